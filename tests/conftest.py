"""Shared by all tests: one thread, a small model, and the command lines as a user types them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).resolve().parent.parent
# Two threads on a busy machine run slower than one, and bits depend on the number of threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path) -> train.Config:
    """The preset shapes, shrunk until a step takes milliseconds; runs go to tmp_path/run."""
    return replace(
        train.Config(**{"preset": "shapes", **train.PRESETS["shapes"]}),
        image_size=16,
        width=16,
        depth=1,
        heads=2,
        num_latents=4,
        latent_dim=4,
        flow_width=16,
        flow_depths=(1, 2),
        flow_head_dim=8,
        drop_path=0.1,
        num_classes=10,
        num_workers=0,
        steps=8,
        batch_size=8,
        nll_warmup=4,
        mask_warmup=0,
        lr_warmup=2,
        save_every=4,
        log_every=2,
        sample_every=8,
        device="cpu",
        out=str(tmp_path / "run"),
    )


@pytest.fixture
def tiny_flags(tiny) -> list[str]:
    """`tiny` as command-line flags of train.py, without --steps and --out."""
    flags = []
    for (
        name
    ) in "image_size width depth heads num_latents latent_dim flow_width flow_head_dim".split():
        flags += [train.flag(name), str(getattr(tiny, name))]
    flags += ["--flow-depths", *map(str, tiny.flow_depths), "--batch-size", str(tiny.batch_size)]
    return [*flags, "--log-every", "2", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture
def run_script():
    """run_script("train.py", "--steps", 4, processes=2) -> CompletedProcess; never a traceback."""

    def run(script: str, *arguments: object, processes: int = 1, cwd: Path = ROOT):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={processes}", "--"]
        command = [*launcher, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        assert processes > 1 or "Traceback" not in done.stderr, done.stderr
        return done

    return run


def randomize(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Add noise to every parameter, so that nothing is zero or the identity by initialisation."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module
