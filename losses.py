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

Phase 1 trains everything on L_joint + lambda_t * L_aux, a sum over teachers; phase 2 the decoder on
L_ft. lambda_nll 1, p 1.1, t 1, gan 0.05 (Tab. 7; shapes: 0.01, 0, no teacher, 0.001). A loss is one
number an image, (B,): so one process on a batch and many on its parts compute the same.
"""

import functools
import math
import re
import warnings
from typing import Any, NamedTuple

import lpips
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from common import runs
from common.weights import Frozen, Scripted, State, Weights, find_weights, fixed_seed, load_weights
from encoder import Block


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# Phase 1: reconstruction, likelihood (Eq. 4-6), what the frozen teachers see (Eq. 7)


def pixel_loss(
    images: Tensor, reconstructions: Tensor, mask: Tensor | None = None, mim_weight: float = 1.0
) -> Tensor:
    """Mean squared error over the WHOLE image, masked or not (Eq. 5, App. A): sampling paints from
    the latent alone, so the latent must hold the visible patches as well.

    images, reconstructions (B, 3, H, W) in [-1, 1] -> (B,). Only the "MIM weight" of App. C.2 looks
    at masks: it scales the squared errors in masked patches, `mask` (B, N) bool, True = hidden, N =
    grid * grid. The sum is still divided by the number of pixels: visible ones count as without.
    release: pixels in [0, 1], so a quarter of this, and divided by the sum of the weights.
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

    u = F(z) (B, K, d) and logdet (B,) in nats per image, as the flow returns them: the first part
    pulls u to the origin, the second keeps it from shrinking there. 0.5 log(2 pi) = 0.919 is left
    out, in the log as well, as in TARFlow; NormalizingFlow.log_prob has it. Eq. 2 and 3: log p(x)
    >= E log p(x|z) + E log p_F(z) + the entropy of the noise, a constant, as sigma is fixed.
    """
    square = 0.5 * u.square().mean(dim=(1, 2))
    return square, -logdet / u[0].numel()


def joint_loss(reconstruction: Tensor, nll: Tensor, nll_weight: float) -> Tensor:
    """L_joint of Eq. 6 for each image: (B,), (B,) -> (B,)."""
    return reconstruction + nll_weight * nll


def auxiliary_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L_aux of Eq. 7 for one teacher: predicted, target (B, N, C_t), mask (B, N) bool -> (B,).

    The mean of -cos over the masked patches (True) of each image, in at least float32. An image
    without a masked patch (Tab. 8's row without masks, the start of a mask warm-up) is averaged
    over all of its patches. The target is on the grid of the model's own patches.
    """
    predicted = at_least_float32(predicted)
    cosine = F.cosine_similarity(predicted, target.type_as(predicted), dim=-1)  # (B, N)
    counted = mask | ~mask.any(dim=1, keepdim=True)  # (B, N)
    return -(cosine * counted).sum(dim=1) / counted.sum(dim=1)


# --------------------------------------------------------------------------------------------------
# Phase 2: decoder against discriminator (Eq. 8)


def finetune_loss(reconstruction: Tensor, generator: Tensor, gan_weight: float) -> Tensor:
    """L_ft of Eq. 8 for each image: (B,), (B,) -> (B,); the weight is 0.05 (Tab. 7)."""
    return reconstruction + gan_weight * generator


def generator_loss(fake_logits: Tensor) -> Tensor:
    """L_GAN of Eq. 8, what the decoder minimises: -mean D(x_hat); (B, 1, h, w) -> (B,)."""
    return -fake_logits.mean(dim=(1, 2, 3))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The hinge loss of the discriminator: two times (B, 1, h, w) -> (B,).

    paper: that of RAE, no formula; here: half the sum of the two hinges, as in RAE, VQGAN and the
    release. The caller detaches reconstructions, or the decoder would learn to be found out.
    """
    real = F.relu(1 - real_logits).mean(dim=(1, 2, 3))
    fake = F.relu(1 + fake_logits).mean(dim=(1, 2, 3))
    return 0.5 * (real + fake)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for every overlapping 70 x 70 patch. paper: "patch-
    based" and "following RAE", which has another; here: the one of the authors' release.

    image (B, 3, H, W) -> 64 -> 128 -> 256 (stride 2 each) -> 512 -> 1, logits (B, 1, h, w)
    """

    MIN_SIDE = 24  # 24 -> 12 -> 6 -> 3 -> 2 -> 1 logit; 256 pixels give 30 x 30

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width, stride in ((64, 2), (128, 2), (256, 1)):
            # No bias, as BatchNorm has one. Its statistics are of the batch only: a running mean
            # would change with every look that the decoder takes.
            layers += [nn.Conv2d(width, 2 * width, 4, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(2 * width, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))
        for layer in self.layers:  # DCGAN's start
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(layer.weight, float(isinstance(layer, nn.BatchNorm2d)), 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> logits (B, 1, H/8 - 2, W/8 - 2), high = real."""
        require_side(images, self.MIN_SIDE, "the discriminator")
        return at_least_float32(self.layers(images))


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


def require_side(images: Tensor, least: int, who: str) -> None:
    """Raise ValueError if a side of images (B, 3, H, W) is less than `least` pixels."""
    if min(H := images.shape[2], W := images.shape[3]) < least:
        raise ValueError(f"{who} needs images of at least {least} x {least} pixels, got {H} x {W}")


# --------------------------------------------------------------------------------------------------
# Perceptual distance (Eq. 5)


class Perceptual(Frozen):
    """LPIPS (Zhang et al. 2018) with a VGG16 trunk: how different two images look (Eq. 5). The
    authors' release mixes in the logits of a ConvNeXt, 1.0 : 0.1; the paper names LPIPS only."""

    MIN_SIDE = 16  # VGG16 halves the image four times

    def __init__(self, vgg: Weights):  # torchvision's file, or "random"
        super().__init__()
        with fixed_seed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by an older name
            # pnet_rand: otherwise lpips downloads VGG16 itself, and checks nothing.
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        load_weights(self.lpips.net, "vgg", vgg, self.convert)
        self.to(memory_format=torch.channels_last)  # the layout that tensor cores read
        self.freeze()

    def convert(self, state: State) -> State:
        """torchvision's features.I.weight as lpips' sliceS.I.weight, without the classifier."""
        return {n: state["features." + n.split(".", 1)[1]] for n in self.lpips.net.state_dict()}

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """images, reconstructions (B, 3, H, W) in [-1, 1] -> (B,), in the dtype of the weights also
        under autocast: small differences of unit vectors, which bfloat16 would round away."""
        require_side(images, self.MIN_SIDE, "LPIPS")
        x, y = (i.to(self.lpips.scaling_layer.shift.dtype) for i in (images, reconstructions))
        with torch.autocast(x.device.type, enabled=False):
            return runs.gradient_at_once(functools.partial(self.distance, x), y)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """That of the lpips package, with half of its passes over the features: (B,)."""
        x, y, total = self.lpips.scaling_layer(x), self.lpips.scaling_layer(y), 0.0
        for stage, head in zip(self.lpips.net.children(), self.lpips.lins, strict=True):
            x, y = stage(x), stage(y)  # (B, C, rows, cols)
            # To root mean square 1 over channels: sqrt(C) times unit length, so squares C times.
            units = (F.rms_norm(f.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-20) for f in (x, y))
            square = F.mse_loss(*units, reduction="none").sum(dim=(1, 2))  # (B, C)
            total = total + square @ head.model[-1].weight.flatten() / x[0].numel()
        return total


# --------------------------------------------------------------------------------------------------
# Frozen teachers (Sec. 3.3.1): what Eq. 7 predicts


class FrozenViT(Frozen):
    """A published ViT-B put together from our own Blocks, read for its patch tokens.

    image (B, 3, H, W) in [-1, 1]
      | normalised, resized bicubically to `patch_size` * `grid` pixels a side
    tokens (B, 1 + N, C)                  N = grid^2, the class token in front
      | + positions, [LayerNorm], 12 blocks, LayerNorm
    features (B, N, C)                    the class token left out
    """

    width, depth, heads = 768, 12, 12  # ViT-B
    patch_size: int  # side of a patch in pixels
    trained_grid: int  # patches on a side while it was trained: size of its position table
    norm_eps: float  # of every LayerNorm
    MEAN: tuple[float, float, float]  # of RGB in [0, 1]
    STD: tuple[float, float, float]
    NAMES: dict[str, str]  # parts of the weight file's names -> ours, replaced in this order

    def __init__(self):
        super().__init__()
        # Buffers: made anew at each call, they would be sent to the GPU each time.
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)
        with fixed_seed():
            self.patch_embed = nn.Conv2d(3, self.width, self.patch_size, stride=self.patch_size)
            self.cls_token = nn.Parameter(0.02 * torch.randn(self.width))
            self.position = nn.Parameter(0.02 * torch.randn(1 + self.trained_grid**2, self.width))
            self.norm_pre = nn.Identity()
            self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(self.depth))
            self.norm = nn.LayerNorm(self.width, self.norm_eps)
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = self.norm_eps
            del block.attention.rotary  # nothing is rotated, and no weight file holds it

    def freeze_at(self, grid: int, **resize: object) -> None:
        """Resample the patches' positions bicubically to the grid, once and for all, and freeze."""
        self.grid = grid
        cls, patches = self.position[:1], self.position[1:]  # (1, C), (N', C)
        side = math.isqrt(len(patches))
        table = patches.T.reshape(1, self.width, side, side)
        table = F.interpolate(table, mode="bicubic", **resize)  # (1, C, grid, grid)
        self.position = nn.Parameter(torch.cat((cls, table[0].flatten(1).T)))
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], square -> features (B, N, C), without gradient."""
        B, side = len(images), self.patch_size * self.grid
        images = (0.5 * (images.to(self.mean.dtype) + 1) - self.mean) / self.std
        # No antialiasing: 256 to 224 pixels barely needs it, and REPA has none.
        images = F.interpolate(images, (side, side), mode="bicubic")
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, C)
        tokens = torch.cat((self.cls_token.expand(B, 1, -1), patches), dim=1)  # (B, 1 + N, C)
        tokens = self.norm_pre(tokens + self.position)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:]

    def renamed(self, state: State) -> State:
        """The tensors of a weight file under our names."""
        for theirs, ours in self.NAMES.items():
            state = {name.replace(theirs, ours): value for name, value in state.items()}
        return state


class DINOv2(FrozenViT):
    """DINOv2 ViT-B/14 (Oquab et al. 2023), its normalised patch tokens: (B, grid^2, 768).

    paper: "DINO features"; here: the official function of the weights. REPA's resamples the
    positions with antialiasing, MAETok's the patch kernel too, and their features differ from it.
    """

    patch_size, trained_grid, norm_eps = 14, 37, 1e-6
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    NAMES = {  # facebookresearch's -> ours
        "patch_embed.proj": "patch_embed",
        "pos_embed": "position",
        "attn.": "attention.",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "ls1.": "attention.proj.",  # layer scale, beside the linear layer whose output it scales
        "ls2.": "mlp.2.",
    }

    def __init__(self, weights: Weights, grid: int = 16):  # 256-pixel images are resized to 224
        super().__init__()
        load_weights(self, "dino", weights, self.convert)
        # The official code asks for grid + 0.1 patches, so that rounding loses none, and takes the
        # table at the coordinates of that scale. `size` would shift every position.
        self.freeze_at(grid, scale_factor=1.0 if grid == 37 else (grid + 0.1) / 37)

    def convert(self, state: State) -> State:
        """The official file's tensors under our names, layer scales multiplied in."""
        state = self.renamed(state)
        del state["mask_token"]
        state["cls_token"], state["position"] = state["cls_token"][0, 0], state["position"][0]
        for name in [name for name in state if name.endswith(".gamma")]:
            gamma, linear = state.pop(name), name.removesuffix("gamma")
            state[linear + "weight"] = gamma[:, None] * state[linear + "weight"]
            state[linear + "bias"] = gamma * state[linear + "bias"]
        return state


class CLIP(FrozenViT):
    """CLIP ViT-B/16's image tower (Radford et al. 2021): (B, grid^2, 768).

    The patch tokens after the last LayerNorm, before the projection to the joint space, which
    OpenAI applies to the class token only.
    """

    patch_size, trained_grid, norm_eps = 16, 14, 1e-5
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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

    def __init__(self, weights: Weights, grid: int = 16):  # 256-pixel images stay as they are
        super().__init__()
        self.norm_pre = nn.LayerNorm(self.width)
        load_weights(self, "clip", weights, self.convert)
        for block in self.blocks:  # its GELU, x * sigmoid(1.702 x), is silu(1.702 x) / 1.702
            block.mlp[1] = nn.SiLU()
            for x, factor in zip(block.mlp.parameters(), (1.702, 1.702, 1 / 1.702, 1), strict=True):
                x.data *= factor
        self.freeze_at(grid, size=(grid, grid))  # no official rule; identity at 14

    def convert(self, state: State) -> State:
        """The image tower under our names, from OpenAI's archive, its state dict or the tower's.
        Selected by its prefix: without it, the text tower has tensors of the same names."""
        prefix = "visual."
        tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = self.renamed(tower or state)
        del state["proj"]
        state["patch_embed.bias"] = torch.zeros(self.width)  # CLIP's has none
        return state


class HOG(Frozen):
    """Histograms of oriented gradients, MaskFeat's target (Wei et al. 2022): (B, grid^2, 108).

    The image is resized bicubically to 16 * grid pixels. In each colour, every pixel votes with
    the length of its gradient for the gradient's orientation, 9 bins over 180 degrees. A cell of
    8 x 8 pixels sums its votes and is scaled to unit length. A patch is 3 colours * 9 bins *
    2 x 2 cells, in this order. MaskFeat gives a vote to one bin; here it is split between the two
    nearest (Dalal and Triggs 2005), so that no feature jumps at a bin's edge.
    """

    bins, cell, width = 9, 8, 108

    def __init__(self, grid: int = 16):
        super().__init__()
        self.grid = grid

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], square -> features (B, N, 108), without gradient."""
        side = 2 * self.cell * self.grid  # S
        x = F.interpolate(images, (side, side), mode="bicubic")
        x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        right = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
        down = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
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


class FrozenNetworks(NamedTuple):
    """What losses look through, a tuple, so in no optimizer, no checkpoint, no call of train()."""

    perceptual: Perceptual | None  # LPIPS of Eq. 5
    teachers: dict[str, Frozen]  # f_t of Eq. 7


def load_frozen_networks(config: Any, device: torch.device) -> FrozenNetworks:
    """Those that a train.Config asks for. Raises WeightsMissing."""
    c, perceptual, teachers = config, None, {}
    if c.perceptual_weight and not c.freeze_autoencoder:
        perceptual = Perceptual(find_weights("vgg", c.vgg)).to(device)
    for name in c.teachers if c.phase == "joint" and not c.freeze_autoencoder else ():
        if name in TEACHERS:
            weights = [] if name == "hog" else [find_weights(name, getattr(c, name))]
            teacher = TEACHERS[name](*weights, grid=c.grid).to(device)
        else:  # a file, under a name that a module may have
            teacher = Scripted(name, c.grid, c.image_size).to(device)
            name = "file_" + re.sub(r"\W", "_", name)
        teachers[name] = runs.keep_bfloat16(teacher) if runs.uses_bf16(device) else teacher
    return FrozenNetworks(perceptual, teachers)
