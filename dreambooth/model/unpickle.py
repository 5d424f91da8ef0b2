"""Makes a .safetensors file of a model's .ckpt, without running what the pickle in it says.

    python -m dreambooth.model.unpickle model.ckpt

writes model.safetensors beside it. Of a pickle, in PyTorch's format of today or the one before, only tensors and plain
containers are read.
"""

import argparse
import zipfile
from pathlib import Path
from pickle import UnpicklingError

from dreambooth.command_line.console import UserError, before_imports, first_line, run_program, say
from dreambooth.command_line.paths import content_of

before_imports(__name__)

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="with weights, in PyTorch's own format")
    path = parser.parse_args().file
    target = path.with_suffix(".safetensors")
    if target.exists():
        raise UserError(f"{target} is there already")
    if not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: name a file of weights")
    try:
        if (content := content_of(path)) not in ("a zip", "a pickle"):
            raise UserError(f"{path} is {content}, and no file of weights in PyTorch's format")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds other things than weights, such as code that would run: it is not read"
        ) from error
    except Exception as error:  # what a file leads torch to has no limit
        raise UserError(f"{path} cannot be read, it may be torn: {first_line(error)}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    named = found.items() if isinstance(found, dict) else []
    tensors = {
        name: one.clone().contiguous()
        for name, one in named
        if isinstance(name, str) and isinstance(one, torch.Tensor)
    }
    if not tensors:
        raise UserError(f"{path} has no weights")
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {first_line(error)}") from error
    say(f"{len(tensors)} tensors written to {target}")


if __name__ == "__main__":
    run_program(main, "unpickle.py")
