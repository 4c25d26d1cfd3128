// One-shot all-reduce + (bias, alpha, residual) + RMS norm (+ second norm) (+ quantise), in one launch.
//
//     h    = residual + alpha * (sum over ranks of x + bias)
//     norm = h / sqrt(mean(h^2) + eps) * (weight + weight_bias)
//
// Every rank pushes its rows to every peer and reduces all of them itself, in FP32 and in rank order.  The rows
// ahead are on their way while one is worked on, so the link never waits for the arithmetic.

constexpr int PROTOCOL = 0;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) one_shot(const __grid_constant__ Args a) {
    __shared__ float partial[2][WARPS];
    RowReduce reduce = {partial, 0};

    uint4 *own, *peer[PEERS];  // receive buffers; read before the wait, since what comes behind depends on them
    own = buffer_of(a, RANK);
#pragma unroll
    for (int step = 1; step < WORLD; step++) peer[step - 1] = buffer_of(a, (RANK + step) % WORLD);

    wait_for_inputs();
    int sequence;
    const int slot = read_slot(a.state, PROTOCOL, sequence);

    int row = a.first + blockIdx.x;
    uint4 mine[VPT], residual[VPT], weight[VPT], weight2[VPT], bias[VPT];
    bool active[VPT];
#pragma unroll
    for (int k = 0; k < VPT; k++) {
        const int v = threadIdx.x + k * THREADS;
        active[k] = v < a.vectors;
        mine[k] = residual[k] = weight[k] = weight2[k] = bias[k] = make_uint4(0, 0, 0, 0);
        if (active[k]) {
            if (row < a.end) mine[k] = a.x[(i64)row * a.vectors + v];
            if (RESIDUAL && row < a.end) residual[k] = a.residual[(i64)row * a.vectors + v];
            if (WEIGHT) weight[k] = a.weight[v];
            if (WEIGHT2) weight2[k] = a.weight2[v];
            if (BIAS) bias[k] = a.bias[v];
        }
    }
    const float given = GIVEN ? *a.scale : 1.0f;

    own += slot * a.slot_vectors;
#pragma unroll
    for (int step = 1; step < WORLD; step++)
        peer[step - 1] += slot * a.slot_vectors + section_of(RANK, (RANK + step) % WORLD) * a.section;
    auto send = [&](int row, const uint4 (&v)[VPT]) {
#pragma unroll
        for (int p = 0; p < PEERS; p++)
#pragma unroll
            for (int k = 0; k < VPT; k++)
                if (active[k]) push(peer[p] + (i64)(row - a.first) * a.vectors + threadIdx.x + k * THREADS, v[k]);
    };

    if (row < a.end) send(row, mine);
    // An empty call brings no ranks together: it takes no turn.
    const int before = a.end > a.first ? arrive(a.state, PROTOCOL) : -1;

    for (; row < a.end; row += gridDim.x) {
        const int ahead = row + gridDim.x;
        uint4 next[VPT], next_residual[VPT];
        if (ahead < a.end) {
#pragma unroll
            for (int k = 0; k < VPT; k++) {
                const i64 v = (i64)ahead * a.vectors + threadIdx.x + k * THREADS;
                next[k] = active[k] ? a.x[v] : make_uint4(0, 0, 0, 0);
                next_residual[k] = RESIDUAL && active[k] ? a.residual[v] : make_uint4(0, 0, 0, 0);
            }
            send(ahead, next);
        }

        float h[VPT][8];
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            uint4 arrived[PEERS];
#pragma unroll
            for (int p = 0; p < PEERS; p++) arrived[p] = make_uint4(0, 0, 0, 0);
            if (active[k]) receive(arrived, own + (i64)(row - a.first) * a.vectors + threadIdx.x + k * THREADS, a.section, a, sequence, 0);
            sum_of_ranks(h[k], mine[k], arrived, bias[k], a.alpha);
        }
        to_norm(h, residual, weight, weight2, row, active, reduce, a);
        if constexpr (NORM) store_norms(a.norm, row, active, h, a.vectors);
        if constexpr (SCHEME != NO_SCHEME) {
            quantise_row(h, given, reduce, [&](int k, const Quantised &v) {
                const int vector = threadIdx.x + k * THREADS;
                if (!active[k]) return;
                store_values(a.q, row, a.vectors, vector, v);
                store_scale(a.scales, row, a.vectors, vector, a.stride_row, a.stride_group, v.scale, v.code);
            });
        }
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            mine[k] = next[k];
            residual[k] = next_residual[k];
        }
    }
    if (a.end == a.tokens) zero_padding_rows(a.scales, a.tokens, a.vectors);
    advance(a.state, PROTOCOL, before, slot, sequence);
    done();
}
