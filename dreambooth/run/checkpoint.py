"""Checkpoints: everything that a run needs to go on as if it had never stopped.

checkpoint-N/
    unet/                    fp32 weights, which `UNet2DConditionModel.from_pretrained` loads
    text_encoder/            likewise, where it is trained
    optimizer.safetensors    what AdamW keeps of each parameter, "exp_avg.unet.conv_in.bias" and so on
    state.json               step, learning rate schedule, loss scale, the run's settings, versions, and these files

Nothing in it is pickled. No state of a random generator is needed: every draw follows from the seed and the number of
its sample (dreambooth/data/randomness.py). No part depends on the plugin or the number of ranks.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dreambooth.command_line.console import RunError, UserError, first_line, is_rank_0, say, warn
from dreambooth.command_line.flags import Flags, OutputFlags, defaults, idle
from dreambooth.command_line.paths import same_folder
from dreambooth.data.images import Photo
from dreambooth.data.randomness import shared_seed
from dreambooth.data.schedule import Schedule
from dreambooth.engine.state import OPTIMIZER, Checkpoint, Training
from dreambooth.model.lora import WEIGHTS as LORA
from dreambooth.model.slices import write_slices
from dreambooth.processes.ranks import Ranks, compare, from_all_ranks, from_rank_0, until_found
from dreambooth.run.folders import MARK, discard, readable, written_by_all
from dreambooth.run.listing import PART, Written, changed_of, files_of
from dreambooth.run.output import leave_out_paths, result_in
from dreambooth.run.trained import check_finite, write_trained

NAME = re.compile(r"checkpoint-(\d+)")
STATE = "state.json"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "colossalai")
# Settings that say which weights are trained: no run goes on with others.
WHAT_IS_TRAINED = {"train_text_encoder", "lora_rank", "lora_target_modules"}
# Files of the checkpoints that diffusers' scripts and others write with accelerate.
OF_ACCELERATE = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model.bin", "model.safetensors")
OF_NFS = ".nfs"  # names of files that were removed while a process had them open
FEW_PROMPTS = 3  # that a line has room for
DIGEST = re.compile(r"[0-9a-f]{16}")  # of what would be too long to tell
# Courses of the learning rate that do not depend on where they end.
ENDLESS = ("constant", "constant_with_warmup")


def seed_of(seed: int | None, checkpoint: Checkpoint | None) -> int:
    """Returns the seed of the run: --seed, or that of the run that it goes on with, or one drawn for all ranks."""
    earlier = None if checkpoint is None else checkpoint.settings.get("seed")
    return shared_seed(earlier if seed is None else seed)


def resolution_of(resolution: int | None, checkpoint: Checkpoint | None, of_model: int) -> int:
    """Returns the resolution of the run: --resolution, or that of the run that it goes on with, or the model's."""
    earlier = None if checkpoint is None else checkpoint.settings.get("resolution")
    return resolution or earlier or of_model


def flag_settings(flags: Flags, schedule: Schedule, *, seed: int, precision: str, resolution: int) -> dict:
    """Returns the settings that two runs have to share so that one can go on where the other stopped.

    Args:
        flags: those that change numbers count, but for those that have no effect beside the others. Where files are
            is not among them: photos, prompts and the model's parts are compared by what they hold.
        schedule: ranks and batch per rank may change, if their product does not.
        seed, precision, resolution: of the run, whether the flags name them or not.
    """
    here = (True, "on GPUs") if torch.cuda.is_available() else (True,)
    settings = {
        flag.name: getattr(group, flag.name)
        for group in flags.groups()
        for flag in fields(group)
        if flag.metadata["numbers"] in here and flag not in idle(group)
    }
    chosen = {"seed": seed, "mixed_precision": precision, "resolution": resolution, "lora_alpha": flags.lora.alpha}
    return settings | chosen | {"steps": schedule.steps, "samples per step": schedule.total_batch}


def image_settings(images: list[Photo]) -> dict:
    """Returns what two such runs have to share besides: their prompts, and images with the number of each one's."""
    prompts = list(dict.fromkeys(photo.prompt for photo in images))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    digest = hashlib.sha256()
    for photo in images:
        digest.update(photo.facts.digest + str(numbers[photo.prompt]).encode())
    return {"photos": digest.hexdigest()[:16], "prompts": prompts if len(prompts) <= FEW_PROMPTS else _digest(prompts)}


def _digest(settings: object) -> str:
    """Returns what stands for settings that would be too long to tell."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def find_checkpoint(wanted: str | None, output_dir: Path) -> Checkpoint | None:
    """Returns the checkpoint of --resume_from_checkpoint: the one named, or the newest; None without any.

    To be called on every rank, once rank 0 has entered the output folder.

    Raises:
        UserError: if the one named is missing, broken, or of another program; or if the newest is wanted of a run that
            has come to its end and left none.
    """
    if wanted is None:
        _tell_others(output_dir)
        return None
    folder = from_rank_0(lambda: _folder_to_resume(wanted, output_dir))
    if folder is None:
        return None
    checkpoint = until_found(lambda: _read(folder))
    compare("contents of the checkpoint", lambda: [checkpoint.step, checkpoint.written_at, checkpoint.settings])
    for library, found in versions().items():
        if found != checkpoint.versions.get(library):
            warn(f"{checkpoint.folder} was written with {library} {checkpoint.versions.get(library)}, this is {found}")
    return checkpoint


def _tell_others(output_dir: Path) -> None:
    """Warns of checkpoints of an earlier run, which this one treats as its own ones.

    One that no flag has asked for goes; others go with a limit, or when there is a newer one of their step.
    """
    folders = list_checkpoints(output_dir)
    interim = [folder for folder in folders if _state_of(folder).get("interim")]
    if folders:
        told = "of a run that was cut short" if interim else "of an earlier run"
        goes = "removes it" if interim else "may replace or remove it"
        warn(
            f"{(interim or folders)[-1]} is {told}, and this one, which begins anew, {goes}: "
            "--resume_from_checkpoint latest goes on from it"
        )


def _folder_to_resume(wanted: str, output_dir: Path) -> Path | None:
    """Returns the folder wanted: the newest checkpoint, or that of a path, or of a name in the output folder."""
    if wanted == "latest":
        folders = list_checkpoints(output_dir)
        if not folders and (result := result_in(output_dir)):
            raise UserError(
                f"--resume_from_checkpoint latest: {output_dir} has no checkpoint, but {result}, which a run from the "
                "beginning would replace: leave the flag out for one"
            )
        if not folders:
            others = sorted(path.name for path in output_dir.glob("checkpoint-*"))
            but = f"; {others[0]} is of another program" if others else ""
            warn(f"--resume_from_checkpoint latest: {output_dir} has no checkpoint, starting from the beginning{but}")
        return folders[-1] if folders else None
    folder = Path(wanted)
    return output_dir / folder if not folder.is_dir() and (output_dir / folder).is_dir() else folder


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns this program's checkpoints in a folder, in the order in which they were written.

    That is not that of their steps where a new run was started beside an old one's. One that was not finished has
    another name.
    """
    folders = {path: _state_of(path).get("written_at") for path in output_dir.glob("checkpoint-*")}
    ours = [path for path, written_at in folders.items() if NAME.fullmatch(path.name) and written_at is not None]
    return sorted(ours, key=lambda path: (folders[path], step_of(path)))


def step_of(folder: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(NAME.fullmatch(folder.name)[1])


def _state_of(folder: Path) -> dict:
    """Returns what the state.json of a checkpoint of this program says; of anything else, nothing."""
    try:
        state = dict(json.loads((folder / STATE).read_text()))
        return state if isinstance(state["written_at"], float | int) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def not_ours(folder: Path) -> str | None:
    """Returns what of a checkpoint-N, if it is there, this program did not write, and neither replaces nor removes."""
    if folder.is_symlink():
        return f"{folder.name} is a link"
    if not folder.exists():
        return None
    if not (state := _state_of(folder)):
        return f"{folder.name} was not written by this program"
    try:
        files = files_of(state["files"])
    except (KeyError, TypeError, AttributeError):
        return f"{folder.name} does not list its files, as those of earlier versions do not"
    if others := sorted(_files_in(folder) - files.keys()):
        return f"{folder.name} has files that this program did not write, such as {others[0]}"
    changed = changed_of(folder, files)
    return f"{folder.name}/{changed} is not as this program has written it" if changed else None


def _files_in(folder: Path) -> set[str]:
    """Returns the paths of the files in a checkpoint, but for its state and those that come and go by themselves."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix() for path in files if not path.name.startswith(OF_NFS)}
    return names - {STATE, MARK}


def check_kind(flags: OutputFlags, *, adapters: bool) -> None:
    """Finds checkpoints of the other kind of run, which this one would write over or remove; on rank 0.

    Args:
        flags: name the folder. Where they name a checkpoint in it to go on from, its settings tell more.
        adapters: whether the run trains adapters alone.

    Raises:
        UserError: naming one.
    """
    if not is_rank_0():
        return
    output_dir, wanted = Path(flags.output_dir), flags.resume_from_checkpoint
    if wanted and (wanted == "latest" or same_folder(_folder_to_resume(wanted, output_dir).parent, output_dir)):
        return
    if other := next((path for path in list_checkpoints(output_dir) if (path / LORA).exists() != adapters), None):
        raise UserError(
            f"--output_dir {output_dir} has {other.name} of a run with{'out' * adapters} --lora_rank, which this one "
            "does not replace: choose another --output_dir"
        )


def check_names(output_dir: Path, first_step: int, steps: int) -> None:
    """Finds what stands where a run may write a checkpoint, after `first_step` and up to its last.

    Raises:
        UserError: naming it, if this program did not write it.
    """
    for path in sorted(output_dir.glob("checkpoint-*")):
        if NAME.fullmatch(path.name) and first_step < step_of(path) <= steps and (problem := not_ours(path)):
            raise UserError(
                f"--output_dir {output_dir}: {problem}, and the run would write one of that name: "
                "move it away, or name another folder"
            )


def _read(folder: Path) -> Checkpoint:
    foreign = [name for name in OF_ACCELERATE if (folder / name).exists()]
    if foreign and not _state_of(folder):
        raise UserError(
            f"--resume_from_checkpoint: {folder} is a checkpoint of another program, with accelerate's {foreign[0]}: "
            f"--external_unet_path {folder / 'unet'} starts a run from its UNet"
        )
    try:
        if not folder.is_dir():
            raise OSError("there is no such folder, nor one of that name in --output_dir")
        state = json.loads((folder / STATE).read_text())
        with safe_open(folder / OPTIMIZER, framework="pt"):
            return Checkpoint(folder=folder, **state)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        problem = first_line(error)
        if isinstance(error, SafetensorError):
            problem = f"{OPTIMIZER} is damaged or cut short ({problem})"
        elif isinstance(error, FileNotFoundError) and error.filename:
            problem = f"it has no {Path(error.filename).name}"
        others = list_checkpoints(folder) or [path for path in list_checkpoints(folder.parent) if path != folder]
        hint = f"; {others[-1]} is another" if others else ""
        raise UserError(f"--resume_from_checkpoint: {folder} is not a whole checkpoint: {problem}{hint}") from error


def check_settings(checkpoint: Checkpoint | None, settings: dict, resume_anyway: bool) -> None:
    """Compares settings of this run with those of the run that wrote the checkpoint, if there is one.

    A flag that the checkpoint does not name was not there when it was written: it counts as its default then.

    Raises:
        UserError: naming each that differs, unless `resume_anyway`, and what is trained is the same; or if there is
            nothing left to train.
    """
    if checkpoint is None:
        return
    resumed = f"--resume_from_checkpoint {checkpoint.folder}"
    if settings.get("steps", checkpoint.step) < checkpoint.step:
        raise UserError(
            f"{resumed}: nothing is left to train, it has {checkpoint.step} steps and the run {settings['steps']}: "
            "give more --max_train_steps"
        )
    earlier = settings | {name: value for name, value in defaults().items() if name in settings} | checkpoint.settings
    if settings.get("lr_scheduler") in ENDLESS:
        earlier["steps"] = settings["steps"]  # a longer run begins as a shorter one does
    if earlier.get("lora_alpha") is None:
        earlier["lora_alpha"] = earlier.get("lora_rank")
    now = json.loads(json.dumps(settings))
    differing = [name for name, value in sorted(now.items()) if value != earlier[name]]
    if not differing:
        return
    # Other defaults follow from what is trained, so that a run is not told of them beside that.
    parts = [name for name in differing if name in WHAT_IS_TRAINED]
    told = "; ".join(_told(name, earlier[name], now[name]) for name in parts or differing)
    if parts or not resume_anyway:
        hint = "a run trains the same parts to its end" if parts else "see --resume_anyway"
        raise UserError(f"{resumed}: {told}; {hint}")
    warn(f"--resume_anyway: the run goes on, but not as it would have: {told}")


def _told(name: str, earlier: Any, now: Any) -> str:
    """Returns how a setting differs, in words."""
    if name == "lora_rank" and None in (earlier, now):
        had = (
            "without --lora_rank: leave it out" if earlier is None else f"with --lora_rank {earlier}: give it here too"
        )
        return f"its run was {had}"
    values = now if isinstance(now, list) else [now]
    if values and all(DIGEST.fullmatch(str(one)) for one in values):
        what = "photos, each with its prompt," if name == "photos" else name
        return f"the {what} are not those of its run"
    was, value = ("not given" if one is None else repr(one) for one in (earlier, now))
    return f"{name} was {was} and is {value}"


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that compute."""
    return {library: version(library) for library in LIBRARIES}


def save_checkpoint(
    flags: OutputFlags, settings: dict, training: Training, ranks: Ranks, step: int, *, interim: bool = False
) -> None:
    """Writes checkpoint-N, then removes those beyond --checkpoints_total_limit; to be called on every rank.

    Each rank writes what it holds. An `interim` one, which no flag asks for, goes when there is a later one; until
    then it is one more than the limit.

    Raises:
        RunError: on rank 0, if it cannot be written, or the weights are not finite; earlier ones stay as they are.
        ToldByRank0: then, on the others.
    """
    started = time.monotonic()
    output_dir = Path(flags.output_dir)
    folder = output_dir / f"checkpoint-{step}"
    from_rank_0(lambda: _check_name(folder))
    weights, moments, progress = training.weights(), training.optimizer_state(), training.progress()
    check_finite(weights)
    state = {
        "step": step,
        "adam_step": max(from_all_ranks(progress.adam_step)),
        "lr_scheduler": progress.lr_scheduler,
        "grad_scaler": progress.grad_scaler,
        "settings": settings,
        "versions": versions(),
        "interim": interim,
    }
    size = sum(one.nbytes for one in weights + moments)
    with written_by_all(folder, size) as partial:
        write_trained(partial, training, ranks)
        write_slices(partial / OPTIMIZER, moments, ranks)
        from_rank_0(lambda: _write_state(partial, state))
    if not is_rank_0():
        return
    say(f"checkpoint-{step} saved in {time.monotonic() - started:.1f} s, {readable(size)}")
    remove_interim_checkpoints(output_dir, before=step)
    if flags.checkpoints_total_limit and not interim:
        wanted = [folder for folder in list_checkpoints(output_dir) if not _state_of(folder).get("interim")]
        remove_checkpoints(wanted[: -flags.checkpoints_total_limit])


def _check_name(folder: Path) -> None:
    if problem := not_ours(folder):
        raise RunError(f"cannot write {folder}: {problem}")


def _write_state(folder: Path, state: dict) -> None:
    leave_out_paths(folder)
    # Weights are known by their sizes: their digests would take as long as writing them.
    files = {name: asdict(Written.now(folder / name, read_up_to=PART)) for name in sorted(_files_in(folder))}
    # After all that are there, whatever the clock says: another machine's may be ahead, and one may be put back.
    newest = max((_state_of(other)["written_at"] for other in list_checkpoints(folder.parent)), default=0)
    written_at = max(time.time(), newest + 0.001)
    (folder / STATE).write_text(json.dumps({"written_at": written_at} | state | {"files": files}, indent=1))


def remove_interim_checkpoints(output_dir: Path, before: float = math.inf) -> None:
    """Removes the checkpoints before step `before` that no flag has asked for."""
    states = {folder: _state_of(folder) for folder in list_checkpoints(output_dir)}
    remove_checkpoints(folder for folder, state in states.items() if state.get("interim") and state["step"] < before)


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Removes checkpoints, but for what this program did not write."""
    for folder in folders:
        if problem := not_ours(folder):
            warn(f"{folder} is kept: {problem}")
        else:
            discard(folder)
