"""The generative decoder (Sec. 3.1): K latent tokens become a picture.

    z (B, K, d)
      | linear d -> C, + learnable 1-D positions
      | N copies of one learnable mask token, + learnable absolute positions, put in front
    tokens (B, N + K, C)
      | depth x Transformer block, bidirectional, 2-D rotary on the N patch tokens, drop-path
      | keep the N patch tokens, LayerNorm, linear C -> p*p*3
    image (B, 3, H, W), about [-1, 1] (not clamped)

The encoder turned round. The decoder sees no pixel and no mask: all it knows of the image is in
z, and z came from a half-hidden image and carries noise, so the decoder learns to inpaint and to
denoise at once.

Beside it, while phase 1 trains, stands one small auxiliary decoder for each frozen teacher, which
must read the teacher's features of the whole image, judged where it is hidden, out of the same z
(Sec. 3.3.1, Eq. 7):

    z (B, K, d) -> linear over the token axis, K -> N -> (B, N, d) -> MLP -> features (B, N, C_t)
"""

import torch
import torch.nn as nn
from torch import Tensor

from encoder import TOKEN_STD, Block, grid_coordinates, init_linear, rotations, sincos_positions


def drop_path_scales(
    batch: int, depth: int, drop_path: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw stochastic depth for every image and residual branch: (depth, 2, batch).

    An entry is 0 with probability p and 1/(1-p) otherwise, so that its mean is 1; p grows
    linearly from 0 at the first block to `drop_path` at the last (Huang et al. 2016).
    """
    device = generator.device if generator is not None else None
    p = torch.linspace(0, drop_path, depth, device=device)[:, None, None]
    kept = torch.rand(depth, 2, batch, generator=generator, device=device) >= p
    return kept / (1 - p)


class Decoder(nn.Module):
    """ViT decoder with mask tokens (Sec. 3.1, Tab. 6)."""

    def __init__(
        self,
        image_size: int = 256,  # side of the square image in pixels
        patch_size: int = 16,  # side p of a patch in pixels; must divide image_size
        width: int = 768,  # C, channels of a token (ViT-B)
        depth: int = 12,  # Transformer blocks
        heads: int = 12,  # attention heads; width / heads must be a multiple of 4
        num_latents: int = 128,  # K latent tokens
        latent_dim: int = 64,  # d numbers each
        drop_path: float = 0.05,  # stochastic depth of the last block while training
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not divisible by patch size {patch_size}")
        self.grid = image_size // patch_size
        self.patch_size = patch_size
        self.drop_path = drop_path
        # paper: nothing on positions; the release: rotary only here. Here: absolute + rotary, as
        # in the encoder, because at small scale rotary alone learns slower.
        self.position = nn.Parameter(sincos_positions(self.grid, self.grid, width))  # (N, C)
        # One for all N places (not the encoder's): to the decoder every patch is hidden.
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.latent_embed = nn.Linear(latent_dim, width)
        self.latent_position = nn.Parameter(TOKEN_STD * torch.randn(num_latents, width))  # (K, C)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.to_pixels = nn.Linear(width, patch_size * patch_size * 3)
        coordinates = torch.cat(
            (grid_coordinates(self.grid, self.grid), torch.zeros(num_latents, 2))
        )
        self.register_buffer("coordinates", coordinates, persistent=False)  # (N + K, 2)

        self.apply(init_linear)
        nn.init.zeros_(self.to_pixels.weight)  # start from the grey image

    def forward(self, z: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """x_hat = D(z): latents (B, K, d) -> images (B, 3, H, W), about [-1, 1].

        `branch_scales` (depth, 2, B) is the drop-path of this call (`drop_path_scales`), for a
        caller that controls randomness; None draws it while training. In eval mode nothing is
        ever dropped.
        """
        B, N = len(z), self.grid**2
        if not self.training or self.drop_path == 0:
            branch_scales = None
        elif branch_scales is None:
            branch_scales = drop_path_scales(B, len(self.blocks), self.drop_path).to(z.device)

        patches = (self.mask_token + self.position).expand(B, -1, -1)  # (B, N, C)
        latents = self.latent_embed(z) + self.latent_position  # (B, K, C)
        tokens = torch.cat((patches, latents), dim=1)  # (B, N + K, C)
        for i, rotation in enumerate(rotations(self.blocks, self.coordinates)):
            scale = None if branch_scales is None else branch_scales[i]
            tokens = self.blocks[i](tokens, rotation, scale)
        return self.unpatchify(self.to_pixels(self.norm(tokens[:, :N])))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Patches (B, N, p*p*3), row-major, each (row, column, colour) -> image (B, 3, H, W)."""
        B, g, p = len(patches), self.grid, self.patch_size
        image = patches.view(B, g, g, p, p, 3).permute(0, 5, 1, 3, 2, 4)  # (B, 3, g, p, g, p)
        return image.reshape(B, 3, g * p, g * p)


class AuxiliaryDecoder(nn.Module):
    """h_t of Eq. 7: a light MLP that predicts a teacher's patch features from z (Sec. 3.3.1).

    Only phase 1 has it; afterwards it is thrown away. Light on purpose: what it cannot work out by
    itself, the latents have to say.
    """

    def __init__(
        self,
        num_patches: int = 256,  # N patches of the image
        num_latents: int = 128,  # K latent tokens
        latent_dim: int = 64,  # d numbers each
        width: int = 1024,  # channels of the two hidden layers
        target_dim: int = 768,  # C_t, channels of the teacher
    ):
        super().__init__()
        self.mix = nn.Linear(num_latents, num_patches)
        self.mlp = nn.Sequential(
            nn.Linear(latent_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, target_dim),
        )
        self.apply(init_linear)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, K, d) -> predicted features (B, N, C_t), one for each patch, row-major."""
        patches = self.mix(z.transpose(1, 2)).transpose(1, 2)  # (B, N, d)
        return self.mlp(patches)
