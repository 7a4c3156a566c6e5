"""Both phases of MIMFlow's training (Sec. 3.2.3 and 3.3, Tab. 6 and 7).

    python train.py                                       # preset shapes: built-in pictures
    python train.py --data FOLDER                         # your pictures: class folders or flat
    torchrun --nproc_per_node=8 train.py --preset mimflow-l --data /path/to/imagenet
    torchrun --nproc_per_node=8 train.py --preset mimflow-l --phase decoder \\
        --init runs/mimflow-l/model.pt --data /path/to/imagenet

Phase 1 (`JointTraining`): encoder, flow and decoder together.

    images (B,3,H,W), mask (B,N) --encoder--> mu (B,K,d) --+ sigma*eps--> z (B,K,d)      Eq. 1
    z, labels --flow--> u (B,K,d), logdet (B,)                        -> L_NLL           Eq. 4
    z --decoder--> image (B,3,H,W)                                    -> L_recon         Eq. 5
    z --auxiliary decoders--> (B,N,C_t), frozen teachers(images)      -> L_aux           Eq. 7
    loss = lambda_nll L_NLL + L_recon + L_aux                                    Eq. 6 and 7

Phase 2 (`DecoderTraining`): encoder and flow stay as they are, the decoder plays against a
discriminator.

    z as above --decoder--> image --PatchDiscriminator--> logits      -> L_GAN
    loss = L_recon + lambda_gan L_GAN                                                    Eq. 8

The file reads in this order: the configuration, the pictures, what is random in a step and the
model, the two objectives, processes and devices, checkpoints, the loop (`main`), the command line.

The same command continues an unfinished run, exactly (with another number of processes: up to
rounding), on devices of the same type, because nothing random needs saving: the order of the data
is a function of (seed, step), the augmentation of (seed, epoch, index), and mask, noise, label drop
and drop-path come from one generator seeded with (seed, step), drawn for the global batch and
sliced by rank. (The one exception: the discriminator's BatchNorm sees the share of one process,
unless on CUDA, where it is synchronised; so on CPU the number of processes, and anywhere
--grad-accum, changes phase 2.)
"""

import argparse
import colorsys
import copy
import datetime
import functools
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
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
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import hflip, pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from decoder import AuxiliaryDecoder, Decoder, drop_path_scales
from encoder import MaskedEncoder, random_mask
from flow import NormalizingFlow
from losses import (
    TEACHERS,
    PatchDiscriminator,
    Perceptual,
    WeightsMissing,
    auxiliary_loss,
    discriminator_loss,
    find_weights,
    finetune_loss,
    flow_nll,
    generator_loss,
    joint_loss,
    make_teacher,
    pixel_loss,
    reconstruction_loss,
)

try:
    import fcntl
except ImportError:  # Windows: run folders are not locked there
    fcntl = None

REQUIRED_KEYS = {"format", "step", "config", "class_names"}  # of every checkpoint
CHECKPOINT_FORMAT = 1  # raised when a file of this program can no longer be read by an older one
SUPERSAMPLE = 4  # the built-in pictures are drawn this many times too large, then averaged
SHOWN_SIDE = 96  # smaller pictures are enlarged in grids, up to this side in pixels
MAX_SKIPPED_IN_A_ROW = 10  # non-finite gradients in a row that stop a run, once they are read
MAX_BROKEN_SHARE = 0.001  # share of unreadable pictures that stops a run in spite of the flag
TIMEOUT = datetime.timedelta(minutes=10)  # after which a silent process or data worker is an error


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
#
# One flat dataclass is the whole truth about a run. Its defaults are the paper's; a preset changes
# some of them, flags of the same names change more, and what results is written to config.json and
# into every checkpoint. So a model can be rebuilt from its file alone, and a run that is continued
# with other settings can be refused by name.


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field of Config with the text of its command-line flag."""
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass
class Config:
    """One run. The defaults are the paper's (Tab. 6 and 7); every field is a flag of train.py."""

    preset: str = "mimflow-l"

    # The phase, and where phase 2 and the baseline of Tab. 1 and Fig. 5 begin
    phase: str = option(
        "joint",
        "joint = phase 1; decoder = phase 2 (Sec. 3.3.2), needs --init",
        choices=("joint", "decoder"),
    )
    init: str | None = option(None, "checkpoint of phase 1 to begin with", metavar="CKPT")
    freeze_autoencoder: bool = option(False, "train the flow alone, as STARFlow does; needs --init")

    # Data (App. A: ADM's recipe)
    data: str | None = option(
        None, "folder of pictures; nothing = built-in shapes", metavar="FOLDER"
    )
    image_size: int = option(256, "side of the training images, pixels")
    num_classes: int | None = option(
        None, "classes, counted in the data if left out; 0 = no labels"
    )
    num_workers: int = option(8, "data-loading processes per GPU")
    skip_bad_images: bool = option(
        False, "use a fixed neighbour for a picture that cannot be read; at most 0.1 %%, or one"
    )

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

    # Losses (Tab. 7)
    nll_weight: float = option(1.0, "weight of L_NLL in Eq. 6")
    nll_warmup: int = option(0, "steps over which that weight grows from 0; paper: 0")
    mask_warmup: int = option(0, "steps over which the mask ratio grows from 0; paper: 0")
    label_drop: float = option(0.1, "probability to train a label as unconditional")
    mim_weight: float = option(1.0, "weight of pixels in masked patches (App. C.2)")
    perceptual_weight: float = option(1.1, "weight of LPIPS in Eq. 5; 0 = none")
    convnext_mix: bool = option(False, "mix ConvNeXt-S into LPIPS, 1.0 : 0.1 (release); paper: no")
    teachers: tuple[str, ...] = option(
        ("dino", "clip"), f"of Eq. 7, any of {' '.join(TEACHERS)}; none = leave empty", nargs="*"
    )
    teacher_weight: float = option(1.0, "weight of each teacher's loss in phase 1 (Eq. 7)")
    aux_width: int = option(1024, "channels of the auxiliary decoders")
    gan_weight: float = option(0.05, "weight of L_GAN in phase 2 (Eq. 8); 0 = no discriminator")

    # Weight files of the frozen networks; left out: torch.hub's cache, else downloaded
    vgg: str | None = option(None, "VGG16 of LPIPS (vgg16-397923af.pth)", metavar="FILE")
    convnext: str | None = option(None, "ConvNeXt-S (convnext_small-0c510722.pth)", metavar="FILE")
    dino: str | None = option(None, "DINOv2 (dinov2_vitb14_pretrain.pth)", metavar="FILE")
    clip: str | None = option(None, "CLIP (ViT-B-16.pt)", metavar="FILE")

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
        name = self.preset if self.phase == "joint" else f"{self.preset}-decoder"
        return Path(self.out if self.out is not None else f"runs/{name}")


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
        perceptual_weight=0.0,  # paper: 1.1; its network is a download, and so are the teachers
        teachers=(),
        aux_width=128,
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
    # STARFlow's own form, trained on the latents of a finished autoencoder (--init): no pictures
    # are decoded, so nothing judges them.
    "starflow-l": dict(
        num_classes=1000,
        gated=False,
        scale="softplus",
        freeze_autoencoder=True,
        perceptual_weight=0.0,
        teachers=(),
    ),
}

# What --phase decoder changes in a preset (Tab. 7, right column).
DECODER_PHASE: dict[str, dict[str, Any]] = {
    # paper: 0.05, beside LPIPS. Against MSE alone 0.005 already paints a grid of artefacts.
    "shapes": dict(steps=600, mask_warmup=0, lr=3e-4, gan_weight=0.001),
    "mimflow-l": dict(epochs=2),
    "starflow-l": dict(epochs=2),
}

# Fields that may change when a run is continued; any other difference makes it another run. (`data`
# may, because folders move: that its classes are the same is all that is checked. With a
# learning rate that decays, more --steps continue it on another schedule: the end is then not, to
# the bit, that of a run which had them from the start.)
MAY_CHANGE = {
    "data", "num_workers", "skip_bad_images", "vgg", "convnext", "dino", "clip",
    "epochs", "steps", "grad_accum", "guidance", "out",
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
        " aux_width"
    )
    for name in positive.split():
        if not getattr(c, name) > 0:
            fail(f"{flag(name)} must be positive, got {getattr(c, name)}", 2)
    not_negative = "num_workers nll_warmup mask_warmup lr_warmup weight_decay sigma nll_weight"
    not_negative += " guidance seed mim_weight perceptual_weight teacher_weight gan_weight"
    for name in not_negative.split():
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
    for name in c.teachers:
        if name not in TEACHERS or c.teachers.count(name) > 1:
            fail(f"--teachers {name}: choose each of {', '.join(TEACHERS)} once at most", 2)
    if c.phase == "decoder" and c.freeze_autoencoder:
        fail("--phase decoder trains what --freeze-autoencoder freezes: choose one", 2)
    if c.init is None and (c.phase == "decoder" or c.freeze_autoencoder):
        what = "phase 2" if c.phase == "decoder" else "a frozen autoencoder"
        fail(f"{what} begins with a trained one: add --init CKPT (the model.pt of phase 1)", 2)
    if c.perceptual_weight and c.image_size < Perceptual.MIN_SIDE:
        fail(f"LPIPS needs pictures of {Perceptual.MIN_SIDE} pixels: --perceptual-weight 0", 2)
    if c.phase == "decoder" and c.gan_weight and c.image_size < PatchDiscriminator.MIN_SIDE:
        fail(f"the discriminator needs {PatchDiscriminator.MIN_SIDE} pixels: --gan-weight 0", 2)
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
        self.labels = np.arange(self.length) % len(SHAPES)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: "int | tuple[int, int]") -> tuple[Tensor, int]:
        """`key`: an index, or (epoch, index) as in FolderDataset; nothing is augmented here."""
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.length:
            raise IndexError(index)
        label = int(self.labels[index])
        rng = np.random.default_rng((0 if self.split == "train" else 1, index))
        return to_tensor(draw_shape(label, rng, self.image_size)), label


# --------------------------------------------------------------------------------------------------
# Pictures from a folder
#
# ADM's recipe (App. A), since FID compares with its reference statistics: another resize alone
# moves it. Values are in [-1, 1] from here to the decoder's output. Nothing is cached: the latents
# of an encoder that still learns, of a picture that is masked anew each time, never come twice.


def to_tensor(picture: Image.Image) -> Tensor:
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    return pil_to_tensor(picture).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255], rounded to the nearest, any shape; out of range is clamped."""
    # 127.5 x + 127.5 is the value, and cutting off 0.5 more rounds it.
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


def read_picture(path: Path) -> Image.Image:
    """RGB from a picture file of any kind. Transparency is ignored, and so is a camera's note that
    the picture should be turned, as in ADM."""
    with Image.open(path) as picture:
        if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would clip, not scale
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        return picture.convert("RGB")


class FolderDataset(Dataset):
    """Pictures of a folder: CLASS folders (labels 0, 1, ... by sorted name), or flat (label -1).

    FOLDER may hold train/, val/ and test/, each in that layout, with the classes of train/; else it
    is itself every split. Hidden files and folders are passed over.
    """

    def __init__(self, folder: str, image_size: int, split: str = "train", seed: int = 0):
        top = Path(folder)
        if not top.is_dir():
            fail(f"there is no data folder {folder}: give --data a folder of pictures")
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
            picture = adm_crop(read_picture(path), self.image_size)
        except Exception as error:  # whatever a decoder raises, the user needs the path
            hint = "--check-data lists all such files, --skip-bad-images goes on without them"
            raise BrokenImage(f"cannot read {path} ({error}): {hint}") from None
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
            print(str(error).rpartition(": ")[0])
    print(f"{len(dataset)} pictures, {len(dataset.class_names)} classes, {broken} broken")
    raise SystemExit(1 if broken else 0)


class TrainingPictures(Dataset):
    """What the training loop reads: (image, label, -1), or with `skip_bad` in place of a picture
    that cannot be read its next readable neighbour's image and label, and the index of the bad
    one."""

    def __init__(self, dataset: ShapesDataset | FolderDataset, skip_bad: bool):
        self.dataset, self.skip_bad = dataset, skip_bad

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = key
        for neighbour in range(index, index + 10):
            try:
                image, label = self.dataset[epoch, neighbour % len(self.dataset)]
                return image, label, -1 if neighbour == index else index
            except BrokenImage as error:
                if not self.skip_bad:
                    raise
                reason = error
        raise reason


class BrokenImages:
    """The pictures skipped so far: each is named once, and too many stop the run."""

    def __init__(self, dataset: ShapesDataset | FolderDataset):
        self.dataset, self.indices = dataset, set()

    def add(self, indices: Tensor) -> None:
        """Note the bad ones among `indices` (share,), which TrainingPictures gives."""
        for index in set(indices[indices >= 0].tolist()) - self.indices:
            self.indices.add(index)
            path = self.dataset.root / os.fsdecode(self.dataset.paths[index])
            tqdm.write(f"skipped {path}: it cannot be read ({len(self.indices)} so far)")
        self.check(len(self.indices))

    def check(self, count: int) -> None:
        """End the run if `count` broken pictures are too many."""
        # One may be broken in the smallest folder; else the flag would be of no use there.
        if count > max(1, MAX_BROKEN_SHARE * len(self.dataset)):
            fail(
                f"{count} of {len(self.dataset)} pictures cannot be read, more than one and "
                f"{MAX_BROKEN_SHARE:.1%}: --check-data lists all; repair or remove them",
                every_rank=True,
            )


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
# The model, and what is random in a step
#
# All that is random in step s is drawn from one generator seeded with (seed, s), for the GLOBAL
# batch; every process draws it all and takes its rows. That costs microseconds and buys three
# things: nothing random has to be saved, a resumed run is the uninterrupted one, and two processes
# are one. (A stream for each process, or a mean over its own number of masked patches, would break
# the last.)


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
    # In this order: another one would draw other numbers, and every seed give another run.
    return Draws(
        mask=random_mask(B, c.grid**2, (low, high), generator),
        noise=torch.randn(B, c.num_latents, c.latent_dim, generator=generator, device=device),
        drop_label=torch.rand(B, generator=generator, device=device) < c.label_drop,
        branch_scales=drop_path_scales(B, c.depth, c.drop_path, generator),
    )


def draws_of_pictures(
    config: Config, numbers: Iterable[int], seed: int, device: torch.device
) -> Draws:
    """Draws for evaluating, past the warm-up of the mask: picture number n of a dataset has its
    own, from (seed, n), whatever is beside it."""
    # On the CPU: a picture is masked alike on every device. Mixed twice, so that picture n does not
    # meet the stream of training step n.
    c = replace(config, batch_size=1, mask_warmup=0)
    seeds = (derived_seed(seed, n) for n in numbers)
    each = [draw_randomness(replace(c, seed=s), 0, torch.device("cpu")) for s in seeds]
    *firsts, scales = zip(*each, strict=True)
    joined = (*map(torch.cat, firsts), torch.cat(scales, dim=2))
    return Draws(*(x.to(device) for x in joined))


def derived_seed(*parts: int) -> int:
    """A 63-bit seed from several integers, well mixed (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class MIMFlow(nn.Module):
    """Encoder, flow and decoder: what a checkpoint holds, and all that sampling needs."""

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
        if c.freeze_autoencoder or c.phase == "decoder":
            self.encoder.requires_grad_(False)
        if c.freeze_autoencoder:
            self.decoder.requires_grad_(False)
        if c.phase == "decoder":
            self.flow.requires_grad_(False)

    def latents(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """mu and z = mu + sigma * noise (Eq. 1), (B, K, d) each, of masked images (B, 3, H, W)."""
        mu = self.encoder(images, draws.mask)
        return mu, mu + self.config.sigma * draws.noise

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        labels: Tensor | None,
        guidance: float = 0.0,
        denoise: bool = False,
        **how: Any,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from noise u (B, K, d) and labels (B,), -1 = no class.

        `guidance` and `how` as in NormalizingFlow.inverse; `denoise` adds TARFlow's denoising.
        """
        z = self.flow.inverse(noise, labels, guidance, **how)
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


# --------------------------------------------------------------------------------------------------
# The objectives of the two phases
#
# Each is a module whose forward is one training step up to the scalar loss: one thing to compile
# and one to wrap in DistributedDataParallel, whose gradient averaging is tied to a forward call.
# Frozen networks are held where torch does not look for parameters.


class FrozenNetworks(NamedTuple):
    """Those that a loss looks through: a plain tuple, so that they are in no optimizer, no
    checkpoint and no call of train()."""

    perceptual: Perceptual | None  # LPIPS of Eq. 5
    teachers: dict[str, nn.Module]  # f_t of Eq. 7


def load_frozen_networks(config: Config, device: torch.device) -> FrozenNetworks:
    """The frozen networks that this run's losses need. Raises losses.WeightsMissing."""
    c, perceptual, teachers = config, None, {}
    if c.perceptual_weight and not c.freeze_autoencoder:
        convnext = find_weights("convnext", c.convnext) if c.convnext_mix else None
        perceptual = Perceptual(find_weights("vgg", c.vgg), convnext).to(device)
    if c.phase == "joint" and not c.freeze_autoencoder:
        for name in c.teachers:
            weights = None if name == "hog" else find_weights(name, getattr(c, name))
            teachers[name] = make_teacher(name, weights, c.grid).to(device)
    return FrozenNetworks(perceptual, teachers)


def painting_loss(
    config: Config, frozen: FrozenNetworks, images: Tensor, painted: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_recon (Eq. 5) of both phases, (B,), and its terms for the log."""
    recon = pixel_loss(images, painted)
    logs = {"mse": recon}  # the plain one, so that runs with other weights compare
    if config.mim_weight != 1:
        recon = pixel_loss(images, painted, mask, config.mim_weight)  # App. C.2
    if frozen.perceptual is not None:
        logs["lpips"] = frozen.perceptual(images, painted)
        recon = reconstruction_loss(recon, logs["lpips"], config.perceptual_weight)
    return recon, logs


class JointTraining(nn.Module):
    """Phase 1: the model, the auxiliary decoders, and Eq. 4 to 7 as one forward pass (Fig. 2)."""

    def __init__(self, model: MIMFlow, frozen: FrozenNetworks):
        super().__init__()
        c = model.config
        self.model, self.frozen = model, frozen
        self.auxiliary = nn.ModuleDict()
        for name, teacher in frozen.teachers.items():
            self.auxiliary[name] = AuxiliaryDecoder(
                c.grid**2, c.num_latents, c.latent_dim, c.aux_width, teacher.width
            )

    def forward(
        self, images: Tensor, labels: Tensor, draws: Draws, nll_weight: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """images (B, 3, H, W) in [-1, 1], labels (B,) -> L_joint + L_aux, scalar; what log.jsonl
        holds, scalars and one (number of blocks,) tensor; the painted images, which only phase 2
        needs. Only the first has a gradient. `nll_weight` grows with the step, so it is given."""
        model, c = self.model, self.model.config
        mu, z = model.latents(images, draws)  # Eq. 1, (B, K, d)
        # -1 trains the null class, which guidance later compares with: both from one flow.
        labels = torch.where(draws.drop_label, -1, labels)
        outputs, logdet = model.flow.intermediates(z, labels)  # u is the last output
        nll_square, nll_logdet = flow_nll(outputs[-1], logdet)  # Eq. 4, (B,) each
        nll = nll_square + nll_logdet
        if c.freeze_autoencoder:  # the baseline's decoder has nothing to learn
            painted, logs = None, {}
            loss = nll_weight * nll
        else:
            painted = model.decoder(z, draws.branch_scales)  # (B, 3, H, W)
            recon, logs = painting_loss(c, self.frozen, images, painted, draws.mask)
            loss = joint_loss(recon, nll, nll_weight)  # Eq. 6
        for name, teacher in self.frozen.teachers.items():
            predicted = self.auxiliary[name](z)  # (B, N, C_t)
            logs[f"aux_{name}"] = auxiliary_loss(predicted, teacher(images), draws.mask)  # Eq. 7
            loss = loss + c.teacher_weight * logs[f"aux_{name}"]

        logs |= {"loss": loss, "nll": nll, "nll_square": nll_square, "nll_logdet": nll_logdet}
        logs = {name: value.detach().mean() for name, value in logs.items()}
        with torch.no_grad():
            # Per-block mean square: 1 at the end is a flow that reaches the unit Gaussian.
            logs["block_mean_square"] = torch.stack([x.square().mean() for x in outputs])
            # Over the images of this forward pass, so comparable between equal parts only. Near 0
            # the latent has collapsed: the flow is content and the picture is lost.
            logs["mu_std"] = mu.std(dim=0, correction=0).mean()
        return loss.mean(), logs, None if painted is None else painted.detach()


class DecoderTraining(nn.Module):
    """Phase 2, the decoder's side: Eq. 8 on latents that come, as in phase 1, from MASKED images
    with noise, so that the decoder goes on seeing what the flow has learned to produce."""

    def __init__(
        self, model: MIMFlow, frozen: FrozenNetworks, discriminator: PatchDiscriminator | None
    ):
        super().__init__()
        self.model, self.frozen = model, frozen
        # In a tuple: its weights belong to the other player (DiscriminatorTraining), not to this.
        self.opponent = (discriminator,)

    def forward(
        self, images: Tensor, labels: Tensor, draws: Draws, nll_weight: float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As JointTraining.forward, with L_ft (Eq. 8); labels and nll_weight play no part."""
        c, (discriminator,) = self.model.config, self.opponent
        with torch.no_grad():
            _, z = self.model.latents(images, draws)  # (B, K, d)
        painted = self.model.decoder(z, draws.branch_scales)  # (B, 3, H, W)
        loss, logs = painting_loss(c, self.frozen, images, painted, draws.mask)
        if discriminator is not None:
            # Detached weights: this loss moves the painting, never its judge.
            weights = {name: p.detach() for name, p in discriminator.named_parameters()}
            logits = torch.func.functional_call(discriminator, weights, (painted,))
            logs["gan"] = generator_loss(logits)
            loss = finetune_loss(loss, logs["gan"], c.gan_weight)  # Eq. 8
        logs["loss"] = loss
        logs = {name: value.detach().mean() for name, value in logs.items()}
        return loss.mean(), logs, painted.detach()


class DiscriminatorTraining(nn.Module):
    """Phase 2, the other side: the discriminator's hinge loss."""

    def __init__(self, discriminator: PatchDiscriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, painted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Real and painted images (B, 3, H, W), without gradient -> loss, scalar, and its logs."""
        real, fake = self.discriminator(images), self.discriminator(painted)
        loss = discriminator_loss(real, fake).mean()
        logs = {"discriminator": loss, "logit_real": real.mean(), "logit_fake": fake.mean()}
        return loss, {name: value.detach() for name, value in logs.items()}


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sample_noise(seed: int, indices: range, num_latents: int, latent_dim: int) -> Tensor:
    """Noise u (len(indices), K, d) of samples number `indices`: each has a generator of its own,
    so that sample i is the same whichever process draws it and whatever is drawn beside it."""
    # The 1 keeps these streams apart from those of the training steps. (A 0 would not: to
    # SeedSequence, (seed, i, 0) and (seed, i) are the same.)
    generators = (torch.Generator().manual_seed(derived_seed(seed, i, 1)) for i in indices)
    return torch.stack([torch.randn(num_latents, latent_dim, generator=g) for g in generators])


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema += (1 - decay) (model - ema), in place.

    paper: decay 0.9999 throughout; here: at most (1 + step) / (10 + step), because the weights of
    the first steps would otherwise weigh on the average for tens of thousands more.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


# --------------------------------------------------------------------------------------------------
# Processes and devices: plain `python` is a world of one
#
# torchrun starts the processes and tells each its place in environment variables. rank() counts
# over all machines and decides which rows of a batch are this process's, LOCAL_RANK counts on one
# machine and decides which GPU is.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """How often torchrun has started this run again by itself (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


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
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        fail(f"device {name} cannot be used by rank {rank()} ({reason})", 2, every_rank=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def uses_bf16(device: torch.device) -> bool:
    """Whether training computes in bfloat16 (autocast) on this device; the weights are float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def start_processes(device: torch.device) -> None:
    """Join the process group of torchrun, if there is one: nccl on CUDA, gloo on the CPU."""
    if world_size() > 1:
        # torchrun keeps one store over its restarts (--max-restarts). Under a name for each try,
        # new processes do not meet the addresses of dead ones.
        store, this, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"try{restarts()}", store)
        # gloo as well: what processes agree on in CPU memory (StopSignal) waits for no GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=this, world_size=count, timeout=TIMEOUT)


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


class StopSignal:
    """SIGTERM (a scheduler's wish) and SIGINT (Ctrl-C): noted when they come, obeyed by all
    processes at the end of the same step."""

    def __init__(self):
        self.number = 0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number: int, frame: Any) -> None:
        self.number = self.number or number

    def agreed(self) -> int:
        """The signal that some process has got, 0 for none. Every process must ask. A CPU tensor,
        so that nothing waits for the GPU."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def restore(self) -> None:
        """Back to the handlers from before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_interrupt(worker: int) -> None:
    """For data workers: Ctrl-C reaches them too, but it is the main process that ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def lock_folder(folder: Path) -> Any:
    """Claim a run folder; keep what is returned. A second run in it ends with a clear line. The
    system gives the lock back when this process ends, however it ends."""
    stream = open(folder / ".lock", "w")
    try:
        # A lock of the process, not of the open file: data workers do not inherit it.
        if fcntl is not None:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another run is at work in {folder}: wait for it, or use --out FOLDER")
    except OSError as error:
        say(f"note: {folder} cannot be locked ({error.strerror}): start no second run in it")
    return stream


# --------------------------------------------------------------------------------------------------
# Checkpoints: tensors and plain Python values only, read with weights_only=True
#
# A pickle can run code when it is read; with weights_only torch refuses those that would. Writing
# goes to a temporary file, is synced and renamed, so a kill at any moment leaves the old file or
# the new one (or, between two renames, the old one as previous.pt). The bare model is saved, never
# what compile or DDP wrap around it.
#
#   last.pt      format, step, config, class_names, model, ema, optimizer, skipped, and auxiliary
#                (phase 1) or discriminator and discriminator_optimizer (phase 2): to go on from
#   previous.pt  the last.pt before it, in case that one is damaged
#   model.pt     format, step, config, class_names, model (= the EMA weights): what one shares


def write_file(path: Path, write: Callable[[Any], Any], previous: Path | None = None) -> None:
    """Call `write(stream)` on a temporary file beside `path`, sync it, put it in place: path always
    holds either the old content or the whole new one. The old one moves to `previous`, if given;
    between the two renames it is there alone, and `find_last` looks there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except RuntimeError as error:
        # torch.save hides what stopped it, a full disk for instance, behind one of these.
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; on a full disk, no part of one."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as stream:
            stream.write(line + "\n")
    except OSError:  # after closing, which tries to write the rest once more
        if path.exists():
            os.truncate(path, before)
        raise


def attempt(what: str, work: Callable[[], None]) -> bool:
    """Do `work`, which writes. A full disk is said and survived: whatever was there before still
    is, and the next try may find room. Returns whether it was done."""
    try:
        work()
        return True
    except OSError as error:
        say(f"WARNING: cannot write {what} ({error.strerror}): going on without it")
        return False


def intact(path: Path) -> bool:
    """Whether a checkpoint is a complete file with no bit changed. torch.load alone does not look
    at the checksums of the zip archive that a checkpoint is, and zipfile forgives what torch
    refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensor yet
    except pickle.UnpicklingError:
        return True  # complete, but not to be trusted: read_checkpoint says so
    except Exception:  # a damaged archive can raise nearly anything
        return False
    return True


def find_last(run_dir: Path) -> Path | None:
    """The checkpoint to go on from: last.pt; previous.pt if that is missing or damaged; or None in
    a folder without either."""
    found = [path for path in (run_dir / "last.pt", run_dir / "previous.pt") if path.exists()]
    sound = [path for path in found if intact(path)]
    if found and not sound:
        fail(f"{' and '.join(map(str, found))} damaged: --overwrite starts again")
    if sound and sound[0] != found[0]:
        say(f"WARNING: {found[0]} is damaged: going on from {sound[0]}")
    return sound[0] if sound else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, on the CPU; one clear line for whatever is wrong."""
    if Path(path).is_dir():
        fail(f"{path} is a folder: name the checkpoint in it, in a run's folder model.pt")
    if not Path(path).is_file():
        fail(f"checkpoint {path} does not exist")
    if not intact(Path(path)):
        fail(f"checkpoint {path} is damaged (incomplete, or its checksums are wrong)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(
            f"checkpoint {path} holds more than tensors and plain values: it is not read, because "
            "it could run code"
        )
    except Exception as error:  # key, value, runtime errors: all mean that this is no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"checkpoint {path} is not one of train.py ({reason[:100]})")
    if not isinstance(checkpoint, dict) or not REQUIRED_KEYS | {"model"} <= checkpoint.keys():
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
    # Phase 2 has frozen the flow. But autocast keeps the bfloat16 copies only of weights that may
    # need gradients; without them, sampling would cast all weights again for every token.
    return model.requires_grad_().to(device).eval()


def find_checkpoint(path: str | None) -> Path:
    """`path`, or without one the newest runs/*/model.pt."""
    if path is not None:
        return Path(path)
    found = sorted(Path("runs").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        fail("no checkpoint given and none in runs/*/model.pt: run `python train.py` to make one")
    return found[-1]


def check_init(trained: Config, config: Config) -> None:
    """Refuse --init from a model of another architecture, naming what differs. Phase 2 also needs
    the same flow and the same latents (sigma, masks)."""
    names = "image_size patch_size width depth heads num_latents latent_dim"
    if config.phase == "decoder":
        names += " flow_width flow_depths flow_head_dim num_classes gated scale sigma mask_ratio"
    differing = [
        f"{flag(name)} {shown(getattr(trained, name))}"
        for name in names.split()
        if getattr(trained, name) != getattr(config, name)
    ]
    if differing:
        fail(f"the model of --init has {', '.join(differing)}: add these flags", 2)


def shown(value: Any) -> str:
    """A value as one types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


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


def earlier_work(config: Config, class_names: tuple[str, ...]) -> dict[str, Any] | None:
    """The checkpoint to go on from, None in a fresh run folder; refuses what does not fit."""
    run_dir = config.run_dir
    found = find_last(run_dir)
    if found is None:
        if (run_dir / "model.pt").exists():
            fail(
                f"{run_dir} holds a model.pt but no last.pt to go on from: use --out FOLDER for a "
                "new run or --overwrite to replace it",
                2,
            )
        return None
    checkpoint = read_checkpoint(found)
    check_same_run(config_from_dict(checkpoint["config"], found), config, run_dir)
    if tuple(checkpoint["class_names"]) != class_names:
        fail(f"{run_dir} was trained on other classes than those of --data: --out or --overwrite")
    return checkpoint


def start_over(run_dir: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    names = ("last.pt", "previous.pt", "model.pt", "log.jsonl", "config.json")
    for path in [*(run_dir / name for name in names), *(run_dir / "samples").glob("step_*.png")]:
        path.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of log.jsonl after `step`: those steps are about to be done again. A line that
    a full disk or a kill cut short is dropped, too."""
    if path.is_file():
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, TypeError, KeyError):
                continue
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


def make_optimizer(module: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW (Tab. 7) over the weights of `module` that train, in one fused kernel: the only one
    that obeys `found_inf`, by which the loop skips a step."""
    c = config
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=c.lr,
        betas=(c.beta1, c.beta2),
        eps=1e-8,
        weight_decay=c.weight_decay,
        fused=True,
    )


def distribute(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """`module` as the loop calls it: compiled if asked for, gradients averaged over processes."""
    if config.compile:
        module = torch.compile(module)
    if world_size() > 1:
        # Newer torch has another name for this flag, but still takes the old one.
        warnings.filterwarnings("ignore", "'broadcast_buffers'", FutureWarning)
        module = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # constants, and statistics that are the same or local
        )
    return module


def main(config: Config, overwrite: bool = False) -> None:
    """Train the phase of `config` from the first step, or go on from last.pt, to config.steps."""
    # Set-up: device, data, processes. All that can be wrong is checked before anything is written.
    check_config(config)
    device = select_device(config.device)
    dataset = open_dataset(config.data, config.image_size, "train", config.seed)
    config = resolve(config, dataset)
    c, run_dir = config, config.run_dir
    last, log_path = run_dir / "last.pt", run_dir / "log.jsonl"
    overwrite = overwrite and restarts() == 0  # what torchrun starts again is this very run
    checkpoint = None if overwrite else earlier_work(config, dataset.class_names)
    if checkpoint is not None and checkpoint["step"] >= c.steps:
        say(
            f"{run_dir} is finished ({checkpoint['step']} steps): --steps N goes on, "
            "--overwrite starts again"
        )
        return
    trained = None  # a run that goes on has its own, later weights in last.pt
    if c.init is not None and checkpoint is None:
        trained = load_checkpoint(c.init)
        check_init(trained.config, config)
    # Before the processes join: a download may take longer than they would wait for one another.
    frozen = load_frozen_networks(config, device)
    start_processes(device)
    lock = None
    if rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(run_dir)
        except OSError as error:
            fail(
                f"cannot write to the run folder {run_dir} ({error.strerror}): choose another --out"
            )

    # Model, its moving average, objectives. Weights have the default dtype: float32, in tests 64.
    torch.manual_seed(c.seed)
    dtype = torch.get_default_dtype()
    model = MIMFlow(config, dataset.class_names).to(device)
    if trained is not None:
        model.encoder.load_state_dict(trained.encoder.state_dict())
        model.decoder.load_state_dict(trained.decoder.state_dict())
        if c.phase == "decoder":  # the baseline of Tab. 1 trains a flow of its own, from nothing
            model.flow.load_state_dict(trained.flow.state_dict())
    # The average is what is sampled from and shared; it starts as a copy and follows slowly. Every
    # process has made the same weights from the seed, so all copies are the same.
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    discriminator = None
    if c.phase == "joint":
        training = JointTraining(model, frozen).to(device)
    else:
        if c.gan_weight:
            # channels_last is the layout in which bfloat16 convolutions are fastest on a GPU.
            discriminator = PatchDiscriminator().to(device, memory_format=torch.channels_last)
            # Else each GPU would normalise by its own few pictures. Not implemented on the CPU.
            if device.type == "cuda" and world_size() > 1:
                discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
        training = DecoderTraining(model, frozen, discriminator)

    # One player, or in phase 2 two: each with its own optimizer. `saved` is what a step changes and
    # the next one needs, by its name in last.pt (counts apart).
    players = (
        [training] if discriminator is None else [training, DiscriminatorTraining(discriminator)]
    )
    optimizers = [make_optimizer(player, config) for player in players]
    saved = {"model": model, "ema": ema, "optimizer": optimizers[0]}
    if c.phase == "joint":
        saved["auxiliary"] = training.auxiliary
    elif discriminator is not None:
        saved |= {"discriminator": discriminator, "discriminator_optimizer": optimizers[1]}
    start = 0
    skipped = torch.zeros((), device=device)  # steps whose gradient was not finite
    in_a_row = torch.zeros((), device=device)  # of these, the unbroken run up to now
    if checkpoint is not None:
        for name, part in saved.items():
            part.load_state_dict(checkpoint[name])
        start = checkpoint["step"]
        skipped += checkpoint["skipped"]
        say(f"continuing {run_dir} after step {start}")
    del checkpoint, trained
    # The players as the loop calls them; optimizers and checkpoints hold the bare modules.
    steppers = [distribute(player, config, device) for player in players]
    bf16 = uses_bf16(device)

    # Data: this process's rows of every global batch; the loader has a generator of its own. It is
    # one long pass over all steps, so its workers live as long as the run.
    share = c.batch_size // world_size()
    rows = range(rank() * share, (rank() + 1) * share)
    with_workers = dict(prefetch_factor=4, timeout=TIMEOUT.total_seconds()) if c.num_workers else {}
    loader = DataLoader(
        TrainingPictures(dataset, c.skip_bad_images),
        batch_sampler=StepSampler(len(dataset), c.batch_size, rows, start, c.steps, c.seed),
        num_workers=c.num_workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=ignore_interrupt,
        **with_workers,
    )
    say(
        f"{run_dir}: {len(dataset)} pictures, {c.num_classes} classes; "
        f"{count_parameters(model) / 1e6:.2f} M parameters; "
        f"steps {start}..{c.steps} of {c.batch_size} on {world_size()} x {device}"
    )

    # Each process has read last.pt by itself: all must have found the same.
    bounds = torch.tensor([start, -start], device=device)
    if dist.is_initialized():
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if bounds.tolist() != [start, -start]:
        fail(f"rank {rank()} would start at step {start}, others not: share {run_dir}", 1, True)
    # The run folder changes only now that everything needed is there, and read by all.
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
        """Write last.pt and model.pt."""
        head = dict(format=CHECKPOINT_FORMAT, step=step, config=asdict(config))
        head["class_names"] = list(dataset.class_names)
        full = {name: part.state_dict() for name, part in saved.items()}
        full = {**head, **full, "skipped": int(skipped)}
        # What the run needs goes first, in case that the disk fills up between the two.
        write_file(last, lambda stream: torch.save(full, stream), run_dir / "previous.pt")
        shared = {**head, "model": full["ema"]}
        write_file(run_dir / "model.pt", lambda stream: torch.save(shared, stream))

    def draw_samples(step: int) -> None:
        """Write a grid of EMA samples."""
        images = ema.sample(noise_shown.to(device), labels_shown.to(device), c.guidance)
        save_png(images, 8, run_dir / "samples" / f"step_{step:07d}.png")

    def log(step: int, line: dict[str, Any]) -> None:
        """Add a line to log.jsonl, and show its most telling numbers."""
        append_line(log_path, json.dumps(line))
        keys = ("loss", "mse", "lpips", "nll", "mu_std", "gan", "discriminator")
        text = "  ".join(f"{key} {line[key]:.4f}" for key in keys if key in line)
        bar.set_postfix_str(text)
        if not terminal:
            say(f"step {step}/{c.steps}  {text}  {line['ms_per_step']:.0f} ms")

    # The loop. Nothing in it waits for the GPU but logging, drawing and saving: the host stays
    # ahead and keeps the device busy.
    logged, since, complete = start, time.perf_counter(), True
    # Counts are read from the device with the log. On a CPU reading costs nothing: every step.
    check_every = 1 if device.type == "cpu" else c.log_every
    broken, counted, stop = BrokenImages(dataset), int(skipped), StopSignal()
    terminal = sys.stderr.isatty() and rank() == 0
    bar = tqdm(total=c.steps, initial=start, desc="training", disable=not terminal)
    for step, (images, labels, bad) in enumerate(loader, start=start):
        done = step + 1
        lr = learning_rate(config, step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        nll_weight = c.nll_weight * ramp(step, c.nll_warmup)
        broken.add(bad)

        # Gradient of the mean over the global batch: the parts of a process add up (--grad-accum),
        # and with the last part DDP averages over processes while the backward pass still runs.
        images = images.to(device, dtype, non_blocking=True)  # (share, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (share,)
        if c.num_classes == 0:
            labels = torch.full_like(labels, -1)
        draws = draw_randomness(config, step, device)
        micro_batch = share // c.grad_accum
        logs: list[dict[str, Tensor]] = []
        for first in range(0, share, micro_batch):
            last_part = first + micro_batch == share
            for stepper in steppers if world_size() > 1 else []:
                stepper.require_backward_grad_sync = last_part  # what DDP.no_sync() sets
            part_draws = draws.rows(rows.start + first, rows.start + first + micro_batch)
            here = slice(first, first + micro_batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, part_logs, painted = steppers[0](
                    images[here], labels[here], part_draws, nll_weight
                )
            (loss / c.grad_accum).backward()  # parts are equal: the mean of means is the mean
            # Both players answer the same pictures, and both move at the end of the step.
            if discriminator is not None:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss, more_logs = steppers[1](images[here], painted)
                (loss / c.grad_accum).backward()
                part_logs |= more_logs
            logs.append(part_logs)

        # Update. If a gradient is not finite no weight moves (found_inf, as torch's GradScaler does
        # it: the decision stays on the device). The norms are of averaged gradients, so all
        # processes decide alike, and both players move or none. Ten in a row, seen when the counts
        # are read, end the run.
        norms = [nn.utils.clip_grad_norm_(player.parameters(), c.grad_clip) for player in players]
        not_finite = 1 - torch.stack(norms).isfinite().all().float()
        for optimizer in optimizers:
            optimizer.found_inf = not_finite
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, c.ema, step)  # after a skipped step too: towards what stood still
        skipped += not_finite
        in_a_row = (in_a_row + 1) * not_finite
        if (done % check_every == 0 or done == c.steps) and int(skipped) > counted:
            counted = int(skipped)
            say(f"step {done}: gradient is not finite, step skipped ({counted} so far)")
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                good = f"{last} keeps the last good state" if last.exists() else "nothing was saved"
                fail(
                    f"{int(in_a_row)} non-finite gradients in a row at step {done}: {good}; "
                    "try a lower --lr"
                )
        bar.update()

        # Log, draw, save; a signal saves too, and ends the run.
        if done % c.log_every == 0 or done == c.steps:
            line = {"step": done, "lr": lr, "grad_norm": float(norms[0]), "skipped": int(skipped)}
            for name in logs[0]:
                mean = mean_over_processes(torch.stack([entry[name] for entry in logs]).mean(dim=0))
                line[name] = mean.tolist()
            if c.skip_bad_images:  # each process has met its own
                mean = mean_over_processes(torch.tensor(float(len(broken.indices)), device=device))
                line["bad_images"] = round(float(mean) * world_size())
                broken.check(line["bad_images"])
            now = time.perf_counter()
            line["ms_per_step"] = round(1000 * (now - since) / (done - logged), 1)
            since, logged = now, done
            if rank() == 0:
                attempt(str(log_path), lambda line=line, done=done: log(done, line))
        if rank() == 0 and (done % c.sample_every == 0 or done == c.steps):
            attempt("a grid of samples", lambda done=done: draw_samples(done))
        # Asked at every step: a process that left alone would leave the others waiting. While
        # gradients are not finite nothing is saved, so that both checkpoints are from before.
        stopped_by = stop.agreed()
        due = done == c.steps or stopped_by or (done % c.save_every == 0 and in_a_row == 0)
        if rank() == 0 and due:
            complete = attempt("a checkpoint", lambda done=done: save(done))
        if stopped_by:
            break

    # A clean end: the loader's workers and the DDP modules go before the process group does.
    bar.close()
    del loader, steppers
    stop_processes()
    stop.restore()
    if lock is not None:
        lock.close()
    if not complete:
        fail(f"the end of the run was not saved: make room, then the same command goes on ({last})")
    if stopped_by:
        name = signal.Signals(stopped_by).name
        fail(f"{name}: saved at step {done}, the same command goes on", 128 + stopped_by)
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
    "phase": "phase",
    "data": "data (App. A)",
    "patch_size": "masked encoder and decoder (Tab. 6)",
    "num_latents": "latent space (Tab. 6)",
    "flow_width": "normalizing flow (Tab. 6)",
    "nll_weight": "losses (Tab. 7)",
    "vgg": "weight files",
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
        description="Train MIMFlow (Sec. 3.2.3 and 3.3). The same command continues a run.",
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
    for f in fields(Config)[1:]:  # --preset has been added above
        if f.name in FLAG_GROUPS:
            group = parser.add_argument_group(FLAG_GROUPS[f.name])
        settings = dict(f.metadata)
        paper = PRESETS["mimflow-l"].get(f.name, f.default)
        values = [paper, PRESETS["shapes"].get(f.name, f.default)]
        if values[0] is not None or values[1] is not None:
            settings["help"] += " [{}; {}]".format(*(shown(v) or "none" for v in values))
        # The type of one value: of "int | None" and of "tuple[int, ...]" that is int.
        kind = (get_args(f.type) or (f.type,))[0]
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = kind
            settings.setdefault("metavar", "N" if kind in (int, float) else None)
        if "choices" in settings:
            settings.pop("metavar")
        # SUPPRESS: what is not given stays open for the preset.
        group.add_argument(flag(f.name), default=argparse.SUPPRESS, **settings)

    flags = parser.parse_args(arguments)
    if flags.preset not in PRESETS:
        parser.error(f"unknown preset {flags.preset}: choose from {', '.join(PRESETS)}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(flags).items()}
    actions = {k: given.pop(k) for k in ("overwrite", "dry_run", "check_data")}
    phase = DECODER_PHASE[flags.preset] if given.get("phase") == "decoder" else {}
    return Config(**{**PRESETS[flags.preset], **phase, **given}), argparse.Namespace(**actions)


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
    except WeightsMissing as error:
        fail(str(error), every_rank=True)
    except torch.cuda.OutOfMemoryError:
        fail(
            "GPU memory is full: a smaller --batch-size, or in training more --grad-accum", 1, True
        )
    except OSError as error:
        fail(f"reading or writing failed: {error}", every_rank=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "DataLoader" in str(error):
            fail(f"a data worker ended ({reason}): try fewer --num-workers, or 0", every_rank=True)
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            fail(f"torch.compile failed ({reason}): leave --compile out", every_rank=True)
        raise
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on (train.py: without --overwrite)", 130)


if __name__ == "__main__":
    run_program(command_line)
