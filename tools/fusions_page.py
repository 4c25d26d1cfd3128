"""Write docs/fusions.md from the rules: what is fused, in which quantisation schemes, and the test that shows each cell.

    python tools/fusions_page.py            # writes the page
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpfuse.config import PASSES
from tpfuse.formats import SCHEME_NAMES
from tpfuse.fusion import composites
from tpfuse.ir import Op, find, registry

PAGE = Path(__file__).parent.parent / "docs" / "fusions.md"
RULES = "tests/fusion/test_rules.py"
CHAIN = "tests/dist/test_chain.py"
MODELS = "tests/dist/test_quantised_models.py"
SUBCLASSES = "tests/dist/test_subclasses.py"
COLUMNS = ("plain", *SCHEME_NAMES)
_MIXED = ("plain", "fp8_tensor", "fp8_token", "fp8_group128", "nvfp4")
# Cells that a rule's derivation does not decide: an attention kernel sees one head, a scale per token spans all of them.
DECLINED = {("attention_quantize", "fp8_token"): f"{RULES}::test_a_scale_per_token_spans_heads"}
# Fusions that are no pattern of one shape, and the tests that show them, by scheme ("plain" for unquantised).
BY_HAND: dict[str, tuple[str, str, dict[str, str]]] = {
    "all_gather_matmul": (
        "async_tp", "all_gather → every matmul of the rows",
        {"plain": "tests/fusion/test_async_tp.py::test_several_products_of_one_gather"},
    ),
    "all_gather_scaled_matmul": (
        "async_tp", "all_gather of quantised rows and scales → every scaled_matmul of them",
        {s: f"{RULES}::test_gathered_products[{s}]" for s in SCHEME_NAMES},
    ),
    "sequence_parallel": (
        "sequence_parallel", "a residual chain of all_reduces → reduce_scatters, own rows between, all_gathers",
        {s: f"{CHAIN}::test_two_ranks[{s}-2]" for s in _MIXED}
        | {"fp8_group64": "tests/dist/test_sequence_parallel.py::test_models[world2-quantised-sequence_parallel]"},
    ),
    "merge_all_reduce": (
        "merge_all_reduce", "all_reduce(a) + all_reduce(b) → all_reduce(a + b)",
        {"plain": "tests/fusion/test_merge.py::test_sum[plain]"},
    ),
    "delay_all_reduce": (
        "merge_all_reduce", "all_reduce(x) · gate, or summed, and added → all_reduce(x · gate), added",
        {"plain": "tests/fusion/test_summands.py::test_one_operator[gated]"},
    ),
    "summand_to_residual": (
        "merge_all_reduce", "h + (all_reduce(x) + y) → (h + y) + all_reduce(x)",
        {"plain": "tests/fusion/test_summands.py::test_one_operator[whole]"},
    ),
    "scale_before_all_reduce": (
        "all_reduce_norm", "a constant factor between all_reduce and norm → before the all_reduce",
        {"plain": "tests/fusion/test_scale.py::test_factor[True-granite]"},
    ),
    "engine attention": (
        "attention_quantize", "an engine's attention operator → quantize: the operator writes the quantised rows",
        {
            "fp8_tensor": "tests/fusion/test_attention.py::test_quantises_itself[static]",
            "fp8_group128": "tests/fusion/test_attention.py::test_quantises_itself[group 128]",
            "fp8_group64": "tests/fusion/test_attention.py::test_quantises_itself[group 64]",
            "nvfp4": "tests/fusion/test_attention.py::test_quantises_itself[NVFP4]",
        },
    ),
}  # fmt: skip
# End to end: what runs, and the test that ran it, by scheme.
END_TO_END: dict[str, dict[str, str]] = {
    "chain model, 2 ranks, bf16": {s: f"{CHAIN}::test_two_ranks[{s}-2]" for s in _MIXED},
    "chain model, 3 ranks, fp16": {s: f"{CHAIN}::test_three_ranks[{s}-3]" for s in _MIXED},
    "chain model, 4 ranks, bf16": {s: f"{CHAIN}::test_four_ranks[{s}-4]" for s in _MIXED},
    "chain model with Gemma's norm, 4 ranks": {"plain": f"{CHAIN}::test_four_ranks[gemma-4]"},
    **{
        f"{name}, 2 ranks": {s: f"{MODELS}::{test}" for s in _MIXED}
        for name, test in {
            "Llama": "test_both_ranges[llama-2]", "Gemma3": "test_both_ranges[gemma3_text-2]",
            "DeepSeek-V3": "test_both_ranges[deepseek_v3-2]", "Qwen3": "test_both_ranges[qwen3-2]",
        }.items()
    },
    **{
        title: dict.fromkeys(
            ("fp8_tensor", "fp8_group128", "nvfp4"), f"tests/raising/test_models.py::test_attention_of_models[{name}]"
        )
        for title, name in {
            "attention of Qwen3": "qwen3", "attention of Gemma3": "gemma3",
            "latent attention of DeepSeek-V2": "deepseek_v2", "latent attention of DeepSeek-V3": "deepseek_v3",
        }.items()
    },
    "latent attention as an operator, column-major, TMA-aligned, packed UE8M0": {
        s: f"{RULES}::test_latent_attention[{s}-col+tma+ue8m0_packed]" for s in ("fp8_group128", "fp8_group64")
    },
    **{
        f"{title}, quantised by torchao, 2 ranks": {
            scheme: f"{SUBCLASSES}::test_models[{name}-{granularity}-2]"
            for scheme, granularity in (("fp8_tensor", "tensor"), ("fp8_token", "row"))
        }
        for title, name in {
            "Llama": "llama", "Gemma3": "gemma3_text", "DeepSeek-V3": "deepseek_v3", "Qwen3": "qwen3",
        }.items()
    },
    "Llama's greedy tokens": {s: f"{MODELS}::test_greedy_tokens[{s}-2]" for s in _MIXED},
}  # fmt: skip

ABOUT = {
    "all_reduce_norm": "The sum over the ranks that ends attention or MLP, the residual, the norm; the sandwich of two norms.",
    "all_reduce_norm_quantize": "The same with the quantise of the norm's result behind it.",
    "norm_quantize": "Without a collective.",
    "merge_all_reduce": "Shared experts beside routed ones: one all-reduce for two, where its residual and norm find it.",
    "sequence_parallel": "An all-reduce in two halves, the norm between them on each rank's own rows, the residual kept sharded.",
    "async_tp": "A product next to half an all-reduce, overlapped, with what follows on own rows.",
    "attention_quantize": "Attention, latent attention too, and the quantise of its rows.",
    "qk_norm_rope": "The norm of each head of q and k, then the rotary embedding.",
}
HEAD = f"""# Fusions

What each pass fuses. **✓**: a test fires the rule in that scheme, with and without each optional step (in brackets), any of its
results alive (`{RULES}::test_fires[OPERATOR-SCHEME]`); the closest chain that must not be fused has a test
too (`test_the_closest_chain_is_not_fused`). A number: another test, listed at the end. An empty cell has none and is not claimed.
"plain" is unquantised (bf16, fp16, FP32); the schemes are described in `tpfuse.formats`.

All of it runs on the operators' bodies, with gloo on CPU; which operators have kernels is said in [kernels.md](kernels.md).
Written by `python tools/fusions_page.py` from the rules.
"""


class Notes:
    """The tests that cells name, those that stand for themselves numbered in the order of their first mention."""

    def __init__(self) -> None:
        self.numbered: dict[str, int] = {}
        self.fired: list[str] = []

    def cell(self, test: str | None, mark: str = "") -> str:
        if test is None:
            return ""
        if "::test_fires[" in test:
            self.fired.append(test)
            return "✓"
        return f"{mark}{self.numbered.setdefault(test, len(self.numbered) + 1)}"


def chain_of(op: Op) -> str:
    """The smaller operators of a composite, in order; an optional step in brackets, by its argument."""
    steps = []
    for node in composites.rules_of(op)[0].pattern.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        inner = find(node.target)
        argument = node.meta.get("optional")
        steps.append(inner.name if inner else f"({str(node.target).split('.')[1]} {argument})")
    return " → ".join(steps)


def derived() -> Iterator[tuple[str, str, str, dict[str, str]]]:
    """(operator, pass, chain, tests by scheme) of every composite whose rule is derived from its body."""
    for op in (op for op in registry.values() if op.fuse in PASSES and not op.variadic):
        columns = SCHEME_NAMES if {"scheme", "w_scheme"} & set(op.params) else ("plain",)
        tests = {s: f"{RULES}::test_fires[{op.name}-{s}]" for s in columns if (op.name, s) not in DECLINED}
        yield op.name, str(op.fuse), chain_of(op), tests


def table(titles: str, rows: Sequence[tuple[str, dict[str, str]]], notes: Notes) -> list[str]:
    """rows: (first cells, tests by scheme; of what is declined with "-" before it).  Columns that hold nothing are left out."""
    columns = [c for c in COLUMNS if any({c, f"-{c}"} & tests.keys() for _, tests in rows)]
    lines = [f"| {titles} | {' | '.join(columns)} |", "|---" * (titles.count("|") + 1 + len(columns)) + "|"]
    for first, tests in rows:
        cells = [notes.cell(tests.get(c)) or notes.cell(tests.get(f"-{c}"), "declined ") for c in columns]
        lines.append(f"| {first} | {' | '.join(cells)} |")
    return [*lines, ""]


def page() -> tuple[str, list[str]]:
    """The page, and the tests that it names."""
    notes, lines = Notes(), [HEAD]
    every = [*derived(), *((name, *row) for name, row in BY_HAND.items())]
    for owner in PASSES:
        rows = [(f"{n} | {what}", tests | declined(n)) for n, of, what, tests in every if of == owner]
        lines += [f"## {owner}", "", ABOUT[owner], "", *table("operator | replaces", rows, notes)]
    lines += ["## End to end", "", *table("model", list(END_TO_END.items()), notes), "## Tests", ""]
    lines += [*(f"{number}. `{test}`" for test, number in notes.numbered.items()), ""]
    return "\n".join(lines), [*notes.fired, *notes.numbered]


def declined(name: str) -> dict[str, str]:
    return {f"-{scheme}": test for (op, scheme), test in DECLINED.items() if op == name}


if __name__ == "__main__":
    PAGE.write_text(page()[0])
    print(f"wrote {PAGE}")
