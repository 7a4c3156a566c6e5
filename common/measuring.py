"""What is around a number: batches over all processes, the clock, the table and the protocol."""

import itertools
import json
import platform
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import runs
from common.runs import fail, printable, progress, rank, say, world_size, write_text
from common.weights import RANDOM

WARM_UP, LONG_ENOUGH = 2, 10.0  # calls that are not timed; seconds after which none is repeated

Numbers = dict[str, Any]  # what --json holds, or a part of it


def look(
    work: Callable[[Any], dict[str, Tensor]], pictures: Dataset, what: str, flags: Namespace
) -> dict[str, Tensor]:
    """What `work` finds, name -> (B, ...), in batches of the pictures, batch j on process j mod
    world_size: on process 0 that of all in their order, name -> (n, ...); elsewhere nothing.

    `work` moves what it returns to the CPU: it is pickled on its way to process 0. No picture
    counts twice: a DistributedSampler would repeat some, to give all processes equally many, and
    every mean would be another.
    """
    count, size = len(pictures), flags.batch_size
    ranges = [range(i, min(i + size, count)) for i in range(0, count, size)]
    # batch_size None: an item of `pictures` is already a batch.
    how = dict(batch_size=None, num_workers=flags.num_workers, generator=torch.Generator())
    loader = DataLoader(pictures, sampler=ranges[rank() :: world_size()], **how)
    parts = [work(batch) for batch in progress(loader, what)]
    if dist.is_initialized():
        gathered = [None] * world_size() if rank() == 0 else None
        dist.gather_object(parts, gathered)
        if rank() != 0:
            return {}
        parts = [gathered[j % world_size()][j // world_size()] for j in range(len(ranges))]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, values in found.items():
        bad = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero()
        if len(bad) and name != "psnr":  # that of equal pictures is infinite
            which = f"of {len(bad)} pictures is not finite, the first is number {int(bad[0])}"
            fail(f"{what}: {name} {which}: damaged pictures or weights")
    return found


def seconds(call: Callable[[], Any], flags: Namespace, factor: float = 1) -> float | None:
    """Median time, times `factor`, of up to --runs calls, after warming up; None, printed as -, of
    what does not fit into the GPU's memory."""
    taken: list[float] = []
    try:
        # At least two: a call that takes so long is warm at the second.
        while len(taken) < 2 or (len(taken) < WARM_UP + flags.runs and sum(taken) < LONG_ENOUGH):
            start = time.perf_counter()
            call()
            if flags.device.type != "cpu":
                torch.accelerator.synchronize()
            # By the slowest clock: all must agree how often, as a training step waits for all.
            taken.append(max(runs.of_all_processes(time.perf_counter() - start)))
    except torch.cuda.OutOfMemoryError:
        return None
    return factor * float(np.median(taken[WARM_UP:] or taken[-1:]))


def table(numbers: Numbers, indent: str = "  ") -> list[str]:
    """A line a number: - for what is left out, 1,234 for counts, five digits for the rest; those of
    a dictionary inside are indented."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *table(value, indent + "  ")]
            continue
        cell = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
        lines.append(f"{indent}{name:{42 - len(indent)}} {cell:>16}")
    return lines


def report(numbers: Numbers, flags: Namespace) -> None:
    """Print numbers and protocol, and what was left out; write both to --json."""
    cuda = flags.device.type == "cuda"
    name = torch.cuda.get_device_name(flags.device) if cuda else platform.processor()
    protocol = {"command": flags.command_line, "device": f"{flags.device} {name}".strip()}
    protocol |= {"processes": world_size(), "python": platform.python_version()}
    protocol |= {module.__name__: module.__version__ for module in (torch, np, scipy)}
    protocol |= numbers.pop("protocol")
    lines = [flags.command, *table({k: v for k, v in numbers.items() if k != "points"})]
    lines += [f"  no {name}: {why}" for name, why in protocol.get("left_out", {}).items()]
    if protocol.get("inception") == RANDOM:
        lines.append("  RANDOM Inception weights: what comes from them means nothing")
    lines.append("protocol")
    for name, value in protocol.items():
        if name != "left_out":
            told = printable(value) if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {name:18} {told}")
    if flags.json is not None:  # first: there may be no room for words
        write_text(flags.json, json.dumps({**numbers, "protocol": protocol}, indent=1))
        lines.append(f"numbers and protocol: {flags.json}")
    say("\n".join(lines))


def read_log(path: Path) -> dict[str, np.ndarray]:
    """What a run's log.jsonl (or its folder) holds: name -> a row (step, values ...) a line."""
    file, log = path / "log.jsonl" if path.is_dir() else path, {}
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for name in dict.fromkeys(("loss", *itertools.chain(*lines))):
            rows = [(line["step"], *np.ravel(line[name])) for line in lines if name in line]
            log[name] = np.array(rows, dtype=float).reshape(-1, len(rows[0]))
    except (OSError, ValueError, TypeError, LookupError) as error:
        fail(f"{file} is no log of a run ({error!r:.80}): give run folders or log.jsonl files", 2)
    return log
