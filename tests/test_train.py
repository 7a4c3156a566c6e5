"""train.py: data, randomness, the joint model, checkpoints, runs that continue or split exactly."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, randomize
from PIL import Image

import train


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]


def without_time(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "ms_per_step"} for line in lines]


def assert_same(one, other) -> None:
    """Equal to the last bit, through nested dictionaries and lists."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# ---------------------------------------------------------------------------------------- Pictures


def test_built_in_pictures_repeat_vary_and_are_balanced():
    dataset = train.ShapesDataset(32)
    image, label = dataset[13]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 3
    assert torch.equal(image, dataset[(7, 13)][0])  # the same in every epoch
    others = [dataset[i][0] for i in range(3, 103, 10)]
    assert all((a - b).abs().mean() > 0.02 for i, a in enumerate(others) for b in others[:i])
    assert not torch.equal(image, train.ShapesDataset(32, "val")[13][0])
    assert {dataset[i][1] for i in range(10)} == set(range(10))
    assert image.min() >= -1 and image.max() <= 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_open_dataset_gives_the_split_asked_for():
    for split in ("train", "val"):
        expected, found = train.ShapesDataset(16, split), train.open_dataset(None, 16, split)
        assert len(found) == len(expected) and torch.equal(found[5][0], expected[5][0])
    assert len(train.open_dataset(None, 16)) == 50_000  # training pictures by default


def test_built_in_shape_covers_the_middle_and_hue_can_be_chosen():
    picture = np.asarray(train.draw_shape(0, np.random.default_rng(0), 32, hue=1 / 3)).astype(int)
    middle, corner = picture[16, 16], picture[0, 0]
    assert middle[1] > middle[0] and middle[1] > middle[2]  # green
    assert middle.sum() > corner.sum()


def test_adm_crop_equals_box_halving_then_bicubic():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (70, 94, 3), dtype=np.uint8))
    pixels = np.asarray(picture).astype(float)
    box = pixels.reshape(35, 2, 47, 2, 3).mean(axis=(1, 3))  # short side 70 >= 2 x 32: halve once
    halved = Image.fromarray((box + 0.5).astype(np.uint8))
    resized = np.asarray(halved.resize((round(47 * 32 / 35), 32), Image.Resampling.BICUBIC))
    left = (resized.shape[1] - 32) // 2
    result = np.asarray(train.adm_crop(picture, 32)).astype(int)
    assert np.abs(result - resized[:, left : left + 32]).max() <= 2  # two roundings


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (640, 33), (32, 32)])
def test_adm_crop_takes_any_size(size):
    assert train.adm_crop(Image.new("RGB", size), 32).size == (32, 32)


def test_uint8_conversion_rounds_and_goes_both_ways():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(train.to_uint8(values.float() / 127.5 - 1), values)
    assert train.to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def write_pictures(folder, count: int, size=(20, 24), mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def test_folder_layouts(tmp_path):
    for name in ("b", "a"):
        write_pictures(tmp_path / "imagenet" / "train" / name, 3)
    write_pictures(tmp_path / "imagenet" / "val" / "a", 1, mode="L")
    write_pictures(tmp_path / "imagenet" / "val" / "b", 1, mode="RGBA")
    dataset = train.open_dataset(str(tmp_path / "imagenet"), 16)
    assert dataset.class_names == ("a", "b") and len(dataset) == 6
    assert dataset[5][0].shape == (3, 16, 16) and dataset[5][1] == 1
    assert len(train.open_dataset(str(tmp_path / "imagenet"), 16, "val")) == 2
    assert train.open_dataset(str(tmp_path / "imagenet"), 16, "val")[1][0].shape == (3, 16, 16)
    classes_directly = train.open_dataset(str(tmp_path / "imagenet" / "train"), 16)
    assert len(classes_directly) == 6
    flat = train.open_dataset(str(tmp_path / "imagenet" / "train" / "a"), 16)
    assert flat.class_names == () and len(flat) == 3 and flat[0][1] == -1


def test_folder_layouts_that_could_be_misread(tmp_path, capsys):
    for name in ("bus", "car", "train"):  # a class called train is no split
        write_pictures(tmp_path / "classes" / name, 1)
    assert train.open_dataset(str(tmp_path / "classes"), 16).class_names == ("bus", "car", "train")

    for name in ("a", "b", "c"):  # val holds fewer classes: labels are those of train
        write_pictures(tmp_path / "splits" / "train" / name, 1)
    write_pictures(tmp_path / "splits" / "val" / "c", 1)
    val = train.open_dataset(str(tmp_path / "splits"), 16, "val")
    assert val.class_names == ("a", "b", "c") and val[0][1] == 2 and len(val) == 1

    write_pictures(tmp_path / "splits" / "train" / ".ipynb_checkpoints", 1)
    (tmp_path / "splits" / "train" / "a" / "._1.png").write_bytes(b"not a picture")
    hidden = train.open_dataset(str(tmp_path / "splits"), 16)
    assert hidden.class_names == ("a", "b", "c") and len(hidden) == 3

    Image.new("RGB", (9, 9)).save(tmp_path / "classes" / "loose.png")
    (tmp_path / "splits" / "val").rename(tmp_path / "elsewhere")
    for folder, split in {"classes": "train", "splits": "val"}.items():
        with pytest.raises(SystemExit):
            train.open_dataset(str(tmp_path / folder), 16, split)
    message = capsys.readouterr().err
    assert "mixes class folders and pictures" in message and "no val/" in message


def test_flip_is_a_function_of_seed_epoch_and_index(tmp_path):
    write_pictures(tmp_path / "flat", 4)
    dataset = train.open_dataset(str(tmp_path / "flat"), 16, seed=3)
    plain = dataset[1][0]
    flipped = [torch.equal(dataset[(epoch, 1)][0], plain.flip(-1)) for epoch in range(60)]
    assert 15 < sum(flipped) < 45
    assert flipped == [torch.equal(dataset[(epoch, 1)][0], plain.flip(-1)) for epoch in range(60)]


# ------------------------------------------------------------------------------- Order, randomness


def test_sampler_shows_every_image_once_an_epoch_in_a_new_order():
    batches = list(train.StepSampler(10, 4, range(4), 0, 10, seed=5))
    entries = [entry for batch in batches for entry in batch]
    first, second = ([i for e, i in entries if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert {e for e, _ in entries} == {0, 1, 2, 3}


def test_sampler_can_start_anywhere_and_ranks_share_the_batch():
    whole = list(train.StepSampler(10, 4, range(4), 0, 9, seed=5))
    assert list(train.StepSampler(10, 4, range(4), 3, 9, seed=5)) == whole[3:]
    left, right = (list(train.StepSampler(10, 4, range(2 * r, 2 * r + 2), 0, 9, 5)) for r in (0, 1))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    assert list(train.StepSampler(10, 4, range(4), 0, 9, seed=6)) != whole


def test_draws_repeat_differ_between_steps_and_rows_are_slices(tiny):
    cpu = torch.device("cpu")
    draws = train.draw_randomness(tiny, 3, cpu)
    for a, b in zip(draws, train.draw_randomness(tiny, 3, cpu), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(draws.noise, train.draw_randomness(tiny, 4, cpu).noise)
    part = draws.rows(2, 5)
    assert torch.equal(part.mask, draws.mask[2:5]) and torch.equal(part.noise, draws.noise[2:5])
    assert part.branch_scales.shape == (1, 2, 3)
    assert not torch.equal(draws.mask[0], draws.mask[1])


def test_label_drop_is_the_share_of_dropped_labels(tiny):
    config = replace(tiny, batch_size=4000, label_drop=0.25)
    dropped = train.draw_randomness(config, 0, torch.device("cpu")).drop_label
    assert abs(dropped.float().mean() - 0.25) < 0.03


def test_ramps_and_learning_rate():
    assert [train.ramp(s, 4) for s in (0, 2, 4, 9)] == [0, 0.5, 1, 1] and train.ramp(0, 0) == 1
    config = train.Config(lr=1.0, lr_warmup=2, lr_decay=0.5, steps=8)
    rates = [train.learning_rate(config, s) for s in range(8)]
    assert rates == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert train.learning_rate(train.Config(steps=100), 99) == 1e-4  # the paper: constant


def test_mask_ratio_grows_over_its_warmup(tiny):
    config = replace(tiny, mask_ratio=(0.5, 0.5), mask_warmup=10)
    hidden = [
        train.draw_randomness(config, s, torch.device("cpu")).mask.sum().item() for s in (0, 5, 10)
    ]
    assert hidden == [0, 8 * 4, 8 * 8]


def test_draws_of_pictures_are_past_the_warm_up_and_belong_to_the_picture(tiny):
    config = replace(tiny, mask_ratio=(0.5, 0.5), mask_warmup=10)
    draws = train.draws_of_pictures(config, [3, 5], 0, torch.device("cpu"))
    assert draws.mask.sum(dim=1).tolist() == [8, 8]
    for a, b in zip(
        train.draws_of_pictures(config, [5], 0, torch.device("cpu")), draws.rows(1, 2), strict=True
    ):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------- Model


def batch_of(config, count: int):
    dataset = train.ShapesDataset(config.image_size)
    images, labels = zip(*(dataset[i] for i in range(count)), strict=True)
    return torch.stack(images), torch.tensor(labels)


def test_forward_is_the_sum_of_the_named_terms(tiny):
    model = randomize(train.MIMFlow(replace(tiny, label_drop=0.5))).double()
    images, labels = batch_of(tiny, 8)
    draws = train.draw_randomness(tiny, 0, torch.device("cpu"))
    draws = draws._replace(noise=draws.noise.double(), branch_scales=draws.branch_scales.double())
    training = train.JointTraining(model, train.FrozenNetworks(None, {}))
    loss, logs, painted = training(images.double(), labels, draws, 0.3)
    z = model.encoder(images.double(), draws.mask) + 0.3 * draws.noise
    used = torch.where(draws.drop_label, -1, labels)
    nll = -model.flow.log_prob(z, used).mean() / 16 - 0.5 * np.log(2 * np.pi)
    mse = (model.decoder(z, draws.branch_scales) - images).square().mean()
    torch.testing.assert_close(logs["mse"], mse)
    torch.testing.assert_close(logs["nll"], nll)
    torch.testing.assert_close(loss, mse + 0.3 * nll)
    torch.testing.assert_close(logs["nll_square"] + logs["nll_logdet"], nll)
    assert logs["block_mean_square"].shape == (2,)
    torch.testing.assert_close(logs["block_mean_square"][-1], 2 * logs["nll_square"])
    mu = model.encoder(images.double(), draws.mask)
    spread = (mu - mu.mean(dim=0)).square().mean(dim=0).sqrt().mean()
    torch.testing.assert_close(logs["mu_std"], spread)


def test_every_parameter_gets_a_gradient_and_is_in_one_optimizer_group(tiny, monkeypatch):
    seen = {}
    real = torch.optim.AdamW

    def spy(parameters, **settings):
        seen["optimizer"] = real(parameters, **settings)
        return seen["optimizer"]

    # Stop after the first backward pass; ratio (0, 0) must not leave the mask token out.
    def stop(parameters, limit):
        seen["gradients"] = [p.grad for p in parameters]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(replace(tiny, mask_ratio=(0.0, 0.0)))
    groups = seen["optimizer"].param_groups
    held = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held) == len(list(train.MIMFlow(tiny).parameters()))
    assert all(gradient is not None for gradient in seen["gradients"])
    assert len(seen["gradients"]) == len(held)
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8


def test_ema_arithmetic():
    model, ema = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    model.register_buffer("count", torch.tensor(7.0))
    ema.register_buffer("count", torch.tensor(0.0))
    old, new = ema.weight.detach().clone(), model.weight.detach().clone()
    train.update_ema(ema, model, decay=0.9, step=1000)
    torch.testing.assert_close(ema.weight, 0.9 * old + 0.1 * new)
    assert ema.count == 7
    old = ema.weight.detach().clone()
    train.update_ema(ema, model, decay=0.9999, step=2)  # warm-up: (1 + 2) / (10 + 2)
    torch.testing.assert_close(ema.weight, 0.25 * old + 0.75 * new)


def test_one_batch_overfits(tiny):
    config = replace(tiny, width=32, num_latents=8, drop_path=0.0, lr=3e-3)
    training = train.JointTraining(train.MIMFlow(config), train.FrozenNetworks(None, {}))
    images, labels = batch_of(config, 8)
    optimizer = torch.optim.AdamW(training.parameters(), 3e-3)
    draws = train.draw_randomness(config, 0, torch.device("cpu"))
    losses = []
    for _ in range(250):
        loss, logs, _ = training(images, labels, draws, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((logs["mse"].item(), logs["nll"].item()))
    assert losses[-1][0] < 0.1 * losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_a_fresh_model_samples_finite_pictures(tiny):
    for classes in (10, 0):
        model = train.MIMFlow(replace(tiny, num_classes=classes)).eval()
        noise = train.sample_noise(0, range(4), 4, 4)
        images = model.sample(noise, torch.tensor([0, 1, 2, -1]), guidance=2.0)
        assert images.shape == (4, 3, 16, 16) and images.isfinite().all()


def test_sample_noise_belongs_to_the_number_of_the_sample():
    whole = train.sample_noise(3, range(6), 4, 2)
    assert torch.equal(train.sample_noise(3, range(4, 6), 4, 2), whole[4:])
    assert len({row.sum().item() for row in whole}) == 6
    assert not torch.equal(train.sample_noise(4, range(6), 4, 2), whole)


def test_paper_scale_parameters_are_the_papers(capsys):
    config, _ = train.parse_arguments(["--preset", "mimflow-l", "--dry-run"])
    train.dry_run(config)
    printed = capsys.readouterr().out
    counts = {}
    for line in printed.splitlines():
        if "parameters" in line:
            name, _, number = line.split(" parameters")[0].rpartition(" ")
            counts[name.strip()] = int(number.replace(",", ""))
    assert abs(counts["encoder + decoder"] / 172.0e6 - 1) < 0.01  # Tab. 2
    assert abs(counts["flow"] / 474.8e6 - 1) < 0.005  # what the text of Sec. 4.1.2 gives


def test_epochs_become_steps_and_a_grid_shows_eight_of_many_classes(tiny):
    config = replace(tiny, steps=None, epochs=1.5)
    assert train.resolve(config, train.ShapesDataset(16)).steps == 1.5 * 50_000 / 8
    assert train.shown_classes(16) == list(range(16)) and train.shown_classes(0) == [-1]
    assert train.shown_classes(1000) == [0, 143, 285, 428, 571, 714, 856, 999]


def test_the_newest_model_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, when in (("a", 30), ("b", 50), ("c", 40)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.pt").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "model.pt", (when, when))
    assert str(train.find_checkpoint(None)) == os.path.join("runs", "b", "model.pt")


# -------------------------------------------------------------------------------------- Whole runs


def test_a_run_writes_what_it_promises(tiny, capsys):
    train.main(tiny)
    run = tiny.run_dir
    names = {path.name for path in run.iterdir()}
    checkpoints = {"last.pt", "previous.pt", "model.pt"}
    assert names == {".lock", "config.json", "log.jsonl", "samples"} | checkpoints
    assert [p.name for p in (run / "samples").iterdir()] == ["step_0000008.png"]
    lines = read_log(run)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    wanted = {"loss", "mse", "nll", "nll_square", "nll_logdet", "block_mean_square", "mu_std", "lr"}
    assert wanted | {"grad_norm", "skipped"} <= lines[0].keys()
    assert len(lines[0]["block_mean_square"]) == 2
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 8
    model = train.load_checkpoint(run / "model.pt")
    assert model.step == 8 and model.class_names[:2] == ("circle", "square")
    assert not model.training and model.config.latent_dim == 4
    ema = torch.load(run / "last.pt", weights_only=True)["ema"]
    assert_same(dict(model.state_dict()), dict(ema))
    assert_same(dict(train.load_checkpoint(run / "last.pt").state_dict()), dict(ema))
    assert "done" in capsys.readouterr().out


def test_a_run_is_the_plain_loop_written_out(tiny, tmp_path):
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "data" / name, 5)
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=2, seed=3, steps=4, log_every=1)
    train.main(config)  # nll_warmup 4, lr_warmup 2, lr_decay 0.5

    torch.manual_seed(3)
    model = train.MIMFlow(config)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    training = train.JointTraining(model, train.FrozenNetworks(None, {}))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    dataset = train.FolderDataset(config.data, 16, "train", 3)
    batches, lines = train.StepSampler(10, 8, range(8), 0, 4, 3), read_log(config.run_dir)
    lr_and_nll = ((0.001, 0), (0.002, 0.0025), (0.002, 0.005), (0.001, 0.0075))
    for step, (batch, (lr, weight)) in enumerate(zip(batches, lr_and_nll, strict=True)):
        images, labels = zip(*(dataset[key] for key in batch), strict=True)
        draws = train.draw_randomness(config, step, torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss, logs, _ = training(torch.stack(images), torch.tensor(labels), draws, weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, value in model.state_dict().items():
            average[name] += (1 - (1 + step) / (10 + step)) * (value - average[name])
        expected = {"lr": lr, "loss": loss.item(), "grad_norm": norm.item()}
        assert {k: lines[step][k] for k in expected} == pytest.approx(expected, rel=1e-4)
    saved = torch.load(config.run_dir / "last.pt", weights_only=True)
    for part, found in ((model.state_dict(), saved["model"]), (average, saved["ema"])):
        for name, value in part.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_grids_are_of_the_moving_average_guided_a_row_a_class(tiny, monkeypatch):
    drawn = {}

    def keep(images, columns, path):
        drawn[path.name] = (images, columns)

    monkeypatch.setattr(train, "save_png", keep)
    config = replace(tiny, lr=0.05, steps=5, sample_every=3, guidance=3.0)
    train.main(config)
    assert list(drawn) == ["step_0000003.png", "step_0000005.png"]  # the last step, too
    model = train.load_checkpoint(config.run_dir / "model.pt")
    noise, labels = train.sample_noise(0, range(80), 4, 4), torch.arange(80) // 8
    images, columns = drawn["step_0000005.png"]
    expected = model.sample(noise, labels, 3.0)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert columns == 8 and (expected - model.sample(noise, labels)).abs().max() > 1e-4


def test_the_log_has_the_last_step_and_the_mean_time_of_a_step(tiny, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1.0  # a second between two looks at the clock
            return self.now

    monkeypatch.setattr(train, "time", Clock())
    train.main(replace(tiny, steps=5))
    times = [(line["step"], line["ms_per_step"]) for line in read_log(tiny.run_dir)]
    assert times == [(2, 500), (4, 500), (5, 1000)]


def test_resumed_equals_uninterrupted_to_the_bit(tiny, tmp_path):
    train.main(replace(tiny, lr_decay=0.0, label_drop=0.3))
    stopped = replace(tiny, lr_decay=0.0, label_drop=0.3, out=str(tmp_path / "stopped"))
    train.main(replace(stopped, steps=5, save_every=5))
    with open(tmp_path / "stopped" / "log.jsonl", "a") as log:  # as if killed after logging step 6
        log.write('{"step": 6}\n{"step": 7, "lo')
    train.main(stopped)
    whole, parts = (
        torch.load(run / "last.pt", weights_only=True) for run in (tiny.run_dir, stopped.run_dir)
    )
    for key in ("model", "ema", "optimizer", "step"):
        assert_same(whole[key], parts[key])
    wanted = {line["step"]: line for line in without_time(read_log(tiny.run_dir))}
    resumed = without_time(read_log(stopped.run_dir))
    assert [line for line in resumed if line["step"] != 5] == [wanted[s] for s in (2, 4, 6, 8)]


def test_gradient_accumulation_is_the_same_step(tiny, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        for parts in (1, 4):
            train.main(replace(tiny, grad_accum=parts, out=str(tmp_path / str(parts))))
    finally:
        torch.set_default_dtype(torch.float32)
    one, four = (
        torch.load(tmp_path / n / "last.pt", weights_only=True)["model"] for n in ("1", "4")
    )
    assert max((one[k] - four[k]).abs().max() for k in one) < 1e-9


RUN_IN_FLOAT64 = """
import sys, torch, train
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
train.main(train.parse_arguments(sys.argv[1:])[0])
"""


def test_compiled_training_takes_the_same_steps(tiny, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, but without its code generator, which takes a
    minute."""
    compiled, calls = torch.compile, []

    def trace(module):
        calls.append(module)
        return compiled(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace)
    train.main(replace(tiny, out=str(tmp_path / "plain")))
    assert not calls
    train.main(replace(tiny, out=str(tmp_path / "compiled"), compile=True))
    assert len(calls) == 1
    one, two = (
        torch.load(tmp_path / n / "model.pt", weights_only=True) for n in ("plain", "compiled")
    )
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, atol=1e-5, rtol=1e-5)


def test_two_processes_equal_one_and_may_take_over(tiny_flags, tmp_path):
    script = tmp_path / "run64.py"
    script.write_text(RUN_IN_FLOAT64)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}

    def run(processes: int, out: str, steps: int) -> None:
        launcher = [sys.executable]
        if processes == 2:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        flags = [*tiny_flags, "--drop-path", "0.2", "--lr-decay", "0", "--steps", str(steps)]
        flags += ["--grad-accum", str(processes)]
        command = [*launcher, str(script), *flags, "--out", str(tmp_path / out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"step {steps}/{steps}") == 1  # only rank 0 speaks

    run(1, "one", 6)
    for processes, steps in ((1, 2), (2, 4), (1, 6)):  # one hands over to two, and they to one
        run(processes, "two", steps)
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("one", "two"))
    for weights in ("model", "ema"):
        assert max((one[weights][k] - two[weights][k]).abs().max() for k in one[weights]) < 1e-9
    for a, b in zip(read_log(tmp_path / "one")[:2], read_log(tmp_path / "two")[:2], strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-9


def test_a_process_that_would_start_elsewhere_is_noticed(tiny, monkeypatch, capsys):
    """As if another process had found step 3, in a run folder that is not shared."""

    def all_reduce(tensor, op):
        tensor.copy_(tensor.maximum(torch.tensor([3, -3])))

    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    with pytest.raises(SystemExit):
        train.main(tiny)
    assert "rank 0 would start at step 0, others not" in capsys.readouterr().err
    assert [path.name for path in tiny.run_dir.iterdir()] == [".lock"]


def test_a_non_finite_gradient_is_skipped_counted_and_named(tiny, monkeypatch, capsys):
    real, calls = train.pixel_loss, []

    def poisoned(images, reconstructions):
        calls.append(1)
        return real(images, reconstructions) * (float("nan") if len(calls) in (3, 4) else 1.0)

    monkeypatch.setattr(train, "pixel_loss", poisoned)
    train.main(tiny)
    printed = capsys.readouterr().out
    assert "step 3: gradient is not finite" in printed and "step 4: gradient" in printed
    assert read_log(tiny.run_dir)[-1]["skipped"] == 2
    weights = torch.load(tiny.run_dir / "last.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tiny, monkeypatch, capsys):
    real, calls = train.pixel_loss, []

    def poisoned(images, reconstructions):
        calls.append(1)
        return real(images, reconstructions) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(train, "pixel_loss", poisoned)
    with pytest.raises(SystemExit) as stopped:
        train.main(replace(tiny, steps=40))
    assert stopped.value.code == 1 and len(calls) == 15
    assert "10 non-finite gradients in a row at step 15" in capsys.readouterr().err
    kept = torch.load(tiny.run_dir / "last.pt", weights_only=True)
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["model"].values())


def test_many_skipped_steps_not_in_a_row_stop_nothing_and_are_counted_on(tiny, monkeypatch):
    real, calls = train.pixel_loss, []

    def poisoned(images, reconstructions):
        calls.append(1)
        return real(images, reconstructions) * (float("nan") if len(calls) % 2 else 1.0)

    monkeypatch.setattr(train, "pixel_loss", poisoned)
    for steps in (8, 32):  # the second time it goes on
        train.main(replace(tiny, steps=steps))
        assert read_log(tiny.run_dir)[-1]["skipped"] == steps // 2


def test_a_run_that_ends_on_a_skipped_step_is_saved_all_the_same(tiny, monkeypatch):
    real, calls = train.pixel_loss, []

    def poisoned(images, reconstructions):
        calls.append(1)
        return real(images, reconstructions) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(train, "pixel_loss", poisoned)
    train.main(tiny)
    saved = torch.load(tiny.run_dir / "last.pt", weights_only=True)
    assert saved["step"] == 8 and saved["skipped"] == 1
    assert train.load_checkpoint(tiny.run_dir / "model.pt").step == 8


def test_a_shared_model_is_not_replaced_and_overwrite_deletes_nothing_in_vain(tiny, capsys):
    train.main(tiny)
    for wrong in (dict(seed=-1), dict(data="/nowhere"), dict(sigma=float("nan"))):
        with pytest.raises(SystemExit):
            train.main(replace(tiny, **wrong), overwrite=True)
    assert (tiny.run_dir / "last.pt").exists()
    (tiny.run_dir / "last.pt").unlink()
    (tiny.run_dir / "previous.pt").unlink()
    content = (tiny.run_dir / "model.pt").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny)
    assert stopped.value.code == 2 and "no last.pt" in capsys.readouterr().err
    assert (tiny.run_dir / "model.pt").read_bytes() == content


def test_a_run_killed_before_its_first_save_starts_its_log_again(tiny):
    train.main(tiny)
    whole = without_time(read_log(tiny.run_dir))
    for name in ("last.pt", "model.pt"):
        (tiny.run_dir / name).unlink()
    train.main(tiny)
    assert without_time(read_log(tiny.run_dir)) == whole


def test_a_different_configuration_is_refused_and_nothing_is_overwritten(tiny, capsys):
    train.main(tiny)
    before = {p: p.read_bytes() for p in tiny.run_dir.iterdir() if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        train.main(replace(tiny, width=32, sigma=0.5, seed=1))
    message = capsys.readouterr().err
    assert "--seed 0 there, 1 now" in message
    assert (
        stopped.value.code == 2 and "--width 16 there, 32 now" in message and "--sigma" in message
    )
    for steps in (8, 6):
        train.main(replace(tiny, steps=steps))
        assert "is finished (8 steps)" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in tiny.run_dir.iterdir() if p.is_file()}
    for name in ("step_0000099.png", "mine.png"):
        (tiny.run_dir / "samples" / name).write_bytes(b"")
    train.main(replace(tiny, sigma=0.5), overwrite=True)
    assert train.load_checkpoint(tiny.run_dir / "model.pt").config.sigma == 0.5
    samples = {path.name for path in (tiny.run_dir / "samples").iterdir()}
    assert samples == {"step_0000008.png", "mine.png"}  # nothing of the earlier run is left


def test_the_baseline_trains_only_the_flow_on_a_frozen_autoencoder(tiny, tmp_path, capsys):
    train.main(tiny)
    init = str(tiny.run_dir / "model.pt")
    baseline = replace(tiny, gated=False, scale="softplus", freeze_autoencoder=True, init=init)
    baseline = replace(baseline, out=str(tmp_path / "baseline"))
    train.main(replace(baseline, steps=4))
    train.main(baseline)  # and goes on
    before, after = (train.load_checkpoint(r.run_dir / "model.pt") for r in (tiny, baseline))
    for part in ("encoder", "decoder"):
        assert_same(*(dict(getattr(m, part).state_dict()) for m in (before, after)))
    fresh = train.MIMFlow(baseline).flow.state_dict()
    assert any((after.flow.state_dict()[k] - fresh[k]).abs().max() > 0 for k in fresh)
    for wrong, message in {"init": "--init", "width": "--width 16"}.items():
        config = replace(baseline, out=str(tmp_path / "new"), **{wrong: {"width": 32}.get(wrong)})
        with pytest.raises(SystemExit) as stopped:
            train.main(config)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["flat", "classes", "ignored labels"])
def test_training_on_a_folder(tiny, tmp_path, layout):
    if layout == "flat":
        write_pictures(tmp_path / "data", 5)
    else:
        for name in ("cat", "dog", "owl"):
            write_pictures(tmp_path / "data" / name, 3, size=(40, 21))
    classes = 0 if layout == "ignored labels" else None
    train.main(replace(tiny, data=str(tmp_path / "data"), num_classes=classes, steps=3))
    model = train.load_checkpoint(tiny.run_dir / "model.pt")
    assert model.config.num_classes == (3 if layout == "classes" else 0)
    assert model.class_names == (() if layout == "flat" else ("cat", "dog", "owl"))


def test_a_run_does_not_go_on_with_other_classes(tiny, tmp_path, capsys):
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "data" / name, 3)
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=2)
    train.main(replace(config, steps=2))
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "cow")
    with pytest.raises(SystemExit):
        train.main(config)
    assert "was trained on other classes" in capsys.readouterr().err


# ------------------------------------------------------------- Teachers, perceptual loss, phase 2


CPU = torch.device("cpu")


def test_teachers_add_eq_7_and_learn_nothing_themselves(tiny):
    config = replace(tiny, teachers=("hog",), aux_width=8, teacher_weight=0.5, mim_weight=5.0)
    frozen = train.load_frozen_networks(config, CPU)
    training = randomize(train.JointTraining(train.MIMFlow(config), frozen)).eval()
    images, labels = batch_of(config, 4)
    draws = train.draw_randomness(config, 0, CPU).rows(0, 4)
    loss, logs, painted = training(images, labels, draws, 0.3)

    z = training.model.encoder(images, draws.mask) + config.sigma * draws.noise
    predicted, target = training.auxiliary["hog"](z), frozen.teachers["hog"](images)
    cosine = torch.nn.functional.cosine_similarity(predicted, target, dim=-1)
    masked = torch.stack([-cosine[i][draws.mask[i]].mean() for i in range(4)]).mean()
    torch.testing.assert_close(logs["aux_hog"], masked)
    pixel_weight = 1 + 4 * draws.mask.view(4, 1, 4, 1, 4, 1)  # 4 x 4 patches of 4 x 4 pixels
    square = (painted - images).square().view(4, 3, 4, 4, 4, 4)
    recon = (square * pixel_weight).mean()
    torch.testing.assert_close(loss, recon + 0.3 * logs["nll"] + 0.5 * masked)
    torch.testing.assert_close(logs["mse"], square.mean())  # without the weight

    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in training.auxiliary.parameters())
    held = {
        id(p)
        for group in train.make_optimizer(training, config).param_groups
        for p in group["params"]
    }
    assert held == {id(p) for p in training.parameters()}
    assert "hog" not in " ".join(training.model.state_dict())


def test_lpips_is_part_of_the_loss_and_of_no_optimizer(tiny):
    config = replace(tiny, perceptual_weight=1.1, vgg="random")
    frozen = train.load_frozen_networks(config, CPU)
    training = randomize(train.JointTraining(train.MIMFlow(config), frozen)).train()
    images, labels = batch_of(config, 2)
    draws = train.draw_randomness(config, 0, CPU).rows(0, 2)
    loss, logs, painted = training(images, labels, draws, 0.0)
    torch.testing.assert_close(logs["lpips"], frozen.perceptual(images, painted).mean())
    torch.testing.assert_close(loss, logs["mse"] + 1.1 * logs["lpips"])
    own = {id(p) for p in frozen.perceptual.parameters()}
    held = {
        id(p)
        for group in train.make_optimizer(training, config).param_groups
        for p in group["params"]
    }
    assert not own & held and not any(m.training for m in frozen.perceptual.modules())
    # The baseline paints nothing, and sampling needs no judge: neither looks for weight files.
    missing = replace(config, vgg="/nowhere", teachers=("dino",), freeze_autoencoder=True)
    assert train.load_frozen_networks(missing, CPU) == train.FrozenNetworks(None, {})


@pytest.fixture
def phase_two(tiny, tmp_path) -> train.Config:
    """A tiny phase 2 whose phase 1 is done; pictures of 24 pixels, the discriminator's smallest."""
    first = replace(tiny, image_size=24, steps=2, sample_every=100)
    train.main(first)
    init = str(first.run_dir / "model.pt")
    second = replace(first, phase="decoder", init=init, steps=8, lr=1e-3, lr_decay=0.0)
    return replace(second, out=str(tmp_path / "two"))


def test_decoder_and_discriminator_leave_each_other_alone(phase_two):
    model, judge = train.MIMFlow(phase_two), train.PatchDiscriminator()
    images, labels = batch_of(phase_two, 4)
    draws = train.draw_randomness(phase_two, 0, CPU).rows(0, 4)
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    loss, logs, painted = train.DecoderTraining(
        randomize(model), train.FrozenNetworks(None, {}), judge
    )(images, labels, draws, 0.0)
    loss.backward()
    torch.testing.assert_close(loss, logs["mse"] + 0.05 * logs["gan"])  # Eq. 8
    torch.testing.assert_close(logs["gan"], -judge(painted).mean())
    assert all(p.grad is None for p in judge.parameters())
    assert_same(before, dict(judge.state_dict()))  # nor any statistics of BatchNorm
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert all(p.grad is None for part in (model.encoder, model.flow) for p in part.parameters())

    gradients = [p.grad.clone() for p in model.decoder.parameters()]
    train.DiscriminatorTraining(judge)(images, painted)[0].backward()
    assert all(p.grad is not None for p in judge.parameters())
    assert_same(gradients, [p.grad for p in model.decoder.parameters()])


def test_phase_two_moves_the_decoder_only_and_resumes_to_the_bit(phase_two, tmp_path):
    train.main(phase_two)
    before, after = (
        train.load_checkpoint(p) for p in (phase_two.init, phase_two.run_dir / "model.pt")
    )
    for part in ("encoder", "flow"):
        assert_same(*(dict(getattr(m, part).state_dict()) for m in (before, after)))
    moved = zip(before.decoder.parameters(), after.decoder.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)

    stopped = replace(phase_two, out=str(tmp_path / "stopped"))
    train.main(replace(stopped, steps=3))
    os.unlink(phase_two.init)  # to go on, phase 1 is not needed any more
    train.main(stopped)
    whole, parts = (
        torch.load(run / "last.pt", weights_only=True)
        for run in (phase_two.run_dir, stopped.run_dir)
    )
    for key in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        assert_same(whole[key], parts[key])


@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_phase_two_is_the_plain_step_written_out(phase_two, clip):
    """One step in two parts; Adam's first moment is then a tenth of the gradient."""
    config = replace(phase_two, grad_accum=2, steps=1, grad_clip=clip)
    train.main(config)
    torch.manual_seed(config.seed)
    train.MIMFlow(config)  # takes its random numbers before the discriminator does
    judge, model = train.PatchDiscriminator(), train.load_checkpoint(config.init)
    batch = next(iter(train.StepSampler(50_000, 8, range(8), 0, 1, config.seed)))
    images = torch.stack([train.ShapesDataset(24)[key][0] for key in batch])
    draws = train.draw_randomness(config, 0, CPU)
    z = model.encoder(images, draws.mask) + config.sigma * draws.noise
    painted = model.decoder(z, draws.branch_scales).detach()
    logs = {"mse": (painted - images).square().mean().item(), "gan": 0.0, "discriminator": 0.0}
    logs |= {"logit_real": 0.0, "logit_fake": 0.0}
    for half in (slice(0, 4), slice(4, 8)):  # BatchNorm sees each half by itself
        real, fake = judge(images[half]), judge(painted[half])
        loss = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())  # hinge
        (loss / 2).backward()
        for name, value in zip(
            list(logs)[1:], (-fake.mean(), loss, real.mean(), fake.mean()), strict=True
        ):
            logs[name] += value.item() / 2
    found = read_log(config.run_dir)[-1]
    assert {name: found[name] for name in logs} == pytest.approx(logs, rel=1e-4, abs=1e-5)
    assert torch.nn.utils.clip_grad_norm_(judge.parameters(), clip) > 0.1
    saved = torch.load(config.run_dir / "last.pt", weights_only=True)["discriminator_optimizer"]
    assert saved["param_groups"][0]["lr"] == 0.5e-3  # half way through the warm-up
    expected = torch.cat([0.1 * parameter.grad.ravel() for parameter in judge.parameters()])
    moments = torch.cat([value["exp_avg"].ravel() for value in saved["state"].values()])
    assert (moments - expected).norm() < 1e-3 * expected.norm()


def test_if_one_player_has_no_finite_gradient_neither_moves(phase_two, monkeypatch):
    real, calls = train.discriminator_loss, []

    def poisoned(*logits):
        calls.append(1)
        return real(*logits) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(train, "discriminator_loss", poisoned)
    train.main(replace(phase_two, steps=2, save_every=1))
    before, after = (
        torch.load(phase_two.run_dir / name, weights_only=True)
        for name in ("previous.pt", "last.pt")
    )
    assert (before["step"], after["step"], after["skipped"]) == (1, 2, 1)
    for key in ("model", "discriminator"):
        assert_same(before[key], after[key])


def test_phase_two_without_a_discriminator(phase_two):
    train.main(replace(phase_two, gan_weight=0.0, steps=2))
    saved = torch.load(phase_two.run_dir / "last.pt", weights_only=True)
    assert "discriminator" not in saved and "gan" not in read_log(phase_two.run_dir)[-1]


def test_phase_two_refuses_another_model_and_names_the_flags(phase_two, capsys):
    wrong = {
        "--init": dict(init=None),
        "--flow-width 16": dict(flow_width=32),
        "--sigma 0.3": dict(sigma=0.5),
        "--mask-ratio 0.4 0.6": dict(mask_ratio=(0.0, 0.0)),
        "--heads 2": dict(heads=4),
        "--gated True": dict(gated=False),
        "--scale exp": dict(scale="softplus"),
        "choose one": dict(freeze_autoencoder=True),
        "the discriminator needs 24 pixels": dict(image_size=16),
    }
    for message, change in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            train.main(replace(phase_two, **change))
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not phase_two.run_dir.exists()


def test_phase_decides_folder_and_length():
    config, _ = train.parse_arguments(
        ["--preset", "mimflow-l", "--phase", "decoder", "--init", "x"]
    )
    assert (str(config.run_dir), config.epochs) == ("runs/mimflow-l-decoder", 2)
    assert config.teachers == ("dino", "clip") and config.perceptual_weight == 1.1  # Tab. 7
    config, _ = train.parse_arguments(["--preset", "starflow-l", "--phase", "decoder"])
    assert config.epochs == 2
    config, _ = train.parse_arguments(["--phase", "decoder", "--steps", "7", "--teachers"])
    assert config.steps == 7 and config.mask_warmup == 0 and config.teachers == ()


def test_both_phases_on_two_processes(run_script, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--image-size", 24, "--grad-accum", 2]
    first = [*flags, "--teachers", "hog", "--aux-width", 8, "--out", tmp_path / "one"]
    second = [*flags, "--phase", "decoder", "--init", tmp_path / "one" / "model.pt"]
    second += ["--out", tmp_path / "two"]
    for command, said in ((first, "aux_hog"), (second, "discriminator")):
        for steps in (2, 4):  # the second time it continues
            done = run_script("train.py", *command, "--steps", steps, processes=2)
            assert done.returncode == 0 and f"step {steps}/{steps}" in done.stdout, done.stderr
        assert "continuing" in done.stdout and said in read_log(command[-1])[-1]


def test_a_missing_weight_file_is_one_line(run_script, tiny_flags, tmp_path):
    flags = [*tiny_flags, "--out", tmp_path / "run"]
    done = run_script("train.py", *flags, "--teachers", "dino", "--dino", "no.pth")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no.pth" in done.stderr and "dinov2_vitb14_pretrain.pth" in done.stderr


# ---------------------------------------------------------------------- Files, and what goes wrong


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rubbish(tmp_path):
    path = tmp_path / "file"
    train.write_file(path, lambda stream: stream.write(b"old"))

    def broken(stream):
        stream.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        train.write_file(path, broken)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "empty", "text", "other", "newer", "odd"]
)
def test_a_bad_checkpoint_is_one_clear_line(tiny, damage, capsys):
    train.main(replace(tiny, steps=1))
    path = tiny.run_dir / "model.pt"
    content = path.read_bytes()
    checkpoint = torch.load(path, weights_only=True)
    if damage == "missing":
        path.unlink()
    elif damage in ("truncated", "empty", "text"):
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b""}.get(damage, b"hi")
        )
    elif damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "newer":
        torch.save({**checkpoint, "format": 99}, path)
    else:
        torch.save({**checkpoint, "config": {**checkpoint["config"], "width": 32}}, path)
    with pytest.raises(SystemExit) as stopped:
        train.load_checkpoint(path)
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and str(path) in message and message.count("\n") == 1


class Evil:
    """What a malicious checkpoint holds: unpickled, it would create the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_checkpoint_is_never_code(tmp_path, capsys):
    trap = tmp_path / "trap"
    torch.save({"format": 1, "config": {}, "model": Evil(str(trap))}, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        train.load_checkpoint(tmp_path / "model.pt")
    assert not trap.exists() and "could run code" in capsys.readouterr().err


BAD_FLAGS = {
    "unknown preset": (["--preset", "huge"], "unknown preset huge"),
    "data missing": (["--data", "/nowhere"], "no data folder /nowhere"),
    "patch": (["--image-size", "30"], "not divisible by patch size 4"),
    "batch": (["--grad-accum", "3"], "--batch-size 8 is not divisible"),
    "classes": (["--num-classes", "7"], "have 10: use 10"),
    "mask": (["--mask-ratio", "0.6", "0.4"], "--mask-ratio"),
    "abbreviation": (["--learning", "1"], "unrecognized arguments"),
    "heads": (["--heads", "3"], "--heads"),
    "lpips": (["--perceptual-weight", "1", "--image-size", "8"], "LPIPS needs pictures of 16"),
    "seed": (["--seed", "-1"], "--seed must not be negative"),
    "drop path": (["--drop-path", "1"], "--drop-path must be below 1"),
    "not finite": (["--sigma", "nan"], "--sigma must be a finite number"),
    "paper without data": (["--preset", "mimflow-l"], "used without --data"),
    "baseline": (["--freeze-autoencoder"], "--init"),
    "device": (["--device", "warp"], "device warp"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_one_clear_line(case, tiny_flags, tmp_path, capsys):
    extra, expected = BAD_FLAGS[case]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        config, _ = train.parse_arguments([*tiny_flags, "--steps", "1", "--out", str(out), *extra])
        train.main(config)
    message = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and message.count("\n") == 1
    assert expected in message and not out.exists()


def test_empty_and_useless_data_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no picture")
    write_pictures(tmp_path / "half" / "cat", 2)
    (tmp_path / "half" / "dog").mkdir()
    for name, expected in {"empty": "no pictures", "notes": "no pictures", "half": "dog"}.items():
        with pytest.raises(SystemExit):
            train.open_dataset(str(tmp_path / name), 16)
        assert expected in capsys.readouterr().err


def test_every_field_is_a_flag_and_presets_are_under_them():
    config, _ = train.parse_arguments(["--lr", "0.5", "--flow-depths", "1", "4", "--no-gated"])
    assert (config.lr, config.flow_depths, config.gated) == (0.5, (1, 4), False)
    assert config.preset == "shapes" and config.width == train.PRESETS["shapes"]["width"]
    paper, _ = train.parse_arguments(["--preset", "mimflow-l", "--mask-ratio", "0", "0"])
    assert paper.mask_ratio == (0.0, 0.0) and paper.epochs == 90 and paper.batch_size == 256
    for preset in train.PRESETS.values():
        assert preset.keys() <= {f.name for f in fields(train.Config)}


def test_command_line_as_a_user_types_it(run_script, tiny_flags, tmp_path):
    out = tmp_path / "run"
    flags = [*tiny_flags, "--out", out]
    dry = run_script("train.py", *flags, "--dry-run")
    assert dry.returncode == 0 and "encoder + decoder" in dry.stdout and not out.exists()
    first = run_script("train.py", *flags, "--steps", 2)
    assert first.returncode == 0 and "step 2/2" in first.stdout, first.stderr
    again = run_script("train.py", *flags, "--steps", 2)
    assert again.returncode == 0 and "is finished" in again.stdout
    longer = run_script("train.py", *flags, "--steps", 4)
    assert longer.returncode == 0 and "continuing" in longer.stdout
    other = run_script("train.py", *flags, "--steps", 4, "--width", 32)
    assert other.returncode == 2 and "--width 16 there, 32 now" in other.stderr


def test_check_data_lists_the_broken_files(run_script, tmp_path):
    write_pictures(tmp_path / "data" / "cat", 3)
    bad = tmp_path / "data" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    done = run_script("train.py", "--data", tmp_path / "data", "--check-data")
    assert done.returncode == 1 and str(bad) in done.stdout
    assert "3 pictures, 1 classes, 1 broken" in done.stdout
    stopped = run_script("train.py", "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert (
        stopped.returncode == 1 and str(bad) in stopped.stderr and "--check-data" in stopped.stderr
    )
