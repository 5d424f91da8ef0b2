"""Whether a run fits into the memory of this machine, said before anything is loaded."""

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dreambooth.command_line.colossalai_flags import PLACEMENTS
from dreambooth.command_line.console import UserError, counted, first_line, say, warn
from dreambooth.command_line.flags import LoraFlags
from dreambooth.command_line.limits import (
    CHECKPOINTING,
    DISK,
    EIGHT_BIT,
    HOST,
    NO_GRAPHS,
    NO_TEXT_ENCODER,
    RANK_OF_ADAPTERS,
    SMALLER_BATCH,
    SPLIT,
    cheaper_flags,
)
from dreambooth.engine.strategy import Strategy
from dreambooth.model.family import dtype_of_vae
from dreambooth.model.outline import Outline, outline_of
from dreambooth.model.precision import DTYPES
from dreambooth.processes.environment import find_place
from dreambooth.processes.ranks import from_all_ranks, from_rank_0
from dreambooth.run.estimate import CONTEXT, GIB, Estimate, Setup, counts_of, estimate
from dreambooth.run.output import Form
from dreambooth.run.room import Sizes, room_of
from dreambooth.run.stages import Run

# A run is refused only where the estimate is so many times what there is. It was at most 1.06 times what was measured,
# in 33 runs on H100 and H200, so that none is refused that would have fitted. Between, a line warns.
REFUSED_FROM = 1.15
# What a run has to have besides: torch reserves more than it has allocated, and an estimate is up to a tenth too low.
# With 10.3 GiB in tensors at most a run of low_level_zero came to its end in 11.4 GiB, and not in 10.7.
TO_SPARE = 1.1
# Cards that are sold, in GB, and how much of that torch sees at least, where the card keeps nothing for ECC.
CARDS = (8, 12, 16, 24, 40, 80)
SEEN_OF_A_CARD = 0.97
FITS, PERHAPS = "fits", "perhaps"


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes; None where it cannot be told.

    Args:
        card: the smallest GPU of the run.
        card_free: what of this process's GPU other programs have not taken.
        host: memory of this machine that may be had, swap included.
        host_free: what of it is free, or is soon.
        processes: of the run on this machine.
        gpus: that this machine has.
    """

    card: int | None = None
    card_free: int | None = None
    host: int | None = None
    host_free: int | None = None
    processes: int = 1
    gpus: int = 0

    def verdict(self, found: Estimate) -> str:
        """Returns FITS, PERHAPS, or what there is too little of."""
        shares = self._shares(found)
        short = [what for what, share in shares.items() if share > REFUSED_FROM]
        if short:
            return f"too little {' and '.join(short)}"
        return FITS if all(TO_SPARE * share <= 1 for share in shares.values()) else PERHAPS

    def share(self, found: Estimate) -> float:
        """Returns how many times what there is a run takes, of what there is least of."""
        return max(self._shares(found).values(), default=0)

    def _shares(self, found: Estimate) -> dict[str, float]:
        """Returns that for each kind of memory that is known."""
        shares = {}
        if found.card and self.card:
            shares["GPU memory"] = found.card.bytes / self.card
        if self.host:
            shares["host memory"] = found.host_alone * self.processes / self.host
        return shares


def this_machine(device: torch.device) -> Machine:
    """Returns what this machine has; to be called on every rank, as the smallest GPU of all counts."""
    on_gpu = device.type == "cuda"
    free = total = None
    if on_gpu:
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info(device)
    totals = from_all_ranks(total)
    host, host_free = _host_memory(Path("/"))
    return Machine(
        card=None if None in totals else min(totals),
        card_free=free,
        host=host,
        host_free=host_free,
        processes=find_place().local_world_size,
        gpus=torch.cuda.device_count() if on_gpu else 0,
    )


def _host_memory(root: Path) -> tuple[int | None, int | None]:
    """Returns how much memory a process may have, and how much of it is free, by Linux's files below `root`."""
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        there = 1024 * (kib["MemTotal"] + kib["SwapTotal"])
        free = 1024 * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, ValueError, LookupError):
        return None, None
    group = root / "sys" / "fs" / "cgroup"
    for limit, taken, stat, cache in (  # version 2, and version 1
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, LookupError):
            most = int((group / limit).read_text())  # "max" is none
            there = min(there, most)
            cached = dict(line.split() for line in (group / stat).read_text().splitlines())
            free = min(free, most - int((group / taken).read_text()) + int(cached[cache]))
    return there, free


def check_memory(run: Run, strategy: Strategy | None = None) -> None:
    """Finds a run that does not fit, before anything is loaded; a dry run is told what every strategy takes.

    To be called on every rank.

    Args:
        run: what its processes have agreed on.
        strategy: ColossalAI's; None for the traditional process.

    Raises:
        UserError: if the run takes clearly more memory than there is; naming what would fit.
    """
    machine = this_machine(run.ranks.device)
    if run.ranks.device.type == "cuda" and machine.card is None:
        return  # there is nothing to compare with
    from_rank_0(lambda: _check(run, strategy, machine))


def _check(run: Run, strategy: Strategy | None, machine: Machine) -> None:
    outline = outline_of(run.model_folder, run.resolution, run.elsewhere, run.tokenizer_folder)
    setup = setup_of(run, strategy, outline, machine)
    try:
        if run.flags.training.dry_run:
            tell_all(setup, outline, machine, lambda other: _disk(run, outline, other))
        else:
            # What it takes at most is known at once. Only where that is too much is it worth a closer look.
            most = estimate(setup, counts_of(outline, setup, at_most=True))
            if machine.verdict(most) == FITS and _is_free(most, machine):
                return
        found = estimate_of(outline, setup)
        verdict = machine.verdict(found)
        refused = refusal(setup, outline, machine) if verdict not in (FITS, PERHAPS) else None
    except UserError:  # such as of layers that cannot have adapters
        raise
    except Exception as error:  # what a library's release cannot do without memory is no reason not to train
        return warn(f"memory is not estimated: {first_line(error)}")
    if refused:
        raise UserError(refused)
    if verdict == PERHAPS:
        warn(f"memory may not be enough: about {needs(found)} by an estimate, and there {has(machine)}")
    elif not _is_free(found, machine):
        warn(f"other programs may have left too little memory: the run takes about {needs(found)} by an estimate")


def setup_of(run: Run, strategy: Strategy | None, outline: Outline, machine: Machine) -> Setup:
    """Returns what decides a run's memory."""
    flags, dtype = run.flags, DTYPES[run.precision]
    encodes = flags.instance.cache_latents == "off"
    return Setup(
        strategy,
        dtype,
        flags.training.train_batch_size,
        examples=1 + flags.prior.with_prior_preservation,
        ranks=run.ranks.world_size,
        card=machine.card,
        text_encoders=flags.model.train_text_encoder,
        recomputes=flags.training.gradient_checkpointing,
        use_8bit_adam=flags.optimizer.use_8bit_adam,
        records=flags.training.cuda_graphs == "on",
        compiles=flags.training.compile,
        accumulates=flags.training.gradient_accumulation_steps > 1,
        encodes=dtype_of_vae(outline.family, outline.components["vae"], dtype) if encodes else None,
        lora=flags.lora,
    )


def estimate_of(outline: Outline, setup: Setup) -> Estimate:
    """Returns the estimate of a model's run."""
    return estimate(setup, counts_of(outline, setup))


def strategies(own: Setup) -> Iterator[Setup]:
    """Yields the ways of a trainer to spread and spare memory, faster ones first; each with `own`'s samples."""
    light = replace(own, recomputes=False, use_8bit_adam=False, records=False)
    ways = [light, replace(light, recomputes=True)]
    if importlib.util.find_spec("bitsandbytes") is not None:
        ways.append(replace(light, recomputes=True, use_8bit_adam=True))
    if own.strategy is None:
        yield from ways
        return
    for placement in ("cuda", "cpu", "auto"):
        for way in ways:
            for plugin in ("torch_ddp", "low_level_zero", "gemini"):
                quantizes_shards = way.use_8bit_adam and plugin != "torch_ddp"
                setup = _with_strategy(way, plugin, placement)
                if placement in PLACEMENTS[plugin] and not (quantizes_shards or setup.is_refused):
                    yield setup


def _with_strategy(setup: Setup, plugin: str, placement: str) -> Setup:
    """Returns a setup with another strategy, and without what does not go with it."""
    precision = setup.strategy.precision
    if plugin != "torch_ddp" and precision == "no":
        precision = "bf16"
    folder = setup.strategy.offload_dir if placement == "cpu" else None
    strategy = Strategy(plugin, placement, precision, float(placement != "cuda"), folder)
    kept = {"use_8bit_adam": setup.use_8bit_adam and not strategy.shards}
    kept |= {name: getattr(setup, name) and plugin != "gemini" for name in ("compiles", "records")}
    return replace(setup, strategy=strategy, dtype=DTYPES[precision], **kept)


def _on_disk(setup: Setup) -> Setup:
    """Returns a setup that has in a folder on a disk what it would have in host memory."""
    return replace(setup, strategy=replace(setup.strategy, offload_dir=setup.strategy.offload_dir or "FOLDER"))


def _with_adapters(setup: Setup) -> Setup:
    """Returns a setup that trains adapters alone, which need nothing of what spares memory of whole weights."""
    strategy = setup.strategy and _with_strategy(setup, "torch_ddp", "cuda").strategy
    return replace(setup, strategy=strategy, lora=LoraFlags(lora_rank=RANK_OF_ADAPTERS))


def lighter(own: Setup, machine: Machine, *, of_host: bool = False) -> Iterator[Setup]:
    """Yields setups that take less memory than `own`, the cheaper first: all of what errors of memory propose.

    A combination costs what the costliest of it does.

    Args:
        own: of the run.
        machine: that it is to fit on.
        of_host: whether there is too little of the host's.
    """
    ways = {
        DISK: [_on_disk],
        NO_GRAPHS: [lambda one: replace(one, records=False)],
        CHECKPOINTING: [lambda one: replace(one, recomputes=True)],
        SMALLER_BATCH: [lambda one: replace(one, batch=1, accumulates=True)],
        EIGHT_BIT: [lambda one: replace(one, use_8bit_adam=True)],
        SPLIT: [lambda one: replace(_with_strategy(one, "low_level_zero", "cuda"), ranks=machine.gpus)],
        HOST: [
            lambda one: _with_strategy(one, "low_level_zero", "cpu"),
            lambda one: _with_strategy(one, "gemini", "cpu"),
            lambda one: _on_disk(_with_strategy(one, "low_level_zero", "cpu")),
            lambda one: _on_disk(_with_strategy(one, "gemini", "cpu")),
        ],
        NO_TEXT_ENCODER: [lambda one: replace(one, text_encoders=False)],
    }
    offered = [ways[flag] for flag in cheaper_flags(of_host=of_host) if flag in ways]
    if machine.gpus < 2:
        offered = [way for way in offered if way is not ways[SPLIT]]
    if own.card is None:  # on the CPU there is one plugin
        offered = [way for way in offered if way is not ways[HOST] and way is not ways[SPLIT]]
    for chosen in range(1, 2 ** len(offered)):
        picked = [way for number, way in enumerate(offered) if chosen >> number & 1]
        for changes in itertools.product(*picked):
            setup = own
            for change in changes:
                setup = change(setup)
            if not setup.is_refused:
                yield setup


def refusal(setup: Setup, outline: Outline, machine: Machine) -> str:
    """Returns what to say of a run that does not fit: what it takes, what there is, and what would fit."""
    found = estimate_of(outline, setup)
    told = f"{setup.flags()} takes about {needs(found)} by an estimate, and there {has(machine)}"
    nearest, nearest_found = setup, found
    others = strategies(setup) if setup.card is not None else ()
    of_host = "host memory" in machine.verdict(found)
    small = _with_adapters(setup)  # another result, and so the last resort
    adapters = () if setup.has_adapters else (small, *lighter(small, machine))
    keeps_more = setup.strategy is None and setup.card is not None
    script = ", or train_dreambooth_colossalai.py, which can keep more in host memory" * keeps_more
    for other in itertools.chain(lighter(setup, machine, of_host=of_host), others, adapters):
        that = estimate_of(outline, other)
        if machine.verdict(that) == FITS:
            if other in adapters:
                return f"{told}: use {other.flags(setup)}, which trains adapters alone, about {needs(that)}{script}"
            return f"{told}: use {other.flags(setup)}, which takes about {needs(that)}"
        if machine.share(that) < machine.share(nearest_found):
            nearest, nearest_found = other, that
    return (
        f"{told}: use a lower --resolution{script}; beside that nothing fits, and {nearest.flags(setup)} comes "
        f"nearest with {needs(nearest_found)}"
    )


def needs(found: Estimate) -> str:
    """Returns in words what a process takes."""
    of_card = f"{found.card.bytes / GIB:.1f} GiB of GPU memory and " if found.card else ""
    return f"{of_card}{found.host.bytes / GIB:.1f} GiB of host memory a process"


def has(machine: Machine) -> str:
    """Returns in words what there is for all processes of this machine."""
    processes = f"{machine.processes} process{'es' * (machine.processes > 1)}"
    kinds = {"of a GPU": machine.card, f"of the host for {processes}": machine.host}
    return "are " + " and ".join(f"{size / GIB:.1f} GiB {what}" for what, size in kinds.items() if size)


def _is_free(found: Estimate, machine: Machine) -> bool:
    """Whether what a run takes is not taken by other programs, as far as that is known."""
    on_card = found.card is None or machine.card_free is None or found.card.bytes - CONTEXT <= machine.card_free
    return on_card and (machine.host_free is None or found.host_alone * machine.processes <= machine.host_free)


def _disk(run: Run, outline: Outline, setup: Setup) -> int:
    """Returns the bytes that a run writes."""
    flags = run.flags
    if setup.has_adapters:
        weights, _ = outline.weights(setup.text_encoders, setup.lora)
        sizes = Sizes.of_adapters(weights, files=1 + flags.lora.save_kohya_lora)
    else:
        form = Form.of(flags.output, flags.lora)
        how = {"use_8bit_adam": setup.use_8bit_adam, "of_pipeline": form.bytes_of_a_weight}
        sizes = Sizes.of(outline.components, outline.trained(setup.text_encoders), **how)
    return room_of(run.flags.output, run.schedule, sizes, first_step=run.first_step).needed


def tell_all(own: Setup, outline: Outline, machine: Machine, disk: Callable[[Setup], int]) -> None:
    """Prints what every strategy takes, and of what the run's own is made.

    Args:
        own: of the run.
        outline: of the model.
        machine: that it runs on. Without a GPU the others are told as on a GPU of any size.
        disk: returns the bytes that a run writes, beside what --offload_dir has.
    """
    on_gpu = own.card is not None
    typed = own if on_gpu else _on_a_gpu(own)
    others = list(strategies(typed))
    rows = others if own in others else [own, *others]
    found = [estimate_of(outline, setup) for setup in rows]
    batch, each = counted(own.batch * own.examples, "image"), f", each of {own.ranks} processes" * (own.ranks > 1)
    say(f"memory by an estimate{each}, {batch} of {outline.resolution} px at a time:")
    names = [f"* {setup.flags()}" if setup == own else f"  {setup.flags(typed)}" for setup in rows]
    if not on_gpu:
        names[rows.index(own)] += ", on the CPU"
    width = max(map(len, names))
    say(f"  {'strategy (* this run)':{width - 2}}  card GiB  host GiB  disk GiB  {'here' if on_gpu else 'card'}")
    for name, setup, one in zip(names, rows, found, strict=True):
        card = f"{one.card.bytes / GIB:.1f}" if one.card else "-"
        where = machine.verdict(one) if setup.card == own.card else smallest_card(one)
        host, of_disk = one.host.bytes / GIB, (disk(setup) + one.disk * own.ranks) / GIB
        say(f"{name:{width}}  {card:>8}  {host:8.1f}  {of_disk:8.1f}  {where}")
    of_own = found[rows.index(own)]
    for what, peak in (("card", of_own.card), ("host", of_own.host)):
        if peak:
            say(f"{what}, this run: {peak}")


def _on_a_gpu(own: Setup) -> Setup:
    """Returns the setup of a run on the CPU as it would be on a GPU."""
    strategy = own.strategy and replace(own.strategy, precision="bf16")
    return replace(own, strategy=strategy, card=CARDS[-1] * GIB, dtype=DTYPES["bf16"])


def smallest_card(found: Estimate) -> str:
    """Returns the smallest of the usual cards that a run fits on."""
    size = next((size for size in CARDS if TO_SPARE * found.card.bytes <= size * GIB * SEEN_OF_A_CARD), None)
    return f"{size} GB" if size else "none"
