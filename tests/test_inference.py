"""inference.py on a tiny model."""

import sys

import numpy as np
from harness import run
from PIL import Image

from benchmarks import random_model


def infer(model, *words):
    command = [sys.executable, "inference.py", model, "--num_inference_steps", 2, *words]
    return run(command, env={"CUDA_VISIBLE_DEVICES": ""})


def test_one_image(tiny_model, tmp_path):
    """The picture itself, without a frame; the same seed gives the same again."""
    output = tmp_path / "new" / "dog.png"
    infer(tiny_model, "--prompt", "A photo of sks dog in a bucket", "--output", output)
    first = Image.open(output).tobytes()
    assert Image.open(output).size == (32, 32)
    for seed, same in ((0, True), (1, False)):
        infer(tiny_model, "--prompt", "A photo of sks dog in a bucket", "--output", output, "--seed", seed)
        assert (Image.open(output).tobytes() == first) is same


def test_a_sheet_compares_two_models(tiny_model, tmp_path):
    """Two prompts, two seeds, two models: equal models make equal halves, different ones do not."""
    random_model.build(tmp_path / "other", "tiny", seed=7)
    sheets = []
    for other in (tiny_model, tmp_path / "other"):
        output = tmp_path / f"{other.name}.png"
        words = ["--prompt", "a dog", "a long " + "and longer " * 50 + "prompt", "--num_images", 2]
        done = infer(tiny_model, "--compare_with", other, *words, "--output", output)
        assert "8 images" in done.stdout
        assert sum("is longer than the 75 tokens that fit" in line for line in done.stderr.splitlines()) == 2
        assert "indexing errors" not in done.stderr
        sheets.append(np.array(Image.open(output)).astype(int))
    step = 32 + 8
    cells = [[sheet[26:50, 8 + step * column : 40 + step * column] for column in range(4)] for sheet in sheets]
    same, different = cells
    assert (same[0] == same[2]).all() and (same[1] == same[3]).all() and (same[0] != same[1]).any()
    assert (different[0] != different[2]).any()
    assert (different[2] == same[2]).all(), "the second half is the model's own, whatever it is compared with"
