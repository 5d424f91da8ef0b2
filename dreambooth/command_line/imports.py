"""What happens as libraries are imported and would take seconds of a program's start for nothing, put off."""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from types import FunctionType

OBJECTS = 100_000  # that are made before Python looks for garbage; ordinarily 700
# What transformers imports if it is installed, for what no run does.
UNUSED = ("jax", "flax", "tensorflow", "sklearn")
_undo = contextlib.ExitStack()


def put_off() -> None:
    """Has imports be without searches for garbage, torch's compiler and UNUSED packages, until `put_off_no_more`."""
    _undo.callback(gc.set_threshold, *gc.get_threshold())
    gc.set_threshold(OBJECTS)
    for name in UNUSED:
        if name not in sys.modules:
            sys.modules[name] = None  # as if it were not installed
            _undo.callback(sys.modules.pop, name, None)
    _put_off_compiling()


def put_off_no_more() -> None:
    """Has all be as ever, now that the libraries are imported; what they are made of is never searched again."""
    _undo.close()
    gc.freeze()


def _put_off_compiling() -> None:
    """Has functions that libraries decorate with torch.compile set up torch's compiler when they are called first.

    ColossalAI and bitsandbytes have some that no run calls, but --use_8bit_adam without a GPU.
    """
    import torch  # not at the top: warnings are silenced before

    compile_now = torch.compile

    @functools.wraps(compile_now)
    def compile_later(model: Callable | None = None, **options) -> Callable:
        if model is None:
            return functools.partial(compile_later, **options)
        if not isinstance(model, FunctionType):
            return compile_now(model, **options)

        @functools.cache
        def compiled() -> Callable:
            return compile_now(model, **options)

        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    _undo.callback(setattr, torch, "compile", compile_now)
    torch.compile = compile_later
