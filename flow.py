"""The latent normalizing flow F, "Improved STARFlow-L": exact density (Sec. 3.2.2, 4.1.2).

    z (B, K, d) --block 1--> --block 2--> ... --block 8 (deep)--> u = F(z) (B, K, d),  u ~ N(0, I)

    log p_F(z) = log N(F(z); 0, I) + log abs det dF/dz                                   (Eq. 4)

One autoregressive block, each with the class, on the tokens x_0 ... x_{K-1} in its own order:

    x (B, K, d) -> linear d -> C -> + position + class -> causal Transformer -> linear C -> 2d
                -> shift by one token: mu_i, alpha_i depend on x_0 ... x_{i-1} only
    u_i = (x_i - mu_i) * exp(-alpha_i),     log abs det = -sum of all alpha,     u_0 = x_0

mu_i and alpha_i are the mean and the log of the scale of one token, given the tokens before it. The
mu and sigma of Eq. 1, the encoder's mean and the noise on it, do not occur in this file.

Causality makes the Jacobian triangular: its determinant is the product of the exp(-alpha), and
density takes one parallel pass. The inverse x_i = u_i * exp(alpha_i) + mu_i must know x_0 ...
x_{i-1} first: token by token, K - 1 calls a block, the deep block first, keys and values cached; or
many tokens at once, nearly the same (`jacobi`). Blocks alternate the order (forward, backward,
...): one transforms a token given all before it, the next given all after it. A block alone makes
each token a Gaussian given those before it; several make more of it. Of eight the last is deep and
does nearly all the work ("deep-shallow"). So guidance, which predicts each token twice, is only
there (App. A), where sampling begins.

Captions are what STARFlow has and the paper leaves to future work (Sec. 5): here without a text
encoder. A caption is a row of L words, and a prefix that the deep block reads before the latent:

    word_1 + place_1, ..., word_L + place_L, x_0, ..., x_{K-1}       an empty place is place_l alone

so that u_0 = (x_0 - mu_0) * exp(-alpha_0) as well: the last place predicts x_0. The block is then a
language model that goes on with Gaussians. An empty caption is the null condition.

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

SCALES = {  # what the network says -> alpha, log of the scale; 0 -> 0: a fresh block is z -> z
    "exp": lambda a: a,
    "softplus": lambda a: F.softplus(a + math.log(math.e - 1)).log(),  # STARFlow's
}
EMBED_STD = 0.5  # initial std of positions and classes: they must stand out beside a token
RULES = ("tarflow", "starflow")  # of `Guidance`
SAMPLERS = ("sequential", "jacobi")  # of `NormalizingFlow.inverse`
DEEP_WINDOW = 32  # tokens of the deep block that `jacobi` works on at a time; all, in the others
FAR = 1e8  # no token of a working flow is this large; its square is still finite in float32


def at_least_float32(x: Tensor) -> Tensor:
    """Raise bfloat16 and float16 to float32; leave float32 and float64 alone."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# --------------------------------------------------------------------------------------------------
# Causal Transformer


class KeyValueCache:
    """Keys and values of the tokens that one block has read while it is being inverted.

    An argument of the calls, never state of a module. Whoever inverts sets `length`, the number of
    tokens that count, the same in all layers; what comes next is written behind them.
    """

    def __init__(self, depth: int, num_tokens: int):
        self.depth, self.num_tokens, self.length = depth, num_tokens, 0
        # (depth, 2, B, heads, num_tokens, hd), made at the first token in the type of its key
        self.buffer: Tensor | None = None

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Store the keys and values (2, B, heads, T, hd) of T more tokens; return those of all."""
        _, B, heads, T, hd = new.shape
        if self.buffer is None:
            self.buffer = new.new_empty(self.depth, 2, B, heads, self.num_tokens, hd)
        filled = self.buffer[layer, :, :, :, : self.length + T]  # a view: nothing is copied
        filled[:, :, :, self.length :] = new
        return filled  # (2, B, heads, length + T, hd)


class CausalGatedAttention(nn.Module):
    """Self-attention where token i sees tokens 0..i, gated elementwise (Tab. 1, "Gated Attn.")."""

    def __init__(self, width: int, head_dim: int, gated: bool):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"flow width {width} is not divisible by head size {head_dim}")
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, width) if gated else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C). With a cache: the T tokens after those in the cache."""
        B, T, hd = *x.shape[:2], self.head_dim  # batch, tokens, channels of a head
        kind = x.device.type  # once for both linear layers that read x
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        qkv = self.qkv(x).view(B, T, 3, -1, hd)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, T, hd) each
        if cache is not None:
            k, v = cache.append(layer, qkv[:, :, 1:].permute(2, 0, 3, 1, 4))  # (B, heads, S, hd)

        S, mask = k.shape[2], None
        if 1 < T < S:  # the last T of S tokens ask; a single one sees all, and needs no mask
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)
        out = out.transpose(1, 2).flatten(2)  # (B, T, C)

        if self.gate is not None:
            out = out * torch.sigmoid(self.gate(x))
        return self.proj(out)


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

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C), `cache` and `layer` as in the attention."""
        x = x + self.attention(self.norm1(x), cache, layer)
        return x + self.mlp(self.norm2(x))


# --------------------------------------------------------------------------------------------------
# Guidance


class Guidance(NamedTuple):
    """Classifier-free guidance of the deep block: weight `w`, 0 = none, and how it acts.

    w_i = w * i/(K-1) for the token at place i of the block's order when `annealed`, else w: TARFlow
    lets it grow, STARFlow does not; no reason is known to us. With rule "tarflow" (default) the
    conditional prediction is extrapolated, alpha += w_i (alpha - alpha_null) and likewise mu; with
    "starflow" the token comes from p_c^(1 + w_i) / p_null^w_i. In a product of Gaussians precisions
    exp(-2 alpha) add up, and means weighted by them. In units of the precision of the class, s is
    that of the null class and t that of the product, a Gaussian if t > 0: s is kept at 1 at most.
        s = min(exp(alpha_c - alpha_null), 1)^2,    t = 1 + w_i - w_i s
        alpha = alpha_c - log(t) / 2,               mu = ((1 + w_i) mu_c - w_i s mu_null) / t
    """

    weight: float = 0.0
    annealed: bool = True
    rule: str = "tarflow"

    def __call__(
        self, mu_c: Tensor, alpha_c: Tensor, mu_null: Tensor, alpha_null: Tensor, progress: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Guided (mu, alpha) from those of the class (c) and the null class, (B, T, d) each.
        `progress` (T, 1) = i/(K-1) of the tokens in the block's order."""
        w = self.weight * (progress if self.annealed else 1.0)
        if self.rule == "tarflow":
            return mu_c + w * (mu_c - mu_null), alpha_c + w * (alpha_c - alpha_null)
        s = (2 * (alpha_c - alpha_null)).clamp(max=0).exp()
        t = 1 + w - w * s
        return ((1 + w) * mu_c - w * s * mu_null) / t, alpha_c - 0.5 * t.log()


NO_GUIDANCE = Guidance()


# --------------------------------------------------------------------------------------------------
# One block


class AutoregressiveBlock(nn.Module):
    """One invertible map of K tokens, affine in each token given the ones before it."""

    def __init__(
        self,
        number: int,
        num_latents: int,
        latent_dim: int,
        width: int,
        depth: int,
        head_dim: int,
        num_classes: int,
        gated: bool,
        scale: str,
        caption_words: int,
    ):
        super().__init__()
        self.number = number  # counted from 0
        self.backward = number % 2 == 1  # this block reads the tokens last to first
        self.scale = scale
        self.proj_in = nn.Linear(latent_dim, width)
        # Row k belongs to token k, wherever the order of the block puts it.
        self.position = nn.Parameter(EMBED_STD * torch.randn(num_latents, width))
        classes = EMBED_STD * torch.randn(num_classes, width)
        self.class_embed = nn.Parameter(classes) if num_classes else None
        # Of a block that reads captions: L places in front of the tokens. Its classes are words.
        places = EMBED_STD * torch.randn(caption_words, width) if caption_words else None
        self.place = nn.Parameter(places) if caption_words else None
        self.layers = nn.ModuleList(Layer(width, head_dim, gated) for _ in range(depth))
        self.proj_out = nn.Linear(width, 2 * latent_dim)
        nn.init.zeros_(self.proj_out.weight)  # a fresh block is the identity
        nn.init.zeros_(self.proj_out.bias)

    def order(self, x: Tensor) -> Tensor:
        """Put tokens (..., K, channels) into the order of this block; its own inverse."""
        return x.flip(-2) if self.backward else x

    def condition(self, labels: Tensor) -> Tensor | float:
        """Class embedding (B, 1, C) of labels; -1 is the null class, the MEAN of all classes'
        embeddings, as in TARFlow: --label-drop, 10 % of the labels, trains them all, a little."""
        if self.class_embed is None or self.place is not None:
            return 0.0
        null, rows = self.class_embed.mean(dim=0), self.class_embed[labels.clamp(min=0)]
        return torch.where(labels[:, None] >= 0, rows, null)[:, None]

    def prefix(self, labels: Tensor) -> Tensor:
        """labels (B, L) -> (B, L, C), what the block reads before the tokens. -1 is no word.
        Nothing is masked: an empty place says that no word is there, as in STARFlow."""
        words = self.class_embed[labels.clamp(min=0)]  # (B, L, C)
        return self.place + torch.where(labels[..., None] >= 0, words, 0.0)

    def embed(self, x: Tensor, position: Tensor, condition: Tensor | float) -> Tensor:
        """Tokens x (B, T, d) as the Transformer reads them, (B, T, C)."""
        return self.proj_in(x.type_as(self.proj_in.weight)) + position + condition

    def predict(self, h: Tensor, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor]:
        """mu and alpha, (B, T, d) each, for the token AFTER each of what is read, h (B, T, C)."""
        for i, layer in enumerate(self.layers):
            h = layer(h, cache, i)
        mu, alpha = at_least_float32(self.proj_out(h)).chunk(2, dim=-1)
        return mu, SCALES[self.scale](alpha)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, K, d), labels or captions -> u (B, K, d) and logdet (B,) in nats."""
        x = self.order(at_least_float32(x))
        h = self.embed(x, self.order(self.position), self.condition(labels))  # (B, K, C)
        if self.place is not None:
            h = torch.cat((self.prefix(labels), h), dim=1)  # (B, L + K, C)
        mu, alpha = self.predict(h)
        # Shift by one: token i gets what was predicted from all before it. Without a caption there
        # is nothing before token 0, which passes unchanged: pad a 0; with L words, cut off L - 1.
        shift = (0, 0, 1 + x.shape[1] - h.shape[1], -1)
        mu, alpha = F.pad(mu, shift), F.pad(alpha, shift)  # (B, K, d) each
        u = (x - mu) * torch.exp(-alpha)
        return self.order(u), -alpha.sum(dim=(1, 2))

    def inverse(
        self,
        u: Tensor,
        labels: Tensor,
        guidance: Guidance = NO_GUIDANCE,
        window: int | None = None,
        tolerance: float = 1e-5,
        watch: Callable[[int, int], None] = lambda block, solved: None,
    ) -> Tensor:
        """The x (B, K, d) that forward maps to u, or its guided version: token by token, or, with a
        `window` (and `tolerance`), by `jacobi`."""
        u = self.order(at_least_float32(u))
        predict = Predictor(self, u, labels, guidance)
        if self.place is not None:  # the solvers below find token 0 solved
            mu, alpha = predict.from_caption(self.prefix(predict.labels))  # (B, 1, d) each
            u = torch.cat((u[:, :1] * torch.exp(alpha) + mu, u[:, 1:]), dim=1)
        if window is not None:
            x = jacobi(u, predict, window, tolerance, functools.partial(watch, self.number))
            return self.order(x)
        # Nothing in this loop waits for the device: sample.py records it as a CUDA graph.
        x = [u[:, :1]]  # the first token passes unchanged, or has just been solved
        for i in range(1, u.shape[1]):
            mu, alpha = predict(x[-1], i - 1)  # of token i, (B, 1, d) each
            x.append(u[:, i : i + 1] * torch.exp(alpha) + mu)
            watch(self.number, 1)
        return self.order(torch.cat(x, dim=1))


# --------------------------------------------------------------------------------------------------
# What the inverse of a block needs


class Predictor:
    """mu and alpha of a block's next tokens, guided, while the block is being inverted.

    It keeps what is the same for all tokens, and the cache, which knows the tokens so far.
    """

    def __init__(self, block: AutoregressiveBlock, u: Tensor, labels: Tensor, guidance: Guidance):
        self.block, self.guidance, K = block, guidance, u.shape[1]
        self.guided = guidance.weight != 0 and block.class_embed is not None
        if self.guided:  # conditional and unconditional halves share one batch
            labels = torch.cat((labels, torch.full_like(labels, -1)))
        self.labels, self.condition = labels, block.condition(labels)
        self.position = block.order(block.position)
        tokens = torch.arange(K, dtype=u.dtype, device=u.device)
        self.progress = tokens[:, None] / max(K - 1, 1)  # (K, 1)
        self.before = 0 if block.place is None else len(block.place)  # places before the tokens
        self.cache = KeyValueCache(len(block.layers), self.before + K)

    def from_caption(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """prefix (B or 2B, L, C), read only once -> mu and alpha of token 0, (B, 1, d) each."""
        mu, alpha = self.block.predict(prefix, self.cache)
        return self.guide(mu[:, -1:], alpha[:, -1:], self.progress[:1])

    def __call__(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """x (B, T, d), the tokens start .. start+T-1 -> mu and alpha, (B, T, d) each, of the tokens
        one later, start+1 .. start+T. The tokens before `start` have been read by earlier calls."""
        # What those calls have read from `start` on were guesses of jacobi, and is overwritten.
        self.cache.length, end = self.before + start, start + x.shape[1]
        both = x.repeat(2, 1, 1) if self.guided else x  # (B or 2B, T, d)
        h = self.block.embed(both, self.position[start:end], self.condition)
        return self.guide(*self.block.predict(h, self.cache), self.progress[start + 1 : end + 1])

    def guide(self, mu: Tensor, alpha: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """mu, alpha (B or 2B, T, d), first with, then without the condition -> (B, T, d) each."""
        if not self.guided:
            return mu, alpha
        (mu, mu_null), (alpha, alpha_null) = mu.chunk(2), alpha.chunk(2)
        return self.guidance(mu, alpha, mu_null, alpha_null, progress)


def jacobi(
    u: Tensor,
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],  # a Predictor
    window: int,
    tolerance: float,
    watch: Callable[[int], None],
) -> Tensor:
    """Many tokens at once, by fixed-point iteration (arXiv 2505.12849): u -> x, (B, K, d) each.

    A sweep puts a guess of x into the right-hand side of x_i = u_i * exp(alpha_i) + mu_i for all
    tokens of a window. The first is then solved, as all before the window are, and so is each next
    one while all before it have changed by at most `tolerance`, in every picture of the batch. The
    window then begins after them: at least one a sweep, so K - 1 suffice; `watch` is told how many.
    Tolerance 0 is the sequential result, but may wait for mere rounding; a larger one is off by
    about itself, mostly after far fewer sweeps. That paper: fixed segments; here: a window that
    moves on with what is solved, because it needs no bound on the sweeps and repeats no solved one.
    """
    x = u.clone()  # token 0 is solved; for the others u is a guess
    inputs, outputs, u_next = x[:, :-1], x[:, 1:], u[:, 1:]  # (B, K - 1, d): token i, token i + 1
    start, count = 0, u.shape[1] - 1
    while start < count:
        here = slice(start, min(start + window, count))
        # A wrong guess may overflow. It must not make the tokens before it NaN: attention
        # multiplies what it hides by zero, and 0 * inf is NaN.
        guess = inputs[:, here].nan_to_num(0.0, FAR, -FAR).clamp(-FAR, FAR)
        mu, alpha = predict(guess, start)  # (B, T, d) each
        better = u_next[:, here] * torch.exp(alpha) + mu
        settled = (better - outputs[:, here]).abs().amax(dim=(0, 2)) <= tolerance  # (T,)
        outputs[:, here] = better  # writes into x, and so into `inputs`
        # All settled ones from the first on, and the next, whose inputs these are.
        solved = min(1 + int(settled.cumprod(0).sum()), len(settled))  # waits for the device
        watch(solved)
        start += solved
    return x


# --------------------------------------------------------------------------------------------------
# The flow


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
        caption_words: int = 0,  # L, words of a caption; 0 = labels. num_classes = words there are
    ):
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f'scale must be one of {", ".join(SCALES)}, got "{scale}"')
        self.num_latents, self.latent_dim, self.num_classes = num_latents, latent_dim, num_classes
        self.caption_words = caption_words
        sizes = (num_latents, latent_dim, width)
        self.blocks = nn.ModuleList()
        for i, depth in enumerate(depths):
            # Words are for the deep block only: in STARFlow's trials that cost nothing.
            known = num_classes if not caption_words or i == len(depths) - 1 else 0
            block = (depth, head_dim, known, gated, scale, caption_words if known else 0)
            self.blocks.append(AutoregressiveBlock(i, *sizes, *block))

    def _labels(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Labels, or rows of L words, as int64 on z's device; None = unconditional = all -1."""
        shape = (len(z), self.caption_words) if self.caption_words else (len(z),)
        if labels is None:
            return torch.full(shape, -1, dtype=torch.int64, device=z.device)
        if labels.shape != shape:
            raise ValueError(f"labels must be {shape}, got {tuple(labels.shape)}")
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

        z (B, K, d); labels int64, one or L words each, -1 = none; None = all unconditional.
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
        """z = F^-1(u): noise (B, K, d) and labels as in `forward` to latents (B, K, d), >= float32.

        `guidance` is the weight w of classifier-free guidance in the deep block, 0 = none (exact
        inverse); `annealed` and `rule` ("tarflow" or "starflow") as in `Guidance`. `sampler` is
        "sequential", or "jacobi", which calls a token solved when none before it has changed by
        more than `tolerance`. `watch` is called with (block, tokens solved) after each pass through
        that block. u is left unchanged.
        """
        for name, value, known in (("rule", rule, RULES), ("sampler", sampler, SAMPLERS)):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got "{value}"')
        x, labels, deep = u, self._labels(u, labels), self.blocks[-1]
        for block in reversed(self.blocks):
            block_guidance = Guidance(guidance, annealed, rule) if block is deep else NO_GUIDANCE
            window = DEEP_WINDOW if block is deep else self.num_latents  # of jacobi only
            window = None if sampler == "sequential" else window
            x = block.inverse(x, labels, block_guidance, window, tolerance, watch)
        return x

    def between(self, z: Tensor, count: int) -> Tensor:
        """From z[0] to z[1], (2, K, d) -> (count, K, d), without a class; both ends as they were.

        Through the noise u: it is almost surely near a sphere, where every point is as likely as
        the ends, so along its arc. A straight line would cut through what is never sampled.
        """
        a, b = self(z, None)[0].flatten(1)  # u, (K * d,) each
        cosine = F.cosine_similarity(a, b, dim=0)
        angle = cosine.clamp(-0.999999, 0.999999).arccos()  # at 0, of equal pictures, 0 / 0
        t = torch.linspace(0, 1, count).to(a)[:, None]
        u = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        return self.inverse(u.unflatten(1, z.shape[1:]), None)  # (count, K, d)
