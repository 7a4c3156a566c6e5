"""The training objective (Eq. 4-6): one small pure function for each term.

    L_joint = lambda_nll * L_NLL + L_recon                                              (Eq. 6)

    L_NLL   = -log p_F(z) per latent number, constant left out                          (Eq. 4)
            = mean over K*d of u^2 / 2   -   logdet / (K*d)
    L_recon = mean over ALL pixels of (x - D(z))^2                                      (Eq. 5)

Every function returns one number per image, (B,): averaging first over an image and then over
images is what makes one process on a joint batch and many processes on its parts the same
computation. The weights and their sum are in train.py, where the model is.
"""

from torch import Tensor


def pixel_loss(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error over the WHOLE image, masked or not (Eq. 5, App. A).

    images, reconstructions (B, 3, H, W) in [-1, 1] -> (B,).
    """
    return (images - reconstructions).square().mean(dim=(1, 2, 3))


def flow_nll(u: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of L_NLL = -log p_F(z) / (K*d) (Eq. 4), nats per latent number, each (B,).

    u = F(z) (B, K, d) and logdet (B,) in nats per image, as the flow returns them. The first part
    pulls u to the origin, the second keeps the flow from shrinking everything to get there. Their
    sum leaves out 0.5 * log(2 pi), as TARFlow does.
    """
    square = 0.5 * u.square().mean(dim=(1, 2))
    return square, -logdet / u[0].numel()


def joint_loss(pixel: Tensor, nll: Tensor, nll_weight: float) -> Tensor:
    """L_joint of Eq. 6 for each image: (B,), (B,) -> (B,)."""
    return pixel + nll_weight * nll
