"""Plumbing: nothing in this folder is about the paper.

The scripts import it before torch, which takes seconds: until run_program, Ctrl-C ends them at once
and without a traceback.
"""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).name in ("train.py", "sample.py", "evaluate.py", "spectral.py"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
