"""Every number of the paper's tables and Fig. 4 and 6 (Sec. 4, App. C), a subcommand each.

    python evaluate.py generation SAMPLES.npz VIRTUAL_imagenet256_labeled.npz           Tab. 3
    torchrun --nproc_per_node=8 -- evaluate.py generation CKPT REFERENCE --num 50000
    python evaluate.py reconstruction CKPT --data DIR             rFID, PSNR, LPIPS     Tab. 5
    python evaluate.py probe CKPT --data DIR                      linear probe          Fig. 6
    python evaluate.py likelihood CKPT --data DIR                 log p_F(z)            Eq. 4
    python evaluate.py map CKPT --data DIR                        latents in 2-D        Fig. 4
    python evaluate.py cost --preset mimflow-l --no-timing        sizes, speed    Tab. 2, 4, 10
    python evaluate.py curves RUN [RUN ...]                       training, as log.jsonl tells it

    pictures --TF1 resize, Inception (2015)--> pool (N, 2048), spatial (N, 2023)
        pool of two sets    -> FID, precision, recall        spatial of two sets -> sFID
        pool of the samples -> Inception Score
    x --masked encoder, noise--> z --decoder--> x_hat                       reconstruction
    x --encoder--> features (K, C) --> mu (K, d) --flow--> block 1 .. u     probe, map
    z as in reconstruction -> log p_F(z)                                    likelihood

The five numbers of generation are those of ADM's evaluation suite (Dhariwal & Nichol 2021), whose
.npz files are read and written here. Every number is printed and written (--json) with its
protocol: what was measured, and how. Numbers do not depend on --batch-size or on the number of
processes, but for rounding: picture i has its own random stream, from (seed, i), and batch j is
process j mod world_size's. Process 0 puts them in order and computes the rest alone: a subcommand
is a generator that yields once where the others leave, and then its numbers (see `main`).

Pictures are in [0, 255] where Inception looks, and in [-1, 1] where the model does.
"""

import common  # noqa: F401  # isort: skip (before torch: Ctrl-C)
import functools
import importlib.util
import itertools
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import sample
import train
from common import data, runs
from common.data import Pictures, PictureSet
from common.inception import FIDInception, inception_features, load_inception
from common.measuring import Numbers, look, read_log, report, seconds
from common.runs import describe_file, fail, positive, printable, progress, say, uses_bf16
from common.shapes import to_uint8
from common.weights import RANDOM, WeightsMissing, find_weights
from losses import Perceptual, flow_nll, load_frozen_networks, pixel_loss
from train import Config, MIMFlow, count_parameters, draws_of_pictures, load_checkpoint

Stages = Iterator[Numbers | None]  # of a subcommand: None where the other processes leave, numbers
Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W), labels (B,), numbers in the dataset

SCORE_SPLIT = 5000  # pictures a split of the Inception Score
NEIGHBOUR = 3  # k of precision and recall
# Pictures that a metric needs on each side: a covariance has 2, a third neighbour 3 others.
LEAST = {"fid": 2, "sfid": 2, "inception_score": 1, "precision": 4, "recall": 4}
BLOCK, ROWS = 2048, 256  # rows held in float64 at a time; rows whose distances to all are
BOX = 21  # side of the box filter that parts low from high frequencies, pixels
SHOWN = 8  # pictures in a row of the reconstruction grid
# The linear probe (Sec. 4.1.1; what the paper leaves open, from its release)
PROBE_EPOCHS, PROBE_BATCH, PROBE_LR, PROBE_MOMENTUM, PROBE_DECAY = 90, 2048, 0.1, 0.9, 1e-4
RANDOM_STD = 0.1  # of a fresh flow's predictions: at 0 jacobi would be done at once


# --------------------------------------------------------------------------------------------------
# ADM's five numbers, from features
#
#     FID, sFID   |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)    lower is better, 0 = equal
#     IS          exp E_x KL(p(y|x) || E_x p(y|x))                      higher, 1 to 1008
#     precision   share of the samples that lie among reference pictures  higher, 0 to 1: fidelity
#     recall      share of the reference that lies among samples          higher, 0 to 1: variety
# Few pictures make an FID larger, by an amount that depends on the model: even an order of models
# at 10,000 samples (Tab. 8) says little about that at 50,000 (Tab. 3).


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), float64, over N - 1. In two passes, as
    one, E x x^T - mu mu^T, would subtract large numbers that are nearly equal."""
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for first in range(0, len(features), BLOCK):
        centred = features[first : first + BLOCK] - mean
        covariance += centred.T @ centred
    return mean, covariance / (len(features) - 1)


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Heusel et al. 2017: the squared Wasserstein distance of two Gaussians with these means (D,)
    and covariances (D, D), in squared units of the features. Equal sets may give -1e-8, as in ADM.

    paper (ADM): scipy's sqrtm of sigma1 sigma2, which is not symmetric; its root becomes complex
    when there are fewer pictures than features. Here: the trace of (M^T sigma2 M)^(1/2), where
    sigma1 = M M^T. Both matrices have the same eigenvalues, but this one is symmetric.
    """
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(eigenvalues.clip(min=0))  # M (D, D); rounding makes zeros negative
    squares = np.linalg.eigvalsh(root.T @ sigma2 @ root)  # (D,)
    cross = np.sqrt(squares.clip(min=0)).sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


@torch.no_grad()
def inception_score(network: FIDInception, pool: Tensor) -> float:
    """Salimans et al. 2016: exp of the mean KL(p(y|x) || p(y)), nats, of pool features (N, 2048).

    High when each sample is surely of one class (p(y|x) is sharp) and all classes occur (p(y) is
    flat). p(y) is the mean of p(y|x) over a split, 5000 rows in file order (a shorter last one
    counts as much): in a file sorted by class, a split has few classes and the score falls.
    """
    scores = []
    for split in pool.split(SCORE_SPLIT):
        logits = network.logits(split.to(network.fc.weight)).cpu()  # (n, 1008)
        log_p = logits.double().log_softmax(dim=1)  # in log space, as p may be 0 in floating point
        log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))  # log p(y), (1008,)
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)  # (n,)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(m, D), (n, D) -> (m, n), float64. ADM's float16 has steps of 0.25 to 0.5 where |a|^2 = 500:
    many distances tie, `<=` admits more, and how many depends on the hardware."""
    a, b = a.double(), b.double()
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (squares - 2 * a @ b.T).clamp_(min=0)


def neighbour_radii(features: Tensor) -> Tensor:
    """Squared distance (N,) of each row of (N, D) to its third nearest other row, N >= 4."""
    blocks = progress(features.split(ROWS), "radii")  # of 50,000 rows all would take 20 GB
    nearest = [squared_distances(rows, features).kthvalue(NEIGHBOUR + 1) for rows in blocks]
    return torch.cat([found.values for found in nearest])  # number 1 is the row itself


def share_covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points (n, D) that lie within the ball of some centre (m, D), radii (m,)."""
    blocks = progress(points.split(ROWS), "coverage")
    inside = [(squared_distances(rows, centres) <= radii).any(dim=1) for rows in blocks]
    return float(torch.cat(inside).double().mean())


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019 with k = 3 on pool features (S, 2048), (R, 2048), S and R >= 4.

    A set "is" the union of balls around its points that reach to the third neighbour. More points
    make smaller balls, so both numbers depend on both counts: papers have 50,000 samples and 10,000
    pictures. ADM prints 0.001 to 0.0025 more (see squared_distances).
    """
    samples, reference = samples.double(), reference.double()
    precision = share_covered(samples, reference, neighbour_radii(reference))
    return precision, share_covered(reference, samples, neighbour_radii(samples))


# --------------------------------------------------------------------------------------------------
# A checkpoint, and the pictures it is looked at with


def describe_checkpoint(path: Path, model: MIMFlow) -> Numbers:
    """What the protocol says of a checkpoint."""
    return {**describe_file(path), "step": model.step, "weights": "EMA"}


def open_checkpoint(flags: Namespace, num: int | None) -> tuple[MIMFlow, Pictures, Numbers]:
    """The model of the checkpoint that the command line names, with its EMA weights; `num` pictures
    training never saw, of val/ (a folder without: of all of it); the protocol of the checkpoint."""
    path = flags.checkpoint = runs.find_checkpoint(flags.checkpoint)
    model = load_checkpoint(path, flags.device)
    flags.data = model.config.data if flags.data is None else flags.data
    size, places = model.config.image_size, model.config.caption_words
    if places and flags.command in ("probe", "map"):
        fail(f"{path} reads captions and has no classes, which {flags.command} needs", 2)
    pictures = Pictures(flags.data, size, "val", num, flags.seed, places)
    if "out" in flags:
        flags.out = flags.out or runs.beside(path, f"{flags.command}.png")
        runs.check_output(flags.out, ".png", [path, Path(pictures.source)])
    return model, pictures, {"checkpoint": describe_checkpoint(path, model), "seed": flags.seed}


# --------------------------------------------------------------------------------------------------
# generation (Tab. 3; the columns gFID to Rec. of Tab. 5, 8 and 9)
#
# Are the samples like real pictures, and as varied? A number compares with a paper's only if the
# reference file, the count (50,000, or 10,000 in Tab. 8), the guidance and the Inception are the
# same. Compare FIDs with and without guidance apart: guidance sharpens each picture (precision, IS
# up) and narrows the set (recall down), and FID is best somewhere between.


def generation(flags: Namespace) -> Stages:
    """FID, sFID, IS, precision, recall of samples against a reference set (Tab. 3)"""
    # What is compared; a checkpoint samples first, and keeps its samples.
    reference = PictureSet(flags.reference, flags.crop)
    network, protocol = load_inception(flags.inception, flags.device)
    path, facts = sample_checkpoint(flags) if flags.samples.suffix == ".pt" else (flags.samples, {})
    sets = PictureSet(path, flags.crop), reference
    statistics = [x.statistics() if x.has_statistics else {} for x in sets]
    protocol |= {**facts, "samples": sets[0].describe(), "reference": reference.describe()}
    protocol["precision_recall"] = "float64; ADM's float16 gives 0.001 to 0.0025 more"

    def work(images: Tensor) -> dict[str, Tensor]:
        features = map(torch.from_numpy, inception_features(network, images))
        return dict(zip(("pool", "spatial"), features, strict=True))

    found = [look(work, pictures, pictures.path.name, flags) for pictures in sets]
    yield  # the other processes leave
    if (count := len(sets[0])) != 50_000:
        say(f"note: papers use 50,000 samples, not {count:,}, and FID depends on the number")
    numbers, left_out = dict.fromkeys(LEAST), {}
    for (name, least), side in itertools.product(LEAST.items(), sets):
        if len(side) < least and not (side.has_statistics and name in ("fid", "sfid")):
            left_out[name] = f"needs {least} pictures, {side.path} has {len(side)}"
    for name, kind, end in (("fid", "pool", ""), ("sfid", "spatial", "_s")):
        if name not in left_out:  # as in ADM, what a file says goes before what its pictures say
            first, second = (
                (known["mu" + end], known["sigma" + end]) if known else moments(x[kind].numpy())
                for known, x in zip(statistics, found, strict=True)
            )
            numbers[name] = frechet_distance(*first, *second)
    numbers["inception_score"] = inception_score(network, found[0]["pool"])
    if "precision" not in left_out:
        device = "cpu" if flags.device.type == "mps" else flags.device  # mps has no float64
        pools = (features["pool"].to(device) for features in found)
        numbers["precision"], numbers["recall"] = precision_recall(*pools)
    yield {**numbers, "protocol": {**protocol, "left_out": left_out}}


def sample_checkpoint(flags: Namespace) -> tuple[Path, Numbers]:
    """Sample --num pictures by sample.py, on all processes, into an .npz that is kept; its path and
    what the protocol says of it. Labels cycle through the classes, so that each split of the
    Inception Score has all of them."""
    model = load_checkpoint(flags.samples, flags.device)
    known = describe_checkpoint(flags.samples, model)  # now: a training may replace the file
    if model.config.caption_words:
        fail(f"{flags.samples} reads captions: sample.py --prompts FILE --npz NPZ, then this", 2)
    count, guidance = model.config.num_classes, sample.choose_guidance(flags.guidance, model)
    names = ("num", "constant_guidance", "guidance_rule", "denoise", "seed", "batch_size")
    chosen = {"guidance": guidance, **{name: getattr(flags, name) for name in names}}
    file = f"samples_of_{flags.samples.stem}_{flags.num}_guidance_{guidance:g}_seed_{flags.seed}"
    file += "_constant" * flags.constant_guidance + "_denoised" * flags.denoise
    file += f"_{flags.guidance_rule}" * (flags.guidance_rule != "tarflow")
    path = flags.npz or flags.samples.with_name(f"{file}.npz")
    room = 6 * flags.num * model.config.image_size**2  # bytes: the parts, then the whole
    runs.check_output(path, ".npz", [flags.samples, flags.reference], room)
    options = Namespace(**vars(sample.parse_arguments([])) | chosen | {"npz": path})
    sample.refuse_flags_of_the_other(options, model)
    options.bf16 = False  # a number should not depend on the device it came from
    sample.sample_set(flags.samples, model, list(range(count)) or [-1], options)  # -1 = no class
    labels = f"sample i has class i mod {count}" if count else "none"
    return path, {**chosen, "checkpoint": known, "labels": labels}


# --------------------------------------------------------------------------------------------------
# reconstruction (rFID of Tab. 5, 8 and 9)
#
# What does a picture lose on its way through z? Half of its patches are hidden, as in training, so
# these numbers are worse than those of a tokenizer that sees everything (--mask-ratio 0 0). rFID
# compares two sets, of a size that matters (papers: ImageNet's 50,000), and forgives another,
# plausible picture; PSNR and MSE compare pixels and reward blur; LPIPS is between. The MSE and its
# frequencies are of x_hat as it is, which is what training minimises; the others of 8-bit pictures.


def frequency_errors(error: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square of the low and of the high frequencies of x - x_hat (B, 3, H, W), (B,) each.

    Low l is what a 21 x 21 box filter, cut off at the border, leaves of the error e, high h = e - l
    the rest. They do not quite add up to the MSE: mean e^2 = mean l^2 + mean h^2 + 2 mean l h.
    """
    low = F.avg_pool2d(error, BOX, stride=1, padding=BOX // 2, count_include_pad=False)
    return low.square().mean(dim=(1, 2, 3)), (error - low).square().mean(dim=(1, 2, 3))


def peak_signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """PSNR = 10 log10(255^2 / MSE) (B,) in dB of uint8 (B, 3, H, W); equal pictures have inf. Its
    mean over pictures, which is printed, is not the PSNR of the mean MSE, but more."""
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().mean(dim=(1, 2, 3)))


def load_judges(flags: Namespace, side: int, count: int) -> tuple[Any, Any, Numbers]:
    """The frozen networks of rFID and LPIPS, and the protocol. What needs weights from elsewhere,
    or larger or more pictures than `count` of `side` x `side` pixels, is left out without them."""
    inception, perceptual, protocol, left_out = None, None, {}, {}
    try:
        inception, protocol = load_inception(flags.inception, flags.device)
    except WeightsMissing as error:
        left_out["rfid"] = str(error)
    try:
        perceptual = Perceptual(vgg := find_weights("vgg", flags.vgg)).to(flags.device)
        protocol["vgg"] = vgg if vgg == RANDOM else describe_file(vgg)
    except WeightsMissing as error:
        left_out["lpips"] = str(error)
    for name, path in (("rfid", flags.inception), ("lpips", flags.vgg)):
        if path and name in left_out:  # asked for by name
            fail(left_out[name])
    least = dict(low_frequency_error=BOX, high_frequency_error=BOX, lpips=Perceptual.MIN_SIDE)
    left_out |= {k: f"needs pictures of at least {n} x {n}" for k, n in least.items() if side < n}
    if count < LEAST["fid"]:
        left_out.setdefault("rfid", f"needs {LEAST['fid']} pictures, there is {count}")
    return inception, perceptual, {**protocol, "left_out": left_out}


def reconstruction(flags: Namespace) -> Stages:
    """rFID, PSNR, LPIPS, MSE and its frequencies, decoded from masked pictures (Tab. 5)"""
    model, pictures, protocol = open_checkpoint(flags, flags.num)
    config = replace(model.config, mask_ratio=tuple(flags.mask_ratio or model.config.mask_ratio))
    inception, perceptual, facts = load_judges(flags, config.image_size, len(pictures))
    evenly = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)
    shown = torch.from_numpy(pictures.numbers[evenly])  # of the grid
    names = ("rfid", "psnr", "lpips", "mse", "low_frequency_error", "high_frequency_error")
    wanted = set(names) - facts["left_out"].keys()

    @torch.no_grad()
    def work(batch: Batch) -> dict[str, Tensor]:
        images, numbers = batch[0].to(flags.device), batch[2]
        draws = draws_of_pictures(config, numbers.tolist(), flags.seed, flags.device)
        _, z = model.latents(images, draws)  # (B, K, d)
        decoded = model.decoder(z)
        saved = [to_uint8(x) for x in (images, decoded)]
        found = {"mse": pixel_loss(images, decoded), "psnr": peak_signal_to_noise(*saved)}
        if "low_frequency_error" in wanted:
            low, high = frequency_errors(images - decoded)
            found |= {"low_frequency_error": low, "high_frequency_error": high}
        if "lpips" in wanted:
            found["lpips"] = perceptual(*(x / 127.5 - 1 for x in saved))
        if "rfid" in wanted:
            pool = [inception_features(inception, x)[0] for x in saved]
            found["rfid"] = torch.from_numpy(np.stack(pool, axis=1))  # (B, 2, 2048)
        rows = torch.isin(numbers, shown).nonzero().flatten().tolist()
        sides = images, sample.hide_patches(images, draws.mask), decoded
        found["shown"] = torch.stack([x[rows] for x in sides], dim=1)  # (rows, 3, 3, H, W)
        return {name: values.cpu() for name, values in found.items()}

    found = look(work, pictures, "reconstruction", flags)
    yield  # the other processes leave
    grid = found.pop("shown").transpose(0, 1).flatten(0, 1).clamp(-1, 1)
    data.save_png(grid, len(shown), flags.out)
    say(f"{flags.out}: originals, what the encoder sees, reconstructions")
    numbers: Numbers = dict.fromkeys(names)
    if "rfid" in found:
        x, x_hat = found.pop("rfid").numpy().swapaxes(0, 1)  # (n, 2048) each
        numbers["rfid"] = frechet_distance(*moments(x), *moments(x_hat))
    numbers |= {name: float(values.double().mean()) for name, values in found.items()}
    protocol |= {**pictures.describe(), "mask_ratio": config.mask_ratio, "sigma": config.sigma}
    protocol["mse"] = "of [-1, 1], unrounded; PSNR, LPIPS, rFID after rounding to 8 bits"
    yield {**numbers, "protocol": {**protocol, **facts}}


# --------------------------------------------------------------------------------------------------
# probe (Acc. of Tab. 5, Fig. 6)
#
# How much of the class can one linear layer read off? The networks stay frozen. Two traps:
# - The flow is given no label. With it, the probe would read off what it was told.
# - A drop towards the last blocks is no loss of information: the flow is invertible. But they turn
#   tokens into independent noise, which the paper's mean over tokens cancels: see --pool flat.
# paper: "REPA's protocol"; here: that of the authors' release, which trains on the K outputs of the
# encoder before they are projected to d numbers (encoder_features: Tab. 5's Acc.), and in the flow
# on hidden features of attention layers; here: on the outputs of blocks.


@torch.no_grad()
def representations(model: MIMFlow, images: Tensor, pool: str) -> dict[str, Tensor]:
    """What is probed of full images (B, 3, H, W) in [-1, 1]: encoder features, latent, output of
    each flow block, each (B, dimension): the mean of the K tokens (C or d numbers), or with pool
    "flat" all of them (K times as many). No mask, no noise, no label."""
    features = model.encoder.features(images)  # (B, K, C)
    latent = model.encoder.projection(features)  # (B, K, d)
    found = {"encoder_features": features, "latent": latent}
    if model.flow is not None:  # the second prior has no blocks that carry z to noise
        blocks, _ = model.flow.intermediates(latent, labels=None)
        found |= {f"flow_block_{i}": x for i, x in enumerate(blocks, start=1)}
    return {k: x.mean(dim=1) if pool == "mean" else x.flatten(1) for k, x in found.items()}


class LinearProbe(nn.Module):
    """(B, D) -> (B, classes): standardise, BatchNorm without learnt scale (MAE's probe), linear.

    The standardisation, by the training set x (n, D), gives BatchNorm's running averages nothing to
    catch up on: a short probe ends before one that begins at 0 has reached a mean of 50.
    """

    def __init__(self, x: Tensor, classes: int, generator: torch.Generator):
        super().__init__()
        std, mean = torch.std_mean(x, dim=0, correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=1e-6))  # a number that never changes stays 0
        self.norm = nn.BatchNorm1d(x.shape[1], eps=1e-6, affine=False)
        self.linear = nn.Linear(x.shape[1], classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm((x.to(self.mean) - self.mean) / self.std))


Labelled = tuple[dict[str, Tensor], Tensor]  # name -> x (n, D) on the CPU, and labels (n,)


def train_probes(
    train_set: Labelled, val_set: Labelled, epochs: int, seed: int, device: torch.device
) -> dict[str, float]:
    """Top-1 accuracy in percent of a linear classifier on each representation.

    All probes see the same batches, and share no weight: the gradient of the sum of their losses is
    that of each alone. The last step is judged: choosing the best would be learning from val_set.
    """
    (x, labels), (val_x, val_labels) = train_set, val_set
    labels, val_labels = labels.to(device), val_labels.to(device)
    classes = int(torch.cat((labels, val_labels)).max()) + 1
    generator = torch.Generator().manual_seed(seed)
    probes = nn.ModuleDict({name: LinearProbe(x[name], classes, generator) for name in x})
    probes, size = probes.to(device), min(PROBE_BATCH, len(labels))
    batches = len(labels) // size  # the last, smaller batch is left out
    settings = dict(lr=PROBE_LR, momentum=PROBE_MOMENTUM, weight_decay=PROBE_DECAY)
    optimizer = torch.optim.SGD(probes.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in progress(range(epochs), "probe"):
        for rows in torch.randperm(len(labels), generator=generator).split(size)[:batches]:
            targets = labels[rows.to(device)]
            loss = sum(F.cross_entropy(p(x[name][rows]), targets) for name, p in probes.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    probes.eval()  # BatchNorm by its running averages: a row is judged alone
    accuracy = {}
    with torch.no_grad():
        for name, p in probes.items():
            guesses = torch.cat([p(rows).argmax(dim=1) for rows in val_x[name].split(BLOCK)])
            accuracy[name] = 100 * float((guesses == val_labels).double().mean())
    return accuracy


def probe(flags: Namespace) -> Stages:
    """Linear probe of encoder features, latent and every block of the flow (Fig. 6)"""
    model, unseen, protocol = open_checkpoint(flags, flags.num)
    seen = Pictures(flags.data, model.config.image_size, "train", flags.num_train, flags.seed)
    if len(seen.class_names) < 2:
        fail(f"{unseen.source} have no classes to tell apart: the probe needs CLASS folders")
    if seen.root == unseen.root:
        fail(f"{unseen.source} has no val/ beside train/: a probe is judged on unseen pictures")

    # Frozen networks: each picture is encoded once, and the probes learn from what was stored.
    def work(batch: Batch) -> dict[str, Tensor]:
        found = representations(model, batch[0].to(flags.device), flags.pool)
        return {**{name: x.float().cpu() for name, x in found.items()}, "labels": batch[1]}

    found = [look(work, x, f"{x.split} features", flags) for x in (seen, unseen)]
    yield  # the other processes leave
    sets = [(x, x.pop("labels")) for x in found]
    accuracy = train_probes(*sets, flags.epochs, flags.seed, flags.device)
    protocol |= {"data": unseen.source, "pool": flags.pool, "epochs": flags.epochs}
    protocol |= {"train_pictures": len(seen), "val_pictures": len(unseen)}
    protocol |= {"batch": min(PROBE_BATCH, len(seen)), "lr": PROBE_LR, "momentum": PROBE_MOMENTUM}
    protocol |= {"weight_decay": PROBE_DECAY, "schedule": "cosine"}
    protocol["input"] = "full image, no mask, no noise; the flow unconditional"
    yield {"top1_percent": accuracy, "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# likelihood (Eq. 4)
#
#     log p_F(z) = log N(F(z); 0, I) + log |det dF/dz|            nats an image
#     bits       = -log_2 p_F(z) / (K d)                          a latent number
# Exact, not a bound; but of z, drawn once a picture, masked and noised as in training (--no-mask:
# unmasked), not of the picture: these are not the bits/dim of pixel models, and two models compare
# only if their latents do: 2 z costs one bit a number more than z, and says the same. Bits can be
# negative, but on average not below the entropy of the noise of Eq. 1, 0.5 log_2(2 pi e sigma^2) =
# 0.31 at sigma 0.3. A class saves log_2(classes) bits an image at most; more: the null class errs.


def likelihood(flags: Namespace) -> Stages:
    """exact log p_F(z) of the latents of pictures, with their class and without (Eq. 4)"""
    model, pictures, protocol = open_checkpoint(flags, flags.num)
    if model.flow is None:
        fail(f"the prior of {flags.checkpoint} is emigm, which has no density")
    c, size = model.config, model.config.num_latents * model.config.latent_dim
    config = replace(c, mask_ratio=(0.0, 0.0) if flags.no_mask else tuple(c.mask_ratio))
    left_out = {}
    if c.num_classes == 0:
        left_out["conditional"] = "the model was trained without labels"
    elif pictures.class_names != model.class_names:  # a label would be the number of another class
        left_out["conditional"] = f"{pictures.source} have other classes than the training data"

    @torch.no_grad()
    def work(batch: Batch) -> dict[str, Tensor]:
        images, labels = (x.to(flags.device) for x in batch[:2])
        draws = draws_of_pictures(config, batch[2].tolist(), flags.seed, flags.device)
        _, z = model.latents(images, draws)  # (B, K, d)
        given = {"conditional": labels, "unconditional": None}
        kinds = given.keys() - left_out.keys()
        return {kind: model.flow.log_prob(z, given[kind]).cpu().double() for kind in kinds}

    found = look(work, pictures, "likelihood", flags)
    yield  # the other processes leave
    numbers: Numbers = dict.fromkeys(("conditional", "unconditional"))
    for kind, nats in found.items():
        numbers[kind] = {}
        both = {"nats_an_image": nats, "bits_a_latent_number": -nats / (size * math.log(2))}
        for name, values in both.items():  # deviations between images, over n: no error of the mean
            numbers[kind][name] = float(values.mean())
            numbers[kind][f"{name}_std"] = float(values.std(correction=0))
    protocol |= {**pictures.describe(), "mask_ratio": config.mask_ratio, "sigma": c.sigma}
    yield {**numbers, "protocol": {**protocol, "latent_numbers": size, "left_out": left_out}}


# --------------------------------------------------------------------------------------------------
# map (Fig. 4)
#
# Do pictures of one class lie together in the latent space? The paper's projection is UMAP, which
# pulls clusters apart and whose distances between them mean nothing; the default here is PCA, the
# plane of largest variance, which needs no package and shows what is there, but only two
# directions: see variance_share. Of 8 classes of 1000, neighbours look better parted than they are.


def principal_plane(x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """PCA: x (n, D), centred -> coordinates (n, 2) and the share of the variance along each."""
    start = np.random.default_rng(0).standard_normal(min(x.shape))  # fixed, so that runs agree
    u, sizes, directions = svds(x, k=2, v0=start)  # D may be 8192: never the whole SVD
    order = sizes.argsort()[::-1]
    # The sign of a principal direction means nothing: its largest entry shall be positive.
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(2), largest])
    return (u * sizes * signs)[:, order], (sizes[order] ** 2 / np.square(x).sum()).tolist()


def plot_map(points: np.ndarray, labels: np.ndarray, names: list[str], path: Path) -> None:
    """Fig. 4: points (n, 2) coloured by their labels (n,), a PNG. Needs matplotlib."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shown = [name.replace("$", r"\$") for name in names]  # $ begins a formula
    colours = colormaps["tab20" if len(names) > 10 else "tab10"].colors
    for i, label in enumerate(np.unique(labels)):
        colour = [colours[i % len(colours)]]
        axes.scatter(*points[labels == label].T, s=6, c=colour, linewidths=0, label=shown[i])
    axes.set(xticks=[], yticks=[])  # neither projection has units
    axes.legend(markerscale=3, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    runs.write_file(path, functools.partial(figure.savefig, format="png", dpi=120))


def latent_map(flags: Namespace) -> Stages:
    """the latents of pictures in two dimensions, coloured by class (Fig. 4)"""
    if flags.method == "umap" and importlib.util.find_spec("umap") is None:
        fail("--method umap needs `pip install umap-learn`; --method pca is built in", 2)
    model, pictures, protocol = open_checkpoint(flags, None)
    classes = sample.choose_classes(flags.classes, model)
    if classes != [-1]:  # which is a model without classes
        if pictures.class_names != model.class_names:
            fail(f"{pictures.source} have other classes than {flags.checkpoint} was trained on")
        pictures.numbers = np.flatnonzero(np.isin(pictures.labels, classes))
    order = np.random.default_rng(flags.seed).permutation(len(pictures))[: flags.num]
    pictures.numbers = np.sort(pictures.numbers[order])
    if len(pictures) < 4:
        fail(f"a map needs 4 pictures, {pictures.source} have {len(pictures)} of these classes")

    @torch.no_grad()
    def work(batch: Batch) -> dict[str, Tensor]:
        return {"mu": model.encoder(batch[0].to(flags.device)).flatten(1).cpu()}

    found = look(work, pictures, "latents", flags)
    yield  # the other processes leave
    # Each latent number is standardised, or the few that vary most would be the whole map.
    mu, numbers = found["mu"].double().numpy(), {}
    mu = (mu - mu.mean(axis=0)) / mu.std(axis=0).clip(min=1e-6)  # (n, K * d)
    if min(mu.shape) < 3 or not mu.any():
        fail("a map needs 3 latent numbers at least, and pictures that differ")
    if flags.method == "pca":
        xy, (first, second) = principal_plane(mu)
        numbers["variance_share"] = {"first_axis": first, "second_axis": second}
    else:
        say("umap: a minute or so")
        xy = importlib.import_module("umap").UMAP(random_state=flags.seed).fit_transform(mu)
    labels = pictures.labels[pictures.numbers] if classes != [-1] else np.full(len(xy), -1)
    names = [printable(model.class_names[i]) if i >= 0 else "no class" for i in np.unique(labels)]
    try:
        plot_map(xy, labels, names, flags.out)
        say(f"{flags.out}: {len(xy)} pictures, {len(names)} classes")
    except ImportError:
        flags.json = flags.json or flags.out.with_suffix(".json")
        say(f"no {flags.out}: `pip install matplotlib` for it; the points are in {flags.json}")
    points = {"picture": pictures.numbers, "label": labels, "xy": xy}
    numbers["points"] = {name: values.tolist() for name, values in points.items()}
    protocol |= {**pictures.describe(), "method": flags.method, "classes": names}
    protocol["input"] = "mu of the full image, all K * d numbers, each standardised"
    yield {**numbers, "protocol": protocol}


def curves(flags: Namespace) -> Stages:
    """loss and all else that the logs of training runs hold, side by side"""
    if importlib.util.find_spec("matplotlib") is None:
        fail("curves needs `pip install matplotlib`", 2)
    from matplotlib.figure import Figure

    runs.check_output(out := flags.out or Path("curves.png"), ".png")
    logs = {str(path).replace("$", r"\$"): read_log(path) for path in flags.logs}  # $: a formula
    yield  # the other processes leave
    names = [name for name in dict.fromkeys(itertools.chain(*logs.values())) if name != "step"]
    figure, rows = Figure(figsize=(14, 10), layout="constrained"), math.ceil(len(names) / 4)
    for place, name in enumerate(names, start=1):
        panel = figure.add_subplot(rows, 4, place, title=name)
        for i, log in enumerate(logs.values()):
            steps, *values = log.get(name, np.empty((0, 2))).T
            for j, y in enumerate(values, start=1):  # of the blocks, the last is the darkest
                panel.plot(steps, y, f"C{i}", alpha=j / len(values), linewidth=0.8)
        low, high = panel.dataLim.intervaly
        panel.set_yscale("log" if 0 < 8 * low < high else "linear")
    figure.legend(figure.axes[0].lines, logs, loc="outside upper left")  # the loss, a line a run
    runs.write_file(out, functools.partial(figure.savefig, format="png", dpi=80))
    yield {"protocol": {"picture": str(out), "logs": list(logs)}}


# --------------------------------------------------------------------------------------------------
# cost (Tab. 2, 4 and 10)
#
# Of a preset, or of a checkpoint: only jacobi's number of sweeps depends on the weights. Counts are
# exact and the same everywhere; times are of this machine, and compare with the paper's (8 A100s
# for Tab. 4, an H20 for Tab. 10) only as ratios. Three traps:
# - Tab. 2 says "FLOPs" and counts multiply-adds, as is usual; strictly they are two operations
#   each. Its 71.25 G are encoder and decoder for one image; norms, softmax and sums do not count.
# - On a GPU, token-by-token sampling waits for memory, not for arithmetic: a batch takes little
#   longer than one image, so "s an image" means nothing without its batch. Hence a row each.
# - A GPU answers before it has finished, hence the synchronisation; the first calls choose kernels
#   and fill caches, hence the warming up; a shared machine has outliers, hence the median.


def count_multiply_adds(work: Callable[[], Any]) -> int:
    """Of a call: matrix products and convolutions, in the backward pass as well."""
    # Attention as the two products that it is. Of its fused kernels, which sample.py may ask for,
    # torch's counter knows some in one version and others in the next; the CPU's is told to it.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two


def some_labels(c: Config, count: int) -> Tensor:
    """As many labels: the classes in turn, or captions of equal words."""
    labels = torch.arange(count) % c.num_classes if c.num_classes else torch.full((count,), -1)
    return labels[:, None].expand(-1, c.caption_words) if c.caption_words else labels


def count_parts(c: Config) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds for one image of each part, on the meta device, where nothing is
    computed. Of the flow from image to noise: inverted, with its cache, it takes about as many. Of
    the second prior from noise to image, in the preset's steps, without guidance."""
    with torch.device("meta"):
        model, labels = MIMFlow(c).eval(), some_labels(c, 1)
        images = torch.empty(1, 3, c.image_size, c.image_size)
        z = torch.empty(1, c.num_latents, c.latent_dim)
    calls = {"encoder": lambda: model.encoder(images), "decoder": lambda: model.decoder(z)}
    if model.flow is not None:
        calls["flow"] = lambda: model.flow(z, labels)
    else:
        how = dict(steps=c.emigm_steps, schedule=c.emigm_schedule)
        how["order"] = torch.zeros(1, c.num_latents, dtype=torch.int64, device="meta")
        calls["emigm"] = lambda: model.emigm.sample(z, labels, **how)
    parts = {}
    for name, call in calls.items():
        parts[name] = {"parameters": count_parameters(getattr(model, name))}
        parts[name]["multiply_adds"] = count_multiply_adds(call)
    both = {key: parts["encoder"][key] + parts["decoder"][key] for key in parts["encoder"]}
    return {**parts, "encoder_and_decoder": both}


def training_step(c: Config, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A step as train.py does it, on `batch_size` random pictures in each process. LPIPS and
    teachers have random weights, which take as long."""
    random = dict.fromkeys(("vgg", "dino", "clip"), RANDOM)
    c = replace(c, grad_accum=1, batch_size=batch_size * runs.world_size(), **random)
    frozen = load_frozen_networks(c, device)
    players = train.make_players(MIMFlow(c).to(device), frozen, device)
    for player in players:
        player.forward = train.distribute(player.module, c, device)
    images = torch.rand(batch_size, 3, c.image_size, c.image_size, device=device) * 2 - 1
    labels = some_labels(c, batch_size).to(device)

    def step() -> None:
        train.accumulate_gradients(players, c, images, labels, step=c.mask_warmup)
        train.update(players, c, c.lr)

    return step


def flow_step(flow: nn.Module, z: Tensor, labels: Tensor) -> None:
    """The flow alone in training, forward and backward, on z (B, K, d)."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=uses_bf16(z.device)):
        square, other = flow_nll(*flow(z, labels))
    (square + other).mean().backward()


def sampling(model: MIMFlow, batch: int, w: float = 0.0, way: str = "sequential") -> Callable:
    """A call that samples a batch as sample.py does, from noise to uint8 pictures."""
    # A recorder of its own for each call, since a recording keeps its memory.
    if model.flow is not None:
        plain = functools.partial(type(model.flow).inverse, model.flow)
        model.flow.inverse = sample.RecordedInverse(plain) if way == "cuda graph" else plain
    sampler = "jacobi" if way == "jacobi" else "sequential"
    options = sample.parse_arguments(["--sampler", sampler, "--guidance", str(w)])
    classes = some_labels(model.config, batch).tolist()
    return functools.partial(sample.sample_batch, model, range(batch), classes, options)


def time_all(model: MIMFlow, flags: Namespace) -> Numbers:
    """Milliseconds a training step and its memory, seconds an image, and both for several numbers
    of tokens. One after the other, each with all of the device's memory."""
    c, device, size = model.config, flags.device, flags.batch_size
    cuda = device.type == "cuda"
    training, sampled, tokens = {"batch_size": size}, {}, {}
    for kind in ("eager", "compiled") if flags.compile else ("eager",):  # Tab. 4
        row = training[kind] = {"ms_a_step": None, "peak_memory_gb": None}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with suppress(torch.cuda.OutOfMemoryError):  # while it is built
            step = training_step(replace(c, compile=kind == "compiled"), size, device)
            row["ms_a_step"] = seconds(step, flags, 1000)
        if cuda and row["ms_a_step"]:
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        step = None  # what comes next needs its memory

    model.to(device)
    ways = ("sequential", "jacobi", "cuda graph")[: 3 if cuda else 2]
    ways = ways if model.flow is not None else ("emigm",)
    guidances = (0.0, c.guidance) if c.num_classes and c.guidance else (0.0,)
    cases = list(itertools.product(ways, guidances, flags.batches))
    for way, w, batch in progress(cases, "sampling"):
        taken = seconds(sampling(model, batch, w, way), flags, 1 / batch)
        sampled[f"{way}, guidance {w:g}, batch {batch}"] = {"s_an_image": taken}
    if model.flow is not None:
        del model.flow.inverse  # and with it the last recording
    model.cpu()

    # Tab. 10. Training takes all tokens at once, so its time grows with K; sampling takes one after
    # the other, each looking back at all before it: K steps that grow with K.
    for count in progress(flags.tokens if model.flow is not None else [], "tokens"):
        other = MIMFlow(replace(c, num_latents=count)).to(device).eval()
        z = torch.randn(size, count, c.latent_dim, device=device)  # (B, K, d)
        labels = some_labels(c, size).to(device)
        flow_training = functools.partial(flow_step, other.flow, z, labels)
        tokens[str(count)] = {
            "flow_training_ms_a_step": seconds(flow_training, flags, 1000),
            "sampling_s_an_image_alone": seconds(sampling(other, 1), flags),
            "sampling_s_an_image_in_batches": seconds(sampling(other, size), flags, 1 / size),
        }
    return {"training": training, "sampling": sampled, "tokens": tokens}


def model_to_time(flags: Namespace) -> MIMFlow:
    """The checkpoint's model, or one of the preset with weights that are not the identity."""
    if flags.checkpoint is not None:
        return load_checkpoint(flags.checkpoint)
    config = train.preset_config(flags.preset or "shapes")
    if config.num_classes is None:
        config, _ = train.resolve(config)
    model = MIMFlow(config).eval()
    for block in model.flow.blocks if model.flow is not None else []:
        nn.init.normal_(block.proj_out.weight, std=RANDOM_STD / math.sqrt(config.flow_width))
    return model


def cost(flags: Namespace) -> Stages:
    """parameters, multiply-adds, milliseconds a training step, seconds an image (Tab. 2, 4, 10)"""
    model = model_to_time(flags)
    c, dtype = model.config, "bfloat16 autocast" if uses_bf16(flags.device) else "float32"
    weights = f"random, predictions of std about {RANDOM_STD}: jacobi's sweeps are theirs"
    if flags.checkpoint is not None:
        weights = describe_checkpoint(Path(flags.checkpoint), model)
    numbers, protocol = {"parts": count_parts(c)}, {"preset": c.preset, "image_size": c.image_size}
    protocol["multiply_adds"] = "for one image, matrix products, attention and convolutions"
    protocol["weights"] = weights
    if not flags.no_timing:
        if flags.device.type == "cpu" and not c.freeze_autoencoder:
            # Weights, gradients, moments; of every layer some 16 activations of its width a token.
            values = 2 * c.depth * (c.grid**2 + c.num_latents) * c.width
            values += sum(c.flow_depths) * c.num_latents * c.flow_width
            runs.require_memory(16 * count_parameters(model) + 64 * values * flags.batch_size)
        numbers |= time_all(model, flags)
        protocol |= {"training": dtype, "sampling": f"{dtype}; jacobi float32"}
        protocol |= {"tokens": "guidance 0", "threads": torch.get_num_threads()}
        protocol["timing"] = "median, after warming up"
        if flags.device.type != "cuda":
            protocol["left_out"] = {"peak_memory_gb": "counted on CUDA only"}
    yield  # the other processes leave
    yield {**numbers, "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# Command line

AT_LEAST_2 = runs.number(int, 2, runs.MANY, "at least 2")
TOKENS = runs.number(int, 2, 2**16, "from 2 to 65536")
BATCH = runs.number(int, 1, 2**16, "from 1 to 65536")
CROP = runs.number(int, 1, 8192, "from 1 to 8192")
WORKERS = runs.number(int, 0, 1024, "from 0 to 1024")
SHARE = runs.number(float, 0, 1, "between 0 and 1")
FLAGS: dict[str, dict[str, Any]] = {  # each is told once; a subcommand names those that it has
    "checkpoint": dict(nargs="?", metavar="CKPT", help="model.pt (as in sample.py; cost: none)"),
    "samples": dict(type=Path, help=".npz, folder, or a checkpoint (.pt) to sample from"),
    "reference": dict(type=Path, help=".npz (ADM's VIRTUAL_..., or arr_0 alone), or folder"),
    "logs": dict(nargs="+", type=Path, metavar="RUN", help="run folders or log.jsonl files"),
    "--data": dict(metavar="DIR", help="pictures with val/ (default: those of the training)"),
    "--num": dict(type=positive, metavar="N", help="pictures (default: %(default)s; None = all)"),
    "--seed": dict(type=runs.seed_number, default=0, metavar="N", help="of choice, masks, noise"),
    "--inception": dict(metavar="FILE", help="weights (default: torch.hub's cache, or download)"),
    "--vgg": dict(metavar="FILE", help="VGG16 weights for LPIPS (default: as for --inception)"),
    "--crop": dict(type=CROP, metavar="SIDE", help="crop folders' pictures as in training"),
    "--npz": dict(type=Path, metavar="FILE", help="samples (default: beside CKPT)"),
    "--out": dict(type=Path, metavar="PNG", help="picture (default: beside CKPT; curves: here)"),
    "--mask-ratio": dict(type=SHARE, nargs=2, metavar=("LOW", "HIGH"), help="0 0 = none hidden"),
    "--no-mask": dict(action="store_true", help="whole pictures (default: hidden as in training)"),
    "--num-train": dict(type=AT_LEAST_2, metavar="N", help="training pictures (default: all)"),
    "--epochs": dict(type=positive, default=PROBE_EPOCHS, metavar="N", help="default: 90"),
    "--pool": dict(choices=("mean", "flat"), default="mean", help="of tokens; flat = all of them"),
    "--classes": dict(nargs="+", metavar="C", help="indices or names (default: all, or 8)"),
    "--method": dict(choices=("pca", "umap"), default="pca", help="projection (default: pca)"),
    "--preset": dict(choices=train.PRESETS, help="default: shapes, if there is no CKPT"),
    "--no-timing": dict(action="store_true", help="count only"),
    "--tokens": dict(type=TOKENS, nargs="+", default=(64, 128, 256, 1024), help="Tab. 10"),
    "--batches": dict(type=BATCH, nargs="+", default=(1, 8, 64, 256), help="to sample"),
    "--runs": dict(type=positive, default=5, metavar="N", help="timed calls at most (default: 5)"),
    "--compile": dict(action="store_true", help="also time training compiled"),
    "--num-workers": dict(type=WORKERS, metavar="N", help="default: 8 on CUDA, else 0"),
    "--batch-size": dict(type=positive, metavar="N", help="of a process (default: %(default)s)"),
    "--device": dict(metavar="NAME", help="cuda, mps or cpu (default: the first there is)"),
    "--json": dict(type=Path, metavar="FILE", help="the numbers and their protocol"),
}
LOOK = "checkpoint --data --num --seed "  # on pictures, with a checkpoint
COMMANDS = {  # name -> what it does, its flags, default of --batch-size and of --num
    "generation": (generation, "samples reference --num --npz --inception --crop", 64, 50_000),
    "reconstruction": (reconstruction, LOOK + "--mask-ratio --inception --vgg --out", 64, None),
    "probe": (probe, LOOK + "--num-train --epochs --pool", 256, None),
    "likelihood": (likelihood, LOOK + "--no-mask", 64, None),
    "map": (latent_map, LOOK + "--classes --method --out", 256, 2000),
    "cost": (cost, "checkpoint --preset --no-timing --tokens --batches --runs --compile", 32, None),
    "curves": (curves, "logs --out", None, None),
}


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags of evaluate.py; without `arguments` those of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = runs.Parser(description="The numbers of the paper, each with its protocol (Sec. 4).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (work, flags, batch_size, num) in COMMANDS.items():
        text, parents = work.__doc__, [sample.sampling_flags()] if work is generation else []
        command = commands.add_parser(name, help=text, description=text, parents=parents)
        flags += " --batch-size --num-workers --device --json" if batch_size else " --json"
        for flag in flags.split():
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(batch_size=batch_size, num=num, device=None, num_workers=None)
    flags = parser.parse_args(arguments)
    flags.command_line = shlex.join(["evaluate.py", *arguments])
    if flags.command == "cost" and flags.checkpoint and flags.preset:
        parser.error("cost takes a checkpoint or a --preset, not both")
    low, high = getattr(flags, "mask_ratio", None) or (0, 0)
    if low > high:
        parser.error(f"--mask-ratio needs LOW <= HIGH, got {low:g} {high:g}")
    return flags


def main(flags: Namespace) -> None:
    """Do one subcommand and report."""
    flags.device = runs.select_device(flags.device)
    torch.backends.cudnn.allow_tf32 = flags.command == "cost"  # elsewhere it moves the fourth digit
    if flags.num_workers is None:
        flags.num_workers = 8 if flags.device.type == "cuda" else 0
    names = ("checkpoint", "samples", "reference", "data")
    inputs = [Path(x) for x in map(vars(flags).get, names) if x] + vars(flags).get("logs", [])
    for name, suffix in (("json", ".json"), ("out", ".png")):
        if path := vars(flags).get(name):
            runs.check_output(path, suffix, inputs)
    runs.start_processes(flags.device)
    stages = COMMANDS[flags.command][0](flags)
    next(stages)
    runs.stop_processes()  # the rest may take longer than the others would wait
    if runs.rank() == 0:
        report(next(stages), flags)


if __name__ == "__main__":
    runs.run_program(lambda: main(parse_arguments()))
