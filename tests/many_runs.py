"""Makes many short runs of a trainer in one process: `many_runs.py SCRIPT FILE`, with a list of lists of flags."""

import gc
import importlib
import json
import sys
from pathlib import Path

# At its end a run hands all that is frozen back to the collector, which would go through what was imported before the
# fork at the start of the next: a third of the time that a short run takes.
gc.unfreeze = lambda: None

script, runs = sys.argv[1:]
main = importlib.import_module(Path(script).stem).main
for argv in json.loads(Path(runs).read_text()):
    main(argv)
