"""Makes assets/tiny-stable-diffusion: a small Stable Diffusion that knows 95 things in eighteen places.

    pip install resvg-py
    python -m assets.recipe.train --downloads emoji --vae_minutes 8 --unet_minutes 15

First the VAE is trained, then UNet and text encoder together on its latents; on one recent GPU. Run again, it goes on
from the weights in the output folder; `--vae_minutes 0` leaves the VAE as it is. `--sheet` draws sixteen prompts.
"""

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from assets.recipe import cutouts
from assets.recipe.scenes import PLACES, RESOLUTION, Scenes, captions
from dreambooth.model.pipeline import write_pipeline
from dreambooth.run.grid import captioned_grid

# Rare words for subjects: one token each, in no caption.
IDENTIFIERS = ("sks", "zwx", "ohwx", "xjy", "tok")
MAX_TOKENS = 24
# Shares of captions that name the thing, its style too, its kind; the rest are empty, for classifier-free guidance.
NAME, STYLE, KIND = 0.55, 0.25, 0.10
# Share of captions that do not say where, so that "a dog" means something.
NO_PLACE = 0.15
# The decoder sees latents with noise up to this share of their deviation: what a UNet draws is never quite clean.
LATENT_NOISE = 0.2

SHEET_PROMPTS = (
    "a dog on the beach",
    "a dog in the snow",
    "a cat on the grass",
    "a 3d fox at night",
    "a flat lion in the desert",
    "an elephant in the city",
    "a penguin in the snow",
    "an owl at night",
    "a fish in the sea",
    "a horse on the grass",
    "a hamburger on a wooden floor",
    "a strawberry on a pink background",
    "a sunflower on a blue background",
    "a cake on a wooden floor",
    "an apple on a yellow background",
    "a dinosaur in the city",
)


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Returns a byte-level BPE in CLIP's format for which every word of `texts` is one token."""
    letters = list(bytes_to_unicode().values())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merged = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merged.write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges), ""]))
        return CLIPTokenizer(str(vocabulary), str(merged), model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def new_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Returns the untrained pipeline."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(48, 64, 96, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        scaling_factor=1.0,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    # v-prediction down to pure noise: plain backgrounds keep their colour (Lin et al., arXiv 2305.08891).
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Training:
    """Steps of AdamW with a cosine learning rate over a given time, and an average of the weights.

    On CUDA the loss is compiled, and a step is captured once as a graph and replayed: these models are so small that
    a step launched kernel by kernel would mostly wait for the host.

    Args:
        modules: trained together, in place.
        loss_of: returns the loss of a fresh random batch.
        lr: peak learning rate; half a minute or 5 % of the time, whichever is less, is warm-up.
        minutes: how long to train.
        decay: of the exponential moving average, per step.
    """

    def __init__(self, modules: list[torch.nn.Module], loss_of: Callable, *, lr: float, minutes: float, decay: float):
        self.modules, self.loss_of, self.peak_lr, self.minutes, self.decay = modules, loss_of, lr, minutes, decay
        self.parameters = [p for module in modules for p in module.parameters()]
        self.device = self.parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu
        )
        self.averages = [p.detach().clone() for p in self.parameters]

    def step(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss = self.loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, self.parameters, 1 - self.decay)
        return loss.detach()

    def captured(self) -> Callable[[], torch.Tensor]:
        """Returns `step`, on CUDA compiled and as a graph's replay."""
        if self.device.type != "cuda":
            return self.step
        self.loss_of = torch.compile(self.loss_of, dynamic=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):  # at learning rate 0
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        return replay

    def run(self) -> Iterator[dict]:
        """Trains; yields step, seconds and mean loss every 200 steps, and leaves the averages in the modules."""
        step_once, started, step = self.captured(), time.monotonic(), 0
        total = torch.zeros((), device=self.device)
        while (seconds := time.monotonic() - started) < 60 * self.minutes:
            done = seconds / (60 * self.minutes)
            warm = min(1.0, seconds / min(30.0, 3 * self.minutes))
            self.lr.fill_(self.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * done)))
            total += step_once()
            step += 1
            if step % 200 == 0:
                yield {"step": step, "seconds": round(seconds, 1), "loss": total.item() / 200}
                total.zero_()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)


def train_vae(vae: AutoencoderKL, scenes: Scenes, *, minutes: float, batch: int) -> Iterator[dict]:
    """Trains the VAE on fresh scenes: absolute and squared error, absolute error of the differences of neighbours."""

    def loss_of() -> torch.Tensor:
        with torch.no_grad():
            images = scenes.draw(*scenes.random(batch))
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        noise = LATENT_NOISE * torch.rand(batch, 1, 1, 1, device=mean.device) * mean.detach().std()
        latents = latents + noise * torch.randn_like(mean)
        decoded = vae.decode(latents).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + error.square().mean() + edges + 1e-5 * kl

    yield from Training([vae], loss_of, lr=1e-3, minutes=minutes, decay=0.999).run()


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, scenes: Scenes) -> float:
    """Returns the peak signal-to-noise ratio of reconstructions from the posterior's mean, in dB, over 256 scenes."""
    generator = torch.Generator(scenes.device).manual_seed(0)
    errors = []
    for _ in range(8):
        images = scenes.draw(*scenes.random(32, generator))
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - images).square().mean(dim=(1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: Scenes, count: int) -> tuple[torch.Tensor, ...]:
    """Returns means and deviations of the latents of `count` scenes, half precision, and the things and places."""
    parts = []
    for _ in range(math.ceil(count / 256)):
        things, places, layout = scenes.random(256)
        with torch.autocast(scenes.device.type, torch.bfloat16):
            posterior = vae.encode(scenes.draw(things, places, layout)).latent_dist
        parts.append((posterior.mean.half(), posterior.std.half(), things, places))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def train_unet(
    pipeline: StableDiffusionPipeline, scenes: Scenes, *, minutes: float, batch: int, pool: int
) -> Iterator[dict]:
    """Trains UNet and text encoder together on a pool of encoded scenes."""
    unet, text_encoder, tokenizer, device = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, scenes.device
    means, deviations, things, places = encode_scenes(pipeline.vae, scenes, pool)
    scale = (means.float().var() + deviations.float().square().mean()).rsqrt()  # latents of variance 1
    pipeline.vae.register_to_config(scaling_factor=scale.item())

    # Token ids of every caption: (things, places and none, ways to say it), and last the empty one.
    texts = [text for thing in scenes.cutouts for place in [*scenes.places, ""] for text in captions(thing, place)]
    tokens = tokenizer([*texts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    alphas = noise_scheduler.alphas_cumprod.to(device)

    def loss_of() -> torch.Tensor:
        chosen = torch.randint(len(means), (batch,), device=device)
        way = torch.rand(batch, device=device)
        phrase = (way > NAME).long() + (way > NAME + STYLE).long()
        untold = torch.rand(batch, device=device) < NO_PLACE
        place = torch.where(untold, len(scenes.places), places[chosen])
        caption = (things[chosen] * (len(scenes.places) + 1) + place) * 3 + phrase
        caption = torch.where(way > NAME + STYLE + KIND, len(tokens) - 1, caption)
        mean, deviation = means[chosen].float(), deviations[chosen].float()
        latents = (mean + deviation * torch.randn_like(mean)) * scale
        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(alphas), (batch,), device=device)
        abar = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
        text = text_encoder(tokens[caption])[0]
        return F.mse_loss(unet(noisy, timesteps, text).sample.float(), velocity)

    yield from Training([unet, text_encoder], loss_of, lr=1e-3, minutes=minutes, decay=0.9995).run()


def draw_sheet(pipeline: StableDiffusionPipeline, path: Path, device: torch.device) -> None:
    """Writes the images of SHEET_PROMPTS, 25 steps each, four to a row."""
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(len(SHEET_PROMPTS))]
    images = pipeline(list(SHEET_PROMPTS), num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    rows = [slice(first, first + 4) for first in range(0, len(images), 4)]
    captions = [" · ".join(SHEET_PROMPTS[row]) for row in rows]
    captioned_grid([images[row] for row in rows], captions, []).save(path)


def record(path: Path, name: str, training: Iterator[dict]) -> None:
    """Trains to the end, prints the figures, and adds them to the curves in the file `path`."""
    curves = json.loads(path.read_text()) if path.is_file() else {}
    curve = []
    for figures in training:
        print(name, figures, flush=True)
        curve.append(figures)
    curves.setdefault(name, []).append(curve)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(curves))


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline in fp16."""
    write_pipeline(copy.deepcopy(pipeline).to(torch.float16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, required=True, help="where the emoji packages are, or go")
    parser.add_argument("--output", type=Path, default=Path("assets/tiny-stable-diffusion"), help="pipeline folder")
    parser.add_argument("--vae_minutes", type=float, default=8, help="of training the VAE; 0 is none (default: 8)")
    parser.add_argument("--unet_minutes", type=float, default=15, help="of training the UNet; 0 is none (default: 15)")
    parser.add_argument("--vae_batch", type=int, default=96, help="images per step (default: 96)")
    parser.add_argument("--unet_batch", type=int, default=512, help="images per step (default: 512)")
    parser.add_argument("--pool", type=int, default=262144, help="encoded scenes that the UNet sees (default: 262144)")
    parser.add_argument("--variants", type=int, default=40, help="paintings of each place (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--sheet", type=Path, help="write a sheet of sixteen prompts to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True

    cutouts.fetch(args.downloads)
    scenes = Scenes(cutouts.load_cutouts(args.downloads), variants=args.variants, seed=args.seed, device=device)
    unseen = cutouts.load_cutouts(args.downloads, cutouts.SUBJECT + cutouts.HELD_OUT)
    unseen = Scenes(unseen, variants=2, seed=args.seed + 1, device=device)

    if (args.output / "model_index.json").is_file():
        pipeline = StableDiffusionPipeline.from_pretrained(args.output, torch_dtype=torch.float32)
    else:
        texts = [text for thing in scenes.cutouts for place in PLACES for text in captions(thing, place)]
        pipeline = new_pipeline(train_tokenizer([*texts, " ".join(IDENTIFIERS)]))
    pipeline.to(device)

    curves = args.output.parent / "training_curves.json"
    if args.vae_minutes:
        training = train_vae(pipeline.vae, scenes, minutes=args.vae_minutes, batch=args.vae_batch)
        record(curves, "VAE", training)
        save(pipeline, args.output)
    print(f"VAE on things that it has never seen: {measure_vae(pipeline.vae, unseen):.2f} dB", flush=True)
    if args.unet_minutes:
        training = train_unet(pipeline, scenes, minutes=args.unet_minutes, batch=args.unet_batch, pool=args.pool)
        record(curves, "UNet", training)
        save(pipeline, args.output)
    if args.sheet:
        draw_sheet(pipeline, args.sheet, device)


if __name__ == "__main__":
    main()
