"""Files and folders that flags name: what stands in the way of writing to them, known before any work."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

from dreambooth.command_line.console import is_utf_8

PARTIAL = ".partial"  # ends the name of a file while it is written
# What file systems without locks answer, NFS among them where a folder is to be locked.
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF)
# What those answer that cannot be asked whether a folder is on the disk.
NO_FLUSH = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

PICKLES = (".ckpt", ".bin", ".pt", ".pth")  # which may run code when they are read
MODEL_FILES = (".safetensors", *PICKLES)


def path(text: str) -> str:
    """Returns what a flag names, with ~ as the home directory: in --flag=~/folder a shell leaves it."""
    return os.path.expanduser(text)


def kind_on_disk(name: str) -> str | None:
    """Returns what a model on this machine is, "folder" or "file"; None of one that is not there."""
    return ("folder" if os.path.isdir(name) else "file") if os.path.exists(name) else None


def not_utf_8(flag: str, folder: str) -> list[str]:
    """Returns what is wrong with a folder that gets a log of TensorBoard, which takes no other names."""
    return [] if is_utf_8(folder) else [f"{flag} {folder} is not valid UTF-8: name another folder"]


def same_folder(one: str | Path, other: str | Path) -> bool:
    """Whether two names are of one folder that is there."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there
        return False


def unwritable(flag: str, folder: str) -> list[str]:
    """Returns what keeps a run from writing into a folder, which need not be there yet; nothing is written."""
    try:
        os.lstat(folder)
        if os.path.islink(folder) and not os.path.exists(folder):
            return [f"{flag} {folder} is a link to {os.readlink(folder)}, which is not there: make that, or remove it"]
        if not os.path.isdir(folder):
            return [f"{flag} {folder} is a file; name a folder"]
    except FileNotFoundError:
        pass
    except OSError as error:
        return [f"{flag} {folder} cannot be made: {error.strerror}"]
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return [f"{flag} {folder} cannot be made: {existing} is a file"]
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        return [f"{flag} {folder} cannot be used: no permission to read and write {existing}"]
    return []


def write_through(file: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk, before it gets another name, which may be there first."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk; not for a folder where the file system has no way to ask that."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in NO_FLUSH or not path.is_dir():
            raise
    finally:
        os.close(file)


def umask() -> int:
    """Returns the bits that new files do not get; read without setting it, since other threads may create files."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def partial_name(file: Path) -> Path:
    """Returns a hidden name beside a file, for it to have while it is written, that no other process uses."""
    return file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def content_of(file: Path | str) -> str:
    """Returns what a file is by its first bytes, in words.

    Returns:
        "an empty file", "a safetensors file", "a zip", "a pickle", "a text" or "a file of another kind". PyTorch
        writes weights as zips, and before 1.6 as pickles.
    """
    with open(file, "rb") as opened:
        first = opened.read(512)
    if not first:
        return "an empty file"
    if first[6:9] == b"\0\0{":  # after the size of what is told in JSON, of 8 bytes
        return "a safetensors file"
    if first.startswith(b"PK"):
        return "a zip"
    if first.startswith(b"\x80"):
        return "a pickle"
    return "a text" if all(byte >= 32 or byte in b"\t\n\f\r" for byte in first) else "a file of another kind"


def is_model_file(name: str) -> bool:
    """Whether there is a file of that name that may have a whole model in it."""
    return os.path.isfile(name) and name.lower().endswith(MODEL_FILES)
