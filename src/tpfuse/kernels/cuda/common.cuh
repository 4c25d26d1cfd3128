// What the norm kernels share: 16-byte vectors of the model's dtype, row sums, quantisers.
//
// Compile-time: HALF (fp16 rows, else bf16), WORLD, RANK, THREADS, MIN_BLOCKS (an SM), VPT (vectors a thread holds) and the
// operator's flags (see finish.cuh).  A block takes a row; thread t holds its vectors t, t + THREADS, ...

constexpr int WARPS = THREADS / 32;

// ---- numbers ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void widen(uint4 v, float (&f)[8]) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if HALF
        asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(f[2 * i]), "=f"(f[2 * i + 1]) : "r"(w[i]));
#else
        f[2 * i] = __uint_as_float(w[i] << 16);
        f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
#endif
    }
}

__device__ __forceinline__ uint4 narrow(const float (&f)[8]) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if HALF
        asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(w[i]) : "f"(f[2 * i]), "f"(f[2 * i + 1]));
#else
        asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(w[i]) : "f"(f[2 * i]), "f"(f[2 * i + 1]));
#endif
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}

// ---- sums and maxima over a row --------------------------------------------------------------------------------

// One value a thread → one a row, in the same order everywhere, so that all ranks get the same bits.
struct RowReduce {
    float (*partial)[WARPS];  // shared, two of them, taking turns: one barrier a reduction is enough
    int turn;

    template <bool MAXIMUM>
    __device__ __forceinline__ float operator()(float v) {
#pragma unroll
        for (int lane = 16; lane; lane >>= 1) v = join<MAXIMUM>(v, __shfl_xor_sync(~0u, v, lane));
        float *own = partial[turn];
        if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = v;
        __syncthreads();
        float total = own[0];
#pragma unroll
        for (int i = 1; i < WARPS; i++) total = join<MAXIMUM>(total, own[i]);
        turn ^= 1;
        return total;
    }

    template <bool MAXIMUM>
    __device__ static __forceinline__ float join(float a, float b) {
        // Maxima are of magnitudes, compared as integers, which order NaN above infinity.
        if constexpr (MAXIMUM) return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
        else return a + b;
    }
};

// ---- quantisers ------------------------------------------------------------------------------------------------

constexpr int NO_SCHEME = 0, TENSOR = 1, DYNAMIC = 2, NVFP4 = 3;

__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }
__device__ __forceinline__ float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN passes

__device__ __forceinline__ u32 e4m3x2(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(packed) : "f"(low), "f"(high));
    return packed;
}

__device__ __forceinline__ float from_e4m3(u32 code) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)code));
    float f;
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(f) : "r"(halves));
    return f;
}

// The smallest power of two that is not less; infinity and NaN stay.
__device__ __forceinline__ float power_of_two(float scale) {
    const u32 bits = __float_as_uint(scale), exponent = (bits >> 23) & 255;
    if (exponent == 255) return scale;
    const u32 code = exponent + ((bits & 0x7fffff) != 0);
    return __uint_as_float(code == 0 ? 1u << 22 : code << 23);
}

// The code of the nearest E2M1 value, ties to the even code; saturates; NaN is 7 or 15.
__device__ __forceinline__ u32 e2m1(float x) {
    const float size = magnitude(x);
    const u32 below = (size <= 0.25f) + (size < 0.75f) + (size <= 1.25f) + (size < 1.75f) + (size <= 2.5f) + (size < 3.5f) + (size <= 5.0f);
    return (7 - below) | ((__float_as_uint(x) >> 28) & 8);
}

// max |y| over the LANES neighbouring lanes that share a scale.
template <int LANES>
__device__ __forceinline__ float group_maximum(float v) {
#pragma unroll
    for (int lane = LANES / 2; lane; lane >>= 1) v = __uint_as_float(max(__float_as_uint(v), __shfl_xor_sync(~0u, __float_as_uint(v), lane)));
    return v;
}

__device__ __forceinline__ i64 scale_offset(i64 row, int group, int groups, i64 stride_row, i64 stride_group) {
    if constexpr (TILE == 1) return row * stride_row + group * stride_group;
    const i64 tile = row / TILE * ((groups + 3) / 4) + group / 4;
    if constexpr (TILE == 128) return tile * 512 + (row % 32) * 16 + ((row % 128) / 32) * 4 + group % 4;
    return tile * 32 + (row % 8) * 4 + group % 4;
}

__device__ __forceinline__ float dynamic_scale(float largest) {
    float scale = clamp(largest, LOW, HIGH) / 448.0f;
    if (scale < FLOOR) scale = FLOOR;
    return POW2 ? power_of_two(scale) : scale;
}

// The quantised form of the 8 columns from `vector` on, and the scale that they share with their neighbours.
struct Quantised {
    u32 low, high;  // FP8: 8 bytes; NVFP4: 4 bytes, in `low`
    float scale;    // DYNAMIC
    u32 code;       // NVFP4's scale
};

__device__ __forceinline__ Quantised quantise(const float (&y)[8], float given, float row_scale) {
    Quantised out = {};
    if constexpr (SCHEME == TENSOR || SCHEME == DYNAMIC) {
        float factor = INVERT ? given : 1.0f / given;
        if constexpr (SCHEME == DYNAMIC) {
            out.scale = row_scale;
            if constexpr (GROUP > 0) {
                float largest = magnitude(y[0]);
#pragma unroll
                for (int i = 1; i < 8; i++) largest = __uint_as_float(max(__float_as_uint(largest), __float_as_uint(magnitude(y[i]))));
                out.scale = dynamic_scale(group_maximum<GROUP / 8>(largest));
            }
            factor = 1.0f / out.scale;
        }
        out.low = e4m3x2(y[0] * factor, y[1] * factor) | e4m3x2(y[2] * factor, y[3] * factor) << 16;
        out.high = e4m3x2(y[4] * factor, y[5] * factor) | e4m3x2(y[6] * factor, y[7] * factor) << 16;
    } else if constexpr (SCHEME == NVFP4) {
        float largest = magnitude(y[0]);
#pragma unroll
        for (int i = 1; i < 8; i++) largest = __uint_as_float(max(__float_as_uint(largest), __float_as_uint(magnitude(y[i]))));
        largest = group_maximum<2>(largest) / 6.0f;
        const float wanted = INVERT ? largest / given : largest * given;
        out.code = e4m3x2(clamp(wanted, FLOOR, 448.0f), 0.0f) & 255;
        const float widened = from_e4m3(out.code);
        const float factor = widened == 0.0f ? 0.0f : (INVERT ? 1.0f / given : given) / widened;
#pragma unroll
        for (int i = 0; i < 8; i++) out.low |= e2m1(y[i] * factor) << (4 * i);
    }
    return out;
}

__device__ __forceinline__ void store_values(void *q, i64 row, int vectors, int vector, const Quantised &v) {
    if constexpr (SCHEME == TENSOR || SCHEME == DYNAMIC) ((uint2 *)q)[row * vectors + vector] = make_uint2(v.low, v.high);
    if constexpr (SCHEME == NVFP4) ((u32 *)q)[row * vectors + vector] = v.low;
}

// By the first lane of each group; the last one of a row fills up the last word or tile with zeros.
__device__ __forceinline__ void store_scale(void *scales, i64 row, int vectors, int vector, i64 stride_row, i64 stride_group, float scale, u32 code) {
    if constexpr (SCHEME == DYNAMIC && GROUP == 0) {
        if (vector == 0) ((float *)scales)[row * stride_row] = scale;
    } else if constexpr (SCHEME == DYNAMIC || SCHEME == NVFP4) {
        constexpr int VECTORS = SCHEME == NVFP4 ? 2 : GROUP / 8;
        if (vector % VECTORS) return;
        const int group = vector / VECTORS, groups = (vectors + VECTORS - 1) / VECTORS;
        if constexpr (SCHEME == NVFP4) {
            u8 *out = (u8 *)scales;
            out[scale_offset(row, group, groups, stride_row, stride_group)] = code;
            if (TILE > 1 && group == groups - 1)
                for (int g = groups; g % 4; g++) out[scale_offset(row, g, groups, stride_row, stride_group)] = 0;
        } else if constexpr (PACKED) {
            u8 *out = (u8 *)scales + (row * stride_row + group / 4 * stride_group) * 4;
            out[group % 4] = (__float_as_uint(scale) >> 23) & 255;
            if (group == groups - 1)
                for (int g = groups; g % 4; g++) out[g % 4] = 0;
        } else {
            ((float *)scales)[scale_offset(row, group, groups, stride_row, stride_group)] = scale;
        }
    }
}

// Zeros in the scales of the rows that fill the last tile; the grid shares them.
__device__ __forceinline__ void zero_padding_rows(void *scales, int tokens, int vectors) {
    if constexpr (SCHEME == NVFP4 && TILE > 1) {
        const int columns = (vectors / 2 + 3) / 4 * 4;
        for (i64 row = tokens + blockIdx.x; row < (tokens + TILE - 1) / TILE * TILE; row += gridDim.x)
            for (int group = threadIdx.x; group < columns; group += THREADS)
                ((u8 *)scales)[scale_offset(row, group, vectors / 2, 0, 0)] = 0;
    }
}
