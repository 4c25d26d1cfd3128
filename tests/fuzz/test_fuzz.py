"""A few models of the fuzzer, the same ones every time; `python -m tests.fuzz` makes more."""

import pytest

from tests.fuzz.generate import generate
from tests.fuzz.oracle import gathered, judge, tally

pytestmark = pytest.mark.timeout(300)
# Few models that hold many operators, found by looking through the first 800, and the fused ones that they hold.
SEEDS = {2: (2, 6, 16, 22, 44, 47, 53, 237, 450, 555, 634, 682, 4250), 3: (6, 50, 284, 434, 475, 520)}
FUSED = {
    2: {
        "add_rms_norm_quantize", "all_gather_matmul", "all_gather_scaled_matmul", "all_reduce_add_rms_norm",
        "all_reduce_add_rms_norm_quantize", "all_reduce_rms_norm", "attention_quantize", "matmul_reduce_scatter_add_rms_norm",
        "matmul_reduce_scatter_rms_norm_add_rms_norm_quantize",
        "reduce_scatter_add_rms_norm_all_gather", "reduce_scatter_add_rms_norm_quantize_all_gather", "reduce_scatter_rms_norm",
        "reduce_scatter_rms_norm_add_rms_norm_all_gather", "reduce_scatter_rms_norm_all_gather", "rms_norm_quantize",
        "scaled_matmul_reduce_scatter_add_rms_norm", "scaled_matmul_reduce_scatter_rms_norm",
    },
    3: {
        "act_and_mul_quantize", "add_rms_norm_quantize", "all_gather_matmul", "all_reduce_add_rms_norm",
        "all_reduce_rms_norm_add_rms_norm", "all_reduce_rms_norm_quantize", "matmul_reduce_scatter",
        "matmul_reduce_scatter_add_rms_norm_quantize", "matmul_reduce_scatter_rms_norm", "qk_norm_rope",
        "reduce_scatter_add_rms_norm", "rms_norm_quantize", "scaled_matmul_reduce_scatter",
    },
}  # fmt: skip


def test_nothing_is_wrong(ranks):
    programs = [generate(seed, ranks.world, "traced") for seed in SEEDS[ranks.world]]
    verdicts = gathered(ranks.run(judge, programs, timeout=280))
    assert {v.seed: v.problem for v in verdicts if v.problem} == {}
    assert {v.seed: v.own for v in verdicts if v.own} == {}, "torch itself fails: the model shows nothing"
    assert FUSED[ranks.world] - set(tally(verdicts)) == set()
