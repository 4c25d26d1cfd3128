// One-shot all-reduce + (bias, alpha, residual) + RMS norm (+ second norm) (+ quantise), in one launch.
//
//     h    = residual + alpha * (sum over ranks of x + bias)
//     norm = h / sqrt(mean(h^2) + eps) * (weight + weight_bias)
//
// Every rank pushes its rows to every peer and reduces all of them itself, in FP32 and in rank order.  A cluster of
// blocks takes a row; the rows ahead are on their way while one is worked on, so the link never waits for the arithmetic.
//
// Flags: RESIDUAL BIAS ALPHA WEIGHT WEIGHT2 SANDWICH NORM NORM_F32 REDUCED GIVEN SCHEME GROUP (0: the row) INVERT FLOOR LOW
// HIGH POW2 PACKED TILE.

constexpr int PROTOCOL = 0;
constexpr int SPAN = THREADS * CLUSTER;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) one_shot(const __grid_constant__ Args a) {
    __shared__ float partial[2][WARPS * CLUSTER];
    RowReduce reduce = {partial, 0};
    const int block = CLUSTER > 1 ? cluster_rank() : 0;
    const int lane = block * THREADS + threadIdx.x;
    const int stride = gridDim.x / CLUSTER;
    if constexpr (CLUSTER > 1) cluster_arrive();

    const float hidden = 8.0f * a.vectors;

    wait_for_inputs();
    int sequence;
    const int slot = read_slot(a.state, PROTOCOL, sequence);

    int row = a.first + blockIdx.x / CLUSTER;
    uint4 mine[VPT], next[VPT], weight[VPT], weight2[VPT], bias[VPT];
    bool active[VPT];
#pragma unroll
    for (int k = 0; k < VPT; k++) {
        const int v = lane + k * SPAN;
        active[k] = v < a.vectors;
        mine[k] = next[k] = weight[k] = weight2[k] = bias[k] = make_uint4(0, 0, 0, 0);
        if (active[k]) {
            if (row < a.end) mine[k] = a.x[(i64)row * a.vectors + v];
            if (WEIGHT) weight[k] = a.weight[v];
            if (WEIGHT2) weight2[k] = a.weight2[v];
            if (BIAS) bias[k] = a.bias[v];
        }
    }
    const float given = GIVEN ? *a.scale : 1.0f;

    auto send = [&](int row, const uint4 (&v)[VPT]) {
#pragma unroll
        for (int step = 1; step < WORLD; step++) {
            const int peer = (a.rank + step) % WORLD;
            uint4 *there = buffer_of(a, peer) + slot * a.slot_vectors + section_of(a.rank, peer) * a.section + (i64)(row - a.first) * a.vectors;
#pragma unroll
            for (int k = 0; k < VPT; k++)
                if (active[k]) push(there + lane + k * SPAN, v[k]);
        }
    };
    uint4 *own = buffer_of(a, a.rank) + slot * a.slot_vectors;

    if (row < a.end) send(row, mine);
    if (a.end > a.first) arrive(a.state, PROTOCOL, slot, sequence);  // an empty call brings no ranks together: it takes no turn
    if constexpr (CLUSTER > 1) cluster_wait();  // the others have begun: their shared memory may be written

    for (; row < a.end; row += stride) {
        const int ahead = row + stride;
        uint4 residual[VPT];
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            const int v = lane + k * SPAN;
            if (ahead < a.end && active[k]) next[k] = a.x[(i64)ahead * a.vectors + v];
            residual[k] = make_uint4(0, 0, 0, 0);
            if (RESIDUAL && active[k]) residual[k] = a.residual[(i64)row * a.vectors + v];
        }
        if (ahead < a.end) send(ahead, next);

        float h[VPT][8];
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            uint4 arrived[PEERS];
#pragma unroll
            for (int p = 0; p < PEERS; p++) arrived[p] = make_uint4(0, 0, 0, 0);
            if (active[k]) receive(arrived, own + (i64)(row - a.first) * a.vectors + lane + k * SPAN, a.section, a, sequence, 0);
            float part[8];
#pragma unroll
            for (int i = 0; i < 8; i++) h[k][i] = 0.0f;
#pragma unroll
            for (int r = 0; r < WORLD; r++) {
                uint4 words = mine[k];
#pragma unroll
                for (int p = 0; p < PEERS; p++)
                    if (r != a.rank && section_of(r, a.rank) == p) words = arrived[p];
                widen(words, part);
#pragma unroll
                for (int i = 0; i < 8; i++) h[k][i] += part[i];
            }
            if (BIAS) {
                widen(bias[k], part);
#pragma unroll
                for (int i = 0; i < 8; i++) h[k][i] += part[i];
            }
            if (ALPHA) {
#pragma unroll
                for (int i = 0; i < 8; i++) h[k][i] *= a.alpha;
            }
            mine[k] = next[k];
        }
        finish(h, residual, weight, weight2, row, lane, active, given, hidden, reduce, a);
    }
    if (a.end == a.tokens) zero_padding_rows(a.scales, a.tokens, a.vectors);
    done();
}
