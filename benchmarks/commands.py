"""Times whole commands as a user types them, and beside each the same work done by diffusers' own DreamBooth script.

    python -m benchmarks.commands --peer diffusers/examples/dreambooth/train_dreambooth.py --output commands

writes a table to commands.md and all figures to commands.json. Each command runs from the start of its process to the
end, with the flags that the README prints and few others, on a model of Stable Diffusion 1.4's shape with random
weights at 512 px, with prior preservation, on JPEGs of 3 : 4 as of a phone. The class images are there already, but in
one command that is a first run and draws them. With `--shape stable-diffusion-xl --resolution 1024` there are fewer
commands. Those that do the same work take turns. The peer's scripts are no part of the project: without --peer there
are no speed-ups. LoRA's lie beside it. A command that fails is told in its row, and is the exit status.

Without a GPU the model is a tiny one and the steps are few, which shows that the benchmark works, and nothing about
speed.
"""

from dreambooth.command_line.console import before_imports, run_program

before_imports(__name__)

import argparse
import functools
import importlib.util
import itertools
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.card_memory import CardMemory
from benchmarks.photos import image_folder
from benchmarks.report import Report
from benchmarks.runs import base_flags, build_parser, in_a_folder, output_dir_of_its_own, side_by_side_flag
from benchmarks.shares import Job, Share, carry_out, shares
from dreambooth.model.folder import family_of
from dreambooth.model.precision import choose_precision
from dreambooth.model.stable_diffusion_xl import STABLE_DIFFUSION_XL

COLOSSALAI, TRADITIONAL = "train_dreambooth_colossalai.py", "train_dreambooth.py"
LAUNCHERS = {
    "python": [],
    # Of several GPUs accelerate would take all, and without the other two it warns.
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    + ["--dynamo_backend", "no"],
}
# Class images that the README's command asks for; fewer where a run does not come to see so many.
CLASS_IMAGES, FEWEST_CLASS_IMAGES = 200, 8
SPAN, FEWEST_STEPS = 10, 4  # steps; see seconds_per_step
LOG_KEPT = 6000  # characters of what a failed command said


@dataclass(frozen=True)
class Command:
    """A command that is timed.

    Args:
        name: for --only.
        launcher: a key of LAUNCHERS.
        script: a file; relative to the project.
        batch, steps, photos: how many.
        draws: whether it draws its class images first, as the first run in a folder does.
        switches: further flags, which the peer has too.
        own: further flags that it lacks.
        peer_own: and the peer's that this one lacks.
        peer_script: the peer's for the same work, beside the one that --peer names; None is that one.
        is_peer: whether it is the peer's.
    """

    name: str
    launcher: str
    script: str
    batch: int = 1
    steps: int = 400
    photos: int = 5
    draws: bool = False
    switches: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    peer_own: tuple[str, ...] = ()
    peer_script: str | None = None
    is_peer: bool = False

    @property
    def work(self) -> tuple:
        """What is done; commands that do the same are compared."""
        return self.batch, self.steps, self.photos, self.draws, self.switches, self.peer_script

    @property
    def class_images(self) -> int:
        """How many there are: whole batches, as the peer would make a smaller one of what is left over."""
        used = min(self.steps * self.batch, CLASS_IMAGES)
        return max(used // self.batch, -(-FEWEST_CLASS_IMAGES // self.batch)) * self.batch

    @property
    def shown(self) -> str:
        """What the table calls it."""
        # Where its weights lie is the trainer's default, and printed by the README nevertheless.
        words = [Path(self.script).name, *self.switches, *(word for word in self.own if word != CUDA[0])]
        drawn = f" (draws {self.class_images} class images)" if self.draws else ""
        return ("peer: " if self.is_peer else "") + " ".join(words) + drawn


CUDA = ("--placement=cuda",)
CHECKPOINTING = "--gradient_checkpointing"
LITTLE_MEMORY = ("--use_8bit_adam", CHECKPOINTING)
_LORA = Command(
    "colossalai-lora",
    "python",
    COLOSSALAI,
    own=(*CUDA, "--lora_rank=16"),
    peer_own=("--rank=16",),
    peer_script="train_dreambooth_lora.py",
)
COMMANDS = (
    Command("colossalai", "python", COLOSSALAI, own=CUDA),
    Command("colossalai-first-run", "python", COLOSSALAI, draws=True, own=CUDA),
    Command("colossalai-800", "python", COLOSSALAI, steps=800, own=CUDA),
    Command("colossalai-batch-4", "python", COLOSSALAI, batch=4, own=CUDA),
    Command("colossalai-batch-16", "python", COLOSSALAI, batch=16, steps=100, photos=16, own=CUDA),
    Command("colossalai-little-memory", "python", COLOSSALAI, steps=100, switches=LITTLE_MEMORY, own=CUDA),
    _LORA,
    Command("traditional", "python", TRADITIONAL),
    Command("traditional-800", "python", TRADITIONAL, steps=800),
)
# Diffusers trains no whole UNet of Stable Diffusion XL.
_LORA_OF_XL = replace(_LORA, steps=100, peer_script="train_dreambooth_lora_sdxl.py")
COMMANDS_OF_XL = (
    _LORA_OF_XL,
    replace(_LORA_OF_XL, name="colossalai-lora-checkpointing", switches=(CHECKPOINTING,)),
)
COLUMNS = (
    "command",
    "batch",
    "steps",
    "s per step",
    "whole command s",
    "until the first step s",
    "after the last s",
    "not steps s",
    "peak of the card GiB",
    "speed-up per step",
    "speed-up of the whole",
)


def checked_peer(path: Path, parser: argparse.ArgumentParser) -> str:
    """Returns the release of diffusers that the peer's script asks for.

    A file that asks for none is refused: another trainer under that name, this project's for one, would be no peer.
    """
    try:
        asked = re.search(r"^check_min_version\(\"(.+)\"\)", path.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--peer: {error}")
    if asked is None:
        parser.error(f"--peer: {path} does not call check_min_version, as diffusers' own script does")
    return asked[1]


def plan(commands: list[Command], peer: Path | None) -> list[list[Command]]:
    """Returns groups of commands that do the same work, with the peer's last if there is one."""
    groups: dict[tuple, list[Command]] = {}
    for command in commands:
        groups.setdefault(command.work, []).append(command)
    if peer:
        launcher = "accelerate" if importlib.util.find_spec("accelerate.commands.launch") else "python"
        for group in groups.values():
            script = peer.with_name(group[0].peer_script or peer.name).absolute()
            name = f"peer {group[0].work}"  # whichever commands are compared with it
            peers = replace(
                group[0], name=name, launcher=launcher, script=str(script), own=group[0].peer_own, is_peer=True
            )
            group.append(peers)
    return list(groups.values())


def words_of(command: Command, flags: dict) -> list[str]:
    """Returns the words of a command, the interpreter first.

    Args:
        command: which.
        flags: of every run (see base_flags). Images are beside their photos, for all; those that the command itself
            is to draw will be beside its output folder.
    """
    resolution, folder = flags["resolution"], Path(flags["instance_data_dir"]).parent
    if command.draws:
        class_data_dir = flags["output_dir"].with_name("class_images")
    else:
        class_data_dir = image_folder(folder, command.class_images, resolution, resolution)
    of_run = {
        "instance_data_dir": image_folder(folder, command.photos, 3 * resolution, 4 * resolution),
        "class_data_dir": class_data_dir,
        "class_prompt": "a photo of dog",
        "num_class_images": command.class_images,
        "prior_loss_weight": 1.0,
        "train_batch_size": command.batch,
        "max_train_steps": command.steps,
    }
    if command.is_peer and torch.cuda.is_available():
        of_run["mixed_precision"] = choose_precision(None)  # which is what the project's trainers take unasked
    valued = [f"--{name}={value}" for name, value in (flags | of_run).items()]
    launched = [sys.executable, *LAUNCHERS[command.launcher], command.script]
    return [*launched, "--with_prior_preservation", *valued, *command.switches, *command.own]


def reason(log: str) -> str:
    """Returns the line of a failed command's log that says why, or nothing."""
    for line in log.splitlines():
        if found := re.search(r": error: (.+)", line):
            return found[1]
        # Launchers add exceptions of their own, after the program's.
        if found := re.match(r"(?:\[rank0\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", line):
            return found[1]
    return ""


def step_ends(output_dir: Path) -> list[float]:
    """Returns when each step's loss was logged to TensorBoard, in seconds; both programs log it in every step."""
    for file in sorted(output_dir.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "loss" in events.Tags()["scalars"]:
            return [point.wall_time for point in events.Scalars("loss")]
    return []


def seconds_per_step(ends: list[float]) -> float:
    """Returns the median time of a step in the second half of a run, from when steps were logged.

    Times are taken over spans of several steps: a program may log a step when the next one is under way, and two at
    once. The median leaves out what does not belong to steps, such as a checkpoint.
    """
    later = ends[len(ends) // 2 :]
    span = min(SPAN, len(later) - 1)
    return statistics.median((end - start) / span for start, end in zip(later, later[span:], strict=False))


def run_command(command: Command, share: Share, flags: dict, limit_s: float) -> dict:
    """Runs a command once, and removes what it has written.

    Returns:
        "seconds_per_step", "whole_s", what of it is over when the first step is logged, "first_step_s", and what is
        to come when the last is, "after_steps_s"; "peak_gib", None without a GPU. Or "failed", with the reason.
    """
    with output_dir_of_its_own(flags) as flags:
        output_dir, log = flags["output_dir"], flags["output_dir"].with_suffix(".log")
        words = words_of(command, flags)  # draws the images, if they are not there
        with log.open("w") as sink, CardMemory(share.gpus) as memory:
            started, started_at = time.perf_counter(), time.time()
            try:
                status = share.run(words, limit_s, stdout=sink, stderr=sink).returncode
            except subprocess.TimeoutExpired:
                status = None
            whole_s, ended_at = time.perf_counter() - started, time.time()
        said = log.read_text(errors="replace")
        if status != 0:
            why = reason(said) or f"exit status {status}" if status else f"not finished after {limit_s:.0f} s"
            return {"failed": why, "log": said[-LOG_KEPT:]}
        ends = step_ends(output_dir)
        if len(ends) != command.steps:
            return {"failed": f"logged {len(ends)} steps of {command.steps}", "log": said[-LOG_KEPT:]}
        around = {"first_step_s": ends[0] - started_at, "after_steps_s": ended_at - ends[-1]}
        return {"seconds_per_step": seconds_per_step(ends), "whole_s": whole_s, "peak_gib": memory.peak_gib} | around


def summarize(runs: list[dict]) -> dict:
    """Returns the figures of a command over its turns, each as median, least and most; or "failed"."""
    failed = next((run["failed"] for run in runs if "failed" in run), None)
    if failed or not runs:
        return {"failed": failed or "not run"}
    measured = "seconds_per_step", "whole_s", "first_step_s", "after_steps_s", "peak_gib"
    columns = {name: [run.get(name) for run in runs] for name in measured}
    columns["not_steps_s"] = [run["whole_s"] - run["steps"] * run["seconds_per_step"] for run in runs]
    return {
        name: (statistics.median(values), min(values), max(values))
        for name, values in columns.items()
        if None not in values
    }


def table(groups: list[list[Command]], rows: list[dict]) -> str:
    """Returns the rows of the commands as Markdown: medians, in brackets the least and the most of several turns."""

    def cell(figures: dict, name: str, digits: int) -> str:
        if name not in figures:
            return "–"
        median, least, most = (f"{value:.{digits}f}" for value in figures[name])
        return median if least == most else f"{median} ({least}–{most})"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for group in groups:
        found = {command: summarize([row for row in rows if row["name"] == command.name]) for command in group}
        peer = next((found[command] for command in group if command.is_peer), {})
        for command in group:
            figures = found[command]
            cells = [command.shown, str(command.batch), str(command.steps)]
            if "failed" in figures:
                why = figures["failed"]
                cells += [why if why == "not run" else f"failed: {why}".replace("|", "/")]
                cells += ["–"] * (len(COLUMNS) - len(cells))
            else:
                cells += [cell(figures, "seconds_per_step", 3)]
                others = "whole_s", "first_step_s", "after_steps_s", "not_steps_s", "peak_gib"
                cells += [cell(figures, name, 1) for name in others]
                for name in ("seconds_per_step", "whole_s"):
                    cells += [f"{peer[name][0] / figures[name][0]:.2f}" if name in peer else "–"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def outcome(row: dict) -> str:
    """Returns what became of a run, in a line; with what it said at the end if it failed."""
    start = f"{row['name']}, turn {row['turn']}: "
    if "failed" in row:
        return f"{start}failed: {row['failed']}\n{row['log']}"
    peak = "" if row["peak_gib"] is None else f", {row['peak_gib']:.1f} GiB"
    return f"{start}{row['seconds_per_step']:.3f} s per step, {row['whole_s']:.1f} s in all{peak}"


def parsed() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Returns what was typed, and the parser, for what is wrong with it only later."""
    names = list(dict.fromkeys(command.name for command in (*COMMANDS, *COMMANDS_OF_XL)))
    parser = build_parser(__doc__, steps=None if torch.cuda.is_available() else 6, learning_rate=5e-6, limit=1200)
    parser.add_argument(
        "--peer",
        type=Path,
        help="diffusers' examples/dreambooth/train_dreambooth.py, of the release that is installed (default: none)",
    )
    parser.add_argument("--turns", type=int, default=2, help="runs of each command (default: 2)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="names of commands (default: all)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the runs of an earlier OUTPUT.json and add those that it lacks (default: off)",
    )
    side_by_side_flag(parser)
    parser.add_argument("--output", type=in_a_folder, default=Path("commands"), help="files to write, without suffix")
    args = parser.parse_args()
    for name, least in (("turns", 1), ("steps", FEWEST_STEPS)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value} is less than {least}")
    return args, parser


def commands_for(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Command]:
    """Returns the commands that suit the model."""
    is_xl = family_of(Path(args.model)) is STABLE_DIFFUSION_XL if args.model else args.shape.endswith("xl")
    commands = [replace(one, steps=args.steps or one.steps) for one in (COMMANDS_OF_XL if is_xl else COMMANDS)]
    if not any(one.name in args.only for one in commands):
        parser.error(f"--only: for this model there is {', '.join(one.name for one in commands)}")
    return commands


def main() -> None:
    args, parser = parsed()
    commands = commands_for(args, parser)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    libraries = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    facts = {
        "title": f"{device}, {libraries}, {args.resolution} px",
        "settings": {name: getattr(args, name) for name in ("steps", "learning_rate")}
        | {"model": Path(args.model or args.shape).name}
        | {"peer": f"for diffusers {checked_peer(args.peer, parser)}" if args.peer else None},
        "rows": [],
    }
    groups = plan([one for one in commands if one.name in args.only], args.peer)

    def shown(facts: dict) -> str:
        there = {*args.only, *(row["name"] for row in facts["rows"])}
        return table(plan([one for one in commands if one.name in there], args.peer), facts["rows"])

    planned = [known_by(command, turn) for group in groups for command, turn in turns(group, args.turns)]
    report = Report(args.output, facts, planned, shown)
    report.begin(parser, resume=args.resume)
    with base_flags(args) as flags:
        for command in itertools.chain(*groups):
            words_of(command, flags)  # draws the images
        if len(report.rows) < len(planned):
            run_command(warm_up(commands[0]), shares()[0], flags, args.limit)  # if it fails, so will others
        jobs = [Job(1, functools.partial(measure, report, group, flags, args)) for group in groups]
        carry_out(jobs, shares(), side_by_side=args.side_by_side)
    print(shown(facts))
    if any("failed" in row for row in report.rows):
        sys.exit(1)


def warm_up(command: Command) -> Command:
    """Returns a short run of a command, to go before all that are timed; it fills no cache of kernels.

    The first program on a machine reads from its disk what all of them use, and none is to pay for that alone.
    """
    return replace(command, steps=FEWEST_STEPS, own=(*command.own, "--cuda_graphs=off"))


def turns(group: list[Command], count: int) -> Iterator[tuple[Command, int]]:
    """Yields commands that do the same work as they run: in turns, each so many times."""
    for turn, command in itertools.product(range(1, count + 1), group):
        yield command, turn


def known_by(command: Command, turn: int) -> dict:
    """Returns what a row of the report is known by."""
    return {"name": command.name, "turn": turn}


def measure(report: Report, group: list[Command], flags: dict, args: argparse.Namespace, share: Share) -> None:
    """Adds what the report lacks of commands that do the same work."""
    for command, turn in turns(group, args.turns):
        has_failed = any(row["name"] == command.name and "failed" in row for row in report.rows)
        if has_failed or report.find(known_by(command, turn)):  # one that has failed would fail again
            continue
        row = known_by(command, turn) | {"batch": command.batch, "steps": command.steps, "machine": platform.node()}
        row |= {"command": shlex.join(words_of(command, flags))} | run_command(command, share, flags, args.limit)
        report.note(row, outcome(row))


if __name__ == "__main__":
    run_program(main, Path(__file__).name)  # which cleans up after Ctrl-C
