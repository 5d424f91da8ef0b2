"""Fine-tunes Stable Diffusion on 3 to 6 photos of a subject with DreamBooth, on ColossalAI's Booster.

On two GPUs:

    torchrun --standalone --nproc_per_node 2 train_dreambooth_colossalai.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images --class_prompt "a photo of dog" \\
        --placement cuda --max_train_steps 400 --output_dir dreambooth-model

Without torchrun it is a run of one process. Without a CUDA GPU it trains on the CPU.
"""

from dreambooth.command_line.console import doing, quiet_libraries, run, say

quiet_libraries()  # before the imports that warn

import argparse
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from colossalai.booster import Booster
from colossalai.booster.mixed_precision import FP16TorchMixedPrecision
from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin

from dreambooth.command_line import arguments
from dreambooth.command_line.limits import remember_cheaper_flags
from dreambooth.data.class_images import check_class_images, check_origins, generate_class_images
from dreambooth.data.images import check_crops, facts_of_all, images_per_epoch
from dreambooth.data.instance_images import find_instance_images
from dreambooth.data.latents import cache_latents
from dreambooth.data.samples import build_dataset, build_loader
from dreambooth.data.schedule import Schedule, plan
from dreambooth.engine.boosted import Boosted
from dreambooth.engine.optimizer import adamw_settings, build_adamw, build_lr_scheduler
from dreambooth.engine.plugins import ShardAdamW
from dreambooth.engine.strategy import PLACEMENTS, Strategy, choose_strategy
from dreambooth.model import stable_diffusion as models
from dreambooth.model.activations import discard_activations
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.folder import find_model
from dreambooth.model.loss import example_inputs, training_loss
from dreambooth.model.precision import DTYPES, INITIAL_LOSS_SCALE, sampling_dtype, set_tf32
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import compare, join, leave
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


def build_parser() -> arguments.Parser:
    """Returns the parser: the shared flags, and ColossalAI's."""
    parser = arguments.build_parser(__doc__)
    group = parser.add_argument_group("ColossalAI")
    group.add_argument(
        "-p",
        "--plugin",
        choices=tuple(PLACEMENTS),
        metavar="PLUGIN",
        help="how the UNet is spread over the GPUs: torch_ddp or torch_ddp_fp16, a whole copy on each; "
        "low_level_zero, optimizer state split (ZeRO 1); gemini, gradients split too (ZeRO 2), and the weights with "
        "--placement cpu (ZeRO 3) (default: torch_ddp for --placement cuda, else gemini)",
    )
    group.add_argument(
        "--placement",
        choices=("cuda", "cpu", "auto"),
        default="cuda",
        help="where weights and optimizer state stay between uses: on the GPUs, or in host memory (cpu, auto); with "
        "auto weights are whole on each GPU during a step, if they take no more than a fifth of its memory "
        "(default: cuda)",
    )
    group.add_argument(
        "--offload_optim_frac",
        type=arguments.number(float, 0, highest=1),
        metavar="X",
        help="gemini with --placement cuda or cpu: share of the optimizer state that is kept in host memory, from "
        "0 to 1 (default: 0 for cuda, 1 for cpu)",
    )
    return parser


def build_optimizer(
    args: argparse.Namespace, strategy: Strategy, denoiser: Denoiser, schedule: Schedule
) -> torch.optim.Optimizer:
    """Returns the strategy's AdamW over the denoiser's parameters."""
    if strategy.placement != "cuda":
        # Part of it works on the CPU, of which torchrun gives each process one core.
        cores = len(os.sched_getaffinity(0)) // find_place().local_world_size
        torch.set_num_threads(max(torch.get_num_threads(), cores))
    if strategy.plugin == "gemini":
        return ShardAdamW(denoiser.parameters(), fused=True, **adamw_settings(args, schedule))
    return build_adamw(args, denoiser.parameters(), schedule)


def build_booster(args: argparse.Namespace, strategy: Strategy, denoiser: Denoiser) -> Booster:
    """Returns the Booster with the strategy's plugin; the sharding plugins clip gradients themselves."""
    if strategy.plugin == "low_level_zero":
        return Booster(
            plugin=LowLevelZeroPlugin(
                stage=1,
                precision=strategy.precision,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=args.max_grad_norm,
                cpu_offload=strategy.placement == "cpu",
            )
        )
    if strategy.plugin == "gemini":
        fetches_weights = not denoiser.is_flat  # parts of a flat parameter cannot be fetched one by one
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
                # An infinite limit clips nothing. Without one Gemini would not wait for the norm of gradients that are
                # on their way between GPUs, and let the backward pass write over their memory.
                max_norm=args.max_grad_norm or math.inf,
                pin_memory=True,
                enable_gradient_accumulation=args.gradient_accumulation_steps > 1,
                # Gemini does not shard a model that is smaller than this many times 2**20 elements.
                min_chunk_size_m=min(32, denoiser.numel() / 4 / 2**20),
            )
        )
    return Booster(
        plugin=TorchDDPPlugin(gradient_as_bucket_view=True),
        mixed_precision=FP16TorchMixedPrecision(INITIAL_LOSS_SCALE) if strategy.precision == "fp16" else None,
    )


def boost(
    args: argparse.Namespace,
    strategy: Strategy,
    denoiser: Denoiser,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    inputs: tuple[torch.Tensor, ...],
) -> Boosted:
    """Puts the strategy's plugin around the denoiser and its optimizer, without losing a bit of the fp32 weights.

    `inputs` are an example of the denoiser's.
    """
    pretrained = denoiser.weights()  # keeps the fp32 weights alive while the plugin puts half-precision ones in place
    if args.cuda_graphs:
        half = None if strategy.shards or strategy.precision == "no" else DTYPES[strategy.precision]
        denoiser.to(inputs[0].device, strategy.weights_dtype).record(*inputs, half)
    booster = build_booster(args, strategy, denoiser)
    model, optimizer, _, _, lr_scheduler = booster.boost(denoiser, optimizer, lr_scheduler=lr_scheduler)
    boosted = Boosted(strategy, booster, denoiser, model, optimizer, lr_scheduler, args.max_grad_norm)
    if strategy.zero_offloads:
        boosted.pin_master_weights()
    boosted.load_master_weights(pretrained)
    return boosted


def train(boosted: Boosted, steps: Iterable[list], loss_of: Callable, milestones: Milestones, first_step: int) -> None:
    """Takes an optimizer step for each list of batches, of the mean of their losses."""
    for step, batches in enumerate(steps, start=first_step + 1):
        losses = []
        for batch in batches:
            with contextlib.nullcontext() if batch is batches[-1] else boosted.no_sync():
                with boosted.strategy.autocast():
                    loss = loss_of(boosted.model, batch) / len(batches)
                boosted.backward(loss)
            losses.append(loss.detach())
        lr = boosted.lr_scheduler.get_last_lr()[0]
        grad_norm = boosted.update()
        if milestones.after(step, loss=sum(losses), lr=lr, grad_norm=grad_norm):
            break


@unlocked_at_the_end()
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(build_parser(), argv)
    place = find_place()
    strategy = choose_strategy(args)
    remember_cheaper_flags(args, sharded=strategy.shards, has_plugins=True)
    instance_images = find_instance_images(args, place)
    check_crops(args, instance_images)
    class_images = check_class_images(args, place)
    enter_output_dir(args)
    model_folder = find_model(args)
    check_origins(args, class_images, model_folder)
    ranks = join(place)
    set_tf32(args.allow_tf32)
    instance_images = facts_of_all(instance_images, args.resolution)
    checkpoint = find_checkpoint(args)
    first_step = 0 if checkpoint is None else checkpoint.step
    seed = seed_of(args, checkpoint)
    schedule = plan(args, ranks.world_size, images_per_epoch(args, instance_images))
    settings = flag_settings(args, schedule, seed=seed, precision=strategy.precision)
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
        prior_dtype = sampling_dtype(strategy.precision, args.prior_generation_precision)
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
    dtype = DTYPES[strategy.precision]
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

    # The optimizer, and the plugin around it and what is trained.
    denoiser.train()
    if not strategy.shards:
        denoiser.normalize_in_half()
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    elif strategy.spares_memory and not (args.compile or args.cuda_graphs):
        discard_activations(denoiser.unet)
    if args.compile:
        denoiser.compile_blocks()
    fetches_weights = strategy.fetches_weights(denoiser.numel(), ranks.gpu_memory())
    if not (fetches_weights or args.use_8bit_adam):  # these two go by single parameters
        denoiser.flatten(multiple_of=ranks.world_size)
    optimizer = build_optimizer(args, strategy, denoiser, schedule)
    lr_scheduler = build_lr_scheduler(args, optimizer, schedule)
    samples = args.train_batch_size * (1 + args.with_prior_preservation)
    inputs = example_inputs(samples, latent_shape, prompts, strategy.weights_dtype, ranks.device)
    boosted = boost(args, strategy, denoiser, optimizer, lr_scheduler, inputs)
    if checkpoint is not None:
        boosted.resume(checkpoint)

    # Train.
    loss_of = functools.partial(
        training_loss,
        vae=vae,
        noise_scheduler=noise_scheduler,
        dtype=strategy.weights_dtype,
        prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
        snr_gamma=args.snr_gamma,
    )
    say(f"{strategy} on {ranks}, {schedule}, seed {seed}")
    with Tracker(args, schedule, ranks, dataset, first_step=first_step, skips=strategy.precision == "fp16") as tracker:
        half = sampling_dtype(strategy.precision)
        draw = functools.partial(validate, args, boosted, load_pipeline, tracker, seed=seed, dtype=half, ranks=ranks)
        milestones = Milestones(args, settings, boosted, tracker, draw, pipeline_size)
        with doing("training"):
            train(boosted, steps, loss_of, milestones, first_step)
        tracker.finish()
        if args.dry_run:
            tell_plan(args, tracker, ranks, first_step=first_step, denoiser=denoiser, pipeline=load_pipeline())
            return leave()

        # Save; the upload, which may take long, keeps no other rank waiting.
        weights = boosted.weights()
        if ranks.rank == 0:
            pipeline, base = load_pipeline(**denoiser.parts_with(weights)), args.pretrained_model_name_or_path
            save_pipeline(Path(args.output_dir), pipeline, step=schedule.steps, base=base, settings=settings)
            remove_interim_checkpoints(Path(args.output_dir))
        leave()
    if repo_id:
        upload(args, repo_id)


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
