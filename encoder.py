"""The masked encoder (Sec. 3.1): an image with half of its patches hidden becomes K latent tokens.

    image (B, 3, H, W) in [-1, 1]
      | patch_embed: one p x p patch -> one token
    patches (B, N, C)                     N = (H/p) * (W/p)
      | hidden patches REPLACED by one learnable mask token, then + learnable absolute positions
      | K learnable query tokens (+ learnable 1-D positions) appended
    tokens (B, N + K, C)
      | depth x [ x + Attention(LN(x)),  x + MLP(LN(x)) ]   bidirectional, 2-D rotary on patches
      | final LayerNorm, keep the K queries only
    features (B, K, C)
      | linear
    mu (B, K, d)                          z = mu + sigma * eps is Eq. 1, drawn by the caller

Each image hides its own share of its patches (`random_mask`: uniform in 40 to 60 %). Why replace,
not drop: every image has N + K tokens, and a mask token says that something is hidden at its place.
Why queries: the flow needs a sequence whose length and meaning do not depend on which patches
happened to be hidden, as those of the visible patches alone would (MAE).

The Vision Transformer below (Attention, MLP, Block) is written out here and shared with decoder.py.
The encoder is deterministic: the mask and the noise are drawn by whoever calls it.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROPE_THETA = 10.0  # base of the rotary frequencies of "mixed" 2-D rotary positions (RoPE-ViT)
TOKEN_STD = 0.7  # initial std of free tokens: the rms of the sine-cosine positions beside them


# --------------------------------------------------------------------------------------------------
# Masking


def random_mask(
    batch: int,
    num_patches: int,
    mask_ratio: tuple[float, float] = (0.4, 0.6),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide a random subset of the patches of each image (Sec. 3.1, Tab. 6).

    Every image draws its own ratio uniformly in `mask_ratio`; exactly round(ratio * num_patches)
    of its patches are hidden. Returns a bool tensor (batch, num_patches) on the generator's
    device, True = HIDDEN. (0, 0) hides nothing. Raises ValueError unless 0 <= low <= high <= 1.
    """
    low, high = mask_ratio
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"mask_ratio must be 0 <= low <= high <= 1, got {low} {high}")
    device = generator.device if generator is not None else None
    ratio = low + (high - low) * torch.rand(batch, 1, generator=generator, device=device)
    num_hidden = (ratio * num_patches).round()  # (B, 1)
    # The rank of a random number is a random permutation: hide the patches with the lowest ranks.
    rank = torch.rand(batch, num_patches, generator=generator, device=device).argsort(1).argsort(1)
    return rank < num_hidden  # (B, N)


# --------------------------------------------------------------------------------------------------
# Positions


def grid_coordinates(rows: int, cols: int) -> Tensor:
    """Row and column of every patch, row-major, (rows * cols, 2), counted from the top left."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack((row, col), dim=-1).flatten(0, 1).to(torch.get_default_dtype())


def sincos_positions(rows: int, cols: int, width: int) -> Tensor:
    """The 2-D sine-cosine table (rows * cols, width): where learnable absolute positions start.

    Amplitude 1, so that positions are as large as the patch embeddings beside them. Started at std
    0.02, as usual, tokens look alike, and training stalls for hundreds of steps.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4 for 2-D positions, got {width}")
    frequency = 1.0 / 10000 ** (torch.arange(width // 4) / (width // 4))  # (C/4,)
    angle = grid_coordinates(rows, cols)[:, :, None] * frequency  # (N, 2, C/4)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(1)  # (N, C)


def mixed_rotary_frequencies(heads: int, head_dim: int) -> Tensor:
    """Initial 2-D rotary frequencies (2, heads, head_dim / 2): a (row, column) wave vector a pair.

    "Mixed": each head's pairs point along two orthogonal directions, turned by an angle of the
    head's own, and all are learned, so that heads may attend along diagonals as well (RoPE-ViT,
    Heo et al. 2024).
    """
    if head_dim % 4:
        raise ValueError(f"head size must be a multiple of 4 for rotary positions, got {head_dim}")
    magnitude = ROPE_THETA ** -(torch.arange(head_dim // 4) / (head_dim // 4))  # (hd/4,)
    turn = torch.rand(heads, 1) * 2 * math.pi
    angle = torch.cat((turn, turn + math.pi / 2), dim=1)[:, :, None]  # (heads, 2, 1)
    wave = torch.stack((magnitude * angle.sin(), magnitude * angle.cos()))  # (2, heads, 2, hd/4)
    return wave.flatten(2)  # (2, heads, hd/2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (j, j + hd/2) of queries and keys by the angles of one of `rotations`:
    x (B, 2, 2, heads, T, hd/2): halves, then q and k; cos and sin (2, 2, heads, T, hd/2)."""
    return x * cos + (x * sin).flip(1)


def rotations(blocks: nn.ModuleList, coordinates: Tensor) -> tuple[Tensor, ...]:
    """For each block [cos, cos], [sin, -sin] of two halves, for q and k, of tokens at coordinates
    (T, 2): (2, 2, 2, heads, T, hd/2). All at once: a block's angles alone keep no GPU busy."""
    rotary = torch.stack([block.attention.rotary for block in blocks])  # (depth, 2, heads, hd/2)
    row, col = coordinates[:, :1], coordinates[:, 1:]  # (T, 1) each
    # Written as products: in a matrix product autocast would round angles to bfloat16.
    angle = row * rotary[:, 0, :, None] + col * rotary[:, 1, :, None]  # (depth, heads, T, hd/2)
    turns = torch.stack((angle.cos(), angle.sin(), angle.cos(), angle.sin()), dim=1)  # of q, of k
    cos, sin = turns.unflatten(1, (2, 2)).unbind(2)  # (depth, 2, heads, T, hd/2) each
    turns = torch.stack((cos, cos, sin, -sin), dim=1).unflatten(1, (2, 2))
    kind = angle.device.type  # float32 turns would make all float32
    if kind != "meta" and torch.is_autocast_enabled(kind):
        turns = turns.to(torch.get_autocast_dtype(kind))
    return turns.transpose(2, 5).contiguous().transpose(2, 5).unbind()  # in memory as q and k are


# --------------------------------------------------------------------------------------------------
# The Vision Transformer


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with 2-D rotary positions on queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rotary = nn.Parameter(mixed_rotary_frequencies(heads, width // heads))

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """x (B, T, C) -> (B, T, C), queries and keys turned as one of `rotations` says, or not."""
        B, T, C = x.shape  # batch, tokens, width
        qk, v = self.qkv(x).view(B, T, 3, self.heads, 2, -1).split((2, 1), dim=2)
        if rotation is not None:
            qk = rotate(qk.transpose(1, 4), *rotation).transpose(1, 4)
        parts = (*qk.unbind(2), v.squeeze(2))  # (B, T, heads, 2, hd/2) each
        q, k, v = (part.flatten(3).transpose(1, 2) for part in parts)  # (B, heads, T, hd) each
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, T, hd)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Sequential):
    """Two linear layers, four times as wide inside, GELU between."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """Pre-LayerNorm Transformer block with optional stochastic depth ("drop-path")."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, branch_scale: Tensor | None = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). `rotation` as in Attention. `branch_scale` (2, B) multiplies
        the two residual branches, image by image: 0 drops one, 1/(1-p) makes up for it (drop-path,
        of the decoder only); None leaves both alone."""
        attention = self.attention(self.norm1(x), rotation)
        x = x + (attention if branch_scale is None else branch_scale[0, :, None, None] * attention)
        mlp = self.mlp(self.norm2(x))
        return x + (mlp if branch_scale is None else branch_scale[1, :, None, None] * mlp)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights, zero biases for linear layers, as MAE starts. For Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class MaskedEncoder(nn.Module):
    """ViT that reads a partly hidden image and writes K latent tokens (Sec. 3.1, Tab. 6)."""

    def __init__(
        self,
        image_size: int = 256,  # side of the square image in pixels
        patch_size: int = 16,  # side p of a patch in pixels; must divide image_size
        width: int = 768,  # C, channels of a token (ViT-B)
        depth: int = 12,  # Transformer blocks
        heads: int = 12,  # attention heads; width / heads must be a multiple of 4
        num_latents: int = 128,  # K query tokens
        latent_dim: int = 64,  # d numbers each
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not divisible by patch size {patch_size}")
        grid = image_size // patch_size
        self.num_patches = grid * grid  # N
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(sincos_positions(grid, grid, width))  # (N, C)
        self.queries = nn.Parameter(TOKEN_STD * torch.randn(num_latents, width))  # (K, C)
        self.query_position = nn.Parameter(torch.zeros(num_latents, width))  # (K, C)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, latent_dim)
        # Query tokens sit at (0, 0), where the rotation is the identity: they are not rotated.
        coordinates = torch.cat((grid_coordinates(grid, grid), torch.zeros(num_latents, 2)))
        self.register_buffer("coordinates", coordinates, persistent=False)  # (N + K, 2)

        self.apply(init_linear)
        # A convolution with stride p is a linear map of each patch, and starts like one.
        nn.init.xavier_uniform_(self.patch_embed.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.bias)

    def features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The K query outputs before the projection: what a linear probe reads (Sec. 4.1.1).

        images (B, 3, H, W) in [-1, 1]; mask (B, N) bool, True = hidden, None: none is -> (B, K, C).
        """
        B, N = len(images), self.num_patches
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, N, C)
        if mask is not None:
            patches = torch.where(mask[:, :, None], self.mask_token.type_as(patches), patches)
        patches = patches + self.position
        queries = (self.queries + self.query_position).expand(B, -1, -1)  # (B, K, C)
        tokens = torch.cat((patches, queries), dim=1)  # (B, N + K, C)
        for i, rotation in enumerate(rotations(self.blocks, self.coordinates)):
            tokens = self.blocks[i](tokens, rotation)
        return self.norm(tokens[:, N:])  # (B, K, C)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """mu = E(x_masked) of Eq. 1, without noise: (B, 3, H, W), (B, N) -> (B, K, d)."""
        return self.projection(self.features(images, mask))
