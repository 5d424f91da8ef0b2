"""Makes a .safetensors file of a model's .ckpt, without running what the pickle in it says.

    python -m dreambooth.model.unpickle model.ckpt

writes model.safetensors beside it. Of a pickle only tensors and plain containers are read.
"""

import argparse
from pathlib import Path

from dreambooth.command_line.console import UserError, before_imports, first_line, run_program, say

before_imports(__name__)

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="with weights, in PyTorch's own format")
    path = parser.parse_args().file
    target = path.with_suffix(".safetensors")
    if target.exists():
        raise UserError(f"{target} is there already")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a file leads torch to has no limit
        raise UserError(f"{path} cannot be read as weights alone: {first_line(error)}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: one.clone().contiguous() for name, one in found.items() if isinstance(one, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} has no weights")
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except OSError as error:
        raise UserError(f"cannot write {target}: {first_line(error)}") from error
    say(f"{len(tensors)} tensors written to {target}")


if __name__ == "__main__":
    run_program(main, "unpickle.py")
