"""A command of the same name in tests: `python` or `torchrun`, whose program runs in a fork of the zygote (zygote.py).

It ends as the program does, and hands signals on.
"""

import json
import os
import signal
import socket
import sys

program = sys.argv[1:]
if os.path.basename(program[0]) == "python":
    del program[0]
else:
    program[0] = os.path.basename(program[0])
process = f"/proc/{os.getpid()}/fd"
order = {"program": program, "env": dict(os.environ), "cwd": os.getcwd()}
order |= {"stdout": f"{process}/1", "stderr": f"{process}/2"}
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.path.join(os.environ["ZYGOTE"], "socket"))
connection.sendall(f"{json.dumps(order)}\n".encode())
answers = connection.makefile()
(pid,) = json.loads(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
