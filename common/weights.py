"""Weights of the networks that only measure: published files, or random numbers on request.

    what a flag says --find_weights--> a file, or RANDOM --load_weights--> a network, filled

Where a flag says nothing, the file is looked for in torch.hub's cache, or downloaded to there.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from common.runs import InputError, explained, file_sha256, one_at_a_time

# In place of a file: weights drawn at random, for tests and for measuring cost. They mean nothing.
# The word has to be written out, so that no missing file can lead to it.
RANDOM = "random"
Weights = Path | Literal["random"]
State = dict[str, Tensor]  # a state dict: parameter names and values


class WeightFile(NamedTuple):
    """A published file of weights."""

    url: str
    sha256: str  # its first hexadecimal digits, as many as were published

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def place(self) -> Path:
        """Where torch.hub, and so torchvision, keeps it."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.filename


CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
WEIGHT_FILES = {  # the keys are flags as well: --vgg FILE names a copy
    "vgg": WeightFile("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "dino": WeightFile(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "clip": WeightFile(
        f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt", CLIP_SHA256
    ),
    "inception": WeightFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
    ),
}


class WeightsMissing(InputError):
    """No usable weight file. The message is one line: what is wrong, and how to put it right."""


def how_to_get(kind: str) -> str:
    """The end of every WeightsMissing line."""
    file = WEIGHT_FILES[kind]
    return f"; download {file.url} to {file.place}, or name a copy with --{kind} FILE"


def find_weights(kind: str, path: str | None = None) -> Weights:
    """The weight file of `kind`, a key of WEIGHT_FILES, downloaded if need be.

    `path` is what the user gave with the flag: a file, taken as it is, or the word "random",
    which is handed on. None means torch.hub's cache: a file there must have the published hash,
    and a missing one is downloaded. Raises WeightsMissing.

    Of processes that start together one downloads, and the others wait for its file.
    """
    file = WEIGHT_FILES[kind]
    if path == RANDOM:
        return RANDOM
    if path is not None:
        if not Path(path).is_file():
            raise WeightsMissing(f"{path}: no such file{how_to_get(kind)}")
        return Path(path)
    if not file.place.exists():
        problem = f"{file.filename} could not be downloaded"
        with explained(problem, how_to_get(kind), WeightsMissing):
            file.place.parent.mkdir(parents=True, exist_ok=True)
            bar = os.environ.get("LOCAL_RANK", "0") == "0"  # one of a machine's processes shows it
            with one_at_a_time(file.place.parent):
                if not file.place.exists():
                    torch.hub.download_url_to_file(file.url, str(file.place), file.sha256, bar)
    elif not (digest := file_sha256(file.place)).startswith(file.sha256):
        hashes = f"sha256 {digest[:8]}..., expected {file.sha256[:8]}..."
        problem = f"{file.place} is broken or another file ({hashes}): delete it"
        raise WeightsMissing(problem + how_to_get(kind))
    return file.place


def load_weights(
    module: nn.Module, kind: str, weights: Weights, convert: Callable[[State], State] = dict
) -> None:
    """Fill `module` from a weight file, strictly; RANDOM leaves it as it was drawn.

    `convert` turns the file's names into the module's. State dicts and TorchScript archives are
    read, half precision is raised to the module's own. Raises WeightsMissing for anything else.
    """
    if weights == RANDOM:
        return
    problem = f"{weights} is not a readable {WEIGHT_FILES[kind].filename}"
    unreadable = explained(problem, how_to_get(kind), WeightsMissing)
    with unreadable, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; CLIP's file is from 2021
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except RuntimeError:
            state = torch.jit.load(weights, map_location="cpu").state_dict()
        module.load_state_dict(convert(state))


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Random weights equal in every process and run, the caller's random numbers left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


class Frozen(nn.Module):
    """A network that only measures: nothing in it learns, and it is in eval mode whatever its
    parent is told."""

    def freeze(self) -> None:
        """For the end of a constructor."""
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


class Scripted(Frozen):
    """A network of the user's own, a TorchScript file: images (B, 3, H, W) in [-1, 1] -> features
    (B, N, C) of N = grid * grid patches, row by row. Raises InputError for anything else."""

    def __init__(self, path: str, grid: int, side: int):
        super().__init__()
        bad = explained(f"{path} is no TorchScript that takes such pictures", "", InputError)
        with bad, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and has no heir: a program of
            # torch.export is bound to one device and mode
            self.network = torch.jit.load(path, map_location="cpu")
            self.freeze()
            found = tuple(self(torch.zeros(2, 3, side, side)).shape)
        if len(found) != 3 or found[:2] != (2, grid**2):
            problem = f"gives {found} for 2 pictures of {side} pixels"
            raise InputError(f"{path} {problem}, not (2, {grid**2}, channels)")
        self.width = found[2]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> features (B, N, C), without gradient."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float())
