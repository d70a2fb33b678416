// What an optimizer does with all parameters, in one pass over each.

#include "elem.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256, V = 4;

struct AdamW {
    float* value;
    float* first;   // the mean of gradients
    float* second;  // the mean of their squares
    Any grad;
    Any copy;  // the value as the model computes with it; may be absent
    int64_t len;
    float factor, beta1, beta2, rest1, rest2, eps, keep, rate, correction;
    int vector;  // whether all tensors are aligned to 16 bytes
};
static_assert(sizeof(AdamW) == 104, "as in optimizer/cuda.rs");

// V neighbours at once where all are there and aligned, else one after another.
template <bool VECTOR> __device__ void adamw_pack(const AdamW& p, int64_t start, int count) {
    float value[V], first[V], second[V], grad[V];
    load<V, VECTOR>(value, p.value + start, count);
    load<V, VECTOR>(first, p.first + start, count);
    load<V, VECTOR>(second, p.second + start, count);
    p.grad.get<V, VECTOR>(grad, start, count);
#pragma unroll
    for (int v = 0; v < V; v++) {
        const float g = grad[v] * p.factor;
        first[v] = p.beta1 * first[v] + p.rest1 * g;
        second[v] = p.beta2 * second[v] + p.rest2 * g * g;
        value[v] = p.keep * value[v] - p.rate * first[v] / (sqrtf(second[v]) * p.correction + p.eps);
    }
    store<V, VECTOR>(p.value + start, value, count);
    store<V, VECTOR>(p.first + start, first, count);
    store<V, VECTOR>(p.second + start, second, count);
    if (p.copy) p.copy.set<V, VECTOR>(start, value, count);
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw(const __grid_constant__ AdamW p) {
    const int64_t start = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
    if (start >= p.len) return;
    const int count = min(static_cast<int64_t>(V), p.len - start);
    if (p.vector && count == V) adamw_pack<true>(p, start, V);
    else adamw_pack<false>(p, start, count);
}

struct SumOfSquares {
    Any x;
    double* sums;  // one a block
    int64_t len;
};
static_assert(sizeof(SumOfSquares) == 32, "as in optimizer/cuda.rs");

// The sum of the squares of each block's share, in an order that depends on the length alone.
extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const __grid_constant__ SumOfSquares p) {
    __shared__ double of_warps[THREADS / 32];
    double sum = 0.0;
    const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
    p.x.visit([&](auto* x) {
        for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < p.len; i += step) {
            const double value = to_float(x[i]);
            sum += value * value;
        }
    });
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < THREADS / 32; warp++) sum += of_warps[warp];
    p.sums[blockIdx.x] = sum;
}
