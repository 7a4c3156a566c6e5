"""decoder.py: the layout of the picture, stochastic depth, the auxiliary decoder."""

import torch
from conftest import randomize

from decoder import AuxiliaryDecoder, Decoder, drop_path_scales


def small_decoder() -> Decoder:
    sizes = dict(image_size=12, patch_size=4, width=16, depth=3, heads=2)
    return randomize(Decoder(**sizes, num_latents=5, latent_dim=6, drop_path=0.5))


def test_unpatchify_puts_every_pixel_where_a_loop_puts_it():
    decoder, patches = small_decoder(), torch.randn(2, 9, 48)
    expected = torch.empty(2, 3, 12, 12)
    for n in range(9):
        for row in range(4):
            for col in range(4):
                for colour in range(3):
                    value = patches[:, n, (row * 4 + col) * 3 + colour]
                    expected[:, colour, n // 3 * 4 + row, n % 3 * 4 + col] = value
    assert torch.equal(decoder.unpatchify(patches), expected)


def test_every_latent_token_and_its_position_matter():
    decoder = small_decoder().eval()
    z = torch.randn(1, 5, 6)
    image = decoder(z)
    assert image.shape == (1, 3, 12, 12)
    for k in range(5):
        changed = z.clone()
        changed[:, k] += 1
        assert (decoder(changed) - image).abs().max() > 1e-5
    assert (decoder(z.flip(1)) - image).abs().max() > 1e-5
    assert decoder.double()(z.double()).dtype == torch.float64


def test_drop_path_is_off_in_eval_and_random_in_training():
    decoder, z, nothing = small_decoder(), torch.randn(4, 5, 6), torch.zeros(3, 2, 4)
    assert not torch.equal(decoder(z), decoder(z))
    decoder.eval()
    assert torch.equal(decoder(z), decoder(z)) and torch.equal(decoder(z, nothing), decoder(z))


def test_drop_path_acts_on_each_image_alone_and_leaves_the_residual_stream():
    decoder, z = small_decoder().train(), torch.randn(2, 5, 6)
    one, nothing = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    torch.testing.assert_close(decoder(z, nothing), decoder(-z, nothing))  # no patch sees a latent
    mixed = decoder(z, torch.stack((one[..., 0], nothing[..., 1]), dim=-1))
    torch.testing.assert_close(mixed[0], decoder(z, one)[0])
    torch.testing.assert_close(mixed[1], decoder(z, nothing)[1])
    torch.testing.assert_close(decoder(z, one), decoder.eval()(z))


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    scales = drop_path_scales(20_000, 3, 0.4, torch.Generator().manual_seed(0))
    assert scales.shape == (3, 2, 20_000)
    assert (scales[0] == 1).all()
    dropped = (scales == 0).double().mean(dim=(1, 2))
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.2, 0.4]).double(), atol=0.01, rtol=0)
    assert (scales.mean(dim=(1, 2)) - 1).abs().max() < 0.02


def test_a_fresh_decoder_paints_grey():
    sizes = dict(image_size=8, patch_size=4, width=16, depth=1, heads=2)
    fresh = Decoder(**sizes, num_latents=2, latent_dim=3)
    assert (fresh(torch.randn(2, 2, 3)) == 0).all()


def test_auxiliary_decoder_mixes_tokens_then_works_on_each_patch_alone():
    auxiliary = randomize(AuxiliaryDecoder(9, 5, 6, width=16, target_dim=7)).double()
    z = torch.randn(2, 5, 6, dtype=torch.float64)
    features = auxiliary(z)
    assert features.shape == (2, 9, 7)
    patch = z.transpose(1, 2) @ auxiliary.mix.weight[4] + auxiliary.mix.bias[4]  # (2, 6)
    torch.testing.assert_close(auxiliary.mlp(patch), features[:, 4])
    assert AuxiliaryDecoder()(torch.randn(1, 128, 64)).shape == (1, 256, 768)  # the paper's
    widths = [m.out_features for m in AuxiliaryDecoder().mlp if isinstance(m, torch.nn.Linear)]
    assert widths == [1024, 1024, 768]
