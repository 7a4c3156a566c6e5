"""Where the paper's claim begins: masked training against unmasked, row by row (Tab. 5, Tab. 8).

    python tests/claims.py                   # trains and judges what is missing; hours on two cores
    python tests/claims.py --only "NLL 0.03" # the rows whose names hold one of these words
    python tests/claims.py --table           # table and plots of what is there; trains nothing

Not collected by pytest. The paper hides 40-60 % of the patches and says that a flow of given size
then models the latents better, so that samples get better. Every row of GRID is a setting of the
built-in pictures, every arm of it a share of hidden patches; they share steps, data, sizes and
seeds. One process a core trains (runs/claims/ROW-ARM-sSEED, continued if it was interrupted) and
judges by tests/judge.py: FD of samples (guidance 0), rFD of reconstructions, gap = FD - rFD, the
share of samples of the right class; beside it the NLL of validation latents with their class (nats
a latent number, without log(2 pi) / 2) and linear probes of the latents, pooled and flat.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, not by pytest
import judge  # noqa: E402

import train  # noqa: E402
from evaluate import train_probes  # noqa: E402

PICTURES = 2000  # judged in each run
SEEDS = (0, 1, 2)
MASKS = {"none": "0 0", "20-40 %": "0.2 0.4", "40-60 %": "0.4 0.6", "60-80 %": "0.6 0.8"}
MASKS["0-80 %"] = "0 0.8"  # "mixed"; the paper gives no range


# The paper's proportions in small: 12 x 12 patches, small beside what they show; a latent of 512
# numbers, K = 32 and d = 16, and a flow too small for it: only so is there something to gain.
SETTING, SIZE, PATCHES = "--preset masks", 36, 12  # of a side: pixels, patches
LARGE = "--flow-width 96 --flow-head-dim 24 --flow-depths 1 1 1 3"  # that of `shapes`
NLL_WEIGHTS = ("0.003", "0.01", "0.03", "0.1")  # of Eq. 6; 0.01 is the preset's
SHORT = "--steps 2000 --nll-weight"
THREE = ("none", "20-40 %", "40-60 %")


class Row(NamedTuple):
    """A setting; its arms are the shares of hidden patches."""

    name: str
    flags: str
    arms: tuple[str, ...] = ("none", "40-60 %")
    before: str = ""  # the row whose models it goes on from, in phase 2


# A flow is layers x width of its Transformers.
GRID = [Row(f"NLL {w}, flow 2 x 32", f"{SHORT} {w}") for w in NLL_WEIGHTS]
GRID[1] = GRID[1]._replace(arms=THREE)
GRID += [
    Row("NLL 0.01, flow 2 x 16", f"{SHORT} 0.01 --flow-width 16", THREE),
    Row("K 16", f"{SHORT} 0.03 --num-latents 16"),
    Row("teacher 0.3", f"{SHORT} 0.03 --teachers TEACHER --teacher-weight 0.3"),
    Row("other ratios", f"{SHORT} 0.03", ("20-40 %", "60-80 %", "0-80 %")),
]
# The preset's 4,000 steps: there, after phase 2, masks pay. Tab. 5, 8 and 9 in miniature.
GRID += [
    Row("NLL 0.01, 4,000 steps", ""),
    Row("NLL 0.03, 4,000 steps", "--nll-weight 0.03"),
    Row("other ratios, 4,000 steps", "", ("20-40 %", "60-80 %", "0-80 %")),
    Row("MIM weight 5, 4,000 steps", "--mim-weight 5", ("40-60 %",)),
    Row("MIM weight 10, 4,000 steps", "--mim-weight 10", ("40-60 %",)),
    Row("teacher 1, 4,000 steps", "--teachers TEACHER"),  # the paper's weight
    Row("flow 6 x 96, 4,000 steps", LARGE),
    Row("K 16, 4,000 steps", "--num-latents 16"),
    Row("K 48, 4,000 steps", "--num-latents 48"),
    Row("sigma 0.2, 4,000 steps", "--sigma 0.2"),
    Row("sigma 0.5, 4,000 steps", "--sigma 0.5"),
]
AFTER = [*GRID[:4], *(row for row in GRID if "steps" in row.name)]
GRID += [Row(f"phase 2 of {row.name}", row.flags, row.arms, before=row.name) for row in AFTER]


class Run(NamedTuple):
    """One training and its folder."""

    row: Row
    arm: str
    seed: int
    folder: Path

    @property
    def command(self) -> list[str]:
        flags = f"{SETTING} {self.row.flags} --mask-ratio {MASKS[self.arm]} --seed {self.seed}"
        if "TEACHER" in flags:
            flags = flags.replace("TEACHER", str(teacher_file(self.folder.parent, SIZE, PATCHES)))
        if self.row.before:
            first = run_folder(self.folder.parent, self.row.before, self.arm, self.seed)
            flags += f" --phase decoder --init {first}/model.pt --steps 600"
        return [*flags.split(), "--out", str(self.folder)]


# --------------------------------------------------------------------------------------------------
# A teacher for Eq. 7 that needs no download


class Teacher(nn.Module):
    """The trunk of a CNN that tells recoloured shapes apart: another one than the judge."""

    def __init__(self, size: int, grid: int):
        super().__init__()
        self.trunk = judge.train_classifier(size, seed=2)[:11]  # up to the third ReLU
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> features (B, grid * grid, 128)."""
        features = self.trunk(images)  # (B, 128, H/4, W/4)
        features = F.interpolate(features, (self.grid, self.grid), mode="bilinear")
        return features.flatten(2).transpose(1, 2)


def teacher_file(folder: Path, size: int, grid: int) -> Path:
    path = folder / f"teacher-{size}-{grid}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.jit.trace(Teacher(size, grid).eval(), torch.zeros(2, 3, size, size)).save(str(path))
    return path


# --------------------------------------------------------------------------------------------------
# One run: trained and judged


def train_and_judge(run: Run) -> None:
    """Do what is missing, each in a process of its own."""
    where, python = run.folder, [sys.executable, "-u"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if (where / "judged.json").exists():
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{where}.txt", "a") as log:
        how = dict(check=True, env=environment, cwd=ROOT, stdout=log, stderr=log)
        subprocess.run([*python, str(ROOT / "train.py"), *run.command], **how)
        subprocess.run([*python, __file__, "--judge", str(where)], **how)
    print(f"{where} done", flush=True)


def the_judge(folder: Path, size: int) -> judge.Judge:
    path = folder / f"judge-{size}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(judge.Judge(size), path)
    return torch.load(path, weights_only=False)  # our own file


@torch.no_grad()
def probes(model: train.MIMFlow) -> dict[str, float]:
    """Linear probes of the latents mu (B, K, d) of whole pictures: their mean, and all of them."""
    sets = []
    for split, count in (("train", 4000), ("val", PICTURES)):
        pictures = judge.Pictures(None, model.config.image_size, split)
        parts = (pictures[range(i, i + 250)] for i in range(0, count, 250))
        mu, labels = zip(*((model.encoder(part[0]), part[1]) for part in parts), strict=True)
        x = torch.cat(mu)  # (count, K, d)
        sets.append(({"pooled": x.mean(dim=1), "flat": x.flatten(1)}, torch.cat(labels)))
    with torch.enable_grad():
        return train_probes(*sets, 90, 0, torch.device("cpu"))


@torch.no_grad()
def judge_run(folder: Path) -> None:
    """Write judged.json: all numbers of one run."""
    torch.set_num_threads(1)
    model = train.load_checkpoint(folder / "model.pt")
    found = the_judge(folder.parent, model.config.image_size).of(model, PICTURES)
    _, z, labels = judge.real_latents(model, PICTURES)
    log_p = judge.in_batches(lambda z, y: model.flow.log_prob(z, y), z, labels)
    nll = -log_p.mean().item() / z[0].numel() - 0.5 * float(np.log(2 * np.pi))
    found |= {"nll": nll, "gap": found["fd_0"] - found["fd_r"], **probes(model)}
    (folder / "judged.json").write_text(json.dumps(found, indent=1))


# --------------------------------------------------------------------------------------------------
# The table

COLUMNS = {  # heading -> key of judged.json
    "rFD": "fd_r", "FD": "fd_0", "gap": "gap", "right, %": "right_0", "MSE": "mse", "NLL": "nll",
    "probe pooled / flat": "pooled",
}  # fmt: skip
SHOWN = "phase 2 of NLL 0.01, 4,000 steps"  # the row whose samples are shown


def cell(values: list[float]) -> str:
    """Mean and, of several seeds, their standard deviation."""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def collect(row: str, arm: str, folder: Path) -> dict[str, list[float]]:
    """key of judged.json -> its values over the seeds that are there."""
    files = (run_folder(folder, row, arm, seed) / "judged.json" for seed in SEEDS)
    found = [json.loads(path.read_text()) for path in files if path.exists()]
    return {key: [one[key] for one in found] for key in (found[0] if found else ())}


def print_table(rows: list[Row], folder: Path) -> None:
    print(f"| setting | hidden | seeds | {' | '.join(COLUMNS)} |\n{'|---' * (3 + len(COLUMNS))}|")
    for row in rows:
        for arm in MASKS:
            if not (found := collect(row.name, arm, folder)):
                continue
            cells = [cell(found[key]) for key in COLUMNS.values()]
            cells[-1] += f" / {cell(found['flat'])}"
            print(f"| {row.name} | {arm} | {len(found['nll'])} | {' | '.join(cells)} |")


def plot(folder: Path, path: Path) -> None:
    """FD and rFD against the weight of the NLL, before and after phase 2; FD against the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    one, two, right = figure.subplots(1, 3)
    weights = {float(w): f"NLL {w}, flow 2 x 32" for w in NLL_WEIGHTS}  # x -> row
    steps, later = {2000: weights[0.01], 4000: "NLL 0.01, 4,000 steps"}, "phase 2 of "
    lines = [(one, weights, "", "fd_0", "-"), (one, weights, "", "fd_r", ":")]
    lines += [(two, weights, later, "fd_0", "-"), (two, weights, later, "fd_r", ":")]
    lines += [(right, steps, "", "fd_0", "--"), (right, steps, later, "fd_0", "-")]
    for color, arm in enumerate(("none", "40-60 %")):
        for axes, rows, phase, key, style in lines:
            found = {x: collect(phase + row, arm, folder).get(key) for x, row in rows.items()}
            found = {x: values for x, values in found.items() if values}
            text = {":": ": reconstructions", "--": ", before phase 2"}.get(style, "")
            how = dict(label=f"{arm} hidden{text}", color=f"C{color}", linestyle=style)
            axes.plot(list(found), [np.mean(values) for values in found.values()], **how)
            for x, values in found.items():  # each training a dot
                axes.plot([x] * len(values), values, ".", color=f"C{color}")
    titles = ("phase 1, 2,000 steps", "after phase 2", "NLL 0.01, by the steps of phase 1")
    for axes, title in zip((one, two, right), titles, strict=True):
        axes.set(ylabel="Frechet distance", yscale="log", ylim=(0.1, 60), title=title)
        axes.set(xlabel="weight of the NLL", xscale="log", xlim=(0.0025, 0.13))
        axes.legend(fontsize=7, loc="lower left")
    right.set(xlabel="steps", xscale="linear", xlim=(1800, 4200), xticks=list(steps))
    figure.savefig(path, dpi=110)


@torch.no_grad()
def samples_side_by_side(row: Row, folder: Path, path: Path) -> None:
    """The same noise through the models of a row, seed 0: ten classes down, six samples an arm."""
    blocks = []
    for arm in row.arms:
        model = train.load_checkpoint(run_folder(folder, row.name, arm, 0) / "model.pt")
        noise = train.sample_noise(0, range(60), model.config.num_latents, model.config.latent_dim)
        images = model.sample(noise, torch.arange(10).repeat_interleave(6))  # (60, 3, H, W)
        grid = images.unflatten(0, (10, 6)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        blocks += [grid, torch.ones(*grid.shape[:2], 8)]  # (3, 10 H, 6 W), and white between
    save_image(torch.cat(blocks[:-1], dim=2) * 0.5 + 0.5, path)


def run_folder(folder: Path, row: str, arm: str, seed: int) -> Path:
    return folder / f"{row}-{arm}-s{seed}".replace(" %", "").replace(" ", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/claims")
    parser.add_argument("--only", nargs="+", default=[""], help="words in the names of rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print what is there")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)  # what a run calls itself
    options = parser.parse_args()
    if options.judge:
        return judge_run(options.judge)
    rows = [row for row in GRID if any(word in row.name for word in options.only)]
    if not options.table:
        the_judge(options.folder, SIZE)  # before two processes want it
        if any("TEACHER" in row.flags for row in rows):
            teacher_file(options.folder, SIZE, PATCHES)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for seed in options.seeds:  # outermost: the whole map first, then its spread
                for later in (False, True):  # phase 2 goes on from models of phase 1
                    runs = [
                        Run(row, arm, seed, run_folder(options.folder, row.name, arm, seed))
                        for row in rows
                        if bool(row.before) == later
                        for arm in row.arms
                    ]
                    list(pool.map(train_and_judge, runs))
    print_table(rows, options.folder)
    if options.table:
        plot(options.folder, ROOT / "docs/claims.png")
        row = next(row for row in GRID if row.name == SHOWN)
        samples_side_by_side(row, options.folder, ROOT / "docs/claims-samples.png")


if __name__ == "__main__":
    main()
