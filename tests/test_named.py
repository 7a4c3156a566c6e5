"""--data cifar10, ...: published data sets by name, from small archives in the published layouts.

torchvision's own classes read them; they are told the addresses and hashes of the small ones.
"""

import functools
import hashlib
import http.server
import io
import multiprocessing
import pickle
import subprocess
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import evaluate
import spectral
import train
from common import data
from common.data import open_dataset


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def pack(path: Path, files: dict[str, bytes]) -> tuple[str, str]:
    """Publish files as a .tar.gz: its address and MD5."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return (path.parent / "address").read_text() + path.name, md5(path.read_bytes())


def jpeg(number: int) -> bytes:
    """Picture `number`: its red says which, its left half is dark in blue."""
    pixels = np.full((30, 40, 3), (20 * number, 100, 200), np.uint8)
    pixels[:, :20, 2] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=95)
    return stream.getvalue()


def planes(side: int, number: int, count: int = 2) -> bytes:
    """The same as raw planes (count, 3, side, side), which STL10 keeps column by column."""
    pixels = np.zeros((count, 3, side, side), np.uint8)
    pixels[:, 0], pixels[:, 2, :, side // 2 :] = 20 * number, 200
    return (pixels.swapaxes(2, 3) if side == 96 else pixels).tobytes()


# Each publishes pictures in the folder `site` and says what is in them: class names, the labels of
# train and of val, and the numbers of their pictures.


def publish_cifar(site, patch, kind=datasets.CIFAR10, labels="labels", names="label_names"):
    files, meta = {}, kind.meta["filename"]
    for i, (name, _) in enumerate((*kind.train_list, *kind.test_list)):
        pixels = np.frombuffer(planes(32, i), np.uint8).reshape(2, -1)
        files[name] = pickle.dumps({"data": pixels, labels: [i % 3, 2]})
    files[meta] = pickle.dumps({names: ["cat", "dog", "bus"]})
    url, digest = pack(site / "c.tar.gz", {f"{kind.base_folder}/{k}": v for k, v in files.items()})
    changes = {"url": url, "tgz_md5": digest, "meta": {**kind.meta, "md5": md5(files[meta])}}
    for name in ("train_list", "test_list"):
        changes[name] = [[k, md5(files[k])] for k, _ in getattr(kind, name)]
    for name, value in changes.items():
        patch(kind, name, value)
    last = len(files) - 2  # the batch of the test set
    train_labels = [label for i in range(last) for label in (i % 3, 2)]
    numbers = [i for i in range(last) for _ in range(2)]
    return ("cat", "dog", "bus"), (train_labels, [last % 3, 2]), (numbers, [last, last])


def publish_cifar100(site, patch):
    return publish_cifar(site, patch, datasets.CIFAR100, "fine_labels", "fine_label_names")


def publish_flowers102(site, patch):
    pictures = {f"jpg/image_{i:05d}.jpg": jpeg(i) for i in range(1, 6)}
    files = {"image": ("102flowers.tgz", pack(site / "102flowers.tgz", pictures)[1])}
    mats = {
        "label": ("imagelabels.mat", dict(labels=[[1, 2, 102, 102, 2]])),
        "setid": ("setid.mat", dict(trnid=[[3, 1]], valid=[[2, 4]], tstid=[[5, 5]])),
    }
    for key, (name, variables) in mats.items():
        savemat(site / name, variables)
        files[key] = name, md5((site / name).read_bytes())
    patch(datasets.Flowers102, "_download_url_prefix", (site / "address").read_text())
    patch(datasets.Flowers102, "_file_dict", files)
    # 102 names of flowers in newer torchvision, else numbers
    names = tuple(getattr(datasets.Flowers102, "classes", map(str, range(102))))
    return names, ([101, 0], [1, 101]), ([3, 1], [2, 4])


def publish_pets(site, patch):
    names = ["Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "great_pyrenees_4"]
    pictures = {f"images/{name}.jpg": jpeg(i) for i, name in enumerate(names)}
    lines = [f"{name} {1 + i % 2} 1 1\n" for i, name in enumerate(names)]
    lists = {
        "annotations/trainval.txt": "".join(lines[:2]).encode(),
        "annotations/test.txt": "".join(lines[2:]).encode(),
    }
    both = {"images.tar.gz": pictures, "annotations.tar.gz": lists}
    found = tuple(pack(site / name, files) for name, files in both.items())
    patch(datasets.OxfordIIITPet, "_RESOURCES", found)
    return ("Abyssinian", "Great Pyrenees"), ([0, 1], [0, 1]), ([0, 1], [2, 3])


def publish_imagenette(site, patch):
    places = "train/n03888257/b", "train/n01440764/a", "val/n01440764/c", "val/n03888257/d"
    files = {f"imagenette2-320/{place}.JPEG": jpeg(i) for i, place in enumerate(places)}
    archives = {"320px": pack(site / "imagenette2-320.tgz", files)}
    patch(datasets.Imagenette, "_ARCHIVES", archives)
    return ("tench", "parachute"), ([0, 1], [0, 1]), ([1, 0], [2, 3])


def publish_stl10(site, patch):
    kind = datasets.STL10
    files = {"class_names.txt": b"airplane\nbird\n", "fold_indices.txt": b""}
    for i, (name, _) in enumerate((*kind.train_list, *kind.test_list)):
        files[name] = planes(96, i) if "X" in name else bytes((2, 1))
    inside = {f"stl10_binary/{name}": content for name, content in files.items()}
    url, digest = pack(site / "s.tar.gz", inside)
    changes = {"url": url, "filename": "s.tar.gz", "tgz_md5": digest}
    for name in ("train_list", "test_list"):
        changes[name] = [[k, md5(files[k])] for k, _ in getattr(kind, name)]
    for name, value in changes.items():
        patch(kind, name, value)
    return ("airplane", "bird"), ([1, 0], [1, 0]), ([0, 0], [3, 3])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(name): a small data set of that name can be downloaded into the folder we are in."""
    site, here = tmp_path / "site", tmp_path / "here"
    site.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    (site / "address").write_text(f"http://127.0.0.1:{server.server_port}/")
    kinds = dict(cifar10=publish_cifar, cifar100=publish_cifar100, flowers102=publish_flowers102)
    kinds |= dict(pets=publish_pets, imagenette=publish_imagenette, stl10=publish_stl10)
    yield lambda name: kinds[name](site, monkeypatch.setattr)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", data.NAMED)
def test_a_published_data_set_is_downloaded_once_by_its_name(name, publish, tmp_path):
    names, labels, numbers = publish(name)
    for split, expected, pictures in zip(("train", "val"), labels, numbers, strict=True):
        dataset = open_dataset(name, 16, split)
        (tmp_path / "site").rename(tmp_path / "gone")  # no second download
        assert dataset.class_names == names
        assert dataset.labels.tolist() == expected == [dataset[i][1] for i in range(len(dataset))]
        assert len(data.Pictures(name, 16, split)) == len(expected)
        for i, number in enumerate(pictures):
            image, _ = dataset[i]
            assert image.shape == (3, 16, 16)
            assert (image[0] - (20 * number / 127.5 - 1)).abs().max() < 0.06
            assert image[2, :, 2].mean() < -0.9 < 0.5 < image[2, :, -3].mean()
            turned = [torch.equal(dataset[epoch, i][0], image.flip(-1)) for epoch in range(20)]
            assert 2 < sum(turned) < 18
        (tmp_path / "gone").rename(tmp_path / "site")
    assert data.Pictures(name, 16, "train").root != data.Pictures(name, 16, "val").root
    assert [path.name for path in Path("data").iterdir() if path.is_dir()] == [name]


def test_the_addresses_are_those_of_torchvision():
    end = {name: row[3] for name, row in data.NAMED.items()}
    for name, kind in dict(cifar10="CIFAR10", cifar100="CIFAR100", stl10="STL10").items():
        assert end[name] == getattr(datasets, kind).url
    assert end["imagenette"] == datasets.Imagenette._ARCHIVES["320px"][0]
    files = ",".join(name for name, _ in datasets.Flowers102._file_dict.values())
    assert end["flowers102"] == datasets.Flowers102._download_url_prefix + "{" + files + "}"
    stem, _, rest = end["pets"].partition("{")
    inside, _, suffix = rest.partition("}")
    assert [stem + x + suffix for x in inside.split(",")] == [
        url for url, _ in datasets.OxfordIIITPet._RESOURCES
    ]


def test_a_folder_of_that_name_wins(publish):
    publish("pets")
    Path("pets/dogs").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save("pets/dogs/a.png")
    assert open_dataset("pets", 16).class_names == ("dogs",)
    assert not Path("data").exists()


def test_without_a_network_one_line_says_what_to_unpack_and_where(publish, tmp_path, capsys):
    publish("pets")
    (tmp_path / "site" / "annotations.tar.gz").unlink()
    with pytest.raises(SystemExit) as stop:
        open_dataset("pets", 16)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("error: pets cannot be downloaded (")
    assert line.endswith(
        "unpack https://www.robots.ox.ac.uk/~vgg/data/pets/data/{images,annotations}.tar.gz "
        "by hand in data/pets/oxford-iiit-pet"
    )
    # By hand it is then; the half that was downloaded does not count.
    folder = Path("data/pets/oxford-iiit-pet")
    assert not Path("data/pets").exists() and Path("data/pets.part").exists()
    publish("pets")
    folder.mkdir(parents=True)
    for name in ("images", "annotations"):
        archive = tmp_path / "site" / f"{name}.tar.gz"
        subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    assert len(open_dataset("pets", 16)) == 2
    (folder / "annotations" / "trainval.txt").unlink()
    with pytest.raises(SystemExit):
        open_dataset("pets", 16)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: data/pets cannot be read (") and "by hand" in line


def test_what_an_interrupted_download_left_is_not_believed(publish):
    publish("imagenette")  # its class takes any folder of the right name for the whole
    Path("data/imagenette.part/imagenette2-320/train/n01440764").mkdir(parents=True)
    assert len(open_dataset("imagenette", 16)) == 2


class Slow(datasets.VisionDataset):
    """A data set whose download takes a while and is noted."""

    def __init__(self, root, train, download=False):
        if download:
            Path(root).mkdir()
            time.sleep(0.3)
            with open("downloads", "a") as stream:
                stream.write("one\n")
            (Path(root) / "whole").touch()
        assert (Path(root) / "whole").exists()
        self.targets, self.classes = [0], ["a"]


def test_of_several_processes_one_downloads_and_the_others_wait(publish, monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10", Slow)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=open_dataset, args=("cifar10", 16)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert Path("downloads").read_text() == "one\n"


def test_broken_pictures_are_named_skipped_and_listed(publish, capsys):
    publish("pets")
    dataset, broken = open_dataset("pets", 16), "data/pets/oxford-iiit-pet/images/Abyssinian_1.jpg"
    Path(broken).write_bytes(jpeg(0)[:200])
    with pytest.raises(data.BrokenImage, match=broken):
        dataset[0]
    image, label, reason = data.TrainingPictures(dataset, skip_bad=True)[0, 0]
    assert label == 1 and broken in reason
    with pytest.raises(SystemExit) as stop:
        data.check_data("pets", 16)
    out = capsys.readouterr().out
    assert stop.value.code == 1 and broken in out and "4 pictures, 2 classes, 1 broken" in out


def test_training_and_what_looks_at_it_take_a_name(publish, tiny, tmp_path, capsys):
    publish("cifar10")
    train.main(replace(tiny, data="cifar10", num_classes=None, num_workers=2, steps=2))
    capsys.readouterr()
    path = str(tmp_path / "run" / "model.pt")
    assert train.load_checkpoint(path).class_names == ("cat", "dog", "bus")
    evaluate.main(evaluate.parse_arguments(["likelihood", path]))
    out = capsys.readouterr().out
    assert "cifar10" in out and "conditional" in out
    spectral.main(spectral.parse_arguments([path, "--images", "2"]))
    assert "sigma_min" in (tmp_path / "run" / "spectral.json").read_text()
