"""Plugin, placement and precision: which combination the flags mean."""

import contextlib
from dataclasses import dataclass

import torch

from dreambooth.command_line.colossalai_flags import PLACEMENTS, ColossalAIFlags
from dreambooth.command_line.console import UserError
from dreambooth.engine.disk import check_folder
from dreambooth.model.precision import DTYPES, choose_precision


@dataclass(frozen=True)
class Strategy:
    """Plugin, placement and precision: a combination that this machine can run."""

    plugin: str
    placement: str
    precision: str
    offload_optim_frac: float = 0.0
    offload_dir: str | None = None

    def __str__(self) -> str:
        return f"plugin {self.plugin}, placement {self.placement}, precision {self.precision}"

    @property
    def shards(self) -> bool:
        """Whether the plugin splits the fp32 master weights over the ranks and computes in a half-precision copy."""
        return self.plugin in ("low_level_zero", "gemini")

    @property
    def zero_offloads(self) -> bool:
        """Whether low_level_zero keeps the master weights and optimizer state in host memory."""
        return self.plugin == "low_level_zero" and self.placement == "cpu"

    def fetches_weights(self, weights: int, gpu_memory: int) -> bool:
        """Returns whether the plugin fetches a weight for each operation, and lets go of it after.

        That takes the least memory and the most time. Otherwise weights are whole on each GPU from a forward pass to
        their gradients; with `auto`, if they take no more than a fifth of the GPU's memory, which is what Gemini's own
        policy leaves to weights as long as it does not know what else is needed.

        Args:
            weights: their number.
            gpu_memory: of the smallest GPU, in bytes.
        """
        if self.plugin != "gemini" or self.placement == "cuda":
            return False
        return self.placement == "cpu" or weights * self.weights_dtype.itemsize > gpu_memory / 5

    @property
    def spares_memory(self) -> bool:
        """Whether it is chosen to need little GPU memory, at the price of time."""
        return self.plugin == "gemini" or self.placement == "cpu"

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype of the weights that the forward pass uses."""
        return DTYPES[self.precision] if self.shards else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context of the forward pass; Booster and the sharding plugins bring their own."""
        if self.shards or self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


def choose_strategy(of_run: ColossalAIFlags) -> Strategy:
    """Returns the strategy of a run's flags.

    Raises:
        UserError: if the flags do not go together, or this machine cannot run them.
    """
    flags, training, adapters = of_run.strategy, of_run.training, of_run.lora.is_on
    on_gpu = torch.cuda.is_available()
    spares = {"cuda": "torch_ddp", "cpu": "low_level_zero" if adapters else "gemini", "auto": "gemini"}
    plugin = flags.plugin or spares[flags.placement]
    chosen = f"--plugin {plugin}" if flags.plugin else f"--placement {flags.placement} (plugin {plugin})"
    if flags.placement not in PLACEMENTS[plugin]:
        raise UserError(f"{chosen} goes with --placement {' or '.join(PLACEMENTS[plugin])}, not {flags.placement}")
    if adapters and plugin == "gemini":
        raise UserError(
            f"{chosen} keeps weights that are not trained whole on each GPU, and has nothing to split with "
            "--lora_rank: use --plugin torch_ddp or low_level_zero"
        )
    if not on_gpu and plugin != "torch_ddp":
        raise UserError(
            f"{chosen} needs a CUDA GPU, and none was found: --plugin torch_ddp --placement cuda trains on the CPU"
        )
    sharded = plugin in ("low_level_zero", "gemini")
    if plugin == "torch_ddp_fp16" and training.mixed_precision not in (None, "fp16"):
        raise UserError(f"{chosen} computes in fp16, not --mixed_precision {training.mixed_precision}: use torch_ddp")
    if sharded and training.mixed_precision == "no":
        raise UserError(f"{chosen} computes in bf16 or fp16: --mixed_precision no goes with --plugin torch_ddp")
    if sharded and of_run.optimizer.use_8bit_adam:
        raise UserError(
            f"--use_8bit_adam quantizes whole parameters, of which {chosen} gives each GPU a piece: "
            "use it with --plugin torch_ddp, or in train_dreambooth.py"
        )
    for name, insists in {"compile": training.compile, "cuda_graphs": training.cuda_graphs == "on"}.items():
        if insists and plugin == "gemini":
            raise UserError(f"--{name} cannot see what {chosen} does with the weights: use it with another plugin")
    offload = flags.offload_optim_frac
    if offload is not None and (plugin != "gemini" or flags.placement == "auto"):
        raise UserError(
            f"--offload_optim_frac goes with --plugin gemini and --placement cuda or cpu, not with {chosen}"
        )
    if offload is None:
        offload = 0.0 if flags.placement == "cuda" else 1.0
    if flags.offload_dir is not None:
        if not (sharded and flags.placement == "cpu"):
            raise UserError(
                "--offload_dir goes with --plugin low_level_zero or gemini and --placement cpu, "
                f"not with {chosen} and --placement {flags.placement}"
            )
        if not offload:
            raise UserError("--offload_dir holds what is offloaded, of which --offload_optim_frac 0 leaves nothing")
        check_folder(flags.offload_dir)
    precision = "fp16" if plugin == "torch_ddp_fp16" else choose_precision(training.mixed_precision)
    return Strategy(plugin, flags.placement, precision, offload, flags.offload_dir)
