"""From a checkpoint to pictures: draw noise, invert the flow, decode (Sec. 3.2.2, App. A).

    python sample.py                                newest runs/*/model.pt -> grid.png beside it
    python sample.py CKPT --classes 3 7 --num 32 --out grid.png
    python sample.py CKPT --prompt "a small red star on a blue ground" "a ring"
    torchrun --nproc_per_node=8 -- sample.py CKPT --num 50000 --npz samples.npz     for ADM's suite
    python sample.py CKPT --between A.png B.png         from one to the other, through the flow
    python sample.py CKPT --reconstruct A.png B.png     pictures, what the encoder sees, decoded

    u ~ N(0, I) (B, K, d), label --flow inverse, guided in the deep block--> z (B, K, d)
    [ z <- z + sigma^2 * grad_z log p_F(z), TARFlow's denoising, with --denoise ]
    z --decoder--> image (B, 3, H, W) in [-1, 1] --> uint8      (nothing masked; no noise added)

Sample i has class (or prompt) number i mod C and noise of its own, by seed and i. They are made in
batches of --batch-size, batch j by process j mod world_size, so that one process and many write the
same set, to the last bit where devices and threads a process are the same. Finished batches wait in
OUTPUT.parts: after an interruption the same command goes on. (The "--" keeps torchrun from reading
--num as an abbreviation of a flag of its own.)

The flow is inverted token by token, or with --sampler jacobi by iterating over many tokens at once,
to nearly the same latents: it can pay for single pictures of a large flow. On CUDA,
--cuda-graph records the second batch and replays it without Python: it pays from the third on.
The second prior (emigm.py) reveals tokens in --steps instead, in an order drawn from (seed, i, 2).
"""

import common  # noqa: F401  # isort: skip (before torch: Ctrl-C)
import argparse
import functools
import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import data, runs
from common.data import is_batch, save_png, shown_classes, write_npz
from common.runs import Parser, fail, flag, positive, printable, rank, say, wait_for_all
from common.shapes import from_uint8, read_prompts, to_uint8
from emigm import sampling_order
from flow import RULES, SAMPLERS
from train import MIMFlow, count_parameters, draws_of_pictures, load_checkpoint, sample_noise

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
GRID_COLUMNS = 8  # pictures a class when --num is left out
OF_EMIGM = ("steps", "evaluations", "interval")  # flags of one prior only
OF_FLOW = "sampler tolerance cuda_graph guidance_rule constant_guidance denoise between".split()
OF_CAPTIONS = ("prompt", "prompts")


# --------------------------------------------------------------------------------------------------
# What to sample


def choose_classes(names: list[str] | None, model: MIMFlow, every: bool = False) -> list[int]:
    """Class indices from names or indices (a name wins); by default those of a grid, or `every`."""
    count = model.config.num_classes
    if names is None:
        return (list(range(count)) or [-1]) if every else shown_classes(count)
    if count == 0:
        fail("this model was trained without labels: leave --classes out", 2)
    known = {str(i): i for i in range(count)} | {n: i for i, n in enumerate(model.class_names)}
    for name in names:
        if name not in known:
            hint = f"this model has classes 0 to {count - 1}, --info names them"
            fail(f"{name!r:.50} is no class and no picture: {hint}", 2)
    return [known[name] for name in names]


def choose_guidance(weight: float | None, model: MIMFlow) -> float:
    """The weight that was asked for, or that of the training's grids; 0 in a model without classes,
    which has nothing to be guided away from."""
    if model.config.num_classes == 0 and weight:
        fail("this model was trained without labels: it has no guidance, leave --guidance out", 2)
    default = model.config.guidance if model.config.num_classes else 0.0
    return default if weight is None else weight


# --------------------------------------------------------------------------------------------------
# A batch
#
# A flow samples by running backwards: the deep block first, then the shallow ones, then the decoder
# once. Nothing is masked, no noise is added: both shaped the latents that the flow has learned, and
# those are what it produces now (Sec. 3.3.2). Guidance moves each token away from what the model
# would expect without a class (App. A); only 0, the exact inverse, samples the model's own density.


def in_bfloat16(options: Namespace, device: torch.device) -> bool:
    """Whether matrices are bfloat16. Left open: on CUDA, but not for jacobi, since rounding changes
    a latent number by about 1e-2, and no tolerance below that is met early."""
    default = runs.uses_bf16(device) and options.sampler == "sequential"
    return default if options.bf16 is None else options.bf16


class RecordedInverse:
    """flow.inverse on CUDA, recorded as a graph and replayed, with the same arguments and results.

    Token by token, a small batch leaves the GPU waiting: Python launches thousands of small kernels
    one after the other. But they are the same for every batch, since nothing in the token loop
    depends on a number (jacobi's does). So the first batch of a size runs as always, and makes what
    may not be made while recording (work spaces, compiled kernels). At the second a recording is
    taken, which computes nothing; that batch and all later ones are replays, on their own noise.
    """

    def __init__(self, inverse: Callable[..., Tensor]):
        self.inverse = inverse
        self.graphs: dict[tuple, tuple | None] = {}  # what a recording fixes -> it

    def __call__(self, u: Tensor, labels: Tensor, guidance: float, **how: Any) -> Tensor:
        key = (*u.shape, guidance, *sorted(item for item in how.items() if item[0] != "watch"))
        if key not in self.graphs:
            self.graphs[key] = None
            return self.inverse(u, labels, guidance, **how)
        if self.graphs[key] is None:
            u_in, labels_in, graph = u.clone(), labels.clone(), torch.cuda.CUDAGraph()
            # Autocast keeps the bfloat16 weights that it has made. Those from before the recording
            # are freed before a replay reads them; those from within lie in the graph's own memory,
            # which every replay writes over. So both are forgotten.
            torch.clear_autocast_cache()
            # thread_local: under torchrun, NCCL's own thread may talk to the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                z = self.inverse(u_in, labels_in, guidance, **how)
            torch.clear_autocast_cache()
            self.graphs[key] = graph, u_in, labels_in, z
        graph, u_in, labels_in, z = self.graphs[key]
        u_in.copy_(u)
        labels_in.copy_(labels)
        graph.replay()  # calls no Python, so nobody tells `watch`
        return z.clone()  # the next replay writes there again


def sample_batch(
    model: MIMFlow, indices: range, classes: list, options: Namespace, **how: Any
) -> np.ndarray:
    """Samples number `indices` as uint8 (n, H, W, 3) of classes, or of rows of words; `how` as in
    flow.inverse."""
    c, device = model.config, model.decoder.coordinates.device
    # Drawn on the CPU, one generator a sample: the same picture on any device, in any batch.
    noise = sample_noise(options.seed, indices, c.num_latents, c.latent_dim).to(device)
    labels = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
    if model.flow is not None:
        how |= dict(annealed=not options.constant_guidance, rule=options.guidance_rule)
        how |= dict(sampler=options.sampler, tolerance=options.tolerance)
    else:  # what is left open is the preset's
        how |= {k: getattr(options, k) for k in OF_EMIGM if getattr(options, k) is not None}
        how["order"] = sampling_order(options.seed, indices, c.num_latents)
    # As in training: matrices in bfloat16; the flow's state stays float32. No cuDNN attention: it
    # plans anew for each length of the cache.
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(options, device))
    with bf16, sdpa_kernel(ATTENTION):
        images = model.sample(noise, labels, options.guidance, options.denoise, **how)
    if not images.isfinite().all():
        fail("pictures are not finite: lower --guidance, or train again", every_rank=True)
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)


def hide_patches(images: Tensor, mask: Tensor) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] with the hidden patches (True) of mask (B, N) in grey."""
    hidden = mask.unflatten(1, 2 * (math.isqrt(mask.shape[1]),))[:, None].float()  # (B, 1, g, g)
    return images * (1 - torch.nn.functional.interpolate(hidden, images.shape[2:]))


@torch.no_grad()
def show_given(out: Path, model: MIMFlow, options: Namespace) -> None:
    """The way --between two pictures, with both, or each picture to --reconstruct as it is, as the
    encoder sees it in training, and decoded. Given are files, or classes, of which a sample is."""
    images: list[Tensor] = []
    for i, name in enumerate(options.between or options.reconstruct):
        file, c = Path(name), model.config  # a name with a dot may be a class, of CUB for one
        if file.is_file() or c.caption_words or (file.suffix and name not in model.class_names):
            picture = data.read_picture(Path(name), model.config.image_size)
        else:
            classes = choose_classes([name], model)
            picture = sample_batch(model, range(i, i + 1), classes, options)[0]
        images.append(from_uint8(torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
    x = torch.stack(images).to(model.decoder.coordinates)  # (n, 3, H, W)
    if options.between:
        # Nothing is hidden and no noise is added: the ends are what encoder and decoder make of it.
        way = model.decoder(model.flow.between(model.encoder(x), GRID_COLUMNS))
        grid, columns = torch.cat((x[:1], way, x[1:])), len(way) + 2
    else:
        draws = draws_of_pictures(model.config, range(len(x)), options.seed, x.device)
        sides = x, hide_patches(x, draws.mask), model.decoder(model.latents(x, draws)[1])
        grid, columns = torch.stack(sides, dim=1).flatten(0, 1), len(sides)
    data.save_png(grid.clamp(-1, 1), columns, out)
    say(f"{out}: {len(grid)} pictures, {columns} a row")


# --------------------------------------------------------------------------------------------------
# A set: batches over all processes, put together by one
#
# 50,000 pictures of 256 x 256 are 10 GB, so no function here holds more than one batch of them, but
# for grids, which are small.


def sample_parts(model: MIMFlow, classes: list, options: Namespace, parts: Path) -> list[Path]:
    """Sample each batch not yet in the folder `parts`, over all processes; all files in order."""
    size, side = options.batch_size, model.config.image_size
    batches = [range(options.num)[i : i + size] for i in range(0, options.num, size)]
    paths = [parts / f"{j:06d}.npy" for j in range(len(batches))]
    # Shares that need no talking: a restart agrees, even with another number of processes. What a
    # crash of the machine has cut short is made again.
    share = range(rank(), len(batches), runs.world_size())
    mine = [j for j in share if not is_batch(paths[j], (len(batches[j]), side, side, 3))]
    steps = model.config.num_latents - 1  # of each block, token by token
    tokens = steps * len(model.flow.blocks) if model.flow else steps + 1  # of a batch
    sweeps, start = Counter(), time.perf_counter()
    with runs.progress(None, "tokens", total=len(mine) * tokens) as bar:

        def watch(block: int, solved: int) -> None:
            sweeps[block] += 1
            bar.update(solved)

        for done, j in enumerate(mine, start=1):
            images = sample_batch(model, batches[j], classes, options, watch=watch)
            runs.write_file(paths[j], functools.partial(np.save, arr=images))
            bar.update(done * tokens - bar.n)  # of a replayed graph nobody was told
    if mine:
        taken = time.perf_counter() - start
        pictures = sum(len(batches[j]) for j in mine)
        say(f"{pictures} pictures in {taken:.1f} s, {pictures / taken:.1f} a second here")
        if options.sampler != "sequential":
            mean = ", ".join(f"{sweeps[block] / len(mine):.1f}" for block in sorted(sweeps)[::-1])
            say(f"sweeps a batch, deep block first: {mean}; token by token: {steps} each")
    wait_for_all()
    return paths


def write_grid(path: Path, parts: list[Path], num_classes: int) -> None:
    """A PNG with a row a class (rows of 8 for one class or none); missing pictures are white."""
    images = np.concatenate([np.load(part) for part in parts])  # (n, H, W, 3)
    rows = num_classes if num_classes > 1 else math.ceil(len(images) / GRID_COLUMNS)
    columns = math.ceil(len(images) / rows)
    grid = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    # Sample i has class i mod C: place it in that row, in the column of its turn.
    i = np.arange(len(images))
    grid[i if num_classes == 1 else i % rows * columns + i // rows] = images
    save_png(torch.from_numpy(grid).permute(0, 3, 1, 2) / 127.5 - 1, columns, path)


def sample_set(path: Path, model: MIMFlow, classes: list, options: Namespace) -> None:
    """Sample options.num pictures of the checkpoint at `path` over all processes, then write them
    as ADM's .npz (options.npz), as a grid (options.out), or both."""
    output = options.npz or options.out
    parts = output.with_name(output.name + ".parts")
    # Finished batches of an interrupted command serve again only if everything that decides about
    # pixels is the same: the flags, but for those that say where to write, and the weights.
    key = {k: str(v) for k, v in vars(options).items() if k not in ("out", "npz", "device", "info")}
    # Not the file's hash: a training run may have replaced it since it was read.
    key |= {"classes": classes, "weights": runs.weights_sha256(model)}
    with runs.parts_folder(parts, {**key, "device": model.decoder.coordinates.device.type}):
        files = sample_parts(model, classes, options, parts)
        numbers = range(len(classes)) if options.prompt else classes
        if rank() == 0 and options.npz is not None:
            write_npz(options.npz, files, np.resize(numbers, options.num))  # cycles through them
            say(f"{options.npz}: {options.num} pictures, {len(set(numbers))} classes")
        if rank() == 0 and options.out is not None:
            write_grid(options.out, files, len(classes))
            known = options.prompt or model.class_names
            names = ["no classes" if i < 0 else printable(known[i]) for i in numbers]
            how = f"guidance {options.guidance:g}, seed {options.seed}"
            say(f"{options.out}: {how}; rows: {', '.join(names)}")


# --------------------------------------------------------------------------------------------------
# Command line


def show_info(path: Path, model: MIMFlow) -> None:
    """Print what a checkpoint is: step, configuration, classes, sizes."""
    say(f"{path}: step {model.step}, EMA weights")
    say(printable(" ".join(f"{flag(k)} {v}" for k, v in vars(model.config).items())))
    say(f"classes: {printable(', '.join(model.class_names)) or 'none'}")
    for name, module in model.named_children():  # encoder, the prior, decoder
        say(f"{name:8} {count_parameters(module):>12,} parameters, finite")


def refuse_flags_of_the_other(options: Namespace, model: MIMFlow) -> None:
    """End with a line if a flag was given that the prior of this checkpoint does not have."""
    plain, captions = parse_arguments([]), model.config.caption_words > 0
    mine = "emigm" if model.flow is None else f"the flow of {'captions' * captions or 'classes'}"
    others = OF_FLOW if model.flow is None else OF_EMIGM
    for name in (*others, *(("classes",) if captions else OF_CAPTIONS)):
        if getattr(options, name) != getattr(plain, name):
            other = "guidance_interval" if name == "interval" else name
            fail(f"{flag(other)}: the prior of this checkpoint is {mine}, without such a flag", 2)


def sampling_flags() -> Parser:
    """What is sampled, here and by `evaluate.py generation`: a parent for argparse."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("what to sample (Sec. 3.2.2, App. A)").add_argument
    add("--seed", type=runs.seed_number, default=0, metavar="N", help="of the noise (default: 0)")
    text = "weight of guidance, 0 = none (default: the preset's; paper's release: 2)"
    add("--guidance", type=runs.weight, metavar="W", help=text)
    add("--constant-guidance", action="store_true", help="the same for every token, not growing")
    add("--guidance-rule", choices=RULES, default="tarflow", help="how it acts (default: tarflow)")
    add("--denoise", action="store_true", help="TARFlow's score denoising of the latents")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The flags of sample.py; what is left open is decided in `main`, which knows the model."""
    parser = Parser(description="Sample pictures from a checkpoint.", parents=[sampling_flags()])
    add = parser.add_argument
    add("checkpoint", nargs="?", help="model.pt (default: newest runs/*/model.pt, or shapes.pt)")
    add("--info", action="store_true", help="describe the checkpoint and stop")
    add("--classes", nargs="+", metavar="C", help="default: all; without --npz, 8 of many")
    add("--prompt", nargs="+", metavar="TEXT", help="captions, of a model that reads them")
    add("--prompts", type=Path, metavar="FILE", help="a file with more of them, one a line")
    add("--num", type=positive, metavar="N", help="pictures in all (default: 8 a class)")
    add("--out", type=Path, metavar="PNG", help="a row a class (default: grid.png by CKPT)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--npz", type=Path, metavar="NPZ", help="ADM's format instead: arr_0, arr_1")
    add("--between", nargs=2, metavar=("A", "B"), help="pictures or classes, and the way there")
    add("--reconstruct", nargs="+", metavar="A", help="pictures or classes, masked and decoded")

    add = parser.add_argument_group("how to invert the flow").add_argument
    text = "token by token, or many at once (default: sequential)"
    add("--sampler", choices=SAMPLERS, default="sequential", help=text)
    add("--tolerance", type=runs.weight, default=1e-5, metavar="X", help="of jacobi; default: 1e-5")
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: on CUDA, but for jacobi")
    add("--cuda-graph", action="store_true", help="record a batch and replay it; not jacobi")
    add = parser.add_argument_group("of the second prior (emigm.py)").add_argument
    add("--steps", type=positive, metavar="S", help="that reveal all (default: the preset's)")
    add("--evaluations", type=positive, metavar="N", help="of its head a step, even (default: 8)")
    text = "guided: steps whose end, from 1 (all hidden) to 0, is in [LO, HI)"
    how = dict(dest="interval", nargs=2, metavar=("LO", "HI"), help=text)
    add("--guidance-interval", type=runs.number(float, 0, 1, "between 0 and 1"), **how)
    add = parser.add_argument_group("the run").add_argument
    add("--batch-size", type=positive, default=64, metavar="N", help="of a process (default: 64)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")
    options = parser.parse_args(arguments)
    if (options.evaluations or 0) % 2:
        parser.error("--evaluations must be even: two are a step of the midpoint rule")
    if options.interval and options.interval[0] > options.interval[1]:
        parser.error("--guidance-interval needs LO <= HI: else no step is guided")
    given, not_theirs = options.between or options.reconstruct, ("num", "classes", *OF_CAPTIONS)
    if given and (idle := [flag(name) for name in not_theirs if getattr(options, name)]):
        parser.error(f"{idle[0]} has no part in --between and --reconstruct: leave it out")
    if options.cuda_graph and options.sampler != "sequential":
        parser.error("--cuda-graph is for --sampler sequential: jacobi asks the GPU each sweep")
    return options


def main(options: Namespace) -> None:
    """Sample what the flags ask for."""
    # The model and what to sample; everything that can be wrong is checked before the work.
    device = runs.select_device(options.device)
    if options.cuda_graph and device.type != "cuda":
        fail(f"--cuda-graph needs a CUDA device, this is {device.type}: leave it out", 2)
    path = runs.find_checkpoint(options.checkpoint)
    model = load_checkpoint(path, device)
    if options.info:
        return show_info(path, model)
    refuse_flags_of_the_other(options, model)
    options.guidance = choose_guidance(options.guidance, model)
    if given := options.between or options.reconstruct:
        name = "between.png" if options.between else "reconstruct.png"
        out = options.out or runs.beside(path, name)
        runs.check_output(out, ".png", [path, *map(Path, given)])
        return show_given(out, model, options) if rank() == 0 else None
    if places := model.config.caption_words:
        asked = (options.prompt, options.prompts, model.class_names, places)
        options.prompt, classes = read_prompts(*asked)  # classes: a row of L words a prompt
    else:
        classes = choose_classes(options.classes, model, every=options.npz is not None)
    if options.num is None:
        options.num = GRID_COLUMNS * (len(classes) if classes != [-1] else GRID_COLUMNS)
    classes = classes[: options.num]  # fewer pictures than classes: no rows without any
    if options.out is None and options.npz is None:
        options.out = runs.beside(path, "grid.png")
    c, bytes_a_picture = model.config, 3 * model.config.image_size**2
    values = bytes_a_picture + 4 * (c.grid**2 + c.num_latents) * c.width  # a layer's, at least
    runs.require_memory(4 * min(options.num, options.batch_size) * values)
    for output, suffix in ((options.out, ".png"), (options.npz, ".npz")):
        if output is not None:  # its parts, then the whole
            runs.check_output(output, suffix, [path], 2 * options.num * bytes_a_picture)
    runs.start_processes(device)
    if in_bfloat16(options, device):
        runs.keep_bfloat16(model.flow or model.emigm)
    if options.cuda_graph:
        model.flow.inverse = RecordedInverse(model.flow.inverse)  # MIMFlow.sample calls it
    sample_set(path, model, classes, options)
    runs.stop_processes()


if __name__ == "__main__":
    runs.run_program(lambda: main(parse_arguments()))
