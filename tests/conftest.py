"""Shared by all tests: one thread, a small model, and the command lines as a user types them."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import train
from common.runs import flag

ROOT = Path(__file__).resolve().parent.parent
# Two threads on a busy machine run slower than one, and bits depend on the number of threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def pytest_report_header() -> str:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"python {platform.python_version()}, {versions}, numpy {np.__version__}"


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Weights and everything computed in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# The preset shapes, shrunk until a step takes milliseconds.
TINY = dict(image_size=16, width=16, depth=1, heads=2, num_latents=4, latent_dim=4, flow_width=16)
TINY |= dict(flow_depths=(1, 2), flow_head_dim=8, batch_size=8, log_every=2, device="cpu")


@pytest.fixture
def tiny(tmp_path) -> train.Config:
    """A tiny run; it goes to tmp_path/run."""
    steps = dict(steps=8, nll_warmup=4, mask_warmup=0, lr_warmup=2, save_every=4, sample_every=8)
    config = train.preset_config("shapes", **TINY, **steps)
    return replace(config, drop_path=0.1, num_classes=10, out=str(tmp_path / "run"))


@pytest.fixture
def tiny_flags() -> list[str]:
    """The same sizes as command-line flags of train.py, without --steps and --out."""
    values = {k: v if isinstance(v, tuple) else (v,) for k, v in TINY.items()}
    return [text for k, v in values.items() for text in (flag(k), *map(str, v))]


@pytest.fixture
def run_script():
    """run_script("train.py", "--steps", 4, processes=2) -> CompletedProcess; never a traceback."""

    def run(script: str, *arguments: object, processes: int = 1, cwd: Path = ROOT):
        command = [*launcher(processes), str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        assert processes > 1 or "Traceback" not in done.stderr, done.stderr
        return done

    return run


def launcher(processes: int, restarts: int = 0) -> list[str]:
    """What comes before a script: python, or torchrun."""
    if processes == 1:
        return [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--max-restarts={restarts}", f"--nproc_per_node={processes}", "--"]


def randomize(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Add noise to every parameter, so that nothing is zero or the identity by initialisation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module


def write_pictures(folder: Path, count: int, size=(20, 24), mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open(Path(folder) / "log.jsonl")]


def without_time(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "ms_per_step"} for line in lines]


def last(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """A checkpoint of a run, as it is in the file."""
    return torch.load(Path(folder) / name, weights_only=True)


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, through nested dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, EMA and optimizer to the bit, and the same log."""
    a, b = last(one), last(other)
    for key in ("step", "model", "ema", "optimizer"):
        assert_same(a[key], b[key])
    assert without_time(read_log(one)) == without_time(read_log(other))
