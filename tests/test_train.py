"""train.py: randomness, the model, both objectives, runs that continue or split exactly."""

import itertools
import json
import os
import subprocess
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    assert_same,
    last,
    launcher,
    randomize,
    read_log,
    without_time,
    write_pictures,
)

import losses
import train
from common.data import BrokenImage, FolderDataset, step_batches
from common.runs import InputError, find_checkpoint
from common.shapes import ShapesDataset

CPU = torch.device("cpu")
NOTHING = losses.FrozenNetworks(None, {})


def batch_of(config, count: int):
    dataset = ShapesDataset(config.image_size)
    images, labels = zip(*(dataset[i] for i in range(count)), strict=True)
    return torch.stack(images), torch.tensor(labels)


def parse(*flags: object) -> train.Config:
    return train.parse_arguments([str(flag) for flag in flags])[0]


def refused(config: train.Config, capsys, code: int = 2, **how: bool) -> str:
    """The line with which a run of `config` ends at once."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(config, **how)
    message = capsys.readouterr().err
    assert stopped.value.code == code and message.count("\n") == 1, message
    return message


def poison(monkeypatch, name: str, when) -> list[int]:
    """Make a loss nan in those of its calls (1, 2, ...) of which `when` is true."""
    real, calls = getattr(losses, name), []

    def poisoned(*inputs):
        calls.append(1)
        return real(*inputs) * (float("nan") if when(len(calls)) else 1.0)

    monkeypatch.setattr(losses, name, poisoned)
    return calls


# -------------------------------------------------------------------------------------- Randomness


def test_draws_repeat_differ_between_steps_and_rows_are_slices(tiny):
    draws = train.draw_randomness(tiny, 3, CPU)
    assert_same(list(draws), list(train.draw_randomness(tiny, 3, CPU)))
    assert not torch.equal(draws.noise, train.draw_randomness(tiny, 4, CPU).noise)
    part = draws.rows(2, 5)
    assert torch.equal(part.mask, draws.mask[2:5]) and torch.equal(part.noise, draws.noise[2:5])
    assert part.branch_scales.shape == (1, 2, 3)
    assert not torch.equal(draws.mask[0], draws.mask[1])
    many = replace(tiny, batch_size=4000, label_drop=0.25)
    assert abs(train.draw_randomness(many, 0, CPU).drop_label.float().mean() - 0.25) < 0.03


def test_mask_ratio_grows_and_draws_of_pictures_are_past_that(tiny):
    config = replace(tiny, mask_ratio=(0.5, 0.5), mask_warmup=10)
    hidden = [train.draw_randomness(config, s, CPU).mask.sum().item() for s in (0, 5, 10)]
    assert hidden == [0, 8 * 4, 8 * 8]
    draws = train.draws_of_pictures(config, [3, 5], 0, CPU)
    assert draws.mask.sum(dim=1).tolist() == [8, 8]
    assert_same(list(train.draws_of_pictures(config, [5], 0, CPU)), list(draws.rows(1, 2)))


def test_ramps_and_learning_rate():
    assert [train.ramp(s, 4) for s in (0, 2, 4, 9)] == [0, 0.5, 1, 1] and train.ramp(0, 0) == 1
    config = train.Config(lr=1.0, lr_warmup=2, lr_decay=0.5, steps=8)
    rates = [train.learning_rate(config, s) for s in range(8)]
    assert rates == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert train.learning_rate(train.Config(steps=100), 99) == 1e-4  # the paper: constant


def test_sample_noise_belongs_to_the_number_of_the_sample():
    whole = train.sample_noise(3, range(6), 4, 2)
    assert torch.equal(train.sample_noise(3, range(4, 6), 4, 2), whole[4:])
    assert len({row.sum().item() for row in whole}) == 6
    assert not torch.equal(train.sample_noise(4, range(6), 4, 2), whole)


# ------------------------------------------------------------------------------- Model, objectives


def test_the_log_is_float32_where_a_gpu_computes_in_bfloat16(tiny):
    images, labels = batch_of(tiny, 8)
    training = train.JointTraining(train.MIMFlow(tiny), NOTHING)
    with torch.autocast("cpu", torch.bfloat16):
        _, logs, _ = training(images, labels, train.draw_randomness(tiny, 0, CPU), 0.3)
    assert {x.dtype for x in logs.values()} == {torch.float32}


def test_forward_is_the_sum_of_the_named_terms(tiny):
    model = randomize(train.MIMFlow(replace(tiny, label_drop=0.5))).double()
    images, labels = batch_of(tiny, 8)
    draws = train.draw_randomness(tiny, 0, CPU)
    draws = draws._replace(noise=draws.noise.double(), branch_scales=draws.branch_scales.double())
    loss, logs, painted = train.JointTraining(model, NOTHING)(images.double(), labels, draws, 0.3)
    mu = model.encoder(images.double(), draws.mask)
    z = mu + 0.3 * draws.noise
    used = torch.where(draws.drop_label, -1, labels)
    nll = -model.flow.log_prob(z, used).mean() / 16 - 0.5 * np.log(2 * np.pi)
    mse = (model.decoder(z, draws.branch_scales) - images).square().mean()
    torch.testing.assert_close(logs["mse"], mse)
    torch.testing.assert_close(logs["nll"], nll)
    torch.testing.assert_close(loss, mse + 0.3 * nll)
    torch.testing.assert_close(logs["nll_square"] + logs["nll_logdet"], nll)
    assert logs["block_mean_square"].shape == (2,)
    torch.testing.assert_close(logs["block_mean_square"][-1], 2 * logs["nll_square"])
    spread = (mu - mu.mean(dim=0)).square().mean(dim=0).sqrt().mean()
    torch.testing.assert_close(logs["mu_std"], spread)


def test_teachers_add_eq_7_and_learn_nothing_themselves(tiny):
    config = replace(tiny, teachers=("hog",), aux_width=8, teacher_weight=0.5, mim_weight=5.0)
    frozen = losses.load_frozen_networks(config, CPU)
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
    torch.testing.assert_close(
        loss, (square * pixel_weight).mean() + 0.3 * logs["nll"] + 0.5 * masked
    )
    torch.testing.assert_close(logs["mse"], square.mean())  # without the weight

    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in training.auxiliary.parameters())
    assert held_by(train.Player(training, config)) == {id(p) for p in training.parameters()}
    assert "hog" not in " ".join(training.model.state_dict())


def held_by(player: train.Player) -> set[int]:
    """The parameters in an optimizer, each in one group."""
    held = [id(p) for group in player.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    return set(held)


def test_lpips_is_part_of_the_loss_and_of_no_optimizer(tiny):
    config = replace(tiny, perceptual_weight=1.1, vgg="random")
    frozen = losses.load_frozen_networks(config, CPU)
    training = randomize(train.JointTraining(train.MIMFlow(config), frozen)).train()
    images, labels = batch_of(config, 2)
    draws = train.draw_randomness(config, 0, CPU).rows(0, 2)
    loss, logs, painted = training(images, labels, draws, 0.0)
    torch.testing.assert_close(logs["lpips"], frozen.perceptual(images, painted).mean())
    torch.testing.assert_close(loss, logs["mse"] + 1.1 * logs["lpips"])
    own = {id(p) for p in frozen.perceptual.parameters()}
    assert not own & held_by(train.Player(training, config))
    assert not any(m.training for m in frozen.perceptual.modules())
    # The baseline paints nothing, and sampling needs no judge: neither looks for weight files.
    missing = replace(config, vgg="/nowhere", teachers=("dino",), freeze_autoencoder=True)
    assert losses.load_frozen_networks(missing, CPU) == NOTHING
    # Phase 2 has no teachers.
    missing = replace(tiny, dino="/nowhere", teachers=("dino",), phase="decoder")
    assert losses.load_frozen_networks(missing, CPU) == NOTHING


def test_every_parameter_gets_a_gradient_and_is_in_the_optimizer(tiny):
    config = replace(tiny, mask_ratio=(0.0, 0.0))  # which must not leave the mask token out
    model = train.MIMFlow(config)
    (player,) = train.make_players(model, NOTHING, CPU)
    train.accumulate_gradients([player], config, *batch_of(config, 8), 0)
    assert all(p.grad is not None for p in model.parameters())
    assert held_by(player) == {id(p) for p in model.parameters()}
    group = player.optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8


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
    config = replace(tiny, width=32, num_latents=8, drop_path=0.0)
    training = train.JointTraining(train.MIMFlow(config), NOTHING)
    images, labels = batch_of(config, 8)
    optimizer = torch.optim.AdamW(training.parameters(), 3e-3)
    draws, found = train.draw_randomness(config, 0, CPU), []
    for _ in range(120):
        loss, logs, _ = training(images, labels, draws, 0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((logs["mse"].item(), logs["nll"].item()))
    assert found[-1][0] < 0.15 * found[0][0] and found[-1][1] < found[0][1]


def test_a_fresh_model_samples_finite_pictures(tiny):
    for classes in (10, 0):
        model = train.MIMFlow(replace(tiny, num_classes=classes)).eval()
        noise = train.sample_noise(0, range(4), 4, 4)
        images = model.sample(noise, torch.tensor([0, 1, 2, -1]), guidance=2.0)
        assert images.shape == (4, 3, 16, 16) and images.isfinite().all()


# -------------------------------------------------------------------------------------- Whole runs


def test_a_run_writes_what_it_promises(tiny, monkeypatch, capsys):
    seconds = itertools.count()  # one between two looks at the clock
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(seconds)))
    train.main(replace(tiny, steps=7))
    run = tiny.run_dir
    names = {path.name for path in run.iterdir()}
    checkpoints = {"last.pt", "previous.pt", "model.pt"}
    assert names == {".lock", "config.json", "log.jsonl", "samples"} | checkpoints
    assert [p.name for p in (run / "samples").iterdir()] == ["step_0000007.png"]
    assert json.loads((run / "config.json").read_text())["latent_dim"] == 4
    lines = read_log(run)
    times = [(line["step"], line["ms_per_step"]) for line in lines]
    assert times == [(2, 500), (4, 500), (6, 500), (7, 1000)]
    wanted = {"loss", "mse", "nll", "nll_square", "nll_logdet", "block_mean_square", "mu_std", "lr"}
    assert wanted | {"grad_norm", "skipped"} <= lines[0].keys()
    assert len(lines[0]["block_mean_square"]) == 2
    model = train.load_checkpoint(run / "model.pt")
    assert model.step == last(run)["step"] == 7 and model.class_names[:2] == ("circle", "square")
    assert not model.training and model.config.latent_dim == 4
    for name in ("model.pt", "last.pt"):
        weights = train.load_checkpoint(run / name).state_dict()
        assert_same(dict(weights), dict(last(run)["ema"]))
    assert "done" in capsys.readouterr().out


def test_a_run_is_the_plain_loop_written_out(tiny, tmp_path):
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "data" / name, 5)
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=2, seed=3, steps=4, log_every=1)
    train.main(config)  # nll_warmup 4, lr_warmup 2, lr_decay 0.5

    torch.manual_seed(3)
    model = train.MIMFlow(config)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    training = train.JointTraining(model, NOTHING)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    dataset = FolderDataset(config.data, 16, "train", 3)
    batches, lines = step_batches(10, 8, range(8), range(4), 3), read_log(config.run_dir)
    lr_and_nll = ((0.001, 0), (0.002, 0.0025), (0.002, 0.005), (0.001, 0.0075))
    for step, (batch, (lr, weight)) in enumerate(zip(batches, lr_and_nll, strict=True)):
        images, labels = zip(*(dataset[key] for key in batch), strict=True)
        draws = train.draw_randomness(config, step, CPU)
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
    saved = last(config.run_dir)
    for part, found in ((model.state_dict(), saved["model"]), (average, saved["ema"])):
        for name, value in part.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_grids_are_of_the_moving_average_guided_a_row_a_class(tiny, monkeypatch):
    grids = {}

    def keep(images, columns, path):
        grids[path.name] = (images, columns)

    monkeypatch.setattr(train.data, "save_png", keep)
    config = replace(tiny, lr=0.05, steps=5, sample_every=3, guidance=3.0)
    train.main(config)
    assert list(grids) == ["step_0000003.png", "step_0000005.png"]  # the last step, too
    model = train.load_checkpoint(config.run_dir / "model.pt")
    noise, labels = train.sample_noise(0, range(80), 4, 4), torch.arange(80) // 8
    images, columns = grids["step_0000005.png"]
    expected = model.sample(noise, labels, 3.0)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert columns == 8 and (expected - model.sample(noise, labels)).abs().max() > 1e-4


def test_resumed_equals_uninterrupted_to_the_bit(tiny, tmp_path):
    config = replace(tiny, lr_decay=0.0, label_drop=0.3)
    train.main(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    train.main(replace(stopped, steps=5, save_every=5))
    with open(tmp_path / "stopped" / "log.jsonl", "a") as log:  # as if killed after logging step 6
        log.write('{"step": 6}\n{"step": 7, "lo')
    train.main(stopped)
    whole, parts = last(tiny.run_dir), last(stopped.run_dir)
    for key in ("model", "ema", "optimizer", "step"):
        assert_same(whole[key], parts[key])
    wanted = without_time(read_log(tiny.run_dir))
    resumed = without_time(read_log(stopped.run_dir))
    assert [line for line in resumed if line["step"] != 5] == wanted


def test_gradient_accumulation_is_the_same_step(tiny, tmp_path, float64):
    for parts in (1, 4):
        train.main(replace(tiny, grad_accum=parts, out=str(tmp_path / str(parts))))
    one, four = (last(tmp_path / n)["model"] for n in ("1", "4"))
    assert max((one[k] - four[k]).abs().max() for k in one) < 1e-9


def test_compiled_training_takes_the_same_steps(tiny, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile, but without its code generator, which takes a
    minute."""
    compiled, calls = torch.compile, []

    def trace(module):
        calls.append(module)
        return compiled(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace)
    for name in ("plain", "compiled"):
        assert not calls
        train.main(replace(tiny, steps=4, out=str(tmp_path / name), compile=name == "compiled"))
    assert len(calls) == 1
    one, two = (last(tmp_path / n, "model.pt")["model"] for n in ("plain", "compiled"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-5)


RUN_IN_FLOAT64 = """
import sys, torch, train
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
train.main(train.parse_arguments(sys.argv[1:])[0])
"""


EMIGM = "--prior emigm --freeze-autoencoder --emigm-width 16 --emigm-heads 2 --emigm-depths 1 1 "
EMIGM += "--emigm-buffer 2 --emigm-head 16 1 --init"


@pytest.mark.parametrize("prior", ["flow", "emigm"])
def test_two_processes_equal_one_and_may_take_over(prior, tiny_flags, tmp_path, float64):
    flags = [*tiny_flags, "--drop-path", "0.2", "--lr-decay", "0", "--num-workers", "0"]
    if prior == "flow":
        flags += ["--teachers", "hog", "--aux-width", "8"]
    else:
        train.main(parse(*flags, "--steps", 1, "--out", tmp_path / "base"))
        flags += [*EMIGM.split(), tmp_path / "base/model.pt"]
    script = tmp_path / "run64.py"
    script.write_text(RUN_IN_FLOAT64)
    train.main(parse(*flags, "--steps", 6, "--out", tmp_path / "one"))
    flags += ["--out", str(tmp_path / "two")]
    train.main(parse(*flags, "--steps", 2))  # one hands over to two, and they to one
    two = [*launcher(2), str(script), *flags, "--steps", "4", "--grad-accum", "2"]
    how = dict(env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = subprocess.run(two, timeout=240, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1 and "continuing" in done.stdout  # only rank 0 speaks
    train.main(parse(*flags, "--steps", 6))
    one, two = last(tmp_path / "one"), last(tmp_path / "two")
    for part in ("model", "ema", "auxiliary"):
        assert all((one[part][k] - two[part][k]).abs().max() < 1e-9 for k in one[part])
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", *(["aux_hog"] if prior == "flow" else [])):
            assert abs(a[name] - b[name]) < 1e-9


def test_a_process_that_would_start_elsewhere_is_noticed(tiny, monkeypatch, capsys):
    """As if another process had found step 3, in a run folder that is not shared."""

    def all_gather_object(steps, own):
        steps[:] = own, 3

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert "processes found last.pt at steps [0, 3]" in refused(tiny, capsys, 1)
    assert [path.name for path in tiny.run_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("layout", ["flat", "classes", "ignored labels"])
def test_training_on_a_folder(tiny, tmp_path, layout, capsys):
    names = () if layout == "flat" else ("cat", "dog", "owl")
    for name in names or ("",):
        write_pictures(tmp_path / "data" / name, 3, size=(40, 21))
    classes = 0 if layout == "ignored labels" else None
    config = replace(tiny, data=str(tmp_path / "data"), num_classes=classes, steps=3)
    train.main(config)
    model = train.load_checkpoint(tiny.run_dir / "model.pt")
    assert model.config.num_classes == (3 if layout == "classes" else 0)
    assert model.class_names == names
    if layout == "classes":  # it does not go on with others
        (tmp_path / "data" / "dog").rename(tmp_path / "data" / "cow")
        assert "was trained on other classes" in refused(replace(config, steps=4), capsys, 1)


# ------------------------------------------------------------------------- Gradients not finite


def test_a_non_finite_gradient_is_skipped_counted_and_named(tiny, monkeypatch, capsys):
    poison(monkeypatch, "pixel_loss", lambda call: call in (3, 8))
    train.main(tiny)
    printed = capsys.readouterr().out
    assert "step 3: gradient is not finite" in printed and "skipped (2 so far)" in printed
    saved = last(tiny.run_dir)  # at the end even after a skipped step
    assert read_log(tiny.run_dir)[-1]["skipped"] == saved["skipped"] == 2 and saved["step"] == 8
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_ten_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(tiny, monkeypatch, capsys):
    calls = poison(monkeypatch, "pixel_loss", lambda call: call > 5)
    message = refused(replace(tiny, steps=40), capsys, 1)
    assert "10 non-finite gradients in a row at step 15" in message and len(calls) == 15
    kept = last(tiny.run_dir)
    assert kept["step"] == 4 and all(v.isfinite().all() for v in kept["model"].values())


def test_many_skipped_steps_not_in_a_row_stop_nothing_and_are_counted_on(tiny, monkeypatch):
    poison(monkeypatch, "pixel_loss", lambda call: call % 2)
    for steps in (4, 24):  # the second time it goes on
        train.main(replace(tiny, steps=steps))
        assert read_log(tiny.run_dir)[-1]["skipped"] == steps // 2


# ----------------------------------------------------------------- The run folder and what is in it


def test_overwrite_deletes_nothing_in_vain(tiny, capsys):
    train.main(tiny)
    for wrong in (dict(seed=-1), dict(data="/nowhere"), dict(sigma=float("nan"))):
        refused(replace(tiny, **wrong), capsys, 1 if "data" in wrong else 2, overwrite=True)
    assert last(tiny.run_dir)["step"] == 8


def test_a_run_killed_before_its_first_save_starts_its_log_again(tiny):
    train.main(tiny)
    whole = without_time(read_log(tiny.run_dir))
    for name in ("last.pt", "previous.pt", "model.pt"):
        (tiny.run_dir / name).unlink()
    train.main(tiny)
    assert without_time(read_log(tiny.run_dir)) == whole


def test_a_finished_run_shares_its_model_again(tiny):
    """A kill may have come between the two files of the last save."""
    train.main(tiny)
    path = tiny.run_dir / "model.pt"
    whole = last(tiny.run_dir, "model.pt")
    path.unlink()
    train.main(tiny)
    assert_same(last(tiny.run_dir, "model.pt"), whole)
    torch.save({**whole, "step": 4}, path)
    train.main(tiny)
    assert_same(last(tiny.run_dir, "model.pt"), whole)


def test_a_different_configuration_is_refused_and_nothing_is_overwritten(tiny, capsys):
    train.main(tiny)
    before = {p: p.read_bytes() for p in tiny.run_dir.iterdir() if p.is_file()}
    message = refused(replace(tiny, width=32, sigma=0.5, seed=1), capsys)
    for part in ("--width 16 there, 32 now", "--sigma 0.3 there, 0.5 now", "--seed 0 there, 1 now"):
        assert part in message
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
    new = replace(baseline, out=str(tmp_path / "new"))
    assert "--init" in refused(replace(new, init=None), capsys)
    assert "--width 16" in refused(replace(new, width=32), capsys)


def test_the_second_prior_is_told_mean_and_std_of_latents_throughout_the_data(tiny, monkeypatch):
    """Of noisy ones (Eq. 1); class folders are sorted by class, so the first are of one."""
    config = replace(tiny, prior="emigm", emigm_width=16, emigm_heads=2, emigm_depths=(1, 1))
    model = train.MIMFlow(config)
    monkeypatch.setattr(train, "FITTED", 3)
    train.fit_prior(model, CPU)
    numbers = (0, 16_666, 33_332, 49_998)  # every 50,000 / 3
    images = torch.stack([ShapesDataset(16)[number][0] for number in numbers])
    draws = train.draws_of_pictures(config, numbers, config.seed, CPU)
    z = model.encoder(images, draws.mask) + config.sigma * draws.noise
    torch.testing.assert_close(model.emigm.mean, z.mean(dim=0))
    torch.testing.assert_close(model.emigm.std, z.std(dim=0))


def test_the_second_prior_passes_over_a_picture_that_cannot_be_read(tiny, tmp_path):
    write_pictures(tmp_path / "data" / "cat", 3)
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"broken")
    sizes = dict(emigm_width=16, emigm_heads=2, emigm_depths=(1, 1))
    config = replace(tiny, prior="emigm", data=str(tmp_path / "data"), num_classes=1, **sizes)
    with pytest.raises(BrokenImage, match="1.png"):
        train.fit_prior(train.MIMFlow(config), CPU)
    model = train.MIMFlow(replace(config, skip_bad_images=True))
    train.fit_prior(model, CPU)  # of 0, 2, 2
    assert model.emigm.std.isfinite().all() and (model.emigm.mean != 0).all()


def test_a_small_preset_has_a_small_second_prior():
    for name in train.DECODER_PHASE.keys() - {"mimflow-l", "captions"}:  # which it does not read
        config = train.preset_config(name, prior="emigm", num_classes=10)
        with torch.device("meta"):
            assert train.count_parameters(train.MIMFlow(config).emigm) < 1e6, name


# ----------------------------------------------------------------------------------------- Phase 2


@pytest.fixture
def phase_two(tiny, tmp_path) -> train.Config:
    """A tiny phase 2 whose phase 1 is done; pictures of 24 pixels, the discriminator's smallest."""
    first = replace(tiny, image_size=24, steps=2, sample_every=100)
    train.main(first)
    init = str(first.run_dir / "model.pt")
    second = replace(first, phase="decoder", init=init, steps=8, lr=1e-3, lr_decay=0.0)
    return replace(second, out=str(tmp_path / "two"))


def test_decoder_and_discriminator_leave_each_other_alone(phase_two):
    model, judge = train.MIMFlow(phase_two), losses.PatchDiscriminator()
    images, labels = batch_of(phase_two, 4)
    draws = train.draw_randomness(phase_two, 0, CPU).rows(0, 4)
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    training = train.DecoderTraining(randomize(model), NOTHING, judge)
    loss, logs, painted = training(images, labels, draws, 0.0)
    loss.backward()
    torch.testing.assert_close(loss, logs["mse"] + 0.05 * logs["gan"])  # Eq. 8
    torch.testing.assert_close(logs["gan"], -judge(painted).mean())
    assert all(p.grad is None for p in judge.parameters())
    assert_same(before, dict(judge.state_dict()))  # nor any statistics of BatchNorm
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert all(p.grad is None for part in (model.encoder, model.flow) for p in part.parameters())

    gradients = [p.grad.clone() for p in model.decoder.parameters()]
    losses.DiscriminatorTraining(judge)(images, painted)[0].backward()
    assert all(p.grad is not None for p in judge.parameters())
    assert_same(gradients, [p.grad for p in model.decoder.parameters()])


def test_phase_two_moves_the_decoder_only_and_resumes_to_the_bit(phase_two, tmp_path):
    phase_two = replace(phase_two, steps=4)
    train.main(phase_two)
    first, second = phase_two.init, phase_two.run_dir / "model.pt"
    before, after = train.load_checkpoint(first), train.load_checkpoint(second)
    for part in ("encoder", "flow"):
        assert_same(*(dict(getattr(m, part).state_dict()) for m in (before, after)))
    moved = zip(before.decoder.parameters(), after.decoder.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)

    stopped = replace(phase_two, out=str(tmp_path / "stopped"))
    train.main(replace(stopped, steps=2))
    os.unlink(phase_two.init)  # to go on, phase 1 is not needed any more
    train.main(stopped)
    whole, parts = last(phase_two.run_dir), last(stopped.run_dir)
    for key in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        assert_same(whole[key], parts[key])


@pytest.mark.parametrize("clip", [1e9, 0.1])
def test_phase_two_is_the_plain_step_written_out(phase_two, clip):
    """One step in two parts; Adam's first moment is then a tenth of the gradient."""
    config = replace(phase_two, grad_accum=2, steps=1, grad_clip=clip)
    train.main(config)
    torch.manual_seed(config.seed)
    train.MIMFlow(config)  # takes its random numbers before the discriminator does
    judge, model = losses.PatchDiscriminator(), train.load_checkpoint(config.init)
    batch = next(iter(step_batches(50_000, 8, range(8), range(1), config.seed)))
    images = torch.stack([ShapesDataset(24)[key][0] for key in batch])
    draws = train.draw_randomness(config, 0, CPU)
    z = model.encoder(images, draws.mask) + config.sigma * draws.noise
    painted = model.decoder(z, draws.branch_scales).detach()
    logs = {"mse": (painted - images).square().mean().item(), "gan": 0.0, "discriminator": 0.0}
    logs |= {"logit_real": 0.0, "logit_fake": 0.0}
    for half in (slice(0, 4), slice(4, 8)):  # BatchNorm sees each half by itself
        real, fake = judge(images[half]), judge(painted[half])
        loss = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())  # hinge
        (loss / 2).backward()
        means = (-fake.mean(), loss, real.mean(), fake.mean())
        for name, value in zip(list(logs)[1:], means, strict=True):
            logs[name] += value.item() / 2
    found = read_log(config.run_dir)[-1]
    assert {name: found[name] for name in logs} == pytest.approx(logs, rel=1e-4, abs=1e-5)
    painter = last(config.run_dir)["optimizer"]["state"].values()  # whose gradient the log is about
    norm = torch.cat([10 * value["exp_avg"].ravel() for value in painter]).norm().item()
    assert norm == pytest.approx(min(clip, found["grad_norm"]), rel=1e-3)
    assert torch.nn.utils.clip_grad_norm_(judge.parameters(), clip) > 0.1
    saved = last(config.run_dir)["discriminator_optimizer"]
    assert saved["param_groups"][0]["lr"] == 0.5e-3  # half way through the warm-up
    expected = torch.cat([0.1 * parameter.grad.ravel() for parameter in judge.parameters()])
    moments = torch.cat([value["exp_avg"].ravel() for value in saved["state"].values()])
    assert (moments - expected).norm() < 1e-3 * expected.norm()


def test_if_one_player_has_no_finite_gradient_neither_moves(phase_two, monkeypatch):
    poison(monkeypatch, "discriminator_loss", lambda call: call == 2)
    train.main(replace(phase_two, steps=2, save_every=1))
    before, after = last(phase_two.run_dir, "previous.pt"), last(phase_two.run_dir)
    assert (before["step"], after["step"], after["skipped"]) == (1, 2, 1)
    for key in ("model", "discriminator"):
        assert_same(before[key], after[key])


def test_phase_two_without_a_discriminator(phase_two):
    train.main(replace(phase_two, gan_weight=0.0, steps=2))
    assert "discriminator" not in last(phase_two.run_dir)
    assert "gan" not in read_log(phase_two.run_dir)[-1]


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
        assert message in refused(replace(phase_two, **change), capsys)
    assert not phase_two.run_dir.exists()


def test_phase_two_goes_on_with_two_processes(phase_two, run_script):
    train.main(replace(phase_two, steps=2))
    before = last(phase_two.run_dir)
    flags, preset = ["--phase", "decoder"], parse("--phase", "decoder")
    for name, value in vars(phase_two).items():
        if value != getattr(preset, name):
            flags += [train.flag(name), *(value if isinstance(value, tuple) else (value,))]
    done = run_script("train.py", *flags, "--steps", 4, "--grad-accum", 2, processes=2)
    assert done.returncode == 0 and "step 4/4" in done.stdout, done.stderr
    assert "continuing" in done.stdout and "discriminator" in read_log(phase_two.run_dir)[-1]
    after = last(phase_two.run_dir)
    for part in ("model", "discriminator"):
        assert any(not torch.equal(before[part][k], after[part][k]) for k in before[part])


# ------------------------------------------------------------------------------------ Command line


def test_phase_decides_folder_and_length():
    config = parse("--preset", "mimflow-l", "--phase", "decoder", "--init", "x")
    assert (str(config.run_dir), config.epochs) == ("runs/mimflow-l-decoder", 2)
    assert config.teachers == ("dino", "clip") and config.perceptual_weight == 1.1  # Tab. 7
    config = parse("--phase", "decoder", "--steps", 7, "--teachers")
    assert config.steps == 7 and config.mask_warmup == 0 and config.teachers == ()


BAD_FLAGS = {  # more are in test_hostile.py
    "--preset huge": "invalid choice: 'huge'",
    "--learning 1": "unrecognized arguments",
    "--image-size 30": "not divisible by patch size 4",
    "--grad-accum 3": "--batch-size 8 is not divisible",
    "--num-classes 7": "have 10: use 10",
    "--drop-path 1": "--drop-path must be",
    "--perceptual-weight 1 --image-size 8": "LPIPS needs pictures of 16",
    "--preset mimflow-l --batch-size 8": "used without --data",
    "--freeze-autoencoder": "add --init",
    "--teachers hog hog": "once at most",
    "--teachers hog no.pt": "no.pt: choose each of dino, clip, hog, FILE",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_clear_line(flags, tiny_flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(parse(*tiny_flags, "--steps", 1, "--out", tmp_path / "run", *flags.split()))
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert BAD_FLAGS[flags] in message and not (tmp_path / "run").exists()


def test_a_missing_weight_file_is_one_line(tiny):
    with pytest.raises(InputError, match="no.pth.*dinov2_vitb14_pretrain.pth") as missing:
        train.main(replace(tiny, teachers=("dino",), dino="no.pth"))
    assert "\n" not in str(missing.value) and not tiny.run_dir.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_teacher_of_ones_own_is_a_torchscript_file(tiny, tmp_path):
    """HOG, traced into a file, teaches what HOG teaches; each file has decoders of its own."""
    hog = losses.HOG(tiny.grid)
    example = torch.zeros(2, 3, tiny.image_size, tiny.image_size)
    (tmp_path / "a.b").mkdir()
    files = [str(tmp_path / name) for name in ("train.pt", "a.b/train.pt")]
    for file in files:
        torch.jit.trace(hog, example).save(file)
    logs = []
    for teachers in (("hog", files[0]), files):
        config = replace(tiny, teachers=tuple(teachers), aux_width=8)
        frozen = losses.load_frozen_networks(config, CPU)
        training = train.JointTraining(train.MIMFlow(config), frozen)
        images, labels = batch_of(config, 4)
        for one in frozen.teachers.values():
            torch.testing.assert_close(one(images), hog(images), atol=1e-5, rtol=1e-4)
            assert one.width == 108
        draws = train.draw_randomness(config, 0, CPU).rows(0, 4)
        logs.append(training(images, labels, draws, 0.3)[1])
        assert len([name for name in logs[-1] if name.startswith("aux_")]) == 2
    train.main(replace(tiny, teachers=(files[1],), aux_width=8, steps=2))
    assert "aux_file" in (tiny.run_dir / "log.jsonl").read_text()


class OwnTeacher(torch.nn.Module):
    """Features (B, N + more, 5), or with as many more: an error of its own."""

    def __init__(self, more: int):
        super().__init__()
        self.more = more

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 16 + self.more, 5).view(len(images), -1, 5 + self.more // 9)


class OneForAll(torch.nn.Module):
    """Features (1, N, 5) for however many pictures."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 16, 5)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize(
    "own, complaint",
    [
        (OwnTeacher(1), r"gives \(2, 17, 5\) .* not \(2, 16, channels\)"),
        (OwnTeacher(9), "no TorchScript"),
        (OneForAll(), r"gives \(1, 16, 5\)"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(own, complaint, tiny, tmp_path):
    file = tmp_path / "own.pt"
    torch.jit.script(own).save(str(file))
    for path, said in {file: complaint, __file__: "no TorchScript"}.items():
        with pytest.raises(InputError, match=said) as refused:
            train.main(replace(tiny, teachers=(str(path),)))
        assert "\n" not in str(refused.value) and not tiny.run_dir.exists()


def test_every_field_is_a_flag_and_presets_are_under_them():
    config = parse("--lr", 0.5, "--flow-depths", 1, 4, "--no-gated")
    assert (config.lr, config.flow_depths, config.gated) == (0.5, (1, 4), False)
    assert config.preset == "shapes" and config.width == train.PRESETS["shapes"]["width"]
    paper = parse("--preset", "mimflow-l", "--mask-ratio", 0, 0)
    assert paper.mask_ratio == (0.0, 0.0) and paper.epochs == 90 and paper.batch_size == 256
    for preset in train.PRESETS.values():
        assert preset.keys() <= {f.name for f in fields(train.Config)}
    config = replace(config, steps=None, epochs=1.5)
    assert train.resolve(config)[0].steps == round(1.5 * 50_000 / 16)


def command(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    train.command_line()


def test_paper_scale_parameters_are_the_papers(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--preset", "mimflow-l", "--dry-run")
    printed = capsys.readouterr().out
    assert "mask_ratio" in printed and not list(tmp_path.iterdir())
    counts = {
        line.split()[0]: int(line.split()[1].replace(",", ""))
        for line in printed.splitlines()
        if line.endswith(" parameters")
    }
    assert abs((counts["encoder"] + counts["decoder"]) / 172.0e6 - 1) < 0.01  # Tab. 2
    assert abs(counts["flow"] / 474.8e6 - 1) < 0.005  # what the text of Sec. 4.1.2 gives


def test_command_line_as_a_user_types_it(run_script, tiny_flags, tmp_path, monkeypatch, capsys):
    flags = [*tiny_flags, "--out", tmp_path / "run"]
    first = run_script("train.py", *flags, "--steps", 2)
    assert first.returncode == 0 and "step 2/2" in first.stdout, first.stderr
    command(monkeypatch, *flags, "--steps", 4)
    assert "continuing" in capsys.readouterr().out
    command(monkeypatch, *flags, "--steps", 4)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(monkeypatch, "--check-data", "--data", "/nowhere")
    assert "no data folder /nowhere" in capsys.readouterr().err


def test_the_newest_model_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, when in (("a", 30), ("b", 50), ("c", 40)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.pt").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "model.pt", (when, when))
    assert str(find_checkpoint(None)) == os.path.join("runs", "b", "model.pt")
