"""Break the code on purpose and see that a test notices: `python -m tests.mutants [NAME …]`.

Each mutant is one replacement in a temporary copy of the sources, with the tests that have to fail.  They are run first
on the unbroken copy, where all have to pass.  Prints a table; ends with 1 if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch._inductor.compile_fx  # noqa: F401  before the forks
import torch.distributed  # noqa: F401

ROOT = Path(__file__).parent.parent
PIPELINE = "tests/dist/test_agreement.py::test_subgroups"
SEAMS = "tests/test_seams.py"
ONE_SHOT = "tests/kernels/test_allreduce_norm.py::test_every_scheme_and_size[one_shot-2]"
TWO_SHOT = "tests/kernels/test_allreduce_norm.py::test_every_scheme_and_size[two_shot-2]"
ON_CPU = "tests/kernels/test_on_cpu.py"
PRODUCTS = "tests/kernels/test_protocols.py::test_products_next_to_collectives"
LAYER = "tests/measure/test_trace.py::test_nothing_is_left_between_products"
ASYNC_TP = "tests/fusion/test_async_tp.py"
NEAR = "tests/test_near_misses.py::test_reason"
FUZZ = "tests/fuzz/test_fuzz.py::test_nothing_is_wrong[world2]"
FUZZED = ("residual dropped", "scale dropped", "wrong epsilon", "weight_bias ignored")


@dataclass(frozen=True)
class Mutant:
    """file: below src/tpfuse.  old, new: the replacement; old occurs there exactly once.  tests: one of them has to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def norm_tests(name: str) -> str:
    return f"tests/raising/test_norms.py::test_spelling[{name}-torch.bfloat16]"


MUTANTS = [
    Mutant("a gate of a later collective", "fusion/delay.py", "latest[factor] < reduced.meta[ORDER]", "True",
           ("tests/fusion/test_summands.py::test_what_must_stay[gate_of_a_later_sum]",)),
    Mutant("rows beside an all-reduce lose their factor", "fusion/summands.py", "for value in (rows, reduced))",
           "for value in (reduced, reduced))", ("tests/fusion/test_summands.py::test_no_less_exact[world2-all_reduced]",)),
    Mutant("a summand of a later collective", "fusion/summands.py",
           "max(latest[v] for v in (rows, residual)) < reduced.meta[ORDER] and fuel()", "fuel()",
           ("tests/fusion/test_summands.py::test_summand_of_a_later_collective_stays",)),
    Mutant("a gate keeps its rows' sizes", "raising/canonical.py", "found[a] = [*sizes[:-1], 1]", "found[a] = sizes",
           ("tests/fusion/test_summands.py::test_one_operator[gated]",)),
    Mutant("a rank dropped", "ir/collective.py", 'return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", group))',
           "return x.clone()", (PIPELINE,)),
    Mutant("maximum for sum", "ir/collective.py", '_c10d.all_reduce(x, "sum", group)', '_c10d.all_reduce(x, "max", group)',
           (PIPELINE,)),
    Mutant("reduce op not looked at", "raising/collectives.py", 'node.args[1] != "sum"', "False", (f"{NEAR}[reduce_op]",)),
    Mutant("wrong group", "ir/collective.py", '_c10d.all_reduce(x, "sum", group)', '_c10d.all_reduce(x, "sum", "0")',
           (PIPELINE,)),
    Mutant("wrong epsilon", "ir/norm.py", "keepdim=True) + eps)", "keepdim=True) + eps * 1.1)", (norm_tests("llama"),)),
    Mutant("epsilon not recovered", "raising/norms.py", "shortest(eps, tensor(wide).dtype)", "eps",
           ("tests/raising/test_norms.py::test_epsilon_is_recovered[1e-06]",)),
    Mutant("weight_bias ignored", "ir/norm.py", "scale if weight_bias == 0.0 else scale + weight_bias", "scale",
           (norm_tests("Gemma"),)),
    Mutant("low_bias ignored", "ir/norm.py", "if weight_bias == 0.0 or how.low_bias else", "if weight_bias == 0.0 else",
           (norm_tests("Gemma in the model's dtype"),)),
    Mutant("casting order", "ir/norm.py", 'y.to(x.dtype) if how.base == "cast_first" else y', "y", (norm_tests("llama"),)),
    Mutant("residual dropped", "ir/norm.py", "h = torch.ops.aten.add.Tensor(x, residual)",
           "h = torch.ops.aten.add.Tensor(x, x)", (f"{SEAMS}::test_only_one_pass",)),
    Mutant("scale dropped", "ir/op.py", "return y if alpha == 1.0 else y * alpha", "return y",
           ("tests/fusion/test_scale.py",)),
    Mutant("bias dropped", "ir/op.py", "return y if bias is None else y + bias", "return y",
           ("tests/ir/test_operators.py::test_reference_against_float64",)),
    Mutant("bias of any shape", "ir/fused.py", 'bias.dim() != 1 or bias.shape[0] != args["x"].shape[-1]', "False",
           (f"{NEAR}[bias_shape]",)),
    Mutant("weight of any dtype", "ir/fused.py", "weight.dtype != args[\"x\"].dtype", "False", (f"{NEAR}[weight_dtype]",)),
    Mutant("inner results may be read", "rewrite/rule.py", "if user not in inside:", "if False:",
           (f"{NEAR}[second_user]",)),
    Mutant("axis not looked at", "raising/norms.py", "if not reduces_last(total.args[1], value):", "if False:",
           (f"{NEAR}[axis]", "tests/raising/test_norms.py::test_near_miss[axis]")),
    Mutant("collectives unordered", "ir/op.py", "Tensor(a!) channel, ", "Tensor channel, ",
           ("tests/dist/test_order.py",)),
    Mutant("fuel is endless", "compiler.py", "if self.left == 0:", "if False:", (f"{SEAMS}::test_fuel_fuses_exactly_so_many",)),
    Mutant("dead results kept alive", "lowering/select.py", "if u.target is operator.getitem and u.users]",
           "if u.target is operator.getitem and not u.users]", (f"{SEAMS}::test_only_one_pass",)),
    Mutant("a step without its end", "lowering/table.py", "if end is None or size <= end)", "if end is None or size < end)",
           ("tests/lowering/test_table.py::test_a_step_holds_up_to_and_with_its_bytes",)),
    Mutant("measured slower, fused all the same", "lowering/select.py", 'if choice.unfused and preference == "auto":',
           "if False:", ("tests/lowering/test_choice.py::test_the_choice_of_a_range[3000-8192-unfused]",)),
    Mutant("the next size's kernel", "ir/op.py", "if size <= limit)", "if size < limit)",
           ("tests/lowering/test_choice.py::test_the_size_of_a_call_chooses_the_kernel",)),
    Mutant("noise taken for a difference", "measure/entries.py", "/ fastest - 1 - margin)", "/ fastest - 1)",
           ("tests/measure/test_entries.py::test_a_tie_within_the_margin_goes_to_the_simpler",)),
    Mutant("every rank's own table", "runtime/agreement.py", "if me == first:", "if True:",
           ("tests/dist/test_tables.py::test_overlapping_groups_end_with_one_table[4]",)),
    Mutant("layer without its products", "measure/precedence.py", "before = {n: sums * us + alone.get(n, 0.0)",
           "before = {n: sums * us", ("tests/measure/test_precedence.py::test_a_form_is_the_sum_of_its_parts",)),
    Mutant("layer of any group of ranks", "measure/precedence.py", "(e.scheme, e.world) == (whole.scheme, whole.world)",
           "e.scheme == whole.scheme", ("tests/measure/test_precedence.py::test_other_ranks_widths_dtypes_schemes_do_not_mix",)),
    Mutant("layer's time overruled by kernels", "runtime/planner.py",
           'return apart(op, args, target.world, self.table, limits) if self.config.kernels == "auto" else None', "return None",
           ("tests/test_worth.py::test_each_range_takes_the_form_that_was_measured_faster_in_it",)),
    Mutant("product by its norm's scheme", "lowering/select.py", 'args.get("w_scheme", "") if isinstance(op, Chained) else ', "",
           ("tests/measure/test_gemm.py::test_any_norm_behind_a_product_is_judged_by_the_one_that_was_measured",)),
    Mutant("product alone as a choice", "measure/entries.py", " and impl != ALONE", "",
           ("tests/measure/test_entries.py::test_a_product_alone_is_the_noise_and_no_choice",)),
    Mutant("end point in the upper range", "lowering/ranges.py", "ranges.append(Range(start, end))",
           "ranges.append(Range(start, max(start, end - 1)))", (f"{SEAMS}::test_each_range_has_its_passes_and_options",)),
    Mutant("disabled passes run", "config.py", "name not in self.disable_passes and", "True and",
           (f"{SEAMS}::test_disabled_passes",)),
    Mutant("verify never fails", "ir/check.py", "if not error <= base * MARGIN", "if False and not error <= base * MARGIN",
           (f"{SEAMS}::test_verify_finds_a_wrong_kernel",)),
    Mutant("strict is silent", "runtime/planner.py", "if self.config.strict and", "if False and",
           ("tests/test_near_misses.py::test_strict_names_the_site_and_the_reason",)),
    Mutant("nobody agrees", "runtime/agreement.py", "        if lines != mine:", "        if False:",
           ("tests/dist/test_agreement.py::test_difference_is_named_on_every_rank[world2-epsilon]",)),
    Mutant("the smaller product first", "fusion/composites.py", "-len(rule.targets) if op.fuse", "len(rule.targets) if op.fuse",
           (f"{ASYNC_TP}::test_nothing_stands_between_the_products_of_a_layer[fp8_token]",)),
    Mutant("gathered rows for nobody", "fusion/async_tp.py", "bool(self.others)", "True",
           (f"{ASYNC_TP}::test_nothing_stands_between_the_products_of_a_layer[plain]",)),
    Mutant("products whatever they cost", "runtime/planner.py", "if isinstance(found, Decline):", "if False:",
           ("tests/test_worth.py::test_nothing_measured",)),
    Mutant("gathered twice for one scale", "fusion/sequence_parallel.py", "if not waits and any", "if any",
           ("tests/fusion/test_sequence_parallel.py::test_a_scale_of_all_tokens_waits_for_the_gather",)),
    Mutant("kernel: a rank dropped", "kernels/allreduce_norm.py", "    h += mine", "    h += mine * 0.0", (ONE_SHOT,)),
    Mutant("kernel: wrong epsilon", "kernels/rows.py", "0) / hidden + eps)", "0) / hidden + eps * 1.1)", (ONE_SHOT,)),
    Mutant("kernel: weight_bias ignored", "kernels/rows.py", "other=0.0).to(tl.float32) + bias", "other=0.0).to(tl.float32)",
           (ONE_SHOT,)),
    Mutant("kernel: wrong scale", "kernels/rows.py", "y * given if INVERT else y / given", "y * given", (ONE_SHOT,)),
    Mutant("kernel: wrong group", "kernels/rows.py", "group = base // GROUP + tl.arange(0, GROUPS)",
           "group = base // GROUP + GROUPS - 1 - tl.arange(0, GROUPS)", (ONE_SHOT,)),
    Mutant("kernel: a stale slot", "kernels/signal.py", "tl.store(ptr + s * stride + w, EMPTY, mask=active)",
           "tl.store(ptr + s * stride + w, words[w], mask=active)", (ONE_SHOT, TWO_SHOT)),
    Mutant("kernel: an early read", "kernels/signal.py", "(missing > 0) & (polls < limit):", "(missing > 0) & (polls < 1):",
           (TWO_SHOT,)),
    Mutant("kernel: a slot for all calls", "kernels/cuda/signals.cuh", "slot ^ 1", "slot", (f"{ON_CPU}::test_one_shot[8]",)),
    Mutant("kernel: own part summed twice", "kernels/cuda/reduce.cu", "(p < RANK ? p : p + 1)", "p",
           (f"{ON_CPU}::test_sum_of_partial_rows[3]",)),
    Mutant("kernel: rows of another rank", "kernels/cuda/sharded.cu", "row = row_of(rank, index), origin",
           "row = row_of(rank ^ 1, index), origin", (f"{ON_CPU}::test_sharded",)),
    Mutant("memory freed under a copy", "kernels/product_scatter.py", "        every.append(made)\n", "",
           ("tests/kernels/test_products.py::test_scatter[7-40-8]",)),
    Mutant("sum before the copies", "kernels/product_scatter.py", "    main.wait_event(sent)\n", "",
           (f"{PRODUCTS}[scatter-turns-3]",)),
    Mutant("copies before all have read", "kernels/product_scatter.py", "arrive.wait_done(region, call.operator)", "pass",
           (f"{PRODUCTS}[scatter-turns-8]",)),
    Mutant("call counted before its copies", "kernels/product_gather.py", "    main.wait_event(sent)\n", "",
           (f"{PRODUCTS}[gather-turns-3]",)),
    Mutant("read before the products", "kernels/product_gather.py", "    main.wait_event(multiplied)\n", "",
           (f"{PRODUCTS}[gather-turns-3]",)),
    Mutant("captured channels given back", "kernels/workspace.py", "if not known.captured:", "if True:",
           ("tests/kernels/test_workspace.py::test_a_captured_graph_survives_that_its_workspace_is_enlarged",)),
    Mutant("kernel: one sequence's rows for all", "kernels/attention.py", "batch * tokens + token, live", "token, live",
           ("tests/kernels/test_attention.py::test_every_scheme_and_width",)),
    Mutant("artifact of other ranks", "runtime/dispatch.py", "{sources('ir')} {worlds}", "{sources('ir')}",
           ("tests/dist/test_tables.py::test_rows_that_ranks_keep_count_together",)),
    Mutant("own rows taken for all", "runtime/symbols.py", "shim.expression(world * ", "shim.expression(",
           ("tests/dist/test_tables.py::test_rows_that_ranks_keep_count_together",)),
    Mutant("config not in the cache key", "runtime/key.py", "repr(config), ", "", (f"{SEAMS}::test_uuid_of_inductor_pass",)),
    Mutant("attention left beside its raised form", "raising/attention.py",
           "if is_call(call, *_NAMES) and not call.users:", "if False:", (f"{LAYER}[llama-all_reduced-fp8_tensor]",)),
    Mutant("bytes gathered as bytes", "raising/collectives.py", "return users if back else []", "return []",
           ("tests/raising/test_collectives.py::test_a_gather_of_bytes[undone]",)),
    Mutant("bytes gathered for others too", "raising/collectives.py", "return users if back else []", "return users",
           ("tests/raising/test_collectives.py::test_a_gather_of_bytes[kept]",)),
    Mutant("outer norm rounds as the inner", "ir/fused.py", "residual, weight2, eps2, weight_bias, rounding2)",
           "residual, weight2, eps2, weight_bias, rounding)",
           ("tests/fusion/test_rules.py::test_the_outer_norm_of_a_sandwich_may_stay_in_fp32",)),
    Mutant("what is kept is quantised", "ir/tails.py", "results[:taken]", "results[-taken:]",
           ("tests/ir/test_operators.py::test_reference_against_float64",)),
    Mutant("a damaged table is found late", "cli/inputs.py", "        read_table(config.table)", "        pass",
           ("tests/cli/test_main.py::test_bad_options_end_before_a_rank_starts",)),
    Mutant("misspelt variables pass", "config.py", "n=1, cutoff=0.75)", "n=1, cutoff=1.0)",
           ("tests/test_config.py::test_a_misspelt_variable_is_not_ignored",)),
    Mutant("embedding shared out", "cli/models.py", '"embedding" in style or "grad" in style', '"grad" in style',
           ("tests/cli/test_models.py::test_a_plan_shares_out_neither_embeddings_nor_gradients[False-llama]",)),
    Mutant("steps timed with the prefills", "measure/serve.py", "firsts[-1].elapsed_time(end)", "start.elapsed_time(end)",
           ("tests/measure/test_serve.py::test_times_add_up",)),
    Mutant("batches that share a cache", "measure/serve.py", "tuple(t[begin:end] for t in cache)",
           "tuple(t[: end - begin] for t in cache)", ("tests/measure/test_serve.py::test_batches_have_rows_of_their_own",)),
]  # fmt: skip

MUTANTS += [
    *(replace(mutant, name=f"fuzzed: {mutant.name}", tests=(FUZZ,)) for mutant in MUTANTS if mutant.name in FUZZED),
    Mutant("fuzzed: rows lie anyhow", "formats/codec.py", "return q.contiguous(), scales", "return q, scales", (FUZZ,)),
]


def run(folder: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass in a copy.  They run in a fork of this process, which has imported torch and nothing of ours."""
    log = folder / "log.txt"
    child = os.fork()
    if child == 0:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.modules.pop("tests", None)
        sys.path[:0] = [str(folder / "src"), str(folder)]
        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--show-capture=no", *tests]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):  # not the tests' word
        raise SystemExit(f"pytest ended with {code}:\n{log.read_text()[-5000:]}")
    return code == 0


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("src", "tests", "tools", "pyproject.toml", "CONTRIBUTING.md"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / part)
        for mutant in chosen:
            text = (ROOT / "src/tpfuse" / mutant.file).read_text()
            if text.count(mutant.old) != 1:
                raise SystemExit(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
        if not run(folder, tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))):
            raise SystemExit(f"the tests fail without a mutant:\n{(folder / 'log.txt').read_text()[-5000:]}")
        for mutant in chosen:
            path = folder / "src/tpfuse" / mutant.file
            text = path.read_text()
            path.write_text(text.replace(mutant.old, mutant.new))
            start = time.monotonic()
            survived = run(folder, mutant.tests)
            path.write_text(text)
            if survived:
                survivors.append(mutant.name)
            verdict, seconds = "SURVIVED" if survived else "killed", time.monotonic() - start
            print(f"{verdict:10}{mutant.name:34}{mutant.file:28}{seconds:6.1f} s", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
