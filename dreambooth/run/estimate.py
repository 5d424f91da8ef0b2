"""How much memory a run takes, from what is known before anything is loaded.

One function of few numbers: the sum of terms that can be checked by hand, of W weights that are trained. What was
measured on GPUs, and how far the estimate is from it, is in tests/test_estimate.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dreambooth.command_line.flags import LoraFlags
from dreambooth.engine.strategy import Strategy
from dreambooth.model.libraries import ARE_OF_TODAY
from dreambooth.model.loss import images_at_a_time
from dreambooth.model.outline import Outline, times
from dreambooth.model.tracing import Passes
from dreambooth.model.trainable import FLAT_ELEMENTS

GIB = 2**30
MIB = 2**20
# What only a machine shows. CUDA's context: nvidia-smi's figure of a process, less what torch has reserved (H100).
CONTEXT = GIB // 2
# What torch had allocated in steps on one and two H100 beyond all other terms, of 16 images as of 8: 0.0 to 0.1 GiB.
WORKSPACES = GIB // 10
# What a process holds of its own when it has imported the libraries: with CUDA and NCCL 2.9 to 4.1 GiB, by five runs
# with --placement cpu and auto on H100 and H200; without them 340 to 430 MiB, and 500 to 515 MiB of today's libraries,
# as seen on a machine that has no GPU. There the libraries' files, 0.2 to 0.4 GiB in memory, are left out: the
# system may drop them, and processes share them. Of what was freed malloc keeps some besides: in a run on the CPU a
# fifth of its memory, by its own settings.
LIBRARIES_WITH_GPU, LIBRARIES = 7 * GIB // 2, (510 if ARE_OF_TODAY else 400) * MIB
# Gemini holds at most so many weights whole that it has fetched, two chunks: 0.31 and 0.32 GiB on H100 and H200, of
# which WORKSPACES are a part.
FETCHED = 2 * 48 * 2**20


@dataclass(frozen=True)
class Setup:
    """What flags and the machine make of a run, as far as it decides its memory.

    Args:
        strategy: ColossalAI's; None for the traditional process.
        dtype: in which the denoiser computes.
        batch: samples of each process at a time.
        examples: images of a sample: two with prior preservation.
        ranks: processes of the run.
        card: bytes of the smallest GPU; None for a run on the CPU.
        text_encoders: whether they are trained.
        recomputes: --gradient_checkpointing.
        use_8bit_adam: as the flag.
        records: whether the run insists on CUDA graphs. Where it does not, it has them if there is the room.
        compiles: --compile, which is counted as if it were not there.
        accumulates: whether a step has several batches.
        encodes: in which dtype the VAE encodes images in the steps; None where it has done it before, or where the
            run decides that: then it encodes a few at a time, and holds less than the passes do.
        lora: adapters, if they alone are trained.
    """

    strategy: Strategy | None
    dtype: torch.dtype
    batch: int
    examples: int = 1
    ranks: int = 1
    card: int | None = None
    text_encoders: bool = False
    recomputes: bool = False
    use_8bit_adam: bool = False
    records: bool = False
    compiles: bool = False
    accumulates: bool = False
    encodes: torch.dtype | None = None
    lora: LoraFlags = LoraFlags()

    @property
    def shards(self) -> bool:
        return self.strategy is not None and self.strategy.shards

    @property
    def has_adapters(self) -> bool:
        """Whether adapters alone are trained."""
        return self.lora.is_on

    @property
    def is_refused(self) -> bool:
        """Whether the trainer refuses it: Gemini would split nothing beside adapters."""
        return self.has_adapters and self.shards and self.strategy.plugin == "gemini"

    @property
    def discards(self) -> bool:
        """Whether activations are made again, as `discard_activations` has it."""
        return self.strategy is not None and self.strategy.spares_memory and not (self.recomputes or self.records)

    def fetches(self, weights: int) -> bool:
        """Whether Gemini fetches single weights, of so many."""
        return self.shards and self.strategy.fetches_weights(weights, self.card or 0)

    def is_flat(self, weights: int) -> bool:
        """Whether weights, so many, lie in flat parameters."""
        return not (self.use_8bit_adam or self.fetches(weights))

    @property
    def keeps_gradients(self) -> bool:
        """Whether those of all weights have memory of their own at any time of a step."""
        return self.records or self.accumulates

    @property
    def _offloads_a_part(self) -> bool:
        """Whether another part of the optimizer state is in host memory than the placement has there by itself."""
        return self.strategy is not None and self.strategy.offload_optim_frac != (self.strategy.placement != "cuda")

    def flags(self, own: "Setup | None" = None) -> str:
        """Returns what to type for it; of what is not on every command line, where it differs from `own`."""
        words = []
        if self.strategy is not None:
            words.append(f"--plugin {self.strategy.plugin}")
            if self.strategy.placement != "cuda":
                words.append(f"--placement {self.strategy.placement}")
            if self._offloads_a_part:
                words.append(f"--offload_optim_frac {self.strategy.offload_optim_frac:g}")
            if self.strategy.offload_dir:
                words.append(f"--offload_dir {self.strategy.offload_dir}")
        words += ["--gradient_checkpointing"] * self.recomputes + ["--use_8bit_adam"] * self.use_8bit_adam
        if self.has_adapters:
            words.append(f"--lora_rank {self.lora.lora_rank}")
        if own is not None:
            if self.batch != own.batch:
                words.append(f"--train_batch_size {self.batch} with more --gradient_accumulation_steps")
            if self.text_encoders != own.text_encoders:
                words.append("no --train_text_encoder")
            if self.strategy and self.strategy.precision != own.strategy.precision:
                words.append(f"--mixed_precision {self.strategy.precision}")
            if own._offloads_a_part and not self._offloads_a_part:
                words.append("no --offload_optim_frac")
            gone = {"cuda_graphs on": "records", "compile": "compiles", "use_8bit_adam": "use_8bit_adam"}
            words += [f"no --{flag}" for flag, field in gone.items() if getattr(self, field) < getattr(own, field)]
            if self.ranks != own.ranks:
                words.append(f"on {self.ranks} GPUs")
        return " ".join(words) or "no flag that spares memory"


@dataclass(frozen=True)
class Counts:
    """What the model makes of it, in numbers of weights, and bytes.

    Args:
        weights: that are trained.
        frozen: those of the same components that are not, beside adapters.
        convolutions: those of them that are of convolutions over more than a pixel.
        chunks: elements of the chunks that Gemini lays them into.
        readers: weights of text encoders that are frozen.
        vae: weights of the VAE.
        caching: bytes that it takes to encode in fp32 as many images as are encoded at a time.
        encoding: bytes that it takes to encode a batch in the steps.
        passes: what the forward and the backward pass of a batch hold.
    """

    weights: int
    frozen: int
    convolutions: int
    chunks: int
    readers: int
    vae: int
    caching: int
    encoding: int
    passes: Passes


# When: before steps, and in them.
PROMPTS, LATENTS, LOADING = "prompts are encoded", "latents are cached", "weights are loaded"
IMAGES, PASSES, UPDATE = "images of a step are encoded", "gradients are computed", "weights are updated"
IN_STEPS = (IMAGES, PASSES, UPDATE)
ALL = (PROMPTS, LATENTS, LOADING, *IN_STEPS)


@dataclass(frozen=True)
class Term:
    """A part of the memory.

    Args:
        where: "card", "host" or "disk".
        bytes: of it; of a process.
        what: it is, in the words that follow "GiB".
        when: phases of a run in which it is there.
    """

    where: str
    bytes: int
    what: str
    when: Sequence[str] = IN_STEPS

    def __str__(self) -> str:
        return f"{self.bytes / GIB:.2f} GiB {self.what}"


@dataclass(frozen=True)
class Peak:
    """The phase of a run in which most is held somewhere, and of what."""

    phase: str
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        """The sum of the terms."""
        return sum(term.bytes for term in self.terms)

    def __str__(self) -> str:
        shown = sorted((term for term in self.terms if term.bytes >= GIB / 100), key=lambda term: -term.bytes)
        return f"{self.bytes / GIB:.1f} GiB while {self.phase}: {', '.join(map(str, shown))}"


@dataclass(frozen=True)
class Estimate:
    """The most that a process holds on its GPU (None on the CPU), in host memory, and by --offload_dir on a disk."""

    card: Peak | None
    host: Peak
    disk: int = 0

    @property
    def host_alone(self) -> int:
        """What of the host's memory a process has to itself: it may share the libraries' files with others."""
        return self.host.bytes - (LIBRARIES if self.card is None else LIBRARIES_WITH_GPU)


def estimate(setup: Setup, counts: Counts) -> Estimate:
    """Returns the memory that one process of a run takes to train.

    Not counted are images that are kept as decoded and latents that are cached, at most 2.25 GiB of the host, and what
    class and validation images take while they are drawn.
    """
    terms = [*_before_steps(setup, counts), *_of_weights(setup, counts), *_of_passes(setup, counts)]
    if setup.card is None:
        terms = [Term("host", LIBRARIES, "of Python and its libraries", ALL)] + [
            replace(term, where="host") for term in terms
        ]
        return Estimate(None, _peak(terms, "host"))
    terms.append(Term("card", CONTEXT + WORKSPACES, "of CUDA's context and workspaces", ALL))
    terms.append(Term("host", LIBRARIES_WITH_GPU, "of Python and its libraries", ALL))
    return Estimate(_peak(terms, "card"), _peak(terms, "host"), _peak(terms, "disk").bytes)


def _peak(terms: list[Term], where: str) -> Peak:
    peaks = [Peak(phase, tuple(one for one in terms if one.where == where and phase in one.when)) for phase in ALL]
    return max(peaks, key=lambda peak: peak.bytes)


def _before_steps(setup: Setup, counts: Counts) -> Iterator[Term]:
    yield Term("card", 4 * counts.readers, "of text encoders in fp32", [PROMPTS])
    yield Term("card", 4 * counts.vae, "of the VAE in fp32", [LATENTS])
    yield Term("card", counts.caching, "that the VAE computes with", [LATENTS])
    if setup.encodes:
        yield Term("card", setup.encodes.itemsize * counts.vae, "of the VAE")
        yield Term("card", counts.encoding, "that the VAE computes with", [IMAGES])


def _of_weights(setup: Setup, counts: Counts) -> Iterator[Term]:
    """Yields what is there of weights, their gradients and AdamW's state."""
    size = setup.dtype.itemsize
    yield Term("card", size * counts.frozen, "of frozen weights")
    if setup.card is not None:
        yield Term("host", size * counts.frozen, "of frozen weights on their way to the GPU", [LOADING])
    if not setup.shards:
        yield from _of_whole_weights(setup, counts.weights)
    elif setup.strategy.plugin == "low_level_zero":
        yield from _of_low_level_zero(setup, counts)
    else:
        yield from _of_gemini(setup, counts)


def _of_whole_weights(setup: Setup, w: int) -> Iterator[Term]:
    """The traditional process, torch_ddp and torch_ddp_fp16: W fp32 weights and all that goes with them."""
    is_ddp = setup.strategy is not None
    yield Term("card", 4 * w, "of fp32 weights")
    yield Term("card", (2 if setup.use_8bit_adam else 8) * w, "of AdamW's moments")
    if setup.dtype.itemsize < 4:
        # Flat ones are handed out once a step, and stay until then; others until their gradients are there.
        yield Term("card", 2 * w, "of their copies in half precision", IN_STEPS if setup.is_flat(w) else [PASSES])
    if is_ddp or setup.ranks > 1:
        yield Term("card", 4 * w, "of gradients in DDP's buckets" if is_ddp else "of DDP's buckets")
    if not is_ddp:  # whose gradients are elsewhere than in the buckets
        yield Term("card", 4 * w, "of gradients", IN_STEPS if setup.keeps_gradients else [UPDATE])
    if setup.records and setup.accumulates:
        yield Term("card", 4 * w, "of gradients that graphs write")
        yield Term("card", 4 * w, "of gradients that are added to others")


def _of_low_level_zero(setup: Setup, counts: Counts) -> Iterator[Term]:
    """Half-precision weights and gradients whole; of fp32 weights and moments the part of this rank."""
    w, own = counts.weights, counts.weights // setup.ranks
    where = _beside_card(setup) if setup.strategy.zero_offloads else "card"
    yield Term("card", 2 * w, "of half-precision weights")
    yield Term(where, 4 * own, "of fp32 weights")
    yield Term(where, 8 * own, "of AdamW's moments")
    yield Term("card", 2 * w, "of gradients", IN_STEPS if setup.keeps_gradients else [UPDATE])
    if setup.records:
        yield Term("card", 2 * counts.convolutions, "of convolutions' weights with channels last")
        yield Term("card", 2 * w * setup.accumulates, "of gradients that graphs write")
        yield Term("card", 2 * w * setup.accumulates, "of gradients that are added to others")
    yield _on_the_way(counts)


def _beside_card(setup: Setup) -> str:
    """Returns where a plugin keeps what it does not keep on the GPU."""
    return "disk" if setup.strategy.offload_dir else "host"


def _on_the_way(counts: Counts) -> Term:
    """A process's own copy on its way to the GPU, of which a flat parameter is laid out at a time."""
    w = counts.weights
    return Term("host", 2 * (w + min(w, FLAT_ELEMENTS)), "of half-precision weights", [LOADING])


def _of_gemini(setup: Setup, counts: Counts) -> Iterator[Term]:
    """Parts of all, in chunks. Gradients take the place of half-precision weights, unless they are added up.

    A chunk has a flat parameter, and is as long as the longest; where weights are fetched one by one, there is little
    to fill up.
    """
    strategy = setup.strategy
    fetches = setup.fetches(counts.weights)
    weights = counts.weights if fetches else counts.chunks
    own, moved = weights // setup.ranks, strategy.offload_optim_frac
    for where, share in (("card", 1 - moved), (_beside_card(setup), moved)):
        yield Term(where, int(4 * own * share), "of fp32 weights")
        yield Term(where, int(8 * own * share), "of AdamW's moments")
    if setup.accumulates:
        yield Term("card", 2 * own, "of gradients")
    if fetches:
        yield Term("host" if moved == 1 else "card", 2 * own, "of half-precision weights")
        yield Term("card", 2 * min(FETCHED, weights), "of weights that are fetched", [PASSES])
    else:
        yield Term("card", 2 * weights, "of half-precision weights", [IMAGES, PASSES])
        yield Term("card", int(2 * own * (1 - moved)), "of gradients in half precision", [UPDATE])
        yield Term("host", int(2 * own * moved), "of gradients in half precision", [UPDATE])
    yield _on_the_way(counts)


def _of_passes(setup: Setup, counts: Counts) -> Iterator[Term]:
    """What grows and goes within the passes: activations, and gradients where nothing else has their place."""
    size, of_a_gradient, of_one, flat = setup.dtype.itemsize, 0, 0, 0
    if not setup.keeps_gradients:
        if setup.strategy is None:
            of_a_gradient = 4
        elif setup.strategy.plugin == "low_level_zero":
            of_a_gradient = size
    if setup.is_flat(counts.weights) and not setup.records:  # where each goes to its place at once
        # A flat parameter's is put together of those of its weights, and then may be turned into fp32.
        flat, of_one = FLAT_ELEMENTS, size + (size if setup.shards else 4)

    def of_gradients(weights: int) -> tuple[int, int]:
        last = min(weights, flat)
        return of_one * last, of_a_gradient * (weights - last)

    most = counts.passes.peak(lambda weights: sum(of_gradients(weights)))
    put_together, there = of_gradients(most.gradients)
    yield Term("card", put_together, "of the gradients that are put together", [PASSES])
    yield Term("card", there, "of the gradients that are there by then", [PASSES])
    # A graph keeps what it takes, also while it does not run.
    yield Term("card", most.activations, "of activations", IN_STEPS if setup.records else [PASSES])


def counts_of(outline: Outline, setup: Setup, *, at_most: bool = False) -> Counts:
    """Returns the numbers of a model for a setup.

    Args:
        outline: of the model.
        setup: of the run.
        at_most: whether passes are not looked at, but taken as more than they hold: it takes no time.
    """
    trained, examples = outline.trained(setup.text_encoders), setup.batch * setup.examples
    what = setup.text_encoders, setup.lora
    weights, convolutions = outline.weights(*what)
    if at_most:
        passes, encoding = outline.passes_at_most(*what, setup.dtype), outline.encoding_at_most
    else:
        how = {"recomputes": setup.recomputes, "discards": setup.discards}
        passes, encoding = outline.passes(*what, setup.dtype, **how), outline.encoding
    is_gemini = setup.shards and setup.strategy.plugin == "gemini"
    at_a_time = images_at_a_time(outline.resolution)
    return Counts(
        weights=weights,
        frozen=outline.size(*trained) if setup.has_adapters else 0,
        convolutions=convolutions,
        chunks=outline.chunks(setup.text_encoders) if is_gemini else 0,
        readers=outline.size(*(name for name in outline.family.text_encoders if name not in trained)),
        vae=outline.size("vae"),
        caching=0 if setup.encodes else encoding(at_a_time, torch.float32),
        encoding=encoding(min(examples, at_a_time), setup.encodes) if setup.encodes else 0,
        passes=times(passes, examples),
    )
