"""evaluate.py: every number against an independent computation, and the command lines."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize, write_pictures
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

import evaluate
import sample
import spectral
import train
from common import measuring, runs, weights
from common.data import BrokenImage, PictureSet, adm_crop, open_dataset
from common.runs import file_sha256
from common.shapes import SHAPES, to_uint8

CPU = torch.device("cpu")
PROTOCOL = {"command", "device", "processes", "torch", "numpy", "scipy", "python"}


@pytest.fixture
def checkpoint(tiny):
    """A model.pt of random, non-zero weights."""
    return write_checkpoint(tiny, randomize(train.MIMFlow(tiny, SHAPES)))


def write_checkpoint(config, model):
    path = config.run_dir / "model.pt"
    path.parent.mkdir(parents=True)
    content = dict(format=1, step=3, config=asdict(config), model=model.state_dict())
    torch.save({**content, "class_names": list(model.class_names)}, path)
    return path


def run(*arguments) -> dict:
    """What the JSON file holds after a command, in this process."""
    arguments = [str(a) for a in arguments]
    target = ["--json", "out.json"] if "--json" not in arguments else []
    flags = evaluate.parse_arguments([*arguments, "--device", "cpu", *target])
    evaluate.main(flags)
    numbers = json.loads(flags.json.read_text())
    assert numbers["protocol"].keys() >= PROTOCOL
    return numbers


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, size, size, 3), each of another colour and contrast, so that they differ."""
    rng = np.random.default_rng(seed)
    colour, contrast = rng.uniform(0, 255, (count, 1, 1, 3)), rng.uniform(5, 120, (count, 1, 1, 1))
    noise = contrast * rng.standard_normal((count, size, size, 3))
    return (colour + noise).clip(0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------
# The formulas


def nuclear_norm_fid(a: np.ndarray, b: np.ndarray) -> float:
    """FID from features: with S = A^T A, tr (S1 S2)^(1/2) is the nuclear norm of A1 A2^T."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    rows = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    cross = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in rows) - 2 * cross


@pytest.mark.parametrize("count", [10, 300])  # fewer and more rows than numbers
def test_frechet_distance_is_the_nuclear_norm_form_and_that_of_torch_fidelity(count):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((count, 40)) @ rng.standard_normal((40, 40)) + 1
    b = rng.standard_normal((count + 3, 40)) @ rng.standard_normal((40, 40))
    ours = evaluate.frechet_distance(*evaluate.moments(a), *evaluate.moments(b))
    assert ours == pytest.approx(nuclear_norm_fid(a, b), rel=1e-6)
    theirs = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-4)  # of a singular product their root is inexact
    assert abs(evaluate.frechet_distance(*evaluate.moments(a), *evaluate.moments(a))) < 1e-5 * ours


def test_moments_in_blocks_are_numpys_also_far_from_the_origin(monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    x = (1000 + np.random.default_rng(0).standard_normal((50, 6))).astype(np.float32)
    mean, covariance = evaluate.moments(x)
    exact = x.astype(np.float64)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(exact, rowvar=False), rtol=1e-10, atol=1e-12)


class LogitsAsTheyAre(nn.Module):
    """Pool features that are logits already."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def logits(self, pool):
        return pool


def test_inception_score_by_hand_with_a_short_last_split(monkeypatch):
    monkeypatch.setattr(evaluate, "SCORE_SPLIT", 5)
    logits = 2 * torch.randn(12, 9)
    p = logits.softmax(dim=1).double().numpy()
    scores = []
    for rows in (p[:5], p[5:10], p[10:]):
        total = sum((q * np.log(q / rows.mean(0))).sum() for q in rows)
        scores.append(math.exp(total / len(rows)))
    ours = evaluate.inception_score(LogitsAsTheyAre(), logits)
    assert ours == pytest.approx(np.mean(scores), rel=1e-5)


def test_inception_score_survives_probabilities_of_zero():
    sure = 1e4 * torch.eye(4)
    assert evaluate.inception_score(LogitsAsTheyAre(), sure) == pytest.approx(4)
    assert evaluate.inception_score(LogitsAsTheyAre(), sure[:1]) == pytest.approx(1)


def brute_force(samples, reference):
    """Precision and recall from all distances at once, k = 3."""

    def distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1)

    def covered(points, centres):
        radius = np.sort(distances(centres, centres), axis=1)[:, 3]
        return (distances(points, centres) <= radius).any(axis=1).mean()

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("kind", ["real", "integer", "far"])
def test_precision_and_recall_are_brute_force_exactly(kind, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 16)
    rng = np.random.default_rng(3)
    reference, samples = rng.standard_normal((90, 6)), 1.3 * rng.standard_normal((70, 6)) + 0.7
    if kind == "integer":  # distances tie exactly, so that <= and < differ; and duplicates
        reference, samples = np.round(reference), np.round(samples)
    if kind == "far":  # a common offset, which float32 would not survive
        reference, samples = reference + 3000, samples + 3000
    reference, samples = reference.astype(np.float32), samples.astype(np.float32)
    found = evaluate.precision_recall(torch.from_numpy(samples), torch.from_numpy(reference))
    assert found == brute_force(samples, reference)
    assert 0.1 < found[0] < 0.95 and 0.1 < found[1] < 0.95 and found[0] != found[1]


# --------------------------------------------------------------------------------------------------
# Sets of pictures


def read(path, batch: int = 3, crop=None) -> np.ndarray:
    data = PictureSet(path, crop)
    ranges = [range(i, min(i + batch, len(data))) for i in range(0, len(data), batch)]
    return torch.cat([data[r] for r in ranges]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", ["plain", "compressed", "float", "fortran"])
def test_npz_is_read_in_batches(kind, tmp_path):
    images = pictures(8, 12)
    if kind == "float":
        images = images.clip(1) - 0.25  # not rounded
        images[:3] = 0  # a batch of black pictures is no batch in [0, 1]
    if kind == "fortran":
        images = np.asfortranarray(images)
    save = np.savez_compressed if kind == "compressed" else np.savez
    save(tmp_path / "set.npz", images, np.arange(8))
    found = read(tmp_path / "set.npz")
    assert found.dtype == np.float32 and np.array_equal(found, images.astype(np.float32))
    data = PictureSet(tmp_path / "set.npz")  # a process reads only its own batches
    assert torch.equal(data[range(6, 8)].permute(0, 2, 3, 1), torch.from_numpy(found[6:]))


def test_folder_is_read_sorted_and_can_be_cropped(tmp_path):
    images = pictures(4, 12)
    for i, name in enumerate(("b/1.png", "a/2.png", "c.png", "a/1.png")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(tmp_path / "set" / name)
    order = [3, 1, 0, 2]
    assert np.array_equal(read(tmp_path / "set"), images[order])
    cropped = [np.asarray(adm_crop(Image.fromarray(images[i]), 8)) for i in order]
    assert np.array_equal(read(tmp_path / "set", crop=8), np.stack(cropped))


def broken_sets(folder):
    """path -> what the line must say."""
    np.savez(folder / "no_arr.npz", images=pictures(2, 8))
    np.savez(folder / "chw.npz", pictures(2, 8).transpose(0, 3, 1, 2))
    np.savez(folder / "half.npz", pictures(2, 8), mu=np.zeros(2048))
    np.savez(folder / "objects.npz", np.array([{}, {}], dtype=object))
    (folder / "text.npz").write_text("hello")
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    for side in (8, 9):
        Image.new("RGB", (side, 8)).save(folder / "mixed" / f"{side}.png")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.jpg").write_text("hello")
    return {
        "no_arr.npz": "no arr_0 (it holds images)",
        "chw.npz": "expected pictures (n, height, width, 3)",
        "half.npz": "has mu but no mu_s, sigma, sigma_s",
        "objects.npz": "arr_0 is object",
        "text.npz": "not an .npz file",
        "nothing.npz": "no pictures in",
        "empty": "no pictures in",
        "mixed": "8.png is 8 x 8",
        "damaged": "cannot read",
    }


def test_broken_sets_are_one_clear_line(tmp_path, capsys):
    for name, expected in broken_sets(tmp_path).items():
        with pytest.raises(SystemExit) as stopped:
            runs.run_program(lambda name=name: read(tmp_path / name))
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.count("\n") == 1 and expected in error, error


def test_a_damaged_archive_is_reported_with_its_path(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, pictures(8, 64))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255  # a flipped byte in the pictures: the checksum tells
    path.write_bytes(content)
    with pytest.raises(BrokenImage, match="set.npz is damaged"):
        read(path)


# --------------------------------------------------------------------------------------------------
# generation


class Projection(nn.Module):
    """In place of the Inception network where its weights do not matter: random projections."""

    def __init__(self, *sizes: int):  # of pool and spatial features
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fc, self.sizes = nn.Linear(1, 1), sizes
        self.weight = 0.1 * torch.randn(48, sum(sizes), generator=generator)

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images / 255, 4).flatten(1) @ self.weight
        return x.split(self.sizes, dim=1)

    def logits(self, pool):
        return pool[:, :50]


@pytest.fixture
def projection(monkeypatch, request):
    network = Projection(*getattr(request, "param", (100, 90)))  # small: FID takes no time
    monkeypatch.setattr(evaluate, "load_inception", lambda *a: (network, {"inception": "random"}))
    return network


def test_identical_sets_have_distance_zero_and_full_precision_and_recall(
    projection, tmp_path, capsys
):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", pictures(9, 16))
    found = run("generation", "a.npz", "b.npz", "--batch-size", 4)
    assert abs(found["fid"]) < 1e-4 and abs(found["sfid"]) < 1e-4
    assert found["precision"] == found["recall"] == 1 and found["inception_score"] > 1.01
    assert found["protocol"]["left_out"] == {}
    said = capsys.readouterr().out  # the protocol stands beside the numbers there as well
    assert "RANDOM Inception" in said and found["protocol"]["samples"]["sha256"] in said


@pytest.mark.parametrize("projection", [(2048, 2023)], indirect=True)
def test_the_statistics_of_a_reference_file_replace_those_of_its_pictures(projection, tmp_path):
    images, scale = pictures(8, 16), {"mu": 3.0, "mu_s": 5.0}
    np.savez(tmp_path / "samples.npz", images)
    statistics = {}
    for (name, variance), side in zip(scale.items(), (2048, 2023), strict=True):
        mean = np.linspace(0, 1, side)
        statistics |= {name: mean, "sigma" + name[2:]: variance * np.eye(side)}
    np.savez(tmp_path / "virtual.npz", arr_0=pictures(6, 16, seed=1), **statistics)
    found = run("generation", "samples.npz", "virtual.npz")
    protocol = found["protocol"]
    assert protocol["reference"]["statistics"] == "of the file"
    assert protocol["samples"]["sha256"] == file_sha256(tmp_path / "samples.npz")
    assert (protocol["samples"]["pictures"], protocol["reference"]["pictures"]) == (8, 6)

    # Against c * identity: tr (c S)^(1/2) is the sum of the singular values of A, times sqrt c.
    features = [
        x.numpy().astype(np.float64) for x in projection(torch.tensor(images).permute(0, 3, 1, 2))
    ]
    for key, (name, variance), x in zip(("fid", "sfid"), scale.items(), features, strict=True):
        rows = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        cross = math.sqrt(variance) * np.linalg.svd(rows, compute_uv=False).sum()
        difference = x.mean(0) - statistics[name]
        expected = difference @ difference + (rows**2).sum() + variance * len(difference)
        assert found[key] == pytest.approx(expected - 2 * cross, rel=1e-5)
    reference = projection(torch.tensor(pictures(6, 16, seed=1)).permute(0, 3, 1, 2))[0].numpy()
    precision_recall = brute_force(features[0], reference)  # from the pictures of the file
    assert (found["precision"], found["recall"]) == precision_recall


def test_a_metric_that_needs_more_pictures_is_null_and_says_so(projection, tmp_path, capsys):
    np.savez(tmp_path / "three.npz", pictures(3, 16))
    np.savez(tmp_path / "one.npz", pictures(1, 16))
    found = run("generation", "three.npz", "one.npz")
    assert found["fid"] is found["sfid"] is found["precision"] is found["recall"] is None
    assert found["inception_score"] > 1
    said = capsys.readouterr().out
    assert "no fid: needs 2 pictures, one.npz has 1" in said
    assert "no recall: needs 4 pictures" in said


def test_features_that_are_not_finite_are_one_clear_line(projection, tmp_path, capsys):
    images, real = pictures(5, 16), projection.forward
    images[3] = 0

    def damaged(images):
        pool, spatial = real(images)
        return pool.masked_fill(images.amax(dim=(1, 2, 3))[:, None] == 0, torch.nan), spatial

    projection.forward = damaged
    np.savez(tmp_path / "a.npz", images)
    with pytest.raises(SystemExit) as stopped:
        run("generation", "a.npz", "a.npz", "--batch-size", 2)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert "pool of 1 pictures is not finite, the first is number 3" in error


def test_without_inception_weights_generation_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    np.savez(tmp_path / "a.npz", pictures(2, 8))
    with pytest.raises(SystemExit) as stopped:
        runs.run_program(lambda: run("generation", "a.npz", "a.npz"))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    for part in ("pt_inception-2015-12-05-6726825d.pth", "https://", "hub", "--inception"):
        assert part in error


def test_two_processes_sample_and_measure_as_one(checkpoint, tmp_path, run_script, monkeypatch):
    np.savez(tmp_path / "reference.npz", pictures(4, 16))
    command = ("generation", checkpoint, "reference.npz", "--num", 5, "--inception", "random")
    flags = ("--device", "cpu", "--batch-size", 2, "--json", "two.json", "--npz", "two.npz")
    done = run_script("evaluate.py", *command, *flags, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    one = run(*command, "--batch-size", 3)
    for key in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    kept = checkpoint.parent / "samples_of_model_5_guidance_1_seed_0.npz"
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(np.load(kept)[name], np.load(tmp_path / "two.npz")[name])
    assert np.load(kept)["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert two["protocol"]["inception"] == "random" and two["protocol"]["guidance"] == 1.0
    assert two["protocol"]["checkpoint"]["sha256"] == file_sha256(checkpoint)
    assert two["protocol"]["processes"] == 2 and not list(tmp_path.rglob("*.parts"))


# --------------------------------------------------------------------------------------------------
# reconstruction


def test_frequency_errors_against_a_plain_loop():
    error = torch.randn(2, 3, 24, 30)
    low = torch.empty_like(error)
    for y in range(24):
        for x in range(30):
            box = error[:, :, max(0, y - 10) : y + 11, max(0, x - 10) : x + 11]
            low[:, :, y, x] = box.mean(dim=(2, 3))
    expected = low.square().mean(dim=(1, 2, 3)), (error - low).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(evaluate.frequency_errors(error), expected)


def test_hidden_patches_are_grey():
    images, mask = torch.ones(1, 3, 8, 8), torch.tensor([[False, True, False, False]])
    shown = sample.hide_patches(images, mask)
    assert (shown[:, :, :4, 4:] == 0).all() and shown.sum() == 3 * 48


@pytest.fixture
def large_checkpoint(tiny):
    """Pictures of 24 x 24, so that the box filter fits."""
    config = replace(tiny, image_size=24)
    return write_checkpoint(config, randomize(train.MIMFlow(config, SHAPES)))


@torch.no_grad()
def test_reconstruction_by_hand_with_any_batch_size(large_checkpoint, projection, capsys):
    command = ("reconstruction", large_checkpoint, "--num", 7, "--seed", 5, "--vgg", "random")
    found, again = run(*command), run(*command, "--batch-size", 3)
    model = train.load_checkpoint(large_checkpoint)
    dataset = open_dataset(None, 24, "val")
    numbers = sorted(np.random.default_rng(5).permutation(2000)[:7].tolist())
    rows = {"mse": [], "psnr": [], "low_frequency_error": [], "high_frequency_error": []}
    shown, pool = [], [[], []]
    for n in numbers:
        image = dataset[n][0][None]
        one = replace(model.config, batch_size=1, mask_ratio=(0.4, 0.6))
        one = replace(one, seed=train.derived_seed(5, n))
        draws = train.draw_randomness(one, 0, CPU)
        assert 0.4 <= draws.mask.float().mean() <= 0.6
        decoded = model.decoder(model.encoder(image, draws.mask) + 0.3 * draws.noise)
        rows["mse"].append((image - decoded).square().mean())
        a, b = (to_uint8(x) for x in (image, decoded))
        rows["psnr"].append(-10 * torch.log10(((a / 255.0 - b / 255.0) ** 2).mean()))
        low, high = evaluate.frequency_errors(image - decoded)
        rows["low_frequency_error"].append(low)
        rows["high_frequency_error"].append(high)
        shown.append(decoded)
        for side, x in enumerate((a, b)):
            pool[side].append(projection(x.float())[0])
    for key, values in rows.items():
        expected = float(torch.stack(values).mean())
        assert found[key] == pytest.approx(expected, rel=1e-4), key
    a, b = (torch.cat(p).numpy() for p in pool)
    assert found["rfid"] == pytest.approx(nuclear_norm_fid(a, b), rel=1e-4)
    for key in [*rows, "rfid", "lpips"]:
        assert again[key] == pytest.approx(found[key], rel=1e-4) and found[key] > 0
    assert found["protocol"]["mask_ratio"] == [0.4, 0.6] and found["protocol"]["vgg"] == "random"

    grid = np.asarray(Image.open(large_checkpoint.parent / "reconstruction.png"))
    assert grid.shape == (3 * 98 + 2, 7 * 98 + 2, 3)
    corner = grid[2 * 98 + 2 : 3 * 98 : 4, 6 * 98 + 2 : 7 * 98 : 4]  # the last, of row 3
    expected = to_uint8(shown[-1].clamp(-1, 1))[0].permute(1, 2, 0).numpy()
    assert np.abs(corner.astype(int) - expected).max() <= 1


def test_reconstruction_leaves_out_what_it_has_no_weights_for(checkpoint, monkeypatch, capsys):
    def missing(kind, path=None):
        raise weights.WeightsMissing(f"no {kind} weights here")

    monkeypatch.setattr(evaluate, "find_weights", missing)
    monkeypatch.setattr(evaluate, "load_inception", lambda path, device: missing("inception"))
    found = run("reconstruction", checkpoint, "--num", 3, "--mask-ratio", 0, 0)
    assert found["rfid"] is found["lpips"] is found["low_frequency_error"] is None
    assert found["mse"] > 0 and found["protocol"]["mask_ratio"] == [0, 0]
    said = capsys.readouterr().out
    for line in ("no rfid: no inception weights", "no lpips: no vgg weights", "at least 21 x 21"):
        assert line in said


# --------------------------------------------------------------------------------------------------
# probe


def separable(count: int, seed: int) -> tuple[dict, torch.Tensor]:
    """Classes that a line separates in `good`, off centre and tiny; nothing in `noise`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    good = 50 + 0.01 * (corners[labels] + 0.1 * torch.randn(count, 2, generator=generator))
    return {"good": good, "noise": torch.randn(count, 3, generator=generator)}, labels


def test_probe_learns_what_is_there_and_nothing_else():
    train_set, val_set = separable(400, 0), separable(200, 1)
    accuracy = evaluate.train_probes(train_set, val_set, epochs=90, seed=0, device=CPU)
    assert accuracy["good"] > 98 and accuracy["noise"] < 40
    features, labels = val_set  # a class alone: rows are judged one by one, not as a batch
    one_class = {name: x[3::4] for name, x in features.items()}, labels[3::4]
    accuracy = evaluate.train_probes(train_set, one_class, epochs=90, seed=0, device=CPU)
    assert accuracy["good"] > 98


def test_the_last_smaller_batch_of_the_probe_is_left_out(monkeypatch):
    """It may be of one picture, of which BatchNorm can tell no deviation."""
    monkeypatch.setattr(evaluate, "PROBE_BATCH", 4)
    five = {"x": torch.randn(5, 3)}, torch.tensor([0, 1, 0, 1, 0])
    assert 0 <= evaluate.train_probes(five, five, epochs=2, seed=0, device=CPU)["x"] <= 100


@torch.no_grad()
def test_representations_are_of_the_whole_picture_without_label(tiny):
    model = randomize(train.MIMFlow(tiny, SHAPES), std=0.3).eval()
    images = torch.randn(3, 3, 16, 16)
    found = evaluate.representations(model, images, "mean")
    assert list(found) == ["encoder_features", "latent", "flow_block_1", "flow_block_2"]
    torch.testing.assert_close(found["encoder_features"], model.encoder.features(images).mean(1))
    mu = model.encoder(images)
    torch.testing.assert_close(found["latent"], mu.mean(1))
    null = torch.full((3,), -1)
    torch.testing.assert_close(found["flow_block_2"], model.flow(mu, null)[0].mean(1))
    assert not torch.allclose(found["flow_block_2"], model.flow(mu, null + 4)[0].mean(1))
    flat = evaluate.representations(model, images, "flat")["flow_block_1"]
    torch.testing.assert_close(flat.view(3, 4, 4).mean(1), found["flow_block_1"])


def save_pictures(folder, classes: int, each: int) -> None:
    """Pictures of 16 x 16 in CLASS folders, a colour a class."""
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for i in range(each):
            colour = (200 * label, 20 * i, 255 - 200 * label)
            Image.new("RGB", (16, 16), colour).save(folder / f"c{label}" / f"{i}.png")


def test_probe_reads_class_folders_and_asks_for_a_val_split(checkpoint, tmp_path, capsys):
    save_pictures(tmp_path / "set" / "train", 2, 6)
    with pytest.raises(SystemExit):
        run("probe", checkpoint, "--data", "set")
    assert "no val/" in capsys.readouterr().err
    save_pictures(tmp_path / "set" / "val", 2, 3)
    found = run("probe", checkpoint, "--data", "set", "--epochs", 20, "--batch-size", 5)
    assert found["top1_percent"]["encoder_features"] == 100
    protocol = found["protocol"]
    assert (protocol["train_pictures"], protocol["val_pictures"], protocol["epochs"]) == (12, 6, 20)
    dataset = open_dataset("set", 16, "val")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1] == [label for _, label in dataset]
    for folder, message in (("set/train", "no val/ beside train/"), ("set/train/c0", "no classes")):
        with pytest.raises(SystemExit) as stopped:
            run("probe", checkpoint, "--data", folder)
        assert stopped.value.code == 1 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# likelihood


@torch.no_grad()
@pytest.mark.parametrize("flags, masked", [((), True), (("--no-mask",), False)])
def test_likelihood_is_the_flows_log_prob(checkpoint, flags, masked):
    found = run("likelihood", checkpoint, "--num", 6, "--batch-size", 4, *flags)
    model = train.load_checkpoint(checkpoint)
    dataset = open_dataset(None, 16, "val")
    nats = {"conditional": [], "unconditional": []}
    for n in sorted(np.random.default_rng(0).permutation(2000)[:6].tolist()):
        image, label = dataset[n]
        one = replace(model.config, batch_size=1, seed=train.derived_seed(0, n))
        draws = train.draw_randomness(one, 0, CPU)
        z = model.encoder(image[None], draws.mask if masked else None)
        if masked:
            z = z + 0.3 * draws.noise
        else:  # another number of draws before the noise would be another noise
            one = replace(one, mask_ratio=(0.0, 0.0))
            z = z + 0.3 * train.draw_randomness(one, 0, CPU).noise
        nats["conditional"].append(float(model.flow.log_prob(z, torch.tensor([label]))))
        nats["unconditional"].append(float(model.flow.log_prob(z, torch.tensor([-1]))))
    assert abs(np.mean(nats["conditional"]) - np.mean(nats["unconditional"])) > 1e-4
    for kind, values in nats.items():
        assert found[kind]["nats_an_image"] == pytest.approx(np.mean(values), rel=1e-5)
        assert found[kind]["nats_an_image_std"] == pytest.approx(np.std(values), rel=1e-3)
        bits = -np.mean(values) / (16 * math.log(2))
        assert found[kind]["bits_a_latent_number"] == pytest.approx(bits, rel=1e-5)


def test_likelihood_of_other_classes_is_unconditional_only(checkpoint, tmp_path, capsys):
    for folder, classes in {"set": 2, "as many": 10}.items():
        save_pictures(tmp_path / folder, classes, 2)
        found = run("likelihood", checkpoint, "--data", folder)
        assert found["conditional"] is None and found["unconditional"]["nats_an_image"] < 0
        assert f"no conditional: {folder} have other classes" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# map


@pytest.mark.parametrize("dimension", [9, 100])  # fewer and more than pictures
def test_the_plane_of_the_map_is_that_of_the_svd(dimension):
    x = np.random.default_rng(0).standard_normal((60, dimension)) * np.linspace(1, 4, dimension)
    x -= x.mean(axis=0)
    points, share = evaluate.principal_plane(x)
    u, sizes, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(u[:, :2] * sizes[:2]), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(share, sizes[:2] ** 2 / (sizes**2).sum(), rtol=1e-8)


def test_map_shows_the_chosen_classes_or_writes_the_points(checkpoint, monkeypatch, capsys):
    found = run("map", checkpoint, "--num", 30, "--classes", 2, "heart")
    assert set(found["points"]["label"]) == {2, 6} and len(found["points"]["xy"]) == 30
    assert [n % 10 for n in found["points"]["picture"]] == found["points"]["label"]
    picture = np.asarray(Image.open(checkpoint.parent / "map.png").convert("RGB"))
    colours = {tuple(c) for c in picture.reshape(-1, 3).tolist()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # tab10's first two
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = evaluate.parse_arguments(["map", str(checkpoint), "--num", "9", "--out", "m.png"])
    evaluate.main(flags)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert len(json.loads(open("m.json").read())["points"]["xy"]) == 9


# --------------------------------------------------------------------------------------------------
# cost


def test_cost_counts_what_the_paper_says():
    parts = evaluate.count_parts(train.preset_config("mimflow-l"))
    both, flow = parts["encoder_and_decoder"], parts["flow"]
    assert both["parameters"] == 172_100_416 == pytest.approx(172.0e6, rel=0.01)
    assert both["multiply_adds"] == 70_980_206_592 == pytest.approx(71.25e9, rel=0.01)
    assert flow["parameters"] == pytest.approx(474.8e6, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_count_does_not_depend_on_the_attention_kernel(dtype):
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=dtype, requires_grad=True)
    work = 2 * 4 * 2 * 9 * 9 * 8  # batch, heads, two products of 9 x 9 x 8
    for causal in (False, True):

        def forward(causal=causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        assert evaluate.count_multiply_adds(forward) == work
        assert evaluate.count_multiply_adds(lambda: forward().sum().backward()) == 3 * work
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):

            def asked(kernel=kernel):
                with torch.no_grad(), sdpa_kernel(kernel):
                    forward()

            assert evaluate.count_multiply_adds(asked) == work, kernel


def test_multiply_adds_by_hand(tiny):
    c, T, K = tiny, 16 + 4, 4  # tokens: 4 x 4 patches and 4 latents
    layer = T * 12 * c.width**2 + 2 * T * T * c.width  # qkv, projection, MLP; attention
    encoder = 16 * c.width * 3 * c.patch_size**2 + c.depth * layer + K * c.width * c.latent_dim
    width = c.flow_width
    flow = 0
    for depth in c.flow_depths:  # the gate is a fifth square matrix
        flow += K * 3 * c.latent_dim * width + depth * (K * 13 * width**2 + 2 * K * K * width)
    parts = evaluate.count_parts(tiny)
    assert parts["encoder"]["multiply_adds"] == encoder
    assert parts["flow"]["multiply_adds"] == flow


@pytest.fixture
def timed(tiny, monkeypatch) -> tuple:
    """The arguments that time a tiny preset."""
    given = {k: v for k, v in asdict(tiny).items() if k not in ("preset", "out", "device")}
    monkeypatch.setitem(train.PRESETS, "tiny", given)
    monkeypatch.setitem(evaluate.FLAGS, "--preset", dict(choices=train.PRESETS))
    flags = ("--tokens", 3, 5, "--runs", 2, "--batch-size", 4, "--batches", 1, 3)
    return ("cost", "--preset", "tiny", *flags)


def test_cost_times_training_and_sampling(tiny, timed, capsys):
    found = run(*timed)
    assert list(found) == ["parts", "training", "sampling", "tokens", "protocol"]
    training = found["training"]
    assert training["batch_size"] == 4 and training["eager"]["ms_a_step"] > 0
    assert training["eager"]["peak_memory_gb"] is None  # counted on CUDA only
    cases = [f"guidance {w:g}, batch {n}" for w in (0, tiny.guidance) for n in (1, 3)]
    assert list(found["sampling"]) == [f"{s}, {c}" for s in ("sequential", "jacobi") for c in cases]
    assert all(row["s_an_image"] > 0 for row in found["sampling"].values())
    assert list(found["tokens"]) == ["3", "5"]
    assert all(value > 0 for row in found["tokens"].values() for value in row.values())
    assert "no peak_memory_gb: counted on CUDA only" in capsys.readouterr().out


def test_what_is_timed_is_divided_by_the_batch_where_it_is_of_an_image(tiny, monkeypatch):
    monkeypatch.setattr(evaluate, "seconds", lambda call, flags, factor=1: factor)
    flags = Namespace(device=CPU, batch_size=4, runs=1, batches=[1, 5], tokens=[3], compile=False)
    found = evaluate.time_all(train.MIMFlow(tiny).eval(), flags)
    assert found["training"]["eager"]["ms_a_step"] == 1000
    for name, row in found["sampling"].items():
        assert row["s_an_image"] == (0.2 if name.endswith("batch 5") else 1)
    assert list(found["tokens"]["3"].values()) == [1000, 1, 0.25]


def test_the_fresh_flow_that_is_timed_predicts_about_a_tenth():
    """As the protocol of the cost says."""
    (*_, deep) = evaluate.model_to_time(Namespace(checkpoint=None, preset="shapes")).flow.blocks
    mu, _ = deep.predict(deep.embed(torch.randn(4, 16, 8), deep.position, 0.0))
    assert 0.03 < mu.std() < 0.3


def test_a_row_that_does_not_fit_into_memory_is_left_out_alone(timed, monkeypatch, capsys):
    real = sample.sample_batch

    def full(model, indices, *rest, **how):
        if len(indices) == 3:
            raise torch.cuda.OutOfMemoryError("full")
        return real(model, indices, *rest, **how)

    def full_training(*arguments):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(sample, "sample_batch", full)
    monkeypatch.setattr(evaluate, "training_step", full_training)
    found = run(*timed)
    assert found["training"]["eager"]["ms_a_step"] is None
    for name, row in found["sampling"].items():
        assert (row["s_an_image"] is None) == ("batch 3" in name)
    assert all(value > 0 for row in found["tokens"].values() for value in row.values())
    (line,) = [
        x for x in capsys.readouterr().out.splitlines() if "ms_a_step" in x and "flow" not in x
    ]
    assert line.split() == ["ms_a_step", "-"]


def test_a_cuda_graph_is_recorded_anew_for_each_case_and_leaves_nothing(tiny, monkeypatch):
    model, inverses = train.MIMFlow(tiny).eval(), []
    call = evaluate.sampling(model, 2, tiny.guidance, "cuda graph")
    assert isinstance(model.flow.inverse, sample.RecordedInverse) and len(call()) == 2
    plain = evaluate.sampling(model, 2)
    assert not isinstance(model.flow.inverse, sample.RecordedInverse) and len(plain()) == 2
    monkeypatch.setattr(evaluate, "seconds", lambda *_: inverses.append(model.flow.inverse) or 1.0)
    flags = Namespace(device=CPU, batch_size=1, runs=1, batches=[1, 2], tokens=[], compile=False)
    evaluate.time_all(model, flags)
    assert "inverse" not in vars(model.flow) and len({*map(id, inverses[1:])}) == 2 * 2 * 2


def test_a_training_step_is_that_of_train_py(tiny):
    config = replace(tiny, drop_path=0.0, mask_ratio=(0.5, 0.5))
    step = evaluate.training_step(config, 4, CPU)
    parts = evaluate.count_parts(config)
    forward = sum(parts[name]["multiply_adds"] for name in ("encoder", "decoder", "flow"))
    # Backward takes two forward passes, attention a little more, the patch embedding one.
    assert 2.6 < evaluate.count_multiply_adds(step) / (4 * forward) < 3.1


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_sampling_is_counted_as_by_hand(tiny, guidance):
    """Token by token: K - 1 steps a block, where step i looks at i tokens."""
    c, model, batch = tiny, randomize(train.MIMFlow(tiny, SHAPES)), 3
    width, d = c.flow_width, c.latent_dim
    work = batch * evaluate.count_parts(tiny)["decoder"]["multiply_adds"]
    for number, depth in enumerate(c.flow_depths):
        rows = batch * (2 if guidance and number == 1 else 1)  # with the unconditional half
        for i in range(1, c.num_latents):
            work += rows * (3 * d * width + depth * (13 * width**2 + 2 * i * width))
    call = evaluate.sampling(model, batch, guidance)
    assert evaluate.count_multiply_adds(call) == work


def test_a_time_is_the_median_of_what_comes_after_the_warm_up(monkeypatch):
    moments = iter([0, 9, 0, 8, 0, 1, 0, 3, 0, 2])  # start and end of five calls
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(moments))
    monkeypatch.setattr(measuring, "LONG_ENOUGH", 100.0)
    calls = []
    flags = Namespace(device=CPU, runs=3)
    assert measuring.seconds(lambda: calls.append(1), flags, 10) == 20 and len(calls) == 5
    # Another process was slower: all go by its clock, or one would wait for what others leave out.
    monkeypatch.setattr(runs, "of_all_processes", lambda mine: [mine, 70])
    moments = iter([0, 1, 0, 2])
    assert measuring.seconds(lambda: calls.append(1), flags) == 70
    monkeypatch.undo()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(moments))
    moments = iter([0, 60, 0, 50])  # long ones are not repeated
    assert measuring.seconds(lambda: calls.append(1), flags) == 50


def test_the_table_has_a_line_a_number():
    numbers = {"b": {"x": 1234, "y": 2.123456}, "a long name": None}
    assert measuring.table(numbers) == [
        "  b",
        "    x                                                 1,234",
        "    y                                                2.1235",
        "  a long name                                             -",
    ]


def test_cost_of_a_checkpoint(checkpoint, capsys):
    flags = ("--batches", 2, "--tokens", 2, "--runs", 1, "--batch-size", 2)
    found = run("cost", checkpoint, *flags)
    assert found["protocol"]["weights"]["sha256"] == file_sha256(checkpoint)
    shown = capsys.readouterr().out
    assert "s_an_image" in shown and "jacobi, guidance" in shown


# --------------------------------------------------------------------------------------------------
# Command lines


def test_the_commands_as_a_user_types_them(checkpoint, tmp_path, run_script):
    """Three as processes of their own, each costs seconds; the others go through `run`."""
    flags = ("--device", "cpu", "--num", 10)
    two = run_script(
        *("evaluate.py", "map", checkpoint, *flags, "--batch-size", 3),
        *("--json", "two.json", "--num-workers", 1),
        processes=2,
        cwd=tmp_path,
    )
    assert two.returncode == 0, two.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    one = run("map", checkpoint, *flags)  # its points stand in the order of the pictures
    assert two["points"]["label"] == one["points"]["label"]
    np.testing.assert_allclose(two["points"]["xy"], one["points"]["xy"], rtol=1e-3, atol=1e-3)

    weights = ("--vgg", "random", "--inception", "random", "--json", "r.json")
    done = run_script("evaluate.py", "reconstruction", checkpoint, *flags, *weights, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rfid"] > 0 and found["lpips"] > 0
    probe = run("probe", checkpoint, *flags, "--num-train", 40, "--epochs", 2)
    for protocol in (two["protocol"], one["protocol"], found["protocol"], probe["protocol"]):
        assert protocol.keys() >= PROTOCOL | {"seed", "data"}
        assert protocol["checkpoint"]["sha256"] == file_sha256(checkpoint)
        assert protocol["command"].startswith("evaluate.py ")
    cost = run_script("evaluate.py", "cost", "--preset", "mimflow-l", "--no-timing")
    assert cost.returncode == 0 and "172,100,416" in cost.stdout, cost.stderr


def test_a_model_without_labels(tiny, projection, tmp_path, capsys):
    config = replace(tiny, num_classes=0)
    path = write_checkpoint(config, randomize(train.MIMFlow(config)))
    found = run("likelihood", path, "--num", 4)
    assert found["conditional"] is None and found["unconditional"]["bits_a_latent_number"] > 0
    found = run("map", path, "--num", 8)
    assert found["points"]["label"] == [-1] * 8 and found["protocol"]["classes"] == ["no class"]
    np.savez(tmp_path / "r.npz", pictures(4, 16))
    protocol = run("generation", path, "r.npz", "--num", 4)["protocol"]
    assert protocol["labels"] == "none" and protocol["guidance"] == 0
    with pytest.raises(SystemExit) as stopped:
        run("generation", path, "r.npz", "--guidance", 1)
    assert stopped.value.code == 2 and "without labels" in capsys.readouterr().err


def test_no_picture_of_the_training_is_overwritten(tiny, tmp_path, capsys):
    """Where --data is the checkpoint's, too."""
    write_pictures(tmp_path / "d" / "cat", 3)
    config = replace(tiny, data=str(tmp_path / "d"), num_classes=1)
    victim, numbers = tmp_path / "d/cat/0.png", str(tmp_path / "d/cat/0.json")
    path, before = write_checkpoint(config, train.MIMFlow(config, ("cat",))), victim.read_bytes()
    Path("log.json").write_text('{"step": 1, "loss": 2.0}')
    for work in (
        lambda: run("reconstruction", path, "--out", victim),
        lambda: spectral.main(
            spectral.parse_arguments([str(path), "--images", "2", "--out", numbers])
        ),
        lambda: evaluate.main(
            evaluate.parse_arguments(["curves", "log.json", "--json", "log.json"])
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            work()
        assert stopped.value.code == 2 and "would be lost" in capsys.readouterr().err
    assert victim.read_bytes() == before


def test_a_protocol_names_the_weights_that_were_read(checkpoint, monkeypatch):
    """A training may replace the file while 50,000 pictures are sampled."""
    read = file_sha256(checkpoint)
    monkeypatch.setattr(sample, "sample_set", lambda path, *rest: path.write_bytes(b"later"))
    flags = evaluate.parse_arguments(["generation", str(checkpoint), "r.npz", "--num", "2"])
    flags.device = CPU
    path, facts = evaluate.sample_checkpoint(flags)
    assert facts["checkpoint"]["sha256"] == read != file_sha256(checkpoint)
    assert path.name == "samples_of_model_2_guidance_1_seed_0.npz"


def test_the_cost_of_a_second_prior_without_labels(tiny):
    sizes = dict(emigm_width=16, emigm_heads=2, emigm_depths=(1, 1), emigm_head=(16, 1))
    config = replace(tiny, prior="emigm", freeze_autoencoder=True, init="x", num_classes=0, **sizes)
    path = write_checkpoint(config, randomize(train.MIMFlow(config)))
    found = run("cost", path, "--batches", 1, "--tokens", 4, "--runs", 1)
    assert found["sampling"]["emigm, guidance 0, batch 1"]["s_an_image"] > 0


def test_a_model_with_the_second_prior(tiny, projection, tmp_path, capsys):
    sizes = dict(emigm_width=16, emigm_heads=2, emigm_depths=(1, 1), emigm_head=(16, 1))
    config = replace(tiny, prior="emigm", freeze_autoencoder=True, init="x", **sizes)
    path = write_checkpoint(config, randomize(train.MIMFlow(config, SHAPES)))
    np.savez(tmp_path / "r.npz", pictures(4, 16))
    assert run("generation", path, "r.npz", "--num", 5)["protocol"]["guidance"] == tiny.guidance
    found = run("probe", path, "--num-train", 20, "--num", 10, "--epochs", 1)
    assert list(found["top1_percent"]) == ["encoder_features", "latent"]
    assert [found["protocol"][f"{split}_pictures"] for split in ("train", "val")] == [20, 10]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("likelihood", path)
    error = capsys.readouterr().err
    assert "no density" in error and error.count("\n") == 1
    flags = ("--runs", 1, "--batches", 2, "--batch-size", 2)
    found = run("cost", path, *flags)
    model = train.load_checkpoint(path)
    assert found["parts"]["emigm"]["parameters"] == train.count_parameters(model.emigm)
    assert found["parts"]["emigm"]["multiply_adds"] > 0 and not found["tokens"]
    assert found["sampling"]["emigm, guidance 0, batch 2"]["s_an_image"] > 0


@pytest.mark.parametrize(
    "command, code, expected",
    [
        ("", 2, "COMMAND"),
        ("unknown", 2, "invalid choice"),
        ("generation a.npz", 2, "reference"),
        ("generation a.npz b.npz --num 0", 2, "--num: must be positive"),
        ("generation a.npz b.npz --guid 1", 2, "unrecognized"),
        ("generation a.npz b.npz", 1, "no pictures in b.npz"),
        ("likelihood none.pt", 1, "none.pt does not exist"),
        ("reconstruction x.pt --mask-ratio 0.6 0.4", 2, "--mask-ratio needs"),
        ("reconstruction CKPT --inception no.pth --vgg random", 1, "no.pth: no such file"),
        ("reconstruction CKPT --inception random --vgg no.pth", 1, "no.pth: no such file"),
        ("reconstruction x.pt --mask-ratio 0 2", 2, "--mask-ratio: must be between 0 and 1"),
        ("probe x.pt --num-train 1", 2, "--num-train: must be at least 2"),
        ("map x.pt --out x.pt", 2, "must end in .png"),
        ("map x.pt --json nowhere/a.json", 2, "folder nowhere of a.json"),
        ("map CKPT --classes unicorn", 2, "'unicorn' is no class"),
        ("map CKPT --method umap", 2, "pip install umap-learn"),
        ("likelihood CKPT --num 3000", 2, "the val split of the built-in pictures has 2000"),
        ("cost --tokens 1", 2, "--tokens: must be"),
        ("cost --batches 0", 2, "--batches: must be"),
        ("cost CKPT --preset shapes", 2, "not both"),
        ("cost none.pt", 1, "none.pt"),
    ],
)
def test_bad_input_is_one_clear_line(checkpoint, command, code, expected, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    arguments = command.replace("CKPT", str(checkpoint)).split()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(evaluate.parse_arguments(arguments))
    error = capsys.readouterr().err
    assert stopped.value.code == code and expected in error and error.count("\n") == 1, error


# ------------------------------------------------------------------------------------------ curves


def plotted(monkeypatch) -> list:
    """The figures that are written, which are kept."""
    from matplotlib.figure import Figure

    kept, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: kept.append(self) or savefig(self, *a, **k)
    )
    return kept


def test_curves_are_the_numbers_of_the_logs_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    joint = [
        {"step": s, "loss": 1 / s, "mse": 0.5, "block_mean_square": [s, 2 * s], "nll": 1 - s}
        for s in (1, 2, 100)
    ]
    other = [{"step": s, "loss": -s, "mu_std": float("nan")} for s in (5, 10)]
    Path("run").mkdir()
    for name, lines in (("run/log.jsonl", joint), ("other$x.jsonl", other)):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = plotted(monkeypatch)
    evaluate.main(evaluate.parse_arguments(["curves", "run", "other$x.jsonl"]))
    assert "curves.png" in capsys.readouterr().out
    assert Image.open("curves.png").size[0] > 800
    (figure,) = kept
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == ["loss", "mse", "block_mean_square", "nll", "mu_std"]
    loss = [line.get_xydata().tolist() for line in panels["loss"].lines]
    assert loss == [[[1, 1], [2, 0.5], [100, 0.01]], [[5, -5], [10, -10]]]
    blocks = panels["block_mean_square"].lines
    assert [line.get_ydata().tolist() for line in blocks[:2]] == [[1, 2, 100], [2, 4, 200]]
    assert blocks[0].get_alpha() < blocks[1].get_alpha() == 1
    scales = {name: panel.get_yscale() for name, panel in panels.items()}
    assert scales.pop("block_mean_square") == "log" and set(scales.values()) == {"linear"}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["run", r"other\$x.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "3\n",
        '{"step": 1}\n',
        '{"loss": 1}\n',
        '{"step": 1, "loss": {}}\n',
        '{"step": 1, "loss": [1, 2]}\n{"step": 2, "loss": [1]}\n',
        "\x00",
    ],
)
def test_a_log_that_is_none_is_one_line_and_no_picture(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "log.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.parse_arguments(["curves", "run", "--out", "a.png"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "run/log.jsonl is no log of a run" in line
    assert not Path("a.png").exists()


def test_curves_without_matplotlib_say_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.parse_arguments(["curves", "checkpoints/shapes.log.jsonl"]))
    assert "pip install matplotlib" in capsys.readouterr().err
