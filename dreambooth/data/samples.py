"""From images to the samples of each step."""

import functools
import multiprocessing.queues
import os
import signal
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dreambooth.command_line.console import UserError
from dreambooth.data.images import Photo, crop_to_square, scaled_image, scaled_size, square_in
from dreambooth.data.randomness import Stream, generator
from dreambooth.data.schedule import Schedule
from dreambooth.model.family import Conditioning, View
from dreambooth.processes.ranks import Ranks
from dreambooth.processes.signals import SIGNALS
from dreambooth.processes.threads import ahead

# An image's place among those of its set, and where along its longer side the square begins (`Examples.offsets`).
Crop = tuple[int, int]


@functools.lru_cache(maxsize=8)
def shuffled(seed: int, order: Stream, pass_number: int, length: int) -> np.ndarray:
    """Returns the order in which pass `pass_number` takes `length` images, as indices."""
    return generator(seed, order, pass_number).permutation(length)


def nothing(view: View) -> Conditioning:
    """Returns what a UNet reads of a view that reads nothing of it."""
    return {}


class Examples:
    """A set of images as an endless, reshuffled sequence of training examples.

    Args:
        photos: the images.
        prompt_indices: the number of each of the run's prompts.
        seed: of the run.
        order: stream of the shuffling; pass p over the images has an order of its own.
        draws: stream of the examples' own draws.
        resolution: side of the images, in pixels.
        center_crop: whether images that are not square are cropped at the centre, and not anywhere.
        latent_shape: (channels, height, width) of the latents.
        num_timesteps: timesteps of the noise schedule.
        of_view: returns what the UNet reads of a view, as `dreambooth.model.family.Family.of_view`.
        weight: of the examples' errors in the loss.
        noise_offset: standard deviation of the shift that the noise of a whole channel gets (Guttenberg, "Diffusion
            with offset noise", 2023): with it a model learns to make images that are dark or bright all over.
    """

    def __init__(
        self,
        photos: list[Photo],
        *,
        prompt_indices: dict[str, int],
        seed: int,
        order: Stream,
        draws: Stream,
        resolution: int,
        center_crop: bool,
        latent_shape: tuple[int, int, int],
        num_timesteps: int,
        of_view: Callable[[View], Conditioning] = nothing,
        weight: float = 1.0,
        noise_offset: float = 0.0,
    ):
        self.photos = photos
        self.prompt_indices = prompt_indices
        self.seed = seed
        self.order = order
        self.draws = draws
        self.resolution = resolution
        self.center_crop = center_crop
        self.latent_shape = latent_shape
        self.num_timesteps = num_timesteps
        self.of_view = of_view
        self.weight = weight
        self.noise_offset = noise_offset
        # By crop, for those that are cached: mean and deviation of the VAE's posterior, times its scaling factor;
        # (2, *latent_shape), float32.
        self.moments: dict[Crop, torch.Tensor] = {}

    def offsets(self, place: int) -> range:
        """Returns where along its longer side the square of an image may begin, in pixels of the image as scaled.

        From one to the next are as many pixels of the square, at `resolution`, as a latent stands for. So an image has
        dozens of crops and not hundreds, few enough to encode each of them once.
        """
        size = scaled_size(self.photos[place].facts.size, self.resolution)
        most = max(size) - min(size)
        if self.center_crop:
            centre = round(most / 2)
            return range(centre, centre + 1)
        pixels_of_latent = self.resolution // self.latent_shape[-1]
        # Of an image that is smaller than `resolution`, these are fewer pixels.
        step = max(1, round(pixels_of_latent * min(size) / self.resolution))
        return range(0, most + 1, step)

    def crop(self, n: int, draw: np.random.Generator) -> Crop:
        """Returns what example `n` shows.

        Args:
            n: its number.
            draw: its generator, from which nothing has been drawn; one number is drawn in any case, so that what is
                drawn next does not depend on the image.
        """
        position, place = draw.random(), self.place_of(n)
        offsets = self.offsets(place)
        return place, offsets[int(position * len(offsets))]

    def crops(self, numbers: range, places: Collection[int]) -> list[Crop]:
        """Returns the crops that the examples of some numbers show of the images at some places, each once, in order.

        It looks at no more examples than it takes to have seen all crops that there are.
        """
        left = sum(len(self.offsets(place)) for place in places)
        seen: set[Crop] = set()
        for n in numbers:
            if not left:
                break
            crop = self.crop(n, generator(self.seed, self.draws, n))
            if crop[0] in places and crop not in seen:
                seen.add(crop)
                left -= 1
        return sorted(seen)

    def view(self, crop: Crop) -> View:
        """Returns what a crop shows of its image."""
        place, offset = crop
        size = self.photos[place].facts.size
        left, top, side = square_in(scaled_size(size, self.resolution), offset)
        scale = self.resolution / side  # of an image that is smaller than that
        return View(size[::-1], (round(top * scale), round(left * scale)), (self.resolution, self.resolution))

    def pixel_values(self, crop: Crop) -> torch.Tensor:
        """Returns the pixels of a crop, as `crop_to_square` does of an image whose shorter side is scaled down."""
        place, offset = crop
        return crop_to_square(scaled_image(self.photos[place], self.resolution), self.resolution, offset)

    def place_of(self, n: int) -> int:
        """Returns the place in `photos` of example `n`'s image: every pass takes each image once."""
        pass_number, turn = divmod(n, len(self.photos))
        return int(shuffled(self.seed, self.order, pass_number, len(self.photos))[turn])

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        """Returns example `n`, a function of the seed and `n` alone.

        Returns:
            latents: `latent_shape`, float32, a sample of the VAE's posterior times its scaling factor; or, of a crop
                that is not in the cache, what makes one:
            pixel_values: (3, resolution, resolution), float32, in [-1, 1].
            posterior_noise: `latent_shape`, float32, standard normal.

            noise: `latent_shape`, float32, standard normal but for its offset; what the UNet has to find.
            timesteps: (), int64, from 0 to num_timesteps - 1.
            prompt_indices: (), int64.
            weights: (), float32.
            of_view: a dict, what the UNet reads of the example's view.
        """
        draw = generator(self.seed, self.draws, n)
        crop = self.crop(n, draw)
        posterior_noise = torch.from_numpy(draw.standard_normal(self.latent_shape, dtype=np.float32))
        if crop in self.moments:
            mean, deviation = self.moments[crop]
            image = {"latents": mean + deviation * posterior_noise}
        else:
            image = {"pixel_values": self.pixel_values(crop), "posterior_noise": posterior_noise}
        noise = torch.from_numpy(draw.standard_normal(self.latent_shape, dtype=np.float32))
        timesteps = torch.tensor(int(draw.integers(self.num_timesteps)))
        if self.noise_offset:
            shifts = draw.standard_normal((self.latent_shape[0], 1, 1), dtype=np.float32)
            noise += self.noise_offset * torch.from_numpy(shifts)
        return image | {
            "noise": noise,
            "timesteps": timesteps,
            "prompt_indices": torch.tensor(self.prompt_indices[self.photos[crop[0]].prompt]),
            "weights": torch.tensor(self.weight),
            "of_view": self.of_view(self.view(crop)),
        }


class DreamBoothDataset(Dataset):
    """Sample n is instance example n and, with prior preservation, class example n.

    Args:
        instance, prior: the examples; no prior is no prior preservation.
        prompts: all prompts of the run, to which the examples' prompt_indices point.
    """

    def __init__(self, instance: Examples, prior: Examples | None, prompts: list[str]):
        self.sets = [instance] if prior is None else [instance, prior]
        self.prompts = prompts

    @property
    def examples_per_sample(self) -> int:
        """2 with prior preservation, else 1."""
        return len(self.sets)

    def __getitem__(self, n: int) -> list[dict[str, torch.Tensor]]:
        return [one[n] for one in self.sets]


def build_dataset(
    instance_images: list[Photo],
    class_images: list[Photo],
    *,
    seed: int,
    resolution: int,
    center_crop: bool,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
    of_view: Callable[[View], Conditioning] = nothing,
    noise_offset: float = 0.0,
    prior_loss_weight: float = 1.0,
) -> DreamBoothDataset:
    """Returns the run's samples.

    Args:
        instance_images: at least one.
        class_images: none where there is no prior preservation.
        seed, resolution, center_crop, latent_shape, num_timesteps, of_view, noise_offset: as of `Examples`.
        prior_loss_weight: of the class images' errors in the loss.
    """
    prompts = list(dict.fromkeys(photo.prompt for photo in [*instance_images, *class_images]))
    settings = {
        "prompt_indices": {prompt: number for number, prompt in enumerate(prompts)},
        "seed": seed,
        "resolution": resolution,
        "center_crop": center_crop,
        "latent_shape": latent_shape,
        "num_timesteps": num_timesteps,
        "of_view": of_view,
        "noise_offset": noise_offset,
    }
    instance = Examples(instance_images, order=Stream.INSTANCE_ORDER, draws=Stream.INSTANCE_SAMPLE, **settings)
    prior = None
    if class_images:
        streams = {"order": Stream.CLASS_ORDER, "draws": Stream.CLASS_SAMPLE}
        prior = Examples(class_images, weight=prior_loss_weight, **streams, **settings)
    return DreamBoothDataset(instance, prior, prompts)


def collate(samples: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Stacks samples: first all instance examples, then all class examples, ready for one forward pass.

    Examples with and without latents may meet in a batch: `latents` has those of the first kind, `pixel_values` and
    `posterior_noise` those of the second, and `rows`, (batch,), int64, where in both together each example is.
    `weights` is (examples of a sample, samples), and `conditioning` what the UNet reads of the examples' views.
    """
    examples = [sample[number] for number in range(len(samples[0])) for sample in samples]
    of_views = [example.pop("of_view") for example in examples]
    keys = dict.fromkeys(key for example in examples for key in example)
    batch = {key: torch.stack([example[key] for example in examples if key in example]) for key in keys}
    batch["conditioning"] = {name: torch.stack([one[name] for one in of_views]) for name in of_views[0]}
    latents_first = sorted(range(len(examples)), key=lambda row: "latents" not in examples[row])
    weights = batch["weights"].view(-1, len(samples))
    return batch | {"rows": torch.tensor(latents_first).argsort(), "weights": weights}


def _leave_all_but_images_to_the_trainer(worker: int) -> None:
    """In a worker process: signals to the whole process group are the trainer's to answer, and errors its to tell.

    It gets those that images cause. One in sending images, for want of shared memory, ends the worker, which it sees.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, item: os._exit(1))


def build_loader(
    dataset: DreamBoothDataset,
    schedule: Schedule,
    ranks: Ranks,
    first_step: int = 0,
    workers: int | None = None,
    conditioning: dict[str, torch.Tensor] | None = None,
    *,
    decodes: bool = True,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yields this rank's batches of each step of the schedule, on its device.

    Args:
        dataset: of the samples.
        schedule: which samples a step takes.
        ranks: which share of them is this process's.
        first_step: steps that are passed over.
        workers: processes that make the batches; 0 has the trainer make each when it wants it, for which a GPU waits
            even if all latents are cached: a tenth of a step of 16 samples. By default, on a GPU machine, four decode
            while the GPU computes, or a thread of the trainer is enough where nothing is to be decoded; on the CPU
            they would only take its cores.
        conditioning: by prompts, (prompts, ...), on the CPU, of which each batch gets the rows that its prompt_indices
            name, beside what it has; None gives it no more.
        decodes: whether there are images that are not cached.
    """
    on_gpu = ranks.device.type == "cuda"
    in_thread = workers is None and on_gpu and not decodes
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if on_gpu and decodes else 0
    loader = DataLoader(
        dataset,
        batch_sampler=schedule.batches(ranks.rank, first_step),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_leave_all_but_images_to_the_trainer,
        pin_memory=on_gpu and workers > 0,
    )

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        # What workers have made is in pinned memory already. A thread does not know which GPU is its process's.
        return (tensor.pin_memory() if on_gpu else tensor).to(ranks.device, non_blocking=True)

    try:
        batches = []
        for batch in ahead(iter(loader)) if in_thread else loader:
            rows = {name: by_prompt[batch["prompt_indices"]] for name, by_prompt in (conditioning or {}).items()}
            rows |= batch.pop("conditioning")
            rows = {name: to_device(one) for name, one in rows.items()}
            batches.append({key: to_device(value) for key, value in batch.items()} | {"conditioning": rows})
            if len(batches) == schedule.accumulation:
                yield batches
                batches = []
    except UserError as error:
        # A worker process sends its traceback too, with the line last.
        raise UserError(error.args[0].rpartition("UserError: ")[2].removesuffix(r"\n")) from error
