// What the CUDA C++ kernels need to run on a CPU: every thread of every rank is a fibre, one of which goes on at a time, chosen by
// chance.  Stores to other ranks arrive late, word by word, in any order.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename To, typename From> To bits(From from) { To to; memcpy(&to, &from, sizeof to); return to; }
inline float __uint_as_float(uint32_t x) { return bits<float>(x); }
inline float __int_as_float(int x) { return bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits<uint32_t>(x); }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

namespace cpu {
struct Index { int x; };
struct Late { uint32_t *where, word; };
struct Block { int waiting = 0, round = 0, lanes[32] = {}, rounds[32] = {}; uint32_t exchange[32][32]; alignas(16) char shared[1024]; };
struct Fibre {
    ucontext_t context;  // of its beginning; later it goes on from `from`
    jmp_buf from;
    std::vector<char> stack;
    std::vector<Late> late;
    Block *block;
    Index thread, number, grid;
    int rank, *barrier = nullptr, passed = 0;  // while it waits at a barrier: its number of rounds, and that when it came
    bool began = false, ended = false;
};
inline jmp_buf scheduler;
inline Fibre *now;
inline int threads, trapped = 0;
inline std::mt19937 chance;

inline void pass() { if (!_setjmp(now->from)) _longjmp(scheduler, 1); }
inline void pass(int &barrier, int round) {
    now->barrier = &barrier, now->passed = round;
    while (barrier == round) pass();
    now->barrier = nullptr;
}
__attribute__((noinline)) inline void go_on(Fibre &f) {
    if (f.barrier && *f.barrier == f.passed) return;
    now = &f;
    if (_setjmp(scheduler)) return;
    if (f.began) _longjmp(f.from, 1);
    f.began = true;
    setcontext(&f.context);
}
inline void store(void *where, uint32_t word) { now->late.push_back({(uint32_t *)where, word}); }

// One of a fibre's stores arrives: the first to some word.
inline void arrive(Fibre &f) {
    size_t i = chance() % f.late.size();
    for (size_t j = 0; j < i; j++)
        if (f.late[j].where == f.late[i].where) i = j;
    *f.late[i].where = f.late[i].word;
    f.late.erase(f.late.begin() + i);
}
inline void fence() { while (!now->late.empty()) pass(); }
}  // namespace cpu

#define threadIdx cpu::now->thread
#define blockIdx cpu::now->number
#define gridDim cpu::now->grid
#define RANK cpu::now->rank
#define SHARED(type) *(type *)cpu::now->block->shared

inline void __syncthreads() {
    cpu::Block &b = *cpu::now->block;
    const int round = b.round;
    if (++b.waiting == cpu::threads) b.waiting = 0, b.round++;
    cpu::pass(b.round, round);
}
template <typename T> T __shfl_sync(uint32_t, T v, int lane) {
    cpu::Block &b = *cpu::now->block;
    const int warp = threadIdx.x / 32, round = b.rounds[warp];
    uint32_t *values = b.exchange[warp];
    values[threadIdx.x % 32] = bits<uint32_t>(v);
    if (++b.lanes[warp] == 32) b.lanes[warp] = 0, b.rounds[warp]++;
    cpu::pass(b.rounds[warp], round);
    const T got = bits<T>(values[lane]);
    // Nobody writes again before all have read.
    if (++b.lanes[warp] == 32) b.lanes[warp] = 0, b.rounds[warp]++;
    cpu::pass(b.rounds[warp], round + 1);
    return got;
}
template <typename T> T __shfl_xor_sync(uint32_t mask, T v, int lane) { return __shfl_sync(mask, v, threadIdx.x % 32 ^ lane); }
inline int atomicAdd(int *where, int v) { cpu::pass(); const int before = *where; *where += v; return before; }
inline int atomicExch(int *where, int v) { const int before = *where; *where = v; return before; }
inline void __nanosleep(int) { cpu::pass(); }

// PTX: see on_cpu.py.
namespace ptx {
inline void none() {}
inline void fence() { cpu::fence(); }
inline void trap() { cpu::trapped = 1; cpu::pass(); }
inline void clock(unsigned long long &v) { static unsigned long long ticks = 0; v = ++ticks; }
template <typename P, typename... Words> void store(P *where, Words... words) {
    uint32_t *to = (uint32_t *)where;
    (cpu::store(to++, words), ...);
    if (cpu::chance() % 4 == 0) cpu::pass();
}
template <int N, typename P> void store_same(P *where, uint32_t word) { for (int i = 0; i < N; i++) ((uint32_t *)where)[i] = word; }
template <typename A, typename P> void load(A &a, P *where) { cpu::pass(); a = ((A *)where)[0]; }
template <typename A, typename P> void load(A &a, A &b, P *where) { cpu::pass(); a = ((A *)where)[0], b = ((A *)where)[1]; }
template <typename A, typename P> void load(A &a, A &b, A &c, A &d, P *where) {
    cpu::pass();
    const A *from = (const A *)where;
    a = from[0], b = from[1], c = from[2], d = from[3];
}
template <typename P> void add_one(int &before, P *where) { cpu::fence(); before = atomicAdd((int *)where, 1); }

inline uint32_t bf16(float f) {
    const uint32_t b = bits<uint32_t>(f);
    return std::isnan(f) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline void to_bf16x2(uint32_t &w, float low, float high) { w = bf16(low) | bf16(high) << 16; }
inline float from_code(uint32_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    return (code == 0x7f ? NAN : e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9));
}
inline uint32_t e4m3(float f) {
    const uint32_t sign = std::signbit(f) ? 0x80 : 0;
    if (std::isnan(f)) return sign | 0x7f;
    const float size = fabsf(f);
    uint32_t code = 0;
    while (code < 126 && from_code(code + 1) <= size) code++;
    if (code < 126) {
        const float below = size - from_code(code), above = from_code(code + 1) - size;
        if (above < below || (above == below && code & 1)) code++;
    }
    return sign | code;
}
inline void to_e4m3x2(uint16_t &packed, float low, float high) { packed = e4m3(low) | e4m3(high) << 8; }
inline void from_e4m3x2(uint32_t &code, uint16_t pair) { code = pair; }
inline void from_half(float &f, uint32_t code) { f = from_code(code & 0x7f) * (code & 0x80 ? -1 : 1); }
}  // namespace ptx
