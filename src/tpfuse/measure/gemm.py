"""Products next to a collective, at the sizes of a layer's two projections: the one before a reduce-scatter and the one behind
an all-gather, by every kernel of the registry, with the product alone beside them.

The product alone is measured first and last: the clock moves under such load, and the difference is the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import formats
from tpfuse.formats import default_layout
from tpfuse.formats.layouts import apply_layout
from tpfuse.ir import overlap, registry
from tpfuse.ir.chained import Chained
from tpfuse.ir.matmul import E4M3, NATIVE, dtype_name, matmul, scaled_matmul
from tpfuse.ir.op import Kernel, Message, Op, load
from tpfuse.lowering import select
from tpfuse.lowering.gemm_kernels import LISTS
from tpfuse.lowering.table import UNFUSED, Table
from tpfuse.measure import plain
from tpfuse.measure.points import AGAIN, ALONE, NVLINK
from tpfuse.measure.timing import summary, without_index
from tpfuse.target import Range, Target

NCCL, TORCH = "nccl+cublas", "torch_fused"
PEERS = {"nccl": NCCL, "torch:fused": TORCH}  # by kernel
SCATTER, WITH_NORM, GATHER = "matmul_reduce_scatter", "matmul_reduce_scatter_add_rms_norm", "all_gather_matmul"
OPERATORS = {  # of rows as they are, and of quantised ones
    SCATTER: (overlap.matmul_reduce_scatter, overlap.scaled_matmul_reduce_scatter),
    WITH_NORM: (registry[WITH_NORM], registry[f"scaled_{WITH_NORM}_quantize"]),
    GATHER: (overlap.all_gather_matmul, overlap.all_gather_scaled_matmul),
}
FLOPS = 650e12  # a second, about, of an H100 in bf16
GRAPH_US = 1500.0  # of calls in a graph, about
SAMPLES_US, FEWEST = 15_000.0, 5  # of all samples of an implementation, about; and how many there are at least
BLOCK = 128
LAYOUTS = {"fp8_group128": "col"}  # as cuBLAS reads them; others' default


@dataclass(frozen=True)
class GemmPoint:
    """operator: a key of `OPERATORS`.  scheme: "" for none.  tokens: of all ranks together.  hidden, intermediate: of the layer,
    the second shared by `world` ranks."""

    operator: str
    scheme: str
    hidden: int
    intermediate: int
    tokens: int
    world: int
    dtype: str = "bfloat16"

    @property
    def op(self) -> Op:
        return OPERATORS[self.operator][bool(self.scheme)]

    @property
    def scatters(self) -> bool:
        return self.operator != GATHER

    @property
    def weight(self) -> tuple[int, int]:
        """k, n: of the down projection, or of gate and up in one."""
        own = self.intermediate // self.world
        return (own, self.hidden) if self.scatters else (self.hidden, 2 * own)

    @property
    def given(self) -> int:
        """Rows of the operator's argument."""
        return self.tokens if self.scatters else self.tokens // self.world

    @property
    def layout(self) -> str:
        return LAYOUTS.get(self.scheme) or (default_layout(self.scheme) if self.scheme else "row")

    @property
    def about_us(self) -> float:
        """What the product alone takes, more or less."""
        k, n = self.weight
        return 2e6 * self.tokens * k * n / FLOPS

    @property
    def calls(self) -> int:
        """Calls in a graph."""
        return max(1, min(4, int(GRAPH_US / self.about_us)))

    def trials(self, most: int) -> int:
        """Samples of an implementation: fewer of long ones, which vary less."""
        return max(min(FEWEST, most), min(most, int(SAMPLES_US / (self.calls * self.about_us))))

    @property
    def alive(self) -> tuple[bool, ...]:
        """The results that a layer wants: behind a norm h too, but not the unquantised norm beside a quantised one."""
        if self.operator != WITH_NORM:
            return (True,)
        return (True, True, False, True) if self.scheme else (True, True)

    @property
    def message(self) -> Message:
        return self.op.message(shapes(self))

    def limit_us(self, alone_us: float) -> float:
        """The product alone, or the rows that each rank must send or receive over NVLink, whichever takes longer."""
        message = self.message
        sent = (self.world - 1) / self.world * self.tokens * message.row_bytes
        return max(alone_us, sent / NVLINK * 1e6)

    def rows(self, samples: Mapping[str, list[float]], world: int, picked: str | None) -> list[dict[str, Any]]:
        """Of a result file."""
        found = {impl: summary(values) for impl, values in samples.items()}
        limit = self.limit_us(min(of["us"] for impl, of in found.items() if impl.startswith(ALONE)))
        return [
            {"op": self.op.name, "scheme": self.scheme, "dtype": self.dtype, "tokens": self.tokens, "hidden": self.hidden,
             "intermediate": self.intermediate, "world": world, "impl": impl, **({"picked": True} if impl == picked else {}),
             **of, "limit_us": limit, "samples": samples[impl]}
            for impl, of in found.items()
        ]  # fmt: skip


def grid(
    operators: Iterable[str], schemes: Iterable[str], sizes: Iterable[tuple[int, int]], tokens: Iterable[int], world: int,
    dtype: str = "bfloat16",
) -> list[GemmPoint]:  # fmt: skip
    """Every combination, the tokens innermost and descending: they share operands, made for the most."""
    counts = sorted(set(tokens), reverse=True)
    return [GemmPoint(o, s, h, i, t, world, dtype) for (h, i), s, o, t in itertools.product(sizes, schemes, operators, counts)]


class Gemms:
    """One rank's implementations over `group`, whose other ranks build the same in the same order.

    most: the largest token count; widest: the most columns that meet in a collective.
    """

    def __init__(self, group: dist.ProcessGroup, target: Target, most: int, widest: int, device: str = "cuda") -> None:
        self.group, self.target, self.room, self.device = group, target, (most, widest), device
        self.prepared: set[str] = set()
        self.made: tuple[Any, dict[str, Any]] = (None, {})
        self.fastest: dict[GemmPoint, str] = {}  # kernel, as far as measured: see `learn`

    def kernels(self, point: GemmPoint) -> dict[str, Callable[[int], Any]]:
        """The product alone, every kernel that serves the point by its name, and the product alone again."""
        args = self.arguments(point)
        found = {ALONE: self.alone(point)}
        for kernel in usable(point, args, self.target):
            self.prepare(kernel.prepare)
            launch = partial(point.op.launcher(kernel.name), *(args[p] for p in point.op.params), alive=point.alive)
            found[kernel.name] = partial(without_index, launch)
        product = replace(point, operator=SCATTER)
        if point.operator == WITH_NORM and product in self.fastest:
            found[UNFUSED] = self.unfused(point, product, self.fastest[product])
        return {**found, ALONE + AGAIN: found[ALONE]}

    def unfused(self, point: GemmPoint, product: GemmPoint, kernel: str) -> Callable[[int], Any]:
        """A kernel of the product of scattered rows, then the norm (and quantise) of own rows by a kernel of its own."""
        given, then = self.arguments(product), self.arguments(point)
        launch = product.op.launcher(kernel)
        name = "add_rms_norm_quantize" if point.scheme else "add_rms_norm"
        norm = load(f"tpfuse.kernels.norm_quant:{name}")

        def call(i: int) -> Any:
            then["x"] = launch(*(given[p] for p in product.op.params), alive=(True,))
            return norm(*(then[p] for p in registry[name].params), alive=point.alive)

        return call

    def learn(self, point: GemmPoint, rows: Iterable[Mapping[str, Any]]) -> None:
        """From the rows of a point whose `impl` are kernels."""
        self.fastest[point] = min((r["us"], r["impl"]) for r in rows if not r["impl"].startswith(ALONE))[1]

    def named(self, point: GemmPoint) -> dict[str, Callable[[int], Any]]:
        """The same by the names of result files; peers in front of a norm have a kernel of its own behind them."""
        *own, again = ((impl_of(name), fn) for name, fn in self.kernels(point).items())
        peers = {}
        if point.operator == WITH_NORM:
            product = replace(point, operator=SCATTER)
            for kernel in usable(product, self.arguments(product), self.target):
                if kernel.name in PEERS:
                    self.prepare(kernel.prepare)
                    peers[PEERS[kernel.name]] = self.unfused(point, product, kernel.name)
        return dict([*own, *peers.items(), again])

    def alone(self, point: GemmPoint) -> Callable[[int], Any]:
        """The product of all rows, without a collective."""
        args, operands = self.operands(point), load("tpfuse.kernels.operands:operands")
        x, scale = rows_of(point, args, point.tokens)
        given = {**args, "x": x, "x_scale": scale, **attributes(point)}
        rows, product = operands([given[name] for name in (scaled_matmul if point.scheme else matmul).params])

        def call(i: int) -> Tensor:
            out = product.empty(point.tokens)
            product.into(out, rows)
            return out

        return call

    def arguments(self, point: GemmPoint) -> dict[str, Any]:
        """The operator's arguments by name, other data on each rank."""
        args = self.operands(point)
        x, scale = rows_of(point, args, point.given)
        return bound(point, {**args, "x": x, "x_scale": scale}, self.group.group_name)

    def operands(self, point: GemmPoint) -> dict[str, Any]:
        """x of the most rows, its scales by rows, and the weight: as a layer stores them, made once for all token counts."""
        key = (point.scatters, point.scheme, point.hidden, point.intermediate, point.dtype)
        if self.made[0] != key:
            self.made = (None, {})  # the memory first
            self.made = (key, make(point, self.room[0], self.group.rank(), self.device))
        return self.made[1]

    def prepare(self, path: str) -> None:
        """Run a kernel's prepare step, once."""
        if path and path not in self.prepared:
            load(path)(self.group, *self.room)
            self.prepared.add(path)


def make(point: GemmPoint, most: int, rank: int, device: str) -> dict[str, Any]:
    """Operands by the names of `scaled_matmul`."""
    k, n = point.weight
    generator = torch.Generator(device).manual_seed(rank)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=getattr(torch, point.dtype))

    x, weight = randn(most, k), randn(n, k) * k**-0.5
    absent = {"bias": None, "result_scale": None, "alpha": None}
    if not point.scheme:
        return {"x": x, "x_scale": None, "weight": weight.t(), "weight_scale": None, **absent}
    q, x_scale = quantised(x, point.scheme)
    if point.scheme == "fp8_group128":
        w, w_scale = blocks(weight)
    else:
        w, w_scale = quantised(weight, point.scheme, k**-0.5)
    if point.scheme == "fp8_token":
        w_scale = w_scale.t().contiguous()
    elif point.scheme == "nvfp4":
        w_scale = apply_layout(w_scale, "swizzled_128x4")
        absent["alpha"] = torch.tensor(1.0 / 200.0**2, device=device)
    return {"x": q, "x_scale": x_scale, "weight": w.t(), "weight_scale": w_scale, **absent}


def quantised(x: Tensor, scheme: str, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Normal values of that spread quantised, with their scales by rows; one number for "fp8_tensor", the same on every rank."""
    if scheme == "fp8_tensor":
        scale = torch.tensor(5 * spread / 448, device=x.device)
        return (x / scale).clamp(-448, 448).to(E4M3), scale
    factor = torch.tensor(200.0, device=x.device) if scheme == "nvfp4" else None
    return formats.quantize(x, factor, scheme, default_layout(scheme))


def blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [n, k] quantised in 128 × 128 blocks → values [n, k], scales [k / 128, n / 128]."""
    n, k = weight.shape
    parts = weight.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK)
    scale = parts.abs().amax((1, 3), keepdim=True).float() / 448
    return (parts / scale).clamp(-448, 448).to(E4M3).view(n, k), scale.view(n // BLOCK, k // BLOCK).t()


def rows_of(point: GemmPoint, args: Mapping[str, Any], count: int) -> tuple[Tensor, Any]:
    """The first `count` rows and their scales in the point's layout."""
    scale = args["x_scale"]
    if point.scheme in ("", "fp8_tensor"):
        return args["x"][:count], scale
    return args["x"][:count], apply_layout(scale[:count], point.layout)


def attributes(point: GemmPoint) -> dict[str, Any]:
    """Those of a product of quantised rows."""
    if not point.scheme:
        return {}
    return {
        "scheme": point.scheme, "layout": point.layout,
        "weight_layout": "swizzled_128x4" if point.scheme == "nvfp4" else "row", "out_dtype": point.dtype,
        "fast_accum": point.scheme in NATIVE, "origin": "",
    }  # fmt: skip


def bound(point: GemmPoint, args: Mapping[str, Any], group: str) -> dict[str, Any]:
    """One product's operands as the operator's arguments, in its order."""
    given = {
        **args, **{name: [args[one]] for name, one in LISTS.items()}, **attributes(point), "padded": False, "rows": None,
        "keep": False, "group": group,
    }  # fmt: skip
    op = point.op
    if isinstance(op, Chained):
        own, _ = op.halves(op.params)
        renamed = {name: given[one] for name, one in zip(own, op.first.params, strict=True)}
        given = {**given, **behind(point, args["x"].device), **renamed}
    return {name: given[name] for name in op.params}


def behind(point: GemmPoint, device: torch.device) -> dict[str, Any]:
    """What follows a product of scattered rows: a residual of own rows, a norm, a quantise."""
    shape, dtype = (-(-point.tokens // point.world), point.hidden), getattr(torch, point.dtype)
    return {
        "residual": torch.full(shape, 0.5, dtype=dtype, device=device), "alpha": 1.0, "eps": plain.EPS, "weight_bias": 0.0,
        "weight": torch.ones(point.hidden, dtype=dtype, device=device), "bias": None, "rounding": "cast_first",
        "scale": plain.scale_of(point.scheme, str(device)) if point.scheme else None, "scheme": point.scheme,
        "layout": point.layout,
    }  # fmt: skip


def by_message(points: Iterable[GemmPoint], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of points with dtype, hidden and across of the rows that meet in the collective, which lowering looks for."""
    where = {}
    for p in points:
        found = p.message
        sizes = {"dtype": dtype_name(found.dtype), "hidden": found.columns, "across": found.across}
        where[p.op.name, p.scheme, p.hidden, p.intermediate] = sizes
    return [{**row, **where[row["op"], row["scheme"], row["hidden"], row["intermediate"]]} for row in rows]


def shapes(point: GemmPoint, group: str = "") -> dict[str, Any]:
    """The operator's arguments without data."""
    k, n = point.weight

    def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    packed = 2 if point.scheme == "nvfp4" else 1
    dtype = getattr(torch, point.dtype) if not point.scheme else torch.uint8 if packed == 2 else E4M3
    weight_scales = {"fp8_token": (1, n), "fp8_group128": (k // BLOCK, n // BLOCK), "nvfp4": (n, k // 16)}
    args: dict[str, Any] = {
        "x": empty(point.given, k // packed, dtype), "weight": empty(n, k // packed, dtype).t(), "x_scale": None,
        "weight_scale": empty(*weight_scales.get(point.scheme, (1, 1)), torch.float32), "bias": None, "result_scale": None,
        "alpha": None,
    }  # fmt: skip
    return bound(point, args, group)


def usable(point: GemmPoint, args: Mapping[str, Any], target: Target) -> list[Kernel]:
    """The kernels that serve the point."""
    return [
        kernel for kernel in point.op.kernels
        if kernel.backend in target.backends - {"reference"} and kernel.supports(args, target) is None
    ]  # fmt: skip


def impl_of(kernel: str) -> str:
    """The name in result files of a kernel of the registry, or of the product alone."""
    if kernel.startswith(ALONE):
        return kernel
    return PEERS.get(kernel) or "tpfuse:" + kernel.removeprefix("cuda:")


def picked_impl(point: GemmPoint, target: Target, table: Table) -> str | None:
    """What lowering would run at this point, by its name in result files; unfused it is cuBLAS and NCCL, where cuBLAS has the
    product."""
    found = select.pick(point.op, shapes(point), target, "auto", table, Range(point.tokens, point.tokens))
    if isinstance(found, select.Pick):
        return impl_of(found.kernels[-1][1].name)
    return NCCL if point.scheme in ("", *NATIVE) else None
