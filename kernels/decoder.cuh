// What the kernels of the decoder share: how they overlap, and what surrounds a product.
#pragma once

#include "elem.cuh"
#include "reduce.cuh"

// From here on the next kernel of the stream may begin, up to its own wait.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the kernels before this one to end. What comes before may only read what no kernel of the same token writes
// before: weights, and the states of this layer. (The embedding lets none begin before the last token has ended.)
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

enum Before : int { PLAIN = 0, RMS = 1, LAYER = 2, RMS_OF_GATED = 3, GATED_RMS = 4 };

// y = scale · f(x) Wᵀ ⊙ scales + bias + base, f a norm or nothing; or, for some outputs, without `base`, a step of the convolution.
struct Project {
    const void* weights[3];  // (.., inputs): the second one's outputs begin at `ends[0]`, the third one's at `ends[1]`
    const float* x;          // rows x_stride apart
    const float* z;          // the gate of the norm, rows z_stride apart
    const float *norm_weight, *norm_bias, *scales, *bias;  // the last three may be absent
    const float* base;       // as y, may be y itself or absent
    Any y;                   // rows y_stride apart
    const float *conv_weight, *conv_bias;
    float* window;           // (rows, conv_end - conv_begin, conv_width - 1)
    void* rounded;           // what the convolution gives once more, in the dtype of the weights, (rows, conv_end - conv_begin); or null
    int64_t x_stride, z_stride, y_stride;
    int ends[2];
    int rows, inputs, outputs;
    int before, norm_groups;
    float eps, scale;
    int conv_begin, conv_end, conv_width, conv_silu;
    int split;  // warps that share an output
};
static_assert(sizeof(Project) == 208, "as in arguments.rs");

// The weights of an output.
template <typename T> __device__ __forceinline__ const T* row_of(const Project& p, int output) {
    const void* weight = p.weights[0];
    int64_t row = output;
    if (output >= p.ends[0]) weight = p.weights[1], row = output - p.ends[0];
    if (output >= p.ends[1]) weight = p.weights[2], row = output - p.ends[1];
    return static_cast<const T*>(weight) + row * p.inputs;
}

// What a sum over the inputs becomes before anything is added that is there.
__device__ __forceinline__ float finished(const Project& p, int output, float sum) {
    sum *= p.scale;
    if (p.scales) sum *= p.scales[output];
    return p.bias ? sum + p.bias[output] : sum;
}

// Asks for weights of outputs from `first` on before they are needed: of each of them `bytes`, to the second cache. What runs before
// this kernel may leave the memory idle.
template <typename T> __device__ __forceinline__ void prefetch(const Project& p, int first, int count, int bytes) {
    constexpr int LINE = 128;
    const int lines = min(static_cast<int>(p.inputs * sizeof(T)), bytes) / LINE;
    for (int i = threadIdx.x; i < count * lines; i += blockDim.x) {
        const int output = first + i / lines;
        if (output >= p.outputs) return;
        const char* line = reinterpret_cast<const char*>(row_of<T>(p, output)) + i % lines * LINE;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
}

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int WIDEST = 4;  // taps of the convolution

// Where the four elements from 4k on of a row of inputs stand in shared memory, in fours: lanes that read 16 bytes of weights each
// read what belongs to it without conflicts if all first fours of 16 bytes come first, then all second fours.
template <int V> __device__ __forceinline__ int place(int k, int inputs) {
    constexpr int FOURS = V / 4;
    return k % FOURS * (inputs / V) + k / FOURS;
}

constexpr int AT_ONCE = 3;  // fours of a thread that are on their way together

// What a norm multiplies with, of the first fours of a thread: asked for ahead of the inputs.
struct NormAhead {
    float4 weight[AT_ONCE];

    __device__ void load(const Project& p, int fours) {
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int k = threadIdx.x + u * THREADS;
            if (p.before != PLAIN && k < fours) weight[u] = __ldg(reinterpret_cast<const float4*>(p.norm_weight) + k);
        }
    }
};

__device__ __forceinline__ float& of(float4& x, int i) { return (&x.x)[i]; }

// Reads all inputs into shared memory, through the norm; rows that are not there are 0. `scratch` holds ROWS sums a warp.
template <int ROWS, int V> __device__ void read_inputs(const Project& p, const NormAhead& ahead, float4* x, float* scratch) {
    const int size = p.inputs / p.norm_groups, fours = size / 4, warp = threadIdx.x / 32;
    for (int group = 0; group < p.norm_groups; group++) {
        const int begin = group * fours;
        float sums[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float4* row = x + r * (p.inputs / 4);
            for (int first = threadIdx.x; first < fours; first += AT_ONCE * THREADS) {
                float4 values[AT_ONCE], z[AT_ONCE];
#pragma unroll
                for (int u = 0; u < AT_ONCE; u++) {
                    const int k = first + u * THREADS;
                    const bool there = k < fours && r < p.rows;
                    values[u] = z[u] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (there) values[u] = reinterpret_cast<const float4*>(p.x + r * p.x_stride)[begin + k];
                    if (there && p.before == RMS_OF_GATED)
                        z[u] = reinterpret_cast<const float4*>(p.z + r * p.z_stride)[begin + k];
                }
#pragma unroll
                for (int u = 0; u < AT_ONCE; u++) {
                    const int k = first + u * THREADS;
                    if (k >= fours) continue;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float& value = of(values[u], i);
                        if (p.before == RMS_OF_GATED) value *= silu(of(z[u], i));
                        sums[r] += p.before == LAYER ? value : value * value;
                    }
                    row[place<V>(begin + k, p.inputs)] = values[u];
                }
            }
        }
        if (p.before == PLAIN) continue;
        block_sum<ROWS>(sums, scratch, warp, WARPS);
        float mean[ROWS] = {};
        if (p.before == LAYER) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                mean[r] = sums[r] / size;
                sums[r] = 0.0f;
                for (int k = threadIdx.x; k < fours; k += THREADS) {
                    float4 values = x[r * (p.inputs / 4) + place<V>(begin + k, p.inputs)];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float value = of(values, i) - mean[r];
                        sums[r] += value * value;
                    }
                }
            }
            block_sum<ROWS>(sums, scratch, warp, WARPS);
        }
        float scale[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) scale[r] = rsqrtf(sums[r] / size + p.eps);
        const auto normalise = [&](int k, float4 weight) {
            float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (p.norm_bias) bias = __ldg(reinterpret_cast<const float4*>(p.norm_bias) + begin + k);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float4& values = x[r * (p.inputs / 4) + place<V>(begin + k, p.inputs)];
                const bool gated = p.before == GATED_RMS && r < p.rows;
                float4 z;
                if (gated) z = reinterpret_cast<const float4*>(p.z + r * p.z_stride)[begin + k];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& value = of(values, i);
                    value = fmaf((value - mean[r]) * scale[r], of(weight, i), of(bias, i));
                    if (gated) value *= silu(of(z, i));
                }
            }
        };
        const auto weight = [&](int k) { return __ldg(reinterpret_cast<const float4*>(p.norm_weight) + begin + k); };
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int k = threadIdx.x + u * THREADS;
            if (k < fours) normalise(k, group == 0 ? ahead.weight[u] : weight(k));
        }
        for (int k = threadIdx.x + AT_ONCE * THREADS; k < fours; k += THREADS) normalise(k, weight(k));
    }
}

// What a step of the convolution needs of one channel, ahead of its newest input; taps that a narrow filter lacks are 0.
struct Taps {
    float window[WIDEST - 1], weight[WIDEST], bias;

    __device__ void load(const Project& p, int row, int channel) {
        const int missing = WIDEST - p.conv_width;
        const int64_t at = static_cast<int64_t>(row) * (p.conv_end - p.conv_begin) + channel;
#pragma unroll
        for (int k = 0; k < WIDEST; k++) {
            const bool there = k >= missing;
            weight[k] = there ? __ldg(p.conv_weight + static_cast<int64_t>(channel) * p.conv_width + k - missing) : 0.0f;
            if (k < WIDEST - 1) window[k] = there ? p.window[at * (p.conv_width - 1) + k - missing] : 0.0f;
        }
        bias = p.conv_bias ? __ldg(p.conv_bias + channel) : 0.0f;
    }

    __device__ float step(const Project& p, int row, int channel, float x) const {
        float sum = fmaf(weight[WIDEST - 1], x, bias);
        const int missing = WIDEST - p.conv_width;
        const int64_t at = static_cast<int64_t>(row) * (p.conv_end - p.conv_begin) + channel;
#pragma unroll
        for (int k = 0; k < WIDEST - 1; k++) {
            sum = fmaf(weight[k], window[k], sum);
            if (k >= missing) p.window[at * (p.conv_width - 1) + k - missing] = k + 1 < WIDEST - 1 ? window[k + 1] : x;
        }
        return p.conv_silu ? silu(sum) : sum;
    }
};
