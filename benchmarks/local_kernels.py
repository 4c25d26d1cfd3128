"""Time the kernels of one GPU against the unfused path: torch.compile's kernels, and torch's attention where there is one.

    python benchmarks/local_kernels.py --out benchmarks/results/local_kernels-h100-1.json

Every point is a CUDA graph of `CALLS` calls, on tensors of their own where they are small, replayed in turn with the peers'
graphs and with a second one of its own; the median of the replays is reported.  Peers are compiled for the point's own
sizes.  `limit_us`: each input read once, each output written once, at the speed that a large elementwise kernel reaches in
the same run; or, where that takes longer, the products at the speed of a large matmul.  `picked`: lowering would take it.

`--tiles` times attention with other tiles too.  `--only` takes a part of the points, by the operator's name.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpfuse.ir import fused
from tpfuse.ir.attention import attention_quantize
from tpfuse.ir.op import Op
from tpfuse.ir.rope import qk_norm_rope
from tpfuse.ir.samples import rows, vector
from tpfuse.kernels import attention, norm_quant, rope
from tpfuse.kernels.attention import AttentionPlan
from tpfuse.lowering.select import Pick, pick
from tpfuse.measure import plain
from tpfuse.measure.results import commit, document, environment, write
from tpfuse.measure.timing import Timer, copy_bandwidth, launches, summary
from tpfuse.runtime.detect import detect

CALLS = 12
SETS_BYTES = 1 << 28  # of the inputs that a graph's calls go round
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
SCHEMES = {"fp8_tensor": (8, 512, 4096), "fp8_token": (8, 4096), "fp8_group128": (8, 512, 4096), "nvfp4": (8, 4096)}
TILES = {
    128: [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3)],
    64: [(128, 128, 8, 2), (128, 64, 4, 3), (128, 128, 4, 2)],
    192: [(128, 128, 8, 2), (128, 64, 8, 2)],
    256: [(64, 64, 4, 2)],
}


@dataclass(frozen=True)
class Point:
    """One operator at one size.

    args(i): the operator's arguments of call i.  peers: functions of the same arguments.  columns: of its rows in the result.
    moved: bytes in and out.  flops: of its products.
    """

    op: Op
    launch: Callable[..., Any]
    args: Callable[[int], tuple[Any, ...]]
    alive: tuple[bool, ...]
    peers: dict[str, Callable[..., Any]]
    columns: dict[str, Any]
    moved: float
    flops: float = 0.0
    others: dict[str, dict[str, Any]] = field(default_factory=dict)  # further options of the launcher, by name


def layout_of(scheme: str) -> str:
    return "linear" if scheme == "nvfp4" else "row"


def out_bytes(scheme: str) -> float:
    """A quantised value's, with its share of the scales."""
    return {"fp8_tensor": 1.0, "fp8_token": 1.0, "fp8_group128": 1 + 4 / 128, "nvfp4": 0.5 + 1 / 16}[scheme]


def in_turn(make: Callable[[int], tuple[Any, ...]], size: float) -> Callable[[int], tuple[Any, ...]]:
    """`make(i)` for some i, made once; `size` bytes each."""
    sets = [make(i) for i in range(max(2, min(CALLS, int(SETS_BYTES / size))))]
    return lambda i: sets[i % len(sets)]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, dynamic=False)


def norms(hidden: int = 4096) -> Iterator[Point]:
    for scheme, counts in SCHEMES.items():
        for tokens in counts:
            shape = {"tokens": tokens, "hidden": hidden, **BF16}
            weight, scale = vector(**shape), plain.scale_of(scheme)
            rest = (weight, scale, plain.EPS, 0.0, "cast_first", scheme, layout_of(scheme))

            def make(i: int, shape: Any = shape, rest: Any = rest) -> tuple[Any, ...]:
                return rows(**shape, seed=i), rows(**shape, seed=50 + i), *rest

            def peer(x, residual, weight, scale, eps, bias, rounding, scheme, layout):
                return plain.chain(x, residual, weight, scale, scheme)

            yield Point(
                fused.add_rms_norm_quantize, norm_quant.add_rms_norm_quantize, in_turn(make, 4 * tokens * hidden),
                (True, True, False, True), {"inductor": compiled(peer)}, {"scheme": scheme, "tokens": tokens, "hidden": hidden},
                tokens * hidden * (6 + out_bytes(scheme)),
            )  # fmt: skip


def activations(width: int = 14336) -> Iterator[Point]:
    for scheme, counts in SCHEMES.items():
        for tokens in counts[::2] if scheme.startswith("fp8") else counts[1:]:
            rest = (plain.scale_of(scheme), "silu", scheme, layout_of(scheme))

            def make(i: int, tokens: int = tokens, rest: Any = rest) -> tuple[Any, ...]:
                both = rows(tokens=tokens, hidden=2 * width, seed=i, **BF16) * 700
                return *both.chunk(2, -1), *rest

            def peer(gate, up, scale, act, scheme, layout):
                return plain.quantise(torch.nn.functional.silu(gate) * up, scale, scheme)

            yield Point(
                fused.act_and_mul_quantize, norm_quant.act_and_mul_quantize, in_turn(make, 4 * tokens * width),
                (True, True, False), {"inductor": compiled(peer)}, {"scheme": scheme, "tokens": tokens, "hidden": width},
                tokens * width * (4 + out_bytes(scheme)),
            )  # fmt: skip


def plain_heads(q, k, q_weight, k_weight, cos, sin, eps, weight_bias, rounding, style):
    """As transformers' Qwen3 and Gemma3 spell it; heads before tokens."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        return (y * (weight_bias + weight.float())).to(x.dtype) if weight_bias else weight * y.to(x.dtype)

    def turn(x: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)

    return turn(norm(q, q_weight).transpose(1, 2)), turn(norm(k, k_weight).transpose(1, 2))


def heads() -> Iterator[Point]:
    qwen = (32, 8, 128, 0.0, "cast_first", "half")
    gemma = (16, 8, 256, 1.0, "cast_last", "half+heads_first")
    for counts, (q_heads, k_heads, width, bias, rounding, style) in (((1, 64, 512, 4096), qwen), ((64, 4096), gemma)):
        for tokens in counts:
            weights = [vector(hidden=width, seed=s, **BF16) for s in (1, 2)]
            angles = torch.randn(1, tokens, width, device="cuda")
            rest = (*weights, angles.cos().bfloat16(), angles.sin().bfloat16(), plain.EPS, bias, rounding, style)

            def make(i: int, sizes: Any = (tokens, q_heads, k_heads, width), rest: Any = rest) -> tuple[Any, ...]:
                tokens, q_heads, k_heads, width = sizes
                parts = (rows(tokens=tokens, hidden=h * width, seed=i, **BF16) for h in (q_heads, k_heads))
                return *(x.view(1, tokens, -1, width) for x in parts), *rest

            size = tokens * (q_heads + k_heads) * width * 2
            columns = {"scheme": "", "tokens": tokens, "hidden": width, "heads": f"{q_heads}/{k_heads}"}
            peers = {"inductor": compiled(plain_heads)}
            yield Point(qk_norm_rope, rope.qk_norm_rope, in_turn(make, size), (True, True), peers, columns, 2 * size)


def attended(backend: SDPBackend) -> Callable[..., Any]:
    """Attention by one of torch's implementations, then quantise."""

    def fn(q, k, v, mask, scale, softmax_scale, causal, method, scheme, layout):
        with sdpa_kernel(backend):  # in the graph: outside, compiled functions that share this code would share one graph
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return plain.quantise(out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1), scale, scheme)

    return compiled(fn)


def attentions(tiles: bool) -> Iterator[Point]:
    llama, mla = ((32, 8), 128, 128), ((16, 16), 192, 128)
    sizes = [(llama, "fp8_tensor", tokens) for tokens in (16, 128, 512, 2048, 4096, 8192)]
    sizes += [(llama, "fp8_group128", 2048), (llama, "nvfp4", 2048), (mla, "fp8_group128", 2048)]
    sizes += [(((32, 8), 64, 64), "fp8_tensor", 2048), (((16, 8), 256, 256), "fp8_tensor", 2048)]
    for ((q_heads, k_heads), width, v_width), scheme, tokens in sizes:
        rest = (None, plain.scale_of(scheme), width**-0.5, True, "flash", scheme, layout_of(scheme))

        def make(i: int, parts: Any = ((q_heads, width), (k_heads, width), (k_heads, v_width)), tokens: int = tokens,
                 rest: Any = rest) -> tuple[Any, ...]:  # fmt: skip
            made = (torch.randn(1, tokens, h, w, **BF16).transpose(1, 2) for h, w in parts)
            return *made, *rest

        first = SDPBackend.FLASH_ATTENTION if width == v_width else SDPBackend.EFFICIENT_ATTENTION
        names = {"flash+inductor" if width == v_width else "efficient+inductor": first}
        names["cudnn+inductor"] = SDPBackend.CUDNN_ATTENTION
        size = tokens * (q_heads * width + k_heads * (width + v_width)) * 2
        plan = AttentionPlan.of(width, v_width)
        others = TILES[width] if tiles else []
        launch = attention.flash if tiles else attention.attention_quantize
        yield Point(
            attention_quantize, launch, in_turn(make, size), (True, True, False),
            {name: attended(backend) for name, backend in names.items()},
            {"scheme": scheme, "tokens": tokens, "hidden": q_heads * v_width, "heads": f"{q_heads}/{k_heads}",
             "head_dim": f"{width}/{v_width}"},
            size + tokens * q_heads * v_width * out_bytes(scheme), q_heads * tokens * tokens * (width + v_width),
            {"x".join(map(str, t)): {"plan": AttentionPlan(t[0], t[1], plan.chunk, plan.v_block, *t[2:])} for t in others},
        )  # fmt: skip


def measure(point: Point, timer: Timer, bandwidth: float, speed: float) -> list[dict[str, Any]]:
    """The rows of one point.  A peer that cannot do it is reported and left out."""
    name = f"tpfuse:{point.launch.__module__.rpartition('.')[2]}"

    def ours(options: dict[str, Any]) -> Callable[[int], Any]:
        return lambda i: point.launch(*point.args(i), alive=point.alive, **options)

    impls: dict[str, Callable[[int], Any]] = {name: ours({}), f"{name} (A/A)": ours({})}
    impls |= {f"{name} {tiles}": ours(options) for tiles, options in point.others.items()}
    for peer, fn in point.peers.items():
        try:
            fn(*point.args(0))
        except RuntimeError as error:
            print(f"  {peer} left out: {str(error).splitlines()[0]}", flush=True)
            continue
        impls[peer] = lambda i, fn=fn: fn(*point.args(i))
    picked = isinstance(pick(point.op, point.op.bind(point.args(0)), detect("cuda", None), "auto"), Pick)
    limit = max(point.moved / bandwidth, point.flops / speed) * 1e6
    return [
        {
            "op": point.op.name, **point.columns, "dtype": "bfloat16", "world": 1, "impl": impl,
            **({"picked": True} if picked and impl == name else {}), **summary(samples), "limit_us": limit,
            "launches": launches(impls[impl]), "samples": samples,
        }
        for impl, samples in timer.alternate(impls, CALLS).items()
    ]  # fmt: skip


def matmul_speed(timer: Timer, size: int = 8192) -> float:
    """Floating-point operations a second of a large bf16 product."""
    a, b = (torch.randn(size, size, **BF16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / min(timer.alternate({"mm": lambda i: torch.mm(a, b, out=out)}, 2)["mm"]) * 1e6


def geometric_means(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By operator: the fastest peer's time over the kernel's, over all points."""
    ratios: dict[str, list[float]] = {}
    points: dict[Any, dict[str, float]] = {}
    for row in found:
        key = tuple(v for k, v in row.items() if k in ("op", "scheme", "tokens", "hidden", "heads", "head_dim"))
        points.setdefault(key, {})[row["impl"]] = row["us"]
    for key, times in points.items():
        peers = [us for impl, us in times.items() if not impl.startswith("tpfuse")]
        ours = next(us for impl, us in times.items() if impl.startswith("tpfuse"))
        ratios.setdefault(key[0], []).append(min(peers) / ours)
    return {op: math.exp(sum(map(math.log, values)) / len(values)) for op, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default=commit(), help="the git commit measured")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--only", default="", help="points whose operator's name holds this")
    parser.add_argument("--tiles", action="store_true")
    args = parser.parse_args()
    timer = Timer(args.trials)
    bandwidth, speed = copy_bandwidth(timer), matmul_speed(timer)
    parts = {
        "qk_norm_rope": heads, "attention_quantize": lambda: attentions(args.tiles), "add_rms_norm_quantize": norms,
        "act_and_mul_quantize": activations,
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    for name, part in parts.items():
        for point in part() if args.only in name else ():
            torch.compiler.reset()
            made = measure(point, timer, bandwidth, speed)
            found += made
            size = " ".join(str(v) for v in point.columns.values())
            times = "  ".join(f"{r['impl']} {r['us']:.1f} ({r['launches']})" for r in made)
            print(f"{time.monotonic() - began:5.1f} s  {name} {size}: {times}  limit {made[0]['limit_us']:.1f}", flush=True)
    extra = {"world": 1, "commit": args.commit, **environment(), "copy_bandwidth": bandwidth, "matmul_flops": speed}
    write(args.out, document("local_kernels", found, **extra))
    for op, ratio in geometric_means(found).items():
        print(f"{op}: {ratio:.2f} x the fastest peer, geometric mean")


if __name__ == "__main__":
    main()
