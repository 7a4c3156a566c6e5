"""The smallest singular value of a flow's Jacobian in another way, to check spectral.py with.

sigma_min(J) = 1 / sigma_max(J^-1): Eq. 9 on the exact inverse. There is no shift and no conjugate
gradient, and nothing is squared, so that it tells where J^T J's condition number is beyond float64.
It takes K products per block and side instead of one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import spectral
from flow import NormalizingFlow


class InverseJacobian:
    """J^-1, exactly, with the methods of spectral.Jacobian.

    J = J_L ... J_1, a factor per block. In the block's own token order J_b is lower triangular,
    because token i of its output depends on tokens 0..i of its input only; and the part that ties
    output token i to input token i is diagonal. So J_b w = v is solved by forward substitution,
    one token after the other, and J_b^T w = v by the same from the last token to the first.
    """

    def __init__(self, flow: NormalizingFlow, z: Tensor, labels: Tensor):
        self.flow, self.z, self.labels = flow, z, labels
        self.factors = []  # (J_b, tokens in the order of block b, diagonal of J_b (B, K, d))
        x = z
        for block in flow.blocks:
            jacobian = spectral.Jacobian(block, x, labels)
            tokens = list(range(x.shape[1]))[:: -1 if block.backward else 1]
            diagonal = torch.empty_like(x)
            for i in tokens:  # ones at token i, nothing elsewhere, read its diagonal off
                ones = torch.zeros_like(x)
                ones[:, i] = 1
                diagonal[:, i] = jacobian.times(ones.flatten(1)).view_as(x)[:, i]
            self.factors.append((jacobian, tokens, diagonal))
            x = jacobian.u

    def times(self, v: Tensor) -> Tensor:
        """J^-1 v, (B, D) -> (B, D): J_1^-1 ... J_L^-1 v, the last block first."""
        for jacobian, tokens, diagonal in reversed(self.factors):
            v = substitute(jacobian.times, tokens, diagonal, v)
        return v

    def transposed_times(self, u: Tensor) -> Tensor:
        """J^-T u, (B, D) -> (B, D): the first block first, each from its last token back."""
        for jacobian, tokens, diagonal in self.factors:
            u = substitute(jacobian.transposed_times, tokens[::-1], diagonal, u)
        return u

    def rows(self, keep: Tensor) -> "InverseJacobian":
        """The inverse Jacobian of some of the images, keep (B,) bool."""
        return InverseJacobian(self.flow, self.z[keep], self.labels[keep])


def substitute(
    times: Callable[[Tensor], Tensor], tokens: list[int], diagonal: Tensor, v: Tensor
) -> Tensor:
    """Solve T w = v, (B, D), T triangular in the order `tokens`, one token at a time."""
    w = torch.zeros_like(diagonal)  # (B, K, d)
    for i in tokens:  # w is final before token i and still 0 from it on
        missing = (v - times(w.flatten(1))).view_as(w)[:, i]  # (B, d)
        w[:, i] = missing / diagonal[:, i]
    return w.flatten(1)


@torch.no_grad()
def sigma_min_by_inverse(flow: NormalizingFlow, z: Tensor, labels: Tensor) -> Tensor:
    """sigma_min (B,) of du/dz at z (B, K, d), labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(z[0].numel(), generator=generator).to(z).expand(len(z), -1)
    inverse = InverseJacobian(flow, z, labels)
    top = spectral.extreme_singular_value(inverse, start, None, 1e-6, 1000, lambda n: None)
    return 1 / top[0]
