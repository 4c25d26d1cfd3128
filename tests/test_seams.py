"""What the options of a Config do, and tpfuse in somebody else's Inductor, on one gloo rank."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import tpfuse
from tests.models import Stack
from tpfuse.testing import interpreted

HIDDEN = 32
ALL = 6  # sites of Stack


pytestmark = pytest.mark.usefixtures("one_rank")


def rows(tokens=8):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)) * 1e-2


def run(config=None, **kwargs):
    """The report of a compiled Stack that gave what the model gives."""
    model = Stack(HIDDEN)
    with interpreted():
        compiled = tpfuse.compile(model, config, **{"fullgraph": True, "dynamic": True, **kwargs})
        assert torch.allclose(compiled(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    return compiled.report


@pytest.mark.parametrize("fuel", [0, 1, 5])
def test_fuel_fuses_exactly_so_many(fuel):
    report = run({"fuel": fuel})
    assert len(report.fired()) == fuel
    assert report.counts().get("all_reduce_add_rms_norm", 0) == fuel
    reasons = [e.reason.code for e in report.declined() if e.attributes.get("operator") == "all_reduce"]
    assert reasons == ["fuel"] * (ALL - fuel)


@pytest.mark.parametrize("config", [{"passes": ()}, {"disable_passes": ("all_reduce_norm", "all_reduce_norm_quantize")}])
def test_disabled_passes(config):
    report = run(config)
    assert report.counts() == {} and not report.fired()
    reasons = {e.reason.code for e in report.declined() if e.attributes.get("operator") == "all_reduce"}
    assert reasons == {"disabled"}


def test_only_one_pass():
    assert run({"passes": ("all_reduce_norm",)}).counts() == {"all_reduce_add_rms_norm": ALL}


def test_verify_reports_every_site():
    report = run({"verify": True})
    assert {row["site"] for row in report.verified} == {f"layers.{i}" for i in range(ALL // 2)}
    assert {(row["operator"], row["kernel"]) for row in report.verified} == {("all_reduce_add_rms_norm", "reference")}
    # A row for each result of each layer's two sites; the last site's residual is dead.
    assert len(report.verified) == ALL and sum(row["calls"] for row in report.verified) == 2 * ALL - 1
    assert all(0 < row["error"] <= 1.25 * row["unfused_error"] for row in report.verified)
    assert json.loads(report.to_json())["verified"] == report.verified


def test_verify_finds_a_wrong_kernel(monkeypatch):
    from tpfuse.ir import registry

    op = registry["all_reduce_add_rms_norm"]
    reference = op.reference

    def launcher(name):
        def launch(x, residual, weight, bias, alpha, eps, *rest, alive):
            return reference(x, residual, weight, bias, alpha, eps * 1.1, *rest)

        return launch

    monkeypatch.setattr(op, "launcher", launcher)
    with pytest.raises(tpfuse.FusionError, match=r"verify: all_reduce_add_rms_norm at layers\.0, result 0"):
        run({"verify": True})


def test_strict_is_content_with_all_sites():
    assert run({"strict": True}).counts() == {"all_reduce_add_rms_norm": ALL}


def test_dump(tmp_path):
    run({"dump": str(tmp_path), "ranges": (16,)})
    raised, fused, lowered = (path.read_text() for path in sorted(tmp_path.glob("rank0/graph*-1-16-*.txt")))
    assert raised.count("tpfuse.all_reduce.default(") == ALL and raised.count("tpfuse.rms_norm.default(") == ALL + 1
    assert fused.count("tpfuse.all_reduce_add_rms_norm.default(") == ALL
    assert lowered.count("tpfuse.all_reduce_add_rms_norm.lowered(") == ALL and "tpfuse.rms_norm" not in lowered


def test_each_range_has_its_passes_and_options():
    """Up to 16 tokens nothing is fused, above everything; both end points belong to the lower range."""
    model = Stack(HIDDEN)
    config = {"ranges": {16: {"passes": (), "inductor": {"max_autotune": False}}}}
    with interpreted():
        compiled = tpfuse.compile(model, config, fullgraph=True, dynamic=True)
        for tokens, counts in ((16, {}), (17, {"all_reduce_add_rms_norm": ALL}), (2, {"all_reduce_add_rms_norm": ALL})):
            assert torch.allclose(compiled(rows(tokens)), model(rows(tokens)), rtol=1e-5, atol=1e-6)
            assert compiled.report.counts() == counts
    low, high = compiled.report.ranges
    assert compiled.report.counts(low) == {} and compiled.report.counts(high) == {"all_reduce_add_rms_norm": ALL}


def test_graph_breaks():
    class Broken(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return self.norm(x)

    model = Broken(HIDDEN)
    with interpreted():
        compiled = tpfuse.compile(model, dynamic=True)
        assert torch.allclose(compiled(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    # One graph serves every layer; the break leaves its second all-reduce without the norm of the next layer.
    assert compiled.report.counts() == {"all_reduce": 1, "all_reduce_add_rms_norm": 1}
    assert [e.reason.code for e in compiled.report.declined() if e.attributes.get("operator") == "all_reduce"] == ["leaves_graph"]


def test_report_of_torch_compile_holds_every_graph():
    """Those of a model with breaks, and of sizes that come later, until Dynamo is reset or options change."""

    class Broken(Stack):
        def forward(self, x):
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.norm(self.layers[1](x))

    def graphs(options, *counts):
        compiled = torch.compile(Broken(HIDDEN), backend="tpfuse", dynamic=False, options=options)
        for tokens in counts:
            compiled(rows(tokens))
        report = tpfuse.last_report()
        return len(report.results), report.counts().get("all_reduce_add_rms_norm")

    with interpreted():
        assert graphs({}, 3) == (2, 3)
        first = tpfuse.last_report()
        assert graphs({"fuel": 2}, 3) == (2, 2)
        assert graphs({}, 4, 5) == (4, 6)
        torch._dynamo.reset()
        assert graphs({}, 3) == (2, 3) and tpfuse.last_report() is not first


def test_branches_under_inductor():
    """Each range has sizes of its own, and so have the graphs of the branches between its layers."""

    class Branching(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x + 1, (layer(x),))
            return self.norm(x)

    model = Branching(HIDDEN, layers=1)
    compiled = tpfuse.compile(model, {"ranges": (8,)}, dynamic=True, fullgraph=True)
    for tokens in (8, 5, 20):
        assert torch.allclose(compiled(rows(tokens)), model(rows(tokens)), rtol=1e-5, atol=1e-6)
    assert len(compiled.report.results) == 2 and compiled.report.fired()


@pytest.mark.parametrize("of", ["rows", "number"])
def test_sizes_that_the_data_decides_under_inductor(of):
    """Rows that are picked by what they hold, all of them reduced, as an expert's are; a number read off a tensor."""
    inner = Stack(HIDDEN, layers=1)

    def model(x, chosen):
        if of == "rows":
            return inner(x[torch.nonzero(chosen).squeeze(1)])
        count = chosen.sum().item()
        torch._check(count >= 0)
        return inner(x) * count

    compiled = tpfuse.compile(model, {"ranges": (8,)}, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for tokens, chosen in ((8, 5), (8, 3), (20, 0)):
            mask = torch.arange(tokens) < chosen
            assert torch.allclose(compiled(rows(tokens), mask), model(rows(tokens), mask), rtol=1e-5, atol=1e-5)
    (result,) = compiled.report.results
    assert result.ops == ["all_reduce_add_rms_norm"] * 2


class Recorder(CustomGraphPass):
    """Stands for the pass that held the slot before."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(sum("tpfuse.all_reduce_add_rms_norm" in str(n.target) for n in graph.nodes))

    def uuid(self):
        return "recorder"


def test_inductor_pass():
    """Seam 2: plain Inductor with tpfuse in its slot, the earlier pass run after it."""
    model, recorder = Stack(HIDDEN, layers=1), Recorder()
    own = tpfuse.inductor_pass({}, then=recorder)
    assert "Inductor's cache may hold it" in str(own.report) and tpfuse.last_report() is own.report
    settings = {"post_grad_custom_pre_pass": own, "fx_graph_cache": False}
    with torch._inductor.config.patch(settings), torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    assert own.report.counts() == {"all_reduce_add_rms_norm": 2} and len(own.report.fired()) == 2
    assert recorder.seen == [2]
    assert tpfuse.last_report() is own.report


def test_uuid_of_inductor_pass():
    def uuid(config=None, **kwargs):
        return tpfuse.inductor_pass(config, **kwargs).uuid()

    different = [
        uuid(), uuid({"disable_passes": ("all_reduce_norm",)}), uuid({"fuel": 1}), uuid(range=tpfuse.Range(1, 8)),
        uuid(then=Recorder()),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert uuid({"fuel": 1}) == different[2] and all(isinstance(u, str | bytes) for u in different)


@pytest.mark.timeout(300)
def test_no_less_exact_than_plain_inductor(tmp_path, monkeypatch):
    """Inductor's loops keep FP32 from the all-reduce to the norm's end; so must what stands in their place."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, exact = Stack(64).bfloat16(), Stack(64).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.mul_(3)
    exact.load_state_dict(model.state_dict())
    x = (torch.randn(512, 64) * 0.02).bfloat16()
    true = exact(x.double())
    compiled = tpfuse.compile(model, fullgraph=True)
    plain, fused = (((run(x).double() - true).norm() / true.norm()).item() for run in (torch.compile(model), compiled))
    assert compiled.report.counts() == {"all_reduce_add_rms_norm": ALL}
    assert 0 < fused <= 1.1 * plain


def test_declarations_are_part_of_the_cache_key(tmp_path, monkeypatch):
    """The same graph with operators declared otherwise (a channel that is not mutated, say) is compiled again."""
    from torch._dynamo.utils import counters

    from tpfuse.runtime import dispatch

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for declarations in ("a", "a", "b"):
        torch._dynamo.reset()
        counters.clear()
        monkeypatch.setattr(dispatch, "sources", lambda folder, text=declarations: text)
        tpfuse.compile(Stack(HIDDEN, layers=1), fullgraph=True)(rows())
        found.append((counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]))
    assert found == [(0, 1), (1, 0), (0, 1)]


def test_events_are_logged(caplog):
    """Those of a range and those of the raised graph, a layer norm among them."""
    model = torch.nn.Sequential(Stack(HIDDEN, layers=1), torch.nn.LayerNorm(HIDDEN))
    with caplog.at_level(logging.DEBUG, logger="tpfuse"), interpreted():
        compiled = tpfuse.compile(model, fullgraph=True)
        compiled(rows())
    logged = [r.getMessage() for r in caplog.records if r.name.startswith("tpfuse")]
    assert "variance" in {e.reason.code for e in compiled.report.shared}
    for event in compiled.report.events:
        assert any(str(event) in line for line in logged), event


SCRIPT = """
import torch, torch.distributed as dist
import tpfuse
from tests.models import Stack
from tpfuse.testing import interpreted
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model, x = Stack(32, layers=1), torch.randn(8, 32)
with torch.no_grad(), interpreted():
    compiled = tpfuse.compile(model, fullgraph=True, dynamic=True)
    compiled(x)
print(compiled.report)
torch._dynamo.reset()
print("explain", tpfuse.explain(model, x), sep="\\n")
"""


@pytest.mark.parametrize(("setting", "lines"), [("tpfuse", 1), ("+tpfuse", 6)])
def test_torch_logs(setting, lines, tmp_path):
    """TORCH_LOGS takes the name of a module: its events are those of the report, and those that `explain` foretold.
    TORCH_TRACE gets them as an artifact."""
    environment = {
        **os.environ, "TORCH_LOGS": setting, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=True)
    logged = [line for line in done.stderr.splitlines() if "graph 0, tokens" in line]
    assert len(logged) == lines, done.stderr
    (trace,) = (path.read_text() for path in tmp_path.iterdir())
    assert "tpfuse_graph_0_tokens_1" in trace and trace.count("fired    all_reduce_add_rms_norm") == 2
    report, _, foretold = done.stdout.partition("explain\n")
    assert foretold.replace("graph 1", "graph 0") == report != ""
    if setting == "+tpfuse":  # every event, as the report prints it
        for line in report.splitlines()[1:]:
            event, _, times = line.strip().partition("  × ")
            assert sum(event.replace("*", "0") in other for other in logged) == int(times or 1), line
