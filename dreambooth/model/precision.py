"""The one place that knows which arithmetic a run uses."""

import functools
import importlib.util
import os

import torch

from dreambooth.command_line.console import UserError, first_line, warn

# Of fp16. The usual 2**16 overflows in the first steps, which then train nothing; the scale grows by itself if it can.
INITIAL_LOSS_SCALE = 2**12

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_precision(requested: str | None) -> str:
    """Returns "no", "fp16" or "bf16": what was requested, else bf16 or fp16 on a GPU and "no" on the CPU.

    A half precision that `accelerate launch` was asked for counts where no flag says otherwise. Its "no" does not, as
    that is what it says when it was not asked.

    Raises:
        UserError: if the machine cannot run what was requested.
    """
    asked_by = "--mixed_precision"
    of_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if requested is None and of_launcher != "no":
        if of_launcher not in DTYPES:
            raise UserError(f"accelerate's configuration asks for mixed precision {of_launcher}: use fp16 or bf16")
        requested, asked_by = of_launcher, "accelerate's mixed precision"
    _check_machine(asked_by, requested)
    if not torch.cuda.is_available():
        return requested or "no"
    return requested or ("bf16" if _has_bf16() else "fp16")


def _has_bf16() -> bool:
    """Whether the GPU computes in bf16; a GPU without it would do so slowly, in software."""
    return torch.cuda.get_device_capability()[0] >= 8


def _check_machine(flag: str, requested: str | None) -> None:
    """Refuses a precision that this machine cannot compute in."""
    if requested == "fp16" and not torch.cuda.is_available():
        raise UserError(f"{flag} fp16 needs a CUDA GPU, and none was found: use no or bf16")
    if requested == "bf16" and torch.cuda.is_available() and not _has_bf16():
        raise UserError(f"{flag} bf16: {torch.cuda.get_device_name()} cannot compute in bf16; use fp16")


@functools.cache
def no_kernels() -> str | None:
    """Returns why this machine cannot run the kernels of `dreambooth.model.kernels`; None if it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and none was found"
    if torch.cuda.get_device_capability() < (7, 0):
        return f"needs a GPU of compute capability 7.0 or more, which {torch.cuda.get_device_name()} has not"
    if importlib.util.find_spec("triton") is None:
        return "needs a package that is not there: pip install triton"
    from triton.runtime import driver

    try:
        _ = driver.active.utils  # which is built when it is first asked for
    except Exception as error:  # of a compiler or of its files: there is no end to what may be missing
        needs = "a C compiler and Python's headers, with which Triton builds what starts its kernels"
        warn(f"this machine lacks {needs}; without its kernels steps are slower ({first_line(error)})")
        return f"needs {needs}"
    return None


def set_tf32(allowed: bool) -> None:
    """Lets GPUs round the inputs of fp32 matrix products to TF32, or not; torch's default for convolutions is TF32."""
    if allowed and not torch.cuda.is_available():
        warn("--allow_tf32: no effect without a CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def sampling_dtype(precision: str, requested: str | None = None) -> torch.dtype:
    """Returns the dtype in which images are drawn: the run's own, but fp32 on the CPU, unless requested.

    Args:
        precision: of the run.
        requested: --prior_generation_precision, "no" or "fp32", "fp16", "bf16"; None leaves the choice.

    Raises:
        UserError: if the machine cannot run what was requested.
    """
    if requested:
        _check_machine("--prior_generation_precision", requested)
        return DTYPES["no" if requested == "fp32" else requested]
    return DTYPES[precision] if torch.cuda.is_available() else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Returns how messages call a dtype: fp32, fp16 or bf16."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def all_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is infinite or NaN: by its extremes, ten times as fast as by each element."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
