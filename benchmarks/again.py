"""Every result file of several GPUs, made anew on this machine: a step for each, in order.

    python benchmarks/again.py --out FOLDER [--world 2] [--only tune_products,gemm] [--flashinfer]

Without `--only` every step runs, an hour in all.  A step that fails or takes longer than its time ends alone: what a benchmark
had measured by then is written, a table is not.  The others go on, and the exit status tells.  What needs FlashInfer, which takes
minutes to build, runs with `--flashinfer` alone.  Files are called STEP-GPU-WORLD.json: `gemm-h100-2.json`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tpfuse.measure import results

WIDTHS = "--hidden 4096,8192 --intermediate 14336,28672"
ROOM = "none,fp8_tensor,fp8_token"
E2E = "bench e2e --table {table} --json {file} --decode"


@dataclass(frozen=True)
class Step:
    """arguments: of `tpfuse`; {file}, {table} and {plot} are paths.  seconds: after which no further point begins.
    flashinfer: it is among the peers."""

    arguments: str
    seconds: int
    flashinfer: bool = False


STEPS = {
    "tune_products": Step(f'tune --tokens "" {WIDTHS} --scheme {ROOM} --no-flashinfer --out {{table}} --samples {{file}}', 240),
    "tune_sums": Step(
        f"tune --tokens 128,512,1024,2048,4096,8192 --hidden 4096,8192 --scheme {ROOM} --sequence-parallel --no-flashinfer "
        "--out {table} --samples {file}", 180,
    ),
    "tune": Step(
        "tune --tokens 1,8,32,64,128,256,512,1024,2048 --hidden 4096,5120,8192 --scheme none,fp8_tensor,fp8_group128 "
        "--out {table} --samples {file}", 300, True,
    ),
    "tune_attention": Step(
        'tune --tokens "" --head-dims 64x64,128x128,256x256,192x128 --scheme fp8_tensor,fp8_group128,nvfp4 --no-flashinfer '
        "--out {table} --samples {file}", 120,
    ),
    "gemm": Step(f"bench gemm --scheme {ROOM},fp8_group128 --table {{table}} --json {{file}} --plot {{plot}}", 300),
    "collectives": Step("bench collectives --table {table} --json {file} --plot {plot}", 400, True),
    "sharded": Step(
        "bench collectives --sharded --tokens 128,256,512,1024,2048 --hidden 4096,8192 --table {table} --json {file} "
        "--plot {plot}", 120, True,
    ),
    "e2e": Step(f'{E2E} 1,8,32,128 --prefill ""', 400, True),
    "e2e_prefill": Step(f'{E2E} "" --prefill 512,2048,8192', 400),
    "e2e_prefill_fp8": Step(f'{E2E} "" --prefill 2048,8192 --scheme fp8_tensor,fp8_token', 600),
    "e2e_prefill_others": Step(f'{E2E} "" --prefill 2048,8192 --shape gemma,mla', 400),
    "e2e_prefill_schemes": Step(f'{E2E} "" --prefill 2048 --shape 8b,mla --scheme fp8_group128,nvfp4', 400),
    "e2e_serve": Step(f'{E2E} "" --prefill "" --shape 8b --layers max --serve 512:1:1,2048:4:32 --plot {{plot}}', 400),
}  # fmt: skip


def names(out: Path, step: str, gpu: str, world: int) -> dict[str, str]:
    """The paths of a step's arguments.  All steps share one table."""
    end = f"{gpu}-{world}"
    return {"file": f"{out / step}-{end}.json", "table": f"{out / 'table'}-{end}.json", "plot": f"{out / step}-{end}.svg"}


def command(step: str, out: Path, gpu: str, world: int, commit: str) -> list[str]:
    """What a step runs."""
    of = STEPS[step]
    paths = names(out, step, gpu, world)
    given = [part.format(**paths) for part in shlex.split(of.arguments)]
    marked = [] if of.arguments.startswith("tune") else ["--commit", commit]
    return [sys.executable, "-m", "tpfuse.cli", *given, "--world", str(world), "--limit-s", str(of.seconds), *marked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--only", default="", metavar="NAME,…", help=" ".join(STEPS))
    parser.add_argument("--flashinfer", action="store_true")
    parser.add_argument("--commit", default=results.commit())
    given = parser.parse_args()
    gpu = torch.cuda.get_device_name().split()[1].lower()  # of "NVIDIA H100 80GB HBM3"
    chosen = given.only.split(",") if given.only else [name for name in STEPS if given.flashinfer or not STEPS[name].flashinfer]
    if unknown := [name for name in chosen if name not in STEPS]:
        parser.error(f"no such step: {', '.join(unknown)}")
    failed = []
    for name in chosen:
        began = time.monotonic()
        try:
            arguments = command(name, given.out, gpu, given.world, given.commit)
            status = subprocess.run(arguments, timeout=STEPS[name].seconds + 200, check=False).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
        failed += [name] if status else []
        print(f"{name}: {status or 'done'} after {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
