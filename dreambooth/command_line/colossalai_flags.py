"""The flags that train_dreambooth_colossalai.py has beside those of both trainers."""

from dataclasses import dataclass

from dreambooth.command_line.flags import Flags, flag
from dreambooth.command_line.paths import path

# Which placements each plugin can serve.
PLACEMENTS = {
    "torch_ddp": ("cuda",),
    "torch_ddp_fp16": ("cuda",),
    "low_level_zero": ("cuda", "cpu"),
    "gemini": ("cuda", "cpu", "auto"),
}


@dataclass(frozen=True, kw_only=True)
class StrategyFlags:
    """The flags that ColossalAI's trainer has besides."""

    heading = "ColossalAI"

    plugin: str | None = flag(
        None,
        "how the UNet is spread over the GPUs: torch_ddp or torch_ddp_fp16, a whole copy on each; low_level_zero, "
        "optimizer state split (ZeRO 1); gemini, gradients split too (ZeRO 2), and the weights with --placement cpu "
        "(ZeRO 3)",
        shown="torch_ddp for --placement cuda, else gemini; with --lora_rank low_level_zero for --placement cpu",
        aliases=["-p"],
        choices=tuple(PLACEMENTS),
        metavar="PLUGIN",
    )
    placement: str = flag(
        "cuda",
        "where weights and optimizer state stay between uses: on the GPUs, or in host memory (cpu, auto); with auto "
        "weights are whole on each GPU during a step, if they take no more than a fifth of its memory",
        choices=("cuda", "cpu", "auto"),
    )
    offload_optim_frac: float | None = flag(
        None,
        "gemini with --placement cuda or cpu: share of the optimizer state that is kept in host memory, from 0 to 1",
        shown="0 for cuda, 1 for cpu",
        limits=(0, 1),
    )
    offload_dir: str | None = flag(
        None,
        "low_level_zero or gemini with --placement cpu: a folder on a fast disk of this machine, which then holds "
        "fp32 weights and optimizer state, 12 bytes for each weight; what is written there is gone when the run is",
        shown="host memory",
        type=path,
    )


@dataclass(frozen=True, kw_only=True)
class ColossalAIFlags(Flags):
    """The flags that both trainers have, and ColossalAI's own."""

    strategy: StrategyFlags = StrategyFlags()
