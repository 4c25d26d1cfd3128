// Waits and signals around products whose rows come from other ranks or go to them, and the push of own rows.
//
// The waits are one warp of few registers, which fits a multiprocessor beside a product's block.

extern "C" __global__ void __launch_bounds__(32) wait_done(const __grid_constant__ Args a) {
    wait_for_inputs();
    await_all(a, DONE, call_of(a) - 1);
}

// For the rank `first`.
extern "C" __global__ void __launch_bounds__(32) wait_full(const __grid_constant__ Args a) {
    wait_for_inputs();
    if (threadIdx.x == 0) await(a, a.first, FULL, call_of(a));
}

extern "C" __global__ void __launch_bounds__(32) finish(const __grid_constant__ Args a) {
    wait_for_inputs();
    if (threadIdx.x == 0) end_call(a, call_of(a));
}

// Own rows (`vectors` vectors from x on) and their scales (`scale_words` words from `scales` on) into every rank's region, to
// the vector `base` and the word `outscales` of it; ends when those of all ranks are here.
extern "C" __global__ void __launch_bounds__(256) push_rows(const __grid_constant__ Args a) {
    __shared__ bool last;
    uint4 *to[WORLD];
#pragma unroll
    for (int step = 0; step < WORLD; step++) to[step] = buffer_of(a, (RANK + step) % WORLD);
    wait_for_inputs();
    const u32 call = call_of(a);
    await_all(a, DONE, call - 1);
    __syncthreads();
    const int begin = blockIdx.x * 256 + threadIdx.x, stride = gridDim.x * 256;
    for (i64 i = begin; i < a.vectors; i += stride) {
        const uint4 v = a.x[i];
#pragma unroll
        for (int step = 0; step < WORLD; step++) to[step][a.base + i] = v;
    }
    for (i64 i = begin; i < a.scale_words; i += stride) {
        const u32 v = ((const u32 *)a.scales)[i];
#pragma unroll
        for (int step = 0; step < WORLD; step++) ((u32 *)to[step])[a.outscales + i] = v;
    }
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        last = is_last(a);
        if (last) signal(a, FULL, call);
    }
    __syncthreads();
    if (last) await_all(a, FULL, call);
    done();
}
