"""What is written with the libraries of one list of requirements is read with those of the other.

Both know the names that files on the Hub have, and for a tokenizer those of vocab.json and merges.txt.
"""

from harness import COLOSSALAI, ROOT, train
from safetensors import safe_open

from dreambooth.model.components import fingerprint
from dreambooth.model.pipeline import load_part
from dreambooth.model.stable_diffusion import STABLE_DIFFUSION


def names_in(file) -> set[str]:
    """Returns the names of the tensors in a file."""
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def test_files_have_the_names_that_both_know(flags, tiny_model):
    """Also of a text encoder that was trained, and so was not read from a file; and of what AdamW keeps of it."""
    flags |= {"train_text_encoder": True, "max_train_steps": 1, "save_steps": 1}
    train(COLOSSALAI, flags)
    checkpoint = flags["output_dir"] / "checkpoint-1"
    for folder in (tiny_model, flags["output_dir"], checkpoint):
        names = names_in(folder / "text_encoder" / "model.safetensors")
        assert names and all(name.startswith("text_model.") for name in names), folder
    kept = {f"exp_avg.text_encoder.{name}" for name in names}
    assert {name for name in names_in(checkpoint / "optimizer.safetensors") if ".text_encoder." in name} == (
        kept | {name.replace("exp_avg.", "exp_avg_sq.") for name in kept}
    )
    for folder in (tiny_model, flags["output_dir"]):
        assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / "tokenizer").iterdir()}


def test_a_checkpoint_knows_its_model_with_either():
    """By what tells the weights of models apart."""
    model = ROOT / "assets" / "tiny-stable-diffusion"
    parts = [load_part(STABLE_DIFFUSION, name, model) for name in ("vae", "text_encoder")]
    assert fingerprint(*parts) == "2497ded2176d5e20"
