"""Hostile input: whatever a user or a file does, a line says what is wrong, and nothing is lost.

A case a line: what is made first, the command, what its line says. All of them run in this process
on copies of one tiny run; every file that was there before must be there, unchanged, afterwards.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, write_pictures
from PIL import Image

import evaluate
import sample
import spectral
import train
from common import data, runs
from common.inception import FIDInception

SMALL = " ".join(
    f"{runs.flag(k)} {runs.shown(v)}" for k, v in TINY.items() if k not in ("batch_size", "device")
)
MAINS = {
    "train.py": train.command_line,
    "sample.py": lambda: sample.main(sample.parse_arguments()),
    "evaluate.py": lambda: evaluate.main(evaluate.parse_arguments()),
    "spectral.py": lambda: spectral.main(spectral.parse_arguments()),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """run/: a finished run; plain/: one without labels; pics/, ten/: class folders; set.npz."""
    torch.manual_seed(0)
    top = tmp_path_factory.mktemp("world")
    for name, classes in (("run", 10), ("plain", 0)):
        config = train.preset_config(
            "shapes", **TINY, steps=2, num_classes=classes, out=str(top / name)
        )
        train.main(config)
    for name in ("cat", "dog"):
        write_pictures(top / "pics" / name, 5)
    for name in "abcdefghij":
        write_pictures(top / "ten" / name, 1)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(top / "set.npz", arr_0=pictures)
    for path in top.glob("*/samples"):
        shutil.rmtree(path)
    return top


@pytest.fixture
def home(world, tmp_path, monkeypatch):
    """A copy of the world to work in."""
    shutil.copytree(world, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(evaluate, "load_inception", lambda path, device: (FIDInception, {}))
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path / "home"
    signal.signal(signal.SIGINT, before)


def snapshot(folder: Path) -> dict[Path, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in found}


def refused(command: str, expected: str, code: int, monkeypatch, capsys) -> None:
    """The command ends with this code and one line, which holds `expected`."""
    before = snapshot(Path.cwd())
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("SMALL", SMALL)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runs.run_program(MAINS[sys.argv[0]])
    errors = capsys.readouterr().err
    assert ended.value.code == code, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert expected in errors and errors.rstrip("\n").isprintable(), errors
    after = snapshot(Path.cwd())
    changed = [path for path, content in before.items() if after.get(path) != content]
    assert not changed


# ------------------------------------------------------------------------------------- Checkpoints


def edit(path: str, change) -> None:
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


NAN, INF = float("nan"), float("inf")
FIELDS = [  # a field of the configuration, what it becomes, what the line says
    ("width", "16", "--width cannot be '16'"),
    ("width", None, "--width cannot be None"),
    ("width", [16], "--width cannot be (16,)"),
    ("width", NAN, "--width cannot be nan"),
    ("width", 16.0, "--width cannot be 16.0"),
    ("width", -16, "--width must be positive"),
    ("width", 0, "--width must be positive"),
    ("width", 17, "no such model"),
    ("width", 2 * 10**9, "no such model"),
    ("width", 10**30, "--width must be"),
    ("heads", 0, "--heads must be positive"),
    ("heads", 3, "no such model"),
    ("depth", 0, "--depth must be"),
    ("depth", 10**8, "--depth must be"),
    ("depth", {}, "--depth cannot be {}"),
    ("flow_depths", 2, "--flow-depths cannot be 2"),
    ("flow_depths", ["1", "2"], "--flow-depths cannot be ('1', '2')"),
    ("flow_depths", [0], "--flow-depths must be"),
    ("flow_depths", [1, -1], "--flow-depths must be"),
    ("flow_depths", [], "fit its configuration"),
    ("flow_depths", [1] * 200, "more weights than the file holds"),
    ("flow_head_dim", 10**9, "no such model"),
    ("flow_width", 10**9, "no such model"),
    ("scale", "tanh", "--scale cannot be 'tanh'"),
    ("prior", "vae", "--prior cannot be 'vae'"),
    ("phase", "third", "--phase cannot be 'third'"),
    ("gated", "yes", "--gated cannot be 'yes'"),
    ("mask_ratio", [0.5], "--mask-ratio needs"),
    ("mask_ratio", [0.6, 0.4], "--mask-ratio needs"),
    ("emigm_interval", [0.9, 0.1], "--emigm-interval needs"),
    ("mask_ratio", [NAN, NAN], "--mask-ratio must be"),
    ("mask_ratio", None, "--mask-ratio cannot be None"),
    ("sigma", NAN, "--sigma must be"),
    ("sigma", -1.0, "--sigma must be"),
    ("sigma", "\x1b[2J", "--sigma cannot be '\\x1b[2J'"),
    ("guidance", INF, "--guidance must be"),
    ("num_classes", -1, "--num-classes must be"),
    ("num_classes", 3, "10 class names, but --num-classes 3"),
    ("num_classes", None, "10 class names"),
    ("num_latents", 10**12, "--num-latents must be"),
    ("num_latents", 10**9, "more weights than the file holds"),
    ("latent_dim", 2**31 - 1, "more weights than the file holds"),
    ("image_size", 17, "no such model"),
    ("image_size", 10**9, "more weights than the file holds"),
    ("seed", 2**64, "--seed must be"),
    ("data", 7, "--data cannot be 7"),
    ("new\nerror: field", 1, "unknown configuration new\\nerror: field"),
    (7, 1, "unknown configuration 7"),
]
EVIL = ["\x1b]0;x\x07", *"abcdefghi"]


def head(**values):
    return lambda c: c.update(values)


def without(name):
    return lambda c: c.pop(name)


def weights(change):
    return lambda c: c.update(model={k: change(v) for k, v in c["model"].items()})


def first_weight(**entry):
    return lambda c: c["model"].update(entry)


HEADS = [  # what is done to model.pt, what the line says
    (head(format="1"), "its format is no int"),
    (head(format=99), "newer than this program"),
    (without("format"), "its format is no int"),
    (head(step="2"), "its step is no int"),
    (head(step=None), "its step is no int"),
    (head(step=NAN), "its step is no int"),
    (head(step=-4), "its step or its class_names"),
    (head(class_names=None), "its class_names is no list"),
    (head(class_names="abcdefghij"), "its class_names is no list"),
    (head(class_names=[1] * 10), "its step or its class_names"),
    (head(class_names=["a"]), "1 class names, but --num-classes 10"),
    (head(config=None), "its config is no dict"),
    (head(config=[1]), "its config is no dict"),
    (head(model=None), "its model is no dict"),
    (without("model"), "its model is no dict"),
    (head(model={}), "more weights than the file holds"),
    (head(ema=None), "do not fit"),
    (head(ema=[1]), "do not fit"),
    (lambda c: c["model"].popitem(), "do not fit"),
    (first_weight(more=torch.ones(1)), "do not fit"),
    (first_weight(**{"\x1b[2J": torch.ones(1)}), "do not fit"),
    (weights(lambda x: NAN * x), "not finite"),
    (weights(lambda x: x.to(torch.complex64)), "do not fit"),
    (weights(lambda x: x.to(torch.int64)), "do not fit"),
    (weights(lambda x: x.tolist()), "do not fit"),
    (weights(lambda x: x[None]), "do not fit"),
    (weights(lambda x: x.to("meta")), "more weights than the file holds"),
]
READERS = [  # every program that reads a model.pt
    "sample.py run/model.pt --out new.png",
    "evaluate.py likelihood run/model.pt --device cpu",
    "evaluate.py generation run/model.pt set.npz --num 2",
    "evaluate.py cost run/model.pt --no-timing",
    "spectral.py run/model.pt --images 2 --device cpu",
    "train.py SMALL --gan-weight 0 --phase decoder --init run/model.pt --out new",
]


@pytest.mark.parametrize("number", range(len(FIELDS)))
def test_an_edited_configuration(home, number, monkeypatch, capsys):
    field, value, expected = FIELDS[number]
    edit("run/model.pt", lambda c: c["config"].update({field: value}))
    refused(READERS[number % len(READERS)], expected, 1, monkeypatch, capsys)


@pytest.mark.parametrize("number", range(len(HEADS)))
def test_an_edited_head_or_weights(home, number, monkeypatch, capsys):
    change, expected = HEADS[number]
    edit("run/model.pt", change)
    refused(READERS[number % len(READERS)], expected, 1, monkeypatch, capsys)


def moments(**values):
    """Change entries of the first weight's state in AdamW; a function gets the old one."""

    def change(c):
        state = c["optimizer"]["state"][0]
        state |= {k: v(state[k]) if callable(v) else v for k, v in values.items()}

    return change


LAST = [  # what is done to last.pt, what the line of the resumed run says
    (lambda c: torch.save({"a": 1}, "run/last.pt") or c.clear(), "is not a MIMFlow checkpoint"),
    (lambda c: c.update(torch.load("run/model.pt")) or c.pop("skipped"), "not a last.pt"),
    (without("ema"), "ema: the weights do not fit"),
    (head(ema=None), "ema: the weights do not fit"),
    (head(ema=[]), "ema: the weights do not fit"),
    (without("optimizer"), "optimizer: the weights do not fit"),
    (head(optimizer=None), "optimizer: the weights do not fit"),
    (head(optimizer={"state": {}, "param_groups": []}), "optimizer: the weights do not fit"),
    (head(auxiliary=None), "auxiliary: the weights do not fit"),
    (without("skipped"), "not a last.pt"),
    (head(skipped="0"), "not a last.pt"),
    (head(skipped=10**400), "not a last.pt"),
    (head(skipped=-1), "not a last.pt"),
    (head(step=-1), "its step or its class_names"),
    (head(step="2"), "its step is no int"),
    (head(class_names=[*"abcdefghij"]), "other classes"),
    (lambda c: c["config"].update(lr=0.1), "--lr 0.1 there"),
    (lambda c: c["config"].update(width=32), "another configuration"),
    (moments(exp_avg=torch.zeros(1)), "do not fit"),
    (moments(exp_avg=lambda x: torch.zeros(1).expand(x.shape)), "do not fit"),
    (moments(exp_avg_sq=lambda x: x.new_zeros(x.numel() + 1)), "do not fit"),
    (moments(exp_avg=lambda x: x * NAN), "do not fit"),
    (moments(step=torch.zeros(0)), "do not fit"),
    (moments(step=torch.tensor(NAN)), "do not fit"),
    (moments(step=None), "do not fit"),
    (lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"), "do not fit"),
    (lambda c: c["model"].popitem(), "model: the weights do not fit"),
    (lambda c: c["config"].update(convnext_mix=True), "--convnext-mix, which is gone"),
]


@pytest.mark.parametrize("number", range(len(LAST)))
def test_an_edited_last_checkpoint(home, number, monkeypatch, capsys):
    change, expected = LAST[number]
    edit("run/last.pt", change)
    code = 2 if "there" in expected or "configuration" in expected else 1
    command = "train.py SMALL --batch-size 8 --device cpu --num-classes 10 --steps 3 --out run"
    refused(command, expected, code, monkeypatch, capsys)


# ------------------------------------------------------------------------------------ Command lines

TRAIN = "train.py SMALL --batch-size 8 --device cpu --steps 1 --out new "
PHASE_2 = "train.py SMALL --gan-weight 0 --phase decoder --out new --init "
COMMANDS = [  # a command, what its line says: exit code 2
    ("sample.py run/model.pt --out run/model.pt", "must end in .png"),
    ("sample.py run/model.pt --npz run/model.pt", "must end in .npz"),
    ("sample.py run/model.pt --npz grid.png", "must end in .npz"),
    ("evaluate.py map run/model.pt --out run/config.png", "the name of a run's configuration"),
    ("sample.py run/model.pt --out no/grid.png", "does not exist"),
    ("sample.py run/model.pt --out /dev/null", "must end in .png"),
    ("sample.py run/model.pt --npz link.npz", "which would be lost"),
    ("sample.py run/model.pt --npz pipe.npz", "not a regular file"),
    ("sample.py run/model.pt --npz folder.npz", "not a regular file"),
    ("sample.py run/model.pt --npz new.npz --num 2147483647", "GB free"),
    ("sample.py run/model.pt --num 10000000000", "below 2^31"),
    ("sample.py run/model.pt --batch-size 0", "must be positive"),
    ("sample.py run/model.pt --num 100000000 --batch-size 100000000", "GB at least"),
    ("evaluate.py map run/model.pt", "run/map.png is not a regular file"),
    ("evaluate.py reconstruction run/model.pt", "run/reconstruction.png is not a regular file"),
    ("sample.py run/model.pt --seed 18446744073709551616", "below 2^63"),
    ("sample.py run/model.pt --seed -1", "not negative"),
    ("sample.py run/model.pt --guidance nan", "finite"),
    ("sample.py run/model.pt --guidance inf", "finite"),
    ("sample.py run/model.pt --tolerance -1", "finite"),
    ("sample.py run/model.pt --classes 10", "--info names them"),
    ("sample.py run/model.pt --classes " + 5000 * "9", "999 is no class"),
    ("sample.py run/model.pt --between star dragon", "'dragon' is no class and no picture"),
    ("sample.py run/model.pt --reconstruct pics", "'pics' is no class and no picture"),
    ("sample.py run/model.pt --between star heart --num 4", "--num has no part in"),
    ("sample.py run/model.pt --reconstruct star --prompt 'a star'", "--prompt has no part in"),
    ("sample.py run/model.pt --guidance-interval 0.8 0.2", "LO <= HI"),
    ("sample.py run/model.pt --classes $'a\x1b[2J'", "--info names them"),
    ("sample.py plain/model.pt --classes 0", "without labels"),
    ("sample.py run/model.pt --device meta", "device meta cannot be used"),
    ("sample.py run/model.pt --device privateuseone", "cannot be used"),
    ("sample.py run/model.pt --device cpu:99999999999999999999", "cannot be used"),
    ("evaluate.py likelihood run/model.pt --json run/model.pt", "must end in .json"),
    ("evaluate.py likelihood run/model.pt --json run/config.json", "a run's configuration"),
    ("evaluate.py likelihood run/model.pt --json no/n.json", "does not exist"),
    ("evaluate.py likelihood run/model.pt --seed 18446744073709551616", "below 2^63"),
    ("evaluate.py likelihood run/model.pt --num 1000000000", "pictures asked for"),
    ("evaluate.py likelihood run/model.pt --num-workers 1000000", "--num-workers"),
    ("evaluate.py map run/model.pt --out run/model.pt", "must end in .png"),
    ("evaluate.py cost run/model.pt --device cpu --batch-size 1000000000", "GB at least"),
    ("evaluate.py map run/model.pt --out pics/cat/0.png --data pics", "would be lost"),
    ("evaluate.py reconstruction run/model.pt --mask-ratio 1 0", "LOW <= HIGH"),
    ("evaluate.py probe run/model.pt --epochs 1000000000000000000000", "below 2^31"),
    ("evaluate.py generation set.npz set.npz --json set.npz", "must end in .json"),
    ("evaluate.py generation run/model.pt set.npz --npz set.npz", "would be lost"),
    ("evaluate.py generation pics pics --crop 100000", "--crop"),
    ("evaluate.py generation pics pics --crop 100000000000000000000", "--crop"),
    ("evaluate.py cost --no-timing --tokens 1000000000", "--tokens"),
    ("evaluate.py cost --batches 1000000000", "--batches"),
    ("spectral.py run/model.pt --out run/config.json", "a run's configuration"),
    ("spectral.py run/model.pt --out run/model.pt", "must end in .json"),
    ("evaluate.py curves run/model.pt", "give run folders or log.jsonl files"),
    ("spectral.py run/model.pt --tolerance inf", "at most"),
    ("spectral.py run/model.pt --shift nan", "at most"),
    ("spectral.py run/model.pt --seed 18446744073709551616", "below 2^63"),
    ("spectral.py run/model.pt --images 1000000000", "pictures asked for"),
    (TRAIN + "--seed 18446744073709551616", "--seed must be"),
    (TRAIN + "--epochs 1e30 --steps 0", "--steps must be"),
    (TRAIN + "--steps 2147483648", "--steps must be"),
    (TRAIN + "--batch-size 1000000000", "GB"),
    (TRAIN + "--image-size 1000000000", "GB"),
    (TRAIN + "--image-size 1000000000 --patch-size 1000000000", "no such model"),
    (TRAIN + "--width 2000000000", "no such model"),
    (TRAIN + "--width 200000", "GB"),
    (TRAIN + "--depth 100000000", "--depth must be"),
    (TRAIN + "--flow-depths 100000000", "--flow-depths must be"),
    (TRAIN + "--num-latents 2000000000", "GB"),
    (TRAIN + "--num-latents 1000000000000000000000", "--num-latents must be"),
    (TRAIN + "--latent-dim 2000000000", "GB"),
    (TRAIN + "--num-workers 2000000000", "--num-workers must be"),
    (TRAIN + "--mim-weight 1e308", "--mim-weight must be"),
    (TRAIN + "--lr nan", "--lr must be"),
    (TRAIN + "--data ''", "--data is empty"),
    ("train.py SMALL --overwrite --steps 1 --out ''", "--out is empty"),
    (PHASE_2 + "run/model.pt --prior emigm", "has no phase 2"),
    (TRAIN + "--caption-words 4 --data cifar10", "has no captions, which"),
    (TRAIN + "--lr 1e400", "--lr must be"),
    (TRAIN + "--device meta", "device meta cannot be used"),
    ("train.py SMALL --dry-run --depth 100000000", "--depth must be"),
    ("train.py --data pics --check-data --image-size 0", "--image-size must be"),
    (PHASE_2 + "run/model.pt --out run --overwrite", "would delete --init"),
    (TRAIN + "--out foreign", "of something else"),
    (TRAIN + "--out foreign --overwrite", "of something else"),
    (TRAIN + "--out logs", "of something else"),
    (TRAIN + "--out other", "no last.pt"),
]


@pytest.fixture
def clutter(home):
    """What the commands above name."""
    os.mkfifo("pipe.npz")
    os.symlink("run/model.pt", "link.npz")
    folders = ("folder.npz", "foreign", "logs", "other", "run/map.png", "run/reconstruction.png")
    for name in folders:
        Path(name).mkdir()
    Path("foreign/config.json").write_text('{"mine": 1}')
    Path("logs/log.jsonl").write_text("mine\n")
    shutil.copy("run/model.pt", "other/model.pt")


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_line(clutter, number, monkeypatch, capsys):
    refused(*COMMANDS[number], 2, monkeypatch, capsys)


# ------------------------------------------------------------------------- Pictures, .npz, folders


def header(text: bytes, rows: bytes = b"", **how) -> None:
    """bad.npz whose arr_0 has this header."""
    text = text.ljust(118) + b"\n"
    with zipfile.ZipFile("bad.npz", "w", **how) as archive:
        length = len(text).to_bytes(2, "little")
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + length + text + rows)


def shaped(shape: str, order: str = "False", kind: str = "|u1") -> bytes:
    return f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}}}".encode()


def flagged(bit: int) -> None:
    """set.npz as bad.npz, said to be encrypted (1) or of an unknown compression."""
    content = bytearray(Path("set.npz").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature) + offset
        content[at if bit == 1 else at + 2] = bit
    Path("bad.npz").write_bytes(content)


def array(x, **more) -> None:
    np.savez("bad.npz", arr_0=x, **more)


def statistics(**changed) -> None:
    """A reference with statistics, some of them changed; unchanged ones are of the unit Gaussian
    (sparse on disk, so that a case costs nothing)."""
    found = {"mu": np.zeros(2048, "f4"), "mu_s": np.zeros(2023, "f4")}
    found |= {"sigma": np.eye(2048, dtype="f4"), "sigma_s": np.eye(2023, dtype="f4")}
    np.savez_compressed("bad.npz", arr_0=np.load("set.npz")["arr_0"], **{**found, **changed})


def edited(x, index, value):
    x[index] = value
    return x


def png(folder: str, content: bytes) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "bad.png").write_bytes(content)


def heic() -> None:
    """A picture of a kind that is not read here, beside one that is."""
    write_pictures(Path("new/cat"), 1)
    Path("new/cat/a.heic").write_bytes(b"x")


def in_the_old_format() -> None:
    checkpoint = torch.load("run/model.pt", weights_only=True)
    torch.save(checkpoint, "run/model.pt", _use_new_zipfile_serialization=False)


def picture(path: str, mode: str, value: float) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), value).save(path)


def splits(*names: str) -> None:
    for name in names:
        write_pictures(Path("new", name, "cat"), 2)


def bomb() -> None:
    """A PNG that says it is 30000 x 30000."""
    import struct
    import zlib

    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    png("new/cat", b"\x89PNG\r\n\x1a\n" + chunk)


COMPARE = "evaluate.py generation bad.npz set.npz --device cpu"
AGAINST = "evaluate.py generation set.npz bad.npz --device cpu"
FOLDER = "evaluate.py generation new set.npz --device cpu"
DATA = TRAIN.replace("--out new", "--out o") + "--data new"
SIX = (6, 16, 16, 3)
FILES = [  # how it is made, a command, what its line says: exit code 1
    (lambda: flagged(1), COMPARE, "encrypted"),
    (lambda: flagged(99), COMPARE, "damaged or not an .npz"),
    (lambda: header(shaped("(-1, 16, 16, 3)"), bytes(768)), COMPARE, "expected pictures"),
    (lambda: header(shaped("(10**12, 16, 16, 3)")), COMPARE, "damaged or not an .npz"),
    (lambda: header(shaped("(1000000000000, 16, 16, 3)"), bytes(768)), COMPARE, "expected pic"),
    (lambda: header(shaped("(1, 16, 16, 3)", "True"), bytes(700)), COMPARE, "expected 768 bytes"),
    (lambda: header(shaped("(1, 16, 16, 3)", kind="|O"), bytes(7000)), COMPARE, "expected pict"),
    (lambda: header(b"(" * 100), COMPARE, "damaged or not an .npz"),
    (lambda: header(b"-" * 60000), COMPARE, "damaged or not an .npz"),
    (lambda: header(b""), COMPARE, "damaged or not an .npz"),
    (lambda: np.savez("bad.npz", wrong=1), COMPARE, "has no arr_0 (it holds wrong)"),
    (lambda: np.savez("bad.npz", **{"\x1b[2J": 1}), COMPARE, "has no arr_0"),
    (lambda: Path("bad.npz").write_bytes(b""), COMPARE, "damaged or not an .npz"),
    (lambda: Path("bad.npz").write_bytes(b"PK"), AGAINST, "damaged or not an .npz"),
    (lambda: Path("bad.npz").mkdir(), COMPARE, "no pictures in bad.npz"),
    (lambda: os.mkfifo("bad.npz"), AGAINST, "no pictures in bad.npz"),
    (lambda: array(np.zeros((6, 3, 16, 16))), COMPARE, "expected pictures"),
    (lambda: array(np.zeros((0, 16, 16, 3))), COMPARE, "expected pictures"),
    (lambda: array(np.zeros((6, 16, 16, 4))), COMPARE, "expected pictures"),
    (lambda: array(np.full(SIX, 0.5)), COMPARE, "values from 0.5 to 0.5, expected 0 to 255"),
    (lambda: array(np.linspace(-1, 1, 4608).reshape(SIX)), AGAINST, "values from -1 to 1"),
    (lambda: array(np.full(SIX, NAN)), COMPARE, "values from nan"),
    (lambda: array(np.full(SIX, 65535, np.uint16)), COMPARE, "to 65535"),
    (lambda: array(np.full(SIX, 10**17)), COMPARE, "to 1e+17"),
    (lambda: array(np.full(SIX, 1j)), COMPARE, "expected pictures"),
    (lambda: array(np.ones(SIX), mu=1), AGAINST, "has mu but no"),
    (lambda: statistics(mu=np.zeros(3)), AGAINST, "expected 2048 features"),
    (lambda: statistics(mu=np.full(2048, NAN)), AGAINST, "no finite mean"),
    (lambda: statistics(mu=np.full(2048, "x")), AGAINST, "no finite mean"),
    (lambda: statistics(mu=np.full(2048, None)), AGAINST, "statistics are damaged"),
    (lambda: statistics(sigma=edited(np.eye(2048), 5, INF)), AGAINST, "no finite mean"),
    (lambda: statistics(sigma=edited(np.eye(2048), (5, 6), 1)), AGAINST, "no finite mean"),
    (lambda: statistics(sigma=np.eye(2048) * 1j), AGAINST, "no finite mean"),
    (lambda: statistics(sigma=-np.eye(2048, dtype="f4")), AGAINST, "no finite mean"),
    (bomb, FOLDER, "cannot read new/cat/bad.png"),
    (bomb, DATA, "cannot read new/cat/bad.png"),
    (lambda: png("new/cat", b"\n"), FOLDER, "cannot read new/cat/bad.png"),
    (lambda: png("new/c\x1b[2J", b"x"), DATA, "cannot read new/c\\x1b[2J/bad.png"),
    (lambda: png("new/a\nerror: b", b"x"), DATA, "cannot read new/a\\nerror: b/bad.png"),
    (lambda: png("new/$\\frac{x$", b"x"), DATA, "bad.png"),
    (lambda: png(os.fsdecode(b"new/c\xff"), b"x"), DATA, "cannot read new/c\\udcff/bad.png"),
    (lambda: picture("new/cat/a.tiff", "F", 0.8), DATA, "32 bits a pixel"),
    (lambda: picture("new/cat/a.tiff", "I", 200), FOLDER, "32 bits a pixel"),
    (lambda: splits("train", "valid"), DATA, "name them train, val, test"),
    (lambda: splits("Train", "val"), DATA, "name them train, val, test"),
    (lambda: splits("train", "val", "more"), DATA, "name them train, val, test"),
    (lambda: splits("val", "test"), DATA, "name them train, val, test"),
    (lambda: splits("train", "dev"), DATA, "has dev, train: name them train, val, test"),
    (lambda: Path("new/cat").mkdir(parents=True), DATA, "holds no pictures"),
    (lambda: splits("cat") or picture("new/a.png", "L", 1), DATA, "mixes class folders"),
    (lambda: Path("new").mkdir() or os.mkfifo("new/a.png"), DATA, "no pictures in new"),
    (lambda: os.symlink(".", "new") or None, TRAIN + "--data new/no", "no data folder"),
    (lambda: write_pictures(Path("new/cat"), 2) or picture("new/cat/z.png", "L", 1), FOLDER, "mix"),
    (lambda: None, TRAIN + "--data run/model.pt", "no data folder"),
    (lambda: None, "sample.py no.pt", "does not exist"),
    (lambda: None, "sample.py run", "its model.pt"),
    (lambda: None, "evaluate.py map no/model.pt", "checkpoint no/model.pt does not exist"),
    (lambda: None, "spectral.py no/model.pt", "checkpoint no/model.pt does not exist"),
    (lambda: None, "train.py --check-data --data ''", "no data folder"),
    (lambda: None, "evaluate.py likelihood run/model.pt --num 2 --data ''", "no data folder"),
    (lambda: None, "spectral.py run/model.pt --images 2 --data ''", "no data folder"),
    (lambda: os.mkfifo("pipe.pt"), "sample.py pipe.pt", "no regular file"),
    (lambda: None, "sample.py run/config.json", "damaged, or no checkpoint"),
    (lambda: None, "evaluate.py generation run/config.json set.npz", "damaged or not an .npz"),
    (lambda: None, "evaluate.py map run/model.pt --data pics --out m.png", "other classes"),
    (lambda: None, "spectral.py run/model.pt --data pics --images 2", "other classes"),
    (lambda: None, PHASE_2 + "run/model.pt --data ten", "other classes than those of --data"),
    (lambda: None, TRAIN + "--perceptual-weight 1 --image-size 64 --vgg no.pth", "no such file"),
    (
        heic,
        "train.py SMALL --batch-size 2 --device cpu --data new --out o",
        "cannot read new/cat/a.heic",
    ),
    (in_the_old_format, "sample.py run/model.pt", "torch's old format"),
    (lambda: Path("n.npz.parts").write_text("x"), "sample.py run/model.pt --npz n.npz", "parts"),
    (lambda: Path("new").write_text("x"), TRAIN, "cannot write to the run folder"),
    (lambda: Path("new/.lock").mkdir(parents=True), TRAIN, "cannot write to the run folder"),
]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_file_or_a_folder(home, number, monkeypatch, capsys):
    make, command, expected = FILES[number]
    monkeypatch.setattr(evaluate, "look", read_all)
    make()
    refused(command, expected, 1, monkeypatch, capsys)


def read_all(work, pictures, what: str, flags: Namespace) -> dict:
    """In place of evaluate.look: read all pictures, without Inception, which takes seconds."""
    pictures[range(len(pictures))]
    return {"pool": torch.rand(len(pictures), 2048), "spatial": torch.rand(len(pictures), 2023)}


# ------------------------------------------------------------------------------------ Environments


def do(command: str, monkeypatch, capsys) -> str:
    """What a command prints that ends well."""
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("SMALL", SMALL)))
    capsys.readouterr()
    runs.run_program(MAINS[sys.argv[0]])
    return capsys.readouterr().out


INFO = "sample.py run/model.pt --info"
ENVIRONMENTS = [  # variables, what a line says; None: the program works as ever
    ({"WORLD_SIZE": "2"}, "start with torchrun, or unset it"),
    ({"WORLD_SIZE": "2", "RANK": "x"}, "start with torchrun, or unset it"),
    ({"WORLD_SIZE": "abc"}, None),
    ({"WORLD_SIZE": "0"}, None),
    ({"WORLD_SIZE": "-1"}, None),
    ({"RANK": "1"}, None),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, None),
]


@pytest.mark.parametrize("number", range(len(ENVIRONMENTS)))
def test_an_environment(home, number, monkeypatch, capsys):
    variables, expected = ENVIRONMENTS[number]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = "sample.py run/model.pt --num 1 --out new.png --device cpu"
    if expected is None:
        assert "new.png" in do(command, monkeypatch, capsys) and Path("new.png").exists()
        assert "is finished" in do(TRAIN + "--steps 2 --out run", monkeypatch, capsys)
    else:
        refused(command, expected, 1, monkeypatch, capsys)


def test_torchrun_cannot_start_a_program_of_one_process(home, monkeypatch, capsys):
    """Its processes would all do the same work, and write the same files at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("spectral.py run/model.pt --images 2", "one process", 2, monkeypatch, capsys)


def test_what_cannot_be_read_is_not_called_damaged(home, monkeypatch, capsys):
    """As root one can read everything, hence no chmod."""

    def denied(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs, "open", denied, raising=False)
    refused(TRAIN + "--out run", "Permission denied: 'run/last.pt'", 1, monkeypatch, capsys)
    refused(INFO, "Permission denied: 'run/model.pt'", 1, monkeypatch, capsys)


def test_a_run_folder_among_the_pictures_is_refused(home, monkeypatch, capsys):
    """It would become a class, and be removed by --overwrite after that."""
    for name in ("flat", "classes/cat"):
        write_pictures(Path(name), 3)
    for where in ("--data flat --out flat", "--data classes --out classes/cat/run"):
        command = TRAIN.replace("--out new", "") + where
        refused(command, "is inside --data", 2, monkeypatch, capsys)
    do(TRAIN + "--data flat --num-classes 0", monkeypatch, capsys)


def test_numbers_are_kept_where_words_have_no_room(home):
    command = [sys.executable, str(ROOT / "evaluate.py"), "cost", "--no-timing", "--json", "c.json"]
    with open("/dev/full", "w") as full:
        subprocess.run(command, stdout=full, stderr=full, env=ENVIRONMENT, timeout=240)
    assert json.loads(Path("c.json").read_text())["parts"]  # whatever Python ends with


def test_a_full_disk_under_standard_output_costs_words_only(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", shlex.split(f"train.py {SMALL} --batch-size 8 --out new"))
    sys.argv += ["--device", "cpu", "--steps", "2"]
    with monkeypatch.context() as patch, suppress(OSError), open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        runs.run_program(train.command_line)
    assert capsys.readouterr().err.count("standard output is full") == 1
    assert runs.read_archive(Path("new/last.pt"))["step"] == 2


@pytest.mark.parametrize("command", ["sample.py run/model.pt --info", "train.py --dry-run"])
def test_who_stops_listening_costs_words_only(command, home):
    """As `| head` does."""
    script, *flags = command.split()
    speaks = python(str(ROOT / script), *flags)
    speaks.stdout.close()
    said = speaks.stderr.read()
    assert speaks.wait(timeout=120) == 0 and said.count("\n") == 1 and "closed" in said, said


def test_a_full_disk_names_the_file_and_what_to_do(home, monkeypatch, capsys):
    real = np.save

    def save(stream, arr):
        real(stream, arr[:1])
        raise OSError("768 requested and 0 written")  # numpy's own words

    monkeypatch.setattr(np, "save", save)
    command = "sample.py run/model.pt --num 2 --npz n.npz --device cpu"
    refused(command, "No space left on device: 'n.npz.parts/000000.npy'", 1, monkeypatch, capsys)
    refused(command, "make room, then the same command", 1, monkeypatch, capsys)


def python(*arguments: str, **how) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, **{**pipes, **how})


def test_ctrl_c_while_python_imports_and_a_closed_output(home):
    script = str(ROOT / "sample.py")
    close = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    silent = python("-c", close, script, "run/model.pt", "--info")
    early = python("-X", "importtime", script, "--help")  # which tells of every import
    for line in early.stderr:
        if line.rstrip().endswith("| numpy"):
            break
    early.send_signal(signal.SIGINT)
    rest = early.communicate(timeout=120)[1]
    assert early.returncode == -signal.SIGINT and "Traceback" not in rest
    assert silent.communicate(timeout=120)[1] == "" and silent.returncode == 0


def test_a_second_ctrl_c_while_python_ends():
    """As impatient people send it; here from what Python calls last."""
    code = "import atexit, os, signal; from common import runs\n"
    code += "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    code += "runs.run_program(lambda: signal.raise_signal(signal.SIGINT))"
    ended = python("-c", code, cwd=ROOT)
    errors = ended.communicate(timeout=120)[1]
    assert errors.startswith("error: interrupted; ") and errors.count("\n") == 1, errors
    assert ended.returncode == -signal.SIGINT


# --------------------------------------------------- Two at once, leftovers, what once ended ill

LOCK = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
LOCK += "print('locked', flush=True); input()"
NPZ = "sample.py run/model.pt --num 6 --batch-size 2 --device cpu --npz n.npz"


def test_two_samplers_do_not_share_an_output(home, monkeypatch, capsys):
    Path("n.npz.parts").mkdir()
    other = python("-c", LOCK, "n.npz.parts/.lock", stdin=subprocess.PIPE)
    assert other.stdout.readline() == "locked\n"
    refused(NPZ, "another run is at work in n.npz.parts", 1, monkeypatch, capsys)
    other.communicate("\n")
    do(NPZ, monkeypatch, capsys)
    assert not Path("n.npz.parts").exists()


def cut(path: str, size: int = 200) -> None:
    os.truncate(path, size)


LEFTOVERS = {  # what happens to the parts of an interrupted sample.py -> what the next one says
    "nothing": (lambda: None, "going on: 2 batches"),
    "key_cut": (lambda: cut("n.npz.parts/key.json", 5), "of another command, and are removed"),
    "key_binary": (lambda: Path("n.npz.parts/key.json").write_bytes(b"\xff\xfe"), "are removed"),
    "key_missing": (lambda: os.remove("n.npz.parts/key.json"), "are removed"),
    "part_cut": (lambda: cut("n.npz.parts/000000.npy"), "going on"),
    "part_half": (lambda: Path("n.npz.parts/000007.npy.tmp").write_text(""), "going on"),
    "part_empty": (lambda: cut("n.npz.parts/000001.npy", 0), "going on"),
    "part_shape": (lambda: np.save("n.npz.parts/000000", np.zeros((2, 9, 9, 3), "u1")), "going on"),
    "part_type": (lambda: np.save("n.npz.parts/000000", np.zeros((2, 16, 16, 3))), "going on"),
    "part_pickle": (lambda: np.save("n.npz.parts/000000", np.array([{}])), "going on"),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_leftovers_of_an_interrupted_sampler(home, case, monkeypatch, capsys):
    do(NPZ.replace("n.npz", "whole.npz"), monkeypatch, capsys)
    real, (harm, expected) = sample.sample_batch, LEFTOVERS[case]

    def stops(model, indices, *rest, **how):
        if indices.start == 4:
            raise KeyboardInterrupt
        return real(model, indices, *rest, **how)

    monkeypatch.setattr(sample, "sample_batch", stops)
    refused(NPZ, "the same command goes on", 130, monkeypatch, capsys)
    monkeypatch.setattr(sample, "sample_batch", real)
    harm()
    Path("n.npz.parts/mine.npy").write_text("of the user")
    assert expected in do(NPZ, monkeypatch, capsys)
    assert Path("n.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert os.listdir("n.npz.parts") == ["mine.npy"]


def test_batches_of_a_checkpoint_that_was_replaced_are_not_mixed_with_the_new_ones(
    home, monkeypatch, capsys
):
    """A training run may save while sample.py is at work with what it has loaded."""
    real, old = sample.sample_batch, Path("run/model.pt").read_bytes()

    def replaced_then_stopped(model, indices, *rest, **how):
        if indices.start == 0:
            edit("run/model.pt", equal_pictures)
        if indices.start == 4:
            raise KeyboardInterrupt
        return real(model, indices, *rest, **how)

    do(NPZ.replace("n.npz", "whole.npz"), monkeypatch, capsys)
    monkeypatch.setattr(sample, "sample_batch", replaced_then_stopped)
    monkeypatch.setattr(sys, "argv", shlex.split(NPZ))
    with pytest.raises(SystemExit):
        runs.run_program(MAINS["sample.py"])
    monkeypatch.setattr(sample, "sample_batch", real)
    assert "of another command, and are removed" in do(NPZ, monkeypatch, capsys)
    assert len(np.unique(np.load("n.npz")["arr_0"], axis=0)) == 1  # all of the new one
    Path("run/model.pt").write_bytes(old)
    do(NPZ, monkeypatch, capsys)
    assert Path("n.npz").read_bytes() == Path("whole.npz").read_bytes()


def test_default_names_of_samples_tell_them_apart(home, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "look", read_all)
    monkeypatch.setattr(evaluate, "inception_score", lambda network, pool: 1.0)
    monkeypatch.setattr(evaluate, "moments", lambda x: (np.zeros(2), np.eye(2)))  # not of 2048
    flags = ["", "--denoise", "--constant-guidance", "--guidance-rule starflow"]
    for flag in flags:
        command = f"evaluate.py generation run/model.pt set.npz --num 2 --device cpu {flag}"
        do(command, monkeypatch, capsys)
    assert len(list(Path("run").glob("samples_*.npz"))) == len(flags)
    kept = next(Path("run").glob("*denoised.npz"))
    again = f"evaluate.py generation run/model.pt {kept} --num 2 --denoise --device cpu"
    refused(again, "would be lost", 2, monkeypatch, capsys)


def linked() -> None:
    write_pictures(Path("new/cat"), 4)
    for name in ("one", "two"):
        os.symlink(".", f"new/cat/{name}")


def with_a_fifo() -> None:
    write_pictures(Path("new/cat"), 4)
    os.mkfifo("new/cat/pipe.png")


def odd_names() -> None:
    """Ten classes, as run/ has; none can be printed or typeset as it is."""
    names = [b"$\\frac{x$", b"\xff", b"a\nb", b"\x1b[2J", b"_a", *b"bcdef".split(b"d"), b"d", b"g"]
    names = [*names, b"h", b"i"][:10]
    for name in names:
        write_pictures(Path("new", os.fsdecode(name)), 2)
    found = [os.fsdecode(name) for name in sorted(names)]
    edit("run/model.pt", lambda c: c.update(class_names=sorted(found)))


def equal_pictures(c) -> None:
    c["model"] = {k: 0 * v for k, v in c["model"].items()}


MAP = "evaluate.py map run/model.pt --device cpu --out m.png"
WORKS = [  # how it is made, a command that used to end ill, what it prints
    (linked, "train.py --data new --check-data", "4 pictures, 1 classes, 0 broken"),
    (with_a_fifo, "train.py --data new --check-data", "4 pictures, 1 classes, 0 broken"),
    (odd_names, MAP + " --data new", "20 pictures, 10 classes"),
    (odd_names, "sample.py run/model.pt --num 10 --device cpu --out g.png", "a\\nb"),
    (odd_names, INFO, "\\x1b[2J"),
    (odd_names, TRAIN.replace("--out new", "--out o") + "--data new", "done: "),
    (lambda: None, "evaluate.py cost plain/model.pt --no-timing", "flow"),
    (lambda: None, MAP.replace("run", "plain") + " --num 9", "9 pictures, 1 classes"),
    (lambda: None, TRAIN + "--epochs 1e30 --steps 1", "done: "),
    (lambda: None, "train.py SMALL --epochs 1e30 --dry-run", "steps              2147483647"),
    (lambda: None, "train.py SMALL --epochs 1 --batch-size 8 --dry-run", "6250"),
]


@pytest.mark.parametrize("number", range(len(WORKS)))
def test_what_once_ended_ill_works(home, number, monkeypatch, capsys):
    make, command, expected = WORKS[number]
    make()
    try:
        printed = do(command, monkeypatch, capsys)
    except SystemExit as ended:  # --check-data ends with its result
        printed = capsys.readouterr().out
        assert ended.code == 0
    assert expected in printed
    assert all(line.isprintable() for line in printed.split("\n"))


def test_a_map_of_nothing_is_refused(home, monkeypatch, capsys):
    edit("run/model.pt", equal_pictures)
    refused(MAP, "pictures that differ", 1, monkeypatch, capsys)


def test_a_broken_picture_in_val_is_found_and_names_are_shown_escaped(home, monkeypatch, capsys):
    splits("train", "val")
    write_pictures(Path(os.fsdecode(b"new/train/cat\xff\n")), 1)
    png(os.fsdecode(b"new/val/cat\xff\n"), b"x")
    with pytest.raises(SystemExit) as ended:
        do("train.py --data new --check-data", monkeypatch, capsys)
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "cannot read new/val/cat\\udcff\\n/bad.png" in printed
    assert "6 pictures, 2 classes, 1 broken" in printed
    data.BrokenImages(1).add(["a\x1b\nb"])
    assert "skipped: a\\x1b\\nb (1 so far)\n" == capsys.readouterr().out
