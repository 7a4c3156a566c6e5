"""Plumbing: nothing in this folder is about the paper.

The scripts import it before torch, which takes seconds: until run_program, Ctrl-C ends them at once
and without a traceback.
"""

import os  # pathlib would take a moment in which Ctrl-C tells of itself
import signal
import sys

if os.path.basename(sys.argv[0]) in ("train.py", "sample.py", "evaluate.py", "spectral.py"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
