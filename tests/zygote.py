"""Runs scripts in forks of a process that has imported the libraries, which takes longer than most tests.

Reads a line of JSON for each run, {"script", "argv", "env", "stdout", "stderr", "nproc"}, with names of files for the
outputs; answers with a line each for the ids of its processes and its exit status. The script's file is executed as
`python script` would, each process with the environment that torchrun would give it if there are several.
"""

import atexit
import contextlib
import gc
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading

import datasets  # noqa: F401

import inference  # noqa: F401
import train_dreambooth  # noqa: F401
import train_dreambooth_colossalai  # noqa: F401


def start(script: str, argv: list[str], stdout: str, stderr: str, environment: dict) -> int:
    """Returns the id of a new process that executes the script."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
        leave(0)
    except SystemExit as end:
        if not isinstance(end.code, str):
            leave(end.code or 0)
        raise


def leave(status: int) -> None:
    """Ends the process, but does not take apart what was imported, which would be most of a short run's time."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    """Returns a port that nobody listens at, below those that the system gives to anybody who asks for some."""
    for port in random.sample(range(15000, 30000), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError("of 100 ports none was free")


def environments(nproc: int) -> list[dict]:
    """Returns what torchrun adds to the environment of each of several processes."""
    if nproc == 1:
        return [{}]
    port = free_port()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    everyone = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(nproc)]
    return [{name: str(value) for name, value in one.items()} for one in everyone]


def wait(pids: list[int]) -> int:
    """Returns the first exit status that is not 0, having ended the other processes then; or 0."""
    status = 0
    running = set(pids)
    while running:
        pid, found = os.wait()
        running.remove(pid)
        if found and not status:
            status = os.waitstatus_to_exitcode(found)
            for other in running:
                os.kill(other, signal.SIGTERM)
    return status


def main() -> None:
    assert threading.active_count() == 1, "a fork has the thread that forks only"
    # A fork's collector would go through all that was imported, and copy the pages of it.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        run = json.loads(line)
        more = run.pop("env")
        pids = [start(**run, environment=environment | more) for environment in environments(run.pop("nproc"))]
        print(json.dumps(pids), flush=True)
        print(wait(pids), flush=True)


main()
