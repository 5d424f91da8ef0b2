"""From prompts to what a text encoder reads, and to what it writes of them once and for all."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from dreambooth.command_line.console import UserError, warn
from dreambooth.model.family import Conditioning, Family, Reader

ENCODED_AT_A_TIME = 32  # prompts
SHOWN = 100  # characters of a prompt that is too long


def max_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Returns how many tokens of a prompt are read, its start and end marks counted in."""
    return min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)


def check_max_length(wanted: int | None, readers: Iterable[Reader]) -> None:
    """Compares --tokenizer_max_length with what is read.

    Raises:
        UserError: if it is another number.
    """
    if wanted is None:
        return
    for reader in readers:
        if wanted != (longest := max_tokens(*reader)):
            raise UserError(
                f"--tokenizer_max_length {wanted}: this model reads {longest} tokens of a prompt; leave it out"
            )
    warn(f"--tokenizer_max_length {wanted}: no effect, it is always so")


def warn_of_cut_prompts(prompts: list[str], readers: Sequence[Reader]) -> None:
    """Tells which prompts are longer than what is read, and what of them is cut; once, where it is so for several."""
    cuts = (_cut(prompt, *reader) for prompt in prompts for reader in readers)
    for cut in dict.fromkeys(filter(None, cuts)):
        warn(cut)


def _cut(prompt: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> str | None:
    """Returns what to say of a prompt that is longer than what is read; None of one that is not."""
    longest = max_tokens(tokenizer, text_encoder)
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    if len(tokens) <= longest:
        return None
    cut = tokenizer.decode(tokens[longest - 1 : -1])  # the end mark takes the last place
    beginning, rest = (text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..." for text in (prompt, cut))
    return f"the prompt {beginning!r} is longer than the {longest - 2} tokens that fit; this part is cut: {rest!r}"


def tokens_of(prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Splits prompts into the tokens that a text encoder reads.

    Returns:
        Tensor of shape (prompts, tokens), int64, on the CPU.
    """
    longest = max_tokens(tokenizer, text_encoder)
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt").input_ids


@torch.no_grad()
def embed(
    family: Family,
    tokens: Conditioning,
    text_encoders: Mapping[str, torch.nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Conditioning:
    """Encodes prompts once and for all.

    Args:
        family: that does it.
        tokens: what its `tokenize` has returned.
        text_encoders: are moved to `device`.
        device: to encode on.
        dtype: to keep the result in; it is computed in fp32, as it happens once.

    Returns:
        What the UNet reads, of `dtype`, on the CPU: all captions of a large data set would take more of a GPU than the
        model.
    """
    for text_encoder in text_encoders.values():
        text_encoder.to(device, torch.float32)
    number = len(next(iter(tokens.values())))
    encoded = []
    for first in range(0, number, ENCODED_AT_A_TIME):
        some = {name: tensor[first : first + ENCODED_AT_A_TIME].to(device) for name, tensor in tokens.items()}
        encoded.append({n: t.to("cpu", dtype) for n, t in family.encode(some, text_encoders).items()})
    return {name: torch.cat([some[name] for some in encoded]) for name in encoded[0]}
