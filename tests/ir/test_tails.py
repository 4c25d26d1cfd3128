"""Operators that are made of others: engines call them by position, and read their texts."""

from inspect import Parameter

import pytest

from tpfuse import ir

PARAMETERS = {
    "act_and_mul_quantize": "gate up scale act=silu scheme=fp8_tensor layout=row",
    "all_reduce_add_rms_norm_quantize": "x residual weight bias scale alpha=1.0 eps=1e-06 weight_bias=0.0 rounding=cast_first "
    "scheme=fp8_tensor layout=row group=",
    "reduce_scatter_rms_norm_all_gather": "x weight bias=None eps=1e-06 weight_bias=0.0 rounding=cast_first padded=True "
    "rows=None group=",
    "reduce_scatter_rms_norm_quantize_all_gather": "x weight bias scale eps=1e-06 weight_bias=0.0 rounding=cast_first "
    "scheme=fp8_tensor layout=row padded=True rows=None group=",
}
RESULTS = {
    "rms_norm_quantize": "(q, scales, result)",
    "all_reduce_rms_norm_add_rms_norm_quantize": "(q, scales, outer norm, h)",
    "reduce_scatter_add_rms_norm_quantize": "(q, scales, norm, h), of own rows",
    "reduce_scatter_rms_norm_all_gather": "(norm of all rows, norm and reduced of own rows)",
    "reduce_scatter_add_rms_norm_quantize_all_gather": "(q and scales of all rows, norm and h of own rows)",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    given = ir.registry[name].signature.parameters.values()
    assert " ".join(p.name + (f"={p.default}" if p.default is not Parameter.empty else "") for p in given) == PARAMETERS[name]


@pytest.mark.parametrize("name", RESULTS)
def test_the_text_names_the_results(name: str) -> None:
    assert f"→ {RESULTS[name]}." in ir.registry[name].doc
