// Elements left out at random, by a mask that is a function of its key.

#include "elem.cuh"

// The words at `block` of Philox 4x32-10 under the key (seed, stream); those at or above the threshold keep their element.
struct Dropout {
    const void* x;  // (len)
    void* y;        // (len)
    int64_t len;
    uint64_t seed, stream;
    uint32_t threshold;
    float scale;
};
static_assert(sizeof(Dropout) == 48, "as in dropout/cuda.rs");

constexpr int THREADS = 256, WORDS = 4;

__device__ inline uint4 words(uint64_t seed, uint64_t stream, uint64_t block) {
    uint4 counter = make_uint4(block, block >> 32, stream, stream >> 32);
    uint32_t low = seed, high = seed >> 32;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t m0 = 0xd2511f53u, m1 = 0xcd9e8d57u;
        counter = make_uint4(__umulhi(m1, counter.z) ^ counter.y ^ low, m1 * counter.z,
                             __umulhi(m0, counter.x) ^ counter.w ^ high, m0 * counter.x);
        low += 0x9e3779b9u, high += 0xbb67ae85u;
    }
    return counter;
}

template <bool VECTOR, typename T>
__device__ void apply(const Dropout& p, int64_t block, int count) {
    const int64_t at = WORDS * block;
    float values[WORDS];
    load<WORDS, VECTOR>(values, static_cast<const T*>(p.x) + at, count);
    const uint4 drawn = words(p.seed, p.stream, block);
    const uint32_t each[WORDS] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
    for (int i = 0; i < WORDS; i++) values[i] = each[i] >= p.threshold ? p.scale * values[i] : 0.0f;
    store<WORDS, VECTOR>(static_cast<T*>(p.y) + at, values, count);
}

template <typename T>
__device__ void dropout(const Dropout& p) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    const int64_t rest = p.len - WORDS * block;
    if (rest <= 0) return;
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y);
    if (rest >= WORDS && address % sizeof(Pack<T, WORDS>) == 0)
        apply<true, T>(p, block, WORDS);
    else
        apply<false, T>(p, block, static_cast<int>(rest < WORDS ? rest : WORDS));
}

#define DROPOUT(T, name)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) dropout_##name(const __grid_constant__ Dropout args) { \
        dropout<T>(args);                                                                                             \
    }
FOR_EACH_DTYPE(DROPOUT)
