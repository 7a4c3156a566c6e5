"""losses.py: each term against numpy or a torch distribution, by hand."""

import math

import numpy as np
import torch

from losses import flow_nll, joint_loss, pixel_loss


def test_pixel_loss_is_the_mean_square_over_the_whole_image():
    x, y = torch.randn(2, 3, 3, 4, 4)
    expected = [np.mean((a - b) ** 2) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    np.testing.assert_allclose(pixel_loss(x, y).numpy(), expected, rtol=1e-6)


def test_nll_parts_add_up_to_the_negative_log_density_per_number():
    u, logdet = torch.randn(3, 4, 5).double(), torch.randn(3).double()
    square, volume = flow_nll(u, logdet)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum(dim=(1, 2)) + logdet
    expected = -log_density / 20 - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(square + volume, expected)
    torch.testing.assert_close(volume, -logdet / 20)


def test_joint_loss_weighs_the_flow():
    pixel, nll = torch.tensor([1.0, 2.0]), torch.tensor([10.0, -10.0])
    assert joint_loss(pixel, nll, 0.1).tolist() == [2.0, 1.0]


def test_equal_parts_average_to_the_whole():
    x, y = torch.randn(2, 8, 3, 4, 4).double()
    parts = [pixel_loss(x[i : i + 2], y[i : i + 2]).mean() for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), pixel_loss(x, y).mean())
