"""The declaration of an operator.  From one function with a straight-line body come its torch.library registration, its
fake, the rule that finds it, the unfused path, the oracle of its tests and its documentation."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.proxy import GraphAppendingTracer

from tpfuse import shim
from tpfuse.ir import check, declared
from tpfuse.report import Decline
from tpfuse.shim import OpOverload
from tpfuse.target import Target

NAMESPACE = "tpfuse"
Args = Mapping[str, Any]  # an operator's arguments by name; tensors are fake tensors or real ones
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
registry: dict[str, Op] = {}
ENDLESS = 1 << 62  # bytes that no message has
_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator.

    backend: the name that preferences and tables use.  launch: "module:function", imported when first picked.
    supports(args, target): None, or why this kernel cannot serve these arguments.
    algorithm: tells two kernels of one back end apart ("one_shot").
    prepare: "module:function", called as f(group, max_tokens, hidden, dtypes) by all ranks before the kernel's first call, or "".
    on_request: `auto` picks it only where a measured table names it.
    """

    backend: str
    launch: str
    supports: Callable[[Args, Target], Decline | None]
    algorithm: str = ""
    prepare: str = ""
    on_request: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.algorithm}" if self.algorithm else self.backend


@dataclass(frozen=True)
class Message:
    """The rows that meet in a collective: what tables measure sizes by and workspaces are made for.

    rows: of this rank's argument.  shared: each rank has a part of them, so there are as many times more as ranks.
    across: of a product next to the collective the dimension of the weights that is not `columns`, several weights' together.
    bounded: the range of tokens that a graph is for bounds them.
    """

    rows: Any
    columns: Any
    dtype: torch.dtype
    shared: bool = False
    across: int | None = None
    bounded: bool = True

    @property
    def row_bytes(self) -> Any:
        return self.columns * self.dtype.itemsize

    @property
    def fixed(self) -> Message | None:
        """The same with ints where a graph only ever has one size (a symbol that was found to be a number); None where the width
        of the rows is no number."""
        if not is_concrete_int(self.columns):
            return None
        across = int(self.across) if self.across is not None and is_concrete_int(self.across) else None
        return replace(self, columns=int(self.columns), across=across)


class BodyTracer(GraphAppendingTracer):
    """Records a body.  through: operators of these passes leave their own bodies' operators instead."""

    def __init__(self, graph: fx.Graph, through: frozenset[str] = frozenset()) -> None:
        super().__init__(graph)
        self.through = through


class Op:
    """An operator: `reference` (the body), `fake`, `rows`, `kernels`.

    rows says how rows (tokens) flow: "local" (row i of the result needs row i of the row arguments only), "collective"
    (local apart from a sum or a move over ranks), "mixing" (rows meet one another).
    row_args: the arguments that have a row per token.
    through: the passes whose operators its rule looks through.
    """

    through: frozenset[str] = frozenset()

    def __init__(
        self,
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None,
        sample: Callable[..., dict[str, Any]],
        rows: str,
        row_args: Sequence[str],
        commutes: tuple[str, str] | None,
        fuse: str | None,
        guard: Callable[[Args], Decline | None],
        opaque: Callable[[Args], bool],
        message: Callable[[Args], Message] | None,
    ) -> None:
        self.reference = reference
        self.name = reference.__name__
        self.doc = inspect.getdoc(reference) or ""
        self._sample = sample
        self.rows = rows
        self.row_args = tuple(row_args)
        self.commutes = commutes
        self.fuse = fuse
        self.guard = guard
        self.opaque = opaque
        self._message = message
        self.kernels: list[Kernel] = [Kernel("reference", "", lambda args, target: None)]
        self.signature = inspect.signature(reference)  # asked once: each call binds its arguments by it
        self.params = list(self.signature.parameters)
        self.collective = rows == "collective"
        self.leaf_fake = fake
        self._register()

    def _register(self) -> None:
        schema = torch.library.infer_schema(self.reference, mutates_args=())
        args, returns = schema.rsplit(" -> ", 1)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake, lib=_library)
        # The form in final graphs: which kernel, which results are alive (a bit mask, above it `wide`) and,
        # for a collective, the channel whose mutation keeps the collectives of a graph in program order under any scheduler.
        channel = "Tensor(a!) channel, " if self.collective else ""
        required = ", ".join(a.split("=")[0] for a in _split(args[1:-1]))
        lowered = f"{self.name}.lowered({channel}{required}, str kernel, int alive) -> {returns}"
        _library.define(lowered, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(f"{self.name}.lowered", self._launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}.lowered", self._lowered_fake, lib=_library)
        self.packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        self.default: OpOverload = self.packet.default
        self.lowered: OpOverload = self.packet.lowered
        self.results = len(self.default._schema.returns)
        self.wide = 1 << self.results  # the bit of `alive` that leaves the last result in FP32
        # Over lists of tensors: as many results as weights, so no single pattern finds it and its pass matches by hand.
        self.variadic = str(self.default._schema.returns[0].type) == "List[Tensor]"
        if self.variadic:
            shim.allow_list_results(self.lowered)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A node when traced, shapes only inside a fake, else the body."""
        bound = self.bind(args, kwargs)
        values = list(bound.values())
        if any(isinstance(a, fx.Proxy) for a in values):
            tracer = next(a for a in values if isinstance(a, fx.Proxy)).tracer
            if isinstance(tracer, BodyTracer) and self.fuse in tracer.through:
                return self.reference(*values)
            out: Any = tracer.create_proxy("call_function", self.default, tuple(values), {})
            return out if self.results == 1 else tuple(out[i] for i in range(self.results))
        return self.fake(*values) if _shapes_only.get() else self.reference(*values)

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Empty results of the right shape, dtype and stride; a composite's are those of its body's smaller operators."""
        values = self.bind(args, kwargs).values()  # the dispatcher leaves out what equals a default
        if self.leaf_fake is not None:
            return self.leaf_fake(*values)
        token = _shapes_only.set(True)
        try:
            return self.reference(*values)
        finally:
            _shapes_only.reset(token)

    @functools.cached_property
    def shapes(self) -> dict[str, declared.Shape]:
        """What the text declares, by argument."""
        return declared.shapes(self, registry)

    def traced(self, through: frozenset[str] = frozenset()) -> fx.Graph:
        """The body with every argument a proxy: a graph of smaller operators.  Those of the passes in `through` leave what they
        are made of."""
        graph = fx.Graph()
        tracer = BodyTracer(graph, through)
        parameters = self.signature.parameters.values()
        proxies = [fx.Proxy(graph.placeholder(p.name, type_expr=p.annotation), tracer) for p in parameters]
        out = self.reference(*proxies)
        graph.output(tuple(o.node for o in out) if isinstance(out, tuple) else out.node)
        return graph

    def sample(self, **shape: Any) -> dict[str, Any]:
        """Arguments for tests by name, in the schema's order."""
        made = self._sample(**shape)
        return {name: made[name] for name in self.params if name in made}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Arguments by name in the schema's order, defaults filled in.  TypeError for what does not fit."""
        bound = self.signature.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        return dict(bound.arguments)

    def kernel(
        self,
        backend: str,
        launch: str,
        supports: Callable[[Args, Target], Decline | None],
        algorithm: str = "",
        prepare: str = "",
        on_request: bool = False,
    ) -> None:
        """Register a kernel; its modules are imported only when it is first picked.  See `Kernel`."""
        self.kernels.append(Kernel(backend, launch, supports, algorithm, prepare, on_request))

    def find_kernels(self, name: str) -> list[tuple[int, Kernel]]:
        """The kernels that a final graph names, each with the largest message that it is launched for, in bytes:
        "triton:one_shot<=1048576,triton:two_shot"."""
        parts = [part.partition("<=") for part in name.split(",")]
        by_name = {k.name: k for k in self.kernels}
        return [(int(limit) if limit else ENDLESS, by_name[kernel]) for kernel, _, limit in parts]

    def launcher(self, name: str) -> Callable[..., Any]:
        """What runs those kernels: called with the operator's arguments by position, and `alive`."""
        launches = [
            (limit, self._reference_alive if kernel.backend == "reference" else load(kernel.launch))
            for limit, kernel in self.find_kernels(name)
        ]
        return launches[0][1] if len(launches) == 1 else functools.partial(self._by_size, launches)

    def _by_size(self, launches: list[tuple[int, Callable[..., Any]]], *args: Any, alive: tuple[bool, ...]) -> Any:
        """Ranks have the same sizes, so they choose alike."""
        bound = dict(zip(self.params, args, strict=True))
        message = self.message(bound)
        size = message.rows * message.row_bytes * (shim.resolve_group(bound["group"]).size() if message.shared else 1)
        return next(launch for limit, launch in launches if size <= limit)(*args, alive=alive)

    def message(self, args: Args) -> Message:
        """What meets in the collective of a call with these arguments: unless it was declared, the rows of the first one."""
        if self._message is not None:
            return self._message(args)
        x = args[self.row_args[0]]
        return Message(math.prod(x.shape[:-1]), x.shape[-1], x.dtype)

    def _launch(self, *args: Any, kernel: str | None = None, alive: int | None = None) -> Any:
        own, name, living, wide = self._own(args, kernel, alive)
        if name.startswith(check.PREFIX):
            return check.checked(self, own, name, living)
        if wide:
            return self._reference_alive(*own, alive=living, wide=True)
        return self.launcher(name)(*own, alive=living)

    @property
    def in_f32(self) -> bool:
        """Whether the reference kernel runs the body in FP32 and rounds its results at the end.  Inductor's loops over the
        unfused chain keep FP32 between its steps too, and a fused site must not be less exact than they are."""
        return self.leaf_fake is None and not self.variadic and "eps" in self.params

    def _reference_alive(self, *args: Any, alive: tuple[bool, ...], wide: bool = False) -> Any:
        """The body as a kernel.  wide: the last result, the next residual, is not rounded."""
        if not self.in_f32 or not any(map(_is_low, args)):
            return _keep(self.reference(*args), alive)
        out = self.reference(*(a.float() if _is_low(a) else a for a in args))
        like = self._fake_of_lowered(args, wide)
        if self.results == 1:
            return out.to(like.dtype)
        return _keep(tuple(o.to(e.dtype) for o, e in zip(out, like, strict=True)), alive)

    def _lowered_fake(self, *args: Any, kernel: str | None = None, alive: int | None = None) -> Any:
        own, _, living, wide = self._own(args, kernel, alive)
        return _keep(self._fake_of_lowered(own, wide), living)

    def _fake_of_lowered(self, args: Sequence[Any], wide: bool) -> Any:
        """`fake` as if every row argument had the first one's dtype (a residual may come in FP32); the last result in FP32 where
        it is `wide`."""
        bound = dict(zip(self.params, args, strict=True))
        first = bound[self.row_args[0]]
        for name in self.row_args[1:]:
            if self.in_f32 and isinstance(bound[name], Tensor) and bound[name].dtype != first.dtype:
                bound[name] = torch.empty_like(bound[name], dtype=first.dtype)
        out = self.fake(*bound.values())
        return (*out[:-1], torch.empty_like(out[-1], dtype=torch.float32)) if wide else out

    def _own(
        self, args: tuple[Any, ...], kernel: str | None, alive: int | None
    ) -> tuple[tuple[Any, ...], str, tuple[bool, ...], bool]:
        """(the operator's arguments, the kernel's name, which results live, whether the last one is wide) of a call of the
        lowered overload."""
        given: list[Any] = [*args, *(v for v in (kernel, alive) if v is not None)]
        *own, name, mask = given[1:] if self.collective else given  # without the channel
        return tuple(own), name, tuple(bool(mask >> i & 1) for i in range(self.results)), bool(mask & self.wide)

    def __repr__(self) -> str:
        return f"Op({self.name})"


def op(
    *,
    sample: Callable[..., dict[str, Any]],
    fake: Callable[..., Any] | None = None,
    rows: str = "local",
    row_args: Sequence[str] = ("x",),
    commutes: tuple[str, str] | None = None,
    fuse: str | None = None,
    guard: Callable[[Args], Decline | None] = lambda args: None,
    opaque: Callable[[Args], bool] = lambda args: False,
    message: Callable[[Args], Message] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an operator.

    sample: makes arguments for tests; what it makes besides the operator's own is left out, so that a family may share one.
    fuse: the pass whose rules are derived from the body, if any: a name of `config.PASSES`, or "always" for a composite that
    others build on.  commutes: two row arguments that may be exchanged.  guard: why a match must not become this operator.
    opaque: whether, for these arguments, the body must never be inlined: its aten form depends on the rank, or on whether
    the world size divides the rows.  message: what meets in the collective, where that is not the first row argument.
    """

    def declare(reference: Callable[..., Any]) -> Op:
        declared = Op(reference, fake, sample, rows, row_args, commutes, fuse, guard, opaque, message)
        registry[declared.name] = declared
        return declared

    return declare


@functools.cache
def load(path: str) -> Callable[..., Any]:
    """The function named "module:function"."""
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def find(target: Any) -> Op | None:
    """The operator that a graph node's target belongs to, or None.  Both the default and the lowered overload are found."""
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        return registry.get(target._schema.name.split("::")[1])
    return None


def optional_add(y: Any, bias: Any) -> Any:
    """A step that a body may do without: y + bias, or y where bias is None.  Rules for both forms are derived."""
    if isinstance(bias, fx.Proxy):
        return _optional(y, torch.ops.aten.add.Tensor, bias)
    return y if bias is None else y + bias


def optional_scale(y: Any, alpha: Any) -> Any:
    """A step that a body may do without: y · alpha, or y where alpha is 1.0."""
    if isinstance(alpha, fx.Proxy):
        return _optional(y, torch.ops.aten.mul.Tensor, alpha)
    return y if alpha == 1.0 else y * alpha


def _optional(y: fx.Proxy, target: Any, argument: fx.Proxy) -> fx.Proxy:
    out = y.tracer.create_proxy("call_function", target, (y, argument), {})
    out.node.meta["optional"] = argument.node.name
    return out


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _keep(out: Any, alive: tuple[bool, ...]) -> Any:
    if isinstance(out, Tensor | list):
        return out
    return tuple(o if a else o.new_empty(0) for o, a in zip(out, alive, strict=True))


def _split(args: str) -> list[str]:
    """Split a schema's argument list at its commas, brackets respected."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(args):
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append(args[start:i].strip())
            start = i + 1
    return [*parts, args[start:].strip()] if args.strip() else []
