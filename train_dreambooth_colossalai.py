"""Fine-tunes Stable Diffusion on 3 to 6 photos of a subject with DreamBooth, on ColossalAI's Booster.

On two GPUs:

    torchrun --standalone --nproc_per_node 2 train_dreambooth_colossalai.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images --class_prompt "a photo of dog" \\
        --placement cuda --max_train_steps 400 --output_dir dreambooth-model

Without torchrun it is a run of one process. Without a CUDA GPU it trains on the CPU.
"""

from dreambooth.command_line.colossalai_flags import ColossalAIFlags
from dreambooth.command_line.console import before_imports, doing, run_program, say
from dreambooth.command_line.parser import check, parse

before_imports(__name__, lambda: check(ColossalAIFlags, None, __doc__))

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence

import torch
from colossalai.booster import Booster
from colossalai.booster.mixed_precision import FP16TorchMixedPrecision
from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin

from dreambooth.command_line.flags import OptimizerFlags
from dreambooth.command_line.limits import remember_cheaper_flags
from dreambooth.data.schedule import Schedule
from dreambooth.engine.booster_training import BoosterTraining
from dreambooth.engine.offload import ORDINARY, Memory
from dreambooth.engine.optimizer import adamw_settings, build_adamw, build_lr_scheduler
from dreambooth.engine.plugins import ShardAdamW, let_convolutions_compile, masters_in
from dreambooth.engine.strategy import Strategy, choose_strategy
from dreambooth.model.activations import discard_activations
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.kernels_ahead import KernelsAhead
from dreambooth.model.libraries import grow_segments
from dreambooth.model.precision import DTYPES, INITIAL_LOSS_SCALE
from dreambooth.model.recording import all_ranks_record, records
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import join
from dreambooth.run.callbacks import Callbacks
from dreambooth.run.folders import unlocked_at_the_end
from dreambooth.run.memory import check_memory
from dreambooth.run.stages import (
    Run,
    agree,
    callbacks_of,
    check_inputs,
    loss_by,
    prepare_class_images,
    prepare_memory,
    prepare_model,
    prepare_samples,
    publish,
    save,
)


def prepare_denoiser(denoiser: Denoiser, strategy: Strategy, run: Run, *, recorded: bool) -> None:
    """Has the denoiser compute in the strategy's dtypes, keep the activations that it has room for, and be flat."""
    training, in_8_bits = run.flags.training, run.flags.optimizer.use_8bit_adam
    anew = in_8_bits and run.ranks.device.type == "cpu"
    denoiser.train().cast(strategy.weights_dtype, frozen=DTYPES[strategy.precision], anew=anew)
    if not strategy.shards:
        denoiser.normalize_in_half()
    if training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    elif strategy.spares_memory and not (training.compile or recorded):
        discard_activations(denoiser.unet)
    if training.compile:
        let_convolutions_compile()
        denoiser.compile_blocks()
    fetches_weights = strategy.fetches_weights(denoiser.trained.numel(), run.ranks.gpu_memory())
    if not (fetches_weights or in_8_bits):  # these two go by single parameters
        device = None if strategy.spares_memory else run.ranks.device
        denoiser.trained.flatten(run.ranks.world_size, device, on_demand=not training.compile)


def build_optimizer(
    flags: OptimizerFlags, strategy: Strategy, denoiser: Denoiser, schedule: Schedule
) -> torch.optim.Optimizer:
    """Returns the strategy's AdamW over the denoiser's parameters."""
    if strategy.placement != "cuda" or strategy.offload_optim_frac:
        # Part of it works on the CPU, of which torchrun gives each process one core.
        cores = len(os.sched_getaffinity(0)) // find_place().local_world_size
        torch.set_num_threads(max(torch.get_num_threads(), cores))
    if strategy.plugin == "gemini":
        return ShardAdamW(denoiser.trained.parameters(), fused=True, **adamw_settings(flags, schedule))
    return build_adamw(flags, denoiser.trained.parameters(), schedule)


def build_booster(strategy: Strategy, denoiser: Denoiser, *, max_grad_norm: float, accumulation: int) -> Booster:
    """Returns the Booster with the strategy's plugin; the sharding plugins clip gradients themselves."""
    if strategy.plugin == "low_level_zero":
        return Booster(
            plugin=LowLevelZeroPlugin(
                stage=1,
                precision=strategy.precision,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=max_grad_norm,
                cpu_offload=strategy.placement == "cpu",
            )
        )
    if strategy.plugin == "gemini":
        fetches_weights = not denoiser.trained.is_flat  # parts of a flat parameter cannot be fetched one by one
        return Booster(
            plugin=GeminiPlugin(
                precision=strategy.precision,
                # Gemini's own "auto" has no way of keeping weights whole.
                placement_policy="auto" if strategy.placement == "auto" and fetches_weights else "static",
                shard_param_frac=float(fetches_weights),
                offload_optim_frac=strategy.offload_optim_frac,
                # Gemini can offload parameters only where the whole optimizer state is offloaded too.
                offload_param_frac=float(strategy.placement == "cpu" and strategy.offload_optim_frac == 1),
                initial_scale=INITIAL_LOSS_SCALE,
                # Always a limit; an infinite one clips nothing. Without one Gemini does not wait for gradients that
                # are on their way between GPUs, and the backward pass may write over them.
                max_norm=max_grad_norm or math.inf,
                pin_memory=True,
                enable_gradient_accumulation=accumulation > 1,
                # Gemini does not shard a model that is smaller than this many times 2**20 elements.
                min_chunk_size_m=min(32, denoiser.trained.numel() / 4 / 2**20),
                # Pinned memory comes in powers of two. Gemini would search for a size that leaves fewer gaps: one
                # a little above 32 * 2**20 elements, say, of which each chunk takes twice that.
                search_range_m=0 if fetches_weights else 32,
            )
        )
    assert strategy.plugin in ("torch_ddp", "torch_ddp_fp16"), strategy.plugin
    return Booster(
        plugin=TorchDDPPlugin(gradient_as_bucket_view=True),
        mixed_precision=FP16TorchMixedPrecision(INITIAL_LOSS_SCALE) if strategy.precision == "fp16" else None,
    )


def boost(
    strategy: Strategy,
    denoiser: Denoiser,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    masters: dict[str, torch.Tensor],
    *,
    max_grad_norm: float,
    accumulation: int = 1,
    memory: Memory = ORDINARY,
) -> BoosterTraining:
    """Puts the strategy's plugin around the denoiser and its optimizer, without losing a bit of the fp32 weights.

    Args:
        strategy: of the run.
        denoiser, optimizer, lr_scheduler: as they are without a plugin.
        masters: the weights as their files have them, from which a sharding plugin's shards are filled.
        max_grad_norm: as of the flag.
        accumulation: batches of each step.
        memory: for what a sharding plugin keeps in host memory.
    """
    booster = build_booster(strategy, denoiser, max_grad_norm=max_grad_norm, accumulation=accumulation)
    with masters_in(memory):
        model, optimizer, _, _, lr_scheduler = booster.boost(denoiser, optimizer, lr_scheduler=lr_scheduler)
    boosted = denoiser, model, optimizer, lr_scheduler
    training = BoosterTraining(strategy, booster, *boosted, max_grad_norm, accumulation > 1, memory)
    if strategy.shards:
        training.load_master_weights(masters)
    return training


def train(
    training: BoosterTraining, steps: Iterable[list], loss_of: Callable, callbacks: Callbacks, first_step: int
) -> None:
    """Takes an optimizer step for each list of batches, of the mean of their losses."""
    for step, batches in enumerate(steps, start=first_step + 1):
        losses = []
        for batch in batches:
            with contextlib.nullcontext() if batch is batches[-1] else training.no_sync():
                with training.strategy.autocast():
                    loss = loss_of(training.model, batch) / len(batches)
                training.backward(loss)
            losses.append(loss.detach())
        lr = training.lr_scheduler.get_last_lr()[0]
        grad_norm = training.update()
        if callbacks.on_step_end(step, loss=sum(losses), lr=lr, grad_norm=grad_norm):
            break


@unlocked_at_the_end()
def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(ColossalAIFlags, argv, __doc__)
    strategy = choose_strategy(flags)
    recorded = records(flags.training, spares_memory=strategy.spares_memory)
    remember_cheaper_flags(flags, strategy)
    kernels = KernelsAhead(wanted=recorded and not flags.training.compile)  # with it most are torch's own
    inputs = check_inputs(flags)
    run = agree(flags, inputs, join(inputs.place), strategy.precision)
    recorded = all_ranks_record(recorded)
    check_memory(run, strategy)
    if strategy.spares_memory:
        grow_segments()

    # The model; what is trained of it comes from the checkpoint, if there is one.
    model = prepare_model(run)
    kernels.compile(model.components["unet"], dtype=DTYPES[strategy.precision], weights_dtype=strategy.weights_dtype)
    memory = prepare_memory(run, model, strategy.offload_dir)

    # Class images, generated by the model as it is before training.
    class_images = prepare_class_images(run, model)

    # Samples, and which rank takes which; and what is trained on them.
    samples, denoiser = prepare_samples(run, model, class_images)
    masters = denoiser.trained.values() if strategy.shards else {}
    prepare_denoiser(denoiser, strategy, run, recorded=recorded)

    # The optimizer, and the plugin around it and what is trained.
    optimizer = build_optimizer(flags.optimizer, strategy, denoiser, run.schedule)
    lr_scheduler = build_lr_scheduler(flags.optimizer, optimizer, run.schedule)
    training = boost(
        strategy,
        denoiser,
        optimizer,
        lr_scheduler,
        masters,
        max_grad_norm=flags.optimizer.max_grad_norm,
        accumulation=flags.training.gradient_accumulation_steps,
        memory=memory,
    )
    if recorded:
        kernels.wait()
        training.record(
            samples.example_inputs(dtype=strategy.weights_dtype), flags.training, besides=samples.encode_example
        )
    if run.checkpoint is not None:
        training.resume(run.checkpoint)

    # Steps, and what is due after them; then the trained pipeline.
    say(f"{strategy} on {run.ranks}, {run.schedule}, seed {run.seed}")
    with callbacks_of(run, model, samples, training) as callbacks:
        with doing("training"):
            train(training, samples.steps, loss_by(run, model, strategy.weights_dtype), callbacks, run.first_step)
        save(run, model, training, callbacks.tracker)
    publish(run, model)


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
