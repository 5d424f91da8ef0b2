"""Fine-tunes Stable Diffusion on 3 to 6 photos of a subject with DreamBooth, on ColossalAI's Booster.

On two GPUs:

    torchrun --standalone --nproc_per_node 2 train_dreambooth_colossalai.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images --class_prompt "a photo of dog" \\
        --placement cuda --max_train_steps 400 --output_dir dreambooth-model

Without torchrun it is a run of one process. Without a CUDA GPU it trains on the CPU.
"""

from dreambooth.console import quiet_libraries, run, say

quiet_libraries()  # before the imports that warn

import argparse
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import colossalai
import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.booster import Booster
from colossalai.booster.mixed_precision import FP16TorchMixedPrecision
from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from diffusers import UNet2DConditionModel

from dreambooth import arguments, models
from dreambooth.boosted import Boosted, ShardAdamW
from dreambooth.checkpoint import check_settings, find_checkpoint, save_checkpoint, settings_of
from dreambooth.class_images import check_class_images, generate_class_images
from dreambooth.data import build_dataset, build_loader, check_crops, find_images, images_to_use
from dreambooth.latents import cache_latents
from dreambooth.loss import training_loss
from dreambooth.optimizer import adamw_settings, build_lr_scheduler
from dreambooth.output import prepare_hub, prepare_output_dir, save_pipeline, unet_with, upload
from dreambooth.precision import DTYPES, INITIAL_LOSS_SCALE, sampling_dtype
from dreambooth.randomness import shared_seed
from dreambooth.ranks import Ranks, check_gpus, leave, run_alone_without_torchrun, stop_early
from dreambooth.schedule import plan
from dreambooth.strategy import PLACEMENTS, Strategy, choose_strategy
from dreambooth.tracker import Tracker


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
        "low_level_zero, optimizer state split (ZeRO 1); gemini, weights split too, in chunks (ZeRO 3) "
        "(default: torch_ddp for --placement cuda, else gemini)",
    )
    group.add_argument(
        "--placement",
        choices=("cuda", "cpu", "auto"),
        default="cuda",
        help="where weights and optimizer state stay between uses: on the GPUs, in host memory, or wherever Gemini "
        "finds room (default: cuda)",
    )
    group.add_argument(
        "--offload_optim_frac",
        type=arguments.number(float, 0, highest=1),
        metavar="X",
        help="gemini with --placement cuda or cpu: share of the optimizer state that is kept in host memory, from "
        "0 to 1 (default: 0 for cuda, 1 for cpu)",
    )
    return parser


def launch() -> Ranks:
    """Joins the process group of torchrun's environment, NCCL on GPUs and gloo on the CPU."""
    check_gpus()
    run_alone_without_torchrun()
    colossalai.launch_from_torch(verbose=False)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=get_accelerator().get_current_device(),
    )


def build_optimizer(strategy: Strategy, unet: UNet2DConditionModel, settings: dict) -> torch.optim.Optimizer:
    """Returns the strategy's AdamW over the UNet's parameters."""
    if strategy.placement != "cuda":
        # Part of it works on the CPU, of which torchrun gives each process one core.
        cores = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(torch.get_num_threads(), cores))
    adamw = ShardAdamW if strategy.plugin == "gemini" else torch.optim.AdamW
    return adamw(unet.parameters(), fused=True, **settings)


def build_booster(strategy: Strategy, unet: UNet2DConditionModel, max_grad_norm: float) -> Booster:
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
        return Booster(
            plugin=GeminiPlugin(
                precision=strategy.precision,
                placement_policy="auto" if strategy.placement == "auto" else "static",
                offload_optim_frac=strategy.offload_optim_frac,
                # Gemini can offload parameters only where the whole optimizer state is offloaded too.
                offload_param_frac=float(strategy.placement == "cpu" and strategy.offload_optim_frac == 1),
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=max_grad_norm,
                pin_memory=True,
                # Gemini does not shard a model that is smaller than this many times 2**20 elements.
                min_chunk_size_m=min(32, unet.num_parameters() / 4 / 2**20),
            )
        )
    return Booster(
        plugin=TorchDDPPlugin(gradient_as_bucket_view=True),
        mixed_precision=FP16TorchMixedPrecision(INITIAL_LOSS_SCALE) if strategy.precision == "fp16" else None,
    )


def boost(
    strategy: Strategy,
    unet: UNet2DConditionModel,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
) -> Boosted:
    """Puts the strategy's plugin around the UNet and its optimizer, without losing a bit of the fp32 weights."""
    pretrained = unet.state_dict()  # keeps the fp32 tensors alive while the plugin puts half-precision ones in place
    booster = build_booster(strategy, unet, max_grad_norm)
    model, optimizer, _, _, lr_scheduler = booster.boost(unet, optimizer, lr_scheduler=lr_scheduler)
    boosted = Boosted(strategy, booster, unet, model, optimizer, lr_scheduler, max_grad_norm)
    boosted.load_master_weights(pretrained)
    return boosted


def train(
    args: argparse.Namespace,
    boosted: Boosted,
    batches: Iterable,
    loss_of: Callable,
    tracker: Tracker,
    write_checkpoint: Callable[[int], None],
    first_step: int,
) -> None:
    """Takes one optimizer step per batch; writes checkpoint-N every --save_steps steps, and before an early stop."""
    for step, batch in enumerate(batches, start=first_step + 1):
        with boosted.strategy.autocast():
            loss = loss_of(boosted.model, batch)
        lr = boosted.lr_scheduler.get_last_lr()[0]
        grad_norm = boosted.update(loss)
        stop = tracker.step(step, loss=loss, lr=lr, grad_norm=grad_norm)
        if stop or step % args.save_steps == 0:
            tracker.settle()
            write_checkpoint(step)
        if stop:
            stop_early(tracker.request.name, step, tracker.schedule.steps)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(build_parser(), argv)
    strategy = choose_strategy(args)
    instance_images = find_images(args.instance_data_dir, "--instance_data_dir", images_to_use(args))
    check_crops(args, instance_images)
    check_class_images(args)
    checkpoint = find_checkpoint(args)
    model_folder = models.find_model(args)
    ranks = launch()
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
        half = sampling_dtype(strategy.precision)
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
    dtype = DTYPES[strategy.precision]
    prompts = [args.instance_prompt, args.class_prompt][: dataset.examples_per_sample]
    prompt_embeddings = models.embed_prompts(prompts, tokenizer, text_encoder, ranks.device, dtype)
    del text_encoder
    vae.to(ranks.device, dtype)
    cache_latents(args, dataset, vae, ranks)

    # The optimizer, and the plugin around it and the UNet.
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(strategy, unet, adamw_settings(args, schedule))
    lr_scheduler = build_lr_scheduler(args, optimizer, schedule)
    boosted = boost(strategy, unet, optimizer, lr_scheduler, args.max_grad_norm)
    if checkpoint is not None:
        boosted.resume(checkpoint)

    # Train.
    loss_of = functools.partial(
        training_loss,
        vae=vae,
        prompt_embeddings=prompt_embeddings,
        noise_scheduler=noise_scheduler,
        unet_dtype=strategy.unet_dtype,
        prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
    )
    say(f"{strategy} on {ranks}, {schedule}, seed {seed}")
    write_checkpoint = functools.partial(save_checkpoint, args, settings, boosted)
    with Tracker(args, schedule, ranks, dataset, first_step=first_step, skips=strategy.precision == "fp16") as tracker:
        train(args, boosted, batches, loss_of, tracker, write_checkpoint, first_step)

    # Save.
    weights = boosted.weights()
    if ranks.rank == 0:
        save_pipeline(Path(args.output_dir), load_pipeline(unet_with(weights, unet.config)))
    if repo_id:
        upload(args, repo_id)
    leave()


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
