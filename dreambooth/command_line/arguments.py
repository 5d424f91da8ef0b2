"""The flags that both trainers have, with the rules that hold between them."""

import argparse
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from setproctitle import getproctitle, setproctitle

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.paths import path, same_folder, unwritable

OUTPUT_DIR = "dreambooth-model"
MAX_SEED = 2**32 - 1  # numpy takes as much
# Limits that no setting of sense comes near; beyond them memory or float32 would fail in the middle of a run.
MAX_RESOLUTION, MAX_BATCH, MAX_IMAGES, MAX_STEPS = 8192, 2**16, 10**6, 10**9
MAX_FACTOR, MIN_EPSILON, MAX_WORKERS = 10**6, 1e-30, 1024
POLYNOMIAL_LR_END = 1e-7  # of diffusers
# Flags of diffusers' and kohya's commands that are accepted, with a word on what is always so here.
ALWAYS_SO = {
    "enable_xformers_memory_efficient_attention": "torch's attention takes as little memory",
    "xformers": "torch's attention takes as little memory",
    "mem_eff_attn": "torch's attention takes as little memory",
    "sdpa": "it is the attention that is used",
    "set_grads_to_none": "gradients are let go of after each step",
    "pre_compute_text_embeddings": "prompts are encoded once, before training",
}
# Those that are refused, and what to do instead.
NOT_HERE = {
    "text_encoder_use_attention_mask": "Stable Diffusion 1.x and 2.x read the padding of a prompt too; leave it out",
    "skip_save_text_encoder": "the pipeline is saved whole, so that it loads; leave it out, and remove the folder "
    "text_encoder afterwards",
    "class_labels_conditioning": "it is for models with class labels, such as DeepFloyd IF, which are not trained "
    "here; leave it out",
    "validation_images": "it is for models that start from an image, which are not trained here; --validation_prompt "
    "draws from a prompt",
}
SAMPLERS = ("DPMSolverMultistepScheduler", "DDPMScheduler")  # of --validation_scheduler
OFFSET_NOISE = 0.1  # of diffusers' flag
# Flags that act beside another one only.
EFFECT_NEEDS = {
    "with_prior_preservation": (
        "class_data_dir",
        "class_prompt",
        "num_class_images",
        "sample_batch_size",
        "prior_loss_weight",
        "prior_generation_precision",
    ),
    "validation_prompt": ("num_validation_images", "validation_steps", "validation_scheduler"),
    "dataset_name": ("dataset_config_name", "image_column"),
    "push_to_hub": ("hub_token", "hub_model_id"),
    "resume_from_checkpoint": ("resume_anyway",),
}
PIPELINE = ("unet", "text_encoder", "vae", "tokenizer", "scheduler")  # its folders
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on one rank, as all others."""

    not_here: dict[str, str] = {}  # what to say of flags that other trainers have

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            flag = word.partition("=")[0]
            if reason := self.not_here.get(flag):
                raise UserError(f"{flag}: {reason}")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def number(convert: type, lowest: float, *, highest: float = math.inf) -> Callable:
    """Returns an argparse type for numbers from `lowest` to `highest`."""
    limits = f"of at least {lowest:g}" + ("" if highest == math.inf else f" and at most {highest:.10g}")

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        # A comparison with NaN is false, and infinity is no setting either.
        if not lowest <= value <= highest or value == math.inf:
            kind = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {limits}")
        return value

    return parse


def true_or_false(text: str) -> bool:
    """Parses true or false, in any case, and nothing else."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


def build_parser(description: str) -> Parser:
    """Returns a parser with the flags that both trainers share; a trainer adds its own groups."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt PROMPT ...",
        allow_abbrev=False,
    )
    parser.not_here = {f"--{name}": reason for name, reason in NOT_HERE.items()}
    for add_group in (_add_model, _add_data, _add_prior, _add_training, _add_optimizer, _add_validation, _add_output):
        add_group(parser)
    return parser


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        type=path,
        required=True,
        metavar="MODEL",
        help="Stable Diffusion 1.x or 2.x to start from: a folder in diffusers' layout, or a Hub id",
    )
    group.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of MODEL on the Hub (default: its main branch)"
    )
    group.add_argument(
        "--variant",
        metavar="NAME",
        help="weights of MODEL to start from, such as fp16: those in *.NAME.safetensors (default: the plain ones, or "
        "the only ones that are there)",
    )
    group.add_argument(
        "--external_unet_path",
        "--externel_unet_path",
        type=path,
        metavar="FOLDER",
        help="train the UNet of this folder instead of MODEL's (default: MODEL's)",
    )
    group.add_argument(
        "--tokenizer_name",
        type=path,
        metavar="NAME",
        help="tokenizer to use: a folder or a Hub id (default: MODEL's)",
    )
    group.add_argument(
        "--tokenizer_max_length",
        type=number(int, 1),
        metavar="N",
        help="accepted for commands of diffusers' scripts, if it is what the text encoder reads (default: that, 77)",
    )
    group.add_argument(
        "--train_text_encoder",
        action="store_true",
        help="train the text encoder with the UNet: closer to the subject, more memory (default: off)",
    )


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("images of the subject")
    group.add_argument(
        "--instance_data_dir",
        type=path,
        metavar="FOLDER",
        help="3 to 6 images of the subject: png, jpg, jpeg, webp or bmp; captions are in NAME.txt or NAME.caption "
        "beside NAME.png, or in a metadata.jsonl as file_name and text (default: none; this or --dataset_name is "
        "needed)",
    )
    group.add_argument(
        "--dataset_name",
        type=path,
        metavar="NAME",
        help="instead of a folder of images: the train split of a data set that the `datasets` library loads: a "
        "folder, a file such as a .parquet, or a Hub id (default: none)",
    )
    group.add_argument(
        "--dataset_config_name",
        metavar="NAME",
        help="configuration of the data set, where it has several (default: none)",
    )
    group.add_argument(
        "--image_column", metavar="NAME", default="image", help="images of the data set (default: image)"
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        default="text",
        help="captions of the data set, or of metadata.jsonl (default: text)",
    )
    group.add_argument(
        "--instance_prompt",
        metavar="PROMPT",
        help='rare word and class noun, such as "a photo of sks dog"; for images without a caption (default: none)',
    )
    group.add_argument(
        "--resolution",
        type=number(int, 1, highest=MAX_RESOLUTION),
        metavar="N",
        default=512,
        help="side of the square training images, in pixels (default: 512)",
    )
    group.add_argument(
        "--center_crop",
        action="store_true",
        help="crop images that are not square at their centre (default: at a random place, anew for each sample)",
    )
    group.add_argument(
        "--cache_latents",
        choices=("auto", "on", "off"),
        nargs="?",
        const="on",
        default="auto",
        help="encode images once, before training: auto takes those whose crop is always the same (square ones, or "
        "all with --center_crop), on (or nothing after the flag) insists on all, off takes none (default: auto)",
    )
    group.add_argument(
        "--test_run",
        type=true_or_false,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="use the first 10 images of each folder only (default: false)",
    )


def _add_prior(parser: Parser) -> None:
    group = parser.add_argument_group("prior preservation")
    group.add_argument(
        "--with_prior_preservation",
        action="store_true",
        help="also train on images of the class, so that the model does not forget it (default: off)",
    )
    group.add_argument(
        "--class_data_dir",
        type=path,
        metavar="FOLDER",
        help="images of the class; those missing are generated into it before training",
    )
    group.add_argument("--class_prompt", metavar="PROMPT", help='the class alone, such as "a photo of dog"')
    group.add_argument(
        "--num_class_images",
        type=number(int, 1, highest=MAX_IMAGES),
        metavar="N",
        default=100,
        help="how many class images are used (default: 100)",
    )
    group.add_argument(
        "--sample_batch_size",
        type=number(int, 1, highest=MAX_BATCH),
        metavar="N",
        default=4,
        help="class images generated at a time on each device (default: 4)",
    )
    group.add_argument(
        "--prior_generation_precision",
        choices=("no", "fp32", "fp16", "bf16"),
        help="arithmetic in which class images are generated; no is fp32 (default: half precision on GPUs, fp32 on "
        "the CPU)",
    )
    group.add_argument(
        "--prior_loss_weight",
        type=number(float, 0, highest=MAX_FACTOR),
        metavar="X",
        default=1.0,
        help="weight of the class term of the loss; 0 drops it (default: 1.0)",
    )


def _add_training(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--train_batch_size",
        type=number(int, 1, highest=MAX_BATCH),
        metavar="N",
        default=4,
        help="samples per device at a time, with prior preservation each an instance and a class image (default: 4)",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=number(int, 1, highest=MAX_BATCH),
        metavar="N",
        default=1,
        help="batches of each device that make up a step: the same as a batch N times as large, in less memory "
        "(default: 1)",
    )
    group.add_argument(
        "--num_train_epochs",
        type=number(int, 1, highest=MAX_STEPS),
        metavar="N",
        default=1,
        help="passes over the larger of the two sets of images (default: 1)",
    )
    group.add_argument(
        "--max_train_steps",
        type=number(int, 1, highest=MAX_STEPS),
        metavar="N",
        help="optimizer steps, instead of --num_train_epochs (default: unset)",
    )
    group.add_argument(
        "--snr_gamma",
        type=number(float, MIN_EPSILON, highest=MAX_FACTOR),
        metavar="X",
        help="min-SNR weighting of the timesteps, arXiv 2303.09556; 5 is usual (default: off)",
    )
    noise = group.add_mutually_exclusive_group()
    noise.add_argument(
        "--noise_offset",
        type=number(float, 0, highest=MAX_FACTOR),
        metavar="X",
        default=0.0,
        help="shift the noise of each channel at random, for images that are dark or bright all over; 0.1 is usual "
        "(default: 0, none)",
    )
    noise.add_argument(
        "--offset_noise",
        action="store_const",
        dest="noise_offset",
        const=OFFSET_NOISE,
        default=argparse.SUPPRESS,
        help=f"the same as --noise_offset {OFFSET_NOISE} (default: off)",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, slower (default: off)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks of the UNet with torch.compile: the first step takes a minute or two, the others "
        "less time and memory; not under gemini (default: off)",
    )
    group.add_argument(
        "--cuda_graphs",
        action="store_true",
        help="record the forward and backward pass as CUDA graphs, so that a slow host or a small batch keeps no GPU "
        "waiting; not under gemini, nor with gradient accumulation or checkpointing (default: off)",
    )
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="arithmetic of the forward pass; master weights and the optimizer stay in fp32 "
        "(default: bf16 where the GPU has it, else fp16; no on the CPU)",
    )
    group.add_argument(
        "--allow_tf32",
        action="store_true",
        help="matrix products of what is computed in fp32 in TF32, on GPUs: faster, less exact (default: off)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=number(int, 0, highest=MAX_WORKERS),
        metavar="N",
        help="processes that decode images for each device (default: 4 on GPUs, 0 on the CPU)",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, highest=MAX_SEED),
        metavar="N",
        help="every random draw follows from it and the sample's number (default: that of the checkpoint that the run "
        "goes on from, else drawn and printed)",
    )
    group.add_argument(
        "--local_rank", type=int, metavar="N", help="accepted for old launchers; the environment's LOCAL_RANK decides"
    )
    for name in ALWAYS_SO:
        group.add_argument(
            f"--{name}",
            action="store_true",
            help="accepted for commands of other trainers; always so (default: on)",
        )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="load everything, take two steps, print what the run would take, and write nothing (default: off)",
    )


def _add_optimizer(parser: Parser) -> None:
    group = parser.add_argument_group("optimizer (AdamW)")
    group.add_argument(
        "--learning_rate",
        type=number(float, 0, highest=MAX_FACTOR),
        metavar="X",
        default=5e-6,
        help="peak learning rate per step (default: 5e-6)",
    )
    group.add_argument(
        "--scale_lr",
        action="store_true",
        help="multiply the learning rate by the samples per step over all devices (default: off)",
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=LR_SCHEDULERS,
        metavar="NAME",
        help=f"course of the learning rate: {', '.join(LR_SCHEDULERS)} (default: constant)",
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=number(int, 0),
        metavar="N",
        default=0,
        help="steps over which the learning rate rises from 0 (default: 0, none)",
    )
    group.add_argument(
        "--lr_num_cycles",
        type=number(int, 1),
        metavar="N",
        default=1,
        help="how often cosine_with_restarts goes from the top to 0 (default: 1)",
    )
    group.add_argument(
        "--lr_power",
        type=number(float, 0, highest=MAX_FACTOR),
        metavar="X",
        default=1.0,
        help="power of polynomial; 1 is a line (default: 1.0)",
    )
    group.add_argument(
        "--max_grad_norm",
        type=number(float, 0),
        metavar="X",
        default=1.0,
        help="gradients are scaled down to this L2 norm where it is larger; 0 is off (default: 1.0)",
    )
    group.add_argument(
        "--use_8bit_adam",
        action="store_true",
        help="bitsandbytes' AdamW, in a quarter of the memory; not where it is split over GPUs (default: off)",
    )
    decay = number(float, 0, highest=1 - 1e-9)
    group.add_argument(
        "--adam_beta1", type=decay, metavar="X", default=0.9, help="decay of the first moment (default: 0.9)"
    )
    group.add_argument(
        "--adam_beta2", type=decay, metavar="X", default=0.999, help="decay of the second moment (default: 0.999)"
    )
    group.add_argument(
        "--adam_weight_decay",
        type=number(float, 0, highest=MAX_FACTOR),
        metavar="X",
        default=1e-2,
        help="decoupled weight decay (default: 1e-2)",
    )
    group.add_argument(
        "--adam_epsilon",
        type=number(float, MIN_EPSILON, highest=MAX_FACTOR),
        metavar="X",
        default=1e-8,
        help="added to the root of the second moment (default: 1e-8)",
    )


def _add_validation(parser: Parser) -> None:
    group = parser.add_argument_group("validation images")
    group.add_argument(
        "--validation_prompt",
        metavar="PROMPT",
        help="draw images of it during training, from the same seeds each time: into --output_dir/validation and "
        "TensorBoard (default: none)",
    )
    group.add_argument(
        "--num_validation_images",
        type=number(int, 1, highest=MAX_IMAGES),
        metavar="N",
        default=4,
        help="how many (default: 4)",
    )
    group.add_argument(
        "--validation_steps",
        type=number(int, 1),
        metavar="N",
        default=100,
        help="steps between them; the last step always draws (default: 100)",
    )
    group.add_argument(
        "--validation_scheduler",
        choices=SAMPLERS,
        metavar="NAME",
        help=f"scheduler of diffusers to draw them by: {' or '.join(SAMPLERS)} (default: the model's own)",
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=path,
        default=OUTPUT_DIR,
        metavar="FOLDER",
        help=f"where the trained pipeline goes (default: {OUTPUT_DIR})",
    )
    group.add_argument(
        "--save_steps",
        "--checkpointing_steps",
        type=number(int, 1),
        metavar="N",
        default=500,
        help="steps between two checkpoint-N folders (default: 500)",
    )
    group.add_argument(
        "--save_minutes",
        type=number(float, 0, highest=MAX_STEPS),
        metavar="X",
        default=5.0,
        help="minutes after the last checkpoint until an interim one is written, more where that takes long; it goes "
        "when there is a later one, or the trained pipeline; 0 is off (default: 5)",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=number(int, 1),
        metavar="N",
        help="checkpoints to keep; the oldest goes once the newest is complete (default: all)",
    )
    group.add_argument(
        "--resume_from_checkpoint",
        type=path,
        metavar="latest|FOLDER",
        help="go on from a checkpoint: the newest in --output_dir, the one named, or the one of that name in "
        "--output_dir, such as checkpoint-500 (default: start anew)",
    )
    group.add_argument(
        "--resume_anyway",
        action="store_true",
        help="also where settings differ from those that the checkpoint was written with (default: off)",
    )
    group.add_argument(
        "--logging_dir",
        type=path,
        default="logs",
        metavar="FOLDER",
        help="TensorBoard folder inside --output_dir (default: logs)",
    )
    group.add_argument(
        "--report_to", choices=("tensorboard",), default="tensorboard", help="where figures go (default: tensorboard)"
    )
    group.add_argument("--push_to_hub", action="store_true", help="upload the pipeline when done (default: off)")
    group.add_argument(
        "--hub_token",
        metavar="TOKEN",
        help="token for the upload; better set HF_TOKEN, or use `hf auth login` (default: these)",
    )
    group.add_argument(
        "--hub_model_id", metavar="NAME", help="repository of the upload (default: the name of --output_dir)"
    )


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags.

    Raises:
        UserError: naming every flag that has to change.
    """
    args = parser.parse_args(argv)
    problems = _problems(args)
    if problems:
        raise UserError("; ".join(problems))
    _warn_of_flags_without_effect(args, parser)
    if args.hub_token:
        warn("--hub_token is kept by the shell's history and shown by torchrun's process: HF_TOKEN is not")
        setproctitle(getproctitle().replace(args.hub_token, "***"))
    return args


def _problems(args: argparse.Namespace) -> list[str]:
    """Returns what stands in the way of a run, as far as flags and folders tell."""
    # A shell gives an empty word for a variable that is not set.
    problems = [
        f"--{name} {text!r} is blank: give it a value or leave it out"
        for name, text in vars(args).items()
        if isinstance(text, str) and not any(c.isprintable() and not c.isspace() for c in text)
    ]
    if problems:
        return problems
    for name in ("instance_prompt", "class_prompt", "validation_prompt"):
        if re.search("[\ud800-\udfff]", getattr(args, name) or ""):
            problems.append(f"--{name} is not valid UTF-8")
    if args.with_prior_preservation:
        missing = [f"--{name}" for name in ("class_data_dir", "class_prompt") if not getattr(args, name)]
        if missing:
            problems.append(f"--with_prior_preservation also needs {' and '.join(missing)}")
        elif args.instance_data_dir and same_folder(args.class_data_dir, args.instance_data_dir):
            problems.append("--class_data_dir is the folder of --instance_data_dir: class images need their own")
    problems += _problems_of_instance_images(args)
    problems += unwritable("--output_dir", args.output_dir)
    for part in (*PIPELINE, "validation"):
        if os.path.isfile(os.path.join(args.output_dir, part)):
            problems.append(f"--output_dir {args.output_dir} has a file named {part}, where a folder goes")
    if same_folder(args.output_dir, args.pretrained_model_name_or_path):
        problems.append("--output_dir is the folder of --pretrained_model_name_or_path, which it would replace")
    logs = os.path.join(args.output_dir, args.logging_dir)
    if {*Path(os.path.normpath(args.logging_dir)).parts[:1]} & {*PIPELINE}:
        problems.append(f"--logging_dir {args.logging_dir}: the trained pipeline's folder of that name replaces it")
    if os.path.isdir(args.output_dir):
        problems += unwritable("--logging_dir", logs)
    if args.external_unet_path and not os.path.isdir(args.external_unet_path):
        problems.append(f"--external_unet_path {args.external_unet_path} is not a folder")
    if args.pre_compute_text_embeddings and args.train_text_encoder:
        problems.append("--pre_compute_text_embeddings: with --train_text_encoder prompts are encoded in every step")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= POLYNOMIAL_LR_END:
        problems.append(f"--lr_scheduler polynomial falls to {POLYNOMIAL_LR_END}: give a --learning_rate above it")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        problems.append("--use_8bit_adam needs a package that is not there: pip install bitsandbytes")
    if args.cuda_graphs and not torch.cuda.is_available():
        problems.append("--cuda_graphs needs a CUDA GPU, and none was found")
    if args.cuda_graphs and args.gradient_accumulation_steps > 1:
        problems.append("--cuda_graphs leaves each batch's gradients in one place: not with gradient accumulation")
    if args.cuda_graphs and args.gradient_checkpointing:
        problems.append("--cuda_graphs cannot record --gradient_checkpointing: leave one of them out")
    return problems


def _problems_of_instance_images(args: argparse.Namespace) -> list[str]:
    folder, dataset = args.instance_data_dir, args.dataset_name
    if folder and dataset:
        return ["--instance_data_dir and --dataset_name: name one of them"]
    if not folder and not dataset:
        return ["the images of the subject are missing: --instance_data_dir names a folder, --dataset_name a data set"]
    if folder and not os.path.isdir(folder):
        return [f"--instance_data_dir {folder} is not a folder"]
    return []


def _warn_of_flags_without_effect(args: argparse.Namespace, parser: Parser) -> None:
    for needed, names in EFFECT_NEEDS.items():
        given = [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]
        if given and not getattr(args, needed):
            warn(f"{', '.join(given)}: no effect without --{needed}")
    for name, reason in ALWAYS_SO.items():
        if getattr(args, name):
            warn(f"--{name}: no effect, {reason}")
    if args.with_prior_preservation and args.class_prompt.split() == (args.instance_prompt or "").split():
        warn("--class_prompt is --instance_prompt: give the subject a rare word, which the class does not have")
    if args.revision and Path(args.pretrained_model_name_or_path).is_dir():
        warn("--revision: no effect on a local folder")
    if args.max_train_steps and args.num_train_epochs != parser.get_default("num_train_epochs"):
        warn("--num_train_epochs: no effect beside --max_train_steps")
    if args.lr_scheduler == "constant" and args.lr_warmup_steps:
        warn("--lr_warmup_steps: no effect on --lr_scheduler constant; constant_with_warmup has a warm-up")
    elif args.max_train_steps and args.lr_warmup_steps >= args.max_train_steps:
        warn(
            f"--lr_warmup_steps {args.lr_warmup_steps}: a run of --max_train_steps {args.max_train_steps} ends before "
            "--learning_rate is reached"
        )
    for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if getattr(args, name) != parser.get_default(name) and args.lr_scheduler != scheduler:
            warn(f"--{name}: no effect on --lr_scheduler {args.lr_scheduler}, but on {scheduler}")
    for name, defaults, flag in (
        ("GRADIENT_ACCUMULATION_STEPS", ("1", str(args.gradient_accumulation_steps)), "--gradient_accumulation_steps"),
        ("DYNAMO_BACKEND", ("no",), "--compile"),
        ("USE_CPU", ("false",), "CUDA_VISIBLE_DEVICES"),
    ):
        value = os.environ.get(f"ACCELERATE_{name}", "")
        if value and value.lower() not in defaults:
            warn(f"ACCELERATE_{name}={value}: no effect, {flag} decides")
    if args.local_rank is not None and args.local_rank != int(os.environ.get("LOCAL_RANK", "0")):
        warn(f"--local_rank {args.local_rank}: no effect, LOCAL_RANK of the environment decides")
