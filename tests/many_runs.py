"""Makes many short runs of a trainer in one process: `many_runs.py SCRIPT FILE`, with a list of lists of flags."""

import importlib
import json
import sys
from pathlib import Path

script, runs = sys.argv[1:]
main = importlib.import_module(Path(script).stem).main
for argv in json.loads(Path(runs).read_text()):
    main(argv)
