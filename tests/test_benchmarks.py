"""The benchmarks prove themselves on the CPU, and the tables that are printed are what they wrote."""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from harness import ROOT, Running, run, wait_for
from PIL import Image

from benchmarks import card_memory, cards, commands, shares, speed, strategies
from benchmarks.runs import output_dir_of_its_own

IN_FORKS = "subprocess.Popen = Forked"
# What stands in for diffusers' script where that is not at hand: it asks for a release, and logs steps as that does.
STAND_IN = """
import argparse, time
from torch.utils.tensorboard import SummaryWriter
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
args, _ = parser.parse_known_args()
with SummaryWriter(f"{args.output_dir}/logs/dreambooth") as writer:
    for step in range(1, args.max_train_steps + 1):
        time.sleep(0.02)
        writer.add_scalar("loss", 1.0, step)
"""
ASKS = 'check_min_version = lambda release: None\ncheck_min_version("0.29.0")\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("four_h200_batch16", "README.md"),
        ("four_h100_batch8", "README.md"),
        ("four_h100_xl", "benchmarks/NOTES.md"),
    ],
)
def test_the_tables_are_what_was_measured(name, text):
    facts = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
    assert speed.table(facts["rows"], facts["matrix_rate"]) in (ROOT / text).read_text()


def test_speed(tmp_path, monkeypatch, capsys):
    """Table, figures and chart, of a strategy that runs here and one that does not."""
    command = ["benchmarks.speed", "--steps", 4, "--warm_up", 1, "--output", tmp_path / "speed", "--bare"]
    strategies = ["--strategies", "traditional-cuda-no", "low_level_zero-cuda-bf16"]
    done = Running("-m", [*command, *strategies], before=IN_FORKS).wait()
    written = (tmp_path / "speed.md").read_text()
    assert "| traditional, fp32, no cache | 1 | 2 |" in written and written.splitlines()[-1] in done.stdout
    assert "| low_level_zero, cuda, bf16 | 1 | 2 | skipped |" in written
    baseline, cached, skipped = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert baseline["speed_up"] == 1 and len(baseline["seconds_per_step"]) == 4
    ratio = baseline["median_seconds_per_step"] / cached["median_seconds_per_step"]
    assert cached["speed_up"] == ratio and f"| {ratio:.2f} |" in written
    assert max(abs(a - b) for a, b in zip(baseline["losses"], cached["losses"], strict=True)) < 1e-5
    assert len(cached["bare_seconds_per_step"]) == 4 and min(cached["bare_seconds_per_step"]) > 0
    bare = sorted(cached["bare_seconds_per_step"][1:])[1]
    assert f"| {cached['median_seconds_per_step'] / bare - 1:+.1%} |" in written
    assert "needs a CUDA GPU" in skipped["skipped"]
    assert all(row["machine"] and "benchmarks.speed --steps 4" in row["command"] for row in (baseline, cached))
    assert Image.open(tmp_path / "speed.png").width > 500

    more = ["--resume", "--strategies", "traditional-cuda-no", "traditional-cuda-no+gradient_checkpointing"]
    Running("-m", [*command, *more], before=IN_FORKS).wait()
    *earlier, added = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert earlier == [baseline, cached, skipped], "nothing is measured twice"
    assert added["switches"] == ["gradient_checkpointing"] and added["speed_up"] != cached["speed_up"]
    for changed, told in (
        (["--shape", "tiny-v2"], "'model': 'tiny'"),
        (["--steps", 5], "'steps': 4"),
        (["--warm_up", 3], "--steps 4 leaves less than two steps after --warm_up 3"),
    ):
        assert told in refusal(speed, [*command, *more, *changed], monkeypatch, capsys)
    (tmp_path / "speed.json").write_text("{")
    assert "is not what this command writes" in refusal(speed, [*command, *more], monkeypatch, capsys)


def refusal(benchmark, words: list, monkeypatch, capsys) -> str:
    """Returns the line with which a benchmark refuses a command."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_others_have_written_stays(tmp_path, monkeypatch, capsys):
    """A report replaces one of its own kind alone; a model and figures of strategies go where nothing is."""
    mine = {
        "commands.md": "mine",
        "other.json": '{"rows": 1}',
        "figures.json": "mine",
        "model/model_index.json": "mine",
    }
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = ["benchmarks.commands", "--steps", 4, "--only", "colossalai", "--output"]
    for benchmark, words, told in (
        (commands, [*command, tmp_path / "commands"], "nothing tells that it is a table of an earlier run"),
        (commands, [*command, tmp_path / "other"], "other.json is not what this command writes"),
        (strategies, ["benchmarks.strategies", "--json", tmp_path / "figures.json"], "is there: name another file"),
    ):
        assert told in refusal(benchmark, words, monkeypatch, capsys)
    done = run([sys.executable, "-m", "benchmarks.random_model", tmp_path / "model"], check=False)
    assert done.returncode == 2 and "is no empty folder: name a new one" in done.stderr
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(mine)

    words = [*command, tmp_path / "commands", "--resume"]
    assert "nothing tells that it is a table" in refusal(commands, words, monkeypatch, capsys)
    (tmp_path / "speed.png").write_text("mine")
    words = ["benchmarks.speed", "--output", tmp_path / "speed", "--resume"]
    assert "speed.png is there" in refusal(speed, words, monkeypatch, capsys)
    figures = {"title": "a card", "settings": {}, "rows": []}
    (tmp_path / "commands.json").write_text(json.dumps(figures))
    assert "is not the table of" in refusal(commands, [*command, tmp_path / "commands"], monkeypatch, capsys)


def test_strategies(tmp_path):
    """Both scripts, with each precision that runs here, on two ranks that torchrun starts; and one that is refused."""
    names = [
        "torch_ddp-cuda-no",
        "torch_ddp-cuda-bf16",
        "gemini-cpu-bf16",
        "traditional-cuda-no",
        "traditional-cuda-bf16",
    ]
    file = tmp_path / "rows.json"
    command = ["benchmarks.strategies", "--steps", 2, "--nproc", 2, "--json", file, "--only", *names]
    done = Running("-m", command, before=f"{IN_FORKS}; fork_ranks()").wait()
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.endswith(": ran, output loads")] == [
        f"{name}: ran, output loads" for name in names if "gemini" not in name
    ]
    reference, in_bf16, refused, *others = rows = json.loads(file.read_text())
    assert "needs a CUDA GPU" in refused["skipped"] and refused["plugin"] == "gemini"
    for row, difference in ((in_bf16, 1e-2), (others[0], 1e-5), (others[1], 1e-2)):
        assert len(row["losses"]) == len(row["seconds_per_step"]) == 2 and row["gpus"] == 2
        assert row["losses"] == pytest.approx(reference["losses"], abs=difference)
    assert in_bf16["losses"] != reference["losses"]
    assert lines[-len(rows) :] == strategies.table(rows).splitlines()[2:]


def test_cards(tmp_path, monkeypatch, capsys):
    """Whole commands, with what they took beside the estimate; what has been measured is not measured again."""
    command = ["benchmarks.cards", "--steps", 3, "--output", tmp_path / "cards", "--resume", "--only"]
    first, second = "torch_ddp-cuda-bf16-8GB", "gemini-cpu-bf16+gradient_checkpointing+offload_dir-8GB"
    done = Running("-m", [*command, first, second], before=IN_FORKS).wait()
    written = (tmp_path / "cards.md").read_text()
    assert written.partition("\n\n")[2] in done.stdout
    trained, skipped = json.loads((tmp_path / "cards.json").read_text())["rows"]
    assert [trained["name"], skipped["name"]] == [first, second]
    assert len(trained["losses"]) == len(trained["seconds_per_step"]) == 3
    assert trained["whole_s"] > sum(trained["seconds_per_step"]) and trained["peak_gib"] is None
    seconds = sorted(trained["seconds_per_step"][1:])
    assert f"| `torch_ddp cuda` | 1 | 8 | {sum(seconds) / 2:.3f} | {trained['seconds_per_step'][0]:.1f} |" in written
    assert 0 < trained["estimate_host_gib"] < trained["peak_host_memory_gib"] < 3  # without the libraries' files
    assert "needs a CUDA GPU" in skipped["skipped"]

    done = Running("-m", [*command, first], before=IN_FORKS).wait()
    assert json.loads((tmp_path / "cards.json").read_text())["rows"] == [trained, skipped]
    assert "trained and saved" not in done.stdout
    for changed, told in (
        (["--only", "no-such"], "there is no no-such, but torch_ddp-cuda-bf16-8GB, "),
        (["--only", first, "--steps", 4], "'steps': 3"),
        (["--only", first, "--model", tmp_path], "--model: the runs are those that suit a --shape"),
    ):
        assert told in refusal(cards, [*command[:-1], *changed], monkeypatch, capsys)


def parts_of_a_machine(gpus: int) -> list[shares.Share]:
    processes = shares.Processes()
    return [shares.Share((f"GPU-{n}",), (n,), processes) for n in range(gpus)]


@pytest.mark.parametrize("side_by_side", [True, False])
def test_runs_side_by_side_share_no_gpu(side_by_side):
    began, lock, busy, most_busy = [], threading.Lock(), set(), []
    meet = threading.Barrier(2, timeout=10)

    def work(number, share):
        with lock:
            assert not busy & set(share.gpus), "another run has that GPU"
            busy.update(share.gpus)
            began.append((number, len(share.gpus), len(share.cores)))
            most_busy.append(len(busy))
        if number < 2 and side_by_side:
            meet.wait()  # the other is under way too
        time.sleep(0.01)
        with lock:
            busy.difference_update(share.gpus)

    wanted = [1, 1, 4, 2, 1, 1, 1]
    jobs = [shares.Job(gpus, functools.partial(work, number)) for number, gpus in enumerate(wanted)]
    shares.carry_out(jobs, parts_of_a_machine(4), side_by_side=side_by_side)
    assert sorted(began) == [(number, gpus, gpus) for number, gpus in enumerate(wanted)]
    assert [number for number, *_ in began[:3] if number == 2] == [2], "what waits for GPUs is not overtaken"
    assert side_by_side or most_busy == wanted


def test_a_failure_ends_what_runs_beside_it(tmp_path):
    """All that a run has started, too; and no other begins."""
    started = tmp_path / "started"
    sleeps = f"sleep 300 & echo $! > {started}.part; mv {started}.part {started}; sleep 300"
    ran = []

    def fail(share):
        wait_for(started.exists)
        raise ZeroDivisionError

    def sleep(share):
        ran.append(share.run(["bash", "-c", sleeps], 300).returncode)
        share.run(["true"], 300)
        ran.append("another")

    jobs = [shares.Job(1, sleep), shares.Job(1, fail)]
    cores = tuple(os.sched_getaffinity(0))
    parts = [shares.Share((f"GPU-{n}",), cores, processes) for processes in [shares.Processes()] for n in range(2)]
    with pytest.raises(ZeroDivisionError):
        shares.carry_out(jobs, parts, side_by_side=True)
    assert ran in ([-signal.SIGKILL], [128 + signal.SIGKILL]), "the shell, or first what it waited for"
    wait_for(lambda: has_ended(int(started.read_text())))


@pytest.fixture
def peer(tmp_path):
    """diffusers' script, where PEER names one; else what stands in for it."""
    if found := os.environ.get("PEER"):
        return Path(found)
    path = tmp_path / "peer" / "train_dreambooth.py"
    path.parent.mkdir()
    path.write_text(ASKS + STAND_IN)
    return path


def test_commands(peer, tmp_path, monkeypatch, capsys):
    """Both trainers and the peer take turns; what has failed is told, and only that is tried again by --resume."""
    command = ["benchmarks.commands", "--steps", 4, "--only", "colossalai", "traditional"]
    command += ["--output", tmp_path / "commands", "--resume"]
    broken = tmp_path / "broken" / peer.name
    broken.parent.mkdir()
    asked = next(line for line in peer.read_text().splitlines() if line.startswith("check_min_version("))
    broken.write_text(f"check_min_version = print\n{asked}\nraise ImportError('it needs | another release')\n")

    def run(*more) -> tuple[list[dict], str]:
        done = Running("-m", [*command, *more], before=IN_FORKS).wait(check=False)
        written = (tmp_path / "commands.md").read_text()
        assert written.partition("\n\n")[2] in done.stdout
        rows = json.loads((tmp_path / "commands.json").read_text())["rows"]
        failures = [row for row in rows if "failed" in row]
        assert done.returncode == bool(failures), done.stderr
        return rows, written

    (colossalai, traditional, failed), written = run("--peer", broken, "--turns", 1)
    assert "| peer: train_dreambooth.py | 1 | 4 | failed: ImportError: it needs / another release | – |" in written
    assert failed["failed"] == "ImportError: it needs | another release" and "Traceback" in failed["log"]
    for row, script in ((colossalai, "train_dreambooth_colossalai.py"), (traditional, "train_dreambooth.py")):
        assert f" {script} --with_prior_preservation " in row["command"] and row["machine"]
        assert 0 < 4 * row["seconds_per_step"] < row["whole_s"] and row["peak_gib"] is None
        assert row["first_step_s"] > 0 < row["after_steps_s"]
        assert row["first_step_s"] + row["after_steps_s"] < row["whole_s"] + 0.1  # two clocks
        assert f"| {script} | 1 | 4 | {row['seconds_per_step']:.3f} | {row['whole_s']:.1f} |" in written

    rows, written = run("--peer", peer, "--turns", 2)
    assert rows[:2] == [colossalai, traditional], "nothing is measured twice"
    assert [row["turn"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert "accelerate.commands.launch" in rows[2]["command"]
    seconds, whole = (
        [(rows[n][key] + rows[n + 3][key]) / 2 for n in range(3)] for key in ("seconds_per_step", "whole_s")
    )
    first, second, last = written.splitlines()[-3:]
    assert first.endswith(f"| – | {seconds[2] / seconds[0]:.2f} | {whole[2] / whole[0]:.2f} |")
    assert second.endswith(f"| – | {seconds[2] / seconds[1]:.2f} | {whole[2] / whole[1]:.2f} |")
    assert last.endswith("| – | 1.00 | 1.00 |")

    for changed, told in (
        (["--peer", peer, "--steps", 5], "'steps': 4"),
        ([], "'peer': 'for diffusers"),
        (["--turns", 0], "--turns 0 is less than 1"),
        (["--shape", "tiny-xl"], "--only: for this model there is colossalai-lora, "),
        (["--output", tmp_path / "no" / "commands"], f"argument --output: there is no folder {tmp_path / 'no'}"),
        (["--peer", ROOT / "train_dreambooth.py"], "does not call check_min_version"),
        (["--peer", tmp_path / "none.py"], "none.py"),
    ):
        assert told in refusal(commands, [*command, *changed], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("planned", "of_adapters"),
    [(commands.COMMANDS, "train_dreambooth_lora.py"), (commands.COMMANDS_OF_XL, "train_dreambooth_lora_sdxl.py")],
)
def test_work_is_compared_with_the_same_work(planned, of_adapters):
    groups = commands.plan(list(planned), Path("/somewhere/train_dreambooth.py"))
    assert sorted(one.name for group in groups for one in group[:-1]) == sorted(one.name for one in planned)
    for *ours, peers in groups:
        is_lora = any("--lora_rank=16" in one.own for one in ours)
        assert peers.script == f"/somewhere/{of_adapters if is_lora else 'train_dreambooth.py'}"
        assert peers.is_peer and peers.own == (("--rank=16",) if is_lora else ())
        assert all(one.work == peers.work and not one.is_peer for one in ours)
        assert peers.class_images % peers.batch == 0 and 8 <= peers.class_images <= 200
        assert peers.photos >= 5


def test_a_run_finds_its_images_but_those_that_it_is_to_draw(tmp_path):
    """Or their drawing would count as the command's."""
    flags = {"resolution": 32, "output_dir": tmp_path / "out", "instance_data_dir": tmp_path / "photos"}
    for command in commands.COMMANDS:
        commands.words_of(command, flags)
        before = sorted(tmp_path.iterdir())
        with output_dir_of_its_own(flags) as own:
            words = dict(word.split("=", 1) for word in commands.words_of(command, own) if "=" in word)
            assert sorted(set(tmp_path.iterdir()) - {own["output_dir"].parent}) == before
            assert Path(words["--instance_data_dir"]).is_dir()
            assert Path(words["--class_data_dir"]).is_dir() != command.draws
            assert not command.draws or Path(words["--class_data_dir"]).parent == own["output_dir"].parent


def test_a_step_is_timed_where_steps_are_logged_two_at_once():
    ends = [n - n % 2 for n in range(1, 101)]  # seconds
    assert commands.seconds_per_step(ends) == 1
    pause = [end + (30 if n > 80 else 0) for n, end in enumerate(ends)]
    assert commands.seconds_per_step(pause) == 1
    assert commands.seconds_per_step([0, 5, 7, 10]) == 3


def test_why_a_command_failed():
    assert commands.reason("train.py: error: no such folder\nChildFailedError: 1") == "no such folder"
    assert (
        commands.reason("  ValueError\n[rank0]: a.b.OddError: odd\nsubprocess.CalledProcessError")
        == "a.b.OddError: odd"
    )
    assert commands.reason("Errors: none") == ""


def test_memory_of_the_card(tmp_path, monkeypatch):
    """The most less the least of what nvidia-smi says; an answer that is no number counts for nothing."""
    answers = tmp_path / "answers"
    answers.write_text("900\n700\n[N/A]\n2748\n")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nhead -n 1 {answers}; sed -i 1d {answers}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(card_memory, "POLLED_EVERY_S", 0.01)
    with card_memory.CardMemory(["GPU-0"]) as memory:
        while answers.read_text():
            time.sleep(0.01)
    assert memory.peak_gib == 2
    monkeypatch.setenv("PATH", "")
    with card_memory.CardMemory(["GPU-0"]) as memory:
        time.sleep(0.05)
    assert memory.peak_gib is None


def test_a_command_that_takes_too_long_leaves_nothing(tmp_path):
    script = tmp_path / "sleeps.py"
    started = tmp_path / "started"
    script.write_text(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    command = commands.Command("sleeps", "python", str(script), steps=8)
    flags = {"resolution": 32, "output_dir": tmp_path / "out", "instance_data_dir": tmp_path / "photos"}
    ran = commands.run_command(command, *shares.shares(), flags, 3)
    assert ran["failed"] == "not finished after 3 s"
    wait_for(lambda: has_ended(int(started.read_text())))


def has_ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
