"""Writes BENCHMARKS.md: this flow beside apple/ml-tarflow's, its cost against K, jacobi, and what
`evaluate.py cost` reports.

    git clone https://github.com/apple/ml-tarflow /elsewhere/ml-tarflow
    python tests/bench_tarflow.py --tarflow /elsewhere/ml-tarflow > BENCHMARKS.md

Not collected by pytest: it takes 20 minutes, another project's code, and a machine with nothing
else to do. What is compared runs in turns (A B A B ...) in one process, so that a disturbance hits
both alike, and medians count.
"""

import argparse
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not by pytest
from conftest import randomize  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from flow import NormalizingFlow  # noqa: E402

K, D, WIDTH, DEPTHS, CLASSES, BATCH = 128, 64, 256, (2, 2, 2, 8), 10, 16
COST_TOKENS, COST_BATCH = (32, 64, 128, 256, 512), 4
GUIDANCE = 2.0
KINDS = ("plain", "gated")  # ours without and with gated attention
SAMPLERS = ("sequential", "jacobi")
STD = 0.01  # of the noise on fresh weights: enough that no output is zero

Work = dict[str, Callable[[], object]]


def medians(work: Work, runs: int) -> dict[str, float]:
    """Seconds of each piece of work: medians of `runs` turns, after one to warm up."""
    seconds = {name: [] for name in work}
    for turn in range(runs + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            seconds[name] += [time.perf_counter() - start] if turn else []
        print(f"turn {turn} of {runs}: {', '.join(work)}", file=sys.stderr)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def table(head: str, rows: list[tuple]) -> None:
    columns = head.count("|") + 1
    print(f"\n| {head} |\n|{' --- |' * columns}")
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")


# --------------------------------------------------------------------------------------------------
# The two flows


def our_flow(num_latents: int = K, gated: bool = False) -> NormalizingFlow:
    return randomize(
        NormalizingFlow(num_latents, D, WIDTH, DEPTHS, 64, CLASSES, gated=gated), std=STD
    )


def our_step(flow: NormalizingFlow, z: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward of the NLL per number."""
    u, logdet = flow(z, labels)
    (0.5 * u.square().mean() - logdet.mean() / z[0].numel()).backward()
    flow.zero_grad(set_to_none=True)


def their_blocks(folder: Path) -> torch.nn.ModuleList:
    """ml-tarflow's blocks in the same sizes; its Model has one depth for all of them."""
    sys.path.insert(0, str(folder))
    import transformer_flow as tarflow

    orders = (tarflow.PermutationIdentity(K), tarflow.PermutationFlip(K))
    blocks = [
        tarflow.MetaBlock(D, WIDTH, K, orders[i % 2], depth, num_classes=CLASSES)
        for i, depth in enumerate(DEPTHS)
    ]
    return randomize(torch.nn.ModuleList(blocks), std=STD)


def their_step(blocks: torch.nn.ModuleList, z: torch.Tensor, labels: torch.Tensor) -> None:
    x, logdet = z, 0.0
    for block in blocks:
        x, more = block(x, labels)
        logdet = logdet + more
    (0.5 * x.square().mean() - logdet.mean()).backward()
    blocks.zero_grad(set_to_none=True)


@torch.no_grad()
def their_inverse(
    blocks: torch.nn.ModuleList, u: torch.Tensor, labels: torch.Tensor, guidance: float
) -> torch.Tensor:
    x = u.clone()  # their inverse writes into its argument
    for block in reversed(blocks):
        x = block.reverse(x, labels, guidance, annealed_guidance=True)
    return x


# --------------------------------------------------------------------------------------------------
# The measurements


def side_by_side(folder: Path, runs: int) -> None:
    theirs, plain, gated = their_blocks(folder), our_flow(), our_flow(gated=True)
    z, labels = torch.randn(BATCH, K, D), torch.randint(CLASSES, (BATCH,))
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    print(f"\n## Beside apple/ml-tarflow, commit {commit[:12]}\n")
    print(
        f"K = {K}, d = {D}, width {WIDTH}, layers {DEPTHS}, batch {BATCH}, float32. It guides all\n"
        "blocks, this flow the deep one. It has no gates: without them is the equal comparison.\n"
        "Seconds; in brackets: its time over ours, above 1 = ours is faster."
    )
    rows = []
    for threads in dict.fromkeys((1, os.cpu_count())):
        torch.set_num_threads(threads)
        work: Work = {
            "theirs": lambda: their_step(theirs, z, labels),
            "plain": lambda: our_step(plain, z, labels),
            "gated": lambda: our_step(gated, z, labels),
        }
        found = [("forward + backward", medians(work, 3 * runs), "1.0")]
        for guidance, goal in ((0.0, "1.2"), (GUIDANCE, "2.5")):
            work = {
                "theirs": lambda w=guidance: their_inverse(theirs, z, labels, w),
                "plain": lambda w=guidance: plain.inverse(z, labels, w),
                "gated": lambda w=guidance: gated.inverse(z, labels, w),
            }
            found.append((f"inverse, guidance {guidance:g}", medians(work, runs), goal))
        for name, t, goal in found:
            ours = (f"{t[kind]:.3g} ({t['theirs'] / t[kind]:.2f})" for kind in KINDS)
            rows.append((threads, name, t["theirs"], *ours, goal))
    table("threads | work | ml-tarflow | without gates | with gates | goal", rows)
    ours, all_guided = sum(DEPTHS) + DEPTHS[-1], 2 * sum(DEPTHS)
    print(
        f"\nGuided, a token passes {ours} layers here and {all_guided} there: "
        f"{all_guided / ours:.2f} times less arithmetic. The rest of the factor\nis what a token "
        "costs beside it: this cache is never copied, and both halves share one call."
    )
    where_time_goes(plain, z, labels)


def where_time_goes(flow: NormalizingFlow, u: torch.Tensor, labels: torch.Tensor) -> None:
    """What holds back guided sampling, on one thread, by torch's profiler."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        flow.inverse(u, labels, GUIDANCE)
    seconds = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    torch.set_num_threads(os.cpu_count())
    total = sum(seconds.values())
    products = sum(t for name, t in seconds.items() if name in ("aten::addmm", "aten::mm"))
    attention = sum(t for name, t in seconds.items() if "attention" in name)
    print(
        f"Guided, without gates, one thread: {products / total:.0%} of the time goes into matrix "
        f"products (of 16 or 32 rows),\n{attention / total:.0%} into attention, which reads all "
        "keys and values from memory for every token, the rest into everything else."
    )


def cost_against_tokens(runs: int) -> None:
    """Seconds for a training step and for sampling, and the exponent fitted to the logarithms."""
    seconds = []
    for tokens in COST_TOKENS:
        flow, z = our_flow(tokens, gated=True), torch.randn(COST_BATCH, tokens, D)
        labels = torch.randint(CLASSES, (COST_BATCH,))
        work: Work = {
            "training": lambda f=flow, z=z, y=labels: our_step(f, z, y),
            "sampling": lambda f=flow, z=z, y=labels: f.inverse(z, y),
            "guided": lambda f=flow, z=z, y=labels: f.inverse(z, y, GUIDANCE),
        }
        seconds.append(list(medians(work, runs).values()))
    exponents = np.polyfit(np.log(COST_TOKENS), np.log(seconds), 1)[0]
    print(f"\n## Cost against K\n\nAs above, with gates, batch {COST_BATCH}; seconds.")
    rows = [(tokens, *taken) for tokens, taken in zip(COST_TOKENS, seconds, strict=True)]
    rows.append(("K to the power of", *(f"{x:.2f}" for x in exponents)))
    table("K | forward + backward | sampling | guided sampling", rows)


def jacobi_rows(name: str, flow: NormalizingFlow, batch: int, runs: int) -> list[tuple]:
    u = torch.randn(batch, flow.num_latents, flow.latent_dim)
    labels = torch.arange(batch) % flow.num_classes
    rows = []
    for guidance in (0.0, 1.0):
        draw = functools.partial(flow.inverse, u, labels, guidance)
        seconds = medians({s: lambda d=draw, s=s: d(sampler=s) for s in SAMPLERS}, runs)
        blocks: list[int] = []  # the block of each sweep, in order
        found = draw(sampler="jacobi", watch=lambda block, solved, b=blocks: b.append(block))
        sweeps = " ".join(str(blocks.count(block)) for block in dict.fromkeys(blocks))
        difference = f"{float((found - draw()).abs().max()):.0e}"
        rows.append((name, batch, f"{guidance:g}", *seconds.values(), sweeps, difference))
    return rows


def jacobi_sweeps(checkpoint: Path, runs: int) -> None:
    trained = train.load_checkpoint(checkpoint, torch.device("cpu")).flow
    name = f"preset shapes, trained, K = {trained.num_latents}"
    rows = jacobi_rows(name, trained, 1, runs) + jacobi_rows(name, trained, 64, runs)
    rows += jacobi_rows(f"random weights, K = {K}", our_flow(gated=True), 1, runs)
    print("\n## Jacobi\n\nTolerance 1e-5; sweeps of each block, deep block first; seconds.")
    table("flow | batch | guidance | sequential | jacobi | sweeps | largest difference", rows)


def cost_report(arguments: str, training: bool) -> None:
    """What `evaluate.py cost` measures of training and sampling."""
    flags = evaluate.parse_arguments(["cost", *arguments.split()])
    flags.device = torch.device("cpu")
    flags.tokens = []
    found = evaluate.time_all(evaluate.model_to_time(flags), flags)
    print(f"\n`python evaluate.py cost {arguments}`\n".replace(f"{ROOT}/", ""))
    if training:
        for kind in ("eager", "compiled"):
            size, took = found["training"]["batch_size"], found["training"][kind]["ms_a_step"]
            print(f"Training step of {size} pictures, {kind}: {took:.0f} ms.")
    rows = [(name, row["s_an_image"]) for name, row in found["sampling"].items()]
    table("sampling | s an image", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tarflow", type=Path, required=True, help="clone of apple/ml-tarflow")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs/shapes/model.pt")
    parser.add_argument("--runs", type=int, default=5, help="turns of each measurement")
    options = parser.parse_args()
    if not options.checkpoint.exists():
        parser.error(f"{options.checkpoint} is missing: python train.py makes it")
    torch.manual_seed(0)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    load = os.getloadavg()[0]
    print(
        "# Benchmarks\n\n"
        "Written by `python tests/bench_tarflow.py --tarflow CLONE > BENCHMARKS.md`.\n"
        f"{cpu}, {os.cpu_count()} cores and threads where nothing else is said, Python "
        f"{platform.python_version()}, torch {torch.__version__}.\n"
        f"Medians of {options.runs} runs in turns, {3 * options.runs} of forward + backward beside "
        "ml-tarflow. GPU: not measured."
    )
    side_by_side(options.tarflow, options.runs)
    cost_against_tokens(options.runs)
    jacobi_sweeps(options.checkpoint, options.runs)
    print("\n## Training and sampling")
    cost_report(f"{options.checkpoint} --compile", training=True)
    cost_report("--preset mimflow-l --batches 1 --runs 3 --batch-size 1", training=False)
    print(
        f"\nLoad of the machine (1 minute) before and after: {load:.1f}, {os.getloadavg()[0]:.1f}."
    )


if __name__ == "__main__":
    main()
