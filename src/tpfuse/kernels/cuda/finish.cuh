// From the sum over the ranks to the results: (inner norm), residual, norm, quantise, store.

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

// Quantise a row and hand each vector to `store(vector, values)`; scales go with the values.
template <typename Store>
__device__ __forceinline__ void quantise_row(const float (&y)[VPT][8], int lane, const bool (&active)[VPT], float given, RowReduce &reduce, Store store) {
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
        if (active[k]) store(lane + k * THREADS * CLUSTER, values);
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

__device__ __forceinline__ void finish(
    float (&h)[VPT][8], const uint4 (&residual)[VPT], const uint4 (&weight)[VPT], const uint4 (&weight2)[VPT], i64 row, int lane,
    const bool (&active)[VPT], float given, float hidden, RowReduce &reduce, const Args &a) {
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
            if (active[k]) a.reduced[row * a.vectors + lane + k * THREADS * CLUSTER] = narrow(h[k]);
    }
    if constexpr (SANDWICH) normalise<WEIGHT2>(h, weight2, a.eps2, a.weight_bias, hidden, reduce);
    else normalise<WEIGHT>(h, weight, a.eps, a.weight_bias, hidden, reduce);
    if constexpr (NORM) {
#pragma unroll
        for (int k = 0; k < VPT; k++)
            if (active[k]) store_norm(a.norm, row, a.vectors, lane + k * THREADS * CLUSTER, h[k]);
    }
    if constexpr (SCHEME != NO_SCHEME) {
        quantise_row(h, lane, active, given, reduce, [&](int vector, const Quantised &v) {
            store_values(a.q, row, a.vectors, vector, v);
            store_scale(a.scales, row, a.vectors, vector, a.stride_row, a.stride_group, v.scale, v.code);
        });
    }
}
