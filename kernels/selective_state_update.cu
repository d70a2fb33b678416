// One decoding step, the state changed in place: h ← exp(Δ·A) h + Δ·x ⊗ B, y = h C + D·x, gated by silu(z).
//
// A row is a channel of a batch element, its state d_state neighbours in memory. LANES lanes share a row, each with V neighbouring
// states (then the next V·LANES, …), and a thread has ROWS rows whose states are on their way at once: neighbouring channels
// where a decays by head, and where it has a row for each channel, that channel of several batch elements, which share it.
// The state of a batch element is that with its number, or with its index in a pool; one with a negative index is padding, which has
// no state and of which y is 0.

#include "elem.cuh"
#include "reduce.cuh"
#include "scalar.cuh"

struct Update {
    float* state;       // (b, h, p, n), or of a pool
    const int* states;  // (b): indices into it; or null
    const void *x, *dt, *b, *c;
    const void* z;  // or null
    void* y;
    Any a, d, dt_bias;  // the last two may be absent
    int rows;           // b·h·p
    int nheads, headdim, ngroups, d_state;
    int dt_per_head, a_per_head, d_per_head, bias_per_head, dt_softplus;
    float low, high;  // the bounds of Δ
};
static_assert(sizeof(Update) == 160, "as in cuda.rs");

constexpr int THREADS = 128;

__device__ inline int state_of(const Update& args, int batch) { return args.states ? args.states[batch] : batch; }

// Δ of a row, after bias, softplus and bounds.
__device__ inline float bounded_step(const Update& args, float dt) {
    if (args.dt_softplus) dt = softplus(dt);
    if (dt < args.low) dt = args.low;  // NaN stays NaN
    if (dt > args.high) dt = args.high;
    return dt;
}

template <typename T, int LANES, int V, int ROWS, bool SHARED>
__device__ void update_heads(const Update& args) {
    constexpr int GROUPS = 32 / LANES;  // rows that a warp reads at once
    const int lane = threadIdx.x % LANES;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / 32;
    const int64_t first = warp * (GROUPS * ROWS) + threadIdx.x % 32 / LANES;
    const int channels = args.nheads * args.headdim, n = args.d_state;
    const int heads_of_group = args.nheads / args.ngroups;

    // All loads before the first use.
    int row[ROWS], channel[ROWS], head[ROWS];
    // With SHARED, all rows of a warp are of one batch element and read the same B and C.
    constexpr int GROUP_ROWS = SHARED ? 1 : ROWS;
    float* states[GROUP_ROWS];  // where that of row 0 would be
    bool padding[GROUP_ROWS];
    int64_t group[GROUP_ROWS];
    float h[ROWS][V], b[GROUP_ROWS][V], c[GROUP_ROWS][V];
    float dt[ROWS], x[ROWS], z[ROWS], d[ROWS], bias[ROWS], decay[ROWS], sum[ROWS];
    const auto load_states = [&](int r, int i) {
        if (i < n) {
            if (!padding[SHARED ? 0 : r]) load<V, true>(h[r], states[SHARED ? 0 : r] + static_cast<int64_t>(row[r]) * n + i);
            if (r < GROUP_ROWS) {
                load<V, true>(b[r], static_cast<const T*>(args.b) + group[r] + i);
                load<V, true>(c[r], static_cast<const T*>(args.c) + group[r] + i);
            }
        }
    };
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        row[r] = min(first + r * GROUPS, static_cast<int64_t>(args.rows) - 1);  // some rows twice, written once
        const int batch = row[r] / channels;
        channel[r] = row[r] - batch * channels;
        head[r] = channel[r] / args.headdim;
        if (r < GROUP_ROWS) {
            group[r] = (static_cast<int64_t>(batch) * args.ngroups + head[r] / heads_of_group) * n;
            const int place = state_of(args, batch);
            padding[r] = place < 0;
            states[r] = args.state + static_cast<int64_t>(padding[r] ? 0 : place - batch) * channels * n;
        }
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
        decay[r] = args.a.get(head[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        dt[r] = bounded_step(args, dt[r] + bias[r]);
        decay[r] = fast_exp2(decay[r] * (dt[r] * LOG2_E));
    }
    for (int i = lane * V; i < n; i += LANES * V) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float input = dt[r] * x[r];
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[r][v] = fmaf(decay[r], h[r][v], input * b[SHARED ? 0 : r][v]);
                sum[r] = fmaf(h[r][v], c[SHARED ? 0 : r][v], sum[r]);
            }
            if (first + r * GROUPS < args.rows && !padding[SHARED ? 0 : r])
                store<V, true>(states[SHARED ? 0 : r] + static_cast<int64_t>(row[r]) * n + i, h[r]);
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
        if (padding[SHARED ? 0 : r]) y = 0.0f;
        if (lane == r % LANES && first + r * GROUPS < args.rows) static_cast<T*>(args.y)[row[r]] = from_float<T>(y);
    }
}

// As `update_heads`, with a row of a for each channel; rows of a thread are of one channel.
template <typename T, int LANES, int V, int ROWS>
__device__ void update_channels(const Update& args) {
    constexpr int CHANNELS = THREADS / LANES;
    const int lane = threadIdx.x % LANES;
    const int channels = args.nheads * args.headdim, n = args.d_state;
    const int batch_size = args.rows / channels;
    const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
    const int place = blockIdx.x % blocks * CHANNELS + threadIdx.x / LANES;
    const int channel = min(place, channels - 1);  // some twice, written once
    const int first = blockIdx.x / blocks * ROWS;
    const int head = channel / args.headdim, group = head / (args.nheads / args.ngroups);

    // What there is one of in a row is the work of one lane of it: lanes [i·LANES/ROWS, …) have row i.
    const int own = lane / (LANES / ROWS), own_batch = min(first + own, batch_size - 1);
    const int64_t own_row = static_cast<int64_t>(own_batch) * channels + channel;
    float h[ROWS][V], a[V];
    float* state[ROWS];  // null of padding
    bool is_padding = false;  // the own one
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int place = state_of(args, min(first + r, batch_size - 1));
        state[r] = place < 0 ? nullptr : args.state + (static_cast<int64_t>(place) * channels + channel) * n;
        if (r == own) is_padding = place < 0;
    }
    Raw<T, V> b[ROWS], c[ROWS];
    const auto load_states = [&](int i) {
        if (i >= n) return;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int batch = min(first + r, batch_size - 1);
            if (state[r]) load<V, true>(h[r], state[r] + i);
            const int64_t coefficients = (static_cast<int64_t>(batch) * args.ngroups + group) * n + i;
            b[r].load(static_cast<const T*>(args.b) + coefficients);
            c[r].load(static_cast<const T*>(args.c) + coefficients);
        }
        args.a.get<V, true>(a, static_cast<int64_t>(channel) * n + i);
    };
    load_states(lane * V);
    const float raw = to_float(static_cast<const T*>(
        args.dt)[args.dt_per_head ? static_cast<int64_t>(own_batch) * args.nheads + head : own_row]);
    const float x = to_float(static_cast<const T*>(args.x)[own_row]);
    const float z = args.z ? to_float(static_cast<const T*>(args.z)[own_row]) : 0.0f;
    const float bias = args.dt_bias ? args.dt_bias.get(args.bias_per_head ? head : channel) : 0.0f;
    const float d = args.d ? args.d.get(args.d_per_head ? head : channel) : 0.0f;

    const float dt = bounded_step(args, raw + bias);
    float exponent[ROWS], input[ROWS], sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int from = threadIdx.x % 32 / LANES * LANES + r * (LANES / ROWS);
        exponent[r] = __shfl_sync(ALL_LANES, dt * LOG2_E, from);
        input[r] = __shfl_sync(ALL_LANES, dt * x, from);
        sum[r] = 0.0f;
    }
    for (int i = lane * V; i < n; i += LANES * V) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[r][v] = fmaf(fast_exp2(exponent[r] * a[v]), h[r][v], input[r] * b[r].get(v));
                sum[r] = fmaf(h[r][v], c[r].get(v), sum[r]);
            }
            if (first + r < batch_size && place < channels && state[r]) store<V, true>(state[r] + i, h[r]);
        }
        load_states(i + LANES * V);
    }
    reduce_scatter<ROWS, LANES, 1>(sum, threadIdx.x);
    if (lane % (LANES / ROWS) == 0 && first + own < batch_size && place < channels) {
        float y = fmaf(d, x, sum[0]);
        if (args.z) y *= silu(z);
        if (is_padding) y = 0.0f;
        static_cast<T*>(args.y)[own_row] = from_float<T>(y);
    }
}

// Whether the rows of each warp are all of one group of one batch element.
template <int LANES, int ROWS>
__device__ inline bool shares_group(const Update& args) {
    return args.nheads / args.ngroups * args.headdim % (32 / LANES * ROWS) == 0;
}

// The registers are bounded for what models have: rows that share their group.
#define HEADS(symbol, bound, T, lanes, v, rows)                                                      \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Update args) { \
        if (shares_group<lanes, rows>(args))                                                         \
            update_heads<T, lanes, v, rows, true>(args);                                             \
        else                                                                                         \
            update_heads<T, lanes, v, rows, false>(args);                                            \
    }
#define CHANNELS(symbol, T, lanes, v, rows)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) symbol(const __grid_constant__ Update args) {    \
        update_channels<T, lanes, v, rows>(args);                                                          \
    }
#define LANES_OF_ROW(lanes, blocks, T, name)                                                               \
    HEADS(selective_state_update_heads_##lanes##v1_##name, (THREADS), T, lanes, 4, 1)                      \
    HEADS(selective_state_update_heads_##lanes##v4_##name, (THREADS, blocks), T, lanes, 4, 4)              \
    CHANNELS(selective_state_update_channels_##lanes##v1_##name, T, lanes, 4, 1)                           \
    CHANNELS(selective_state_update_channels_##lanes##v4_##name, T, lanes, 4, 4)
#define INSTANTIATE(T, name)                                                                               \
    LANES_OF_ROW(4, 5, T, name)                                                                            \
    LANES_OF_ROW(8, 5, T, name)                                                                            \
    LANES_OF_ROW(16, 6, T, name)                                                                           \
    LANES_OF_ROW(32, 6, T, name)                                                                           \
    HEADS(selective_state_update_heads_32_##name, (THREADS), T, 32, 1, 1)                                  \
    CHANNELS(selective_state_update_channels_32_##name, T, 32, 1, 1)

FOR_EACH_DTYPE(INSTANTIATE)
