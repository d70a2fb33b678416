// The products of the decoder for 3 to 64 sequences, with 16-bit weights, on tensor cores. Norms have a kernel of their own here,
// since a block would compute them for all sequences, and so has the convolution behind products of cuBLAS; inputs of products are
// rounded.

#include "decoder.cuh"
#include "product.cuh"

// ---- Norms ------------------------------------------------------------------------------------------------------------------

// A block a sequence: y, in the dtype of the weights, is the norm of x; see `Project`.
template <typename T> __device__ void normed(Project p) {
    extern __shared__ float4 shared[];
    __shared__ float scratch[WARPS];
    const int64_t row = blockIdx.x;
    NormAhead norm;
    norm.load(p, p.inputs / p.norm_groups / 4);
    let_next_begin();
    wait_for_previous();
    p.x += row * p.x_stride;
    p.z += row * p.z_stride;
    p.rows = 1;
    read_inputs<1, 4>(p, norm, shared, scratch);
    __syncthreads();
    T* y = static_cast<T*>(p.y.data) + row * p.y_stride;
    for (int k = threadIdx.x; k < p.inputs / 4; k += THREADS) {
        float4 values = shared[k];
        const float four[4] = {values.x, values.y, values.z, values.w};
        store<4, true>(y + 4 * k, four);
    }
}

#define NORMED(T, name)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) decoder_norm_##name(const __grid_constant__ Project args) {      \
        normed<T>(args);                                                                                                    \
    }
NORMED(f16, f16)
NORMED(bf16, bf16)

// ---- The convolution --------------------------------------------------------------------------------------------------------

// A step of the convolution of some columns of y, in place; see `Project`.
template <typename T> __device__ void convolve(const Project& p) {
    const int channel = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y, channels = p.conv_end - p.conv_begin;
    const bool there = channel < channels;
    Taps taps;
    if (there) taps.load(p, row, channel);
    let_next_begin();
    wait_for_previous();
    if (!there) return;
    float* y = static_cast<float*>(p.y.data) + row * p.y_stride + p.conv_begin + channel;
    const float sum = taps.step(p, row, channel, *y);
    *y = sum;
    if (p.rounded) static_cast<T*>(p.rounded)[static_cast<int64_t>(row) * channels + channel] = from_float<T>(sum);
}

#define CONVOLVE(T, name)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) decoder_conv_##name(const __grid_constant__ Project args) {      \
        convolve<T>(args);                                                                                                  \
    }
CONVOLVE(f16, f16)
CONVOLVE(bf16, bf16)

// ---- Products ---------------------------------------------------------------------------------------------------------------

constexpr int M = 16;      // outputs of a warp
constexpr int DEPTH = 32;  // inputs that a warp reads of a row at once: four lanes with 8 each
#ifndef PREFETCHED_BYTES
#define PREFETCHED_BYTES 2048
#endif
constexpr int PREFETCHED = PREFETCHED_BYTES;  // of each of the first outputs of a block

__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from));
}

// Elements from row to row of inputs in shared memory: those of eight rows that are read together lie in different banks.
__device__ __forceinline__ int staged_row(int inputs) {
    const int depths = (inputs + DEPTH - 1) / DEPTH;
    return (depths | 1) * DEPTH;
}

// Copies all inputs, in the dtype of the weights, to shared memory; behind their end are zeros.
template <typename T> __device__ void stage(const Project& p, T* staged) {
    const int pitch = staged_row(p.inputs), packs = p.inputs / 8, whole = (p.inputs + DEPTH - 1) / DEPTH * DEPTH / 8;
    const T* x = reinterpret_cast<const T*>(p.x);
    for (int row = threadIdx.x / 32; row < p.rows; row += WARPS) {
        for (int k = threadIdx.x % 32; k < whole; k += 32) {
            T* to = staged + row * pitch + k * 8;
            if (k < packs) {
                copy_async(to, x + row * p.x_stride + k * 8);
            } else {
                *reinterpret_cast<int4*>(to) = make_int4(0, 0, 0, 0);
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}

// Where a sum over the inputs does not care for their order, lane i of four takes eight neighbours of each row at once, and
// calls them the inputs that the instruction wants of it.
//
// `split` warps share 16 outputs, each with a part of the inputs. `x` of `p` is in the dtype of the weights; STAGED, it fits into
// shared memory.
template <typename T, int TILES, bool STAGED> __device__ void product(const Project& p) {
    constexpr int AHEAD = 4;                                    // reads of a row that are on their way
    constexpr int X_AHEAD = !STAGED && TILES <= 2 ? AHEAD : 1;  // and of inputs
    constexpr int ROWS = 8 * TILES, PITCH = ROWS + 1;
    extern __shared__ float4 shared[];
    float* sums = reinterpret_cast<float*>(shared);              // [warp][M][PITCH]
    T* staged = reinterpret_cast<T*>(sums + WARPS * M * PITCH);  // a multiple of 16 bytes
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int part = warp % p.split, outputs = WARPS / p.split * M;  // of a block
    const int depths = (p.inputs + DEPTH - 1) / DEPTH;

    int first = blockIdx.x * outputs + warp / p.split * M;
    int4 w[AHEAD][2], b[X_AHEAD][TILES];
    const int4 zero = make_int4(0, 0, 0, 0);
    const auto fetch = [&](int u, int output, int depth) {
        const int k = depth * DEPTH + quarter * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int of = output + half * 8 + group;
            const bool there = k < p.inputs && of < p.outputs;
            w[u][half] = there ? __ldcs(reinterpret_cast<const int4*>(row_of<T>(p, of) + k)) : zero;
        }
    };
    // Rows that are not there are the last one once more; nobody reads their sums.
    int rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        rows[tile] = min(tile * 8 + group, p.rows - 1) * (STAGED ? staged_row(p.inputs) : static_cast<int>(p.x_stride));
    }
    const T* x = STAGED ? staged : reinterpret_cast<const T*>(p.x);
    const auto fetch_x = [&](int u, int depth) {
        const int k = depth * DEPTH + quarter * 8;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const bool there = STAGED || k < p.inputs;  // staged, what is behind the end is 0
            b[u][tile] = there ? *reinterpret_cast<const int4*>(x + rows[tile] + k) : zero;
        }
    };
#pragma unroll
    for (int u = 0; u < AHEAD; u++) fetch(u, first, part + u * p.split);
    let_next_begin();
    prefetch<T>(p, blockIdx.x * outputs, outputs, PREFETCHED);
    wait_for_previous();
    if constexpr (STAGED) stage<T>(p, staged);
    if constexpr (X_AHEAD > 1) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++) fetch_x(u, part + u * p.split);
    }

    for (int begin = blockIdx.x * outputs; begin < p.outputs; begin += gridDim.x * outputs) {
        const int next = first + gridDim.x * outputs;
        float c[TILES][4] = {};
        for (int depth = part; depth < depths; depth += AHEAD * p.split) {
            const bool last = depth + AHEAD * p.split >= depths;
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int at = depth + u * p.split, ahead = last ? part + u * p.split : at + AHEAD * p.split;
                const int of = X_AHEAD > 1 ? u : 0;
                if (at < depths) {
                    if constexpr (X_AHEAD == 1) fetch_x(0, at);
                    const int4 low = w[u][0], high = w[u][1];
                    const uint32_t first_half[4] = {uint32_t(low.x), uint32_t(high.x), uint32_t(low.y), uint32_t(high.y)};
                    const uint32_t second_half[4] = {uint32_t(low.z), uint32_t(high.z), uint32_t(low.w), uint32_t(high.w)};
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        multiply_add<T>(c[tile], first_half, b[of][tile].x, b[of][tile].y);
                        multiply_add<T>(c[tile], second_half, b[of][tile].z, b[of][tile].w);
                    }
                }
                fetch(u, last ? next : first, ahead);
                if constexpr (X_AHEAD > 1) fetch_x(u, ahead);
            }
        }
        first = next;

        float* mine = sums + warp * M * PITCH;
        __syncthreads();  // the last tile's are read
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) mine[(group + i / 2 * 8) * PITCH + tile * 8 + quarter * 2 + i % 2] = c[tile][i];
        }
        __syncthreads();
        constexpr int TOGETHER = 4;
        for (int some = threadIdx.x; some < outputs * ROWS; some += TOGETHER * THREADS) {
            Taps taps[TOGETHER];
            const auto element = [&](int j, auto f) {
                const int i = some + j * THREADS, output = i & (outputs - 1), row = i / outputs, of = begin + output;
                if (i < outputs * ROWS && of < p.outputs && row < p.rows) f(output, row, of, p.conv_begin <= of && of < p.conv_end);
            };
            if (p.window) {
#pragma unroll
                for (int j = 0; j < TOGETHER; j++) {
                    element(j, [&](int, int row, int of, bool convolves) {
                        if (convolves) taps[j].load(p, row, of - p.conv_begin);
                    });
                }
            }
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                element(j, [&](int output, int row, int of, bool convolves) {
                    const float* parts = sums + (output / M * p.split * M + output % M) * PITCH + row;
                    float sum = 0.0f;
                    for (int other = 0; other < p.split; other++) sum += parts[other * M * PITCH];
                    sum = finished(p, of, sum);
                    if (convolves) {
                        const int channel = of - p.conv_begin;
                        sum = taps[j].step(p, row, channel, sum);
                        const int64_t at = static_cast<int64_t>(row) * (p.conv_end - p.conv_begin) + channel;
                        if (p.rounded) static_cast<T*>(p.rounded)[at] = from_float<T>(sum);
                    }
                    const int64_t at = row * p.y_stride + of;
                    p.y.set(at, p.base ? p.base[at] + sum : sum);
                });
            }
        }
    }
}

#define PRODUCT(T, name, tiles, how, staged)                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, tiles <= 4 ? 2 : 1)                                              \
        decoder_##how##_##tiles##_##name(const __grid_constant__ Project args) {                                           \
        product<T, tiles, staged>(args);                                                                                   \
    }
#define PRODUCTS(T, name)                                                                                                  \
    PRODUCT(T, name, 1, staged, true) PRODUCT(T, name, 2, staged, true) PRODUCT(T, name, 4, staged, true)                  \
    PRODUCT(T, name, 1, product, false) PRODUCT(T, name, 2, product, false)                                                \
    PRODUCT(T, name, 4, product, false) PRODUCT(T, name, 8, product, false)
PRODUCTS(f16, f16)
PRODUCTS(bf16, bf16)
