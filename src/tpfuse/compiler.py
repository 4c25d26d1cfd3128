"""The seams: `torch.compile(backend="tpfuse")`, `tpfuse.compile`, `tpfuse.inductor_pass`."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from tpfuse import shim
from tpfuse.config import Config
from tpfuse.ir import declared, find
from tpfuse.ir.verify import verify
from tpfuse.raising import raise_graph
from tpfuse.report import Decline, Event, FusionError, Report
from tpfuse.rewrite.listing import listing
from tpfuse.runtime.dispatch import Dispatcher
from tpfuse.runtime.key import cache_key
from tpfuse.runtime.planner import Planner
from tpfuse.shim import CustomGraphPass
from tpfuse.target import UNBOUNDED, Range, Target

log = logging.getLogger("tpfuse")


@dataclass
class _Compilation:
    """What belongs to all graphs of one model.  settings: those of `torch.compile(backend="tpfuse")`.  frame: the last one of
    Dynamo's that was compiled with them."""

    report: Report
    fuel: Fuel
    settings: Any = None
    frame: int = -1


_last: list[_Compilation] = []


def last_report() -> Report | None:
    """The report of what was compiled last in this process.  None before the first.

    Of `tpfuse.compile` it is of one model.  `torch.compile(backend="tpfuse")` hands over graphs and names no model: its report
    is of all graphs that were compiled with the same options since `torch._dynamo.reset()`."""
    return _last[0].report if _last else None


def _begin(report: Report, config: Config) -> _Compilation:
    """→ the last compilation from now on."""
    _last[:] = [_Compilation(report, Fuel(config.fuel))]
    return _last[0]


def _go_on(config: Config, patches: dict[str, Any]) -> _Compilation:
    """The compilation that a graph of `torch.compile(backend="tpfuse")` belongs to."""
    frame, again = shim.dynamo_frame()
    last, settings = _last[0] if _last else None, (config, patches)
    if last is None or last.settings != settings or not (again or frame > last.frame):  # Dynamo's reset counts frames anew
        last = _begin(Report(), config)
    last.settings, last.frame = settings, max(frame, last.frame)
    return last


def backend(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend of `torch.compile(backend="tpfuse", mode=…, options=…)`.

    options: fields of `Config`, and settings of Inductor, told apart by name.  mode: as for Inductor.
    ValueError for a name that neither knows.
    """
    own, patches = _split(options or {}, mode)
    config = Config.of(own)
    whole = _go_on(config, patches)
    return _compile(gm, inputs, config, patches, whole.report, whole.fuel)


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: Config,
    patches: dict[str, Any],
    report: Report,
    fuel: Callable[[], bool],
) -> Callable[..., Any]:
    """Inductor on a graph of Dynamo's, with tpfuse where it would compile one.  patches: settings of Inductor."""
    specialise_floats(gm.graph)
    inner = functools.partial(compile_graph, config=config, patches=patches, report=report, fuel=fuel)
    return shim.compile_fx(gm, inputs, inner, patches)


def specialise_floats(graph: fx.Graph) -> None:
    """Make constants of the Python floats that `dynamic=True` turned into inputs, a norm's epsilon among them.

    Reading such a float guards it: another value is another graph, as it is without `dynamic=True`.  A float that the graph
    computes (`tensor.item()`) has no value yet and stays.
    """
    for node in list(graph.nodes):
        value = node.meta.get("example_value")
        if node.op == "call_method" and node.target == "item" and isinstance(value, torch.SymFloat) and value.node.has_hint():
            node.replace_all_uses_with(float(value))
            graph.erase_node(node)


class Fuel:
    """Rewrites that are left, over all graphs of one model; None is endless."""

    def __init__(self, amount: int | None) -> None:
        self.left = amount

    def __call__(self) -> bool:
        if self.left is None:
            return True
        if self.left == 0:
            return False
        self.left -= 1
        return True


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    config: Config,
    patches: dict[str, Any],
    report: Report,
    fuel: Callable[[], bool],
    **kwargs: Any,
) -> Callable[[list[Any]], Any]:
    """Stands where Inductor compiles one graph: raise it now, fuse and lower it when each range is first needed."""
    if not kwargs.get("is_inference"):
        _share(report, [Event("declined", "graph", reason=Decline("training", "gradients are on: plain Inductor"))])
        return shim.compile_fx_inner(gm, inputs, **kwargs)
    kept = drop_opaque_inputs(gm, kwargs)
    check_calls(gm.graph)
    _share(report, raise_graph(gm.graph))
    verify(gm.graph, "raise")
    dispatcher = Dispatcher(gm, kwargs, config, patches, report, fuel)
    if dispatcher.by_data:
        dispatcher.warm_as_traced()
    if len(kept) == len(inputs):
        return dispatcher

    def call(args: list[Any]) -> Any:
        chosen = [args[i] for i in kept]
        args.clear()
        return dispatcher(chosen)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def check_calls(graph: fx.Graph) -> None:
    """ValueError where an operator that the model calls by hand has arguments that are not as declared."""
    for node in graph.nodes:
        if op := find(node.target):
            declared.check(op, fx.node.map_arg(op.bind(node.args, node.kwargs), lambda n: n.meta["val"]))


def _share(report: Report, events: Sequence[Event]) -> None:
    """Put events of no particular range in the report and in the log."""
    report.shared += events
    for event in events:
        log.debug("every range: %s", event)


def drop_opaque_inputs(gm: fx.GraphModule, kwargs: dict[str, Any]) -> list[int]:
    """Take unused DeviceMesh inputs out: with them Inductor's cache misses in every new process.  → indices kept."""
    kept = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if shim.opaque_object(node.meta.get("val")) and not node.users:
            gm.graph.erase_node(node)
        else:
            kept.append(i)
    static = kwargs.get("static_input_idxs") or ()
    kwargs["static_input_idxs"] = [new for new, old in enumerate(kept) if old in set(static)]
    return kept


def compile(model: Callable[..., Any], config: Config | Mapping[str, Any] | None = None, **kwargs: Any) -> CompiledModel:
    """torch.compile with tpfuse's backend → the model, compiled, with a `.report`.  See `CompiledModel`.

    model: a module or function.  config: a `Config` or a mapping of its fields, over the environment's.  kwargs: those of
    torch.compile (`dynamic`, `fullgraph`, `mode`, `options` of Inductor).
    ValueError for a field or value that `Config` does not know, and for an option that is none of Inductor's; calls raise
    FusionError (see `Config.strict`, `Config.timeout`).
    """
    if not callable(model):
        raise TypeError(f"a module or a function is compiled, not {type(model).__name__}")
    if given := [f.name for f in fields(Config) if f.name in kwargs]:
        raise TypeError(f"{', '.join(given)}: fields of tpfuse.Config, to be given as tpfuse.compile(model, {{{given[0]!r}: …}})")
    return CompiledModel(model, Config.of(config), kwargs)


class CompiledModel:
    """A compiled module or function; `report` holds what happened in it, over all graphs and ranges.

    All other attributes are the model's own (`config`, `device`, `parameters()`), to read and to set.  A method of a module that
    calls the module (`generate`) runs it compiled, and one that gives the module back (`eval()`, `to()`) gives this object.  It
    is no nn.Module; `module.compile(backend="tpfuse")` compiles in place what is to be part of another module.
    """

    report: Report
    _model: Any
    _call: Callable[..., Any]

    def __init__(self, model: Callable[..., Any], config: Config, kwargs: dict[str, Any]) -> None:
        own, patches = _split(kwargs.pop("options", None) or {}, kwargs.pop("mode", None))
        if own:
            raise ValueError(f"{', '.join(own)}: fields of tpfuse.Config, to be given as config and not among Inductor's options")
        whole = _begin(Report(), config)
        bound = functools.partial(_compile, config=config, patches=patches, report=whole.report, fuel=whole.fuel)
        bound.__name__ = "tpfuse"  # type: ignore[attr-defined]  torch names it in its errors
        vars(self).update(report=whole.report, _model=model, _call=torch.compile(model, backend=bound, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(*args, **kwargs)
        except shim.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, FusionError | ValueError | OSError):
                raise error.inner_exception from None
            raise

    @property
    def forward(self) -> Callable[..., Any]:
        return self.__call__

    def __getattr__(self, name: str) -> Any:
        model = vars(self).get("_model")
        if model is None:  # half made, as a copy is
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(model, name)
        if not (isinstance(model, torch.nn.Module) and inspect.ismethod(value) and value.__self__ is model):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            with shim.calling(model, self.__call__):
                found = value(*args, **kwargs)
            return self if found is model else found

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    def __repr__(self) -> str:
        return f"tpfuse.compile({self._model!r})"


def _split(options: Mapping[str, Any], mode: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of Config, and settings of Inductor with those of its `mode`.  ValueError for a name that neither knows."""
    names = [f.name for f in fields(Config)]
    own = {k: v for k, v in options.items() if k in names}
    patches = {k: v for k, v in options.items() if k not in names}
    for name in patches:
        if not shim.inductor_knows(name):
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown option {name!r}: neither a field of tpfuse.Config nor a setting of Inductor{hint}")
    return own, {**(shim.mode_options(mode) if mode is not None else {}), **patches}


def explain(
    model: Callable[..., Any], *args: Any, config: Config | Mapping[str, Any] | None = None, target: Target | None = None,
    **kwargs: Any,
) -> Report:  # fmt: skip
    """What would happen to a model on `target`, without compiling or running anything: the graph is captured, raised, fused
    and lowered for every range, and its results are taken to be zeros.

    model, args, kwargs: as for a call; meta tensors and a model on the meta device will do.  A process group of torch's "fake"
    back end stands in for ranks.  config: as for `compile`.  target: None means this machine.
    FusionError under `Config(strict=True)` where an expected fusion would not happen.
    """
    config = Config.of(config)
    report = _begin(Report(), config).report
    if not isinstance(target, Target | None):
        raise TypeError(f"target: expected a tpfuse.Target such as Target('cuda', sm=90), got {type(target).__name__}")
    targets = None if target is None else lambda group: replace(target, world=shim.resolve_group(group).size() if group else 1)

    def planned(gm: fx.GraphModule, inputs: Sequence[Any], **inner: Any) -> Callable[[list[Any]], Any]:
        outputs = shim.pytree_leaves(gm.graph.find_nodes(op="output")[0].args)
        zeros = [_zeros(n.meta["val"]) if isinstance(n, fx.Node) else n for n in outputs]
        before = listing(gm.graph)
        _share(report, raise_graph(gm.graph))
        verify(gm.graph, "raise")
        planner = Planner(gm, config, report, Fuel(config.fuel), targets)
        for limits in planner.ranges:
            graph, result, _ = planner.plan(limits)
            result.before, result.after = before, listing(graph)
            report.add(result)
        return shim.boxed(lambda *_: tuple(zeros))

    def whole(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        specialise_floats(gm.graph)
        return shim.compile_fx(gm, inputs, planned, {})

    args, kwargs = shim.tree_map_tensors(_off_meta, (args, kwargs))
    with torch.no_grad(), _weights_off_meta(model), shim.recompiled_at_will():
        torch.compile(model, backend=whole, dynamic=True)(*args, **kwargs)
    return report


def _zeros(value: Any) -> Any:
    """A real value of a fake one's size, with no more memory than one element."""
    if isinstance(value, torch.Tensor):
        return torch.zeros((), dtype=value.dtype).expand([shim.traced(s) for s in value.shape])
    return shim.traced(value) if isinstance(value, torch.SymInt) else value


def _stack(value: torch.Tensor) -> torch.Tensor:
    """Operators on stacks of matrices (`grouped_mm`) refuse strides that no matrix has."""
    return torch.empty(value.shape[-2:], dtype=value.dtype).expand(value.shape)


def _off_meta(value: torch.Tensor) -> torch.Tensor:
    return _zeros(value) if value.is_meta else value


@contextlib.contextmanager
def _weights_off_meta(model: Any) -> Iterator[None]:
    """Inside, weights on the meta device (which Inductor treats apart) are one-element zeros, expanded; stacks of matrices, as
    experts are, one matrix that nobody reads."""
    taken: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value.is_meta:
                    taken.append((store, name, value))
                    light = _zeros(value) if value.dim() < 3 else _stack(value)
                    store[name] = torch.nn.Parameter(light, False) if store is module._parameters else light
    try:
        yield
    finally:
        for store, name, value in taken:
            store[name] = value


class InductorPass(CustomGraphPass):
    """Seam 2: tpfuse as a post-grad pass in an engine's own Inductor slot, before Inductor's patterns.

    On an FX cache hit no pass runs: the report is then empty and says so, and ranks agree through the engine's own means.
    """

    def __init__(self, config: Config, limits: Range | None, then: CustomGraphPass | None) -> None:
        self.config, self.limits, self.then = config, limits or Range(1, config.max_tokens or UNBOUNDED), then
        self.report = Report(
            "no graph has passed through this pass; Inductor's cache may hold it, fused as it was when it was compiled: "
            "force_disable_caches=True compiles it anew"
        )
        _begin(self.report, config)

    def __call__(self, graph: fx.Graph) -> None:
        _begin(self.report, self.config)
        _share(self.report, raise_graph(graph))
        verify(graph, "raise")
        gm = fx.GraphModule({}, graph) if graph.owning_module is None else graph.owning_module
        planner = Planner(gm, self.config, self.report, Fuel(self.config.fuel))
        self.report.add(planner.rewrite(graph, self.limits))
        if self.then is not None:
            self.then(graph)

    def uuid(self) -> str:
        return cache_key(self.config, self.limits, self.then.uuid() if self.then else None)


def inductor_pass(
    config: Config | Mapping[str, Any] | None = None, range: Range | None = None, then: CustomGraphPass | None = None
) -> InductorPass:
    """A pass for `torch._inductor.config.post_grad_custom_pre_pass`, for engines that own their Inductor settings; its report is
    `.report`, and `last_report()`'s.

    config: as for `compile`.  range: the token counts that the graph will see (None: 1 … max_tokens).  then: the pass that held
    the slot before, run after tpfuse's.
    """
    if not isinstance(range, Range | None):
        raise TypeError(f"range: expected a tpfuse.Range such as Range(1, 256), got {type(range).__name__}")
    return InductorPass(Config.of(config), range, then)
