"""spectral.py against dense linear algebra: numpy's SVD of Jacobians small enough to write down."""

import json
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from inverse_jacobian import InverseJacobian, sigma_min_by_inverse
from PIL import Image
from torch import Tensor

import spectral
import train
from common.data import Pictures
from common.shapes import SHAPES
from flow import NormalizingFlow

VARIANTS = {
    "improved": dict(gated=True, scale="exp"),
    "softplus": dict(gated=True, scale="softplus"),
    "starflow": dict(gated=False, scale="softplus"),
}


def random_flow(seed: int = 0, std: float = 0.1, **options) -> NormalizingFlow:
    """A float64 flow of 4 tokens of 2 (D = 8) whose blocks are not the identity."""
    torch.manual_seed(seed)
    sizes = dict(num_latents=4, latent_dim=2, width=16, depths=(1, 1), head_dim=8, num_classes=3)
    flow = NormalizingFlow(**sizes, **options).double()
    for block in flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=std)
    return flow


def random_latents(batch: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """z (batch, 4, 2) and labels (batch,), unconditional ones among them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 4, 2, generator=generator, dtype=torch.float64)
    return z, torch.arange(batch) % 4 - 1


def dense_singular_values(flow, z: Tensor, labels: Tensor) -> np.ndarray:
    """All singular values (B, D) of the Jacobian of each image, largest first, by reverse mode."""
    values = []
    for i in range(len(z)):
        matrix = torch.autograd.functional.jacobian(
            lambda x, i=i: flow(x[None], labels[i : i + 1])[0][0].flatten(), z[i]
        )
        values.append(np.linalg.svd(matrix.reshape(z[i].numel(), -1).numpy(), compute_uv=False))
    return np.array(values)


def linear_map(values: Tensor, tokens: int, seed: int = 0):
    """A "flow" z -> M z whose Jacobian M has the singular values `values` (D,)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(2, len(values), len(values), generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(random)[0]
    matrix = left * values @ right.T
    return lambda z, labels: ((z.flatten(1) @ matrix.T).view(len(z), tokens, -1), None)


def relative_error(found: Tensor, expected) -> float:
    return float(np.abs(found.numpy() / np.asarray(expected) - 1).max())


# --------------------------------------------------------------------------------------------------
# The values


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_extremes_are_those_of_the_dense_svd(variant, seed):
    flow, (z, labels) = random_flow(seed, std=0.12, **VARIANTS[variant]), random_latents(4, seed)
    values = dense_singular_values(flow, z, labels)
    found = spectral.singular_extremes(flow, z, labels)
    assert found.sigma_max.shape == found.sigma_min.shape == (4,)
    assert relative_error(found.sigma_max, values[:, 0]) < 1e-6
    assert relative_error(found.sigma_min, values[:, -1]) < 1e-6
    condition = np.log10(values[:, 0] / values[:, -1])
    np.testing.assert_allclose(found.log10_condition.numpy(), condition, atol=1e-6)
    assert found.converged.all()
    assert max(found.residual_max.max(), found.residual_min.max()) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_are_one_matrix_and_its_determinant_is_the_flows(variant):
    flow, (z, labels) = random_flow(3, **VARIANTS[variant]), random_latents(2)
    jacobian = spectral.Jacobian(flow, z, labels)
    unit = torch.eye(8, dtype=torch.float64)
    columns = torch.stack([jacobian.times(e.expand(2, -1)) for e in unit], dim=2)  # (B, D, D)
    rows = torch.stack([jacobian.transposed_times(e.expand(2, -1)) for e in unit], dim=1)
    torch.testing.assert_close(columns, rows, rtol=1e-10, atol=1e-12)
    product = torch.linalg.svdvals(columns).prod(dim=1)
    logdet = flow(z, labels)[1]
    assert logdet.abs().min() > 1e-3  # not the identity
    torch.testing.assert_close(product, logdet.exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", ["exp", "softplus"])
def test_flow_with_condition_number_1e4_and_smallest_values_that_nearly_coincide(scale):
    # Channel scales by hand: the tokens share them, so that, but for small random weights, every
    # singular value is nearly fourfold.
    flow, (z, labels) = random_flow(0, std=1e-4, scale=scale), random_latents(3)
    for block in flow.blocks:
        alpha = torch.tensor([-2.4, 2.4], dtype=torch.float64)
        if scale == "softplus":  # softplus(bias + log(e - 1)) = e^alpha
            alpha = alpha.exp().expm1().log() - math.log(math.e - 1)
        block.proj_out.bias.data[2:] = alpha
    values = dense_singular_values(flow, z, labels)
    assert (values[:, 0] / values[:, -1] > 1e4).all()
    assert (values[:, -2] / values[:, -1] - 1 < 1e-2).all()
    found = spectral.singular_extremes(flow, z, labels)
    assert relative_error(found.sigma_max, values[:, 0]) < 1e-6
    assert relative_error(found.sigma_min, values[:, -1]) < 1e-6
    assert found.converged.all()


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3])
def test_values_are_right_where_the_two_extreme_ones_nearly_coincide(gap):
    middle = torch.logspace(0, -2, 36, dtype=torch.float64)
    ends = torch.tensor([2.0 * (1 + gap), 2.0, 0.004 * (1 + gap), 0.004], dtype=torch.float64)
    values = torch.cat((ends[:2], middle, ends[2:]))
    z = torch.zeros(2, 8, 5, dtype=torch.float64)
    found = spectral.singular_extremes(linear_map(values, 8), z)
    assert relative_error(found.sigma_max, values[0]) < 1e-6
    assert relative_error(found.sigma_min, values[-1]) < 1e-6
    assert found.converged.all()


def test_evenly_spread_spectrum_of_condition_1e4_takes_few_products():
    values = torch.logspace(0, -4, 96, dtype=torch.float64)
    z = torch.zeros(1, 12, 8, dtype=torch.float64)
    found = spectral.singular_extremes(linear_map(values, 12), z)
    assert relative_error(found.sigma_max, 1.0) < 1e-6
    assert relative_error(found.sigma_min, 1e-4) < 1e-6
    assert found.converged.all()
    # Conjugate gradients without memory take more than 10,000 steps here.
    assert found.cg_steps.item() < 2 * 96
    # Any 96 independent vectors would do; the iterates of Eq. 9 and 10 get there far sooner.
    assert found.iterations_max.item() < 48 and found.iterations_min.item() < 48


def test_the_shift_does_not_enter_the_values():
    flow, (z, labels) = random_flow(), random_latents(2)
    expected = dense_singular_values(flow, z, labels)[:, -1]
    found = spectral.singular_extremes(flow, z, labels, shift=1e-2)  # of the order of sigma_min^2
    assert relative_error(found.sigma_min, expected) < 1e-6


def test_the_shift_is_in_units_of_the_largest_value_squared():
    values, z = torch.logspace(0, -2, 24, dtype=torch.float64), torch.zeros(1, 6, 4).double()
    plain, large = (
        spectral.singular_extremes(linear_map(scale * values, 6), z, shift=1e-3)
        for scale in (1.0, 1024.0)
    )
    assert torch.equal(large.sigma_min, 1024 * plain.sigma_min)
    assert plain.iterations_min > 1 and torch.equal(large.iterations_min, plain.iterations_min)
    assert torch.equal(large.cg_steps, plain.cg_steps)


def test_fresh_flow_is_the_identity():
    flow, (z, _) = random_flow(std=0.0), random_latents(2)
    found = spectral.singular_extremes(flow, z)
    torch.testing.assert_close(found.sigma_max, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found.sigma_min, torch.ones(2, dtype=torch.float64))
    assert found.iterations_max.tolist() == found.iterations_min.tolist() == [1, 1]


def test_blocks_can_be_analysed_alone():
    flow, (z, labels) = random_flow(), random_latents(2)
    for block in flow.blocks:
        values = dense_singular_values(block, z, labels)
        found = spectral.singular_extremes(block, z, labels)
        assert relative_error(found.sigma_max, values[:, 0]) < 1e-6
        assert relative_error(found.sigma_min, values[:, -1]) < 1e-6


# --------------------------------------------------------------------------------------------------
# One image and its neighbours


def test_batch_of_8_is_8_single_runs():
    flow, (z, labels) = random_flow(4, std=0.12), random_latents(8)
    together = spectral.singular_extremes(flow, z, labels)
    alone = [spectral.singular_extremes(flow, z[i : i + 1], labels[i : i + 1]) for i in range(8)]
    assert len(set(together.iterations_max.tolist())) > 1  # they do not all stop together
    for name in ("sigma_max", "sigma_min"):
        expected = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-9, atol=0)
    for name in ("iterations_max", "iterations_min", "cg_steps"):
        assert getattr(together, name).tolist() == [getattr(one, name).item() for one in alone]


def test_an_image_ignores_its_neighbours():
    flow, (z, labels) = random_flow(4), random_latents(4)
    others = z.clone()
    others[1:] = 0.5 * z[1:].flip(0)
    first = spectral.singular_extremes(flow, z, labels)
    second = spectral.singular_extremes(flow, others, labels)
    torch.testing.assert_close(first.sigma_min[0], second.sigma_min[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(first.sigma_max[0], second.sigma_max[0], rtol=1e-9, atol=0)
    assert (first.sigma_min[1:] - second.sigma_min[1:]).abs().min() > 1e-6


def test_labels_matter_and_none_is_unconditional():
    flow, (z, _) = random_flow(), random_latents(2)
    none = spectral.singular_extremes(flow, z).sigma_min
    null = spectral.singular_extremes(flow, z, torch.tensor([-1, -1])).sigma_min
    first = spectral.singular_extremes(flow, z, torch.tensor([0, 0])).sigma_min
    assert torch.equal(none, null)
    assert (none - first).abs().min() > 1e-6


# --------------------------------------------------------------------------------------------------
# The parts


def test_conjugate_gradients_solve_and_remember():
    values = torch.logspace(0, -2, 24, dtype=torch.float64)
    z = torch.zeros(3, 6, 4, dtype=torch.float64)
    jacobian = spectral.Jacobian(linear_map(values, 6), z, torch.zeros(3))
    shift = torch.tensor([1e-6, 1e-3, 1.0], dtype=torch.float64)
    solver = spectral.ConjugateGradients(jacobian, shift, max_steps=100)
    b = torch.randn(3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = solver.solve(b, torch.full((3,), 1e-9, dtype=torch.float64))

    unit = torch.eye(24, dtype=torch.float64)
    matrix = torch.stack([jacobian.times(e.expand(3, -1))[0] for e in unit], dim=1)
    for i in range(3):
        system = matrix.T @ matrix + shift[i] * unit
        torch.testing.assert_close(w[i], torch.linalg.solve(system, b[i]), rtol=1e-4, atol=1e-4)
    steps = solver.steps.tolist()
    assert steps[2] < steps[0]  # the best conditioned image is solved first
    again = solver.solve(b, torch.full((3,), 1e-9, dtype=torch.float64))
    assert solver.steps.tolist() == steps  # all of it was known
    torch.testing.assert_close(again, w, rtol=1e-6, atol=1e-6)

    keep = torch.tensor([False, True, True])
    solver.restrict(jacobian.rows(keep), keep)
    w = solver.solve(-b[:2], torch.full((2,), 1e-9, dtype=torch.float64))
    for i in range(2):
        system = matrix.T @ matrix + shift[i + 1] * unit
        torch.testing.assert_close(w[i], torch.linalg.solve(system, -b[i]), rtol=1e-6, atol=1e-6)


def test_orthogonalize_leaves_nothing_of_the_span_where_one_round_does():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 12, 5, generator=generator, dtype=torch.float64))[0].mT
    new = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    v = basis.sum(dim=1) + 1e-9 * new  # nearly all of it lies in the span
    once = spectral.normalize(v - spectral.project(v, basis, basis))
    found = spectral.orthogonalize(v, basis, basis)
    assert (basis @ once[..., None]).abs().max() > 1e-9
    assert (basis @ found[..., None]).abs().max() < 1e-14
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # Where rows are not the basis: conjugate directions, rows_i . onto_j = 1 if i = j else 0.
    rows = torch.linalg.pinv(basis + 0.1 * new[:, None]).mT
    found = spectral.orthogonalize(v, rows, basis + 0.1 * new[:, None])
    assert (rows @ found[..., None]).abs().max() < 1e-8


@pytest.mark.parametrize("variant", VARIANTS)
def test_smallest_value_is_that_of_the_exact_inverse(variant):
    """In a way that has nothing in common with Eq. 10, and shown to be the inverse."""
    flow, (z, labels) = random_flow(5, std=0.15, **VARIANTS[variant]), random_latents(3)
    v = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian, inverse = spectral.Jacobian(flow, z, labels), InverseJacobian(flow, z, labels)
    torch.testing.assert_close(inverse.times(jacobian.times(v)), v, rtol=1e-9, atol=1e-9)
    undone = inverse.transposed_times(jacobian.transposed_times(v))
    torch.testing.assert_close(undone, v, rtol=1e-9, atol=1e-9)
    found = spectral.singular_extremes(flow, z, labels).sigma_min
    assert relative_error(found, sigma_min_by_inverse(flow, z, labels)) < 1e-6


# --------------------------------------------------------------------------------------------------
# What goes wrong is said


def test_too_few_iterations_are_reported_per_image():
    flow, (z, labels) = random_flow(), random_latents(3)
    found = spectral.singular_extremes(flow, z, labels, max_iterations=2)
    assert found.converged.tolist() == [False, False, False]
    assert (found.residual_max > 1e-6).all() and (found.residual_min > 1e-6).all()
    assert found.iterations_max.tolist() == [2, 2, 2]


def test_a_residual_that_is_not_a_number_is_not_small():
    z = torch.randn(1, 2, 2).double()
    found = spectral.singular_extremes(lambda z, _: (0 * z, None), z, max_iterations=3)
    assert not found.converged.any() and found.iterations_max == 3


def test_converged_is_said_only_of_both_ends():
    values = torch.cat((torch.tensor([100.0]), torch.linspace(1, 0.9, 23))).double()
    z = torch.zeros(1, 6, 4, dtype=torch.float64)
    found = spectral.singular_extremes(linear_map(values, 6), z, max_iterations=4)
    assert found.residual_max < 1e-6 < found.residual_min and not found.converged.any()


def test_progress_counts_every_value_once():
    flow, (z, labels) = random_flow(), random_latents(3)
    for limit in (2, 1000):
        counts = []
        spectral.singular_extremes(flow, z, labels, max_iterations=limit, progress=counts.append)
        assert sum(counts) == 6


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(shift=0.0), "shift"),
        (dict(shift=-1e-9), "shift"),
        (dict(tolerance=0.0), "tolerance"),
        (dict(max_iterations=0), "max_iterations"),
        (dict(labels=torch.zeros(3)), "labels"),
        (dict(z=torch.zeros(2, 15)), r"\(B, K, d\)"),
    ],
)
def test_unusable_arguments_raise(bad, words):
    arguments = dict(zip(("z", "labels"), random_latents(2), strict=True)) | bad
    with pytest.raises(ValueError, match=words):
        spectral.singular_extremes(random_flow(), **arguments)


def test_flow_that_is_not_finite_raises():
    flow, (z, labels) = random_flow(), random_latents(2)
    flow.blocks[0].proj_out.bias.data[:] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        spectral.singular_extremes(flow, z, labels)


# --------------------------------------------------------------------------------------------------
# The command


def save_checkpoint(path, weights=lambda name: True, **changes) -> train.MIMFlow:
    """A tiny untrained model with a flow that is not the identity, as train.py writes it."""
    torch.manual_seed(0)
    tiny = dict(width=32, depth=1, heads=2, num_latents=4, latent_dim=2, num_classes=10)
    tiny |= dict(flow_width=16, flow_depths=(1, 1), flow_head_dim=8, image_size=16)
    config = train.Config(**{**train.PRESETS["shapes"], **tiny, **changes}, preset="shapes")
    names = list(SHAPES)[: config.num_classes]
    model = train.MIMFlow(config, tuple(names))
    for block in model.flow.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    state = {name: x for name, x in model.state_dict().items() if weights(name)}
    values = dict(format=1, step=7, config=asdict(config), class_names=names, model=state)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path)
    return model


def run(*arguments) -> None:
    spectral.main(spectral.parse_arguments([*map(str, arguments), "--device", "cpu"]))


def test_command_writes_numbers_that_are_those_of_the_dense_svd(tmp_path, capsys):
    model = save_checkpoint(tmp_path / "a" / "model.pt").double()
    run(tmp_path / "a" / "model.pt", "--images", 5, "--batch-size", 2, "--per-block")
    report = json.loads((tmp_path / "a" / "spectral.json").read_text())
    (result,) = report["checkpoints"]
    images = result["images"]
    assert report["protocol"]["dtype"] == "torch.float64"
    assert result["step"] == 7 and result["dimension"] == 8 and result["not_converged"] == []
    assert all(len(column) == 5 for column in images.values())
    assert images["index"] == sorted(set(images["index"])) and max(images["index"]) > 5
    assert images["label"] == [i % 10 for i in images["index"]]  # the true class
    assert result["labels"] == "true class"
    assert [len(block["images"]["sigma_min"]) for block in result["blocks"]] == [5, 5]

    z, labels = spectral.encode(model, Pictures(None, 16, num=5), range(5), seed=0)
    values = dense_singular_values(model.flow, z, labels)
    assert relative_error(torch.tensor(images["sigma_max"]), values[:, 0]) < 1e-6
    assert relative_error(torch.tensor(images["sigma_min"]), values[:, -1]) < 1e-6
    summary = result["summary"]["sigma_min"]
    assert np.mean(values[:, -1]) == pytest.approx(summary["mean"])
    assert np.std(values[:, -1]) == pytest.approx(summary["std"])
    inputs = (z, model.flow.blocks[0](z, labels)[0])
    for block, x, found in zip(model.flow.blocks, inputs, result["blocks"], strict=True):
        expected = dense_singular_values(block, x.detach(), labels)
        assert np.allclose(found["images"]["sigma_max"], expected[:, 0], rtol=1e-6)
        assert np.allclose(found["images"]["sigma_min"], expected[:, -1], rtol=1e-6)

    printed = capsys.readouterr().out
    assert "sigma_min" in printed and "block 2 sigma_min" in printed and "NOT" not in printed


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, where names leave no room
def test_two_checkpoints_side_by_side_see_the_same_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name / "model.pt" for name in ("ours", "baseline")]
    save_checkpoint(paths[0])
    save_checkpoint(paths[1], gated=False, scale="softplus")
    run(*paths, "--images", 3, "--out", tmp_path / "both.json")
    first, second = json.loads((tmp_path / "both.json").read_text())["checkpoints"]
    assert first["images"]["index"] == second["images"]["index"]
    assert first["images"]["sigma_min"] != second["images"]["sigma_min"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_numbers_are_written_and_a_line_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_checkpoint(tmp_path / "model.pt")
    run(tmp_path / "model.pt", "--images", 1)
    assert (tmp_path / "spectral.json").exists() and not (tmp_path / "spectral.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


def test_what_did_not_converge_is_printed_and_written(tmp_path, capsys):
    save_checkpoint(tmp_path / "model.pt")
    run(tmp_path / "model.pt", "--images", 2, "--max-iterations", 1)
    (result,) = json.loads((tmp_path / "spectral.json").read_text())["checkpoints"]
    assert result["not_converged"] == [0, 1]
    assert "NOT converged: 2 of 2 images (rows 0, 1)" in capsys.readouterr().out


def test_latents_are_masked_noised_and_the_same_in_any_batches(tmp_path):
    model = save_checkpoint(tmp_path / "model.pt").double()
    pictures = Pictures(None, 16, num=4, seed=3)
    z, labels = spectral.encode(model, pictures, range(4), seed=3)
    halves = [spectral.encode(model, pictures, range(i, i + 2), seed=3)[0] for i in (0, 2)]
    torch.testing.assert_close(z, torch.cat(halves), rtol=1e-10, atol=1e-10)
    assert z.dtype == torch.float64 and z.shape == (4, 4, 2)
    assert (z - spectral.encode(model, pictures, range(4), seed=4)[0]).abs().max() > 0.1
    everything = Pictures(None, 16)  # a picture has its draws, whatever is beside it
    number = int(pictures.numbers[0])
    alone, _ = spectral.encode(model, everything, range(number, number + 1), seed=3)
    torch.testing.assert_close(alone, z[:1], rtol=1e-10, atol=1e-10)

    model.config.sigma = 0.0  # no noise: what differs from the open picture is the mask
    masked, _ = spectral.encode(model, pictures, range(4), seed=3)
    images, *_ = pictures[range(4)]
    assert (masked - model.encoder(images.double())).abs().max() > 1e-3
    assert 0.1 < (z - masked).std() < 0.6  # sigma = 0.3


def test_without_classes_in_the_pictures_or_in_the_run_all_is_unconditional(tmp_path):
    for i in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    save_checkpoint(tmp_path / "model.pt")
    run(tmp_path / "model.pt", "--images", 3, "--data", tmp_path / "flat")
    save_checkpoint(tmp_path / "none" / "model.pt", num_classes=0)
    run(tmp_path / "none" / "model.pt", "--images", 3)
    for folder in (tmp_path, tmp_path / "none"):
        (result,) = json.loads((folder / "spectral.json").read_text())["checkpoints"]
        assert result["labels"] == "unconditional" and result["images"]["label"] == [-1, -1, -1]


def test_pictures_of_other_classes_are_refused(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "0.png")
    save_checkpoint(tmp_path / "model.pt")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "model.pt", "--images", 1, "--data", tmp_path / "data")
    assert end.value.code == 1 and "other classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["--shift", "0"], 2, "--shift: must be positive"),
        (["--max-iterations", "0"], 2, "--max-iterations: must be positive"),
        (["--tolerance", "0"], 2, "--tolerance: must be positive"),
        (["--images", "0"], 2, "--images: must be positive"),
        (["--images", "2001"], 2, "2001 pictures asked for"),
        (["--out", "numbers.txt"], 2, "must end in .json"),
        (["--out", "missing/numbers.json"], 2, "folder missing"),
        (["--data", "missing"], 1, "no data folder missing"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model.pt")
    with pytest.raises(SystemExit) as end:
        run("model.pt", *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == code and line.startswith("error: ") and words in line


def test_checkpoint_without_a_flow_is_one_clear_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "model.pt", weights=lambda name: not name.startswith("flow."))
    with pytest.raises(SystemExit):
        run(tmp_path / "model.pt", "--images", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "flow." in line


def test_diverged_checkpoint_is_one_clear_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "model.pt")
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    checkpoint["model"]["flow.blocks.0.proj_out.bias"].fill_(-1e4)  # exp(-alpha) overflows
    torch.save(checkpoint, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        run(tmp_path / "model.pt", "--images", 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "not finite" in line


def test_float32_is_asked_for_no_more_than_it_can_give(tmp_path):
    save_checkpoint(tmp_path / "model.pt")
    found = []
    for dtype in ("float32", "float64"):
        run(tmp_path / "model.pt", "--images", 3, "--dtype", dtype)
        report = json.loads((tmp_path / "spectral.json").read_text())
        found.append(report["checkpoints"][0])
    assert [result["not_converged"] for result in found] == [[], []]
    one, two = (result["images"]["sigma_max"] for result in found)
    assert np.allclose(one, two, rtol=1e-3)
