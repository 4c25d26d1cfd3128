// The sum of partial rows that lie in this rank's region, a section for each rank, + (bias, alpha, residual) + RMS norm (+ second
// norm) (+ quantise): what follows the products of a reduce-scatter, in one launch.
//
// Rank r owns the `share` rows from r * share on, of the residual too; its rows `first` to `end` lie in the sections, from the
// vector `base` on and `section` vectors apart.  Rows past the last one count as zeros.

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) reduce(const __grid_constant__ Args a) {
    __shared__ float partial[2][WARPS];
    RowReduce over_row = {partial, 0};
    const uint4 *parts = buffer_of(a, RANK) + a.base;

    wait_for_inputs();
    const u32 call = call_of(a);
    if (blockIdx.x == 0 && threadIdx.x == 0) signal(a, FULL, call);  // the products are the kernels before this one

    uint4 weight[VPT], weight2[VPT], bias[VPT];
    bool active[VPT];
#pragma unroll
    for (int k = 0; k < VPT; k++) {
        const int v = threadIdx.x + k * THREADS;
        active[k] = v < a.vectors;
        weight[k] = weight2[k] = bias[k] = make_uint4(0, 0, 0, 0);
        if (active[k]) {
            if (WEIGHT) weight[k] = a.weight[v];
            if (WEIGHT2) weight2[k] = a.weight2[v];
            if (BIAS) bias[k] = a.bias[v];
        }
    }
    const float given = GIVEN ? *a.scale : 1.0f;

    await_all(a, FULL, call);
    __syncthreads();
    for (int index = a.first + blockIdx.x; index < a.end; index += gridDim.x) {
        const bool is_row = RANK * a.share + index < a.tokens;
        uint4 residual[VPT];
        float h[VPT][8];
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            const int v = threadIdx.x + k * THREADS;
            const uint4 *part = parts + (i64)(index - a.first) * a.vectors + v;
            uint4 mine = make_uint4(0, 0, 0, 0), others[PEERS];
#pragma unroll
            for (int p = 0; p < PEERS; p++) others[p] = make_uint4(0, 0, 0, 0);
            if (is_row && active[k]) {
                mine = part[RANK * a.section];
#pragma unroll
                for (int p = 0; p < PEERS; p++) others[p] = part[(p < RANK ? p : p + 1) * a.section];
            }
            residual[k] = RESIDUAL && active[k] ? a.residual[(i64)index * a.vectors + v] : make_uint4(0, 0, 0, 0);
            sum_of_ranks(h[k], mine, others, bias[k], a.alpha);
        }
        to_norm(h, residual, weight, weight2, index, active, over_row, a);
        if constexpr (OWN_NORM) store_norms(a.own_norm, index, active, h, a.vectors);
        if constexpr (SCHEME != NO_SCHEME) {
            quantise_row(h, given, over_row, [&](int k, const Quantised &q) {
                const int v = threadIdx.x + k * THREADS;
                if (!active[k]) return;
                store_values(a.q, index, a.vectors, v, q);
                store_scale(a.scales, index, a.vectors, v, a.stride_row, a.stride_group, q.scale, q.code);
            });
        }
    }
    if (a.end == a.share) zero_padding_rows(a.scales, a.share, a.vectors);
    __syncthreads();
    if (threadIdx.x == 0 && is_last(a)) end_call(a, call);
    done();
}
