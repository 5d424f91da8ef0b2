"""Runs programs in forks of a process that has imported the libraries, which takes longer than most tests.

    python tests/zygote.py FOLDER

A run is a connection to FOLDER/socket: a line of JSON with the fields of `Order` goes in, a line each with the ids of
the run's processes and with the exit status comes out. A program is executed as Python would execute it, each process
with the environment that torchrun would give it if there are several. It may be torchrun itself: it does all that it
always does, but the processes that it starts are forks too.

Runs that connect to FOLDER/anew instead are forks of a process that has not imported the project, nor huggingface_hub,
which reads variables of the environment when it is imported, nor what imports that.

It sees no GPU: a fork could not go on with what libraries begin there when they are imported. A run that is to use one
is made of new processes.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

# What takes long and does not import huggingface_hub; and what does. Those that need one that is missing say so.
LIBRARIES = (
    *("matplotlib.pyplot", "pandas", "pyarrow", "torch._dynamo", "torch._inductor.select_algorithm"),
    *("torch.distributed.run", "torch.distributed.tensor", "torch.utils.tensorboard", "torchvision", "bitsandbytes"),
)
PROJECT = ("datasets", "inference", "train_dreambooth", "train_dreambooth_colossalai")


@dataclass(frozen=True)
class Order:
    """What is run, and how.

    Args:
        program: a script and the words after it, or "-m" and a module, or "torchrun".
        env: is added to the environment; None takes away.
        cwd: the working directory.
        stdout, stderr: files that the outputs are added to.
        nproc: the number of processes.
        before: lines of Python that each process executes first; they know all names of this file.
        as_new: whether each process executes Python instead, without `before`.
    """

    program: list[str]
    env: dict[str, str | None]
    cwd: str
    stdout: str
    stderr: str
    nproc: int = 1
    before: str = ""
    as_new: bool = False


def execute(program: list[str], before: str = "") -> None:
    """Executes a program (see Order), and ends this process as Python would."""
    sys.argv, sys.orig_argv = program[program[0] == "-m" :], [sys.executable, *program]
    try:
        exec(before, dict(globals()))
        if program[0] == "torchrun":
            fork_ranks()
            torch.distributed.run.main()
        elif program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except BaseException:
        leave(status_of(*sys.exc_info()))
    leave(0)


def status_of(kind: type, end: BaseException, traceback: object) -> int:
    """Returns the exit status of a program that an exception has ended, having printed what Python would."""
    if kind is SystemExit:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
    else:
        sys.excepthook(kind, end, traceback)
    return 1


def leave(status: int) -> None:
    """Ends the process, but does not take apart what was imported, which would be most of a short run's time."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        os._exit(os.EX_IOERR)
    os._exit(status)


class Forked(subprocess.Popen):
    """What Popen is; but a process that would execute Python is a fork.

    What a new program does not take over from the one that starts it, the fork gives up: files, what handles signals,
    and what is to be removed in the end.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        if args[0] != sys.executable:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
            return
        pipes, start_new_session = others[3:9], others[14]
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number, end in enumerate(pipes[number] for number in (0, 3, 5)):
                    if end != -1:
                        os.dup2(end, number)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                if start_new_session:
                    os.setsid()
                handle_no_signals()
                weakref.finalize._registry.clear()
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                os.chdir(cwd or ".")
                execute([str(word) for word in args[1:] if word != "-u"])
            finally:
                os._exit(1)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def fork_ranks() -> None:
    """Has torchrun's agent in this process start forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda self, args, env: Forked(args, env=env, start_new_session=True)


def handle_no_signals() -> None:
    """Has signals do what they do to a new program; those that are ignored stay so."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(order: Order, environment: dict) -> int:
    """Returns the id of a new process that does what is ordered."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for number, path in enumerate((os.devnull, order.stdout, order.stderr)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        os.chdir(order.cwd)
        if order.as_new:
            os.execv(sys.executable, [sys.executable, *order.program])
        tempfile.tempdir = None  # another one, if TMPDIR is
        execute(order.program, order.before)
    except OSError:  # of the files for what it says
        os._exit(os.EX_IOERR)
    finally:
        os._exit(1)


def free_port() -> int:
    """Returns a port that nobody listens at, below those that the system gives to anybody who asks for some."""
    for port in random.sample(range(15000, 30000), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("of 100 ports none was free")


def environments(order: Order) -> list[dict]:
    """Returns what each process gets into its environment: what torchrun adds, if there are several without it."""
    if order.nproc == 1:
        return [order.env]
    nproc = order.nproc
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    everyone = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(nproc)]
    return [{name: str(value) for name, value in one.items()} | order.env for one in everyone]


@dataclass
class Run:
    """What was ordered on a connection.

    Args:
        connection: to answer on.
        pids: of the processes that have not ended.
        status: the first exit status that is not 0.
    """

    connection: socket.socket
    pids: set[int]
    status: int = 0

    def end(self, pid: int, status: int) -> None:
        """Notes that a process has ended; where it has failed, ends the others, and with the last one, answers."""
        self.pids.remove(pid)
        if status and not self.status:
            self.status = status
            for other in self.pids:
                os.kill(other, signal.SIGTERM)
        if not self.pids:
            answer(self.connection, self.status)
            self.connection.close()


def answer(connection: socket.socket, content: object) -> None:
    with contextlib.suppress(ConnectionError):  # nobody waits for it any more
        connection.sendall(f"{json.dumps(content)}\n".encode())


def serve(listener: socket.socket) -> None:
    """Has every order carried out, until standard input ends."""
    assert threading.active_count() == 1, "a fork has the thread that forks only"
    running: dict[int, tuple[int, Run]] = {}  # by what tells that a process has ended
    while sys.stdin not in (ready := select.select([listener, sys.stdin, *running], [], [])[0]):
        for one in ready:
            if one is not listener:
                pid, run = running.pop(one)
                os.close(one)
                run.end(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                continue
            connection, _ = listener.accept()
            if line := connection.makefile().readline():  # else somebody has seen whether this is ready
                order = Order(**json.loads(line))
                pids = [start(order, environment) for environment in environments(order)]
                answer(connection, pids)
                run = Run(connection, set(pids))
                running |= {os.pidfd_open(pid): (pid, run) for pid in pids}


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def import_all(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def warm_up() -> None:
    """Does what most runs do once: libraries import parts of themselves and make tables when they are first used.

    Without gradients, as autograd cannot be used in a fork of a process that has used it.
    """
    import colossalai.logging
    import peft.tuners.lora.bnb  # noqa: F401
    import PIL.Image
    from diffusers import DDPMScheduler

    import dreambooth.model.single_file  # noqa: F401
    from dreambooth.model.pipeline import load_model

    PIL.Image.preinit()
    colossalai.logging.get_dist_logger()
    DDPMScheduler().compatibles  # noqa: B018
    with torch.random.fork_rng(devices=[]):
        load_model(Path("assets/tiny-stable-diffusion"), resolution=128)


def freeze() -> None:
    """Keeps the collector of a fork from going through all that was imported, which would copy the pages of it."""
    gc.collect()
    gc.freeze()


def main() -> None:
    folder = Path(sys.argv[1])
    import_all(LIBRARIES)
    assert "huggingface_hub" not in sys.modules
    anew = listen(folder / "anew")
    freeze()
    if os.fork():
        serve(anew)
        return
    anew.close()
    import_all(PROJECT)
    warm_up()
    freeze()
    serve(listen(folder / "socket"))


main()
