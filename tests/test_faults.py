"""What a long run meets: kills, signals, restarts, full disks, damaged files, broken pictures.

Real processes where it matters. tests/stress.py does the same for minutes instead of seconds.
"""

import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from PIL import Image
from test_train import assert_same, read_log, without_time, write_pictures

import train

DONE = "done: "


def start(script, *arguments: object, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    """Start train.py, or a script that changes it first, in the background."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        launcher += [f"--nproc_per_node={processes}", "--"]
    return subprocess.Popen(
        [*launcher, str(script), *map(str, arguments)],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Read the output until a line holds `words`."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"the process ended without saying: {words}")


def finish(process: subprocess.Popen) -> str:
    """Wait for the end; the rest of the output."""
    output, _ = process.communicate(timeout=240)
    return output


def last(folder) -> dict:
    return torch.load(os.path.join(folder, "last.pt"), weights_only=True)


@pytest.fixture
def whole(tiny_flags, tmp_path):
    """Flags of a run of 30 steps, and the folder where it was done without any interruption."""
    flags = [*tiny_flags, "--steps", 30, "--save-every", 5]
    done = start(ROOT / "train.py", *flags, "--out", tmp_path / "whole")
    assert DONE in finish(done)
    return flags, tmp_path / "whole"


def assert_same_run(one, other) -> None:
    """The same weights, EMA and optimizer to the bit, and the same log."""
    a, b = last(one), last(other)
    for key in ("step", "model", "ema", "optimizer"):
        assert_same(a[key], b[key])
    assert without_time(read_log(one)) == without_time(read_log(other))


# ------------------------------------------------------------------------- Kills, signals, restarts


def test_kill_9_loses_nothing_that_was_saved(whole, tmp_path):
    flags, expected = whole
    out = tmp_path / "killed"
    for step in (6, 14):
        process = start(ROOT / "train.py", *flags, "--out", out)
        wait_for(process, f"step {step}/30")
        process.kill()
        finish(process)
        assert last(out)["step"] >= step - step % 5
        train.load_checkpoint(out / "model.pt")
    assert "continuing" in finish(start(ROOT / "train.py", *flags, "--out", out))
    assert_same_run(expected, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(whole, tmp_path, number):
    flags, expected = whole
    out = tmp_path / "stopped"
    process = start(ROOT / "train.py", *flags, "--save-every", 1000, "--out", out)
    wait_for(process, "step 8/30")
    process.send_signal(number)
    output = finish(process)
    assert process.returncode == 128 + number and "Traceback" not in output
    assert f"error: {number.name}: saved at step" in output
    assert 8 <= last(out)["step"] < 30
    finish(start(ROOT / "train.py", *flags, "--out", out))
    assert_same_run(expected, out)


def test_a_signal_to_torchrun_stops_every_process_at_one_step(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--steps", 100_000, "--save-every", 100_000, "--out", tmp_path / "two"]
    process = start(ROOT / "train.py", *flags, processes=2)
    wait_for(process, "step 6/")
    process.terminate()
    output = finish(process)
    assert output.count("error: SIGTERM: saved at step") == 1, output
    assert last(tmp_path / "two")["step"] >= 6


# A rank that dies once, at step 7, and is started again by torchrun.
DIES_ONCE = """
import os, signal, train
real = train.draw_randomness
def draw(config, step, device):
    if step == 6 and train.rank() == 1 and train.restarts() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(config, step, device)
train.draw_randomness = draw
train.run_program(train.command_line)
"""


def test_torchrun_restarts_a_run_by_itself(tiny_flags, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES_ONCE)
    flags = [*tiny_flags, "--steps", 10, "--save-every", 4]
    # --overwrite must not throw away what the first try has done.
    twice = [*flags, "--out", tmp_path / "twice", "--overwrite"]
    output = finish(start(script, *twice, processes=2, restarts=2))
    assert "continuing" in output and "after step 4" in output and DONE in output, output
    output = finish(start(ROOT / "train.py", *flags, "--out", tmp_path / "once", processes=2))
    assert DONE in output
    assert_same_run(tmp_path / "once", tmp_path / "twice")


def test_a_second_run_in_the_same_folder_is_refused(tiny_flags, tmp_path, run_script):
    flags = [*tiny_flags, "--steps", 100_000, "--out", tmp_path / "run"]
    first = start(ROOT / "train.py", *flags)
    wait_for(first, "step 2/")
    second = run_script("train.py", *flags)
    assert second.returncode == 1 and "another run is at work in" in second.stderr
    first.kill()
    finish(first)


def test_a_finished_run_gives_signals_back(tiny):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    train.main(replace(tiny, steps=1))
    assert [signal.getsignal(number) for number in numbers] == before


WRAPPED = "Caught BrokenImage in worker 0.\nTraceback: ...\ntrain.BrokenImage: cannot read a.png"
ENDS = {
    "memory": (torch.cuda.OutOfMemoryError("tried to allocate"), 1, "GPU memory is full"),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "disk": (OSError(28, "No space left on device"), 1, "No space left on device"),
    "weights": (train.WeightsMissing("no file vgg.pth"), 1, "error: no file vgg.pth"),
    "picture": (train.BrokenImage(WRAPPED), 1, "error: cannot read a.png"),
    "worker": (RuntimeError("DataLoader worker exited\nmore"), 1, "a data worker ended"),
}


@pytest.mark.parametrize("case", ENDS)
def test_what_a_user_can_cause_is_one_line(case, capsys):
    error, code, expected = ENDS[case]

    def work():
        raise error

    with pytest.raises(SystemExit) as stopped:
        train.run_program(work)
    message = capsys.readouterr().err
    assert stopped.value.code == code and expected in message and message.count("\n") == 1


def test_a_mistake_of_the_program_keeps_its_traceback():
    def work():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train.run_program(work)


# --------------------------------------------------------------------------------- Disks and files


def test_a_disk_full_for_a_while_costs_nothing(tiny, tmp_path, monkeypatch, capsys):
    train.main(tiny)
    real, calls = torch.save, []

    def full_at_first(content, stream):
        calls.append(1)
        if len(calls) == 3:  # last.pt and model.pt of step 2, then last.pt of step 4
            raise OSError(28, "No space left on device")
        real(content, stream)

    monkeypatch.setattr(torch, "save", full_at_first)
    other = replace(tiny, save_every=2, out=str(tmp_path / "full"))
    train.main(other)
    printed = capsys.readouterr().out
    assert "cannot write a checkpoint (No space left on device): going on" in printed
    assert_same(last(tiny.run_dir)["model"], last(other.run_dir)["model"])


def test_a_disk_full_at_the_end_keeps_the_checkpoint_before(tiny, monkeypatch, capsys):
    real = torch.save

    def full_at_the_end(content, stream):
        if content["step"] == 8:
            raise OSError(28, "No space left on device")
        real(content, stream)

    monkeypatch.setattr(torch, "save", full_at_the_end)
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny)
    assert stopped.value.code == 1 and "make room" in capsys.readouterr().err
    assert last(tiny.run_dir)["step"] == 4
    monkeypatch.undo()
    train.main(tiny)
    assert last(tiny.run_dir)["step"] == 8


@pytest.fixture
def file_limit():
    """No file can grow beyond 100,000 bytes."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("length", [500, 50_000])
def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path, file_limit, length):
    path = tmp_path / "log.jsonl"
    whole = b"x" * (99_900 - 1) + b"\n"
    path.write_bytes(whole)
    with pytest.raises(OSError, match="File too large"):
        train.append_line(path, length * "y")
    assert path.read_bytes() == whole


def test_a_real_file_limit_stops_torch_save_and_the_line_says_why(tmp_path, file_limit):
    path = tmp_path / "last.pt"
    train.write_file(path, lambda stream: torch.save({"old": torch.ones(3)}, stream))
    with pytest.raises(OSError, match="File too large"):
        big = {"new": torch.ones(100_000)}
        train.write_file(path, lambda stream: torch.save(big, stream))
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.load(path, weights_only=True)["old"].tolist() == [1, 1, 1]


def flip_a_byte(path) -> None:
    """Change one bit in the middle, which torch.load alone would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_last_checkpoint_falls_back_on_the_previous(tiny, tmp_path, damage, capsys):
    config = replace(tiny, lr_decay=0.0)
    train.main(config)
    expected = last(tiny.run_dir)
    short = replace(config, out=str(tmp_path / "short"))
    train.main(replace(short, steps=6, save_every=4))  # previous.pt: step 4, last.pt: step 6
    path = short.run_dir / "last.pt"
    if damage == "flipped":
        flip_a_byte(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        path.unlink()  # killed between the two renames
    train.main(short)
    printed = capsys.readouterr().out
    assert "after step 4" in printed and ("is damaged: going on" in printed) == (
        damage != "missing"
    )
    assert_same(expected["model"], last(short.run_dir)["model"])
    steps = [line["step"] for line in read_log(short.run_dir)]
    assert steps == [2, 4, 6, 8]


def test_an_archive_that_is_no_checkpoint_is_not_intact(tmp_path):
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
        archive.writestr("readme.txt", "sound, but not torch's")
    assert not train.intact(tmp_path / "last.pt")
    torch.save({"step": 1}, tmp_path / "last.pt")
    assert train.intact(tmp_path / "last.pt")


def test_a_flipped_byte_is_noticed_where_nothing_is_in_reserve(tiny, capsys):
    train.main(replace(tiny, steps=2))
    flip_a_byte(tiny.run_dir / "model.pt")
    with pytest.raises(SystemExit):
        train.load_checkpoint(tiny.run_dir / "model.pt")
    assert "model.pt is damaged" in capsys.readouterr().err
    flip_a_byte(tiny.run_dir / "last.pt")
    with pytest.raises(SystemExit):
        train.main(tiny)
    assert "damaged: --overwrite starts again" in capsys.readouterr().err


def test_a_log_cut_short_is_repaired(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}{"st\nnull\n\xff\xfe\n{"step": 3}\n{"step": 4}\n{"s')
    train.cut_log(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    train.append_line(path, "{}")
    assert path.read_text().endswith("}\n{}\n")


# ---------------------------------------------------------------------------------- Broken pictures


def many_pictures(folder, count: int) -> None:
    """`count` names for three pictures: links, which cost no disk."""
    write_pictures(folder / "cat", 3)
    for i in range(3, count):
        os.link(folder / "cat" / f"{i % 3}.png", folder / "cat" / f"{i:04d}.png")


def break_picture(path) -> None:
    content = path.read_bytes()
    path.unlink()  # or the other names of the same file would be broken as well
    path.write_bytes(content[:100])


def test_a_skipped_picture_has_a_fixed_neighbour_and_is_named_once(
    tiny, tmp_path, capsys, monkeypatch
):
    many_pictures(tmp_path / "data", 1001)
    bad = tmp_path / "data" / "cat" / "0500.png"
    break_picture(bad)
    dataset = train.open_dataset(str(tmp_path / "data"), 16)
    index = [os.fsdecode(path) for path in dataset.paths].index("cat/0500.png")
    strict, lenient = (train.TrainingPictures(dataset, skip_bad=b) for b in (False, True))
    with pytest.raises(train.BrokenImage, match="--skip-bad-images"):
        strict[0, index]
    image, label, reported = lenient[0, index]
    neighbour, _, nothing = lenient[0, index + 1]
    assert torch.equal(image, neighbour) and reported == index and nothing == -1

    broken = train.BrokenImages(dataset)
    for _ in range(3):
        broken.add(torch.tensor([-1, index, index, -1]))
    assert capsys.readouterr().out.count(str(bad)) == 1
    with pytest.raises(SystemExit):  # 2 of 1001 are more than 0.1 %
        broken.add(torch.tensor([index + 7]))
    assert "2 of 1001 pictures cannot be read" in capsys.readouterr().err

    # Through the loop, and its log: every picture of the epoch is asked for once.
    data = str(tmp_path / "data")
    config = replace(tiny, data=data, num_classes=1, batch_size=77, steps=13, sample_every=100)
    with pytest.raises(train.BrokenImage):
        train.main(config)
    train.main(replace(config, skip_bad_images=True))
    assert read_log(tiny.run_dir)[-1]["bad_images"] == 1
    # As if a second process had met as many: two are too many.

    def mean_of_two(value):
        monkeypatch.setattr(train, "world_size", lambda: 2)
        return value

    monkeypatch.setattr(train, "mean_over_processes", mean_of_two)
    with pytest.raises(SystemExit):
        train.main(replace(config, skip_bad_images=True), overwrite=True)
    assert "2 of 1001 pictures cannot be read" in capsys.readouterr().err


def test_the_neighbour_may_be_far_and_after_the_last_comes_the_first(tmp_path):
    write_pictures(tmp_path / "flat", 5)
    for name in ("2.png", "3.png", "4.png"):
        break_picture(tmp_path / "flat" / name)
    dataset = train.open_dataset(str(tmp_path / "flat"), 16)
    image, _, reported = train.TrainingPictures(dataset, skip_bad=True)[0, 2]
    assert torch.equal(image, dataset[0, 0][0]) and reported == 2


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


def deep(picture: Image.Image) -> Image.Image:
    """The same picture in 16 bits of grey."""
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    return exif


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_read(tmp_path, name):
    ramp = np.linspace(40, 200, 24).astype(np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], (24, 24, 3)).copy())
    (tmp_path / "data").mkdir()
    ODD_PICTURES[name](picture, tmp_path / "data" / name)
    image, _ = train.open_dataset(str(tmp_path / "data"), 24)[0]
    assert image.shape == (3, 24, 24) and image.min() >= -1 and image.max() <= 1
    if name not in ("pixel.png", "line.png", "one_bit.png"):  # the ramp is still there
        expected = torch.from_numpy(ramp).float() / 127.5 - 1
        tolerance = 0.1 if name.endswith("jpg") else 0.02
        # A camera's "turn me" is not obeyed, as in ADM: ImageNet's labels do not depend on it.
        assert (image[0, 12, 1:] - expected[1:]).abs().max() < tolerance


@pytest.mark.parametrize("content", [b"", b"just text", b"\xff\xd8\xff\xe0 half a JPEG"])
def test_files_that_are_no_pictures_are_named(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(train.BrokenImage, match="a.jpg"):
        train.open_dataset(str(tmp_path), 16)[0]


# A picture that takes the whole worker process with it.
WORKER_DIES = """
import os, train
real = train.TrainingPictures.__getitem__
def get(self, key):
    if key[1] % 50 == 7:
        os.kill(os.getpid(), 9)
    return real(self, key)
train.TrainingPictures.__getitem__ = get
train.run_program(train.command_line)
"""


def test_a_dead_data_worker_ends_the_run_with_the_cause(tiny_flags, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(WORKER_DIES)
    began = time.monotonic()
    flags = [*tiny_flags, "--num-workers", 2, "--steps", 1000, "--out", tmp_path / "run"]
    process = start(script, *flags)
    output = finish(process)
    before, found, _ = output.partition("a data worker ended")
    assert process.returncode == 1 and found
    # Behind it the worker that is left may complain that its peer has gone.
    assert "Traceback" not in before and time.monotonic() - began < 200  # no hang


def test_workers_change_nothing(tiny, tmp_path):
    train.main(tiny)
    train.main(replace(tiny, num_workers=2, out=str(tmp_path / "workers")))
    assert_same_run(tiny.run_dir, tmp_path / "workers")


def test_one_broken_picture_is_allowed_in_the_smallest_folder(tmp_path, capsys):
    many_pictures(tmp_path, 5)
    broken = train.BrokenImages(train.FolderDataset(str(tmp_path), 16))
    broken.check(1)
    with pytest.raises(SystemExit):
        broken.check(2)
    assert "2 of 5 pictures cannot be read" in capsys.readouterr().err
