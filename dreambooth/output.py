"""What a run leaves behind: folders written whole, the trained pipeline, and its copy on the Hub."""

import argparse
import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from safetensors import SafetensorError

from dreambooth.console import RunError, UserError, is_rank_0
from dreambooth.models import first_line

PARTIAL = ".partial"  # ends the names of folders that are not whole
_locks: list[int] = []  # open as long as the process lives


def readable(size: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def prepare_output_dir(args: argparse.Namespace) -> None:
    """Creates --output_dir, keeps other runs out of it, and removes what a run that was killed left half-written.

    Does so on rank 0, and not in a --dry_run. The lock is the operating system's, and gone when the process is.

    Raises:
        UserError: if another run writes into the folder, or nobody can.
    """
    output_dir = Path(args.output_dir)
    if not is_rank_0() or args.dry_run:
        return
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _locks.append(os.open(output_dir, os.O_RDONLY))
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {output_dir}: another run writes into it; name another folder") from None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {first_line(error)}") from error
    for partial in output_dir.glob(f".*{PARTIAL}/"):
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def written_whole(folder: Path, size: int) -> Iterator[Path]:
    """Yields a folder to write into, which takes the name `folder` once all of it is on the disk.

    Args:
        folder: may exist, and is replaced.
        size: of what is going to be written, in bytes.

    Raises:
        RunError: if there is no room, or writing fails; what was written is removed.
    """
    partial, old = (folder.with_name(f".{folder.name}{suffix}{PARTIAL}") for suffix in ("", ".old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < size:
            raise OSError(f"only {readable(free)} are free")
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _flush_to_disk(path)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        _flush_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"cannot write {folder}, which needs {readable(size)}: {first_line(error)}") from error


def _flush_to_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def bytes_of(parts: Iterable[torch.nn.Module]) -> int:
    """Returns the size of models' parameters and buffers."""
    return sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())


def parts_of(pipeline: StableDiffusionPipeline) -> list[torch.nn.Module]:
    """Returns the models of a pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def save_pipeline(output_dir: Path, pipeline: StableDiffusionPipeline) -> None:
    """Writes the whole pipeline into `output_dir`, beside the checkpoints.

    Raises:
        RunError: as `written_whole` does.
    """
    whole = output_dir / f".pipeline{PARTIAL}"
    with written_whole(whole, bytes_of(parts_of(pipeline))) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
    # model_index.json goes first and comes last: a folder that has it is whole.
    index = "model_index.json"
    try:
        (output_dir / index).unlink(missing_ok=True)
        for part in sorted(os.listdir(whole), key=lambda name: name == index):
            if (output_dir / part).is_dir():
                shutil.rmtree(output_dir / part)
            os.replace(whole / part, output_dir / part)
        whole.rmdir()
    except OSError as error:
        raise RunError(f"cannot write {output_dir}: {first_line(error)}") from error


def hub_name(args: argparse.Namespace) -> str:
    """Returns the repository that --push_to_hub uploads to, as far as the flags name it."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def prepare_hub(args: argparse.Namespace) -> str | None:
    """Creates the repository that --push_to_hub names, before any time is spent on training; on rank 0.

    Returns:
        The repository's full name; None where nothing is to be uploaded.

    Raises:
        UserError: if the Hub cannot be reached or refuses.
    """
    if not args.push_to_hub or args.dry_run or not is_rank_0():
        return None
    name = hub_name(args)
    try:
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # Whatever the network and the Hub can answer: nothing has been done yet.
        raise UserError(f"--push_to_hub: cannot create {name} on the Hub: {first_line(error)}") from error


def upload(args: argparse.Namespace, repo_id: str) -> None:
    """Uploads the trained pipeline, without checkpoints, logs and validation images.

    Raises:
        RunError: if the Hub cannot be reached or refuses.
    """
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            ignore_patterns=["checkpoint-*", f"{os.path.normpath(args.logging_dir)}/*", "validation/*", ".*"],
            commit_message="DreamBooth training",
        )
    except Exception as error:  # whatever the network and the Hub can answer
        raise RunError(
            f"--push_to_hub: {first_line(error)}; the pipeline is whole in {args.output_dir}: "
            f"huggingface-cli upload {repo_id} {args.output_dir} . --exclude 'checkpoint-*/*' uploads it"
        ) from error
