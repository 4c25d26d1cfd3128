"""What the compiler must know of the machine and of the token counts: two small frozen types, no detection at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNBOUNDED = 2**31 - 1  # the end of a range without one


@dataclass(frozen=True, order=True)
class Range:
    """Token counts `start` … `end`, both inclusive.

    `str` gives "1..256", "257.." where there is no upper bound, "7" for a single size.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.end:
            raise ValueError(f"a range needs 1 <= start <= end, got [{self.start}, {self.end}]")

    def __contains__(self, tokens: int) -> bool:
        return self.start <= tokens <= self.end

    def bytes(self, row: int) -> tuple[int, int | None]:
        """The same range in bytes, for tokens of `row` bytes; None for no upper bound."""
        return self.start * row, None if self.end == UNBOUNDED else self.end * row

    def __str__(self) -> str:
        return str(self.start) if self.start == self.end else f"{self.start}..{'' if self.end == UNBOUNDED else self.end}"


@dataclass(frozen=True)
class Target:
    """Hardware facts that kernels ask for.  Built by hand in tests, by `tpfuse.runtime.detect` at run time.

    device: "cpu" or "cuda".  sm: compute capability as an integer (90 for 9.0), 0 on CPU.  world: ranks of the group.
    peer_access: every rank can map every other rank's memory.
    backends: the usable kernel back ends ("reference", "triton", "torch", "nccl", "flashinfer", …).
    versions: of each back end that has one, for example {"flashinfer": "0.6.12"}.
    """

    device: str
    sm: int = 0
    world: int = 1
    peer_access: bool = False
    backends: frozenset[str] = frozenset({"reference"})
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def family(self) -> int:
        """The capability family: 90 for sm_90, 100 for sm_100 and sm_103."""
        return self.sm // 10 * 10
