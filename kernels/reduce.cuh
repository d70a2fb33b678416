// Sums over the lanes of a warp and the warps of a block, in an order that does not change.
#pragma once

#include <cstdint>

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over groups of LANES neighbouring lanes, in each of them.
template <int LANES = 32>
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// The sums of N values over `warps` neighbouring warps that share `scratch`, N floats a warp; in each thread. `warp` is the
// number of this warp among them. All threads of the block take part.
template <int N>
__device__ inline void block_sum(float (&x)[N], float* scratch, int warp, int warps) {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    const int lane = threadIdx.x & 31;
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) scratch[warp * N + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = warp_sum(lane < warps ? scratch[lane * N + i] : 0.0f);
    __syncthreads();  // before the next sum writes there
}

// The sum of each of V values over LANES lanes that are STRIDE apart, spread: afterwards lane i of them holds sums
// [i·V/LANES, (i+1)·V/LANES) in front, or, with fewer values than lanes, lanes [i·LANES/V, …) hold sum i.
template <int V, int LANES, int STRIDE> __device__ __forceinline__ void reduce_scatter(float (&v)[V], int lane) {
    int count = V;
#pragma unroll
    for (int lanes = LANES / 2; lanes >= 1; lanes /= 2) {
        if (count > 1) {
            count /= 2;
            const bool upper = lane & (lanes * STRIDE);
#pragma unroll
            for (int i = 0; i < V / 2; i++) {
                if (i < count) {
                    const float send = upper ? v[i] : v[i + count];
                    const float keep = upper ? v[i + count] : v[i];
                    v[i] = keep + __shfl_xor_sync(0xffffffffu, send, lanes * STRIDE);
                }
            }
        } else {
            v[0] += __shfl_xor_sync(0xffffffffu, v[0], lanes * STRIDE);
        }
    }
}
