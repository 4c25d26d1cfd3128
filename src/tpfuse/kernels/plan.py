"""Launch plans and workspace layouts: pure functions of sizes, without a device."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR_BYTES = 16
MAX_HIDDEN = 16384
MAX_WORLD = 8
SLOTS = 2
ALIGNMENT = 128
# Registers a thread may take.  At 64, THREADS_PER_SM threads fit an SM whatever the kernel: what a grid relies on when
# its blocks wait for one another.
MAX_REGISTERS = 64
THREADS_PER_SM = 65536 // MAX_REGISTERS
# The largest message of the one-shot, over all peers together, and of one launch of the two-shot.
ONE_SHOT_BYTES = 32 << 20
TWO_SHOT_BYTES = 32 << 20
# The largest region of the rows next to products: longer calls go in several turns.
REGION_BYTES = 512 << 20
REGION_HEAD = 4096  # its flags (cuda/flags.cuh)
# Where nothing was measured: a message's bytes up to which Triton's one-shot was ahead of CUDA's on two H100s, and bytes to
# the peers up to which more than two ranks send their rows whole (N - 1 copies, one wait) rather than by the two-shot
# (2 (N - 1) / N copies, two waits).
TRITON_LIMIT = 2 << 20
WHOLE_LIMIT = 4 << 20


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def algorithm_of(message: int, world: int) -> str:
    """The kernel for a message of that many bytes where no table says: its name in the registry."""
    if message <= TRITON_LIMIT and message * (world - 1) <= WHOLE_LIMIT:
        return "triton:one_shot"
    return "cuda:one_shot" if world == 2 or message * (world - 1) <= WHOLE_LIMIT else "triton:two_shot"


def align(size: int, multiple: int = ALIGNMENT) -> int:
    return ceil_div(size, multiple) * multiple


@dataclass(frozen=True)
class RowPlan:
    """How a block holds one row: `vectors` 16-byte vectors (a power of two, covering the row), `warps` warps."""

    vectors: int
    block: int  # columns: vectors * 16 / itemsize
    warps: int

    @staticmethod
    def of(hidden: int, itemsize: int) -> RowPlan:
        """One vector a thread where 1024 threads suffice.  At least 512 columns, so that every group layout fits."""
        per_vector = VECTOR_BYTES // itemsize
        vectors = 1 << (max(ceil_div(hidden, per_vector), 512 // per_vector) - 1).bit_length()
        return RowPlan(vectors, vectors * per_vector, min(32, max(1, vectors // 32)))


def resident_blocks(sms: int, warps: int) -> int:
    """Blocks of `warps` warps that are certainly resident at once on so many multiprocessors."""
    return max(1, sms * max(1, THREADS_PER_SM // (32 * warps)))


@dataclass(frozen=True)
class ChannelLayout:
    """Where things lie in a rank's receive buffer of one channel.  Sizes and offsets in bytes.

    One-shot: two slots of `world - 1` sections of `one_shot` bytes, one per peer in rank order.
    Two-shot: two slots, each of `world - 1` sections of `inbox` bytes (the peers' partial rows of this rank's shard)
    and an outbox of `outbox` bytes (the finished rows of all ranks) with `scales` bytes for their scales.
    """

    world: int
    one_shot: int
    inbox: int
    outbox: int
    scales: int

    @staticmethod
    def of(world: int, max_tokens: int, hidden: int, itemsize: int) -> ChannelLayout:
        """Room for messages of up to `max_tokens` rows; longer ones go in several launches."""
        if not 2 <= world <= MAX_WORLD:
            raise ValueError(f"world size {world}: 2 to {MAX_WORLD} are supported")
        if min(max_tokens, hidden, itemsize) < 1:
            raise ValueError(f"{max_tokens} tokens of {hidden} x {itemsize} bytes: all must be positive")
        row = align(hidden * itemsize, VECTOR_BYTES)
        one_shot_rows = max(1, min(max_tokens, ONE_SHOT_BYTES // (world - 1) // row))
        shard = max(1, ceil_div(min(max_tokens, TWO_SHOT_BYTES // row), world))
        scales = align(ceil_div(hidden, 64) * 4, VECTOR_BYTES)  # FP32 per group of 64; NVFP4's are a quarter of a byte
        return ChannelLayout(
            world, align(one_shot_rows * row), align(shard * row), align(shard * world * row),
            align(shard * world * scales),
        )  # fmt: skip

    @property
    def one_shot_slot(self) -> int:
        return (self.world - 1) * self.one_shot

    @property
    def two_shot_offset(self) -> int:
        return SLOTS * self.one_shot_slot

    @property
    def outbox_offset(self) -> int:
        """Of the outbox within a two-shot slot."""
        return (self.world - 1) * self.inbox

    @property
    def scales_offset(self) -> int:
        return self.outbox_offset + self.outbox

    @property
    def two_shot_slot(self) -> int:
        return self.scales_offset + self.scales

    @property
    def total(self) -> int:
        return self.two_shot_offset + SLOTS * self.two_shot_slot

    def one_shot_rows(self, row_bytes: int) -> int:
        """Rows of one one-shot launch; 0 where not even one fits."""
        return self.one_shot // row_bytes

    def two_shot_rows(self, row_bytes: int) -> int:
        """Rows of one two-shot launch; 0 where not even one a rank fits."""
        return min(self.inbox // row_bytes * self.world, self.outbox // row_bytes)


@dataclass(frozen=True)
class RegionLayout:
    """Where rows that come from other ranks lie in a rank's region.  Sizes and offsets in bytes; the flags come first.

    Of a reduce-scatter: `world` sections of `part` bytes, one for each rank's partial rows of this rank's share.  Of a gather:
    the rows of all ranks one after another, then, `scales_offset` on, their scales likewise.
    """

    world: int
    part: int
    scales: int

    @staticmethod
    def of(world: int, max_tokens: int, hidden: int, itemsize: int, with_scales: bool) -> RegionLayout:
        """Room for calls of up to `max_tokens` rows, of all ranks together.  Scales may take a byte for 8 columns, and 16."""
        row, scales = align(hidden * itemsize, VECTOR_BYTES), align(ceil_div(hidden, 8), VECTOR_BYTES) + 16
        share = max(1, min(ceil_div(max_tokens, world), REGION_BYTES // world // row))
        return RegionLayout(world, align(share * row), align(share * scales) if with_scales else 0)

    @property
    def scales_offset(self) -> int:
        return REGION_HEAD + self.world * self.part

    @property
    def total(self) -> int:
        return self.scales_offset + self.world * self.scales

    def rows(self, row_bytes: int, scale_bytes: int = 0) -> int:
        """Rows of a rank in one turn; 0 where not even one fits."""
        rows = self.part // row_bytes
        return min(rows, self.scales // scale_bytes) if scale_bytes else rows


def share_of(rank: int, share: int, tokens: int, first: int, end: int) -> tuple[int, int]:
    """Rows `first` to `end` of a rank's share among all `tokens` rows, `share` a rank: the last ranks have fewer, or none."""
    return min(tokens, rank * share + first), min(tokens, rank * share + end)


def turns(share: int, rows: int) -> list[tuple[int, int]]:
    """A share in turns of at most `rows` rows: [first, end) of each."""
    return [(first, min(share, first + rows)) for first in range(0, share, rows)]
