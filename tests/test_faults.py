"""What a long run meets: kills, signals, restarts, full disks, damaged files, broken pictures.

Real processes where it matters. tests/stress.py does the same for minutes instead of seconds.
"""

import os
import resource
import signal
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    assert_same,
    assert_same_run,
    last,
    launcher,
    read_log,
    write_pictures,
)

import train
from common import data, runs
from common.weights import WeightsMissing

STARTED: list[subprocess.Popen] = []


def start(script: Path, *arguments: object, processes: int = 1, restarts: int = 0):
    """Start train.py, or a script that changes it first, in the background."""
    process = subprocess.Popen(
        [*launcher(processes, restarts), str(script), *map(str, arguments)],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in (p for p in STARTED if p.poll() is None):  # of a test that has failed
        process.send_signal(signal.SIGCONT)
        process.terminate()  # torchrun ends its processes, too
        process.communicate(timeout=60)
    STARTED.clear()


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


# ------------------------------------------------------------------------- Kills, signals, restarts


def test_kill_9_loses_nothing_that_was_saved_and_a_run_locks_its_folder(
    tiny_flags, tmp_path, capsys
):
    flags = [*tiny_flags, "--steps", "30", "--save-every", "5", "--out"]
    whole, config = (train.parse_arguments([*flags, str(tmp_path / n)])[0] for n in ("whole", "a"))
    train.main(whole)
    process = start(ROOT / "train.py", *flags, config.out)
    wait_for(process, "step 14/30")
    process.send_signal(signal.SIGSTOP)  # or it might be through before we have looked
    with pytest.raises(SystemExit):
        train.main(config)
    assert "another run is at work in" in capsys.readouterr().err
    process.kill()
    finish(process)
    assert last(config.out)["step"] >= 10
    train.load_checkpoint(config.run_dir / "model.pt")
    train.main(config)
    assert "continuing" in capsys.readouterr().out
    assert_same_run(whole.out, config.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tiny, tmp_path, number, monkeypatch, capsys):
    config = replace(tiny, save_every=1000)
    train.main(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    before, real = signal.getsignal(number), train.draw_randomness

    def interrupted(config, step, device):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(config, step, device)

    monkeypatch.setattr(train, "draw_randomness", interrupted)
    with pytest.raises(SystemExit) as ended:
        train.main(stopped)
    assert ended.value.code == 128 + number
    assert f"error: {number.name}: saved at step 6" in capsys.readouterr().err
    assert last(stopped.out)["step"] == 6 and signal.getsignal(number) == before
    train.main(stopped)
    assert_same_run(config.out, stopped.out)


def test_a_second_ctrl_c_ends_a_step_that_waits_for_a_disk_that_never_answers(tmp_path):
    """A read that hangs: here from a pipe into which nobody writes."""
    os.mkfifo(tmp_path / "pipe")
    stop, before = runs.StopSignal(), time.monotonic()
    try:
        for _ in range(2):  # of one Ctrl-C a terminal, or torchrun, may send two
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed() == signal.SIGINT and time.monotonic() < before + runs.PATIENCE
        stop.when -= runs.PATIENCE
        other = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        other.start()
        with pytest.raises(KeyboardInterrupt):
            (tmp_path / "pipe").read_bytes()
        assert signal.getsignal(signal.SIGINT) == stop.before[signal.SIGINT]
    finally:
        stop.restore()


def test_a_signal_to_torchrun_stops_every_process_at_one_step(tiny_flags, tmp_path):
    """It reaches the data workers, too."""
    flags = [*tiny_flags, "--steps", 100_000, "--save-every", 100_000, "--num-workers", 2]
    process = start(ROOT / "train.py", *flags, "--out", tmp_path / "two", processes=2)
    wait_for(process, "step 6/")
    process.terminate()
    output = finish(process)
    assert output.count("error: SIGTERM: saved at step") == 1, output
    assert "DataLoader" not in output and last(tmp_path / "two")["step"] >= 6


# A rank that dies once, at step 7, and is started again by torchrun.
DIES_ONCE = """
import os, signal, torch, train
from common import runs
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
real = train.draw_randomness
def draw(config, step, device):
    if step == 6 and runs.rank() == 1 and runs.restarts() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(config, step, device)
train.draw_randomness = draw
runs.run_program(train.command_line)
"""


def test_torchrun_restarts_a_run_by_itself(tiny_flags, tmp_path, float64):
    script = tmp_path / "dies.py"
    script.write_text(DIES_ONCE)
    flags = [*tiny_flags, "--steps", "10", "--save-every", "4", "--out"]
    train.main(train.parse_arguments([*flags, str(tmp_path / "one")])[0])
    # --overwrite must not throw away what the first try has done.
    two = [*flags, tmp_path / "two", "--overwrite"]
    output = finish(start(script, *two, processes=2, restarts=2))
    assert "continuing" in output and "after step 4" in output and "done: " in output, output
    one, two = (last(tmp_path / name)["model"] for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


WRAPPED = "Caught BrokenImage in worker 0.\nTraceback: ...\ndata.BrokenImage: cannot read a.png"
ENDS = {
    "gpu": (torch.cuda.OutOfMemoryError("tried to allocate"), 1, "GPU memory is full"),
    "memory": (RuntimeError("DefaultCPUAllocator: not enough memory\nat"), 1, "memory is full"),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "disk": (OSError(28, "No space left on device"), 1, "No space left on device"),
    "weights": (WeightsMissing("no file vgg.pth"), 1, "error: no file vgg.pth"),
    "picture": (data.BrokenImage(WRAPPED), 1, "error: cannot read a.png"),
    "terminal": (runs.InputError("no \x1b[2J\n.png"), 1, "error: no \\x1b[2J\\n.png"),
    "worker": (RuntimeError("DataLoader worker exited\nmore"), 1, "a data worker ended"),
    "program": (RuntimeError("shapes do not fit"), None, ""),  # keeps its traceback
}


@pytest.mark.parametrize("case", ENDS)
def test_what_a_user_can_cause_is_one_line(case, capsys):
    error, code, expected = ENDS[case]

    def work():
        raise error

    with pytest.raises(SystemExit if code else type(error)) as stopped:
        runs.run_program(work)
    message = capsys.readouterr().err
    assert code is None or (stopped.value.code == code and message.count("\n") == 1)
    assert expected in message


def test_a_cause_without_words_is_named_by_its_kind(capsys):
    with pytest.raises(SystemExit), runs.explained("cannot do it"):
        raise EOFError
    assert "error: cannot do it (EOFError)" in capsys.readouterr().err


# --------------------------------------------------------------------------------- Disks and files


def test_a_full_disk_costs_nothing_once_there_is_room(tiny, tmp_path, monkeypatch, capsys):
    train.main(replace(tiny, save_every=2))
    real, calls = torch.save, []

    def save(content, stream):
        calls.append(content["step"])
        if len(calls) == 3 or content["step"] == 8:  # last.pt of step 4, and all at the end
            raise OSError(28, "No space left on device")
        real(content, stream)

    full = replace(tiny, save_every=2, out=str(tmp_path / "full"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch, "save", save)
        train.main(full)
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "make room" in printed.err
    assert "cannot write a checkpoint (No space left on device): going on" in printed.out
    assert last(full.out)["step"] == 6 and not list(full.run_dir.glob("*.tmp"))
    train.main(full)
    assert_same_run(tiny.out, full.out)


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
        runs.append_line(path, length * "y")
    assert path.read_bytes() == whole


def test_a_real_file_limit_stops_torch_save_and_the_line_says_why(tmp_path, file_limit):
    path = tmp_path / "last.pt"
    runs.write_file(path, lambda stream: torch.save({"old": torch.ones(3)}, stream))
    with pytest.raises(OSError, match="File too large"):
        big = {"new": torch.ones(100_000)}
        runs.write_file(path, lambda stream: torch.save(big, stream))
    assert os.listdir(tmp_path) == ["last.pt"]
    assert torch.load(path, weights_only=True)["old"].tolist() == [1, 1, 1]


def flip_a_byte(path: Path) -> None:
    """Change one bit in the middle, which torch.load alone would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_last_checkpoint_falls_back_on_the_previous(tiny, tmp_path, damage, capsys):
    config = replace(tiny, lr_decay=0.0)
    train.main(config)
    expected = last(config.out)
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
    assert "after step 4" in printed and ("last.pt is damaged" in printed) == (damage != "missing")
    assert_same(expected["model"], last(short.out)["model"])
    assert [line["step"] for line in read_log(short.out)] == [2, 4, 6, 8]


class Evil:
    """What a malicious checkpoint holds: unpickled, it would make the folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme.txt", 10**6 * "0")


NOT_CHECKPOINTS = {  # how one makes it -> what the line says; more are in test_hostile.py
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-500]), "damaged"),
    "flipped": (flip_a_byte, "damaged"),
    "bomb": (zipped, "compressed"),
    "code": (lambda path: torch.save(Evil(f"{path}.trap"), path), "could run code"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_one_clear_line(tmp_path, kind, capsys):
    path, (make, expected) = tmp_path / "model.pt", NOT_CHECKPOINTS[kind]
    torch.save({"step": 1, "weights": torch.ones(2000)}, path)
    assert runs.read_archive(path)["step"] == 1
    make(path)
    with pytest.raises(SystemExit) as stopped:
        train.load_checkpoint(path)
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and str(path) in message and message.count("\n") == 1
    assert expected in message and not Path(f"{path}.trap").exists()


def test_where_nothing_is_in_reserve_a_damaged_checkpoint_ends_the_run(tiny, capsys):
    train.main(replace(tiny, steps=2))
    flip_a_byte(tiny.run_dir / "last.pt")
    with pytest.raises(SystemExit):
        train.main(tiny)
    assert "--overwrite starts again" in capsys.readouterr().err


def test_what_another_run_saved_meanwhile_is_not_done_again(tiny, monkeypatch, capsys):
    """A scheduler may start a run anew while the old one still saves; the new one has read by then,
    and may be downloading something."""
    train.main(replace(tiny, steps=2))
    real = train.losses.load_frozen_networks

    def download(*arguments):
        os.utime(tiny.run_dir / "last.pt", (1, 1))
        return real(*arguments)

    monkeypatch.setattr(train.losses, "load_frozen_networks", download)
    with pytest.raises(SystemExit):
        train.main(tiny)
    assert "another run has saved in" in capsys.readouterr().err
    assert last(tiny.out)["step"] == 2
    monkeypatch.undo()
    train.main(tiny)


def test_names_of_classes_do_not_matter_to_a_run_without_labels(tiny, tmp_path, capsys):
    write_pictures(tmp_path / "data" / "cat", 8)
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=0)
    train.main(replace(config, steps=2))
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "dog")
    train.main(config)
    assert "continuing" in capsys.readouterr().out


def test_a_log_cut_short_is_repaired(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}{"st\nnull\n\xff\xfe\n{"step": 3}\n{"step": 4}\n{"s')
    runs.cut_log(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    runs.append_line(path, "{}")
    assert path.read_text().endswith("}\n{}\n")


# -------------------------------------------------------------------- Broken pictures, dead workers


def test_a_broken_picture_ends_a_run_or_is_skipped_and_counted(tiny, tmp_path):
    """Every picture of the epoch is asked for once. Links cost no disk."""
    write_pictures(tmp_path / "data" / "cat", 3)
    for i in range(3, 1000):
        os.link(tmp_path / "data" / "cat" / f"{i % 3}.png", tmp_path / "data" / "cat" / f"{i}.png")
    (tmp_path / "data" / "cat" / "bad.png").write_bytes(b"broken")
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=1, batch_size=77, steps=13)
    with pytest.raises(data.BrokenImage, match="bad.png"):
        train.main(config)
    train.main(replace(config, skip_bad_images=True))
    assert read_log(tiny.out)[-1]["bad_images"] == 1


def test_workers_change_nothing_and_a_dead_one_ends_the_run_with_the_cause(
    tiny, tmp_path, monkeypatch, capsys
):
    train.main(tiny)
    train.main(replace(tiny, num_workers=2, out=str(tmp_path / "workers")))
    assert_same_run(tiny.run_dir, tmp_path / "workers")

    # A picture that takes the whole worker process with it.
    def get(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(data.TrainingPictures, "__getitem__", get)
    began, config = time.monotonic(), replace(tiny, num_workers=2, out=str(tmp_path / "dead"))
    with pytest.raises(SystemExit) as stopped:
        runs.run_program(lambda: train.main(config))
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and "a data worker ended" in message
    assert message.count("\n") == 1 and time.monotonic() - began < 100  # no hang


def test_a_run_that_goes_on_looks_at_the_checksums_once(tiny, monkeypatch):
    train.main(replace(tiny, steps=4))
    looked, real = [], runs.damage
    monkeypatch.setattr(runs, "damage", lambda path: looked.append(path.name) or real(path))
    train.main(tiny)  # steps may change
    assert looked == ["last.pt"]
