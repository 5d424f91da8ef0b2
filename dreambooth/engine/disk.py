"""Memory that lies in files, for weights and moments that a machine has too little memory for.

The files have no names: when a process ends, however it does, the disk has its room back.
"""

import errno
import mmap
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.command_line.console import UserError, first_line
from dreambooth.command_line.paths import unwritable
from dreambooth.engine.offload import Memory

# Of a file in the moment between its creation and the removal of its name, on file systems that cannot do without.
NAME = re.compile(r"\.dreambooth\.[0-9a-f]{16}\.offload")
IN_MEMORY = ("tmpfs", "ramfs")
NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "lustre",
    "glusterfs",
    "beegfs",
    "gpfs",
    "afs",
    "fuse.sshfs",
)
# What file systems answer that have no files without names.
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
MEASURED = 2**28  # bytes that are written to see how fast a disk is: a second on a slow one
BLOCK = 2**23
MORE = 2**28  # bytes of a further file, where what was reserved is too little, as Gemini's chunks have gaps


def check_folder(folder: str) -> None:
    """Finds out whether files for --offload_dir can be in a folder.

    Raises:
        UserError: if it is not there, cannot be written to, or is not on a disk of this machine.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--offload_dir {folder} is not a folder: make it, on a disk of this machine")
    for problem in unwritable("--offload_dir", folder):
        raise UserError(problem)
    kind = file_system(Path(folder))
    if kind in IN_MEMORY:
        raise UserError(f"--offload_dir {folder} is in memory ({kind}), which it is to spare: name a folder on a disk")
    if kind in NETWORK:
        raise UserError(
            f"--offload_dir {folder} is on another machine ({kind}): every step reads and writes all of it; "
            "name a folder on a disk of this one"
        )
    try:
        remove_leftovers(Path(folder))
        os.close(unnamed_file(Path(folder)))
    except OSError as error:
        raise UserError(f"--offload_dir {folder}: {first_line(error)}") from error


def file_system(folder: Path) -> str:
    """Returns the kind of the file system that a folder is on, as the kernel names it; empty where it does not say."""
    path, best, kind = os.path.realpath(folder), "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
        if inside and len(mounted) >= len(best):  # of two at one place, the later is on top
            best, kind = mounted, after.split()[0]
    return kind


def remove_leftovers(folder: Path) -> None:
    """Removes the empty files of processes that were killed in the moment between creating and removing a name."""
    for path in folder.iterdir():
        if NAME.fullmatch(path.name):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and not status.st_size:
                path.unlink(missing_ok=True)


def unnamed_file(folder: Path) -> int:
    """Returns a new file on the disk of a folder, open and without a name.

    Raises:
        OSError: if it cannot be created.
    """
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise
    path = folder / f".dreambooth.{secrets.token_hex(8)}.offload"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink(missing_ok=True)  # another start may have taken it for a leftover
    return file


def take_room(file: int, size: int) -> None:
    """Takes `size` bytes of the disk for an open file: all of them or none.

    The system's own call fills a disk before it finds it too small, so that others cannot write for that time.

    Raises:
        OSError: if the disk has too little room.
    """
    disk = os.fstatvfs(file)
    if size > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(file, 0, size)


@dataclass
class Slab:
    """A file, mapped into memory, of which tensors have taken the first `taken` bytes."""

    mapped: mmap.mmap
    taken: int = 0

    def take(self, elements: int) -> Tensor | None:
        """Returns so many float32 of it; None if there is no room."""
        if self.taken + 4 * elements > len(self.mapped):
            return None
        tensor = torch.frombuffer(self.mapped, dtype=torch.float32, count=elements, offset=self.taken)
        self.taken += -(-4 * elements // mmap.PAGESIZE) * mmap.PAGESIZE
        return tensor


class DiskMemory(Memory):
    """Memory in files of a folder; pages that fit into the machine's memory beside all else stay there too.

    Steps go through it in turns, from the first piece to the last and back: what is in memory at the end of one is
    what the next begins with.

    Args:
        folder: in which the files would be if they had names.
    """

    turns = True
    ahead = 2**23  # elements, 96 MiB of weights and moments: read while those before them are worked on

    def __init__(self, folder: Path):
        self.folder = folder
        self.slabs: list[Slab] = []
        self._begins: dict[int, tuple[Slab, int]] = {}  # of tensors: where in a slab, by their addresses

    def reserve(self, size: int) -> float:
        """Takes room for `size` bytes on the disk, and writes some of them.

        Returns:
            How many bytes a second the disk has written.

        Raises:
            OSError: if it has too little room.
        """
        file = self._allocate(size)
        try:
            measured = min(size, MEASURED)
            block = os.urandom(min(BLOCK, measured))  # not zeros, which some disks do not write
            began = time.monotonic()
            for begin in range(0, measured, BLOCK):
                os.pwrite(file, block[: measured - begin], begin)
            os.fdatasync(file)
            return measured / max(time.monotonic() - began, 1e-9)
        finally:
            os.close(file)  # it is mapped

    def _allocate(self, size: int) -> int:
        """Adds a slab, and returns its file, open."""
        file = unnamed_file(self.folder)
        try:
            # Where there is no room for it, a write into a mapped file ends the process.
            take_room(file, size)
            mapped = mmap.mmap(file, size)
            # The kernel would also read what lies around a page, which in every other step was worked on just before.
            mapped.madvise(mmap.MADV_RANDOM)
            self.slabs.append(Slab(mapped))
        except BaseException:
            os.close(file)
            raise
        return file

    def _new(self, elements: int) -> Tensor:
        for slab in self.slabs:
            begin = slab.taken
            if (tensor := slab.take(elements)) is not None:
                self._begins[tensor.data_ptr()] = slab, begin
                return tensor
        os.close(self._allocate(max(MORE, 4 * elements)))
        return self._new(elements)

    def take(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor, float32, in this memory."""
        assert tensor.dtype == torch.float32
        return self._new(tensor.numel()).view(tensor.shape).copy_(tensor)

    def zeros_like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns zeros of the shape of `tensor`: in this memory if that is, else on its device."""
        if not self.holds(tensor):
            return torch.zeros_like(tensor, dtype=dtype)
        assert dtype == torch.float32
        return self._new(tensor.numel()).view(tensor.shape).zero_()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, lies in this memory."""
        return tensor.untyped_storage().data_ptr() in self._begins

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Has the kernel read what the machine's memory has not of some tensors."""
        for tensor in tensors:
            slab, begin = self._begins[tensor.untyped_storage().data_ptr()]
            begin += tensor.storage_offset() * tensor.itemsize
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            slab.mapped.madvise(mmap.MADV_WILLNEED, page, begin - page + tensor.nbytes)
