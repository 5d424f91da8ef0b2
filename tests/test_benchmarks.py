"""The benchmarks prove themselves on the CPU, and the README's tables are what they wrote."""

import json
import sys

import pytest
from harness import ROOT, Running
from PIL import Image

from benchmarks import speed


def test_the_readme_has_the_table_that_was_measured():
    facts = json.loads((ROOT / "benchmarks" / "h100.json").read_text())
    assert speed.table(facts["rows"], facts["matrix_rate"]) in (ROOT / "README.md").read_text()


def test_speed(tmp_path, monkeypatch, capsys):
    """Table, figures and chart, of a strategy that runs here and one that does not."""
    command = ["benchmarks.speed", "--steps", 4, "--warm_up", 1, "--output", tmp_path / "speed", "--bare"]
    strategies = ["--strategies", "traditional-cuda-no", "low_level_zero-cuda-bf16"]
    in_forks = "subprocess.Popen = Forked"
    done = Running("-m", [*command, *strategies], before=in_forks).wait()
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
    Running("-m", [*command, *more], before=in_forks).wait()
    *earlier, added = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert earlier == [baseline, cached, skipped], "nothing is measured twice"
    assert added["switches"] == ["gradient_checkpointing"] and added["speed_up"] != cached["speed_up"]
    for changed, told in (
        (["--shape", "tiny-v2"], "'model': 'tiny'"),
        (["--steps", 5], "'steps': 4"),
        (["--warm_up", 3], "--steps 4 leaves less than two steps after --warm_up 3"),
    ):
        assert told in refusal([*command, *more, *changed], monkeypatch, capsys)
    (tmp_path / "speed.json").write_text("{")
    assert "is not what this command writes" in refusal([*command, *more], monkeypatch, capsys)


def refusal(words: list, monkeypatch, capsys) -> str:
    """Returns the line with which the benchmark refuses a command."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit) as end:
        speed.main()
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
