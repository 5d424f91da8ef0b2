"""What the libraries of 2024 and today's do differently: all that the project knows of their releases.

Of everything else both lists of requirements are served by the same code.
"""

from pathlib import Path

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase


def save_whole_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Writes a pipeline in safetensors, for the libraries of either time to read."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_vocabulary(pipeline.tokenizer, Path(folder, "tokenizer"))


def save_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes vocab.json and merges.txt: transformers 5 saves a tokenizer.json alone, which release 4 cannot load."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.model.save(str(folder))
