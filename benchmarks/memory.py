"""Estimates what one GPU has to have, as Markdown for the README; nothing is measured, and no GPU is needed.

python -m benchmarks.memory
"""

from dreambooth.command_line.console import before_imports

before_imports(__name__)

import argparse
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import init_empty_weights

from benchmarks.random_model import SHAPES
from dreambooth.command_line.flags import LoraFlags
from dreambooth.command_line.limits import RANK_OF_ADAPTERS
from dreambooth.engine.strategy import Strategy
from dreambooth.model.configurations import build_pipeline, clip_tokenizer
from dreambooth.model.folder import FAMILIES
from dreambooth.model.outline import Outline
from dreambooth.run.estimate import GIB, Estimate, Setup
from dreambooth.run.memory import CARDS, FITS, SEEN_OF_A_CARD, Machine, estimate_of, smallest_card, strategies

# The models of the table, each with how many images are in a batch: one sample, with prior preservation or without.
MODELS = {"stable-diffusion-v1-4": 2, "stable-diffusion-xl": 1}
NAMES = {"stable-diffusion-v1-4": "Stable Diffusion 1.4", "stable-diffusion-xl": "Stable Diffusion XL"}


@functools.cache  # with all that is found out about it
def outline(shape: str, resolution: int | None = None) -> Outline:
    """Returns the outline of a model of a shape of random_model.py, with the vocabulary of CLIP."""
    with init_empty_weights():
        pipeline = build_pipeline(SHAPES[shape], clip_tokenizer, "epsilon")
    family = next(one for one in FAMILIES if isinstance(pipeline, one.pipeline))
    components = {name: pipeline.components[name] for name in family.components}
    return Outline(family, components, resolution or SHAPES[shape]["vae"]["sample_size"])


def _plain(images: int, card: int) -> Setup:
    size = int(card * GIB * SEEN_OF_A_CARD)
    return Setup(Strategy("torch_ddp", "cuda", "bf16"), torch.bfloat16, 1, examples=images, card=size)


def rows(model: Outline, images: int, card: int) -> Iterator[tuple[Setup, Estimate]]:
    """Yields every strategy on one GPU of `card` GB in bf16, the faster first."""
    for setup in strategies(_plain(images, card)):
        yield setup, estimate_of(model, setup)


def rows_of_adapters(model: Outline, images: int, card: int) -> Iterator[tuple[Setup, Estimate]]:
    """Yields the same for adapters, which are another result."""
    for recomputes in (False, True):
        setup = replace(_plain(images, card), recomputes=recomputes, lora=LoraFlags(lora_rank=RANK_OF_ADAPTERS))
        yield setup, estimate_of(model, setup)


def table_of_strategies(models: dict[str, Outline]) -> str:
    """Returns what each strategy takes on a card that has enough."""
    lines = [
        "| | " + " | ".join(f"{NAMES[shape]}: card | from | host" for shape in models) + " |",
        "|---|" + "---|" * 3 * len(models),
    ]
    found = [
        [*rows(model, MODELS[shape], CARDS[-1]), *rows_of_adapters(model, MODELS[shape], CARDS[-1])]
        for shape, model in models.items()
    ]
    for of_models in zip(*found, strict=True):
        cells = [f"`{of_models[0][0].flags()}`"]
        for _, one in of_models:
            cells += [f"{one.card.bytes / GIB:.1f}", smallest_card(one), f"{one.host.bytes / GIB:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_cards(models: dict[str, Outline]) -> str:
    """Returns the fastest strategy that fits on each card, with what it takes of the card and of the host."""
    lines = ["| card | " + " | ".join(NAMES[shape] for shape in models) + " |", "|---|" + "---|" * len(models)]
    for card in CARDS:
        machine = Machine(card=int(card * GIB * SEEN_OF_A_CARD))
        cells = [f"{card} GB"]
        for shape, model in models.items():
            fits = ((setup, one) for setup, one in rows(model, MODELS[shape], card) if machine.verdict(one) == FITS)
            setup, one = next(fits, (None, None))
            told = one and f"`{setup.flags()}` ({one.card.bytes / GIB:.1f}, {one.host.bytes / GIB:.1f})"
            cells.append(told or "none")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables() -> str:
    """Returns both tables."""
    models = {shape: outline(shape) for shape in MODELS}
    return f"{table_of_cards(models)}\n\n{table_of_strategies(models)}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(tables())
