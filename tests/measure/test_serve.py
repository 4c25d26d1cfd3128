"""Loads: caches are filled batch by batch and read by every step; times add up; only even batches are served."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.measure.test_e2e import TINY
from tpfuse.cli import bench_e2e
from tpfuse.cli.inputs import BadInput
from tpfuse.cli.plots import save_e2e
from tpfuse.measure.e2e import ASYNC, OURS, PLAIN, ROOM, Runner, Variants
from tpfuse.measure.points import AGAIN
from tpfuse.measure.serve import TOTAL, TPOT, TTFT, Load, Served, _rows_of
from tpfuse.measure.stack import Stack
from tpfuse.testing import interpreted

LOADS = [Load(8, 2, 4, 3), Load(6, 1, 2, 5), Load(8, 1, 1, 3)]


def served(rank: int, world: int, name: str) -> list[tuple[Any, Any, Any]]:
    """By load: the caches after its prefills and a step, and what the step gives, plain and by tpfuse; the rows."""
    torch.manual_seed(rank)
    group: Any = dist.group.WORLD
    stack, variants = Stack(TINY[name], 2, world, torch.float32, "cpu"), Variants(group, "", None, 64)
    chosen = PLAIN, OURS
    prefill, decode = ([v for v in own if v.name in chosen] for own in (variants.prefill(), variants.decode(False)))
    pairs = {k: v for k, v in variants.serving().items() if k in chosen}
    runner = Runner(stack, decode, prefill)
    found = []
    with interpreted():
        for load in LOADS:
            it = Served(runner, load, pairs)
            states = {}
            held = [t for cache in it.caches for t in cache]
            for how in chosen:
                for tensor in held:
                    tensor.zero_()
                for run in it.prefills[how]:
                    run(0)
                step = it.steps[how](0)
                states[how] = [t.clone() for t in held], step
            times = {f"{name} {metric}": [1e3 * len(metric)] for name in it.pairs for metric in (TTFT, TPOT, TOTAL)}
            it.times = lambda timer, times=times: times
            found.append((states, it.measure(None, lambda mine: [mine]), len(runner.decode[OURS].report.results)))  # type: ignore
    return found


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("name", ["llama", "mla"])
def test_a_load(ranks: Any, name: str) -> None:
    for states_of_loads in ranks.run(served, name, timeout=240):
        for load, (states, rows, graphs) in zip(LOADS, states_of_loads, strict=True):
            (caches, step), (own_caches, own_step) = states[PLAIN], states[OURS]
            torch.testing.assert_close(own_step, step, rtol=1e-4, atol=1e-5)
            for cache, own in zip(caches, own_caches, strict=True):
                torch.testing.assert_close(own, cache, rtol=1e-4, atol=1e-5)
            assert step.shape == (load.sequences, 256) and all(bool(cache[..., -1, :].any()) for cache in caches)
            assert [row["impl"] for row in rows] == [PLAIN + AGAIN, PLAIN, OURS]
            assert rows[0]["tokens_per_s"] == load.sequences * load.output / 2e3 * 1e6  # "us" has two letters
            assert (rows[0][TTFT], rows[0][TPOT], rows[0]["layers"]) == (7e3, 7e3, 2)
            assert [set(part) for part in rows[2]["operators"]] == [{"all_reduce_add_rms_norm by reference"}] * 2
            assert graphs <= 2  # of decode: one for a sequence alone, one for all other numbers of them and lengths


def test_batches_have_rows_of_their_own() -> None:
    caches: Any = [(torch.arange(6.0).view(6, 1),)]
    assert [part[0][0].flatten().tolist() for part in (_rows_of(caches, 0, 2), _rows_of(caches, 4, 6))] == [[0, 1], [4, 5]]


def test_who_prefills_and_who_decodes() -> None:
    group: Any = SimpleNamespace(group_name="", rank=lambda: 0, size=lambda: 2)
    assert Variants(group, "", None, 8).serving()[ASYNC] == (ASYNC, PLAIN)
    assert list(Variants(group, "nvfp4", None, 8).serving()) == [PLAIN, OURS, ROOM]


class Clock:
    """Events that are a millisecond apart each."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at, Clock.now = Clock.now, Clock.now + 1.0

    def elapsed_time(self, other: Clock) -> float:
        return other.at - self.at


def test_times_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    it, calls = Served.__new__(Served), []
    it.load, it.prefills = Load(8, 2, 4, 11), {"x": [calls.append] * 2}
    timer: Any = SimpleNamespace(align=lambda: None)

    def step() -> None:
        Clock.now += 0.5
        calls.append("step")

    found = it._serve(timer, "x", step)
    assert calls == [0, 0, *["step"] * 10]
    # Prefills end after 1 and 2 ms, ten steps of half a millisecond begin one later.
    assert found == {TTFT: 1.5e3, TPOT: 600.0, TOTAL: 8e3}


def test_loads_and_layers_are_read() -> None:
    assert bench_e2e.loads_of("2048:4:32,512:1:1", 64) == [Load(2048, 4, 32, 64), Load(512, 1, 1, 64)]
    assert bench_e2e.loads_of("", 64) == [] and bench_e2e.layers_of("max") is None and bench_e2e.layers_of("12") == 12
    for text in ("512", "512:0:1", "512:3:4"):
        with pytest.raises(BadInput):
            bench_e2e.loads_of(text, 64)
    for text in ("0", "all", "-1"):
        with pytest.raises(BadInput):
            bench_e2e.layers_of(text)


def test_plots_of_steps_and_loads(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"op": "serve", "shape": "8b", "scheme": scheme, "sequences": n, "tokens": 512, "batch": 1, "layers": 8, "impl": impl,
         TTFT: 1e4, TPOT: 2e3, "tokens_per_s": 500.0}
        for scheme in ("", "fp8_tensor") for n in (1, 8) for impl in (PLAIN, OURS)
    ]  # fmt: skip
    steps = [
        {"op": "prefill", "scheme": "", "hidden": hidden, "tokens": n, "impl": impl, "us": us}
        for hidden in (4096, 8192) for n in (512, 2048) for impl, us in ((PLAIN, 120.0), (ROOM, 100.0), (OURS, 105.0))
        if (n, impl) != (512, OURS)
    ]  # fmt: skip
    document = {"machine": {"count": 2, "gpu": "H100"}, "world": 2, "date": "2026-11-25", "rows": [*steps, *rows]}
    written = save_e2e(document, tmp_path / "e2e.json")
    assert [path.name for path in written] == ["e2e-prefill.png", "e2e-prefill.svg", "e2e-serve.png", "e2e-serve.svg"]
    assert all(path.stat().st_size > 10_000 for path in written)
    assert "% over no collectives" in written[1].read_text() and "tokens a second" in written[3].read_text()
