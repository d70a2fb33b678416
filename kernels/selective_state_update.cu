// One decoding step, the state changed in place: h ← exp(Δ·A) h + Δ·x ⊗ B, y = h C + D·x, gated by silu(z).
//
// A row is a channel, its state d_state neighbours in memory. LANES lanes share a row, each with V neighbouring states (then
// the next V·LANES, …), and a thread has ROWS rows whose states are on their way at once.

#include "elem.cuh"
#include "reduce.cuh"

struct Update {
    float* state;  // (b, h, p, n)
    const void *x, *dt, *b, *c;
    const void* z;  // or null
    void* y;
    Any a, d, dt_bias;  // the last two may be absent
    int rows;           // b·h·p
    int nheads, headdim, ngroups, d_state;
    int dt_per_head, a_per_head, d_per_head, bias_per_head, dt_softplus;
    float low, high;  // the bounds of Δ
};
static_assert(sizeof(Update) == 152, "as in cuda.rs");

constexpr int THREADS = 128;

template <typename T, int LANES, int V, int ROWS, bool A_PER_HEAD, bool SHARED>
__device__ void update(const Update& args) {
    constexpr int GROUPS = 32 / LANES;  // rows that a warp reads at once
    const int lane = threadIdx.x % LANES;
    const int warp = (blockIdx.x * THREADS + threadIdx.x) / 32;
    const int64_t first = static_cast<int64_t>(warp) * (GROUPS * ROWS) + threadIdx.x % 32 / LANES;
    const int channels = args.nheads * args.headdim, n = args.d_state;
    const int heads_of_group = args.nheads / args.ngroups;

    // All loads before the first use.
    int row[ROWS], channel[ROWS], head[ROWS];
    // B and C: with SHARED, all rows of a warp read the same.
    constexpr int GROUP_ROWS = SHARED ? 1 : ROWS;
    int64_t group[GROUP_ROWS];
    float h[ROWS][V], b[GROUP_ROWS][V], c[GROUP_ROWS][V], a[ROWS][V];
    float dt[ROWS], x[ROWS], z[ROWS], d[ROWS], bias[ROWS], decay[ROWS], sum[ROWS];
    const auto load_states = [&](int r, int i) {
        if (i < n) {
            load<V, true>(h[r], args.state + static_cast<int64_t>(row[r]) * n + i);
            if (r < GROUP_ROWS) {
                load<V, true>(b[r], static_cast<const T*>(args.b) + group[r] + i);
                load<V, true>(c[r], static_cast<const T*>(args.c) + group[r] + i);
            }
            if (!A_PER_HEAD) args.a.get<V, true>(a[r], static_cast<int64_t>(channel[r]) * n + i);
        }
    };
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = min(first + r * GROUPS, static_cast<int64_t>(args.rows) - 1);  // some rows twice, written once
        const int batch = row[r] / channels;
        channel[r] = row[r] - batch * channels;
        head[r] = channel[r] / args.headdim;
        if (r < GROUP_ROWS) group[r] = (static_cast<int64_t>(batch) * args.ngroups + head[r] / heads_of_group) * n;
        load_states(r, lane * V);
        dt[r] = to_float(
            static_cast<const T*>(args.dt)[args.dt_per_head ? batch * args.nheads + head[r] : row[r]]);
        x[r] = to_float(static_cast<const T*>(args.x)[row[r]]);
        z[r] = args.z ? to_float(static_cast<const T*>(args.z)[row[r]]) : 0.0f;
        sum[r] = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        bias[r] = args.dt_bias ? args.dt_bias.get(args.bias_per_head ? head[r] : channel[r]) : 0.0f;
        d[r] = args.d ? args.d.get(args.d_per_head ? head[r] : channel[r]) : 0.0f;
        decay[r] = A_PER_HEAD ? args.a.get(head[r]) : 1.0f;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        dt[r] += bias[r];
        if (args.dt_softplus) dt[r] = softplus(dt[r]);
        if (dt[r] < args.low) dt[r] = args.low;  // NaN stays NaN
        if (dt[r] > args.high) dt[r] = args.high;
        decay[r] *= dt[r] * LOG2_E;
        if (A_PER_HEAD) decay[r] = fast_exp2(decay[r]);
    }
    for (int i = lane * V; i < n; i += LANES * V) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float input = dt[r] * x[r];
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float factor = A_PER_HEAD ? decay[r] : fast_exp2(decay[r] * a[r][v]);
                h[r][v] = fmaf(factor, h[r][v], input * b[SHARED ? 0 : r][v]);
                sum[r] = fmaf(h[r][v], c[SHARED ? 0 : r][v], sum[r]);
            }
            if (first + r * GROUPS < args.rows)
                store<V, true>(args.state + static_cast<int64_t>(row[r]) * n + i, h[r]);
        }
        if (i + LANES * V < n) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) load_states(r, i + LANES * V);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float y = fmaf(d[r], x[r], warp_sum<LANES>(sum[r]));
        if (args.z) y *= silu(z[r]);
        if (lane == r % LANES && first + r * GROUPS < args.rows) static_cast<T*>(args.y)[row[r]] = from_float<T>(y);
    }
}

// Whether the rows of each warp are all of one group of one batch element.
template <int LANES, int ROWS>
__device__ inline bool shares_group(const Update& args) {
    return args.nheads / args.ngroups * args.headdim % (32 / LANES * ROWS) == 0;
}

// The registers are bounded for what models have: rows that share their group.
#define KERNEL(symbol, bound, T, lanes, v, rows)                                                     \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Update args) { \
        const bool shared = shares_group<lanes, rows>(args);                                         \
        if (args.a_per_head && shared)                                                               \
            update<T, lanes, v, rows, true, true>(args);                                             \
        else if (args.a_per_head)                                                                    \
            update<T, lanes, v, rows, true, false>(args);                                            \
        else if (shared)                                                                             \
            update<T, lanes, v, rows, false, true>(args);                                            \
        else                                                                                         \
            update<T, lanes, v, rows, false, false>(args);                                           \
    }
#define INSTANTIATE(T, name)                                                \
    KERNEL(selective_state_update_4v1_##name, (THREADS), T, 4, 4, 1)        \
    KERNEL(selective_state_update_4v4_##name, (THREADS, 5), T, 4, 4, 4)     \
    KERNEL(selective_state_update_8v1_##name, (THREADS), T, 8, 4, 1)        \
    KERNEL(selective_state_update_8v4_##name, (THREADS, 5), T, 8, 4, 4)     \
    KERNEL(selective_state_update_16v1_##name, (THREADS), T, 16, 4, 1)      \
    KERNEL(selective_state_update_16v4_##name, (THREADS, 6), T, 16, 4, 4)   \
    KERNEL(selective_state_update_32v1_##name, (THREADS), T, 32, 4, 1)      \
    KERNEL(selective_state_update_32v4_##name, (THREADS, 6), T, 32, 4, 4)   \
    KERNEL(selective_state_update_32_##name, (THREADS), T, 32, 1, 1)

FOR_EACH_DTYPE(INSTANTIATE)
