"""From words to flags: a parser made of the groups that flags.py declares."""

import argparse
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Sequence

from setproctitle import getproctitle, setproctitle

from dreambooth.command_line.console import UserError, warn
from dreambooth.command_line.flags import NOT_HERE, Flags
from dreambooth.command_line.paths import path
from dreambooth.command_line.rules import problems_of, warnings_of

AnyFlags = typing.TypeVar("AnyFlags", bound=Flags)
# Words that are no flags. argparse's own leaves out 1e-4, and says of it that the flag before has no value.
NEGATIVE_NUMBER = re.compile(r"-\.?\d[\d_.]*(e[+-]?\d+)?$|-inf(inity)?$|-nan$", re.IGNORECASE)
HUB_TOKEN = re.compile(r"hf_\w+")
METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on one rank, as all others."""

    not_here: dict[str, str] = {}  # what to say of flags that other trainers have

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = NEGATIVE_NUMBER

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        missing = None
        try:
            parsed, unknown = self.parse_known_args(args, namespace)
        except UserError as error:
            parsed, unknown = self._without_required(args, namespace)  # what else is wrong raises again
            missing = error
        for word in unknown:
            flag = word.partition("=")[0]
            if reason := self.not_here.get(flag):
                raise UserError(f"{flag}: {reason}")
        strange = f"unrecognized arguments: {' '.join(_without_tokens(unknown))}"
        if unknown and missing:  # often the same flag, mistyped
            raise UserError(f"{strange}; {missing}")
        if unknown:
            self.error(strange)
        if missing:
            raise missing
        return parsed

    def _without_required(self, *words) -> tuple[argparse.Namespace, list[str]]:
        """Returns what `parse_known_args` does where no flag is required."""
        required = [action for action in self._actions if action.required]
        try:
            for action in required:
                action.required = False
            return self.parse_known_args(*words)
        finally:
            for action in required:
                action.required = True


def _without_tokens(words: Sequence[str]) -> list[str]:
    """Returns words without what may be a token of the Hub, such as that of a mistyped --hub_token."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    return [HUB_TOKEN.sub("***", word) for word in (flags if any("token" in flag for flag in flags) else words)]


def number(convert: type, lowest: float, highest: float = math.inf) -> Callable:
    """Returns an argparse type for numbers from `lowest` to `highest`."""
    limits = f"of at least {lowest:g}" + ("" if highest == math.inf else f" and at most {highest:.10g}")

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        # A comparison with NaN is false, and infinity is no setting either.
        if not lowest <= value <= highest or value == math.inf:
            kind = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {limits}")
        return value

    return parse


def true_or_false(text: str) -> bool:
    """Parses true or false, in any case, and nothing else."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


@functools.cache
def build_parser(kind: type[Flags], description: str) -> Parser:
    """Returns a parser of all flags in the groups of `kind`."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir FOLDER --instance_prompt PROMPT ...",
        allow_abbrev=False,
    )
    parser.not_here = {f"--{name}": reason for name, reason in NOT_HERE.items()}
    for field in dataclasses.fields(kind):
        group = parser.add_argument_group(field.type.heading)
        for flag in dataclasses.fields(field.type):
            _add(group, flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: dataclasses.Field) -> None:
    """Adds what a field declares to a parser's group."""
    spec = flag.metadata
    help = f"{spec['help']} (default: {_shown(flag)})"
    if spec["each_of"]:
        for name in spec["each_of"]:
            group.add_argument(f"--{name}", action="store_true", help=help)
        return
    if spec["same_as"]:
        group = group.add_mutually_exclusive_group()
    # A short name comes first.
    names = sorted([f"--{flag.name}", *spec["aliases"]], key=lambda name: name.startswith("--"))
    if flag.default is dataclasses.MISSING:
        group.add_argument(*names, dest=flag.name, required=True, help=spec["help"], **_value(flag))
    else:
        default = None if spec["beside"] else flag.default  # `read` finds out
        group.add_argument(*names, dest=flag.name, default=default, help=help, **_value(flag))
    for name, value in (spec["same_as"] or {}).items():
        group.add_argument(
            f"--{name}",
            action="store_const",
            dest=flag.name,
            const=value,
            default=argparse.SUPPRESS,
            help=f"the same as --{flag.name} {value} (default: off)",
        )


def _shown(flag: dataclasses.Field) -> str:
    """Returns a default as --help has it."""
    if flag.metadata["shown"]:
        return flag.metadata["shown"]
    if flag.default is None:
        return "none"
    if flag.default is False:
        return "off"
    return f"{flag.default:g}".replace("e-0", "e-") if isinstance(flag.default, float) else str(flag.default)


def _value(flag: dataclasses.Field) -> dict:
    """Returns the arguments of `add_argument` that say which words may follow a flag."""
    spec = flag.metadata
    kind = next((one for one in typing.get_args(flag.type) if one is not type(None)), flag.type)  # of one or None
    if kind is bool and spec["alone"] is None:
        return {"action": "store_true"}
    convert = spec["type"] or (true_or_false if kind is bool else kind)
    if spec["limits"]:
        convert = number(kind, *spec["limits"])
    metavar = spec["metavar"]
    if metavar is None and not spec["choices"]:
        metavar = "FOLDER" if convert is path else METAVARS[kind]
    value = {"type": convert, "choices": spec["choices"], "metavar": metavar}
    return value if spec["alone"] is None else value | {"nargs": "?", "const": spec["alone"]}


def read(kind: type[AnyFlags], words: Sequence[str] | None, description: str = "") -> AnyFlags:
    """Returns the flags that words give, each checked by itself.

    Args:
        kind: of the flags.
        words: those of the command line by default.
        description: of the program, for --help.

    Raises:
        UserError: for the first word that is wrong.
    """
    namespace = build_parser(kind, description).parse_args(words)

    def value(flag: dataclasses.Field):
        if each_of := flag.metadata["each_of"]:
            return tuple(name for name in each_of if getattr(namespace, name))
        found, beside = getattr(namespace, flag.name), flag.metadata["beside"]
        if found is None and beside:
            return next((value for name, value in beside.items() if getattr(namespace, name)), flag.default)
        return found

    groups = dataclasses.fields(kind)
    return kind(
        **{one.name: one.type(**{flag.name: value(flag) for flag in dataclasses.fields(one.type)}) for one in groups}
    )


def check(kind: type[AnyFlags], words: Sequence[str] | None, description: str = "") -> AnyFlags:
    """Returns the flags that words give, as `read`, and checked against each other.

    It takes no library that takes time to import.

    Raises:
        UserError: naming every flag that has to change.
    """
    flags = read(kind, words, description)
    if problems := problems_of(flags):
        raise UserError("; ".join(problems))
    return flags


def parse(kind: type[AnyFlags], words: Sequence[str] | None, description: str = "") -> AnyFlags:
    """Returns the flags of a run, as `check`; warns of those without an effect, and hides a token.

    Raises:
        UserError: as `check` does.
    """
    flags = check(kind, words, description)
    for warning in warnings_of(flags):
        warn(warning)
    if token := flags.output.hub_token:
        warn("--hub_token is kept by the shell's history and shown by torchrun's process: HF_TOKEN is not")
        setproctitle(getproctitle().replace(token, "***"))
    return flags
