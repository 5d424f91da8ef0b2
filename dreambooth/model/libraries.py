"""What the libraries of 2024 and today's do differently: all that the project knows of their releases.

Of everything else both lists of requirements are served by the same code.
"""

import functools
import inspect
import os
from pathlib import Path

import torch
import transformers
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, PreTrainedTokenizerBase

ARE_OF_TODAY = int(transformers.__version__.split(".")[0]) > 4


def save_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes vocab.json and merges.txt: transformers 5 saves a tokenizer.json alone, which release 4 cannot load."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.model.save(str(folder))


# Whether what is recomputed can be recorded: release 0.29 of diffusers keeps the state of random numbers for it.
CHECKPOINTING_TAKES_A_FUNCTION = (
    "gradient_checkpointing_func" in inspect.signature(UNet2DConditionModel.enable_gradient_checkpointing).parameters
)


def checkpoint_activations(unet: UNet2DConditionModel, kind: dict) -> None:
    """Makes a UNet recompute activations in the backward pass; `kind` are arguments of torch's `checkpoint`."""
    if CHECKPOINTING_TAKES_A_FUNCTION:
        unet.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, **kind))
    else:
        unet.enable_gradient_checkpointing()


def name_in_file(component: torch.nn.Module, name: str) -> str:
    """Returns the name by which files have a weight of a component.

    Those of a CLIPTextModel begin with "text_model.", as release 4 of transformers and other programs expect. Release
    5 reads them, but has them without in the model, and would save them so: release 4 then starts from random weights.
    """
    has_prefix = not isinstance(component, CLIPTextModel) or hasattr(component, "text_model")
    return name if has_prefix else f"text_model.{name}"


def grow_segments() -> None:
    """Has torch take GPU memory in segments that grow: in those of fixed sizes gaps remain, where nothing else fits.

    It goes on from now; what the environment says of torch's allocator stays.
    """
    said = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys()
    if said or not torch.cuda.is_available():
        return
    old = "_cuda_cudaCachingAllocator_set_allocator_settings"
    set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or getattr(torch._C, old)
    set_allocator("expandable_segments:True")
