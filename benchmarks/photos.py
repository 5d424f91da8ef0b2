"""JPEGs that cost a program what photographs do: of as many pixels, and about as many bytes for each."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Of contrast, from each size of detail to the half of it: JPEGs then take 0.2 bytes a pixel, as photographs do.
FALL = 0.7


def draw_image(pixels: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns an image whose detail falls off with its frequency as in photographs, so that it compresses like one."""
    image = torch.zeros(1, 3, height, width)
    side, weight = 3, 1.0
    while side <= max(width, height):
        grey = pixels.standard_normal((1, 1, side, side), dtype=np.float32)
        colour = pixels.standard_normal((1, 3, side, side), dtype=np.float32)
        coarse = torch.from_numpy(weight * (grey + 0.3 * colour))
        image += F.interpolate(coarse, (height, width), mode="bicubic")
        side, weight = side * 2, weight * FALL
    levels = (118 + 50 * (image / image.std())[0].permute(1, 2, 0)).clamp(0, 255)
    return Image.fromarray(levels.to(torch.uint8).numpy())


def image_folder(folder: Path, count: int, width: int, height: int) -> Path:
    """Returns a folder of so many JPEGs, drawn unless they are there."""
    folder = folder / f"{count}-of-{width}x{height}"
    if not folder.exists():
        folder.mkdir()
        pixels = np.random.default_rng(0)
        for number in range(count):
            draw_image(pixels, width, height).save(folder / f"{number:03}.jpg", quality=90)
    return folder
