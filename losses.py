"""The training objectives (Eq. 4-8) and the frozen networks that they measure with.

    L_NLL   = -log p_F(z) per latent number, constant left out                          (Eq. 4)
            = mean over K*d of u^2 / 2   -   logdet / (K*d)
    L_recon = mean over ALL pixels of (x - x_hat)^2  +  lambda_p * LPIPS(x, x_hat)      (Eq. 5)
    L_joint = lambda_nll * L_NLL + L_recon                                              (Eq. 6)
    L_aux   = mean over the MASKED patches i of -cos(h(z)_i, f(x)_i), for each teacher  (Eq. 7)
    L_ft    = L_recon + lambda_gan * L_GAN                                              (Eq. 8)

    z (B, K, d) --flow------> u (B, K, d), logdet (B,) ----------------------> flow_nll
        |--decoder----------> x_hat (B, 3, H, W) --+--(x)--------------------> pixel_loss
        |                                          |--(x)-- VGG16 -----------> Perceptual
        |                                          `-- PatchDiscriminator ---> generator_loss
        `--auxiliary decoder-> h(z) (B, N, C_t) -----+--(mask)---------------> auxiliary_loss
    x (B, 3, H, W) --DINOv2, CLIP, HOG--> f(x) (B, N, C_t)

Phase 1 trains everything on L_joint + L_aux, summed over teachers; phase 2 trains the decoder
alone on L_ft, against the discriminator.

Every loss is one number per image, (B,): averaging first over an image and then over images is
what makes one process on a joint batch and many processes on its parts the same computation. The
weights lambda come from train.Config.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import lpips
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor

from encoder import Block

# --------------------------------------------------------------------------------------------------
# Phase 1: reconstruction and likelihood (Eq. 4-6)


def pixel_loss(
    images: Tensor,
    reconstructions: Tensor,
    mask: Tensor | None = None,
    mim_weight: float = 1.0,
) -> Tensor:
    """Mean squared error over the WHOLE image, masked or not (Eq. 5, App. A): sampling paints from
    the latent alone, so the latent must hold the visible patches as well.

    images, reconstructions (B, 3, H, W) in [-1, 1] -> (B,).

    The "MIM weight" of App. C.2 scales the squared errors in the masked patches: `mask` (B, N)
    bool, True = hidden, N = grid * grid on a square image; None weighs all pixels 1. The sum is
    still divided by the number of pixels, so visible pixels count as they do without it.
    """
    square = (images - reconstructions).square()  # (B, 3, H, W)
    if mask is not None:
        grid = math.isqrt(mask.shape[1])
        weight = torch.where(mask, mim_weight, 1.0).type_as(square)  # (B, N)
        square = square * F.interpolate(weight.view(-1, 1, grid, grid), square.shape[2:])
    return square.mean(dim=(1, 2, 3))


def reconstruction_loss(pixel: Tensor, perceptual: Tensor, perceptual_weight: float) -> Tensor:
    """L_recon of Eq. 5 for each image: (B,), (B,) -> (B,); the weight is 1.1 (Tab. 7)."""
    return pixel + perceptual_weight * perceptual


def flow_nll(u: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of L_NLL = -log p_F(z) / (K*d) (Eq. 4), nats per latent number, each (B,).

    u = F(z) (B, K, d) and logdet (B,) in nats per image, as the flow returns them. The first part
    pulls u to the origin, the second keeps the flow from shrinking everything to get there. Their
    sum leaves out 0.5 * log(2 pi), as TARFlow does.
    """
    square = 0.5 * u.square().mean(dim=(1, 2))
    return square, -logdet / u[0].numel()


def joint_loss(reconstruction: Tensor, nll: Tensor, nll_weight: float) -> Tensor:
    """L_joint of Eq. 6 for each image: (B,), (B,) -> (B,)."""
    return reconstruction + nll_weight * nll


# --------------------------------------------------------------------------------------------------
# Phase 1: what the frozen teachers see (Eq. 7)


def auxiliary_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L_aux of Eq. 7 for one teacher: predicted, target (B, N, C_t), mask (B, N) bool -> (B,).

    The mean of -cos over the masked patches (True) of each image, in at least float32. An image
    without a masked patch is averaged over all of its patches: Tab. 8 has a row with teachers and
    no masks.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    cosine = F.cosine_similarity(predicted.to(dtype), target.to(dtype), dim=-1)  # (B, N)
    counted = mask | ~mask.any(dim=1, keepdim=True)  # (B, N)
    return -(cosine * counted).sum(dim=1) / counted.sum(dim=1)


# --------------------------------------------------------------------------------------------------
# Phase 2: decoder against discriminator (Eq. 8)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_GAN of Eq. 8, what the decoder minimises: -mean D(x_hat); (B, 1, h, w) -> (B,)."""
    return -fake_logits.mean(dim=(1, 2, 3))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The hinge loss of the discriminator: two times (B, 1, h, w) -> (B,).

    paper: "hinge", no formula; here: half the sum of the two hinges, as in VQGAN and RAE. The
    caller detaches the reconstructions, or the decoder would learn to be found out.
    """
    real = F.relu(1 - real_logits).mean(dim=(1, 2, 3))
    fake = F.relu(1 + fake_logits).mean(dim=(1, 2, 3))
    return 0.5 * (real + fake)


def finetune_loss(reconstruction: Tensor, generator: Tensor, gan_weight: float) -> Tensor:
    """L_ft of Eq. 8 for each image: (B,), (B,) -> (B,); the weight is 0.05 (Tab. 7)."""
    return reconstruction + gan_weight * generator


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for every overlapping 70 x 70 patch.

        image (B, 3, H, W) -> 64 -> 128 -> 256 (stride 2 each) -> 512 -> 1, logits (B, 1, h, w)

    256 pixels give 30 x 30 logits; fewer than 24 would give none.
    """

    MIN_SIDE = 24  # 24 -> 12 -> 6 -> 3 by the strides, then 3 -> 2 -> 1

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width, stride in ((64, 2), (128, 2), (256, 1)):
            # No bias: BatchNorm's own takes its place.
            layers += [nn.Conv2d(width, 2 * width, 4, stride, padding=1, bias=False)]
            # Batch statistics only: it is never used outside of training, and a running mean would
            # change with every look that the decoder takes.
            layers += [nn.BatchNorm2d(2 * width, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """DCGAN's start: N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm's scale."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> logits (B, 1, H/8 - 2, W/8 - 2), high = real.

        Raises ValueError for sides below MIN_SIDE.
        """
        require_side(images, self.MIN_SIDE, "the discriminator")
        logits = self.layers(images)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_side(images: Tensor, least: int, who: str) -> None:
    """Raise ValueError if a side of images (B, 3, H, W) is less than `least` pixels."""
    H, W = images.shape[2:]
    if min(H, W) < least:
        raise ValueError(f"{who} needs images of at least {least} x {least} pixels, got {H} x {W}")


# --------------------------------------------------------------------------------------------------
# Weight files of the frozen networks

# Frozen networks take a Path, or this word: weights drawn at random, for tests and for measuring
# cost. They mean nothing. It has to be written out, so that no missing file can lead to it.
RANDOM = "random"
Weights = Path | Literal["random"]


class WeightFile(NamedTuple):
    """A published file of weights, and the flag by which a user names a copy of it."""

    url: str
    sha256: str  # its first hexadecimal digits, as many as were published
    flag: str

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]


CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
WEIGHT_FILES = {
    "vgg": WeightFile(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af",
        "--vgg",
    ),
    "convnext": WeightFile(
        "https://download.pytorch.org/models/convnext_small-0c510722.pth",
        "0c510722",
        "--convnext",
    ),
    "dino": WeightFile(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        "--dino",
    ),
    "clip": WeightFile(
        f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt",
        CLIP_SHA256,
        "--clip",
    ),
    "inception": WeightFile(  # for evaluate.py
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d",
        "--inception",
    ),
}


class WeightsMissing(Exception):
    """No usable weight file. The message is one line: what is wrong, and how to put it right."""


def find_weights(kind: str, path: str | None = None) -> Weights:
    """The weight file of `kind`, a key of WEIGHT_FILES, downloaded if need be.

    `path` is what the user gave with the flag: a file, taken as it is, or the word "random",
    which is handed on. None means torch.hub's cache: a file there must have the published hash,
    and a missing one is downloaded. Raises WeightsMissing.

    Processes that start together may all download: torch.hub writes under a name of its own and
    renames, so none of them reads half a file.
    """
    if path == RANDOM:
        return RANDOM
    file = WEIGHT_FILES[kind]
    if path is not None:
        if not Path(path).is_file():
            raise WeightsMissing(f"{path}: no such file; {how_to_get(kind)}")
        return Path(path)
    place = cache_place(kind)
    if not place.exists():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            quiet = os.environ.get("LOCAL_RANK", "0") != "0"
            torch.hub.download_url_to_file(file.url, str(place), file.sha256, progress=not quiet)
        except Exception as error:  # a network fails in many ways, and all mean the same here
            reason = " ".join(str(error).split())
            raise WeightsMissing(
                f"{file.filename} could not be downloaded ({reason}); {how_to_get(kind)}"
            ) from error
    else:
        digest = hashlib.sha256(place.read_bytes()).hexdigest()
        if not digest.startswith(file.sha256):
            raise WeightsMissing(
                f"{place} is broken or another file: sha256 {digest[:8]}..., expected "
                f"{file.sha256[:8]}...; delete it, then {how_to_get(kind)}"
            )
    return place


def cache_place(kind: str) -> Path:
    """Where torch.hub, and so torchvision, keeps the weight file of `kind`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHT_FILES[kind].filename


def how_to_get(kind: str) -> str:
    """The end of every WeightsMissing line."""
    file = WEIGHT_FILES[kind]
    return f"download {file.url} to {cache_place(kind)}, or name a copy with {file.flag} FILE"


State = dict[str, Tensor]  # a state dict: parameter names and values


def load_weights(
    module: nn.Module, kind: str, path: Path, convert: Callable[[State], State] = dict
) -> None:
    """Fill `module` from a weight file, strictly; `convert` turns the file's names into ours.

    Plain state dicts and TorchScript archives (OpenAI's CLIP) are read; half precision is raised
    to the module's own. Raises WeightsMissing if the file is unreadable or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated; CLIP's file is from 2021
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except RuntimeError:
                state = torch.jit.load(path, map_location="cpu").state_dict()
        module.load_state_dict(convert(state))
    except Exception as error:  # a file can be wrong in many ways, and all mean the same here
        name = WEIGHT_FILES[kind].filename
        raise WeightsMissing(f"{path} is not a readable {name}; {how_to_get(kind)}") from error


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Random weights equal in every process and run, the caller's random numbers left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


class Frozen(nn.Module):
    """A network that only measures: in eval mode, whatever its parent is told."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


# --------------------------------------------------------------------------------------------------
# Perceptual distance (Eq. 5)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
CONVNEXT_SIZE = 224  # pixels, the size ConvNeXt-S was trained at
CONVNEXT_WEIGHT = 0.1  # ConvNeXt : LPIPS in the authors' release, the sum divided by 1.1


class Normalize(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H, W) less a data set's mean, over its deviation."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):  # of RGB in [0, 1]
        super().__init__()
        # Buffers: made anew at each call, they would be sent to the GPU each time.
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (0.5 * (images + 1) - self.mean) / self.std


class Perceptual(Frozen):
    """LPIPS with a VGG16 trunk: how different two images look (Eq. 5).

    With `convnext`, the authors' release: (1.0 * LPIPS + 0.1 * ConvNeXt) / 1.1, where ConvNeXt is
    the mean squared difference of ConvNeXt-S's ImageNet logits; the paper names LPIPS only.
    """

    MIN_SIDE = 16  # VGG16 halves the image four times

    def __init__(
        self,
        vgg: Weights,  # torchvision's file, or "random"
        convnext: Weights | None = None,  # torchvision's file, or "random"; None: LPIPS only
    ):
        super().__init__()
        with fixed_seed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by an older name
            # pnet_rand: otherwise lpips downloads VGG16 itself, and checks nothing.
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
            self.convnext = None if convnext is None else torchvision.models.convnext_small()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        if vgg != RANDOM:
            load_weights(self.lpips.net, "vgg", vgg, self.vgg_state)
        if convnext not in (None, RANDOM):
            load_weights(self.convnext, "convnext", convnext)
        self.to(memory_format=torch.channels_last)  # the layout that tensor cores read
        self.requires_grad_(False).eval()

    def vgg_state(self, state: State) -> State:
        """torchvision's features.I.weight as lpips' sliceS.I.weight, without the classifier."""
        names = self.lpips.net.state_dict()
        return {name: state["features." + name.split(".", 1)[1]] for name in names}

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """images, reconstructions (B, 3, H, W) in [-1, 1] -> (B,).

        In the dtype of the weights (float32, or the default dtype at construction), also under
        autocast: LPIPS is small differences of unit vectors, and bfloat16 rounds them away.
        Raises ValueError for sides below MIN_SIDE.
        """
        require_side(images, self.MIN_SIDE, "LPIPS")
        dtype = self.normalize.mean.dtype
        # lpips runs VGG16 on the two sides in turn. Only the reconstructions have a gradient, so
        # the images' side keeps nothing for the backward pass; in one joint batch it would.
        with torch.autocast(images.device.type, enabled=False):
            images, reconstructions = images.to(dtype), reconstructions.to(dtype)
            distance = self.lpips(images, reconstructions).flatten()  # (B,)
            if self.convnext is None:
                return distance
            difference = self.logits(images) - self.logits(reconstructions)  # (B, 1000)
            distance = distance + CONVNEXT_WEIGHT * difference.square().mean(dim=1)
            return distance / (1 + CONVNEXT_WEIGHT)

    def logits(self, images: Tensor) -> Tensor:
        """ConvNeXt-S's class scores: images (B, 3, H, W) in [-1, 1] -> (B, 1000)."""
        size = (CONVNEXT_SIZE, CONVNEXT_SIZE)
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.convnext(self.normalize(images))


# --------------------------------------------------------------------------------------------------
# Frozen teachers (Sec. 3.3.1): what Eq. 7 predicts

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class FrozenViT(Frozen):
    """A published ViT-B put together from our own Blocks, read for its patch tokens.

        image (B, 3, H, W) in [-1, 1]
          | normalised, resized bicubically to `patch_size` * `grid` pixels a side
        tokens (B, 1 + N, C)                  N = grid^2, the class token in front
          | + positions, [LayerNorm], 12 blocks, LayerNorm
        features (B, N, C)                    the class token left out

    Our Block does it all: without coordinates it rotates nothing, and DINOv2's layer scales are
    multiplied into the linear layers before them when they are loaded.
    """

    width, depth, heads = 768, 12, 12  # ViT-B

    def __init__(
        self,
        patch_size: int,  # side of a patch in pixels
        trained_grid: int,  # patches on a side while it was trained: size of its position table
        norm_eps: float,  # of every LayerNorm
        mean: tuple[float, float, float],  # of RGB in [0, 1]
        std: tuple[float, float, float],  # likewise
    ):
        super().__init__()
        self.patch_size = patch_size
        self.normalize = Normalize(mean, std)
        self.patch_embed = nn.Conv2d(3, self.width, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(self.width))
        self.position = nn.Parameter(0.02 * torch.randn(1 + trained_grid**2, self.width))
        self.norm_pre = nn.Identity()
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width)
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = norm_eps
            del block.attention.rotary  # nothing is rotated, and no weight file holds it
        self.norm.eps = norm_eps

    def freeze_at(self, grid: int, **resize: object) -> None:
        """Resample the positions bicubically to the grid, once and for all, and freeze.

        `resize` tells F.interpolate the size. The class token's position is kept.
        """
        self.grid = grid
        cls, patches = self.position[:1], self.position[1:]  # (1, C), (N', C)
        side = math.isqrt(len(patches))
        table = patches.T.reshape(1, self.width, side, side)
        table = F.interpolate(table, mode="bicubic", **resize)  # (1, C, grid, grid)
        self.position = nn.Parameter(torch.cat((cls, table[0].flatten(1).T)))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], square -> features (B, N, C), without gradient."""
        B, side = len(images), self.patch_size * self.grid
        images = self.normalize(images.to(self.position.dtype))
        # No antialiasing: 256 to 224 pixels barely needs it, and REPA has none.
        images = F.interpolate(images, (side, side), mode="bicubic")
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = torch.cat((self.cls_token.expand(B, 1, -1), patches), dim=1)  # (B, 1 + N, C)
        tokens = self.norm_pre(tokens + self.position)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:]


def renamed(state: State, names: dict[str, str]) -> State:
    """A state dict with every occurrence of a key of `names` in its names replaced, in order."""
    result = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = value
    return result


class DINOv2(FrozenViT):
    """DINOv2 ViT-B/14 (Oquab et al. 2023), its normalised patch tokens: (B, grid^2, 768).

    paper: "DINO features"; here: the official function of the weights. REPA's resamples the
    positions with antialiasing, MAETok's the patch kernel too, and their features differ from it.
    """

    NAMES = {  # facebookresearch's -> ours
        "patch_embed.proj": "patch_embed",
        "pos_embed": "position",
        "attn.": "attention.",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "ls1.": "attention.proj.",  # layer scale, beside the linear layer whose output it scales
        "ls2.": "mlp.2.",
    }

    def __init__(
        self,
        weights: Weights,  # dinov2_vitb14_pretrain.pth, or "random"
        grid: int = 16,  # patches on a side, 14 pixels each: 256-pixel images are resized to 224
    ):
        with fixed_seed():
            super().__init__(
                patch_size=14, trained_grid=37, norm_eps=1e-6, mean=IMAGENET_MEAN, std=IMAGENET_STD
            )
        if weights != RANDOM:
            load_weights(self, "dino", weights, self.convert)
        # The official code asks for grid + 0.1 patches, so that rounding loses none, and takes the
        # table at the coordinates of that scale. `size` would shift every position.
        self.freeze_at(grid, scale_factor=1.0 if grid == 37 else (grid + 0.1) / 37)

    @classmethod
    def convert(cls, state: State) -> State:
        """The official file's tensors under our names, layer scales multiplied in."""
        state = renamed(state, cls.NAMES)
        del state["mask_token"]
        state["cls_token"], state["position"] = state["cls_token"][0, 0], state["position"][0]
        for name in [name for name in state if name.endswith(".gamma")]:
            gamma, linear = state.pop(name), name.removesuffix("gamma")
            state[linear + "weight"] = gamma[:, None] * state[linear + "weight"]
            state[linear + "bias"] = gamma * state[linear + "bias"]
        return state


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the GELU that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIP(FrozenViT):
    """CLIP ViT-B/16's image tower (Radford et al. 2021): (B, grid^2, 768).

    The patch tokens after the last LayerNorm, before the projection to the joint space, which
    OpenAI applies to the class token only.
    """

    NAMES = {  # OpenAI's -> ours
        "conv1": "patch_embed",
        "class_embedding": "cls_token",
        "positional_embedding": "position",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "transformer.resblocks": "blocks",
        "ln_": "norm",
        "attn.in_proj_": "attention.qkv.",
        "attn.out_proj": "attention.proj",
        "mlp.c_fc": "mlp.0",
        "mlp.c_proj": "mlp.2",
    }

    def __init__(
        self,
        weights: Weights,  # ViT-B-16.pt, its state dict or the image tower's, or "random"
        grid: int = 16,  # patches on a side, 16 pixels each: 256-pixel images stay as they are
    ):
        with fixed_seed():
            super().__init__(
                patch_size=16, trained_grid=14, norm_eps=1e-5, mean=CLIP_MEAN, std=CLIP_STD
            )
            self.norm_pre = nn.LayerNorm(self.width)
        for block in self.blocks:
            block.mlp[1] = QuickGELU()
        if weights != RANDOM:
            load_weights(self, "clip", weights, self.convert)
        self.freeze_at(grid, size=(grid, grid))  # no official rule; identity at 14

    @classmethod
    def convert(cls, state: State) -> State:
        """The image tower under our names.

        Selected by its prefix: without it, the text tower has tensors of the same names.
        """
        tower = {
            name.removeprefix("visual."): value
            for name, value in state.items()
            if name.startswith("visual.")
        }
        state = renamed(tower or state, cls.NAMES)
        del state["proj"]
        state["patch_embed.bias"] = torch.zeros(cls.width)  # CLIP's has none
        return state


class HOG(Frozen):
    """Histograms of oriented gradients, MaskFeat's target (Wei et al. 2022): (B, grid^2, 108).

    The image is resized bicubically to 16 * grid pixels. In each colour, every pixel votes with
    the length of its gradient for the gradient's orientation, 9 bins over 180 degrees. A cell of
    8 x 8 pixels sums its votes and is scaled to unit length. A patch is 3 colours * 9 bins *
    2 x 2 cells, in this order.

    MaskFeat gives a vote to one bin; here it is split between the two nearest (Dalal and Triggs
    2005), so that no feature jumps at a bin's edge.
    """

    bins, cell, width = 9, 8, 108

    def __init__(self, grid: int = 16):
        super().__init__()
        self.grid = grid

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], square -> features (B, N, 108), without gradient."""
        side = 2 * self.cell * self.grid  # S
        x = F.interpolate(images, (side, side), mode="bicubic")  # (B, 3, S, S)
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        right = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]  # (B, 3, S, S)
        down = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]  # (B, 3, S, S)

        # Orientations and distances between them are in bins; a period of 9 makes opposites one.
        turn = torch.atan2(down, right) / math.pi * self.bins  # (B, 3, S, S)
        center = torch.arange(self.bins, device=x.device).view(-1, 1, 1) + 0.5
        half = self.bins / 2
        away = (turn[:, :, None] - center + half) % self.bins - half  # (B, 3, 9, S, S)
        votes = torch.hypot(right, down)[:, :, None] * (1 - away.abs()).clamp(min=0)

        cells = F.avg_pool2d(votes.flatten(1, 2), self.cell)  # (B, 27, 2g, 2g)
        cells = F.normalize(cells.unflatten(1, (3, self.bins)), dim=2).flatten(1, 2)
        return F.pixel_unshuffle(cells, 2).flatten(2).transpose(1, 2)  # (B, N, 108)


TEACHERS = {"dino": DINOv2, "clip": CLIP, "hog": HOG}  # Tab. 5


def make_teacher(name: str, weights: Weights | None, grid: int) -> Frozen:
    """The teacher `name` of TEACHERS for grid x grid patches; hog has no weights: None."""
    return HOG(grid) if name == "hog" else TEACHERS[name](weights, grid)
