// Reduce-scatter + (bias, alpha, residual) + RMS norm (+ second norm) (+ quantise) (+ all-gather), in one launch.
//
// Rank r owns the `share` rows from r * share on, of the residual too.  Each row goes to its owner, who sums it in FP32 and in
// rank order, adds, norms and quantises, and with GATHER pushes what it made, quantised, to all.  Rows past the last one count
// as zeros.  Own rows `first` to `end` are done; rows ahead are on their way while one is worked on, and the rows that
// others made are fetched one turn later.

constexpr int PROTOCOL = 1;

// How one vector of a finished row travels.
template <int S> struct Carried { typedef uint2 type; };
template <> struct Carried<NO_SCHEME> { typedef uint4 type; };
template <> struct Carried<NVFP4> { typedef u32 type; };
typedef Carried<SCHEME>::type Carry;

__device__ __forceinline__ uint4 carry(const Quantised &v, const float (&y)[8], uint4) { return narrow(y); }
__device__ __forceinline__ uint2 carry(const Quantised &v, const float (&y)[8], uint2) { return make_uint2(v.low, v.high); }
__device__ __forceinline__ u32 carry(const Quantised &v, const float (&y)[8], u32) { return v.low; }

// Words of a row's scales on the way, and which vectors' threads send and fetch one.
constexpr int VECTORS_A_WORD = SCHEME == NVFP4 ? 8 : SCHEME == DYNAMIC && GROUP > 0 ? GROUP / 8 : 1 << 30;
constexpr bool SCALES = SCHEME == NVFP4 || SCHEME == DYNAMIC;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) sharded(const __grid_constant__ Args a) {
    __shared__ float partial[2][WARPS];
    RowReduce reduce = {partial, 0};

    uint4 *own = buffer_of(a, RANK) + a.base, *peer[PEERS];
#pragma unroll
    for (int step = 1; step < WORLD; step++) peer[step - 1] = buffer_of(a, (RANK + step) % WORLD) + a.base;
    const int rows = a.end - a.first;  // of a rank in this launch

    wait_for_inputs();
    int sequence;
    const int slot = read_slot(a.state, PROTOCOL, sequence);
    own += slot * a.slot_vectors;
#pragma unroll
    for (int p = 0; p < PEERS; p++) peer[p] += slot * a.slot_vectors;

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

    auto row_of = [&](int rank, int index) { return rank * a.share + index; };
    auto load = [&](int row, int k) {
        return row < a.tokens && active[k] ? a.x[(i64)row * a.vectors + threadIdx.x + k * THREADS] : make_uint4(0, 0, 0, 0);
    };
    // To each owner its row `index`, and this rank's own → mine.
    auto send = [&](int index, uint4 (&mine)[VPT]) {
        uint4 v[PEERS][VPT];
#pragma unroll
        for (int step = 1; step < WORLD; step++)
#pragma unroll
            for (int k = 0; k < VPT; k++) v[step - 1][k] = load(row_of((RANK + step) % WORLD, index), k);
#pragma unroll
        for (int k = 0; k < VPT; k++) mine[k] = load(row_of(RANK, index), k);
#pragma unroll
        for (int step = 1; step < WORLD; step++) {
            uint4 *inbox = peer[step - 1] + section_of(RANK, (RANK + step) % WORLD) * a.section + (i64)(index - a.first) * a.vectors;
#pragma unroll
            for (int k = 0; k < VPT; k++)
                if (active[k]) push(inbox + threadIdx.x + k * THREADS, v[step - 1][k]);
        }
    };
    // Where the finished row `index` of a rank lies in a buffer.
    auto values_of = [&](uint4 *buffer, int rank, int index) {
        return (Carry *)(buffer + a.outbox) + (i64)(rank * rows + index - a.first) * a.vectors;
    };
    auto scales_of = [&](uint4 *buffer, int rank, int index) {
        return (u32 *)(buffer + a.outscales) + (i64)(rank * rows + index - a.first) * a.scale_words;
    };
    // The rows `index` that the other ranks have finished, into the results.
    auto fetch = [&](int index) {
#pragma unroll
        for (int step = 1; step < WORLD; step++) {
            const int rank = (RANK + step) % WORLD, row = row_of(rank, index), origin = section_of(rank, RANK);
            if (row >= a.tokens) continue;
#pragma unroll
            for (int k = 0; k < VPT; k++) {
                const int v = threadIdx.x + k * THREADS;
                Carry arrived[1];
                u32 word[1] = {0};
                const bool carries = SCALES && active[k] && v % VECTORS_A_WORD == 0;
                if (active[k]) receive(arrived, values_of(own, rank, index) + v, 0, a, sequence, origin);
                if (carries) receive(word, scales_of(own, rank, index) + v / VECTORS_A_WORD, 0, a, sequence, origin);
                u32 code = 0;
                if constexpr (SCHEME == NVFP4) code = __shfl_sync(~0u, word[0], threadIdx.x % 32 & ~7) >> (v / 2 % 4 * 8) & 255;
                if (!active[k]) continue;
                ((Carry *)(SCHEME == NO_SCHEME ? a.norm : a.q))[(i64)row * a.vectors + v] = arrived[0];
                if (SCALES) store_scale(a.scales, row, a.vectors, v, a.stride_row, a.stride_group, __uint_as_float(word[0]), code);
            }
        }
    };

    int index = a.first + blockIdx.x;
    uint4 mine[VPT], next[VPT];
    if (index < a.end) send(index, mine);
    const int before = a.end > a.first ? arrive(a.state, PROTOCOL) : -1;

    int last = -1;
    for (; index < a.end; index += gridDim.x) {
        if (index + gridDim.x < a.end) send(index + gridDim.x, next);
        const int row = row_of(RANK, index);
        uint4 residual[VPT];
        float h[VPT][8];
#pragma unroll
        for (int k = 0; k < VPT; k++)
            residual[k] = RESIDUAL && active[k] ? a.residual[(i64)index * a.vectors + threadIdx.x + k * THREADS] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            uint4 arrived[PEERS];
#pragma unroll
            for (int p = 0; p < PEERS; p++) arrived[p] = make_uint4(0, 0, 0, 0);
            if (active[k]) receive(arrived, own + (i64)(index - a.first) * a.vectors + threadIdx.x + k * THREADS, a.section, a, sequence, 0);
            sum_of_ranks(h[k], mine[k], arrived, bias[k], a.alpha);
        }
        to_norm(h, residual, weight, weight2, index, active, reduce, a);
        if constexpr (OWN_NORM) store_norms(a.own_norm, index, active, h, a.vectors);
        const bool sends = GATHER && row < a.tokens;
        const int to = GATHER ? row : index;  // its row of the results
        const bool stores = !GATHER || row < a.tokens;
        if constexpr (NORM && SCHEME == NO_SCHEME) {
            if (stores) store_norms(a.norm, to, active, h, a.vectors);
        }
        auto finished = [&](int k, const Quantised &q) {
            const int v = threadIdx.x + k * THREADS;
            if (SCHEME != NO_SCHEME && stores && active[k]) {
                store_values(a.q, to, a.vectors, v, q);
                store_scale(a.scales, to, a.vectors, v, a.stride_row, a.stride_group, q.scale, q.code);
            }
            u32 word = __float_as_uint(q.scale);
            if constexpr (SCHEME == NVFP4) {
                const int lead = threadIdx.x % 32 & ~7;
                word = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) word |= __shfl_sync(~0u, q.code, lead + 2 * j) << (8 * j);
            }
            if (!sends || !active[k]) return;
#pragma unroll
            for (int p = 0; p < PEERS; p++) {
                push(values_of(peer[p], RANK, index) + v, carry(q, h[k], Carry{}));
                if (SCALES && v % VECTORS_A_WORD == 0) push(scales_of(peer[p], RANK, index) + v / VECTORS_A_WORD, word);
            }
        };
        if constexpr (SCHEME != NO_SCHEME) {
            quantise_row(h, given, reduce, finished);
        } else if constexpr (GATHER) {
#pragma unroll
            for (int k = 0; k < VPT; k++) finished(k, Quantised{});
        }
        if (GATHER && last >= 0) fetch(last);
        last = index;
#pragma unroll
        for (int k = 0; k < VPT; k++) mine[k] = next[k];
    }
    if (GATHER && last >= 0) fetch(last);
    if (a.end == a.share) zero_padding_rows(a.scales, GATHER ? a.tokens : a.share, a.vectors);
    advance(a.state, PROTOCOL, before, slot, sequence);
    done();
}
