"""What a person sees on the terminal: one line for an error, once, and no noise from libraries."""

import atexit
import contextlib
import errno
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

from tqdm import tqdm

from dreambooth.command_line.imports import put_off, put_off_no_more

# How long a rank waits for another one to tell an error.
OTHERS_SPEAK_FIRST_S = 5
# How long one that has no error of its own lets the others leave first: torchrun takes the first to leave for the
# cause, and then ends all that are left.
OTHERS_LEAVE_FIRST_S = 30
# How often a log gets a line of progress.
LOGGED_EVERY_S = 30
STOPPED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
# Errors of a disk, of which a library may not say which file it was about.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_succeeded = threading.Event()  # set once this program's `main` has returned


def one_line(text: str) -> str:
    """Returns text with its control characters and line ends escaped: names of files may have any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_utf_8(text: str) -> bool:
    """Whether text can be written as UTF-8: a word of the command line that is not has surrogates in it."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_blank(text: str) -> bool:
    """Whether text has nothing in it that could be seen."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def first_line(error: Exception) -> str:
    """Returns the first line of what a library says, or the kind of error where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def counted(number: int, noun: str) -> str:
    """Returns a number of things in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class UserError(ValueError):
    """Something that the user can mend: the message, one line, names the flag or file, what was found, what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))

    status = 2


class RunError(UserError):
    """Something that went wrong during the run, after the settings had been found good."""

    status = 1


class Stopped(Exception):
    """The run ends early because it was asked to; the message says how to go on."""


class ToldByRank0(Exception):
    """Ends another rank quietly, because of an error that rank 0 has told; the argument is the exit status."""


def is_rank_0() -> bool:
    """Whether this process is the one that prints; known before any process group exists."""
    return os.environ.get("RANK", "").strip("0") == ""


def say(message: str) -> None:
    """Prints a line on rank 0, above a progress bar if there is one."""
    if is_rank_0():
        with unless_nobody_listens():
            tqdm.write(message)
            sys.stdout.flush()


def warn(message: str) -> None:
    """Prints a warning on rank 0: a flag without an effect, a prompt that is cut."""
    if is_rank_0():
        _to_stderr(f"warning: {one_line(message)}")


def unless_nobody_listens() -> contextlib.AbstractContextManager[None]:
    """Within it what cannot be printed is left unsaid: a terminal may be closed, or the log's disk be full.

    A run goes on, and ends as it would have.
    """
    return contextlib.suppress(OSError)


def _to_stderr(line: str) -> None:
    with unless_nobody_listens():
        print(line, file=sys.stderr, flush=True)


class _LineByLine:
    """A stream into a log: what would go over the line before on a terminal becomes a line of its own."""

    def __init__(self):
        self.last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:  # when a bar is closed, it writes what it has just written
            with unless_nobody_listens():
                sys.stderr.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        with unless_nobody_listens():
            sys.stderr.flush()


def progress(total: int, *, desc: str, unit: str, initial: int = 0, shown: bool = True) -> tqdm:
    """Returns a progress bar on standard error; where that is no terminal, a line every LOGGED_EVERY_S seconds.

    The environment's TQDM_MININTERVAL sets other seconds.
    """
    bar = {"total": total, "desc": desc, "unit": unit, "initial": initial, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**bar)
    every = float(os.environ.get("TQDM_MININTERVAL", LOGGED_EVERY_S))
    return tqdm(**bar, file=_LineByLine(), mininterval=every, maxinterval=math.inf, miniters=1, ncols=0)


@contextlib.contextmanager
def doing(what: str, *, takes_less: str | None = None) -> Iterator[None]:
    """Names what is done within it, for the message of an error that ends it.

    Args:
        what: in the words that follow "while".
        takes_less: flags that help where memory runs out in it; those of training by default.
    """
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("doing", what)
        error.__dict__.setdefault("takes_less", takes_less)
        raise


def run_program(main: Callable[[], None], program: str) -> None:
    """Runs `main`, and ends the process with what a person has to know: of an error that he can mend, one line.

    The exit status is 0, 2 for settings that cannot work, 1 for a run that failed, 75 for one that was asked to stop.

    Most errors meet every rank alike: rank 0 tells them, and a launcher such as torchrun then ends the others. An
    error that only another rank has is told by that rank once rank 0 had its chance; those who merely miss a rank that
    has ended keep quiet. The first error is left to torchrun too, which repeats it at the end.
    """
    put_off_no_more()
    threading.excepthook = _thread_failed
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        _succeeded.set()
        return
    except (Exception, KeyboardInterrupt) as error:
        _interrupts_end_at_once()
        status = _report(program, error)
    # Not sys.exit: a library's exit handler may wait for ranks that wait for this one.
    os._exit(status)


def _prepare_streams() -> None:
    """Gives standard streams that are closed a place to write to: else a file that is opened later would be it.

    Those that are open print any name of a file: it need not be text in their encoding.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, as long as the process
        elif stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _leave_at_once() -> None:
    """Ends a process that has succeeded; Python would take a second or two to take apart all that was imported."""
    if _succeeded.is_set():
        for stream in (sys.stdout, sys.stderr):
            with unless_nobody_listens():
                stream.flush()
        os._exit(0)


def _interrupts_end_at_once() -> None:
    """Has Ctrl-C end this process as any other program, without the traceback of Python's own handler."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _report(program: str, error: BaseException) -> int:
    """Prints what a person has to know of what has ended a program, and returns the exit status."""
    if isinstance(error, Stopped):
        if is_rank_0():
            _to_stderr(f"{program}: {error}")
        return STOPPED_STATUS
    if isinstance(error, KeyboardInterrupt):
        if is_rank_0():
            _to_stderr(f"{program}: interrupted")
        return 130  # as a shell has it
    if isinstance(error, UserError):
        _tell(program, str(error))
        return error.status
    if isinstance(error, ToldByRank0):
        if _error_file():
            time.sleep(OTHERS_LEAVE_FIRST_S)
        return error.args[0]
    # Not at the top: warnings are silenced before torch is imported.
    from dreambooth.command_line.limits import explain

    if told := explain(error):
        _tell(program, one_line(told))
    elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        asks = "--compile asks for it, and --use_8bit_adam without a GPU: leave that out"
        _tell(program, f"torch's compiler has failed: {first_line(error)}. {asks}")
    elif told := _of_nccl(error):
        time.sleep(OTHERS_SPEAK_FIRST_S)  # it may have failed for want of another rank, which then speaks by now
        _tell(program, f"NCCL, which connects the GPUs, says: {told} (NCCL_DEBUG=INFO has it say more)")
    elif _misses_a_rank(error):
        time.sleep(OTHERS_LEAVE_FIRST_S if _error_file() else OTHERS_SPEAK_FIRST_S)
        _to_stderr(f"{program}: rank {os.environ.get('RANK')} ends, because another rank has")
    elif isinstance(error, OSError) and error.filename:
        _tell(program, f"cannot read or write {os.fsdecode(error.filename)}: {error.strerror}")
    elif isinstance(error, OSError) and error.errno in OF_THE_DISK:
        _tell(program, f"while {getattr(error, 'doing', 'setting up the run')}: {error.strerror}")
    else:
        told = "".join(traceback.format_exception(error))
        _to_stderr(told.rstrip("\n"))
        _leave_to_torchrun(told)
    return 1


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Keeps quiet about TensorBoard's thread when it cannot write: the next figure logged raises the same error."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _tell(program: str, line: str) -> None:
    """Prints an error, on another rank than 0 once that had its chance."""
    if not is_rank_0():
        time.sleep(OTHERS_SPEAK_FIRST_S)
    _to_stderr(f"{program}: error: {line}")
    _leave_to_torchrun(line)


def _of_nccl(error: Exception) -> str | None:
    """Returns the last words of NCCL where it has failed, and not because another rank has ended."""
    import torch.distributed as dist  # as above

    text = str(error).strip()
    if isinstance(error, dist.DistBackendError) and text.startswith("NCCL error") and "ncclRemoteError" not in text:
        return one_line(text.splitlines()[-1].strip())
    return None


def _misses_a_rank(error: Exception) -> bool:
    """Whether a collective failed, which it does when another rank has ended."""
    import torch.distributed as dist  # as above

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _error_file() -> str | None:
    """Returns the file in which torchrun looks for an error, if it has started this process."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def _leave_to_torchrun(error: str) -> None:
    """Writes the error to the file that torchrun looks into; it shows the first one of all ranks."""
    if path := _error_file():
        details = {"py_callstack": error, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w") as file:  # on a disk that may be full
            json.dump({"message": {"message": error, "extraInfo": details}}, file)


def before_imports(module: str, check: Callable[[], object] = lambda: None) -> None:
    """Keeps out of sight what libraries warn of and a user can do nothing about, and idle processes away.

    Ctrl-C ends a program without a traceback meanwhile: the imports take seconds, and leave nothing to be saved. A
    program's imports also do without what only takes time, until `run_program`.

    Args:
        module: name of the one that is going to import; a program's is "__main__".
        check: is called in a program: an error that it raises ends it before it imports.
    """
    if module == "__main__":
        _prepare_streams()
        _interrupts_end_at_once()
        try:
            check()
        except Exception as error:
            sys.exit(_report(os.path.basename(sys.argv[0]), error))
        atexit.register(_leave_at_once)  # before the libraries' exit handlers, so that it runs after them
    # Deprecations inside torch, diffusers, transformers and ColossalAI, among the versions pinned here.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(colossalai|torch|transformers|diffusers)\b")
    # torch looks for the steps of the optimizer that the scheduler knows, and plugins take them without it.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
    # Of EXIF data that is passed over, and of photos above 89 megapixels.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    for library in ("accelerate", "bitsandbytes", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # These two set the levels of their loggers when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A library of ColossalAI's imports torch's compiler, which would start a process for each core right away.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    if module == "__main__":
        put_off()
