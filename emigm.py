"""A second prior on the latent tokens: masked generation after eMIGM (arXiv 2503.07197).

The flow writes tokens one by one, exactly; this prior writes several at a time, in any order, and
has no density. "P" is its paper, whose sections and equations are cited here, the release is
ML-GSAI/eMIGM. Patches are masked, tokens are hidden or visible.

    z (B, K, d), standardised once; order (B, K), a random permutation: its first n are visible
      | linear, + position; hidden tokens are as if dropped (MAE)
    [class x buffer, visible tokens] --its encoder--> linear
      | a learnable mask token at each hidden place, + position
    [class x buffer, all K places] --its decoder--> + position --> h (B, K, C), a feature a token
      | Head: an MLP, each token for itself
    v (B, K, d), the velocity that carries noise to the token, given what is visible

Training is conditional flow matching of each hidden token, given the visible ones (Eq. 7). Frozen
latents only: an encoder that learned with L would shrink z to ease it, and no logdet forbids that.

    t uniform in [t_min, 1]:   ceil(K gamma(t)) of K tokens are hidden                   (Sec. 4)
    x_tau = tau x + (1 - tau) eps,   eps ~ N(0, I),   tau uniform in [0, 1],   v = x - eps
    L = mean over the hidden tokens x and their d numbers of  (v_head(x_tau, tau, h) - v)^2

    sampling:   all hidden; each of S steps reveals the next places of `order` and keeps them, few
                at first: dx/dtau = v_head(x, tau, h) from u at tau = 0 to the token at tau = 1
    guidance:   v = v_class + w (v_class - v_null), in the steps of an interval only   (Sec. 5.3)

Tokens of one step are independent, given those before: S = K is an exact chain rule; fewer steps
are faster, and blind to what tokens of a step have in common. L is 2 for a fresh network, and
pi s / 2 at best where tokens are Gaussian, with std s, given the visible ones.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from encoder import MLP, init_linear

# release: 0.02; here: as in flow.py, because tokens that look alike learn nothing for long.
EMBED_STD = 0.5  # initial std of positions, classes and mask token
WAVES = 128  # cosines, and as many sines, that tell the head its time (release)
SCHEDULES = ("exp", "cosine", "linear", "log")
ROUNDING = 1e-9  # cos(pi/2) is 6e-17: what is this little above a whole number is that number


# --------------------------------------------------------------------------------------------------
# Which tokens are hidden, and what else is random


def hidden_share(t: Tensor, schedule: str) -> Tensor:
    """gamma(t), the share of tokens that is hidden at time t in [0, 1] (Sec. 4, App. D)."""
    return {
        "exp": 1 - torch.exp(-5 * t),  # P's default
        "cosine": torch.cos(math.pi / 2 * (1 - t)),
        "linear": t,
        "log": torch.log1p(math.expm1(5) * t) / 5,  # log-exp, the best of P's Tab. 9
    }[schedule]


def visible_slots(num_latents: int, schedule: str, t_min: float) -> int:
    """V: the most tokens that are ever visible in training, at t = t_min; K - 1 at most."""
    share = hidden_share(torch.tensor(t_min, dtype=torch.float64, device="cpu"), schedule)
    return num_latents - max(1, math.ceil(num_latents * float(share) - ROUNDING))


def reveal_counts(num_latents: int, steps: int, schedule: str) -> list[int]:
    """Tokens revealed in each of `steps` steps, K at most, from t = 1 to t = 0: all >= 1, their sum
    K. Release: each hidden one with probability 1 - gamma(t_next) / gamma(t); here: how many are
    expected: each sample costs the same, and depends on none beside it."""
    steps = min(steps, num_latents)
    times = torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu") / steps  # 1 ... 0
    gamma, hidden = hidden_share(times, schedule), [num_latents]
    wanted = (num_latents * gamma / gamma[0] - ROUNDING).ceil().tolist()
    for left in wanted[1:]:  # gamma is concave, so that one token is left for each later step
        hidden.append(min(int(left), hidden[-1] - 1))
    return [hidden[i] - hidden[i + 1] for i in range(steps)]


class TokenDraws(NamedTuple):
    """Everything random in a training step of this prior, for a batch of B pictures."""

    order: Tensor  # (B, K) int64, a permutation a picture
    visible: Tensor  # (B,) int64: so many tokens, the first in `order`, are not hidden
    tau: Tensor  # (B, R, K) uniform: the head's times
    noise: Tensor  # (B, R, K, d) standard normal: the head's eps

    def rows(self, start: int, stop: int) -> "TokenDraws":
        """The draws of pictures start..stop of the batch."""
        return TokenDraws(*(x[start:stop] for x in self))


def draw_tokens(
    batch: int,
    num_latents: int,
    latent_dim: int,
    schedule: str = "exp",
    t_min: float = 0.2,
    repeats: int = 4,  # R, times and noises a token: the head is cheap beside the Transformer
    generator: torch.Generator | None = None,
) -> TokenDraws:
    """Draw a training step's randomness for the GLOBAL batch, on the generator's device. Release:
    one t for a process, max(U, 0.2), so a fifth of all t is exactly 0.2; here: one a picture, each
    from another of B equal parts of [t_min, 1], truncated as in P: less noise in small batches."""
    how = dict(generator=generator, device=generator.device if generator is not None else None)
    # In this order: another one would draw other numbers, and every seed give another run.
    part = torch.randperm(batch, **how)  # shuffled: every process gets t of all kinds
    t = t_min + (1 - t_min) * (part + torch.rand(batch, **how)) / batch  # (B,)
    order = torch.rand(batch, num_latents, **how).argsort(dim=1)
    tau = torch.rand(batch, repeats, num_latents, **how)
    noise = torch.randn(batch, repeats, num_latents, latent_dim, **how)
    visible = num_latents - (num_latents * hidden_share(t, schedule)).ceil().long()
    visible = visible.clamp(0, visible_slots(num_latents, schedule, t_min))  # for float32's ceil
    return TokenDraws(order, visible, tau, noise)


def sampling_order(seed: int, indices: Iterable[int], num_latents: int) -> Tensor:
    """Orders (len(indices), K) in which samples number `indices` reveal their tokens, each from a
    generator of its own (and not that of its noise), whatever is sampled beside it."""
    orders = [np.random.default_rng((seed, i, 2)).permutation(num_latents) for i in indices]
    return torch.from_numpy(np.stack(orders)).long()


# --------------------------------------------------------------------------------------------------
# The Transformer (encoder.Block without rotary positions, but with masked keys), and the head


class Attention(nn.Module):
    """Bidirectional multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). No token attends to one whose `seen` (B, T) is False."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None]  # (B, 1, 1, T)
        out = F.scaled_dot_product_attention(q, k, v, mask)  # (B, heads, T, hd)
        return self.proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-LayerNorm layer. Release: dropout 0.1; here: none, the caller draws what is random."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), `seen` as in Attention."""
        x = x + self.attention(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class HeadBlock(nn.Module):
    """Residual MLP whose LayerNorm is shifted, scaled and gated by the condition (adaLN)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (..., W), condition (..., W) -> (..., W)."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)  # (..., W) each
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Head(nn.Module):
    """v_head. P: predicts the noise of a diffusion, and its variance; here: the velocity of a
    straight path (rectified flow), because that is a few lines for hundreds."""

    def __init__(self, latent_dim: int, width: int, depth: int, features: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.proj_in, self.feature = nn.Linear(latent_dim, width), nn.Linear(features, width)
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.modulation, self.proj_out = nn.Linear(width, 2 * width), nn.Linear(width, latent_dim)
        self.apply(init_linear)
        # A fresh block is the identity, a fresh head returns 0; its first step moves only proj_out.
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.proj_out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, tau: Tensor, h: Tensor) -> Tensor:
        """x (..., d) at times tau (...), with features h (..., C), all broadcast -> v (..., d)."""
        # 1000 tau at frequencies from 1 to 1/10000, as diffusion models embed steps 0 to 1000.
        power = torch.arange(WAVES, device=x.device).type_as(x) / WAVES  # (128,)
        angle = 1000 * tau.type_as(x)[..., None] / 10000**power  # (..., 128)
        time = self.time(torch.cat((angle.cos(), angle.sin()), dim=-1).type_as(h))  # (..., W)
        v, condition = self.proj_in(x.type_as(h)), F.silu(time + self.feature(h))  # (..., W) each
        for block in self.blocks:
            v = block(v, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)  # (..., W) each
        return self.proj_out(F.layer_norm(v, v.shape[-1:]) * (1 + scale) + shift).type_as(x)


def midpoint(velocity: Callable[..., Tensor], x: Tensor, steps: int, *given: object) -> Tensor:
    """Solve dx/dtau = velocity(x, tau, *given) from tau = 0 to 1, in two evaluations a step. P:
    DPM-Solver; here: the midpoint rule, because paths are straight: 8 evaluations of the exact v of
    a Gaussian of std s = 0.33 to 1 give std 0.994 s to 0.998 s (Euler's rule: 0.79 s to 0.85 s)."""
    for step in range(steps):
        start, middle = x.new_full((), step / steps), x.new_full((), (step + 0.5) / steps)
        x = x + velocity(x + velocity(x, start, *given) / (2 * steps), middle, *given) / steps
    return x


# --------------------------------------------------------------------------------------------------
# The prior


class MaskedPrior(nn.Module):
    """Transformer over visible tokens, and a head that writes hidden ones (eMIGM-L by default)."""

    def __init__(
        self,
        num_latents: int = 128,  # K tokens
        latent_dim: int = 64,  # d numbers each
        width: int = 1024,  # C, channels of the Transformer
        heads: int = 16,  # its attention heads
        encoder_depth: int = 16,  # layers over visible tokens
        decoder_depth: int = 16,  # layers over all tokens
        buffer: int = 32,  # class tokens in front, >= 1. P: 64 for 256 tokens; here: the same share
        head_width: int = 1280,  # W, channels of the head
        head_depth: int = 8,  # its blocks
        num_classes: int = 1000,  # 0 = unconditional only
    ):
        super().__init__()
        self.buffer, self.num_classes, places = buffer, num_classes, buffer + num_latents
        # P: one std for all z; here: each number's, because a token is a query with its own mean.
        self.register_buffer("mean", torch.zeros(num_latents, latent_dim))
        self.register_buffer("std", torch.ones(num_latents, latent_dim))
        self.class_embed = nn.Parameter(EMBED_STD * torch.randn(num_classes, width))
        self.mask_token = nn.Parameter(EMBED_STD * torch.randn(width))  # and null class (App. D)
        self.encoder_position = nn.Parameter(EMBED_STD * torch.randn(places, width))
        self.decoder_position = nn.Parameter(EMBED_STD * torch.randn(places, width))
        self.head_position = nn.Parameter(EMBED_STD * torch.randn(num_latents, width))
        self.proj_in, self.proj_decoder = nn.Linear(latent_dim, width), nn.Linear(width, width)
        self.norm_in, self.encoder_norm, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.encoder = nn.ModuleList(Layer(width, heads) for _ in range(encoder_depth))
        self.decoder = nn.Sequential(*(Layer(width, heads) for _ in range(decoder_depth)))
        self.apply(init_linear)
        self.head = Head(latent_dim, head_width, head_depth, width)  # last: it starts at zero

    @torch.no_grad()
    def fit(self, z: Tensor) -> None:
        """Set mean and std from latents z (M, K, d), once; what never changes keeps std 1."""
        std, mean = torch.std_mean(z.cpu().double(), dim=0)  # (K, d) each
        self.mean[:], self.std[:] = mean, torch.where(std > 1e-6, std, 1.0)

    def standardise(self, z: Tensor) -> Tensor:
        """Latents z (B, K, d) -> (B, K, d) of mean 0 and std 1, in at least float32."""
        return (z.to(torch.promote_types(z.dtype, torch.float32)) - self.mean) / self.std

    def features(
        self, z: Tensor, labels: Tensor, order: Tensor, visible: Tensor | int, slots: int
    ) -> Tensor:
        """h (B, K, C): what the first `visible` tokens, (B,) or a number, of order (B, K) tell.

        z (B, K, d), hidden tokens may hold anything; labels (B,), -1 = null. Release: the hidden
        dropped, as many in each picture; here: the first `slots` >= `visible` of `order` enter,
        hidden ones masked as keys, because shapes are then fixed, and each picture has its number.
        """
        (B, K, _), front = z.shape, self.buffer  # batch, tokens; class tokens in front
        places, each = order[:, :slots], torch.arange(B, device=z.device)[:, None]  # (B, V), (B, 1)
        count = visible if isinstance(visible, int) else visible[:, None]
        filled = (torch.arange(slots, device=z.device) < count).expand(B, -1)  # (B, V)
        seen, filled = F.pad(filled, (front, 0), value=True), filled[..., None]

        # Even what is masked must be finite: attention multiplies it by zero, and 0 * NaN is NaN.
        x = self.standardise(z)[each, places].masked_fill(~filled, 0)  # (B, V, d)
        x = self.proj_in(x.type_as(self.proj_in.weight)) + self.encoder_position[front:][places]
        classes = torch.cat((self.mask_token[None], self.class_embed))[labels + 1]  # (B, C)
        classes = classes[:, None] + self.encoder_position[:front]  # (B, buffer, C)
        x = self.norm_in(torch.cat((classes, x), dim=1))  # (B, buffer + V, C)
        for layer in self.encoder:
            x = layer(x, seen)
        x = self.proj_decoder(self.encoder_norm(x))

        # Visible tokens (of order 2 0 3 1, two visible: 2 and 0) to their places, else mask tokens.
        tokens = torch.where(filled, x[:, front:], self.mask_token)  # (B, V, C)
        tokens = self.mask_token.expand(B, K, -1).index_put((each, places), tokens)  # (B, K, C)
        x = torch.cat((x[:, :front], tokens), dim=1) + self.decoder_position
        return self.norm_out(self.decoder(x)[:, front:]) + self.head_position  # (B, K, C)

    def forward(self, z: Tensor, labels: Tensor, draws: TokenDraws, slots: int) -> Tensor:
        """L (B,) of latents z (B, K, d) and labels (B,), -1 = null; slots = V (`visible_slots`).
        P: a sum over the hidden tokens; here: the mean, as in the release: pictures weigh alike."""
        h = self.features(z, labels, draws.order, draws.visible, slots)
        # The head runs on visible tokens too, and their error is dropped: shapes never change.
        x = self.standardise(z)[:, None]  # (B, 1, K, d)
        tau, eps = draws.tau[..., None].type_as(x), draws.noise.type_as(x)  # (B, R, K, 1 or d)
        v = self.head(tau * x + (1 - tau) * eps, tau[..., 0], h[:, None])  # (B, R, K, d)
        error = (v - (x - eps)).square().mean(dim=(1, 3)).gather(1, draws.order)  # (B, K)
        hidden = torch.arange(z.shape[1], device=z.device) >= draws.visible[:, None]  # (B, K)
        return torch.where(hidden, error, 0.0).sum(dim=1) / hidden.sum(dim=1)

    def velocity(self, x: Tensor, tau: Tensor, h: Tensor, w: float) -> Tensor:
        """Guided v (B, n, d) of x (B, n, d): h has n features of the class, then of the null class.
        This guides eps, as P does: v = (x_tau - eps) / tau."""
        if not w:
            return self.head(x, tau, h)
        v, v_null = self.head(x.repeat(2, 1, 1), tau, h).chunk(2)  # (B, n, d) each
        return v + w * (v - v_null)

    @torch.no_grad()
    def sample(
        self,
        u: Tensor,
        labels: Tensor | None = None,
        guidance: float = 0.0,  # w, 0 = none. P: the scale w + 1 = 4
        interval: tuple[float, float] = (0.1, 0.3),  # [lo, hi): guided are steps that end in it
        steps: int = 16,  # S, at most K
        evaluations: int = 8,  # of the head in each step: even, two a step of the midpoint rule
        schedule: str = "exp",
        order: Tensor | None = None,  # None = `sampling_order` of seed 0
        watch: Callable[[int, int], None] = lambda step, tokens: None,  # told what is revealed
    ) -> Tensor:
        """Latents z (B, K, d), in at least float32, from noise u (B, K, d) and labels (B,).

        P: draws noise and places on the way; here: order (B, K) and u are given, because sample i
        is then the same anywhere. Guidance costs diversity, early tokens are final: Sec. 5.3.
        """
        if steps < 1 or evaluations < 2 or evaluations % 2:
            raise ValueError(f"steps >= 1, even evaluations >= 2, not {steps} and {evaluations}")
        (B, K, _), n = u.shape, 0  # n tokens are visible
        each, null = torch.arange(B, device=u.device)[:, None], torch.full((B,), -1).to(u.device)
        labels = null if labels is None else labels.to(null)
        order = (sampling_order(0, range(B), K) if order is None else order).to(u.device)
        z, counts = torch.zeros_like(self.standardise(u)), reveal_counts(K, steps, schedule)
        for step, count in enumerate(counts):
            end = (len(counts) - 1 - step) / len(counts)  # t after it: 1 = all hidden, 0 = none
            w = guidance if self.num_classes and interval[0] <= end < interval[1] else 0.0
            copies = 2 if w else 1  # guided: twice the batch, the second half of the null class
            both = torch.cat((labels, null))[: copies * B]
            h = self.features(z.repeat(copies, 1, 1), both, order.repeat(copies, 1), n, n)
            places = order[:, n : n + count]  # (B, count)
            h = torch.cat([half[each, places] for half in h.split(B)])  # (B or 2B, count, C)
            x = midpoint(self.velocity, u.to(z)[each, places], evaluations // 2, h, w)
            z[each, places] = self.mean[places] + self.std[places] * x
            n += count
            watch(step, count)
        return z
