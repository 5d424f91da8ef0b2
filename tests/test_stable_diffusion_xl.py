"""Stable Diffusion XL: what is its own, against diffusers' pipeline, and whole runs of a tiny one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoPipelineForText2Image, DDPMScheduler, StableDiffusionXLPipeline
from harness import COLOSSALAI, TRADITIONAL, Running, scalars, train
from PIL import Image
from safetensors.torch import load_file

from benchmarks import random_model
from dreambooth.command_line.console import UserError
from dreambooth.command_line.flags import ModelFlags
from dreambooth.data.images import crop_to_square, find_images, scaled_image
from dreambooth.data.randomness import Stream, starting_points
from dreambooth.data.samples import build_dataset, collate
from dreambooth.model.components import latent_shape
from dreambooth.model.configurations import build_pipeline
from dreambooth.model.denoiser import Denoiser
from dreambooth.model.family import View, dtype_of_vae
from dreambooth.model.folder import find_elsewhere, find_model
from dreambooth.model.loss import encode_images, training_loss
from dreambooth.model.pipeline import load_model, load_part, load_pipeline, load_tokenizers, write_pipeline
from dreambooth.model.prompts import embed
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION
from dreambooth.model.stable_diffusion_xl import STABLE_DIFFUSION_XL
from dreambooth.run.checkpoint import resolution_of

CPU = torch.device("cpu")
PROMPTS = ["a photo of sks dog", "a dog", "a photo of " + "very " * 60 + "long dog", "!"]
BOTH = pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])


@pytest.fixture
def model(xl_model, tmp_path):
    """One to change."""
    return shutil.copytree(xl_model, tmp_path / "model")


@pytest.fixture
def pipeline(xl_model):
    """The pipeline, by diffusers alone."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def flags(flags, xl_model):
    return flags | {"pretrained_model_name_or_path": xl_model, "max_train_steps": 4, "learning_rate": 1e-3}


def change_json(file: Path, **changed) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


# What is its own ----------------------------------------------------------------------------------------------------


def embeddings(model, prompts: list[str]) -> dict[str, torch.Tensor]:
    tokens = model.family.tokenize(prompts, model.tokenizers, model.components)
    return embed(model.family, tokens, model.text_encoders, device=CPU, dtype=torch.float32)


def test_prompts_are_encoded_as_by_the_pipeline(xl_model, pipeline):
    """To the bit: tokens, their padding, both text encoders, what is pooled."""
    found = embeddings(load_model(xl_model, resolution=32), PROMPTS)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert hidden.shape == (len(PROMPTS), 77, 32 + 48) and pooled.shape == (len(PROMPTS), 40)
    assert torch.equal(found["encoder_hidden_states"], hidden) and torch.equal(found["text_embeds"], pooled)


def test_a_view_is_told_as_by_the_pipeline(pipeline):
    """In whole numbers, which no precision of a run rounds."""
    sizes = (3001, 4003), (0, 171), (1024, 1024)
    found = STABLE_DIFFUSION_XL.of_view(View(*sizes))["time_ids"]
    expected = pipeline._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=40)
    assert not found.is_floating_point()
    assert torch.equal(found[None].float(), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_pipelines_parts(prediction_type, xl_model, pipeline, photos):
    """With frozen text encoders as with those that are trained; of crops of photos that are not square."""
    model = load_model(xl_model, resolution=32)
    model.noise_scheduler.register_to_config(prediction_type=prediction_type)
    found = find_images(photos, "--x", resolution=32)
    images = [[replace(photo, prompt=prompt) for photo in found] for prompt in PROMPTS[:2]]
    settings = {"seed": 3, "resolution": 32, "center_crop": False, "num_timesteps": 1000, "prior_loss_weight": 0.5}
    settings |= {"latent_shape": latent_shape(pipeline.vae, 32), "of_view": model.family.of_view}
    dataset = build_dataset(*images, **settings)
    samples = [dataset[number] for number in range(3)]
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    expected, crops = 0, set()
    for number, sample in enumerate(samples):
        for examples, example, prompt, weight in zip(dataset.sets, sample, PROMPTS, (1, 0.5), strict=False):
            height, width, top, left, *size = example["of_view"]["time_ids"].tolist()
            photo = examples.photos[examples.place_of(number)]
            assert (width, height) == Image.open(photo.name).size and size == [32, 32]
            pixels = crop_to_square(scaled_image(photo, 32), 32, top + left)
            crops.add((top, left))
            with torch.no_grad():
                posterior = pipeline.vae.encode(pixels[None]).latent_dist
                latents = posterior.mean + posterior.std * example["posterior_noise"]
                latents = latents * pipeline.vae.config.scaling_factor
                hidden, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
                sizes = (height, width), (top, left), (32, 32)
                time_ids = pipeline._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=40)
                added = {"text_embeds": pooled, "time_ids": time_ids}
                noise, timestep = example["noise"][None], example["timesteps"][None]
                noisy = scheduler.add_noise(latents, noise, timestep)
                predicted = pipeline.unet(noisy, timestep, hidden, added_cond_kwargs=added).sample
                is_v = prediction_type == "v_prediction"
                target = scheduler.get_velocity(latents, noise, timestep) if is_v else noise
                expected += weight * F.mse_loss(predicted, target) / len(samples)
    assert len(crops) > 2
    batch = collate(samples)
    tokens = model.family.tokenize(dataset.prompts, model.tokenizers, model.components)
    for by_prompt, trained in ((embeddings(model, dataset.prompts), {}), (tokens, model.text_encoders)):
        denoiser = Denoiser(model.family, unet=model.components["unet"], **trained)
        rows = {name: tensor[batch["prompt_indices"]] for name, tensor in by_prompt.items()}
        inputs = batch | {"conditioning": rows | batch["conditioning"]}
        how = {"vae": model.components["vae"], "noise_scheduler": model.noise_scheduler, "dtype": torch.float32}
        loss = training_loss(denoiser, inputs, **how)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    without = [name for name, weight in denoiser.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not without, "whose gradients ranks would wait for"


def test_what_nothing_reads_is_frozen(xl_model):
    """And nothing else: any other weight of a text encoder changes what is encoded."""
    model = load_model(xl_model, resolution=32)
    before = embeddings(model, PROMPTS[:2])
    frozen = {}
    for name, text_encoder in model.text_encoders.items():
        frozen[name] = [weight for weight in text_encoder.parameters() if not weight.requires_grad]
    assert len(frozen["text_encoder"]) == 16 + 2 and not frozen["text_encoder_2"]
    with torch.no_grad():
        for weight in frozen["text_encoder"]:
            weight.add_(torch.randn_like(weight))
    after = embeddings(model, PROMPTS[:2])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_vae_is_in_fp32_where_it_asks_for_it(dtype, xl_model, model, pipeline):
    drawing = load_pipeline(xl_model, dtype)
    assert drawing.vae.dtype == torch.float32 and drawing.unet.dtype == drawing.text_encoder_2.dtype == dtype
    drawing.set_progress_bar_config(disable=True)
    how = {"prompt": "a dog", "num_inference_steps": 2, **starting_points(drawing, 1, Stream.VALIDATION, [0])}
    assert how["latents"].dtype == dtype
    image = drawing(**how, output_type="np").images[0]
    how |= starting_points(drawing, 1, Stream.VALIDATION, [0])
    latents = drawing(**how, output_type="latent").images
    with torch.no_grad():
        decoded = pipeline.vae.decode((latents / pipeline.vae.config.scaling_factor).float()).sample
    np.testing.assert_allclose(image, pipeline.image_processor.postprocess(decoded, "np")[0], atol=1e-6)

    change_json(model / "vae" / "config.json", force_upcast=False)
    assert load_pipeline(model, dtype).vae.dtype == dtype
    assert dtype_of_vae(STABLE_DIFFUSION_XL, load_part(STABLE_DIFFUSION_XL, "vae", model), dtype) == dtype
    assert dtype_of_vae(STABLE_DIFFUSION, pipeline.vae, dtype) == dtype, "there it is a default that nobody means"


def test_the_vae_encodes_in_fp32_under_autocast(pipeline):
    pixels, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 4, 16, 16)
    expected = encode_images(pipeline.vae, pixels, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_images(pipeline.vae, pixels, noise), expected)


def changed_unet(model: Path, **config) -> None:
    change_json(model / "unet" / "config.json", **config)


def as_refiner(model: Path) -> None:
    """As the index of the refiner is, which has no first text encoder."""
    change_json(
        model / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )


REFUSED = {
    "refiner": (as_refiner, "model is the refiner of Stable Diffusion XL, which cannot be trained here: use a Stable"),
    "UNet of the refiner": (
        lambda model: changed_unet(model, projection_class_embeddings_input_dim=40 + 5 * 8),
        "the UNet reads 80 numbers beside the prompt, and this model has 88: it is the refiner",
    ),
    "UNet of another text encoder": (
        lambda model: changed_unet(model, projection_class_embeddings_input_dim=50 + 6 * 8),
        "the UNet reads 98 numbers beside the prompt, and this model has 88: use a UNet of it",
    ),
    "inpainting": (lambda model: changed_unet(model, in_channels=9), "it is an inpainting model, which cannot be"),
    "UNet of Stable Diffusion 1.x": (
        lambda model: changed_unet(model, addition_embed_type=None),
        "the UNet does not read what that of a Stable Diffusion XL does",
    ),
    "UNet of one text encoder": (
        lambda model: changed_unet(model, cross_attention_dim=48),
        "the UNet reads prompts of width 48, and this model encodes them in 80",
    ),
    "latents that are shifted": (
        lambda model: change_json(model / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "the VAE's latents are to be shifted",
    ),
    "VAE of gray images": (
        lambda model: change_json(model / "vae" / "config.json", in_channels=1, out_channels=1),
        "the VAE reads images of 1 channel and returns such of 1: use one of RGB",
    ),
    "latents that are nothing": (
        lambda model: change_json(model / "vae" / "config.json", scaling_factor=0),
        "the VAE scales latents by 0: use one",
    ),
    "latents that are scaled by no number": (
        lambda model: change_json(model / "vae" / "config.json", scaling_factor=None),
        "the VAE scales latents by None: use one",
    ),
    "no second text encoder": (
        lambda model: change_json(model / "model_index.json", text_encoder_2=[None, None]),
        r"model is a StableDiffusionXLPipeline with other parts than one has \(text_encoder_2\): use a Stable",
    ),
    "no second tokenizer": (
        lambda model: shutil.rmtree(model / "tokenizer_2"),
        "has no tokenizer_2: it is not a whole",
    ),
}


def find(model: Path) -> Path:
    return find_model(ModelFlags(pretrained_model_name_or_path=str(model)), {})


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_like_it_is_refused(case, model):
    change, told = REFUSED[case]
    change(model)
    with pytest.raises(UserError, match=told):
        find(model)


def test_tokenizers_of_one_text_encoder_are_refused(xl_model):
    with pytest.raises(UserError, match="tokenizer has no tokenizer and no tokenizer_2: name a folder with tokenizer"):
        load_tokenizers(STABLE_DIFFUSION_XL, xl_model / "tokenizer")


def test_a_distilled_model_is_told(model, capfd):
    """By its name or by its scheduler; a last timestep that is all noise is no such sign."""
    find(model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    change_json(scheduler, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    find(model)
    assert not capfd.readouterr().err
    change_json(scheduler, rescale_betas_zero_snr=False)
    find(model)
    assert "looks distilled to draw in few steps" in (told := capfd.readouterr().err) and "'trailing'" in told
    change_json(scheduler, timestep_spacing="leading")
    change_json(model / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    find(model)
    assert "its scheduler is LCMScheduler" in capfd.readouterr().err
    change_json(model / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    find(model)
    assert not capfd.readouterr().err
    change_json(model / "model_index.json", _name_or_path="someone/hyper-sdxl")
    find(model)
    assert "its name has 'hyper-sd' in it" in capfd.readouterr().err
    find(model.rename(model.with_name("SDXL-Turbo")))
    assert "its name has 'turbo' in it" in capfd.readouterr().err


# Whole runs ---------------------------------------------------------------------------------------------------------

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo of dog", "num_class_images": 3}
WHOLE = PRIOR | {
    "train_text_encoder": True,
    "validation_prompt": "a photo of sks dog in a bucket",
    "num_validation_images": 1,
    "save_steps": 2,
    "lr_scheduler": "cosine",
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns all weights of a pipeline or a checkpoint, and a checkpoint's optimizer state."""
    files = [file for part in STABLE_DIFFUSION_XL.components for file in (folder / part).glob("*.safetensors")]
    files += folder.glob("optimizer.safetensors")
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def whole(flags, once):
    """Returns a function that makes a run of everything, once for all tests: the folder of its output and images."""

    def run(script: str, nproc: int) -> Path:
        def make(folder: Path) -> None:
            own = {"output_dir": folder / "out", "class_data_dir": folder / "class", "train_batch_size": 2 // nproc}
            train(script, flags | WHOLE | own, nproc=nproc)

        return once(f"xl-{script}-{nproc}", make)

    return run


def test_any_number_of_ranks_and_both_trainers_take_the_same_steps(whole, xl_model):
    one = whole(COLOSSALAI, 1)
    before, after = weights_of(xl_model), weights_of(one / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name.partition(".")[0] for name in moved}
    assert trained == {"unet", "text_encoder", "text_encoder_2"}
    assert not any("text_model.encoder.layers.2." in name for name in moved if name.startswith("text_encoder.")), (
        "what is frozen is as it was"
    )
    checkpoint = weights_of(one / "out" / "checkpoint-4")
    assert all(torch.equal(checkpoint[name], after[name]) for name in after if not name.startswith("vae."))
    for script, nproc in ((COLOSSALAI, 2), (TRADITIONAL, 1), (TRADITIONAL, 2)):
        other = whole(script, nproc)
        for name in ("loss", "grad_norm", "lr"):
            np.testing.assert_allclose(scalars(other / "out", name), scalars(one / "out", name), rtol=2e-5)
        images = [sorted(folder.glob("*.png")) for folder in (one / "class", other / "class")]
        assert [path.read_bytes() for path in images[0]] == [path.read_bytes() for path in images[1]]
        assert len(images[0]) == 3
        drawn = [Image.open(run / "out" / "validation" / "step-4.png") for run in (one, other)]
        assert np.abs(np.subtract(*(np.asarray(image, dtype=int) for image in drawn))).max() <= 2


@BOTH
def test_a_run_that_goes_on_equals_one_that_never_stopped(script, whole, flags, tmp_path):
    """To the bit: both text encoders and what is frozen of them included."""
    run = whole(script, 1)
    shutil.copytree(run / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    own = {"class_data_dir": run / "class", "resume_from_checkpoint": "latest", "resolution": None}
    train(script, flags | WHOLE | own)
    for name in (".", "checkpoint-4"):
        found, expected = weights_of(tmp_path / "out" / name), weights_of(run / "out" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_output_is_a_pipeline_of_diffusers(whole, tmp_path):
    """For its own class and for the one that chooses; inference.py draws the same."""
    output_dir = whole(TRADITIONAL, 2) / "out"
    image = tmp_path / "image.png"
    words = [output_dir, "--prompt", "a sks dog", "--num_inference_steps", 2, "--output", image]
    Running("inference.py", [str(word) for word in words]).wait()
    drawn = np.asarray(Image.open(image), dtype=int)
    for kind in (StableDiffusionXLPipeline, AutoPipelineForText2Image):
        pipeline = kind.from_pretrained(output_dir)
        assert type(pipeline) is StableDiffusionXLPipeline
        pipeline.set_progress_bar_config(disable=True)
        how = {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(0)}
        found = np.asarray(pipeline("a sks dog", **how).images[0], dtype=int)
        assert found.shape == (32, 32, 3) and np.abs(found - drawn).max() <= 1
    assert pipeline.tokenizer_2.pad_token == "!" and pipeline.tokenizer.pad_token != "!"


def test_a_vae_of_another_factor_is_refused(xl_model, flags, tmp_path):
    """Its latents would be images of other sides to the UNet."""
    shape = AutoencoderKL.load_config(xl_model / "vae")
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        shape[name] = [*shape[name], shape[name][-1]]
    AutoencoderKL.from_config(shape).save_pretrained(tmp_path / "other")
    done = train(COLOSSALAI, flags | {"pretrained_vae_model_name_or_path": tmp_path / "other"}, check=False)
    assert done.returncode == 2
    assert "times smaller than images, and the model's own" in done.error_lines[0], done.stderr


@BOTH
def test_another_vae(script, xl_model, tiny_model, flags, tmp_path):
    """Of a model, or alone; it makes the latents and the images, and is saved."""
    shutil.copytree(tiny_model / "vae", tmp_path / "other")
    where = {COLOSSALAI: tiny_model, TRADITIONAL: tmp_path / "other"}[script]
    flags |= PRIOR | {"class_data_dir": tmp_path / "class", "num_class_images": 1, "max_train_steps": 1}
    flags |= {"pretrained_vae_model_name_or_path": where, "validation_prompt": "a dog", "num_validation_images": 1}
    told = train(script, flags).stderr
    assert "the VAE scales latents by 0.18215, and the model's own by 0.13025" in told
    found = load_file(flags["output_dir"] / "vae" / "diffusion_pytorch_model.safetensors")
    expected = load_file(tiny_model / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert f"with the VAE of {where.name}" in Image.open(tmp_path / "class" / "00000.png").text["dreambooth"]
    pipeline = load_pipeline(flags["output_dir"])
    pipeline.set_progress_bar_config(disable=True)
    # Not that of the model itself: its class images are refused.
    own = {"pretrained_vae_model_name_or_path": None, "output_dir": tmp_path / "own"}
    done = train(script, flags | own, check=False)
    assert "00000.png was generated by" in done.error_lines[0]


OTHER_VAES = {
    "a file": (lambda folder: (folder / "vae").write_text(""), "/vae is not a folder"),
    "nothing": (lambda folder: None, "/vae is not a folder"),
    "empty": (lambda folder: (folder / "vae").mkdir(), "cannot load the VAE of .*: it has no diffusion_pytorch_model"),
    "a pickle": (
        lambda folder: [(folder / "vae").mkdir(), (folder / "vae" / "diffusion_pytorch_model.bin").touch()],
        "its weights are in a pickle file",
    ),
}


@pytest.mark.parametrize("case", OTHER_VAES)
def test_no_other_vae(case, tmp_path):
    make, told = OTHER_VAES[case]
    make(tmp_path)
    named = {"pretrained_model_name_or_path": "m", "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    with pytest.raises(UserError, match=told):
        find_elsewhere(ModelFlags(**named))


@pytest.fixture(scope="module")
def model_of_large_images(once):
    """One whose VAE makes a latent of 64 x 64 pixels, so that images of 1024 pixels take little time."""

    def make(folder: Path) -> None:
        shape = random_model.SHAPES["tiny-xl"]
        shape = shape | {"vae": shape["vae"] | {"block_out_channels": (4,) * 7, "norm_num_groups": 2}}
        torch.manual_seed(0)
        write_pipeline(build_pipeline(shape, random_model.byte_tokenizer, "v_prediction"), folder)

    return once("xl-large-images", make)


def resolution_in(checkpoint: Path) -> int:
    return json.loads((checkpoint / "state.json").read_text())["settings"]["resolution"]


def test_the_resolution_is_that_of_the_flag_or_the_checkpoint_or_the_model(model_of_large_images, flags):
    assert STABLE_DIFFUSION.resolution == resolution_of(None, None, STABLE_DIFFUSION.resolution) == 512
    flags |= {"pretrained_model_name_or_path": model_of_large_images, "resolution": None, "train_batch_size": 1}
    flags |= {"max_train_steps": 1, "save_steps": 1, "snr_gamma": 5, "noise_offset": 0.1}
    out = flags["output_dir"]
    train(TRADITIONAL, flags | {"output_dir": out / "model"})
    assert resolution_in(out / "model" / "checkpoint-1") == 1024
    train(TRADITIONAL, flags | {"output_dir": out / "flag", "resolution": 128})
    assert resolution_in(out / "flag" / "checkpoint-1") == 128
    go_on = {"output_dir": out / "flag", "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    train(COLOSSALAI, flags | go_on)
    assert resolution_in(out / "flag" / "checkpoint-2") == 128
    done = train(COLOSSALAI, flags | go_on | {"resolution": 256, "max_train_steps": 3}, check=False)
    assert "resolution was 128 and is 256" in done.error_lines[0]


def test_a_dry_run(flags, tmp_path):
    done = train(COLOSSALAI, flags | WHOLE | {"class_data_dir": tmp_path / "class", "dry_run": True})
    assert "nothing was written" in done.stdout and not list(tmp_path.glob("*/*"))
