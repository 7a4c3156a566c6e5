"""Pictures as numbers, what all datasets share, and the built-in pictures, rendered on the fly: ten
shapes, and the same with captions. What a dataset gives: the head of common/data.py.
"""

import colorsys
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import hflip, pil_to_tensor

from common.runs import fail

SUPERSAMPLE = 4  # pictures are drawn this many times too large, then averaged


# --------------------------------------------------------------------------------------------------
# Values, and the base of all datasets


def to_tensor(picture: Image.Image) -> Tensor:
    """PIL RGB -> float32 (3, H, W) in [-1, 1]."""
    return from_uint8(pil_to_tensor(picture))


def from_uint8(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255], rounded to the nearest, any shape; out of range is clamped."""
    # 127.5 x + 127.5 is the value, and cutting off 0.5 more rounds it.
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


class PictureDataset(Dataset):
    """What is the same in all datasets. Each has its own `class_names`, `labels` and `picture`, and
    with `places` for words `known` ones and a `caption`; if it `flips`, half of the training
    pictures are mirrored."""

    flips, places = False, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: "int | tuple[int, int]") -> tuple[Tensor, int | Tensor]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        picture, flips = self.picture(index), self.flips and epoch is not None
        if flips and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            picture = hflip(picture)
        return to_tensor(picture), self.row(index, epoch)

    def row(self, index: int, epoch: int | None = None) -> int | Tensor:
        """The label of a picture."""
        if self.places:
            return caption_row(self.caption(index, epoch), self.known, self.places)
        return int(self.labels[index])


# --------------------------------------------------------------------------------------------------
# Ten shapes, nothing to download


def regular_polygon(corners: int, radius: float, start=90.0, shift=0.0) -> np.ndarray:
    """Corners (corners, 2) as (x, y), y downwards, first at `start` degrees, shifted along x."""
    angle = np.radians(start + 360.0 * np.arange(corners) / corners)
    return np.stack((radius * np.cos(angle) + shift, -radius * np.sin(angle)), axis=1)


T = np.linspace(0, 2 * math.pi, 48, endpoint=False)  # the heart is a curve of this angle
HEART_Y = 13 * np.cos(T) - 5 * np.cos(2 * T) - 2 * np.cos(3 * T) - np.cos(4 * T)
STAR = (regular_polygon(5, 1.1), regular_polygon(5, 0.45, start=126))  # its tips, and between
CROSS_ARM = np.array(((-0.34, -1), (0.34, -1), (0.34, -0.34)))  # a quarter of the corners
QUARTER_TURNS = [np.linalg.matrix_power(((0, 1), (-1, 0)), t) for t in range(4)]
ARROW = np.array(((-1, -0.3), (0, -0.3), (0, -0.9), (1.1, 0), (0, 0.9), (0, 0.3), (-1, 0.3)))

# Class name -> polygons about the origin, radius about 1: the first is filled, the second cut out.
SHAPES: dict[str, list[np.ndarray]] = {
    "circle": [regular_polygon(48, 0.95)],
    "square": [regular_polygon(4, 1.2, start=45)],
    "triangle": [regular_polygon(3, 1.2) + (0, 0.2)],
    "star": [np.stack(STAR, axis=1).reshape(10, 2)],
    "cross": [np.concatenate([CROSS_ARM @ turn for turn in QUARTER_TURNS])],
    "ring": [regular_polygon(48, 1.0), regular_polygon(48, 0.55)],
    "heart": [np.stack((np.sin(T) ** 3, -(HEART_Y + 2) / 16), axis=1)],
    "moon": [regular_polygon(48, 1.0, shift=-0.15), regular_polygon(48, 0.85, shift=0.35)],
    "bar": [np.array(((-1.1, -0.33), (1.1, -0.33), (1.1, 0.33), (-1.1, 0.33)))],
    "arrow": [ARROW],
}


def render_shape(
    label: int, rng: np.random.Generator, size: int, hue=None, ground_hue=None, radius=(0.36, 0.44)
) -> Image.Image:
    """One picture (size x size, RGB) of class `label`: a bright shape on a dark textured ground.

    Place, size (a `radius`, in sides), tilt, colours and textures vary with `rng`. Each class has a
    typical hue, as real classes do, with some spread; `hue` in [0, 1) overrides it (a classifier
    that must judge shape, not colour, is trained on random hues), `ground_hue` that of the ground.
    """
    # Coverage of each pixel by the shape: polygons too large, then averaged.
    side = size * SUPERSAMPLE
    radius, tilt = rng.uniform(*radius) * side, math.radians(rng.uniform(-15, 15))
    centre = (0.5 + rng.uniform(-0.06, 0.06, 2)) * side
    cos, sin = math.cos(tilt), math.sin(tilt)
    turn = radius * np.array(((cos, sin), (-sin, cos)))  # (x, y) @ turn
    canvas = Image.new("L", (side, side), 0)
    for polygon, fill in zip(list(SHAPES.values())[label], (255, 0), strict=False):
        ImageDraw.Draw(canvas).polygon((polygon @ turn + centre).ravel().tolist(), fill=fill)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)[:, :, None] / 255

    # Colours: a two-colour ramp with waves behind; the class's hue, shaded, with waves in front.
    x = np.arange(size, dtype=np.float32) / size - 0.5
    direction = rng.uniform(0, 2 * math.pi, 3)  # of the ramp and of the two waves
    phase = x * np.cos(direction)[:, None, None] + x[:, None] * np.sin(direction)[:, None, None]
    ramp, back_wave, front_wave = phase[..., None].astype(np.float32)  # (size, size, 1) each
    waves, shift = 2 * math.pi * rng.uniform(2, 4, 2), rng.uniform(0, 2 * math.pi, 2)
    low, high = (0, 0.3, 0.05), (1, 0.8, 0.35)
    if ground_hue is not None:  # strong enough to be named
        low, high = (ground_hue, 0.6, 0.2), (ground_hue, 0.9, 0.4)
    ground = [colorsys.hsv_to_rgb(*rng.uniform(low, high)) for _ in range(2)]
    ground = np.array(ground, dtype=np.float32)
    back = ground[0] + (ground[1] - ground[0]) * (ramp + 0.5)
    back += 0.04 * np.sin(waves[0] * back_wave + shift[0])
    if hue is None:
        hue = (label / len(SHAPES) + rng.normal(0, 0.03)) % 1.0
    pale = 0.45 if ground_hue is None else 0.65  # pale red has another name
    colour = np.array(colorsys.hsv_to_rgb(hue, *rng.uniform((pale, 0.85), (0.85, 1.0))), np.float32)
    front = colour * (0.88 + 0.25 * ramp) * (1 + 0.1 * np.sin(waves[1] * front_wave + shift[1]))
    picture = back + (front - back) * coverage  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


class ShapesDataset(PictureDataset):
    """Built-in labelled pictures: picture `index` is always the same, class index % 10."""

    def __init__(self, image_size: int, split: str = "train"):
        self.image_size, self.split, self.root = image_size, split, split
        self.class_names = tuple(SHAPES)
        self.labels = np.arange({"train": 50_000, "val": 2_000}[split]) % len(SHAPES)

    def picture(self, index: int) -> Image.Image:
        rng = np.random.default_rng((0 if self.split == "train" else 1, index))
        return render_shape(int(self.labels[index]), rng, self.image_size)


# --------------------------------------------------------------------------------------------------
# Captions


def split_words(text: str) -> list[str]:
    """The words of a caption: letters only, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def caption_row(text: str, known: dict[str, int], places: int) -> Tensor:
    """Numbers of the words of a caption that are known, at most `places`; -1 for nothing."""
    found = [known[word] for word in split_words(text) if word in known][:places]
    return torch.tensor(found + [-1] * (places - len(found)))


def read_prompts(
    texts: list[str] | None, file: Path | None, words: Iterable[str], places: int
) -> tuple[list[str], list[list[int]]]:
    """Prompts of the command line and of a file of lines, and the caption_row of each; ends with
    one line if there are none, or if the model cannot read one."""
    known, texts = {word: i for i, word in enumerate(words)}, list(texts or [])
    if file is not None and not file.is_file():
        fail(f"--prompts {file} is no file: name one with a prompt a line", 2)
    lines = file.read_text("utf-8", errors="replace").splitlines() if file else []
    texts += filter(split_words, lines)  # "" asks for any picture, a line without words for none
    if not texts:
        examples = '"a small red star on a blue ground" "a ring"'
        fail(f"add --prompt, as in --prompt {examples}; words: {', '.join(known)}", 2)
    for text in texts:
        if unknown := [word for word in split_words(text) if word not in known]:
            fail(f"unknown: {', '.join(unknown)}; this model knows {', '.join(known)}", 2)
        if len(split_words(text)) > places:
            fail(f'"{text}" is too long: this model reads {places} words', 2)
    return texts, [caption_row(text, known, places).tolist() for text in texts]


COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")  # number k has hue k / 6, +- 0.04
SIZES = {"small": (0.24, 0.30), "large": (0.38, 0.44)}  # radius, in sides
LEFT_OUT = 0.25  # how often a training caption does not name the size, the colour, the ground
NAMES = (list(SHAPES), COLOURS, COLOURS, list(SIZES))  # of shape, colour, ground, size
# Shapes and colours in training: one colour of each shape never comes, so that one can ask for it.
PAIRS = [(s, c) for s in range(len(SHAPES)) for c in range(6) if (s + c) % 6]


def describe(shape: str, colour: str = "", ground: str = "", size: str = "", way: int = 0) -> str:
    """A caption in one of three wordings; "" = not named."""
    where = f"on {'a ' * (way == 0)}{ground} ground" if ground else ""
    thing = f"a {colour} {shape} {size}" if way == 1 else f"a {size} {colour} {shape}"
    return " ".join((f"{where} {thing}" if way == 2 else f"{thing} {where}").split())


def render_described(values: tuple[int, ...], rng: np.random.Generator, side: int) -> Image.Image:
    """A picture (side x side, RGB) of numbers: in SHAPES, COLOURS, COLOURS (ground), SIZES."""
    hue, ground_hue = (np.array(values[1:3]) / len(COLOURS) + rng.uniform(-0.04, 0.04, 2)) % 1
    return render_shape(values[0], rng, side, hue, ground_hue, list(SIZES.values())[values[3]])


class CaptionedShapes(ShapesDataset):
    """Built-in pictures with captions: picture `index` is always the same, its caption another one
    in each epoch (which names less), or without an epoch the full one."""

    def __init__(self, image_size: int, split: str, seed: int, places: int):
        super().__init__(image_size, split)
        self.seed, self.places = seed, places
        self.class_names = tuple(sorted({"a", "on", "ground", *COLOURS, *SIZES, *SHAPES}))
        self.known = {word: i for i, word in enumerate(self.class_names)}

    def attributes(self, index: int) -> tuple[tuple[int, ...], np.random.Generator]:
        """Numbers of shape, colour, ground and size of a picture, and what draws the rest."""
        rng = np.random.default_rng((2 if self.split == "train" else 3, index))
        return (*PAIRS[rng.integers(len(PAIRS))], *rng.integers((len(COLOURS), 2)).tolist()), rng

    def caption(self, index: int, epoch: int | None = None) -> str:
        values, way = zip(NAMES, self.attributes(index)[0], strict=True), 0
        shape, *names = (known[number] for known, number in values)
        if epoch is not None:
            rng = np.random.default_rng((self.seed, epoch, index))
            names = [name if rng.random() >= LEFT_OUT else "" for name in names]
            way = int(rng.integers(3))
        return describe(shape, *names, way)

    def picture(self, index: int) -> Image.Image:
        return render_described(*self.attributes(index), self.image_size)


def read_captions(picture: Path) -> list[str]:
    """The captions of a picture file, the lines of FILE.txt beside FILE.jpg; none without it."""
    path = picture.with_suffix(".txt")
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    return [line for line in text.splitlines() if split_words(line)]
