// Flags at the head of a region (plan.RegionLayout): a word for each rank of each kind, and in it the number of a call.
//
// FULL: all that the rank has to write here for that call is here.  DONE: the rank has read all that was written to it.
// Numbers only grow, and are compared by their difference, so that they may wrap and nothing is reset between calls.  The
// number of the present call, from 1, lies in the region's state and is advanced by the call's last kernel: captured graphs
// replay in any order.

constexpr int FULL = 0, DONE = 32;  // in words: a cache line each

__device__ __forceinline__ u32 call_of(const Args &a) {
    u32 call;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(call) : "l"(&((State *)a.state)->sequence) : "memory");
    return call;
}

// To all peers, by one thread, of everything that happened before.
__device__ __forceinline__ void signal(const Args &a, int kind, u32 call) {
    asm volatile("fence.acq_rel.sys;" ::: "memory");
#pragma unroll
    for (int step = 1; step < WORLD; step++) {
        int *flag = (int *)buffer_of(a, (RANK + step) % WORLD) + kind + RANK;
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(call) : "memory");
    }
}

__device__ __forceinline__ void await(const Args &a, int rank, int kind, u32 call) {
    const int *flag = (const int *)buffer_of(a, RANK) + kind + rank;
    Patience patience;
    for (;;) {
        u32 seen;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if ((int)(seen - call) >= 0) return;
        if (patience.ran_out(a.state)) give_up(a.state, a.operation, call_of(a) - 1, RANK, section_of(rank, RANK));
    }
}

// By the threads of a block, a peer each.
__device__ __forceinline__ void await_all(const Args &a, int kind, u32 call) {
    if (threadIdx.x < WORLD && threadIdx.x != RANK) await(a, threadIdx.x, kind, call);
}

// Whether this block is the grid's last one to come here, by thread 0.  What the others did before is visible to it.
__device__ __forceinline__ bool is_last(const Args &a) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&((State *)a.state)->arrivals) : "memory");
    if (before != (int)gridDim.x - 1) return false;
    ((State *)a.state)->arrivals = 0;
    return true;
}

// The end of a call, by one thread: this rank has read everything.
__device__ __forceinline__ void end_call(const Args &a, u32 call) {
    signal(a, DONE, call);
    ((State *)a.state)->sequence = call + 1;
}
