"""What is in an output folder, whoever put it there and whatever ends a run: it stays, or is replaced as a whole."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from harness import COLOSSALAI, TRADITIONAL, train, unet_weights, wait_for
from safetensors.torch import load_file

from dreambooth.command_line.console import RunError, UserError
from dreambooth.command_line.flags import Flags, OutputFlags
from dreambooth.command_line.parser import read
from dreambooth.data.schedule import Schedule
from dreambooth.engine.state import Checkpoint
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.pipeline import load_part, load_pipeline
from dreambooth.model.slices import Slice
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.processes.ranks import Ranks
from dreambooth.run import folders, in_place, listing, output
from dreambooth.run.checkpoint import (
    LIBRARIES,
    check_kind,
    check_names,
    check_settings,
    find_checkpoint,
    flag_settings,
    list_checkpoints,
    remove_checkpoints,
)
from dreambooth.run.room import Sizes, room_of

OUTSIDE = json.dumps({"files": {"../mine": asdict(listing.Written(1, 1, ""))}})  # a listing that no run writes
BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])


@pytest.fixture(autouse=True)
def unlocked():
    yield
    folders.unlock()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def a_checkpoint(folder: Path, text: str = "", **state) -> Path:
    files = {"unet/config.json": text, "optimizer.safetensors": text}
    write(folder, files)
    listed = {name: asdict(replace(listing.Written.now(folder / name), mtime_ns=0)) for name in files}
    return write(folder, {"state.json": json.dumps({"written_at": 1.0, "text": text, "files": listed} | state)})


def a_pipeline(folder: Path, text: str, *names: str) -> Path:
    """A small one: each file says which pipeline it is of."""
    names = ("model_index.json", "unet/config.json", *names)
    write(folder, dict.fromkeys(names, text))
    files = {name: asdict(listing.Written.now(folder / name)) for name in names}
    return write(folder, {"dreambooth.json": json.dumps({"files": files, "is": text})})


def enter(output_dir: Path) -> None:
    output.prepare_output_dir(output_dir)


def killed_at_call(number: int, work) -> bool:
    """Does `work` in a fork that dies, as by SIGKILL, at one of the calls that change a folder; says whether."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in ("rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


# What others wrote ---------------------------------------------------------------------------------------------------


@BOTH
def test_what_another_program_wrote_is_neither_replaced_nor_removed(script, flags):
    """Its folders have the names of ours."""
    names = ("unet", "vae", "text_encoder", "checkpoints", "checkpoint-400")
    output_dir = write(flags["output_dir"], {f"{name}/mine.safetensors": "mine" for name in names})
    more = {"max_train_steps": 2, "save_steps": 1, "checkpoints_total_limit": 1}
    before = files_in(output_dir)
    done = train(script, flags | more, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1
    assert "that this program did not write" in done.error_lines[0]
    assert files_in(output_dir) == before
    for name in ("unet", "vae", "text_encoder"):
        shutil.rmtree(output_dir / name)
    train(script, flags | more)
    assert (output_dir / "checkpoint-400" / "mine.safetensors").read_text() == "mine"
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-400"}


def test_only_what_the_listing_names_is_the_pipelines(tmp_path):
    """Of an earlier output each file can have been replaced by something else."""
    for name, found, in_the_way in (
        ("model_index.json", lambda path: path.write_text("{}"), "has a model_index.json that this"),
        ("vae", lambda path: write(path, {"a": ""}), "has a vae that this"),
        ("scheduler", lambda path: path.symlink_to("/nowhere"), "has a scheduler that this"),
        ("tokenizer", lambda path: path.mkdir(), None),
        (
            "dreambooth.json",
            lambda path: path.write_text(OUTSIDE),
            "has a dreambooth.json that this",
        ),
        ("logs", lambda path: path.mkdir(), None),
    ):
        folder = tmp_path / name
        folder.mkdir()
        found(folder / name)
        if in_the_way:
            with pytest.raises(UserError, match=in_the_way):
                enter(folder)
        else:
            enter(folder)
    ours = a_pipeline(tmp_path / "ours", "earlier")
    write(ours, {"unet/notes.txt": "mine"})
    enter(ours)
    for name in ("unet", "unet/config.json"):
        linked = a_pipeline(tmp_path / f"linked {name.replace('/', ' ')}", "earlier")
        (linked / name).rename(linked / "elsewhere")
        (linked / name).symlink_to(linked / "elsewhere")
        with pytest.raises(UserError, match=f"{name} is a link"):
            enter(linked)


def test_a_file_that_was_changed_is_not_ours_any_more(tmp_path):
    """One of another size, one of the same size, and one in whose place a folder is; a copy of all is as good."""
    for name, change in (
        ("longer", lambda file: file.write_text("earlier and merged")),
        ("other", lambda file: file.write_text("EARLIER")),
        ("folder", lambda file: (file.unlink(), file.mkdir(), (file / "mine").touch())),
    ):
        changed = a_pipeline(tmp_path / name, "earlier")
        change(changed / "unet/config.json")
        with pytest.raises(UserError, match="unet/config.json is not as this program has written it: move it away"):
            enter(changed)
        # And one that changes while a run trains: the new pipeline stays beside it.
        before = files_in(changed)
        staged = a_pipeline(changed / "pipeline-step-4", "new")
        with pytest.raises(OSError, match="unet/config.json was changed meanwhile"):
            in_place.put_in_place(staged, changed)
        assert {file: body for file, body in files_in(changed).items() if not file.startswith("pipeline-")} == before
    ours = a_pipeline(tmp_path / "ours", "earlier")
    (ours / "unet/config.json").unlink()  # of which nothing can be lost
    enter(ours)
    copy = shutil.copytree(a_pipeline(tmp_path / "moved", "earlier"), tmp_path / "copy", copy_function=shutil.copy)
    os.utime(copy / "unet/config.json", (1, 1))
    enter(copy)


def test_a_large_file_is_known_by_the_digest_of_its_parts(tmp_path, monkeypatch):
    """As by that of the whole, which earlier versions have written."""
    path, content = tmp_path / "model.safetensors", bytes(range(250))
    path.write_bytes(content)
    assert listing.digest_of(path) == hashlib.sha256(content).hexdigest()
    parts = [hashlib.sha256(content[begin : begin + 100]).digest() for begin in (0, 100, 200)]
    assert listing.digest_of(path, part=100) == hashlib.sha256(b"".join(parts)).hexdigest()
    monkeypatch.setattr(listing.digest_of, "__defaults__", (100,))
    ours = listing.Written.now(path)
    assert ours.sha256 == listing.digest_of(path, part=100)
    earlier = replace(ours, sha256=hashlib.sha256(content).hexdigest())
    os.utime(path, (1, 1))
    assert ours.is_still(path) and earlier.is_still(path)
    by_size = listing.Written.now(path, read_up_to=len(content) - 1)
    assert by_size.sha256 is None and listing.Written.now(path, read_up_to=len(content)).sha256 == ours.sha256
    path.write_bytes(content[:-1] + b"x")
    assert by_size.is_still(path)
    assert not ours.is_still(path) and not earlier.is_still(path)
    path.write_bytes(b"")
    assert not by_size.is_still(path) and listing.digest_of(path) == hashlib.sha256().hexdigest()


def test_a_checkpoint_that_is_not_ours_is_not_written_over(tmp_path):
    for name, make, problem in (
        ("file", lambda path: path.touch(), "was not written by this program"),
        ("other", lambda path: write(path, {"trainer_state.json": "{}"}), "was not written by this program"),
        ("link", lambda path: path.symlink_to(a_checkpoint(tmp_path / "elsewhere")), "checkpoint-4 is a link"),
        ("with notes", lambda path: write(a_checkpoint(path), {"notes.txt": ""}), "such as notes.txt"),
        ("notes inside", lambda path: write(a_checkpoint(path), {"unet/sub/n.txt": ""}), "such as unet/sub/n.txt"),
        ("hidden", lambda path: write(a_checkpoint(path), {".notes": ""}), "such as .notes"),
        ("linked", lambda path: (a_checkpoint(path) / "unet/link").symlink_to(tmp_path), "such as unet/link"),
        ("edited", lambda path: write(a_checkpoint(path), {"unet/config.json": "mine"}), "unet/config.json is not"),
        ("earlier", lambda path: a_checkpoint(path, files=None), "does not list its files, as those of earlier"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        make(folder / "checkpoint-4")
        with pytest.raises(UserError, match=problem):
            check_names(folder, 0, 4)
        check_names(folder, 4, 8)
        check_names(folder, 0, 3)
        before = files_in(folder)
        remove_checkpoints([folder / "checkpoint-4"])
        assert files_in(folder) == before and (folder / "checkpoint-4").exists()
    ours = a_checkpoint(tmp_path / "ours" / "checkpoint-4")
    check_names(ours.parent, 0, 4)
    remove_checkpoints([ours])
    assert not list(ours.parent.iterdir())


@pytest.mark.parametrize("change", [{"staged": ".."}, {"staged": "../other"}, {"new": ["a", "../b"]}, {"new": None}])
def test_a_note_of_a_change_leads_nowhere_else(change, tmp_path):
    """It may come with a folder of somebody else's."""
    output_dir, note = tmp_path / "out", {"staged": "pipeline-step-1", "new": ["model_index.json", "a"], "earlier": []}
    write(output_dir, {"a": "1", ".pipeline.0123abcd.aside/change.json": json.dumps(note | change)})
    before = files_in(tmp_path)
    enter(output_dir)
    assert files_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as two users")
def test_what_another_user_has_written_is_found_before_training():
    with tempfile.TemporaryDirectory() as name:  # others may enter it, unlike pytest's own
        output_dir = a_pipeline(Path(name, "out"), "earlier")
        Path(name).chmod(0o755)
        output_dir.chmod(0o777)
        os.seteuid(65534)
        try:
            with pytest.raises(UserError, match="no permission to replace what is in .*/out/unet"):
                enter(output_dir)
        finally:
            os.seteuid(0)
        enter(output_dir)
        folders.unlock()


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    """As some of virtual machines; that a file is on the disk has to be known."""
    flush = os.fsync

    def fsync(number: int) -> None:
        if refused(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr("os.fsync", fsync)
    for refused in (stat.S_ISDIR, stat.S_ISREG):
        with contextlib.suppress(RunError), folders.written_whole(tmp_path / refused.__name__, 0) as folder:
            write(folder, {"a": "1"})
    assert set(files_in(tmp_path)) == {"S_ISDIR/a"}


def test_only_half_written_folders_of_ours_are_removed(tmp_path):
    theirs = write(tmp_path, {".cache.partial/a": "", ".checkpoint-3.0123abcd.partial/a": "", ".x.aside/a": ""})
    before = files_in(theirs)
    enter(tmp_path)
    assert files_in(tmp_path) == before
    with pytest.raises(ZeroDivisionError), folders.written_whole(tmp_path / "checkpoint-3", 0):
        raise ZeroDivisionError
    assert files_in(tmp_path) == before
    with pytest.raises(KeyboardInterrupt), folders.written_whole(tmp_path / "checkpoint-3", 0):
        raise KeyboardInterrupt  # leaves it
    assert len(files_in(tmp_path)) == len(before) + 1
    enter(tmp_path)
    assert files_in(tmp_path) == before


@BOTH
def test_a_second_run_replaces_its_own_files_alone(script, flags, tiny_model):
    """Nothing of them is private to their owner, or names a folder of this machine; what a user adds, stays."""
    output_dir = flags["output_dir"]
    flags |= {"max_train_steps": 2, "save_steps": 2, "external_unet_path": tiny_model / "unet"}
    train(script, flags)
    listing = json.loads((output_dir / "dreambooth.json").read_text())
    assert listing["step"] == 2 and listing["settings"]["seed"] == 1 and listing["base_model"] is None
    parts = [output_dir / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
    written = {str(path.relative_to(output_dir)) for part in parts for path in part.iterdir()}
    assert {*listing["files"]} == written | {"model_index.json"}
    mine = {"unet/notes.txt": "mine", "samples/1.txt": "mine", "README.md": "mine"}
    write(output_dir, mine)
    first = unet_weights(output_dir / "unet")
    done = train(script, flags | {"seed": 2})
    assert f"{output_dir} has a pipeline of step 2, written 2" in done.stdout
    assert any(not torch.equal(tensor, first[name]) for name, tensor in unet_weights(output_dir / "unet").items())
    assert {name: (output_dir / name).read_text() for name in mine} == mine
    assert not list(output_dir.glob(".*")) and not list(output_dir.glob("pipeline*"))
    for path in output_dir.rglob("*"):
        everybody = (0o777 if path.is_dir() else 0o666) & ~folders.umask()
        assert stat.S_IMODE(path.stat().st_mode) == everybody, path
        if path.suffix == ".json":
            text = path.read_text()
            assert "name_or_path" not in text and str(tiny_model) not in text and str(output_dir.parent) not in text


# Whatever ends a run -------------------------------------------------------------------------------------------------


def test_files_go_to_the_disk_while_others_are_written(tmp_path, monkeypatch):
    """And not all at the end; what the disk says of them then is told, since it says so once."""
    old = write(tmp_path / "checkpoint-3", {"weights": "old"})
    flushed, flush = threading.Event(), folders.flush

    def flush_and_tell(path: Path) -> None:
        flush(path)
        if path.name == "first":
            flushed.set()

    monkeypatch.setattr(folders, "flush", flush_and_tell)
    with folders.written_whole(tmp_path / "checkpoint-2", 0) as partial:
        write(partial, {"first": "weights"})
        assert flushed.wait(20)

    def fail_once(path: Path) -> None:
        if path.name == "first" and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    failed = threading.Event()
    monkeypatch.setattr(folders, "flush", fail_once)
    with pytest.raises(RunError, match="Input/output error"), folders.written_whole(old, 0) as partial:
        write(partial, {"first": "weights"})
        assert failed.wait(20)
    assert files_in(tmp_path) == {"checkpoint-2/first": b"weights", "checkpoint-3/weights": b"old"}


@pytest.mark.parametrize("place", ["among the files", "around the folder"])
def test_where_the_disk_fails_at_the_end_what_was_there_is_back(place, tmp_path, monkeypatch):
    """Also when the new folder has its name already, and only that may not be on the disk."""
    old = write(tmp_path / "checkpoint-3", {"weights": "old"})
    flush = folders.flush

    def fail(path: Path) -> None:
        if path == tmp_path if place == "around the folder" else path.name == "weights":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(path)

    monkeypatch.setattr(folders, "flush", fail)
    with pytest.raises(RunError, match="Input/output error"), folders.written_whole(old, 0) as partial:
        write(partial, {"weights": "new"})
    assert files_in(tmp_path) == {"checkpoint-3/weights": b"old"}


def test_an_interrupt_does_not_wait_for_what_is_removed(tmp_path, monkeypatch):
    """Nor for a thread that nobody tells to end, if it comes just as that has begun."""
    flushed, submit = [], ThreadPoolExecutor.submit

    def slow(path: Path) -> None:
        flushed.append(path)
        time.sleep(0.5)

    def interrupted(pool: ThreadPoolExecutor, work: Callable) -> None:
        submit(pool, work)
        raise KeyboardInterrupt

    def write_nothing() -> None:
        with pytest.raises(KeyboardInterrupt), folders.written_whole(tmp_path / "checkpoint-4", 0):
            pass

    monkeypatch.setattr(folders, "flush", slow)
    with pytest.raises(KeyboardInterrupt), folders.written_whole(tmp_path / "checkpoint-3", 0) as partial:
        write(partial, {str(number): "weights" for number in range(20)})
        wait_for(lambda: flushed)
        raise KeyboardInterrupt
    assert len(flushed) < 10
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    writes = threading.Thread(target=write_nothing, daemon=True)
    writes.start()
    writes.join(20)
    assert not writes.is_alive()


def test_killed_at_any_moment_one_checkpoint_of_the_name_is_whole(tmp_path):
    old = files_in(a_checkpoint(tmp_path / "old", "old"))
    new = files_in(a_checkpoint(tmp_path / "new", "new"))
    for number in range(1, 100):
        output_dir = tmp_path / str(number)
        folder = a_checkpoint(output_dir / "checkpoint-4", "old")

        def save(folder=folder):
            with folders.written_whole(folder, 0) as partial:
                a_checkpoint(partial, "new")

        killed = killed_at_call(number, save)
        enter(output_dir)
        folders.unlock()
        (found,) = output_dir.iterdir()
        assert found == folder
        kept = files_in(folder)
        kept.pop(".dreambooth", None)
        assert kept == new or (killed and kept == old)
        assert list_checkpoints(output_dir) == [folder]
        if not killed:
            break
    assert number > 5  # in Python 3.10; more later, where pathlib calls more of what is counted


def test_killed_at_any_moment_both_pipelines_are_whole(tmp_path):
    """That of the run, wherever it is, and the earlier one, until the new one is in its place."""

    def of(folder: Path) -> str | None:
        """Which pipeline is whole in a folder, and no other."""
        if not (folder / "model_index.json").exists():
            return None
        files = output.pipeline_files(folder)
        (one,) = {
            json.loads((folder / "dreambooth.json").read_text())["is"],
            *((folder / n).read_text() for n in files),
        }
        return one

    seen = set()
    for number in range(1, 200):
        output_dir = a_pipeline(tmp_path / str(number), "earlier", "vae/config.json", "safety_checker/config.json")
        write(output_dir, {"unet/notes.txt": "mine", "checkpoint-2/state.json": "{}"})
        staged = a_pipeline(output_dir / "pipeline-step-4", "new", "vae/config.json", "vae/more.json")
        killed = killed_at_call(number, lambda output_dir=output_dir, s=staged: in_place.put_in_place(s, output_dir))
        enter(output_dir)
        folders.unlock()
        names = {path.name for path in output_dir.iterdir()}
        seen.add(of(output_dir))
        assert not any(name.startswith(".") for name in names)
        assert (output_dir / "unet" / "notes.txt").read_text() == "mine"
        if of(output_dir) == "earlier":
            assert killed and of(staged) == "new" and len(files_in(output_dir)) == 5 + 2 + 5
        else:
            assert of(output_dir) == "new" and not files_in(output_dir).keys() & {"safety_checker/config.json"}
            assert names <= {"model_index.json", "dreambooth.json", "unet", "vae", "checkpoint-2"}
        if not killed:
            break
    assert seen == {"earlier", "new"} and number > 15


@dataclass
class Untrained:
    """A `Training` of no steps."""

    denoiser: Denoiser

    def weights(self) -> list[Slice]:
        return [piece.slice_of(piece.shard.tensor) for piece in self.denoiser.trained.pieces()]


@pytest.fixture
def save_into(tiny_model):
    """Returns a function that saves an untrained pipeline into a folder."""
    training = Untrained(Denoiser(STABLE_DIFFUSION, unet=load_part(STABLE_DIFFUSION, "unet", tiny_model)))
    load, alone = functools.partial(load_pipeline, tiny_model), Ranks(0, 1, torch.device("cpu"))

    def save(folder: Path, base: str | None = None) -> None:
        output.save_pipeline(folder, load, training, alone, size=2**20, step=4, base=base, settings={})

    save.training = training
    return save


def test_a_pipeline_that_cannot_be_put_in_place_is_whole_elsewhere(save_into, tmp_path):
    """Something has come in its way during the run: a file, then a link. No later run removes it."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    save_into(output_dir)
    listing = json.loads((output_dir / "dreambooth.json").read_text())
    del listing["files"]["vae/config.json"]  # as if it were a user's
    (output_dir / "dreambooth.json").write_text(json.dumps(listing))
    earlier, staged = files_in(output_dir), output_dir / "pipeline-step-4"
    with pytest.raises(RunError, match=rf"vae/config.json is there.*; it is whole in {staged}$"):
        save_into(output_dir)
    assert {name: body for name, body in files_in(output_dir).items() if "pipeline-step-" not in name} == earlier
    StableDiffusionPipeline.from_pretrained(output_dir)
    (output_dir / "vae").rename(tmp_path / "vae")
    (output_dir / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(RunError, match=rf"vae is a link; it is whole in {staged}-2$"):
        save_into(output_dir)
    assert len(list((tmp_path / "vae").iterdir())) == 2
    (output_dir / "vae").unlink()
    enter(output_dir)
    for kept in (staged, output_dir / "pipeline-step-4-2"):
        StableDiffusionPipeline.from_pretrained(kept)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_reach_no_file(broken, save_into, tmp_path):
    save_into.training.denoiser.unet.conv_in.bias.data[0] = broken
    with pytest.raises(RunError, match="not finite, in unet.conv_in.bias: they are not saved"):
        save_into(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_both_reasons_are_told(save_into, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(RunError, match=r"cannot write /proc/out/pipeline-step-4.*; cannot write /proc/nowhere/"):
        save_into(Path("/proc/out"))


DISK, REST = OSError("the disk is gone"), output.NoRest("the model is gone")


@pytest.mark.parametrize(
    ("faults", "kept_in"), [([DISK, REST], "temporary"), ([REST, DISK], "temporary"), ([REST], "out")]
)
def test_what_was_trained_survives_what_fails_beside_it(faults, kept_in, tmp_path, monkeypatch):
    """The disk, and the rest of the pipeline, one after the other."""
    for name in ("out", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    coming = iter(faults)

    def write_files(folder: Path, *, whole: bool) -> None:
        (folder / "unet").write_text("trained")
        if fault := next(coming, None):
            raise fault
        assert not whole

    told = {"size": 1, "step": 4, "base": None, "settings": {}}
    with pytest.raises(RunError, match=f"{faults[0]}.*what was trained is in {tmp_path / kept_in}/") as error:
        output._save(tmp_path / "out", write_files, "pipeline", **told)
    assert all(str(fault) in str(error.value) for fault in faults)
    (kept,) = (path for path in (tmp_path / kept_in).iterdir())
    assert (kept / "unet").read_text() == "trained" and str(error.value).endswith(str(kept))


def test_the_index_names_a_model_of_the_hub(save_into, tmp_path):
    save_into(tmp_path, "someone/tiny")
    named = {name for name, body in files_in(tmp_path).items() if b"_name_or_path" in body}
    assert named == {"model_index.json"}
    assert json.loads((tmp_path / "model_index.json").read_text())["_name_or_path"] == "someone/tiny"
    assert json.loads((tmp_path / "dreambooth.json").read_text())["base_model"] == "someone/tiny"


# The lock ------------------------------------------------------------------------------------------------------------


def is_free(folder: Path) -> bool:
    """Whether another process could lock a folder."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def test_a_lock_ends_with_the_process_whatever_its_workers_do(tmp_path):
    receiver, sender = os.pipe()
    run = os.fork()
    if run == 0:
        folders.lock(tmp_path)
        folders.lock(tmp_path)
        worker = os.fork()
        if worker == 0:
            os.write(sender, f"{os.getpid()}".encode())
            time.sleep(60)
            os._exit(0)
        os.waitpid(worker, 0)
        os._exit(0)
    worker = int(os.read(receiver, 10))
    assert not is_free(tmp_path)
    with pytest.raises(UserError, match="another run writes into it"):
        folders.lock(tmp_path)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    free = is_free(tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert free
    folders.lock(tmp_path)
    assert not is_free(tmp_path)
    folders.unlock()
    assert is_free(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    folders.lock(tmp_path)
    folders.lock(tmp_path)
    assert capsys.readouterr().err.count("its file system has no locks (Operation not supported)") == 1


# Resuming ------------------------------------------------------------------------------------------------------------


@BOTH
def test_a_run_may_go_on_for_longer(script, flags, photos, tmp_path, monkeypatch):
    """By the name of its checkpoint, with the same photos by another path; to the bit as if it had been so long."""
    flags |= {"save_steps": 2, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3}
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    train(script, flags | {"max_train_steps": 4, "output_dir": whole})
    (tmp_path / "photos").symlink_to(photos)
    train(script, flags | {"max_train_steps": 2, "output_dir": longer})
    more = {"resume_from_checkpoint": "checkpoint-2", "instance_data_dir": tmp_path / "photos", "max_train_steps": 4}
    done = train(script, flags | more | {"output_dir": longer})
    assert "not as it would have" not in done.stderr
    for one, other in (
        (unet_weights(whole / "unet"), unet_weights(longer / "unet")),
        tuple(load_file(folder / "checkpoint-4" / "optimizer.safetensors") for folder in (whole, longer)),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    UNet2DConditionModel.from_pretrained(longer / "checkpoint-2" / "unet")
    done = train(script, flags | more | {"max_train_steps": 1, "output_dir": longer}, check=False)
    assert done.returncode == 2 and "nothing is left to train, it has 2 steps and the run 1" in done.error_lines[0]


def settings_of(*words: str, steps: int = 8) -> dict:
    flags = read(Flags, ["--pretrained_model_name_or_path", "m", *words])
    return flag_settings(flags, Schedule(2, 1, steps), seed=1, precision="no", resolution=512)


def a_read_checkpoint(settings: dict) -> Checkpoint:
    settings = json.loads(json.dumps(settings))
    return Checkpoint(Path("checkpoint-4"), 0.0, 4, 4, {}, {}, settings, dict.fromkeys(LIBRARIES, "1"))


PRIOR = ("--with_prior_preservation", "--class_data_dir", "c", "--class_prompt", "a dog")


@pytest.mark.parametrize(
    "words",
    [
        ["--gradient_checkpointing"],
        ["--output_dir", "x", "--logging_dir", "y", "--instance_data_dir", "./d"],
        ["--pretrained_model_name_or_path", "./m", "--revision", "main", "--external_unet_path", "u"],
        ["--num_class_images", "7"],  # of which there are none
        ["--save_steps", "3", "--compile", "--cache_latents", "off", "--dataloader_num_workers", "1"],
        ["--lr_warmup_steps", "3", "--lr_power", "2", "--lr_num_cycles", "2"],  # of other schedulers
    ],
)
def test_what_changes_no_number_is_free(words):
    check_settings(a_read_checkpoint(settings_of()), settings_of(*words), resume_anyway=False)


@pytest.mark.parametrize(
    ("both", "word", "named"),
    [
        ((), ["--learning_rate", "1e-3"], "learning_rate was 5e-06 and is 0.001"),
        ((), ["--noise_offset", "0.1"], "noise_offset was 0.0 and is 0.1"),
        (PRIOR, ["--num_class_images", "7"], "num_class_images was 100 and is 7"),
        ((), ["--adam_beta2", "0.9"], "adam_beta2 was 0.999 and is 0.9"),
        (["--lr_scheduler", "polynomial"], ["--lr_power", "2"], "lr_power was 1.0 and is 2.0"),
    ],
)
def test_what_changes_numbers_is_named(both, word, named):
    earlier, now = settings_of(*both), settings_of(*both, *word)
    with pytest.raises(UserError, match=named):
        check_settings(a_read_checkpoint(earlier), now, resume_anyway=False)
    # Before there was the flag it was as its default is.
    earlier.pop(named.split()[0])
    with pytest.raises(UserError, match=named):
        check_settings(a_read_checkpoint(earlier), now, resume_anyway=False)
    check_settings(a_read_checkpoint(earlier), settings_of(*both), resume_anyway=False)


def test_what_scales_adapters_counts_whether_a_flag_says_it_or_not():
    rank, alpha = ("--lora_rank", "4"), ("--lora_alpha", "4")
    for earlier, now in (((), alpha), (alpha, ())):
        check_settings(a_read_checkpoint(settings_of(*rank, *earlier)), settings_of(*rank, *now), resume_anyway=False)
    before = settings_of(*rank) | {"lora_alpha": None}  # as it was once written
    check_settings(a_read_checkpoint(before), settings_of(*rank), resume_anyway=False)
    with pytest.raises(UserError, match="lora_alpha was 4 and is 8.0"):
        check_settings(a_read_checkpoint(before), settings_of(*rank, "--lora_alpha", "8"), resume_anyway=False)


def test_tf32_counts_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="allow_tf32 was False and is True"):
        check_settings(a_read_checkpoint(settings_of()), settings_of("--allow_tf32"), resume_anyway=False)


def test_other_numbers_of_steps():
    for course, steps, refused in (
        ("constant", 12, None),
        ("constant_with_warmup", 6, None),
        ("constant", 3, "nothing is left to train"),
        ("cosine", 12, "steps was 8 and is 12"),
        ("cosine", 3, "nothing is left to train"),
    ):
        checkpoint = a_read_checkpoint(settings_of("--lr_scheduler", course))
        settings = settings_of("--lr_scheduler", course, steps=steps)
        if refused is None:
            check_settings(checkpoint, settings, resume_anyway=False)
            continue
        with pytest.raises(UserError, match=refused):
            check_settings(checkpoint, settings, resume_anyway=False)


def test_a_checkpoint_elsewhere_says_nothing_of_those_in_the_folder(tmp_path):
    """Which a run of adapters that goes on from it would replace or remove, though they are of whole models."""
    a_checkpoint(tmp_path / "out" / "checkpoint-2")
    elsewhere = a_checkpoint(tmp_path / "elsewhere" / "checkpoint-4")
    for wanted in (None, str(elsewhere)):
        with pytest.raises(UserError, match="has checkpoint-2 of a run without --lora_rank"):
            check_kind(OutputFlags(output_dir=str(tmp_path / "out"), resume_from_checkpoint=wanted), adapters=True)
    for wanted in ("latest", "checkpoint-2", str(tmp_path / "out" / "checkpoint-2")):
        check_kind(OutputFlags(output_dir=str(tmp_path / "out"), resume_from_checkpoint=wanted), adapters=True)


def test_checkpoints_by_their_names(tmp_path, monkeypatch):
    """A path comes before a name in the output folder; another program's is told apart."""
    monkeypatch.chdir(tmp_path)

    def find(wanted: str) -> Checkpoint | None:
        return find_checkpoint(wanted, tmp_path / "out")

    for folder in ("out/checkpoint-400", "out/checkpoint-9", "elsewhere/checkpoint-4"):
        write(tmp_path / folder, {"optimizer.bin": "", "random_states_0.pkl": "", "unet/config.json": "{}"})
    assert find("latest") is None
    for wanted, named in (
        ("checkpoint-9", "out/checkpoint-9/unet"),
        ("elsewhere/checkpoint-4", "elsewhere/checkpoint-4/unet"),
    ):
        with pytest.raises(UserError, match=f"optimizer.bin: --external_unet_path .*{named} starts a run"):
            find(wanted)
    with pytest.raises(UserError, match="checkpoint-5 is not a whole checkpoint: there is no such folder"):
        find("checkpoint-5")
    a_checkpoint(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match="resume_from_checkpoint: checkpoint-9 is not a whole checkpoint"):
        find("checkpoint-9")


# Room ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("existing", "flags", "steps", "first_step", "needed"),
    [
        # In thousands of bytes: a checkpoint takes 12, the pipeline 20.
        ({}, {}, 8, 0, 4 * 12 + 20),
        ({}, {"checkpoints_total_limit": 2}, 8, 0, 2 * 12 + 20),
        ({}, {"checkpoints_total_limit": 9, "save_steps": 9}, 8, 0, 20),
        ({2: 12, 4: 12}, {}, 8, 2, 2 * 12 + 20),  # one of three is there
        ({2: 50, 4: 50}, {"checkpoints_total_limit": 2}, 8, 4, 12),  # the first one comes before larger ones go
        ({2: 12}, {"checkpoints_total_limit": 1, "save_steps": 8}, 8, 2, 20),
        ({}, {"save_steps": 1}, 10**9, 0, 100_000 * 12 + 20),
    ],
)
def test_the_most_that_is_there_at_a_time(existing, flags, steps, first_step, needed, tmp_path):
    for step, size in existing.items():
        folder = a_checkpoint(tmp_path / f"checkpoint-{step}", written_at=step)
        missing = 1000 * size - sum(map(len, files_in(folder).values()))
        (folder / "optimizer.safetensors").write_bytes(bytes(missing))
    flags = OutputFlags(output_dir=str(tmp_path), **{"save_steps": 2} | flags)
    room = room_of(flags, Schedule(1, 1, steps), Sizes(checkpoint=12_000, pipeline=20_000), first_step=first_step)
    assert room.needed == 1000 * needed


def test_moments_in_8_bits_take_half_a_checkpoint():
    parts = {"unet": torch.nn.Linear(999, 1), "vae": torch.nn.Linear(3999, 1)}
    assert Sizes.of(parts, ["unet"], use_8bit_adam=False) == Sizes(checkpoint=12_000, pipeline=20_000)
    assert Sizes.of(parts, ["unet"], use_8bit_adam=True) == Sizes(checkpoint=6_000, pipeline=20_000)
