"""Two priors on the same latents: the flow (flow.py) beside masked generation (emigm.py).

    python train.py && python tests/compare_priors.py          # about two hours on two cores
    python tests/compare_priors.py --times                     # on an otherwise idle machine

Not collected by pytest. On ONE frozen checkpoint of the preset shapes it trains, where they are
missing, (B) the flow again and (C) the second prior, with the same data and steps, one run a seed
in runs/priors/. The learning rate of each is the one with the least FD z on seed 0. Then it
compares them and (A) the flow that was trained jointly:

    class-correct   share of samples that an independent CNN (tests/judge.py) assigns to their class
    FD features     Frechet distance of that CNN's 128 pooled features, samples against pictures
    FD z            the same of the K*d latent numbers: of the priors alone, without the decoder
    critic          mean log p_B(z) in nats a latent number: the exact density as a judge of both
    loss of C       on real latents with a quarter, half, three quarters of the tokens visible

Prints README's table, and with matplotlib writes docs/priors.png: quality against calls.
"""

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not by pytest
import judge  # noqa: E402
from judge import distance, in_batches, real_latents  # noqa: E402

import train  # noqa: E402
from common.shapes import SHAPES  # noqa: E402
from emigm import draw_tokens, sampling_order  # noqa: E402
from evaluate import training_step  # noqa: E402

FLAGS = {"B": [], "C": ["--prior", "emigm"]}  # what is trained on the frozen latents
GUIDANCES, STEPS, BATCHES = (0.0, 1.0, 2.0), (1, 2, 4, 8, 16), (1, 8, 64)
NUMBERS = (*(f"correct_{w:g}" for w in GUIDANCES), "fd_features", "fd_z", "critic")


def run_folder(folder: Path, kind: str, seed: int, lr: str) -> Path:
    return folder / f"{kind}-seed{seed}-lr{lr}"


def trained(base: Path, folder: Path, kind: str, seed: int, lr: str) -> train.MIMFlow:
    """The model of a run, which is trained if it is not there; interrupted, it goes on."""
    out = run_folder(folder, kind, seed, lr)
    if not (out / "model.pt").exists() or train.load_checkpoint(out / "model.pt").step < 3000:
        command = [sys.executable, str(ROOT / "train.py"), "--init", str(base)]
        command += ["--freeze-autoencoder", "--mask-warmup", "0", "--nll-warmup", "0"]
        command += ["--nll-weight", "1", "--seed", str(seed), "--lr", lr, *FLAGS[kind]]
        subprocess.run([*command, "--out", str(out)], check=True)
    return train.load_checkpoint(out / "model.pt")


@torch.no_grad()
def sample_latents(model: train.MIMFlow, num: int, w: float, batch: int = 250, **how) -> Tensor:
    """z (num, K, d) of samples 0 .. num - 1, sample i of class i mod 10."""
    c, z = model.config, []
    for first in range(0, num, batch):
        indices = range(first, min(first + batch, num))
        u = train.sample_noise(0, indices, c.num_latents, c.latent_dim)
        labels = torch.tensor([i % len(SHAPES) for i in indices])
        if model.flow is not None:
            z.append(model.flow.inverse(u, labels, w))
        else:
            how = dict(steps=c.emigm_steps, interval=c.emigm_interval) | how
            order = sampling_order(0, indices, c.num_latents)
            schedule = c.emigm_schedule
            z.append(model.emigm.sample(u, labels, w, schedule=schedule, order=order, **how))
    return torch.cat(z)


class Comparison:
    """What all models are compared with: real pictures, the CNN, and the flow as critic."""

    def __init__(self, base: train.MIMFlow, critic: train.MIMFlow, num: int):
        self.decoder, self.critic, self.num = base.decoder, critic.flow, num
        self.images, self.z, self.labels = real_latents(base, num)
        self.cnn = judge.train_classifier(base.config.image_size)
        held_out = judge.recoloured(2000, base.config.image_size, seed=78)
        self.held_out = judge.accuracy(self.cnn, *held_out)
        self.features = in_batches(self.cnn[:-1], self.images)
        self.wanted = torch.arange(num) % len(SHAPES)

    def correct(self, z: Tensor) -> float:
        images = in_batches(self.decoder, z).clamp(-1, 1)
        return 100 * judge.accuracy(self.cnn, images, self.wanted[: len(z)])

    @torch.no_grad()
    def numbers(self, z: Tensor, labels: Tensor) -> dict[str, float]:
        """FD on features and on z, and the critic, of latents z (n, K, d)."""
        images = in_batches(self.decoder, z).clamp(-1, 1)
        rows = range(0, len(z), 250)
        log_p = [self.critic.log_prob(z[i : i + 250], labels[i : i + 250]) for i in rows]
        return {
            "fd_features": distance(in_batches(self.cnn[:-1], images), self.features),
            "fd_z": distance(z, self.z),
            "critic": float(torch.cat(log_p).mean()) / z[0].numel(),
        }

    @torch.no_grad()
    def of(self, model: train.MIMFlow, weights=GUIDANCES, **how) -> dict[str, float]:
        """All numbers of one prior."""
        found = {}
        for w in weights:
            z = sample_latents(model, self.num, w, **how)
            found[f"correct_{w:g}"] = self.correct(z)
            if w == 0:
                found |= self.numbers(z, self.wanted)
        return found

    @torch.no_grad()
    def loss(self, model: train.MIMFlow, visible: int) -> float:
        """C's loss on the real latents with so many tokens visible."""
        (B, K, d), R = self.z.shape, model.config.emigm_repeats
        generator, total = torch.Generator().manual_seed(0), 0.0
        for first in range(0, B, 250):
            rows = slice(first, first + 250)
            draws = draw_tokens(250, K, d, repeats=R, generator=generator)
            draws = draws._replace(visible=torch.full((250,), visible))
            total += float(model.emigm(self.z[rows], self.labels[rows], draws, K - 1).sum())
        return total / B


def seconds(model: train.MIMFlow, batch: int, **how) -> float:
    """Median seconds a picture of sampling latents, guidance 0."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        sample_latents(model, batch, 0.0, **how)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) / batch


def spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def plot(rows: dict[str, tuple[int, float, float]], path: Path) -> None:
    """Right classes and FD z against sequential calls of a network for one batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for place, label in enumerate(("class-correct at w = 0, %", "FD z, less is better"), start=1):
        axes = figure.add_subplot(1, 2, place)
        for name, values in rows.items():
            axes.scatter(values[0], values[place], c="C1" if name.startswith("C") else "C0")
            short = name.replace("emigm, ", "").partition(", the")[0]
            where = dict(xytext=(5, 4), textcoords="offset points", fontsize=8)
            axes.annotate(short, (values[0], values[place]), **where)
        axes.margins(x=0.2, y=0.1)
        axes.set(xscale="log", xlabel="sequential calls for a batch", ylabel=label)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/shapes/model.pt")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/priors")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lr", nargs="+", default=["0.0005", "0.001", "0.002", "0.004"], help="tried"
    )
    parser.add_argument("--num", type=int, default=5000, help="samples a number, 250 at a time")
    parser.add_argument("--times", action="store_true", help="print seconds only, of seed 0")
    options = parser.parse_args()
    make = functools.partial(trained, options.base, options.folder)
    base = train.load_checkpoint(options.base)
    calls_of_flow = (base.config.num_latents - 1) * len(base.flow.blocks)
    calls_of_emigm = {
        steps: steps * (1 + 8) for steps in STEPS
    }  # Transformer, and its head 8 times
    if options.times:
        return print_times({kind: make(kind, 0, options.lr[0]) for kind in FLAGS})

    first = {(kind, lr): make(kind, 0, lr) for kind in FLAGS for lr in options.lr}
    compare = Comparison(base, first["B", options.lr[0]], options.num)
    real = compare.numbers(compare.z, compare.labels)
    print(f"CNN on held-out recoloured pictures: {100 * compare.held_out:.1f} %")
    print("\n| seed 0 | lr | correct, w = 0 | FD features | FD z |\n" + "|---" * 5 + "|")
    best: dict[str, tuple[float, str]] = {}
    for (kind, lr), model in first.items():
        found = compare.of(model, (0.0,))
        cells = (f"{found[key]:.4g}" for key in ("correct_0", "fd_features", "fd_z"))
        print(f"| {kind} | {lr} | {' | '.join(cells)} |", flush=True)
        best[kind] = min(best.get(kind, (math.inf, "")), (found["fd_z"], lr))
    models = {kind: [make(kind, s, best[kind][1]) for s in options.seeds] for kind in FLAGS}
    compare.critic = models["B"][0].flow
    real = compare.numbers(compare.z, compare.labels)
    print(f"\nreal latents: critic {real['critic']:.3f}, FD features {real['fd_features']:.3g}")
    rows, plotted = {"A, the joint flow": ([base], {}, calls_of_flow)}, {}
    rows["B, the flow again"] = (models["B"], {}, calls_of_flow)
    for steps, calls in calls_of_emigm.items():
        rows[f"C, emigm, {steps} steps"] = (models["C"], dict(steps=steps), calls)
    columns = ["calls", *(f"correct, w = {w:g}" for w in GUIDANCES), "FD features", "FD z"]
    print(f"\n| prior | {' | '.join([*columns, 'critic'])} |\n{'|---' * 8}|")
    for name, (several, how, calls) in rows.items():
        found = [compare.of(model, **how) for model in several]
        cells = [spread([one[key] for one in found]) for key in NUMBERS]
        print(f"| {name} | {calls} | {' | '.join(cells)} |", flush=True)
        means = (float(np.mean([one[key] for one in found])) for key in ("correct_0", "fd_z"))
        plotted[name] = (calls, *means)
    for visible in (4, 8, 12):
        values = [compare.loss(model, visible) for model in models["C"]]
        print(f"loss of C, {visible} of 16 visible: {spread(values)}")
    plot(plotted, ROOT / "docs/priors.png")


def print_times(models: dict[str, train.MIMFlow]) -> None:
    """Seconds a picture of sampling latents, guidance 0, and milliseconds a training step."""
    print(
        f"| prior | {' | '.join(f'ms a picture, batch {b}' for b in BATCHES)} |\n|---|---|---|---|"
    )
    rows = {"B": (models["B"], {})} | {f"C, {s} steps": (models["C"], dict(steps=s)) for s in STEPS}
    for name, (model, how) in rows.items():
        cells = (f"{1000 * seconds(model, batch, **how):.3g}" for batch in BATCHES)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for kind in models:
        model = models[kind]
        step = training_step(model.config, model.config.batch_size, torch.device("cpu"))
        taken = timeit.repeat(step, number=1, repeat=25)[5:]
        print(f"training step of {kind}: {1000 * statistics.median(taken):.0f} ms, median of 20")


if __name__ == "__main__":
    main()
