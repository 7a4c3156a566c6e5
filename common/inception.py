"""The network that defines FID, sFID, Inception Score, precision and recall.

    images (B, 3, H, W) in [0, 255]
      | TensorFlow 1's bilinear resize to 299 x 299, then to [-1, 1)
      | Inception v3, TensorFlow's graph of 2015-12-05
    pool (B, 2048): what is in the picture      spatial (B, 2023): where things are, for sFID

FID is defined by this one network, with the parameter names of its published conversion to
PyTorch. torchvision's Inception3 has other weights, resizes and scales otherwise, counts padding
where it averages, has no maximum in the last block and 1000 outputs. Each of these moves the FID,
so numbers of two different Inceptions do not compare.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.models.inception import Inception3

from common.runs import describe_file, say
from common.weights import RANDOM, WEIGHT_FILES, Frozen, find_weights, fixed_seed, load_weights

SIDE = 299  # pixels
SPATIAL_CHANNELS = 7  # of Mixed_6d, 17 x 17 each: sFID's 2023 numbers


class Pooling(TorchFunctionMode):
    """Within it, another function pools where torchvision's blocks call F.avg_pool2d."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.function if function is F.avg_pool2d else function
        return function(*args, **(kwargs or {}))


class FIDInception(Frozen, Inception3):
    """torchvision's Inception3 made the FID's; random weights until load_inception loads others."""

    def __init__(self):
        # 1008 outputs: 1000 classes, background, unused ones.
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for module in self.modules():  # random weights should let the picture through
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) float32 in [0, 255] -> pool (B, 2048), spatial (B, 2023)."""
        # Not x / 127.5 - 1, which pytorch-fid has: 255 becomes 0.992.
        x = (tf1_resize(images, SIDE) - 128) * 0.0078125  # (B, 3, 299, 299)
        # TensorFlow averages over the pixels that exist. The maximum in the last block is a slip of
        # the 2015 graph, kept by every FID since.
        average = partial(F.avg_pool2d, count_include_pad=False)
        for name, layer in self.named_children():  # torchvision's order is that of the graph
            if name == "avgpool":
                break
            with Pooling(F.max_pool2d if name == "Mixed_7c" else average):
                x = layer(x)
            if name == "Mixed_6d":
                # Its first channels are those of branch1x1. TensorFlow's order, (17, 17, 7), is
                # that of mu_s and sigma_s in ADM's files. With (7, 17, 17) the sFID of two folders
                # is the same, and that against a file is nonsense: some ports print 299 for 6.1.
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008) WITHOUT the bias, as the Inception Score of ADM has it."""
        return pool @ self.fc.weight.T


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear resize, (B, C, H, W) -> (B, C, side, side), float32.

    Output pixel i reads position i * in / out: no half-pixel centres, no antialiasing, so that
    F.interpolate cannot do it. The horizontal blend comes first; all in float32, to the bit. FIDs
    with different resizes do not compare (Parmar et al. 2022).
    """
    for dim in (3, 2):
        length = images.shape[dim]
        source = torch.arange(side, dtype=torch.float32, device=images.device)
        source = source * float(np.float32(length) / np.float32(side))
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        t = source - low
        if dim == 2:
            t = t[:, None]
        lower, upper = images.index_select(dim, low), images.index_select(dim, high)
        images = lower + (upper - lower) * t
    return images


def load_inception(path: str | None, device: torch.device) -> tuple[FIDInception, dict[str, Any]]:
    """The network with the weights that --inception names, and what the protocol says of them.

    "random" is for tests of this program. Raises WeightsMissing.
    """
    weights = find_weights("inception", path)
    with fixed_seed():
        network = FIDInception()
    load_weights(network, "inception", weights, without_counters)
    if weights == RANDOM:
        return network.to(device), {"inception": RANDOM}
    described = describe_file(weights)
    if not described["sha256"].startswith(WEIGHT_FILES["inception"].sha256):
        say(f"note: {weights} is not the published Inception, its numbers compare with no paper's")
    return network.to(device), {"inception": described}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop BatchNorm's counters, which do nothing and which only some files have. (In a plain dict
    load_state_dict forgives that they are missing, and nothing else.)"""
    return {k: value for k, value in state.items() if not k.endswith("num_batches_tracked")}


@torch.no_grad()
def inception_features(network: FIDInception, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """images (B, 3, H, W) in [0, 255] -> float32 pool (B, 2048) and spatial (B, 2023)."""
    images = images.to(network.fc.weight)
    # TF32 convolutions, on by default on recent GPUs, would move the third digit.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pool, spatial = network(images)
    return pool.cpu().numpy(), spatial.cpu().numpy()
