"""Time norm + quantise and activation + quantise on one GPU against torch.compile's kernels.

    python benchmarks/norm_quant.py --out benchmarks/results/norm_quant-h200-1.json

Every point is a CUDA graph of `CALLS` calls, each on tensors of its own, replayed alternately with the peer's graph; the
median of the replays is reported.  `limit_us`: each input read once, each output written once, at the speed that a large
elementwise kernel reaches in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tpfuse.ir.samples import rows, vector
from tpfuse.kernels import norm_quant
from tpfuse.measure import plain
from tpfuse.measure.results import document, environment, write
from tpfuse.measure.timing import Timer, copy_bandwidth, launches, summary

CALLS = 12
SCHEMES = (("fp8_tensor", "row"), ("fp8_token", "row"), ("fp8_group128", "row"), ("nvfp4", "linear"))
TOKENS = (1, 8, 64, 512, 2048, 8192)


def plain_act(both, scale, scheme):
    gate, up = both.chunk(2, -1)
    return plain.quantise(torch.nn.functional.silu(gate) * up, scale, scheme)


def norm_point(tokens: int, hidden: int, scheme: str, layout: str, compiled: Callable[..., Any]) -> dict[str, list[Any]]:
    scale = plain.scale_of(scheme)
    shape: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": torch.bfloat16, "device": "cuda"}
    weight = vector(**shape)
    sets = [(rows(**shape, seed=i), rows(**shape, seed=50 + i)) for i in range(min(CALLS, 2 if tokens > 2048 else CALLS))]
    mark_tokens(t for pair in sets for t in pair)

    def ours(i: int) -> Any:
        args = (*sets[i % len(sets)], weight, scale, 1e-6, 0.0, "cast_first", scheme, layout)
        return norm_quant.add_rms_norm_quantize(*args, alive=(True, True, False, True))

    return {"ours": [ours], "peer": [lambda i: compiled(*sets[i % len(sets)], weight, scale, scheme)]}


def act_point(tokens: int, width: int, scheme: str, layout: str, compiled: Callable[..., Any]) -> dict[str, list[Any]]:
    scale = plain.scale_of(scheme)
    shape: dict[str, Any] = {"tokens": tokens, "hidden": 2 * width, "dtype": torch.bfloat16, "device": "cuda"}
    sets = [rows(**shape, seed=i) * 700 for i in range(min(CALLS, 2 if tokens > 512 else CALLS))]
    mark_tokens(sets)

    def ours(i: int) -> Any:
        gate, up = sets[i % len(sets)].chunk(2, -1)
        return norm_quant.act_and_mul_quantize(gate, up, scale, "silu", scheme, layout, alive=(True, True, False))

    return {"ours": [ours], "peer": [lambda i: compiled(sets[i % len(sets)], scale, scheme)]}


def mark_tokens(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def moved(op: str, tokens: int, width: int, scheme: str) -> float:
    """Bytes in and out."""
    out = {"fp8_tensor": 1.0, "fp8_token": 1.0, "fp8_group128": 1 + 4 / 128, "nvfp4": 0.5 + 1 / 16}[scheme]
    return tokens * width * ((6 if op == "add_rms_norm_quantize" else 4) + out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default="unknown", help="the git commit measured")
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    timer = Timer(args.trials)
    bandwidth = copy_bandwidth(timer)
    found: list[dict[str, Any]] = []
    points = (("add_rms_norm_quantize", 8192, norm_point, plain.chain), ("act_and_mul_quantize", 14336, act_point, plain_act))
    for op, width, point, chain in points:
        for scheme, layout in SCHEMES:
            torch.compiler.reset()
            compiled = torch.compile(chain)  # as in a model: the tokens dynamic, the width not
            for tokens in TOKENS:
                made = point(tokens, width, scheme, layout, compiled)
                ours, peer = made["ours"][0], made["peer"][0]
                impls = {"tpfuse:norm_quant": ours, "tpfuse:norm_quant (A/A)": ours, "inductor": peer}
                times = timer.alternate(impls, CALLS)
                for impl, samples in times.items():
                    found.append(
                        {
                            "op": op, "scheme": scheme, "dtype": "bfloat16", "tokens": tokens, "hidden": width, "world": 1,
                            "impl": impl, **summary(samples),
                            "limit_us": moved(op, tokens, width, scheme) / bandwidth * 1e6,
                            "launches": launches(impls[impl]), "samples": samples,
                        }
                    )  # fmt: skip
                last = {row["impl"]: row["us"] for row in found[-3:]}
                print(f"{op} {scheme:13} {tokens:5} x {width}: " + "  ".join(f"{k} {v:.1f}" for k, v in last.items()), flush=True)
    extra = {"world": 1, "commit": args.commit, **environment(), "copy_bandwidth": bandwidth}
    write(args.out, document("norm_quant", found, **extra))


if __name__ == "__main__":
    main()
