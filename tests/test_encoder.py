"""encoder.py: masks, rotary positions, attention and what the latents may depend on."""

from types import SimpleNamespace

import pytest
import torch
from conftest import randomize

from encoder import (
    Attention,
    Block,
    MaskedEncoder,
    grid_coordinates,
    random_mask,
    rotate,
    rotations,
    sincos_positions,
)


def small_encoder(**changes) -> MaskedEncoder:
    sizes = dict(image_size=16, patch_size=4, width=16, depth=2, heads=2)
    return randomize(MaskedEncoder(**{**sizes, "num_latents": 3, "latent_dim": 5, **changes}))


def test_mask_hides_the_drawn_share_of_every_image_exactly_and_repeats():
    generator = torch.Generator().manual_seed(1)
    for ratio, hidden in ((0, 0), (0.5, 128), (1, 256)):
        assert (random_mask(50, 256, (ratio, ratio), generator).sum(dim=1) == hidden).all()
    hidden = random_mask(2000, 100, (0.4, 0.6), generator).sum(dim=1)
    assert hidden.min() == 40 and hidden.max() == 60
    assert abs(hidden.double().mean() - 50) < 0.5  # uniform between: std 5.8 / sqrt(2000) = 0.13
    mask = random_mask(4000, 16, (0.5, 0.5), generator)
    assert (mask.double().mean(dim=0) - 0.5).abs().max() < 0.04  # every patch as often: 5 sigma
    first, second = (random_mask(3, 9, generator=torch.Generator().manual_seed(4)) for _ in "12")
    assert (first == second).all()
    with pytest.raises(ValueError, match="mask_ratio"):
        random_mask(3, 9, (0.7, 0.2))


def test_pixels_of_a_hidden_patch_cannot_influence_mu():
    encoder = small_encoder()
    images = torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 6] = True  # row 1, column 2 of the 4 x 4 grid
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 10
    assert torch.equal(encoder(images, mask), encoder(changed, mask))
    assert (encoder(images) - encoder(changed)).abs().max() > 1e-3


def test_masking_replaces_the_patch_and_keeps_its_position():
    encoder = small_encoder()
    images = torch.randn(1, 3, 16, 16)
    one, other = torch.zeros(2, 1, 16, dtype=torch.bool)
    one[0, 3], other[0, 12] = True, True
    everything = torch.ones(1, 16, dtype=torch.bool)
    assert (encoder(images, one) - encoder(images, other)).abs().max() > 1e-4
    assert torch.equal(encoder(images, everything), encoder(-images, everything))
    torch.testing.assert_close(encoder(images, torch.zeros_like(one)), encoder(images))


def test_features_are_what_the_projection_reads_and_float64_stays():
    encoder = small_encoder().double()
    images = torch.randn(2, 3, 16, 16).double()
    features, mu = encoder.features(images), encoder(images)
    assert features.shape == (2, 3, 16)  # (B, K, C)
    assert mu.shape == (2, 3, 5) and mu.dtype == torch.float64  # (B, K, d)
    assert torch.equal(encoder.projection(features), mu) and torch.equal(encoder(images), mu)


def test_the_outputs_kept_are_those_of_the_queries():
    encoder = small_encoder()
    for weight in encoder.blocks.parameters():  # such layers add nothing to what they get
        torch.nn.init.zeros_(weight)
    expected = encoder.norm(encoder.queries + encoder.query_position).expand(2, -1, -1)
    torch.testing.assert_close(encoder.features(torch.randn(2, 3, 16, 16)), expected)


def test_attention_without_rotation_equals_torch_multihead_attention():
    attention = randomize(Attention(width=16, heads=4))
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.weight.copy_(attention.proj.weight)
        reference.out_proj.bias.copy_(attention.proj.bias)
    x = torch.randn(2, 7, 16)
    expected, _ = reference(x, x, x)
    torch.testing.assert_close(attention(x, None), expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_rotated_at_the_origin():
    block, x = randomize(Block(width=16, heads=4)), torch.randn(2, 7, 16)
    (still,) = rotations([block], torch.zeros(7, 2))
    assert torch.equal(block.attention(x, still), block.attention(x, None))


def test_rotary_attention_depends_on_relative_positions_only():
    block = randomize(Block(width=16, heads=2)).double()
    x, coordinates = torch.randn(1, 9, 16).double(), grid_coordinates(3, 3).double()

    def attend(where: torch.Tensor) -> torch.Tensor:
        return block.attention(x, *rotations([block], where))

    shifted = coordinates + torch.tensor([5.0, -2.0]).double()
    torch.testing.assert_close(attend(shifted), attend(coordinates))
    assert (attend(2 * coordinates) - attend(coordinates)).abs().max() > 1e-4


def test_rotation_turns_channel_pairs_as_complex_numbers():
    attention, coordinates = randomize(Attention(16, 2)).double(), torch.randn(5, 2).double()
    angle = torch.einsum("tr, rhj -> htj", coordinates, attention.rotary)  # (heads, T, hd/2)
    (rotation,) = rotations([SimpleNamespace(attention=attention)], coordinates)
    x = torch.randn(3, 2, 2, 2, 5, 4).double()
    expected = torch.complex(*x.unbind(1)) * torch.polar(torch.ones_like(angle), angle)
    turned = rotate(x, *rotation)
    torch.testing.assert_close(torch.complex(*turned.unbind(1)), expected)


def test_query_tokens_are_not_rotated():
    encoder = small_encoder()
    assert encoder.coordinates.shape == (16 + 3, 2)
    assert (encoder.coordinates[16:] == 0).all()
    assert encoder.coordinates[6].tolist() == [1, 2]


def test_start_positions_tell_all_patches_apart_at_amplitude_one():
    table = sincos_positions(4, 4, 32)
    assert table.shape == (16, 32)
    assert table.abs().max() <= 1 and abs(table.square().mean().item() - 0.5) < 0.01
    assert torch.cdist(table, table).add(torch.eye(16)).min() > 0.5


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not divisible by patch size"):
        small_encoder(image_size=18)
    with pytest.raises(ValueError, match="heads"):
        small_encoder(heads=3)
