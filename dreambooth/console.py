"""What a person sees on the terminal: one line for an error, once, and no noise from libraries."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

# How long a rank other than 0 waits for rank 0 to tell the same error. torchrun ends it as soon as rank 0 has left.
RANK_0_SPEAKS_FIRST_S = 10


def one_line(text: str) -> str:
    """Returns text with its control characters and line ends escaped: names of files may have any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """Something that the user can mend: the message, one line, names the flag or file, what was found, what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def is_rank_0() -> bool:
    """Whether this process is the one that prints; known before any process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if is_rank_0():
        print(message, flush=True)


def warn(message: str) -> None:
    """Prints a warning on rank 0: a flag without an effect, a prompt that is cut."""
    if is_rank_0():
        print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def run(main: Callable[[], None], program: str) -> None:
    """Runs `main`; a UserError becomes one line on stderr and exit status 2.

    Most such errors meet every rank alike: rank 0 tells them, and a launcher such as torchrun then ends the
    others. An error that only another rank has is told by that rank once rank 0 had its chance.
    """
    try:
        main()
    except UserError as error:
        if not is_rank_0():
            time.sleep(RANK_0_SPEAKS_FIRST_S)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: a library's exit handler may wait for ranks that wait for this one.
        os._exit(2)


def quiet_libraries() -> None:
    """Keeps warnings out of sight that a user of the trainers can do nothing about; call it before the imports."""
    # Deprecations inside torch, diffusers, transformers and ColossalAI, among the versions pinned here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(colossalai|torch|transformers|diffusers)\b")
    # Of EXIF data that is passed over, and of photos above 89 megapixels.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    for library in ("accelerate", "bitsandbytes", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # These two set the levels of their loggers when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
