"""Scenes: a drawing in a place, with a caption that says so."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

from assets.recipe.cutouts import Cutout

RESOLUTION = 128
COLOURS = {
    "red": (214, 59, 52),
    "orange": (242, 145, 45),
    "yellow": (250, 214, 70),
    "green": (84, 166, 78),
    "blue": (62, 121, 214),
    "purple": (134, 84, 190),
    "pink": (245, 160, 190),
    "brown": (133, 92, 62),
    "gray": (150, 152, 156),
    "white": (250, 250, 250),
}


@dataclass
class Canvas:
    """An image four times as large as needed, which is drawn on and then scaled down."""

    rng: np.random.Generator

    def __post_init__(self):
        self.side = 4 * RESOLUTION
        self.image = Image.new("RGB", (self.side, self.side))
        self.draw = ImageDraw.Draw(self.image)

    def near(self, colour: tuple[int, int, int], spread: float = 10) -> tuple[int, ...]:
        """A colour close to `colour`."""
        return tuple(int(np.clip(c + self.rng.normal(0, spread), 0, 255)) for c in colour)

    def gradient(self, top: tuple, bottom: tuple, first: float = 0.0, last: float = 1.0) -> None:
        """Rows from height `first` to `last` (0 is the top), from one colour to another."""
        start, end = int(first * self.side), int(last * self.side)
        for y in range(start, end):
            mix = (y - start) / max(1, end - start - 1)
            row = tuple(int(a + (b - a) * mix) for a, b in zip(top, bottom, strict=True))
            self.draw.line([(0, y), (self.side, y)], fill=row)

    def blob(self, x: float, y: float, width: float, height: float, colour: tuple) -> None:
        """An ellipse around (x, y), in shares of the side."""
        s = self.side
        self.draw.ellipse(
            [s * (x - width / 2), s * (y - height / 2), s * (x + width / 2), s * (y + height / 2)], colour
        )

    def box(self, left: float, top: float, right: float, bottom: float, colour: tuple) -> None:
        self.draw.rectangle([self.side * edge for edge in (left, top, right, bottom)], colour)

    def finish(self) -> Image.Image:
        soft = self.image.filter(ImageFilter.GaussianBlur(2))
        return soft.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def plain(colour: tuple[int, int, int]) -> Callable[[Canvas], None]:
    def paint(c: Canvas) -> None:
        shade = c.near(colour, 6)
        c.gradient(shade, tuple(int(0.93 * v) for v in shade))

    return paint


def sky(c: Canvas, horizon: float, top=(96, 170, 240), bottom=(190, 225, 250), clouds: int = 3) -> None:
    c.gradient(c.near(top), c.near(bottom), 0, horizon)
    for _ in range(c.rng.integers(0, clouds + 1)):
        x, y = c.rng.random(), c.rng.random() * horizon * 0.6
        for _ in range(4):
            size = 0.08 + 0.08 * c.rng.random()
            c.blob(x + c.rng.normal(0, 0.05), y + c.rng.normal(0, 0.01), 1.6 * size, size * 0.7, (248, 250, 253))


def grass(c: Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.6)
    sky(c, horizon)
    c.gradient(c.near((120, 190, 80)), c.near((70, 140, 50)), horizon, 1)
    for _ in range(40):
        x, y = c.rng.random(), c.rng.uniform(horizon + 0.03, 1)
        size = 0.02 + 0.03 * (y - horizon)
        c.draw.line([(c.side * x, c.side * y), (c.side * (x + 0.01), c.side * (y - size))], c.near((60, 125, 45)), 4)


def beach(c: Canvas) -> None:
    horizon = c.rng.uniform(0.3, 0.4)
    shore = horizon + c.rng.uniform(0.12, 0.2)
    sky(c, horizon)
    c.gradient(c.near((40, 120, 190)), c.near((80, 190, 210)), horizon, shore)
    c.gradient(c.near((250, 235, 190), 5), c.near((235, 205, 140), 5), shore, 1)
    c.box(0, shore - 0.008, 1, shore + 0.008, (250, 252, 252))


def snow(c: Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.6)
    c.gradient(c.near((150, 180, 210)), c.near((210, 225, 240)), 0, horizon)
    c.gradient(c.near((245, 249, 254), 3), c.near((215, 228, 244), 5), horizon, 1)
    for _ in range(35):
        size = c.rng.uniform(0.01, 0.022)
        c.blob(c.rng.random(), c.rng.random(), size, size, (255, 255, 255))


def night(c: Canvas) -> None:
    horizon = c.rng.uniform(0.6, 0.75)
    c.gradient(c.near((10, 14, 48), 5), c.near((36, 44, 96), 5), 0, horizon)
    for _ in range(30):
        size = c.rng.uniform(0.006, 0.014)
        c.blob(c.rng.random(), c.rng.random() * horizon, size, size, (250, 245, 210))
    x, y = c.rng.uniform(0.1, 0.9), c.rng.uniform(0.08, 0.2)
    c.blob(x, y, 0.13, 0.13, (248, 240, 190))
    c.gradient(c.near((22, 34, 44), 4), c.near((12, 20, 28), 4), horizon, 1)


def sea(c: Canvas) -> None:
    horizon = c.rng.uniform(0.2, 0.35)
    sky(c, horizon)
    c.gradient(c.near((60, 150, 215)), c.near((14, 72, 140)), horizon, 1)
    for _ in range(14):
        x, y = c.rng.random(), c.rng.uniform(horizon + 0.05, 1)
        c.blob(x, y, 0.2, 0.012, c.near((120, 195, 235)))


def wooden_floor(c: Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.6)
    c.gradient(c.near((232, 222, 205), 6), c.near((215, 203, 184), 6), 0, horizon)
    c.gradient(c.near((190, 135, 85), 6), c.near((150, 98, 56), 6), horizon, 1)
    for line in np.linspace(-1.5, 2.5, 17):
        x = c.side * (0.5 + (line - 0.5) * 0.5)
        c.draw.line([(x, c.side * horizon), (c.side * line, c.side)], (120, 76, 42), 5)
    c.box(0, horizon - 0.02, 1, horizon, (245, 240, 232))


def city(c: Canvas) -> None:
    horizon = c.rng.uniform(0.68, 0.76)
    sky(c, horizon, clouds=2)
    left = -0.05
    while left < 1:
        width, top = c.rng.uniform(0.12, 0.22), c.rng.uniform(0.15, 0.45)
        wall = c.near((150, 140, 150), 25)
        c.box(left, top, left + width, horizon, wall)
        for x in np.arange(left + 0.03, left + width - 0.03, 0.05):
            for y in np.arange(top + 0.03, horizon - 0.04, 0.07):
                c.box(x, y, x + 0.025, y + 0.035, (250, 232, 160))
        left += width + 0.01
    c.gradient(c.near((110, 112, 118), 5), c.near((84, 86, 92), 5), horizon, 1)
    for x in np.arange(0.05, 1, 0.25):
        c.box(x, 0.87, x + 0.12, 0.89, (238, 238, 230))


def desert(c: Canvas) -> None:
    horizon = c.rng.uniform(0.45, 0.55)
    c.gradient(c.near((250, 190, 110)), c.near((252, 226, 170)), 0, horizon)
    c.gradient(c.near((226, 160, 92)), c.near((200, 130, 70)), horizon, 1)
    for _ in range(3):
        x, y = c.rng.random(), c.rng.uniform(horizon, 0.95)
        c.blob(x, y + 0.1, 0.9, 0.18, c.near((214, 146, 80), 8))


def with_article(noun: str) -> str:
    """Returns "a dog", "an apple"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


PLACES: dict[str, Callable[[Canvas], None]] = {
    **{f"on {with_article(name)} background": plain(colour) for name, colour in COLOURS.items()},
    "on the grass": grass,
    "on the beach": beach,
    "in the snow": snow,
    "at night": night,
    "in the sea": sea,
    "on a wooden floor": wooden_floor,
    "in the city": city,
    "in the desert": desert,
}


def captions(cutout: Cutout, place: str) -> tuple[str, str, str]:
    """Returns the ways to say it: by name, by style and name, by kind; an empty place is left out."""
    nouns = (cutout.name, f"{cutout.style} {cutout.name}", cutout.kind)
    return tuple(f"{with_article(noun)} {place}".rstrip() for noun in nouns)


class Scenes:
    """Draws batches of scenes on a device.

    Args:
        cutouts: the drawings.
        variants: paintings of each place.
        seed: of the paintings.
        device: where scenes are drawn.
    """

    def __init__(self, cutouts: list[Cutout], *, variants: int, seed: int, device: torch.device):
        self.cutouts = cutouts
        self.places = list(PLACES)
        self.variants = variants
        self.device = device
        sprites = torch.stack([_to_tensor(cutout.image) for cutout in cutouts]).float() / 255
        # Premultiplied by opacity, so that interpolation does not bleed in the colour of what is transparent.
        sprites[:, :3] *= sprites[:, 3:]
        self.sprites = sprites.half().to(device)
        rng = np.random.default_rng(seed)
        painted = []
        for paint in PLACES.values():
            for _ in range(variants):
                canvas = Canvas(rng)
                paint(canvas)
                painted.append(_to_tensor(canvas.finish()))
        self.backgrounds = torch.stack(painted).to(device)  # (places * variants, 3, side, side), uint8

    def random(self, count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Draws what is in each of `count` scenes.

        Returns:
            things, places: (count,), int64.
            layout: the rest of what `draw` needs.
        """

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.rand(count, device=self.device, generator=generator) * (high - low) + low

        def below(limit: int) -> torch.Tensor:
            return torch.randint(limit, (count,), device=self.device, generator=generator)

        things, places = below(len(self.cutouts)), below(len(self.places))
        size = uniform(0.55, 0.85)
        room = (1 - size) * 0.6
        layout = {
            "variant": below(self.variants),
            "size": size,
            "angle": uniform(-0.15, 0.15),
            "flip": torch.sign(uniform(-1, 1) + 1e-6),
            "x": uniform(-1, 1) * room,
            "y": uniform(-0.5, 1) * room,
        }
        return things, places, layout

    def draw(self, things: torch.Tensor, places: torch.Tensor, layout: dict) -> torch.Tensor:
        """Draws scenes.

        Args:
            things, places: (n,), int64.
            layout: of `random`: variant of the place; size as a share of the side; angle in radians; flip 1 or -1;
                centre x and y, in shares of half the side.

        Returns:
            (n, 3, RESOLUTION, RESOLUTION), float32, in [-1, 1].
        """
        cos, sin = torch.cos(layout["angle"]) / layout["size"], torch.sin(layout["angle"]) / layout["size"]
        x, y, flip = layout["x"], layout["y"], layout["flip"]
        # From a place in the scene to a place in the sprite.
        rows = [
            torch.stack([flip * cos, flip * sin, -flip * (cos * x + sin * y)], dim=-1),
            torch.stack([-sin, cos, sin * x - cos * y], dim=-1),
        ]
        theta = torch.stack(rows, dim=1)
        shape = (len(things), 4, 2 * RESOLUTION, 2 * RESOLUTION)
        with torch.autocast(self.device.type, enabled=False):  # half precision would move a drawing by a pixel
            grid = F.affine_grid(theta, shape, align_corners=False)
        sprites = F.grid_sample(self.sprites[things].float(), grid, align_corners=False)
        sprites = F.avg_pool2d(sprites, 2)
        background = self.backgrounds[places * self.variants + layout["variant"]].float() / 255
        return (sprites[:, :3] + background * (1 - sprites[:, 3:])) * 2 - 1


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Returns (channels, height, width), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(scene: torch.Tensor) -> Image.Image:
    """Returns the picture of a (3, height, width) tensor in [-1, 1]."""
    pixels = (scene.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
