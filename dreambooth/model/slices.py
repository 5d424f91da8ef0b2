"""Tensors of which each rank holds a part: written into one file by all of them, or put together on rank 0."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from dreambooth.command_line.console import RunError, ToldByRank0, first_line, is_rank_0
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import Ranks, from_all_ranks, from_rank_0, on_one_machine
from dreambooth.processes.threads import cores_of, in_threads

# As safetensors files name the dtypes that are written here; in them, those with the larger elements come first.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
# A dtype of integers of the same size, in which the sum of a tensor and of zeros is the tensor, bit for bit.
INTEGERS = {torch.float32: torch.int32, torch.uint8: torch.uint8}
NO_METADATA: Mapping[str, str] = {}
MAX_WRITERS = 4  # threads of a rank that copy from its GPU and write; a file system lets few into one file


@dataclass(frozen=True)
class Slice:
    """What this rank holds of a tensor: some of its elements, one after another as they lie in memory.

    Every rank has a slice of every tensor, in the same order, though it may be empty.

    Args:
        name: of the tensor.
        shape: of the whole tensor.
        first: number of the first element that is held.
        values: (elements,), float32 or uint8, on any device.
        is_everywhere: whether all ranks hold the same, which is all of it.
        dtype: in which a file gets them; None is that of the values.
    """

    name: str
    shape: torch.Size
    first: int
    values: Tensor
    is_everywhere: bool = False
    dtype: torch.dtype | None = None

    @property
    def written_dtype(self) -> torch.dtype:
        """The dtype of the tensor in a file."""
        return self.dtype or self.values.dtype

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in a file."""
        return self.shape.numel() * self.written_dtype.itemsize

    def share(self, rank: int, world_size: int) -> "Slice":
        """Returns what a rank writes: what it holds, or its share of what all of them hold."""
        if not self.is_everywhere:
            return self
        begin, end = (self.values.numel() * turn // world_size for turn in (rank, rank + 1))
        return Slice(self.name, self.shape, begin, self.values[begin:end], dtype=self.dtype)


def write_slices(path: Path, slices: Iterable[Slice], ranks: Ranks, metadata: Mapping[str, str] = NO_METADATA) -> None:
    """Writes a safetensors file of whole tensors; to be called on every rank.

    On one machine each rank writes what it holds. Processes of several need not see the same files: they send theirs
    to rank 0, tensor by tensor.

    Args:
        path: of the file, which is new, in a folder that is there.
        slices: of its tensors.
        ranks: of the run.
        metadata: that the file has besides.

    Raises:
        OSError: on rank 0, if some rank cannot write.
        ToldByRank0: then, on the others.
    """
    slices = list(slices)
    places, size, header = _layout(slices, metadata)
    path = from_rank_0(lambda: _create(path, header, size))
    error = None
    try:
        if on_one_machine():
            own = [one.share(ranks.rank, ranks.world_size) for one in slices]
            write = functools.partial(_write, path, places)
            for _ in in_threads(write, own, threads=min(MAX_WRITERS, cores_of(find_place()))):
                pass
        else:
            _write_gathered(path, places, slices, ranks)
    except OSError as caught:
        error = first_line(caught)
    if found := [one for one in from_all_ranks(error) if one]:
        raise OSError(found[0]) if is_rank_0() else ToldByRank0(RunError.status)
    from_rank_0(lambda: _check(path))


def _layout(slices: Sequence[Slice], metadata: Mapping[str, str]) -> tuple[dict[str, int], int, bytes]:
    """Returns where in a safetensors file each tensor begins, the size of the file, and what is before the tensors."""
    tensors, end = {}, 0
    for one in sorted(slices, key=lambda one: (-one.written_dtype.itemsize, one.name)):
        begin, end = end, end + one.nbytes
        told = {"dtype": DTYPES[one.written_dtype], "shape": [*one.shape], "data_offsets": [begin, end]}
        tensors[one.name] = told
    told = {"__metadata__": {"format": "pt", **metadata}}
    text = json.dumps(told | tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return {name: len(header) + told["data_offsets"][0] for name, told in tensors.items()}, len(header) + end, header


def _create(path: Path, header: bytes, size: int) -> Path:
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(size)
    return path


def _write(path: Path, places: Mapping[str, int], part: Slice) -> None:
    if not part.values.numel():  # nor may there be a file, on another machine
        return
    with open(path, "r+b", buffering=0) as file:
        file.seek(places[part.name] + part.first * part.written_dtype.itemsize)
        left = memoryview(part.values.to(part.written_dtype).contiguous().cpu().view(torch.uint8).numpy())
        while left:
            left = left[file.write(left) :]


def _write_gathered(path: Path, places: Mapping[str, int], slices: Sequence[Slice], ranks: Ranks) -> None:
    """Writes tensors on rank 0, where they are put together one after another."""
    error = None
    for one, whole in zip(slices, gather(slices, ranks), strict=True):  # to the end: other ranks have to send
        try:
            if error is None:
                _write(path, places, Slice(one.name, one.shape, 0, whole.flatten(), dtype=one.dtype))
        except OSError as caught:
            error = caught
    if error is not None:
        raise error


def _check(path: Path) -> None:
    with safe_open(path, framework="pt"):  # compares the file's size with what its header says
        pass


def gather(slices: Iterable[Slice], ranks: Ranks) -> Iterator[Tensor]:
    """Yields tensors, each put together on rank 0; to be called, and gone through, on every rank.

    Returns:
        Each tensor whole, on the CPU; on other ranks than 0 an empty one.
    """
    for one in slices:
        whole = one.values
        if not one.is_everywhere:
            integers = INTEGERS[whole.dtype]
            whole = torch.zeros(one.shape.numel(), dtype=integers, device=ranks.device)
            whole[one.first : one.first + one.values.numel()] = one.values.view(integers).to(ranks.device)
            dist.reduce(whole, dst=0)
            whole = whole.view(one.values.dtype)
        yield whole.view(one.shape).cpu() if ranks.rank == 0 else torch.empty(0, dtype=one.values.dtype)
