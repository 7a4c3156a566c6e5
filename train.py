"""Phase 1 of MIMFlow: encoder, flow and decoder trained together (Sec. 3.2.3, Tab. 6 and 7).

    python train.py                                       # preset shapes: built-in pictures
    python train.py --data FOLDER                         # your pictures: class folders or flat
    torchrun --nproc_per_node=8 train.py --preset mimflow-l --data /path/to/imagenet

    images (B,3,H,W), mask (B,N) --encoder--> mu (B,K,d) --+ sigma*eps--> z (B,K,d)      Eq. 1
    z, labels --flow--> u (B,K,d), logdet (B,)  -> L_NLL                                 Eq. 4
    z         --decoder--> image (B,3,H,W)      -> L_recon                               Eq. 5
    L_joint = lambda L_NLL + L_recon                                                     Eq. 6

The file reads in this order: the configuration, the pictures, the model, randomness and processes,
checkpoints, the loop (`main`), the command line.

The same command continues an unfinished run, exactly, with any number of processes on devices of
the same type, because nothing random needs saving: the order of the data is a function of (seed,
step), the augmentation of (seed, epoch, index), and mask, noise, label drop and drop-path come from
one generator seeded with (seed, step), drawn for the global batch and sliced by rank.
"""

import argparse
import colorsys
import copy
import datetime
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms.functional import hflip, pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from decoder import Decoder, drop_path_scales
from encoder import MaskedEncoder, random_mask
from flow import NormalizingFlow
from losses import flow_nll, joint_loss, pixel_loss

HEAD = {"format", "step", "config", "class_names"}  # what every checkpoint begins with
CHECKPOINT_FORMAT = 1  # raised when a file of this program can no longer be read by an older one
SUPERSAMPLE = 4  # the built-in pictures are drawn this many times too large, then averaged
SHOWN_SIDE = 96  # smaller pictures are enlarged in grids, up to this side in pixels
MAX_SKIPPED_IN_A_ROW = 10  # non-finite gradients in a row that stop a run


def fail(message: str, code: int = 1, every_rank: bool = False) -> NoReturn:
    """End the program with one line that says what is wrong and what to do.

    Rank 0 speaks, since most of what is wrong is wrong on every rank; `every_rank` is for what one
    process alone can meet. Exit code 2 for usage, 1 for the rest.
    """
    if every_rank or rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


# --------------------------------------------------------------------------------------------------
# Configuration


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field of Config with the text of its command-line flag."""
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass
class Config:
    """One run. The defaults are the paper's (Tab. 6 and 7); every field is a flag of train.py."""

    preset: str = "mimflow-l"

    # Data (App. A: ADM's recipe)
    data: str | None = option(
        None, "folder of pictures; nothing = built-in shapes", metavar="FOLDER"
    )
    image_size: int = option(256, "side of the training images, pixels")
    num_classes: int | None = option(
        None, "classes, counted in the data if left out; 0 = no labels"
    )
    num_workers: int = option(8, "data-loading processes per GPU")

    # Masked encoder and decoder (Tab. 6): ViT-B twice
    patch_size: int = option(16, "side of a patch, pixels")
    width: int = option(768, "channels of encoder and decoder")
    depth: int = option(12, "layers of encoder and of decoder")
    heads: int = option(12, "attention heads of encoder and decoder")
    mask_ratio: tuple[float, ...] = option(
        (0.4, 0.6), "hidden share, drawn between; 0 0 = none", nargs=2
    )
    drop_path: float = option(0.05, "stochastic depth of the decoder's last layer")

    # Latent space (Tab. 6)
    num_latents: int = option(128, "latent tokens K")
    latent_dim: int = option(64, "numbers per latent token d")
    sigma: float = option(0.3, "std of the noise on the latents (Eq. 1)")

    # Normalizing flow (Tab. 6): Improved STARFlow-L
    flow_width: int = option(1024, "channels of the flow")
    flow_depths: tuple[int, ...] = option(
        (2, 2, 2, 2, 2, 2, 2, 20), "layers of each block, the deep block last", nargs="+"
    )
    flow_head_dim: int = option(64, "size of an attention head of the flow")
    gated: bool = option(True, "gated attention (Tab. 1)")
    scale: str = option("exp", "scale of the affine map (Tab. 1)", choices=("exp", "softplus"))

    # Baseline of Tab. 1 and Fig. 5: a flow on the latents of a frozen autoencoder
    init: str | None = option(None, "checkpoint to take encoder and decoder from", metavar="CKPT")
    freeze_autoencoder: bool = option(False, "train the flow alone, as STARFlow does; needs --init")

    # Losses (Tab. 7)
    nll_weight: float = option(1.0, "weight of L_NLL in Eq. 6")
    nll_warmup: int = option(0, "steps over which that weight grows from 0; paper: 0")
    mask_warmup: int = option(0, "steps over which the mask ratio grows from 0; paper: 0")
    label_drop: float = option(0.1, "probability to train a label as unconditional")

    # Optimizer (Tab. 7)
    epochs: float = option(90, "passes over the data; --steps overrides it")
    steps: int | None = option(None, "training steps")
    batch_size: int = option(256, "images per step, over all processes")
    grad_accum: int = option(1, "parts a process's share of the batch is split into")
    lr: float = option(1e-4, "learning rate of AdamW")
    lr_warmup: int = option(0, "steps over which it grows from 0; paper: 0")
    lr_decay: float = option(0.0, "last share of the steps, where it falls to 0; paper: 0")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    weight_decay: float = option(1e-4, "AdamW weight decay")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.9999, "decay of the weights' moving average, per step")
    seed: int = option(0, "seed of weights, data order, masks and noise")

    # The run
    guidance: float = option(2.0, "guidance of the sample grids, and sample.py's default; 0 = none")
    out: str | None = option(None, "folder of the run (default: runs/PRESET)", metavar="FOLDER")
    save_every: int = option(5000, "steps between checkpoints")
    log_every: int = option(100, "steps between lines of log.jsonl")
    sample_every: int = option(5000, "steps between sample grids")
    device: str | None = option(None, "cuda, mps or cpu (default: the first there is)")
    compile: bool = option(False, "compile the model with torch.compile")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def run_dir(self) -> Path:
        return Path(self.out if self.out is not None else f"runs/{self.preset}")


# A preset lists what it changes; mimflow-l is the paper. `shapes` is for a laptop.
PRESETS: dict[str, dict[str, Any]] = {
    "shapes": dict(
        image_size=32,
        num_workers=0,
        patch_size=4,
        width=96,
        depth=2,
        heads=4,
        drop_path=0.0,
        num_latents=16,
        latent_dim=8,
        flow_width=96,
        flow_depths=(1, 1, 1, 3),
        flow_head_dim=24,
        # paper: 1.0, beside LPIPS and two teachers. Here, against MSE alone, 1.0 makes mu collapse:
        # the flow prefers a latent without information. The ramps let the autoencoder come first.
        nll_weight=0.01,
        nll_warmup=500,
        mask_warmup=900,
        steps=3000,
        batch_size=16,
        lr=2e-3,
        lr_warmup=50,
        lr_decay=0.5,  # paper: constant, with an EMA over 10,000 steps. Here there are few steps.
        weight_decay=0.0,
        ema=0.995,
        guidance=1.0,
        save_every=500,
        log_every=20,
        sample_every=500,
    ),
    "mimflow-l": dict(num_classes=1000),
    "starflow-l": dict(num_classes=1000, gated=False, scale="softplus", freeze_autoencoder=True),
}

# Fields that may change when a run is continued; any other difference makes it another run. (With a
# learning rate that decays, more --steps continue it on another schedule; exact needs equal steps.)
MAY_CHANGE = {
    "data", "num_workers", "epochs", "steps", "grad_accum", "guidance", "out",
    "save_every", "log_every", "sample_every", "device", "compile",
}  # fmt: skip


def check_config(config: Config) -> None:
    """End with exit code 2 on a value that cannot work, before anything is loaded or written."""
    c = config
    for f in fields(Config):
        if isinstance(getattr(c, f.name), float) and not math.isfinite(getattr(c, f.name)):
            fail(f"{flag(f.name)} must be a finite number, got {getattr(c, f.name)}", 2)
    positive = "image_size patch_size width depth heads num_latents latent_dim flow_width"
    positive += (
        " flow_head_dim batch_size grad_accum save_every log_every sample_every lr grad_clip"
    )
    for name in positive.split():
        if not getattr(c, name) > 0:
            fail(f"{flag(name)} must be positive, got {getattr(c, name)}", 2)
    not_negative = "num_workers nll_warmup mask_warmup lr_warmup weight_decay sigma nll_weight"
    for name in (not_negative + " guidance seed").split():
        if getattr(c, name) < 0:
            fail(f"{flag(name)} must not be negative, got {getattr(c, name)}", 2)
    for name in ("drop_path", "label_drop", "lr_decay", "ema", "beta1", "beta2"):
        if not 0 <= getattr(c, name) <= 1:
            fail(f"{flag(name)} must lie between 0 and 1, got {getattr(c, name)}", 2)
    for name in ("drop_path", "beta1", "beta2"):
        if getattr(c, name) == 1:
            fail(f"{flag(name)} must be below 1", 2)
    if not 0 <= c.mask_ratio[0] <= c.mask_ratio[1] <= 1:
        fail(
            f"--mask-ratio needs 0 <= LOW <= HIGH <= 1, got {c.mask_ratio[0]} {c.mask_ratio[1]}", 2
        )
    if c.image_size % c.patch_size:
        fail(
            f"image size {c.image_size} is not divisible by patch size {c.patch_size}: "
            f"try --image-size {c.grid * c.patch_size or c.patch_size}",
            2,
        )
    if c.width % c.heads or (c.width // c.heads) % 4:
        fail(f"--width {c.width} / --heads {c.heads} must be a multiple of 4", 2)
    if c.flow_width % c.flow_head_dim:
        fail(
            f"--flow-width {c.flow_width} is not divisible by --flow-head-dim {c.flow_head_dim}", 2
        )
    if min(c.flow_depths) < 1:
        fail(f"--flow-depths must be positive, got {c.flow_depths}", 2)
    if c.num_classes is not None and c.num_classes < 0:
        fail(f"--num-classes must not be negative, got {c.num_classes}", 2)
    if (c.steps is not None and c.steps < 1) or c.epochs <= 0:
        fail("--steps and --epochs must be positive", 2)
    parts = world_size() * c.grad_accum
    if c.batch_size % parts:
        fail(
            f"--batch-size {c.batch_size} is not divisible by {world_size()} processes x "
            f"--grad-accum {c.grad_accum}",
            2,
        )


def flag(name: str) -> str:
    """The command-line flag of a field of Config."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------
# The built-in pictures: ten shapes, drawn on the fly, nothing to download


def regular_polygon(
    corners: int, radius: float, start: float = 90.0, shift: float = 0.0
) -> np.ndarray:
    """Corners (corners, 2) as (x, y), y downwards, first at `start` degrees, shifted along x."""
    angle = np.radians(start + 360.0 * np.arange(corners) / corners)
    return np.stack((radius * np.cos(angle) + shift, -radius * np.sin(angle)), axis=1)


def star_polygon() -> np.ndarray:
    points = (regular_polygon(5, 1.1), regular_polygon(5, 0.45, start=126))
    return np.stack(points, axis=1).reshape(10, 2)


def heart_polygon() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((np.sin(t) ** 3, -(y + 2) / 16), axis=1)


CROSS_ARM = np.array(((-0.34, -1), (0.34, -1), (0.34, -0.34)))  # a quarter of the corners
QUARTER_TURN = np.array(((0, 1), (-1, 0)))  # (x, y) -> (-y, x)
ARROW = ((-1, -0.3), (0, -0.3), (0, -0.9), (1.1, 0), (0, 0.9), (0, 0.3), (-1, 0.3))

# Class name -> polygons about the origin, radius about 1: the first is filled, the second cut out.
SHAPES: dict[str, list[np.ndarray]] = {
    "circle": [regular_polygon(48, 0.95)],
    "square": [regular_polygon(4, 1.2, start=45)],
    "triangle": [regular_polygon(3, 1.2) + (0, 0.2)],
    "star": [star_polygon()],
    "cross": [
        np.concatenate([CROSS_ARM @ np.linalg.matrix_power(QUARTER_TURN, t) for t in range(4)])
    ],
    "ring": [regular_polygon(48, 1.0), regular_polygon(48, 0.55)],
    "heart": [heart_polygon()],
    "moon": [regular_polygon(48, 1.0, shift=-0.15), regular_polygon(48, 0.85, shift=0.35)],
    "bar": [np.array(((-1.1, -0.33), (1.1, -0.33), (1.1, 0.33), (-1.1, 0.33)))],
    "arrow": [np.array(ARROW)],
}


def draw_shape(
    label: int, rng: np.random.Generator, size: int, hue: float | None = None
) -> Image.Image:
    """Draw one picture (size x size, RGB) of class `label`: a bright shape on a dark textured
    ground.

    Place, size, tilt, colours and textures vary with `rng`. Each class has a typical hue, as real
    classes do, with some spread; `hue` in [0, 1) overrides it (a classifier that must judge
    shape, not colour, is trained on random hues).
    """
    # Coverage of each pixel by the shape: polygons drawn too large, then averaged.
    side = size * SUPERSAMPLE
    radius, tilt = rng.uniform(0.36, 0.44) * side, math.radians(rng.uniform(-15, 15))
    centre = (0.5 + rng.uniform(-0.06, 0.06, 2)) * side
    cos, sin = math.cos(tilt), math.sin(tilt)
    turn = radius * np.array(((cos, sin), (-sin, cos)))  # (x, y) @ turn
    canvas = Image.new("L", (side, side), 0)
    for polygon, fill in zip(list(SHAPES.values())[label], (255, 0), strict=False):
        ImageDraw.Draw(canvas).polygon((polygon @ turn + centre).ravel().tolist(), fill=fill)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)[:, :, None] / 255

    # Colours: a two-colour ramp with waves behind; the class's hue, shaded, with waves in front.
    x = np.arange(size, dtype=np.float32) / size - 0.5
    direction = rng.uniform(0, 2 * math.pi, 3)  # of the ramp and of the two waves
    phase = x * np.cos(direction)[:, None, None] + x[:, None] * np.sin(direction)[:, None, None]
    ramp, back_wave, front_wave = phase[..., None].astype(np.float32)  # (size, size, 1) each
    waves, shift = 2 * math.pi * rng.uniform(2, 4, 2), rng.uniform(0, 2 * math.pi, 2)
    ground = [colorsys.hsv_to_rgb(*rng.uniform((0, 0.3, 0.05), (1, 0.8, 0.35))) for _ in range(2)]
    ground = np.array(ground, dtype=np.float32)
    back = ground[0] + (ground[1] - ground[0]) * (ramp + 0.5)
    back += 0.04 * np.sin(waves[0] * back_wave + shift[0])
    if hue is None:
        hue = (label / len(SHAPES) + rng.normal(0, 0.03)) % 1.0
    colour = np.array(colorsys.hsv_to_rgb(hue, *rng.uniform((0.45, 0.85), (0.85, 1.0))), np.float32)
    front = colour * (0.88 + 0.25 * ramp) * (1 + 0.1 * np.sin(waves[1] * front_wave + shift[1]))
    picture = back + (front - back) * coverage  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


class ShapesDataset(Dataset):
    """Built-in labelled pictures: picture `index` is always the same, class index % 10."""

    def __init__(self, image_size: int, split: str = "train"):
        self.image_size, self.split = image_size, split
        self.class_names = tuple(SHAPES)
        self.length = {"train": 50_000, "val": 2_000}[split]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: "int | tuple[int, int]") -> tuple[Tensor, int]:
        """`key`: an index, or (epoch, index) as in FolderDataset; nothing is augmented here."""
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.length:
            raise IndexError(index)
        label = index % len(SHAPES)
        rng = np.random.default_rng((0 if self.split == "train" else 1, index))
        return to_tensor(draw_shape(label, rng, self.image_size)), label


# --------------------------------------------------------------------------------------------------
# Pictures from a folder


def to_tensor(picture: Image.Image) -> Tensor:
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    return pil_to_tensor(picture).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255], rounded to the nearest, any shape; out of range is clamped."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def adm_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing (App. A): halve by box filter while the short side is >= 2 x size,
    resize the short side to `size` by bicubic interpolation, crop the centre. RGB of any size ->
    size x size."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = size / min(picture.size)
    new_size = (round(picture.width * factor), round(picture.height * factor))
    picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class FolderDataset(Dataset):
    """Pictures of a folder: CLASS folders (labels 0, 1, ... by sorted name), or flat (label -1).

    FOLDER may hold train/, val/ and test/, each in that layout, with the classes of train/; else it
    is itself every split. Hidden files and folders are passed over.
    """

    def __init__(self, folder: str, image_size: int, split: str = "train", seed: int = 0):
        top = Path(folder)
        if not top.is_dir():
            fail(f"data folder {folder} does not exist: give --data a folder of pictures")
        self.image_size, self.seed = image_size, seed
        folders = {path.name for path in visible(top) if path.is_dir()}
        has_splits = "train" in folders and folders <= {"train", "val", "test"}
        if has_splits and split not in folders:
            fail(f"{folder} has train/ but no {split}/: add {split}/ to it")
        self.root = top / split if has_splits else top
        classes = visible(top / "train") if has_splits else visible(top)
        names = sorted(path.name for path in classes if path.is_dir())
        loose = [path for path in visible(self.root) if path.suffix.lower() in IMG_EXTENSIONS]
        if names and loose:
            fail(f"{self.root} mixes class folders and pictures ({loose[0].name}): sort them")

        pictures = sorted(loose)
        labels = [-1] * len(loose)
        for label, name in enumerate(names):
            found = list_images(self.root / name)
            if not found and split == "train":
                fail(f"class folder {self.root / name} holds no pictures: fill it or remove it")
            pictures += found
            labels += [label] * len(found)
        if not pictures:
            fail(f"no pictures in {self.root}: expected CLASS/*.jpg or *.jpg, *.png, ...")
        self.class_names = tuple(names)
        # Arrays, not lists of a million objects: worker processes would copy those, one by one.
        self.paths = np.array([os.fsencode(path.relative_to(self.root)) for path in pictures])
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: "int | tuple[int, int]") -> tuple[Tensor, int]:
        """`key`: an index, or (epoch, index), which also flips half of the pictures."""
        epoch, index = key if isinstance(key, tuple) else (None, key)
        path = self.root / os.fsdecode(self.paths[index])
        try:
            picture = adm_crop(default_loader(str(path)), self.image_size)
        except Exception as error:  # whatever a decoder raises, the user needs the path
            raise BrokenImage(f"cannot read {path} ({error}): see --check-data") from None
        if epoch is not None and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            picture = hflip(picture)
        return to_tensor(picture), int(self.labels[index])


class BrokenImage(Exception):
    """A picture that cannot be decoded; the message has its path."""


def visible(folder: Path) -> list[Path]:
    """What a folder holds, without hidden files and what archives of macOS leave."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX"]


def list_images(folder: Path) -> list[Path]:
    """All picture files below a folder, sorted."""
    found: list[Path] = []
    for path in visible(folder):
        if path.is_dir():
            found += list_images(path)
        elif path.suffix.lower() in IMG_EXTENSIONS:
            found.append(path)
    return sorted(found)


def open_dataset(
    data: str | None, image_size: int, split: str = "train", seed: int = 0
) -> ShapesDataset | FolderDataset:
    """The pictures that --data names, or with None the built-in ones. Items: (image, label)."""
    if data is None:
        return ShapesDataset(image_size, split)
    return FolderDataset(data, image_size, split, seed)


def check_data(config: Config) -> None:
    """Open every picture once, list those that cannot be read; exit code 1 if there are any."""
    dataset = open_dataset(config.data, config.image_size)
    broken = 0
    for index in tqdm(range(len(dataset)), desc="checking", disable=not sys.stderr.isatty()):
        try:
            dataset[index]
        except BrokenImage as error:
            broken += 1
            print(str(error).removesuffix(": see --check-data"))
    print(f"{len(dataset)} pictures, {len(dataset.class_names)} classes, {broken} broken")
    raise SystemExit(1 if broken else 0)


class StepSampler(Sampler):
    """Batches of (epoch, index) for this process, from step `start` to `stop`: a function of the
    seed.

    Image number p of the run (p = step * batch_size + row) is entry p mod n of the permutation of
    epoch p div n, so no image is dropped or seen twice in an epoch, and any step can be the
    first.
    """

    def __init__(self, length: int, batch_size: int, rows: range, start: int, stop: int, seed: int):
        self.length, self.batch_size, self.rows = length, batch_size, rows
        self.steps, self.seed = range(start, stop), seed

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        shuffled_epoch, order = -1, np.empty(0)
        for step in self.steps:
            batch = []
            for row in self.rows:
                epoch, position = divmod(step * self.batch_size + row, self.length)
                if epoch != shuffled_epoch:
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                    shuffled_epoch = epoch
                batch.append((epoch, int(order[position])))
            yield batch


# --------------------------------------------------------------------------------------------------
# The model


def ramp(step: int, length: float) -> float:
    """Rise from 0 at step 0 to 1 at step `length`, then 1; always 1 if length is 0."""
    return min(1.0, step / length) if length else 1.0


def learning_rate(config: Config, step: int) -> float:
    """Constant (Tab. 7) between a linear warm-up and a linear decay to 0, both off in the paper."""
    decay_steps = config.lr_decay * config.steps
    return config.lr * ramp(step + 1, config.lr_warmup) * ramp(config.steps - step, decay_steps)


class Draws(NamedTuple):
    """Everything random in one training step, for a batch of B images."""

    mask: Tensor  # (B, N) bool, True = hidden
    noise: Tensor  # (B, K, d) standard normal
    drop_label: Tensor  # (B,) bool
    branch_scales: Tensor  # (depth, 2, B) drop-path of the decoder

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of images start..stop of the batch."""
        return Draws(*(x[start:stop] for x in self[:3]), self.branch_scales[:, :, start:stop])


def draw_randomness(config: Config, step: int, device: torch.device) -> Draws:
    """Draw a step's randomness for the GLOBAL batch from a generator seeded with (seed, step)."""
    c, B = config, config.batch_size
    generator = torch.Generator(device).manual_seed(derived_seed(c.seed, step))
    low, high = (ratio * ramp(step, c.mask_warmup) for ratio in c.mask_ratio)
    return Draws(
        mask=random_mask(B, c.grid**2, (low, high), generator),
        noise=torch.randn(B, c.num_latents, c.latent_dim, generator=generator, device=device),
        drop_label=torch.rand(B, generator=generator, device=device) < c.label_drop,
        branch_scales=drop_path_scales(B, c.depth, c.drop_path, generator),
    )


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class MIMFlow(nn.Module):
    """Encoder, flow and decoder as one module; its forward is the figure of the method (Fig. 2)."""

    def __init__(self, config: Config, class_names: tuple[str, ...] = ()):
        super().__init__()
        c = config
        self.config, self.class_names, self.step = config, tuple(class_names), 0
        vit = dict(image_size=c.image_size, patch_size=c.patch_size, width=c.width, depth=c.depth)
        vit |= dict(heads=c.heads, num_latents=c.num_latents, latent_dim=c.latent_dim)
        self.encoder = MaskedEncoder(**vit)
        self.flow = NormalizingFlow(
            num_latents=c.num_latents,
            latent_dim=c.latent_dim,
            width=c.flow_width,
            depths=c.flow_depths,
            head_dim=c.flow_head_dim,
            num_classes=c.num_classes,
            gated=c.gated,
            scale=c.scale,
        )
        self.decoder = Decoder(**vit, drop_path=c.drop_path)
        if c.freeze_autoencoder:
            self.encoder.requires_grad_(False)
            self.decoder.requires_grad_(False)

    def forward(
        self, images: Tensor, labels: Tensor, draws: Draws, nll_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass of phase 1: images (B, 3, H, W) in [-1, 1], labels (B,) -> L_joint (Eq. 6),
        scalar, and what log.jsonl holds, scalars and one (number of blocks,) tensor, without
        gradient."""
        mu = self.encoder(images, draws.mask)  # (B, K, d)
        z = mu + self.config.sigma * draws.noise  # Eq. 1
        labels = torch.where(draws.drop_label, -1, labels)
        outputs, logdet = self.flow.intermediates(z, labels)  # u is the last output
        nll_square, nll_logdet = flow_nll(outputs[-1], logdet)  # Eq. 4, (B,) each
        if self.config.freeze_autoencoder:
            pixel = torch.zeros_like(nll_square)  # the baseline's decoder has nothing to learn
        else:
            pixel = pixel_loss(images, self.decoder(z, draws.branch_scales))  # Eq. 5, (B,)
        loss = joint_loss(pixel, nll_square + nll_logdet, nll_weight).mean()  # Eq. 6

        with torch.no_grad():
            logs = {
                "loss": loss,
                "mse": pixel.mean(),
                "nll": (nll_square + nll_logdet).mean(),
                "nll_square": nll_square.mean(),
                "nll_logdet": nll_logdet.mean(),
                # Per-block mean square: 1 at the end is a flow that reaches the unit Gaussian.
                "block_mean_square": torch.stack([x.square().mean() for x in outputs]),
                # Near 0 the latent has collapsed: the flow is content and the picture is lost.
                "mu_std": mu.std(dim=0, correction=0).mean(),
            }
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        labels: Tensor | None,
        guidance: float = 0.0,
        denoise: bool = False,
        **rule: Any,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from noise u (B, K, d) and labels (B,), -1 = no class.

        `guidance` and `rule` as in NormalizingFlow.inverse; `denoise` adds TARFlow's denoising.
        """
        z = self.flow.inverse(noise, labels, guidance, **rule)
        if denoise:
            z = self.denoise(z, labels)
        return self.decoder(z).float().clamp(-1, 1)

    def denoise(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """z + sigma^2 * grad_z log p_F(z), (B, K, d): the posterior mean of the clean latent
        (Tweedie), as the flow models clean latents plus noise of std sigma (Eq. 1)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.flow.log_prob(z, labels).sum(), z)
        return (z + self.config.sigma**2 * score).detach()


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sample_noise(seed: int, indices: range, num_latents: int, latent_dim: int) -> Tensor:
    """Noise u (len(indices), K, d) of samples number `indices`: each has a generator of its own,
    so that sample i is the same whichever process draws it and whatever is drawn beside it."""
    # The 1 keeps these streams apart from those of the training steps.
    generators = (torch.Generator().manual_seed(derived_seed(seed, i, 1)) for i in indices)
    return torch.stack([torch.randn(num_latents, latent_dim, generator=g) for g in generators])


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema += (1 - decay) (model - ema), in place, with decay at most (1 + step) / (10 + step)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


# --------------------------------------------------------------------------------------------------
# Processes and devices: plain `python` is a world of one


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message: str) -> None:
    """Print on rank 0, above a progress bar if one is running."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()  # a log file shows the line at once


def select_device(name: str | None) -> torch.device:
    """The named device, or the first of cuda, mps, cpu; on CUDA that of the local rank."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if world_size() > 1 and ":" in name:
        fail(f"--device {name} would put every process on one device: use --device cuda", 2)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        fail(f"device {name} cannot be used by rank {rank()} ({reason})", 2, every_rank=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def start_processes(device: torch.device) -> None:
    """Join the process group of torchrun, if there is one: nccl on CUDA, else gloo."""
    if world_size() > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))


def stop_processes() -> None:
    """Leave the process group; the last DDP module must be gone by then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, which hold equal shares of the batch."""
    if dist.is_initialized():
        value = value / world_size()
        dist.all_reduce(value)
    return value


# --------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain Python values only, read with weights_only=True
#
#   last.pt   format, step, config, class_names, model, ema, optimizer, skipped: to go on from
#   model.pt  format, step, config, class_names, model (= the EMA weights): what one shares


def write_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Call `write(stream)` on a temporary file beside `path`, sync it, put it in place: path always
    holds either the old content or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, on the CPU; one clear line for whatever is wrong."""
    if Path(path).is_dir():
        fail(f"{path} is a folder: name the checkpoint in it, {Path(path) / 'model.pt'}")
    if not Path(path).is_file():
        fail(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # zipfile, pickle, EOF, key errors: all mean that this is no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"checkpoint {path} is damaged or not a checkpoint ({reason[:100]})")
    if not isinstance(checkpoint, dict) or not HEAD | {"model"} <= checkpoint.keys():
        fail(f"{path} is not a MIMFlow checkpoint (model.pt or last.pt of train.py)")
    if checkpoint["format"] > CHECKPOINT_FORMAT:
        fail(
            f"{path} has format {checkpoint['format']}, newer than "
            f"this program's {CHECKPOINT_FORMAT}: update the program"
        )
    return checkpoint


def config_from_dict(values: dict[str, Any], path: str | Path) -> Config:
    """The Config stored in the checkpoint at `path`."""
    known = {f.name for f in fields(Config)}
    if unknown := sorted(set(values) - known):
        fail(f"{path} was made by another version: unknown configuration {', '.join(unknown)}")
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Config(**lists)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> MIMFlow:
    """The model of model.pt (or last.pt), with its EMA weights, in eval mode on `device`.

    It has .encoder, .flow, .decoder, .config, .class_names and .step.
    """
    checkpoint = read_checkpoint(path)
    model = MIMFlow(config_from_dict(checkpoint["config"], path), checkpoint["class_names"])
    try:
        model.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        fail(f"{path}: the weights do not fit its configuration ({reason[:100]})")
    model.step = checkpoint["step"]
    return model.to(device).eval()


def find_checkpoint(path: str | None) -> Path:
    """`path`, or without one the newest runs/*/model.pt."""
    if path is not None:
        return Path(path)
    found = sorted(Path("runs").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        fail("no checkpoint given and none in runs/*/model.pt: run `python train.py` to make one")
    return found[-1]


def check_same_autoencoder(trained: Config, config: Config) -> None:
    """Refuse --init from an autoencoder of another architecture, naming what differs."""
    names = "image_size patch_size width depth heads num_latents latent_dim".split()
    differing = [
        f"{flag(name)} {getattr(trained, name)}"
        for name in names
        if getattr(trained, name) != getattr(config, name)
    ]
    if differing:
        fail(f"the autoencoder of --init has {', '.join(differing)}: add these flags", 2)


def check_same_run(stored: Config, config: Config, run_dir: Path) -> None:
    """Refuse to continue a run with another configuration, naming every field that differs."""
    differing = [
        f"{flag(f.name)} {getattr(stored, f.name)} there, {getattr(config, f.name)} now"
        for f in fields(Config)
        if f.name not in MAY_CHANGE and getattr(stored, f.name) != getattr(config, f.name)
    ]
    if differing:
        fail(
            f"{run_dir} holds a run of another configuration ({'; '.join(differing)}): nothing was "
            "changed; use --out FOLDER for a new run or --overwrite to replace this one",
            2,
        )


def start_over(run_dir: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    files = [run_dir / name for name in ("last.pt", "model.pt", "log.jsonl", "config.json")]
    for path in [*files, *(run_dir / "samples").glob("step_*.png")]:
        path.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of log.jsonl after `step`: those steps are about to be done again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        write_file(path, lambda stream: stream.write("".join(kept).encode()))


# --------------------------------------------------------------------------------------------------
# Training


def resolve(config: Config, dataset: ShapesDataset | FolderDataset) -> Config:
    """Fill in what the data decide: the number of classes and of steps."""
    found = len(dataset.class_names)
    classes = found if config.num_classes is None else config.num_classes
    if classes not in (0, found):
        source = config.data or "the built-in pictures, which are used without --data,"
        hint = f"{found}, or 0 for no labels" if found else "0, as there are no class folders"
        fail(f"--num-classes is {classes} but {source} have {found}: use {hint}", 2)
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * len(dataset) / config.batch_size))
    return replace(config, num_classes=classes, steps=steps)


def shown_classes(num_classes: int) -> list[int]:
    """The rows of a grid: all of up to 16 classes, 8 of more, evenly; [-1] without classes."""
    if num_classes > 16:
        return np.linspace(0, num_classes - 1, 8).round().astype(int).tolist()
    return list(range(num_classes)) or [-1]


def save_png(images: Tensor, columns: int, path: Path) -> None:
    """Write images (n, 3, H, W) in [-1, 1] as a grid with `columns` pictures a row, row by row.

    Small pictures are enlarged by a whole factor, each pixel to a square, so that one can see them.
    """
    zoom = max(1, SHOWN_SIDE // images.shape[-1])
    images = to_uint8(images).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: picture.save(stream, "png"))


def main(config: Config, overwrite: bool = False) -> None:
    """Train phase 1 from the first step, or go on from last.pt, to config.steps."""
    # Set-up: device, data, processes. All that can be wrong is checked before anything is written.
    check_config(config)
    device = select_device(config.device)
    dataset = open_dataset(config.data, config.image_size, "train", config.seed)
    config = resolve(config, dataset)
    c, run_dir = config, config.run_dir
    last, log_path = run_dir / "last.pt", run_dir / "log.jsonl"
    checkpoint = None
    if (run_dir / "model.pt").exists() and not last.exists() and not overwrite:
        fail(
            f"{run_dir} holds a model.pt but no last.pt to go on from: use --out FOLDER for a new "
            "run or --overwrite to replace it",
            2,
        )
    if last.exists() and not overwrite:
        checkpoint = read_checkpoint(last)
        check_same_run(config_from_dict(checkpoint["config"], last), config, run_dir)
        if tuple(checkpoint["class_names"]) != dataset.class_names:
            fail(
                f"{run_dir} was trained on other classes than those of --data: "
                "use --out or --overwrite"
            )
        if checkpoint["step"] >= c.steps:
            say(
                f"{run_dir} is finished ({checkpoint['step']} steps): --steps N "
                "goes on, --overwrite starts again"
            )
            return
    trained = None
    if c.freeze_autoencoder and c.init is None:
        fail("a frozen autoencoder comes from a trained one: add --init CKPT (a model.pt)", 2)
    if c.init is not None and checkpoint is None:
        trained = load_checkpoint(c.init)
        check_same_autoencoder(trained.config, config)
    start_processes(device)
    if rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make the run folder {run_dir} ({error.strerror}): choose another --out")

    # Model, its moving average, optimizer. Weights have the default dtype: float32, in tests 64.
    torch.manual_seed(c.seed)
    dtype = torch.get_default_dtype()
    model = MIMFlow(config, dataset.class_names).to(device)
    if trained is not None:
        model.encoder.load_state_dict(trained.encoder.state_dict())
        model.decoder.load_state_dict(trained.decoder.state_dict())
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=c.lr,
        betas=(c.beta1, c.beta2),
        eps=1e-8,
        weight_decay=c.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )
    start, skipped = 0, 0
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start, skipped = checkpoint["step"], checkpoint["skipped"]
        say(f"continuing {run_dir} after step {start}")
        del checkpoint
    step_model = torch.compile(model) if c.compile else model
    if world_size() > 1:
        step_model = DistributedDataParallel(
            step_model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # the only buffers are constant coordinates
        )
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    # Data: this process's rows of every global batch; the loader has a generator of its own.
    share = c.batch_size // world_size()
    rows = range(rank() * share, (rank() + 1) * share)
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(dataset), c.batch_size, rows, start, c.steps, c.seed),
        num_workers=c.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    say(
        f"{run_dir}: {len(dataset)} pictures, {c.num_classes} classes; "
        f"{count_parameters(model) / 1e6:.2f} M parameters; "
        f"steps {start}..{c.steps} of {c.batch_size} on {world_size()} x {device}"
    )

    # The run folder changes only now that everything needed is there.
    if float(mean_over_processes(torch.tensor(float(start), device=device))) != start:
        fail(f"rank {rank()} would start at step {start}, others not: share {run_dir}", 1, True)
    if rank() == 0:
        if overwrite:
            start_over(run_dir)
        cut_log(log_path, start)
        text = json.dumps(asdict(config), indent=1)
        write_file(run_dir / "config.json", lambda stream: stream.write(text.encode()))

    # The same noise and labels in every grid, so that one sees the same pictures improve.
    labels_shown = torch.tensor(shown_classes(c.num_classes)).repeat_interleave(8)
    noise_shown = sample_noise(c.seed, range(len(labels_shown)), c.num_latents, c.latent_dim)

    def save(step: int) -> None:
        """Write last.pt and model.pt on rank 0."""
        if rank() != 0:
            return
        head = dict(format=CHECKPOINT_FORMAT, step=step, config=asdict(config))
        head["class_names"] = list(dataset.class_names)
        full = dict(
            model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict()
        )
        write_file(last, lambda stream: torch.save({**head, **full, "skipped": skipped}, stream))
        shared = {**head, "model": ema.state_dict()}
        write_file(run_dir / "model.pt", lambda stream: torch.save(shared, stream))

    def draw_samples(step: int) -> None:
        """Write a grid of EMA samples on rank 0."""
        if rank() == 0:
            images = ema.sample(noise_shown.to(device), labels_shown.to(device), c.guidance)
            save_png(images, 8, run_dir / "samples" / f"step_{step:07d}.png")

    in_a_row, logged, since = 0, start, time.perf_counter()
    terminal = sys.stderr.isatty() and rank() == 0
    bar = tqdm(total=c.steps, initial=start, desc="training", disable=not terminal)
    for step, (images, labels) in enumerate(loader, start=start):
        # Learning rate and loss weight of this step.
        done = step + 1
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        nll_weight = c.nll_weight * ramp(step, c.nll_warmup)

        # Gradient of the mean over the global batch: parts of a process first, then DDP.
        images = images.to(device, dtype, non_blocking=True)  # (share, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (share,)
        if c.num_classes == 0:
            labels = torch.full_like(labels, -1)
        draws = draw_randomness(config, step, device)
        part = share // c.grad_accum
        logs: list[dict[str, Tensor]] = []
        for first in range(0, share, part):
            is_last = first + part == share
            if world_size() > 1:
                step_model.require_backward_grad_sync = is_last
            part_draws = draws.rows(rows.start + first, rows.start + first + part)
            here = slice(first, first + part)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, part_logs = step_model(images[here], labels[here], part_draws, nll_weight)
            (loss / c.grad_accum).backward()
            logs.append(part_logs)

        # Update, unless the gradient is not finite: then no weight moves; ten in a row end the run.
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        if torch.isfinite(grad_norm):
            optimizer.step()
            update_ema(ema, model, c.ema, step)
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            say(f"step {done}: gradient is not finite, step skipped ({skipped} so far)")
            if in_a_row == MAX_SKIPPED_IN_A_ROW:
                kept = (
                    f"{last} keeps the last good state"
                    if last.exists()
                    else "nothing was saved yet"
                )
                fail(
                    f"{in_a_row} non-finite gradients in a row at step {done}: {kept}; "
                    "try a lower --lr"
                )
        optimizer.zero_grad(set_to_none=True)
        bar.update()

        # Log, draw, save.
        if done % c.log_every == 0 or done == c.steps:
            line = {"step": done, "lr": lr, "grad_norm": float(grad_norm), "skipped": skipped}
            for name in logs[0]:
                mean = mean_over_processes(torch.stack([part[name] for part in logs]).mean(dim=0))
                line[name] = mean.tolist()
            now = time.perf_counter()
            line["ms_per_step"] = round(1000 * (now - since) / (done - logged), 1)
            since, logged = now, done
            if rank() == 0:
                with open(log_path, "a") as stream:
                    stream.write(json.dumps(line) + "\n")
                keys = ("loss", "mse", "nll", "mu_std")
                text = "  ".join(f"{key} {line[key]:.4f}" for key in keys)
                bar.set_postfix_str(text)
                if not terminal:
                    say(f"step {done}/{c.steps}  {text}  {line['ms_per_step']:.0f} ms")
        if done % c.sample_every == 0 or done == c.steps:
            draw_samples(done)
        if done == c.steps or (done % c.save_every == 0 and in_a_row == 0):
            save(done)

    # A clean end: the loader's workers and the DDP module go before the process group does.
    bar.close()
    del loader, step_model
    stop_processes()
    say(f"done: {run_dir / 'model.pt'}; pictures: python sample.py {run_dir / 'model.pt'}")


# --------------------------------------------------------------------------------------------------
# Command line


def dry_run(config: Config) -> None:
    """Print the resolved configuration and the parameters of each part, without allocating them."""
    check_config(config)
    if config.data is not None or config.num_classes is None:
        config = resolve(config, open_dataset(config.data, config.image_size))
    for name, value in asdict(config).items():
        print(f"  {name:15} {value}")
    with torch.device("meta"):
        model = MIMFlow(config)
    encoder, decoder = count_parameters(model.encoder), count_parameters(model.decoder)
    counts = {"encoder": encoder, "decoder": decoder, "encoder + decoder": encoder + decoder}
    counts |= {"flow": count_parameters(model.flow), "all": count_parameters(model)}
    for name, count in counts.items():
        print(f"{name:18} {count:>12,} parameters  {count / 1e6:8.2f} M")


# The first field of each group of flags in --help, in the order of Config.
FLAG_GROUPS = {
    "data": "data (App. A)",
    "patch_size": "masked encoder and decoder (Tab. 6)",
    "num_latents": "latent space (Tab. 6)",
    "flow_width": "normalizing flow (Tab. 6)",
    "init": "baseline on a frozen autoencoder (Tab. 1)",
    "nll_weight": "losses (Tab. 7)",
    "epochs": "optimizer (Tab. 7)",
    "guidance": "the run",
}


class Parser(argparse.ArgumentParser):
    """The parser of all scripts: no abbreviations, one-line errors, help 100 columns wide."""

    def __init__(self, formatter: Any = argparse.HelpFormatter, **settings: Any):
        wide = functools.partial(formatter, max_help_position=30, width=100)
        super().__init__(allow_abbrev=False, formatter_class=wide, **settings)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists all flags)", 2)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The Config of the flags (preset first, flags on top), and the flags that only act."""
    parser = Parser(
        description="Train MIMFlow, phase 1 (Sec. 3.2.3). The same command continues a run.",
        epilog="In brackets: the paper's value (preset mimflow-l, Tab. 6 and 7); that of shapes.",
    )
    parser.add_argument(
        "--preset", default="shapes", metavar="PRESET", help=f"{' or '.join(PRESETS)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again in a used run folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration and sizes, stop"
    )
    parser.add_argument("--check-data", action="store_true", help="open every picture once, stop")
    for f in fields(Config)[1:]:
        if f.name in FLAG_GROUPS:
            group = parser.add_argument_group(FLAG_GROUPS[f.name])
        settings = dict(f.metadata)
        paper = PRESETS["mimflow-l"].get(f.name, f.default)
        values = [paper, PRESETS["shapes"].get(f.name, f.default)]
        shown = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
        if values[0] is not None or values[1] is not None:
            settings["help"] += f" [{shown[0]}; {shown[1]}]"
        # The type of one value: of "int | None" and of "tuple[int, ...]" that is int.
        kind = (get_args(f.type) or (f.type,))[0]
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = kind
            settings.setdefault("metavar", "N" if kind in (int, float) else None)
        if "choices" in settings:
            settings.pop("metavar")
        group.add_argument(flag(f.name), default=argparse.SUPPRESS, **settings)

    flags = parser.parse_args(arguments)
    if flags.preset not in PRESETS:
        parser.error(f"unknown preset {flags.preset}: choose from {', '.join(PRESETS)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(flags).items()}
    actions = {k: given.pop(k) for k in ("overwrite", "dry_run", "check_data")}
    return Config(**{**PRESETS[flags.preset], **given}), argparse.Namespace(**actions)


def command_line() -> None:
    """Do what the command line says."""
    config, actions = parse_arguments()
    if actions.check_data:
        check_data(config)
    elif actions.dry_run:
        dry_run(config)
    else:
        main(config, actions.overwrite)


def run_program(work: Callable[[], None]) -> None:
    """Call `work`; what a user can cause ends in one line instead of a traceback."""
    try:
        work()
    except BrokenImage as error:  # from a worker process it comes wrapped in the worker's traceback
        fail(str(error).strip().split("BrokenImage: ")[-1], every_rank=True)
    except torch.cuda.OutOfMemoryError:
        fail(
            "GPU memory is full: a smaller --batch-size, or in training more --grad-accum", 1, True
        )
    except OSError as error:
        fail(f"reading or writing failed: {error}", every_rank=True)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on (train.py: without --overwrite)", 130)


if __name__ == "__main__":
    run_program(command_line)
