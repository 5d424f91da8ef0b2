"""What a run leaves behind: the trained pipeline in its output folder, and its copy on the Hub.

The pipeline's files, and no others, are listed in dreambooth.json beside them, each with its size, its time and its
digest. So this program knows later what it may replace, and what it uploads; what was changed since, it leaves alone.

A run replaces what it writes anew itself: a whole pipeline a whole pipeline, a file one of its name. What else an
earlier run has left would be lost, or stay and be taken for this run's, so that a run into such a folder is refused
before anything loads.
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi
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
from dreambooth.model.hub import hub_reason
from dreambooth.model.lora import KOHYA_WEIGHTS, WEIGHTS, as_kohya_names, kohya_metadata
from dreambooth.model.pipeline import write_pipeline
from dreambooth.model.precision import DTYPES
from dreambooth.processes.ranks import Ranks, from_rank_0
from dreambooth.processes.threads import in_threads
from dreambooth.run.folders import MARK, beside, discard, flush, lock, put_right, written_by_all, written_whole
from dreambooth.run.trained import check_finite, gather_adapters, write_trained

LISTING, INDEX = "dreambooth.json", "model_index.json"
# A pipeline, or adapters alone: the file that tells that all are there.
LAST = (INDEX, WEIGHTS)
PART = 64 * 2**20  # bytes of a file that a thread reads at a time for its digest
# A folder with the earlier pipeline while another takes its place, and a file in it that says which.
ASIDE, CHANGE = "aside", "change.json"
# By which the libraries tell where on this machine a part came from.
PATHS = ("_name_or_path", "name_or_path")


def check_logging_dir(logging_dir: str) -> None:
    """Finds out whether --logging_dir leads into a folder of the trained pipeline.

    Raises:
        UserError: if it does, as the pipeline would replace it.
    """
    if {*Path(os.path.normpath(logging_dir)).parts[:1]} & {*PIPELINE}:
        raise UserError(f"--logging_dir {logging_dir}: the trained pipeline's folder of that name replaces it")


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
        if lora.lora_rank is not None:
            more = (WEIGHTS, KOHYA_WEIGHTS) if lora.save_kohya_lora else (WEIGHTS,)
        return cls(wanted or torch.float32, wanted or torch.float16, more)

    @property
    def bytes_of_a_weight(self) -> int:
        """How many bytes of a weight are written, the single file included."""
        return self.dtype.itemsize + (self.of_single_file.itemsize if self.more else 0)


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
                if left := _settle(aside):
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
    found = next((name for name in LAST if (output_dir / name).exists()), None)
    if found and not dry_run:
        say(f"{one_line(str(output_dir))} has {_told(output_dir, found)}: this run replaces it")


def _told(output_dir: Path, name: str) -> str:
    """Returns what a result in a folder is called, with its step and its time."""
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((output_dir / name).stat().st_mtime))
    what = {INDEX: "a pipeline", WEIGHTS: "a LoRA"}.get(name, name)
    return f"{what} of step {read_listing(output_dir).get('step')}, written {written}"


@dataclass(frozen=True)
class Written:
    """What a file was when this program wrote it.

    Args:
        size: in bytes.
        mtime_ns: when it was written, in nanoseconds since the epoch.
        sha256: of its content, as of `digest_of`.
    """

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def now(cls, path: Path) -> "Written":
        """Returns what a file is now."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, digest_of(path))

    def is_still(self, path: Path) -> bool:
        """Whether a file is what it was. It is read only where its time is another, as that of a copy is."""
        status = path.stat()
        if status.st_size != self.size:
            return False
        if status.st_mtime_ns == self.mtime_ns or digest_of(path) == self.sha256:
            return True
        return digest_of(path, part=self.size) == self.sha256  # as earlier versions have it


def digest_of(path: Path, part: int = PART) -> str:
    """Returns the SHA-256 of a file, hexadecimal; of one that is larger than a part, that of its parts' SHA-256.

    The parts are read in threads: one core would take seconds over a model.

    Args:
        path: of the file.
        part: size of a part, in bytes.
    """
    with open(path, "rb") as file:
        begins = range(0, max(1, os.fstat(file.fileno()).st_size), max(1, part))
        threads = min(len(begins), len(os.sched_getaffinity(0)))
        digests = [*in_threads(functools.partial(_digest_of_part, file.fileno(), part), begins, threads=threads)]
    return digests[0].hex() if len(digests) == 1 else hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_of_part(file: int, size: int, begin: int) -> bytes:
    digest, end = hashlib.sha256(), begin + size
    while block := os.pread(file, min(2**20, end - begin), begin):
        digest.update(block)
        begin += len(block)
    return digest.digest()


def read_listing(folder: Path) -> dict:
    """Returns what the listing in a folder says; empty if there is none, or it is none of this program's.

    Its "files" are those of the pipeline that this program has written into the folder, by their paths inside.
    """
    try:
        listing = json.loads((folder / LISTING).read_text())
        files = {name: Written(**written) for name, written in listing["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {"files": {}}
    return listing | {"files": files if all(map(_is_inside, files)) else {}}


def pipeline_files(folder: Path) -> dict[str, Written]:
    """Returns the files of the pipeline that this program has written into a folder, by their paths inside."""
    return read_listing(folder)["files"]


def _changed(folder: Path, files: dict[str, Written]) -> str | None:
    """Returns the first of the files that are there and are not what they were."""
    return next((name for name, file in files.items() if _is_other(folder / name, file)), None)


def _is_other(path: Path, file: Written) -> bool:
    return path.exists() and not (path.is_file() and file.is_still(path))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(path.parts) > 0


def _check_parts(output_dir: Path, more: Collection[str]) -> None:
    """Compares what is where the pipeline's parts go with the list of its files.

    Raises:
        UserError: naming a part that this program did not write, or a link.
    """
    files = pipeline_files(output_dir)
    for name in files:
        if link := _link_in(output_dir, name):
            raise UserError(
                f"--output_dir {output_dir}: {link} is a link, which is neither replaced nor written through: "
                "remove it, or name another folder"
            )
    if changed := _changed(output_dir, files):
        raise UserError(
            f"--output_dir {output_dir}: {changed} is not as this program has written it: "
            "move it away, or name another folder"
        )
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


def _link_in(folder: Path, name: str) -> str | None:
    """Returns the first link on the way from a folder to a file inside."""
    path = PurePosixPath(name)
    steps = [*reversed(path.parents), path][1:]
    return next((str(step) for step in steps if (folder / step).is_symlink()), None)


def save_pipeline(
    output_dir: Path,
    load_pipeline: Callable[..., DiffusionPipeline],
    training: Training,
    ranks: Ranks,
    *,
    size: int,
    step: int,
    base: str,
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
        base: the model that was trained, a Hub id or a folder; the latter is told nobody.
        settings: of the run.
        dtype: of its weights.
        write_more: adds files to the folder of the whole pipeline, on rank 0.

    Raises:
        RunError: saying where the pipeline is; if it cannot be put in place, in a folder that no run removes; if the
            disk takes no more, in the system's folder for temporary files. It is raised on rank 0.
        ToldByRank0: then, on the others.
    """
    hub_id = None if os.path.exists(base) else base

    def write_files(folder: Path) -> None:
        write_trained(folder, training, ranks, dtype)
        from_rank_0(lambda: write_the_rest(folder))

    def write_the_rest(folder: Path) -> None:
        trained = {name: empty_copy(component) for name, component in training.denoiser.named_children()}
        pipeline = load_pipeline(**trained)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(dtype)
        write_pipeline(pipeline, folder, without=trained)
        leave_out_paths(folder, hub_id)
        write_more(folder)

    check_finite(training.weights())
    _save(output_dir, write_files, "pipeline", size=size, step=step, hub_id=hub_id, settings=settings)


def save_lora(
    output_dir: Path,
    training: Training,
    ranks: Ranks,
    *,
    kohya: bool,
    size: int,
    step: int,
    base: str,
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

    def write_files(folder: Path) -> None:
        from_rank_0(lambda: write(folder))

    def write(folder: Path) -> None:
        told = {"format": "pt"} | adapters.metadata(alpha=adapters.rank)
        save_file(weights, folder / WEIGHTS, metadata=told)
        if kohya:
            save_file(as_kohya_names(weights), folder / KOHYA_WEIGHTS, metadata=kohya_metadata(adapters))

    hub_id = None if os.path.exists(base) else base
    _save(output_dir, write_files, "LoRA", size=size, step=step, hub_id=hub_id, settings=settings)


def _save(
    output_dir: Path,
    write_files: Callable[[Path], None],
    what: str,
    *,
    size: int,
    step: int,
    hub_id: str | None,
    settings: dict,
) -> None:
    """Has files be written into a folder of their own, lists them, and puts them in place.

    Args:
        output_dir, size, step, settings: as of `save_pipeline`.
        write_files: writes them into a folder; called on every rank.
        what: messages call them.
        hub_id: of the model that was trained, if it has one.
    """
    origin = {"written_at": time.time(), "step": step, "base_model": hub_id, "settings": settings}

    def write(folder: Path) -> None:
        with written_by_all(folder, size) as partial:
            write_files(partial)
            from_rank_0(lambda: write_listing(partial))

    def write_listing(folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
        states = {path.relative_to(folder).as_posix(): asdict(Written.now(path)) for path in files}
        (folder / LISTING).write_text(json.dumps(origin | {"files": states}, indent=1))

    name = f"{what.lower()}-step-{step}"
    staged = from_rank_0(lambda: _unused(output_dir / name))
    try:
        write(staged)
    except (RunError, ToldByRank0) as error:
        try:
            elsewhere = Path(tempfile.gettempdir(), f"dreambooth-{name}-{secrets.token_hex(4)}")
            write(elsewhere)
        except RunError as second:
            raise RunError(f"{error}; {first_line(second)}") from error
        if not is_rank_0():
            raise
        raise RunError(f"{error}; the trained {what} is whole in {elsewhere} instead") from error
    from_rank_0(lambda: _put_all_in_place(staged, output_dir, what))


def _put_all_in_place(staged: Path, output_dir: Path, what: str) -> None:
    try:
        _put_in_place(staged, output_dir)
    except OSError as error:
        raise RunError(
            f"cannot put the trained {what} in its place: {first_line(error)}; it is whole in {staged}"
        ) from error


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


def _unused(folder: Path) -> Path:
    """Returns `folder`, or with a number at its end if there is something of that name."""
    number, path = 1, folder
    while os.path.lexists(path):
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def _put_in_place(staged: Path, output_dir: Path) -> None:
    """Moves the files of a whole pipeline to where they belong, and those of the earlier one out of their way.

    The index, or the adapters' own file, goes first and comes last: a folder that has it is whole. Until then all can
    be taken back.

    Raises:
        OSError: if it cannot be done; then the earlier pipeline is back, and the new one whole in `staged`.
    """
    files = pipeline_files(output_dir)
    if changed := _changed(output_dir, files):
        raise OSError(f"{output_dir / changed} was changed meanwhile")
    aside = beside(output_dir / "pipeline", ASIDE)
    new, earlier = _index_first(pipeline_files(staged)), _index_first(files)
    try:
        with written_whole(aside, 0) as folder:
            (folder / CHANGE).write_text(json.dumps({"staged": staged.name, "new": new, "earlier": earlier}))
    except RunError as error:
        raise OSError(str(error)) from error
    try:
        for name in earlier:
            _move(name, output_dir, aside)
        for name in reversed(new):
            _move(name, staged, output_dir)
    finally:
        _settle(aside)


def _index_first(files: Iterable[str]) -> list[str]:
    """Returns the files of a pipeline, and their listing, in the order in which they go."""
    return sorted([*files, LISTING] if files else [], key=lambda name: (name not in LAST, name))


def _move(name: str, source: Path, target: Path) -> None:
    """Moves a file, if it is there, to the same place in another folder, where there is none."""
    if not os.path.lexists(source / name):
        return
    for folder in (source, target):
        if link := _link_in(folder, name):
            raise OSError(f"{folder / link} is a link")
    if os.path.lexists(target / name):
        raise OSError(f"{target / name} is there, and not of an earlier pipeline of this program")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    os.rename(source / name, target / name)


def _settle(aside: Path) -> Path | None:
    """Ends a change of pipelines, begun by this process or by one that was killed.

    The new pipeline stays if all of it is in place, and the earlier one goes. Else each goes back to where it was.

    Returns:
        Where the new pipeline is, if not in its place.
    """
    output_dir = aside.parent
    try:
        change = json.loads((aside / CHANGE).read_text())
        staged, new, earlier = output_dir / change["staged"], change["new"], change["earlier"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # not ours
    done = bool(new) and (output_dir / new[0]).exists() and not (staged / new[0]).exists()
    if not done:
        for name in new:
            if not os.path.lexists(staged / name):
                _move(name, output_dir, staged)
        for name in reversed(earlier):
            _move(name, aside, output_dir)
    for folder in _folders_of(earlier + new, output_dir):
        if done:
            _remove_if_empty(folder)
        if folder.is_dir():
            flush(folder)
    if done:
        for folder in _folders_of(new, staged):
            _remove_if_empty(folder)
    discard(aside)
    return None if done else staged


def _folders_of(files: list[str], folder: Path) -> list[Path]:
    """Returns the folders, `folder` among them, in which some files are, each before the one that it is in."""
    return sorted({folder / parent for name in files for parent in PurePosixPath(name).parents}, reverse=True)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # has something in it
        folder.rmdir()


def hub_name(flags: OutputFlags) -> str:
    """Returns the repository that --push_to_hub uploads to, as far as the flags name it."""
    return flags.hub_model_id or Path(flags.output_dir).resolve().name


def prepare_hub(flags: OutputFlags) -> str | None:
    """Creates the repository that --push_to_hub names, before any time is spent on training; on rank 0.

    Returns:
        The repository's full name; None where nothing is to be uploaded.

    Raises:
        UserError: if the Hub cannot be reached or refuses.
    """
    if not flags.push_to_hub or not is_rank_0():
        return None
    name = hub_name(flags)
    try:
        return HfApi(token=flags.hub_token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # Whatever the network and the Hub can answer: nothing has been done yet.
        raise UserError(f"--push_to_hub: cannot create {name} on the Hub: {hub_reason(error)}") from error


def upload(flags: OutputFlags, repo_id: str) -> None:
    """Uploads the trained pipeline's files, and nothing else of the output folder.

    Raises:
        RunError: if the Hub cannot be reached or refuses.
    """
    output_dir = Path(flags.output_dir)
    files = pipeline_files(output_dir)
    try:
        HfApi(token=flags.hub_token).create_commit(
            repo_id=repo_id,
            operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=output_dir / name) for name in files],
            commit_message="DreamBooth training",
        )
    except Exception as error:  # whatever the network and the Hub can answer
        parts = sorted({PurePosixPath(name).parts[0] for name in files})
        include = " ".join(part if (output_dir / part).is_file() else f"'{part}/*'" for part in parts)
        what = "LoRA" if WEIGHTS in files else "pipeline"
        raise RunError(
            f"--push_to_hub: {hub_reason(error)}; the {what} is whole in {output_dir}: "
            f"hf upload {repo_id} {output_dir} . --include {include} uploads it"
        ) from error
