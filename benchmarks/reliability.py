"""Injects every fault and tries every input that the tests know, and counts what came of it.

    python -m benchmarks.reliability

prints the table of the README's reliability section. Each row sums up tests that ran the real scripts; a test that
fails is named, and is the exit status.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FAULTS, INPUTS = "tests/test_faults.py", "tests/test_corpus.py"


def table(cases: list[ElementTree.Element]) -> str:
    """Returns the counts as Markdown: what the tests of faults report, and how many inputs there were."""
    lines = ["| | tried | resumed | equal to an uninterrupted run, to the bit |", "|---|---|---|---|"]
    sums: dict[str, list[int]] = {}
    for case in cases:
        for found in case.iterfind("properties/property[@name='fault']"):
            fault, *counts = json.loads(found.get("value"))
            sums[fault] = [a + b for a, b in zip(counts, sums.get(fault, [0, 0, 0]), strict=True)]
    for fault, (injected, resumed, equal) in sums.items():
        lines.append(f"| {fault} | {injected} | {resumed or '–'} | {equal if resumed else '–'} |")
    inputs = sum("test_corpus" in case.get("classname") for case in cases)
    return "\n".join([*lines, f"| bad and odd inputs, each with its line or its success | {inputs} | – | – |"])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", FAULTS, INPUTS]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed = [case for case in cases if all(case.find(tag) is None for tag in ("failure", "error", "skipped"))]
    print(table(passed))
    lost = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    print(f"\nLost: {', '.join(lost) or 'nothing'}.")
    if lost or not cases:
        sys.exit(1)


if __name__ == "__main__":
    main()
