"""Every number of the paper's tables and Fig. 4 and 6 (Sec. 4, App. C), a subcommand each.

    python evaluate.py generation SAMPLES.npz VIRTUAL_imagenet256_labeled.npz           Tab. 3
    torchrun --nproc_per_node=8 -- evaluate.py generation CKPT REFERENCE --num 50000
    python evaluate.py reconstruction CKPT --data DIR             rFID, PSNR, LPIPS     Tab. 5
    python evaluate.py probe CKPT --data DIR                      linear probe          Fig. 6
    python evaluate.py likelihood CKPT --data DIR                 log p_F(z)            Eq. 4
    python evaluate.py map CKPT --data DIR                        latents in 2-D        Fig. 4
    python evaluate.py cost --preset mimflow-l --no-timing        sizes, speed    Tab. 2, 4, 10

    pictures --TF1 resize, Inception (2015)--> pool (N, 2048), spatial (N, 2023)
        pool of two sets    -> FID, precision, recall        spatial of two sets -> sFID
        pool of the samples -> Inception Score
    x --masked encoder, noise--> z --decoder--> x_hat                       reconstruction
    x --encoder--> features (K, C) --> mu (K, d) --flow--> block 1 .. u     probe, map
                                       z -> log p_F(z)                      likelihood

The five numbers of generation are defined by ADM's evaluation suite (Dhariwal & Nichol 2021),
whose .npz files are read and written here. They depend on the number of pictures, on the file they
are compared with and on the very weights of the Inception network (torchvision's are others), so
each number is printed and written (--json) together with its protocol: what was measured, and how.

Numbers do not depend on --batch-size or on the number of processes, but for rounding: sample and
picture i has its own random stream, from (seed, i); process r handles batches r, r + world_size,
...; process 0 puts them in order and computes the rest alone.

Pictures are in [0, 255] where Inception looks, and in [-1, 1] where the model does. The file reads
in this order: sets of pictures, batches over processes, Inception, the formulas, then a section for
each subcommand: its first lines say what its numbers mean, and how they are misread.
"""

import argparse
import functools
import hashlib
import json
import math
import platform
import shlex
import statistics
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import losses
import sample
from flow import DEEP_WINDOW
from train import (
    PRESETS,
    BrokenImage,
    Config,
    JointTraining,
    MIMFlow,
    Parser,
    adm_crop,
    count_parameters,
    distribute,
    draw_randomness,
    draws_of_pictures,
    fail,
    find_checkpoint,
    flag,
    list_images,
    load_checkpoint,
    load_frozen_networks,
    make_optimizer,
    open_dataset,
    rank,
    read_picture,
    resolve,
    run_program,
    sample_noise,
    save_png,
    say,
    select_device,
    shown_classes,
    start_processes,
    stop_processes,
    to_uint8,
    uses_bf16,
    world_size,
    write_file,
)

# ADM's metrics
INCEPTION_SIDE = 299  # pixels
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1, 17 x 17 each: sFID's 2023 numbers
SCORE_SPLIT = 5000  # pictures a split of the Inception Score
NEIGHBOUR = 3  # k of precision and recall
# Pictures that a metric needs on each side: a covariance has 2, a third neighbour 3 others.
LEAST = {"fid": 2, "sfid": 2, "rfid": 2, "inception_score": 1, "precision": 4, "recall": 4}
BLOCK = 2048  # rows held in float64 at a time

# Reconstruction
BOX = 21  # side of the box filter that parts low from high frequencies, pixels
SHOWN = 8  # pictures in a row of the reconstruction grid

# The linear probe (Sec. 4.1.1; what the paper leaves open, from its release)
PROBE_EPOCHS, PROBE_BATCH, PROBE_LR, PROBE_MOMENTUM, PROBE_DECAY = 90, 2048, 0.1, 0.9, 1e-4

# Cost
TOKENS = (64, 128, 256, 1024)  # numbers of latent tokens compared in Tab. 10
BATCHES = (1, 8, 64, 256)  # pictures drawn at a time
RANDOM_STD = 0.1  # of a fresh flow's predictions: at 0 it is the identity, and jacobi done at once
WARM_UP = 2  # calls before those that are timed
LONG_ENOUGH = 10.0  # seconds after which a timing is not repeated any more


# --------------------------------------------------------------------------------------------------
# Sets of pictures: an .npz file of ADM's format, or a folder
#
# Papers exchange samples as one .npz: arr_0 holds the pictures, and reference files hold besides
# them the mean and covariance of the features of the whole training set. ADM's VIRTUAL_ file has
# 10,000 pictures, but statistics of 1.28 million: FID and sFID use the statistics, precision and
# recall the pictures.


class PictureSet(Dataset):
    """Pictures of one size in [0, 255] on disk, read a batch at a time: 50,000 take 10 GB.

    path: an .npz with arr_0 (n, H, W, 3), uint8 or any numbers, and perhaps the statistics mu,
    sigma, mu_s, sigma_s of ADM's reference files; or a folder, all pictures below it sorted by
    path. crop: side in pixels to which pictures of a folder are cropped as in training; None
    leaves them alone. self[range] is a float32 batch (n, 3, H, W), neither clipped nor rounded.

    What cannot be a set of pictures ends the program with one line; a picture that turns out to
    be damaged when it is read raises BrokenImage.
    """

    def __init__(self, path: Path, crop: int | None = None):
        self.path, self.crop = path, crop
        self.has_statistics = False
        self.stream: Any = None  # opened at the first read, by the process that reads
        self.array: np.ndarray | None = None  # only for an order that cannot be streamed
        if path.is_dir():
            self.files = list_images(path)
            self.count = len(self.files)
            if not self.files:
                fail(f"no pictures in {path}")
            if crop is None:
                self.check_sizes()
        elif path.is_file():
            self.files = []
            self.open_npz()
        else:
            fail(f"{path} does not exist: give an .npz file or a folder of pictures")

    def check_sizes(self) -> None:
        """End with a line that names two pictures of different sizes; reads headers only."""
        first = None
        for file in progress(self.files, f"sizes in {self.path.name}"):
            try:
                with Image.open(file) as picture:
                    size = picture.size
            except OSError as error:
                fail(f"cannot read {file} ({error})")
            first = first or size
            if size != first:
                fail(
                    f"{self.path} mixes sizes: {self.files[0]} is {first[0]} x {first[1]}, {file} "
                    f"is {size[0]} x {size[1]}; --crop SIDE crops and resizes all as in training"
                )

    def open_npz(self) -> None:
        """Find out what an .npz file holds, without reading its pictures."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                if "arr_0" not in names:
                    held = ", ".join(sorted(names)) or "nothing"
                    fail(f"{self.path} has no arr_0 (it holds {held}): pictures are expected there")
                with archive.open("arr_0.npy") as stream:
                    shape, fortran, self.dtype = read_header(stream)
        except (zipfile.BadZipFile, ValueError) as error:
            fail(f"{self.path} is damaged or not an .npz file ({error})")
        if len(shape) != 4 or shape[3] != 3 or 0 in shape or self.dtype.kind not in "uif":
            fail(
                f"{self.path}: arr_0 is {self.dtype} {shape}, expected pictures (n, height, "
                "width, 3) in 0..255"
            )
        self.count, self.shape = shape[0], shape[1:]
        self.has_statistics = "mu" in names  # ADM asks for mu alone, then reads all four
        missing = {"sigma", "mu_s", "sigma_s"} - names
        if self.has_statistics and missing:
            fail(f"{self.path} has mu but no {', '.join(sorted(missing))}")
        if fortran:
            self.array = np.load(self.path, allow_pickle=False)["arr_0"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: range) -> Tensor:
        if self.files:
            images = np.stack([self.read_file(self.files[i]) for i in indices])
        elif self.array is not None:
            images = self.array[indices.start : indices.stop]
        else:
            images = self.read_npz(indices)
        return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)

    def read_file(self, path: Path) -> np.ndarray:
        """A picture as uint8 (H, W, 3)."""
        try:
            picture = read_picture(path)
        except Exception as error:  # whatever a decoder raises, the user needs the path
            raise BrokenImage(f"cannot read {path} ({error})") from None
        return np.asarray(picture if self.crop is None else adm_crop(picture, self.crop))

    def read_npz(self, indices: range) -> np.ndarray:
        """Rows of arr_0 (n, H, W, 3) out of the archive, compressed or not.

        np.load would unpack all of arr_0 into memory. In C order the rows lie one after the other
        in the stream, and zipfile can seek in it (by unpacking what is between, if compressed).
        """
        if self.stream is None:
            self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")
            read_header(self.stream)
            self.start = self.stream.tell()
        size = math.prod(self.shape) * self.dtype.itemsize  # bytes a picture
        try:
            self.stream.seek(self.start + indices.start * size)
            data = self.stream.read(len(indices) * size)
            return np.frombuffer(data, self.dtype).reshape(len(indices), *self.shape)
        except (zipfile.BadZipFile, ValueError) as error:
            raise BrokenImage(f"{self.path} is damaged ({error})") from None

    def statistics(self) -> dict[str, np.ndarray]:
        """mu (2048,), sigma (2048, 2048), mu_s (2023,), sigma_s (2023, 2023) of the file."""
        names = ("mu", "sigma", "mu_s", "sigma_s")
        with np.load(self.path, allow_pickle=False) as file:
            found = {name: file[name].astype(np.float64) for name in names}
        for name, side in {"mu": 2048, "mu_s": 2023}.items():
            shapes = found[name].shape, found["sigma" + name[2:]].shape
            if shapes != ((side,), (side, side)):
                fail(f"{self.path}: {name} and its sigma are {shapes}, expected {side} features")
        return found

    def describe(self) -> dict[str, Any]:
        """What the protocol says of this set."""
        return {
            "file": str(self.path),
            "sha256": file_sha256(*(self.files or [self.path])),
            "pictures": self.count,
            "statistics": "of the file" if self.has_statistics else "of its pictures",
            "crop": self.crop,
        }


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an .npy stream, which is left at its first number."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def file_sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of the contents of several, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """What the protocol says of a file: a name can lie about its content, a hash cannot."""
    return {"file": str(path), "sha256": file_sha256(path)}


# --------------------------------------------------------------------------------------------------
# Batches over all processes
#
# Networks run on all processes; formulas run once, on rank 0, over what all of them found. Nothing
# is averaged over processes: FID, for one, is not the mean of the FIDs of parts.


def progress(work: Iterable, description: str) -> tqdm:
    """A bar on rank 0, if somebody is watching."""
    return tqdm(work, desc=description, disable=not sys.stderr.isatty() or rank() != 0)


def sharded(
    data: Dataset, work: Callable[[Any], Any], description: str, flags: argparse.Namespace
) -> list[Any] | None:
    """work(data[range]) for every batch of `data`, batch j on process j mod world_size.

    On rank 0 the results in order, None elsewhere. `work` moves what it returns to the CPU: it is
    pickled on its way to rank 0. No picture counts twice: a DistributedSampler would repeat some,
    to give all processes equally many, and every mean would be another.
    """
    size = flags.batch_size
    ranges = [range(i, min(i + size, len(data))) for i in range(0, len(data), size)]
    # batch_size None: an item of `data` is already a batch. The loader's own generator leaves the
    # global one alone.
    loader = DataLoader(
        data,
        sampler=ranges[rank() :: world_size()],
        batch_size=None,
        num_workers=flags.num_workers,
        generator=torch.Generator(),
    )
    done = [work(batch) for batch in progress(loader, description)]
    if not dist.is_initialized():
        return done
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(done, gathered)
    if gathered is None:
        return None
    return [gathered[j % world_size()][j // world_size()] for j in range(len(ranges))]


# --------------------------------------------------------------------------------------------------
# The Inception network of the FID
#
# FID is defined by one network: TensorFlow's Inception v3 graph of 2015-12-05, with the parameter
# names of its published conversion to PyTorch. torchvision's inception_v3 has other weights and
# differs in four more places: how pictures are resized and scaled, average pooling that does not
# count padding, a maximum pooling in the last block, and 1008 outputs. Each of these moves the FID,
# so numbers of two different Inceptions do not compare.


class Conv(NamedTuple):
    """A convolution of a branch: padded to keep the size at stride 1, unpadded at stride 2."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)  # (height, width)
    stride: int = 1


def chain(name: str, *convolutions: tuple) -> list[Conv]:
    """name_1, name_2, ... one after the other, each (channels, kernel, stride)."""
    return [Conv(f"{name}_{i}", *given) for i, given in enumerate(convolutions, start=1)]


# A branch is a list of steps: a Conv, several side by side (a list inside the list), or a pooling.
Step = Conv | list[Conv] | Callable[[Tensor], Tensor]
Branches = list[list[Step]]

# As in TensorFlow, the mean is over the pixels that exist: padding is not counted.
AVERAGE = functools.partial(
    F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
MAXIMUM = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
SHRINK = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


def branches_a(pool: int) -> Branches:
    """35 x 35: Mixed_5b, 5c, 5d."""
    return [
        [Conv("branch1x1", 64)],
        chain("branch5x5", (48,), (64, (5, 5))),
        chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        [AVERAGE, Conv("branch_pool", pool)],
    ]


def branches_b() -> Branches:
    """35 x 35 -> 17 x 17: Mixed_6a."""
    return [
        [Conv("branch3x3", 384, (3, 3), 2)],
        chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2)),
        [SHRINK],
    ]


def branches_c(c: int) -> Branches:
    """17 x 17: Mixed_6b, 6c, 6d, 6e. A 7 x 7 is taken apart into 1 x 7 and 7 x 1: cheaper."""
    wide, high = (1, 7), (7, 1)
    return [
        [Conv("branch1x1", 192)],
        chain("branch7x7", (c,), (c, wide), (192, high)),
        chain("branch7x7dbl", (c,), (c, high), (c, wide), (c, high), (192, wide)),
        [AVERAGE, Conv("branch_pool", 192)],
    ]


def branches_d() -> Branches:
    """17 x 17 -> 8 x 8: Mixed_7a."""
    return [
        chain("branch3x3", (192,), (320, (3, 3), 2)),
        chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)),
        [SHRINK],
    ]


def branches_e(pooling: Callable[[Tensor], Tensor]) -> Branches:
    """8 x 8: Mixed_7b, 7c. Two branches end in a pair of convolutions, side by side."""

    def pair(name: str) -> list[Conv]:
        return [Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))]

    return [
        [Conv("branch1x1", 320)],
        [*chain("branch3x3", (384,)), pair("branch3x3_2")],
        [*chain("branch3x3dbl", (448,), (384, (3, 3))), pair("branch3x3dbl_3")],
        [pooling, Conv("branch_pool", 192)],
    ]


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalisation (frozen statistics), ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionBlock(nn.Module):
    """Parallel branches whose channels are concatenated in the order given."""

    def __init__(self, inputs: int, branches: Branches):
        super().__init__()
        self.branches, self.channels = branches, 0
        for branch in branches:
            channels = inputs
            for step in branch:
                convs = step if isinstance(step, list) else [step]
                convs = [conv for conv in convs if isinstance(conv, Conv)]  # a pooling has none
                for conv in convs:
                    padding = [k // 2 if conv.stride == 1 else 0 for k in conv.kernel]
                    layer = ConvNormReLU(channels, conv.channels, conv.kernel, conv.stride, padding)
                    self.add_module(conv.name, layer)
                channels = sum(conv.channels for conv in convs) or channels
            self.channels += channels

    def apply_step(self, x: Tensor, step: Step) -> Tensor:
        if isinstance(step, list):
            return torch.cat([self.apply_step(x, conv) for conv in step], dim=1)
        return getattr(self, step.name)(x) if isinstance(step, Conv) else step(x)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [functools.reduce(self.apply_step, branch, x) for branch in self.branches]
        return torch.cat(outputs, dim=1)


class FIDInception(losses.Frozen):
    """The network whose features define FID, sFID, IS, precision and recall.

    Random weights until load_inception loads the published ones.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3)
        channels = 192
        blocks = {
            "Mixed_5b": branches_a(32),
            "Mixed_5c": branches_a(64),
            "Mixed_5d": branches_a(64),
            "Mixed_6a": branches_b(),
            "Mixed_6b": branches_c(128),
            "Mixed_6c": branches_c(160),
            "Mixed_6d": branches_c(160),
            "Mixed_6e": branches_c(192),
            "Mixed_7a": branches_d(),
            "Mixed_7b": branches_e(AVERAGE),
            "Mixed_7c": branches_e(MAXIMUM),  # a slip of the 2015 graph, kept by every FID since
        }
        self.block_names = list(blocks)
        for name, branches in blocks.items():
            block = InceptionBlock(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, 1008)  # 1000 classes, background, unused ones
        for module in self.modules():  # random weights should let the picture through
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) float32 in [0, 255] -> pool (B, 2048), spatial (B, 2023).

        pool is an average over the picture: what is in it. spatial, from a layer in the middle,
        keeps its places, 17 x 17: where things are; sFID is the FID of these.
        """
        # Not x / 127.5 - 1, which pytorch-fid has: 255 becomes 0.992.
        x = (tf1_resize(images, INCEPTION_SIDE) - 128) * 0.0078125  # (B, 3, 299, 299) in [-1, 1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(SHRINK(x)))  # (B, 192, 71, 71)
        x = SHRINK(x)  # (B, 192, 35, 35)
        for name in self.block_names:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                # Its first channels are those of branch1x1. TensorFlow's order, (17, 17, 7), is
                # that of mu_s and sigma_s in ADM's files. With (7, 17, 17) the sFID of two folders
                # is the same, and that against a file is nonsense: some ports print 299 for 6.1.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008) WITHOUT the bias, as the Inception Score of ADM has it."""
        return pool @ self.fc.weight.T


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize, (B, C, H, W) -> (B, C, side, side), float32.

    Output pixel i reads position i * in / out: no half-pixel centres, no antialiasing, so that
    F.interpolate cannot do it. The horizontal blend comes first; all in float32, to the bit. FIDs
    with different resizes do not compare (Parmar et al. 2022).
    """
    for dim in (3, 2):
        length = images.shape[dim]
        source = torch.arange(side, dtype=torch.float32, device=images.device)
        source = source * float(np.float32(length) / np.float32(side))
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        t = source - low
        if dim == 2:
            t = t[:, None]
        lower, upper = images.index_select(dim, low), images.index_select(dim, high)
        images = lower + (upper - lower) * t
    return images


def load_inception(path: str | None, device: torch.device) -> tuple[FIDInception, dict[str, Any]]:
    """The network with the weights that --inception names, and what the protocol says of them.

    "random" is for tests of this program. Raises losses.WeightsMissing.
    """
    weights = losses.find_weights("inception", path)
    with losses.fixed_seed():
        network = FIDInception()
    if weights == losses.RANDOM:
        return network.to(device), {"inception": losses.RANDOM}
    losses.load_weights(network, "inception", weights, without_counters)
    described = describe_file(weights)
    if not described["sha256"].startswith(losses.WEIGHT_FILES["inception"].sha256):
        say(f"note: {weights} is not the published Inception, its numbers compare with no paper's")
    return network.to(device), {"inception": described}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop BatchNorm's counters, which do nothing and which only some files have. (In a plain dict
    load_state_dict forgives that they are missing, and nothing else.)"""
    return {k: value for k, value in state.items() if not k.endswith("num_batches_tracked")}


@torch.no_grad()
def inception_features(network: FIDInception, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """images (B, 3, H, W) in [0, 255] -> float32 pool (B, 2048) and spatial (B, 2023)."""
    images = images.to(network.fc.weight)
    # TF32 convolutions, on by default on recent GPUs, would move the third digit.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pool, spatial = network(images)
    return pool.cpu().numpy(), spatial.cpu().numpy()


# --------------------------------------------------------------------------------------------------
# ADM's five numbers, from features
#
#     FID, sFID   |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)    lower is better, 0 = equal
#     IS          exp E_x KL(p(y|x) || E_x p(y|x))                      higher, 1 to 1008
#     precision   share of the samples that lie among reference pictures  higher, 0 to 1: fidelity
#     recall      share of the reference that lies among samples          higher, 0 to 1: variety
#
# FID alone is biased: a covariance estimated from few pictures makes it larger, by an amount that
# depends on the model, so that even an order of models at 10,000 samples (Tab. 8) says little about
# that at 50,000 (Tab. 3).


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), float64, over N - 1.

    In two passes, a block of rows at a time: float32 features are all that is held. One pass,
    E x x^T - mu mu^T, would subtract large numbers that are nearly equal; in float32 that alone
    costs digits of the FID.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for first in range(0, len(features), BLOCK):
        centred = features[first : first + BLOCK] - mean
        covariance += centred.T @ centred
    return mean, covariance / (len(features) - 1)


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """Heusel et al. 2017: |mu1 - mu2|^2 + tr sigma1 + tr sigma2 - 2 tr (sigma1 sigma2)^(1/2).

    The squared Wasserstein distance of two Gaussians with these means (D,) and covariances (D, D),
    in squared units of the features. Equal sets may give -1e-8, as in ADM.

    paper (ADM): scipy's sqrtm of sigma1 sigma2, which is not symmetric; its root becomes complex
    when there are fewer pictures than features. Here: the trace of (M^T sigma2 M)^(1/2), where
    sigma1 = M M^T. It is the same number (both matrices have the same eigenvalues), but of a
    symmetric matrix, so that nothing becomes complex and singular covariances are no special case.
    """
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(eigenvalues.clip(min=0))  # M (D, D); rounding makes zeros negative
    squares = np.linalg.eigvalsh(root.T @ sigma2 @ root)  # (D,)
    cross = np.sqrt(squares.clip(min=0)).sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


@torch.no_grad()
def inception_score(network: FIDInception, pool: np.ndarray) -> float:
    """Salimans et al. 2016: exp of the mean KL(p(y|x) || p(y)), nats, of pool features (N, 2048).

    High when each sample is surely of one class (p(y|x) is sharp) and all classes occur (p(y) is
    flat). It never looks at a real picture: a single perfect sample a class would do.

    p(y) is the mean of p(y|x) over a split. Splits are runs of 5000 rows in file order, a shorter
    last one counts as much; the score is their mean. So the order of a file matters: sorted by
    class, a split has few classes and the score falls. In log space, as a probability may be 0 in
    floating point.
    """
    scores = []
    for split in torch.from_numpy(pool).split(SCORE_SPLIT):
        logits = network.logits(split.to(network.fc.weight)).cpu()  # (n, 1008)
        log_p = logits.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))  # log p(y), (1008,)
        divergence = (log_p.exp() * (log_p - log_mean)).sum(dim=1)  # (n,)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores))


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(m, D), (n, D) -> (m, n), float64.

    ADM computes |a|^2 - 2 a.b + |b|^2 in float16, whose steps at |a|^2 = 500 are 0.25 to 0.5: many
    distances tie, `<=` admits more, and how many depends on the hardware. float32 is good to seven
    digits of the norms, not of the small difference that is left of them.
    """
    a, b = a.double(), b.double()
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (squares - 2 * a @ b.T).clamp_(min=0)


def neighbour_radii(features: Tensor) -> Tensor:
    """Squared distance (N,) of each row of (N, D) to its third nearest other row, N >= 4.

    A merge over blocks of columns: of 50,000 rows all distances would take 20 GB.
    """
    radii = []
    for rows in progress(features.split(BLOCK), "radii"):
        nearest = rows.new_empty(len(rows), 0, dtype=torch.float64)
        for columns in features.split(BLOCK):
            candidates = torch.cat((nearest, squared_distances(rows, columns)), dim=1)
            size = min(NEIGHBOUR + 1, candidates.shape[1])
            nearest = candidates.topk(size, largest=False).values  # ascending
        radii.append(nearest[:, NEIGHBOUR])  # entry 0 is the row itself
    return torch.cat(radii)


def share_covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points (n, D) that lie within the ball of some centre (m, D), radii (m,)."""
    covered = 0
    for rows in progress(points.split(BLOCK), "coverage"):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radius in zip(centres.split(BLOCK), radii.split(BLOCK), strict=True):
            inside |= (squared_distances(rows, columns) <= radius).any(dim=1)
        covered += int(inside.sum())
    return covered / len(points)


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019 with k = 3 on pool features (S, 2048), (R, 2048), S and R >= 4.

    A set "is" the union of balls around its points that reach to the third neighbour. Precision:
    share of the samples within the reference; recall: share of the reference within the samples.
    More points make smaller balls, so both depend on both counts: papers have 50,000 samples and
    10,000 pictures. ADM prints 0.001 to 0.0025 more (see squared_distances).
    """
    precision = share_covered(samples, reference, neighbour_radii(reference))
    return precision, share_covered(reference, samples, neighbour_radii(samples))


# --------------------------------------------------------------------------------------------------
# generation (Tab. 3; the columns gFID to Rec. of Tab. 5, 8 and 9)
#
# Are the samples like real pictures, and as varied? A number compares with a paper's only if the
# reference file, the count (50,000, or 10,000 in Tab. 8), the guidance and the Inception are the
# same. Compare FIDs with and without guidance apart: guidance sharpens each picture (precision, IS
# up) and narrows the set (recall down), and FID is best somewhere between.


class MeasuredSet(NamedTuple):
    """A set of pictures and its Inception features, float32, in file order."""

    pictures: PictureSet
    pool: np.ndarray  # (N, 2048)
    spatial: np.ndarray  # (N, 2023)

    def gaussian(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance for fid or sfid: those in the file if there are any, as in ADM."""
        if not self.pictures.has_statistics:
            return moments(self.pool if metric == "fid" else self.spatial)
        end = "" if metric == "fid" else "_s"
        found = self.pictures.statistics()
        return found["mu" + end], found["sigma" + end]

    def lacks(self, metric: str) -> str | None:
        """Why the set is too small for a metric, if it is."""
        count = len(self.pictures)
        known = self.pictures.has_statistics and metric in ("fid", "sfid")
        if known or count >= LEAST[metric]:
            return None
        return f"needs {LEAST[metric]} pictures, {self.pictures.path} has {count}"


def stack(batches: Iterable[np.ndarray], source: object) -> np.ndarray:
    """The features of all batches as one array (N, D); ends with a line if any is not finite."""
    features = np.concatenate(list(batches))
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        fail(
            f"{source}: {len(bad)} pictures have features that are not finite, the first is number "
            f"{bad[0]}: damaged pictures or Inception weights"
        )
    return features


def generation(flags: argparse.Namespace) -> dict[str, Any] | None:
    """FID, sFID, IS, precision and recall of samples against a reference set, by ADM's rules."""
    # What is compared; a checkpoint samples first, and keeps its samples.
    reference = PictureSet(flags.reference, flags.crop)
    network, protocol = load_inception(flags.inception, flags.device)
    path = flags.samples
    if path.suffix == ".pt":
        path, facts = sample_checkpoint(flags)
        protocol |= facts
    samples = PictureSet(path, flags.crop)
    protocol |= {"samples": samples.describe(), "reference": reference.describe()}
    protocol["precision_recall"] = "float64; ADM's float16 gives 0.001 to 0.0025 more"

    # Features of all pictures, on all processes; the rest on rank 0.
    extract = functools.partial(inception_features, network)
    parts = [sharded(s, extract, s.path.name, flags) for s in (samples, reference)]
    stop_processes()
    if rank() != 0:
        return None
    if len(samples) != 50_000:
        say(f"note: papers use 50,000 samples, not {len(samples):,}, and FID depends on the number")
    measured = []
    for pictures in (samples, reference):
        features = zip(*parts.pop(0), strict=True)  # popped: batches go when they are stacked
        measured.append(MeasuredSet(pictures, *(stack(x, pictures.path) for x in features)))
    numbers, left_out = generation_numbers(network, *measured)
    return {**numbers, "protocol": {**protocol, "left_out": left_out}}


def generation_numbers(
    network: FIDInception, samples: MeasuredSet, reference: MeasuredSet
) -> tuple[dict[str, float | None], dict[str, str]]:
    """The five numbers, None for those that need more pictures, and why they are left out."""
    numbers: dict[str, float | None] = {}
    left_out = {}
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        numbers[name] = None
        for measured in (samples,) if name == "inception_score" else (samples, reference):
            if reason := measured.lacks(name):
                left_out[name] = reason
    for name in {"fid", "sfid"} - left_out.keys():
        numbers[name] = frechet_distance(*samples.gaussian(name), *reference.gaussian(name))
    if "inception_score" not in left_out:
        numbers["inception_score"] = inception_score(network, samples.pool)
    if "precision" not in left_out:
        device = network.fc.weight.device
        device = "cpu" if device.type == "mps" else device  # mps has no float64
        pools = (torch.from_numpy(measured.pool).to(device) for measured in (samples, reference))
        numbers["precision"], numbers["recall"] = precision_recall(*pools)
    return numbers, left_out


def sample_checkpoint(flags: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Draw --num samples by sample.py's draw_set, on all processes, into an .npz that is kept;
    its path and what the protocol says of it.

    Labels are balanced, and cycle through the classes: so each split of the Inception Score has
    all of them. An interrupted command goes on from its finished batches.
    """
    model = load_checkpoint(flags.samples, flags.device)
    count = model.config.num_classes
    classes = list(range(count)) or [-1]  # -1 = no class
    if not count and flags.guidance:
        fail("this model was trained without labels: it has no guidance, leave --guidance out", 2)
    guidance = model.config.guidance if flags.guidance is None else flags.guidance
    chosen = {"num": flags.num, "guidance": guidance if count else 0.0}
    for name in ("constant_guidance", "guidance_rule", "denoise", "seed", "batch_size"):
        chosen[name] = getattr(flags, name)
    protocol = {
        **chosen,
        "checkpoint": describe_checkpoint(flags.samples, model),
        "labels": f"sample i has class i mod {count}" if count else "none",
    }
    # Everywhere the slow and exact way: a number should not depend on the device it came from.
    options = argparse.Namespace(**chosen, sampler="sequential", tolerance=0.0, bf16=False)
    path = flags.npz or flags.samples.with_name(
        f"samples_{options.num}_guidance_{options.guidance:g}_seed_{options.seed}.npz"
    )
    key = {**protocol, "device": flags.device.type}
    sample.draw_set(model, classes, options, key, npz=path, grid=None)
    return path, protocol


# --------------------------------------------------------------------------------------------------
# A checkpoint and the pictures it is looked at with
#
# What all of the four subcommands below begin with. Weights are those of the EMA; pictures are of
# the validation split, which training never saw.


class Pictures(Dataset):
    """Some pictures of a split of --data, or of the data that the checkpoint is trained on.

    num: how many, drawn with the seed (class folders are sorted by class, so that the first ones
    would be of one class); None = all. self[range] is (images (n, 3, H, W) in [-1, 1], labels
    (n,), numbers (n,)), where a number is the picture's place in the dataset.
    """

    def __init__(self, model: MIMFlow, data: str | None, split: str, num: int | None, seed: int):
        self.data = model.config.data if data is None else data
        self.split = split
        self.dataset = open_dataset(self.data, model.config.image_size, split)
        self.class_names = tuple(self.dataset.class_names)
        count = len(self.dataset)
        if num is not None and num > count:
            fail(f"{num} pictures asked for, but the {split} split of {self.source} has {count}", 2)
        order = np.random.default_rng(seed).permutation(count)[: num or count]
        self.numbers = np.sort(order)  # (len(self),)

    @property
    def source(self) -> str:
        return "the built-in pictures" if self.data is None else str(self.data)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: range) -> tuple[Tensor, Tensor, Tensor]:
        numbers = self.numbers[indices.start : indices.stop]
        images, labels = zip(*(self.dataset[int(n)] for n in numbers), strict=True)
        return torch.stack(images), torch.tensor(labels), torch.from_numpy(numbers)

    def describe(self) -> dict[str, Any]:
        """What the protocol says of these pictures."""
        return {"data": self.source, "split": self.split, "pictures": len(self)}


def require_finite(values: Tensor, what: str, flags: argparse.Namespace) -> None:
    """End with one line if a number that came out of the checkpoint is not finite."""
    if not values.isfinite().all():
        fail(f"{flags.checkpoint}: {what} is not finite: the training diverged")


def describe_checkpoint(path: Path, model: MIMFlow) -> dict[str, Any]:
    """What the protocol says of a checkpoint."""
    return {**describe_file(path), "step": model.step, "weights": "EMA"}


def open_model(flags: argparse.Namespace) -> tuple[MIMFlow, dict[str, Any]]:
    """The model of the checkpoint that the command line names, and its protocol."""
    path = find_checkpoint(flags.checkpoint)
    model = load_checkpoint(path, flags.device)
    flags.checkpoint = path
    return model, {"checkpoint": describe_checkpoint(path, model), "seed": flags.seed}


# --------------------------------------------------------------------------------------------------
# reconstruction (rFID of Tab. 5, 8 and 9)
#
# What does a picture lose on its way through z? Half of its patches are hidden, as in training, so
# that these numbers are worse than those of a tokenizer that sees everything: for them,
# --mask-ratio 0 0. rFID compares two sets and forgives a reconstruction that is another, plausible
# picture; PSNR and MSE compare pixels and reward blur; LPIPS is between. rFID is FID with
# statistics of both sides, so the count matters (papers: the 50,000 of ImageNet's validation set).


def frequency_errors(error: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square of the low and of the high frequencies of x - x_hat (B, 3, H, W), (B,) each.

    Low l is what a 21 x 21 box filter leaves of the error e, high h = e - l the rest. At the border
    the box is cut off: the mean is over the pixels that exist. The two do not quite add up to the
    MSE, since a box parts frequencies softly: mean e^2 = mean l^2 + mean h^2 + 2 mean l h.
    """
    low = F.avg_pool2d(error, BOX, stride=1, padding=BOX // 2, count_include_pad=False)
    return low.square().mean(dim=(1, 2, 3)), (error - low).square().mean(dim=(1, 2, 3))


def peak_signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """PSNR = 10 log10(255^2 / MSE) (B,) in dB of uint8 (B, 3, H, W); equal pictures have inf.

    Its mean over pictures, which is printed, is not the PSNR of the mean MSE, but more.
    """
    mse = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def hide_patches(images: Tensor, mask: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] with the hidden patches (True) of mask (B, N) in grey."""
    grid = math.isqrt(mask.shape[1])
    hidden = mask.view(-1, 1, grid, grid).float()
    return images * (1 - F.interpolate(hidden, size=images.shape[2:], mode="nearest"))


class Judges(NamedTuple):
    """The frozen networks of rFID and LPIPS, None where there are no weights."""

    inception: FIDInception | None
    perceptual: losses.Perceptual | None
    protocol: dict[str, Any]
    left_out: dict[str, str]  # number -> why it cannot be computed


def load_judges(flags: argparse.Namespace, side: int, count: int) -> Judges:
    """What needs weights from elsewhere, or larger or more pictures, is left out without them.

    side: of the pictures, pixels; count: how many there are.
    """
    inception = perceptual = None
    protocol, left_out = {}, {}
    try:
        inception, protocol = load_inception(flags.inception, flags.device)
    except losses.WeightsMissing as error:
        left_out["rfid"] = str(error)
    try:
        vgg = losses.find_weights("vgg", flags.vgg)
        perceptual = losses.Perceptual(vgg).to(flags.device)
        protocol["vgg"] = vgg if vgg == losses.RANDOM else describe_file(vgg)
    except losses.WeightsMissing as error:
        left_out["lpips"] = str(error)
    least_sides = dict(low_frequency_error=BOX, high_frequency_error=BOX)
    for name, least in {**least_sides, "lpips": losses.Perceptual.MIN_SIDE}.items():
        if side < least:
            left_out[name] = f"needs pictures of at least {least} x {least}"
    if count < LEAST["rfid"]:
        left_out.setdefault("rfid", f"needs {LEAST['rfid']} pictures, there is {count}")
    return Judges(inception, perceptual, protocol, left_out)


def compare_pictures(images: Tensor, decoded: Tensor, judges: Judges) -> dict[str, Any]:
    """Each number (B,), float64 on the CPU, of x and x_hat (B, 3, H, W) in [-1, 1], and their
    Inception features [(B, 2048), (B, 2048)].

    The MSE and its frequencies are of x_hat as it is, which is what training minimises. The others
    are of 8-bit pictures, as if both had been saved and read again.
    """
    original, rounded = to_uint8(images), to_uint8(decoded)
    found = {"mse": losses.pixel_loss(images, decoded)}
    found["psnr"] = peak_signal_to_noise(original, rounded)
    if "low_frequency_error" not in judges.left_out:
        low, high = frequency_errors(images - decoded)
        found |= {"low_frequency_error": low, "high_frequency_error": high}
    if "lpips" not in judges.left_out:
        found["lpips"] = judges.perceptual(original / 127.5 - 1, rounded / 127.5 - 1)
    result: dict[str, Any] = {name: value.cpu().double() for name, value in found.items()}
    if "rfid" not in judges.left_out:
        pair = (original, rounded)
        result["inception"] = [inception_features(judges.inception, x)[0] for x in pair]
    return result


def reconstruction_numbers(parts: list[dict[str, Any]], source: Path) -> dict[str, Any]:
    """Means over all pictures, and rFID, of the batches that compare_pictures found; else None."""
    names = ("rfid", "psnr", "lpips", "mse", "low_frequency_error", "high_frequency_error")
    numbers: dict[str, Any] = dict.fromkeys(names)
    for name in numbers.keys() & parts[0].keys():
        numbers[name] = float(torch.cat([part[name] for part in parts]).mean())
    if "inception" in parts[0]:
        sides = zip(*(part["inception"] for part in parts), strict=True)  # originals, x_hat
        originals, rebuilt = (moments(stack(side, source)) for side in sides)
        numbers["rfid"] = frechet_distance(*originals, *rebuilt)
    return numbers


def reconstruction(flags: argparse.Namespace) -> dict[str, Any] | None:
    """rFID, PSNR, LPIPS, MSE and its low and high frequencies, decoded from masked pictures."""
    model, protocol = open_model(flags)
    pictures = Pictures(model, flags.data, "val", flags.num, flags.seed)
    ratio = tuple(model.config.mask_ratio if flags.mask_ratio is None else flags.mask_ratio)
    config = replace(model.config, mask_ratio=ratio)
    judges = load_judges(flags, model.config.image_size, len(pictures))
    protocol |= {**pictures.describe(), "mask_ratio": ratio, "sigma": model.config.sigma}
    protocol["mse"] = "of [-1, 1], unrounded; PSNR, LPIPS, rFID after rounding to 8 bits"
    protocol |= {**judges.protocol, "left_out": judges.left_out}
    evenly = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)
    shown = torch.from_numpy(pictures.numbers[evenly])  # of the grid

    @torch.no_grad()
    def work(batch: tuple[Tensor, ...]) -> dict[str, Any]:
        """Numbers (B,), Inception features, and the pictures of the grid, of one batch."""
        images, numbers = batch[0].to(flags.device), batch[2]
        draws = draws_of_pictures(config, numbers.tolist(), flags.seed, flags.device)
        _, z = model.latents(images, draws)  # (B, K, d)
        decoded = model.decoder(z)
        rows = torch.isin(numbers, shown).nonzero().flatten().tolist()
        rows_shown = [x[rows].cpu() for x in (images, hide_patches(images, draws.mask), decoded)]
        return {**compare_pictures(images, decoded, judges), "shown": torch.stack(rows_shown)}

    parts = sharded(pictures, work, "reconstruction", flags)
    stop_processes()
    if parts is None:
        return None
    grid = torch.cat([part["shown"] for part in parts], dim=1)  # (3, n, 3, H, W)
    out = flags.out or flags.checkpoint.with_name("reconstruction.png")
    save_png(grid.flatten(0, 1).clamp(-1, 1), len(shown), out)
    say(f"{out}: originals, what the encoder sees, reconstructions")
    return {**reconstruction_numbers(parts, flags.checkpoint), "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# probe (Acc. of Tab. 5, Fig. 6)
#
# How much of the class can one linear layer read off? The networks stay frozen. Two traps:
#
# - The flow is given no label. With it, the probe would read off what it was told.
# - A drop towards the last blocks is no loss of information: the flow is invertible, so all of its
#   blocks know the same. But the last ones turn tokens into noise that is independent from token
#   to token, and a mean over tokens, the paper's pooling, cancels it. --pool flat shows what is
#   still there.
#
# paper: "REPA's protocol"; here: that of the authors' release, which trains on the K outputs of the
# encoder before they are projected to d numbers. Tab. 5's Acc. is encoder_features.


@torch.no_grad()
def representations(model: MIMFlow, images: Tensor, pool: str) -> dict[str, Tensor]:
    """What is probed of full images (B, 3, H, W) in [-1, 1]: encoder features, latent, output of
    each flow block, each (B, dimension).

    Pooled over the K tokens by their mean (C or d numbers), or with "flat" side by side (K times as
    many). No mask, no noise; the flow is given no label.
    """
    features = model.encoder.features(images)  # (B, K, C)
    latent = model.encoder.projection(features)  # (B, K, d)
    blocks, _ = model.flow.intermediates(latent, labels=None)
    found = {"encoder_features": features, "latent": latent}
    found |= {f"flow_block_{i}": x for i, x in enumerate(blocks, start=1)}
    return {k: x.mean(dim=1) if pool == "mean" else x.flatten(1) for k, x in found.items()}


class LinearProbe(nn.Module):
    """(B, D) -> (B, classes): standardise, BatchNorm without learnt scale (MAE's probe), linear.

    One learning rate has to suit features of any scale. The standardisation, by the training set
    x (n, D), also gives BatchNorm's running averages nothing to catch up on: a short probe ends
    before an average that begins at 0 has reached a mean of 50.
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


def fit_probes(
    probes: nn.ModuleDict, x: dict[str, Tensor], labels: Tensor, epochs: int, draw: torch.Generator
) -> None:
    """SGD with a cosine schedule over all steps, on x[name] (n, D) and labels (n,).

    All probes see the same batches. They share no weight, so that the gradient of the sum of their
    losses is that of each alone.
    """
    count = len(labels)
    size = min(PROBE_BATCH, count)
    batches = count // size  # the last, smaller batch is left out
    optimizer = torch.optim.SGD(
        probes.parameters(), PROBE_LR, momentum=PROBE_MOMENTUM, weight_decay=PROBE_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in progress(range(epochs), "probe"):
        for rows in torch.randperm(count, generator=draw).split(size)[:batches]:
            targets = labels[rows.to(labels.device)]
            loss = sum(F.cross_entropy(p(x[name][rows]), targets) for name, p in probes.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def top1_percent(trained: LinearProbe, x: Tensor, labels: Tensor) -> float:
    """Share in percent of rows of x (n, D) whose largest score is that of their label (n,)."""
    trained.eval()  # BatchNorm by its running averages: a row is judged alone
    guesses = torch.cat([trained(rows).argmax(dim=1) for rows in x.split(BLOCK)])  # (n,)
    return 100 * float((guesses == labels).double().mean())


def train_probes(
    train_set: dict[str, Tensor],
    train_labels: Tensor,
    val_set: dict[str, Tensor],
    val_labels: Tensor,
    epochs: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Top-1 accuracy in percent of a linear classifier on each representation.

    Sets are name -> (n, D) on the CPU, labels (n,); batches move to the device. The last step is
    the one that is judged: choosing the best by val_set would be learning from it.
    """
    classes = int(torch.cat((train_labels, val_labels)).max()) + 1
    draw = torch.Generator().manual_seed(seed)
    probes = nn.ModuleDict({name: LinearProbe(x, classes, draw) for name, x in train_set.items()})
    fit_probes(probes.to(device), train_set, train_labels.to(device), epochs, draw)
    val_labels = val_labels.to(device)
    return {name: top1_percent(p, val_set[name], val_labels) for name, p in probes.items()}


def open_probe_sets(model: MIMFlow, flags: argparse.Namespace) -> dict[str, Pictures]:
    """Pictures to learn from and pictures to be judged on; ends with a line if there are none."""
    sets = {
        split: Pictures(model, flags.data, split, num, flags.seed)
        for split, num in (("train", flags.num_train), ("val", flags.num))
    }
    source = sets["train"].source
    if len(sets["train"].class_names) < 2:
        fail(f"{source} have no classes to tell apart: the probe needs CLASS folders")
    roots = {getattr(pictures.dataset, "root", pictures.split) for pictures in sets.values()}
    if len(roots) == 1:
        fail(f"{source} has no val/ beside train/: a probe is judged on pictures it has not seen")
    if len(sets["train"]) < 2:
        fail("--num-train must be at least 2", 2)
    return sets


def probe(flags: argparse.Namespace) -> dict[str, Any] | None:
    """Linear probe on encoder features, latent and every block of the flow."""
    model, protocol = open_model(flags)
    sets = open_probe_sets(model, flags)

    # Frozen networks: each picture is encoded once, and the probes learn from what was stored.
    def work(batch: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Tensor]:
        found = representations(model, batch[0].to(flags.device), flags.pool)
        return {name: x.float().cpu() for name, x in found.items()}, batch[1]

    parts = [sharded(pictures, work, f"{k} features", flags) for k, pictures in sets.items()]
    stop_processes()
    if rank() != 0:
        return None
    data = []  # train_set, train_labels, val_set, val_labels
    for part in parts:
        found, labels = zip(*part, strict=True)
        data += [{name: torch.cat([x[name] for x in found]) for name in found[0]}]
        data += [torch.cat(labels)]
    for name, x in data[0].items():
        require_finite(x, name, flags)
    accuracy = train_probes(*data, flags.epochs, flags.seed, flags.device)
    protocol |= {"data": sets["train"].source, "pool": flags.pool, "epochs": flags.epochs}
    protocol |= {f"{split}_pictures": len(pictures) for split, pictures in sets.items()}
    protocol |= {"batch": min(PROBE_BATCH, len(sets["train"])), "lr": PROBE_LR}
    protocol |= {"momentum": PROBE_MOMENTUM, "weight_decay": PROBE_DECAY, "schedule": "cosine"}
    protocol["input"] = "full image, no mask, no noise; the flow unconditional"
    return {"top1_percent": accuracy, "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# likelihood (Eq. 4)
#
#     log p_F(z) = log N(F(z); 0, I) + log |det dF/dz|            nats an image
#     bits       = -log_2 p_F(z) / (K d)                          a latent number
#
# Exact, as a flow alone can be: not a bound. But of the latent z, not of the picture: these are not
# the bits per pixel (bits/dim) of pixel models, and two models compare only if their latents do:
# 2 z costs one bit a number more than z, and says the same. Densities can exceed 1, so bits can be
# negative; the noise of Eq. 1 is what keeps them up, since on average they cannot fall below its
# own entropy, 0.5 log_2(2 pi e sigma^2) = 0.31 at sigma = 0.3. What they fall by when the class is
# given is what the class tells the flow.


def summary(nats: Tensor, size: int) -> dict[str, float]:
    """Mean and standard deviation over images of log p (n,), in nats, and of its code length.

    The deviation is that between images (over n), not the error of the mean.
    """
    bits = -nats / (size * math.log(2))
    return {
        "nats_an_image": float(nats.mean()),
        "nats_an_image_std": float(nats.std(correction=0)),
        "bits_a_latent_number": float(bits.mean()),
        "bits_a_latent_number_std": float(bits.std(correction=0)),
    }


def likelihood(flags: argparse.Namespace) -> dict[str, Any] | None:
    """log p_F(z), exact, at the latents of validation pictures: with their class and without."""
    model, protocol = open_model(flags)
    pictures = Pictures(model, flags.data, "val", flags.num, flags.seed)
    ratio = (0.0, 0.0) if flags.no_mask else tuple(model.config.mask_ratio)
    config = replace(model.config, mask_ratio=ratio)
    size = model.config.num_latents * model.config.latent_dim
    left_out = {}
    if model.config.num_classes == 0:
        left_out["conditional"] = "the model was trained without labels"
    elif pictures.class_names != model.class_names:  # a label would be the number of another class
        left_out["conditional"] = f"{pictures.source} have other classes than the training data"
    kinds = [kind for kind in ("conditional", "unconditional") if kind not in left_out]

    @torch.no_grad()
    def work(batch: tuple[Tensor, ...]) -> Tensor:
        """log p (kinds, B)."""
        images, labels = (x.to(flags.device) for x in batch[:2])
        draws = draws_of_pictures(config, batch[2].tolist(), flags.seed, flags.device)
        _, z = model.latents(images, draws)  # (B, K, d)
        given = {"conditional": labels, "unconditional": None}
        return torch.stack([model.flow.log_prob(z, given[kind]).cpu().double() for kind in kinds])

    parts = sharded(pictures, work, "likelihood", flags)
    stop_processes()
    if parts is None:
        return None
    numbers: dict[str, Any] = dict.fromkeys(("conditional", "unconditional"))
    for kind, nats in zip(kinds, torch.cat(parts, dim=1), strict=True):
        require_finite(nats, f"{kind} log p(z)", flags)
        numbers[kind] = summary(nats, size)
    protocol |= {**pictures.describe(), "mask_ratio": ratio, "sigma": model.config.sigma}
    return {**numbers, "protocol": {**protocol, "latent_numbers": size, "left_out": left_out}}


# --------------------------------------------------------------------------------------------------
# map (Fig. 4)
#
# Do pictures of one class lie together in the latent space? A picture to look at, not a number to
# compare. The paper's projection is UMAP, which pulls clusters apart and whose distances between
# them mean nothing; the default here is PCA, the plane of largest variance, which needs no package
# and shows what is really there, but only its two strongest directions: see variance_share. With 8
# classes of 1000, neighbours look better parted than they are.


def principal_plane(x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """PCA: x (n, D), centred -> coordinates (n, 2) and the share of the variance along each."""
    start = np.random.default_rng(0).standard_normal(min(x.shape))  # fixed, so that runs agree
    u, sizes, directions = svds(x, k=2, v0=start)  # D may be 8192: never the whole SVD
    order = sizes.argsort()[::-1]
    # The sign of a principal direction means nothing: its largest entry shall be positive.
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(2), largest])
    points = (u * sizes * signs)[:, order]
    return points, (sizes[order] ** 2 / np.square(x).sum()).tolist()


def draw_map(points: np.ndarray, labels: np.ndarray, names: list[str], path: Path) -> bool:
    """Fig. 4: points (n, 2) coloured by their labels (n,), a PNG; False without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20" if len(names) > 10 else "tab10"].colors
    for i, label in enumerate(np.unique(labels)):
        rows = labels == label
        colour = [colours[i % len(colours)]]
        axes.scatter(*points[rows].T, s=6, c=colour, linewidths=0, label=names[i])
    axes.set(xticks=[], yticks=[])  # neither projection has units
    axes.legend(markerscale=3, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    write_file(path, lambda stream: figure.savefig(stream, format="png", dpi=120))
    return True


def pictures_of(classes: list[int], model: MIMFlow, flags: argparse.Namespace) -> Pictures:
    """At most --num validation pictures of these classes; [-1] is those of a model without."""
    pictures = Pictures(model, flags.data, "val", None, flags.seed)
    if classes != [-1]:
        if pictures.class_names != model.class_names:
            fail(f"{pictures.source} have other classes than {flags.checkpoint} was trained on")
        pictures.numbers = np.flatnonzero(np.isin(pictures.dataset.labels, classes))
    order = np.random.default_rng(flags.seed).permutation(len(pictures))[: flags.num]
    pictures.numbers = np.sort(pictures.numbers[order])
    if len(pictures) < 4:
        fail(f"a map needs 4 pictures, {pictures.source} have {len(pictures)} of these classes")
    return pictures


def load_umap() -> Any:
    """The class umap.UMAP of an optional package; without it, a line that says what to do."""
    try:
        from umap import UMAP
    except ImportError:
        fail("--method umap needs `pip install umap-learn`; --method pca is built in", 2)
    return UMAP


def project(latents: np.ndarray, umap: Any, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """latents (n, K * d) -> points (n, 2) by umap.UMAP, or if None by PCA, and its variance_share.

    Each latent number is standardised first, or the few that vary most would be the whole map.
    """
    latents = (latents - latents.mean(axis=0)) / latents.std(axis=0).clip(min=1e-6)
    if umap is not None:
        say("umap: a minute or so")
        return umap(random_state=seed).fit_transform(latents), {}
    points, (first, second) = principal_plane(latents)
    return points, {"variance_share": {"first_axis": first, "second_axis": second}}


def latent_map(flags: argparse.Namespace) -> dict[str, Any] | None:
    """The latents of validation pictures in two dimensions, coloured by class."""
    umap = load_umap() if flags.method == "umap" else None
    model, protocol = open_model(flags)
    classes = sample.choose_classes(flags.classes, model)
    pictures = pictures_of(classes, model, flags)

    @torch.no_grad()
    def work(batch: tuple[Tensor, ...]) -> Tensor:
        return model.encoder(batch[0].to(flags.device)).flatten(1).cpu()  # (B, K * d)

    parts = sharded(pictures, work, "latents", flags)
    stop_processes()
    if parts is None:
        return None
    latents = torch.cat(parts).double()
    require_finite(latents, "the latent", flags)
    points, numbers = project(latents.numpy(), umap, flags.seed)
    labels = pictures.dataset.labels[pictures.numbers]
    labels = labels if classes != [-1] else np.full(len(points), -1)
    names = [model.class_names[i] if i >= 0 else "no class" for i in np.unique(labels)]
    out = flags.out or flags.checkpoint.with_name("map.png")
    if draw_map(points, labels, names, out):
        say(f"{out}: {len(points)} pictures, {len(names)} classes")
    else:
        flags.json = flags.json or out.with_suffix(".json")
        say(f"no {out}: `pip install matplotlib` and run again; the points are in {flags.json}")
    protocol |= {**pictures.describe(), "method": flags.method, "classes": names}
    protocol["input"] = "mu of the full image, all K * d numbers, each standardised"
    points = {"picture": pictures.numbers.tolist(), "label": labels.tolist(), "xy": points.tolist()}
    return {**numbers, "points": points, "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# cost (Tab. 2, 4 and 10)
#
# What does a model cost to train and to sample from? A preset will do: speed does not depend on the
# weights, but for jacobi's number of sweeps, so a checkpoint may be given. Counts are exact and the
# same everywhere; times are of this machine, and compare with the paper's (8 A100s for Tab. 4, an
# H20 for Tab. 10) only as ratios. Three traps:
#
# - Tab. 2 says "FLOPs" and counts multiply-adds, as is usual; strictly they are two operations
#   each. Its 71.25 G are encoder and decoder for one image; norms, softmax and sums do not count.
# - On a GPU, token-by-token sampling waits for memory, not for arithmetic: a batch takes little
#   longer than one image, so "s an image" means nothing without its batch. Hence a row each.
# - A GPU answers before it has finished, hence the synchronisation; the first calls choose kernels
#   and fill caches, hence the warming up; a shared machine has outliers, hence the median.


def preset_config(preset: str) -> Config:
    """A preset with its number of classes known."""
    config = Config(**{"preset": preset, **PRESETS[preset]})
    if config.num_classes is None:
        config = resolve(config, open_dataset(None, config.image_size))
    return config


def count_multiply_adds(work: Callable[[], Any]) -> int:
    """Of a call: matrix products, attention and convolutions, in the backward pass as well."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2  # torch counts a multiply-add as two


def count_parts(config: Config) -> dict[str, dict[str, float]]:
    """Parameters, and multiply-adds for one image, of each part; on the meta device, where
    nothing is allocated or computed.

    The flow is counted from image to noise; inverted, with its cache, it takes about as many.
    """
    with torch.device("meta"):
        model = MIMFlow(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
        z = torch.empty(1, config.num_latents, config.latent_dim)
        labels = torch.zeros(1, dtype=torch.int64)
    calls = {
        "encoder": functools.partial(model.encoder, images),
        "decoder": functools.partial(model.decoder, z),
        "flow": functools.partial(model.flow, z, labels),
    }
    parts = {}
    for name, call in calls.items():
        parts[name] = {"parameters": count_parameters(call.func)}
        parts[name]["multiply_adds"] = count_multiply_adds(call)
    both = {key: parts["encoder"][key] + parts["decoder"][key] for key in parts["flow"]}
    return {**parts, "encoder_and_decoder": both}


def measure(work: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median seconds of a call over up to `runs` calls, after warming up."""

    def seconds() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        if seconds() > LONG_ENOUGH:
            break  # whatever takes so long is warm
    taken = [seconds()]
    while len(taken) < runs and sum(taken) < LONG_ENOUGH:
        taken.append(seconds())
    return statistics.median(taken)


def training_step(
    config: Config, batch_size: int, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """One step of phase 1 (Eq. 6 and 7) as train.py does it, on random pictures: forward,
    backward, clipping, optimizer. LPIPS and teachers have random weights, which take as long."""
    random = dict.fromkeys(("vgg", "convnext", "dino", "clip"), losses.RANDOM)
    config = replace(config, batch_size=batch_size, compile=compiled, **random)
    training = JointTraining(MIMFlow(config), load_frozen_networks(config, device)).to(device)
    optimizer = make_optimizer(training, config)
    shape = (batch_size, 3, config.image_size, config.image_size)
    images = torch.rand(shape, device=device) * 2 - 1  # [-1, 1]
    labels = torch.arange(batch_size, device=device) % config.num_classes
    draws = draw_randomness(config, config.mask_warmup, device)  # past the warm-up of the mask
    forward = distribute(training, config, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device)):
            loss, *_ = forward(images, labels, draws, config.nll_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matmul_peak(device: torch.device, runs: int) -> float:
    """Multiply-adds a second of a large matrix product in the type that training uses.

    Measured, not the data sheet's: what this machine, with this power limit, really reaches.
    """
    side = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if uses_bf16(device) else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    return side**3 / measure(lambda: a @ a, device, 10 * runs)


def time_training(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """Tab. 4: milliseconds of a step, its share of the peak of matrix products, memory (10^9
    bytes).

    The share says how far from the machine's limit the program is, on any machine: what is
    missing went into everything that is not a matrix product, and into waiting for memory.
    """
    device = flags.device
    peak = matmul_peak(device, flags.runs)
    step = training_step(config, flags.batch_size, device, compiled=False)
    work = count_multiply_adds(step)
    result: dict[str, Any] = {"batch_size": flags.batch_size, "multiply_adds_a_step": work}
    result["matmul_peak_tera_multiply_adds_a_second"] = peak / 1e12
    for kind in ("eager", "compiled") if flags.compile else ("eager",):
        if kind == "compiled":
            step = training_step(config, flags.batch_size, device, compiled=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = measure(step, device, flags.runs)
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
        result[kind] = {
            "ms_a_step": 1000 * seconds,
            "share_of_matmul_peak": work / seconds / peak,
            "peak_memory_gb": memory,
        }
    return result


def memory_bandwidth(device: torch.device, runs: int) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    a = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device)  # beyond any cache
    b = torch.empty_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a), device, 10 * runs)


def drawing(guidance: float, sampler: str) -> argparse.Namespace:
    """The flags of sample.py that `sample.draw` reads, as they are by default."""
    return argparse.Namespace(
        **vars(sample.parse_arguments([])) | {"guidance": guidance, "sampler": sampler}
    )


class Passes:
    """Counts the calls of each block while a batch is drawn, and what each must read from memory:
    the block's weights, and the keys and values of the tokens so far; and the decoder's weights,
    once. A `watch` of flow.inverse.
    """

    def __init__(self, model: MIMFlow, batch: int, options: argparse.Namespace):
        self.flow, self.batch, self.options = model.flow, batch, options
        self.size = 2 if sample.in_bfloat16(options, model.decoder.coordinates.device) else 4
        self.count, self.solved = 0, Counter()  # tokens solved of each block
        self.bytes = self.size * count_parameters(model.decoder)

    def __call__(self, number: int, solved: int) -> None:
        block, K = self.flow.blocks[number], self.flow.num_latents
        deep = number == len(self.flow.blocks) - 1
        window = DEEP_WINDOW if deep else K
        reach = 1 if self.options.sampler == "sequential" else window  # tokens in one pass
        tokens = min(self.solved[number] + reach, K - 1)
        rows = self.batch * (2 if deep and self.options.guidance else 1)
        cache = rows * tokens * 2 * len(block.layers) * block.position.shape[1]
        self.bytes += self.size * (count_parameters(block) + cache)
        self.count += 1
        self.solved[number] += solved


def ways_to_sample(model: MIMFlow, flags: argparse.Namespace) -> Iterable[tuple[str, str]]:
    """Names and samplers; the model is made ready before each, in an order in which nothing has to
    be undone."""
    yield "sequential", "sequential"
    yield "jacobi", "jacobi"
    faster = []
    if flags.compile:
        sample.compile_layers(model)
        faster.append("--compile")
        yield " ".join(faster), "sequential"
    if flags.device.type == "cuda":
        model.flow.inverse = sample.RecordedInverse(model.flow.inverse)
        yield " ".join([*faster, "--cuda-graph"]), "sequential"


def time_sampling(model: MIMFlow, flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds from noise to uint8 pictures, by batch, guidance and sampler, beside a floor.

    The floor is what the batch would take if this machine only did its matrix products at the peak,
    or only read weights, keys and values at the speed of a copy, whichever is longer. Left out are
    norms, softmax, activations, writing the cache, starting kernels, and the way back to the CPU.
    """
    c, device = model.config, flags.device
    peak, bandwidth = matmul_peak(device, flags.runs), memory_bandwidth(device, flags.runs)
    classes = shown_classes(c.num_classes)
    guidances = (0.0, c.guidance) if c.num_classes and c.guidance else (0.0,)
    rows, counted = {}, {}
    for way, sampler in ways_to_sample(model, flags):
        cases = [(w, batch) for w in guidances for batch in flags.batches]
        for guidance, batch in progress(cases, way):
            options, case = drawing(guidance, sampler), (sampler, guidance, batch)
            draw = functools.partial(sample.draw, model, range(batch), classes, options)
            if case not in counted:  # the same work, however it is launched
                watch = Passes(model, batch, options)
                work = count_multiply_adds(functools.partial(draw, watch))
                counted[case] = work, watch
            work, watch = counted[case]
            seconds = measure(draw, device, flags.runs)
            rows[f"{way}, guidance {guidance:g}, batch {batch}"] = {
                "s_an_image": seconds / batch,
                "floor": max(work / peak, watch.bytes / bandwidth) / batch,
                "images_a_s": batch / seconds,
                "of_peak": work / seconds / peak,
                "passes": watch.count,
            }
    return rows


def time_tokens(config: Config, flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tab. 10: the flow alone in training, and sampling, for several numbers of tokens K.

    Training takes all tokens at once, so its time grows with K; sampling takes one after the other,
    each looking back at all before it: K steps that grow with K.
    """
    device, size, rows = flags.device, flags.batch_size, {}
    options, classes = drawing(0.0, "sequential"), shown_classes(config.num_classes)
    for count in progress(flags.tokens, "tokens"):
        config = replace(config, num_latents=count)
        model = MIMFlow(config).to(device).eval()
        noise = sample_noise(0, range(size), count, config.latent_dim).to(device)  # (B, K, d)
        labels = torch.arange(size, device=device) % max(config.num_classes, 1)

        def train_flow(model=model, noise=noise, labels=labels) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device)):
                u, logdet = model.flow(noise, labels)
                square, other = losses.flow_nll(u, logdet)
            (square + other).mean().backward()

        def draw(batch: int, model=model) -> Callable[[], Any]:
            return functools.partial(sample.draw, model, range(batch), classes, options)

        rows[str(count)] = {
            "flow_training_ms_a_step": 1000 * measure(train_flow, device, flags.runs),
            "sampling_s_an_image_alone": measure(draw(1), device, flags.runs),
            "sampling_s_an_image_in_batches": measure(draw(size), device, flags.runs) / size,
        }
    return rows


def model_to_time(flags: argparse.Namespace) -> MIMFlow:
    """The checkpoint's model, or one of the preset with weights that are not the identity."""
    if flags.checkpoint is not None:
        return load_checkpoint(flags.checkpoint, flags.device)
    config = preset_config(flags.preset or "shapes")
    model = MIMFlow(config).to(flags.device).eval()
    for block in model.flow.blocks:
        nn.init.normal_(block.proj_out.weight, std=RANDOM_STD / math.sqrt(config.flow_width))
    return model


def cost(flags: argparse.Namespace) -> dict[str, Any]:
    """Parameters and multiply-adds by part, milliseconds a training step, seconds an image."""
    model = model_to_time(flags)
    config = model.config
    numbers: dict[str, Any] = {"parts": count_parts(config)}
    weights = f"random, predictions of std about {RANDOM_STD}: jacobi's sweeps are theirs"
    protocol = {"preset": config.preset, "image_size": config.image_size, "weights": weights}
    if flags.checkpoint is not None:
        protocol["weights"] = describe_checkpoint(Path(flags.checkpoint), model)
    protocol["multiply_adds"] = "for one image, matrix products, attention and convolutions"
    if not flags.no_timing:
        numbers["training"] = time_training(config, flags)
        numbers["sampling"] = time_sampling(model, flags)
        numbers["tokens"] = time_tokens(config, flags)
        dtype = "bfloat16 autocast" if uses_bf16(flags.device) else "float32"
        protocol |= {
            "training": dtype,
            "sampling": f"{dtype}; jacobi float32",
            "tokens": "guidance 0",
        }
        protocol["floor"] = "s an image: matrix products at the peak, or memory at a copy's speed"
        protocol["of_peak"] = f"multiply-adds a second over those of a large product in {dtype}"
        protocol["passes"] = "calls of the blocks for one batch, K - 1 of each token by token"
        protocol |= {"threads": torch.get_num_threads(), "timing": "median, after warming up"}
        if flags.device.type != "cuda":
            protocol["left_out"] = {"peak_memory_gb": "counted on CUDA only"}
    stop_processes()
    return {**numbers, "protocol": protocol}


# --------------------------------------------------------------------------------------------------
# Report


def environment(flags: argparse.Namespace) -> dict[str, Any]:
    """The part of every protocol that is about this program and this machine."""
    device = flags.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "command": flags.command_line,
        "device": f"{device} {name}".strip(),
        "processes": world_size(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def cell(value: float | None) -> str:
    """- for what is left out, 1,234 for counts, five digits for the rest."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def shared_names(value: Any) -> tuple[str, ...] | None:
    """The column names of a dictionary of rows, two or more; None for anything else."""
    rows = list(value.values()) if isinstance(value, dict) else []
    if len(rows) < 2 or not all(isinstance(row, dict) for row in rows):
        return None
    return tuple(rows[0]) if len({tuple(row) for row in rows}) == 1 else None


def table(numbers: dict[str, Any], indent: str = "  ") -> list[str]:
    """Lines of a small table; a dictionary inside becomes an indented one, dictionaries with the
    same names become its rows."""
    lines = []
    for name, value in numbers.items():
        if columns := shared_names(value):
            widths = {key: max(len(key), 11) for key in columns}
            head = "".join(f"  {key:>{width}}" for key, width in widths.items())
            first = max(map(len, value))
            lines += [f"{indent}{name}", f"{indent}  {'':{first}}{head}"]
            for row, cells in value.items():
                text = "".join(f"  {cell(cells[key]):>{width}}" for key, width in widths.items())
                lines.append(f"{indent}  {row:{first}}{text}")
        elif isinstance(value, dict):
            lines += [f"{indent}{name}", *table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:{42 - len(indent)}} {cell(value):>16}")
    return lines


def report(numbers: dict[str, Any], flags: argparse.Namespace) -> None:
    """Print numbers and protocol, and what was left out; write both to --json."""
    protocol = numbers["protocol"] = {**environment(flags), **numbers["protocol"]}
    left_out = protocol.get("left_out", {})
    shown = {k: v for k, v in numbers.items() if k not in ("protocol", "points")}
    lines = [flags.command, *table(shown)]
    lines += [f"  no {name}: {reason}" for name, reason in left_out.items()]
    if protocol.get("inception") == losses.RANDOM:
        lines.append("  RANDOM Inception weights: what comes from them means nothing")
    lines.append("protocol")
    for name, value in protocol.items():
        if name != "left_out":
            lines.append(f"  {name:18} {value if isinstance(value, str) else json.dumps(value)}")
    say("\n".join(lines))
    if flags.json is not None:
        text = json.dumps(numbers, indent=1)
        write_file(flags.json, lambda stream: stream.write(text.encode()))
        say(f"numbers and protocol: {flags.json}")


# --------------------------------------------------------------------------------------------------
# Command line: the flags of each subcommand, the shared ones first


def add_common(parser: Parser, batch_size: int) -> None:
    """Flags of every subcommand."""
    add = parser.add_argument_group("the run").add_argument
    text = f"pictures at a time on one process (default: {batch_size})"
    add("--batch-size", type=int, default=batch_size, metavar="N", help=text)
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")
    add("--json", type=Path, metavar="FILE", help="write the numbers and their protocol")


def add_data(parser: Parser, num: int | None = None) -> None:
    """Flags of the subcommands that look at pictures with a checkpoint."""
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CKPT", help="model.pt (default: the newest of runs/)")
    add("--data", metavar="DIR", help="pictures with val/ (default: those of the training)")
    text = f"validation pictures (default: {num or 'all'})"
    add("--num", type=int, default=num, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of choice, masks and noise (default: 0)")
    add_workers(parser)


def add_workers(parser: Parser) -> None:
    text = "processes that read pictures (default: 8 with cuda, else 0)"
    parser.add_argument("--num-workers", type=int, metavar="N", help=text)


def add_inception(parser: Parser) -> None:
    text = "weights of the FID's Inception (default: torch.hub's cache, then download)"
    parser.add_argument("--inception", metavar="FILE", help=text)


def add_generation(parser: Parser) -> None:
    add = parser.add_argument
    add("samples", type=Path, help=".npz, folder, or a checkpoint (.pt) to sample from")
    add("reference", type=Path, help=".npz (ADM's VIRTUAL_... or with arr_0 alone), or folder")
    add_inception(parser)
    add("--crop", type=int, metavar="SIDE", help="crop the pictures of folders as in training")
    add_workers(parser)
    add = parser.add_argument_group("sampling, if SAMPLES is a checkpoint").add_argument
    add("--num", type=int, default=50_000, metavar="N", help="samples (default: 50000)")
    add("--guidance", type=float, metavar="W", help="0 = none (default: the preset's)")
    add("--constant-guidance", action="store_true", help="the same for every token")
    rules = ("tarflow", "starflow")
    add("--guidance-rule", choices=rules, default="tarflow", help="how it acts (default: tarflow)")
    add("--denoise", action="store_true", help="TARFlow's score denoising of the latents")
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    add("--npz", type=Path, metavar="FILE", help="where to keep them (default: beside CKPT)")


def add_reconstruction(parser: Parser) -> None:
    add_data(parser)
    add = parser.add_argument
    text = "hidden share, drawn between; 0 0 = none (default: that of the training)"
    add("--mask-ratio", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    add_inception(parser)
    add("--vgg", metavar="FILE", help="VGG16 weights for LPIPS (default: as for --inception)")
    add("--out", type=Path, metavar="PNG", help="picture (default: reconstruction.png by CKPT)")


def add_probe(parser: Parser) -> None:
    add_data(parser)
    add = parser.add_argument
    add("--num-train", type=int, metavar="N", help="training pictures (default: all)")
    text = f"passes over the training pictures (default: {PROBE_EPOCHS})"
    add("--epochs", type=int, default=PROBE_EPOCHS, metavar="N", help=text)
    text = "tokens: their mean, or side by side (flat; K times the memory) (default: mean)"
    add("--pool", choices=("mean", "flat"), default="mean", help=text)


def add_likelihood(parser: Parser) -> None:
    add_data(parser)
    text = "show the encoder whole pictures (default: hidden as in training)"
    parser.add_argument("--no-mask", action="store_true", help=text)


def add_map(parser: Parser) -> None:
    add_data(parser, num=2000)
    add = parser.add_argument
    text = "indices or names (default: all, or 8 of many)"
    add("--classes", nargs="+", metavar="C", help=text)
    add("--method", choices=("pca", "umap"), default="pca", help="projection (default: pca)")
    add("--out", type=Path, metavar="PNG", help="picture (default: map.png beside CKPT)")


def add_cost(parser: Parser) -> None:
    add = parser.add_argument
    text = "model.pt: its sizes instead of a preset's, and its weights for jacobi's sweeps"
    add("checkpoint", nargs="?", metavar="CKPT", help=text)
    add("--preset", choices=PRESETS, help="default: shapes, if there is no CKPT")
    add("--no-timing", action="store_true", help="count only")
    text = f"numbers of tokens to sample with (default: {' '.join(map(str, TOKENS))})"
    add("--tokens", type=int, nargs="+", default=TOKENS, metavar="K", help=text)
    text = f"pictures drawn at a time (default: {' '.join(map(str, BATCHES))})"
    add("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help=text)
    add("--runs", type=int, default=5, metavar="N", help="timed calls at most (default: 5)")
    add("--compile", action="store_true", help="also time training and sampling compiled")


# name -> what it does, its flags, the default of --batch-size, and its line of --help
COMMANDS = {
    "generation": (generation, add_generation, 64, "FID, sFID, IS, precision, recall (Tab. 3)"),
    "reconstruction": (reconstruction, add_reconstruction, 64, "rFID, PSNR, LPIPS, MSE (Tab. 5)"),
    "probe": (probe, add_probe, 256, "linear probe of encoder, latent, flow blocks (Fig. 6)"),
    "likelihood": (likelihood, add_likelihood, 64, "exact log-likelihood of the latents (Eq. 4)"),
    "map": (latent_map, add_map, 256, "latents in two dimensions, by class (Fig. 4)"),
    "cost": (cost, add_cost, 32, "parameters, multiply-adds, speed (Tab. 2, 4, 10)"),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of evaluate.py; without `arguments` those of the command line.

    What is wrong ends the program with one line and exit code 2, before anything is loaded.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(description="The numbers of the paper, each with its protocol (Sec. 4).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, add_flags, batch_size, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_flags(command)
        add_common(command, batch_size)
    flags = parser.parse_args(arguments)
    flags.command_line = shlex.join(["evaluate.py", *arguments])

    # Each subcommand has some of these flags.
    given = {name: value for name, value in vars(flags).items() if value is not None}
    for name in ("num", "num_train", "batch_size", "epochs", "runs", "crop"):
        if given.get(name, 1) < 1:
            parser.error(f"{flag(name)} must be positive")
    for name in ("seed", "guidance", "num_workers"):
        if not 0 <= given.get(name, 0) < math.inf:
            parser.error(f"{flag(name)} must not be negative, and finite")
    if flags.command == "cost" and flags.checkpoint and flags.preset:
        parser.error("cost takes a checkpoint or a --preset, not both")
    if min(given.get("tokens", [2])) < 2:
        parser.error("--tokens must be at least 2")
    if min(given.get("batches", [1])) < 1:
        parser.error("--batches must be positive")
    low, high = given.get("mask_ratio", (0, 0))
    if not 0 <= low <= high <= 1:
        parser.error(f"--mask-ratio needs 0 <= LOW <= HIGH <= 1, got {low:g} {high:g}")
    for output in (given[name] for name in ("json", "out", "npz") if name in given):
        if output.is_dir() or not output.parent.is_dir():
            parser.error(f"{output} cannot be written: name a file in a folder that exists")
    return flags


def main(flags: argparse.Namespace) -> None:
    """Do one subcommand and report."""
    flags.device = select_device(flags.device)
    if getattr(flags, "num_workers", 0) is None:
        flags.num_workers = 8 if flags.device.type == "cuda" else 0
    start_processes(flags.device)
    work = COMMANDS[flags.command][0]
    numbers = work(flags)  # None on all ranks but 0
    if numbers is not None and rank() == 0:
        report(numbers, flags)


if __name__ == "__main__":
    run_program(lambda: main(parse_arguments()))
