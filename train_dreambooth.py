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

from dreambooth.command_line.console import doing, quiet_libraries, run, say

quiet_libraries()  # before the imports that warn

import argparse
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs

from dreambooth.command_line import arguments
from dreambooth.command_line.limits import remember_cheaper_flags
from dreambooth.data.class_images import check_class_images, check_origins, generate_class_images
from dreambooth.data.images import check_crops, facts_of_all, images_per_epoch
from dreambooth.data.instance_images import find_instance_images
from dreambooth.data.latents import cache_latents
from dreambooth.data.samples import build_dataset, build_loader
from dreambooth.data.schedule import plan
from dreambooth.engine.optimizer import (
    adam_step,
    build_adamw,
    build_lr_scheduler,
    optimizer_state,
    resume_lr_scheduler,
    resume_optimizer,
)
from dreambooth.engine.state import Checkpoint, Progress
from dreambooth.model import stable_diffusion as models
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.folder import find_model
from dreambooth.model.loss import example_inputs, training_loss
from dreambooth.model.precision import DTYPES, INITIAL_LOSS_SCALE, choose_precision, sampling_dtype, set_tf32
from dreambooth.processes.environment import Place, find_place
from dreambooth.processes.ranks import Ranks, check_gpus, compare, join, leave
from dreambooth.run.checkpoint import (
    check_settings,
    find_checkpoint,
    flag_settings,
    image_settings,
    remove_interim_checkpoints,
    seed_of,
)
from dreambooth.run.dry_run import tell_plan
from dreambooth.run.folders import unlocked_at_the_end
from dreambooth.run.milestones import Milestones
from dreambooth.run.output import enter_output_dir, prepare_hub, prepare_output_dir, save_pipeline, upload
from dreambooth.run.room import check_room
from dreambooth.run.tracker import Tracker
from dreambooth.run.validation import validate


def launch(place: Place, precision: str) -> tuple[Accelerator, Ranks]:
    """Joins the process group, if there is to be one, and hands it to accelerate."""
    if place.world_size > 1:
        join(place)
    else:
        check_gpus(place)
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
    accelerator = Accelerator(
        mixed_precision=precision,
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

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the fp32 weights on the CPU, by name; on other ranks than 0 nothing."""
        if not self.accelerator.is_main_process:
            return {}
        return {name: weight.cpu() for name, weight in self.denoiser.weights().items()}

    def progress(self, step: int) -> Progress:
        """Returns how far the run is after `step`."""
        adamw, scaler = self.optimizer.optimizer, self.accelerator.scaler
        return Progress(
            step=step,
            adam_step=adam_step(adamw),
            optimizer=optimizer_state(adamw, self.denoiser) if self.accelerator.is_main_process else {},
            lr_scheduler=self.lr_scheduler.state_dict(),
            grad_scaler=scaler.state_dict() if scaler else {},
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        resume_optimizer(self.optimizer.optimizer, self.denoiser.parts(), checkpoint)
        resume_lr_scheduler(self.lr_scheduler, checkpoint.lr_scheduler)
        if self.accelerator.scaler and checkpoint.grad_scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.grad_scaler)


def train(
    args: argparse.Namespace,
    training: Training,
    steps: Iterable[list],
    loss_of: Callable,
    milestones: Milestones,
    first_step: int,
) -> None:
    """Takes an optimizer step for each list of batches, of the mean of their losses."""
    for step, batches in enumerate(steps, start=first_step + 1):
        losses = []
        for batch in batches:
            # Ranks share their gradients after the last batch alone.
            with contextlib.nullcontext() if batch is batches[-1] else training.accelerator.no_sync(training.model):
                loss = loss_of(training.model, batch) / len(batches)
                training.accelerator.backward(loss)
            losses.append(loss.detach())
        grad_norm = training.accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm or math.inf)
        lr = training.lr_scheduler.get_last_lr()[0]
        training.optimizer.step()
        training.lr_scheduler.step()
        training.optimizer.zero_grad()
        if milestones.after(step, loss=sum(losses), lr=lr, grad_norm=grad_norm):
            break


@unlocked_at_the_end()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(arguments.build_parser(__doc__), argv)
    place = find_place()
    precision = choose_precision(args.mixed_precision)
    remember_cheaper_flags(args)
    instance_images = find_instance_images(args, place)
    check_crops(args, instance_images)
    class_images = check_class_images(args, place)
    enter_output_dir(args)
    model_folder = find_model(args)
    check_origins(args, class_images, model_folder)
    accelerator, ranks = launch(place, precision)
    set_tf32(args.allow_tf32)
    instance_images = facts_of_all(instance_images, args.resolution)
    checkpoint = find_checkpoint(args)
    first_step = 0 if checkpoint is None else checkpoint.step
    seed = seed_of(args, checkpoint)
    schedule = plan(args, ranks.world_size, images_per_epoch(args, instance_images))
    settings = flag_settings(args, schedule, seed=seed, precision=precision)
    compare("settings", lambda: settings)
    check_settings(checkpoint, settings, args.resume_anyway)
    repo_id = prepare_hub(args)

    # The parts of the model; those that are trained come from the checkpoint, if there is one.
    trained = None if checkpoint is None else checkpoint.folder
    tokenizer = models.load_tokenizer(model_folder, args.tokenizer_name)
    text_encoder = models.load_text_encoder(model_folder, trained, variant=args.variant)
    vae = models.load_vae(model_folder, args.resolution, variant=args.variant)
    unet = models.load_unet(model_folder, trained or args.external_unet_path, variant=args.variant)
    models.check_parts_fit(tokenizer, text_encoder, vae, unet)
    models.check_max_length(args.tokenizer_max_length, tokenizer, text_encoder)
    noise_scheduler = models.load_noise_scheduler(model_folder)
    load_pipeline = functools.partial(models.load_pipeline, model_folder, variant=args.variant, tokenizer=tokenizer)

    # What is frozen is not in a checkpoint, and each rank has it from its own disk.
    frozen = {"frozen parts": models.fingerprint(vae, *([] if args.train_text_encoder else [text_encoder]))}
    compare("model weights", functools.partial(models.fingerprint, unet, text_encoder, vae))
    check_settings(checkpoint, frozen, args.resume_anyway)
    pipeline_size = check_room(args, schedule, first_step=first_step, unet=unet, text_encoder=text_encoder, vae=vae)
    prepare_output_dir(args)

    # Class images, generated by the model as it is before training.
    if args.with_prior_preservation:
        prior_dtype = sampling_dtype(precision, args.prior_generation_precision)
        load_prior_unet = functools.partial(models.load_unet, model_folder, args.external_unet_path, prior_dtype)
        class_images = generate_class_images(
            args,
            class_images,
            lambda: load_pipeline(dtype=prior_dtype, unet=load_prior_unet(variant=args.variant)),
            model_folder,
            seed=seed,
            ranks=ranks,
        )

    # Samples, and which rank takes which.
    latent_shape = models.latent_shape(vae, args.resolution)
    dataset = build_dataset(
        args,
        instance_images,
        class_images,
        seed=seed,
        latent_shape=latent_shape,
        num_timesteps=noise_scheduler.config.num_train_timesteps,
    )
    settings_of_images = image_settings(instance_images + class_images)
    compare("images", lambda: settings_of_images)
    check_settings(checkpoint, settings_of_images, args.resume_anyway)
    settings |= frozen | settings_of_images

    # The frozen parts, in the run's precision. A text encoder that is trained reads tokens in every step.
    dtype = DTYPES[precision]
    prompts = models.tokenize(dataset.prompts, tokenizer, text_encoder)
    if args.train_text_encoder:
        denoiser = Denoiser(unet, text_encoder)
    else:
        prompts = models.embed(prompts.to(ranks.device), text_encoder, dtype)
        denoiser = Denoiser(unet)
    del text_encoder
    with doing("caching latents"):
        cache_latents(args, dataset, vae, ranks, dtype=dtype)
    steps = build_loader(dataset, schedule, ranks, first_step, args.dataloader_num_workers, prompts)

    # The optimizer. The learning rate counts optimizer steps, so accelerate, which would count ranks, does not get it.
    denoiser.train()
    denoiser.normalize_in_half()
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if args.compile:
        denoiser.compile_blocks()
    if not args.use_8bit_adam:  # which goes by single parameters
        denoiser.flatten(multiple_of=ranks.world_size)
    if args.cuda_graphs:
        samples = args.train_batch_size * (1 + args.with_prior_preservation)
        autocast = None if precision == "no" else dtype
        denoiser.to(ranks.device).record(
            *example_inputs(samples, latent_shape, prompts, torch.float32, ranks.device), autocast
        )
    optimizer = build_adamw(args, denoiser.parameters(), schedule)
    lr_scheduler = build_lr_scheduler(args, optimizer, schedule)
    training = Training(accelerator, denoiser, *accelerator.prepare(denoiser, optimizer), lr_scheduler)
    if checkpoint is not None:
        training.resume(checkpoint)

    # Train.
    loss_of = functools.partial(
        training_loss,
        vae=vae,
        noise_scheduler=noise_scheduler,
        dtype=torch.float32,
        prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
        snr_gamma=args.snr_gamma,
    )
    say(f"traditional process, precision {precision} on {ranks}, {schedule}, seed {seed}")
    with Tracker(args, schedule, ranks, dataset, first_step=first_step, skips=precision == "fp16") as tracker:
        half = sampling_dtype(precision)
        draw = functools.partial(validate, args, training, load_pipeline, tracker, seed=seed, dtype=half, ranks=ranks)
        milestones = Milestones(args, settings, training, tracker, draw, pipeline_size)
        with doing("training"):
            train(args, training, steps, loss_of, milestones, first_step)
        tracker.finish()
        if args.dry_run:
            tell_plan(args, tracker, ranks, first_step=first_step, denoiser=denoiser, pipeline=load_pipeline())
            return leave()

        # Save; the upload, which may take long, keeps no other rank waiting.
        weights = training.weights()
        if ranks.rank == 0:
            pipeline, base = load_pipeline(**denoiser.parts_with(weights)), args.pretrained_model_name_or_path
            save_pipeline(Path(args.output_dir), pipeline, step=schedule.steps, base=base, settings=settings)
            remove_interim_checkpoints(Path(args.output_dir))
        leave()
    if repo_id:
        upload(args, repo_id)


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
