"""The folders of the package are rooms, and a room imports only those before it."""

import ast
from pathlib import Path

import pytest
from harness import ROOT

ROOMS = ("command_line", "processes", "model", "data", "engine", "run")
FILES = sorted((ROOT / "dreambooth").rglob("*.py"))


def rooms_imported(file: Path) -> set[str]:
    """Returns the rooms that a file imports from, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name and name.startswith("dreambooth.")}
    return found


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_a_room_imports_only_those_before_it(file):
    room = file.parent.name
    if room == "dreambooth":
        assert not rooms_imported(file)
    else:
        assert rooms_imported(file) <= set(ROOMS[: ROOMS.index(room) + 1])


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_is_for(room):
    text = ast.get_docstring(ast.parse((ROOT / "dreambooth" / room / "__init__.py").read_text()))
    assert "mport" in text, "what it may import"
