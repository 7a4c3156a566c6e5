"""The latent normalizing flow F, "Improved STARFlow-L": exact density (Sec. 3.2.2, 4.1.2).

    z (B, K, d) --block 1--> --block 2--> ... --block 8 (deep)--> u = F(z) (B, K, d),  u ~ N(0, I)

    log p_F(z) = log N(F(z); 0, I) + log abs det dF/dz                                   (Eq. 4)

One autoregressive block, on the tokens x_0 ... x_{K-1} in the block's own order:

    x (B, K, d) -> linear d -> C -> + position + class -> causal Transformer -> linear C -> 2d
                -> shift by one token: mu_i, alpha_i depend on x_0 ... x_{i-1} only
    u_i = (x_i - mu_i) * exp(-alpha_i),     log abs det = -sum_i alpha_i,     u_0 = x_0

Here mu and sigma = exp(alpha) are those of one token, given the tokens before it. The mu and sigma
of Eq. 1, the encoder's mean and the noise on it, are others, and do not occur in this file.

Causality makes the Jacobian triangular: its determinant is the product of the exp(-alpha), and
density takes one parallel pass. The inverse x_i = u_i * exp(alpha_i) + mu_i must know x_0 ...
x_{i-1} first, so sampling goes token by token, with a key-value cache; or it iterates over many
tokens at once, to the same result (`jacobi`). Blocks alternate the token order (forward, backward,
...), so that every token is transformed by its whole context after two of them. Seven shallow
blocks and a deep one ("deep-shallow"): the deep one, inverted first, does nearly all the work and
alone is guided (App. A), so that only there each token is predicted twice.

Improvements over STARFlow (Tab. 1), each a switch: scale="exp" instead of "softplus"; gated=True.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

INVERSE_SOFTPLUS_OF_1 = math.log(math.e - 1)  # a fresh softplus flow is the identity
TOKEN_STD = 0.5  # initial std of positions and classes: they must stand out beside a token
DEEP_WINDOW = 32  # tokens of the deep block that `jacobi` works on at a time; all, in the others
FAR = 1e8  # no token of a working flow is this large; its square is still finite in float32


def at_least_float32(x: Tensor) -> Tensor:
    """Raise bfloat16 and float16 to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# --------------------------------------------------------------------------------------------------
# Causal Transformer


class KeyValueCache:
    """Keys and values of the tokens that one block has seen while it is being inverted.

    An argument of the calls, never state of a module. `length` tokens are filled, the same in all
    layers; lower it, and what comes next overwrites the later ones.
    """

    def __init__(self, depth: int, num_tokens: int):
        self.depth, self.num_tokens = depth, num_tokens
        # (depth, 2, B, heads, num_tokens, hd), made at the first token in the type of its key
        self.buffer: Tensor | None = None
        self.length = 0

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Store the keys and values (2, B, heads, T, hd) of T more tokens; return those of all."""
        _, B, heads, T, hd = new.shape
        if self.buffer is None:
            self.buffer = new.new_empty(self.depth, 2, B, heads, self.num_tokens, hd)
        filled = self.buffer[layer, :, :, :, : self.length + T]
        filled[:, :, :, self.length :] = new
        return filled  # (2, B, heads, length + T, hd)


class CausalGatedAttention(nn.Module):
    """Self-attention where token i sees tokens 0..i, gated elementwise (Tab. 1, "Gated Attn.").

    In three parts: what each token asks, offers and lets pass; the mixing, where alone tokens meet;
    what each token takes away.
    """

    def __init__(self, width: int, head_dim: int, gated: bool):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"flow width {width} is not divisible by head size {head_dim}")
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, width) if gated else None
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) -> queries, keys and values (3, B, heads, T, hd), and the gate (B, T, C)."""
        B, T, _ = x.shape  # batch, tokens, width
        qkv = self.qkv(x).view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return qkv, None if self.gate is None else torch.sigmoid(self.gate(x))

    def mix(self, qkv: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        """(3, B, heads, T, hd) -> (B, heads, T, hd). With a cache: T tokens after those in it."""
        q, k, v = qkv  # (B, heads, T, hd) each
        if cache is not None:
            k, v = cache.append(layer, qkv[1:])  # (B, heads, S, hd) each
        T, S, mask = q.shape[2], k.shape[2], None  # the last T of S tokens; a single one sees all
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)

    def merge(self, out: Tensor, gate: Tensor | None) -> Tensor:
        """(B, heads, T, hd) and the gate -> (B, T, C)."""
        out = out.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.proj(out if gate is None else out * gate)


class Layer(nn.Module):
    """Pre-LayerNorm causal Transformer layer, MLP four times as wide inside."""

    def __init__(self, width: int, head_dim: int, gated: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalGatedAttention(width, head_dim, gated)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    # `before` and `after` treat each token alone: no cache, and sampling calls them with the same
    # shapes for every token. That is what makes them easy to compile (sample.py --compile).

    def before(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, T, C) -> queries, keys, values (3, B, heads, T, hd) and the gate (B, T, C)."""
        return self.attention.split(self.norm1(x))

    def after(self, x: Tensor, out: Tensor, gate: Tensor | None) -> Tensor:
        """x (B, T, C), out (B, heads, T, hd) of the attention, and its gate -> (B, T, C)."""
        x = x + self.attention.merge(out, gate)
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache: the T tokens after those in the cache."""
        qkv, gate = self.before(x)
        return self.after(x, self.attention.mix(qkv, cache, layer), gate)


# --------------------------------------------------------------------------------------------------
# Guidance


class Guidance(NamedTuple):
    """Classifier-free guidance of the deep block: weight `w`, 0 = none, and how it acts.

    w grows with the token, w_i = w * i/(K-1), when `annealed`. With rule "tarflow" (default) the
    conditional prediction is extrapolated, alpha += w_i (alpha - alpha_null) and likewise mu; with
    "starflow" two Gaussians are combined and s = min(sigma_c/sigma_null, 1)^2 keeps it one:
        sigma = sigma_c / sqrt(1 + w - w s),    mu = ((1 + w) mu_c - w s mu_null) / (1 + w - w s)
    """

    weight: float = 0.0
    annealed: bool = True
    rule: str = "tarflow"

    def __call__(
        self,
        mu_c: Tensor,
        alpha_c: Tensor,
        mu_null: Tensor,
        alpha_null: Tensor,
        progress: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """Guided (mu, alpha), alpha = log sigma, from those of the class (c) and the null class,
        (B, T, d) each. `progress` (T, 1) = i/(K-1) of the tokens in the block's order."""
        w = self.weight * (progress if self.annealed else 1.0)
        if self.rule == "tarflow":
            return mu_c + w * (mu_c - mu_null), alpha_c + w * (alpha_c - alpha_null)
        s = (2 * (alpha_c - alpha_null)).clamp(max=0).exp()
        total = 1 + w - w * s
        return ((1 + w) * mu_c - w * s * mu_null) / total, alpha_c - 0.5 * total.log()


NO_GUIDANCE = Guidance()


# --------------------------------------------------------------------------------------------------
# Two ways to solve x_i = u_i * exp(alpha_i) + mu_i, where mu_i, alpha_i depend on x_0 .. x_{i-1}

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_{i-1}, i) -> mu_i, alpha_i
Watch = Callable[[int], None]  # told, after each call of Predict, how many tokens it has solved


def sequential(u: Tensor, predict: Predict, watch: Watch) -> Tensor:
    """Token by token, in K - 1 calls of `predict`: u (B, K, d) -> x (B, K, d)."""
    tokens = [u[:, :1]]  # the first token passes unchanged
    for i in range(1, u.shape[1]):
        mu, alpha = predict(tokens[-1], i)  # (B, 1, d) each
        tokens.append(u[:, i : i + 1] * torch.exp(alpha) + mu)
        watch(1)
    return torch.cat(tokens, dim=1)


def jacobi(u: Tensor, predict: Predict, watch: Watch, tolerance: float, window: int) -> Tensor:
    """Many tokens at once, by fixed-point iteration (arXiv 2505.12849): u -> x, (B, K, d) each.

    A sweep puts a guess of x into the right-hand side for all tokens of a window. A token is
    solved when no token before it has just changed by more than `tolerance`, in any picture of the
    batch; the window then begins after it (Gauss-Seidel). That is one token a sweep at least, so
    K - 1 sweeps always suffice. Tolerance 0 is exact, but rounding alone can keep numbers changing;
    otherwise errors of about `tolerance` enter, and mostly far fewer sweeps are needed. That paper:
    fixed segments; here: a window that moves on with what is solved, because it needs no bound on
    the sweeps and repeats no solved token.
    """
    x, K, first = u.clone(), u.shape[1], 1  # token 0 passes unchanged; for the others u is a guess
    while first < K:
        last = min(first + window, K)
        # A wrong guess may overflow. It must not make the tokens before it NaN: attention
        # multiplies what it hides by zero, and 0 * inf is NaN.
        guess = x[:, first - 1 : last - 1].nan_to_num(0.0, FAR, -FAR).clamp(-FAR, FAR)
        mu, alpha = predict(guess, first)  # (B, T, d) each
        better = u[:, first:last] * torch.exp(alpha) + mu
        settled = (better - x[:, first:last]).abs().amax(dim=(0, 2)) <= tolerance  # (T,)
        x[:, first:last] = better
        # All settled ones from the first on, and the next, whose inputs these are.
        solved = min(1 + int(settled.cumprod(0).sum()), last - first)  # waits for the device
        watch(solved)
        first += solved
    return x


# --------------------------------------------------------------------------------------------------
# The flow


class AutoregressiveBlock(nn.Module):
    """One invertible map of K tokens, affine in each token given the ones before it."""

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        width: int,
        depth: int,
        head_dim: int,
        num_classes: int,
        gated: bool,
        scale: str,
        backward: bool,
    ):
        super().__init__()
        self.scale = scale
        self.backward = backward  # this block reads the tokens last to first
        self.proj_in = nn.Linear(latent_dim, width)
        # Row k belongs to token k, wherever the order of the block puts it.
        self.position = nn.Parameter(TOKEN_STD * torch.randn(num_latents, width))
        classes = TOKEN_STD * torch.randn(num_classes, width)
        self.class_embed = nn.Parameter(classes) if num_classes else None
        self.layers = nn.ModuleList(Layer(width, head_dim, gated) for _ in range(depth))
        self.proj_out = nn.Linear(width, 2 * latent_dim)
        nn.init.zeros_(self.proj_out.weight)  # a fresh block is the identity
        nn.init.zeros_(self.proj_out.bias)

    def order(self, x: Tensor) -> Tensor:
        """Put tokens (..., K, channels) into the order of this block; its own inverse."""
        return x.flip(-2) if self.backward else x

    def condition(self, labels: Tensor) -> Tensor | float:
        """Class embedding (B, 1, C) of labels (B,); -1 is the null class, the MEAN of all classes'
        embeddings, as in TARFlow: labels dropped in training reach it, and through it all."""
        if self.class_embed is None:
            return 0.0
        null = self.class_embed.mean(dim=0)
        return torch.where(labels[:, None] >= 0, self.class_embed[labels.clamp(min=0)], null)[
            :, None
        ]

    def predict(
        self,
        x: Tensor,
        position: Tensor,
        condition: Tensor | float,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """mu and alpha, (B, T, d) each, for the token AFTER each of the tokens x (B, T, d)."""
        h = self.proj_in(x.type_as(self.proj_in.weight)) + position + condition  # (B, T, C)
        for i, layer in enumerate(self.layers):
            h = layer(h, cache, i)
        if cache is not None:
            cache.length += x.shape[1]
        mu, alpha = at_least_float32(self.proj_out(h)).chunk(2, dim=-1)
        if self.scale == "softplus":  # STARFlow's scale; alpha stays its logarithm
            alpha = F.softplus(alpha + INVERSE_SOFTPLUS_OF_1).log()
        return mu, alpha

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, K, d), labels (B,) -> u (B, K, d) and logdet (B,) in nats."""
        x = self.order(at_least_float32(x))
        mu, alpha = self.predict(x, self.order(self.position), self.condition(labels))
        # Shift by one token: token i gets what was predicted from 0 .. i-1; token 0 passes
        # unchanged.
        mu, alpha = F.pad(mu[:, :-1], (0, 0, 1, 0)), F.pad(alpha[:, :-1], (0, 0, 1, 0))  # (B, K, d)
        u = (x - mu) * torch.exp(-alpha)
        return self.order(u), -alpha.sum(dim=(1, 2))

    def inverse(
        self,
        u: Tensor,
        labels: Tensor,
        guidance: Guidance = NO_GUIDANCE,
        solve: Callable[[Tensor, Predict, Watch], Tensor] = sequential,
        watch: Watch = lambda solved: None,
    ) -> Tensor:
        """The x (B, K, d) that forward maps to u, or its guided version, found by `solve`."""
        guided = guidance.weight != 0 and self.class_embed is not None
        u = self.order(at_least_float32(u))
        K = u.shape[1]  # tokens
        if guided:  # conditional and unconditional halves share one batch
            labels = torch.cat((labels, torch.full_like(labels, -1)))
        condition, position = self.condition(labels), self.order(self.position)
        tokens = torch.arange(K, dtype=u.dtype, device=u.device)
        progress = tokens[:, None] / max(K - 1, 1)  # (K, 1)
        cache = KeyValueCache(len(self.layers), K)

        def predict_from(x: Tensor, first: int) -> tuple[Tensor, Tensor]:
            """mu and alpha of the tokens first .. first + T - 1; x (B, T, d) holds the tokens
            first - 1 .. first + T - 2. What an earlier sweep put into the cache from there on came
            from guesses, and is overwritten."""
            cache.length, last = first - 1, first + x.shape[1]
            before = position[first - 1 : last - 1]  # (T, C)
            if not guided:
                return self.predict(x, before, condition, cache)
            mu, alpha = self.predict(x.repeat(2, 1, 1), before, condition, cache)  # (2B, T, d)
            (mu, mu_null), (alpha, alpha_null) = mu.chunk(2), alpha.chunk(2)
            return guidance(mu, alpha, mu_null, alpha_null, progress[first:last])

        return self.order(solve(u, predict_from, watch))


class NormalizingFlow(nn.Module):
    """F: a stack of autoregressive blocks, the last one deep (Sec. 4.1.2)."""

    def __init__(
        self,
        num_latents: int = 128,  # K tokens
        latent_dim: int = 64,  # d numbers each
        width: int = 1024,  # C, channels of the causal Transformers
        depths: tuple[int, ...] = (2, 2, 2, 2, 2, 2, 2, 20),  # layers a block, the last is deep
        head_dim: int = 64,  # size of an attention head
        num_classes: int = 1000,  # 0 = unconditional only
        gated: bool = True,  # gated attention; False = STARFlow baseline
        scale: str = "exp",  # "exp", or "softplus" = STARFlow baseline
    ):
        super().__init__()
        if scale not in ("exp", "softplus"):
            raise ValueError(f'scale must be "exp" or "softplus", got "{scale}"')
        self.num_latents, self.latent_dim, self.num_classes = num_latents, latent_dim, num_classes
        self.blocks = nn.ModuleList(
            AutoregressiveBlock(
                num_latents,
                latent_dim,
                width,
                depth,
                head_dim,
                num_classes,
                gated,
                scale,
                backward=i % 2 == 1,
            )
            for i, depth in enumerate(depths)
        )

    def _labels(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Labels as int64 (B,) on z's device; None = unconditional = all -1."""
        if labels is None:
            return torch.full((len(z),), -1, dtype=torch.int64, device=z.device)
        return labels.to(z.device, torch.int64)

    def intermediates(self, z: Tensor, labels: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The output of every block, a list of (B, K, d) with u last, and logdet (B,) in nats."""
        labels = self._labels(z, labels)
        x, logdet, outputs = z, 0.0, []
        for block in self.blocks:
            x, block_logdet = block(x, labels)
            logdet = logdet + block_logdet
            outputs.append(x)
        return outputs, logdet

    def forward(self, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u = F(z) (B, K, d) and log abs det dF/dz (B,) in nats per image.

        z (B, K, d); labels int64 (B,), -1 = unconditional; None = all unconditional.
        """
        outputs, logdet = self.intermediates(z, labels)
        return outputs[-1], logdet

    def log_prob(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p_F(z) (B,) in nats, constants included (Eq. 4)."""
        u, logdet = self(z, labels)
        log_normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(dim=(1, 2))  # (B,)
        return log_normal + logdet

    @torch.no_grad()
    def inverse(
        self,
        u: Tensor,
        labels: Tensor | None = None,
        guidance: float = 0.0,
        annealed: bool = True,
        rule: str = "tarflow",
        sampler: str = "sequential",
        tolerance: float = 1e-5,
        watch: Callable[[int, int], None] = lambda block, solved: None,
    ) -> Tensor:
        """z = F^-1(u): noise (B, K, d) and labels (B,) to latents (B, K, d), in at least float32.

        `guidance` is the weight w of classifier-free guidance in the deep block, 0 = none (exact
        inverse); `annealed` and `rule` ("tarflow" or "starflow") as in `Guidance`. `sampler` is
        "sequential", or "jacobi", which calls a token solved when none before it has changed by
        more than `tolerance`.
        `watch` is called with (block, tokens solved) after each pass through that block. u is left
        unchanged.
        """
        if rule not in ("tarflow", "starflow"):
            raise ValueError(f'rule must be "tarflow" or "starflow", got "{rule}"')
        if sampler not in ("sequential", "jacobi"):
            raise ValueError(f'sampler must be "sequential" or "jacobi", got "{sampler}"')
        labels = self._labels(u, labels)
        x, deep = u, len(self.blocks) - 1
        for number in range(deep, -1, -1):
            block_guidance = Guidance(guidance, annealed, rule) if number == deep else NO_GUIDANCE
            solve = sequential
            if sampler == "jacobi":
                window = DEEP_WINDOW if number == deep else self.num_latents
                solve = functools.partial(jacobi, tolerance=tolerance, window=window)
            tell = functools.partial(watch, number)
            x = self.blocks[number].inverse(x, labels, block_guidance, solve, tell)
        return x
