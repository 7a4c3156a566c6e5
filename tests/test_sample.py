"""sample.py: the same set from any number of processes, the files, and bad input."""

import argparse
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image

import sample
import train


@pytest.fixture
def checkpoint(tiny):
    """A model.pt of random, non-zero weights."""
    model = randomize(train.MIMFlow(tiny, tuple(train.SHAPES)))
    return write_checkpoint(tiny, model)


def write_checkpoint(config, model):
    path = config.run_dir / "model.pt"
    path.parent.mkdir(parents=True)
    content = dict(format=1, step=3, config=train.asdict(config), model=model.state_dict())
    torch.save({**content, "class_names": list(model.class_names)}, path)
    return path


def run(path, *flags) -> argparse.Namespace:
    options = sample.parse_arguments([str(path), "--device", "cpu", *map(str, flags)])
    sample.main(options)
    return options


def test_grid_has_a_row_a_class(checkpoint, tmp_path):
    run(checkpoint, "--classes", "2", "heart", "--num", "6", "--out", tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").size == (3 * 98 + 2, 2 * 98 + 2)  # (width, height)
    run(checkpoint, "--classes", "2", "heart", "--num", "6", "--npz", tmp_path / "s.npz")
    pictures, labels = (np.load(tmp_path / "s.npz")[k] for k in ("arr_0", "arr_1"))
    assert labels.tolist() == [2, 6, 2, 6, 2, 6]
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    for row in range(2):
        for col in range(3):
            y, x = 2 + 98 * row, 2 + 98 * col  # a pixel is a square of 6
            assert (grid[y : y + 96 : 6, x : x + 96 : 6] == pictures[2 * col + row]).all()


def test_default_output_is_a_grid_beside_the_checkpoint_of_all_classes(checkpoint):
    run(checkpoint)
    assert Image.open(checkpoint.parent / "grid.png").size == (8 * 98 + 2, 10 * 98 + 2)
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["grid.png", "model.pt"]


def test_npz_is_adms_format_and_repeats(checkpoint, tmp_path):
    for name in ("a", "b"):
        run(checkpoint, "--num", "25", "--batch-size", "10", "--npz", tmp_path / f"{name}.npz")
    run(checkpoint, "--num", "25", "--batch-size", "10", "--seed", "1", "--npz", tmp_path / "c.npz")
    a, b, c = (np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in "abc")
    assert a["arr_0"].shape == (25, 16, 16, 3) and a["arr_0"].dtype == np.uint8
    assert a["arr_1"].tolist() == [i % 10 for i in range(25)] and a.files == ["arr_0", "arr_1"]
    assert (a["arr_0"] == b["arr_0"]).all() and (a["arr_0"] != c["arr_0"]).any()
    assert len({picture.tobytes() for picture in a["arr_0"]}) == 25  # no duplicates


def test_one_and_two_processes_write_the_same_set(checkpoint, tmp_path, run_script):
    flags = ("--num", 25, "--batch-size", 7, "--device", "cpu")
    one = run_script("sample.py", checkpoint, *flags, "--npz", tmp_path / "1.npz")
    two = run_script("sample.py", checkpoint, *flags, "--npz", tmp_path / "2.npz", processes=2)
    assert one.returncode == two.returncode == 0, two.stderr
    a, b = (np.load(tmp_path / f"{n}.npz") for n in "12")
    assert all((a[k] == b[k]).all() for k in a.files)
    assert not list(tmp_path.glob("*.parts"))


def test_an_interrupted_set_is_continued_and_another_one_is_not_mixed_in(
    checkpoint, tmp_path, monkeypatch
):
    flags = ("--num", "25", "--batch-size", "10", "--npz", tmp_path / "s.npz")
    real, calls = sample.draw, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags)
    run(checkpoint, *flags)
    assert len(calls) == 4  # only the third batch was drawn again
    continued = np.load(tmp_path / "s.npz")["arr_0"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags, "--seed", "9")
    run(checkpoint, *flags)
    assert (np.load(tmp_path / "s.npz")["arr_0"] == continued).all()


def test_guidance_rules_and_denoising_change_the_pictures(checkpoint, tmp_path):
    model = train.load_checkpoint(checkpoint)
    base = ["--guidance", "0"], ["--guidance", "2"], ["--guidance", "2", "--constant-guidance"]
    base += (["--guidance", "2", "--guidance-rule", "starflow"], ["--guidance", "0", "--denoise"])
    drawn = set()
    for flags in base:
        options = sample.parse_arguments([str(checkpoint), *flags])
        drawn.add(sample.draw(model, range(4), [0, 1], options).tobytes())
    assert len(drawn) == 5


def test_denoising_is_tweedies_formula(checkpoint):
    model = train.load_checkpoint(checkpoint).double()
    z, labels = torch.randn(1, 4, 4).double(), torch.tensor([3])
    step, score = 1e-5, torch.zeros_like(z)
    for k in range(4):
        for j in range(4):
            shift = torch.zeros_like(z)
            shift[0, k, j] = step
            both = model.flow.log_prob(torch.cat((z + shift, z - shift)), labels.repeat(2))
            score[0, k, j] = (both[0] - both[1]) / (2 * step)
    torch.testing.assert_close(model.denoise(z, labels), z + 0.09 * score, atol=1e-6, rtol=1e-6)


def test_a_model_without_labels(tiny, tmp_path, capsys):
    config = replace(tiny, num_classes=0)
    path = write_checkpoint(config, randomize(train.MIMFlow(config)))
    run(path, "--num", "9", "--npz", tmp_path / "s.npz", "--out", tmp_path / "g.png")
    assert (np.load(tmp_path / "s.npz")["arr_1"] == -1).all()
    assert Image.open(tmp_path / "g.png").size == (5 * 98 + 2, 2 * 98 + 2)
    for flags in (["--classes", "0"], ["--guidance", "1"]):
        with pytest.raises(SystemExit) as stopped:
            run(path, *flags)
        assert stopped.value.code == 2 and "without labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--classes", "10"], "classes 0 to 9"),
        (["--classes", "unicorn"], "--classes unicorn"),
        (["--num", "0"], "--num must be positive"),
        (["--guidance", "-1"], "must not be negative"),
        (["--tolerance", "nan"], "must not be negative"),
        (["--sampler", "newton"], "--sampler"),
        (["--out", "/nowhere/g.png"], "folder /nowhere"),
    ],
)
def test_bad_flags_are_one_clear_line(checkpoint, flags, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, *flags)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_command_line_as_a_user_types_it(checkpoint, tmp_path, run_script):
    nothing = run_script("sample.py", cwd=tmp_path)
    folder = checkpoint.parent.rename(tmp_path / "runs_shapes")
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "shapes")
    assert nothing.returncode == 1 and "python train.py" in nothing.stderr
    newest = run_script("sample.py", "--num", 10, "--device", "cpu", cwd=tmp_path)
    assert newest.returncode == 0 and (tmp_path / "runs/shapes/grid.png").exists(), newest.stderr
    info = run_script("sample.py", "runs/shapes/model.pt", "--info", cwd=tmp_path)
    assert "step 3" in info.stdout and "finite" in info.stdout and "circle" in info.stdout
    missing = run_script("sample.py", "runs/none.pt")
    assert missing.returncode == 1 and "does not exist" in missing.stderr


def pictures(path):
    return np.load(path)["arr_0"].astype(int)


@pytest.fixture
def one_block_at_once(checkpoint):
    """The checkpoint with an identity as shallow block: jacobi solves it in one sweep."""
    content = torch.load(checkpoint, weights_only=True)
    for name in ("weight", "bias"):
        content["model"][f"flow.blocks.0.proj_out.{name}"].zero_()
    torch.save(content, checkpoint)
    return checkpoint


def test_jacobi_draws_the_same_pictures_and_says_its_sweeps(one_block_at_once, tmp_path, capsys):
    base, drawn, said = ("--num", "25", "--batch-size", "10", "--guidance", "1"), {}, {}
    jacobi = ("--sampler", "jacobi")
    for name, flags in dict(s=(), j=jacobi, loose=(*jacobi, "--tolerance", "1000")).items():
        run(one_block_at_once, *base, *flags, "--npz", tmp_path / "s.npz")
        drawn[name], said[name] = pictures(tmp_path / "s.npz"), capsys.readouterr().out
    assert "sweeps" not in said["s"]
    assert "sweeps a batch, deep block first: 3.0, 1.0; token by token: 3" in said["j"]
    assert "sweeps a batch, deep block first: 1.0, 1.0; token by token: 3" in said["loose"]
    assert abs(drawn["j"] - drawn["s"]).max() <= 1  # a number may fall to the other side of a half
    assert (drawn["j"] != drawn["s"]).mean() < 1e-3 < (drawn["loose"] != drawn["s"]).mean()


@pytest.mark.parametrize("faster", ["sequential", "jacobi"])
def test_auto_takes_the_faster_sampler_and_says_which(
    faster, checkpoint, tmp_path, monkeypatch, capsys
):
    real, used = sample.draw, []

    def draw(model, indices, classes, options, *rest):
        used.append((options.sampler, len(indices)))
        time.sleep(0.0 if options.sampler == faster else 0.3)
        return real(model, indices, classes, options, *rest)

    monkeypatch.setattr(sample, "draw", draw)
    flags = ("--sampler", "auto", "--num", "8", "--batch-size", "5", "--npz", tmp_path / "s.npz")
    run(checkpoint, *flags)
    assert used[:3] == [("sequential", 5), ("sequential", 5), ("jacobi", 5)]
    assert used[3:] == [(faster, 5), (faster, 3)]
    assert f"--sampler {faster}: a batch of 5 takes" in capsys.readouterr().out


def test_bfloat16_rounds_the_pictures_a_little(checkpoint, tmp_path):
    for name, flag in (("f", "--no-bf16"), ("b", "--bf16"), ("d", "--seed=0")):
        run(checkpoint, "--num", "20", flag, "--npz", tmp_path / f"{name}.npz")
    exact, rounded, default = (pictures(tmp_path / f"{name}.npz") for name in "fbd")
    assert (exact == default).all()  # on a CPU
    assert 0 < abs(exact - rounded).mean() < 5


@pytest.mark.parametrize("change", [("--sampler", "jacobi"), ("--tolerance", "1e-3"), ("--bf16",)])
def test_batches_of_another_sampler_are_not_mixed_in(change, checkpoint, tmp_path, monkeypatch):
    flags = ("--num", "20", "--batch-size", "10", "--npz", tmp_path / "s.npz")
    real, calls = sample.draw, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags)
    run(checkpoint, *flags, *change)
    assert len(calls) == 4  # both batches again


def test_bar_counts_tokens_of_one_batch_and_batches_of_many(
    one_block_at_once, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for sampler in ("sequential", "jacobi"):
        run(one_block_at_once, "--num", "5", "--sampler", sampler, "--npz", tmp_path / "s.npz")
        assert "tokens: 100%" in (shown := capsys.readouterr().err) and "6/6" in shown
    run(one_block_at_once, "--num", "5", "--batch-size", "2", "--npz", tmp_path / "s.npz")
    assert "batches: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown
