// The largest of each row: what greedy decoding reads next.

#include "elem.cuh"
#include "reduce.cuh"

// The first place of the largest of each row; NaN is none, and of nothing else the place is 0.
struct Argmax {
    const void* x;  // (rows, len)
    uint32_t* y;    // (rows)
    int len;
};
static_assert(sizeof(Argmax) == 24, "as in argmax.rs");

constexpr int THREADS = 1024;

struct Best {
    float value;
    int place;

    __device__ void meet(float v, int at) {
        if (v > value || (v == value && at < place)) value = v, place = at;
    }
};

template <typename T> __device__ void argmax(const Argmax& p) {
    constexpr int V = 16 / sizeof(T), UNROLL = 4;
    __shared__ Best of_warps[THREADS / 32];
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(blockIdx.x) * p.len;
    Best best = {-INFINITY, 0x7fffffff};
    // The packs in the middle, which 16 bytes are read of at once, then what is before and after them.
    const int before = min(static_cast<int>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T)), p.len);
    const int packs = (p.len - before) / V;
    for (int first = threadIdx.x; first < packs; first += UNROLL * THREADS) {
        Pack<T, V> pack[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int at = first + u * THREADS;
            if (at < packs) pack[u] = reinterpret_cast<const Pack<T, V>*>(x + before)[at];
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int at = first + u * THREADS;
            if (at >= packs) continue;
#pragma unroll
            for (int v = 0; v < V; v++) best.meet(to_float(pack[u].values[v]), before + at * V + v);
        }
    }
    const int after = before + packs * V;
    if (threadIdx.x < before) best.meet(to_float(x[threadIdx.x]), threadIdx.x);
    if (after + threadIdx.x < p.len) best.meet(to_float(x[after + threadIdx.x]), after + threadIdx.x);

    const auto join = [&]() {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float value = __shfl_xor_sync(ALL_LANES, best.value, offset);
            const int place = __shfl_xor_sync(ALL_LANES, best.place, offset);
            best.meet(value, place);
        }
    };
    join();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = of_warps[threadIdx.x];
    join();
    if (threadIdx.x == 0) p.y[blockIdx.x] = best.place < p.len ? best.place : 0;
}

#define ARGMAX(T, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) argmax_##name(const __grid_constant__ Argmax args) { \
        argmax<T>(args);                                                                                           \
    }
FOR_EACH_DTYPE(ARGMAX)
