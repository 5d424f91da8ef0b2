"""Injects every fault and tries every input that the tests know, and counts what came of it.

    python -m benchmarks.reliability

prints the tables of the README's reliability section, the second one where there are CUDA GPUs. Each row sums up tests
that ran the real scripts; a test that fails is named, and is the exit status.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
KILLS = 10  # of a run
TESTS = (
    "tests/test_faults.py",
    "tests/test_corpus.py",
    "tests/test_gpu.py::test_a_killed_rank_costs_nothing",
    "tests/test_gpu.py::test_a_resumed_run_goes_on_as_it_would_have",
    "tests/test_gpu.py::test_a_run_of_two_gpus_goes_on_on_one",
)


def reported(cases: list[ElementTree.Element], name: str) -> list[list]:
    """Returns what the tests report under a name."""
    found = (case.iterfind(f"properties/property[@name='{name}']") for case in cases)
    return [json.loads(one.get("value")) for of_case in found for one in of_case]


def table(cases: list[ElementTree.Element]) -> str:
    """Returns the counts as Markdown: what the tests of faults report, and how many inputs there were."""
    lines = ["| | tried | resumed | equal to an uninterrupted run, to the bit |", "|---|---|---|---|"]
    sums: dict[str, list[int]] = {}
    for fault, *counts in reported(cases, "fault"):
        sums[fault] = [a + b for a, b in zip(counts, sums.get(fault, [0, 0, 0]), strict=True)]
    for fault, (injected, resumed, equal) in sums.items():
        lines.append(f"| {fault} | {injected} | {resumed or '–'} | {equal if resumed else '–'} |")
    inputs = sum("test_corpus" in case.get("classname") for case in cases)
    return "\n".join([*lines, f"| bad and odd inputs, each with its line or its success | {inputs} | – | – |"])


def gpu_table(cases: list[ElementTree.Element]) -> str:
    """Returns how far the losses of resumed runs were off on GPUs, where there are any; else nothing."""
    differences: dict[tuple[str, str], list[float]] = {}
    for fault, plugin, difference in reported(cases, "on_gpus"):
        differences.setdefault((fault, plugin), []).append(difference)
    if not differences:
        return ""
    lines = ["\n| on CUDA GPUs | plugin | resumed | largest difference of a loss |", "|---|---|---|---|"]
    for (fault, plugin), found in sorted(differences.items()):
        lines.append(f"| {fault} | {plugin} | {len(found)} | {max(found):.1e} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="tests run at a time (default: 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(args.workers), f"--junitxml={report}", *TESTS]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"KILLS": str(KILLS)}, stdout=sys.stderr)
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed = [case for case in cases if all(case.find(tag) is None for tag in ("failure", "error", "skipped"))]
    print(table(passed), gpu_table(passed), sep="\n")
    lost = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    print(f"Lost: {', '.join(lost) or 'nothing'}.")
    if lost or not cases:
        sys.exit(1)


if __name__ == "__main__":
    main()
