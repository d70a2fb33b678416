// RMSNorm and layer norm with residual stream, gate and groups, forward and backward, as in cpu.rs:
//
// r = x + residual, s = silu(z), u = r·s or r, û = (u - m)·ρ, ρ = 1 / √(Σ (u - m)² / n + eps): y = û·w + b, times s if the
// gate comes after. Backward, with g the gradient of û·w + b: db = Σ g, dw = Σ g·û,
// du = ρ·(g·w - û·mean(g·w·û) - mean(g·w)) (the last mean for layer norm alone), dr = du, or du·s and dz = du·r·s' with the
// gate before; after, g = dy·s and dz = dy·(û·w + b)·s'.
//
// blockDim.x threads share a group of a row, each with PACKS packs of V neighbours in registers; a warp is enough for a small
// group, and blockDim.y of them share a block.

#include "elem.cuh"
#include "reduce.cuh"

enum Gate : int { WITHOUT = 0, BEFORE = 1, AFTER = 2 };

struct Norm {
    const void* x;
    const void* z;  // or null
    Any weight, bias, residual;
    int64_t rows;
    int dim, group_size;
    float eps;
    int layer;
    int gate;
    int padding;
};
static_assert(sizeof(Norm) == 96, "as in cuda.rs");

struct NormForward {
    Norm norm;
    void* y;
    Any sum;  // x + residual, if asked for
};
static_assert(sizeof(NormForward) == 120, "as in cuda.rs");

struct NormBackward {
    Norm norm;
    const void* grad_y;  // or null
    Any grad_sum;
    Any dx, dresidual;
    void* dz;
    float *dweight, *dbias;  // (gridDim.x · blockDim.y, dim): the sums over some of the rows; null if not asked for
};
static_assert(sizeof(NormBackward) == 176, "as in cuda.rs");

constexpr int V = 8;

// The place of one thread in its group.
template <int PACKS>
struct Place {
    int64_t start;  // of the group, in x
    int column;     // of the group, in the weight
    int size;

    __device__ int offset(int k) const { return (k * blockDim.x + threadIdx.x) * V; }
    // Of a pack in x; of one beyond the end, the start of the group.
    __device__ int64_t element(int k) const { return start + (offset(k) < size ? offset(k) : 0); }
    __device__ int count(int k) const { return max(0, min(V, size - offset(k))); }
};

template <int N>
__device__ inline void sum_group(float (&sums)[N], float* scratch) {
    block_sum(sums, scratch, threadIdx.x / 32, blockDim.x / 32);
}

// GATE as in `Gate`, or any: then it is what `norm.gate` says.
constexpr int ANY_GATE = -1;

template <typename T, int PACKS, bool VECTOR, int GATE>
struct Group {
    float r[PACKS][V];  // x + residual
    float u[PACKS][V];  // û
    float z[PACKS][V];
    float rho;

    __device__ static int gate(const Norm& norm) { return GATE == ANY_GATE ? norm.gate : GATE; }

    __device__ void load_sum(const Norm& norm, const Place<PACKS>& at) {
        // All loads before the first use: threads beyond the end read the start of the group, and take 0.
        float residual[PACKS][V];
#pragma unroll
        for (int k = 0; k < PACKS; k++) load<V, VECTOR>(r[k], static_cast<const T*>(norm.x) + at.element(k), at.count(k));
        if (gate(norm) != WITHOUT) {
#pragma unroll
            for (int k = 0; k < PACKS; k++)
                load<V, VECTOR>(z[k], static_cast<const T*>(norm.z) + at.element(k), at.count(k));
        }
        if (norm.residual) {
#pragma unroll
            for (int k = 0; k < PACKS; k++) norm.residual.get<V, VECTOR>(residual[k], at.element(k), at.count(k));
        }
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const bool inside = at.count(k) > 0;
#pragma unroll
            for (int v = 0; v < V; v++) {
                if (norm.residual) r[k][v] += residual[k][v];
                if (!inside) r[k][v] = 0.0f;
                if (!inside || gate(norm) == WITHOUT) z[k][v] = 0.0f;
            }
        }
    }

    __device__ void normalise(const Norm& norm, const Place<PACKS>& at, float* scratch) {
#pragma unroll
        for (int k = 0; k < PACKS; k++)
#pragma unroll
            for (int v = 0; v < V; v++) u[k][v] = gate(norm) == BEFORE ? r[k][v] * silu(z[k][v]) : r[k][v];
        const float inverse = 1.0f / static_cast<float>(at.size);
        if (norm.layer) {
            // The second time takes away what rounding left of a mean that is large beside the spread.
            for (int time = 0; time < 2; time++) {
                float sum[1] = {0.0f};
#pragma unroll
                for (int k = 0; k < PACKS; k++)
#pragma unroll
                    for (int v = 0; v < V; v++) sum[0] += u[k][v];
                sum_group(sum, scratch);
                const float mean = sum[0] * inverse;
#pragma unroll
                for (int k = 0; k < PACKS; k++) {
                    const int count = at.count(k);
#pragma unroll
                    for (int v = 0; v < V; v++)
                        if (v < count) u[k][v] -= mean;
                }
            }
        }
        float square[1] = {0.0f};
#pragma unroll
        for (int k = 0; k < PACKS; k++)
#pragma unroll
            for (int v = 0; v < V; v++) square[0] = fmaf(u[k][v], u[k][v], square[0]);
        sum_group(square, scratch);
        rho = rsqrtf(square[0] * inverse + norm.eps);
#pragma unroll
        for (int k = 0; k < PACKS; k++)
#pragma unroll
            for (int v = 0; v < V; v++) u[k][v] *= rho;
    }
};

// The weight or bias of a pack, or what stands for it.
template <bool VECTOR>
__device__ inline void parameter(float (&out)[V], const Any& x, int64_t i, int count, float otherwise) {
#pragma unroll
    for (int v = 0; v < V; v++) out[v] = otherwise;
    if (x && count > 0) x.get<V, VECTOR>(out, i, count);
}

template <typename T, int PACKS, bool VECTOR, int GATE>
__device__ void forward(const NormForward& args) {
    __shared__ float scratch[32];
    const Norm& norm = args.norm;
    const int groups = norm.dim / norm.group_size;
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (unit >= norm.rows * groups) return;
    const int64_t row = unit / groups;
    const int column = unit % groups * norm.group_size;
    const Place<PACKS> at{row * norm.dim + column, column, norm.group_size};
    Group<T, PACKS, VECTOR, GATE> group;
    const int gate = group.gate(norm);
    group.load_sum(norm, at);
    if (args.sum) {
#pragma unroll
        for (int k = 0; k < PACKS; k++)
            if (at.count(k) > 0) args.sum.set<V, VECTOR>(at.start + at.offset(k), group.r[k], at.count(k));
    }
    group.normalise(norm, at, scratch);
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int count = at.count(k);
        if (count == 0) continue;
        float w[V], b[V], y[V];
        parameter<VECTOR>(w, norm.weight, column + at.offset(k), count, 1.0f);
        parameter<VECTOR>(b, norm.bias, column + at.offset(k), count, 0.0f);
#pragma unroll
        for (int v = 0; v < V; v++) {
            y[v] = fmaf(group.u[k][v], w[v], b[v]);
            if (gate == AFTER) y[v] *= silu(group.z[k][v]);
        }
        store<V, VECTOR>(static_cast<T*>(args.y) + at.start + at.offset(k), y, count);
    }
}

template <typename T, int PACKS, bool VECTOR, int GATE>
__device__ void backward(const NormBackward& args) {
    __shared__ float scratch[64];
    const Norm& norm = args.norm;
    const int column = blockIdx.y * norm.group_size;
    float dw[PACKS][V] = {}, db[PACKS][V] = {};
    const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    for (int64_t row = part; row < norm.rows; row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
        const Place<PACKS> at{row * norm.dim + column, column, norm.group_size};
        Group<T, PACKS, VECTOR, GATE> group;
    const int gate = group.gate(norm);
        group.load_sum(norm, at);
        float g[PACKS][V];  // the gradient of û, then of r; that of z takes the place of z
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
#pragma unroll
            for (int v = 0; v < V; v++) g[k][v] = 0.0f;
            if (args.grad_y)
                load<V, VECTOR>(g[k], static_cast<const T*>(args.grad_y) + at.element(k), at.count(k));
            if (at.count(k) == 0) {
#pragma unroll
                for (int v = 0; v < V; v++) g[k][v] = 0.0f;
            }
        }
        if (args.grad_y) {
            group.normalise(norm, at, scratch);
            float sums[2] = {};  // of g·w·û and of g·w
#pragma unroll
            for (int k = 0; k < PACKS; k++) {
                const int count = at.count(k);
                float w[V], b[V];
                parameter<VECTOR>(w, norm.weight, column + at.offset(k), count, 1.0f);
                if (gate == AFTER) parameter<VECTOR>(b, norm.bias, column + at.offset(k), count, 0.0f);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const float u = group.u[k][v];
                    if (gate == AFTER) {
                        const float z = group.z[k][v];
                        group.z[k][v] = g[k][v] * fmaf(u, w[v], b[v]) * silu_slope(z);
                        g[k][v] *= silu(z);
                    }
                    db[k][v] += g[k][v];
                    dw[k][v] = fmaf(g[k][v], u, dw[k][v]);
                    g[k][v] *= w[v];
                    sums[0] = fmaf(g[k][v], u, sums[0]);
                    sums[1] += g[k][v];
                }
            }
            sum_group(sums, scratch);
            const float inverse = 1.0f / static_cast<float>(at.size);
            const float along = -sums[0] * inverse, mean = norm.layer ? sums[1] * inverse : 0.0f;
#pragma unroll
            for (int k = 0; k < PACKS; k++)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    const float du = group.rho * fmaf(along, group.u[k][v], g[k][v] - mean);
                    g[k][v] = du;
                    if (gate == BEFORE) {
                        const float z = group.z[k][v];
                        group.z[k][v] = du * group.r[k][v] * silu_slope(z);
                        g[k][v] = du * silu(z);
                    }
                }
        } else {
#pragma unroll
            for (int k = 0; k < PACKS; k++)
#pragma unroll
                for (int v = 0; v < V; v++) group.z[k][v] = 0.0f;
        }
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int count = at.count(k);
            const int64_t i = at.start + at.offset(k);
            if (count == 0) continue;
            if (args.grad_sum) {
                float more[V];
                args.grad_sum.get<V, VECTOR>(more, i, count);
#pragma unroll
                for (int v = 0; v < V; v++) g[k][v] += more[v];
            }
            if (args.dx) args.dx.set<V, VECTOR>(i, g[k], count);
            if (args.dresidual) args.dresidual.set<V, VECTOR>(i, g[k], count);
            if (args.dz) store<V, VECTOR>(static_cast<T*>(args.dz) + i, group.z[k], count);
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const Place<PACKS> at{0, column, norm.group_size};
        const int count = at.count(k);
        if (count == 0) continue;
        const int64_t i = part * norm.dim + column + at.offset(k);
        if (args.dweight) store<V, VECTOR>(args.dweight + i, dw[k], count);
        if (args.dbias) store<V, VECTOR>(args.dbias + i, db[k], count);
    }
}

constexpr int THREADS = 512;

#define KERNEL(symbol, bound, Args, function)                                                      \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Args args) { \
        function(args);                                                                            \
    }
// What is in registers depends on the gate: bodies of their own within one bound.
#define BY_GATE(symbol, bound, Args, function, T, packs)                            \
    extern "C" __global__ void bound symbol(const __grid_constant__ Args args) {    \
        switch (args.norm.gate) {                                                   \
            case WITHOUT: return function<T, packs, true, WITHOUT>(args);           \
            case BEFORE: return function<T, packs, true, BEFORE>(args);             \
            default: return function<T, packs, true, AFTER>(args);                  \
        }                                                                           \
    }
#define COMMA ,
#define INSTANTIATE(T, name)                                                                                  \
    BY_GATE(norm_fwd_1v_##name, __launch_bounds__(THREADS), NormForward, forward, T, 1)                       \
    BY_GATE(norm_fwd_2v_##name, __launch_bounds__(THREADS COMMA 2), NormForward, forward, T, 2)               \
    KERNEL(norm_fwd_4v_##name, (THREADS), NormForward, (forward<T COMMA 4 COMMA true COMMA ANY_GATE>))        \
    KERNEL(norm_fwd_4_##name, (THREADS), NormForward, (forward<T COMMA 4 COMMA false COMMA ANY_GATE>))        \
    BY_GATE(norm_bwd_1v_##name, __launch_bounds__(THREADS COMMA 2), NormBackward, backward, T, 1)             \
    BY_GATE(norm_bwd_2v_##name, __launch_bounds__(THREADS), NormBackward, backward, T, 2)                     \
    KERNEL(norm_bwd_4v_##name, (THREADS), NormBackward, (backward<T COMMA 4 COMMA true COMMA ANY_GATE>))      \
    KERNEL(norm_bwd_4_##name, (THREADS), NormBackward, (backward<T COMMA 4 COMMA false COMMA ANY_GATE>))

FOR_EACH_DTYPE(INSTANTIATE)
