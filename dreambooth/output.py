"""What a run leaves behind: checkpoint folders, the trained pipeline, and its copy on the Hub."""

import argparse
import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi

from dreambooth.console import UserError
from dreambooth.models import first_line


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which takes the name `folder` once the block has ended without an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)


def unet_with(weights: dict[str, torch.Tensor], config: dict) -> UNet2DConditionModel:
    """Returns a UNet of `config` that has `weights`, fp32, on the CPU."""
    with torch.device("meta"):  # no time for random weights that are replaced
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet


def save_pipeline(output_dir: Path, load: Callable[..., StableDiffusionPipeline], unet: UNet2DConditionModel) -> None:
    """Writes the whole pipeline, with the trained UNet, into `output_dir`.

    `load(unet)` brings the parts that were not trained from the original checkpoint once more: those in memory are in
    the run's precision, not in the checkpoint's.
    """
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    load(unet).save_pretrained(partial, safe_serialization=True)
    # model_index.json goes first and comes last: a folder that has it is whole.
    index = "model_index.json"
    (output_dir / index).unlink(missing_ok=True)
    for part in sorted(os.listdir(partial), key=lambda name: name == index):
        if (output_dir / part).is_dir():
            shutil.rmtree(output_dir / part)
        os.replace(partial / part, output_dir / part)
    partial.rmdir()


def prepare_hub(args: argparse.Namespace) -> str:
    """Creates the repository that --push_to_hub names, before any time is spent on training.

    Returns:
        The repository's full name.

    Raises:
        UserError: if the Hub cannot be reached or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # Whatever the network and the Hub can answer: nothing has been done yet.
        raise UserError(f"--push_to_hub: cannot create {name} on the Hub: {first_line(error)}") from error


def upload(args: argparse.Namespace, repo_id: str) -> None:
    """Uploads the trained pipeline, without checkpoints and logs."""
    HfApi(token=args.hub_token).upload_folder(
        repo_id=repo_id,
        folder_path=args.output_dir,
        ignore_patterns=["checkpoint-*", f"{args.logging_dir}/*", ".*"],
        commit_message="DreamBooth training",
    )
