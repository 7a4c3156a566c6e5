"""Both phases of MIMFlow's training (Sec. 3.2.3 and 3.3, Tab. 6 and 7).

    python train.py                                # preset shapes: built-in pictures; or captions
    python train.py --preset photos --data FOLDER  # your pictures: class folders or flat
    torchrun --nproc_per_node=8 train.py --preset mimflow-l --data /path/to/imagenet
    torchrun --nproc_per_node=8 train.py --preset mimflow-l --phase decoder \\
        --init runs/mimflow-l/model.pt --data /path/to/imagenet

Phase 1 (`JointTraining`), all parts together; all losses reach the encoder through z (sigma 0.3):

    images (B,3,H,W), mask (B,N) --encoder--> mu (B,K,d) --+ sigma*eps--> z (B,K,d)      Eq. 1
    z, labels --flow--> u (B,K,d), logdet (B,)                        -> L_NLL           Eq. 4
    z --decoder--> image (B,3,H,W)                                    -> L_recon         Eq. 5
    z --auxiliary decoders--> (B,N,C_t), frozen teachers(images)      -> L_aux           Eq. 7
    loss = lambda_nll L_NLL + L_recon + lambda_t L_aux, each teacher             Eq. 6 and 7

Phase 2 (`DecoderTraining`), the decoder alone, all else frozen, against a discriminator (hinge loss
on images and on painted ones):

    z as above --decoder--> image --PatchDiscriminator--> logits      -> L_GAN = -mean of the logits
    loss = L_recon + lambda_gan L_GAN,  L_recon = pixels and LPIPS                 Eq. 5 and 8

The same command continues an unfinished run on a device of the same kind: all that is random is a
function of (seed, step), so nothing random is saved. A CPU repeats it exactly; a GPU, or another
number of processes, up to rounding. (In phase 2 BatchNorm sees a part of the batch: --grad-accum,
and on a CPU the number of processes, change its numbers.)
"""

import common  # noqa: F401  # isort: skip (before torch: Ctrl-C)
import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import losses
from common import data, runs
from common.runs import BELOW_1, POSITIVE, SHARE, fail, flag, option, rank, say, shown, world_size
from common.shapes import from_uint8
from decoder import AuxiliaryDecoder, Decoder, drop_path_scales
from emigm import SCHEDULES, MaskedPrior, TokenDraws, draw_tokens, visible_slots
from encoder import MaskedEncoder, random_mask
from flow import SCALES, NormalizingFlow
from losses import TEACHERS, DiscriminatorTraining, FrozenNetworks, PatchDiscriminator, Perceptual

FITTED = 2048  # pictures, at least, that tell the second prior mean and std of the latents
CHECKPOINT_FORMAT = 1  # raised when a file of this program can no longer be read by an older one
RETIRED = ("convnext", "convnext_mix")  # fields of older checkpoints: switches that were dropped


# --------------------------------------------------------------------------------------------------
# Configuration
#
# One flat dataclass is the whole truth about a run. It is written to config.json and into every
# checkpoint: a model can be rebuilt from its file, and a run with other settings refused by name.


@dataclass
class Config:
    """One run. The defaults are the paper's (Tab. 6 and 7); every field is a flag of train.py."""

    preset: str = option("mimflow-l", "what the other defaults are")
    # The phase, and where phase 2 and the baseline of Tab. 1 and Fig. 5 begin
    phase: str = option("joint", "phase 1, or phase 2 (Sec. 3.3.2)", choices=("joint", "decoder"))
    init: str | None = option(None, "begin with its autoencoder; phase 2: and flow", metavar="CKPT")
    freeze_autoencoder: bool = option(False, "train the flow alone, as STARFlow does; needs --init")
    # Data (App. A: ADM's recipe)
    data: str | None = option(None, "folder, or cifar10, pets, ...; no = built-in", metavar="DATA")
    image_size: int = option(256, "side of the training images, pixels", POSITIVE)
    num_classes: int | None = option(None, "0 = no labels; left out: counted in the data")
    caption_words: int = option(0, "words of a caption that are read; 0 = classes", (0, 999))
    num_workers: int = option(8, "data-loading processes per GPU", (0, 1024))
    skip_bad_images: bool = option(False, "pass over pictures that cannot be read, 0.1 %% at most")
    # Masked encoder and decoder (Tab. 6): ViT-B twice
    patch_size: int = option(16, "side of a patch, pixels", POSITIVE)
    width: int = option(768, "channels of encoder and decoder", POSITIVE)
    depth: int = option(12, "layers of encoder and of decoder", (1, 1000))
    heads: int = option(12, "attention heads of encoder and decoder", POSITIVE)
    mask_ratio: tuple[float, ...] = option((0.4, 0.6), "hidden share; 0 0 = none", SHARE, nargs=2)
    drop_path: float = option(0.05, "stochastic depth of the decoder's last layer", BELOW_1)
    # Latent space (Tab. 6)
    num_latents: int = option(128, "latent tokens K", POSITIVE)
    latent_dim: int = option(64, "numbers per latent token d", POSITIVE)
    sigma: float = option(0.3, "std of the noise on the latents (Eq. 1)")
    # Normalizing flow (Tab. 6): Improved STARFlow-L
    flow_width: int = option(1024, "channels of the flow", POSITIVE)
    flow_depths: tuple[int, ...] = option((2,) * 7 + (20,), "layers a block", (1, 1000), nargs="+")
    flow_head_dim: int = option(64, "size of an attention head of the flow", POSITIVE)
    gated: bool = option(True, "gated attention (Tab. 1)")
    scale: str = option("exp", "scale of the affine map (Tab. 1)", choices=SCALES)
    # The second prior (emigm.py), in place of the flow, on the latents of a frozen autoencoder
    prior: str = option("flow", "or emigm, without density", choices=("flow", "emigm"))
    emigm_width: int = option(1024, "channels of its Transformer", POSITIVE)
    emigm_heads: int = option(16, "its attention heads", POSITIVE)
    emigm_depths: tuple[int, ...] = option((16, 16), "its encoder, decoder", (1, 1000), nargs=2)
    emigm_buffer: int = option(32, "class tokens in front", POSITIVE)
    emigm_head: tuple[int, ...] = option((1280, 8), "its head: channels, blocks", POSITIVE, nargs=2)
    emigm_schedule: str = option("exp", "how many are hidden at a time", choices=SCHEDULES)
    emigm_t_min: float = option(0.2, "least time in training: how few are hidden", SHARE)
    emigm_repeats: int = option(4, "times and noises a token in training", POSITIVE)
    emigm_steps: int = option(16, "steps of sampling", POSITIVE)
    emigm_interval: tuple[float, ...] = option((0.1, 0.3), "guided: [lo, hi)", SHARE, nargs=2)
    # Losses (Tab. 7)
    nll_weight: float = option(1.0, "weight of L_NLL in Eq. 6")
    nll_warmup: int = option(0, "steps over which that weight grows from 0; paper: 0")
    mask_warmup: int = option(0, "steps over which both ends of --mask-ratio grow from 0; paper: 0")
    label_drop: float = option(0.1, "probability to train a label as unconditional", SHARE)
    mim_weight: float = option(1.0, "weight of pixels in masked patches (App. C.2)")
    perceptual_weight: float = option(1.1, "weight of LPIPS in Eq. 5; 0 = none")
    teachers: tuple[str, ...] = option(("dino", "clip"), "Eq. 7; also TorchScript files", nargs="*")
    teacher_weight: float = option(1.0, "weight of each teacher's loss in phase 1 (Eq. 7)")
    aux_width: int = option(1024, "channels of the auxiliary decoders", POSITIVE)
    gan_weight: float = option(0.05, "weight of L_GAN in phase 2 (Eq. 8); 0 = no discriminator")
    # Weight files of the frozen networks; left out: torch.hub's cache, else downloaded
    vgg: str | None = option(None, "VGG16 of LPIPS (vgg16-397923af.pth)", metavar="FILE")
    dino: str | None = option(None, "DINOv2 (dinov2_vitb14_pretrain.pth)", metavar="FILE")
    clip: str | None = option(None, "CLIP (ViT-B-16.pt)", metavar="FILE")
    # Optimizer (Tab. 7)
    epochs: float = option(90, "passes over the data; --steps overrides it", POSITIVE)
    steps: int | None = option(None, "training steps", POSITIVE)
    batch_size: int = option(256, "images per step, over all processes", POSITIVE)
    grad_accum: int = option(1, "parts a process's share of the batch is split into", POSITIVE)
    lr: float = option(1e-4, "learning rate of AdamW", POSITIVE)
    lr_warmup: int = option(0, "steps over which it grows from 0; paper: 0")
    lr_decay: float = option(0.0, "last share of the steps, where it falls to 0; paper: 0", SHARE)
    beta1: float = option(0.9, "AdamW beta 1", BELOW_1)
    beta2: float = option(0.95, "AdamW beta 2", BELOW_1)
    weight_decay: float = option(1e-4, "AdamW weight decay")
    grad_clip: float = option(1.0, "largest norm of the gradient", POSITIVE)
    ema: float = option(0.9999, "decay of the weights' moving average, per step", SHARE)
    seed: int = option(0, "seed of weights, data order, masks and noise", (0, 2**63 - 1))
    # The run
    guidance: float = option(2.0, "of the sample grids, and sample.py's default; 0 = none")
    out: str | None = option(None, "its folder (default: runs/PRESET[-decoder])", metavar="FOLDER")
    save_every: int = option(5000, "steps between checkpoints", POSITIVE)
    log_every: int = option(100, "steps between lines of log.jsonl", POSITIVE)
    sample_every: int = option(5000, "steps between sample grids", POSITIVE)
    device: str | None = option(None, "cuda, mps or cpu (default: the first there is)")
    compile: bool = option(False, "compile the model with torch.compile")

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def run_dir(self) -> Path:
        return Path(self.out or f"runs/{self.preset}{'-decoder' * (self.phase == 'decoder')}")


LAPTOP = "shapes"  # the preset of plain `python train.py`; Config() alone is the paper's run
FROZEN = dict(num_classes=1000, freeze_autoencoder=True, perceptual_weight=0.0, teachers=())

# fmt: off
# A preset lists what it changes. These are shared by those that need no download.
SMALL = dict(
    patch_size=4, heads=4, drop_path=0.0, guidance=1.0, save_every=500, sample_every=500,
    # paper: 1.0, beside LPIPS and two teachers. Here, against MSE alone, 1.0 makes mu collapse: the
    # flow prefers a latent without information. Ramps of it and of masks let the autoencoder lead.
    nll_weight=0.01, perceptual_weight=0.0, teachers=(),
    # paper: constant rate, with an EMA over 10,000 steps. Here there are few steps.
    lr_warmup=50, lr_decay=0.5, weight_decay=0.0,
)
PRESETS: dict[str, dict[str, Any]] = {
    LAPTOP: dict(
        SMALL, image_size=32, num_workers=0, width=96, depth=2, num_latents=16, latent_dim=8,
        flow_width=96, flow_depths=(1, 1, 1, 3), flow_head_dim=24, nll_warmup=500, mask_warmup=900,
        aux_width=128, steps=3000, batch_size=16, lr=2e-3, ema=0.995, log_every=20,
    ),
    # One's own pictures, on one GPU or overnight on a CPU. As in the paper, a latent has 1/24 of
    # the numbers of its picture, and 256 patches: to hide small ones costs a picture least.
    "photos": dict(
        SMALL, image_size=64, num_workers=4, width=128, depth=3, num_latents=32, latent_dim=16,
        flow_width=192, flow_depths=(1, 1, 1, 5), flow_head_dim=32, guidance=2.0, nll_warmup=1000,
        mask_warmup=1000, aux_width=256, steps=20_000, batch_size=32, lr=1e-3, ema=0.999,
    ),
    "mimflow-l": dict(num_classes=1000),
    # On the latents of a finished autoencoder (--init): no picture is decoded, none is judged.
    "starflow-l": dict(FROZEN, gated=False, scale="softplus"),  # STARFlow's own form
    "emigm-l": dict(FROZEN, prior="emigm", guidance=3.0),
}
PRESETS["captions"] = PRESETS[LAPTOP] | dict(  # more to tell apart: longer latents, cheaper
    caption_words=8, latent_dim=16, nll_weight=0.005, steps=6000, guidance=2.0)
# Small patches, a flow too small for its latents: there, after phase 2, masks pay (docs/claims.md).
PRESETS["masks"] = PRESETS[LAPTOP] | dict(flow_head_dim=16, mask_warmup=500, steps=4000,
    image_size=36, patch_size=3, num_latents=32, latent_dim=16, flow_width=32, flow_depths=(1, 1))

# What --prior emigm changes in a preset.
EMIGM: dict[str, dict[str, Any]] = dict.fromkeys((LAPTOP, "photos", "masks"), dict(
    emigm_width=96, emigm_heads=4, emigm_depths=(2, 3), emigm_buffer=4, emigm_head=(96, 3),
    # K is small: exp would hide all tokens in half of the pictures, and never show many.
    emigm_schedule="cosine", emigm_t_min=0.0, emigm_steps=8, emigm_interval=(0.0, 1.0), lr=5e-4,
))

# What --phase decoder changes in a preset (Tab. 7, right column).
DECODER_PHASE: dict[str, dict[str, Any]] = {"mimflow-l": dict(epochs=2)} | dict.fromkeys(
    # paper: 0.05, beside LPIPS. Against MSE alone 0.005 already paints a grid of artefacts.
    (LAPTOP, "photos", "captions", "masks"),
    dict(steps=600, mask_warmup=0, lr=3e-4, gan_weight=0.001))

# Fields that may change when a run is continued; any other difference makes it another run.
MAY_CHANGE = {
    "data", "num_workers", "skip_bad_images", "vgg", "dino", "clip", "epochs", "steps",
    "grad_accum", "guidance", "out", "save_every", "log_every", "sample_every", "device", "compile",
}
# fmt: on


def preset_config(preset: str, **changes: Any) -> Config:
    """The Config of a preset, with some fields changed."""
    more = DECODER_PHASE.get(preset, {}) if changes.get("phase") == "decoder" else {}
    more = EMIGM.get(preset, {}) if changes.get("prior") == "emigm" else more
    return Config(**{"preset": preset, **PRESETS[preset], **more, **changes})


def unbuildable(config: Config, most: float = float("inf")) -> str | None:
    """Why there can be no model with these sizes and `most` weights at most."""
    if problem := runs.out_of_range(config):
        return problem
    for name in ("mask_ratio", "emigm_interval"):
        if len(pair := getattr(config, name)) != 2 or pair[0] > pair[1]:
            return f"{flag(name)} needs LOW <= HIGH, got {shown(pair)}"
    try:  # the networks say themselves which of their sizes do not fit
        with torch.device("meta"):
            count = count_parameters(MIMFlow(replace(config, num_classes=config.num_classes or 0)))
    except (ValueError, RuntimeError) as error:
        return f"no such model can be built: {error}"
    return "more weights than the file holds" if count > most else None


def check_config(config: Config) -> None:
    """End with exit code 2 on what cannot work, before anything is loaded or written."""
    c, problem = config, unbuildable(config)
    if empty := [flag(k) for k, v in asdict(c).items() if v == ""]:  # a shell's unset variable
        problem = f"{empty[0]} is empty: leave it out, or give it a value"
    known = {*TEACHERS, *(x for x in c.teachers if Path(x).is_file())}
    if odd := [x for x in c.teachers if x not in known or c.teachers.count(x) > 1]:
        problem = f"--teachers {odd[-1]}: choose each of {', '.join(TEACHERS)}, FILE once at most"
    if c.prior == "emigm" and not c.freeze_autoencoder:
        # Its loss rewards z that is easy to predict, and no logdet pays for shrinking z: collapse.
        problem = "--prior emigm needs --freeze-autoencoder (and --init), and has no phase 2"
    if c.caption_words and (c.prior == "emigm" or c.num_classes == 0):
        problem = "--caption-words needs --prior flow, and words: leave --num-classes out"
    if c.phase == "decoder" and c.freeze_autoencoder:
        problem = "--phase decoder trains what --freeze-autoencoder freezes: choose one"
    if c.init is None and (c.phase == "decoder" or c.freeze_autoencoder):
        problem = "phase 2 and a frozen autoencoder begin with phase 1's model.pt: add --init CKPT"
    if c.perceptual_weight and c.image_size < Perceptual.MIN_SIDE:
        problem = f"LPIPS needs pictures of {Perceptual.MIN_SIDE} pixels: --perceptual-weight 0"
    if c.phase == "decoder" and c.gan_weight and c.image_size < PatchDiscriminator.MIN_SIDE:
        problem = f"the discriminator needs {PatchDiscriminator.MIN_SIDE} pixels: --gan-weight 0"
    if not problem and c.batch_size % (world_size() * c.grad_accum):
        parts = f"{world_size()} processes x --grad-accum {c.grad_accum}"
        problem = f"--batch-size {c.batch_size} is not divisible by {parts}"
    if problem:
        fail(problem, 2)


def resolve(c: Config) -> tuple[Config, Dataset]:
    """Fill in what the data decide, the number of classes and of steps; the data."""
    dataset = data.open_dataset(c.data, c.image_size, "train", c.seed, c.caption_words)
    found = len(dataset.class_names)
    classes = found if c.num_classes is None else c.num_classes
    if classes not in (0, found):
        source = c.data or "the built-in pictures, which are used without --data,"
        hint = f"{found}, or 0 for no labels" if found else "0, as there are no class folders"
        fail(f"--num-classes is {classes} but {source} have {found}: use {hint}", 2)
    steps = min(runs.MANY, max(1, round(c.epochs * len(dataset) / c.batch_size)))
    return replace(c, num_classes=classes, steps=c.steps or steps), dataset


# --------------------------------------------------------------------------------------------------
# What is random in a step
#
# All that is random in step s (`Draws`: masks, noise, dropped labels, drop-path) is drawn for the
# GLOBAL batch from one generator seeded with (seed, s); every process draws it all, takes its rows.
# So nothing random is saved, a resumed run is the uninterrupted one, on a CPU to the bit, and two
# processes are one up to rounding. (Order, flips of pictures: by seed and epoch, common/data.py.)


def derived_seed(*parts: int) -> int:
    """Integers mixed by numpy's SeedSequence to 63 bits, 32 of which torch reads on a CPU."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


def ramp(step: int, length: float) -> float:
    """Rise from 0 at step 0 to 1 at step `length`, then 1; always 1 if length is 0."""
    return min(1.0, step / length) if length else 1.0


class Draws(NamedTuple):
    """Everything random in one training step, for a batch of B images."""

    mask: Tensor  # (B, N) bool, True = hidden
    noise: Tensor  # (B, K, d) standard normal
    drop_label: Tensor  # (B,) bool
    branch_scales: Tensor  # (depth, 2, B) drop-path of the decoder
    tokens: TokenDraws | None = None  # of the second prior

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of images start..stop of the batch."""
        tokens = self.tokens and self.tokens.rows(start, stop)
        firsts = (x[start:stop] for x in self[:3])
        return Draws(*firsts, self.branch_scales[:, :, start:stop], tokens)


def draw_randomness(config: Config, step: int, device: torch.device) -> Draws:
    """Draw a step's randomness for the GLOBAL batch from a generator seeded with (seed, step)."""
    c, B = config, config.batch_size
    generator = torch.Generator(device).manual_seed(derived_seed(c.seed, step))
    low, high = (ratio * ramp(step, c.mask_warmup) for ratio in c.mask_ratio)
    # In this order: another one would draw other numbers, and every seed give another run.
    draws = Draws(
        mask=random_mask(B, c.grid**2, (low, high), generator),
        noise=torch.randn(B, c.num_latents, c.latent_dim, generator=generator, device=device),
        drop_label=torch.rand(B, generator=generator, device=device) < c.label_drop,
        branch_scales=drop_path_scales(B, c.depth, c.drop_path, generator),
    )
    if c.prior == "flow":
        return draws
    how = (c.emigm_schedule, c.emigm_t_min, c.emigm_repeats, generator)
    return draws._replace(tokens=draw_tokens(B, c.num_latents, c.latent_dim, *how))


def draws_of_pictures(
    config: Config, numbers: Iterable[int], seed: int, device: torch.device
) -> Draws:
    """Draws for evaluating, past the warm-up of the mask: picture number n of a dataset has its
    own, from (seed, n), whatever is beside it and on every device."""
    # A batch of one each, on the CPU. draw_randomness derives its seed from this one once more, so
    # that picture n does not meet the stream of training step n. prior="flow": no TokenDraws.
    one = replace(config, batch_size=1, mask_warmup=0, prior="flow")
    seeds = (derived_seed(seed, n) for n in numbers)
    each = [draw_randomness(replace(one, seed=s), 0, torch.device("cpu")) for s in seeds]
    mask, noise, drop_label, branch_scales, _ = zip(*each, strict=True)
    joined = (*map(torch.cat, (mask, noise, drop_label)), torch.cat(branch_scales, dim=2))
    return Draws(*(x.to(device) for x in joined))


def sample_noise(seed: int, indices: range, num_latents: int, latent_dim: int) -> Tensor:
    """Noise u (len(indices), K, d) of samples number `indices`: each has a generator of its own,
    so that sample i is the same whichever process draws it and whatever is drawn beside it."""
    # The 1 keeps these streams apart from those of the training steps. (A 0 would not: to
    # SeedSequence, (seed, i, 0) and (seed, i) are the same.)
    generators = (torch.Generator().manual_seed(derived_seed(seed, i, 1)) for i in indices)
    return torch.stack([torch.randn(num_latents, latent_dim, generator=g) for g in generators])


# --------------------------------------------------------------------------------------------------
# The model


class MIMFlow(nn.Module):
    """Encoder, flow and decoder: what a checkpoint holds, and all that sampling needs. With the
    second prior (emigm.py) `emigm` takes the place of `flow`, which is None then."""

    def __init__(self, config: Config, class_names: Iterable[str] = ()):
        super().__init__()
        c = config
        self.config, self.class_names, self.step = config, tuple(class_names), 0
        vit = dict(image_size=c.image_size, patch_size=c.patch_size, width=c.width, depth=c.depth)
        vit |= dict(heads=c.heads, num_latents=c.num_latents, latent_dim=c.latent_dim)
        flow = dict(depths=c.flow_depths, head_dim=c.flow_head_dim, gated=c.gated, scale=c.scale)
        flow |= dict(num_classes=c.num_classes, caption_words=c.caption_words)
        self.encoder = MaskedEncoder(**vit)
        self.flow = self.emigm = None
        if c.prior == "flow":
            self.flow = NormalizingFlow(c.num_latents, c.latent_dim, c.flow_width, **flow)
            self.flow.requires_grad_(c.phase == "joint")
        else:
            sizes = (c.emigm_width, c.emigm_heads, *c.emigm_depths, c.emigm_buffer, *c.emigm_head)
            self.emigm = MaskedPrior(c.num_latents, c.latent_dim, *sizes, c.num_classes)
        self.decoder = Decoder(**vit, drop_path=c.drop_path)
        # What stands still: in phase 2 all but the decoder, in the baseline all but the flow.
        self.encoder.requires_grad_(c.phase == "joint" and not c.freeze_autoencoder)
        self.decoder.requires_grad_(not c.freeze_autoencoder)

    def latents(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """mu and z = mu + sigma * noise (Eq. 1), (B, K, d) each, of masked images (B, 3, H, W)."""
        mu = self.encoder(images, draws.mask)
        return mu, mu + self.config.sigma * draws.noise

    @torch.no_grad()
    def sample(
        self, noise: Tensor, labels: Tensor | None, guidance: float = 0, denoise=False, **how: Any
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] from noise u (B, K, d) and labels, -1 = none.

        `guidance`, `how` as in NormalizingFlow.inverse or MaskedPrior.sample; `denoise`: TARFlow's.
        """
        if self.flow is not None:
            z = self.flow.inverse(noise, labels, guidance, **how)
        else:
            c = self.config
            preset = dict(interval=c.emigm_interval, steps=c.emigm_steps, schedule=c.emigm_schedule)
            z = self.emigm.sample(noise, labels, guidance, **{**preset, **how})
        z = self.denoise(z, labels) if denoise else z
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


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema += (1 - decay) (model - ema), in place. paper: decay 0.9999 throughout; here: at most
    (1 + step) / (10 + step), or the first weights would weigh on it for tens of thousands more."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        average.copy_(buffer)


# --------------------------------------------------------------------------------------------------
# The objectives of the two phases
#
# Each is a module whose forward is one training step up to the scalar loss: one thing to compile
# and one to wrap in DistributedDataParallel, whose gradient averaging is tied to a forward call.
# They return the loss, what log.jsonl holds, the painted images; only the loss has a gradient.


def paint(objective: nn.Module, images: Tensor, z: Tensor, draws: Draws) -> tuple[Any, Any, dict]:
    """D(z) (B, 3, H, W), its L_recon (Eq. 5) of both phases, (B,), and the terms for the log."""
    model, frozen, c = objective.model, objective.frozen, objective.model.config
    if c.freeze_autoencoder:  # the baseline's decoder has nothing to learn
        return None, 0.0, {}
    painted = model.decoder(z, draws.branch_scales)
    recon = losses.pixel_loss(images, painted)
    logs = {"mse": recon}  # the plain one, so that runs with other weights compare
    if c.mim_weight != 1:
        recon = losses.pixel_loss(images, painted, draws.mask, c.mim_weight)  # App. C.2
    if frozen.perceptual is not None:
        logs["lpips"] = frozen.perceptual(images, painted)
        recon = losses.reconstruction_loss(recon, logs["lpips"], c.perceptual_weight)
    return painted, recon, logs


class JointTraining(nn.Module):
    """Phase 1: Eq. 4 to 7 as one forward pass (Fig. 2); frozen, or without a flow: baselines."""

    def __init__(self, model: MIMFlow, frozen: FrozenNetworks):
        super().__init__()
        c = model.config
        self.model, self.frozen = model, frozen
        sizes = (c.grid**2, c.num_latents, c.latent_dim, c.aux_width)
        decoders = {k: AuxiliaryDecoder(*sizes, t.width) for k, t in frozen.teachers.items()}
        self.auxiliary = nn.ModuleDict(decoders)

    def forward(
        self, images: Tensor, labels: Tensor, draws: Draws, nll_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """images (B, 3, H, W) in [-1, 1], labels (B,) -> L_joint + L_aux, a scalar, logs, painted
        images (B, 3, H, W) or None. `nll_weight` grows with the step, so it is given."""
        model, c = self.model, self.model.config
        mu, z = model.latents(images, draws)  # Eq. 1, (B, K, d)
        # Dropped labels (-1) train the null class, or empty caption, that guidance compares with.
        labels = torch.where(draws.drop_label.view(-1, *[1] * (labels.dim() - 1)), -1, labels)
        # Over the images of this forward pass: compare equal batch sizes only. Near 0 the latent
        # has collapsed: the flow is content and the picture is lost.
        mu_std = losses.at_least_float32(mu.detach()).std(dim=0, correction=0).mean()
        if model.flow is None:
            slots = visible_slots(c.num_latents, c.emigm_schedule, c.emigm_t_min)
            loss = model.emigm(z, labels, draws.tokens, slots).mean()
            return loss, {"loss": loss.detach(), "mu_std": mu_std}, None
        # The decoder goes first if there is LPIPS, which needs 6 GB for a moment, as the flow will.
        # Else it goes last: gradients of z then add up as in older runs, to the bit.
        early = paint(self, images, z, draws) if self.frozen.perceptual is not None else None
        outputs, logdet = model.flow.intermediates(z, labels)  # u is the last output
        nll_square, nll_logdet = losses.flow_nll(outputs[-1], logdet)  # Eq. 4, (B,) each
        nll = nll_square + nll_logdet
        painted, recon, logs = early or paint(self, images, z, draws)
        loss = losses.joint_loss(recon, nll, nll_weight)  # Eq. 6
        for name, teacher in self.frozen.teachers.items():
            predicted, target = self.auxiliary[name](z), teacher(images)  # (B, N, C_t) each
            logs[f"aux_{name}"] = losses.auxiliary_loss(predicted, target, draws.mask)  # Eq. 7
            loss = loss + c.teacher_weight * logs[f"aux_{name}"]

        logs.update(loss=loss, nll=nll, nll_square=nll_square, nll_logdet=nll_logdet)
        logs = {name: value.detach().mean() for name, value in logs.items()}
        # Per-block mean square: 1 at the end is a flow that reaches the unit Gaussian.
        logs["block_mean_square"] = torch.stack([x.detach().square().mean() for x in outputs])
        logs["mu_std"] = mu_std
        return loss.mean(), logs, None if painted is None else painted.detach()


class DecoderTraining(nn.Module):
    """Phase 2, the decoder's side: Eq. 8 on latents that come, as in phase 1, from MASKED images
    with noise: the decoder goes on seeing what the flow has learned to produce."""

    def __init__(self, model: MIMFlow, frozen: FrozenNetworks, *opponent: PatchDiscriminator):
        super().__init__()
        self.model, self.frozen = model, frozen
        self.opponent = opponent  # a tuple: its weights belong to the other player, not to this

    def forward(
        self, images: Tensor, labels: Tensor, draws: Draws, nll_weight: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As JointTraining.forward, with L_ft (Eq. 8); labels and nll_weight play no part."""
        c = self.model.config
        with torch.no_grad():
            _, z = self.model.latents(images, draws)  # (B, K, d)
        painted, loss, logs = paint(self, images, z, draws)
        for discriminator in self.opponent:  # one, or none
            # Detached weights: this loss moves the painting, never its judge.
            weights = {name: p.detach() for name, p in discriminator.named_parameters()}
            logits = torch.func.functional_call(discriminator, weights, (painted,))
            logs["gan"] = losses.generator_loss(logits)
            loss = losses.finetune_loss(loss, logs["gan"], c.gan_weight)  # Eq. 8
        logs["loss"] = loss
        logs = {name: value.detach().mean() for name, value in logs.items()}
        return loss.mean(), logs, painted.detach()


# --------------------------------------------------------------------------------------------------
# A step of training


class Player:
    """An objective with its optimizer; phase 1 has one, phase 2 two that play against each other.
    `forward` is what the loop calls, the module or what `distribute` has wrapped around it. `saved`
    goes into last.pt: networks of its `own` as named there, the optimizer as {name}optimizer."""

    def __init__(self, module: nn.Module, c: Config, name: str = "", **own: nn.Module):
        self.module = self.forward = module
        # AdamW (Tab. 7), fused: only that obeys `found_inf`, by which `update` skips a step.
        weights, betas = [p for p in module.parameters() if p.requires_grad], (c.beta1, c.beta2)
        self.optimizer = torch.optim.AdamW(weights, c.lr, betas, 1e-8, c.weight_decay, fused=True)
        self.saved = {f"{name}optimizer": self.optimizer, **own}


def make_players(model: MIMFlow, frozen: FrozenNetworks, device: torch.device) -> list[Player]:
    """The objectives of the configured phase, on the device of the model."""
    c = model.config
    if c.phase == "joint":
        joint = JointTraining(model, frozen).to(device)
        return [Player(joint, c, auxiliary=joint.auxiliary)]
    if not c.gan_weight:
        return [Player(DecoderTraining(model, frozen), c)]
    # channels_last is the layout in which bfloat16 convolutions are fastest on a GPU.
    discriminator = PatchDiscriminator().to(device, memory_format=torch.channels_last)
    # Else each GPU would normalise by its own few pictures. Not implemented on the CPU.
    if device.type == "cuda" and world_size() > 1:
        discriminator = nn.SyncBatchNorm.convert_sync_batchnorm(discriminator)
    painter = DecoderTraining(model, frozen, discriminator)
    judge = DiscriminatorTraining(discriminator)
    return [Player(painter, c), Player(judge, c, "discriminator_", discriminator=discriminator)]


def distribute(module: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """`module` as the loop calls it: compiled if asked for, gradients averaged over processes."""
    module = torch.compile(module) if config.compile else module
    if world_size() > 1:
        # Newer torch has another name for this flag, but still takes the old one.
        warnings.filterwarnings("ignore", ".broadcast_buffers.", FutureWarning)
        on = [device] if device.type == "cuda" else None
        # Buffers are constants. Gradients are views of what is sent.
        how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
        module = DistributedDataParallel(module, device_ids=on, **how)
    return module


def learning_rate(c: Config, step: int) -> float:
    """Constant (Tab. 7) between a linear warm-up and a linear decay to 0, both off in the paper."""
    return c.lr * ramp(step + 1, c.lr_warmup) * ramp(c.steps - step, c.lr_decay * c.steps)


def accumulate_gradients(
    players: list[Player], config: Config, images: Tensor, labels: Tensor, step: int
) -> dict[str, Tensor]:
    """Gradients of the mean over the global batch, and the logs of this process's rows, images
    (share, 3, H, W) and labels (share,). The parts of a process add up (--grad-accum), and with the
    last part DDP averages over processes while the backward pass still runs."""
    c, share, device = config, len(images), images.device
    draws = draw_randomness(config, step, device).rows(rank() * share, (rank() + 1) * share)
    # A tensor, since compiled code is compiled anew for each new number.
    nll_weight = torch.full((), c.nll_weight * ramp(step, c.nll_warmup), device=device)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=runs.uses_bf16(device))
    size, logs = share // c.grad_accum, []
    for first in range(0, share, size):
        stop = first + size
        for player in players if world_size() > 1 else []:
            player.forward.require_backward_grad_sync = stop == share  # what DDP.no_sync() sets
        inputs = (images[first:stop], labels[first:stop], draws.rows(first, stop), nll_weight)
        with bf16:
            loss, part_logs, painted = players[0].forward(*inputs)
        (loss / c.grad_accum).backward()  # parts are equal: the mean of means is the mean
        for opponent in players[1:]:  # answers the same pictures; both move in `update`
            with bf16:
                loss, more_logs = opponent.forward(inputs[0], painted)
            (loss / c.grad_accum).backward()
            part_logs.update(more_logs)
        logs.append(part_logs)
    return {name: torch.stack([entry[name] for entry in logs]).mean(dim=0) for name in logs[0]}


def update(players: list[Player], config: Config, lr: float) -> tuple[Tensor, Tensor]:
    """A step of every optimizer with clipped gradients -> the norm of the first player's gradient;
    1.0 if any gradient was not finite, else 0.0: then nothing moves (found_inf, decided on the
    device, as GradScaler does). Norms are of averaged gradients: all processes decide alike."""
    norms = [nn.utils.clip_grad_norm_(p.module.parameters(), config.grad_clip) for p in players]
    not_finite = 1 - torch.stack(norms).isfinite().all().float()
    for optimizer in (player.optimizer for player in players):
        optimizer.param_groups[0]["lr"] = float(lr)  # the only group
        optimizer.found_inf = not_finite
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms[0], not_finite


# --------------------------------------------------------------------------------------------------
# Checkpoints
#
#   last.pt      format, step, config, class_names, model, ema, optimizer, skipped, and auxiliary
#                (phase 1) or discriminator and discriminator_optimizer (phase 2): to go on from
#   previous.pt  the last.pt before it, in case that one is damaged
#   model.pt     format, step, config, class_names, model (= the EMA weights): what one shares


def saved_parts(model: MIMFlow, ema: MIMFlow, players: list[Player]) -> dict[str, Any]:
    """What a step changes and the next one needs, by its name in last.pt (counts apart)."""
    saved = [part for player in players for part in player.saved.items()]
    return {"model": model, "ema": ema, **dict(saved)}


def save(parts: dict[str, Any], step: int, skipped: int) -> None:
    """Write last.pt and model.pt of the run."""
    config, names = parts["model"].config, list(parts["model"].class_names)
    head = dict(format=CHECKPOINT_FORMAT, step=step, config=asdict(config), class_names=names)
    full = {**head, **{k: part.state_dict() for k, part in parts.items()}, "skipped": skipped}
    runs.write_checkpoints(config.run_dir, full)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], Config]:
    """The dictionary of a sound checkpoint and its configuration; one line for what is wrong."""
    checkpoint, config = runs.read_checkpoint(path, Config, RETIRED, CHECKPOINT_FORMAT)
    problem, count = unbuildable(config, path.stat().st_size), len(checkpoint["class_names"])
    if not problem and config.num_classes not in (0, count):
        problem = f"{count} class names, but --num-classes {config.num_classes}"
    if problem:
        fail(f"{path} was edited, or made by another version: {problem}")
    return checkpoint, config


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> MIMFlow:
    """The model of model.pt (or last.pt), with its EMA weights, in eval mode on `device`. It has
    .encoder, .flow (or .emigm), .decoder, .config, .class_names and .step."""
    runs.require_sound(Path(path))
    checkpoint, config = read_checkpoint(Path(path))
    model = MIMFlow(config, checkpoint["class_names"])
    runs.load_state(model, checkpoint.get("ema", checkpoint["model"]), path)
    model.step = checkpoint["step"]
    # Phase 2 has frozen the flow. But autocast keeps the bfloat16 copies only of weights that may
    # need gradients; without them, sampling would cast all weights again for every token.
    return model.requires_grad_().to(device).eval()


def begin_from(trained: MIMFlow, model: MIMFlow) -> None:
    """Take over the networks of --init; refuse those of another architecture, naming what differs.
    Phase 2 also needs the same flow and the same latents (sigma, masks)."""
    parts = ["encoder", "decoder"]
    fit = "image_size patch_size width depth heads num_latents latent_dim "  # what must be the same
    if model.config.phase == "decoder":  # the baseline of Tab. 1 trains a flow of its own
        parts += ["flow"]
        fit += "prior flow_width flow_depths flow_head_dim num_classes gated scale sigma mask_ratio"
        fit += " caption_words"
    there = {name: getattr(trained.config, name) for name in fit.split()}
    if differing := [k for k, v in there.items() if v != getattr(model.config, k)]:
        named = ", ".join(f"{flag(k)} {shown(there[k])}" for k in differing)
        fail(f"the model of --init has {named}: add these flags", 2)
    if "flow" in parts and model.config.num_classes and model.class_names != trained.class_names:
        fail("the model of --init was trained on other classes than those of --data")
    for part in parts:
        getattr(model, part).load_state_dict(getattr(trained, part).state_dict())


def fit_prior(model: MIMFlow, device: torch.device) -> None:
    """Tell the second prior mean and std of the latents of training pictures as they are."""
    c, z = model.config, []
    pictures = data.TrainingPictures(data.open_dataset(c.data, c.image_size), c.skip_bad_images)
    count = len(pictures.dataset)
    for some in torch.arange(0, count, max(1, count // FITTED)).split(64):
        images = from_uint8(torch.stack([pictures[None, n][0] for n in some.tolist()]))
        draws = draws_of_pictures(c, some.tolist(), c.seed, device)
        with torch.no_grad():
            z.append(model.latents(images.to(device, draws.noise.dtype), draws)[1].cpu())
    model.emigm.fit(torch.cat(z))


def earlier_work(config: Config, class_names: tuple[str, ...]) -> dict[str, Any] | None:
    """The checkpoint to go on from, None in a fresh run folder; refuses what does not fit, naming
    every field that differs."""
    run_dir, found = config.run_dir, runs.find_last(config.run_dir)
    other = "use --out FOLDER for a new run or --overwrite to replace"
    if found is None:
        if (run_dir / "model.pt").exists():
            fail(f"{run_dir} holds a model.pt but no last.pt to go on from: {other} it", 2)
        return None
    checkpoint, stored = read_checkpoint(found)  # find_last has looked
    if checkpoint["config"].get("convnext_mix"):
        fail(f"{found} was trained with --convnext-mix, which is gone: go on with commit f59eff8")
    stored, now = asdict(stored), asdict(config)
    if names := [k for k in now if k not in MAY_CHANGE and stored[k] != now[k]]:
        named = "; ".join(f"{flag(k)} {stored[k]} there, {now[k]} now" for k in names)
        what = f"{run_dir} holds a run of another configuration ({named})"
        fail(f"{what}: nothing was changed; {other} this one", 2)
    if not isinstance(n := checkpoint.get("skipped"), int) or not 0 <= n <= checkpoint["step"]:
        fail(f"{found} is a model.pt, not a last.pt: {other} this run")
    if config.num_classes and tuple(checkpoint["class_names"]) != class_names:
        fail(f"{run_dir} was trained on other classes than those of --data: --out or --overwrite")
    return checkpoint


# --------------------------------------------------------------------------------------------------
# Training


def sample_grid(ema: MIMFlow, device: torch.device, done: int, dataset: Dataset) -> None:
    """Write a grid of EMA samples, always of the same noise and labels: one sees them improve."""
    c = ema.config
    labels = data.shown_labels(dataset, c.num_classes).repeat_interleave(8, dim=0)
    noise = sample_noise(c.seed, range(len(labels)), c.num_latents, c.latent_dim)
    images = ema.sample(noise.to(device), labels.to(device), c.guidance)
    data.save_png(images, 8, c.run_dir / "samples" / f"step_{done:07d}.png")


def write_log(config: Config, line: dict[str, Any], bar: Any) -> None:
    """Add a line to log.jsonl, and show its most telling numbers."""
    runs.append_line(config.run_dir / "log.jsonl", json.dumps(line))
    keys = ("loss", "mse", "lpips", "nll", "mu_std", "gan", "discriminator")
    bar.set_postfix_str(text := "  ".join(f"{key} {line[key]:.4f}" for key in keys if key in line))
    if bar.disable:
        say(f"step {line['step']}/{config.steps}  {text}  {line['ms_per_step']:.0f} ms")


def main(config: Config, overwrite: bool = False) -> None:
    """Train the phase of `config` from the first step, or go on from last.pt, to config.steps."""
    # Set-up: device, data, earlier work. All that can be wrong is found before anything is written.
    check_config(config)
    device = runs.select_device(config.device)
    config, dataset = resolve(config)
    c, last, model_path = config, config.run_dir / "last.pt", config.run_dir / "model.pt"
    overwrite = overwrite and runs.restarts() == 0  # what torchrun starts again is this very run
    saved = runs.require_own_folder(c.run_dir, "num_latents", c.data)
    earlier = None if overwrite else earlier_work(config, dataset.class_names)
    if earlier is not None and earlier["step"] >= c.steps:
        runs.mend_shared(c.run_dir, earlier)
        done = f"{c.run_dir} is finished ({earlier['step']} steps)"
        return say(f"{done}: --steps N goes on, --overwrite starts again")
    if overwrite and c.init is not None and Path(c.init).resolve().parent == c.run_dir.resolve():
        fail(f"--overwrite would delete --init {c.init}: use --out for another folder", 2)
    # At the very least: weights and EMA; the pictures, and two activations of every layer.
    with torch.device("meta"):
        weights = count_parameters(MIMFlow(config))
    values = 3 * c.image_size**2 + 4 * c.depth * (c.grid**2 + c.num_latents) * c.width
    runs.require_memory(8 * weights + 4 * values * c.batch_size // world_size() // c.grad_accum)
    # A run that goes on has its own, later weights in last.pt.
    trained = load_checkpoint(c.init) if c.init is not None and earlier is None else None
    # Before the processes join: a download may take longer than they would wait for one another.
    frozen = losses.load_frozen_networks(config, device)
    runs.start_processes(device)

    # Model, moving average, players. Weights have the default dtype: float32, in tests 64.
    torch.manual_seed(c.seed)
    model = MIMFlow(config, dataset.class_names)
    if trained is not None:
        begin_from(trained, model)
    model = model.to(device)
    if model.emigm is not None and earlier is None:
        fit_prior(model, device)
    # The average is what is sampled from and shared. All processes made the same from the seed.
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    players = make_players(model, frozen, device)
    parts, start = saved_parts(model, ema, players), 0
    skipped = runs.SkippedSteps(device)
    lock = runs.claim_folder(c.run_dir, saved)
    if earlier is not None:
        for name, part in parts.items():
            runs.load_state(part, earlier.get(name), f"{last}, {name}")
        start, skipped = earlier["step"], runs.SkippedSteps(device, earlier["skipped"])
        say(f"continuing {c.run_dir} after step {start}")
    del earlier, trained
    # Wrapped last: DDP sends what has been loaded, and optimizers and files hold the bare modules.
    for player in players:
        player.forward = distribute(player.module, config, device)

    # Data: this process's rows of every global batch.
    on_cuda, dtype = device.type == "cuda", torch.get_default_dtype()
    steps, how = range(start, c.steps), dict(num_workers=c.num_workers, pin_memory=on_cuda)
    loader = data.training_loader(dataset, c.batch_size, steps, c.seed, c.skip_bad_images, **how)
    plan = f"steps {start}..{c.steps} of {c.batch_size} on {world_size()} x {device}"
    kind, size = "words" if c.caption_words else "classes", f"{count_parameters(model) / 1e6:.2f} M"
    say(f"{c.run_dir}: {len(dataset)} pictures, {c.num_classes} {kind}; {size} parameters; {plan}")
    # The run folder changes only now that everything needed is there, and read by all processes.
    runs.require_same_step(start)
    if rank() == 0:
        if overwrite:
            runs.start_over(c.run_dir)
        runs.cut_log(c.run_dir / "log.jsonl", start)
        runs.write_text(c.run_dir / "config.json", json.dumps(asdict(config), indent=1))

    # The loop: gradients, update, EMA. Nothing in it waits for the GPU but logging, sampling and
    # saving: the host stays ahead and keeps the device busy.
    logged, since, complete, stopped_by = start, time.perf_counter(), True, 0
    broken, stop = data.BrokenImages(len(dataset)), runs.StopSignal()
    bar = runs.progress(None, "training", total=c.steps, initial=start)
    for step, (images, labels, bad) in zip(steps, loader, strict=True):
        done, at_end = step + 1, step + 1 == c.steps
        broken.add(bad)
        images = from_uint8(images.to(device, non_blocking=on_cuda))  # (share, 3, H, W)
        images, labels = images.to(dtype), labels.to(device, non_blocking=on_cuda)
        labels = labels if c.num_classes else torch.full_like(labels, -1)
        logs = accumulate_gradients(players, config, images, labels, step)
        lr = learning_rate(config, step)
        norm, not_finite = update(players, config, lr)
        update_ema(ema, model, c.ema, step)  # after a skipped step too: towards what stood still
        skipped.add(not_finite)
        if device.type == "cpu" or done % c.log_every == 0 or at_end:
            skipped.tell(done, last)  # ten in a row end the run
        bar.update()

        # Log, sample, save; a signal saves too, and ends the run.
        if done % c.log_every == 0 or at_end:
            line = {"step": done, "lr": lr, "grad_norm": float(norm), "skipped": int(skipped.total)}
            line |= {k: runs.mean_over_processes(value).tolist() for k, value in logs.items()}
            if c.skip_bad_images:
                line["bad_images"] = broken.count_of_all()
            taken, since = time.perf_counter() - since, time.perf_counter()
            line["ms_per_step"], logged = round(1000 * taken / (done - logged), 1), done
            if rank() == 0:
                runs.attempt("log.jsonl", write_log, config, line, bar)
        # Rank 0 alone samples and writes; the others wait for it at the next gradient.
        if rank() == 0 and (done % c.sample_every == 0 or at_end):
            runs.attempt("a grid of samples", sample_grid, ema, device, done, dataset)
        # Asked at every step: a process that left alone would leave the others waiting. While
        # gradients are not finite no save is due, so that both checkpoints are from before.
        stopped_by = stop.agreed()
        due = at_end or stopped_by or (done % c.save_every == 0 and skipped.in_a_row == 0)
        if rank() == 0 and due:
            complete = runs.attempt("a checkpoint", save, parts, done, int(skipped.total))
        if stopped_by:
            break

    # A clean end: the loader's workers and the DDP modules go before the process group does.
    bar.close()
    del loader, parts, players, player, lock
    runs.stop_processes()
    stop.restore()
    if not complete:
        fail(f"the end of the run was not saved: make room, then the same command goes on ({last})")
    if stopped_by:
        stop.end(stopped_by, done)
    say(f"done: {model_path}; pictures: python sample.py {model_path}")


# --------------------------------------------------------------------------------------------------
# Command line


# fmt: off
FLAG_GROUPS = {  # the first field of each group of flags in --help, in the order of Config
    "phase": "phase", "data": "data (App. A)", "patch_size": "masked encoder and decoder (Tab. 6)",
    "num_latents": "latent space (Tab. 6)", "flow_width": "normalizing flow (Tab. 6)",
    "prior": "the second prior (emigm.py), trained with --freeze-autoencoder",
    "nll_weight": "losses (Tab. 7)", "vgg": "weight files", "epochs": "optimizer (Tab. 7)",
    "guidance": "the run",
}
# fmt: on


def parse_arguments(arguments: list[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The Config of the flags (preset first, flags on top), and the flags that only act."""
    parser = runs.Parser(
        description="Train MIMFlow (Sec. 3.2.3 and 3.3). The same command continues a run.",
        epilog="In brackets: phase 1 of mimflow-l (the paper's, where it tells); of shapes.",
    )
    add = parser.add_argument
    add("--preset", default=LAPTOP, choices=PRESETS, help=f"default: {LAPTOP}")
    add("--overwrite", action="store_true", help="start again in a used run folder")
    add("--dry-run", action="store_true", help="print configuration and sizes, stop")
    add("--check-data", action="store_true", help="open every picture once, stop")
    # In --help, in brackets: values of mimflow-l and of shapes. --preset has been added above.
    shows = [asdict(preset_config(preset)) for preset in ("mimflow-l", LAPTOP)]
    runs.add_field_flags(parser, fields(Config)[1:], FLAG_GROUPS, shows)
    given = vars(parser.parse_args(arguments))
    actions = {k: given.pop(k) for k in ("overwrite", "dry_run", "check_data")}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    given = ({"steps": None} if "epochs" in given else {}) | given  # not the preset's steps then
    return preset_config(**given), argparse.Namespace(**actions)


def command_line() -> None:
    """Do what the command line says."""
    config, actions = parse_arguments()
    if actions.check_data:
        data.check_data(config.data, config.image_size, config.caption_words)
    elif actions.dry_run:
        check_config(config)
        if config.data is not None or config.num_classes is None:
            config, _ = resolve(config)
        say("\n".join(f"{name:18} {shown(value)}" for name, value in asdict(config).items()))
        with torch.device("meta"):  # nothing is allocated
            model = MIMFlow(config)
        for name, part in model.named_children():
            say(f"{name:8} {count_parameters(part):>12,} parameters")
    else:
        main(config, actions.overwrite)


if __name__ == "__main__":
    runs.run_program(command_line)
