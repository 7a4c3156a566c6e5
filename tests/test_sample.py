"""sample.py: the same set from any number of processes, the files, and bad input."""

import argparse
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
