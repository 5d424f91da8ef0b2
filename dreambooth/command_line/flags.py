"""The flags that both trainers have, by group: what a run is told, as frozen objects that a program can make too.

    OptimizerFlags(learning_rate=1e-4, lr_scheduler="cosine")

A trainer adds a group of its own in a subclass of `Flags`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal

from dreambooth.command_line.paths import path

OUTPUT_DIR, LORA_OUTPUT_DIR = "dreambooth-model", "dreambooth-lora"
MAX_SEED = 2**32 - 1  # numpy takes as much
# Limits of numbers. No setting of sense comes near the upper ones; beyond them memory or float32 would fail in the
# middle of a run.
COUNT, BATCH, IMAGES, STEPS, PIXELS = (1, math.inf), (1, 2**16), (1, 10**6), (1, 10**9), (1, 8192)
NOT_NEGATIVE, FACTOR, POSITIVE, DECAY, MINUTES = (0, math.inf), (0, 10**6), (1e-30, 10**6), (0, 1 - 1e-9), (0, 10**9)
RANK, DROPOUT = (1, 1024), (0, 0.99)
PRIOR, LORA = "with_prior_preservation", "lora_rank"  # which the other flags of their groups need
SAMPLERS = ("DPMSolverMultistepScheduler", "DDPMScheduler")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
# Flags of diffusers' and kohya's commands that are accepted, with a word on what is always so here.
ALWAYS_SO = {
    "enable_xformers_memory_efficient_attention": "torch's attention takes as little memory",
    "xformers": "torch's attention takes as little memory",
    "mem_eff_attn": "torch's attention takes as little memory",
    "sdpa": "it is the attention that is used",
    "set_grads_to_none": "gradients are let go of after each step, or have a place of their own",
    "pre_compute_text_embeddings": "prompts are encoded once, before training",
}
# Those that are refused, and what to do instead.
NOT_HERE = {
    "text_encoder_use_attention_mask": "Stable Diffusion reads the padding of a prompt too; leave it out",
    "skip_save_text_encoder": "the pipeline is saved whole, so that it loads; leave it out, and remove the folder "
    "text_encoder afterwards",
    "class_labels_conditioning": "it is for models with class labels, such as DeepFloyd IF, which are not trained "
    "here; leave it out",
    "validation_images": "it is for models that start from an image, which are not trained here; --validation_prompt "
    "draws from a prompt",
}


def flag(
    default: Any,
    help: str,
    *,
    shown: str | None = None,
    metavar: str | None = None,
    type: Callable[[str], Any] | None = None,
    choices: Collection[str] | None = None,
    limits: tuple[float, float] | None = None,
    alone: Any = None,
    aliases: Collection[str] = (),
    same_as: Mapping[str, Any] | None = None,
    each_of: Collection[str] = (),
    needs: str | None = None,
    needs_one_of: Collection[str] = (),
    beside: Mapping[str, Any] | None = None,
    numbers: bool | Literal["on GPUs"] = False,
) -> Any:
    """Declares a flag: a field of a group, with what the parser, the rules and the checkpoints have to know of it.

    Args:
        default: MISSING for a flag that is required.
        help: what --help says, which adds the default.
        shown: what --help says of the default, where it has to say more than its value.
        metavar: of the value; by default N of a whole number, X of another one, FOLDER of a path, NAME of a text.
        type: turns a word into the value; by default as the field is annotated.
        choices: what there is to choose from.
        limits: the least number and the largest.
        alone: the value of the flag with no word after it, for one that may have a word.
        aliases: other names of the flag, with their dashes.
        same_as: names of flags without a word that stand for a value of this one.
        each_of: the field stands for several flags without a word, and its value is a tuple of those that are given.
        needs: name of a flag of the same group, without which this one has no effect.
        needs_one_of: values of that flag, beside others of which this one has none either.
        beside: what the default is beside other flags instead, by their names, where words give those.
        numbers: whether another value changes what the steps compute, so that a run that goes on needs the same.
    """
    metadata = dict(locals())
    return dataclasses.field(default=metadata.pop("default"), metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is trained, and from which weights."""

    heading = "model"

    pretrained_model_name_or_path: str = flag(
        MISSING,
        "Stable Diffusion 1.x, 2.x or XL to start from: a folder in diffusers' layout, a Hub id, or a "
        ".safetensors file in the original layout",
        type=path,
        metavar="MODEL",
    )
    revision: str | None = flag(None, "branch, tag or commit of MODEL on the Hub", shown="its main branch")
    variant: str | None = flag(
        None,
        "weights of MODEL to start from, such as fp16: those in *.NAME.safetensors",
        shown="the plain ones, or the only ones that are there",
    )
    external_unet_path: str | None = flag(
        None,
        "train the UNet of this folder, or of this .safetensors file in the original layout, instead of MODEL's",
        shown="MODEL's",
        aliases=["--externel_unet_path"],
        type=path,
    )
    single_file_config: str | None = flag(
        None,
        "folder of a model in diffusers' layout whose configurations and tokenizers are those of a MODEL that is one "
        "file, such as that of Stable Diffusion 2 base",
        shown="Stable Diffusion 1.5's, 2.1's or XL's, as its weights tell",
        type=path,
        metavar="FOLDER",
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        None,
        "VAE to use instead of MODEL's: a folder or a Hub id, of the VAE alone or of a model that has it",
        shown="MODEL's",
        type=path,
        metavar="VAE",
    )
    tokenizer_name: str | None = flag(
        None,
        "tokenizer to use: a folder or a Hub id; of Stable Diffusion XL, that of a model that has both",
        shown="MODEL's",
        type=path,
        metavar="NAME",
    )
    tokenizer_max_length: int | None = flag(
        None,
        "accepted for commands of diffusers' scripts, if it is what the text encoder reads",
        shown="that, 77",
        limits=COUNT,
    )
    train_text_encoder: bool = flag(
        False,
        "train the text encoder, of Stable Diffusion XL both, with the UNet: closer to the subject, more memory",
        numbers=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Low-rank adapters, which are trained instead of the weights that they stand beside (arXiv 2106.09685)."""

    heading = "LoRA"

    lora_rank: int | None = flag(
        None,
        "train adapters of this rank instead of the whole UNet; the output is a small file of them, which goes with "
        "MODEL; 4 to 64 are usual",
        shown="off, the whole UNet",
        aliases=["--rank"],
        limits=RANK,
        numbers=True,
    )
    lora_alpha: float | None = flag(
        None,
        "what the adapters add is multiplied by this over the rank",
        shown="the rank",
        limits=POSITIVE,
        needs=LORA,
        numbers=True,
    )
    lora_dropout: float = flag(
        0.0, "share of what the adapters read that is left out at random", limits=DROPOUT, needs=LORA, numbers=True
    )
    lora_target_modules: str = flag(
        "attention",
        "layers of the UNet that get adapters: attention, its projections to_q, to_k, to_v and to_out.0; all, those "
        "of feed-forward and the convolutions too; or names of layers, such as to_k,to_v. Text encoders get them in "
        "their attention",
        aliases=["--lora_layers"],
        metavar="attention|all|NAME,NAME",
        needs=LORA,
        numbers=True,
    )
    save_kohya_lora: bool = flag(
        False, "write the adapters also under the names that kohya's scripts and web interfaces read", needs=LORA
    )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and nothing else."""
        return self.lora_rank is not None

    @property
    def alpha(self) -> float | None:
        """What scales the adapters, whether its flag says it or not; None without any."""
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class InstanceFlags:
    """The images of the subject, and what becomes of any image before it is trained on."""

    heading = "images of the subject"

    instance_data_dir: str | None = flag(
        None,
        "3 to 6 images of the subject: png, jpg, jpeg, webp or bmp; captions are in NAME.txt or NAME.caption beside "
        "NAME.png, or in a metadata.jsonl as file_name and text",
        shown="none; this or --dataset_name is needed",
        type=path,
    )
    dataset_name: str | None = flag(
        None,
        "instead of a folder of images: the train split of a data set that the `datasets` library loads: a folder, a "
        "file such as a .parquet, or a Hub id",
        type=path,
        metavar="NAME",
    )
    dataset_config_name: str | None = flag(
        None, "configuration of the data set, where it has several", needs="dataset_name"
    )
    image_column: str = flag("image", "images of the data set", needs="dataset_name")
    caption_column: str = flag("text", "captions of the data set, or of metadata.jsonl")
    instance_prompt: str | None = flag(
        None, 'rare word and class noun, such as "a photo of sks dog"; for images without a caption', metavar="PROMPT"
    )
    resolution: int | None = flag(
        None,
        "side of the square training images, in pixels",
        shown="that of the checkpoint that the run goes on from, else 512, of Stable Diffusion XL 1024",
        limits=PIXELS,
        numbers=True,
    )
    center_crop: bool = flag(
        False,
        "crop images that are not square at their centre",
        shown="at a random place, anew for each sample",
        numbers=True,
    )
    cache_latents: str = flag(
        "auto",
        "encode the crops that the run will take once, before training: auto up to 2 GiB of them, all where the VAE "
        "computes in fp32, else those of square images, and of others where that at least halves the encoding; on (or "
        "nothing after the flag) all; off none",
        choices=("auto", "on", "off"),
        alone="on",
    )
    test_run: bool = flag(
        False,
        "use the first 10 images of each folder only",
        shown="false",
        alone=True,
        metavar="true|false",
        numbers=True,
    )


@dataclass(frozen=True, kw_only=True)
class PriorFlags:
    """Prior preservation: the images of the class, how they are made, and what they weigh."""

    heading = "prior preservation"

    with_prior_preservation: bool = flag(
        False, "also train on images of the class, so that the model does not forget it", numbers=True
    )
    class_data_dir: str | None = flag(
        None, "images of the class; those missing are generated into it before training", type=path, needs=PRIOR
    )
    class_prompt: str | None = flag(
        None, 'the class alone, such as "a photo of dog"', metavar="PROMPT", needs=PRIOR, numbers=True
    )
    num_class_images: int = flag(100, "how many class images are used", limits=IMAGES, needs=PRIOR, numbers=True)
    sample_batch_size: int = flag(4, "class images generated at a time on each device", limits=BATCH, needs=PRIOR)
    prior_generation_precision: str | None = flag(
        None,
        "arithmetic in which class images are generated; no is fp32",
        shown="the run's on GPUs, fp32 on the CPU",
        choices=("no", "fp32", "fp16", "bf16"),
        needs=PRIOR,
    )
    prior_loss_weight: float = flag(
        1.0, "weight of the class term of the loss; 0 drops it", limits=FACTOR, needs=PRIOR, numbers=True
    )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """The steps: how many, of how many samples, of what loss, in what arithmetic."""

    heading = "training"

    train_batch_size: int = flag(
        4, "samples per device at a time, with prior preservation each an instance and a class image", limits=BATCH
    )
    gradient_accumulation_steps: int = flag(
        1,
        "batches of each device that make up a step: the same as a batch N times as large, in less memory",
        limits=BATCH,
    )
    num_train_epochs: int = flag(1, "passes over the larger of the two sets of images", limits=STEPS)
    max_train_steps: int | None = flag(
        None, "optimizer steps, instead of --num_train_epochs", shown="unset", limits=STEPS
    )
    snr_gamma: float | None = flag(
        None,
        "min-SNR weighting of the timesteps, arXiv 2303.09556; 5 is usual",
        shown="off",
        limits=POSITIVE,
        numbers=True,
    )
    noise_offset: float = flag(
        0.0,
        "shift the noise of each channel at random, for images that are dark or bright all over; 0.1 is usual",
        shown="0, none",
        same_as={"offset_noise": 0.1},
        limits=FACTOR,
        numbers=True,
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = flag(
        False,
        "compile the blocks of the UNet with torch.compile: the first step takes a minute or two, the others less "
        "time and memory; not under gemini",
    )
    cuda_graphs: str = flag(
        "auto",
        "record the forward and backward pass as CUDA graphs, so that a slow host or a small batch keeps no GPU "
        "waiting: auto does where it can, and the GPU has the room; on (or nothing after the flag) insists on it; not "
        "under gemini",
        choices=("auto", "on", "off"),
        alone="on",
    )
    mixed_precision: str | None = flag(
        None,
        "arithmetic of the forward pass; master weights and the optimizer stay in fp32",
        shown="bf16 where the GPU has it, else fp16; no on the CPU",
        choices=("no", "fp16", "bf16"),
    )
    allow_tf32: bool = flag(
        False, "matrix products of what is computed in fp32 in TF32, on GPUs: faster, less exact", numbers="on GPUs"
    )
    dataloader_num_workers: int | None = flag(
        None,
        "processes that decode images for each device",
        shown="4 on GPUs if not all latents are cached, else 0",
        limits=(0, 1024),
    )
    seed: int | None = flag(
        None,
        "every random draw but dropout's follows from it and the sample's number",
        shown="that of the checkpoint that the run goes on from, else drawn and printed",
        limits=(0, MAX_SEED),
    )
    local_rank: int | None = flag(
        None, "accepted for old launchers; the environment's LOCAL_RANK decides", aliases=["--local-rank"]
    )
    always_so: tuple[str, ...] = flag(
        (), "accepted for commands of other trainers; always so", shown="on", each_of=ALWAYS_SO
    )
    dry_run: bool = flag(
        False,
        "print what memory every strategy takes, by an estimate, and which fit on this machine; then load everything, "
        "take two steps, print what the run would take, and write nothing outside caches",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """AdamW and the course of its learning rate."""

    heading = "optimizer (AdamW)"

    learning_rate: float = flag(
        5e-6,
        "peak learning rate per step",
        shown="5e-6, with --lora_rank 1e-4",
        beside={LORA: 1e-4},
        limits=FACTOR,
        numbers=True,
    )
    scale_lr: bool = flag(False, "multiply the learning rate by the samples per step over all devices", numbers=True)
    lr_scheduler: str = flag(
        "constant",
        f"course of the learning rate: {', '.join(LR_SCHEDULERS)}",
        choices=LR_SCHEDULERS,
        metavar="NAME",
        numbers=True,
    )
    lr_warmup_steps: int = flag(
        0,
        "steps over which the learning rate rises from 0",
        shown="0, none",
        limits=NOT_NEGATIVE,
        needs="lr_scheduler",
        needs_one_of=[name for name in LR_SCHEDULERS if name != "constant"],
        numbers=True,
    )
    lr_num_cycles: int = flag(
        1,
        "how often cosine_with_restarts goes from the top to 0",
        limits=COUNT,
        needs="lr_scheduler",
        needs_one_of=["cosine_with_restarts"],
        numbers=True,
    )
    lr_power: float = flag(
        1.0,
        "power of polynomial; 1 is a line",
        limits=FACTOR,
        needs="lr_scheduler",
        needs_one_of=["polynomial"],
        numbers=True,
    )
    max_grad_norm: float = flag(
        1.0,
        "gradients are scaled down to this L2 norm where it is larger; 0 is off",
        limits=NOT_NEGATIVE,
        numbers=True,
    )
    use_8bit_adam: bool = flag(
        False, "bitsandbytes' AdamW, in a quarter of the memory; not where it is split over GPUs", numbers=True
    )
    adam_beta1: float = flag(0.9, "decay of the first moment", limits=DECAY, numbers=True)
    adam_beta2: float = flag(0.999, "decay of the second moment", limits=DECAY, numbers=True)
    adam_weight_decay: float = flag(1e-2, "decoupled weight decay", limits=FACTOR, numbers=True)
    adam_epsilon: float = flag(1e-8, "added to the root of the second moment", limits=POSITIVE, numbers=True)


@dataclass(frozen=True, kw_only=True)
class ValidationFlags:
    """The images that are drawn during training."""

    heading = "validation images"

    validation_prompt: str | None = flag(
        None,
        "draw images of it during training, from the same seeds each time: into --output_dir/validation and "
        "TensorBoard",
        metavar="PROMPT",
    )
    num_validation_images: int = flag(4, "how many", limits=IMAGES, needs="validation_prompt")
    validation_steps: int = flag(
        100, "steps between them; the last step always draws", limits=COUNT, needs="validation_prompt"
    )
    validation_scheduler: str | None = flag(
        None,
        f"scheduler of diffusers to draw them by: {' or '.join(SAMPLERS)}",
        shown="the model's own",
        choices=SAMPLERS,
        metavar="NAME",
        needs="validation_prompt",
    )


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What a run writes, goes on from, and uploads."""

    heading = "output"

    output_dir: str = flag(
        OUTPUT_DIR,
        "where the trained pipeline goes, or the adapters: one replaces an earlier one of its kind alone",
        shown=f"{OUTPUT_DIR}, with --lora_rank {LORA_OUTPUT_DIR}",
        beside={LORA: LORA_OUTPUT_DIR},
        type=path,
    )
    save_dtype: str | None = flag(
        None,
        "dtype of the weights of the trained pipeline; checkpoints are in fp32 always",
        shown="fp32, and fp16 for --save_single_file",
        choices=("fp32", "fp16", "bf16"),
    )
    save_single_file: bool = flag(
        False,
        "write the trained pipeline as one .safetensors file in the original layout too, as web interfaces and node "
        "editors read it, in --output_dir and with its name",
    )
    save_steps: int = flag(
        500, "steps between two checkpoint-N folders", aliases=["--checkpointing_steps"], limits=COUNT
    )
    save_minutes: float = flag(
        5.0,
        "minutes after the last checkpoint until an interim one is written, more where that takes long; it goes when "
        "there is a later one, or the trained pipeline; 0 is off",
        limits=MINUTES,
    )
    checkpoints_total_limit: int | None = flag(
        None, "checkpoints to keep; the oldest goes once the newest is complete", shown="all", limits=COUNT
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "go on from a checkpoint: the newest in --output_dir, the one named, or the one of that name in --output_dir, "
        "such as checkpoint-500",
        shown="start anew",
        type=path,
        metavar="latest|FOLDER",
    )
    resume_anyway: bool = flag(
        False,
        "also where settings differ from those that the checkpoint was written with",
        needs="resume_from_checkpoint",
    )
    logging_dir: str = flag("logs", "TensorBoard folder: inside --output_dir, or a whole path", type=path)
    report_to: str = flag("tensorboard", "where figures go", choices=("tensorboard",))
    push_to_hub: bool = flag(False, "upload the pipeline when done")
    hub_token: str | None = flag(
        None,
        "token for the upload; better set HF_TOKEN, or use `hf auth login`",
        shown="these",
        metavar="TOKEN",
        needs="push_to_hub",
    )
    hub_model_id: str | None = flag(
        None, "repository of the upload", shown="the name of --output_dir", needs="push_to_hub"
    )
    hub_private_repo: bool = flag(
        False, "make the repository a private one; a public one that is there is refused", needs="push_to_hub"
    )


@dataclass(frozen=True, kw_only=True)
class Flags:
    """All flags of a run; nothing rewrites them."""

    model: ModelFlags
    lora: LoraFlags = LoraFlags()
    instance: InstanceFlags = InstanceFlags()
    prior: PriorFlags = PriorFlags()
    training: TrainingFlags = TrainingFlags()
    optimizer: OptimizerFlags = OptimizerFlags()
    validation: ValidationFlags = ValidationFlags()
    output: OutputFlags = OutputFlags()

    def groups(self) -> list:
        """Returns the groups, in order."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def defaults() -> dict[str, Any]:
    """Returns the default of each flag that both trainers have, by its name; MISSING where it is required."""
    return {
        field.name: field.default for group in dataclasses.fields(Flags) for field in dataclasses.fields(group.type)
    }


def idle(group) -> list[dataclasses.Field]:
    """Returns the flags of a group that have no effect, as the one that they need is not given, or is another."""

    def is_idle(needs: str, needs_one_of: Collection[str]) -> bool:
        value = getattr(group, needs)
        return value not in needs_one_of if needs_one_of else not value

    found = [(field, field.metadata["needs"], field.metadata["needs_one_of"]) for field in dataclasses.fields(group)]
    return [field for field, needs, one_of in found if needs and is_idle(needs, one_of)]
