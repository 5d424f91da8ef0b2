"""--offload_dir: weights and optimizer state in files without names, which leave nothing however a run ends."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from harness import Running, command_line, small_disk, train, unet_weights, wait_for
from safetensors.torch import load_file

from dreambooth.command_line.colossalai_flags import ColossalAIFlags, StrategyFlags
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import ModelFlags
from dreambooth.engine import disk
from dreambooth.engine.disk import DiskMemory, check_folder, file_system, unnamed_file
from dreambooth.engine.strategy import choose_strategy
from dreambooth.processes.ranks import Ranks
from dreambooth.run import room

SCRIPT = "tests/sharding_on_cpu.py"
STRATEGIES = {
    "low_level_zero": {"plugin": "low_level_zero", "placement": "cpu", "mixed_precision": "fp16"},
    "gemini": {"plugin": "gemini", "placement": "cpu", "mixed_precision": "bf16"},
}
STEPS = 12
OTHERS_FILES = {"notes.txt": b"mine", ".dreambooth.0123456789abcdef.offload": b"not empty", ".hidden": b""}
each = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture
def folder(tmp_path):
    """A folder on a disk, in which a user has files."""
    if file_system(tmp_path) in (*disk.IN_MEMORY, *disk.NETWORK):
        pytest.skip("the folder of temporary files is on no disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    for name, content in OTHERS_FILES.items():
        (folder / name).write_bytes(content)
    return folder


def assert_as_it_was(folder) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == OTHERS_FILES


@pytest.fixture
def short(tiny_model, photos):
    return {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": photos,
        "instance_prompt": "a sks dog",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "seed": 1,
    }


@pytest.fixture
def in_memory(short, once):
    """Returns a function that runs a strategy on two ranks in ordinary memory: the output folder."""

    def run(strategy: str):
        def make(folder):
            train(SCRIPT, short | STRATEGIES[strategy] | {"output_dir": folder / "out"}, nproc=2)

        return once(f"in-memory-{strategy}", make) / "out"

    return run


def assert_same(output_dir, other) -> None:
    for file in ("optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        here, there = (load_file(run / f"checkpoint-{STEPS}" / file) for run in (output_dir, other))
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)


@each
def test_a_run_is_the_same_to_the_bit_and_leaves_nothing(strategy, short, in_memory, folder, tmp_path):
    """In pieces that go back and forth, a hundred for each rank."""
    script = tmp_path / "in_small_pieces.py"
    lines = "from dreambooth.engine import offload\noffload.PIECE = 1024"
    script.write_text(f"import sharding_on_cpu\n{lines}\nsharding_on_cpu.main()\n")
    flags = short | STRATEGIES[strategy] | {"output_dir": tmp_path / "out", "offload_dir": folder}
    done = train(str(script), flags, nproc=2)
    assert f"1.2 MiB of each process in {folder}, a disk that writes " in done.stdout
    assert_same(tmp_path / "out", in_memory(strategy))
    assert_as_it_was(folder)


@each
def test_a_run_that_is_killed_leaves_nothing_and_goes_on_to_the_bit(strategy, short, in_memory, folder, tmp_path):
    more = {"output_dir": tmp_path / "out", "offload_dir": folder, "resume_from_checkpoint": "latest"}
    argv = command_line(short | STRATEGIES[strategy] | more)
    run = Running(SCRIPT, argv, nproc=2)
    wait_for((tmp_path / "out" / "checkpoint-3").is_dir)
    run.send(signal.SIGKILL)
    run.wait(check=False)
    assert_as_it_was(folder)
    done = Running(SCRIPT, argv, nproc=2).wait()
    assert f"{STEPS}/{STEPS} [" in done.stderr and f"0/{STEPS} [" not in done.stderr.replace(f"10/{STEPS}", "")
    assert_same(tmp_path / "out", in_memory(strategy))
    assert_as_it_was(folder)


# Where a file system has no files without names, and a process is killed before it has removed one.
KILLED_WITH_A_NAME = """
import errno, os, signal
from pathlib import Path
open_as_ever = os.open
def open_with_a_name(path, flags, *args, **settings):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return open_as_ever(path, flags, *args, **settings)
os.open = open_with_a_name
unlink = Path.unlink
def killed(path, *args, **settings):
    if path.name.endswith(".offload"):
        {}
    unlink(path, *args, **settings)
Path.unlink = killed
"""


def test_what_a_killed_start_has_left_goes_at_the_next(short, folder, tmp_path):
    argv = command_line(
        short | STRATEGIES["gemini"] | {"output_dir": tmp_path / "out", "offload_dir": folder, "max_train_steps": 1}
    )
    before = KILLED_WITH_A_NAME.format("os.kill(os.getpid(), signal.SIGKILL)")
    assert Running(SCRIPT, argv, before=before).wait(check=False).returncode != 0
    (left,) = {path.name for path in folder.iterdir()} - OTHERS_FILES.keys()
    assert disk.NAME.fullmatch(left) and not (folder / left).stat().st_size
    Running(SCRIPT, argv, before=KILLED_WITH_A_NAME.format("pass")).wait()
    assert_as_it_was(folder)
    assert unet_weights(tmp_path / "out" / "unet")


# What may be wrong with a disk: lines that a process executes first, and what it says.
def _limited(folder) -> str:
    return "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"


def _full(folder, size: str = "1m") -> str:
    return small_disk(folder, size) + "from dreambooth.engine import disk\ndisk.IN_MEMORY = ()\n"


def _read_only(folder) -> str:
    mounted = small_disk(folder, "1m")
    return mounted + f"subprocess.run(['mount', '-o', 'remount,ro', {str(folder)!r}], check=True)\n"


def _in_memory(folder) -> str:
    return small_disk(folder, "100m")


def _not_there(folder) -> str:
    return f"import shutil; shutil.rmtree({str(folder)!r})"


DISKS = {
    "files are limited": (_limited, "each process needs 2.3 MiB there, and .* are free: .*File too large"),
    "full": (_full, "each process needs 2.3 MiB there, and 1.0 MiB are free: .*No space left on device"),
    "read-only": (_read_only, "cannot be used: no permission to read and write"),
    "in memory": (_in_memory, r"is in memory \(tmpfs\), which it is to spare: name a folder on a disk"),
    "not there": (_not_there, "is not a folder: make it, on a disk of this machine"),
}


@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_that_cannot_serve_is_told_in_a_line_before_class_images_are_made(kind, short, folder, tmp_path):
    prepare, told = DISKS[kind]
    prior = {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class_images"}
    flags = short | prior | STRATEGIES["low_level_zero"]
    flags |= {"output_dir": tmp_path / "out", "offload_dir": folder}
    done = Running(SCRIPT, command_line(flags), before=prepare(folder)).wait(check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert f"error: --offload_dir {folder}" in done.error_lines[0]
    assert re.search(told, done.error_lines[0]), done.error_lines
    assert not (tmp_path / "class_images").exists() and "Traceback" not in done.stderr
    if kind != "not there":
        assert_as_it_was(folder)


def test_a_rank_that_gets_no_room_ends_all(short, folder, tmp_path):
    """Rank 1 alone may not write large files."""
    limit = "import os\nif os.environ['RANK'] == '1':\n    " + _limited(folder)
    flags = short | STRATEGIES["gemini"] | {"output_dir": tmp_path / "out", "offload_dir": folder}
    done = Running(SCRIPT, command_line(flags), nproc=2, before=limit).wait(check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert "needs 1.2 MiB there" in done.error_lines[0] and "File too large" in done.error_lines[0]


def test_ranks_look_for_room_for_all_of_them(short, folder, tmp_path):
    """For one of the two there would be room."""
    flags = short | STRATEGIES["gemini"] | {"output_dir": tmp_path / "out", "offload_dir": folder}
    before = _full(folder, "2m") + "import os\nos.posix_fallocate = lambda *arguments: os._exit(1)\n"
    done = Running(SCRIPT, command_line(flags), nproc=2, before=before).wait(check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1, done.stderr
    assert "needs 1.2 MiB there, and 2.0 MiB are free: No space left on device" in done.error_lines[0]


def test_a_disk_of_another_machine_is_refused(monkeypatch, folder):
    monkeypatch.setattr(disk, "file_system", lambda folder: "nfs4")
    with pytest.raises(UserError, match=r"is on another machine \(nfs4\): every step reads and writes all of it"):
        check_folder(str(folder))


def test_a_file_system_is_that_of_the_last_mount_above(monkeypatch, tmp_path):
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        "2 1 0:2 / /mnt\\040nfs rw shared:7 - nfs4 host:/ rw",
        "3 2 8:2 / /mnt\\040nfs/disk rw - xfs /dev/sdb rw",
        "4 1 8:3 / /mnt\\040nfs/disk rw - btrfs /dev/sdc rw",
        "5 1 8:4 / /mnt\udcff rw - vfat /dev/sdd rw",  # a name that is no UTF-8
    ]
    mounts = "\n".join(lines).encode(errors="surrogateescape")
    monkeypatch.setattr(disk.Path, "read_text", lambda path, errors="strict": mounts.decode(errors=errors))
    found = [file_system(disk.Path(path)) for path in ("/mnt", "/mnt nfs/a", "/mnt nfs/disk/b", "/mnt nfs/disks")]
    assert found == ["ext4", "nfs4", "btrfs", "nfs4"]


@pytest.mark.parametrize(("available", "warns"), [(0, True), (2**25, True), (2**27, False)])
def test_a_slow_disk_is_told_with_the_seconds_that_it_costs(monkeypatch, folder, capsys, available, warns):
    """As far as its part of host memory does not hold what lies there."""
    monkeypatch.setattr(DiskMemory, "reserve", lambda self, size: 2**20)
    monkeypatch.setattr(room, "available_memory", lambda: available)
    room.reserve(str(folder), 200 * 2**20, Ranks(0, 2, torch.device("cpu")))
    out, err = capsys.readouterr()
    left = 100 - available // 2**20
    assert "100.0 MiB of each process in" in out and "a disk that writes 1.0 MiB/s" in out
    assert (f"{left}.0 MiB do not fit into memory, so that each step takes at least {left} s" in err) == warns
    assert bool(err) == warns


@pytest.mark.parametrize(
    ("plugin", "placement"), [("torch_ddp", "cuda"), ("low_level_zero", "cuda"), ("gemini", "auto"), (None, "cuda")]
)
def test_only_what_is_in_host_memory_can_be_on_a_disk(monkeypatch, folder, plugin, placement):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    of_plugin = StrategyFlags(plugin=plugin, placement=placement, offload_dir=str(folder))
    flags = ColossalAIFlags(model=ModelFlags(pretrained_model_name_or_path="m"), strategy=of_plugin)
    with pytest.raises(UserError, match="--offload_dir goes with --plugin low_level_zero or gemini and --placement"):
        choose_strategy(flags)


def test_a_disk_that_nothing_would_go_to_is_refused(monkeypatch, folder):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    of_plugin = StrategyFlags(plugin="gemini", placement="cpu", offload_optim_frac=0.0, offload_dir=str(folder))
    flags = ColossalAIFlags(model=ModelFlags(pretrained_model_name_or_path="m"), strategy=of_plugin)
    with pytest.raises(UserError, match="of which --offload_optim_frac 0 leaves nothing"):
        choose_strategy(flags)


def test_tensors_lie_beside_each_other_in_a_file_until_it_is_full(monkeypatch, folder):
    monkeypatch.setattr(disk, "MORE", 2**16)
    memory = DiskMemory(folder)
    memory.reserve(2**15)
    tensors = [memory.take(torch.full((25, 40), float(number))) for number in range(30)]
    moments = memory.zeros_like(tensors[0][3:], torch.float32)
    assert all((tensor == number).all() and tensor.shape == (25, 40) for number, tensor in enumerate(tensors))
    assert moments.shape == (22, 40) and not moments.any()
    assert len(memory.slabs) == 3 and memory.holds(tensors[-1][1:]) and memory.holds(moments.view(-1)[7:].detach())
    elsewhere = torch.zeros(3)
    assert not memory.holds(elsewhere) and not memory.holds(memory.zeros_like(elsewhere, torch.float32))
    memory.expect([tensors[3].view(-1)[17:900], moments])
    assert_read_as_asked(tensors[0])
    assert_as_it_was(folder)


def assert_read_as_asked(tensor: torch.Tensor) -> None:
    """The kernel reads what it is asked for, and not what comes before and after."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    begins = [*(int(one.partition("-")[0], 16) for one in mappings), 2**64]
    (found,) = (
        one for one, begin, end in zip(mappings, begins, begins[1:], strict=False) if begin <= tensor.data_ptr() < end
    )
    flags = re.search("VmFlags:(.*)", found)[1].split()
    assert "rr" in flags and "sh" in flags, "random reads, shared with the file"


def test_room_is_taken_when_it_is_reserved(monkeypatch, folder):
    files = []
    monkeypatch.setattr(disk, "unnamed_file", lambda folder: files.append(unnamed_file(folder)) or os.dup(files[0]))
    monkeypatch.setattr(disk, "MEASURED", 2**20)  # what is written of it
    DiskMemory(folder).reserve(2**28)
    assert os.fstat(files[0]).st_blocks * 512 >= 2**28
    os.close(files[0])
    assert_as_it_was(folder)


def test_a_disk_is_never_filled_in_vain(monkeypatch, folder):
    """The system's call would fill it first, and fail then."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: pytest.fail("the disk was about to be filled"))
    with pytest.raises(OSError, match="No space left on device") as error:
        DiskMemory(folder).reserve(shutil.disk_usage(folder).total)
    assert error.value.errno == errno.ENOSPC
    assert_as_it_was(folder)
