"""The stacks that end-to-end figures are measured on: what is compared is the same model in each form, and all of it fuses."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from tests.raising.capture import row_scales
from tpfuse import shim
from tpfuse.config import PASSES, Config
from tpfuse.measure.e2e import (
    ASYNC,
    FORCED,
    OURS,
    PLAIN,
    ROOM,
    SHARDED,
    Runner,
    Variant,
    Variants,
    closed,
)  # fmt: skip
from tpfuse.measure.forms import ALONE, all_reduced, sequence_parallel
from tpfuse.measure.linears import OWN
from tpfuse.measure.points import AGAIN
from tpfuse.measure.stack import SHAPES, Latent, Shape, Stack
from tpfuse.testing import interpreted

TINY = {
    "llama": Shape(256, 512, 4, 4, 64),
    "gemma": Shape(256, 512, 4, 4, 64, gemma=True),
    "mla": Shape(256, 512, 4, 4, latent=Latent(128, 128, 48, 16, 64)),
}
LINES = {"llama": "all_reduce_add_rms_norm", "gemma": "all_reduce_rms_norm_add_rms_norm", "mla": "all_reduce_add_rms_norm"}
LAYERS = 2


def outputs(rank, world, name, scheme, dtype):
    """(Outputs by variant and step, counts of the fused operators by variant); the unfused ones are not compiled."""
    torch.manual_seed(rank)
    stack = Stack(TINY[name], LAYERS, world, dtype, "cpu", scheme)
    group = dist.group.WORLD
    form = all_reduced(group)
    ours = Variant(OURS, form, Config(strict=True)), Variant(FORCED, form, Config(strict=True, passes=PASSES))
    runner = Runner(stack, [ours[0]], list(ours))
    found = []
    with interpreted(), torch.no_grad():
        for sequences in (6, 5):  # one graph for both
            runner.decode_steps(sequences, 8)[OURS](0)
        for rows, prompts, cached in ((8, 1, None), (12, 3, None), (6, None, 8)):
            caches = stack.caches(rows, cached) if cached else None
            x = runner.rows(rows)
            plain = {PLAIN: form, ROOM: ALONE, **({} if scheme in OWN else {SHARDED: sequence_parallel(group)})}
            values = {name: stack(x, caches, prompts, how) for name, how in plain.items()}
            for name, call in (runner.decode if cached else runner.prefill).items():
                values[name] = call(x, caches, prompts)
            found.append(values)
    return found, {OURS: runner.prefill[OURS].report.counts(), FORCED: runner.prefill[FORCED].report.counts(),
                   "decode": runner.decode[OURS].report.counts()}  # fmt: skip


def scattered(counts, begin):
    """Products with a scatter behind them, whatever else they are one operator with."""
    return sum(count for op, count in counts.items() if op.startswith(begin))


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("name", TINY)
def test_every_form_is_the_same_model_and_all_of_it_fuses(ranks, name):
    for found, counts in ranks.run(outputs, name, "", torch.float32, timeout=240):
        for values in found:
            assert not torch.allclose(values[ROOM], values[PLAIN], rtol=1e-2)
            for variant in set(values) - {PLAIN, ROOM}:
                torch.testing.assert_close(values[variant], values[PLAIN], rtol=1e-5, atol=1e-5)
        assert counts["decode"] == {LINES[name]: 2 * LAYERS}
        assert counts[OURS] == {LINES[name]: 2 * 2 * LAYERS}  # two sizes, a graph each
        assert scattered(counts[FORCED], "matmul_reduce_scatter") == 2 * 2 * LAYERS
        assert not any(op.startswith("all_reduce") for op in counts[FORCED])


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llama", "fp8_tensor"), pytest.param("mla", "fp8_token", marks=row_scales), ("gemma", "fp8_group128"),
        ("gemma", "fp8_tensor"), ("llama", "nvfp4"),
    ],
)  # fmt: skip
def test_quantised_stacks_fuse_in_every_form(ranks, name, scheme):
    line, latents = LINES[name], 2 * LAYERS if name == "mla" else 0  # of queries, keys and values
    attended = 0 if scheme in ("fp8_token", "fp8_group128") else LAYERS  # a scale that spans heads
    rest = {"act_and_mul_quantize": LAYERS, **({"attention_quantize": attended} if attended else {})}
    shared = {f"{line}_quantize": 2 * LAYERS - 1, line: 1, "rms_norm_quantize": 1 + latents, **rest}
    for found, counts in ranks.run(outputs, name, scheme, torch.bfloat16, timeout=240):
        for values in found:
            wide = {variant: value.double() for variant, value in values.items()}
            error = {v: ((x - wide[PLAIN]).norm() / wide[PLAIN].norm()).item() for v, x in wide.items()}
            assert error.get(SHARDED, 0) == 0 and error[ROOM] > 0.5
            # a bit that turns is 6% of an FP8 value, and half of an FP4 one
            assert max(error[v] for v in values if v != ROOM) < (0.3 if scheme == "nvfp4" else 0.15)
        assert counts[OURS] == {op: 2 * n for op, n in shared.items()}
        assert scattered(counts[FORCED], "scaled_matmul_reduce_scatter") == 2 * 2 * LAYERS
        assert not any(op.startswith("all_reduce") for op in counts[FORCED])


class Seen(Exception):
    """Ends a compile when its graph has been seen."""


def overlapped(rank, world, scheme):
    """How many of each of torch's overlapping operators its own passes put into the graph; they have no bodies on CPU."""
    import torch._inductor.fx_passes.post_grad as post_grad
    from torch._functorch import config as functorch_config
    from torch.distributed import _symmetric_memory

    stack, group, found = Stack(TINY["llama"], LAYERS, world, torch.bfloat16, "cpu", scheme), dist.group.WORLD, Counter()
    runner = Runner(stack, [], [Variant(ASYNC, sequence_parallel(group), options=shim.async_tp(group))])
    real = post_grad.micro_pipeline_tp_pass

    def look(graph):
        real(graph)
        found.update(str(n.target) for n in graph.nodes if "symm_mem" in str(n.target))
        raise Seen

    with (
        shim.inductor_patch({"fx_graph_cache": False}), functorch_config.patch(enable_autograd_cache=False),
        _symmetric_memory._test_mode(), patch("torch.distributed.is_nccl_available", lambda: True),
        patch.object(post_grad, "micro_pipeline_tp_pass", look), pytest.raises(Exception, match="Seen"),
    ):  # fmt: skip
        runner.prefill_steps(8)[ASYNC](0)
    return dict(found)


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("scheme", ["", "fp8_tensor", "fp8_token"])
def test_torch_overlaps_every_collective_of_the_form_that_it_is_given(ranks, scheme):
    kind = "scaled_matmul" if scheme else "matmul"
    want = {f"symm_mem.fused_all_gather_{kind}.default": 2 * LAYERS, f"symm_mem.fused_{kind}_reduce_scatter.default": 2 * LAYERS}
    assert ranks.run(overlapped, scheme, timeout=120) == [want] * 2


def test_what_one_rank_cannot_compile_no_rank_measures():
    def fails(i):
        raise NotImplementedError("no such product\nand more")

    runner = Runner(Stack(TINY["llama"], 1, 1, torch.float32, "cpu"), [], [])
    steps = {PLAIN: lambda i: None, ASYNC: lambda i: None}
    assert runner.working(steps, lambda mine: [mine, ""]) == steps and not runner.notes
    assert list(runner.working(steps, lambda mine: [mine, "it failed"])) == [PLAIN]
    assert list(runner.working({**steps, ASYNC: fails}, lambda mine: [mine, ""])) == [PLAIN]
    assert [n.split("measured: ")[1] for n in runner.notes] == ["it failed", "NotImplementedError: no such product"]


def test_shapes_are_shared_only_by_ranks_that_divide_them():
    assert all(shape.check(world) is None for shape in SHAPES.values() for world in (2, 4, 8))
    assert SHAPES["8b"].check(3) == "intermediate = 14336 is no multiple of 3"


def test_the_room_that_is_closed():
    rows = [{"impl": PLAIN, "us": 100.0}, {"impl": "tpfuse", "us": 70.0}, {"impl": ROOM, "us": 50.0}]
    assert closed(rows) == {"tpfuse": 0.6}


class Counted:
    """Stands for a timer of GPUs: a step takes as many microseconds as its name has letters."""

    def queued(self, impls):
        return {name: [float(len(name))] for name in impls}

    def alternate(self, impls, calls):
        return self.queued(impls)


def measured(rank, world):
    group = dist.group.WORLD
    variants = Variants(group, "", None, 64).prefill(), Variants(group, "", None, 8).decode(False)
    prefill, decode = ([v for v in own if v.config is not None or v.name == PLAIN] for own in variants)
    runner = Runner(Stack(TINY["llama"], LAYERS, world, torch.float32, "cpu"), decode, prefill)

    def share(mine):
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
        return everyone

    with interpreted():
        return runner.measure(Counted(), 16, None, share) + runner.measure(Counted(), 4, 8, share)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_rows_say_what_was_fused_and_how_far_outputs_differ(ranks):
    rows = ranks.run(measured, timeout=120)[0]
    found = {(row["op"], row["impl"]): row for row in rows}
    assert list(found) == [(op, impl) for op, own in (("prefill", (OURS, FORCED)), ("decode", (OURS,)))
                           for impl in (PLAIN + AGAIN, PLAIN, *own)]  # fmt: skip
    assert all(row["us"] == len(row["impl"]) / LAYERS for row in rows)
    assert found["prefill", OURS]["operators"] == {"all_reduce_add_rms_norm by reference": 2 * LAYERS}
    assert scattered(found["prefill", FORCED]["operators"], "matmul_reduce_scatter") == 2 * LAYERS
    assert all(0 < row["difference"] < 1e-5 for (_, impl), row in found.items() if impl in (OURS, FORCED))
