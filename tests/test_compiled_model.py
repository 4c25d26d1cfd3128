"""What `tpfuse.compile` returns stands in for the model: its attributes, its methods, its errors."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives

import tpfuse


class Model(nn.Module):
    """With what Hugging Face's models have and their users' code reads."""

    def __init__(self):
        super().__init__()
        self.config = {"hidden_size": 32}
        self.norm = nn.RMSNorm(32, eps=1e-5)
        self.eager = 0

    @property
    def device(self):
        return self.norm.weight.device

    def forward(self, x):
        self.eager += not torch.compiler.is_compiling()
        return self.norm(x + collectives.all_reduce(x, "sum", dist.group.WORLD))

    def generate(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


pytestmark = pytest.mark.usefixtures("one_rank")


def test_attributes_are_the_models():
    model = Model()
    compiled = tpfuse.compile(model)
    assert compiled.config is model.config and compiled.device == torch.device("cpu")
    assert next(compiled.parameters()) is model.norm.weight and compiled.norm is model.norm
    assert compiled.state_dict().keys() == model.state_dict().keys()
    assert {"report", "config", "generate"} <= set(dir(compiled)) and "RMSNorm" in repr(compiled)
    compiled.config = {}
    assert model.config == {}
    with pytest.raises(AttributeError, match="confg"):
        compiled.confg  # noqa: B018
    assert copy.copy(compiled).norm is model.norm


def test_what_gives_the_module_back_gives_the_compiled_one():
    model = Model()
    compiled = tpfuse.compile(model)
    assert compiled.eval() is compiled and not model.training
    assert compiled.to(torch.float64) is compiled and model.norm.weight.dtype == torch.float64
    assert isinstance(compiled.double()(torch.randn(4, 32).double()), torch.Tensor)
    assert compiled.report.counts() == {"all_reduce_add_rms_norm": 1}


def test_methods_run_the_module_compiled():
    model = Model()
    compiled, x = tpfuse.compile(model), torch.randn(4, 32)
    wanted = model.generate(x, 3)
    model.eager = 0
    torch.testing.assert_close(compiled.generate(x, 3), wanted)
    torch.testing.assert_close(compiled.forward(x), compiled(x))
    assert model.eager == 0 and compiled.report.counts() == {"all_reduce_add_rms_norm": 1}
    torch.testing.assert_close(model(x), compiled(x))  # the module itself stays as it was
    assert model.eager == 1


def test_a_function():
    def double(x):
        return x + x

    compiled = tpfuse.compile(double)
    assert compiled.__name__ == "double" and compiled(torch.ones(2)).tolist() == [2, 2]


def test_errors_come_as_they_were_raised():
    with pytest.raises(ValueError, match="unknown option 'foo'"):
        tpfuse.compile(Model(), options={"foo": 1})(torch.randn(4, 32))
    with pytest.raises(OSError, match="/no/table.json"):
        tpfuse.compile(Model(), {"table": "/no/table.json"})(torch.randn(4, 32))
    with pytest.raises(tpfuse.FusionError, match="max_tokens=3"):
        tpfuse.compile(Model(), {"max_tokens": 3}, dynamic=True)(torch.randn(4, 32))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: tpfuse.compile(Model(), strict=True), TypeError, r"tpfuse.compile\(model, \{'strict': …\}\)"),
        (lambda: tpfuse.explain(Model(), torch.ones(1, 32), target="cuda"), TypeError, "expected a tpfuse.Target such as"),
        (lambda: tpfuse.inductor_pass({}, (1, 256)), TypeError, r"expected a tpfuse.Range such as Range\(1, 256\), got tuple"),
        (lambda: tpfuse.release("tp"), ValueError, "no process group is named 'tp'"),
        (lambda: tpfuse.release(None), TypeError, "group must be a ProcessGroup, a one-dimensional DeviceMesh or a name"),
    ],
)
def test_wrong_arguments_are_named(call, error, told):
    with pytest.raises(error, match=told):
        call()
