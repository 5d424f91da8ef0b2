"""The stages of a run that both trainers go through, in the order of their `main`; each to be called on every rank."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from dreambooth.command_line.console import UserError, counted, doing, one_line, say, warn
from dreambooth.command_line.flags import Flags, ModelFlags, TrainingFlags
from dreambooth.command_line.paths import kind_on_disk
from dreambooth.data.class_images import STAND_IN, check_class_images, check_origins, generate_class_images
from dreambooth.data.images import Photo, facts_of_all, images_per_epoch, warn_of_small_images
from dreambooth.data.instance_images import find_instance_images
from dreambooth.data.latents import cache_latents
from dreambooth.data.samples import DreamBoothDataset, build_dataset, build_loader
from dreambooth.data.schedule import Schedule, plan
from dreambooth.engine.offload import ORDINARY, Memory
from dreambooth.engine.state import Checkpoint, Training
from dreambooth.model.components import (
    fingerprint,
    fingerprint_of_tokens,
    latent_shape,
    noise_settings,
    warn_of_dropout,
)
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.drawing import DrawingDevice
from dreambooth.model.family import Conditioning, Model, dtype_of_vae
from dreambooth.model.folder import family_of, find_elsewhere, find_model, find_tokenizer, known_family
from dreambooth.model.lora import Adapters, adapter_weights, adapters_of, add_adapters, digest_of, load_adapters
from dreambooth.model.loss import encode_images, example_inputs, training_loss
from dreambooth.model.pipeline import load_model, load_pipeline
from dreambooth.model.precision import DTYPES, no_kernels, sampling_dtype, set_tf32
from dreambooth.model.prompts import check_max_length, embed, warn_of_cut_prompts
from dreambooth.processes.environment import Place, find_place
from dreambooth.processes.ranks import Ranks, compare, leave
from dreambooth.run.callbacks import Callbacks
from dreambooth.run.checkpoint import (
    check_kind,
    check_settings,
    find_checkpoint,
    flag_settings,
    image_settings,
    remove_interim_checkpoints,
    resolution_of,
    seed_of,
)
from dreambooth.run.dry_run import tell_plan
from dreambooth.run.output import (
    Form,
    enter_output_dir,
    prepare_output_dir,
    result_in,
    save_lora,
    save_pipeline,
)
from dreambooth.run.room import Sizes, check_room, reserve
from dreambooth.run.tracker import Tracker
from dreambooth.run.upload import prepare_hub, upload
from dreambooth.run.validation import check_validation_images, validate

FEW_STEPS = 50  # some hundreds are usual


@dataclass(frozen=True)
class Inputs:
    """What the flags name, found and looked at while no process has to wait for another."""

    place: Place
    instance_images: list[Photo]
    class_images: list[Photo]
    model_folder: Path
    elsewhere: Mapping[str, Path]  # folders of parts that are not the model's
    tokenizer_folder: Path | None  # None where it is the model's


def check_inputs(flags: Flags) -> Inputs:
    """Finds the files that a run reads, and enters the folder that it writes to.

    Raises:
        UserError: if one of them cannot serve.
    """
    place = find_place()
    family = known_family(flags.model)
    # At which images are kept as they are decoded. Where it turns out to be another, they are decoded once more.
    resolution = flags.instance.resolution or (family and family.resolution)
    instance_images = find_instance_images(flags.instance, place, resolution)
    class_images = check_class_images(flags.prior, flags.instance, place, resolution)
    form = Form.of(flags.output, flags.lora)
    form.check_names(flags.output, flags.model.pretrained_model_name_or_path)
    enter_output_dir(Path(flags.output.output_dir), dry_run=flags.training.dry_run, more=form.more)
    check_kind(flags.output, adapters=flags.lora.is_on)
    elsewhere = find_elsewhere(flags.model)
    model_folder = find_model(flags.model, elsewhere)
    check_origins(flags.prior, flags.model, class_images, model_folder, elsewhere)
    tokenizer_folder = find_tokenizer(flags.model.tokenizer_name)
    return Inputs(place, instance_images, class_images, model_folder, elsewhere, tokenizer_folder)


@dataclass(frozen=True)
class Run:
    """What the processes of a run have agreed on.

    Args:
        flags: of the run.
        ranks: of the run.
        precision: "no", "bf16" or "fp16".
        instance_images, class_images: those that were found, with their facts.
        model_folder: of the model to train.
        elsewhere: folders of parts that are not the model's.
        tokenizer_folder: of another tokenizer; None for the model's.
        checkpoint: from which the run goes on; None for a new one.
        seed: of every draw.
        resolution: of the training images, in pixels.
        schedule: of steps and samples.
        base: Hub id by which anybody has the model that is trained; None without, and where flags change it.
        settings: that a run has to share to go on from this one's checkpoints; the stages add theirs.
    """

    flags: Flags
    ranks: Ranks
    precision: str
    instance_images: list[Photo]
    class_images: list[Photo]
    model_folder: Path
    elsewhere: Mapping[str, Path]
    tokenizer_folder: Path | None
    checkpoint: Checkpoint | None
    seed: int
    resolution: int
    schedule: Schedule
    base: str | None
    settings: dict = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        """Steps that an earlier run has done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def prompt(self) -> str | None:
        """The one of all images of the subject; None where they have several."""
        prompts = {photo.prompt for photo in self.instance_images}
        return prompts.pop() if len(prompts) == 1 else None

    @property
    def output_dir(self) -> Path:
        """The folder of all that is written."""
        return Path(self.flags.output.output_dir)

    def settle(self, what: str, settings: dict) -> None:
        """Adds settings, which have to be those of all ranks and of the checkpoint.

        Raises:
            UserError: naming what differs.
        """
        compare(what, lambda: settings)
        check_settings(self.checkpoint, settings, self.flags.output.resume_anyway)
        self.settings.update(settings)


def agree(flags: Flags, inputs: Inputs, ranks: Ranks, precision: str) -> Run:
    """Settles on the checkpoint, the seed, the resolution, the schedule and the flags that change numbers.

    Raises:
        UserError: if ranks have found different things, or the checkpoint is of another run, or the machine cannot
            draw class images in the precision that is asked for.
    """
    set_tf32(flags.training.allow_tf32)
    if flags.prior.with_prior_preservation:
        sampling_dtype(precision, flags.prior.prior_generation_precision)  # known before anything is made
    checkpoint = find_checkpoint(flags.output.resume_from_checkpoint, Path(flags.output.output_dir))
    of_model = family_of(inputs.model_folder).resolution
    resolution = resolution_of(flags.instance.resolution, checkpoint, of_model)
    instance_images = facts_of_all(inputs.instance_images, resolution)
    warn_of_small_images(instance_images, resolution)
    seed = seed_of(flags.training.seed, checkpoint)
    per_epoch = images_per_epoch(flags.prior, instance_images, flags.instance.test_run)
    schedule = plan(flags.training, ranks.world_size, per_epoch)
    _check_length(flags, schedule)
    found = inputs.class_images, inputs.model_folder, inputs.elsewhere, inputs.tokenizer_folder
    run = Run(
        flags, ranks, precision, instance_images, *found, checkpoint, seed, resolution, schedule, _base(flags.model)
    )
    settings = flag_settings(flags, schedule, seed=seed, precision=precision, resolution=resolution)
    run.settle("settings", settings)
    if checkpoint is not None and checkpoint.step == schedule.steps:
        say(f"{checkpoint.folder} has all steps of the run: nothing is left to train")
    return run


def _check_length(flags: Flags, schedule: Schedule) -> None:
    """Tells of a run that is short because no flag says how long it is to be, or shorter than its warm-up.

    Raises:
        UserError: if the learning rate is to fall as a polynomial in no step.
    """
    training, warmup = flags.training, flags.optimizer.lr_warmup_steps
    if warmup == schedule.steps and flags.optimizer.lr_scheduler == "polynomial":
        raise UserError(f"--lr_warmup_steps {warmup} leaves no step in which --lr_scheduler polynomial could fall")
    is_asked_for = training.max_train_steps or training.num_train_epochs != TrainingFlags.num_train_epochs
    if schedule.steps < FEW_STEPS and not is_asked_for:
        warn(f"one pass over the images is {counted(schedule.steps, 'step')}: --max_train_steps 400 is usual")
    if warmup >= schedule.steps and flags.optimizer.lr_scheduler != "constant":
        ends = f"a run of {counted(schedule.steps, 'step')} ends before --learning_rate is reached"
        warn(f"--lr_warmup_steps {warmup}: {ends}")


def _base(model: ModelFlags) -> str | None:
    name = model.pretrained_model_name_or_path
    return None if kind_on_disk(name) or model.external_unet_path or model.revision else name


@dataclass
class PreparedModel(Model):
    """The model of a run; what of its components is in the denoiser, or of no more use, leaves it.

    Args:
        trained: names of its components that are trained.
        adapters: that these have, and that are trained instead of them; None without.
        load_pipeline: returns the whole pipeline anew, of a dtype, with some parts replaced.
        sizes: of what the run writes.
        repo_id: on the Hub, where it goes; None for none.
    """

    trained: tuple[str, ...]
    adapters: Adapters | None
    load_pipeline: Callable[..., DiffusionPipeline]
    sizes: Sizes
    repo_id: str | None


def prepare_model(run: Run) -> PreparedModel:
    """Loads the model, what is trained of it from the checkpoint if there is one, and makes the output folder.

    A repository on the Hub is made too, if one is asked for, and not before the run is known to suit this machine.

    Raises:
        UserError: if parts do not fit, or are not those of the checkpoint or of other ranks, or the disk is too small,
            or the Hub refuses.
    """
    flags, folder, dry_run = run.flags, run.model_folder, run.flags.training.dry_run
    model = load_model(
        folder,
        resolution=run.resolution,
        variant=flags.model.variant,
        tokenizer=run.tokenizer_folder,
        elsewhere=run.elsewhere,
        trained=None if run.checkpoint is None or flags.lora.is_on else run.checkpoint.folder,
    )
    check_max_length(flags.model.tokenizer_max_length, model.readers)
    trained = ("unet", *(model.text_encoders if flags.model.train_text_encoder else ()))
    # What is frozen is not in a checkpoint, and each rank has all of it from its own disk.
    keeps = () if flags.lora.is_on else trained
    frozen = [model.components[name] for name in ("vae", *model.text_encoders, "unet") if name not in keeps]
    compare("model weights", functools.partial(fingerprint, *model.components.values()))
    run.settle("frozen parts", {"frozen parts": fingerprint(*frozen)})
    run.settle("noise schedule", noise_settings(model.noise_scheduler))
    run.settle("tokenizers", {"tokenizers": [fingerprint_of_tokens(one) for one in model.tokenizers.values()]})
    form = Form.of(flags.output, flags.lora)
    in_8_bits, of_pipeline = flags.optimizer.use_8bit_adam, form.bytes_of_a_weight
    sizes = Sizes.of(model.components, trained, use_8bit_adam=in_8_bits, of_pipeline=of_pipeline)
    adapters = None
    if flags.lora.is_on:
        adapters, sizes = _prepare_adapters(run, model, trained)
    warn_of_dropout(*(model.components[name] for name in trained))
    check_room(flags.output, run.schedule, sizes, first_step=run.first_step, dry_run=dry_run)
    check_validation_images(
        flags.validation, run.output_dir / "validation", first_step=run.first_step, steps=run.schedule.steps
    )
    repo_id = None if dry_run else prepare_hub(flags.output)
    prepare_output_dir(run.output_dir, dry_run=dry_run, more=form.more)
    origin = {"variant": flags.model.variant, "elsewhere": run.elsewhere}
    load = functools.partial(load_pipeline, folder, **origin, **model.tokenizers)
    return PreparedModel(
        **vars(model), trained=trained, adapters=adapters, load_pipeline=load, sizes=sizes, repo_id=repo_id
    )


def _prepare_adapters(run: Run, model: Model, names: Collection[str]) -> tuple[Adapters, Sizes]:
    """Gives components of a model adapters, those of the checkpoint if there is one.

    Returns:
        What they are, and the sizes of what the run writes.
    """
    flags, components = run.flags, {name: model.components[name] for name in names}
    adapters = adapters_of(flags.lora, components, base=run.base, instance_prompt=run.prompt)
    add_adapters(components, adapters, run.seed)
    model.family.freeze_unread(model.components)
    if run.checkpoint is not None:
        load_adapters(run.checkpoint.folder, components)
    compare("adapters", functools.partial(digest_of, components))
    weights = sum(one.numel() for component in components.values() for one in adapter_weights(component).values())
    return adapters, Sizes.of_adapters(weights, files=1 + flags.lora.save_kohya_lora)


def prepare_memory(run: Run, model: PreparedModel, offload_dir: str | None) -> Memory:
    """Returns where a plugin that keeps fp32 weights and optimizer state in host memory is to have them.

    Args:
        run, model: of which the room on a disk is reserved before anything else takes it.
        offload_dir: a folder on that disk; None for ordinary memory.

    Raises:
        UserError: if the disk is too small for that, or for what the run writes beside it.
    """
    if offload_dir is None:
        return ORDINARY
    memory = reserve(offload_dir, model.sizes.checkpoint, run.ranks)  # a checkpoint holds just that
    dry_run = run.flags.training.dry_run
    check_room(run.flags.output, run.schedule, model.sizes, first_step=run.first_step, dry_run=dry_run)
    return memory


def prepare_class_images(run: Run, model: PreparedModel) -> list[Photo]:
    """Generates the class images that are missing, by the model as it is before training; none without a prior."""
    flags, prior = run.flags, run.flags.prior
    if not prior.with_prior_preservation:
        return []
    dtype = sampling_dtype(run.precision, prior.prior_generation_precision)
    images = generate_class_images(
        prior,
        flags.instance,
        flags.model,
        run.class_images,
        functools.partial(model.load_pipeline, dtype=dtype),
        run.model_folder,
        run.elsewhere,
        resolution=run.resolution,
        seed=run.seed,
        ranks=run.ranks,
        replays=flags.training.cuda_graphs != "off" and no_kernels() is None,
        dry_run=flags.training.dry_run,
    )
    warn_of_small_images(images, run.resolution, "class")
    return images


@dataclass(frozen=True)
class Samples:
    """What the steps are made of.

    Args:
        dataset: of all samples.
        steps: this rank's batches of each step.
        example_inputs: returns what the denoiser is called with, zeros in place of latents, of a dtype.
        encode_example: encodes a batch of images, where steps do.
    """

    dataset: DreamBoothDataset
    steps: Iterator[list]
    example_inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, Conditioning]]
    encode_example: Callable[[], object]


def prepare_samples(run: Run, model: PreparedModel, class_images: list[Photo]) -> tuple[Samples, Denoiser]:
    """Lays out which rank takes which samples, and has the frozen parts do now what they would do in each step.

    A text encoder that is trained reads tokens in every step; a frozen one has done its work afterwards.

    Returns:
        The samples, and what is trained on them.
    """
    flags, ranks = run.flags, run.ranks
    vae = model.components["vae"]
    of_latents = latent_shape(vae, run.resolution)
    dataset = build_dataset(
        run.instance_images,
        class_images,
        seed=run.seed,
        resolution=run.resolution,
        center_crop=flags.instance.center_crop,
        latent_shape=of_latents,
        num_timesteps=model.noise_scheduler.config.num_train_timesteps,
        of_view=model.family.of_view,
        noise_offset=flags.training.noise_offset,
        prior_loss_weight=flags.prior.prior_loss_weight,
    )
    if not any(photo.name == STAND_IN for photo in class_images):
        run.settle("images", image_settings(run.instance_images + class_images))
    dtype = DTYPES[run.precision]
    drawn = [flags.validation.validation_prompt] if flags.validation.validation_prompt else []
    warn_of_cut_prompts([*dataset.prompts, *drawn], model.readers)
    conditioning = model.family.tokenize(dataset.prompts, model.tokenizers, model.components)
    if not flags.model.train_text_encoder:
        conditioning = embed(model.family, conditioning, model.text_encoders, device=ranks.device, dtype=dtype)
        for text_encoder in model.text_encoders.values():
            text_encoder.to("meta")  # its weights take no memory any more, whoever still refers to it
    trained = {name: model.components[name] for name in model.trained}
    denoiser = Denoiser(model.family, adapters=model.adapters, **trained)
    model.components = {"vae": vae}  # the others are the denoiser's, or of no more use
    with doing("caching latents"):
        settings = {"dtype": dtype_of_vae(model.family, vae, dtype), "which": flags.instance.cache_latents}
        is_complete = cache_latents(dataset, vae, ranks, run.schedule, run.first_step, **settings)
    workers = flags.training.dataloader_num_workers
    steps = build_loader(dataset, run.schedule, ranks, run.first_step, workers, conditioning, decodes=not is_complete)
    batch = flags.training.train_batch_size * dataset.examples_per_sample
    of_view = model.family.of_view(dataset.sets[0].view((0, 0)))
    conditioning = conditioning | {name: tensor[None] for name, tensor in of_view.items()}
    inputs = functools.partial(example_inputs, batch, of_latents, conditioning, device=ranks.device)

    def encode_example() -> None:
        if not is_complete:
            image = torch.zeros(batch, 3, run.resolution, run.resolution, device=ranks.device)
            encode_images(vae, image, torch.zeros(batch, *of_latents, device=ranks.device))

    return Samples(dataset, steps, inputs, encode_example), denoiser


def loss_by(run: Run, model: PreparedModel, dtype: torch.dtype) -> Callable:
    """Returns the loss as a function of the denoiser, whose weights are of `dtype`, and a batch."""
    return functools.partial(
        training_loss,
        vae=model.components["vae"],
        noise_scheduler=model.noise_scheduler,
        dtype=dtype,
        snr_gamma=run.flags.training.snr_gamma,
    )


@contextlib.contextmanager
def callbacks_of(run: Run, model: PreparedModel, samples: Samples, training: Training) -> Iterator[Callbacks]:
    """Yields what is to be told of each step; signals that end a process wait for it while the context lasts."""
    flags, ranks, dry_run = run.flags, run.ranks, run.flags.training.dry_run
    with Tracker(
        run.schedule,
        ranks,
        samples.dataset,
        folder=None if dry_run else run.output_dir / flags.output.logging_dir,
        first_step=run.first_step,
        save_minutes=flags.output.save_minutes,
        cuda_graphs=training.denoiser.recording is not None,
        skips=run.precision == "fp16",
    ) as tracker:
        folder = run.output_dir / "validation"
        device = DrawingDevice(ranks.device, "validation images")
        draws = {"seed": run.seed, "dtype": sampling_dtype(run.precision), "ranks": ranks, "device": device}
        yield Callbacks(
            flags.output,
            flags.validation,
            run.settings,
            training,
            ranks,
            tracker,
            functools.partial(validate, flags.validation, folder, training, model.load_pipeline, tracker, **draws),
            sizes=model.sizes,
            dry_run=dry_run,
        )


def save(run: Run, model: PreparedModel, training: Training, tracker: Tracker) -> None:
    """Writes the trained pipeline and lets the ranks leave; after a dry run, tells what a real one would take."""
    flags, ranks = run.flags, run.ranks
    tracker.finish()
    if flags.training.dry_run:
        tell_plan(flags, tracker, ranks, first_step=run.first_step, sizes=model.sizes)
        return leave()
    origin = {"step": run.schedule.steps, "base": run.base, "settings": run.settings}
    form = Form.of(flags.output, flags.lora)

    def write_more(folder: Path) -> None:
        if not form.more:
            return
        from dreambooth.model.single_file import write_single_file  # with a loader that takes time to import

        for name in form.more:
            file = {"dtype": form.of_single_file, "title": run.output_dir.resolve().name}
            write_single_file(folder, folder / name, model.family, resolution=run.resolution, **file)

    origin |= {"size": model.sizes.pipeline, "dtype": form.dtype}
    if model.adapters is None:
        save_pipeline(run.output_dir, model.load_pipeline, training, ranks, write_more=write_more, **origin)
    else:
        save_lora(run.output_dir, training, ranks, kohya=flags.lora.save_kohya_lora, **origin)
    if ranks.rank == 0:
        remove_interim_checkpoints(run.output_dir)
        if result := result_in(run.output_dir):
            say(f"{one_line(str(run.output_dir))} has {result}")
    leave()


def publish(run: Run, model: PreparedModel) -> None:
    """Uploads what was saved, if the flags say so; it may take long, and keeps no other rank waiting."""
    if model.repo_id:
        upload(run.flags.output, model.repo_id, run.prompt)
