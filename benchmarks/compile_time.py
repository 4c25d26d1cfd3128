"""Compile time of one graph and range with tpfuse beside plain Inductor: alternating, each in a process of its own with cold
caches.

    python benchmarks/compile_time.py [--layers 30] [--repeats 3] [--hidden 64] [--output FILE]

The model is the hand-written transformer of the tests on one gloo rank, under dynamic=True.  Reported are the seconds of the
first call, wall clock and processor (C++ compilers included), the ratio of the medians, and the seconds that tpfuse's own
stages took.  Plain Inductor is measured twice in every round: the difference of its two series is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMPLS = ("inductor", "tpfuse:pipeline", "inductor (again)")


def measure(impl: str, layers: int, hidden: int) -> dict[str, Any]:
    """Compile once in this process → seconds, cpu_seconds, and by stage the seconds that tpfuse spent."""
    import torch
    import torch.distributed as dist

    import tpfuse
    from tests.models import Stack
    from tpfuse import compiler
    from tpfuse.runtime import dispatch

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    stages: dict[str, float] = {}
    for module, name in (
        (compiler, "raise_graph"), (compiler, "verify"), (dispatch, "fuse"), (dispatch, "verify"), (dispatch, "lower")
    ):  # fmt: skip
        setattr(module, name, clocked(stages, name, getattr(module, name)))
    model = Stack(hidden, layers)
    x = torch.randn(64, hidden)
    compiled: Any = torch.compile(model, dynamic=True, fullgraph=True)
    if impl.startswith("tpfuse"):
        compiled = tpfuse.compile(model, dynamic=True, fullgraph=True)
    start, cpu = time.perf_counter(), cpu_seconds()
    with torch.no_grad():
        compiled(x)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu, "stages": stages}
    if impl.startswith("tpfuse"):
        assert compiled.report.counts() == {"all_reduce_add_rms_norm": 2 * layers}
    return found


def clocked(stages: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            stages[name] = stages.get(name, 0.0) + time.perf_counter() - start

    return call


def cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def in_a_process(impl: str, layers: int, hidden: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, __file__, "--one", impl, "--layers", str(layers), "--hidden", str(hidden)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/compile_time-cpu-1.json"))
    parser.add_argument("--one", choices=IMPLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers, options.hidden)))
        return
    import torch

    from tpfuse.measure.results import document, write

    samples: dict[str, list[dict[str, Any]]] = {impl: [] for impl in IMPLS}
    for _ in range(options.repeats):
        for impl in IMPLS:
            samples[impl].append(in_a_process(impl, options.layers, options.hidden))
            print(impl, samples[impl][-1], flush=True)
    rows = [row_of(impl, samples[impl], options) for impl in IMPLS]
    base, fused, again = rows
    for key in ("seconds", "cpu_seconds"):
        print(f"{key}: {fused[key] / base[key]:.2f} × plain Inductor (plain against plain: {again[key] / base[key]:.2f})")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    extra = {
        "machine": {"cpu": platform.machine(), "count": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"torch": torch.__version__, "python": platform.python_version()}, "commit": commit,
    }  # fmt: skip
    write(options.output, document("compile_time", rows, world=1, **extra))


def row_of(impl: str, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    row = {
        "op": "compile", "impl": impl, "dtype": "float32", "tokens": "1..", "hidden": options.hidden, "layers": options.layers,
        "world": 1, "seconds": statistics.median(seconds), "seconds_min": min(seconds), "seconds_max": max(seconds),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs), "samples": seconds,
    }  # fmt: skip
    stages = runs[-1]["stages"]
    return {**row, "stages": {k: round(v, 3) for k, v in stages.items()}} if stages else row


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    main()
