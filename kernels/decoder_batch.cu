// The products of the decoder for 3 to 64 sequences, with 16-bit weights, on tensor cores. Norms and the convolution have kernels
// of their own here, since a block would compute them for all sequences; inputs of products are rounded.

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

// Where a sum over the inputs does not care for their order, lane i of four takes eight neighbours of each row at once, and
// calls them the inputs that the instruction wants of it.
//
// `split` warps share 16 outputs, each with a part of the inputs. `x` of `p` is in the dtype of the weights.
template <typename T, int TILES> __device__ void product(const Project& p) {
    constexpr int AHEAD = 4;  // reads of a row that are on their way
    extern __shared__ float sums[];  // [warp][M][8·TILES + 1]
    constexpr int PITCH = 8 * TILES + 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int part = warp % p.split, outputs = WARPS / p.split * M;  // of a block
    const int depths = (p.inputs + DEPTH - 1) / DEPTH;
    const T* weight = static_cast<const T*>(p.weight);
    const T* x = reinterpret_cast<const T*>(p.x);

    int first = blockIdx.x * outputs + warp / p.split * M;
    int4 w[AHEAD][2];
    const int4 zero = make_int4(0, 0, 0, 0);
    const auto fetch = [&](int u, int output, int depth) {
        const int k = depth * DEPTH + quarter * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int of = output + half * 8 + group;
            const bool there = k < p.inputs && of < p.outputs;
            w[u][half] = there ? __ldcs(reinterpret_cast<const int4*>(weight + static_cast<int64_t>(of) * p.inputs + k)) : zero;
        }
    };
#pragma unroll
    for (int u = 0; u < AHEAD; u++) fetch(u, first, part + u * p.split);
    let_next_begin();
    wait_for_previous();

    for (int begin = blockIdx.x * outputs; begin < p.outputs; begin += gridDim.x * outputs) {
        const int next = first + gridDim.x * outputs;
        float c[TILES][4] = {};
        for (int depth = part; depth < depths; depth += AHEAD * p.split) {
            const bool last = depth + AHEAD * p.split >= depths;
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int at = depth + u * p.split, k = at * DEPTH + quarter * 8;
                if (at < depths) {
                    int4 b[TILES];
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const int row = tile * 8 + group;
                        const bool there = k < p.inputs && row < p.rows;
                        b[tile] = there ? *reinterpret_cast<const int4*>(x + row * p.x_stride + k) : zero;
                    }
                    const int4 low = w[u][0], high = w[u][1];
                    const uint32_t first_half[4] = {uint32_t(low.x), uint32_t(high.x), uint32_t(low.y), uint32_t(high.y)};
                    const uint32_t second_half[4] = {uint32_t(low.z), uint32_t(high.z), uint32_t(low.w), uint32_t(high.w)};
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        multiply_add<T>(c[tile], first_half, b[tile].x, b[tile].y);
                        multiply_add<T>(c[tile], second_half, b[tile].z, b[tile].w);
                    }
                }
                fetch(u, last ? next : first, last ? part + u * p.split : at + AHEAD * p.split);
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
#pragma unroll 4
        for (int i = threadIdx.x; i < outputs * 8 * TILES; i += THREADS) {
            const int output = i % outputs, row = i / outputs, of = begin + output;
            if (of >= p.outputs || row >= p.rows) continue;
            const float* parts = sums + (output / M * p.split * M + output % M) * PITCH + row;
            float sum = 0.0f;
            for (int other = 0; other < p.split; other++) sum += parts[other * M * PITCH];
            if (p.bias) sum += p.bias[of];
            const int64_t at = row * p.y_stride + of;
            p.y.set(at, p.add ? p.y.get(at) + sum : sum);
        }
    }
}

#define PRODUCT(T, name, tiles)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, tiles <= 4 ? 2 : 1)                                              \
        decoder_product_##tiles##_##name(const __grid_constant__ Project args) {                                           \
        product<T, tiles>(args);                                                                                           \
    }
#define PRODUCTS(T, name) PRODUCT(T, name, 1) PRODUCT(T, name, 2) PRODUCT(T, name, 4) PRODUCT(T, name, 8)
PRODUCTS(f16, f16)
PRODUCTS(bf16, bf16)
