"""Signals between GPUs: data that says of itself whether it has arrived, and bounded waits.

There are no flags.  Receive slots are full of `EMPTY` words (two bf16 -0.0), a sender overwrites them with 16-byte
vectors in which no word is `EMPTY` (such a word becomes two +0.0: the sign of a zero is the one thing that is lost),
and a receiver polls the words that it needs, in its own memory, until none is `EMPTY` (Lamport's trick, as the fastest
all-reduce kernels use it), and leaves them `EMPTY`.  Two slots take turns: while a rank empties one, a fast peer may
write the other; it writes the first again only after it has seen this rank's next call, so after the emptying.  A wait
that lasts longer than the channel's time-out writes one record to pinned host memory and traps: it never falls through
into a result.

Device functions take `ASM`: with it, vectors move by inline assembly; without it (Triton's interpreter on CPU tensors)
by ordinary loads and stores, the arithmetic around them being the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

EMPTY = tl.constexpr(-2147450880)  # 0x80008000
# Words of a channel's state (int32, in device memory, so that graph replay finds them as they are).  Each protocol has
# a block: slot, sequence number, two unused, arrivals.
PROTOCOL_WORDS = tl.constexpr(8)
RECORD_WORD = tl.constexpr(24)  # two words: address of the error record
TIMEOUT_WORD = tl.constexpr(26)  # two words: nanoseconds (in the interpreter: polls)
CLAIM_WORD = tl.constexpr(28)  # the first thread that gives up takes it and writes the record
STATE_WORDS = 32
RECORD_WORDS = 8

# Operators as numbers, for the record that a kernel leaves when it gives up.
OPERATORS = (
    "all_reduce_rms_norm",
    "all_reduce_add_rms_norm",
    "all_reduce_rms_norm_quantize",
    "all_reduce_add_rms_norm_quantize",
    "all_reduce_rms_norm_add_rms_norm",
    "all_reduce_rms_norm_add_rms_norm_quantize",
    *(
        f"reduce_scatter_{norm}{quantize}{gather}"
        for norm in ("rms_norm", "add_rms_norm", "rms_norm_add_rms_norm") for quantize in ("", "_quantize")
        for gather in ("", "_all_gather")
    ),
    *(
        f"{product}_reduce_scatter{norm}"
        for product in ("matmul", "scaled_matmul")
        for norm in ("", *(f"_{n}{q}" for n in ("rms_norm", "add_rms_norm", "rms_norm_add_rms_norm") for q in ("", "_quantize")))
    ),
    "all_gather_matmul",
    "all_gather_scaled_matmul",
)  # fmt: skip


@dataclass(frozen=True)
class LostPeer:
    """What a kernel says when its wait ran out."""

    operator: str
    sequence: int  # calls of this protocol on this channel before the one that failed
    rank: int  # who waited; a rank of the group
    missing: int  # for whom

    def __str__(self) -> str:
        return (
            f"{self.operator}: rank {self.rank} waited in vain for rank {self.missing} "
            f"(call {self.sequence} of its channel): the peer has died, has not called the operator, "
            f"has called it with other shapes, or waits for another rank itself"
        )


def read_record(words: list[int]) -> LostPeer | None:
    """Decode an error record (`RECORD_WORDS` int32); None while there is none."""
    if words[0] == 0:
        return None
    _, operator, sequence, rank, section = words[:5]
    return LostPeer(OPERATORS[operator], sequence, rank, section + (section >= rank))


@triton.constexpr_function
def _yield_core():
    """In the interpreter: ranks that wait leave the cores to those that work."""
    import time  # Triton refuses kernels that refer to a module's global function

    time.sleep(1e-4)


@triton.constexpr_function
def _words(count):
    return tuple([tl.int32] * count) if count > 1 else tl.int32


@triton.constexpr_function
def _vector(width, first):
    """The operand list of a load or store of `width` words, starting at operand `first`."""
    names = ", ".join(f"${first + i}" for i in range(width))
    return (f".v{width}.b32", "{" + names + "}") if width > 1 else (".b32", names)


@triton.constexpr_function
def _load_asm(width, order):
    kind, names = _vector(width, 0)
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(width))
    return (
        f"{{ .reg .pred p; setp.ne.s32 p, ${width + 1}, 0; {zeros} "
        f"@p ld{order}.global{kind} {names}, [${width}]; }}"
    )


@triton.constexpr_function
def _store_asm(width, order):
    kind, names = _vector(width, 2)
    return f"{{ .reg .pred p; setp.ne.s32 p, ${2 + width}, 0; @p st{order}.global{kind} [$1], {names}; mov.b32 $0, 0; }}"


@triton.constexpr_function
def _constraints(outputs, inputs):
    return ",".join(["=&r"] * outputs + [inputs])


@triton.constexpr_function
def _poll_asm(sections, width, operator, rank):
    """Poll `sections` vectors of `width` words, a stride apart, until no word is EMPTY.

    Operands after the words: first address, stride in bytes, first peer, active, state address, sequence number.
    Every 1024 polls the clock is read; past the time-out one thread of the grid writes the record and traps, the
    others poll on (a trap of theirs could come before the record is written).
    """
    count = sections * width
    base, stride, first, active, state, sequence = (f"${count + i}" for i in range(6))
    tests, loads, addresses, blame = [], [], [], []
    for s in range(sections):
        kind, names = _vector(width, s * width)
        previous = f"add.s64 a{s}, a{s - 1}, {stride};" if s else f"mov.b64 a{s}, {base};"
        addresses.append(previous)
        loads.append(f"ld.relaxed.sys.global{kind} {names}, [a{s}];")
        for w in range(width):
            joined = ".or" if tests else ""
            tests.append(f"setp.eq{joined}.b32 q, ${s * width + w}, 0x80008000{', q' if joined else ''};")
    for s in reversed(range(sections)):
        for w in range(width):
            blame.append(f"setp.eq.b32 q, ${s * width + w}, 0x80008000; @q mov.u32 t, {s};")
    empty = ", ".join(["t"] * width)
    empty = "{" + empty + "}" if width > 1 else empty
    emptied = [f"st.relaxed.gpu.global{_vector(width, 0)[0]} [a{s}], {empty};" for s in range(sections)]
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    return f"""{{
        .reg .pred q, late; .reg .b32 n, t; .reg .b64 start, now, bound, record; .reg .b64 a<{sections}>;
        {zeros}
        setp.eq.s32 q, {active}, 0;
        @q bra SKIP;
        {" ".join(addresses)}
        mov.u32 n, 0;
        mov.u64 start, 0;
    POLL:
        {" ".join(loads)}
        {" ".join(tests)}
        @!q bra DONE;
        add.u32 n, n, 1;
        and.b32 t, n, 1023;
        setp.ne.u32 q, t, 0;
        @q bra POLL;
        mov.u64 now, %globaltimer;
        setp.eq.u64 q, start, 0;
        @q mov.u64 start, now;
        sub.u64 now, now, start;
        ld.relaxed.gpu.global.u64 bound, [{state} + {4 * TIMEOUT_WORD.value}];
        setp.lt.u64 late, now, bound;
        @late bra POLL;
        mov.u32 t, 0;
        {" ".join(blame)}
        add.u32 t, t, {first};
        atom.relaxed.gpu.global.exch.b32 n, [{state} + {4 * CLAIM_WORD.value}], 1;
        setp.ne.u32 q, n, 0;
        @q bra POLL;
        ld.relaxed.gpu.global.u64 record, [{state} + {4 * RECORD_WORD.value}];
        st.relaxed.sys.global.u32 [record + 4], {operator};
        st.relaxed.sys.global.u32 [record + 8], {sequence};
        st.relaxed.sys.global.u32 [record + 12], {rank};
        st.relaxed.sys.global.u32 [record + 16], t;
        fence.acq_rel.sys;
        st.relaxed.sys.global.u32 [record], 1;
        fence.acq_rel.sys;
        trap;
    DONE:
        mov.b32 t, 0x80008000;
        {" ".join(emptied)}
    SKIP:
    }}"""


# Thread 0 counts its block in; the last block writes what the next call reads.
_ARRIVE_ASM = tl.constexpr("""{
    .reg .pred p, last; .reg .b32 t, n;
    mov.u32 t, %tid.x;
    setp.eq.u32 p, t, 0;
    mov.u32 n, 0xffffffff;
    @p atom.relaxed.gpu.global.add.u32 n, [$1 + 16], 1;
    setp.eq.u32 last, n, $2;
    @last st.relaxed.gpu.global.v2.b32 [$1], {$3, $4};
    @last st.relaxed.gpu.global.b32 [$1 + 16], 0;
    mov.b32 $0, 0;
}""")


@triton.constexpr_function
def section_of(source, destination):
    """The section of `destination`'s buffer that `source` writes: peers in rank order, without oneself."""
    return source - 1 if source > destination else source


@triton.jit
def section_words(words, SECTION: tl.constexpr):
    """The four words of one section in what `poll_words` returned."""
    return words[4 * SECTION], words[4 * SECTION + 1], words[4 * SECTION + 2], words[4 * SECTION + 3]


@triton.jit
def wait_for_inputs(ASM: tl.constexpr):
    """Before the first read of anything that an earlier kernel may have written (programmatic dependent launch)."""
    if ASM:
        tl.extra.cuda.gdc_wait()


@triton.jit
def done(ASM: tl.constexpr):
    """After the last store: kernels that depend on this one may start."""
    if ASM:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_words(ptr, active, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """`WIDTH` int32 words at each address of `ptr` (int32 pointers), zeros where not `active`, as a tuple."""
    if ASM:
        words = tl.inline_asm_elementwise(
            _load_asm(WIDTH, ""), _constraints(WIDTH, "l,r"), [ptr.to(tl.int64), active.to(tl.int32)],
            dtype=_words(WIDTH), is_pure=False, pack=1,
        )  # fmt: skip
        if WIDTH == 1:
            return (words,)
        else:
            return words
    else:
        words = ()
        for w in tl.static_range(WIDTH):
            words = words + (tl.load(ptr + w, mask=active, other=0, volatile=True),)
        return words


@triton.jit
def push_words(ptr, words, active, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """Store words where a peer polls them: no word arrives as EMPTY."""
    clean = ()
    for w in tl.static_range(WIDTH):
        clean = clean + (tl.where(words[w] == EMPTY, 0, words[w]),)
    if ASM:
        if WIDTH == 4:
            tl.inline_asm_elementwise(
                _store_asm(4, ".relaxed.sys"), "=r,l,r,r,r,r,r",
                [ptr.to(tl.int64), clean[0], clean[1], clean[2], clean[3], active.to(tl.int32)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        elif WIDTH == 2:
            tl.inline_asm_elementwise(
                _store_asm(2, ".relaxed.sys"), "=r,l,r,r,r",
                [ptr.to(tl.int64), clean[0], clean[1], active.to(tl.int32)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                _store_asm(1, ".relaxed.sys"), "=r,l,r,r", [ptr.to(tl.int64), clean[0], active.to(tl.int32)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        for w in tl.static_range(WIDTH):
            tl.store(ptr + w, clean[w], mask=active)


@triton.jit
def poll_words(
    ptr, stride, first, active, state, sequence,
    SECTIONS: tl.constexpr, WIDTH: tl.constexpr, OPERATOR: tl.constexpr, RANK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Wait for `WIDTH` words at `ptr`, at `ptr + stride`, ... (`SECTIONS` of them; stride in words): a flat tuple.  The
    words are left EMPTY.

    first: which peer the first section is of, counted without this rank.
    """
    if ASM:
        words = tl.inline_asm_elementwise(
            _poll_asm(SECTIONS, WIDTH, OPERATOR, RANK), _constraints(SECTIONS * WIDTH, "l,l,r,r,l,r"),
            [ptr.to(tl.int64), stride.to(tl.int64) * 4, first, active.to(tl.int32), state.to(tl.int64), sequence],
            dtype=_words(SECTIONS * WIDTH), is_pure=False, pack=1,
        )  # fmt: skip
        if SECTIONS * WIDTH == 1:
            return (words,)
        else:
            return words
    else:
        result = ()
        limit = tl.load(state + TIMEOUT_WORD)
        for s in tl.static_range(SECTIONS):
            polls = 0
            missing = 1
            words = load_words(ptr + s * stride, active, WIDTH, ASM)
            while (missing > 0) & (polls < limit):
                words = load_words(ptr + s * stride, active, WIDTH, ASM)
                missing = 0
                for w in tl.static_range(WIDTH):
                    missing += tl.sum((words[w] == EMPTY).to(tl.int32))
                polls += 1
                _yield_core()
            if missing > 0:
                record = tl.load(state.to(tl.pointer_type(tl.int64)) + RECORD_WORD // 2).to(tl.pointer_type(tl.int32))
                tl.store(record + 1, OPERATOR)
                tl.store(record + 2, sequence)
                tl.store(record + 3, RANK)
                tl.store(record + 4, first + s)
                tl.store(record, 1)
            for w in tl.static_range(WIDTH):
                tl.store(ptr + s * stride + w, EMPTY, mask=active)
            result = result + words
        return result


@triton.jit
def read_state(state, PROTOCOL: tl.constexpr, ASM: tl.constexpr):
    """(slot, sequence number) of a protocol on this channel."""
    block = state + PROTOCOL * PROTOCOL_WORDS
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [block.to(tl.int64)],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(block), tl.load(block + 1)


@triton.jit
def arrive(state, slot, sequence, PROTOCOL: tl.constexpr, ASM: tl.constexpr):
    """Count this block in, after all its threads have read the state; the last one advances the slot."""
    block = state + PROTOCOL * PROTOCOL_WORDS
    last = tl.num_programs(0) - 1
    if ASM:
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            _ARRIVE_ASM, "=r,l,r,r,r", [block.to(tl.int64), last, 1 - slot, sequence + 1],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        if tl.atomic_add(block + 4, 1) == last:
            tl.store(block, 1 - slot)
            tl.store(block + 1, sequence + 1)
            tl.store(block + 4, 0)
