"""Full scale without a GPU: training steps and sampling of mimflow-l on fake CUDA tensors.

    python tests/fake_gpu.py                           phase 1, phase 2, sampling; also as 1 of 8
    python tests/fake_gpu.py --work sample --batch 1   one of them
    python tests/fake_gpu.py --small                   few layers and tokens: test_fake_gpu.py

A fake tensor (torch's FakeTensorMode) has a shape, a type and a device, and no numbers. On such
tensors train.main and sample.main run as they are. Replaced, all in this file: pictures, files,
NCCL, the choice of an attention kernel, and what the GPU's driver would be asked. Exit code 1 after
an error of device, type or shape, or when a step waits for the GPU more often than it must; 77 with
a reason where this torch cannot do it.

Counted are operations with a kernel, multiply-adds, and memory: that of live tensors, in 10^9
bytes, without the context, workspaces and fragments. The time is a MODEL, a roofline: arithmetic
at 70 % of the data sheet's peak or bytes at 85 %, whichever takes longer, one kernel at a time.
Needs g++ and a CUDA build of torch 2.14; one core, a minute for a training step, two for sampling.
"""

import argparse
import ctypes
import math
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not by pytest
import sample  # noqa: E402
import train  # noqa: E402
from common import data, runs  # noqa: E402

CUDA, STEPS = torch.device("cuda", 0), 3  # the second step is counted, the third shows what lives
CARDS = {  # operations a second in bfloat16, TF32 (convolutions), float32; bytes a second
    "A100": (312e12, 156e12, 19.5e12, 2.04e12),
    "H100": (989e12, 494e12, 67e12, 3.35e12),
}
PARTS = {"MaskedEncoder": "encoder", "AutoregressiveBlock": "flow", "Layer": "flow"}
PARTS |= {"Decoder": "decoder", "AuxiliaryDecoder": "auxiliary", "Perceptual": "LPIPS"}
PARTS |= {"DINOv2": "DINOv2", "CLIP": "CLIP", "PatchDiscriminator": "discriminator"}
# Sampling sends noise and labels, asks whether all is finite, and fetches the pictures.
WAITS = {("sample", 1): 4, ("decoder", 8): 27}  # torch's SyncBatchNorm asks for counts
NO_KERNEL = {"_unsafe_view", "is_same_size", "empty", "empty_like", "empty_strided", "new_empty"}
PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # tensors a launch, by number of lists
SMALL = dict(depth=1, flow_depths=(1, 1), num_latents=16)


# --------------------------------------------------------------------------------------------------
# What has to be replaced for tensors without numbers on a device that is not there

SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
struct Pretend : at::CUDAHooksInterface {  // what the backward pass asks the driver
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
static Pretend pretend;
extern "C" void install() { *(void**)&at::detail::getCUDAHooks() = *(void**)&pretend; }
"""


class CudaGenerator(torch.Generator):
    device = CUDA


def pretend_cuda() -> None:
    """Let fake tensors, autocast and the backward pass believe in a GPU."""
    root, library = torch.__path__[0], tempfile.mkdtemp() + "/shim.so"
    command = f"g++ -x c++ - -shared -fPIC -std=c++20 -I{root}/include -L{root}/lib -lc10"
    command += f" -ltorch_cpu -o {library} -D_GLIBCXX_USE_CXX11_ABI="
    command += str(int(torch._C._GLIBCXX_USE_CXX11_ABI))
    subprocess.run(command.split(), input=SHIM, text=True, check=True, capture_output=True)
    ctypes.CDLL(library).install()
    torch.autograd.set_multithreading_enabled(False)
    torch.nn.Module._apply = convert_all
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda **_: True
    torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True
    real = torch.Generator
    torch.Generator = lambda device="cpu": real() if device == "cpu" else CudaGenerator()
    F.scaled_dot_product_attention = attention
    torch.Tensor.numpy = lambda x: x


@torch.no_grad()
def convert_all(module: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
    """Module._apply, which exchanges tensors in place, as fake ones do not allow."""
    for part in module.modules():
        for name, x in [*part._parameters.items(), *part._buffers.items()]:
            if x is not None and (new := convert(x)) is not x:
                weight = name in part._parameters
                new = torch.nn.Parameter(new, x.requires_grad) if weight else new
                (part._parameters if weight else part._buffers)[name] = new
    return module


def attention(q, k, v, mask=None, is_causal=False):
    """The kernels that a GPU takes: flash for bfloat16, the memory-efficient one for float32."""
    assert mask is None, "an attention mask would cost the flash kernel"
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.bfloat16() for x in (q, k, v))
    if q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    how = (None, torch.is_grad_enabled(), 0.0, is_causal)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, *how)[0]


def channels(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(x.shape[1], device=x.device)


SYNC_NORM = {  # SyncBatchNorm's kernels have no fake version
    "batch_norm_stats": lambda x, eps: (channels(x), channels(x)),
    "batch_norm_gather_stats_with_counts": lambda x, *_: (channels(x), channels(x)),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda dy, *_: tuple(channels(dy) for _ in range(4)),
    "batch_norm_backward_elemt": lambda dy, *_: torch.empty_like(dy),
}


# --------------------------------------------------------------------------------------------------
# The recorder


class Step:
    """What is counted in a training step, or in a batch of samples."""

    def __init__(self):
        self.operations, self.peak, self.peak_at, self.waits = 0, 0, 0, Counter()
        # (operation, type, part, backward pass?) -> launches, bytes, multiply-adds
        self.cost = defaultdict(lambda: [0, 0, 0])


class Recorder(TorchDispatchMode):
    """Sees every operation and every storage, and knows the part of the model that they are of."""

    def __init__(self):
        super().__init__()
        self.inside, self.behind = [], "losses"  # parts in their forward, in their backward pass
        self.live: dict[int, tuple] = {}  # storage -> bytes, what for, a watch on its end
        self.bytes, self.steps, self.snapshot = 0, [Step()], Counter()
        self.owners = lambda: {}  # name -> tensors
        register_module_forward_pre_hook(self.enter)
        register_module_forward_hook(self.leave, always_call=True)

    def enter(self, module: Any, inputs: Any) -> None:
        if part := PARTS.get(type(module).__name__):
            self.inside.append(part)
            if torch.is_grad_enabled() and not module._backward_pre_hooks:
                module.register_full_backward_pre_hook(lambda *_: setattr(self, "behind", part))

    def leave(self, module: Any, inputs: Any, output: Any) -> None:
        if type(module).__name__ in PARTS:
            self.inside.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name, step = kwargs or {}, func._schema.name.split("::")[1], self.steps[-1]
        if func.namespace == "prim":  # asks for a device
            return func(*args, **kwargs)
        if wait := self.wait(name, args, kwargs):
            step.waits[wait] += 1
        if name == "_local_scalar_dense":
            return 0.0 if args[0].is_floating_point() else 0
        if self.by_mask(name, args):
            return args[0].clone()  # as if all were kept
        out = SYNC_NORM[name](*args) if name in SYNC_NORM else func(*args, **kwargs)
        step.operations += 1
        self.account(step, func, name, args, kwargs, out)
        return out

    def wait(self, name: str, args: tuple, kwargs: dict) -> str | None:
        """What the host waits for here, if it must wait for the GPU."""
        if name in ("_local_scalar_dense", "nonzero") and args[0].is_cuda:
            return "a number"
        blocking = not kwargs.get("non_blocking") and not any(a is True for a in args[2:])
        if name in ("_to_copy", "copy_") and blocking:
            source, target = args[name == "copy_"], kwargs.get("device", args[0].device)
            return "a copy" if torch.device(target).type != source.device.type else None
        return "a mask" if self.by_mask(name, args) and args[0].is_cuda else None

    def by_mask(self, name: str, args: tuple) -> bool:
        indices = args[1] if name == "index" else []
        return any(i is not None and i.dtype == torch.bool for i in indices)

    def account(self, step: Step, func, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        made, read = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_cuda]
            for tree in (out, (args, kwargs))
        )
        backward = torch._C._current_graph_task_id() >= 0
        part = self.inside[-1] if self.inside else self.behind if backward else "loop"
        for x in made:
            self.hold(step, x, name, part, read, backward)
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(info is not None and not info.is_write for info in returns)
        if is_view or name in NO_KERNEL or not (made or read):
            return
        launches, lists = 1, [a for a in (*args, out) if isinstance(a, list | tuple) and a]
        if name.startswith(("_foreach", "_fused_adam")):
            chunks = sum(x.numel() for x in lists[0]) / 65536
            most = PER_LAUNCH[min(len(lists), 5)]
            launches = max(math.ceil(len(lists[0]) / most), math.ceil(chunks / 320))
        count = flop_registry.get(func._overloadpacket)
        products = count(*args, **kwargs, out_val=out) // 2 if count else 0
        floating = [x.dtype for x in (*read, *made) if x.is_floating_point()] or [torch.int64]
        kind = floating[0] if products else next((x.dtype for x in made), floating[0])
        once = {
            x.untyped_storage()._cdata: min(x.nbytes, x.untyped_storage().nbytes()) for x in read
        }
        entry = step.cost[name, str(kind)[6:], part, backward]
        entry[0] += launches
        entry[1] += sum(once.values()) + sum(x.nbytes for x in made)
        entry[2] += products

    def hold(self, step: Step, x, name: str, part: str, read: list, backward: bool) -> None:
        storage = x.untyped_storage()
        if (key := storage._cdata) in self.live:
            return
        cast = name == "_to_copy" and read and read[0].is_leaf and read[0].requires_grad
        what = "work of the backward pass" if backward else f"activations: {part}"
        what = "buckets of DDP, and other set-up" if len(self.steps) == 1 else what
        size = -(-storage.nbytes() // 512) * 512
        gone = weakref.ref(storage, lambda _: self.free(key))
        self.live[key] = (size, "weights in bfloat16" if cast else what, gone)
        self.bytes += size
        if self.bytes > step.peak:
            step.peak, step.peak_at = self.bytes, step.operations
        if len(self.steps) == STEPS + 1 and step.operations == self.steps[-2].peak_at:
            owner = {x.untyped_storage()._cdata: k for k, v in self.owners().items() for x in v}
            for key, (size, what, _) in self.live.items():
                self.snapshot[owner.get(key, what)] += size

    def free(self, key: int) -> None:
        self.bytes -= self.live.pop(key)[0]


# --------------------------------------------------------------------------------------------------
# The work


class NoPictures:
    """As many pictures as ImageNet, none of them looked at."""

    class_names = tuple(f"{i:04d}" for i in range(1000))

    def __len__(self) -> int:
        return 1_281_167


def train_on_nothing(recorder: Recorder, config: train.Config, processes: int) -> None:
    """train.main as rank 0 of `processes`, STEPS steps long."""

    def loader(dataset, batch_size, *_, **__):
        share, side = batch_size // processes, config.image_size
        for _ in range(STEPS):
            recorder.steps.append(Step())
            images = torch.empty(share, 3, side, side, dtype=torch.uint8)
            yield images, torch.zeros(share).long(), [""] * share

    def saved_parts(model, ema, players, real=train.saved_parts):
        networks, optimizers = [p.module for p in players], [p.optimizer for p in players]
        weights = [w for network in networks for w in network.parameters()]
        frozen = networks[0].frozen
        recorder.owners = lambda: {
            "parameters": weights,
            "moving average": list(ema.parameters()),
            "gradients": [w.grad for w in weights if w.grad is not None],
            "Adam": [x for o in optimizers for s in o.state.values() for x in s.values()],
            "teachers, VGG16": [
                w for n in (frozen.perceptual, *frozen.teachers.values()) for w in n.parameters()
            ],
        }
        return real(model, ema, players)

    def trained(path: str) -> train.MIMFlow:
        return train.MIMFlow(train.replace(config, phase="joint"), NoPictures.class_names)

    runs.select_device, runs.require_memory = lambda name: CUDA, lambda needed: None
    runs.attempt, runs.require_same_step = lambda *_: True, lambda step: None
    data.open_dataset, data.training_loader = lambda *_: NoPictures(), loader
    train.load_checkpoint, train.saved_parts = trained, saved_parts
    if processes > 1:
        pretend_processes(processes)
    train.main(config)


def pretend_processes(count: int) -> None:
    """DistributedDataParallel of rank 0, whose sums of gradients nobody else adds to."""
    from torch.nn.parallel import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def average(state, bucket):
        done = torch.futures.Future()
        done.set_result(bucket.buffer().div_(count))
        return done

    class Reducer:
        """DDP's, without what would ask the GPU for the time or other processes for an order."""

        def __init__(self, real: Any):
            self.real = real

        def __getattr__(self, name: str) -> Any:
            if name in ("_rebuild_buckets", "prepare_for_forward"):
                return lambda: False
            return getattr(self.real, name)

    def distribute(*arguments, real=train.distribute):
        module = real(*arguments)
        module.register_comm_hook(None, average)
        module.reducer = Reducer(module.reducer)
        return module

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(count))
    runs.start_processes = lambda device: torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=count
    )
    distributed._verify_param_shape_across_processes = lambda *_, **__: True
    distributed._sync_module_states = lambda *_, **__: None
    train.distribute = distribute


def sample_nothing(recorder: Recorder, config: train.Config, batch: int) -> None:
    """sample.main, guided, token by token, up to the pictures of STEPS batches."""

    def sample_set(path, model, classes, options):
        recorder.owners = lambda: {"parameters": [*model.parameters()]}
        for _ in range(STEPS):
            recorder.steps.append(Step())
            sample.sample_batch(model, range(batch), classes, options)

    runs.select_device, runs.check_output = lambda name: CUDA, lambda *_: None
    sample.load_checkpoint = lambda path, device: (
        train.MIMFlow(config, NoPictures.class_names).to(device).eval()
    )
    sample.sample_set, sample.fail = sample_set, lambda *_, **__: None  # no picture is finite
    sample.main(sample.parse_arguments(["none.pt", "--guidance", "2", "--npz", "none.npz"]))


# --------------------------------------------------------------------------------------------------
# The report


def report(recorder: Recorder) -> None:
    step, rows, times = recorder.steps[2], defaultdict(lambda: [0, 0, 0, 0, 0]), Counter()
    for (name, kind, part, backward), (launches, moved, products) in step.cost.items():
        for card, (half, tf32, single, bandwidth) in CARDS.items():
            peak = half if kind == "bfloat16" else tf32 if "convolution" in name else single
            ms = 1000 * max(2 * products / (0.7 * peak), moved / (0.85 * bandwidth))
            times[card] += ms
        for row in (rows[part], rows["all"]):
            row[0], row[1 + backward] = row[0] + launches, row[1 + backward] + products / 1e12
            row[3 + (not products)] += ms  # of the last card
    print(f"{rows['all'][0]:,} kernels; waits: {dict(step.waits) or 'none'}")
    held = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in recorder.snapshot.most_common() if v > 1e7)
    print(f"peak {step.peak / 1e9:.2f} GB: {held}")
    print("roofline, a model:", ", ".join(f"{card} {ms:.0f} ms" for card, ms in times.items()))
    print(
        "part           kernels   10^12 multiply-adds: forward, backward   H100 ms: products, else"
    )
    for part, row in sorted(rows.items(), key=lambda item: item[1][0]):
        print("{:14}{:8,}{:30.3f}{:10.3f}{:20.1f}{:6.1f}".format(part, *row))


def one(work: str, processes: int, flags: argparse.Namespace) -> int:
    """Run one of the works in this process; whether something is wrong."""
    print(f"\n{work}, 1 of {processes}, {flags.batch} pictures a GPU", flush=True)
    run = dict(num_workers=0, steps=STEPS, log_every=1000, batch_size=flags.batch * processes)
    run |= dict(vgg="random", dino="random", clip="random", out=tempfile.mkdtemp())
    run |= dict(phase="decoder", init="none") if work == "decoder" else {}
    config = train.preset_config(flags.preset, **run, **(SMALL if flags.small else {}))
    pretend_cuda()
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        if work == "sample":
            sample_nothing(recorder, config, flags.batch)
        else:
            train_on_nothing(recorder, config, processes)
    report(recorder)
    waits, most = sum(recorder.steps[2].waits.values()), WAITS.get((work, processes), 0)
    if waits > most:
        print(f"FAILED: a step waits for the GPU {waits} times, {most} are known")
    return waits > most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    works = ("joint", "decoder", "sample")
    parser.add_argument("--work", nargs="+", default=works, choices=works)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--batch", type=int, default=32, help="pictures a GPU (default: 32)")
    parser.add_argument("--preset", default="mimflow-l")
    parser.add_argument("--small", action="store_true", help="few layers and tokens: seconds")
    flags = parser.parse_args()
    if not torch.backends.cuda.is_built() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        print(f"skipped: torch {torch.__version__} cannot pretend to have a GPU")
        return 77
    if shutil.which("g++") is None:
        print("skipped: there is no g++ to compile what pretends to be a GPU")
        return 77
    failed = 0
    for work in flags.work:
        for processes in flags.processes if work != "sample" else (1,):
            if (child := os.fork()) == 0:  # what is replaced stays replaced
                os._exit(one(work, processes, flags))
            failed += os.waitpid(child, 0)[1] != 0
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
