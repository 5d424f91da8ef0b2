"""Writes the lists of pinned versions from what the project asks for, or checks that they are of it.

    python requirements/freeze.py            # needs uv: pip install uv
    python requirements/freeze.py --check    # needs nothing, not even the network

requirements.txt is made from today/pyproject.toml, cuda12.txt from cuda12/pyproject.toml. Versions that a list has
already are kept where they serve; `--upgrade` takes the newest. Each list says in its head what it was made from.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Pinned:
    """A list of pinned versions.

    Args:
        path: of the list.
        source: the pyproject.toml that it is made from.
        python: the oldest release that it is for.
        command: that installs it.
    """

    path: Path
    source: Path
    python: str
    command: str

    @property
    def head(self) -> str:
        """The comment above the list, with a digest of what it is made from."""
        digest = hashlib.sha256(self.source.read_bytes()).hexdigest()[:16]
        source = self.source.relative_to(HERE.parent)
        return f"# {self.command}\n# Made by requirements/freeze.py from {source} (SHA-256 {digest})\n"

    def make(self, upgrade: bool) -> None:
        """Writes the list, as uv resolves it."""
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "made.txt")
            if self.path.exists() and not upgrade:
                made.write_text(self.path.read_text())  # whose versions uv keeps
            words = ["--quiet", "--universal", "--python-version", self.python, "--no-annotate", "--no-header"]
            words += ["--no-emit-index-url", "--output-file", made, "pyproject.toml"]
            subprocess.run([sys.executable, "-m", "uv", "pip", "compile", *words], cwd=self.source.parent, check=True)
            lines = [line for line in made.read_text().splitlines() if not line.startswith("#")]
        # Each line has that condition, and Linux is all there is here.
        lines = [line.replace(" and sys_platform == 'linux'", "") for line in lines]
        lines = [line.removesuffix(" ; sys_platform == 'linux'") for line in lines]
        self.path.write_text(self.head + "\n".join(lines) + "\n")


LISTS = (
    Pinned(
        HERE.parent / "requirements.txt",
        HERE / "today" / "pyproject.toml",
        "3.11",
        "pip install --no-deps -r requirements.txt",
    ),
    Pinned(
        HERE / "cuda12.txt",
        HERE / "cuda12" / "pyproject.toml",
        "3.10",
        "pip install --no-deps -r requirements/cuda12.txt",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a list is not of its source")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that serve")
    args = parser.parse_args()
    for pinned in LISTS:
        if not args.check:
            pinned.make(args.upgrade)
        elif not pinned.path.read_text().startswith(pinned.head):
            sys.exit(f"{pinned.path.name} is older than {pinned.source.parent.name}/pyproject.toml: run this")


if __name__ == "__main__":
    main()
