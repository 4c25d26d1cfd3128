"""From IR to final operators: pick a kernel, or take the operator one step apart and try again; the rest goes back to aten."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpfuse.formats import Scheme
from tpfuse.ir.chained import Chained
from tpfuse.ir.op import Kernel, Op, find
from tpfuse.lowering import cuda_kernels as _cuda  # noqa: F401
from tpfuse.lowering import gemm_kernels as _gemm  # noqa: F401
from tpfuse.lowering import peer_kernels as _peers  # noqa: F401
from tpfuse.lowering import product_kernels as _products  # noqa: F401
from tpfuse.lowering import product_peers as _product_peers  # noqa: F401
from tpfuse.lowering import residuals
from tpfuse.lowering import triton_kernels as _own  # noqa: F401
from tpfuse.lowering.choice import choose
from tpfuse.lowering.table import BUILT_IN, Entry, Table
from tpfuse.report import Decline, Event
from tpfuse.rewrite.emit import emit
from tpfuse.rewrite.inline import inline, unfuse
from tpfuse.rewrite.order import is_collective
from tpfuse.rewrite.site import site_of
from tpfuse.shim import detect_fake_mode
from tpfuse.target import UNBOUNDED, Range, Target

EVERY = Range(1, UNBOUNDED)
Targets = Callable[[str | None], Target]  # by the name of a group


def lower(
    graph: fx.Graph, targets: Targets, preference: str, verify: bool = False, table: Table = BUILT_IN, limits: Range = EVERY
) -> list[Event]:
    """Replace every IR operator, in place.  preference: a value of `Config.kernels`.  table: what was measured.  limits: the
    tokens that the graph is for."""
    events: list[Event] = []
    pending = [n for n in graph.nodes if find(n.target)]
    chosen: list[tuple[fx.Node, Op, Pick]] = []
    while pending:
        node = pending.pop(0)
        op = find(node.target)
        if op is None:
            continue
        single = op.fuse in (None, "always")  # no composite: its body goes back to aten unless it has a kernel of its own
        if single and len(op.kernels) == 1:
            continue
        args = fx.node.map_arg(op.bind(node.args, node.kwargs), lambda n: n.meta["val"])
        found = pick(op, args, targets(args.get("group")), preference, table, limits)
        if single and (isinstance(found, Decline) or found.name == "reference"):
            continue
        if isinstance(found, Pick):
            chosen.append((node, op, found))
            events.append(Event("lowered", op.name, site_of(node), attributes={"kernel": found.name, "why": found.why}))
        else:
            events.append(Event("unfused", op.name, site_of(node), reason=found))
            pending = [*unfuse(graph, node, op), *pending]
    # Once one collective is opaque to Inductor, all of them go through the channel, or it may swap them.
    fused = any(op.collective for _, op, _ in chosen) or any(map(_opaque, graph.nodes))
    channels: dict[torch.device, fx.Node] = {}
    wide = residuals.takers((n, op) for n, op, kernel in chosen if kernel.name == "reference" and not verify)
    for node, op, kernel in chosen:
        _final(graph, node, op, kernel.name, channels, verify, wide)
    for node in list(graph.nodes):
        op = find(node.target)
        if op is None or node.target is not op.default:
            continue
        if (op.collective and fused) or _opaque(node):
            _final(graph, node, op, "reference", channels)
        else:
            inline(graph, node, op)
    return events


def _opaque(node: fx.Node) -> bool:
    """Whether a node's body must not be seen by Inductor."""
    op = find(node.target)
    return op is not None and node.target is op.default and op.opaque(op.bind(node.args, node.kwargs))


@dataclass(frozen=True)
class Pick:
    """kernels: each with the bytes up to which it is launched, ascending, the last without end.  why: for people."""

    kernels: tuple[tuple[int | None, Kernel], ...]
    why: str

    @property
    def name(self) -> str:
        """As final graphs spell it: "triton:two_shot", "triton:one_shot<=1048576,triton:two_shot"."""
        return ",".join(k.name if limit is None else f"{k.name}<={limit}" for limit, k in self.kernels)


def pick(
    op: Op, args: Mapping[str, Any], target: Target, preference: str, table: Table = BUILT_IN, limits: Range = EVERY
) -> Pick | Decline:
    """The kernels that were measured to be fastest, of those that support the arguments; where nothing was measured, or none of
    them does, the first registered one that does and waits for no measurement, newest registration first; or why there is none.

    A `preference` other than auto leaves only kernels of that back end, and never unfuses by measurement.
    """
    usable = {k.name: k for k in op.kernels if k.backend in target.backends and preference in ("auto", k.backend)}
    reasons = {name: kernel.supports(args, target) for name, kernel in usable.items()}
    entry = measured(op, args, target, table)
    why = "no measurement" if preference == "auto" else f"kernels={preference}"
    if entry is not None:
        message = op.message(args)
        low, high = (limits if message.bounded else EVERY).bytes(int(message.row_bytes))
        choice = choose(entry, low, high, lambda kernel: kernel in usable and reasons[kernel] is None)
        if choice.steps:
            return Pick(tuple((end, usable[kernel]) for end, kernel in choice.steps), choice.why)
        if choice.unfused and preference == "auto":
            return Decline("threshold", choice.why)
        why = f"{choice.why}, which cannot serve this"
    for name, kernel in reversed(usable.items()):
        last = kernel.on_request or (kernel.backend == "reference" and target.device == "cuda")
        if reasons[name] is None and not (last and preference == "auto"):
            return Pick(((None, kernel),), why)
    alike: dict[Decline, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            alike.setdefault(reason, []).append(name)
    named = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reversed(alike.items()))
    return Decline("no_kernel", named or f"no kernel of {preference!r} for {target.device}")


def measured(op: Op, args: Mapping[str, Any], target: Target, table: Table) -> Entry | None:
    """What the table says of an operator; None where nothing was measured."""
    if not isinstance(args[op.row_args[0]], torch.Tensor):
        return None
    message = op.message(args).fixed
    if message is None:
        return None
    own = message.dtype, target.world, _scheme(op, args), message.columns, message.across
    return next(filter(None, (table.find(name, *own) for name in _measured_as(op))), None)


def apart(op: Op, args: Mapping[str, Any], world: int, table: Table, limits: Range) -> Decline | None:
    """Why a product and its collective should stay apart in layers of this width, whatever kernels serve them together."""
    message = op.message(args).fixed
    if message is None:
        return None
    hidden = message.columns * (2 if message.dtype == torch.uint8 else 1)
    dtype = getattr(torch, args["out_dtype"]) if "out_dtype" in args else message.dtype
    refused = table.refuses("async_tp", dtype, world, limits, hidden, _scheme(op, args))
    return None if refused is None or refused.code == "unmeasured" else refused


def _scheme(op: Op, args: Mapping[str, Any]) -> str:
    """The name of a product's own scheme, or of the operator's; "" for none."""
    scheme = args.get("w_scheme", "") if isinstance(op, Chained) else args.get("scheme", "")
    return Scheme.parse(scheme).name if scheme else ""


def _measured_as(op: Op) -> Iterable[str]:
    """Operators by whose measurements one is judged: whatever norm follows a product, product and link are what takes long."""
    yield op.name
    if isinstance(op, Chained):
        for suffix in ("", "_quantize"):
            yield f"{op.first.name}_reduce_scatter_add_rms_norm{suffix}"


def _final(
    graph: fx.Graph,
    node: fx.Node,
    op: Op,
    kernel: str,
    channels: dict[torch.device, fx.Node],
    verify: bool = False,
    wide: AbstractSet[fx.Node] = frozenset(),
) -> None:
    """Put the lowered form of `node` in its place.  wide: the sites that may exchange residuals in FP32."""
    args: list[Any] = list(op.bind(node.args, node.kwargs).values())
    alive, last = 1, []
    if op.results > 1:
        items = [u for u in node.users if u.target is operator.getitem and u.users]
        alive = sum(1 << i for i in {u.args[1] for u in items})
        last = [u for u in items if u.args[1] == op.results - 1]
    if node in wide and residuals.stays_wide(last, wide):
        alive |= op.wide
    spec = f"verify@{site_of(node)}|{kernel}" if verify else kernel
    with graph.inserting_before(node):
        if op.collective:
            args = [_channel(graph, node, channels), *args]
        new = emit(graph, op.lowered, [*args, spec, alive], like=node)
    for user in [u for u in node.users if u.target is operator.getitem and not u.users]:
        graph.erase_node(user)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if alive & op.wide:
        for item in last:
            dtype, item.meta["val"] = item.meta["val"].dtype, new.meta["val"][-1]
            residuals.narrow_for_others(item, wide, dtype)


def _channel(graph: fx.Graph, node: fx.Node, channels: dict[torch.device, fx.Node]) -> fx.Node:
    """The byte whose mutation by every collective keeps them in order."""
    device = next(a.meta["val"] for a in node.all_input_nodes).device
    if device not in channels:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            empty = graph.call_function(
                torch.ops.aten.empty.memory_format, ([1],), {"dtype": torch.uint8, "device": device, "pin_memory": False}
            )
        mode = detect_fake_mode([node.all_input_nodes[0].meta["val"]])
        assert mode is not None
        with mode:
            empty.meta["val"] = torch.empty([1], dtype=torch.uint8, device=device)
        channels[device] = empty
    return channels[device]


def schedule(graph: fx.Graph, ranks: Callable[[str], tuple[int, ...]]) -> dict[str, list[str]]:
    """For each group the collectives of the final graph in order, described by what all its ranks must share."""
    plans: dict[str, list[str]] = {}
    for node in graph.nodes:
        if not is_collective(node):
            continue
        op = find(node.target)
        value = node.all_input_nodes[0 if op is None else 1].meta["val"]  # behind the channel
        shape = ",".join(str(s) if isinstance(s, int) else "*" for s in value.shape)
        if op is None:
            group = next(a for a in reversed(node.args) if isinstance(a, str))
            plans.setdefault(group, []).append(f"{node.target} {value.dtype} [{shape}] over {ranks(group)}")
            continue
        bound = dict(zip(["channel", *op.params, "kernel", "alive"], node.args, strict=True))
        own = " ".join(f"{k}={v}" for k, v in bound.items() if isinstance(v, str | float | int) and k != "group")
        group = bound["group"]
        plans.setdefault(group, []).append(f"{op.name} {value.dtype} [{shape}] {own} over {ranks(group)}")
    return plans


@dataclass
class Need:
    """What the kernels of one group want prepared: the widest rows that meet in a collective, their dtypes."""

    hidden: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)


def needs(graph: fx.Graph) -> dict[tuple[str, str], Need]:
    """By (prepare function, group): what a final graph's collective kernels must find prepared."""
    found: dict[tuple[str, str], Need] = {}
    for node in graph.nodes:
        op = find(node.target)
        if op is None or not op.collective:
            continue
        bound = dict(zip(["channel", *op.params, "kernel", "alive"], node.args, strict=True))
        kernels = op.find_kernels(bound["kernel"].rsplit("|", 1)[-1])
        for prepare in {kernel.prepare for _, kernel in kernels if kernel.prepare}:
            message = op.message(fx.node.map_arg(bound, lambda n: n.meta["val"]))
            need = found.setdefault((prepare, bound["group"]), Need())
            need.hidden = max(need.hidden, int(message.columns))
            need.dtypes.add(message.dtype)
    return found


def final_operators(graph: fx.Graph) -> list[str]:
    """Names of tpfuse's operators in a final graph, in order."""
    return [op.name for n in graph.nodes if (op := find(n.target)) is not None]


__all__ = ["Need", "Pick", "Targets", "apart", "final_operators", "lower", "needs", "pick", "schedule"]
