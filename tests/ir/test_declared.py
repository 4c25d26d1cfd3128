"""What operators' texts declare: for each tensor, true of every sample, and told where arguments are something else."""

import pytest
import torch

import tpfuse
from tests.ir.test_operators import cases
from tpfuse import ir
from tpfuse.ir import declared

# What one clause of a text cannot say.
APART = {"mask", "scales", "x_scale", "weight_scale", "w_scale", "weight_scales", "result_scale", "result_scales", "alpha",
         "w_alpha", "alphas"}  # fmt: skip


def test_every_tensor_is_declared():
    for op in ir.registry.values():
        tensors = {name for name, p in op.signature.parameters.items() if "Tensor" in str(p.annotation)}
        assert tensors - op.shapes.keys() <= APART, op.name


def test_samples_are_as_declared(group):
    for op in ir.registry.values():
        for shape in cases(op):
            args = op.bind((), op.sample(**{**shape, "tokens": 2 * shape["tokens"]}, group=group, rank=0))
            assert declared.wrong_kind(op, args) is None
            declared.check(op, args)


X, W, ONE = torch.randn(4, 64), torch.ones(64), torch.tensor(1.0)
FP8 = torch.ones(4, 64, dtype=torch.float8_e4m3fn)


def test_a_call_is_checked_once_for_its_kind(monkeypatch):
    """Whatever the values are: by shapes, strides, dtypes, devices and what is no tensor."""
    checked = []
    monkeypatch.setattr("tpfuse.ops._launches", {})
    monkeypatch.setattr("tpfuse.ops.MOST_KINDS", 4)
    monkeypatch.setattr("tpfuse.ops.declared.check", lambda op, args: checked.append(op.name))
    for x, eps in ((X, 1e-5), (X + 1, 1e-5), (X[:2], 1e-5), (X, 1e-6), (X.bfloat16(), 1e-5), (X, 1e-5)):
        got = tpfuse.ops.rms_norm(x, W.to(x.dtype), eps)
        torch.testing.assert_close(got, torch.nn.functional.rms_norm(x, [64], W.to(x.dtype), eps))
    assert len(checked) == 4
    torch.testing.assert_close(tpfuse.ops.rms_norm(X.t().contiguous().t(), W), tpfuse.ops.rms_norm(X, W))
    assert len(checked) == 6  # other strides; and only so many kinds are remembered
    for _ in range(2):
        with pytest.raises(TypeError, match="eps is a str"):
            tpfuse.ops.rms_norm(X, W, "1e-5")
        with pytest.raises(TypeError, match="eps is a dict"):
            tpfuse.ops.rms_norm(X, W, {})


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("rms_norm", (X, W[:1]), "rms_norm: weight is of shape [1]; expected [hidden], and hidden is 64 by x"),
        ("rms_norm", (X.long(), W), "x is int64; expected bfloat16, float16, float32, float64"),
        ("rms_norm", (torch.tensor(1.0), None), "x is of shape []; expected [..., hidden], 1 dimensions or more"),
        ("rms_norm", (X.to("meta"), W), "weight is on cpu, x on meta"),
        ("rms_norm", (X, W, "1e-5"), "eps is a str; expected float"),
        ("rms_norm", (X.numpy(), None), "x is a ndarray; expected Tensor"),
        ("add_rms_norm", (X, X[:1], W), "residual is of shape [1, 64]; expected [..., hidden], and ... is [4] by x"),
        ("act_and_mul", (X, X[:, :32]), "up is of shape [4, 32]; expected [..., width], and width is 64 by gate"),
        ("quantize", (X, W), "scale is of shape [64]; expected one number"),
        ("quantize", (X, ONE.half()), "scale is float16; expected float32"),
        ("quantize", (X, 1.0), "scale is a float; expected Tensor | None"),
        ("quantize", (X, None), "scheme 'fp8_tensor' needs a scale"),
        ("matmul", (X[None], torch.ones(64, 3)), "x is of shape [1, 4, 64]; expected [tokens, k], 2 dimensions"),
        ("scaled_matmul", (X, X.t(), ONE, ONE), "x is float32; expected float8_e4m3fn, uint8"),
        ("all_gather_matmul", (X, [W.view(64, 1)], []), "an entry for each weight is needed in every list, got 1 weights, 0"),
        ("all_gather_matmul", (X, [X.t(), X], [None] * 2), "weights[1] is of shape [4, 64]; expected [k, n_i], and k is 64 by x"),
        ("all_gather_matmul", (X, [X.t(), X.t()], [None, W]), "biases[1] is of shape [64]; expected [n_i], and n_i is 4 by"),
        ("all_gather_matmul", (X, W, [None]), "weights is a Tensor; expected list[Tensor]"),
        ("all_gather_scaled_matmul", (FP8, ONE, [X.t()], [ONE], [None], [None], [None]), "weights[0] is float32; expected"),
        ("reduce_scatter_add_rms_norm", (X, X[:3], W), "residual is of shape [3, 64]; expected [⌈rows / world⌉, hidden], "
         "and ⌈rows / world⌉ is 2 by x on 2 ranks"),
        ("matmul_reduce_scatter_rms_norm", (X, X.t(), None, W), "weight is of shape [64]; expected [n], and n is 4 by w"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(group, name, args, told):
    op = ir.registry[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(tpfuse.ops, name)(*args, **({"group": group} if op.collective else {}))
    assert told in str(raised.value)


def test_rows_that_ranks_cannot_share(group):
    with pytest.raises(ValueError, match="x has 3 rows, which 2 ranks cannot share evenly; padded=True"):
        tpfuse.ops.reduce_scatter(X[:3], group=group)


def test_an_unknown_group_is_named():
    with pytest.raises(ValueError, match="no process group is named 'nope'"):
        tpfuse.ops.all_reduce(X, group="nope")


def test_the_same_under_torch_compile():
    def model(x, weight):
        return tpfuse.ops.rms_norm(x, weight)

    for dynamic in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match="weight is of shape .63.; expected .hidden., and hidden is 64"):
            tpfuse.compile(model, dynamic=dynamic)(X, W[:63])
