"""What of an output folder this program has written: dreambooth.json in it.

That lists the files of the result, a pipeline or adapters, and no others, each with its size, its time and its digest.
So this program knows later what it may replace, and what it uploads; what was changed since, it leaves alone.
"""

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dreambooth.model.lora import WEIGHTS
from dreambooth.processes.threads import in_threads

LISTING, INDEX = "dreambooth.json", "model_index.json"
# A pipeline, or adapters alone: the file that tells that all are there.
LAST = (INDEX, WEIGHTS)
PART = 64 * 2**20  # bytes of a file that a thread reads at a time for its digest


@dataclass(frozen=True)
class Written:
    """What a file was when this program wrote it.

    Args:
        size: in bytes.
        mtime_ns: when it was written, in nanoseconds since the epoch.
        sha256: of its content, as of `digest_of`; None for a file that is known by its size alone.
    """

    size: int
    mtime_ns: int
    sha256: str | None

    @classmethod
    def now(cls, path: Path, *, read_up_to: float = math.inf) -> "Written":
        """Returns what a file is now; of one of more bytes than are read, the size is enough."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, digest_of(path) if status.st_size <= read_up_to else None)

    def is_still(self, path: Path) -> bool:
        """Whether a file is what it was. It is read only where its time is another, as that of a copy is."""
        status = path.stat()
        if status.st_size != self.size:
            return False
        if self.sha256 is None or status.st_mtime_ns == self.mtime_ns or digest_of(path) == self.sha256:
            return True
        return digest_of(path, part=self.size) == self.sha256  # as earlier versions have it


def digest_of(path: Path, part: int = PART) -> str:
    """Returns the SHA-256 of a file, hexadecimal; of one that is larger than a part, that of its parts' SHA-256.

    The parts are read in threads: one core would take seconds over a model.

    Args:
        path: of the file.
        part: size of a part, in bytes.
    """
    with open(path, "rb") as file:
        begins = range(0, max(1, os.fstat(file.fileno()).st_size), max(1, part))
        threads = min(len(begins), len(os.sched_getaffinity(0)))
        digests = [*in_threads(functools.partial(_digest_of_part, file.fileno(), part), begins, threads=threads)]
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_of_part(file: int, size: int, begin: int) -> bytes:
    digest, end = hashlib.sha256(), begin + size
    while block := os.pread(file, min(2**20, end - begin), begin):
        digest.update(block)
        begin += len(block)
    return digest.digest()


def files_of(written: object) -> dict[str, Written]:
    """Returns the files that a listing names, by their paths inside its folder.

    Args:
        written: as JSON has it.

    Raises:
        TypeError, AttributeError: if it is not what this program writes.
    """
    files = {name: Written(**file) for name, file in written.items()}
    return files if all(map(is_inside, files)) else {}


def read_listing(folder: Path) -> dict:
    """Returns what the listing in a folder says; empty if there is none, or it is none of this program's.

    Its "files" are those of the pipeline that this program has written into the folder, by their paths inside.
    """
    try:
        listing = json.loads((folder / LISTING).read_text())
        return listing | {"files": files_of(listing["files"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"files": {}}


def pipeline_files(folder: Path) -> dict[str, Written]:
    """Returns the files of the pipeline that this program has written into a folder, by their paths inside."""
    return read_listing(folder)["files"]


def changed_of(folder: Path, files: dict[str, Written]) -> str | None:
    """Returns the first of the files that are there and are not what they were."""
    return next((name for name, file in files.items() if _is_other(folder / name, file)), None)


def _is_other(path: Path, file: Written) -> bool:
    return path.exists() and not (path.is_file() and file.is_still(path))


def is_inside(name: str) -> bool:
    """Returns whether a relative path leads to something in the folder that it is of."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(path.parts) > 0


def link_in(folder: Path, name: str) -> str | None:
    """Returns the first link on the way from a folder to a file inside."""
    path = PurePosixPath(name)
    steps = [*reversed(path.parents), path][1:]
    return next((str(step) for step in steps if (folder / step).is_symlink()), None)
