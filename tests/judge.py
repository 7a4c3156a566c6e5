"""Judge samples of the built-in pictures by an independent classifier (not collected by pytest).

    python tests/judge.py [CKPT] [--num 2000] [--guidance 0 1 2] [--seed 0]

A small CNN, trained here on fresh built-in pictures in RANDOM hues, so that it must judge the shape
and cannot read the class off its typical colour. It has seen neither the model nor its training
pictures; on held-out recoloured pictures it must be right in more than 98 %. Prints

    right   the share of pictures that it assigns to their class
    FD      the Frechet distance of its 128 pooled features, samples against validation pictures
    rFD     the same of reconstructions, masked and with noise as in training
    gap     FD - rFD: what the flow adds to what the autoencoder loses
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not by pytest
import train  # noqa: E402
from common.data import Pictures  # noqa: E402
from common.runs import find_checkpoint  # noqa: E402
from common.shapes import SHAPES, render_shape, to_tensor  # noqa: E402
from evaluate import frechet_distance, moments  # noqa: E402

PICTURES_FOR_TRAINING, STEPS, BATCH = 20_000, 800, 64
AT_A_TIME = 250  # pictures


def recoloured(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) in [-1, 1] with random hues, and their classes (count,)."""
    labels = torch.arange(count) % len(SHAPES)
    pictures = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        pictures.append(render_shape(int(labels[i]), rng, size, hue=rng.uniform()))
    return torch.stack([to_tensor(picture) for picture in pictures]), labels


def train_classifier(size: int, seed: int = 1) -> nn.Module:
    """A three-layer CNN with global average pooling, trained for a minute or two on a CPU."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    images, labels = recoloured(PICTURES_FOR_TRAINING, size, seed=77 * seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        noise = 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn(BATCH, *images.shape[1:])
        loss = F.cross_entropy(model(images[rows] + noise), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def in_batches(call, *tensors: Tensor) -> Tensor:
    """`call` of rows of the tensors, some at a time, put together."""
    parts = zip(*(x.split(AT_A_TIME) for x in tensors), strict=True)
    return torch.cat([call(*part) for part in parts])


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (in_batches(classifier, images).argmax(dim=1) == labels).double().mean().item()


def distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of rows."""
    return frechet_distance(*moments(a.flatten(1).numpy()), *moments(b.flatten(1).numpy()))


@torch.no_grad()
def real_latents(model: train.MIMFlow, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """`num` validation pictures (n, 3, H, W), their latents z (n, K, d) as in training, labels."""
    c, z, images = model.config, [], []
    pictures = Pictures(None, c.image_size, "val")
    # Picture i is a function of i, so that the validation split goes on behind its end.
    pictures.numbers = np.arange(num)
    pictures.labels = pictures.dataset.labels = pictures.numbers % len(SHAPES)
    for first in range(0, len(pictures), AT_A_TIME):
        batch, _, numbers = pictures[range(first, min(first + AT_A_TIME, num))]
        draws = train.draws_of_pictures(c, numbers.tolist(), 0, torch.device("cpu"))
        images.append(batch)
        z.append(model.latents(batch, draws)[1])
    return torch.cat(images), torch.cat(z), torch.from_numpy(pictures.labels)


class Judge:
    """The CNN for pictures of one size, as good as it must be, or the program ends."""

    def __init__(self, size: int):
        self.classifier = train_classifier(size)
        self.held_out = accuracy(self.classifier, *recoloured(2000, size, seed=78))
        if self.held_out < 0.98:
            raise SystemExit(f"the classifier is right in {self.held_out:.1%}: it cannot judge")

    def of(self, model: train.MIMFlow, num=2000, guidances=(0.0,), seed=0) -> dict[str, float]:
        """All numbers of one model: right (%), FD, at each guidance; those of reconstructions."""
        c, labels = model.config, torch.arange(num) % len(SHAPES)
        images, z, _ = real_latents(model, num)
        features = in_batches(self.classifier[:-1], images)
        noise = train.sample_noise(seed, range(num), c.num_latents, c.latent_dim)
        painted = {"r": in_batches(lambda z: model.decoder(z).clamp(-1, 1), z)}
        for w in guidances:
            painted[f"{w:g}"] = in_batches(lambda u, y, w=w: model.sample(u, y, w), noise, labels)
        found = {"mse": (painted["r"] - images).square().mean().item()}
        for name, pictures in painted.items():
            found[f"right_{name}"] = 100 * accuracy(self.classifier, pictures, labels)
            found[f"fd_{name}"] = distance(in_batches(self.classifier[:-1], pictures), features)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    model = train.load_checkpoint(find_checkpoint(flags.checkpoint))
    judge = Judge(model.config.image_size)
    print(f"classifier on held-out recoloured pictures: {judge.held_out:.4f} right")
    found = judge.of(model, flags.num, flags.guidance, flags.seed)
    print(f"reconstructions of masked val pictures: mse {found['mse']:.4f}")
    print(f"  {found['right_r']:.1f} % right, rFD {found['fd_r']:.3g}")
    print(f"{flags.num} samples, noise seed {flags.seed}")
    for w in (f"{w:g}" for w in flags.guidance):
        fd, gap = found[f"fd_{w}"], found[f"fd_{w}"] - found["fd_r"]
        right = found[f"right_{w}"]
        print(f"  guidance {w}: {right:.1f} % right, FD {fd:.3g}, gap {gap:.3g}")


if __name__ == "__main__":
    main()
