"""Folders that are whole or not there, whatever ends the process that writes them; and the lock of an output folder.

What is begun and what is set aside is in hidden folders, which this program knows by a mark of its own inside. It is
the first file in them and the last to go. Who has the lock may end what is found so: its run goes on no more.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from dreambooth.command_line.console import RunError, UserError, first_line, warn
from dreambooth.command_line.paths import NO_LOCKS, flush, umask
from dreambooth.processes.ranks import from_rank_0

MARK = ".dreambooth"
PARTIAL, OLD = "partial", "old"  # a folder that is not whole, or not any more; one that another is to replace
HIDDEN = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}\.({PARTIAL}|{OLD})")
FLUSHED_EVERY_S = 0.1  # while a folder is written

_locks: dict[tuple[int, int], int] = {}  # open files by (device, inode)


def readable(size: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def lock(output_dir: Path) -> None:
    """Keeps other runs out of an output folder until `unlock`, or the end of this process; once is as good as twice.

    Where the file system has no locks, a warning says so.

    Raises:
        UserError: if another process has the lock.
        OSError: if the folder cannot be opened.
    """
    file = os.open(output_dir, os.O_RDONLY)
    status = os.fstat(file)
    folder = status.st_dev, status.st_ino
    try:
        if folder not in _locks:
            _lock(file, output_dir)
            _locks[folder], file = file, None
    finally:
        if file is not None:
            os.close(file)


def _lock(file: int, output_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {output_dir}: another run writes into it; name another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(
            f"--output_dir {output_dir}: its file system has no locks ({error.strerror}): "
            "see to it that no other run writes into it"
        )


def unlock() -> None:
    """Lets other runs into the folders that this one has locked."""
    while _locks:
        os.close(_locks.popitem()[1])


@contextlib.contextmanager
def unlocked_at_the_end() -> Iterator[None]:
    """Lets go of what was locked within it, however it ends: the process may live on, in a notebook."""
    try:
        yield
    finally:
        unlock()


# Worker processes may outlive the run by some seconds. What they inherit is closed, and the lock stays the parent's.
os.register_at_fork(after_in_child=unlock)


def beside(folder: Path, kind: str) -> Path:
    """Returns a hidden name that nothing else has, of a folder that is to become `folder` or was it."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


@contextlib.contextmanager
def written_whole(folder: Path, size: int) -> Iterator[Path]:
    """Yields a folder to write into, which takes the name `folder` once all of it is on the disk.

    Args:
        folder: may exist, and is replaced. It is set aside at first: a process that is killed leaves the one or the
            other for `put_right`.
        size: of what is going to be written, in bytes.

    Raises:
        RunError: if there is no room, or writing fails; then, and at any other error, what was written is removed, and
            `folder` is as it was.
    """
    partial, old = beside(folder, PARTIAL), beside(folder, OLD)
    try:
        partial.mkdir(parents=True)
        (partial / MARK).touch()
        free = shutil.disk_usage(partial).free
        if free < size:
            raise OSError(f"only {readable(free)} are free")
        with flushed_meanwhile(partial):
            yield partial
        for path in [*partial.rglob("*"), partial]:
            _finish(path)
        if os.path.lexists(folder):
            (folder / MARK).touch()
            os.rename(folder, old)
        os.rename(partial, folder)
        try:
            flush(folder.parent)
        except OSError:
            os.rename(folder, partial)  # so that the one before can come back
            raise
        (folder / MARK).unlink()
        if old.exists():
            discard(old)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # the next start tries again
            _put_right(old, partial)
        raise RunError(f"cannot write {folder}, which needs {readable(size)}: {first_line(error)}") from error
    except Exception:
        with contextlib.suppress(OSError):
            _put_right(old, partial)
        raise


@contextlib.contextmanager
def written_by_all(folder: Path, size: int) -> Iterator[Path]:
    """`written_whole` for all ranks, which rank 0 does; to be called on every rank.

    What may fail within it has to fail on all ranks, as that of `from_rank_0` does.
    """
    with contextlib.ExitStack() as stack:
        yield from_rank_0(lambda: stack.enter_context(written_whole(folder, size)))
        from_rank_0(stack.close)


@contextlib.contextmanager
def flushed_meanwhile(folder: Path) -> Iterator[None]:
    """Has the files of a folder go to the disk while they are written, so that little is left to wait for at the end.

    Raises:
        OSError: as it ends, what the disk has said meanwhile: it tells each error once.
    """
    written = threading.Event()

    def flush_all() -> None:
        while not written.wait(FLUSHED_EVERY_S):
            with contextlib.suppress(FileNotFoundError):  # a file that was there for a moment
                for path in folder.rglob("*"):
                    if written.is_set():  # what is left is flushed with all else, or removed
                        return
                    flush(path)

    with ThreadPoolExecutor(1) as pool:
        try:
            flushing = pool.submit(flush_all)
            yield
        finally:
            written.set()
    flushing.result()


def _finish(path: Path) -> None:
    """Gives a file the mode that the umask gives, if whoever wrote it has kept some of it, and has it on the disk."""
    if path.is_file():
        path.chmod(path.stat().st_mode & 0o7777 | 0o666 & ~umask())
    flush(path)


def put_right(output_dir: Path) -> None:
    """Ends what a process that was killed has begun in a folder, which is locked.

    What was set aside comes back where nothing has taken its place; all else that is not whole is removed.

    Raises:
        OSError: if something cannot be brought back.
    """
    hidden = [path for path in output_dir.iterdir() if HIDDEN.fullmatch(path.name)]
    _put_right(*sorted(hidden, key=lambda path: path.suffix))  # what is old is back before what is partial goes


def _put_right(*hidden: Path) -> None:
    for path in hidden:
        if path.is_symlink() or not (path / MARK).is_file():
            with contextlib.suppress(OSError):  # a file, or has something in it
                path.rmdir()  # killed before the mark was there, or after it was gone
            continue
        name, kind = HIDDEN.fullmatch(path.name).groups()
        folder = path.with_name(name)
        if kind == OLD and not os.path.lexists(folder):
            os.rename(path, folder)
            (folder / MARK).unlink()
        else:
            discard(path)


def discard(folder: Path) -> None:
    """Removes a folder of this program's own; a process that is killed meanwhile leaves nothing that looks whole."""
    try:
        (folder / MARK).touch()
        name = HIDDEN.fullmatch(folder.name)
        going = beside(folder.with_name(name[1]) if name else folder, PARTIAL)
        os.rename(folder, going)
        for path in going.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        (going / MARK).unlink()
        going.rmdir()
    except OSError as error:
        warn(f"cannot remove {folder}: {first_line(error)}")
