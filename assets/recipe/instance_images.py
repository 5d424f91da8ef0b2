"""Makes assets/instance_images: five pictures of the subject that the small model has never seen.

python -m assets.recipe.instance_images --downloads emoji
"""

import argparse
from pathlib import Path

import torch

from assets.recipe import cutouts
from assets.recipe.scenes import Scenes, to_image

# Place, size as a share of the side, angle in radians, flip, centre x and y.
PICTURES = (
    ("on a red background", 0.80, 0.00, 1.0, 0.00, 0.00),
    ("on the grass", 0.66, 0.05, -1.0, 0.10, 0.15),
    ("on a wooden floor", 0.72, -0.05, 1.0, -0.08, 0.12),
    ("on a yellow background", 0.68, 0.08, -1.0, -0.05, 0.05),
    ("in the city", 0.64, 0.00, 1.0, 0.12, 0.16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downloads", type=Path, required=True, help="where the emoji packages are, or go")
    parser.add_argument("--output", type=Path, default=Path("assets/instance_images"), help="folder of the pictures")
    args = parser.parse_args()
    cutouts.fetch(args.downloads)
    subject = [cutout for cutout in cutouts.load_cutouts(args.downloads, cutouts.SUBJECT) if cutout.style == "3d"]
    scenes = Scenes(subject, variants=1, seed=1, device=torch.device("cpu"))
    places = torch.tensor([scenes.places.index(place) for place, *_ in PICTURES])
    numbers = torch.tensor([numbers for _, *numbers in PICTURES])
    layout = dict(zip(("size", "angle", "flip", "x", "y"), numbers.T, strict=True)) | {"variant": 0 * places}
    args.output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(scenes.draw(0 * places, places, layout)):
        to_image(picture).save(args.output / f"{number}.png")


if __name__ == "__main__":
    main()
