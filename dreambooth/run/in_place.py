"""A new result takes the place of an earlier one in the output folder: all of it, or nothing, also where it is killed.

The earlier one's files go into a folder aside, with a note of what is under way; a later start ends what was begun.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dreambooth.command_line.console import RunError
from dreambooth.command_line.paths import flush
from dreambooth.run.folders import beside, discard, written_whole
from dreambooth.run.listing import LAST, LISTING, changed_of, is_inside, link_in, pipeline_files

# A folder with the earlier files while others take their place, and a file in it that says which.
ASIDE, CHANGE = "aside", "change.json"


def put_in_place(staged: Path, output_dir: Path) -> None:
    """Moves the files of a whole pipeline to where they belong, and those of the earlier one out of their way.

    The index, or the adapters' own file, goes first and comes last: a folder that has it is whole. Until then all can
    be taken back.

    Raises:
        OSError: if it cannot be done; then the earlier pipeline is back, and the new one whole in `staged`.
    """
    files = pipeline_files(output_dir)
    if changed := changed_of(output_dir, files):
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
        settle(aside)


def _index_first(files: Iterable[str]) -> list[str]:
    """Returns the files of a pipeline, and their listing, in the order in which they go."""
    return sorted([*files, LISTING] if files else [], key=lambda name: (name not in LAST, name))


def _move(name: str, source: Path, target: Path) -> None:
    """Moves a file, if it is there, to the same place in another folder, where there is none."""
    if not os.path.lexists(source / name):
        return
    for folder in (source, target):
        if link := link_in(folder, name):
            raise OSError(f"{folder / link} is a link")
    if os.path.lexists(target / name):
        raise OSError(f"{target / name} is there, and not of an earlier pipeline of this program")
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    os.rename(source / name, target / name)


def settle(aside: Path) -> Path | None:
    """Ends a change of pipelines, begun by this process or by one that was killed.

    The new pipeline stays if all of it is in place, and the earlier one goes. Else each goes back to where it was.

    Returns:
        Where the new pipeline is, if not in its place.
    """
    output_dir = aside.parent
    try:
        change = json.loads((aside / CHANGE).read_text())
        staged, new, earlier = output_dir / change["staged"], change["new"], change["earlier"]
        if staged.parent != output_dir or staged.name == os.pardir or not all(map(is_inside, new + earlier)):
            return None
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
