"""Writes requirements.txt, a list of pinned versions, from the pyproject.toml beside this, or checks that it is of it.

    python requirements/freeze.py            # needs uv: pip install uv
    python requirements/freeze.py --check    # needs nothing, not even the network

Versions that the list has already are kept where they serve; `--upgrade` takes the newest. The list says in its head
what it was made from. cuda12.txt is written by hand: there pip finds the versions by itself.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE, LIST = HERE / "pyproject.toml", HERE.parent / "requirements.txt"
OLDEST_PYTHON = "3.11"


def head() -> str:
    """Returns the comment above the list, with a digest of what it is made from."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    return (
        "# pip install --no-deps -r requirements.txt\n"
        f"# Made by requirements/freeze.py from requirements/pyproject.toml (SHA-256 {digest})\n"
    )


def freeze(upgrade: bool) -> None:
    """Writes the list, as uv resolves it."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.txt")
        if LIST.exists() and not upgrade:
            made.write_text(LIST.read_text())  # whose versions uv keeps
        words = ["--quiet", "--universal", "--python-version", OLDEST_PYTHON, "--no-annotate", "--no-header"]
        words += ["--no-emit-index-url", "--output-file", made, "pyproject.toml"]
        subprocess.run([sys.executable, "-m", "uv", "pip", "compile", *words], cwd=SOURCE.parent, check=True)
        lines = [line for line in made.read_text().splitlines() if not line.startswith("#")]
    # Each line has that condition, and Linux is all there is here.
    lines = [line.replace(" and sys_platform == 'linux'", "") for line in lines]
    lines = [line.removesuffix(" ; sys_platform == 'linux'") for line in lines]
    LIST.write_text(head() + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the list is not of its source")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that serve")
    args = parser.parse_args()
    if not args.check:
        freeze(args.upgrade)
    elif not LIST.read_text().startswith(head()):
        sys.exit(f"{LIST.name} is not of requirements/{SOURCE.name} as it is now: run this to make it")


if __name__ == "__main__":
    main()
