"""The kernels of one layer of a stack shaped like a model, by the profiler: plain, and with its residual sharded.

    python benchmarks/layer_kernels.py --out benchmarks/results/layer_kernels-h100-2.json [--shape 8b] [--scheme none,fp8_tensor]
        [--tokens 2048] [--scatter chunked] [--gather chunked] [--world 2]

A row for each kernel: how often a layer launches it, and the microseconds of all these launches.  `plain` is torch.compile's
stack with all-reduces (of NVFP4 and FP8 in groups, whose products only tpfuse has, one that tpfuse compiles without any fusion);
`tpfuse` is every pass, with the algorithms that are named for products next to collectives.  The profiler slows nothing that is
counted, but times are not those of a benchmark: read them as shares.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from tpfuse.cli.bench import run_ranks
from tpfuse.cli.inputs import schemes
from tpfuse.cli.launch import Place
from tpfuse.measure import results, trace
from tpfuse.measure.e2e import FORCED, PLAIN, Variants
from tpfuse.measure.ranks import Ranks
from tpfuse.measure.stack import SHAPES, Stack


def work(place: Place, progress: Any, shape: str, names: list[str], tokens: int, scatter: str, gather: str) -> list[Any]:
    """One rank: → the rows, this rank's."""
    ranks = Ranks.join(place, (), flashinfer=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        trace.overlapped(place.world, scatter, gather).save(table)
        for scheme in names:

            def make(layers: int, scheme: str = scheme) -> Stack:
                torch.manual_seed(place.rank)
                return Stack(SHAPES[shape], layers, place.world, torch.bfloat16, scheme=scheme)

            variants = {v.name: v for v in Variants(ranks.group, scheme, str(table), tokens).prefill()}
            for name in (PLAIN, FORCED):
                progress(f"{scheme or 'none'} {name}", 0, 0)
                where = {
                    "op": "layer", "scheme": scheme, "dtype": "bfloat16", "tokens": tokens, "hidden": SHAPES[shape].hidden,
                    "intermediate": SHAPES[shape].intermediate, "world": place.world, "impl": name,
                }  # fmt: skip
                rows += [{**where, **row} for row in trace.of_a_layer(make, variants[name], tokens)]
    ranks.leave()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--scheme", default="none,fp8_tensor")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--scatter", default="chunked", choices=["chunked", "plain"])
    parser.add_argument("--gather", default="chunked", choices=["chunked", "push"])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--commit")
    given = parser.parse_args()
    job = given.shape, schemes(given.scheme, ()), given.tokens, given.scatter, given.gather
    rows = run_ranks(work, Place.of_torchrun(), given.world, *job)
    extra = {"world": given.world, "commit": given.commit or results.commit(), "scatter": given.scatter, "gather": given.gather}
    results.write(given.out, results.document("layer_kernels", rows, **extra, **results.environment()))
    for row in rows:
        told = f"{row['count']:4.1f} × {row['us']:7.1f} µs {row['kind']:9} {row['kernel']}"
        print(f"{row['impl']:26} {row['scheme'] or 'none':12} {told}")


if __name__ == "__main__":
    main()
