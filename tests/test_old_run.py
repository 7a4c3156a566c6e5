"""A run folder of the first house (commit f59eff8): its checkpoints load, sample and continue.

tests/data/old_run holds 8 steps of the preset shapes, made tiny; flags.txt the commands that made
and continued it, expected.json what the old code came to. The same torch on the same kind of CPU
must come to the same bits, any other to the same numbers.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, last, read_log, without_time
from PIL import Image

import sample
import train

FOLDER = ROOT / "tests" / "data" / "old_run"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
LINES = (FOLDER / "flags.txt").read_text().splitlines()
COMMANDS = {name: flags.split() for name, flags in (line.split(": ") for line in LINES)}


def same_machine() -> bool:
    """Whether the bits must be the same: other CPUs of a name choose other kernels."""
    if not Path("/proc/cpuinfo").exists():
        return False
    made = EXPECTED["made_with"]
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    cpu = {line.split("\t")[0]: line.split(": ")[-1] for line in lines}  # of the first core
    here = " ".join(cpu.get(name, "") for name in ("cpu family", "model", "stepping"))
    capability = torch.backends.cpu.get_cpu_capability() == made["capability"]
    same_cpu = here == made["family_model_stepping"] and capability
    return same_cpu and torch.__version__ == made["torch"]


def run(name: str) -> None:
    """What flags.txt has under this name."""
    script, *flags = COMMANDS[name]
    if script == "train.py":
        train.main(train.parse_arguments(flags)[0])
    else:
        sample.main(sample.parse_arguments([*flags, "--device", "cpu"]))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    return hashlib.sha256(
        b"".join(tensors[k].numpy().tobytes() for k in sorted(tensors))
    ).hexdigest()


def numbers(folder: str, after: int) -> dict:
    """What a run came to, as expected.json has it."""
    full, shared = last(folder), last(folder, "model.pt")["model"]
    state = full["optimizer"]["state"]
    moments = {f"{i:04d}.{k}": v for i, entry in state.items() for k, v in entry.items()}
    values = {
        name: {"mean": x.mean().item(), "norm": x.norm().item(), "last": x[-1].item()}
        for name, x in (
            (k, shared[k].double().flatten()) for k in sorted(shared)[:: len(shared) // 12]
        )
    }
    hashes = {
        "model_sha256": digest(shared),
        "last_model_sha256": digest(full["model"]),
        "last_optimizer_sha256": digest(moments),
    }
    log = [line for line in without_time(read_log(folder)) if line["step"] > after]
    return {**hashes, "tensors": len(shared), "step": full["step"], "values": values, "log": log}


def picture(path: str) -> dict:
    pixels = np.asarray(Image.open(path))
    means = pixels.reshape(-1, 3).mean(axis=0).tolist()
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return {"size": list(pixels.shape), "pixels_sha256": digest, "channel_means": means}


def assert_close(found, expected, name: str = "") -> None:
    if isinstance(expected, dict | list):
        assert len(found) == len(expected), name
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_close(found[key], expected[key], f"{name} {key}")
    elif "sha256" not in name or same_machine():
        rel = 1e-3 if "channel_means" in name else 1e-4  # of pixels rounded to 8 bits
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=rel, abs=1e-6)
        assert found == expected, name


def test_an_old_run_loads_samples_and_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "run")
    shutil.copy("run/model.pt", "fixture-model.pt")
    run("sample")
    assert_close(picture("sample.png"), EXPECTED["sample"])
    run("continued")
    assert_close(numbers("run", 8), EXPECTED["continued"])
    run("continued_sample")
    assert_close(picture("continued_sample.png"), EXPECTED["continued_sample"])
    run("decoder")
    assert_close(numbers("decoder", 0), EXPECTED["decoder"])
    run("decoder_sample")
    assert_close(picture("decoder_sample.png"), EXPECTED["decoder_sample"])
