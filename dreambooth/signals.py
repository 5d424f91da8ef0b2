"""SIGTERM and Ctrl-C during training: a request to stop once the step in hand is done and saved."""

import os
import signal
import socket
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A signal sent to torchrun reaches its processes more than once within moments.
REPEATED_S = 2
# torchrun also sends SIGTERM when a rank has died, to ranks that may wait for it in a collective for ever. They have
# this long to heed the request; torchrun kills them 30 s after the signal.
HEEDED_WITHIN_S = 20


class StopRequest:
    """Whether a signal has asked this process to stop, while the context lasts; a second one ends it at once.

    The training loop has to ask, and to call `heed` when it stops.
    """

    def __init__(self):
        self.name: str | None = None  # of the signal
        self._since = 0.0
        self._heeded = threading.Event()

    def __bool__(self) -> bool:
        return self.name is not None

    def heed(self) -> None:
        """Tells that the run is about to stop, in its own time."""
        self._heeded.set()

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            receiver, sender = socket.socketpair()
            sender.setblocking(False)
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            self._sender = sender  # keeps it open
            threading.Thread(target=self._leave_if_stuck, args=[receiver], daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.heed()
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self and time.monotonic() - self._since > REPEATED_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self:
            self.name, self._since = signal.Signals(number).name, time.monotonic()

    def _leave_if_stuck(self, receiver: socket.socket) -> None:
        """Ends the process if it waits in a collective, where Python's own handlers do not run, for a dead rank."""
        while (number := receiver.recv(1)) and number[0] not in SIGNALS:
            pass
        if number and not self._heeded.wait(HEEDED_WITHIN_S):
            os._exit(1)
