"""Pipelines that draw, on a device that may not hold all of one."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from dreambooth.command_line.console import first_line, warn
from dreambooth.command_line.limits import is_out_of_gpu_memory
from dreambooth.model.replays import replay, replay_no_more

Drawn = TypeVar("Drawn")
# Pixels of a side of what is decoded at a time in the last of the ways.
TILE = 512


def _replayed(pipeline: DiffusionPipeline, device: torch.device) -> None:
    pipeline.to(device)
    replay(pipeline.unet)


def _whole(pipeline: DiffusionPipeline, device: torch.device) -> None:
    pipeline.to(device)


def _parts_in_turn(pipeline: DiffusionPipeline, device: torch.device) -> None:
    pipeline.enable_model_cpu_offload(device=device)


def _layers_in_turn(pipeline: DiffusionPipeline, device: torch.device) -> None:
    pipeline.remove_all_hooks()
    pipeline.to("cpu", silence_dtype_warnings=True)  # a part that was in its turn is still on the device
    pipeline.enable_sequential_cpu_offload(device=device)
    decode_in_tiles(pipeline.vae)


def decode_in_tiles(vae: AutoencoderKL) -> None:
    """Has a VAE decode images of more than TILE pixels a side in pieces, whose seams are blended."""
    vae.enable_tiling()
    vae.tile_latent_min_size = TILE * vae.tile_latent_min_size // vae.tile_sample_min_size
    vae.tile_sample_min_size = TILE


# Each takes less of the card than the one before it, and more time.
WAYS = {
    _replayed: "",
    _whole: "images take longer",
    _parts_in_turn: "its parts are there one at a time",
    _layers_in_turn: "its layers are there one at a time, which takes longer, and large images are decoded in tiles",
}


class DrawingDevice:
    """A device on which one pipeline after the other draws: each whole, or once that was too much less at a time.

    How much of a pipeline is there changes no image, but for the tiles of the last resort, whose seams are blended.
    Passes that are recorded change roundings.

    Args:
        device: on which they draw.
        what: they draw, for what is told.
        replays: whether the UNet's passes are recorded and replayed, which takes some seconds of the first image; the
            device has to be a GPU that runs our kernels (`no_kernels`).
    """

    def __init__(self, device: torch.device | str, what: str, *, replays: bool = False):
        self.device, self.what = torch.device(device), what
        self.pipeline: DiffusionPipeline | None = None  # which draws
        self._is_placed = False
        self._ways = list(WAYS)
        if not replays:
            self._ways.remove(_replayed)

    def put(self, pipeline: DiffusionPipeline) -> None:
        """Has a pipeline, which is on the CPU, draw from now on; it decodes images one by one."""
        if self.pipeline is not None:
            replay_no_more(self.pipeline.unet)
        pipeline.vae.enable_slicing()
        self.pipeline, self._is_placed = pipeline, False

    def draw(self, images: Callable[[DiffusionPipeline], Drawn]) -> Drawn:
        """Returns what `images` returns of the pipeline; it may be called again where the device has too little room.

        Raises:
            Exception: of whatever kind, if even the least takes too much memory.
        """
        while True:
            try:
                if not self._is_placed:
                    self._ways[0](self.pipeline, self.device)
                    self._is_placed = True
                return images(self.pipeline)
            except Exception as error:
                # A recording that fails may not say that it was for want of memory; images do not need it anyway.
                if self._ways[0] is _replayed and isinstance(error, RuntimeError):
                    why = f"the UNet cannot be recorded ({first_line(error)})"
                elif len(self._ways) > 1 and is_out_of_gpu_memory(error):
                    why = "the GPU has no room for the whole model"
                else:
                    raise
            # The error held on to all that was computed with.
            self._ways.pop(0)
            self._is_placed = False
            replay_no_more(self.pipeline.unet)
            torch.cuda.empty_cache()
            warn(f"{self.what}: {why}: {WAYS[self._ways[0]]}")

    def clear(self) -> None:
        """Lets go of the pipeline, and of the memory that it has had."""
        if self.pipeline is not None:
            replay_no_more(self.pipeline.unet)
        self.pipeline = None
        gc.collect()  # by what takes them to the device in turns, parts refer to themselves
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
