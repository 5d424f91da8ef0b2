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

from dreambooth.console import quiet_libraries, run, say

quiet_libraries()  # before the imports that warn

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradScalerKwargs
from diffusers import UNet2DConditionModel

from dreambooth import arguments, models
from dreambooth.checkpoint import (
    MOMENTS,
    Checkpoint,
    Progress,
    check_settings,
    find_checkpoint,
    save_checkpoint,
    settings_of,
)
from dreambooth.class_images import check_class_images, generate_class_images
from dreambooth.data import build_dataset, build_loader, check_crops, find_images, images_to_use
from dreambooth.latents import cache_latents
from dreambooth.loss import training_loss
from dreambooth.optimizer import adamw_settings, build_lr_scheduler, resume_lr_scheduler
from dreambooth.output import prepare_hub, prepare_output_dir, save_pipeline, unet_with, upload
from dreambooth.precision import DTYPES, INITIAL_LOSS_SCALE, choose_precision, sampling_dtype
from dreambooth.randomness import shared_seed
from dreambooth.ranks import Ranks, check_gpus, leave, stop_early
from dreambooth.schedule import plan
from dreambooth.tracker import Tracker


def launch(precision: str) -> tuple[Accelerator, Ranks]:
    """Joins the process group of accelerate's or torchrun's environment, if there is one."""
    check_gpus()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[GradScalerKwargs(init_scale=INITIAL_LOSS_SCALE)],
    )
    return accelerator, Ranks(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )


@dataclass
class Training:
    """What accelerate has prepared, and what it takes to go on with a run."""

    accelerator: Accelerator
    unet: UNet2DConditionModel
    model: torch.nn.Module
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the fp32 weights on the CPU, by name; on other ranks than 0 nothing."""
        if not self.accelerator.is_main_process:
            return {}
        return {name: parameter.detach().cpu() for name, parameter in self.unet.named_parameters()}

    def progress(self, step: int) -> Progress:
        """Returns how far the run is after `step`."""
        state = self.optimizer.optimizer.state
        scaler = self.accelerator.scaler
        return Progress(
            step=step,
            adam_step=max((int(of_one["step"]) for of_one in state.values()), default=0),
            moments={moment: self._moment(moment) for moment in MOMENTS},
            lr_scheduler=self.lr_scheduler.state_dict(),
            grad_scaler=scaler.state_dict() if scaler else {},
        )

    def _moment(self, moment: str) -> dict[str, torch.Tensor]:
        """Returns one of MOMENTS of all parameters, on the CPU; zeros before the first update."""
        state = self.optimizer.optimizer.state
        return {
            name: state[parameter][moment].cpu() if parameter in state else torch.zeros(parameter.shape)
            for name, parameter in self.unet.named_parameters()
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        for name, parameter in self.unet.named_parameters():
            state = self.optimizer.optimizer.state[parameter]
            state["step"] = torch.tensor(float(checkpoint.adam_step), device=parameter.device)
            for moment in MOMENTS:
                state[moment] = checkpoint.moment(moment, name).to(parameter.device)
        resume_lr_scheduler(self.lr_scheduler, checkpoint.lr_scheduler)
        if self.accelerator.scaler and checkpoint.grad_scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.grad_scaler)


def train(
    args: argparse.Namespace,
    training: Training,
    batches: Iterable,
    loss_of: Callable,
    tracker: Tracker,
    write_checkpoint: Callable[[int], None],
    first_step: int,
) -> None:
    """Takes one optimizer step per batch; writes checkpoint-N every --save_steps steps, and before an early stop."""
    for step, batch in enumerate(batches, start=first_step + 1):
        loss = loss_of(training.model, batch)
        training.accelerator.backward(loss)
        grad_norm = training.accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm or math.inf)
        lr = training.lr_scheduler.get_last_lr()[0]
        training.optimizer.step()
        training.lr_scheduler.step()
        training.optimizer.zero_grad()
        stop = tracker.step(step, loss=loss, lr=lr, grad_norm=grad_norm)
        if stop or step % args.save_steps == 0:
            tracker.settle()
            write_checkpoint(step)
        if stop:
            stop_early(tracker.request.name, step, tracker.schedule.steps)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(arguments.build_parser(__doc__), argv)
    precision = choose_precision(args.mixed_precision)
    instance_images = find_images(args.instance_data_dir, "--instance_data_dir", images_to_use(args))
    check_crops(args, instance_images)
    check_class_images(args)
    checkpoint = find_checkpoint(args)
    model_folder = models.find_model(args)
    accelerator, ranks = launch(precision)
    seed = shared_seed(args.seed)
    repo_id = prepare_hub(args) if args.push_to_hub and ranks.rank == 0 else None

    # The parts of the model.
    tokenizer = models.load_tokenizer(model_folder, args.tokenizer_name)
    text_encoder = models.load_text_encoder(model_folder)
    vae = models.load_vae(model_folder, args.resolution)
    unet = models.load_unet(model_folder, args.external_unet_path if checkpoint is None else checkpoint.unet)
    models.check_parts_fit(tokenizer, text_encoder, vae, unet)
    noise_scheduler = models.load_noise_scheduler(model_folder)
    load_pipeline = functools.partial(models.load_pipeline, model_folder, tokenizer=tokenizer)

    prepare_output_dir(Path(args.output_dir))

    # Class images, generated by the model as it is before training.
    class_images = []
    if args.with_prior_preservation:
        half = sampling_dtype(precision)
        class_images = generate_class_images(
            args,
            lambda: load_pipeline(models.load_unet(model_folder, args.external_unet_path).to(half), torch_dtype=half),
            seed=seed,
            ranks=ranks,
        )

    # Samples, and which rank takes which.
    dataset = build_dataset(
        args,
        instance_images,
        class_images,
        seed=seed,
        latent_shape=models.latent_shape(vae, args.resolution),
        num_timesteps=noise_scheduler.config.num_train_timesteps,
    )
    schedule = plan(args, ranks.world_size, dataset.images_per_epoch)
    settings = settings_of(args, seed=seed, total_batch=schedule.total_batch, images=instance_images + class_images)
    first_step = 0
    if checkpoint is not None:
        check_settings(checkpoint, settings, args.resume_anyway)
        first_step = checkpoint.step
    batches = build_loader(dataset, schedule, ranks, first_step)

    # The frozen parts, in the run's precision.
    dtype = DTYPES[precision]
    prompts = [args.instance_prompt, args.class_prompt][: dataset.examples_per_sample]
    prompt_embeddings = models.embed_prompts(prompts, tokenizer, text_encoder, ranks.device, dtype)
    del text_encoder
    vae.to(ranks.device, dtype)
    cache_latents(args, dataset, vae, ranks)

    # The optimizer. The learning rate counts optimizer steps, so accelerate, which would count ranks, does not get it.
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True, **adamw_settings(args, schedule))
    lr_scheduler = build_lr_scheduler(args, optimizer, schedule)
    training = Training(accelerator, unet, *accelerator.prepare(unet, optimizer), lr_scheduler)
    if checkpoint is not None:
        training.resume(checkpoint)

    # Train.
    loss_of = functools.partial(
        training_loss,
        vae=vae,
        prompt_embeddings=prompt_embeddings,
        noise_scheduler=noise_scheduler,
        unet_dtype=torch.float32,
        prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
    )
    say(f"traditional process, precision {precision}, fused AdamW on {ranks}, {schedule}, seed {seed}")
    write_checkpoint = functools.partial(save_checkpoint, args, settings, training)
    with Tracker(args, schedule, ranks, dataset, first_step=first_step, skips=precision == "fp16") as tracker:
        train(args, training, batches, loss_of, tracker, write_checkpoint, first_step)

    # Save.
    weights = training.weights()
    if ranks.rank == 0:
        save_pipeline(Path(args.output_dir), load_pipeline(unet_with(weights, unet.config)))
    if repo_id:
        upload(args, repo_id)
    leave()


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
