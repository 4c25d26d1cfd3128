// From the rows of all ranks to the norm, and what becomes of it.
//
// Flags: RESIDUAL BIAS ALPHA WEIGHT WEIGHT2 SANDWICH NORM NORM_F32 OWN_NORM REDUCED GIVEN SCHEME GROUP (0: the row) INVERT FLOOR
// LOW HIGH POW2 PACKED TILE.

// The FP32 sum in rank order, (+ bias), times alpha.
__device__ __forceinline__ void sum_of_ranks(float (&h)[8], uint4 mine, const uint4 (&arrived)[PEERS], uint4 bias, float alpha) {
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; i++) h[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < WORLD; r++) {
        widen(r == RANK ? mine : arrived[section_of(r, RANK) % PEERS], part);
#pragma unroll
        for (int i = 0; i < 8; i++) h[i] += part[i];
    }
    if constexpr (BIAS) {
        widen(bias, part);
#pragma unroll
        for (int i = 0; i < 8; i++) h[i] += part[i];
    }
    if constexpr (ALPHA) {
#pragma unroll
        for (int i = 0; i < 8; i++) h[i] *= alpha;
    }
}

__device__ __forceinline__ float sum_of_squares(const float (&h)[VPT][8]) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VPT; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) sum += h[k][i] * h[k][i];
    return sum;
}

// y = x / sqrt(mean(x^2) + eps) * (weight + bias), in place.
template <bool WEIGHTED>
__device__ __forceinline__ void normalise(float (&y)[VPT][8], const uint4 (&weight)[VPT], float eps, float bias, float hidden, RowReduce &reduce) {
    const float factor = rsqrtf(reduce.template operator()<false>(sum_of_squares(y)) / hidden + eps);
#pragma unroll
    for (int k = 0; k < VPT; k++) {
        float w[8];
        widen(weight[k], w);
#pragma unroll
        for (int i = 0; i < 8; i++) y[k][i] *= WEIGHTED ? factor * (w[i] + bias) : factor;
    }
}

// Quantise a row and hand each vector to `store(k, values)`, which all threads call.
template <typename Store>
__device__ __forceinline__ void quantise_row(const float (&y)[VPT][8], float given, RowReduce &reduce, Store store) {
    float row_scale = 1.0f;
    if constexpr (SCHEME == DYNAMIC && GROUP == 0) {
        float largest = 0.0f;
#pragma unroll
        for (int k = 0; k < VPT; k++)
#pragma unroll
            for (int i = 0; i < 8; i++) largest = RowReduce::join<true>(largest, magnitude(y[k][i]));
        row_scale = dynamic_scale(reduce.template operator()<true>(largest));
    }
#pragma unroll
    for (int k = 0; k < VPT; k++) {
        const Quantised values = quantise(y[k], given, row_scale);
        store(k, values);
    }
}

__device__ __forceinline__ void store_norm(void *norm, i64 row, int vectors, int vector, const float (&y)[8]) {
    if constexpr (NORM_F32) {
        float4 *out = (float4 *)norm + (row * vectors + vector) * 2;
        out[0] = make_float4(y[0], y[1], y[2], y[3]);
        out[1] = make_float4(y[4], y[5], y[6], y[7]);
    } else {
        ((uint4 *)norm)[row * vectors + vector] = narrow(y);
    }
}

constexpr bool NORMED = NORM || OWN_NORM || SCHEME != NO_SCHEME;  // else only the sum is wanted

// h: the sum → its norm, in place, where anybody wants it.  Row `row` of `a.reduced` gets what the norm was taken of.
__device__ __forceinline__ void to_norm(
    float (&h)[VPT][8], const uint4 (&residual)[VPT], const uint4 (&weight)[VPT], const uint4 (&weight2)[VPT], i64 row,
    const bool (&active)[VPT], RowReduce &reduce, const Args &a) {
    const float hidden = 8.0f * a.vectors;
    if constexpr (SANDWICH) normalise<WEIGHT>(h, weight, a.eps, a.weight_bias, hidden, reduce);
    if constexpr (RESIDUAL) {
#pragma unroll
        for (int k = 0; k < VPT; k++) {
            float part[8];
            widen(residual[k], part);
#pragma unroll
            for (int i = 0; i < 8; i++) h[k][i] += part[i];
        }
    }
    if constexpr (REDUCED) {
#pragma unroll
        for (int k = 0; k < VPT; k++)
            if (active[k]) a.reduced[row * a.vectors + threadIdx.x + k * THREADS] = narrow(h[k]);
    }
    if constexpr (!NORMED) return;
    if constexpr (SANDWICH) normalise<WEIGHT2>(h, weight2, a.eps2, a.weight_bias, hidden, reduce);
    else normalise<WEIGHT>(h, weight, a.eps, a.weight_bias, hidden, reduce);
}

__device__ __forceinline__ void store_norms(void *norm, i64 row, const bool (&active)[VPT], const float (&y)[VPT][8], int vectors) {
#pragma unroll
    for (int k = 0; k < VPT; k++)
        if (active[k]) store_norm(norm, row, vectors, threadIdx.x + k * THREADS, y[k]);
}
