"""Judge samples of the preset shapes by an independent classifier (not collected by pytest).

    python tests/judge.py [CKPT] [--num 1000] [--guidance 0 1 2] [--seed 0]

A small CNN, trained here on fresh built-in pictures in RANDOM hues, so that it must judge the shape
and cannot read the class off its typical colour. It has seen neither the model nor its training
pictures. Prints its accuracy on held-out recoloured pictures (it must exceed 98 %), then the share
of class-conditional samples that it assigns to their class, and the same for reconstructions of
masked pictures.
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
from common.runs import find_checkpoint  # noqa: E402
from common.shapes import SHAPES, ShapesDataset, render_shape, to_tensor  # noqa: E402
from encoder import random_mask  # noqa: E402

PICTURES_FOR_TRAINING, STEPS, BATCH = 20_000, 800, 64


def recoloured(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, size, size) in [-1, 1] with random hues, and their classes (count,)."""
    labels = torch.arange(count) % len(SHAPES)
    pictures = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        pictures.append(render_shape(int(labels[i]), rng, size, hue=rng.uniform()))
    return torch.stack([to_tensor(picture) for picture in pictures]), labels


def train_classifier(size: int) -> nn.Module:
    """A three-layer CNN with global average pooling, trained for a minute or two on a CPU."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    images, labels = recoloured(PICTURES_FOR_TRAINING, size, seed=77)
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
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    found = torch.cat([classifier(part).argmax(dim=1) for part in images.split(250)])
    return (found == labels).double().mean().item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    model = train.load_checkpoint(find_checkpoint(flags.checkpoint))
    c = model.config

    with torch.enable_grad():
        classifier = train_classifier(c.image_size)
    held_out = accuracy(classifier, *recoloured(2000, c.image_size, seed=78))
    print(f"classifier on held-out recoloured pictures: {held_out:.4f}")
    if held_out < 0.98:
        raise SystemExit("the classifier is below 98 %: its judgement means nothing")

    labels = torch.arange(flags.num) % len(SHAPES)
    noise = train.sample_noise(flags.seed, range(flags.num), c.num_latents, c.latent_dim)
    for guidance in flags.guidance:
        parts = zip(noise.split(250), labels.split(250), strict=True)
        images = torch.cat([model.sample(u, y, guidance) for u, y in parts])
        found = accuracy(classifier, images, labels)
        print(
            f"samples, guidance {guidance:g}, seed {flags.seed}, {flags.num} pictures: {found:.4f}"
        )

    dataset = ShapesDataset(c.image_size, "val")
    images = torch.stack([dataset[i][0] for i in range(flags.num)])
    generator = torch.Generator().manual_seed(flags.seed)
    mask = random_mask(flags.num, c.grid**2, c.mask_ratio, generator)
    mu = model.encoder(images, mask)
    images_hat = model.decoder(mu + c.sigma * torch.randn(mu.shape, generator=generator))
    mse = (images_hat - images).square().mean()
    found = accuracy(classifier, images_hat, labels)
    print(f"reconstructions of masked val pictures: {found:.4f}, mse {mse:.4f}")


if __name__ == "__main__":
    main()
