"""The Jacobian of the flow (App. B, Fig. 5): how much F stretches and squeezes near real latents.

    python spectral.py runs/shapes/model.pt                               # one checkpoint
    python spectral.py runs/mimflow-l/model.pt runs/starflow-l/model.pt   # Fig. 5: side by side
    python spectral.py CKPT --per-block --check                           # which block; is it right

J = dF/dz is D x D, D = K d, too large to write down (mimflow-l: 8192^2), but its products come from
automatic differentiation: J v from a JVP, J^T u from a VJP. With A = J^T J, from a random v_0:

    v_{k+1} = A v_k / ||A v_k||,                           sigma_max = sqrt(v^T A v)       (Eq. 9)
    solve (A + eps I) w = v_k,  v_{k+1} = w / ||w||                                        (Eq. 10)
                                                           sigma_min = sqrt(lambda - eps)  (Eq. 11)
    condition number = sigma_max / sigma_min

lambda is the smallest eigenvalue of A + eps I; lambda - eps is then v^T A v, which is what is
computed here, so that the shift only helps the solver and never enters a value.

Two deviations: both remember more, neither changes the limit. They turn thousands of products
into dozens:
1. Eq. 9 and 10 keep the last vector only, and crawl when two extreme values nearly coincide. Here
   the iterates stay, and v_k is the best combination of all of them (Rayleigh-Ritz; for Eq. 9 that
   is Lanczos' method). Forgetting all but the last gives the paper's iteration back.
2. Conjugate gradients lose their conjugacy to rounding when A is ill-conditioned. Here old search
   directions stay too, and every solve starts from those of the solves before it. (A matrix with
   D = 128, condition number 1e4: 22,000 products without this memory, 150 with it.)

An image is done when its own residual ||A v - theta v|| / theta, theta = v^T A v, is below the
tolerance: an eigenvalue of A then lies that close, relatively, and half as close for sigma (far
closer where eigenvalues are apart). Rounding leaves a residual of about 1e-16 (condition number)^2
in float64, so beyond 1e5 the smallest value cannot prove 1e-6. It is then reported as not
converged, with its residual; --check, which squares nothing, still tells.

J is block-diagonal over a batch, so one product serves all of its images; each has its own scalars.
Where J is taken: real validation pictures, hidden and noised as in training, z = mu + sigma eps
(Eq. 1), the mask ratio after its warm-up; conditional on the true class, or unconditional where the
run or the pictures have no classes. The draws of a picture depend on --seed,
its number and the checkpoint's mask settings alone.

Cost of one product with A, counted: a JVP (torch multiplies the weights three times) and a VJP
(once, weights need no gradient). mimflow-l: 0.36 + 0.12 TFLOP per image, 14 s on one CPU core. In
float64 its weights are 3.8 GB, the graph of the VJP 0.8 GB an image, a remembered CG direction 128
kB an image: --batch-size is the flag that makes it fit, --dtype float32 the one that halves it.
"""

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from tqdm import tqdm

from train import (
    MIMFlow,
    Parser,
    draws_of_pictures,
    fail,
    find_checkpoint,
    load_checkpoint,
    open_dataset,
    run_program,
    say,
    select_device,
    write_file,
)

CG_REDUCTION = 0.01  # a solve of Eq. 10 is "inexact": this fraction of the outer residual is enough
CHECK_IMAGES = 4  # --check solves token by token, so it looks at a few images only
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (z, labels) -> (u, logdet): flow or block
Progress = Callable[[int], Any]  # told how many values have just been finished


# --------------------------------------------------------------------------------------------------
# The Jacobian as two products


class Jacobian:
    """J = du/dz of a flow, or of one of its blocks, for every image of a batch.

    Vectors are (B, D) with D = K d: one per image, all served by one pass.
    """

    def __init__(self, flow: Map, z: Tensor, labels: Tensor):
        self.flow, self.z, self.labels = flow, z, labels
        # Neither forward-mode AD nor a second VJP goes through fused attention: plain math instead.
        with sdpa_kernel(SDPBackend.MATH):
            self.u, self.vjp = torch.func.vjp(self.map, z)  # one graph, for every J^T u

    def map(self, z: Tensor) -> Tensor:
        return self.flow(z, self.labels)[0]

    def times(self, v: Tensor) -> Tensor:
        """J v, (B, D) -> (B, D): a JVP."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(self.map, (self.z,), (v.view_as(self.z),))[1].flatten(1)

    def transposed_times(self, u: Tensor) -> Tensor:
        """J^T u, (B, D) -> (B, D): a VJP."""
        return self.vjp(u.view_as(self.z))[0].flatten(1)

    def rows(self, keep: Tensor) -> "Jacobian":
        """The Jacobian of some of the images, keep (B,) bool."""
        return Jacobian(self.flow, self.z[keep], self.labels[keep])


class InverseJacobian:
    """J^-1, exactly: no shift, no iteration, nothing in common with Eq. 10. It is for --check.

    J = J_L ... J_1, a factor per block. In the block's own token order J_b is lower triangular,
    because token i of its output depends on tokens 0..i of its input only; and the part that ties
    output token i to input token i is diagonal. So J_b w = v is solved by forward substitution,
    one token after the other, and J_b^T w = v by the same from the last token to the first.
    """

    def __init__(self, flow: torch.nn.Module, z: Tensor, labels: Tensor):
        self.flow, self.z, self.labels = flow, z, labels
        self.factors = []  # (J_b, tokens in the order of block b, diagonal of J_b (B, K, d))
        x = z
        for block in flow.blocks:
            jacobian = Jacobian(block, x, labels)
            tokens = list(range(x.shape[1]))[:: -1 if block.backward else 1]
            diagonal = torch.empty_like(x)
            for i in tokens:  # ones at token i, nothing elsewhere, read its diagonal off
                ones = torch.zeros_like(x)
                ones[:, i] = 1
                diagonal[:, i] = jacobian.times(ones.flatten(1)).view_as(x)[:, i]
            self.factors.append((jacobian, tokens, diagonal))
            x = jacobian.u

    def times(self, v: Tensor) -> Tensor:
        """J^-1 v, (B, D) -> (B, D): J_1^-1 ... J_L^-1 v, the last block first."""
        for jacobian, tokens, diagonal in reversed(self.factors):
            v = substitute(jacobian.times, tokens, diagonal, v)
        return v

    def transposed_times(self, u: Tensor) -> Tensor:
        """J^-T u, (B, D) -> (B, D): the first block first, each from its last token back."""
        for jacobian, tokens, diagonal in self.factors:
            u = substitute(jacobian.transposed_times, tokens[::-1], diagonal, u)
        return u

    def rows(self, keep: Tensor) -> "InverseJacobian":
        """The inverse Jacobian of some of the images, keep (B,) bool."""
        return InverseJacobian(self.flow, self.z[keep], self.labels[keep])


def substitute(
    times: Callable[[Tensor], Tensor], tokens: list[int], diagonal: Tensor, v: Tensor
) -> Tensor:
    """Solve T w = v, (B, D), T triangular in the order `tokens`, one token at a time."""
    w = torch.zeros_like(diagonal)  # (B, K, d)
    for i in tokens:  # w is final before token i and still 0 from it on
        missing = (v - times(w.flatten(1))).view_as(w)[:, i]  # (B, d)
        w[:, i] = missing / diagonal[:, i]
    return w.flatten(1)


# --------------------------------------------------------------------------------------------------
# Eq. 9-11: vectors are (B, D), scalars (B,), one of each per image


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of (..., D) vectors: (...)."""
    return (a * b).sum(dim=-1)


def normalize(v: Tensor) -> Tensor:
    """v / ||v||; a zero vector stays zero."""
    return v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def project(v: Tensor, rows: Tensor, onto: Tensor) -> Tensor:
    """sum_i (rows_i . v) onto_i: v (B, D), rows and onto (B, m, D) -> (B, D)."""
    return (onto.mT @ (rows @ v[..., None]))[..., 0]


def append(basis: Tensor, v: Tensor) -> Tensor:
    """(B, m, D) and (B, D) -> (B, m + 1, D)."""
    return torch.cat((basis, v[:, None]), dim=1)


class ConjugateGradients:
    """Solves (A + eps I) w = b (Eq. 10), many times, and remembers its search directions.

    Directions p_i are conjugate, p_i^T (A + eps I) p_j = 1 if i = j else 0, so that the best w in
    their span is sum_i (p_i . b) p_i. An image that is solved gets the direction 0, which does
    nothing.
    """

    def __init__(self, jacobian: Jacobian, shift: Tensor, max_steps: int):
        self.jacobian, self.shift, self.max_steps = jacobian, shift[:, None], max_steps  # eps (B,)
        B, D = len(shift), jacobian.z[0].numel()
        self.directions = shift.new_empty(B, 0, D)  # p_i
        self.products = shift.new_empty(B, 0, D)  # (A + eps I) p_i
        self.steps = torch.zeros(B, dtype=torch.int64, device=shift.device)  # done so far

    def solve(self, b: Tensor, tolerance: Tensor) -> Tensor:
        """w (B, D) with ||b - (A + eps I) w|| <= tolerance (B,), or what max_steps allow."""
        # Start from the best w in the old directions; a second round removes what rounding left.
        w, r = torch.zeros_like(b), b
        for _ in range(2):
            w = w + project(r, self.directions, self.directions)
            r = r - project(r, self.directions, self.products)

        while self.directions.shape[1] < self.max_steps:
            open_ = r.norm(dim=-1) > tolerance  # (B,)
            if not open_.any():
                break
            # The next direction is the residual, made conjugate to the others. Plain CG subtracts
            # the last one only, since r is conjugate to the older ones, but for rounding.
            p = normalize(torch.where(open_[:, None], r, 0.0))
            for _ in range(2):  # "twice is enough"
                p = normalize(p - project(p, self.products, self.directions))
            product = self.jacobian.transposed_times(self.jacobian.times(p)) + self.shift * p
            size = dot(p, product).clamp_min(torch.finfo(p.dtype).tiny).sqrt()[:, None]
            p, product = p / size, product / size
            along = dot(p, r)[:, None]
            w, r = w + along * p, r - along * product
            self.directions = append(self.directions, p)
            self.products = append(self.products, product)
            self.steps += open_
        return w

    def restrict(self, jacobian: Jacobian, keep: Tensor) -> None:
        """Go on with some of the images, keep (B,) bool, whose Jacobian is `jacobian`."""
        self.jacobian, self.shift, self.steps = jacobian, self.shift[keep], self.steps[keep]
        self.directions, self.products = self.directions[keep], self.products[keep]


def rayleigh_ritz(basis: Tensor, products: Tensor, smallest: bool) -> tuple[Tensor, Tensor]:
    """The unit v in the span of an orthonormal basis (B, m, D) with the extreme ||J v||, and J v.

    `products` (B, m, D) holds J times the basis. Returns v and J v, (B, D) each.
    """
    # Gram matrix = A in the basis. Only its eigenvector is used: the eigenvalue of a small sigma
    # would have lost its digits here, the length of the combination J v has not.
    gram = products @ products.mT  # (B, m, m)
    best = torch.linalg.eigh(gram)[1][..., 0 if smallest else -1]  # (B, m)
    return (best[:, None] @ basis)[:, 0], (best[:, None] @ products)[:, 0]


class Estimate(NamedTuple):
    """One extreme singular value of every image, (B,) each."""

    sigma: Tensor
    iterations: Tensor  # of Eq. 9 or 10
    residual: Tensor  # ||A v - theta v|| / theta, theta = v^T A v
    steps: Tensor  # of conjugate gradients, over all iterations; 0 for Eq. 9


def extreme_singular_value(
    jacobian: Jacobian | InverseJacobian,
    start: Tensor,
    solver: ConjugateGradients | None,
    tolerance: float,
    max_iterations: int,
    progress: Progress,
) -> Estimate:
    """The largest singular value by Eq. 9, or, given a solver, the smallest by Eq. 10 and 11.

    start: v_0 (B, D). Images that are done leave the batch; the others neither notice nor wait.
    """
    B, D = start.shape  # images, K * d
    found = Estimate(*start.new_zeros(4, B))
    left = torch.arange(B, device=start.device)  # numbers of the images that still iterate
    basis = products = start.new_empty(B, 0, D)  # orthonormal iterates, and J times each
    new = normalize(start)
    for iteration in range(1, min(max_iterations, D) + 1):
        # v_k: the best combination of the iterates so far, its eigenvalue, its residual.
        product = jacobian.times(new)
        if not product.isfinite().all():
            raise ValueError("the flow's Jacobian is not finite at some latents: diverged weights?")
        basis, products = append(basis, new), append(products, product)
        v, Jv = rayleigh_ritz(basis, products, smallest=solver is not None)
        eigenvalue = dot(Jv, Jv)  # v^T A v, without the shift (Eq. 11)
        Av = jacobian.transposed_times(Jv)
        residual = (Av - eigenvalue[:, None] * v).norm(dim=-1) / eigenvalue
        steps = solver.steps if solver is not None else torch.zeros_like(left)
        values = (eigenvalue.sqrt(), torch.full_like(residual, iteration), residual, steps)
        for field, value in zip(found, values, strict=True):
            field[left] = value.to(field.dtype)

        # An image is done when its own residual is small.
        keep = ~(residual <= tolerance)  # not ">": a NaN would count as done
        progress(int((~keep).sum()))
        left = left[keep]
        if not len(left):
            break
        if not keep.all():
            still = (basis, products, v, Av, residual)
            basis, products, v, Av, residual = (x[keep] for x in still)
            jacobian = jacobian.rows(keep)
            if solver is not None:
                solver.restrict(jacobian, keep)

        # The next iterate: w = A v (Eq. 9) or (A + eps I) w = v (Eq. 10), and what is new in it.
        w = Av if solver is None else solver.solve(v, CG_REDUCTION * residual)
        new = normalize(w)
        for _ in range(2):
            new = normalize(new - project(new, basis, basis))
    progress(len(left))
    return found


# --------------------------------------------------------------------------------------------------
# Both ends of the spectrum


class Extremes(NamedTuple):
    """Extreme singular values of J for B images, all (B,) on the CPU; sigma in units of u per z."""

    sigma_max: Tensor
    sigma_min: Tensor
    log10_condition: Tensor  # log10(sigma_max / sigma_min)
    converged: Tensor  # bool: both residuals are below the tolerance
    iterations_max: Tensor  # of Eq. 9
    iterations_min: Tensor  # of Eq. 10
    cg_steps: Tensor  # of conjugate gradients, over all iterations of Eq. 10
    residual_max: Tensor  # ||A v - lambda v|| / lambda
    residual_min: Tensor


@torch.no_grad()  # the weights need no graph; torch.func makes its own
def singular_extremes(
    flow: Map,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    shift: float = 1e-12,  # eps of Eq. 10, in units of sigma_max^2: flows differ in scale
    tolerance: float = 1e-6,  # relative residual at which an image is done
    max_iterations: int = 1000,  # of Eq. 9, of Eq. 10, and CG steps over all of Eq. 10
    seed: int = 0,  # of the first vector
    progress: Progress = lambda finished: None,
) -> Extremes:
    """sigma_max (Eq. 9), sigma_min (Eq. 10, 11) and condition number of du/dz, for every image.

    flow: a NormalizingFlow, one of its blocks, or any map (z, labels) -> (u, logdet) that treats
    images independently; its weights must have z's type, float64 for full accuracy. z (B, K, d);
    labels int64 (B,), -1 or None = unconditional. What does not reach the tolerance comes back with
    converged False. Raises ValueError for unusable arguments and for a flow that is not finite.
    """
    if z.ndim != 3 or not z.is_floating_point() or not len(z):
        raise ValueError(f"z must be a floating-point (B, K, d), got {z.dtype} {tuple(z.shape)}")
    if labels is not None and labels.shape != z.shape[:1]:
        raise ValueError(f"labels must be ({len(z)},), got {tuple(labels.shape)}")
    if not shift > 0 or not tolerance > 0 or max_iterations < 1:
        raise ValueError(
            "shift, tolerance and max_iterations must be positive, "
            f"got {shift}, {tolerance} and {max_iterations}"
        )
    labels = torch.full((len(z),), -1) if labels is None else labels
    jacobian = Jacobian(flow, z, labels.to(z.device))
    start = first_vector(z, seed)
    settings = (tolerance, max_iterations, progress)
    top = extreme_singular_value(jacobian, start, None, *settings)
    solver = ConjugateGradients(jacobian, shift * top.sigma.square(), max_iterations)
    bottom = extreme_singular_value(jacobian, start, solver, *settings)
    top, bottom = (Estimate(*(x.cpu() for x in estimate)) for estimate in (top, bottom))
    return Extremes(
        sigma_max=top.sigma,
        sigma_min=bottom.sigma,
        log10_condition=(top.sigma / bottom.sigma).log10(),
        converged=(top.residual <= tolerance) & (bottom.residual <= tolerance),
        iterations_max=top.iterations.long(),
        iterations_min=bottom.iterations.long(),
        cg_steps=bottom.steps.long(),
        residual_max=top.residual,
        residual_min=bottom.residual,
    )


def first_vector(z: Tensor, seed: int) -> Tensor:
    """v_0 (B, D): the same for every image, so that none depends on its place in a batch."""
    v = torch.randn(z[0].numel(), generator=torch.Generator().manual_seed(seed))
    return v.to(z).expand(len(z), -1)


@torch.no_grad()
def sigma_min_by_inverse(
    flow: torch.nn.Module,
    z: Tensor,
    labels: Tensor,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    seed: int = 0,
) -> Tensor:
    """sigma_min (B,) on the CPU as 1 / sigma_max(J^-1): Eq. 9 on the exact inverse of J.

    Independent of shift and CG, and free of J^T J's squared condition number. It takes K products
    per block and side, so it is a check. Arguments as in singular_extremes; labels (B,).
    """
    inverse = InverseJacobian(flow, z, labels.to(z.device))
    start = first_vector(z, seed)
    top = extreme_singular_value(inverse, start, None, tolerance, max_iterations, lambda n: None)
    return 1 / top.sigma.cpu()


# --------------------------------------------------------------------------------------------------
# A checkpoint, at the latents of real pictures


class Pictures(NamedTuple):
    """Which pictures a checkpoint is looked at with."""

    dataset: Dataset
    source: str  # in words
    indices: list[int]  # in the dataset, drawn with --seed
    conditional: bool  # on the true class


def choose_pictures(
    path: Path, model: MIMFlow, data: str | None, count: int, seed: int
) -> Pictures:
    """`count` random validation pictures of --data, or of the data the checkpoint is trained on."""
    data = model.config.data if data is None else data
    dataset = open_dataset(data, model.config.image_size, "val")
    source = "the built-in validation pictures" if data is None else f"the pictures of {data}"
    if len(dataset) < count:
        fail(f"--images {count} is more than {source} hold ({len(dataset)}): ask for fewer", 2)
    conditional = model.config.num_classes != 0 and bool(dataset.class_names)
    if conditional and tuple(dataset.class_names) != model.class_names:
        fail(f"{source} have other classes than {path} was trained on: give its own data as --data")
    # Class folders are sorted by class, so the first pictures would all be of one.
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Pictures(dataset, source, order[:count].tolist(), conditional)


@torch.no_grad()
def encode(
    model: MIMFlow, pictures: Pictures, rows: slice, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Latents z (B, K, d) of some of the pictures, in the type of the weights, and labels (B,)."""
    indices = pictures.indices[rows]
    images, labels = zip(*(pictures.dataset[i] for i in indices), strict=True)
    # Latents as the flow has learned them: of masked pictures, with noise.
    draws = draws_of_pictures(model.config, indices, seed, device)
    _, z = model.latents(torch.stack(images).to(next(model.parameters())), draws)
    return z, torch.tensor(labels) if pictures.conditional else torch.full((len(z),), -1)


def analyse(path: Path, model: MIMFlow, pictures: Pictures, flags: argparse.Namespace) -> dict:
    """What the JSON file holds about one checkpoint; see --help for the flags."""
    began, device = time.perf_counter(), flags.device
    model = model.to(device, flags.dtype)
    flow, blocks, count = model.flow, model.flow.blocks, len(pictures.indices)
    settings = dict(shift=flags.shift, tolerance=flags.tolerance, seed=flags.seed)
    settings["max_iterations"] = flags.max_iterations

    parts, labels_seen, checks = [], [], []  # parts: a list of Extremes per batch: flow, block 1..
    maps = 1 + (len(blocks) if flags.per_block else 0)
    terminal = sys.stderr.isatty()
    bar = tqdm(total=2 * count * maps, desc=str(path), unit="value", disable=not terminal)
    for first in range(0, count, flags.batch_size):
        rows = slice(first, first + flags.batch_size)
        z, labels = encode(model, pictures, rows, flags.seed, device)
        inputs = [(flow, z)]
        if flags.per_block:
            with torch.no_grad():
                outputs, _ = flow.intermediates(z, labels.to(device))
            inputs += zip(blocks, [z, *outputs[:-1]], strict=True)
        parts.append(
            [singular_extremes(f, x, labels, progress=bar.update, **settings) for f, x in inputs]
        )
        labels_seen += labels.tolist()
        few = max(0, min(len(z), CHECK_IMAGES - first)) if flags.check else 0
        if few:
            tolerance, limit = flags.tolerance, flags.max_iterations
            found = sigma_min_by_inverse(flow, z[:few], labels[:few], tolerance, limit, flags.seed)
            checks += found.tolist()
        if not terminal:
            say(f"{path}: {min(first + flags.batch_size, count)} of {count} images")
    bar.close()

    # Batches joined: one dictionary of lists for the flow, and one per block.
    joined = [
        Extremes(*map(torch.cat, zip(*part, strict=True))) for part in zip(*parts, strict=True)
    ]
    as_lists = [{name: x.tolist() for name, x in e._asdict().items()} for e in joined]
    per_image = {"index": pictures.indices, "label": labels_seen, **as_lists[0]}
    result = {
        "checkpoint": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "step": model.step,
        "dimension": flow.num_latents * flow.latent_dim,
        "pictures": pictures.source,
        "labels": "true class" if pictures.conditional else "unconditional",
        "seconds": round(time.perf_counter() - began, 1),
        "not_converged": [i for i, ok in enumerate(per_image["converged"]) if not ok],
        "summary": summarize(joined[0]),
        "images": per_image,
    }
    if flags.per_block:
        result["blocks"] = [
            {"summary": summarize(e), "images": lists}
            for e, lists in zip(joined[1:], as_lists[1:], strict=True)
        ]
    if flags.check:
        estimates = per_image["sigma_min"][: len(checks)]
        relative = [abs(a / b - 1) for a, b in zip(estimates, checks, strict=True)]
        result["check"] = {"sigma_min_by_inverse": checks, "relative_difference": relative}
    model.cpu()  # makes room for the next checkpoint
    return result


# --------------------------------------------------------------------------------------------------
# Report: a table, a JSON file, Fig. 5


def summarize(extremes: Extremes) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and quantiles over the images, for each of the three quantities."""
    summary = {}
    for name in ("sigma_max", "sigma_min", "log10_condition"):
        values = getattr(extremes, name).double().numpy()
        summary[name] = {"mean": float(values.mean()), "std": float(values.std())}
        summary[name] |= {f"{100 * q:.0f}%": float(np.quantile(values, q)) for q in QUANTILES}
    return summary


def print_report(result: dict) -> None:
    """The numbers of one checkpoint on the terminal."""
    images, count = result["images"], len(result["images"]["index"])
    say(
        f"\n{result['checkpoint']}: step {result['step']}, D = {result['dimension']}, {count} of "
        f"{result['pictures']}, {result['labels']}, {result['seconds']:.0f} s"
    )
    columns = list(result["summary"]["sigma_max"])
    say(f"  {'':16}" + "".join(f"{column:>11}" for column in columns))
    for name, row in result["summary"].items():
        say(f"  {name:16}" + "".join(f"{row[column]:11.5g}" for column in columns))
    for number, block in enumerate(result.get("blocks", []), start=1):
        mean = {name: row["mean"] for name, row in block["summary"].items()}
        bad = block["images"]["converged"].count(False)
        say(
            f"  block {number}: mean sigma_max {mean['sigma_max']:.5g}, sigma_min "
            f"{mean['sigma_min']:.5g}, log10_condition {mean['log10_condition']:.5g}"
            + (f" ({bad} images NOT converged)" if bad else "")
        )
    say(
        f"  at most {max(images['iterations_max'])} iterations for sigma_max, "
        f"{max(images['iterations_min'])} for sigma_min with {max(images['cg_steps'])} CG steps"
    )
    if result["not_converged"]:
        worst = max(images["residual_max"] + images["residual_min"])
        listed = ", ".join(map(str, result["not_converged"]))
        say(
            f"  NOT converged: {len(result['not_converged'])} of {count} images (rows {listed}), "
            f"largest residual {worst:.1e}; try more --max-iterations or a larger --tolerance"
        )
    if "check" in result:
        relative = result["check"]["relative_difference"]
        say(
            f"  check: sigma_min by the exact inverse of {len(relative)} images "
            f"differs by {max(relative):.1e} at most (relative)"
        )


def draw_figure(results: list[dict], path: Path) -> None:
    """Fig. 5: histograms of sigma_min and of the log condition number, checkpoints side by side.

    Without matplotlib it says in one line how to get the picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"no {path}: `pip install matplotlib` and run again for the picture")
        return
    names = [display_name(result, results) for result in results]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"sigma_min": "smallest singular value", "log10_condition": "log10 condition number"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values = [result["images"][key] for result in results]
        bins = np.histogram_bin_edges(np.concatenate(values), "auto")  # one scale for all
        for name, value in zip(names, values, strict=True):
            axes.hist(value, bins=bins, alpha=0.6, label=f"{name} (mean {np.mean(value):.3g})")
        axes.set(xlabel=title, ylabel="images")
        axes.legend()
    write_file(path, lambda stream: figure.savefig(stream, format="png", dpi=150))
    say(f"figure: {path}")


def display_name(result: dict, results: list[dict]) -> str:
    """The run's folder, or the whole path where that would name two checkpoints alike."""
    name = Path(result["checkpoint"]).resolve().parent.name
    same = [r for r in results if Path(r["checkpoint"]).resolve().parent.name == name]
    return name if len(same) == 1 else result["checkpoint"]


# --------------------------------------------------------------------------------------------------
# Command line


def main(flags: argparse.Namespace) -> None:
    """Analyse the checkpoints of `flags` one after the other and write the report."""
    # torch's own words about its own code, at the first JVP of a process.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)

    # Everything that can be wrong is found before the first product.
    if flags.tolerance is None:  # below float32's own, iterations only add rounding
        flags.tolerance = 1e-6 if flags.dtype == "float64" else 1e-4
    for name in ("images", "batch_size", "max_iterations", "shift", "tolerance"):
        if not getattr(flags, name) > 0:
            fail(f"--{name.replace('_', '-')} must be positive, got {getattr(flags, name)}", 2)
    if flags.seed < 0:
        fail(f"--seed must not be negative, got {flags.seed}", 2)
    flags.device, flags.dtype = select_device(flags.device), getattr(torch, flags.dtype)
    if flags.device.type == "mps" and flags.dtype == torch.float64:
        say("mps has no float64: using the CPU (--dtype float32 would use mps)")
        flags.device = torch.device("cpu")
    paths = [find_checkpoint(path) for path in flags.checkpoints or [None]]
    out = paths[0].parent / "spectral.json" if flags.out is None else Path(flags.out)
    if out.suffix != ".json":
        fail(f"--out {out} must end in .json (the picture gets the same name with .png)", 2)
    if not out.parent.is_dir():
        fail(f"--out {out}: folder {out.parent} does not exist", 2)
    models = [load_checkpoint(path) for path in paths]
    chosen = [
        choose_pictures(path, model, flags.data, flags.images, flags.seed)
        for path, model in zip(paths, models, strict=True)
    ]

    results = []
    for path, model, pictures in zip(paths, models, chosen, strict=True):
        try:
            results.append(analyse(path, model, pictures, flags))
        except ValueError as error:
            fail(f"{path}: {error}")
        print_report(results[-1])

    names = ("images", "seed", "shift", "tolerance", "max_iterations", "batch_size")
    protocol = {name: getattr(flags, name) for name in names}
    protocol |= {"dtype": str(flags.dtype), "device": str(flags.device)}
    protocol |= {"torch": torch.__version__, "numpy": np.__version__}
    text = json.dumps({"protocol": protocol, "checkpoints": results}, indent=1)
    write_file(out, lambda stream: stream.write(text.encode()))
    say(f"\nnumbers: {out}")
    draw_figure(results, out.with_suffix(".png"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of spectral.py; without `arguments` those of the command line."""
    parser = Parser(
        description="Extreme singular values of the flow's Jacobian at real latents (App. B).",
        formatter=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    hidden = argparse.SUPPRESS  # no default shown where "None" would say nothing
    add("checkpoints", nargs="*", metavar="CKPT", help="model.pt files; none = newest of runs/")
    add("--data", metavar="FOLDER", help="pictures (val/ if there is one); None = the run's own")
    add("--images", type=int, default=64, metavar="N", help="pictures per checkpoint")
    add("--shift", type=float, default=1e-12, metavar="X", help="eps of Eq. 10, over sigma_max^2")
    text = "relative residual to reach; None = 1e-6, in float32 1e-4"
    add("--tolerance", type=float, metavar="X", help=text)
    add("--max-iterations", type=int, default=1000, metavar="N", help="limit of each iteration")
    add("--seed", type=int, default=0, metavar="N", help="of pictures, masks, noise, first vector")
    add("--check", action="store_true", default=hidden, help="sigma_min a second, exact way")
    add("--per-block", action="store_true", default=hidden, help="also the spectrum of each block")
    add("--batch-size", type=int, default=16, metavar="N", help="images at a time: memory")
    add("--dtype", choices=("float64", "float32"), default="float64", help="of the arithmetic")
    add("--device", metavar="NAME", help="cuda, mps or cpu; None = the first there is")
    add("--out", metavar="FILE.json", help="numbers, .png beside; None = spectral.json beside CKPT")
    flags = parser.parse_args(arguments)
    return argparse.Namespace(**{"check": False, "per_block": False, **vars(flags)})


if __name__ == "__main__":
    run_program(lambda: main(parse_arguments()))
