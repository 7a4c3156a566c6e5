"""The Jacobian of the flow (App. B, Fig. 5): how much F stretches and squeezes near real latents.

    python spectral.py runs/shapes/model.pt                               # one checkpoint
    python spectral.py runs/mimflow-l/model.pt runs/starflow-l/model.pt   # Fig. 5: side by side

J = dF/dz is D x D, D = K d, too large to write down (mimflow-l: 8192^2), but its products come from
automatic differentiation: J v from a JVP, J^T u from a VJP. With A = J^T J, from a random v_0:

    v_{k+1} = A v_k / ||A v_k||,                           sigma_max = sqrt(v^T A v)       (Eq. 9)
    solve (A + eps I) w = v_k by conjugate gradients,  v_{k+1} = w / ||w||                 (Eq. 10)
                                                           sigma_min = sqrt(lambda - eps)  (Eq. 11)
    condition number = sigma_max / sigma_min

lambda is the smallest eigenvalue of A + eps I; lambda - eps is then v^T A v, which is what is
computed here, so that the shift only helps the solver and never enters a value.

Two deviations keep more vectors; the limit is the same, in dozens of products, not thousands.
1. Eq. 9 and 10 keep the last vector only, and crawl when two extreme values nearly coincide. Here
   all iterates stay, and v_k is their best combination (Rayleigh-Ritz; for Eq. 9, Lanczos' method).
2. Conjugate gradients lose their conjugacy to rounding when A is ill-conditioned. Here old search
   directions stay too, and every solve starts from those of the solves before it. (A matrix with
   D = 128, condition number 1e4: 22,000 products without this memory, 150 with it.)

An image is done when its own residual ||A v - theta v|| / theta, theta = v^T A v, is below the
tolerance: an eigenvalue of A then lies that close, relatively, and half as far for sigma.
Rounding leaves about 1e-16 (condition number)^2 in float64, so beyond 1e5 the smallest value cannot
prove 1e-6. It is then reported as not converged, with its residual.

J is block-diagonal over a batch, so one product serves all images. It is taken at real validation
pictures, hidden and noised as in training (Eq. 1), given the true class where run and pictures have
classes. On mimflow-l a product with A is 0.48 TFLOP an image; in float64 the weights are 3.8 GB,
the VJP's graph 0.8 GB an image, a remembered direction 128 kB an image.
"""

import common  # noqa: F401  # isort: skip (before torch: Ctrl-C)
import functools
import json
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import runs
from common.data import Pictures
from common.runs import fail, say
from train import MIMFlow, draws_of_pictures, load_checkpoint

CG_REDUCTION = 0.01  # a solve of Eq. 10 is "inexact": this fraction of the outer residual is enough
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SOLVER_FLAGS = ("shift", "tolerance", "max_iterations", "seed")  # arguments of singular_extremes


# --------------------------------------------------------------------------------------------------
# The Jacobian as two products


class Jacobian:
    """J = du/dz of a flow, or of one of its blocks, for every image of a batch.

    Vectors are (B, D) with D = K d: one per image, all served by one pass.
    """

    def __init__(self, flow: Callable, z: Tensor, labels: Tensor):
        self.flow, self.z, self.labels = flow, z, labels
        self.u, self.vjp = torch.func.vjp(self.map, z)  # one graph, for every J^T u

    def map(self, z: Tensor) -> Tensor:
        # Neither forward-mode AD nor a second VJP goes through fused attention: plain math instead.
        with sdpa_kernel(SDPBackend.MATH):
            return self.flow(z, self.labels)[0]

    def times(self, v: Tensor) -> Tensor:
        """J v, (B, D) -> (B, D): a JVP."""
        return torch.func.jvp(self.map, (self.z,), (v.view_as(self.z),))[1].flatten(1)

    def transposed_times(self, u: Tensor) -> Tensor:
        """J^T u, (B, D) -> (B, D): a VJP."""
        return self.vjp(u.view_as(self.z))[0].flatten(1)

    def rows(self, keep: Tensor) -> "Jacobian":
        """The Jacobian of some of the images, keep (B,) bool."""
        return Jacobian(self.flow, self.z[keep], self.labels[keep])


# --------------------------------------------------------------------------------------------------
# Eq. 9-11: vectors are (B, D), scalars (B,), one of each per image


def normalize(v: Tensor) -> Tensor:
    """v / ||v||; a zero vector stays zero."""
    return v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def project(v: Tensor, rows: Tensor, onto: Tensor) -> Tensor:
    """sum_i (rows_i . v) onto_i: v (B, D), rows and onto (B, m, D) -> (B, D)."""
    return (onto.mT @ (rows @ v[..., None]))[..., 0]


def orthogonalize(v: Tensor, rows: Tensor, onto: Tensor) -> Tensor:
    """The unit vector (B, D) left of v (B, D) without its part in the span of `onto` (B, m, D).
    `rows` (B, m, D), with rows_i . onto_j = 1 if i = j else 0, measures that part: an orthonormal
    basis is its own. A second round removes what rounding left: "twice is enough"."""
    v = normalize(v)
    for _ in range(2):
        v = normalize(v - project(v, rows, onto))
    return v


class ConjugateGradients:
    """Solves (A + eps I) w = b (Eq. 10), many times, and remembers its search directions.

    Directions p_i are conjugate, p_i^T (A + eps I) p_j = 1 if i = j else 0, so that the best w in
    their span is sum_i (p_i . b) p_i. An image that is solved gets the direction 0, which does
    nothing.
    """

    def __init__(self, jacobian: Jacobian, shift: Tensor, max_steps: int):
        self.jacobian, self.shift, self.max_steps = jacobian, shift[:, None], max_steps  # eps (B,)
        B, D = len(shift), jacobian.z[0].numel()
        self.directions = self.products = shift.new_empty(B, 0, D)  # p_i, and (A + eps I) p_i
        self.steps = torch.zeros_like(shift)  # done so far

    def improve(self, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Add to w (B, D), whose residual is r (B, D), the best in the span of the directions."""
        w = w + project(r, self.directions, self.directions)
        return w, r - project(r, self.directions, self.products)

    def solve(self, b: Tensor, tolerance: Tensor) -> Tensor:
        """w (B, D) with ||b - (A + eps I) w|| <= tolerance (B,), or what max_steps allow."""
        w, r = self.improve(torch.zeros_like(b), b)
        w, r = self.improve(w, r)  # what rounding left
        while self.directions.shape[1] < self.max_steps:
            open_ = r.norm(dim=-1) > tolerance  # (B,)
            if not open_.any():
                break
            # The next direction is the residual, made conjugate to the others. Plain CG subtracts
            # the last one only, since r is conjugate to the older ones, but for rounding.
            r_open = torch.where(open_[:, None], r, 0.0)
            p = orthogonalize(r_open, self.products, self.directions)
            product = self.jacobian.transposed_times(self.jacobian.times(p)) + self.shift * p
            square = (p * product).sum(dim=1, keepdim=True)  # p^T (A + eps I) p, to be 1
            size = square.clamp_min(torch.finfo(p.dtype).tiny).sqrt()
            p, product = p / size, product / size
            along = (p * r).sum(dim=1, keepdim=True)
            w, r = w + along * p, r - along * product
            self.directions = torch.cat((self.directions, p[:, None]), dim=1)
            self.products = torch.cat((self.products, product[:, None]), dim=1)
            self.steps += open_
        return w

    def restrict(self, jacobian: Jacobian, keep: Tensor) -> None:
        """Go on with some of the images, keep (B,) bool, whose Jacobian is `jacobian`."""
        self.jacobian, self.shift, self.steps = jacobian, self.shift[keep], self.steps[keep]
        self.directions, self.products = self.directions[keep], self.products[keep]


def rayleigh_ritz(basis: Tensor, products: Tensor, smallest: bool) -> tuple[Tensor, Tensor]:
    """The unit v in the span of an orthonormal basis (B, m, D) with the extreme ||J v||, and J v,
    (B, D) each. `products` (B, m, D) holds J times the basis."""
    # Gram matrix = A in the basis. Only its eigenvector is used: the eigenvalue of a small sigma
    # would have lost its digits here, the length of the combination J v has not.
    gram = products @ products.mT  # (B, m, m)
    best = torch.linalg.eigh(gram)[1][..., 0 if smallest else -1]  # (B, m)
    return (best[:, None] @ basis)[:, 0], (best[:, None] @ products)[:, 0]


def extreme_singular_value(
    jacobian: Jacobian,
    start: Tensor,
    solver: ConjugateGradients | None,
    tolerance: float,
    max_iterations: int,
    progress: Callable[[int], Any],
) -> Tensor:
    """The largest singular value by Eq. 9, or, given a solver, the smallest by Eq. 10 and 11.

    start: v_0 (B, D). Returns (4, B): the value, iterations, residual and steps of the solver of
    every image. Those that are done leave the batch; the others neither notice nor wait.
    """
    B, D = start.shape  # images, K * d
    found = start.new_zeros(4, B)
    left = torch.arange(B, device=start.device)  # which images still iterate
    basis = products = start.new_empty(B, 0, D)  # orthonormal iterates, and J times each
    new = normalize(start)
    for iteration in range(1, min(max_iterations, D) + 1):
        # v_k: the best combination of the iterates so far, its eigenvalue, its residual.
        product = jacobian.times(new)
        if not product.isfinite().all():
            raise ValueError("the flow's Jacobian is not finite at some latents: diverged weights?")
        basis = torch.cat((basis, new[:, None]), dim=1)
        products = torch.cat((products, product[:, None]), dim=1)
        v, Jv = rayleigh_ritz(basis, products, smallest=solver is not None)
        eigenvalue = (Jv * Jv).sum(dim=1)  # v^T A v, without the shift (Eq. 11)
        Av = jacobian.transposed_times(Jv)
        residual = (Av - eigenvalue[:, None] * v).norm(dim=-1) / eigenvalue
        steps = torch.zeros_like(residual) if solver is None else solver.steps
        count = torch.full_like(residual, iteration)
        found[:, left] = torch.stack((eigenvalue.sqrt(), count, residual, steps))

        # An image is done when its own residual is small. Whatever has a row for it loses that.
        keep = ~(residual <= tolerance)  # not ">": a NaN would count as done
        left = left[keep]
        progress(len(keep) - len(left))
        if not len(left):
            break
        if len(left) < len(keep):
            per_image = (basis, products, v, Av, residual)
            basis, products, v, Av, residual = (x[keep] for x in per_image)
            jacobian = jacobian.rows(keep)
            if solver is not None:
                solver.restrict(jacobian, keep)

        # The next iterate: w = A v (Eq. 9) or (A + eps I) w = v (Eq. 10), and what is new in it.
        w = Av if solver is None else solver.solve(v, CG_REDUCTION * residual)
        new = orthogonalize(w, basis, basis)
    progress(len(left))
    return found


class Extremes(NamedTuple):
    """Extreme singular values of J for B images, all (B,) on the CPU; sigma in units of u per z."""

    sigma_max: Tensor
    sigma_min: Tensor
    log10_condition: Tensor  # log10(sigma_max / sigma_min)
    converged: Tensor  # bool: both residuals are below the tolerance
    iterations_max: Tensor  # of Eq. 9
    iterations_min: Tensor  # of Eq. 10
    cg_steps: Tensor  # of conjugate gradients, over all iterations of Eq. 10
    residual_max: Tensor  # ||A v - theta v|| / theta, of an eigenvalue: the best found, no bound
    residual_min: Tensor


@torch.no_grad()  # the weights need no graph; torch.func makes its own
def singular_extremes(
    flow: Callable,
    z: Tensor,
    labels: Tensor | None = None,
    *,
    shift: float = 1e-12,  # eps of Eq. 10, in units of sigma_max^2: flows differ in scale
    tolerance: float = 1e-6,  # relative residual at which an image is done
    max_iterations: int = 1000,  # of Eq. 9, of Eq. 10, and CG steps over all of Eq. 10
    seed: int = 0,  # of the first vector
    progress: Callable[[int], Any] = lambda finished: None,  # told of values just finished
) -> Extremes:
    """sigma_max (Eq. 9), sigma_min (Eq. 10, 11) and condition number of du/dz, for every image.

    flow: a NormalizingFlow, one of its blocks, or any map (z, labels) -> (u, logdet) that treats
    images independently; its weights must have z's type, float64 for full accuracy. z (B, K, d);
    labels int64, one or a row of words each, -1 or None = unconditional. What misses the tolerance
    has converged False. Raises ValueError for unusable arguments and for a flow that is not finite.
    """
    if z.ndim != 3 or not z.is_floating_point() or not len(z):
        raise ValueError(f"z must be a floating-point (B, K, d), got {z.dtype} {tuple(z.shape)}")
    if labels is not None and labels.shape[:1] != z.shape[:1]:
        raise ValueError(f"labels must be ({len(z)},), got {tuple(labels.shape)}")
    if not (shift > 0 and tolerance > 0 and max_iterations > 0):
        raise ValueError("shift, tolerance and max_iterations must be positive")
    places = getattr(flow, "caption_words", 0)  # of the words of a caption
    labels = torch.full((len(z), places)[: 1 + bool(places)], -1) if labels is None else labels
    jacobian = Jacobian(flow, z, labels.to(z.device))
    # v_0 is the same for every image, so that none depends on its place in a batch.
    v = torch.randn(z[0].numel(), generator=torch.Generator().manual_seed(seed))
    start = v.to(z).expand(len(z), -1)  # (B, D)
    top = extreme_singular_value(jacobian, start, None, tolerance, max_iterations, progress)
    solver = ConjugateGradients(jacobian, shift * top[0].square(), max_iterations)
    bottom = extreme_singular_value(jacobian, start, solver, tolerance, max_iterations, progress)
    sigma_max, iterations_max, residual_max, _ = top.cpu()
    sigma_min, iterations_min, residual_min, cg_steps = bottom.cpu()
    condition = (sigma_max / sigma_min).log10()
    converged = (residual_max <= tolerance) & (residual_min <= tolerance)
    counts = (x.long() for x in (iterations_max, iterations_min, cg_steps))
    return Extremes(sigma_max, sigma_min, condition, converged, *counts, residual_max, residual_min)


# --------------------------------------------------------------------------------------------------
# The command: checkpoints at the latents of real pictures; a table, a JSON file, Fig. 5


@torch.no_grad()
def encode(model: MIMFlow, pictures: Pictures, rows: range, seed: int) -> tuple[Tensor, Tensor]:
    """Latents z (B, K, d) of some of the pictures, in the type of the weights, and labels (B,)."""
    images, labels, numbers = pictures[rows]
    weight = next(model.parameters())
    # Latents as the flow has learned them: of masked pictures, with noise.
    draws = draws_of_pictures(model.config, numbers.tolist(), seed, weight.device)
    _, z = model.latents(images.to(weight), draws)
    return z, labels if model.config.num_classes else torch.full_like(labels, -1)


@torch.no_grad()
def analyse(path: Path, sha256: str, model: MIMFlow, pictures: Pictures, flags: Namespace) -> dict:
    """What the JSON file holds about one checkpoint; see --help for the flags."""
    began, count = time.perf_counter(), len(pictures)
    flow = model.to(flags.device, flags.dtype).flow
    maps = 1 + (len(flow.blocks) if flags.per_block else 0)
    bar = runs.progress(None, str(path), total=2 * count * maps, unit="value")
    settings = {name: getattr(flags, name) for name in SOLVER_FLAGS}
    solve = functools.partial(singular_extremes, progress=bar.update, **settings)
    all_labels, batches = [], []  # batches: the Extremes of the flow, and of its blocks, for each
    for first in range(0, count, flags.batch_size):
        rows = range(first, min(first + flags.batch_size, count))
        z, labels = encode(model, pictures, rows, flags.seed)
        inputs = [(flow, z)]
        if flags.per_block:
            outputs, _ = flow.intermediates(z, labels)
            inputs += zip(flow.blocks, [z, *outputs[:-1]], strict=True)
        batches.append([solve(f, x, labels) for f, x in inputs])
        all_labels += labels.tolist()
        if bar.disable:  # nobody is watching it
            say(f"{path}: {rows.stop} of {count} images")
    bar.close()
    model.cpu()  # makes room for the next checkpoint

    whole, *blocks = (summarize(parts) for parts in zip(*batches, strict=True))
    whole["images"] = {"index": pictures.numbers.tolist(), "label": all_labels, **whole["images"]}
    head = {"checkpoint": str(path), "sha256": sha256, "step": model.step}
    return {
        **head,
        "dimension": flow.num_latents * flow.latent_dim,
        "pictures": pictures.source,
        "labels": "true class" if np.max(all_labels) >= 0 else "unconditional",
        "seconds": round(time.perf_counter() - began, 1),
        **whole,
        **({"blocks": blocks} if blocks else {}),
    }


def summarize(parts: tuple[Extremes, ...]) -> dict[str, Any]:
    """All batches of the flow or a block: lists over the images, and for the quantities of Fig. 5
    mean, standard deviation and quantiles."""
    joined, summary = Extremes(*map(torch.cat, zip(*parts, strict=True))), {}
    for name in ("sigma_max", "sigma_min", "log10_condition"):
        values = getattr(joined, name).double().numpy()
        summary[name] = {"mean": float(values.mean()), "std": float(values.std())}
        summary[name] |= {f"{100 * q:.0f}%": float(np.quantile(values, q)) for q in QUANTILES}
    images = {name: x.tolist() for name, x in joined._asdict().items()}
    bad = [row for row, converged in enumerate(images["converged"]) if not converged]
    return {"not_converged": bad, "summary": summary, "images": images}


def print_report(result: dict[str, Any]) -> None:
    """The numbers of one checkpoint on the terminal: the flow's, and those of each block."""
    n = len(result["images"]["index"])
    about = "{checkpoint}: step {step}, D = {dimension}, {n} of {pictures}, {labels}, {seconds} s"
    say("\n" + about.format(n=n, **result))
    say(" " * 26 + "".join(f"{column:>11}" for column in result["summary"]["sigma_max"]))
    for number, part in enumerate([result, *result.get("blocks", [])]):
        name, bad = f"block {number} " if number else "", part["not_converged"]
        for quantity, row in part["summary"].items():
            say(f"  {name + quantity:24}" + "".join(f"{value:11.5g}" for value in row.values()))
        if bad:
            say(f"  {name}NOT converged: {len(bad)} of {n} images (rows {str(bad)[1:-1]})")


def plot_figure(results: list[dict], path: Path) -> None:
    """Fig. 5: histograms of sigma_min and of the log condition number, checkpoints side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say(f"no {path}: `pip install matplotlib` and run again for the picture")
    paths = (Path(result["checkpoint"]).resolve().parts[-2:] for result in results)
    names = ["/".join(parts).replace("$", r"\$") for parts in paths]  # $ begins a formula
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"sigma_min": "smallest singular value", "log10_condition": "log10 condition number"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        values = [result["images"][key] for result in results]
        means = [f"{x} (mean {np.mean(v):.3g})" for x, v in zip(names, values, strict=True)]
        axes.hist(values, "auto", alpha=0.6, histtype="stepfilled", label=means)
        axes.set(xlabel=title, ylabel="images")
        axes.legend()
    runs.write_file(path, lambda stream: figure.savefig(stream, format="png", dpi=150))
    say(f"figure: {path}")


def main(flags: Namespace) -> None:
    """Analyse the checkpoints of `flags` one after the other and write the report."""
    if runs.world_size() > 1:
        fail("spectral.py is one process: start it with python, WORLD_SIZE unset", 2)
    # torch's own words about its own code, at the first JVP of a process.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    # Below float32's own tolerance, iterations only add rounding.
    flags.tolerance = flags.tolerance or {"float64": 1e-6, "float32": 1e-4}[flags.dtype]
    flags.device, flags.dtype = runs.select_device(flags.device), getattr(torch, flags.dtype)
    if flags.device.type == "mps" and flags.dtype == torch.float64:
        say("mps has no float64: using the CPU (--dtype float32 would use mps)")
        flags.device = torch.device("cpu")
    # Everything that can be wrong is found before the first product.
    paths = [runs.find_checkpoint(path) for path in flags.checkpoints or [None]]
    work = []
    for path in paths:
        model = load_checkpoint(path)
        if model.flow is None:
            fail(f"{path}: its prior (emigm.py) is no map and has no Jacobian: a flow is needed")
        data = model.config.data if flags.data is None else flags.data
        asked = (model.config.image_size, "val", flags.images, flags.seed)
        pictures = Pictures(data, *asked, model.config.caption_words)
        if model.config.num_classes and pictures.class_names not in ((), model.class_names):
            fail(f"{path} was trained on other classes than {pictures.source} has: give its own")
        work.append((path, runs.file_sha256(path), model, pictures))
    out = runs.beside(paths[0], "spectral.json") if flags.out is None else Path(flags.out)
    inputs = [*paths, *(Path(pictures.source) for *_, pictures in work)]
    runs.check_output(out, ".json", inputs)
    runs.check_output(out.with_suffix(".png"), ".png", inputs)

    results = []
    for path, *what in work:
        try:
            results.append(analyse(path, *what, flags))
        except ValueError as error:
            fail(f"{path}: {error}")
        print_report(results[-1])

    protocol = {name: getattr(flags, name) for name in ("images", "batch_size", *SOLVER_FLAGS)}
    protocol |= {"dtype": str(flags.dtype), "device": str(flags.device)}
    protocol |= {"torch": torch.__version__, "numpy": np.__version__}
    runs.write_text(out, json.dumps({"protocol": protocol, "checkpoints": results}, indent=1))
    say(f"\nnumbers: {out}")
    plot_figure(results, out.with_suffix(".png"))


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags of spectral.py; without `arguments` those of the command line."""
    parser = runs.Parser(ArgumentDefaultsHelpFormatter, description=__doc__.splitlines()[0])
    add, size = parser.add_argument, runs.number(float, 1e-99, 0.1, "positive, 0.1 at most")
    count, small = dict(type=runs.positive, metavar="N"), dict(type=size, metavar="X")
    add("checkpoints", nargs="*", metavar="CKPT", help="model.pt files; none = as sample.py")
    add("--data", metavar="FOLDER", help="pictures (val/ if there is one); None = the run's own")
    add("--images", default=64, help="pictures per checkpoint", **count)
    add("--shift", default=1e-12, help="eps of Eq. 10, over sigma_max^2", **small)
    add("--tolerance", help="relative residual to reach; None = 1e-6, in float32 1e-4", **small)
    add("--max-iterations", default=1000, help="limit of each iteration", **count)
    add("--seed", default=0, help="of pictures, masks, noise, first vector", type=runs.seed_number)
    add("--per-block", action="store_true", help="also the spectrum of each block")
    add("--batch-size", default=16, help="images at a time: memory", **count)
    add("--dtype", choices=("float64", "float32"), default="float64", help="of the arithmetic")
    add("--device", metavar="NAME", help="cuda, mps or cpu; None = the first there is")
    add("--out", metavar="FILE.json", help="numbers, .png beside; None = spectral.json beside CKPT")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    runs.run_program(lambda: main(parse_arguments()))
