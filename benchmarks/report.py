"""What a benchmark leaves: a table and all its figures, written after each run, and taken up by a later one."""

import argparse
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path


class Report:
    """The rows that have been measured; threads may add to it.

    Args:
        output: of the files, without suffix.
        facts: "title", "settings", and the empty "rows"; what else there is goes into the file.
        planned: for each row to come, in the order of the table, what it is known by.
        table: returns the facts as Markdown.
        chart: file of the same figures that the benchmark draws; None if it draws none.
    """

    def __init__(
        self,
        output: Path,
        facts: dict,
        planned: Sequence[dict],
        table: Callable[[dict], str],
        chart: Path | None = None,
    ):
        self.facts, self.planned, self.table = facts, list(planned), table
        self.figures, self.written, self.chart = output.with_suffix(".json"), output.with_suffix(".md"), chart
        self._earlier, self._lock = 0, threading.Lock()

    @property
    def rows(self) -> list[dict]:
        return self.facts["rows"]

    def begin(self, parser: argparse.ArgumentParser, *, resume: bool) -> None:
        """Tells where the files go, in whose place there may only be those of an earlier report.

        Args:
            parser: for what is wrong.
            resume: whether to take over what an earlier run under the same conditions has left.
        """
        earlier = self._earlier_facts(parser, "resume" if resume else "output")
        there = [file for file in (self.written, self.chart) if file is not None and file.exists()]
        if there and not earlier:
            told = "nothing tells that it is a table of an earlier run, or its chart"
            parser.error(f"--output: {there[0]} is there, and {told}")
        if self.written in there and not self.written.read_bytes().startswith(f"{earlier['title']}\n".encode()):
            parser.error(f"--output: {self.written} is not the table of {self.figures}")
        if earlier and resume:
            self._take_over(earlier, parser)
        print(f"the table goes to {self.written}, and all figures to {self.figures}", flush=True)

    def _earlier_facts(self, parser: argparse.ArgumentParser, flag: str) -> dict | None:
        """Returns what an earlier report has written; None if there is none. `flag` is the one to blame."""
        if not self.figures.exists():
            return None
        try:
            earlier = json.loads(self.figures.read_text())
            rows = [row | {name: tuple(row[name]) for name in ("switches",) if name in row} for row in earlier["rows"]]
            return earlier | {"title": earlier["title"], "rows": rows}
        except (OSError, ValueError, TypeError, KeyError):
            parser.error(f"--{flag}: {self.figures} is not what this command writes")

    def _take_over(self, earlier: dict, parser: argparse.ArgumentParser) -> None:
        """Adds the rows of an earlier report, but those that failed."""
        for name in ("title", "settings"):
            if earlier.get(name) != self.facts[name]:
                parser.error(f"--resume: {self.figures} is of {earlier.get(name)}, this run of {self.facts[name]}")
        rows = [row for row in earlier["rows"] if not {"failed", "bare_failed"} & row.keys()]
        self.facts |= earlier | {"rows": rows}
        self._earlier = len(self.rows)

    def find(self, known_by: dict) -> dict | None:
        """Returns the row that is known by this, if it is there."""
        return next((row for row in self.rows if row | known_by == row), None)

    def note(self, row: dict, told: str) -> None:
        """Adds a row, or what it has been given if it is there; tells it, and writes the files.

        A benchmark that is cut short leaves what it has measured.
        """
        with self._lock:
            if not any(one is row for one in self.rows):
                self.rows.append(row)
            self.rows[self._earlier :] = sorted(self.rows[self._earlier :], key=self._place)
            print(told, flush=True)
            table = self.table(self.facts)
            self.figures.write_text(json.dumps(self.facts, indent=1))
            self.written.write_text(f"{self.facts['title']}\n\n{table}\n")

    def _place(self, row: dict) -> int:
        return next(place for place, known_by in enumerate(self.planned) if row | known_by == row)
