"""Signals that would end the process, taken as a request to stop once the step in hand is done and saved."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from dreambooth.command_line.console import is_rank_0, unless_nobody_listens

# Ctrl-C, a closed terminal, the end of a job's time, a scheduler's notice: all that can be caught and ends a process
# that is in good health.
NAMES = (
    *("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR"),
    *("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGSTKFLT"),
)
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# A signal to torchrun, `timeout` or a shell's job reaches a process more than once within moments; a session that ends
# sends two kinds.
REPEATED_S = 2
# torchrun also sends SIGTERM when a rank has died, to ranks that may wait for it in a collective for ever. They leave
# when they have not got on for so long, and for so many times the longest step; torchrun kills them 30 s after the
# signal.
PATIENCE_S, PATIENCE_STEPS = 20, 3


class StopRequest:
    """Whether a signal has asked this process to stop, while the context lasts; a second one ends it at once.

    The training loop has to ask, to tell of each step that it gets on, and to call `heed` when it stops. Signals that
    were ignored before, as those of a closed terminal under nohup, or that somebody else handles, are left alone.
    """

    def __init__(self):
        self.name: str | None = None  # of the signal
        self._since = 0.0
        self._heeded = threading.Event()
        self._got_on: float | None = None  # when; None before the first step, which may take as long as it likes
        self._longest_step = 0.0
        self._unhurried = False

    def __bool__(self) -> bool:
        return self.name is not None

    def heed(self) -> None:
        """Tells that the run is about to stop, in its own time."""
        self._heeded.set()

    def get_on(self) -> None:
        """Tells that a step is done."""
        now = time.monotonic()
        if self._got_on is not None:
            self._longest_step = max(self._longest_step, now - self._got_on)
        self._got_on = now

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Within it this process may wait for another one that works, for as long as that takes."""
        self._unhurried = True
        yield
        if self._got_on is not None:
            self._got_on = time.monotonic()
        self._unhurried = False

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread only
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._receive)
        if int(os.environ.get("WORLD_SIZE") or "1") > 1:
            receiver, sender = socket.socketpair()
            sender.setblocking(False)
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            self._sender = sender  # keeps it open
            threading.Thread(target=self._leave_if_stuck, args=[receiver], daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.heed()
        if self._previous:
            signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if not self:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
            if is_rank_0():
                with unless_nobody_listens():  # not by print, in which the signal may have come
                    os.write(2, f"\n{self.name}: ending and saving the step in hand; again to end at once\n".encode())
            return
        if time.monotonic() - self._since > REPEATED_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _leave_if_stuck(self, receiver: socket.socket) -> None:
        """Ends the process if it waits in a collective, where Python's own handlers do not run, for a dead rank."""
        while (number := receiver.recv(1)) and number[0] not in self._previous:
            pass
        asked = time.monotonic()
        while number and not self._heeded.wait(1):
            if self._got_on is None or self._unhurried:
                continue
            waited = time.monotonic() - max(asked, self._got_on)
            if waited > max(PATIENCE_S, PATIENCE_STEPS * self._longest_step):
                os._exit(1)
