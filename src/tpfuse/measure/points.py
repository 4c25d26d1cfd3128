"""What is measured: an operator at one scheme, width and token count, what bounds it, and the loop over such points."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tpfuse.ir import Op, registry
from tpfuse.measure.timing import slowest, summary

NVLINK = 380e9  # bytes a second in one direction between two H100s, attainable
AGAIN = " (A/A)"  # a second graph of an implementation: the difference is the noise
ALONE = "gemm_alone"  # a product without its collective
LAYOUTS = {"nvfp4": "linear"}  # "row" for the others

Impls = Mapping[str, Callable[[int], Any]]


def memory_bandwidth() -> float:
    """Bytes a second that this GPU's memory can move, by its clock and width; without a GPU an H100 SXM's, of its datasheet."""
    if not torch.cuda.is_available():
        return 3.35e12
    from triton import testing

    return testing.get_dram_gbps() * 1e9


@dataclass(frozen=True)
class Point:
    """scheme: "" for none.  residual: whether one is added.  dtype: "bfloat16", "float16"."""

    scheme: str
    hidden: int
    tokens: int
    dtype: str = "bfloat16"
    residual: bool = True

    @property
    def op(self) -> Op:
        return registry[f"all_reduce_{'add_' * self.residual}rms_norm{'_quantize' * bool(self.scheme)}"]

    @property
    def layout(self) -> str:
        return LAYOUTS.get(self.scheme, "row")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def message(self) -> int:
        """Bytes of the rows that meet in the collective."""
        return self.tokens * self.hidden * self.torch_dtype.itemsize

    @property
    def calls(self) -> int:
        """Calls in a graph: many of short ones, whose start would show otherwise."""
        return 24 if self.message <= 4 << 20 else 8

    def limit_us(self, world: int) -> float:
        """The larger of what each rank must send by the best algorithm over NVLink and read and write in its memory."""
        written = 2.0 if not self.scheme else 1.0 + (0.53 if self.scheme == "nvfp4" else 1.0) / self.torch_dtype.itemsize
        moved = (1 + self.residual + written) * self.message
        return max(2 * (world - 1) / world * self.message / NVLINK, moved / memory_bandwidth()) * 1e6

    def rows(self, samples: Mapping[str, list[float]], world: int, picked: str | None) -> list[dict[str, Any]]:
        """Of a result file, one an implementation.  picked: the one that lowering would pick."""
        return [
            {"op": self.op.name, "scheme": self.scheme, "dtype": self.dtype, "tokens": self.tokens, "hidden": self.hidden,
             "world": world, "impl": impl, **({"picked": True} if impl == picked else {}), **summary(values),
             "limit_us": self.limit_us(world), "samples": values}
            for impl, values in samples.items()
        ]  # fmt: skip


class Measured(Protocol):
    """What a sweep goes through: calls of a graph, and the rows of a result file that samples make."""

    @property
    def calls(self) -> int: ...

    def rows(self, samples: Mapping[str, list[float]], world: int, picked: str | None) -> list[dict[str, Any]]: ...


def grid(
    schemes: Iterable[str], hidden: Iterable[int], tokens: Iterable[int], dtype: str = "bfloat16", residual: bool = True
) -> list[Point]:
    """Every combination, the tokens innermost: what is compiled for a scheme and a width serves all of them."""
    return [Point(s, h, t, dtype, residual) for s, h, t in itertools.product(schemes, hidden, tokens)]


@dataclass
class Sweep:
    """How points are measured; all ranks run the same one.

    build: the implementations of a point.  measure: microseconds a call of it, by implementation (`Timer.alternate`).
    share: what every rank gives, by rank.  limit_s: no point begins later than this after `start` (rank 0's clock); None for no
    limit.  tell: called with every point's rows.
    """

    world: int
    build: Callable[[Any], Impls]
    measure: Callable[[Impls, Any], dict[str, list[float]]]
    share: Callable[[Any], list[Any]]
    limit_s: float | None = None
    tell: Callable[[Any, list[dict[str, Any]]], None] = lambda point, rows: None
    clock: Callable[[], float] = time.monotonic
    start: float = field(default_factory=time.monotonic)

    def run(self, points: Sequence[Measured], picked: Callable[[Any], str | None] = lambda point: None) -> list[dict[str, Any]]:
        """Rows of a result file, a point's together.  picked: the implementation that lowering would pick."""
        found: list[dict[str, Any]] = []
        for point in points:
            if self.limit_s is not None and self.share(self.clock() - self.start)[0] > self.limit_s:
                break
            samples = slowest(self.share(self.measure(self.build(point), point)))
            rows = point.rows(samples, self.world, picked(point))
            self.tell(point, rows)
            found += rows
        return found
