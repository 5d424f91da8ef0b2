"""Fine-tunes Stable Diffusion on 3 to 6 photos of a subject with DreamBooth, on ColossalAI's Booster.

On two GPUs:

    torchrun --standalone --nproc_per_node 2 train_dreambooth_colossalai.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --instance_data_dir photos --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images --class_prompt "a photo of dog" \\
        --placement cuda --max_train_steps 400 --output_dir dreambooth-model

Without torchrun it is a run of one process. Without a CUDA GPU it trains on the CPU.
"""

from dreambooth.console import UserError, quiet_libraries, run, say

quiet_libraries()  # before the imports that warn

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import colossalai
import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.amp.naive_amp.grad_scaler import DynamicGradScaler
from colossalai.booster import Booster
from colossalai.booster.mixed_precision import FP16TorchMixedPrecision
from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.interface import OptimizerWrapper
from colossalai.zero import GeminiDDP, LowLevelZeroOptimizer
from colossalai.zero.gemini import gemini_optimizer
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
from dreambooth.class_images import generate_class_images
from dreambooth.data import build_dataset, build_loader, find_images, images_to_use
from dreambooth.latents import cache_latents
from dreambooth.loss import training_loss
from dreambooth.optimizer import adamw_settings, build_lr_scheduler, resume_lr_scheduler
from dreambooth.output import prepare_hub, save_pipeline, unet_with, upload
from dreambooth.precision import DTYPES, INITIAL_LOSS_SCALE, choose_precision, sampling_dtype
from dreambooth.randomness import shared_seed
from dreambooth.ranks import Ranks, check_gpus, leave, run_alone_without_torchrun
from dreambooth.schedule import plan
from dreambooth.tracker import Tracker

# What ColossalAI's loss scaler counts, besides the scale.
SCALER_COUNTERS = ("_growth_step", "_hysteresis_step")
# Which placements each plugin can serve.
PLACEMENTS = {
    "torch_ddp": ("cuda",),
    "torch_ddp_fp16": ("cuda",),
    "low_level_zero": ("cuda", "cpu"),
    "gemini": ("cuda", "cpu", "auto"),
}


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


@dataclass(frozen=True)
class Strategy:
    """Plugin, placement and precision: a combination that this machine can run."""

    plugin: str
    placement: str
    precision: str
    offload_optim_frac: float = 0.0

    def __str__(self) -> str:
        return f"plugin {self.plugin}, placement {self.placement}, precision {self.precision}, fused AdamW"

    @property
    def shards(self) -> bool:
        """Whether the plugin splits the fp32 master weights over the ranks and computes in a half-precision copy."""
        return self.plugin in ("low_level_zero", "gemini")

    @property
    def unet_dtype(self) -> torch.dtype:
        """Dtype of the weights that the forward pass uses."""
        return DTYPES[self.precision] if self.shards else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns the context of the forward pass; Booster and the sharding plugins bring their own."""
        if self.shards or self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(get_accelerator().get_current_device().type, torch.bfloat16)


def choose_strategy(args: argparse.Namespace) -> Strategy:
    """Returns the strategy of the flags.

    Raises:
        UserError: if the flags do not go together, or this machine cannot run them.
    """
    on_gpu = torch.cuda.is_available()
    plugin = args.plugin or ("torch_ddp" if args.placement == "cuda" else "gemini")
    chosen = f"--plugin {plugin}" if args.plugin else f"--placement {args.placement} (plugin {plugin})"
    if args.placement not in PLACEMENTS[plugin]:
        raise UserError(f"{chosen} goes with --placement {' or '.join(PLACEMENTS[plugin])}, not {args.placement}")
    if not on_gpu and plugin != "torch_ddp":
        raise UserError(
            f"{chosen} needs a CUDA GPU, and none was found: --plugin torch_ddp --placement cuda trains on the CPU"
        )
    sharded = plugin in ("low_level_zero", "gemini")
    if plugin == "torch_ddp_fp16" and args.mixed_precision not in (None, "fp16"):
        raise UserError(f"{chosen} computes in fp16, not --mixed_precision {args.mixed_precision}: use torch_ddp")
    if sharded and args.mixed_precision == "no":
        raise UserError(f"{chosen} computes in bf16 or fp16: --mixed_precision no goes with --plugin torch_ddp")
    offload = args.offload_optim_frac
    if offload is not None and (plugin != "gemini" or args.placement == "auto"):
        raise UserError(
            f"--offload_optim_frac goes with --plugin gemini and --placement cuda or cpu, not with {chosen}"
        )
    if offload is None:
        offload = 1.0 if args.placement == "cpu" else 0.0
    precision = "fp16" if plugin == "torch_ddp_fp16" else choose_precision(args.mixed_precision)
    return Strategy(plugin, args.placement, precision, offload)


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


class ShardAdamW(torch.optim.AdamW):
    """torch's fused AdamW for the shards that Gemini hands out: fp32 weights with half-precision gradients.

    Gemini leaves the division of the gradients, for clipping and by the loss scale, to the optimizer: it calls
    `step(div_scale=...)`. ColossalAI has optimizers for that, whose kernels are compiled at their first use; this one
    needs no compiler, and works on GPUs and in host memory.
    """

    num_fp32_shards_per_param = 4  # weight, gradient, two moments: by which Gemini finds room for them
    div_scale = -1.0  # not above 0: no division

    def step(self, closure=None, div_scale: float = -1.0):
        self.div_scale = div_scale
        return super().step(closure)

    def _init_group(self, group: dict, params: list, grads: list, *others):
        """Gathers a group's tensors, as torch's optimizers do; the gradients in fp32."""
        found = super()._init_group(group, params, grads, *others)
        grads[:] = [grad.float() for grad in grads]
        if self.div_scale > 0:
            torch._foreach_div_(grads, self.div_scale)
        return found


gemini_optimizer._AVAIL_OPTIM_LIST.add(ShardAdamW)  # Gemini takes the exact types of this set only


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


@dataclass
class Part:
    """What this rank holds of a parameter of the UNet: its flattened elements from `first` to `last`.

    Args:
        name: of the parameter.
        tensor: the fp32 master weights that AdamW updates; what is beyond `last - first` elements is padding.
        state_key: by which the optimizer keeps its state of them.
    """

    name: str
    first: int
    last: int
    tensor: torch.Tensor
    state_key: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the elements of a tensor that is laid out as `tensor` is, without padding, flat."""
        return tensor.view(-1)[: self.last - self.first]


@dataclass
class Boosted:
    """The UNet and its optimizer as Booster returned them, and the module that was boosted.

    A sharding plugin computes in a half-precision copy of the weights; the fp32 master weights, which are the model,
    lie in its optimizer, each rank holding a part.
    """

    strategy: Strategy
    booster: Booster
    unet: UNet2DConditionModel
    model: torch.nn.Module
    optimizer: OptimizerWrapper
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    max_grad_norm: float

    def update(self, loss: torch.Tensor) -> torch.Tensor | float | None:
        """Takes an optimizer step down the gradient of `loss`.

        Returns:
            The L2 norm of the gradients over all ranks before clipping, or None where clipping is off.
        """
        self.booster.backward(loss, self.optimizer)
        if self.strategy.shards:
            self.optimizer.step()
            norm = self._norm_of_sharded_gradients()
        else:
            norm = self._clip()
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return norm

    def _clip(self) -> torch.Tensor | None:
        if not self.max_grad_norm:
            return None
        if self.strategy.precision == "fp16":
            self.optimizer.unscale_grad()
        return torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.max_grad_norm)

    def _norm_of_sharded_gradients(self) -> float | None:
        """Returns the norm that the plugin found when it clipped, without the loss scale that is in it in fp16."""
        norm = self.optimizer.get_grad_norm()
        if not self.max_grad_norm or norm is None:
            return None
        return norm / self._sharded_grad_scaler.scale.item() if self.strategy.precision == "fp16" else norm

    def _parts(self) -> Iterator[Part]:
        """Yields this rank's parts, in the same order on all ranks; a part may be empty."""
        if isinstance(self.optimizer, LowLevelZeroOptimizer):
            for name, parameter in self.unet.named_parameters():
                shard = self.optimizer.working_to_master_param[id(parameter)]
                first = min(dist.get_rank() * shard.numel(), parameter.numel())
                yield Part(name, first, min(first + shard.numel(), parameter.numel()), shard, shard)
        elif isinstance(self.model, GeminiDDP):
            fakes = {
                id(parameter): self.optimizer.id_to_fake_params.get(number)
                for number, parameter in self.optimizer.id_to_real_params.items()
            }
            for half, master in zip(self.model.fp16_params, self.model.fp32_params, strict=True):
                chunk = self.model.chunk_manager.get_chunk(master)
                assert not chunk.is_gathered, "each rank holds a shard"
                place = chunk.tensors_info[master]
                first = max(place.offset, chunk.shard_begin)
                last = max(first, min(place.end, chunk.shard_end))
                shard = chunk.payload[first - chunk.shard_begin : last - chunk.shard_begin]
                name = self.model.param2name[half]
                yield Part(name, first - place.offset, last - place.offset, shard, fakes[id(half)])
        else:
            for name, parameter in self.unet.named_parameters():
                yield Part(name, 0, parameter.numel(), parameter.detach(), parameter)

    @property
    def _adamw(self) -> torch.optim.AdamW:
        """The optimizer inside the plugin's wrappers, of which torch_ddp_fp16 has two."""
        optimizer = self.optimizer
        while isinstance(optimizer, OptimizerWrapper):
            optimizer = optimizer.optim
        return optimizer

    def _state(self, part: Part) -> dict:
        """Returns the state that AdamW keeps of a part."""
        return self._adamw.state[part.state_key]

    @torch.no_grad()
    def load_master_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Sets the fp32 master weights of a sharding plugin, which has made its own out of the half-precision copy.

        Args:
            weights: fp32 tensors by the names of the UNet's parameters.
        """
        if self.strategy.shards:
            for part in self._parts():
                part.of(part.tensor).copy_(weights[part.name].flatten()[part.first : part.last])

    @torch.no_grad()
    def gather(self, tensor_of: Callable[[Part], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Collects fp32 tensors of the parameters' shapes on rank 0, on the CPU; to be called on every rank.

        Args:
            tensor_of: returns this rank's tensor of a part that is not empty.

        Returns:
            Tensors by the names of the UNet's parameters; an empty dict on other ranks than 0.
        """
        device = get_accelerator().get_current_device()
        shapes = {name: parameter.shape for name, parameter in self.unet.named_parameters()}
        gathered = {}
        for part in self._parts():
            if self.strategy.shards:
                # As integers, the sum of all parts and zeros elsewhere is each part, to the sign of a zero.
                whole = torch.zeros(shapes[part.name].numel(), dtype=torch.int32, device=device)
                if part.first < part.last:
                    whole[part.first : part.last] = part.of(tensor_of(part)).view(torch.int32).to(device)
                dist.reduce(whole, dst=0)
                whole = whole.view(torch.float32).view(shapes[part.name])
            else:
                whole = tensor_of(part)
            if dist.get_rank() == 0:
                gathered[part.name] = whole.detach().cpu()
        return gathered

    def gather_master_weights(self) -> dict[str, torch.Tensor]:
        """Collects the fp32 master weights, as `gather` does."""
        return self.gather(lambda part: part.tensor)

    def progress(self, step: int) -> Progress:
        """Returns how far the run is after `step`; to be called on every rank."""
        adam_steps = [int(state["step"]) for state in self._adamw.state.values()]
        return Progress(
            step=step,
            adam_step=adam_steps[0],
            moments={name: self.gather(lambda part: self._state(part)[name]) for name in MOMENTS},  # noqa: B023
            lr_scheduler=self.lr_scheduler.state_dict(),
            grad_scaler=self._grad_scaler_state(),
        )

    @torch.no_grad()
    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint's optimizer state, learning rate schedule and loss scale, beside its weights."""
        for part in self._parts():
            if part.first < part.last:
                state = self._state(part)
                state["step"] = torch.tensor(float(checkpoint.adam_step), device=part.tensor.device)
                for name in MOMENTS:
                    state[name] = torch.zeros_like(part.tensor, dtype=torch.float32)
                    whole = checkpoint.moment(name, part.name).flatten()
                    part.of(state[name]).copy_(whole[part.first : part.last])
        resume_lr_scheduler(self.lr_scheduler, checkpoint.lr_scheduler)
        self._load_grad_scaler_state(checkpoint.grad_scaler)

    @property
    def _sharded_grad_scaler(self) -> DynamicGradScaler:
        gemini = isinstance(self.model, GeminiDDP)
        return (self.optimizer.mix_precision_mixin if gemini else self.optimizer.mixed_precision_mixin).grad_scaler

    def _grad_scaler_state(self) -> dict:
        """Returns the state of fp16's loss scale; ColossalAI's own `state_dict` leaves the counters out."""
        if self.strategy.precision != "fp16":
            return {}
        if not self.strategy.shards:
            return self.optimizer.scaler.state_dict()
        scaler = self._sharded_grad_scaler
        return {"scale": scaler.scale.item()} | {name: getattr(scaler, name) for name in SCALER_COUNTERS}

    def _load_grad_scaler_state(self, state: dict) -> None:
        if self.strategy.precision != "fp16" or not state:
            return
        if not self.strategy.shards:
            self.optimizer.scaler.load_state_dict(state)
            return
        scaler = self._sharded_grad_scaler
        scaler.scale.fill_(state["scale"])
        for name in SCALER_COUNTERS:
            setattr(scaler, name, state[name])


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
    write_checkpoint: Callable[[Progress, UNet2DConditionModel], None],
    first_step: int,
) -> None:
    """Takes one optimizer step per batch, and writes checkpoint-N every --save_steps steps."""
    for step, batch in enumerate(batches, start=first_step + 1):
        with boosted.strategy.autocast():
            loss = loss_of(boosted.model, batch)
        lr = boosted.lr_scheduler.get_last_lr()[0]
        grad_norm = boosted.update(loss)
        tracker.step(step, loss=loss, lr=lr, grad_norm=grad_norm)
        if step % args.save_steps == 0:
            save(boosted, functools.partial(write_checkpoint, boosted.progress(step)))


def save(boosted: Boosted, write: Callable[[UNet2DConditionModel], None]) -> None:
    """Hands the UNet with its fp32 master weights to `write` on rank 0; to be called on every rank."""
    weights = boosted.gather_master_weights()
    if dist.get_rank() == 0:
        write(unet_with(weights, boosted.unet.config))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments.parse(build_parser(), argv)
    strategy = choose_strategy(args)
    model_folder = models.find_model(args)
    instance_images = find_images(args.instance_data_dir, "--instance_data_dir", images_to_use(args))
    checkpoint = find_checkpoint(args)
    ranks = launch()
    seed = shared_seed(args.seed)
    repo_id = prepare_hub(args) if args.push_to_hub and ranks.rank == 0 else None

    # The parts of the model.
    tokenizer = models.load_tokenizer(model_folder, args.tokenizer_name)
    text_encoder = models.load_text_encoder(model_folder)
    vae = models.load_vae(model_folder, args.resolution)
    unet = models.load_unet(model_folder, args.external_unet_path if checkpoint is None else checkpoint.unet)
    noise_scheduler = models.load_noise_scheduler(model_folder)
    load_pipeline = functools.partial(models.load_pipeline, model_folder, tokenizer=tokenizer)

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
    with Tracker(args, schedule, ranks, first_step, schedule.total_batch * dataset.examples_per_sample) as tracker:
        write_checkpoint = functools.partial(save_checkpoint, args, settings)
        train(args, boosted, batches, loss_of, tracker, write_checkpoint, first_step)

    # Save.
    save(boosted, functools.partial(save_pipeline, Path(args.output_dir), load_pipeline))
    if repo_id:
        upload(args, repo_id)
    leave()


if __name__ == "__main__":
    run(main, os.path.basename(__file__))
