"""The recipe of the small model: its scenes and its tokenizer, on drawings made here."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from harness import ROOT
from PIL import Image

from assets.recipe import cutouts
from assets.recipe.cutouts import Cutout, square
from assets.recipe.scenes import PLACES, RESOLUTION, Scenes, captions
from assets.recipe.train import IDENTIFIERS, train_tokenizer


@pytest.fixture(scope="module")
def red_square():
    """Opaque and as wide as its sprite."""
    return Cutout(square(Image.new("RGBA", (10, 10), (255, 0, 0, 255))), "apple", "fruit", "flat")


def test_the_model_is_an_ordinary_pipeline():
    """All of it is in one dtype when nobody names any, or it could not draw."""
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "tiny-stable-diffusion")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


def test_things_are_drawn_where_the_layout_says(red_square):
    scenes = Scenes([red_square], variants=1, seed=0, device=torch.device("cpu"))
    place = torch.tensor([scenes.places.index("on a blue background")])
    layout = {"variant": 0 * place, "size": 0.25, "angle": 0.0, "flip": 1.0, "x": 0.5, "y": -0.5}
    layout = {key: torch.as_tensor(value).reshape(1) for key, value in layout.items()}
    image = scenes.draw(torch.tensor([0]), place, layout)[0]
    assert image.shape == (3, RESOLUTION, RESOLUTION)
    red = (image[0] > 0.9) & (image[2] < -0.9)
    rows, columns = red.nonzero(as_tuple=True)
    centre, half = RESOLUTION // 4, RESOLUTION // 8
    assert abs(columns.float().mean() - 3 * centre) < 1 and abs(rows.float().mean() - centre) < 1
    assert abs(red.sum().sqrt() - 2 * half) < 2


def test_scenes_follow_from_the_seed(red_square):
    def draw(seed: int) -> torch.Tensor:
        scenes = Scenes([red_square], variants=1, seed=seed, device=torch.device("cpu"))
        return scenes.draw(*scenes.random(4, torch.Generator().manual_seed(seed)))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_captions_have_their_article(red_square):
    assert captions(red_square, "on an orange background") == (
        "an apple on an orange background",
        "a flat apple on an orange background",
        "a fruit on an orange background",
    )
    assert "on an orange background" in PLACES and "on a red background" in PLACES


def test_every_word_and_identifier_is_one_token():
    """Also of a text that the tokenizer has never seen, nothing is unknown."""
    texts = [f"a {name} of kind {kind} {place}" for _, name, kind in cutouts.THINGS for place in PLACES]
    tokenizer = train_tokenizer([*texts, " ".join(IDENTIFIERS)])
    for word in {word for text in texts for word in text.split()} | set(IDENTIFIERS):
        assert tokenizer.tokenize(word) == [f"{word}</w>"], word
    assert "".join(tokenizer.tokenize("Zürich?")).replace("</w>", "") != ""
    assert tokenizer.unk_token_id not in tokenizer("Zürich?", add_special_tokens=False).input_ids


def test_the_subject_is_in_no_caption():
    """Held out by code point and by name."""
    points, names = ({entry[column] for entry in cutouts.THINGS} for column in (0, 1))
    for code_point, name, _ in cutouts.SUBJECT + cutouts.HELD_OUT:
        assert code_point not in points and name not in names
