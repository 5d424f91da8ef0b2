"""What the libraries of 2024 and today's do differently: all that the project knows of their releases.

Of everything else both lists of requirements are served by the same code.
"""

from pathlib import Path

import torch
from transformers import CLIPTextModel, PreTrainedTokenizerBase


def save_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes vocab.json and merges.txt: transformers 5 saves a tokenizer.json alone, which release 4 cannot load."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.model.save(str(folder))


def name_in_file(component: torch.nn.Module, name: str) -> str:
    """Returns the name by which files have a weight of a component.

    Those of a CLIPTextModel begin with "text_model.", as release 4 of transformers and other programs expect. Release
    5 reads them, but has them without in the model, and would save them so: release 4 then starts from random weights.
    """
    has_prefix = not isinstance(component, CLIPTextModel) or hasattr(component, "text_model")
    return name if has_prefix else f"text_model.{name}"
