"""From a checkpoint to pictures: draw noise, invert the flow, decode (Sec. 3.2.2, App. A).

    python sample.py                                newest runs/*/model.pt -> grid.png beside it
    python sample.py CKPT --classes 3 7 --num 32 --out grid.png
    torchrun --nproc_per_node=8 -- sample.py CKPT --num 50000 --npz samples.npz     for ADM's suite

    u ~ N(0, I) (B, K, d), label --flow inverse, guided in the deep block--> z (B, K, d)
    [ z <- z + sigma^2 * grad_z log p_F(z), TARFlow's denoising, with --denoise ]
    z --decoder--> image (B, 3, H, W) in [-1, 1] --> uint8

Sample number i has class classes[i mod C] and noise from (seed, i). Samples are made in batches of
--batch-size, batch j by process j mod world_size, so that one process and many write the same set,
to the last bit where devices and threads a process are the same. Finished batches wait as files in
OUTPUT.parts: after an interruption the same command goes on. (The "--" keeps torchrun from reading
--num as an abbreviation of a flag of its own.)

The flow is inverted token by token, or with --sampler jacobi by iterating over many tokens at once,
to the same latents up to --tolerance; it can pay for single pictures of a large flow. auto times
both first: what it took is printed, since the last bits of the pictures depend on it. For many
batches token by token, --compile fuses what happens between two attentions, and --cuda-graph
replays a recorded batch without Python. The first batch compiles and the second is recorded, so it
is from the third on that they pay.
"""

import argparse
import functools
import hashlib
import json
import math
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from train import (
    MIMFlow,
    Parser,
    count_parameters,
    fail,
    find_checkpoint,
    flag,
    load_checkpoint,
    mean_over_processes,
    rank,
    run_program,
    sample_noise,
    save_png,
    say,
    select_device,
    shown_classes,
    start_processes,
    stop_processes,
    to_uint8,
    uses_bf16,
    world_size,
    write_file,
)

GRID_COLUMNS = 8  # pictures a class when --num is left out


# --------------------------------------------------------------------------------------------------
# What to draw


def choose_classes(names: list[str] | None, model: MIMFlow) -> list[int]:
    """Class indices from names or indices (a name wins); default: those of a grid."""
    count = model.config.num_classes
    if names is None:
        return shown_classes(count)
    if count == 0:
        fail("this model was trained without labels: leave --classes out", 2)
    known = {name: i for i, name in enumerate(model.class_names)}
    chosen = []
    for name in names:
        index = known.get(name, int(name) if name.isdecimal() else -1)
        if not 0 <= index < count:
            fail(
                f"--classes {name}: this model has classes 0 to {count - 1} ({class_list(model)})",
                2,
            )
        chosen.append(index)
    return chosen


def class_list(model: MIMFlow) -> str:
    """The first class names, for messages."""
    shown = ", ".join(model.class_names[:12])
    return shown + (", ..." if len(model.class_names) > 12 else "")


# --------------------------------------------------------------------------------------------------
# Drawing
#
# A flow samples by running backwards: the deep block first, then the shallow ones, then the decoder
# once. No mask is involved. The mask shaped the latents that the flow has learned, and those are
# what it produces now (Sec. 3.3.2). Guidance moves each token away from what the model would expect
# without a class (App. A); 0 is the exact inverse, and only that samples the model's own density.


def in_bfloat16(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether matrices are bfloat16. Left open: on CUDA, but not for jacobi, since rounding changes
    a latent number by about 1e-2, and no tolerance below that is met early."""
    if options.bf16 is not None:
        return options.bf16
    return uses_bf16(device) and options.sampler == "sequential"


def compile_layers(model: MIMFlow) -> None:
    """Compile what each layer of the flow does to a token by itself; attention stays as it is.

    Those two pieces see the same shapes at every token, so each is compiled once for all layers and
    tokens of a batch size (guidance doubles it in the deep block). With the cache in them, every
    length would be another program.
    """
    for block in model.flow.blocks:
        for layer in block.layers:
            layer.before = torch.compile(layer.before)
            layer.after = torch.compile(layer.after)


class RecordedInverse:
    """flow.inverse on CUDA, recorded as a graph and replayed, with the same arguments and results.

    Token by token, a small batch leaves the GPU waiting: Python launches thousands of small kernels
    one after the other. But it launches the same ones for every batch, since nothing in the token
    loop depends on a number. So the first batch of a size runs as always, and makes what may not be
    made while recording (work spaces, compiled kernels). At the second a recording is taken, which
    computes nothing; that batch and all later ones are replays of it, on their own noise.
    """

    def __init__(self, inverse: Callable[..., Tensor]):
        self.inverse = inverse
        self.graphs: dict[tuple, tuple | None] = {}  # what a recording fixes -> it

    def __call__(
        self, u: Tensor, labels: Tensor, guidance: float, watch: Callable, **how: Any
    ) -> Tensor:
        call = functools.partial(self.inverse, guidance=guidance, **how)
        key = (*u.shape, guidance, *sorted(how.items()))
        if how["sampler"] != "sequential" or key not in self.graphs:
            self.graphs[key] = None
            return call(u, labels, watch=watch)
        if self.graphs[key] is None:
            self.graphs[key] = self.record(call, u.clone(), labels.clone())
        graph, u_in, labels_in, z = self.graphs[key]
        u_in.copy_(u)
        labels_in.copy_(labels)
        graph.replay()  # calls no Python, so nobody tells `watch`
        return z.clone()  # the next replay writes there again

    def record(self, call: Callable[..., Tensor], u: Tensor, labels: Tensor) -> tuple:
        """The graph of one inversion, the tensors that it reads from, and the one it writes to."""
        graph = torch.cuda.CUDAGraph()
        # Autocast keeps the bfloat16 weights that it has made. Those from before the recording are
        # freed before a replay reads them; those from within lie in the graph's own memory, which
        # every replay writes over. So both are forgotten.
        torch.clear_autocast_cache()
        # thread_local: under torchrun, NCCL's own thread may talk to the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            z = call(u, labels)
        torch.clear_autocast_cache()
        return graph, u, labels, z


def draw(
    model: MIMFlow,
    indices: range,
    classes: list[int],
    options: argparse.Namespace,
    watch: Callable[[int, int], None] = lambda block, solved: None,
) -> np.ndarray:
    """Samples number `indices` as uint8 (len(indices), H, W, 3); `watch` as in flow.inverse."""
    c, device = model.config, model.decoder.coordinates.device
    # Drawn on the CPU, one generator a sample: the same picture on any device, in any batch.
    noise = sample_noise(options.seed, indices, c.num_latents, c.latent_dim).to(device)
    labels = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
    # As in training: matrices in bfloat16, cast once a batch; the flow's state stays float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(options, device)):
        images = model.sample(
            noise,
            labels,
            options.guidance,
            options.denoise,
            annealed=not options.constant_guidance,
            rule=options.guidance_rule,
            sampler=options.sampler,
            tolerance=options.tolerance,
            watch=watch,
        )  # (B, 3, H, W)
    if not images.isfinite().all():
        fail("pictures are not finite: lower --guidance, or train again", every_rank=True)
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)


def choose_sampler(model: MIMFlow, classes: list[int], options: argparse.Namespace) -> str:
    """The sampler that draws a batch of this command faster, the same on all processes."""
    # Which one wins depends on the device, the batch and the trained weights: nothing to look up.
    indices, seconds = range(min(options.num, options.batch_size)), {}
    # The last turn of each counts: the first warms up, the second of --cuda-graph records.
    for sampler in ("sequential", "sequential", "sequential", "jacobi", "jacobi"):
        timed = argparse.Namespace(**{**vars(options), "sampler": sampler})
        start = time.perf_counter()
        draw(model, indices, classes, timed)
        mine = torch.tensor(time.perf_counter() - start, device=model.decoder.coordinates.device)
        seconds[sampler] = float(mean_over_processes(mine))
    chosen = min(seconds, key=seconds.get)
    times = ", ".join(f"{sampler} {taken:.2f} s" for sampler, taken in seconds.items())
    say(f"--sampler {chosen}: a batch of {len(indices)} takes {times}")
    return chosen


def draw_all(
    model: MIMFlow, classes: list[int], options: argparse.Namespace, parts: Path
) -> list[Path]:
    """Draw each batch not yet in the folder `parts`, over all processes; all files in order."""
    count = math.ceil(options.num / options.batch_size)
    paths = [parts / f"{batch:06d}.npy" for batch in range(count)]
    # Shares that need no talking: a restart agrees, even with another number of processes.
    mine = [j for j in range(rank(), count, world_size()) if not paths[j].exists()]

    # The bar counts batches, or the tokens of all blocks if there is only one batch.
    sweeps, unit = Counter(), "batches" if len(mine) != 1 else "tokens"
    steps = model.config.num_latents - 1  # of each block, token by token
    total = len(mine) if unit == "batches" else steps * len(model.flow.blocks)
    bar = tqdm(total=total, desc=unit, disable=not sys.stderr.isatty() or rank() != 0)

    def watch(block: int, solved: int) -> None:
        sweeps[block] += 1
        bar.update(solved if unit == "tokens" else 0)

    start, drawn = time.perf_counter(), 0
    for batch in mine:
        first = batch * options.batch_size
        indices = range(first, min(first + options.batch_size, options.num))
        images = draw(model, indices, classes, options, watch)
        write_file(paths[batch], lambda stream, images=images: np.save(stream, images))
        drawn += len(images)
        bar.update(unit == "batches")
    bar.close()
    seconds = time.perf_counter() - start
    if drawn:
        say(f"{drawn} pictures in {seconds:.1f} s, {drawn / seconds:.1f} a second on this process")
        if options.sampler == "jacobi":
            mean = ", ".join(f"{sweeps[block] / len(mine):.1f}" for block in sorted(sweeps)[::-1])
            say(f"sweeps a batch, deep block first: {mean}; token by token: {steps} each")
    if dist.is_initialized():
        dist.barrier()
    return paths


def open_parts(parts: Path, key: dict[str, Any]) -> None:
    """Make the folder of finished batches; those of another command (`key`) are removed."""
    key_path, text = parts / "key.json", json.dumps(key, indent=1)
    if rank() == 0:
        parts.mkdir(parents=True, exist_ok=True)
        if not key_path.exists() or key_path.read_text() != text:
            remove_parts(parts)
            write_file(key_path, lambda stream: stream.write(text.encode()))
        elif done := len(list(parts.glob("*.npy"))):
            say(f"going on: {done} batches are in {parts}")
    if dist.is_initialized():
        dist.barrier()


def remove_parts(parts: Path) -> None:
    """Empty the folder of finished batches; the folder itself stays."""
    for path in [*parts.glob("*.npy*"), parts / "key.json"]:
        path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Writing
#
# 50,000 pictures of 256 x 256 are 10 GB, so no function here holds more than one batch of them,
# but for grids, which are small.


def write_npz(path: Path, parts: list[Path], labels: np.ndarray) -> None:
    """ADM's sample file: arr_0 uint8 (n, H, W, 3), arr_1 int64 (n,). Holds one batch at a time."""
    # An .npz is a zip archive of .npy files: a header with the shape of the whole, then its rows.
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(stream: Any) -> None:
        with zipfile.ZipFile(stream, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for part in parts:
                    entry.write(np.load(part).tobytes())
            with archive.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, labels)

    write_file(path, write)


def write_grid(path: Path, parts: list[Path], num_classes: int) -> None:
    """A PNG with a row a class (rows of 8 for one class or none); missing pictures are white."""
    images = np.concatenate([np.load(part) for part in parts])  # (n, H, W, 3)
    rows = num_classes if num_classes > 1 else math.ceil(len(images) / GRID_COLUMNS)
    columns = math.ceil(len(images) / rows)
    # Sample i has class i mod C: place it in that row, in the column of its turn.
    grid = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    order = np.arange(len(images))
    place = order if num_classes == 1 else order % rows * columns + order // rows
    grid[place] = images
    save_png(torch.from_numpy(grid).permute(0, 3, 1, 2) / 127.5 - 1, columns, path)


def draw_set(
    model: MIMFlow,
    classes: list[int],
    options: argparse.Namespace,
    key: dict[str, Any],
    npz: Path | None,
    grid: Path | None,
) -> None:
    """Draw options.num samples over all processes, then write them as ADM's .npz, as a grid, or
    both. What `key` says is what an interrupted call must have been given to go on from its
    finished batches."""
    output = npz or grid
    parts = output.with_name(output.name + ".parts")
    open_parts(parts, key)
    files = draw_all(model, classes, options, parts)
    if rank() == 0:
        labels = np.array([classes[i % len(classes)] for i in range(options.num)])
        if npz is not None:
            write_npz(npz, files, labels)
            say(f"{npz}: {options.num} pictures, {len(set(classes))} classes")
        if grid is not None:
            write_grid(grid, files, len(classes))
        remove_parts(parts)
        parts.rmdir()
    if dist.is_initialized():
        dist.barrier()  # nobody reads the files before they are there


# --------------------------------------------------------------------------------------------------
# Command line


def show_info(path: Path, model: MIMFlow) -> None:
    """Print what a checkpoint is: step, configuration, classes, sizes, and whether it is finite."""
    print(f"{path}: step {model.step}, EMA weights")
    print(" ".join(f"{flag(k)} {v}" for k, v in vars(model.config).items()))
    print(f"classes: {class_list(model) or 'none'}")
    for name in ("encoder", "flow", "decoder"):
        module = getattr(model, name)
        finite = all(p.isfinite().all() for p in module.parameters())
        state = "finite" if finite else "NOT FINITE"
        print(f"{name:8} {count_parameters(module):>12,} parameters, {state}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of sample.py; what is left open is decided in `main`, which knows the model."""
    parser = Parser(description="Draw pictures from a trained MIMFlow.")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="model.pt of a run (default: the newest runs/*/model.pt)")
    add("--info", action="store_true", help="describe the checkpoint and stop")

    add = parser.add_argument_group("what to draw (Sec. 3.2.2, App. A)").add_argument
    text = "class indices or names (default: all, or 8 of many)"
    add("--classes", nargs="+", metavar="C", help=text)
    add("--num", type=int, metavar="N", help=f"pictures in all (default: {GRID_COLUMNS} a class)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)")
    text = "weight of guidance, 0 = none (default: the preset's; paper's release: 2)"
    add("--guidance", type=float, metavar="W", help=text)
    text = "the same weight for every token, not growing"
    add("--constant-guidance", action="store_true", help=text)
    rules = ("tarflow", "starflow")
    add("--guidance-rule", choices=rules, default="tarflow", help="how it acts (default: tarflow)")
    add("--denoise", action="store_true", help="TARFlow's score denoising of the latents")

    add = parser.add_argument_group("how to invert the flow").add_argument
    ways = ("sequential", "jacobi", "auto")
    text = "token by token, many at once, or what is faster here (default: sequential)"
    add("--sampler", choices=ways, default="sequential", help=text)
    text = "of jacobi: largest last change of a latent number (default: 1e-5)"
    add("--tolerance", type=float, default=1e-5, metavar="X", help=text)
    text = "matrices in bfloat16 (default: on CUDA, but for jacobi)"
    add("--bf16", action=argparse.BooleanOptionalAction, help=text)
    add("--compile", action="store_true", help="compile the layers' steps with torch.compile")
    text = "record a batch and replay it: on CUDA, token by token"
    add("--cuda-graph", action="store_true", help=text)
    text = "pictures at a time on one process (default: 64)"
    add("--batch-size", type=int, default=64, metavar="N", help=text)
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the first there is)")

    add = parser.add_argument_group("output").add_argument
    text = "grid, a row a class (default: grid.png beside the checkpoint)"
    add("--out", type=Path, metavar="PNG", help=text)
    text = "all pictures in ADM's format instead: arr_0, arr_1"
    add("--npz", type=Path, metavar="NPZ", help=text)
    options = parser.parse_args(arguments)
    for name in ("num", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"{flag(name)} must be positive")
    if options.seed < 0 or not 0 <= (options.guidance or 0.0) < math.inf:
        parser.error("--seed and --guidance must not be negative, and finite")
    if not 0 <= options.tolerance < math.inf:
        parser.error("--tolerance must not be negative, and finite")
    if options.cuda_graph and options.sampler == "jacobi":
        parser.error(
            "--cuda-graph is for --sampler sequential: jacobi waits for the GPU each sweep"
        )
    return options


def main(options: argparse.Namespace) -> None:
    """Draw what the flags ask for."""
    # The model and what to draw; everything that can be wrong is checked before the work.
    device = select_device(options.device)
    if options.cuda_graph and device.type != "cuda":
        fail(f"--cuda-graph needs a CUDA device, this is {device.type}: leave it out", 2)
    path = find_checkpoint(options.checkpoint)
    model = load_checkpoint(path, device)
    if options.info:
        show_info(path, model)
        return
    classes = choose_classes(options.classes, model)
    if classes == [-1] and options.guidance:
        fail(
            "this model was trained without labels: it has no guidance, leave --guidance out",
            2,
        )
    if options.guidance is None:
        options.guidance = model.config.guidance if model.config.num_classes else 0.0
    if options.num is None:
        options.num = GRID_COLUMNS * (len(classes) if classes != [-1] else GRID_COLUMNS)
    classes = classes[: options.num]  # fewer pictures than classes: no rows without any
    if options.out is None and options.npz is None:
        options.out = path.parent / "grid.png"
    for output in filter(None, (options.out, options.npz)):
        if output.is_dir():
            fail(f"{output} is a folder: name a file", 2)
        if not output.parent.is_dir():
            fail(f"folder {output.parent} of {output.name} does not exist: make it first", 2)

    # Draw in batches over all processes, then one process puts them together.
    start_processes(device)
    if options.compile:
        compile_layers(model)
    if options.cuda_graph:
        model.flow.inverse = RecordedInverse(model.flow.inverse)  # MIMFlow.sample calls it
    if options.sampler == "auto":
        options.sampler = choose_sampler(model, classes, options)
    # Finished batches of an interrupted command may be used again only if everything that decides
    # about pixels is the same: the flags, but for those that only say where to write, and the
    # weights, so their hash is part of the key.
    key = {k: str(v) for k, v in vars(options).items() if k not in ("out", "npz", "device", "info")}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    key |= {"classes": classes, "checkpoint": digest, "device": device.type}
    draw_set(model, classes, options, key, options.npz, options.out)
    if options.out is not None:
        say(
            f"{options.out}: guidance {options.guidance:g}, seed {options.seed}; "
            f"rows: {row_names(model, classes)}"
        )
    stop_processes()


def row_names(model: MIMFlow, classes: list[int]) -> str:
    """The classes of a grid's rows, top to bottom."""
    if classes == [-1]:
        return "no classes"
    return ", ".join(model.class_names[i] for i in classes)


if __name__ == "__main__":
    run_program(lambda: main(parse_arguments()))
