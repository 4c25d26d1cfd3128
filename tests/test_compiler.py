"""The seams on one rank: ranges, warm-up, explain, direct operators."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sympy
import torch
import torch.distributed as dist

import tpfuse
from tests.models import Stack
from tpfuse.runtime.dispatch import Dispatcher
from tpfuse.runtime.planner import Planner

pytestmark = pytest.mark.usefixtures("interpreted_rank")


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ranges_are_compiled_when_needed_and_by_warmup():
    model, x = Stack(), torch.randn(5, 32)
    compiled = tpfuse.compile(model, {"ranges": (32,)}, dynamic=True, fullgraph=True)
    assert close(compiled(x), model(x))
    assert compiled.report.ranges == [tpfuse.Range(1, 32)]
    tpfuse.warmup([64])
    assert [str(r) for r in compiled.report.ranges] == ["1..32", "33.."]
    for tokens in (32, 33, 50):
        x = torch.randn(tokens, 32)
        assert close(compiled(x), model(x))
    assert len(compiled.report.results) == 2


def test_compile_all_and_single_sizes():
    model, x = Stack(), torch.randn(9, 32)
    options = {"ranges": (32,), "sizes": (7,), "compile_all": True}
    compiled = tpfuse.compile(model, options, dynamic=True, fullgraph=True)
    assert close(compiled(x), model(x))
    assert [str(r) for r in compiled.report.ranges] == ["1..6", "7", "8..32", "33.."]
    x = torch.randn(7, 32)
    assert close(compiled(x), model(x))


@pytest.mark.parametrize(("options", "others"), [({"ranges": (1,)}, ["2.."]), ({"sizes": (1, 3)}, ["2", "3", "4.."])])
def test_a_range_that_the_graph_is_never_called_in_is_not_compiled(options, others):
    """torch makes a graph for any count of tokens from two on: one token has its own."""
    model, x = Stack(), torch.randn(9, 32)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = tpfuse.compile(model, {**options, "compile_all": True}, fullgraph=True)
    assert close(compiled(x), model(x))
    assert [str(r) for r in compiled.report.ranges] == others
    tpfuse.warmup([1])
    x = torch.randn(1, 32)
    assert close(compiled(x), model(x))
    assert compiled.report.ranges[0] == tpfuse.Range(1, 1)


def test_workspaces_are_prepared_of_real_tensors(monkeypatch):
    """Also inside AOTAutograd, whose fake mode is on."""
    from tpfuse.lowering.select import Need
    from tpfuse.runtime import dispatch

    made = []
    monkeypatch.setattr(dispatch, "needs", lambda graph: {("a:prepare", "g"): Need(32, {torch.float32})})
    monkeypatch.setattr(dispatch, "load", lambda path: lambda *args: made.append((torch.zeros(4).data_ptr() != 0, *args)))
    tpfuse.compile(Stack(), dynamic=True)(torch.randn(9, 32))
    dispatcher = max(dispatch._dispatchers, key=lambda d: d.number)
    dispatcher.compiled = {limits: [] for limits in dispatcher.ranges}
    with next(p.fake_mode for p in dispatcher.placeholders if isinstance(p, torch.Tensor)):
        dispatcher.warm_as_traced()
    assert made == [(True, "g", 9, 32, [torch.float32])] * 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_tokens(dynamic):
    """A rank of a data-parallel group may have none."""
    model = Stack()
    compiled = tpfuse.compile(model, {"max_tokens": 16}, dynamic=dynamic)
    for tokens in (0, 5, 0):
        x = torch.randn(tokens, 32)
        assert close(compiled(x), model(x))
    assert len(compiled.report.results) == 2 and compiled.report.fired()


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_more_tokens_than_promised(dynamic):
    compiled = tpfuse.compile(Stack(), {"max_tokens": 16}, dynamic=dynamic)
    compiled(torch.randn(16, 32))
    with pytest.raises(tpfuse.FusionError, match="17 tokens"):
        compiled(torch.randn(17, 32))


def test_what_one_range_asks_of_sizes_does_not_bind_another(monkeypatch):
    """torch's meta functions ask whether there are several rows: the first call has them."""
    rewrite = Planner.rewrite

    def asking(self, graph, limits):
        tensors = [v for v in self.placeholders if isinstance(v, torch.Tensor)]
        assert all(v.shape[0] // 2 >= 2 for v in tensors if isinstance(v.shape[0], torch.SymInt))
        return rewrite(self, graph, limits)

    monkeypatch.setattr(Planner, "rewrite", asking)
    model = Stack()
    compiled = tpfuse.compile(model, {"ranges": (23,)}, dynamic=True)
    for tokens in (24, 2):
        x = torch.randn(tokens, 32)
        assert close(compiled(x), model(x))


def test_a_range_compiled_again_and_again_is_told(monkeypatch, caplog):
    build = Dispatcher._build

    def tied(self, graph, limits, values, everyone):
        return build(self, graph, limits, values, everyone)[0], [sympy.Eq(symbol, value) for symbol, value in values.items()]

    monkeypatch.setattr(Dispatcher, "_build", tied)
    model = Stack()
    compiled = tpfuse.compile(model, dynamic=True)
    for tokens in range(2, 12):
        x = torch.randn(tokens, 32)
        assert close(compiled(x), model(x))
    (told,) = [r.getMessage() for r in caplog.records if "compiled 8 times" in r.getMessage()]
    assert len(compiled.report.results) == 10 and "Eq(s" in told and told.endswith("compiled when they come")


def test_epsilon_stays_a_constant_under_dynamic():
    model, x = Stack(), torch.randn(5, 32) * 1e-3
    compiled = tpfuse.compile(model, dynamic=True, fullgraph=True)
    before = compiled(x)
    assert {e.attributes["eps"] for e in compiled.report.fired()} == {1e-5}
    model.layers[0].norm2.eps = 1e-2  # another epsilon is another graph, not a stale one
    assert close(compiled(x), model(x))
    assert not close(compiled(x), before)


def test_floats_that_the_graph_computes():
    inner, x = Stack(), torch.randn(5, 32)

    def model(x):
        return inner(x * x.max().item())

    compiled = tpfuse.compile(model, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert close(compiled(x), model(x)) and compiled.report.fired()


def test_integers_that_are_no_sizes():
    """A position that `dynamic=True` left open may have any sign; another one is another call, not another graph."""
    inner, x = Stack(), torch.randn(5, 32)

    def model(x, position):
        return inner.norm(inner(x * position) + position)

    compiled = tpfuse.compile(model, dynamic=True, fullgraph=True)
    for position in (3, 7, -2):
        assert close(compiled(x, position), model(x, position))
    assert len(compiled.report.results) == 1 and compiled.report.fired()


def test_explain_for_another_machine():
    target = tpfuse.Target("cuda", 90, 2, True, frozenset({"reference", "nccl"}))
    report = tpfuse.explain(Stack(), torch.randn(5, 32), target=target)
    assert len(report.fired()) == 6
    unfused = [e for e in report.declined() if e.status == "unfused"]
    assert len(unfused) == 6 and {e.reason.code for e in unfused} == {"no_kernel"}
    assert report.counts() == {}


def test_explain_on_meta_tensors():
    with torch.device("meta"):
        model, x = Stack(), torch.randn(5, 32)
    report = tpfuse.explain(model, x, target=tpfuse.Target("cpu"))
    assert report.counts() == {"all_reduce_add_rms_norm": 6}


def test_direct_call():
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.rand(32) + 0.5
    norm, h = tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, eps=1e-5, group=dist.group.WORLD)
    assert close(h, x + residual)
    assert close(norm, torch.nn.functional.rms_norm(h, (32,), weight, 1e-5))
    with pytest.raises(TypeError, match="nothing runs on a default"):
        tpfuse.ops.all_reduce(x)
    with pytest.raises(AttributeError, match="known: "):
        tpfuse.ops.all_reduces(x)


def test_direct_call_inside_a_compiled_model():
    weight = torch.rand(32) + 0.5

    def layer(x, residual):
        return tpfuse.ops.all_reduce_add_rms_norm(x, residual, weight, eps=1e-5, group=dist.group.WORLD.group_name)

    x, residual = torch.randn(5, 32), torch.randn(5, 32)
    compiled = tpfuse.compile(layer, fullgraph=True)
    for a, b in zip(compiled(x, residual), layer(x, residual), strict=True):
        assert close(a, b)
    assert compiled.report.counts() == {"all_reduce_add_rms_norm": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stric": True}, "did you mean 'strict'"),
        ({"passes": ("all_reduce_nrm",)}, "did you mean 'all_reduce_norm'"),
        ({"kernels": "tritn"}, "did you mean 'triton'"),
    ],
)
def test_unknown_names_suggest_the_closest(options, message):
    with pytest.raises(ValueError, match=message):
        tpfuse.compile(Stack(), options)
    with pytest.raises(Exception, match=message):
        torch.compile(Stack(), backend=tpfuse.backend, options=options)(torch.randn(2, 32))


def test_options_of_tpfuse_are_its_config():
    """`options` of `tpfuse.compile` are Inductor's: a field of Config among them is refused, not passed over."""
    with pytest.raises(ValueError, match="strict: fields of tpfuse.Config"):
        tpfuse.compile(Stack(), options={"strict": True})
    with pytest.raises(ValueError, match="unknown option 'max_autotun'"):
        tpfuse.compile(Stack(), options={"max_autotun": True})


def test_verified_sites_are_reported_by_every_way_in():
    """Also where torch.compile holds the handle; many calls leave as many rows as one."""
    model, x = Stack(), torch.randn(5, 32)
    compiled = torch.compile(model, backend="tpfuse", options={"verify": True})
    for _ in range(3):
        compiled(x)
    rows = tpfuse.last_report().verified
    assert {row["site"] for row in rows} == {"layers.0", "layers.1", "layers.2"} and len(rows) == 6
    assert sum(row["calls"] for row in rows) == 3 * 11  # six sites, of which the last leaves no residual


def test_threads_share_what_one_compiles(monkeypatch):
    from tpfuse import shim

    model, compiling = Stack(), []
    compiled = tpfuse.compile(model, {"ranges": (32,)}, dynamic=True)
    compiled(torch.randn(5, 32))
    inductor, x = shim.compile_fx_inner, torch.randn(64, 32)

    def slowly(*args, **kwargs):
        compiling.append(threading.current_thread())
        time.sleep(0.3)
        return inductor(*args, **kwargs)

    monkeypatch.setattr(shim, "compile_fx_inner", slowly)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: torch.no_grad()(compiled)(x), range(2)))
    assert all(close(result, model(x)) for result in results)
    assert len(compiling) == 1 and len(compiled.report.results) == 2
