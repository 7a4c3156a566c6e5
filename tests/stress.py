"""Minutes of faults: kills, restarts, flipped bytes, full disks, with real processes, and a count.

    python tests/stress.py                 five to ten minutes on two cores; not collected by pytest

Each part prints what it did and what was lost. The exit code is 0 only if nothing was.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import ENVIRONMENT, assert_same, last, launcher  # noqa: E402

import train  # noqa: E402
from common import runs  # noqa: E402

# Small enough for milliseconds a step, large enough that a save takes a noticeable share of them.
SIZES = "--image-size 24 --width 64 --depth 1 --heads 2 --num-latents 4 --latent-dim 4 "
SIZES += "--flow-width 64 --flow-depths 1 2 --flow-head-dim 16 --batch-size 8 --device cpu "
SIZES += "--save-every 3 --log-every 10 --sample-every 100000 --steps 300"
CHECKPOINTS = ("last.pt", "previous.pt", "model.pt")


def start(flags: list[str], out: Path, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    command = [*launcher(processes, restarts), str(ROOT / "train.py"), *SIZES.split(), *flags]
    command += ["--out", str(out)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=ENVIRONMENT, **streams)


def run(flags: list[str], out: Path, **how: int) -> str:
    process = start(flags, out, **how)
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"an undisturbed run failed:\n{output[-2000:]}")
    return output


def same_end(one: Path, other: Path) -> bool:
    a, b = last(one), last(other)
    for name in ("config", "format"):  # the folders differ
        a.pop(name), b.pop(name)
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def saving(out: Path) -> bool:
    return any((out / f"{name}.tmp").exists() for name in CHECKPOINTS)


def broken_files(out: Path) -> list[str]:
    """The checkpoints in `out` that do not load."""
    bad = []
    for name in CHECKPOINTS:
        try:
            if (out / name).exists():
                train.load_checkpoint(out / name)
        except SystemExit:
            bad.append(name)
    return bad


def kills(flags: list[str], work: Path, count: int, name: str) -> int:
    """kill -9 at random moments, every second one in the middle of a save, resuming each time."""
    run(flags, work / f"{name}-whole")
    out, lost, in_a_save, resumed = work / f"{name}-killed", 0, 0, 0
    for number in range(count):
        process = start(flags, out)
        for line in process.stdout:
            resumed += "continuing" in line
            if line.startswith("step") or "is finished" in line:
                break
        time.sleep(random.uniform(0, 0.4))
        while number % 2 and process.poll() is None and not saving(out):
            time.sleep(0.0002)
        process.kill()
        process.communicate()
        in_a_save += saving(out)
        bad = broken_files(out)
        lost += len(bad)
    run(flags, out)
    same = same_end(work / f"{name}-whole", out)
    print(
        f"{name}: {count} kills, {in_a_save} of them during a save, {resumed} resumes, "
        f"{lost} files lost, end {'equal to' if same else 'DIFFERENT FROM'} the undisturbed run's"
    )
    return lost + (not same)


def sampling_kills(work: Path, count: int) -> int:
    """kill -9 of `sample.py --npz` at random moments, each time by the same command going on."""
    command = [sys.executable, str(ROOT / "sample.py"), str(work / "phase 1-whole" / "model.pt")]
    command += "--num 6000 --batch-size 16 --device cpu --npz".split()
    quiet = dict(env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    subprocess.run([*command, work / "whole.npz"], check=True, **quiet)
    out, kept, at_work = work / "killed.npz", 0, 0
    parts = out.with_name("killed.npz.parts")
    for _ in range(count):
        before = len(list(parts.glob("*.npy")))
        process = subprocess.Popen([*command, out], **quiet)
        while process.poll() is None and len(list(parts.glob("*.npy"))) <= before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.5))
        at_work += process.poll() is None
        process.kill()
        process.wait()
        kept = max(kept, len(list(parts.glob("*.npy"))))
    subprocess.run([*command, out], check=True, **quiet)
    same = out.read_bytes() == (work / "whole.npz").read_bytes() and not parts.exists()
    print(
        f"sample.py --npz: {count} kills, {at_work} of them at work, up to {kept} batches kept, "
        f"end {'equal to' if same else 'DIFFERENT FROM'} the undisturbed"
    )
    return not same


def restarts(work: Path, count: int) -> int:
    """One of two processes dies by kill -9; torchrun must start both again by itself."""
    run([], work / "two-whole", processes=2)
    failures = 0
    for number in range(count):
        out = work / f"two-{number}"
        process = start([], out, processes=2, restarts=3)
        for line in process.stdout:
            if line.startswith("step 1"):
                break
        time.sleep(random.uniform(0, 0.5))
        listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
        rows = [row.split(None, 2) for row in listing.stdout.splitlines()[1:]]
        ranks = [int(row[0]) for row in rows if int(row[1]) == process.pid and "train.py" in row[2]]
        os.kill(random.choice(ranks), signal.SIGKILL)
        process.communicate(timeout=300)
        failures += process.returncode != 0 or not same_end(work / "two-whole", out)
    print(f"torchrun --max-restarts: {count} ranks killed, {failures} runs lost")
    return failures


def flips(work: Path, count: int) -> int:
    """Flip single bits of a checkpoint: each must be noticed, or change nothing that is read."""
    source, path = work / "phase 1-whole" / "last.pt", work / "flipped.pt"
    content, missed, noticed = source.read_bytes(), 0, 0
    expected = torch.load(source, weights_only=True)
    for _ in range(count):
        flipped = bytearray(content)
        flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        if runs.damage(path):
            noticed += 1
            continue
        try:
            assert_same(torch.load(path, weights_only=True), expected)
        except AssertionError:
            missed += 1
    print(f"{count} flipped bits: {noticed} noticed, {missed} read as something else")
    return missed


def full_disk(work: Path) -> int:
    """A run on a file system with room for a checkpoint or two, and its end when there is more."""
    disk = work / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        print("full disk: skipped, mounting a small tmpfs needs root")
        return 0
    try:
        process = start([], disk / "run")
        output, _ = process.communicate(timeout=300)
        said, bad = output.count("No space left"), broken_files(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run([], disk / "run")
        same = same_end(work / "phase 1-whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    print(
        f"full disk: {said} failed writes named, exit code {process.returncode}, {len(bad)} files "
        f"lost; with room again the end is {'equal' if same else 'DIFFERENT'}"
    )
    return len(bad) + (not same) + (not said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Faults for minutes, and what was lost.")
    parser.add_argument("--kills", type=int, default=20, help="per phase (default: 20)")
    parser.add_argument("--restarts", type=int, default=4, help="(default: 4)")
    parser.add_argument("--flips", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="mimflow-stress-"))
    began = time.monotonic()
    lost = kills([], work, options.kills, "phase 1")
    second = ["--phase", "decoder", "--init", str(work / "phase 1-whole" / "model.pt")]
    lost += kills([*second, "--steps", "200"], work, options.kills, "phase 2")
    lost += sampling_kills(work, (options.kills + 1) // 2)
    lost += restarts(work, options.restarts)
    lost += flips(work, options.flips)
    lost += full_disk(work)
    shutil.rmtree(work)
    print(f"{lost} losses in {time.monotonic() - began:.0f} s")
    sys.exit(1 if lost else 0)
