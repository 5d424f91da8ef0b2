"""Drawings of a hundred or so things without background, from two emoji sets on the npm registry."""

import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# Licences: MIT for the first, Apache-2.0 for the second; assets/NOTICE has the notices.
PACKAGES = {"3d": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "@iconify-json/noto@1.2.9"}
SIZE = 256

# Never shown to the model: the subject that DreamBooth teaches it,
SUBJECT = (("1f429", "poodle", "dog"),)
# and things on which the VAE is measured.
HELD_OUT = (
    ("1f9a6", "otter", "animal"),
    ("1f9a8", "skunk", "animal"),
    ("1f9a1", "badger", "animal"),
    ("1f990", "shrimp", "animal"),
    ("1f33a", "hibiscus", "flower"),
    ("1f951", "avocado", "fruit"),
    ("1f36a", "cookie", "food"),
)

# Code point, name, kind. Several drawings of one thing share its name.
THINGS = (
    ("1f412", "monkey", "animal"),
    ("1f98d", "gorilla", "animal"),
    ("1f9a7", "orangutan", "animal"),
    ("1f436", "dog", "animal"),
    ("1f415", "dog", "animal"),
    ("1f9ae", "dog", "animal"),
    ("1f415-200d-1f9ba", "dog", "animal"),
    ("1f43a", "wolf", "animal"),
    ("1f98a", "fox", "animal"),
    ("1f99d", "raccoon", "animal"),
    ("1f431", "cat", "animal"),
    ("1f408", "cat", "animal"),
    ("1f408-200d-2b1b", "black cat", "animal"),
    ("1f981", "lion", "animal"),
    ("1f42f", "tiger", "animal"),
    ("1f405", "tiger", "animal"),
    ("1f406", "leopard", "animal"),
    ("1f434", "horse", "animal"),
    ("1f40e", "horse", "animal"),
    ("1f984", "unicorn", "animal"),
    ("1f993", "zebra", "animal"),
    ("1f98c", "deer", "animal"),
    ("1f9ac", "bison", "animal"),
    ("1f42e", "cow", "animal"),
    ("1f404", "cow", "animal"),
    ("1f437", "pig", "animal"),
    ("1f416", "pig", "animal"),
    ("1f40f", "ram", "animal"),
    ("1f411", "sheep", "animal"),
    ("1f410", "goat", "animal"),
    ("1f42a", "camel", "animal"),
    ("1f999", "llama", "animal"),
    ("1f992", "giraffe", "animal"),
    ("1f418", "elephant", "animal"),
    ("1f9a3", "mammoth", "animal"),
    ("1f98f", "rhinoceros", "animal"),
    ("1f99b", "hippopotamus", "animal"),
    ("1f42d", "mouse", "animal"),
    ("1f401", "mouse", "animal"),
    ("1f439", "hamster", "animal"),
    ("1f430", "rabbit", "animal"),
    ("1f407", "rabbit", "animal"),
    ("1f43f", "squirrel", "animal"),
    ("1f9ab", "beaver", "animal"),
    ("1f994", "hedgehog", "animal"),
    ("1f987", "bat", "animal"),
    ("1f43b", "bear", "animal"),
    ("1f43b-200d-2744-fe0f", "polar bear", "animal"),
    ("1f428", "koala", "animal"),
    ("1f43c", "panda", "animal"),
    ("1f9a5", "sloth", "animal"),
    ("1f998", "kangaroo", "animal"),
    ("1f413", "rooster", "bird"),
    ("1f424", "chick", "bird"),
    ("1f425", "chick", "bird"),
    ("1f427", "penguin", "bird"),
    ("1f54a", "dove", "bird"),
    ("1f985", "eagle", "bird"),
    ("1f986", "duck", "bird"),
    ("1f9a2", "swan", "bird"),
    ("1f989", "owl", "bird"),
    ("1f9a9", "flamingo", "bird"),
    ("1f99a", "peacock", "bird"),
    ("1f99c", "parrot", "bird"),
    ("1f438", "frog", "animal"),
    ("1f40a", "crocodile", "animal"),
    ("1f422", "turtle", "animal"),
    ("1f40d", "snake", "animal"),
    ("1f409", "dragon", "animal"),
    ("1f995", "dinosaur", "animal"),
    ("1f996", "dinosaur", "animal"),
    ("1f433", "whale", "animal"),
    ("1f42c", "dolphin", "animal"),
    ("1f41f", "fish", "animal"),
    ("1f420", "fish", "animal"),
    ("1f988", "shark", "animal"),
    ("1f419", "octopus", "animal"),
    ("1f980", "crab", "animal"),
    ("1f99e", "lobster", "animal"),
    ("1f40c", "snail", "animal"),
    ("1f98b", "butterfly", "insect"),
    ("1f41d", "bee", "insect"),
    ("1f41e", "ladybug", "insect"),
    ("1f339", "rose", "flower"),
    ("1f33b", "sunflower", "flower"),
    ("1f337", "tulip", "flower"),
    ("1f332", "fir", "tree"),
    ("1f333", "oak", "tree"),
    ("1f334", "palm", "tree"),
    ("1f335", "cactus", "plant"),
    ("1f344", "mushroom", "plant"),
    ("1f347", "grapes", "fruit"),
    ("1f349", "watermelon", "fruit"),
    ("1f34a", "orange", "fruit"),
    ("1f34b", "lemon", "fruit"),
    ("1f34c", "banana", "fruit"),
    ("1f34d", "pineapple", "fruit"),
    ("1f34e", "apple", "fruit"),
    ("1f34f", "green apple", "fruit"),
    ("1f350", "pear", "fruit"),
    ("1f352", "cherries", "fruit"),
    ("1f353", "strawberry", "fruit"),
    ("1f955", "carrot", "food"),
    ("1f354", "hamburger", "food"),
    ("1f355", "pizza", "food"),
    ("1f369", "doughnut", "food"),
    ("1f9c1", "cupcake", "food"),
    ("1f382", "cake", "food"),
)


@dataclass(frozen=True)
class Cutout:
    """A drawing on a transparent ground."""

    image: Image.Image
    name: str
    kind: str
    style: str


def fetch(folder: Path) -> None:
    """Downloads the packages into `folder`, those that are not there yet."""
    for style, package in PACKAGES.items():
        if not (folder / style).is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            packed = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
            )
            with tarfile.open(folder / packed.stdout.strip()) as archive:
                archive.extractall(folder / style, filter="data")


def load_cutouts(folder: Path, entries: tuple[tuple[str, str, str], ...] = THINGS) -> list[Cutout]:
    """Returns the drawings of `entries` in both styles, from packages that `fetch` has brought."""
    draw = {"3d": _fluent(folder / "3d" / "package"), "flat": _noto(folder / "flat" / "package")}
    return [
        Cutout(square(image), name, kind, style)
        for code_point, name, kind in entries
        for style, of in draw.items()
        if (image := of(code_point)) is not None
    ]


def square(image: Image.Image) -> Image.Image:
    """Returns what is visible of an image, centred on a transparent square of SIZE pixels."""
    visible = image.crop(image.getchannel("A").getbbox())
    scale = SIZE / max(visible.size)
    visible = visible.resize([max(1, round(side * scale)) for side in visible.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(visible, ((SIZE - visible.width) // 2, (SIZE - visible.height) // 2))
    return canvas


def _fluent(package: Path):
    """Returns a function from code points to Microsoft's three-dimensional emoji, None where one is missing."""

    def image(code_point: str) -> Image.Image | None:
        names = [code_point, f"{code_point}-fe0f", code_point.replace("-fe0f", "")]
        files = [path for name in names if (path := package / "assets" / f"{name}.webp").is_file()]
        return Image.open(files[0]).convert("RGBA") if files else None

    return image


def _noto(package: Path):
    """Returns a function from code points to Google's flat emoji, None where one is missing."""
    import resvg_py

    icons = json.loads((package / "icons.json").read_text())
    names = json.loads((package / "chars.json").read_text())

    def image(code_point: str) -> Image.Image | None:
        name = names.get(code_point) or names.get(code_point.replace("-fe0f", ""))
        if name is None or name not in icons["icons"]:
            return None
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    return image
