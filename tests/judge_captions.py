"""Judge models of captions by an independent classifier (not collected by pytest).

    python tests/judge_captions.py CKPT [CKPT ...] [--num 1000] [--guidance 0 1 2] [--seed 0]

A small CNN with four heads, shape, colour, ground and size, trained here on fresh pictures of ALL
60 pairs of shape and colour with independent attributes, as they are and blurred, as samples of so
small a model are: else it would judge sharpness. It must exceed 98 % in each on real pictures.
Then, of each checkpoint: how many samples show what full captions ask for, of the 50 pairs seen in
training and of the 10 held out; colours exchanged; the colours of "a star"; how often the density
of a latent tells its true caption from 20 that are wrong in one attribute; and the bits a latent
number with the caption, of the mixture over all 600 trained captions, and of the empty one.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not by pytest
import train  # noqa: E402
from common import data, shapes  # noqa: E402
from common.shapes import COLOURS, NAMES, PAIRS, SHAPES  # noqa: E402

COUNTS = [len(names) for names in NAMES]
HELD_OUT = [pair for pair in itertools.product(range(10), range(6)) if pair not in PAIRS]
PICTURES_FOR_TRAINING, STEPS, BATCH, BLUR = (
    20_000,
    1500,
    64,
    1.5,
)  # std of the blur, pixels, at most
RULES = {"tarflow": {}, "starflow": dict(rule="starflow", annealed=False)}  # STARFlow's own way


def caption(values: tuple[int, ...]) -> str:
    """The full caption of four attributes."""
    return shapes.describe(*(names[i] for names, i in zip(NAMES, values, strict=True)))


def random_attributes(count: int, pairs: list, rng: np.random.Generator) -> Tensor:
    """(count, 4): the pairs in turn, grounds and sizes at random."""
    rest = rng.integers((6, 2), size=(count, 2))
    return torch.tensor([(*pairs[i % len(pairs)], *rest[i]) for i in range(count)])


def real_pictures(attributes: Tensor, size: int, seed: int) -> Tensor:
    """Fresh pictures (n, 3, size, size) in [-1, 1] of attributes (n, 4)."""
    pictures = []
    for i, values in enumerate(attributes.tolist()):
        rng = np.random.default_rng((seed, i))
        pictures.append(shapes.to_tensor(shapes.render_described(values, rng, size)))
    return torch.stack(pictures)


def train_classifier(size: int) -> nn.Module:
    """A three-layer CNN with global average pooling and a head of all names."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, sum(COUNTS))]
    model, everything = nn.Sequential(*layers), PAIRS + HELD_OUT
    targets = random_attributes(PICTURES_FOR_TRAINING, everything, np.random.default_rng(76))
    images = real_pictures(targets, size, seed=77)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,))
        noise = 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn(BATCH, *images.shape[1:])
        seen = gaussian_blur(images[rows] + noise, 7, BLUR * float(torch.rand(())) + 0.01)
        heads = model(seen).split(COUNTS, dim=1)
        loss = sum(F.cross_entropy(h, t) for h, t in zip(heads, targets[rows].T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judged(classifier: nn.Module, images: Tensor) -> Tensor:
    """The attributes (n, 4) that the classifier sees."""
    logits = torch.cat([classifier(part) for part in images.split(250)])
    return torch.stack([head.argmax(dim=1) for head in logits.split(COUNTS, dim=1)], dim=1)


def rows_of(model: train.MIMFlow, texts: list[str]) -> Tensor:
    """Captions as labels (n, L)."""
    places = model.config.caption_words
    return torch.tensor(shapes.read_prompts(texts, None, model.class_names, places)[1])


def sample(model: train.MIMFlow, texts: list[str], seed: int, w: float, rule: str) -> Tensor:
    """A picture for each caption."""
    c, rows = model.config, rows_of(model, texts)
    noise = train.sample_noise(seed, range(len(texts)), c.num_latents, c.latent_dim)
    parts = zip(noise.split(250), rows.split(250), strict=True)
    return torch.cat([model.sample(u, y, w, **RULES[rule]) for u, y in parts])


def corruptions(values: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The 20 captions that are wrong in one attribute."""
    changed = ((k, new) for k, count in enumerate(COUNTS) for new in range(count))
    return [(*values[:k], new, *values[k + 1 :]) for k, new in changed if new != values[k]]


@torch.no_grad()
def log_probs(model: train.MIMFlow, z: Tensor, texts: list[str]) -> Tensor:
    """log p(z | caption) in nats: z (n, K, d), the same texts for all -> (n, len(texts))."""
    rows = rows_of(model, texts)
    return torch.stack([model.flow.log_prob(x.expand(len(rows), -1, -1), rows) for x in z])


def bits(model: train.MIMFlow, z: Tensor, texts: list[str], everything: list[str]) -> Tensor:
    """Bits (3, n) of each z: its caption, the mixture over `everything`, the empty caption."""
    with torch.no_grad():
        true = model.flow.log_prob(z, rows_of(model, texts))
        mixture = log_probs(model, z, everything).logsumexp(dim=1) - math.log(len(everything))
        return -torch.stack((true, mixture, model.flow.log_prob(z))) / math.log(2)


def measure(
    model: train.MIMFlow, classifier: nn.Module, flags: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """The rows of the table: a name, a share or a number."""
    c, seed = model.config, flags.seed
    for name, pairs in (("trained pairs", PAIRS), ("held-out pairs", HELD_OUT)):
        wanted = random_attributes(flags.num, pairs, np.random.default_rng(5))
        texts = [caption(values) for values in wanted.tolist()]
        for rule, w in [(r, w) for r in RULES for w in flags.guidance if w or r == "tarflow"]:
            right = judged(classifier, sample(model, texts, seed, w, rule)) == wanted
            where = f"{name}, w = {w:g}" + f" ({rule})" * (w > 0)
            yield f"{where}: shape and colour", right[:, :2].all(dim=1).double().mean().item()
            yield f"{where}: all four", right.all(dim=1).double().mean().item()
            single = right.double().mean(dim=0)
            yield f"{where}: product of single ones", single.prod().item()
    for ours, other in (("red", "blue"), ("blue", "red")):
        text = shapes.describe("star", ours, other)
        found = judged(classifier, sample(model, [text] * flags.num, seed, c.guidance, "tarflow"))
        wanted = torch.tensor((COLOURS.index(ours), COLOURS.index(other)))
        yield f"{text}: both colours", (found[:, 1:3] == wanted).all(dim=1).double().mean().item()
    found = judged(classifier, sample(model, ["a star"] * 600, seed, 0.0, "tarflow"))[:, 1]
    for k, colour in enumerate(COLOURS):
        held = " (held out)" * ((list(SHAPES).index("star"), k) in HELD_OUT)
        yield f"a star, w = 0: {colour}{held}", (found == k).double().mean().item()

    pictures = data.Pictures(None, c.image_size, "val", flags.num, seed, c.caption_words)
    images, rows, numbers = pictures[range(flags.num)]
    draws = train.draws_of_pictures(c, numbers.tolist(), seed, torch.device("cpu"))
    with torch.no_grad():
        z = model.latents(images, draws)[1]
        painted = model.decoder(z)
    values = [pictures.dataset.attributes(int(n))[0] for n in numbers]
    right = judged(classifier, painted) == torch.tensor(values)
    yield "reconstructions: shape and colour", right[:, :2].all(dim=1).double().mean().item()
    yield "reconstructions: all four", right.all(dim=1).double().mean().item()
    yield "reconstructions: mse", (painted - images).square().mean().item()
    found = [
        log_probs(model, x[None], list(map(caption, (v, *corruptions(v))))).argmax().item()
        for x, v in zip(z, values, strict=True)
    ]
    yield "true caption beats 20 others", float(np.mean(np.array(found) == 0))
    everything = [caption((*p, g, s)) for p in PAIRS for g in range(6) for s in range(2)]
    few = z[: flags.mixture]
    kinds = bits(model, few, list(map(caption, values[: len(few)])), everything) / z[0].numel()
    names = ("with caption", f"mixture of {len(everything)}", "empty caption")
    for name, value in zip(names, kinds.mean(dim=1), strict=True):
        yield f"bits a latent number, {len(few)} pictures: {name}", value.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--mixture", type=int, default=100, help="pictures of the mixture")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    models = [train.load_checkpoint(path) for path in flags.checkpoints]
    size = models[0].config.image_size
    classifier = train_classifier(size)
    truth = random_attributes(2000, PAIRS + HELD_OUT, np.random.default_rng(78))
    images, worst = real_pictures(truth, size, seed=79), 1.0
    for kind, seen in (("real", images), ("blurred by a pixel", gaussian_blur(images, 7, 1.0))):
        shares = (judged(classifier, seen) == truth).double().mean(dim=0).tolist()
        print(f"classifier, {kind}:", *(f"{share:.4f}" for share in shares), flush=True)
        worst = min(worst, *shares)
    if worst < 0.98:
        raise SystemExit("a head of the classifier is below 98 %: its judgement means nothing")

    columns = [dict(measure(model, classifier, flags)) for model in models]
    for name in columns[0]:
        values = [column[name] for column in columns]
        spread = f"{np.mean(values):.4f} +- {np.std(values, ddof=1):.4f}  " if values[1:] else ""
        print(f"{name:60} {spread}", *(f"{value:.4f}" for value in values))


if __name__ == "__main__":
    main()
