"""Forms of other torch releases, written out in aten, so that they are tested whatever torch is installed."""

import pytest
import torch
from torch import Tensor, fx

from tests.raising.capture import assert_identical, raised, trace
from tpfuse.ir import registry
from tpfuse.raising import raise_graph

aten = torch.ops.aten
prims = torch.ops.prims
HIDDEN = 64


def rows() -> Tensor:
    return (torch.randn(24, HIDDEN) * 3e-3).bfloat16()


def weight() -> Tensor:
    return (torch.rand(HIDDEN) * 2.75 + 0.25).bfloat16()


def rms_norm_2_11(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """F.rms_norm before its last cast, as torch 2.11 takes it apart: the epsilon is not rounded to FP32."""
    wide = prims.convert_element_type(x, torch.float32)
    root = aten.rsqrt(aten.add.Scalar(aten.mean.dim(aten.pow.Tensor_Scalar(wide, 2), [1], True), eps))
    return aten.mul.Tensor(aten.mul.Tensor(wide, root), w)


def fp8(x: Tensor) -> Tensor:
    return prims.convert_element_type(
        aten.clamp_max.default(aten.clamp_min.default(aten.div.Tensor(x, 0.02), -448.0), 448.0), torch.float8_e4m3fn
    )


def test_unrounded_epsilon() -> None:
    (norm,) = raised(lambda x, w: prims.convert_element_type(rms_norm_2_11(x, w), torch.bfloat16), rows(), weight()).named(
        "rms_norm"
    )
    assert norm["eps"] == 1e-6 and norm["rounding"] == "cast_last"


def test_round_trip_removed_before_a_quantise() -> None:
    """torch 2.11 drops bfloat16 between the norm and the quantise; 2.13 keeps it."""
    (norm,) = raised(lambda x, w: fp8(rms_norm_2_11(x, w)), rows(), weight()).named("rms_norm")
    assert norm["rounding"] == "cast_last+keep_f32"
    (norm,) = raised(
        lambda x, w: fp8(
            prims.convert_element_type(prims.convert_element_type(rms_norm_2_11(x, w), torch.bfloat16), torch.float32)
        ),
        rows(),
        weight(),
    ).named("rms_norm")
    assert norm["rounding"] == "cast_last"


def test_norm_with_two_consumers() -> None:
    """There one FP32 norm is cast for one consumer and quantised for the other."""

    def model(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        norm = rms_norm_2_11(x, w)
        return prims.convert_element_type(norm, torch.bfloat16), fp8(norm)

    (norm,) = raised(model, rows(), weight()).named("rms_norm")
    assert norm["rounding"] == "cast_last+keep_f32"


def test_weight_widened_first() -> None:
    """An FP32 product of two widened factors, rounded once, is the product in the model's dtype; unrounded it is not."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        wide = prims.convert_element_type(x, torch.float32)
        root = aten.rsqrt(aten.add.Tensor(aten.mean.dim(aten.pow.Tensor_Scalar(wide, 2), [-1], True), 1e-6))
        unit = prims.convert_element_type(aten.mul.Tensor(wide, root), torch.bfloat16)
        return prims.convert_element_type(unit, torch.float32) * prims.convert_element_type(w, torch.float32)

    (norm,) = raised(lambda x, w: prims.convert_element_type(product(x, w), torch.bfloat16), rows(), weight()).named("rms_norm")
    assert norm["rounding"] == "cast_first" and norm["weight"].op == "placeholder"
    (norm,) = raised(product, rows(), weight()).named("rms_norm")
    assert norm["rounding"] == "cast_first" and norm["weight"].op == "call_function"  # the widened weight


MUTATIONS = {"eps": (2, 1e-5), "weight_bias": (3, 1.0), "rounding": (4, "cast_first"), "weight": (1, None)}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_attribute_shows(name: str) -> None:
    """The inputs of these tests tell a tenfold epsilon, another bias, another rounding and a lost weight from the right."""
    gm, inputs = trace(lambda x, w: prims.convert_element_type(rms_norm_2_11(x, w), torch.bfloat16), [rows(), weight()])
    expected = fx.Interpreter(gm).run(*inputs)
    raise_graph(gm.graph)
    (node,) = gm.graph.find_nodes(op="call_function", target=registry["rms_norm"].default)
    assert_identical(fx.Interpreter(gm).run(*inputs), expected)
    node.update_arg(*MUTATIONS[name])
    with pytest.raises(AssertionError):
        assert_identical(fx.Interpreter(gm).run(*inputs), expected)
