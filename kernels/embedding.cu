// The gradient of a table whose rows were taken by their ids: each row is the sum of those of its id, in order.

#include "elem.cuh"
#include "reduce.cuh"

struct EmbeddingBackward {
    const uint32_t* ids;  // (count)
    const void* grad;     // (count, dim)
    void* table;          // (rows, dim), zeros
    int64_t count, rows;
    int dim;
};
static_assert(sizeof(EmbeddingBackward) == 48, "as in embedding/cuda.rs");

constexpr int THREADS = 256, OF_THREAD = 4, COLUMNS = THREADS * OF_THREAD, UNROLL = 4;

// One block a position and COLUMNS columns: that of the first position of an id adds the rows of all, the others have nothing to
// do. So each row has one writer, and the order of a sum is that of the positions, whatever the launch.
template <typename T> __device__ void embedding_backward(const EmbeddingBackward& p) {
    __shared__ int found[THREADS + UNROLL], of_warps[THREADS / 32];
    const int64_t first = blockIdx.x;
    const uint32_t id = p.ids[first];
    if (id >= p.rows) return;
    // Backwards, for most repetitions are near.
    for (int64_t end = first; end > 0; end -= THREADS) {
        const int64_t at = end - 1 - threadIdx.x;
        if (__syncthreads_or(at >= 0 && p.ids[at] == id)) return;
    }
    const int column = blockIdx.y * COLUMNS + threadIdx.x * OF_THREAD;
    const int columns = min(OF_THREAD, p.dim - column);  // not positive where there are none
    const T* grad = static_cast<const T*>(p.grad) + column;
    const bool whole = p.dim % OF_THREAD == 0 && reinterpret_cast<uintptr_t>(p.grad) % (OF_THREAD * sizeof(T)) == 0;
    float sum[OF_THREAD] = {};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int64_t start = first; start < p.count; start += THREADS) {
        const int64_t at = start + threadIdx.x;
        const bool match = at < p.count && p.ids[at] == id;
        const unsigned of_warp = __ballot_sync(ALL_LANES, match);
        if (lane == 0) of_warps[warp] = __popc(of_warp);
        __syncthreads();
        int before = __popc(of_warp & ((1u << lane) - 1)), all = 0;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) before += of_warps[w];
            all += of_warps[w];
        }
        if (match) found[before] = threadIdx.x;
        __syncthreads();
        for (int i = 0; i < all; i += UNROLL) {
            float rows[UNROLL][OF_THREAD] = {};
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                if (i + u >= all || columns <= 0) continue;
                const T* row = grad + (start + found[i + u]) * p.dim;
                if (whole) load<OF_THREAD, true>(rows[u], row);
                else load<OF_THREAD, false>(rows[u], row, columns);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                for (int c = 0; c < OF_THREAD; c++) sum[c] += rows[u][c];
            }
        }
        __syncthreads();
    }
    if (columns > 0) {
        store<OF_THREAD, false>(static_cast<T*>(p.table) + static_cast<int64_t>(id) * p.dim + column, sum, columns);
    }
}

#define EMBEDDING(T, name)                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                             \
        embedding_backward_##name(const __grid_constant__ EmbeddingBackward args) { \
        embedding_backward<T>(args);                                                  \
    }
FOR_EACH_DTYPE(EMBEDDING)
