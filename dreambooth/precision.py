"""The one place that knows which arithmetic a run uses."""

import torch

from dreambooth.console import UserError, warn

# Of fp16. The usual 2**16 overflows in the first steps, which then train nothing; the scale grows by itself if it can.
INITIAL_LOSS_SCALE = 2**12

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_precision(requested: str | None) -> str:
    """Returns "no", "fp16" or "bf16": what was requested, else bf16 or fp16 on a GPU and "no" on the CPU.

    Raises:
        UserError: if the machine cannot run what was requested.
    """
    if not torch.cuda.is_available():
        if requested == "fp16":
            raise UserError("--mixed_precision fp16 needs a CUDA GPU, and none was found: use no or bf16")
        return requested or "no"
    bf16_in_hardware = torch.cuda.get_device_capability()[0] >= 8
    if requested == "bf16" and not bf16_in_hardware:
        raise UserError(f"--mixed_precision bf16: {torch.cuda.get_device_name()} cannot compute in bf16; use fp16")
    return requested or ("bf16" if bf16_in_hardware else "fp16")


def set_tf32(allowed: bool) -> None:
    """Lets GPUs round the inputs of fp32 matrix products to TF32, or not; torch's default for convolutions is TF32."""
    if allowed and not torch.cuda.is_available():
        warn("--allow_tf32: no effect without a CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def sampling_dtype(precision: str) -> torch.dtype:
    """Returns the dtype in which class and validation images are drawn: the run's own, but fp32 on the CPU."""
    return DTYPES[precision] if torch.cuda.is_available() else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """Returns how messages call a dtype: fp32, fp16 or bf16."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def all_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no element is infinite or NaN: by its extremes, ten times as fast as by each element."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())
