"""common/data.py: built-in pictures, folders, ADM's crop, broken pictures, the order of steps."""

import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image

from common import data, runs, shapes
from common.data import BrokenImage, open_dataset, step_batches
from common.shapes import ShapesDataset

# ------------------------------------------------------------------------------------ Built-in ones


def test_built_in_pictures_repeat_vary_and_are_balanced():
    dataset = ShapesDataset(32)
    image, label = dataset[13]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 3
    assert torch.equal(image, dataset[(7, 13)][0])  # the same in every epoch
    others = [dataset[i][0] for i in range(3, 103, 10)]
    assert all((a - b).abs().mean() > 0.02 for i, a in enumerate(others) for b in others[:i])
    assert {dataset[i][1] for i in range(10)} == set(range(10))
    assert image.min() >= -1 and image.max() <= 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    val = open_dataset(None, 32, "val")
    assert len(open_dataset(None, 32)) == 50_000 and len(val) == 2_000
    assert not torch.equal(image, val[13][0])


def test_built_in_shape_covers_the_middle_and_hue_can_be_chosen():
    picture = shapes.render_shape(0, np.random.default_rng(0), 32, hue=1 / 3)
    middle, corner = np.asarray(picture).astype(int)[[16, 0], [16, 0]]
    assert middle[1] > middle[0] and middle[1] > middle[2]  # green
    assert middle.sum() > corner.sum()


# ------------------------------------------------------------------------------------------ Folders


def test_adm_crop_equals_box_halving_then_bicubic():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (70, 94, 3), dtype=np.uint8))
    pixels = np.asarray(picture).astype(float)
    box = pixels.reshape(35, 2, 47, 2, 3).mean(axis=(1, 3))  # short side 70 >= 2 x 32: halve once
    halved = Image.fromarray((box + 0.5).astype(np.uint8))
    resized = np.asarray(halved.resize((round(47 * 32 / 35), 32), Image.Resampling.BICUBIC))
    left = (resized.shape[1] - 32) // 2
    result = np.asarray(data.adm_crop(picture, 32)).astype(int)
    assert np.abs(result - resized[:, left : left + 32]).max() <= 2  # two roundings
    twice = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))  # halved, too
    box = np.asarray(twice).astype(float).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(data.adm_crop(twice, 32)) - box).max() <= 1
    for size in ((1, 1), (3, 200), (640, 33), (32, 32)):
        assert data.adm_crop(Image.new("RGB", size), 32).size == (32, 32)


def test_uint8_conversion_rounds_and_goes_both_ways():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(shapes.to_uint8(shapes.from_uint8(values)), values)
    assert torch.equal(shapes.from_uint8(values), values.float() / 127.5 - 1)  # bits of all runs
    assert shapes.to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_folder_layouts(tmp_path, capsys):
    for name in ("b", "a"):
        write_pictures(tmp_path / "imagenet" / "train" / name, 3)
    write_pictures(tmp_path / "imagenet" / "val" / "b", 1, mode="RGBA")  # fewer classes than train
    dataset, val = (
        open_dataset(str(tmp_path / "imagenet"), 16, split) for split in ("train", "val")
    )
    assert dataset.class_names == val.class_names == ("a", "b")
    assert len(dataset) == 6 and dataset[5][0].shape == (3, 16, 16) and dataset[5][1] == 1
    assert len(val) == 1 and val[0][0].shape == (3, 16, 16) and val[0][1] == 1
    assert len(open_dataset(str(tmp_path / "imagenet" / "train"), 16)) == 6  # classes directly
    flat = open_dataset(str(tmp_path / "imagenet" / "train" / "a"), 16)
    assert flat.class_names == () and len(flat) == 3 and flat[0][1] == -1

    for name in ("bus", "car", "train"):  # a class called train is no split
        write_pictures(tmp_path / "classes" / name, 1)
    assert open_dataset(str(tmp_path / "classes"), 16).class_names == ("bus", "car", "train")
    write_pictures(tmp_path / "imagenet" / "train" / ".ipynb_checkpoints", 1)
    (tmp_path / "imagenet" / "train" / "a" / "._1.png").write_bytes(b"not a picture")
    hidden = open_dataset(str(tmp_path / "imagenet"), 16)
    assert hidden.class_names == ("a", "b") and len(hidden) == 6
    with pytest.raises(SystemExit):
        open_dataset(str(tmp_path / "imagenet"), 16, "test")
    found = capsys.readouterr()
    assert "has train/ but no test/" in found.err and not found.out
    write_pictures(tmp_path / "imagenet" / "val" / "B", 1)
    assert len(open_dataset(str(tmp_path / "imagenet"), 16, "val")) == 1
    assert "has B, which train/ has not: left out" in capsys.readouterr().out


def test_flip_is_a_function_of_seed_epoch_and_index(tmp_path):
    write_pictures(tmp_path / "flat", 4)
    dataset = open_dataset(str(tmp_path / "flat"), 16, seed=3)
    plain = dataset[1][0]
    flipped = [torch.equal(dataset[(epoch, 1)][0], plain.flip(-1)) for epoch in range(60)]
    assert 15 < sum(flipped) < 45
    assert flipped == [torch.equal(dataset[(epoch, 1)][0], plain.flip(-1)) for epoch in range(60)]


def deep(picture: Image.Image) -> Image.Image:
    """The same picture in 16 bits of grey."""
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return exif


ODD_PICTURES = {
    "cmyk.jpg": lambda picture, path: picture.convert("CMYK").save(path),
    "palette.png": lambda picture, path: picture.quantize(64).save(path, transparency=0),
    "alpha.png": lambda picture, path: picture.convert("RGBA").save(path),
    "grey_alpha.png": lambda picture, path: picture.convert("LA").save(path),
    "one_bit.png": lambda picture, path: picture.convert("1").save(path),
    "deep.png": lambda picture, path: deep(picture).save(path),
    "turned.jpg": lambda picture, path: picture.save(path, exif=turned()),
    "pixel.png": lambda picture, path: picture.resize((1, 1)).save(path),
    "line.png": lambda picture, path: picture.resize((200, 1)).save(path),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_read(tmp_path, name):
    ramp = np.linspace(40, 200, 24).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], (24, 24, 3)).copy())
    ODD_PICTURES[name](picture, tmp_path / name)
    image, _ = open_dataset(str(tmp_path), 24)[0]
    assert image.shape == (3, 24, 24) and image.min() >= -1 and image.max() <= 1
    if name == "deep.png":  # 257 times each value
        assert (shapes.to_uint8(image[0, 12]) == torch.from_numpy(ramp)).all()
    if name not in ("pixel.png", "line.png", "one_bit.png"):  # the ramp is still there
        expected = torch.from_numpy(ramp).float() / 127.5 - 1
        tolerance = 0.1 if name.endswith("jpg") else 0.02
        # A camera's "turn me" is not obeyed, as in ADM: ImageNet's labels do not depend on it.
        assert (image[0, 12, 1:] - expected[1:]).abs().max() < tolerance


# ---------------------------------------------------------------------------------- Broken pictures


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("RGB", (201, 1)).save(tmp_path / "thread.png")
    with pytest.raises(BrokenImage, match="thread.png.*over 200 times"):
        open_dataset(str(tmp_path), 24)[0]


def test_a_skipped_picture_has_a_fixed_neighbour_and_after_the_last_comes_the_first(tmp_path):
    write_pictures(tmp_path / "flat", 5)
    for name in ("2.png", "3.png", "4.png"):
        (tmp_path / "flat" / name).write_bytes(b"broken")
    dataset = open_dataset(str(tmp_path / "flat"), 16)
    strict, lenient = (data.TrainingPictures(dataset, skip_bad=b) for b in (False, True))
    with pytest.raises(BrokenImage, match="2.png.*--check-data.*--skip-bad-images"):
        strict[0, 2]
    image, label, reason = lenient[0, 2]
    assert torch.equal(shapes.from_uint8(image), dataset[0, 0][0]) and "2.png" in reason
    assert lenient[0, 1][2] == ""


def test_each_broken_picture_is_named_once_and_too_many_end_the_run(capsys):
    broken = data.BrokenImages(1001)
    for _ in range(3):
        broken.add(["", "cannot read a.png", "cannot read a.png", ""])
    assert capsys.readouterr().out.count("a.png") == 1 and broken.count_of_all() == 1
    with pytest.raises(SystemExit):  # 2 of 1001 are more than 0.1 %
        broken.add(["cannot read b.png"])
    assert "2 of 1001 pictures cannot be read" in capsys.readouterr().err
    data.BrokenImages(5).check(1)  # one may be broken in the smallest folder
    with pytest.raises(SystemExit):
        data.BrokenImages(5).check(2)


def test_pictures_that_two_processes_met_are_too_many_together(monkeypatch, capsys):
    def all_gather_object(met, own):
        met[:] = own, {"cannot read b.png"}

    monkeypatch.setattr(runs.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runs.dist, "all_gather_object", all_gather_object)
    broken = data.BrokenImages(1001)
    broken.add(["cannot read b.png"])
    assert broken.count_of_all() == 1  # the same one
    broken.reasons = {"cannot read a.png"}
    with pytest.raises(SystemExit):
        broken.count_of_all()


# ------------------------------------------------------------------------------ The order of steps


def test_sampler_shows_every_image_once_an_epoch_in_a_new_order():
    batches = list(step_batches(10, 4, range(4), range(10), seed=5))
    entries = [entry for batch in batches for entry in batch]
    first, second = ([i for e, i in entries if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert {e for e, _ in entries} == {0, 1, 2, 3}


def test_there_are_no_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for asked, got in ((0, 0), (1, 1), (9, 2)):
        loader = data.training_loader(ShapesDataset(16), 4, range(1), 0, False, num_workers=asked)
        assert loader.num_workers == got


def test_sampler_can_start_anywhere_and_ranks_share_the_batch():
    whole = list(step_batches(10, 4, range(4), range(9), 5))
    assert list(step_batches(10, 4, range(4), range(3, 9), 5)) == whole[3:]
    left, right = (list(step_batches(10, 4, range(r, r + 2), range(9), 5)) for r in (0, 2))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    assert list(step_batches(10, 4, range(4), range(9), 6)) != whole


def test_a_grid_shows_eight_of_many_classes():
    assert data.shown_classes(16) == list(range(16)) and data.shown_classes(0) == [-1]
    assert data.shown_classes(1000) == [0, 143, 285, 428, 571, 714, 856, 999]
