"""What every long-running program needs and no paper mentions: one-line errors, the command line,
processes and devices, signals, and files that survive a kill.

Plain `python` is a world of one process. torchrun starts several and tells each its place in
environment variables: rank() counts over all machines and decides which rows of a batch are this
process's, LOCAL_RANK counts on one machine and decides which GPU is.
"""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

TIMEOUT = datetime.timedelta(minutes=10)  # after which a silent data worker is an error
# Processes wait for one another longer: rank 0 may be writing 13 GB to a slow disk meanwhile.
GROUP_TIMEOUT = datetime.timedelta(hours=1)
MAX_SKIPPED = 10  # non-finite gradients in a row that stop a run
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "shapes.pt"
PATIENCE = 2.0  # seconds within which a second Ctrl-C is the same one


# --------------------------------------------------------------------------------------------------
# Errors: one line that says what is wrong, where, and what to do


class InputError(Exception):
    """What a user gave cannot be used. The message is the line to show."""


def printable(text: str) -> str:
    """Text with all that a terminal would obey, or cannot show, made visible as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fail(message: str, code: int = 1, *, every_rank: bool = False) -> NoReturn:
    """End the program with one line. Exit code 2 for usage, 1 for the rest.

    Rank 0 speaks, since most of what is wrong is wrong on every rank; `every_rank` is for what one
    process alone can meet.
    """
    if (every_rank or rank() == 0) and sys.stderr is not None:
        print(f"error: {printable(message)[:1000]}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextlib.contextmanager
def explained(problem: str, hint: str = "", end: Callable[[str], Any] = fail) -> Iterator[None]:
    """Whatever is raised inside, and libraries raise nearly anything, ends in one line: `problem`
    (its cause) `hint`. end: `fail`, or the error to raise where a caller may go on without."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise end(f"{problem} ({cause}){hint}") from None


def run_program(work: Callable[[], None]) -> None:
    """Call `work`; what a user can cause ends in one line instead of a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see common/__init__.py
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by the shell: `>&-`
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # names of files need not fit the terminal's encoding
        stream.reconfigure(errors="backslashreplace")
    try:
        work()
    except InputError as error:  # from a data worker it comes wrapped in the worker's traceback
        fail(str(error).strip().split(f"{type(error).__name__}: ")[-1], every_rank=True)
    except OSError as error:
        hint = ": make room, then the same command goes on" if error.errno == errno.ENOSPC else ""
        fail(f"reading or writing failed: {error}{hint}", every_rank=True)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        full = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if full or "not enough memory" in reason or "can't allocate memory" in reason:
            hint = "a smaller --batch-size or model, or in training more --grad-accum"
            where = "GPU memory" if isinstance(error, torch.cuda.OutOfMemoryError) else "memory"
            fail(f"{where} is full: {hint}", every_rank=True)
        if "DataLoader" in str(error):
            fail(f"a data worker ended ({reason}): try fewer --num-workers, or 0", every_rank=True)
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            fail(f"torch.compile failed ({reason}): leave --compile out", every_rank=True)
        raise
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on (train.py: without --overwrite)", 130)
    finally:  # Python's own end takes a moment, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """The parser of all scripts: no abbreviations, one-line errors, help 100 columns wide."""

    def __init__(self, formatter: Any = argparse.HelpFormatter, **settings: Any):
        wide = functools.partial(formatter, max_help_position=30, width=100)
        super().__init__(allow_abbrev=False, formatter_class=wide, **settings)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists all flags)", 2)


def number(kind: type, low: float, high: float, words: str) -> Callable[[str], Any]:
    """A type for argparse: an int or float from `low` to `high`, which `words` describe."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # a nan is not, either
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    convert.__name__ = kind.__name__  # in argparse's line about what is no number
    return convert


MANY = 2**31 - 1  # more pictures, pixels or steps than anything here can hold
positive = number(int, 1, MANY, "positive and below 2^31")
seed_number = number(int, 0, 2**63 - 1, "not negative and below 2^63")
weight = number(float, 0, sys.float_info.max, "not negative, and finite")


def flag(name: str) -> str:
    """The command-line flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as one types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# A dataclass whose fields are flags: each carries the text of its flag and what its number may be.
POSITIVE, NATURAL, SHARE, BELOW_1 = (1e-30, 1e30), (0, 1e30), (0, 1), (0, 0.999999)


def option(default: Any, help: str, within: tuple = NATURAL, **argparse_options: Any) -> Any:
    """A field of a dataclass that is a flag, too. within: its least and its largest number."""
    return field(default=default, metadata={"help": help, "within": within, **argparse_options})


def kind_of(f: Field) -> type:
    """The type of one value of a field: of "int | None" and of "tuple[int, ...]" that is int."""
    return (get_args(f.type) or (f.type,))[0]


def out_of_range(config: Any) -> str | None:
    """What is wrong with the types and numbers of a dataclass of options, None if nothing."""
    for f in fields(config):
        value, kind, (low, high) = getattr(config, f.name), kind_of(f), f.metadata["within"]
        if value is None and type(None) in get_args(f.type):
            continue
        values = value if get_origin(f.type) is tuple else (value,)
        known = {kind, int} if kind is float else {kind}  # 90 is as good as 90.0
        fits = isinstance(values, tuple) and known.issuperset(map(type, values))
        if not fits or not set(values).issubset(f.metadata.get("choices", values)):
            return f"{flag(f.name)} cannot be {value!r:.50}"
        if kind is int:
            low, high = math.ceil(low), MANY if high == NATURAL[1] else high
        if kind in (int, float) and not all(low <= x <= high for x in values):
            positive = "positive, " if low > 0 else ""
            return f"{flag(f.name)} must be {positive}from {low:g} to {high:g}, got {value}"
    return None


def add_field_flags(
    parser: Parser, of: Iterable[Field], groups: dict[str, str], shows: list[dict[str, Any]]
) -> None:
    """Add the flag of every field. groups: first field of each group of --help -> its title; shows:
    values of the fields that --help names in brackets. What is not given the result leaves out."""
    for f in of:
        if f.name in groups:
            add = parser.add_argument_group(groups[f.name]).add_argument
        settings = {k: v for k, v in f.metadata.items() if k != "within"}
        values = [values[f.name] for values in shows]
        if any(value is not None for value in values):
            settings["help"] += f" [{'; '.join(shown(v) or 'none' for v in values)}]"
        if (kind := kind_of(f)) is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind} if kind is str else {"type": kind, "metavar": "N"}
        add(flag(f.name), default=argparse.SUPPRESS, **settings)


# --------------------------------------------------------------------------------------------------
# Processes and devices


def told(name: str, default: int) -> int:
    """A number of torchrun's in the environment; what is no number is not torchrun's."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def world_size() -> int:
    return max(1, told("WORLD_SIZE", 1))


def rank() -> int:
    return told("RANK", 0) if world_size() > 1 else 0  # some schedulers set RANK


def restarts() -> int:
    """How often torchrun has started this run again by itself (--max-restarts)."""
    return told("TORCHELASTIC_RESTART_COUNT", 0)


def say(message: str) -> None:
    """Print on rank 0, above a progress bar if one is running."""
    if rank() != 0:
        return
    try:
        tqdm.write("\n".join(map(printable, message.split("\n"))))
        sys.stdout.flush()  # a log file shows the line at once
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = open(os.devnull, "w")  # a full disk, or `| head`, takes the words, not the run
        with contextlib.suppress(OSError):  # which may be the same file
            print("note: standard output is full or closed: no more goes there", file=sys.stderr)


def progress(work: Iterable | None, description: str, **settings: Any) -> tqdm:
    """A bar on rank 0, if somebody is watching (disable=None: only on a terminal)."""
    return tqdm(work, desc=description, disable=True if rank() else None, **settings)


def select_device(name: str | None) -> torch.device:
    """The named device, or the first of cuda, mps, cpu; on CUDA that of the local rank."""
    if name is None:
        # Before 2.14 torch has silent faults on mps: AdamW ignores found_inf, attention errs.
        mps = torch.backends.mps.is_available() and torch.__version__ >= (2, 14)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if world_size() > 1 and ":" in name:
        fail(f"--device {name} would put every process on one device: use --device cuda", 2)
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("cuda, mps and cpu are known here")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", told("LOCAL_RANK", 0))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        fail(f"device {name} cannot be used by rank {rank()} ({reason})", 2, every_rank=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def require_memory(needed: float) -> None:
    """End with exit code 2 if more bytes are needed than this machine has."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        have = max(have, torch.cuda.get_device_properties(0).total_memory)
    if needed > have:
        sizes = f"{needed / 1e9:.1f} GB at least, this machine has {have / 1e9:.1f} GB"
        fail(f"this model and batch need {sizes}: choose smaller ones, or train.py --grad-accum", 2)


def uses_bf16(device: torch.device) -> bool:
    """Whether training computes in bfloat16 (autocast) on this device; the weights are float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def gradient_at_once(measure: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """measure(x), a number for each x[b] that depends on it alone. The gradient is taken
    here, while the activations are there, so that none are kept for the backward pass."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return measure(x)
    leaf = x.detach().requires_grad_()
    value = measure(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    zero = (x - leaf.detach()) * gradient  # and this is its gradient
    return value.detach() + zero.flatten(1).sum(dim=1)


def keep_bfloat16(network: nn.Module) -> nn.Module:
    """Store matrices in the type that autocast gives them at each call: the same bits, half the
    memory, and no call has to cast them."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()
    return network


def start_processes(device: torch.device) -> None:
    """Join the process group of torchrun, if there is one: nccl on CUDA, gloo on the CPU."""
    if world_size() == 1:
        return
    try:
        store, this, count = next(dist.rendezvous("env://", timeout=GROUP_TIMEOUT))
    except ValueError as error:
        fail(f"WORLD_SIZE is set, not by torchrun ({error}): start with torchrun, or unset it")
    # torchrun keeps one store over its restarts (--max-restarts). Under a name for each try, new
    # processes do not meet the addresses of dead ones.
    store = dist.PrefixStore(f"try{restarts()}", store)
    # gloo as well: what processes agree on in CPU memory (StopSignal) waits for no GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    how = dict(store=store, rank=this, world_size=count, timeout=GROUP_TIMEOUT)
    dist.init_process_group(backend, **how)


def stop_processes() -> None:
    """Leave the process group; the last DDP module must be gone by then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, which hold equal shares of the batch."""
    if dist.is_initialized():
        value = value / world_size()
        dist.all_reduce(value)
    return value


def of_all_processes(value: Any) -> list[Any]:
    """What each process has as `value`, by rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def require_same_step(step: int) -> None:
    """End if the processes, each of which has read last.pt by itself, found different steps."""
    if len(steps := sorted(set(of_all_processes(step)))) > 1:
        fail(f"processes found last.pt at steps {steps}: share the run folder")


class SkippedSteps:
    """Steps whose gradient was not finite, counted on the device: `tell` waits for it."""

    def __init__(self, device: torch.device, earlier: int = 0):
        self.total = torch.full((), float(earlier), device=device)
        self.in_a_row = torch.zeros((), device=device)  # the unbroken run up to now
        self.told = earlier

    def add(self, not_finite: Tensor) -> None:
        self.total += not_finite
        self.in_a_row = (self.in_a_row + 1) * not_finite

    def tell(self, done: int, last: Path) -> None:
        """Say what was skipped; ten in a row end the run."""
        if int(self.total) > self.told:
            self.told = int(self.total)
            say(f"step {done}: gradient is not finite, step skipped ({self.told} so far)")
        if self.in_a_row >= MAX_SKIPPED:
            kept = f"{last} is from before" if last.exists() else "nothing was saved"
            row = f"{int(self.in_a_row)} non-finite gradients in a row at step {done}"
            fail(f"{row}: {kept}; a new run (--out) with a lower --lr may do better")


class StopSignal:
    """SIGTERM (a scheduler's wish) and SIGINT (Ctrl-C): noted when they come, obeyed by all
    processes at the end of the same step."""

    def __init__(self):
        self.number, self.when = 0, 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}

    def note(self, number: int, frame: Any) -> None:
        # A second Ctrl-C, later, ends at once: the step may wait for a disk that never answers.
        if self.number == number == signal.SIGINT and time.monotonic() > self.when + PATIENCE:
            self.restore()
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.when = number, time.monotonic()

    def agreed(self) -> int:
        """The signal that some process has got, 0 for none. Every process must ask. A CPU tensor,
        so that nothing waits for the GPU."""
        number = torch.tensor(self.number)
        if dist.is_initialized():
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def end(self, number: int, done: int) -> NoReturn:
        """Leave by the agreed signal, saved at step `done`."""
        name = signal.Signals(number).name
        fail(f"{name}: saved at step {done}, the same command goes on", 128 + number)

    def restore(self) -> None:
        """Back to the handlers from before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """For data workers: Ctrl-C and torchrun's SIGTERM reach them too, but it is the main process
    that ends them, once it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# Files: whole or not at all


def check_output(path: Path, suffix: str, inputs: Iterable[Path] = (), room: float = 0) -> None:
    """End with exit code 2 unless `path` can be written: before the work, not after it.

    It must be new or a regular file with this suffix, none of `inputs` nor a picture in one, in a
    folder that exists and can be written to, on a disk with `room` bytes free.
    """
    folder = path.parent
    if path.suffix != suffix:
        fail(f"{path} must end in {suffix}", 2)
    if path.stem == "config":  # beside a picture there may be a .json
        fail(f"{path} is the name of a run's configuration: name another", 2)
    if not folder.is_dir():
        fail(f"folder {folder} of {path.name} does not exist: make it first", 2)
    if path.exists() and not path.is_file():
        fail(f"{path} is not a regular file: name another", 2)
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        fail(f"{path} cannot be written: no permission", 2)
    for other in inputs if path.exists() else []:
        of_it = suffix == ".png" and other.resolve() in path.resolve().parents
        if of_it or (other.exists() and path.samefile(other)):
            fail(f"{path} is also {other}, which would be lost: name another file", 2)
    if room > (free := shutil.disk_usage(folder).free):
        fail(f"{path} needs {room / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free", 2)


def write_file(path: Path, write: Callable[[Any], Any], previous: Path | None = None) -> None:
    """Call `write(stream)` on a temporary file beside `path`, sync it, put it in place: path always
    holds either the old content or the whole new one. The old one moves to `previous`, if given;
    between the two renames it is there alone, and `find_last` looks there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides what stopped it, a full disk for instance, behind a RuntimeError; numpy
        # says how many numbers there was room for.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        code = cause.errno or errno.ENOSPC
        raise OSError(code, cause.strerror or os.strerror(code), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A whole text file, or none of it."""
    write_file(path, lambda stream: stream.write(text.encode()))


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; on a full disk, no part of one."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as stream:
            stream.write(line + "\n")
    except OSError:  # after closing, which tries to write the rest once more
        if path.exists():
            os.truncate(path, before)
        raise


def attempt(what: str, work: Callable[..., None], *arguments: Any) -> bool:
    """Do `work(*arguments)`, which writes. A full disk is said and survived: whatever was there
    before still is, and the next try may find room. Returns whether it was done."""
    try:
        work(*arguments)
        return True
    except OSError as error:
        say(f"WARNING: cannot write {what} ({error.strerror}): going on without it")
        return False


def file_sha256(*paths: Path) -> str:
    """SHA-256 of a file, or of the contents of several, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """What a protocol says of a file: a name can lie about its content, a hash cannot."""
    return {"file": str(path), "sha256": file_sha256(path)}


# --------------------------------------------------------------------------------------------------
# Checkpoints as files: tensors and plain Python values only, read with weights_only=True
#
# A pickle can run code when it is read; with weights_only torch refuses those that would. Writing
# goes to a temporary file, is synced and renamed, so a kill at any moment leaves the old file or
# the new one (or, between two renames, the old one as previous.pt).


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint as a file, None if nothing. Raises OSError if the file cannot
    be read at all, which says nothing about what is in it."""
    with open(path, "rb") as stream:
        stream.read(1)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                return "compressed, which torch.save never does"  # and may fill the memory
            # torch.load alone does not look at the checksums of the zip archive that a checkpoint
            # is, and zipfile forgives what torch refuses.
            if archive.testzip() is not None:
                return "damaged (its checksums are wrong)"
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads no tensor yet
    except pickle.UnpicklingError:
        return "not read, because it holds more than tensors and plain values and could run code"
    except Exception:  # a damaged archive can raise nearly anything
        return "damaged, or no checkpoint of train.py (torch's old format is none, either)"
    return None


def require_sound(path: Path) -> None:
    """End with one clear line unless `path` is a whole checkpoint file: 10 GB take seconds."""
    if not path.is_file():
        fail(f"checkpoint {path} does not exist, or is no regular file; a run's is its model.pt")
    if reason := damage(path):
        fail(f"checkpoint {path} is {reason}")


def read_archive(path: Path) -> dict[str, Any]:
    """The dictionary in a sound checkpoint file, on the CPU."""
    # Beside a GPU all processes look at the file's own pages, and copy to their GPU what they need.
    on_gpu = torch.cuda.is_available()
    checkpoint = torch.load(path, map_location="cpu", mmap=on_gpu, weights_only=True)
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        fail(f"{path} is not a MIMFlow checkpoint (model.pt or last.pt of train.py)")
    return checkpoint


HEAD = {"format": int, "step": int, "config": dict, "class_names": list}  # of every checkpoint


def read_checkpoint(path: Path, of: type, retired: Iterable[str], newest: int) -> tuple[dict, Any]:
    """The dictionary of a sound checkpoint, and its configuration, of the dataclass `of`. Nothing
    in it is trusted: a file may have been edited, or be another program's. retired: fields of older
    configurations; newest: the last format that can be read."""
    checkpoint = read_archive(path)
    for key, kind in {**HEAD, "model": dict}.items():
        if not isinstance(checkpoint.get(key), kind):
            fail(f"{path} is not a MIMFlow checkpoint: its {key} is no {kind.__name__}")
    names, values = checkpoint["class_names"], dict(checkpoint["config"])
    if checkpoint["format"] > newest:
        fail(f"{path} has format {checkpoint['format']}, newer than this program: update it")
    if checkpoint["step"] < 0 or not all(isinstance(name, str) for name in names):
        fail(f"{path} was edited: its step or its class_names make no sense")
    for name in retired:
        values.pop(name, None)
    if unknown := sorted(map(str, values.keys() - {f.name for f in fields(of)})):
        fail(f"{path} was made by another version: unknown configuration {', '.join(unknown)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return checkpoint, of(**values)


def write_checkpoints(run_dir: Path, full: dict[str, Any]) -> None:
    """Write last.pt and model.pt. What the run needs goes first, in case that the disk fills up
    between the two."""
    last, previous = run_dir / "last.pt", run_dir / "previous.pt"
    write_file(last, lambda stream: torch.save(full, stream), previous)
    write_shared(run_dir, full)


def mend_shared(run_dir: Path, full: dict[str, Any]) -> None:
    """Write the model.pt of a finished run if it is missing or of another step: a kill or a full
    disk may have come between the two files."""
    path = run_dir / "model.pt"
    sound = path.is_file() and not damage(path) and read_archive(path).get("step") == full["step"]
    if rank() == 0 and not sound:
        write_shared(run_dir, full)


def write_shared(run_dir: Path, full: dict[str, Any]) -> None:
    """Write model.pt: the EMA weights of a full checkpoint, and its head."""
    shared = {**{key: full[key] for key in HEAD}, "model": full["ema"]}
    write_file(run_dir / "model.pt", lambda stream: torch.save(shared, stream))


def load_state(part: Any, state: Any, path: str | Path) -> None:
    """Give a module or an optimizer its state; one line if it does not fit or is not finite."""
    with explained(f"{path}: the weights do not fit its configuration"):
        if isinstance(part, nn.Module):
            own = part.state_dict().items()  # a complex weight would be copied, with a warning
            if any(state.get(k, x).is_floating_point() != x.is_floating_point() for k, x in own):
                raise TypeError("another type of numbers")
            part.load_state_dict(state)
            sound = all(x.isfinite().all() for x in part.state_dict().values())
        else:  # it keeps its own settings; moments shorter than weights would be written beyond
            part.load_state_dict({**part.state_dict(), "state": state["state"]})
            sound = len(part.state) > 0
            for weight, moments in part.state.items():
                like = dict(step=torch.zeros(()), exp_avg=weight, exp_avg_sq=weight)
                for name, x in like.items():
                    same = moments[name].shape == x.shape and moments[name].stride() == x.stride()
                    sound = sound and same and not moments[name].isnan().any()
        if not sound:
            raise ValueError("not finite, or of another shape")


def find_last(run_dir: Path) -> Path | None:
    """The checkpoint to go on from: last.pt; previous.pt if that is missing or damaged; or None in
    a folder without either."""
    found = [path for path in (run_dir / "last.pt", run_dir / "previous.pt") if path.is_file()]
    for path in found:
        if not (reason := damage(path)):
            return path
        say(f"WARNING: {path} is {reason}")
    if found:
        fail(f"no checkpoint to go on from in {run_dir}: --overwrite starts again")
    return None


def find_checkpoint(path: str | None) -> Path:
    """`path`, or without one the newest runs/*/model.pt, or the one that comes with the code."""
    if path is not None:
        return Path(path)
    found = sorted(Path("runs").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        say(f"no runs/*/model.pt here: taking {SHIPPED}; `python train.py` trains one of your own")
    return found[-1] if found else SHIPPED


def beside(checkpoint: Path, name: str) -> Path:
    """A file `name` beside a checkpoint; of those that come with the code, in this folder."""
    shipped = checkpoint.resolve().parent == SHIPPED.parent
    return Path(name) if shipped else checkpoint.with_name(name)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Of the processes that come here for the same folder one goes on; the others wait for it."""
    with contextlib.ExitStack() as at_end:
        with contextlib.suppress(ImportError, OSError):  # Windows; a file system without locks
            import fcntl

            stream = os.open(folder, os.O_RDONLY)
            at_end.callback(os.close, stream)  # which gives the lock back
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------
# Run folders


def saved_at(run_dir: Path) -> float:
    """The time of the last.pt of a run, 0 if there is none."""
    last = run_dir / "last.pt"
    return last.stat().st_mtime if last.exists() else 0.0


def claim_folder(run_dir: Path, saved: float | None = None) -> Any:
    """Make the run folder on rank 0 and lock it; keep what is returned. A second run in it ends
    with a clear line, and so does one that read its last.pt (of the time `saved`) while another was
    at work. The system gives the lock back when this process ends, however it ends."""
    if rank() != 0:
        return None
    with explained(f"cannot write to the run folder {run_dir}", ": choose another --out"):
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = open(run_dir / ".lock", "a")  # whatever may be in it stays
    try:
        import fcntl  # which Windows does not have

        # A lock of the process, not of the open file: data workers do not inherit it.
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another run is at work in {run_dir}: wait for it, or use --out FOLDER")
    except (ImportError, OSError) as error:
        say(f"note: {run_dir} cannot be locked ({error}): start no second run in it")
    if saved not in (None, saved_at(run_dir)):
        fail(f"another run has saved in {run_dir} meanwhile: the same command goes on from there")
    return stream


def require_own_folder(run_dir: Path, key: str, data: str | None) -> float:
    """Refuse a folder without checkpoints whose config.json or log.jsonl is not of a run: `key` is
    in the configuration of every run. Refuse one among the pictures: it would become a class.
    Returns when its last.pt was saved."""
    if data and Path(data).resolve() in (run_dir / "samples").resolve().parents:
        fail(f"the run folder {run_dir} is inside --data {data}: use --out to name another", 2)
    config, log = run_dir / "config.json", run_dir / "log.jsonl"
    ours = config.is_file() and f'"{key}"' in config.read_text(errors="replace")
    ours = ours or any((run_dir / name).exists() for name in ("last.pt", "previous.pt"))
    if not ours and (config.exists() or log.exists()):
        fail(f"{run_dir} holds a config.json or log.jsonl of something else: use another --out", 2)
    return saved_at(run_dir)


def start_over(run_dir: Path) -> None:
    """Remove what an earlier run left in its folder, and nothing else."""
    names = ("last.pt", "previous.pt", "model.pt", "log.jsonl", "config.json")
    for path in [*(run_dir / name for name in names), *(run_dir / "samples").glob("step_*.png")]:
        path.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of log.jsonl after `step`: those steps are about to be done again. A line that
    a full disk or a kill cut short is dropped, too."""
    if path.is_file():
        kept = []
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.append(line)
        write_text(path, "".join(kept))


# --------------------------------------------------------------------------------------------------
# Sampling: finished batches wait as files in a folder of parts


BATCHES = "[0-9]" * 6 + ".npy"  # names of finished batches


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the weights that were loaded."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())  # bfloat16, too
    return digest.hexdigest()


@contextlib.contextmanager
def parts_folder(parts: Path, key: dict[str, Any]) -> Iterator[None]:
    """The folder in which finished batches wait, locked; those of another command (`key`) are
    removed. If the work inside is interrupted, all stays; at its end the folder goes, unless
    something else is in it."""
    key_path, text = parts / "key.json", json.dumps(key, indent=1)

    def empty() -> None:
        for path in [*parts.glob(BATCHES + "*"), key_path]:
            path.unlink(missing_ok=True)

    lock = claim_folder(parts)
    if rank() == 0:
        known = key_path.is_file() and key_path.read_bytes() == text.encode()
        if (done := len(list(parts.glob(BATCHES)))) and known:
            say(f"going on: {done} batches are in {parts}")
        elif done:
            say(f"note: {done} batches in {parts} are of another command, and are removed")
        if not known:
            empty()
            write_text(key_path, text)
    wait_for_all()
    yield
    if rank() == 0:
        empty()
        lock.close()
        (parts / ".lock").unlink()
        with contextlib.suppress(OSError):  # not empty: of the user
            parts.rmdir()
    wait_for_all()  # nobody reads the files before they are there
