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
#include "scalar.cuh"

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
    int64_t z_stride;  // from one row of z to the next: it is often a part of wider rows
};
static_assert(sizeof(Norm) == 104, "as in cuda.rs");

struct NormForward {
    Norm norm;
    void* y;
    Any sum;  // x + residual, if asked for
};
static_assert(sizeof(NormForward) == 128, "as in cuda.rs");

struct NormBackward {
    Norm norm;
    const void* grad_y;  // or null
    Any grad_sum;
    Any dresidual;
    void *dx, *dz;
    float *dweight, *dbias;  // (gridDim.x · blockDim.y, dim): the sums over some of the rows; null if not asked for
};
static_assert(sizeof(NormBackward) == 176, "as in cuda.rs");

constexpr int V = 8, THREADS = 512;

// The place of one thread in its group.
template <int PACKS>
struct Place {
    int64_t start;    // of the group, in x
    int64_t start_z;  // and in z
    int column;       // of the group, in the weight
    int size;

    __device__ Place(const Norm& norm, int64_t row, int column)
        : start(row * norm.dim + column), start_z(row * norm.z_stride + column), column(column), size(norm.group_size) {}
    __device__ int offset(int k) const { return (k * blockDim.x + threadIdx.x) * V; }
    // Of a pack in x; of one beyond the end, the start of the group.
    __device__ int64_t element(int k) const { return start + inside(k); }
    __device__ int64_t element_z(int k) const { return start_z + inside(k); }
    __device__ int inside(int k) const { return offset(k) < size ? offset(k) : 0; }
    __device__ int count(int k) const { return max(0, min(V, size - offset(k))); }
};

template <int N>
__device__ inline void sum_group(float (&sums)[N], float* scratch) {
    block_sum(sums, scratch, threadIdx.x / 32, blockDim.x / 32);
}

// Takes the mean of a group away from it.
template <int PACKS>
__device__ void subtract_mean(float (&u)[PACKS][V], const Place<PACKS>& at, float* scratch) {
    // The second time takes away what rounding left of a mean that is large beside the spread.
    for (int time = 0; time < 2; time++) {
        float sum[1] = {0.0f};
#pragma unroll
        for (int k = 0; k < PACKS; k++)
#pragma unroll
            for (int v = 0; v < V; v++) sum[0] += u[k][v];
        sum_group(sum, scratch);
        const float mean = sum[0] / static_cast<float>(at.size);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int count = at.count(k);
#pragma unroll
            for (int v = 0; v < V; v++)
                if (v < count) u[k][v] -= mean;
        }
    }
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
                load<V, VECTOR>(z[k], static_cast<const T*>(norm.z) + at.element_z(k), at.count(k));
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
        if (norm.layer) subtract_mean(u, at, scratch);
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
    const Place<PACKS> at(norm, row, column);
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

// The gradients of one group after another, each thread with the sums over them for its columns. What a group is read from
// stays as it came, and the next group is on its way meanwhile; weights wait in shared memory. PLAIN: without mean and bias, so
// that one sum over the group is enough, that of u² beside that of g·w·u, and with a gate without a residual stream.
template <typename T, int PACKS, bool VECTOR, int GATE, bool PLAIN>
__device__ void backward(const NormBackward& args) {
    __shared__ float scratch[3 * 32];
    extern __shared__ float4 weights[];  // of each thread its own
    const Norm& norm = args.norm;
    const int gate = GATE == ANY_GATE ? norm.gate : GATE;
    const bool stream = !PLAIN || GATE == WITHOUT;
    const int column = blockIdx.y * norm.group_size;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    const float inverse = 1.0f / static_cast<float>(norm.group_size);
    Raw<T, V> next_x[PACKS], next_z[PACKS], next_g[PACKS];
    const auto fetch_group = [&](int64_t row) {
        const Place<PACKS> at(norm, row, column);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            next_x[k].template fetch<VECTOR>(static_cast<const T*>(norm.x) + at.element(k), at.count(k));
            if (gate != WITHOUT) next_z[k].template fetch<VECTOR>(static_cast<const T*>(norm.z) + at.element_z(k), at.count(k));
            if (args.grad_y) next_g[k].template fetch<VECTOR>(static_cast<const T*>(args.grad_y) + at.element(k), at.count(k));
        }
    };
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const auto weight = [&](int k, float (&w)[V]) {
#pragma unroll
        for (int i = 0; i < V / 4; i++) {
            const float4 four = weights[(k * (V / 4) + i) * blockDim.y * blockDim.x + thread];
            w[4 * i] = four.x, w[4 * i + 1] = four.y, w[4 * i + 2] = four.z, w[4 * i + 3] = four.w;
        }
    };
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const Place<PACKS> at(norm, 0, column);
        float w[V];
        parameter<VECTOR>(w, norm.weight, column + at.offset(k), at.count(k), 1.0f);
#pragma unroll
        for (int i = 0; i < V / 4; i++) {
            weights[(k * (V / 4) + i) * blockDim.y * blockDim.x + thread] =
                make_float4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
        }
    }
    float dw[PACKS][V] = {}, db[PACKS][V] = {};
    if (part < norm.rows) fetch_group(part);
    for (int64_t row = part; row < norm.rows; row += step) {
        const Place<PACKS> at(norm, row, column);
        float r[PACKS][V], u[PACKS][V];  // x + residual; u, then less the mean
        Raw<T, V> x[PACKS], z[PACKS], g[PACKS];
        const auto unpack = [&](int k) {
            const bool inside = at.count(k) > 0;
#pragma unroll
            for (int v = 0; v < V; v++) {
                r[k][v] = inside ? x[k].get(v) : 0.0f;
                u[k][v] = gate == BEFORE ? r[k][v] * silu(z[k].get(v)) : r[k][v];
            }
        };
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const bool inside = at.count(k) > 0;
            x[k] = next_x[k], z[k] = next_z[k], g[k] = next_g[k];
            if (gate == WITHOUT) z[k].clear();
            if (!args.grad_y || !inside) g[k].clear();
            unpack(k);
            if (stream && norm.residual) {
                float residual[V];
                norm.residual.get<V, VECTOR>(residual, at.element(k), at.count(k));
#pragma unroll
                for (int v = 0; v < V; v++) {
                    if (inside) r[k][v] += residual[v];
                    u[k][v] = gate == BEFORE ? r[k][v] * silu(z[k].get(v)) : r[k][v];
                }
            }
        }
        if (row + step < norm.rows) fetch_group(row + step);
        if (!PLAIN && norm.layer) subtract_mean(u, at, scratch);

        float sums[3] = {};  // of u², of g·w·u and of g·w, with g the gradient of û·w + b
        const auto of_normed = [&](int k, int v) { return g[k].get(v) * (gate == AFTER ? silu(z[k].get(v)) : 1.0f); };
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            float w[V];
            weight(k, w);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float weighted = __fmul_rn(of_normed(k, v), w[v]);  // rounded, as where the mean is taken off
                sums[0] = fmaf(u[k][v], u[k][v], sums[0]);
                sums[1] = fmaf(weighted, u[k][v], sums[1]);
                if (!PLAIN) sums[2] += weighted;
            }
        }
        sum_group(sums, scratch);
        const float rho = rsqrtf(fmaf(sums[0], inverse, norm.eps));
        const float along = -sums[1] * rho * inverse, mean = !PLAIN && norm.layer ? sums[2] * inverse : 0.0f;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const int count = at.count(k);
            if (count == 0) continue;
            const int64_t i = at.start + at.offset(k);
            if (!stream) {  // registers for what is computed twice would be too many
                x[k].forget(), z[k].forget(), g[k].forget();
                unpack(k);
            }
            float w[V], b[V] = {}, of_r[V], of_z[V];
            weight(k, w);
            if (!PLAIN && gate == AFTER) parameter<VECTOR>(b, norm.bias, column + at.offset(k), count, 0.0f);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float normed = u[k][v] * rho, gradient = of_normed(k, v), before = z[k].get(v);
                dw[k][v] = fmaf(gradient, normed, dw[k][v]);
                if (!PLAIN) db[k][v] += gradient;
                const float of_u = rho * fmaf(along, normed, __fmul_rn(gradient, w[v]) - mean);
                of_r[v] = gate == BEFORE ? of_u * silu(before) : of_u;
                of_z[v] = gate == BEFORE ? of_u * r[k][v] * silu_slope(before)
                                         : g[k].get(v) * fmaf(normed, w[v], b[v]) * silu_slope(before);
            }
            if (stream && args.grad_sum) {
                float more[V];
                args.grad_sum.get<V, VECTOR>(more, i, count);
#pragma unroll
                for (int v = 0; v < V; v++) of_r[v] += more[v];
            }
            if (args.dx) store<V, VECTOR>(static_cast<T*>(args.dx) + i, of_r, count);
            if (stream && args.dresidual) args.dresidual.set<V, VECTOR>(i, of_r, count);
            if (args.dz) store<V, VECTOR>(static_cast<T*>(args.dz) + i, of_z, count);
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const Place<PACKS> at(norm, 0, column);
        const int count = at.count(k);
        if (count == 0) continue;
        const int64_t i = part * norm.dim + column + at.offset(k);
        if (args.dweight) store<V, VECTOR>(args.dweight + i, dw[k], count);
        if (args.dbias) store<V, VECTOR>(args.dbias + i, db[k], count);
    }
}

#define KERNEL(symbol, bound, Args, ...) \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Args args) { __VA_ARGS__ }
// What is in registers depends on the gate: bodies of their own within one bound.
#define BY_GATE(symbol, bound, Args, function, T, packs, ...)                              \
    KERNEL(symbol, bound, Args, switch (args.norm.gate) {                                  \
        case WITHOUT: return function<T, packs, true, WITHOUT, ##__VA_ARGS__>(args);       \
        case BEFORE: return function<T, packs, true, BEFORE, ##__VA_ARGS__>(args);         \
        default: return function<T, packs, true, AFTER, ##__VA_ARGS__>(args);              \
    })
#define ANY(symbol, Args, function, T, packs, vector, ...) \
    KERNEL(symbol, (THREADS), Args, function<T, packs, vector, ANY_GATE, ##__VA_ARGS__>(args);)
#define INSTANTIATE(T, name)                                                               \
    BY_GATE(norm_fwd_1v_##name, (THREADS), NormForward, forward, T, 1)                     \
    BY_GATE(norm_fwd_2v_##name, (THREADS, 2), NormForward, forward, T, 2)                  \
    ANY(norm_fwd_4v_##name, NormForward, forward, T, 4, true)                              \
    ANY(norm_fwd_4_##name, NormForward, forward, T, 4, false)                              \
    BY_GATE(norm_bwd_plain1v_##name, (THREADS, 2), NormBackward, backward, T, 1, true)     \
    BY_GATE(norm_bwd_plain2v_##name, (THREADS), NormBackward, backward, T, 2, true)             \
    ANY(norm_bwd_1v_##name, NormBackward, backward, T, 1, true, false)                     \
    ANY(norm_bwd_2v_##name, NormBackward, backward, T, 2, true, false)                     \
    ANY(norm_bwd_4v_##name, NormBackward, backward, T, 4, true, false)                     \
    ANY(norm_bwd_4_##name, NormBackward, backward, T, 4, false, false)

FOR_EACH_DTYPE(INSTANTIATE)
