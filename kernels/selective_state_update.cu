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

template <typename T, int LANES, int V, int ROWS>
__device__ void update(const Update& args) {
    constexpr int GROUPS = 32 / LANES;  // rows that a warp reads at once
    const int lane = threadIdx.x % LANES;
    const int warp = (blockIdx.x * THREADS + threadIdx.x) / 32;
    const int64_t first = static_cast<int64_t>(warp) * (GROUPS * ROWS) + threadIdx.x % 32 / LANES;
    const int channels = args.nheads * args.headdim, n = args.d_state;
    const int heads_of_group = args.nheads / args.ngroups;

    int row[ROWS], channel[ROWS], head[ROWS];
    int64_t group[ROWS];  // where B and C start
    float decay[ROWS], input[ROWS], sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = min(first + r * GROUPS, static_cast<int64_t>(args.rows) - 1);  // some rows twice, written once
        const int b = row[r] / channels;
        channel[r] = row[r] % channels;
        head[r] = channel[r] / args.headdim;
        group[r] = (static_cast<int64_t>(b) * args.ngroups + head[r] / heads_of_group) * n;
        decay[r] = input[r] = sum[r] = 0.0f;
    }
    for (int i = lane * V; i < n; i += LANES * V) {
        float h[ROWS][V];
#pragma unroll
        for (int r = 0; r < ROWS; r++) load<V, true>(h[r], args.state + static_cast<int64_t>(row[r]) * n + i);
        if (i < LANES * V) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int b = row[r] / channels;
                float dt = to_float(
                    static_cast<const T*>(args.dt)[args.dt_per_head ? b * args.nheads + head[r] : row[r]]);
                if (args.dt_bias) dt += args.dt_bias.get(args.bias_per_head ? head[r] : channel[r]);
                if (args.dt_softplus) dt = softplus(dt);
                if (dt < args.low) dt = args.low;  // NaN stays NaN
                if (dt > args.high) dt = args.high;
                constexpr float LOG2_E = 1.4426950408889634f;
                decay[r] = dt * LOG2_E;
                if (args.a_per_head) decay[r] = exp2f(decay[r] * args.a.get(head[r]));
                input[r] = dt * to_float(static_cast<const T*>(args.x)[row[r]]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float a[V], b[V], c[V];
            load<V, true>(b, static_cast<const T*>(args.b) + group[r] + i);
            load<V, true>(c, static_cast<const T*>(args.c) + group[r] + i);
            if (!args.a_per_head) args.a.get<V, true>(a, static_cast<int64_t>(channel[r]) * n + i);
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float factor = args.a_per_head ? decay[r] : exp2f(decay[r] * a[v]);
                h[r][v] = fmaf(factor, h[r][v], input[r] * b[v]);
                sum[r] = fmaf(h[r][v], c[v], sum[r]);
            }
            if (first + r * GROUPS < args.rows)
                store<V, true>(args.state + static_cast<int64_t>(row[r]) * n + i, h[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float y = warp_sum<LANES>(sum[r]);
        if (lane != r % LANES || first + r * GROUPS >= args.rows) continue;
        if (args.d) {
            const float x = to_float(static_cast<const T*>(args.x)[row[r]]);
            y = fmaf(args.d.get(args.d_per_head ? head[r] : channel[r]), x, y);
        }
        if (args.z) y *= silu(to_float(static_cast<const T*>(args.z)[row[r]]));
        static_cast<T*>(args.y)[row[r]] = from_float<T>(y);
    }
}

#define KERNEL(symbol, T, lanes, v, rows)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) symbol(const __grid_constant__ Update args) { \
        update<T, lanes, v, rows>(args);                                                                \
    }
#define INSTANTIATE(T, name)                                    \
    KERNEL(selective_state_update_4v1_##name, T, 4, 4, 1)       \
    KERNEL(selective_state_update_4v4_##name, T, 4, 4, 4)       \
    KERNEL(selective_state_update_8v1_##name, T, 8, 4, 1)       \
    KERNEL(selective_state_update_8v4_##name, T, 8, 4, 4)       \
    KERNEL(selective_state_update_16v1_##name, T, 16, 4, 1)     \
    KERNEL(selective_state_update_16v4_##name, T, 16, 4, 4)     \
    KERNEL(selective_state_update_32v1_##name, T, 32, 4, 1)     \
    KERNEL(selective_state_update_32v4_##name, T, 32, 4, 4)     \
    KERNEL(selective_state_update_32_##name, T, 32, 1, 1)

FOR_EACH_DTYPE(INSTANTIATE)
