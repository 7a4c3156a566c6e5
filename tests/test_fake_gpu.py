"""A small mimflow-l runs on fake CUDA tensors; `python tests/fake_gpu.py` counts the large one."""

import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT


def test_both_phases_and_sampling_run_on_a_gpu_without_waiting_for_it():
    command = [sys.executable, str(ROOT / "tests" / "fake_gpu.py"), "--small", "--processes", "8"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
