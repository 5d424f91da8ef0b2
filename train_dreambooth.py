"""Fine-tunes Stable Diffusion on 3 to 6 photos of a subject with DreamBooth: the traditional process, on accelerate.

It is there to be compared with train_dreambooth_colossalai.py: same flags, same samples, same loss.

On one GPU (or, with `accelerate launch --multi_gpu`, on several):

    python train_dreambooth.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images --class_prompt "a photo of dog" \\
        --max_train_steps 400 --output_dir dreambooth-model

Without a CUDA GPU it trains on the CPU.
"""

from dreambooth.command_line.console import before_imports, doing, run_program, say
from dreambooth.command_line.flags import Flags
from dreambooth.command_line.parser import check, parse

before_imports(__name__, lambda: check(Flags, None, __doc__))

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs

from dreambooth.command_line.limits import remember_cheaper_flags
from dreambooth.engine.optimizer import (
    adam_step,
    build_adamw,
    build_lr_scheduler,
    clip,
    load_torch_scaler,
    resume_lr_scheduler,
    resume_optimizer,
    state_bytes,
    state_slices,
)
from dreambooth.engine.state import Checkpoint, Progress
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.kernels_ahead import KernelsAhead
from dreambooth.model.precision import DTYPES, INITIAL_LOSS_SCALE, choose_precision
from dreambooth.model.recording import all_ranks_record, records
from dreambooth.model.slices import Slice
from dreambooth.processes.environment import Place
from dreambooth.processes.ranks import Ranks, check_gpus, join
from dreambooth.run.callbacks import Callbacks
from dreambooth.run.folders import unlocked_at_the_end
from dreambooth.run.memory import check_memory
from dreambooth.run.stages import (
    agree,
    callbacks_of,
    check_inputs,
    loss_by,
    prepare_class_images,
    prepare_model,
    prepare_samples,
    publish,
    save,
)


def launch(place: Place, precision: str) -> tuple[Accelerator, Ranks]:
    """Joins the process group, if there is to be one, and hands it to accelerate."""
    if place.world_size > 1:
        join(place)
    else:
        check_gpus(place)
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
    os.environ.pop("ACCELERATE_USE_CPU", None)  # the GPUs that are seen decide, as in all that was checked before
    accelerator = Accelerator(
        mixed_precision=precision,
        dynamo_backend="no",  # --compile decides, whatever the environment says
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[GradScalerKwargs(init_scale=INITIAL_LOSS_SCALE)],
    )
    accelerator.gradient_accumulation_steps = 1  # `train` divides; accelerate would again, if the environment says so
    return accelerator, Ranks(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )


@dataclass
class Training:
    """What accelerate has prepared, and what it takes to go on with a run."""

    accelerator: Accelerator
    denoiser: Denoiser
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float

    def weights(self) -> list[Slice]:
        """Returns the fp32 weights, which every rank has, and those that are frozen."""
        trained = self.denoiser.trained
        return [piece.slice_of(piece.shard.tensor) for piece in trained.pieces()] + trained.frozen()

    def optimizer_state(self) -> list[Slice]:
        """Returns AdamW's state, which every rank has."""
        return state_slices(self.optimizer.optimizer, self.denoiser.trained.pieces())

    def progress(self) -> Progress:
        """Returns how far the run is."""
        scaler = self.accelerator.scaler
        return Progress(
            adam_step(self.optimizer.optimizer), self.lr_scheduler.state_dict(), scaler.state_dict() if scaler else {}
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        resume_optimizer(self.optimizer.optimizer, self.denoiser.trained.pieces(), checkpoint)
        resume_lr_scheduler(self.lr_scheduler, checkpoint.lr_scheduler)
        if self.accelerator.scaler and checkpoint.grad_scaler:
            load_torch_scaler(self.accelerator.scaler, checkpoint.grad_scaler)


def train(training: Training, steps: Iterable[list], loss_of: Callable, callbacks: Callbacks, first_step: int) -> None:
    """Takes an optimizer step for each list of batches, of the mean of their losses."""
    for step, batches in enumerate(steps, start=first_step + 1):
        losses = []
        for batch in batches:
            # Ranks share their gradients after the last batch alone.
            with contextlib.nullcontext() if batch is batches[-1] else training.accelerator.no_sync(training.model):
                loss = loss_of(training.model, batch) / len(batches)
                training.accelerator.backward(loss)
            losses.append(loss.detach())
        training.accelerator.unscale_gradients()
        grad_norm = clip(training.optimizer.optimizer, training.max_grad_norm)
        lr = training.lr_scheduler.get_last_lr()[0]
        training.optimizer.step()
        training.lr_scheduler.step()
        training.optimizer.zero_grad()
        if callbacks.on_step_end(step, loss=sum(losses), lr=lr, grad_norm=grad_norm):
            break


@unlocked_at_the_end()
def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, __doc__)
    precision = choose_precision(flags.training.mixed_precision)
    recorded = records(flags.training)
    remember_cheaper_flags(flags)
    kernels = KernelsAhead(wanted=recorded and not flags.training.compile)  # with it most are torch's own
    inputs = check_inputs(flags)
    accelerator, ranks = launch(inputs.place, precision)
    run = agree(flags, inputs, ranks, precision)
    recorded = all_ranks_record(recorded)
    check_memory(run)

    # The model; what is trained of it comes from the checkpoint, if there is one.
    model = prepare_model(run)
    kernels.compile(model.components["unet"], dtype=DTYPES[precision], weights_dtype=torch.float32)

    # Class images, generated by the model as it is before training.
    class_images = prepare_class_images(run, model)

    # Samples, and which rank takes which; and what is trained on them.
    samples, denoiser = prepare_samples(run, model, class_images)
    in_8_bits = flags.optimizer.use_8bit_adam
    denoiser.train().cast(torch.float32, frozen=DTYPES[precision], anew=in_8_bits and ranks.device.type == "cpu")
    denoiser.normalize_in_half()
    if flags.training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if flags.training.compile:
        denoiser.compile_blocks()
    if not in_8_bits:  # which goes by single parameters
        denoiser.trained.flatten(ranks.world_size, ranks.device, on_demand=not flags.training.compile)

    # The optimizer. The learning rate counts optimizer steps, so accelerate, which would count ranks, does not get it.
    optimizer = build_adamw(flags.optimizer, denoiser.trained.parameters(), run.schedule)
    lr_scheduler = build_lr_scheduler(flags.optimizer, optimizer, run.schedule)
    prepared = accelerator.prepare(denoiser, optimizer)
    training = Training(accelerator, denoiser, *prepared, lr_scheduler, flags.optimizer.max_grad_norm)
    if recorded:
        kernels.wait()
        denoiser.record(
            samples.example_inputs(dtype=torch.float32),
            dtype=DTYPES[precision],
            keep_free=state_bytes(optimizer, denoiser.trained.numel()),
            insist=flags.training.cuda_graphs == "on",
            besides=samples.encode_example,
            accumulates=flags.training.gradient_accumulation_steps > 1,
        )
    if run.checkpoint is not None:
        training.resume(run.checkpoint)

    # Steps, and what is due after them; then the trained pipeline.
    say(f"traditional process, precision {precision} on {ranks}, {run.schedule}, seed {run.seed}")
    with callbacks_of(run, model, samples, training) as callbacks:
        with doing("training"):
            train(training, samples.steps, loss_by(run, model, torch.float32), callbacks, run.first_step)
        save(run, model, training, callbacks.tracker)
    publish(run, model)


if __name__ == "__main__":
    run_program(main, os.path.basename(__file__))
