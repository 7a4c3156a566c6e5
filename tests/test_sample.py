"""sample.py: the same set from any number of processes, the files, and bad input."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from common import runs
from common.data import read_picture
from common.shapes import SHAPES, from_uint8, to_tensor
from flow import NormalizingFlow


@pytest.fixture
def checkpoint(tiny):
    """A model.pt of random, non-zero weights."""
    model = randomize(train.MIMFlow(tiny, SHAPES))
    return write_checkpoint(tiny, model)


def write_checkpoint(config, model):
    path = config.run_dir / "model.pt"
    path.parent.mkdir(parents=True)
    content = dict(format=1, step=3, config=asdict(config), model=model.state_dict())
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


def interrupt_sampling(monkeypatch, at: int) -> list:
    """Ctrl-C when the list that comes back, which grows with every batch, gets its item `at`."""
    real, calls = sample.sample_batch, []

    def interrupted(*arguments, **how):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr(sample, "sample_batch", interrupted)
    return calls


def test_an_interrupted_set_is_continued_and_another_one_is_not_mixed_in(
    checkpoint, tmp_path, monkeypatch, capsys
):
    flags = ("--num", "25", "--batch-size", "10", "--npz", tmp_path / "s.npz")
    calls = interrupt_sampling(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags)
    run(checkpoint, *flags)
    assert len(calls) == 4  # only the third batch was made again
    assert "going on: 2 batches" in capsys.readouterr().out
    continued = np.load(tmp_path / "s.npz")["arr_0"]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags, "--seed", "9")
    run(checkpoint, *flags)
    assert (np.load(tmp_path / "s.npz")["arr_0"] == continued).all()


def test_batches_of_other_weights_are_not_mixed_in(checkpoint, tmp_path, monkeypatch):
    flags = ("--num", "20", "--batch-size", "10", "--npz", tmp_path / "s.npz")
    calls = interrupt_sampling(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags)
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["flow.blocks.0.proj_out.bias"] += 1.0  # trained on
    torch.save(content, checkpoint)
    run(checkpoint, *flags)
    assert len(calls) == 4  # both batches again


def test_a_process_makes_every_second_batch_of_two_processes(
    one_block_at_once, tmp_path, monkeypatch, capsys
):
    model = train.load_checkpoint(one_block_at_once)
    flags = ("--num", "25", "--batch-size", "10", "--sampler", "jacobi", "--guidance", "1")
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    files = sample.sample_parts(model, [0], sample.parse_arguments(["x", *flags]), tmp_path)
    assert [path.exists() for path in files] == [True, False, True]
    assert len(np.load(files[2])) == 5
    said = capsys.readouterr().out  # of the two batches that it has made
    assert "sweeps a batch, deep block first: 3.0, 1.0; token by token: 3" in said


def test_a_class_name_wins_over_an_index(tiny):
    model = train.MIMFlow(replace(tiny, num_classes=3), ("2", "cat", "dog"))
    assert sample.choose_classes(["2", "1", "dog"], model) == [0, 1, 2]


def test_bfloat16_is_the_default_where_it_is_fast_but_not_for_jacobi(monkeypatch):
    monkeypatch.setattr(runs, "uses_bf16", lambda device: True)
    cases = {(): True, ("--no-bf16",): False, ("--sampler", "jacobi"): False}
    cases[("--sampler", "jacobi", "--bf16")] = True
    for flags, expected in cases.items():
        options = sample.parse_arguments(list(flags))
        assert sample.in_bfloat16(options, torch.device("cpu")) == expected


def test_guidance_rules_and_denoising_change_the_pictures(checkpoint, tmp_path):
    model = train.load_checkpoint(checkpoint)
    base = ["--guidance", "0"], ["--guidance", "2"], ["--guidance", "2", "--constant-guidance"]
    base += (["--guidance", "2", "--guidance-rule", "starflow"], ["--guidance", "0", "--denoise"])
    found = set()
    for flags in base:
        options = sample.parse_arguments([str(checkpoint), *flags])
        found.add(sample.sample_batch(model, range(4), [0, 1], options).tobytes())
    assert len(found) == 5


def test_guidance_0_is_none_and_left_out_it_is_the_presets(tiny):
    model = train.MIMFlow(replace(tiny, guidance=2.0))
    assert [sample.choose_guidance(w, model) for w in (None, 0.0, 3.0)] == [2.0, 0.0, 3.0]


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
    grid, made = np.asarray(Image.open(tmp_path / "g.png")), pictures(tmp_path / "s.npz")
    for i in range(10):  # row by row, the missing tenth is white
        y, x = 2 + 98 * (i // 5), 2 + 98 * (i % 5)
        assert (grid[y : y + 96 : 6, x : x + 96 : 6] == (made[i] if i < 9 else 255)).all()
    for flags in (["--classes", "0"], ["--guidance", "1"]):
        with pytest.raises(SystemExit) as stopped:
            run(path, *flags)
        assert stopped.value.code == 2 and "without labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--classes", "10"], "classes 0 to 9"),
        (["--classes", "unicorn"], "'unicorn' is no class"),
        (["--num", "0"], "--num: must be positive"),
        (["--seed", "-1"], "--seed: must be not negative"),
        (["--guidance", "-1"], "--guidance: must be not negative"),
        (["--tolerance", "nan"], "--tolerance: must be not negative"),
        (["--sampler", "newton"], "--sampler"),
        (["--cuda-graph"], "needs a CUDA device"),
        (["--cuda-graph", "--sampler", "jacobi"], "--cuda-graph is for --sampler sequential"),
        (["--out", "/nowhere/g.png"], "folder /nowhere"),
        (["--out", "g.npz"], "must end in .png"),
        (["--npz", "CKPT"], "must end in .npz"),
    ],
)
def test_bad_flags_are_one_clear_line(checkpoint, flags, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, *(str(checkpoint) if flag == "CKPT" else flag for flag in flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in error and error.count("\n") == 1, error


def test_command_line_as_a_user_types_it(checkpoint, tmp_path, run_script):
    shipped = run_script("sample.py", "--num", 10, "--device", "cpu", cwd=tmp_path)
    folder = checkpoint.parent.rename(tmp_path / "runs_shapes")
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "shapes")
    assert shipped.returncode == 0 and "python train.py" in shipped.stdout
    assert (tmp_path / "grid.png").exists()
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


def test_jacobi_makes_the_same_pictures_and_says_its_sweeps(one_block_at_once, tmp_path, capsys):
    base, made, said = ("--num", "25", "--batch-size", "10", "--guidance", "1"), {}, {}
    jacobi = ("--sampler", "jacobi")
    for name, flags in dict(s=(), j=jacobi, loose=(*jacobi, "--tolerance", "1000")).items():
        run(one_block_at_once, *base, *flags, "--npz", tmp_path / "s.npz")
        made[name], said[name] = pictures(tmp_path / "s.npz"), capsys.readouterr().out
    assert "sweeps" not in said["s"]
    assert "sweeps a batch, deep block first: 3.0, 1.0; token by token: 3" in said["j"]
    assert "sweeps a batch, deep block first: 1.0, 1.0; token by token: 3" in said["loose"]
    assert abs(made["j"] - made["s"]).max() <= 1  # a number may fall to the other side of a half
    assert (made["j"] != made["s"]).mean() < 1e-3 < (made["loose"] != made["s"]).mean()


def test_bfloat16_rounds_the_pictures_a_little(checkpoint, tmp_path):
    for name, flag in (("f", "--no-bf16"), ("b", "--bf16"), ("d", "--seed=0")):
        run(checkpoint, "--num", "20", flag, "--npz", tmp_path / f"{name}.npz")
    exact, rounded, default = (pictures(tmp_path / f"{name}.npz") for name in "fbd")
    assert (exact == default).all()  # on a CPU
    assert 0 < abs(exact - rounded).mean() < 5


@pytest.mark.parametrize(
    "change", [("--sampler", "jacobi"), ("--tolerance", "1e-3"), ("--bf16",), ("--denoise",)]
)
def test_batches_of_another_sampler_are_not_mixed_in(change, checkpoint, tmp_path, monkeypatch):
    flags = ("--num", "20", "--batch-size", "10", "--npz", tmp_path / "s.npz")
    calls = interrupt_sampling(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, *flags)
    run(checkpoint, *flags, *change)
    assert len(calls) == 4  # both batches again


def test_the_bar_counts_the_tokens_of_all_batches(one_block_at_once, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for flags, tokens in ((), 6), (("--sampler", "jacobi"), 6), (("--batch-size", "2"), 18):
        run(one_block_at_once, "--num", "5", *flags, "--npz", tmp_path / "s.npz")
        assert (
            "tokens: 100%" in (shown := capsys.readouterr().err) and f"{tokens}/{tokens}" in shown
        )


# --------------------------------------------------------------------------------------------------
# CUDA graphs


@pytest.fixture
def flow():
    return randomize(NormalizingFlow(6, 4, 16, (1, 2), 8, 10)).requires_grad_(False)


def noise_and_labels(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 4, generator=generator), torch.arange(count) + seed % 2


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: keeps each operation with its tensors, does all of them
    again on the same memory, and knows nothing of the Python that chose them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Each of these would make the GPU's answer decide what Python does.
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{function} waits for the device"
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            old, new = (x if isinstance(x, (tuple, list)) else (x,) for x in (result, again))
            for a, b in zip(old, new, strict=True):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():
                    a.copy_(b)


@pytest.fixture
def recorded(monkeypatch):
    """CUDA's graphs replaced by recorders; a list of those that were made."""
    made = []

    def graph(recorder, capture_error_mode):
        made.append(recorder)
        return recorder

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


def test_a_recorded_inversion_follows_new_noise_and_labels(flow, recorded):
    inverse = sample.RecordedInverse(flow.inverse)
    rule = dict(annealed=True, rule="tarflow", sampler="sequential", tolerance=1e-5)
    found, graphs, given = [], [], []
    sizes = (3, 3, 3, 2, 3, 2, 2)
    for seed, size in enumerate(sizes):
        u, labels = noise_and_labels(size, seed)
        given += [(u, u.clone()), (labels, labels.clone())]
        found.append(inverse(u, labels, 1.5, watch=lambda block, solved: None, **rule))
        graphs.append(len(recorded))
    for seed, size in enumerate(sizes):  # after all: no result is written over by a later replay
        expected = flow.inverse(*noise_and_labels(size, seed), 1.5)
        torch.testing.assert_close(found[seed], expected, atol=1e-6, rtol=1e-6)
    assert all((u == kept).all() for u, kept in given)
    assert graphs == [0, 1, 1, 1, 1, 2, 2]  # the first of a size runs as always
    u, labels = noise_and_labels(3, 9)
    other = inverse(u, labels, 0.5, watch=lambda block, solved: None, **rule)
    torch.testing.assert_close(other, flow.inverse(u, labels, 0.5))  # not the graph of 1.5
    assert len(recorded) == 2


def test_recorded_sets_are_the_plain_ones(checkpoint, tmp_path, recorded, monkeypatch):
    flags = ("--num", "23", "--batch-size", "5", "--guidance", "1")
    run(checkpoint, *flags, "--npz", tmp_path / "plain.npz")
    pretended = argparse.Namespace(type="cuda", index=0)  # passes the check, then is a CPU again

    def select(name):
        monkeypatch.setattr(runs, "start_processes", lambda device: None)
        return pretended

    monkeypatch.setattr(runs, "select_device", select)
    monkeypatch.setattr(sample, "load_checkpoint", lambda path, _: train.load_checkpoint(path))
    run(checkpoint, *flags, "--cuda-graph", "--npz", tmp_path / "graph.npz")
    assert len(recorded) == 1  # five batches, of them the last one smaller
    assert abs(pictures(tmp_path / "graph.npz") - pictures(tmp_path / "plain.npz")).max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a graph: needs a CUDA device")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_cuda_graph_gives_what_the_plain_path_gives(flow, bf16):
    flow.cuda().requires_grad_(True)  # as loaded: autocast keeps only weights that need gradients
    inverse = sample.RecordedInverse(flow.inverse)
    rule = dict(annealed=True, rule="tarflow", sampler="sequential", tolerance=1e-5)
    for seed in range(4):
        u, labels = (x.cuda() for x in noise_and_labels(3, seed))
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            found = inverse(u, labels, 1.5, watch=lambda block, solved: None, **rule)
            expected = flow.inverse(u, labels, 1.5)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phase", ["joint", "decoder"])
def test_bfloat16_weights_are_cast_once_a_batch(phase, tiny, tmp_path):
    """Autocast keeps its copies only of weights that may need gradients: phase 2 froze some."""
    model = randomize(train.MIMFlow(replace(tiny, phase=phase), SHAPES))
    model = train.load_checkpoint(write_checkpoint(model.config, model))
    weights, casts = {id(p): name for name, p in model.flow.named_parameters()}, []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and id(args[0]) in weights:
                casts.append(weights[id(args[0])])
            return function(*args, **(kwargs or {}))

    options = sample.parse_arguments(["--bf16", "--guidance", "1"])
    with Casts():
        sample.sample_batch(model, range(3), [0], options)
    assert len(casts) == len(set(casts)) > 20


def test_fewer_pictures_than_classes_make_no_empty_rows(checkpoint, tmp_path, capsys):
    run(checkpoint, "--num", "3", "--out", tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").size == (98 + 2, 3 * 98 + 2)
    assert "rows: circle, square, triangle\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------ Pictures you have


def cells(path, columns: int, rows: int) -> torch.Tensor:
    """The pictures of a grid PNG, row by row, (rows * columns, 3, 16, 16) in [-1, 1]."""
    grid = torch.from_numpy(np.asarray(Image.open(path)).copy())
    assert grid.shape == (rows * 98 + 2, columns * 98 + 2, 3)
    found = [
        grid[2 + 98 * y : 98 + 98 * y : 6, 2 + 98 * x : 98 + 98 * x : 6]  # a pixel is a square of 6
        for y in range(rows)
        for x in range(columns)
    ]
    return from_uint8(torch.stack(found)).permute(0, 3, 1, 2)


def test_the_way_between_two_latents_is_the_great_circle_of_their_noise(tiny, float64):
    flow = randomize(train.MIMFlow(tiny, SHAPES), std=0.1).flow
    first, second = torch.randn(2, 16)
    first, second = 3 * first / first.norm(), 3 * second / second.norm()
    with torch.no_grad():
        z = flow.inverse(torch.stack((first, second)).view(2, 4, 4), None)
        way = flow.between(z, 5)
        u = flow(way, None)[0].flatten(1)
    side = second - (second @ first / 9) * first  # the other axis of the plane of the circle
    whole = torch.arccos(first @ second / 9)
    for i in range(5):
        turn = whole * i / 4
        expected = torch.cos(turn) * first + torch.sin(turn) * 3 * side / side.norm()
        assert (u[i] - expected).abs().max() < 1e-9
    assert (way[[0, -1]] - z).abs().max() < 1e-9
    fresh = train.MIMFlow(tiny).flow  # u = z; of equal ones the cosine is 1 exactly
    assert (fresh.between(torch.ones(2, 4, 4), 3) - 1).abs().max() < 1e-6


def test_between_two_pictures_the_ends_are_their_reconstructions(checkpoint, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for i, path in enumerate(paths):  # larger than the model's, and not square
        pixels = np.random.default_rng(i).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((45, 30)).save(path)
    run(checkpoint, "--between", *paths)
    model = train.load_checkpoint(checkpoint)
    x = torch.stack([to_tensor(read_picture(path, 16)) for path in paths])
    with torch.no_grad():
        plain = model.decoder(model.encoder(x))
        way = model.decoder(model.flow.between(model.encoder(x), 8))
    assert (way[[0, -1]] - plain).abs().max() < 1e-4
    shown = cells(checkpoint.parent / "between.png", 10, 1)
    assert (shown[[0, -1]] - x).abs().max() < 0.01
    assert (shown[1:-1] - way.clamp(-1, 1)).abs().max() < 0.005
    assert (way[3] - plain[0]).abs().max() > 1e-3 < (way[3] - plain[1]).abs().max()
    run(checkpoint, "--between", paths[0], paths[0], "--out", tmp_path / "same.png")
    same = cells(tmp_path / "same.png", 10, 1)[1:-1]
    assert (same - plain[0].clamp(-1, 1)).abs().max() < 0.01


def test_a_class_may_have_a_dot_and_only_one_process_shows_the_way(tiny, tmp_path, monkeypatch):
    names = [f"{i:03}.Bird" for i in range(10)]  # as in CUB-200
    path = write_checkpoint(tiny, randomize(train.MIMFlow(tiny, names)))
    monkeypatch.setattr(sample, "rank", lambda: 1)
    run(path, "--between", "001.Bird", "002.Bird", "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    monkeypatch.undo()
    run(path, "--between", "001.Bird", "002.Bird", "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_reconstruct_shows_what_is_given_what_is_seen_and_what_comes_out(checkpoint, tmp_path):
    Image.new("RGB", (20, 20), (250, 120, 30)).save(tmp_path / "a.png")
    run(checkpoint, "--reconstruct", tmp_path / "a.png", "heart", "3", "--seed", "5")
    shown = cells(checkpoint.parent / "reconstruct.png", 3, 3).view(3, 3, 3, 16, 16)
    given, seen, decoded = shown.unbind(dim=1)
    options = sample.parse_arguments([str(checkpoint), "--guidance", "1", "--seed", "5"])
    model = train.load_checkpoint(checkpoint)
    for row, label in ((1, 6), (2, 3)):  # classes: samples number 1 and 2 of the seed
        picture = sample.sample_batch(model, range(row, row + 1), [label], options)[0]
        assert (
            given[row] - from_uint8(torch.from_numpy(picture)).permute(2, 0, 1)
        ).abs().max() < 1e-6
    hidden = (seen - given).abs().amax(dim=1) > 0.01  # (3, 16, 16)
    assert seen.movedim(1, -1)[hidden].abs().max() < 0.01  # grey
    draws = train.draws_of_pictures(model.config, range(3), 5, torch.device("cpu"))
    patches = hidden.view(3, 4, 4, 4, 4).sum(dim=(2, 4)).flatten(1)
    assert (draws.mask[0] == (patches[0] == 16)).all()  # no pixel of the first picture is grey
    with torch.no_grad():
        expected = model.decoder(model.latents(given, draws)[1]).clamp(-1, 1)
    assert (decoded - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    "flags, what",
    [
        (("--between", "heart", "none.png"), "cannot read none.png"),
        (("--between", "heart", "cat"), "'cat' is no class"),
        (("--reconstruct", "broken.png"), "cannot read broken.png"),
        (("--between", "a.png", "heart", "--out", "a.png"), "a.png is also a.png"),
        (("--between", "a.png", "heart", "--out", "a.jpg"), "must end in .png"),
        (("--between", "a.png", "a.png", "--npz", "x.npz"), "not allowed with"),
        (("--between", "a.png"), "expected 2 arguments"),
    ],
)
def test_pictures_that_cannot_be_shown_are_one_line(
    checkpoint, tmp_path, monkeypatch, capsys, flags, what
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(SystemExit):
        runs.run_program(lambda: run(checkpoint, *flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line
    assert (tmp_path / "a.png").read_bytes() == before and not (tmp_path / "a.jpg").exists()


@pytest.fixture
def second_prior(tiny):
    c = replace(tiny, prior="emigm", emigm_width=16, emigm_heads=2, emigm_depths=(1, 1))
    c = replace(c, emigm_head=(16, 1), emigm_steps=2, freeze_autoencoder=True)
    return write_checkpoint(c, train.MIMFlow(c, SHAPES))


def test_the_second_prior_has_no_way_between_but_reconstructs(second_prior, capsys):
    with pytest.raises(SystemExit):
        run(second_prior, "--between", "heart", "moon")
    assert "--between: the prior of this checkpoint is emigm" in capsys.readouterr().err
    run(second_prior, "--reconstruct", "heart")
    assert (second_prior.parent / "reconstruct.png").exists()


def test_the_second_prior_takes_the_steps_of_its_preset_or_those_of_the_flag(second_prior):
    model = train.load_checkpoint(second_prior)
    told = []
    for flags in [], ["--steps", "3"]:
        options = sample.parse_arguments(["--guidance", "0", *flags])
        sample.sample_batch(model, range(1), [0], options, watch=lambda step, _: told.append(step))
    assert told == [0, 1, 0, 1, 2]


def test_pictures_of_the_checkpoint_that_comes_with_the_code_are_not_put_beside_it(monkeypatch):
    monkeypatch.chdir(runs.SHIPPED.parent.parent)
    for path in (runs.SHIPPED, Path("checkpoints/shapes.pt")):
        assert runs.beside(path, "a.png") == Path("a.png")
    assert runs.beside(Path("runs/x/model.pt"), "a.png") == Path("runs/x/a.png")
