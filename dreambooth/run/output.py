"""What a run leaves behind in its output folder: the trained pipeline, or adapters.

A run replaces what it writes anew itself: a whole pipeline a whole pipeline, a file one of its name. What else an
earlier run has left would be lost, or stay and be taken for this run's, so that a run into such a folder is refused
before anything loads.
"""

import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file

from dreambooth.command_line.console import (
    RunError,
    ToldByRank0,
    UserError,
    first_line,
    is_rank_0,
    one_line,
    say,
    warn,
)
from dreambooth.command_line.flags import LoraFlags, OutputFlags
from dreambooth.engine.state import Training
from dreambooth.model.components import empty_copy
from dreambooth.model.folder import PIPELINE
from dreambooth.model.lora import KOHYA_WEIGHTS, WEIGHTS, as_kohya_names, kohya_metadata
from dreambooth.model.pipeline import write_pipeline
from dreambooth.model.precision import DTYPES
from dreambooth.processes.ranks import Ranks, from_rank_0
from dreambooth.run.folders import MARK, lock, put_right, written_by_all
from dreambooth.run.in_place import ASIDE, put_in_place, settle
from dreambooth.run.listing import INDEX, LAST, LISTING, Written, changed_of, link_in, pipeline_files, read_listing
from dreambooth.run.trained import check_finite, gather_adapters, write_trained

# By which the libraries tell where on this machine a part came from.
PATHS = ("_name_or_path", "name_or_path")


class NoRest(UserError):
    """What is not trained of a pipeline cannot be had, or not be written for another reason than the disk's."""

    status = RunError.status


@dataclass(frozen=True)
class Form:
    """In what form the trained pipeline, or the adapters, are written.

    Args:
        dtype: of the weights.
        of_single_file: of those in a single file.
        more: names of files beside a pipeline's parts: of the single file, or of adapters, which are alone.
    """

    dtype: torch.dtype
    of_single_file: torch.dtype
    more: tuple[str, ...]

    @classmethod
    def of(cls, flags: OutputFlags, lora: LoraFlags) -> "Form":
        wanted = flags.save_dtype and (torch.float32 if flags.save_dtype == "fp32" else DTYPES[flags.save_dtype])
        more = (_name_of_single_file(Path(flags.output_dir)),) if flags.save_single_file else ()
        if lora.is_on:
            more = (WEIGHTS, KOHYA_WEIGHTS) if lora.save_kohya_lora else (WEIGHTS,)
        return cls(wanted or torch.float32, wanted or torch.float16, more)

    @property
    def bytes_of_a_weight(self) -> int:
        """How many bytes of a weight are written, the single file included."""
        return self.dtype.itemsize + (self.of_single_file.itemsize if self.more else 0)

    def check_names(self, flags: OutputFlags, model: str) -> None:
        """Finds out whether --logging_dir, or the model to train from, has a name that the run writes to.

        Raises:
            UserError: if it has.
        """
        output_dir, logs = flags.output_dir, flags.logging_dir
        first = (*Path(os.path.relpath(os.path.join(output_dir, logs), output_dir)).parts, "")[0]
        if first in PIPELINE:
            raise UserError(f"--logging_dir {logs}: the trained pipeline's folder of that name replaces it")
        if first in (*LAST, LISTING, *self.more) or re.fullmatch(r"checkpoint-\d+", first):
            raise UserError(f"--logging_dir {logs}: the run itself writes {first}")
        for name in self.more:
            if os.path.isfile(model) and os.path.realpath(model) == os.path.realpath(Path(output_dir, name)):
                raise UserError(f"--output_dir {output_dir}: the run would replace {name}, the model to train")


def enter_output_dir(output_dir: Path, *, dry_run: bool = False, more: Collection[str] = ()) -> None:
    """Keeps other runs out of --output_dir, if it is there, and ends what a run that was killed has begun in it.

    Does so on rank 0, and not in a --dry_run.

    Args:
        output_dir: the folder.
        dry_run: whether nothing may be changed.
        more: files that the run writes beside the pipeline's parts.

    Raises:
        UserError: if another run writes into the folder, or nobody can, or what the pipeline would replace was not
            written by this program, or something that an earlier run has left is not replaced by its like.
    """
    if not is_rank_0() or not output_dir.is_dir():
        return
    try:
        if not dry_run:
            lock(output_dir)
            put_right(output_dir)
            for aside in output_dir.glob(f".*.{ASIDE}"):
                if left := settle(aside):
                    warn(f"a run was killed while it put its pipeline in place: it is whole in {left}")
        _check_parts(output_dir, more)
        _check_left(output_dir, more)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {first_line(error)}") from error


def prepare_output_dir(output_dir: Path, *, dry_run: bool = False, more: Collection[str] = ()) -> None:
    """Creates --output_dir, and enters it, as `enter_output_dir`; on rank 0, and not in a --dry_run.

    Raises:
        UserError: as `enter_output_dir` does.
    """
    if is_rank_0() and not dry_run:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: {first_line(error)}") from error
    enter_output_dir(output_dir, dry_run=dry_run, more=more)
    if not dry_run and (result := result_in(output_dir)):
        say(f"{one_line(str(output_dir))} has {result}: this run replaces it")


def result_in(output_dir: Path) -> str | None:
    """Returns what the result in a folder is called, with its step and its time; None where there is none."""
    found = next((name for name in LAST if (output_dir / name).exists()), None)
    return found and _told(output_dir, found)


def _told(output_dir: Path, name: str) -> str:
    """Returns what a file of a result stands for, in words."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((output_dir / name).stat().st_mtime))
    what = {INDEX: "a pipeline", WEIGHTS: "a LoRA"}.get(name, name)
    return f"{what} of step {read_listing(output_dir).get('step')}, written {written}"


def _check_parts(output_dir: Path, more: Collection[str]) -> None:
    """Compares what is where the pipeline's parts go with the list of its files.

    Raises:
        UserError: naming a part that this program did not write, or may not replace, or a link.
    """
    files = pipeline_files(output_dir)
    for name in files:
        if link := link_in(output_dir, name):
            raise UserError(
                f"--output_dir {output_dir}: {link} is a link, which is neither replaced nor written through: "
                "remove it, or name another folder"
            )
    if changed := changed_of(output_dir, files):
        raise UserError(
            f"--output_dir {output_dir}: {changed} is not as this program has written it: "
            "move it away, or name another folder"
        )
    for folder in sorted({(output_dir / name).parent for name in files}):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise UserError(f"--output_dir {output_dir}: no permission to replace what is in {folder}")
    for part in (INDEX, *PIPELINE, *more, LISTING):
        path = output_dir / part
        ours = files if part == LISTING else [name for name in files if PurePosixPath(name).parts[0] == part]
        is_there = os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
        if is_there and not ours:
            told = "" if part == LISTING else f", as {LISTING} would tell"
            raise UserError(
                f"--output_dir {output_dir} has a {part} that this program did not write{told}: "
                "move it away, or name another folder"
            )


def _check_left(output_dir: Path, more: Collection[str]) -> None:
    """Finds what an earlier run has left that this one does not write anew.

    Raises:
        UserError: naming it.
    """
    names = [PurePosixPath(name) for name in pipeline_files(output_dir) if (output_dir / name).exists()]
    parts = {name.parts[0] for name in names}
    of_pipeline = {INDEX} | {name.parts[0] for name in names if len(name.parts) > 1}  # which go and come as a whole
    own = {*more} if WEIGHTS in more else {*more, *of_pipeline}
    left = sorted(parts - own, key=lambda part: (part not in LAST, part))
    if not left:
        return
    told = f"--output_dir {output_dir} has {_told(output_dir, left[0])}"
    if WEIGHTS in more and left[0] != KOHYA_WEIGHTS:
        raise UserError(f"{told}, and adapters, which this run leaves, do not replace it: choose another --output_dir")
    if left[0] == WEIGHTS:
        raise UserError(f"{told}, and a run without --lora_rank leaves none: choose another --output_dir")
    flags = {KOHYA_WEIGHTS: "--save_kohya_lora", _name_of_single_file(output_dir): "--save_single_file"}
    anew = f"add {flags[left[0]]}, which writes it anew, " if left[0] in flags else ""
    raise UserError(
        f"{told}, and this run would leave none of that name: {anew}choose another --output_dir, or move it away"
    )


def _name_of_single_file(output_dir: Path) -> str:
    return f"{output_dir.resolve().name}.safetensors"


def save_pipeline(
    output_dir: Path,
    load_pipeline: Callable[..., DiffusionPipeline],
    training: Training,
    ranks: Ranks,
    *,
    size: int,
    step: int,
    base: str | None,
    settings: dict,
    dtype: torch.dtype = torch.float32,
    write_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the whole pipeline into `output_dir`, beside the checkpoints, in place of an earlier one.

    It is whole in a folder of its own before any file is replaced. What a user has put beside the earlier one's files
    stays. To be called on every rank.

    Args:
        output_dir: that has been prepared.
        load_pipeline: returns the pipeline, with some of its parts replaced.
        training: what of it is trained.
        ranks: of the run.
        size: of the pipeline, in bytes.
        step: optimizer steps done.
        base: Hub id of the model that was trained, if it has one.
        settings: of the run.
        dtype: of its weights.
        write_more: adds files to the folder of the whole pipeline, on rank 0.

    Raises:
        RunError: saying where the pipeline is; if it cannot be put in place, in a folder that no run removes; if the
            disk takes no more, in the system's folder for temporary files. If the rest of the pipeline cannot be had
            any more, what was trained is in such a folder alone. It is raised on rank 0.
        ToldByRank0: then, on the others.
    """

    def write_files(folder: Path, *, whole: bool) -> None:
        write_trained(folder, training, ranks, dtype)
        if whole:
            from_rank_0(lambda: write_the_rest(folder))

    def write_the_rest(folder: Path) -> None:
        try:
            write_frozen(folder)
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # what was trained is not to be lost, whatever a library finds in the rest
            raise NoRest(first_line(error)) from error

    def write_frozen(folder: Path) -> None:
        trained = {name: empty_copy(component) for name, component in training.denoiser.named_children()}
        pipeline = load_pipeline(**trained)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(dtype)
        write_pipeline(pipeline, folder, without=trained)
        leave_out_paths(folder, base)
        write_more(folder)

    check_finite(training.weights())
    _save(output_dir, write_files, "pipeline", size=size, step=step, base=base, settings=settings)


def save_lora(
    output_dir: Path,
    training: Training,
    ranks: Ranks,
    *,
    kohya: bool,
    size: int,
    step: int,
    base: str | None,
    settings: dict,
    dtype: torch.dtype,
) -> None:
    """Writes the adapters that are trained into `output_dir`, as `save_pipeline` does a pipeline, and instead of one.

    What alpha multiplies is in the weights already, so that any program draws what the run has trained.

    Args:
        kohya: whether they are written also by the names of kohya's scripts.
        output_dir, training, ranks, size, step, base, settings, dtype: as of `save_pipeline`.

    Raises:
        RunError, ToldByRank0: as `save_pipeline` does.
    """
    adapters = training.denoiser.adapters
    weights = {name: weight.to(dtype) for name, weight in gather_adapters(training, ranks).items()}

    def write_files(folder: Path, *, whole: bool) -> None:
        from_rank_0(lambda: write(folder))

    def write(folder: Path) -> None:
        told = {"format": "pt"} | adapters.metadata(alpha=adapters.rank)
        save_file(weights, folder / WEIGHTS, metadata=told)
        if kohya:
            save_file(as_kohya_names(weights), folder / KOHYA_WEIGHTS, metadata=kohya_metadata(adapters))

    _save(output_dir, write_files, "LoRA", size=size, step=step, base=base, settings=settings)


def _save(
    output_dir: Path,
    write_files: Callable[..., None],
    what: str,
    *,
    size: int,
    step: int,
    base: str | None,
    settings: dict,
) -> None:
    """Has files be written into a folder of their own, lists them, and puts them in place.

    Args:
        output_dir, size, step, base, settings: as of `save_pipeline`.
        write_files: writes them into a folder, or if they are not to be `whole` what was trained alone; called on
            every rank.
        what: messages call them.
    """
    origin = {"written_at": time.time(), "step": step, "base_model": base, "settings": settings}

    def write(folder: Path, *, whole: bool = True) -> None:
        with written_by_all(folder, size) as partial:
            write_files(partial, whole=whole)
            from_rank_0(lambda: write_listing(partial))

    def write_listing(folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
        states = {path.relative_to(folder).as_posix(): asdict(Written.now(path)) for path in files}
        (folder / LISTING).write_text(json.dumps(origin | {"files": states}, indent=1))

    name = f"{what.lower()}-step-{step}"
    staged = from_rank_0(lambda: _unused(output_dir / name))
    elsewhere = from_rank_0(lambda: Path(tempfile.gettempdir(), f"dreambooth-{name}-{secrets.token_hex(4)}"))
    folder, whole, errors = staged, True, []
    while True:
        try:
            write(folder, whole=whole)
            break
        except (RunError, NoRest, ToldByRank0) as error:  # which all ranks have; one that is alone with another leaves
            errors.append(error)
        if from_rank_0(lambda: isinstance(errors[-1], NoRest)):
            whole = False
        elif folder == staged:
            folder = elsewhere
        else:
            raise _all_of(errors)
    if errors:
        left = f"the trained {what} is whole in {folder} instead" if whole else f"what was trained is in {folder}"
        raise _all_of(errors, left)
    from_rank_0(lambda: _put_all_in_place(staged, output_dir, what))


def _all_of(errors: list[Exception], *more: str) -> Exception:
    """Returns what is to be raised because of errors that all ranks have, one after another."""
    if not is_rank_0():
        return ToldByRank0(RunError.status)
    return RunError("; ".join([*map(first_line, errors), *more]))


def _put_all_in_place(staged: Path, output_dir: Path, what: str) -> None:
    try:
        put_in_place(staged, output_dir)
    except OSError as error:
        raise RunError(
            f"cannot put the trained {what} in its place: {first_line(error)}; it is whole in {staged}"
        ) from error


def _unused(folder: Path) -> Path:
    """Returns `folder`, or with a number at its end if there is something of that name."""
    number, path = 1, folder
    while os.path.lexists(path):
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def leave_out_paths(folder: Path, hub_id: str | None = None) -> None:
    """Takes out of the JSON files in a folder where a model was on this machine; the index names a Hub id instead."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        names_one = path.name == INDEX and hub_id
        if not names_one and not any(f'"{name}"' in text for name in PATHS):
            continue
        told = json.loads(text, object_hook=lambda content: {k: v for k, v in content.items() if k not in PATHS})
        if names_one:
            told["_name_or_path"] = hub_id
        path.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
