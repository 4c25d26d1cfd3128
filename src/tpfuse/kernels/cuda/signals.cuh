// How kernels of different ranks meet: bounded waits, and 16-byte vectors that say of themselves whether they have arrived.
// No header is included, so that the run-time compiler needs no include path.
//
// Compile-time: WORLD, RANK.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr u32 EMPTY = 0x80008000u;  // two bf16 -0.0: "has not arrived"
constexpr int PEERS = WORLD - 1;

// Words of a channel's state; see signal.py.
struct State {
    int slot, sequence, unused0, unused1;
    int arrivals, unused2, unused3, unused4;
};
constexpr int RECORD = 24, TIMEOUT = 26, CLAIM = 28;

struct Args {
    const uint4 *x, *residual;
    const uint4 *bias, *weight, *weight2;
    const float *scale;
    void *norm, *own_norm;
    uint4 *reduced;
    void *q, *scales;
    const i64 *table;
    int *state;
    i64 section, slot_vectors, base, outbox, outscales;  // in vectors: see plan.ChannelLayout
    i64 stride_row, stride_group;
    int first, end, tokens, share, scale_words, vectors, operation;
    float alpha, eps, eps2, weight_bias;
};

__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void done() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ u32 sent(u32 word) { return word == EMPTY ? 0u : word; }

// Vectors of 16, 8 and 4 bytes.
__device__ __forceinline__ void push(uint4 *where, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(where), "r"(sent(v.x)), "r"(sent(v.y)),
                 "r"(sent(v.z)), "r"(sent(v.w))
                 : "memory");
}
__device__ __forceinline__ void push(uint2 *where, uint2 v) {
    asm volatile("st.relaxed.sys.global.v2.b32 [%0], {%1, %2};" ::"l"(where), "r"(sent(v.x)), "r"(sent(v.y)) : "memory");
}
__device__ __forceinline__ void push(u32 *where, u32 v) {
    asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(where), "r"(sent(v)) : "memory");
}

__device__ __forceinline__ void look(const uint4 *where, uint4 &v) {
    asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(where) : "memory");
}
__device__ __forceinline__ void look(const uint2 *where, uint2 &v) {
    asm volatile("ld.relaxed.sys.global.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(where) : "memory");
}
__device__ __forceinline__ void look(const u32 *where, u32 &v) {
    asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(v) : "l"(where) : "memory");
}

__device__ __forceinline__ void empty(uint4 *where) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %1, %1, %1};" ::"l"(where), "r"(EMPTY) : "memory");
}
__device__ __forceinline__ void empty(uint2 *where) {
    asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %1};" ::"l"(where), "r"(EMPTY) : "memory");
}
__device__ __forceinline__ void empty(u32 *where) { asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(where), "r"(EMPTY) : "memory"); }

__device__ __forceinline__ bool is_missing(uint4 v) { return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY; }
__device__ __forceinline__ bool is_missing(uint2 v) { return v.x == EMPTY || v.y == EMPTY; }
__device__ __forceinline__ bool is_missing(u32 v) { return v == EMPTY; }

__device__ __forceinline__ int read_slot(const int *state, int protocol, int &sequence) {
    int slot;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(slot), "=r"(sequence) : "l"(state + 8 * protocol) : "memory");
    return slot;
}

// Counts this block in, once all its threads have read the state → how many came before (thread 0).  What comes of that
// is read late, by `advance`: nobody should wait for the answer.
__device__ __forceinline__ int arrive(int *state, int protocol) {
    __syncthreads();
    return threadIdx.x == 0 ? atomicAdd(&((State *)(state + 8 * protocol))->arrivals, 1) : -1;
}

// The last block of the grid to arrive gives the next call the other slot.
__device__ __forceinline__ void advance(int *state, int protocol, int before, int slot, int sequence) {
    if (before == (int)gridDim.x - 1) {
        State *block = (State *)(state + 8 * protocol);
        block->slot = slot ^ 1;
        block->sequence = sequence + 1;
        block->arrivals = 0;
    }
}

// A wait that lasts too long leaves a record and traps: it never falls through into a result.
__device__ __noinline__ void give_up(int *state, int operation, int sequence, int rank, int section) {
    if (atomicExch(&state[CLAIM], 1) == 0) {
        volatile int *record = *(int *volatile *)&state[RECORD];
        record[1] = operation;
        record[2] = sequence;
        record[3] = rank;
        record[4] = section;
        asm volatile("fence.acq_rel.sys;" ::: "memory");
        record[0] = 1;
        asm volatile("fence.acq_rel.sys;" ::: "memory");
        asm volatile("trap;");
    }
    for (;;) __nanosleep(1000);  // the thread with the record ends the grid
}

struct Patience {
    u32 polls = 0;
    u64 start = 0;
    // Whether the wait has lasted too long; reads the clock every 1024 polls.
    __device__ __forceinline__ bool ran_out(const int *state) {
        if (++polls & 1023) return false;
        u64 now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (start == 0) start = now;
        return now - start >= *(const volatile u64 *)&state[TIMEOUT];
    }
};

// Wait for COUNT vectors, `stride` apart, then leave them EMPTY for the call after next.  origin: the section that the first
// one comes from, the others from those behind it.
template <typename Vector, int COUNT>
__device__ __forceinline__ void receive(Vector (&v)[COUNT], Vector *where, i64 stride, const Args &a, int sequence, int origin) {
    Patience patience;
    for (;;) {
        bool missing = false;
#pragma unroll
        for (int i = 0; i < COUNT; i++) look(where + i * stride, v[i]);
#pragma unroll
        for (int i = 0; i < COUNT; i++) missing |= is_missing(v[i]);
        if (!missing) break;
        if (patience.ran_out(a.state)) {
            int section = 0;
#pragma unroll
            for (int i = COUNT - 1; i >= 0; i--)
                if (is_missing(v[i])) section = i;
            give_up(a.state, a.operation, sequence, RANK, origin + section);
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) empty(where + i * stride);
}

// The receive buffer of a rank, as this one maps it.
__device__ __forceinline__ uint4 *buffer_of(const Args &a, int rank) { return (uint4 *)a.table[rank]; }

// The section of `destination`'s buffer that `source` writes: peers in rank order, without oneself.
__device__ __forceinline__ constexpr int section_of(int source, int destination) { return source > destination ? source - 1 : source; }
