"""Makes a .safetensors file of a model's .ckpt, without running what the pickle in it says.

    python -m dreambooth.model.unpickle model.ckpt

writes model.safetensors beside it. Of a pickle, in PyTorch's format of today or the one before, only tensors and plain
containers are read. What else is in it, such as the callbacks of whoever trained the model, becomes nothing.
"""

import argparse
import pickle
from pathlib import Path

from dreambooth.command_line.console import UserError, before_imports, first_line, run_program, say
from dreambooth.command_line.paths import content_of, umask

before_imports(__name__)

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

# What pickles call to make tensors, and the dictionary that weights come in.
ALLOWED = {
    "torch._utils": ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    "collections": ("OrderedDict",),
}


class Nothing:
    """Takes the place of any other class or function, does nothing, and takes whatever a pickle gives it."""

    dump_patches = False  # what torch asks the class of a module for

    def __init__(self, *args: object, **more: object):
        pass

    def __call__(self, *args: object, **more: object) -> "Nothing":
        return self

    append = extend = add = __setitem__ = __setstate__ = __init__


class Bytes:
    """Takes the place of torch's class of untyped storages: torch asks for no more, and a pickle cannot call it."""

    dtype = torch.uint8


class Unpickler(pickle.Unpickler):
    """Python's, which runs no more than what makes tensors."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return Bytes()
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        return super().find_class(module, name) if is_dtype or name in ALLOWED.get(module, ()) else Nothing

    @classmethod
    def load_from(cls, file, **how: object) -> object:
        return cls(file, **how).load()


class PickleModule:
    """What torch.load wants in the place of Python's module."""

    Unpickler, load = Unpickler, Unpickler.load_from


def _is_program(path: Path) -> bool:
    """Whether torch.load would give a zip to TorchScript, past any unpickler: it goes by this, read by this."""
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


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
        is_zip = content == "a zip"  # by its first bytes, as torch.load has it
        if is_zip and _is_program(path):
            raise UserError(f"{path} is a program of TorchScript: reading it would run it")
        how = {"weights_only": False, "pickle_module": PickleModule, "mmap": is_zip}
        found = torch.load(path, map_location="cpu", **how)
    except UserError:
        raise
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
        target.chmod(0o666 & ~umask())  # which safetensors does not ask
    except KeyError as error:
        raise UserError(f"{path} has numbers of {error.args[0]}, which a .safetensors file cannot have") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {first_line(error)}") from error
    say(f"{len(tensors)} tensors written to {target}")


if __name__ == "__main__":
    run_program(main, "unpickle.py")
