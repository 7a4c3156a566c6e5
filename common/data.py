"""Pictures in and out: folders, published sets, .npz files; ADM's crop; the order of steps; grids.

A dataset has `class_names`, `labels` (n,) and `__len__`, and gives (image, label) for `dataset[i]`
and `dataset[epoch, i]`, the training picture, augmented unless epoch is None. Images are float32
(3, H, W) in [-1, 1], labels int, -1 = none. A picture that cannot be read raises BrokenImage.
With captions (`caption_words` L > 0) `class_names` are the words that are known, and a label, which
is `dataset.row(i)` as well, is the caption: L numbers of words, after the last one -1 for nothing.
"""

import itertools
import math
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid
from tqdm import tqdm

from common import runs
from common.runs import InputError, fail, printable, progress, rank, say, world_size
from common.shapes import (
    CaptionedShapes,
    PictureDataset,
    ShapesDataset,
    read_captions,
    split_words,
    to_uint8,
)

MAX_ASPECT = 200  # of a picture: enlarged, a longer one would fill the memory
SHOWN_SIDE = 96  # smaller pictures are enlarged in grids, up to this side in pixels
MAX_BROKEN_SHARE = 0.001  # share of unreadable pictures that stops a run in spite of the flag


# What is read as a picture, as far as this Pillow can. EPS, for one, is left out: PIL would hand it
# to Ghostscript. Pictures in other formats are not passed over: they end in a line that names them.
Image.init()
FORMATS = Image.OPEN.keys() & {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF"}
EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe", ".avif", ".heic", ".jxl", ".jp2", ".tga")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")


class BrokenImage(InputError):
    """A picture that cannot be decoded; the message has its path."""


# --------------------------------------------------------------------------------------------------
# Pictures from a folder
#
# ADM's recipe, since FID compares with its reference statistics: another resize alone moves it.
# Nothing is cached: the latents of an encoder that still learns, of a picture that is masked anew
# each time, never come twice.


def adm_crop(picture: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing: halve by box filter while the short side is >= 2 x size, resize the
    short side to `size` by bicubic interpolation, crop the centre. RGB, any size -> size x size."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    factor = size / min(picture.size)
    new_size = (round(picture.width * factor), round(picture.height * factor))
    picture = picture.resize(new_size, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def read_picture(path: Path, crop: int | None = None) -> Image.Image:
    """RGB from a picture file of any kind, cropped to a side of `crop` pixels if given; raises
    BrokenImage. Transparency is ignored, and so is a camera's note that the picture should be
    turned, as in ADM."""
    cannot = runs.explained(f"cannot read {path}", end=BrokenImage)
    with cannot, Image.open(path, formats=[*FORMATS]) as picture:
        if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
            raise ValueError("32 bits a pixel have no agreed scale: save it with 8 or 16")
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise ValueError(f"one side is over {MAX_ASPECT} times the other")
        if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would clip, not scale
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        picture = picture.convert("RGB")
        return picture if crop is None else adm_crop(picture, crop)


def look_into(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and picture files in a folder, without hidden ones and what archives of macOS leave.
    scandir knows what each entry is: a million files are not asked one by one."""
    folders, pictures = [], []
    for entry in os.scandir(folder) if folder.is_dir() else []:
        path = folder / entry.name
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            folders.append(path)
        elif path.suffix.lower() in EXTENSIONS and entry.is_file():  # a pipe would never end
            pictures.append(path)
    return sorted(folders), sorted(pictures)


def list_images(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> list[Path]:
    """All picture files below a folder, sorted; a link to a folder above is not followed again."""
    if not folder.is_dir() or (here := (folder.stat().st_dev, folder.stat().st_ino)) in above:
        return []
    folders, found = look_into(folder)
    for path in folders:
        found += list_images(path, above | {here})
    return sorted(found)


class FolderDataset(PictureDataset):
    """Pictures of a folder: CLASS folders (labels 0, 1, ... by sorted name), or flat (label -1).

    FOLDER may hold train/, val/ and test/, each in that layout, with the classes of train/; else it
    is itself every split. Hidden files and folders are passed over. With `places` for the words of
    captions the labels are those, class folders are just folders, and nothing is flipped: "left"
    would lie. Words that occur twice or more in the captions of train/ are known.
    """

    def __init__(self, folder: str, image_size: int, split="train", seed=0, places=0):
        top = Path(folder)
        if not (folder and top.is_dir()):  # Path("") would be where one stands
            fail(f"there is no data folder {folder}: give one, or one of {', '.join(NAMED)}")
        self.image_size, self.seed, self.places, self.flips = image_size, seed, places, not places
        folders = {path.name for path in look_into(top)[0]}
        has_splits = "train" in folders and folders <= {"train", "val", "test"}
        if has_splits and split not in folders:
            fail(f"{folder} has train/ but no {split}/: add {split}/ to it")
        alike = sorted(name for name in folders if name.lower() in SPLIT_NAMES)
        nested = "train" in folders and look_into(top / "train")[0]  # beside dev/, eval/, ...
        if not has_splits and (len(alike) > 1 or nested):  # else they would become classes
            found = ", ".join(sorted(folders)[:9] if nested else alike)
            fail(f"{folder} has {found}: name them train, val, test, nothing else")
        self.root = top / split if has_splits else top
        names = [path.name for path in look_into(top / "train" if has_splits else top)[0]]
        pictures = look_into(self.root)[1]
        if names and pictures:
            fail(f"{self.root} mixes class folders and pictures ({pictures[0].name}): sort them")

        if alone := sorted({path.name for path in look_into(self.root)[0]} - set(names)):
            say(f"note: {self.root} has {', '.join(alone[:9])}, which train/ has not: left out")
        labels = [-1] * len(pictures)
        for label, name in enumerate(names):
            found = list_images(self.root / name)
            if not found and split == "train":
                fail(f"class folder {self.root / name} holds no pictures: fill it or remove it")
            pictures += found
            labels += [label] * len(found)
        if not pictures:
            fail(f"no pictures in {self.root}: expected CLASS/*.jpg or *.jpg, *.png, ...")
        self.class_names = tuple(names)
        # Arrays, not lists of a million objects: worker processes would copy those, one by one.
        self.paths = np.array([os.fsencode(path.relative_to(self.root)) for path in pictures])
        self.labels = np.array(labels)
        if places:
            lines = map(read_captions, list_images(top / "train" if has_splits else top))
            count = Counter(word for line in itertools.chain(*lines) for word in split_words(line))
            self.class_names = tuple(sorted(word for word, n in count.items() if n > 1))
            self.known = {word: i for i, word in enumerate(self.class_names)}
            if not self.known:
                fail(f"no word comes twice in captions of {folder}: put FILE.txt beside FILE.jpg")

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def caption(self, index: int, epoch: int | None = None) -> str:
        """The first caption of a picture, or that of an epoch; "" without any."""
        lines, turn = read_captions(self.path(index)) or [""], 0
        if epoch is not None:
            turn = np.random.default_rng((self.seed, epoch, index)).integers(len(lines))
        return lines[turn]

    def picture(self, index: int) -> Image.Image:
        return read_picture(self.path(index), self.image_size)


# fmt: off
# name -> torchvision's class, its arguments for train and for val, and for want of a network the
# address (and where in data/NAME it is unpacked).
VGG, KRIZ = "https://www.robots.ox.ac.uk/~vgg/data", "https://www.cs.toronto.edu/~kriz"
NAMED = {
    "cifar10": ("CIFAR10", dict(train=True), dict(train=False), f"{KRIZ}/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", dict(train=True), dict(train=False),
        f"{KRIZ}/cifar-100-python.tar.gz"),
    "flowers102": ("Flowers102", dict(split="train"), dict(split="val"),
        VGG + "/flowers/102/{102flowers.tgz,imagelabels.mat,setid.mat}", "flowers-102"),
    "pets": ("OxfordIIITPet", dict(split="trainval"), dict(split="test"),
        VGG + "/pets/data/{images,annotations}.tar.gz", "oxford-iiit-pet"),
    "imagenette": ("Imagenette", dict(size="320px"), dict(size="320px", split="val"),
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"),
    "stl10": ("STL10", dict(split="train"), dict(split="test"),
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
}
# fmt: on


class NamedDataset(FolderDataset):
    """A published data set, downloaded and read by torchvision's class of it, in data/NAME: its own
    classes, and its own split for validation (its test set where it has no other)."""

    flips = True

    def __init__(self, name: str, image_size: int, split="train", seed=0, places=0):
        if places:
            fail(f"{name} has no captions, which --caption-words, or this checkpoint, needs", 2)
        kind, train, val, address, *folder = NAMED[name]
        kind, how = getattr(datasets, kind), train if split == "train" else val
        top, part = Path("data", name), Path("data", name + ".part")
        hint = f": unpack {address} by hand in {Path(top, *folder)}"
        end = partial(fail, every_rank=True)  # a network, or a disk, may fail one process alone
        with runs.explained(f"{name} cannot be downloaded", hint, end):
            top.parent.mkdir(exist_ok=True)
            with runs.one_at_a_time(top.parent):  # one process downloads, the others wait
                if not top.exists():
                    shutil.rmtree(part, ignore_errors=True)  # of an interrupted download
                    kind(part, **how, download=True)
                    part.rename(top)
        with runs.explained(f"{top} cannot be read", hint, end):
            self.pictures = kind(top, **how)
        # Lists of files, of labels or of pairs of both, by a name of its own in each class.
        has = vars(self.pictures)
        labels = next(has[x] for x in ("targets", "labels", "_labels", "_samples") if x in has)
        self.labels = np.array([int(x[1] if isinstance(x, tuple) else x) for x in labels])
        paths = next((has[x] for x in ("_image_files", "_images", "_samples") if x in has), [])
        paths = [Path(x[0] if isinstance(x, tuple) else x).absolute() for x in paths]
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.image_size, self.seed, self.root = image_size, seed, Path(name, split)
        # Flowers102 has had names since torchvision 0.22; those of Imagenette are synonyms.
        names = getattr(self.pictures, "classes", range(self.labels.max() + 1))
        self.class_names = tuple(x[0] if isinstance(x, tuple) else str(x) for x in names)

    def picture(self, index: int) -> Image.Image:
        if len(self.paths):
            return super().picture(index)
        return adm_crop(self.pictures[index][0], self.image_size)


def open_dataset(data: str | None, image_size: int, split="train", seed=0, places=0) -> Dataset:
    """The pictures that --data names, or with None the built-in ones; a folder wins over a name.
    `places`: with captions."""
    if data is None and places:
        return CaptionedShapes(image_size, split, seed, places)
    if data is None:
        return ShapesDataset(image_size, split)
    kind = NamedDataset if data in NAMED and not Path(data).is_dir() else FolderDataset
    return kind(data, image_size, split, seed, places)


def check_captions(dataset: FolderDataset) -> int:
    """Name pictures without a caption and captions without a picture; how many there are."""
    pictures = {path.with_suffix(""): path for path in map(dataset.path, range(len(dataset)))}
    found = [f"{path} has no caption" for path in pictures.values() if not read_captions(path)]
    texts = sorted(dataset.root.rglob("[!.]*.txt"))
    found += [f"{path} has no picture" for path in texts if path.with_suffix("") not in pictures]
    for line in found:
        say(line)
    return len(found)


def check_data(data: str | None, image_size: int, places: int = 0) -> None:
    """Open every picture of train/ and val/ once, list those that cannot be read, and with captions
    what stands alone; exit code 1 if there are any that cannot be read."""
    if not 0 < image_size <= 2**16:
        fail(f"--image-size must be from 1 to 65536, got {image_size}", 2)
    sets, broken = [open_dataset(data, image_size, places=places)], 0
    has_val = data and sets[0].root != Path(data) and Path(data, "val").is_dir()
    if has_val or isinstance(sets[0], NamedDataset):
        sets.append(open_dataset(data, image_size, "val", places=places))
    for dataset in sets:
        for index in progress(range(len(dataset)), "checking"):
            try:
                dataset[index]
            except BrokenImage as error:
                broken += 1
                say(printable(str(error)))
    alone = sum(map(check_captions, sets)) if places and data is not None else 0
    kind = f"words, {alone} captions or pictures alone" if places else "classes"
    say(f"{sum(map(len, sets))} pictures, {len(sets[0].class_names)} {kind}, {broken} broken")
    raise SystemExit(1 if broken else 0)


# --------------------------------------------------------------------------------------------------
# What the training loop reads


class TrainingPictures(Dataset):
    """(image, label, ""), or with `skip_bad` in place of a picture that cannot be read its next
    readable neighbour's image and label, and why it cannot. Images are uint8 [0, 255], a quarter of
    the way through shared memory and to the GPU."""

    def __init__(self, dataset: Dataset, skip_bad: bool):
        self.dataset, self.skip_bad = dataset, skip_bad

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int, str]:
        (epoch, index), reason = key, ""
        for neighbour in range(index, index + 10):
            try:
                image, label = self.dataset[epoch, neighbour % len(self.dataset)]
                return to_uint8(image), label, reason
            except BrokenImage as error:
                reason = reason or str(error)
                if not self.skip_bad:
                    break
        hint = "--check-data lists all such files, --skip-bad-images goes on without them"
        raise BrokenImage(f"{reason}: {hint}")


class BrokenImages:
    """The pictures skipped so far: each is named once, and too many stop the run."""

    def __init__(self, count: int):
        # One may be broken in the smallest folder; else the flag would be of no use there.
        self.count, self.most, self.reasons = count, max(1, MAX_BROKEN_SHARE * count), set()

    def add(self, reasons: Iterable[str]) -> None:
        """Note what TrainingPictures gives."""
        for reason in set(reasons) - self.reasons - {""}:
            self.reasons.add(reason)
            tqdm.write(f"skipped: {printable(reason)} ({len(self.reasons)} so far)")
        self.check(len(self.reasons))

    def count_of_all(self) -> int:
        """How many pictures all processes have met, each counted once."""
        self.check(met := len(set().union(*runs.of_all_processes(self.reasons))))
        return met

    def check(self, met: int) -> None:
        """End the run if `met` broken pictures are too many."""
        if met > self.most:
            limit = f"more than one and {MAX_BROKEN_SHARE:.1%}"
            what = f"{met} of {self.count} pictures cannot be read, {limit}"
            fail(f"{what}: --check-data lists all; repair or remove them", every_rank=True)


def step_batches(
    length: int, batch_size: int, rows: range, steps: range, seed: int
) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, index) for this process, a function of the seed and the step.

    Image number p of the run (p = step * batch_size + row) is entry p mod n of the permutation of
    epoch p div n, so none is dropped or seen twice in an epoch, and any step can come first."""

    @lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(length)

    for step in steps:
        places = (divmod(step * batch_size + row, length) for row in rows)
        yield [(epoch, int(order(epoch)[position])) for epoch, position in places]


def training_loader(
    dataset: Dataset, batch_size: int, steps: range, seed: int, skip_bad: bool, **settings: Any
) -> DataLoader:
    """This process's rows of the global batches: images uint8 (share, 3, H, W), labels (share,),
    why pictures were skipped. One long pass, so that its workers live as long as the run."""
    share = batch_size // world_size()
    rows = range(rank() * share, (rank() + 1) * share)
    # No more processes than cores: the four of `photos` would only draw a warning on a laptop.
    settings["num_workers"] = min(settings["num_workers"], os.cpu_count() or 1)
    if settings["num_workers"]:
        settings |= dict(prefetch_factor=4, timeout=runs.TIMEOUT.total_seconds())
    return DataLoader(
        TrainingPictures(dataset, skip_bad),
        batch_sampler=step_batches(len(dataset), batch_size, rows, steps, seed),
        generator=torch.Generator(),  # leaves the global one alone
        worker_init_fn=runs.ignore_signals,
        **settings,
    )


# --------------------------------------------------------------------------------------------------
# What evaluation reads


class Pictures(Dataset):
    """Some pictures of a split of --data: what a checkpoint is looked at with.

    num: how many, drawn with the seed, as folders are sorted by class; None = all. self[range] is
    (images (n, 3, H, W) in [-1, 1], labels (n,), numbers (n,)): places in the dataset.
    """

    def __init__(
        self, data: str | None, size: int, split="val", num: int | None = None, seed=0, places=0
    ):
        self.split, self.dataset = split, open_dataset(data, size, split, places=places)
        self.source = "the built-in pictures" if data is None else str(data)
        self.root = self.dataset.root  # one and the same for several splits?
        self.class_names, self.labels = tuple(self.dataset.class_names), self.dataset.labels
        count = len(self.dataset)
        if num is not None and num > count:
            fail(f"{num} pictures asked for, but the {split} split of {self.source} has {count}", 2)
        self.numbers = np.sort(np.random.default_rng(seed).permutation(count)[:num])  # (len(self),)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: range) -> tuple[Tensor, Tensor, Tensor]:
        numbers = self.numbers[indices.start : indices.stop]
        images, labels = default_collate([self.dataset[int(n)] for n in numbers])
        return images, labels, torch.from_numpy(numbers)

    def describe(self) -> dict[str, Any]:
        """What a protocol says of these pictures."""
        split = "the whole folder: no val/" if self.root == Path(self.source) else self.split
        return {"data": self.source, "split": split, "pictures": len(self)}


class PictureSet(Dataset):
    """Pictures of one size in [0, 255] on disk, an .npz file of ADM's format or a folder.

    Papers exchange samples as one .npz: arr_0 (n, H, W, 3) holds the pictures, and reference files
    hold besides them mean and covariance of the features of the whole training set (mu, sigma and
    mu_s, sigma_s). 50,000 pictures are 10 GB, so only a batch is ever in memory: self[range] is
    float32 (n, 3, H, W), neither clipped nor rounded. Pictures of a folder, all below it sorted by
    path, are cropped to a side of `crop` pixels as in training; None leaves them alone.

    What cannot be a set of pictures ends the program with one line; a picture that turns out to
    be damaged when it is read raises BrokenImage.
    """

    def __init__(self, path: Path, crop: int | None = None):
        self.path, self.crop, self.has_statistics = path, crop, False
        self.files = list_images(path)
        self.stream: Any = None  # opened at the first read, by the process that reads
        self.array: np.ndarray | None = None  # only for an order that cannot be streamed
        if self.files:
            self.count, self.shape = len(self.files), self.read_file(0).shape
        elif path.is_file():
            self.open_npz()
        else:
            fail(f"no pictures in {path}: give an .npz file or a folder of pictures")

    def open_npz(self) -> None:
        """Find out what an .npz file holds, without reading its pictures."""
        bad = runs.explained(f"{self.path} is damaged or not an .npz file")
        with bad, zipfile.ZipFile(self.path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" not in names:
                held = ", ".join(sorted(names)[:9]) or "nothing"
                fail(f"{self.path} has no arr_0 (it holds {held}): pictures are expected there")
            size = archive.getinfo("arr_0.npy").file_size
            with archive.open("arr_0.npy") as stream:
                shape, fortran, self.dtype = read_header(stream)
            if fortran:
                self.array = np.load(self.path)["arr_0"]
        whole = math.prod(shape) * self.dtype.itemsize <= size and min(shape, default=0) > 0
        if len(shape) != 4 or shape[3] != 3 or not whole or self.dtype.kind not in "uif":
            expected = "expected pictures (n, height, width, 3) in 0..255"
            fail(f"{self.path}: arr_0 is {self.dtype} {shape} in {size} bytes, {expected}")
        self.count, self.shape = shape[0], shape[1:]
        self.has_statistics = "mu" in names  # ADM asks for mu alone, then reads all four
        missing = {"sigma", "mu_s", "sigma_s"} - names
        if self.has_statistics and missing:
            fail(f"{self.path} has mu but no {', '.join(sorted(missing))}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: range) -> Tensor:
        if self.files:
            images = np.stack([self.read_file(i) for i in indices])
        elif self.array is not None:
            images = self.array[indices.start : indices.stop]
        else:
            images = self.read_npz(indices)
        low, high = images.min(), images.max()
        scaled = images.dtype.kind == "f" and 0 < high <= 1  # to [0, 1] or [-1, 1]
        if scaled or not (low >= 0 and high <= 255):
            raise BrokenImage(f"{self.path} has values from {low:g} to {high:g}, expected 0 to 255")
        return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)

    def read_file(self, i: int) -> np.ndarray:
        """Picture i of a folder, uint8 (H, W, 3), if it is as large as the first."""
        picture = np.asarray(read_picture(self.files[i], self.crop))
        if i and picture.shape != self.shape:
            (h, w, _), (height, width, _) = picture.shape, self.shape
            sizes = f"{self.files[0]} is {width} x {height}, {self.files[i]} is {w} x {h}"
            hint = "--crop SIDE crops and resizes all as in training"
            raise BrokenImage(f"{self.path} mixes sizes: {sizes}; {hint}")
        return picture

    def read_npz(self, indices: range) -> np.ndarray:
        """Rows of arr_0 (n, H, W, 3) out of the archive, compressed or not.

        np.load would unpack all of arr_0 into memory. In C order the rows lie one after the other
        in the stream, and zipfile can seek in it (by unpacking what is between, if compressed).
        """
        if self.stream is None:
            self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")
            read_header(self.stream)
            self.start = self.stream.tell()
        size = math.prod(self.shape) * self.dtype.itemsize  # bytes a picture
        with runs.explained(f"{self.path} is damaged", end=BrokenImage):
            self.stream.seek(self.start + indices.start * size)
            rows = self.stream.read(len(indices) * size)
            return np.frombuffer(rows, self.dtype).reshape(len(indices), *self.shape)

    def statistics(self) -> dict[str, np.ndarray]:
        """mu (2048,), sigma (2048, 2048), mu_s (2023,), sigma_s (2023, 2023) of the file."""
        names = ("mu", "sigma", "mu_s", "sigma_s")
        with runs.explained(f"{self.path}: its statistics are damaged"), np.load(self.path) as file:
            found = {name: file[name] for name in names}
        for name, side in {"mu": 2048, "mu_s": 2023}.items():
            mu, sigma = found[name], found["sigma" + name[2:]]
            usable = (mu.shape, sigma.shape) == ((side,), (side, side))
            usable = usable and mu.dtype.kind == sigma.dtype.kind == "f" and np.isfinite(mu).all()
            usable = usable and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T, 1e-4, 1e-6)
            if not usable or (values := np.linalg.eigvalsh(sigma))[0] < -1e-3 * values[-1]:
                what = "no finite mean or covariance, expected"
                fail(f"{self.path}: {name} or its sigma is {what} {side} features")
        return {name: value.astype(np.float64) for name, value in found.items()}

    def describe(self) -> dict[str, Any]:
        """What a protocol says of this set."""
        statistics = "of the file" if self.has_statistics else "of its pictures"
        named = {"file": str(self.path), "sha256": runs.file_sha256(*(self.files or [self.path]))}
        return {**named, "pictures": self.count, "statistics": statistics, "crop": self.crop}


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an .npy stream, which is left at its first number."""
    np.lib.format.read_magic(stream)  # version 2 is for headers that no array of numbers needs
    return np.lib.format.read_array_header_1_0(stream)


# --------------------------------------------------------------------------------------------------
# Writing pictures


def is_batch(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether there is a whole .npy of uint8 pictures of this shape."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # none, or damaged
        return False
    return found.shape == shape and found.dtype == np.uint8


def write_npz(path: Path, parts: list[Path], labels: np.ndarray) -> None:
    """ADM's sample file: arr_0 uint8 (n, H, W, 3), arr_1 int64 (n,). Holds one batch at a time."""
    # An .npz is a zip archive of .npy files: a header with the shape of the whole, then its rows.
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(stream: Any) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(np.load(part).tobytes())
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)

    runs.write_file(path, write)


def shown_labels(dataset: Dataset, num_classes: int) -> Tensor:
    """The rows of a grid in training: its classes, or the first eight captions."""
    if getattr(dataset, "places", 0):
        return torch.stack([dataset.row(index) for index in range(min(8, len(dataset)))])
    return torch.tensor(shown_classes(num_classes))


def shown_classes(num_classes: int) -> list[int]:
    """The rows of a grid: all of up to 16 classes, 8 of more, evenly; [-1] without classes."""
    if num_classes > 16:
        return np.linspace(0, num_classes - 1, 8).round().astype(int).tolist()
    return list(range(num_classes)) or [-1]


def save_png(images: Tensor, columns: int, path: Path) -> None:
    """Write images (n, 3, H, W) in [-1, 1] as a grid with `columns` pictures a row, row by row.
    Small pictures are enlarged by a whole factor, each pixel to a square: one can see them."""
    zoom = max(1, SHOWN_SIDE // images.shape[-1])
    images = to_uint8(images).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    picture = Image.fromarray(grid.permute(1, 2, 0).cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_file(path, lambda stream: picture.save(stream, "png"))
