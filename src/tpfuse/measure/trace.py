"""The kernels of one layer of a stack, by the profiler: what a longer stack launches more than a shorter one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tpfuse.ir.op import registry
from tpfuse.lowering.table import Entry, Table
from tpfuse.measure.e2e import Runner, Variant
from tpfuse.measure.linears import SCHEMES
from tpfuse.measure.stack import Stack
from tpfuse.measure.timing import in_step

COUNTS = (2, 4)  # layers of the two stacks
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
OWN = {
    "reduce", "sharded", "one_shot", "push_rows", "wait_done", "wait_full", "finish", "one_shot_kernel", "two_shot_kernel",
    "norm_kernel", "act_kernel", "attention_kernel", "quantise_heads_kernel", "qk_norm_rope_kernel", "grouped_kernel",
    "nvfp4_kernel", "decode_kernel", "finish_kernel",
}  # fmt: skip
KINDS = {  # by parts of names, the first that fits
    "NCCL": ("nccl",), "copy": ("Memcpy", "Memset"), "Inductor": ("triton_",), "attention": ("flash", "fmha", "attention"),
    "product": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma"),
}  # fmt: skip
MOVED = {"": "bfloat16", "nvfp4": "uint8"}  # what is gathered for a product; FP8 for every other scheme


def kernels(fn: Callable[[], Any]) -> dict[str, list[float]]:
    """The microseconds of each launch, by the name of what was launched."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        fn()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ON_DEVICE:
            found.setdefault(event["name"], []).append(float(event["dur"]))
    return found


def kind(name: str) -> str:
    """Whose kernel it is, or what it does."""
    if name in OWN:
        return "tpfuse"
    return next((kind for kind, parts in KINDS.items() if any(part.lower() in name.lower() for part in parts)), "other")


def difference(short: Mapping[str, Sequence[float]], long: Mapping[str, Sequence[float]], layers: int) -> list[dict[str, Any]]:
    """What each of `layers` more layers launches: {"kernel", "kind", "count", "us"}, us for all of a layer's launches of it, the
    kernels that take longest first."""
    rows = []
    for name, times in long.items():
        count = (len(times) - len(short.get(name, ()))) / layers
        if count:
            rows.append({"kernel": name, "kind": kind(name), "count": count, "us": count * sum(times) / len(times)})
    return sorted(rows, key=lambda row: -row["us"])


def of_a_layer(make: Callable[[int], Stack], variant: Variant, tokens: int) -> list[dict[str, Any]]:
    """`difference` for a prefill of so many tokens.  make: a stack of so many layers.  Every rank of its group calls it."""
    found, align = [], in_step()
    for layers in COUNTS:
        step = Runner(make(layers), [], [variant]).prefill_steps(tokens)[variant.name]
        for i in range(3):
            step(i)
        torch.cuda.synchronize()
        found.append(kernels(lambda step=step: (align(), step(0))))  # the ranks begin together: waits are no longer than they are
        del step
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return difference(found[0], found[1], COUNTS[1] - COUNTS[0])


def overlapped(world: int, scatter: str, gather: str) -> Table:
    """A table by which every product goes with its collective, by these algorithms ("chunked", "plain"; "chunked", "push")."""
    entries = []
    for scheme in SCHEMES:
        product = "scaled_matmul" if scheme else "matmul"
        scatters = [name for name in registry if name.startswith(f"{product}_reduce_scatter")]
        entries += [Entry(name, "bfloat16", world, ((None, f"cuda:{scatter}"),), scheme) for name in scatters]
        moved = MOVED.get(scheme, "float8_e4m3fn")
        entries.append(Entry(f"all_gather_{product}", moved, world, ((None, f"cuda:{gather}"),), scheme))
    return Table(entries=tuple(entries))
