"""The implementations of the all-reduce + norm (+ quantise): our kernels through the operator's registry, and the peers at
their best: reduced in place where they can be, norms compiled for one width with only the tokens dynamic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpfuse import shim
from tpfuse.ir.op import Kernel, load, registry
from tpfuse.ir.samples import rows, vector
from tpfuse.lowering import peer_kernels, select
from tpfuse.lowering.ranges import plan_ranges
from tpfuse.lowering.table import Table
from tpfuse.measure import plain
from tpfuse.measure.points import AGAIN, Point
from tpfuse.target import Target

EARLY = 16  # tokens up to which users let FlashInfer complete early
UNFUSED = "nccl+inductor"
EVERY = slice(None)
OWN = ("triton", "cuda")  # back ends whose kernels are tpfuse's


class Collectives:
    """One rank's implementations over `group`, whose other ranks build the same in the same order."""

    def __init__(self, group: dist.ProcessGroup, target: Target, max_tokens: int, max_hidden: int, eager: bool = False) -> None:
        self.group, self.target, self.eager = group, target, eager
        self.largest = (max_tokens, max_hidden)
        self.prepared: set[str] = set()
        self.compiled: tuple[Any, Any, Any] = (None, None, None)
        self.data: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def kernels(self, point: Point, wanted: Callable[[Kernel], bool] = lambda kernel: True) -> dict[str, Callable[[int], Any]]:
        """The operator's kernels that serve the point, by their names, but not the one that chooses when it is launched."""
        op, args = point.op, self.arguments(point)
        args = {name: args[name] for name in op.params}
        found: dict[str, Callable[[int], Any]] = {}
        for kernel in op.kernels:
            usable = kernel.backend in self.target.backends and kernel.backend != "reference"
            if chooses(kernel) or not usable or not wanted(kernel) or kernel.supports(args, self.target) is not None:
                continue
            self.prepare(kernel.prepare)
            found[kernel.name] = partial(_call, op.launcher(kernel.name), [args[p] for p in op.params], alive_of(point))
        return found

    def arguments(self, point: Point) -> dict[str, Any]:
        """The operator's arguments by name, other rows on each rank.  Not to be written to."""
        key = (point.hidden, point.torch_dtype)
        if key not in self.data:  # the largest ones, of which every point takes the first rows
            shape: dict[str, Any] = {"tokens": self.largest[0], "hidden": key[0], "dtype": key[1], "device": "cuda"}
            made = rows(**shape, rank=self.group.rank()), rows(**{**shape, "seed": 9}), vector(**shape)
            self.data = {key: made}
        x, residual, weight = self.data[key]
        return {
            "x": x[: point.tokens], "residual": residual[: point.tokens], "weight": weight,
            "bias": None, "alpha": 1.0, "eps": plain.EPS, "weight_bias": 0.0, "rounding": "cast_first",
            "scale": plain.scale_of(point.scheme) if point.scheme else None, "scheme": point.scheme, "layout": point.layout,
            "group": self.group.group_name,
        }  # fmt: skip

    def unfused(self, point: Point) -> Callable[[int], Any]:
        """NCCL, in place, then Inductor's kernel.  The sums grow from call to call, which costs no time."""
        scratch, norm = self.arguments(point)["x"].clone(), self.norm(point)

        def call(i: int) -> Any:
            dist.all_reduce(scratch, group=self.group)
            return norm(scratch)

        return call

    def peers(self, point: Point) -> dict[str, Callable[[int], Any]]:
        """What others offer, by the names of result files."""
        found = {UNFUSED: self.unfused(point), **self._symmetric(point), **self._flashinfer(point)}
        if self.eager:
            scratch, behind = self.arguments(point)["x"].clone(), self._behind(point)

            def eager(i: int) -> Any:
                dist.all_reduce(scratch, group=self.group)
                return plain.chain(scratch, *behind, point.scheme)

            found["nccl+eager"] = eager
        return found

    def ours(self, point: Point, also: str | None = None) -> dict[str, Callable[[int], Any]]:
        """tpfuse's own kernels, the first one twice, and the back end of that name in result files."""
        kernels = self.kernels(point, lambda k: k.backend in OWN or impl_of(k.name) == also)
        found = {impl_of(name): fn for name, fn in kernels.items()}
        return {next(iter(found)) + AGAIN: next(iter(found.values())), **found}

    def _symmetric(self, point: Point) -> dict[str, Callable[[int], Any]]:
        if point.torch_dtype not in peer_kernels.SYMMETRIC_DTYPES:
            return {}
        self.prepare("tpfuse.kernels.torch_symm:prepare")
        x, norm, name = self.arguments(point)["x"], self.norm(point), self.group.group_name
        message: Tensor = load("tpfuse.kernels.torch_symm:message_of")(name, x)
        message.copy_(x)

        def one_shot(i: int) -> Any:
            return norm(torch.ops.symm_mem.one_shot_all_reduce(message.view(-1), "sum", name).view(x.shape))

        def two_shot(i: int) -> Any:
            torch.ops.symm_mem.two_shot_all_reduce_(message.view(-1), "sum", name)
            return norm(message)

        found: dict[str, Callable[[int], Any]] = {"torch_symm_one_shot+norm": one_shot}
        if self.target.world in peer_kernels.TWO_SHOT_WORLDS:
            found["torch_symm_two_shot+norm"] = two_shot
        return found

    def _flashinfer(self, point: Point) -> dict[str, Callable[[int], Any]]:
        """The fused kernel; schemes that it does not know get a kernel of Inductor's behind its norm."""
        args = self.arguments(point)
        if not point.residual:  # it knows no norm without one
            args["residual"] = torch.zeros_like(args["residual"])
        known = peer_kernels.flashinfer_supports({k: args[k] for k in args if k != "scheme" or point.scheme}, self.target) is None
        unquantised = {k: v for k, v in args.items() if k not in ("scheme", "layout", "scale")}
        if not known and (not point.scheme or peer_kernels.flashinfer_supports(unquantised, self.target) is not None):
            return {}
        self.prepare("tpfuse.kernels.flashinfer:prepare")
        fuses = bool(point.scheme) and known
        launch, call_of = load("tpfuse.kernels.flashinfer:launch"), load("tpfuse.kernels.calls:call_of")
        name = "all_reduce_add_rms_norm" + "_quantize" * fuses
        values = [args[p] for p in registry[name].params]
        call = call_of(load("tpfuse.kernels.calls:NormCall"), name, values, alive_of(point) if fuses else (True, True))
        behind = self._quantise(point) if point.scheme and not fuses else None
        suffix = "+quantise" if behind else ""

        def fn(i: int, **how: bool) -> Any:
            out = launch(call, **how)
            return behind(out.norm) if behind else out

        ways: dict[str, dict[str, bool]] = {"one_shot": {}, "one_shot_pdl": {"pdl": True}}
        if point.tokens <= EARLY:
            ways["one_shot_pdl_early"] = {"pdl": True, "at_end": False}
        if point.tokens > self.target.world:
            ways["two_shot"] = {"whole": False}
        return {f"flashinfer_{name}{suffix}": partial(fn, **how) for name, how in ways.items()}

    def prepare(self, path: str) -> None:
        """Run a kernel's prepare step, once."""
        if path and path not in self.prepared:
            load(path)(self.group, *self.largest)
            self.prepared.add(path)

    def norm(self, point: Point, rows: slice = EVERY) -> Callable[[Tensor], Any]:
        """Inductor's kernel for what stands behind the reduction, of those rows."""
        residual, weight, scale = self._behind(point)
        residual = None if residual is None else residual[rows]
        norm, _ = self._compiled(point)

        def call(reduced: Tensor) -> Any:
            self._mark(point, reduced, residual)
            return norm(reduced, residual, weight, scale, point.scheme)

        return call

    def _behind(self, point: Point) -> tuple[Tensor | None, Tensor, Tensor | None]:
        args = self.arguments(point)
        return args["residual"] if point.residual else None, args["weight"], args["scale"]

    def _quantise(self, point: Point) -> Callable[[Tensor], Any]:
        _, quantise = self._compiled(point)
        scale = plain.scale_of(point.scheme)

        def call(norm: Tensor) -> Any:
            self._mark(point, norm)
            return quantise(norm, scale, point.scheme)

        return call

    def _compiled(self, point: Point) -> tuple[Any, Any]:
        """Compiled once for a scheme and a width: for one token, and for any larger number of them."""
        key = (point.scheme, point.hidden, point.dtype, point.residual)
        if self.compiled[0] != key:
            torch.compiler.reset()
            self.compiled = (key, torch.compile(plain.chain, fullgraph=True), torch.compile(plain.quantise, fullgraph=True))
        return self.compiled[1], self.compiled[2]

    def _mark(self, point: Point, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and point.tokens > 1:
                shim.mark_dynamic(tensor, 0)


def alive_of(point: Point) -> tuple[bool, ...]:
    """Everything but the unquantised norm beside a quantised one: h is the next residual."""
    return (True, True, False, True) if point.scheme else (True, True)


def _call(launch: Callable[..., Any], values: Sequence[Any], alive: tuple[bool, ...], i: int) -> Any:
    return launch(*values, alive=alive)


def impl_of(kernel: str) -> str:
    """The name in result files of a kernel of the registry."""
    return "tpfuse:" + kernel.removeprefix("triton:")


def picked_impl(point: Point, target: Target, table: Table) -> str | None:
    """What lowering would run at this point, by its name in result files; None where that is no implementation of ours or NCCL
    with Inductor (a quantise that is unfused alone)."""
    sites = [(point.torch_dtype, target.world, point.hidden)]
    ranges = plan_ranges(thresholds=table.thresholds(sites, {"", point.scheme}))
    limits = next(r for r in ranges if point.tokens in r)
    found = select.pick(point.op, shapes(point), target, "auto", table, limits)
    if not isinstance(found, select.Pick):
        return UNFUSED if found.code == "threshold" and not point.scheme else None
    kernel = next(kernel for limit, kernel in found.kernels if limit is None or point.message <= limit)
    if not chooses(kernel):
        return impl_of(kernel.name)
    return impl_of(load("tpfuse.kernels.plan:algorithm_of")(point.message, target.world))


def chooses(kernel: Kernel) -> bool:
    """Whether it is the one that chooses among its siblings when it is launched."""
    return kernel.backend in OWN and not kernel.algorithm


def shapes(point: Point) -> dict[str, Any]:
    """The operator's arguments without data."""
    x = torch.empty(point.tokens, point.hidden, dtype=point.torch_dtype, device="meta")
    return {
        "x": x, "residual": x, "weight": x[0], "bias": None, "alpha": 1.0, "rounding": "cast_first", "scale": None,
        **({"scheme": point.scheme, "layout": point.layout} if point.scheme else {}),
    }  # fmt: skip
