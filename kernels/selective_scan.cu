// The selective scan of Mamba-1, forward and backward.
//
// A thread owns S states of one channel and steps through time with them in registers; LANES neighbouring lanes own one
// channel. A block owns CHANNELS neighbouring channels of one batch element, whose b and c are of one group, and walks
// over tiles of TILE tokens that it stages in shared memory: there each step size, gate and output is worked out once.
//
// The backward pass goes through the tiles from the last, from the states that the forward pass kept before each. Within
// a tile it steps forward once, keeping the states before every SUB tokens, then takes these pieces from the last: steps
// forward again with everything in registers, and back. With g the gradient of y before the gate, H_t = C_t g_t +
// a_{t+1} H_{t+1} and a_t = exp(delta_t A):
//   dC_t = sum of g h_t, dB_t = sum of H delta u over channels; dA = sum of delta H a_t h_{t-1} over time;
//   du = D g + delta sum_n H B, ddelta = u sum_n H B + sum_n A H a_t h_{t-1}, dD = sum of g u.
// Sums over channels of a block are formed in a fixed order and written out; selective_scan_sum adds blocks up.
#include "scalar.cuh"

struct SelectiveScan {
    const void *u, *delta, *z, *b, *c, *grad_y;
    const float *a, *d, *delta_bias, *initial_state, *grad_state;
    const float *b_constant, *c_constant;  // (dim, d_state), in place of b and c
    void *y, *grad_u, *grad_delta, *grad_z;
    float *final_state;
    float *checkpoints;  // (batch, tiles, dim, d_state), states before each tile; null if not wanted
    float *grad_initial_state;
    float *grad_a, *grad_b_constant, *grad_c_constant;  // (batch, dim, d_state)
    float *grad_d, *grad_delta_bias;                    // (batch, dim)
    float *partials;                                    // (batch, blocks, seqlen, 2, STATES)
    // In elements: batch, channel, token; b and c: batch, group, state, token.
    int64_t u_stride[3], delta_stride[3], z_stride[3], grad_y_stride[3], y_stride[3];
    int64_t b_stride[4], c_stride[4];
    int32_t batch, dim, seqlen, d_state;
    int32_t unit;    // channels that share a group of b and one of c; a divisor of dim
    int32_t blocks;  // of one batch element
    int32_t b_group_len, c_group_len;
    int32_t delta_softplus;
    int32_t packs;  // every activation, and varying b and c, may be read in packs of 16 bytes along its layout's last axis
};
static_assert(sizeof(SelectiveScan) == 432, "as in cuda.rs");

namespace {

constexpr int TILE = 32;
constexpr int ROW = TILE + 1;  // of staged activations, (channel, token): no two channels of a warp share a bank

template <int S_, int LANES_, int WARPS_, int SUB_> struct Shape {
    static constexpr int S = S_, LANES = LANES_, WARPS = WARPS_, SUB = SUB_;
    static constexpr int STATES = S * LANES, THREADS = WARPS * 32, PER_WARP = 32 / LANES, CHANNELS = WARPS * PER_WARP;
    static constexpr int COEFFICIENT_ROW = STATES + 4;
    static constexpr int COEFFICIENTS = (TILE > CHANNELS ? TILE : CHANNELS) * COEFFICIENT_ROW;
    static constexpr int ACTIVATIONS = CHANNELS * ROW;
    static constexpr int PACK = CHANNELS * TILE / THREADS;  // neighbouring elements of a tile that a thread stages
    static constexpr int COEFFICIENT_PACK = TILE * STATES / THREADS < 8 ? TILE * STATES / THREADS : 8;
    static constexpr int COEFFICIENT_PACKS = TILE * STATES / THREADS / COEFFICIENT_PACK;
    // Tiles are fetched while the one before is computed, where registers allow.
    static constexpr bool AHEAD = COEFFICIENT_PACKS <= 2;
    static constexpr int TOKENS_PER_LANE = SUB > LANES ? SUB / LANES : 1;
    static constexpr int LANES_PER_TOKEN = LANES > SUB ? LANES / SUB : 1;
};

// Which channels a block owns.
struct Place {
    int batch, block, first, channels;

    template <typename C> __device__ static Place of(const SelectiveScan& p, C) {
        const int block = blockIdx.x % p.blocks, per_unit = (p.unit + C::CHANNELS - 1) / C::CHANNELS;
        const int within = (block % per_unit) * C::CHANNELS;
        return {int(blockIdx.x / p.blocks), block, block / per_unit * p.unit + within,
                min(C::CHANNELS, p.unit - within)};
    }
};

// The elements of a tile of activations that a thread stages: a pack of neighbours along the axis that is contiguous.
template <typename C> struct Staged {
    int channel, token;              // of the first
    int channel_step, token_step;    // from one to the next
    int shared, shared_step;         // places in a tile in shared memory

    __device__ explicit Staged(bool time_is_contiguous) {
        const int i = threadIdx.x;
        if (time_is_contiguous) {
            channel = i / (TILE / C::PACK), token = i % (TILE / C::PACK) * C::PACK;
            channel_step = 0, token_step = 1, shared_step = 1;
        } else {
            channel = i % (C::CHANNELS / C::PACK) * C::PACK, token = i / (C::CHANNELS / C::PACK);
            channel_step = 1, token_step = 0, shared_step = ROW;
        }
        shared = channel * ROW + token;
    }
    __device__ __forceinline__ bool exists(int k, int channels, int tokens) const {
        return channel + k * channel_step < channels && token + k * token_step < tokens;
    }
};

// What a thread stages of one activation.
template <typename T, typename C> struct Activation {
    T* start;  // of the thread's elements of the first tile
    int64_t step, token_stride;

    __device__ Activation(const void* x, const int64_t (&stride)[3], const Place& at, const Staged<C>& staged)
        : start(const_cast<T*>(static_cast<const T*>(x)) + at.batch * stride[0] +
                (at.first + staged.channel) * stride[1] + staged.token * stride[2]),
          step(staged.token_step ? stride[2] : stride[1]), token_stride(stride[2]) {}

    // `whole` if the tile is and packs are aligned.
    __device__ __forceinline__ void load(Raw<T, C::PACK>& raw, const Staged<C>& staged, int64_t first, bool whole,
                                         int channels, int tokens) const {
        const T* at = start + first * token_stride;
        if (whole) {
            raw.load(at);
        } else {
            raw.clear();
#pragma unroll
            for (int k = 0; k < C::PACK; k++) {
                if (staged.exists(k, channels, tokens)) raw.set(k, at[k * step]);
            }
        }
    }
    __device__ __forceinline__ void store(const Pack<T, C::PACK>& pack, const Staged<C>& staged, int64_t first, bool whole,
                                          int channels, int tokens) const {
        T* at = start + first * token_stride;
        if (whole) {
            *reinterpret_cast<Pack<T, C::PACK>*>(at) = pack;
        } else {
#pragma unroll
            for (int k = 0; k < C::PACK; k++) {
                if (staged.exists(k, channels, tokens)) at[k * step] = pack.values[k];
            }
        }
    }
};

template <int S> __device__ __forceinline__ void load_row(const float* from, float (&to)[S]) {
    if constexpr (S % 4 == 0) {
#pragma unroll
        for (int i = 0; i < S / 4; i++) {
            const float4 v = reinterpret_cast<const float4*>(from)[i];
            to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < S / 2; i++) {
            const float2 v = reinterpret_cast<const float2*>(from)[i];
            to[2 * i] = v.x, to[2 * i + 1] = v.y;
        }
    }
}

// b or c in shared memory: rows of a tile's tokens, or, if constant, of the block's channels.
template <typename C, typename T> struct Coefficients {
    const float* constant;
    const T* start;
    int64_t state_stride, token_stride;
    float* shared;
    int step;  // from token to token
    bool time_is_contiguous;

    __device__ Coefficients(const void* x, const float* constant, const int64_t (&stride)[4], int group_len,
                            const Place& at, bool time_is_contiguous, float* shared)
        : constant(constant), start(static_cast<const T*>(x)), state_stride(stride[2]), token_stride(stride[3]),
          shared(shared), step(constant ? 0 : C::COEFFICIENT_ROW), time_is_contiguous(time_is_contiguous) {
        if (!constant) start += at.batch * stride[0] + (at.first / group_len) * stride[1];
    }

    __device__ void stage_constant(const SelectiveScan& p, const Place& at) const {
        if (!constant) return;
        for (int i = threadIdx.x; i < C::CHANNELS * C::STATES; i += C::THREADS) {
            const int channel = i / C::STATES, n = i % C::STATES;
            const bool exists = channel < at.channels && n < p.d_state;
            shared[channel * C::COEFFICIENT_ROW + n] =
                exists ? constant[int64_t(at.first + channel) * p.d_state + n] : 0.0f;
        }
    }

    // What a thread stages of a tile: packs along the axis that is contiguous.
    using One = Raw<T, C::COEFFICIENT_PACK>;
    struct Packs { One packs[C::AHEAD ? C::COEFFICIENT_PACKS : 1]; };

    __device__ __forceinline__ void place(int i, int& state, int& token) const {
        constexpr int PACK = C::COEFFICIENT_PACK;
        i = i * C::THREADS + threadIdx.x;
        if (time_is_contiguous) {
            state = i / (TILE / PACK), token = i % (TILE / PACK) * PACK;
        } else {
            state = i % (C::STATES / PACK) * PACK, token = i / (C::STATES / PACK);
        }
    }
    __device__ __forceinline__ void load(One& raw, int i, const SelectiveScan& p, int64_t first, int tokens) const {
        int n, t;
        place(i, n, t);
        const T* at = start + n * state_stride + (first + t) * token_stride;
        if (p.packs && tokens == TILE && p.d_state == C::STATES) {
            raw.load(at);
        } else {
            raw.clear();
#pragma unroll
            for (int k = 0; k < C::COEFFICIENT_PACK; k++) {
                const int nk = time_is_contiguous ? n : n + k, tk = time_is_contiguous ? t + k : t;
                if (nk < p.d_state && tk < tokens) raw.set(k, at[k * (time_is_contiguous ? token_stride : state_stride)]);
            }
        }
    }
    __device__ __forceinline__ void stage(int i, const One& pack) const {
        int n, t;
        place(i, n, t);
        float* const to = shared + t * C::COEFFICIENT_ROW + n;
#pragma unroll
        for (int k = 0; k < C::COEFFICIENT_PACK; k++) {
            to[time_is_contiguous ? k * C::COEFFICIENT_ROW : k] = pack.get(k);
        }
    }
    // Fetches a tile into registers, if there is room; `stage` then brings it to shared memory.
    __device__ __forceinline__ void fetch(Packs& packs, const SelectiveScan& p, int64_t first, int tokens) const {
        if (!C::AHEAD || constant) return;
#pragma unroll
        for (int i = 0; i < C::COEFFICIENT_PACKS; i++) load(packs.packs[i], i, p, first, tokens);
    }
    __device__ __forceinline__ void stage(const Packs& packs, const SelectiveScan& p, int64_t first, int tokens) const {
        if (constant) return;
        if constexpr (C::AHEAD) {
#pragma unroll
            for (int i = 0; i < C::COEFFICIENT_PACKS; i++) stage(i, packs.packs[i]);
        } else {
#pragma unroll 2
            for (int i = 0; i < C::COEFFICIENT_PACKS; i++) {
                One raw;
                load(raw, i, p, first, tokens);
                stage(i, raw);
            }
        }
    }

    // Where the states of a thread begin; advance by `step` a token.
    __device__ const float* of(int channel, int state) const {
        return shared + (constant ? channel * C::COEFFICIENT_ROW : 0) + state;
    }
};

// Reads or writes the states of a thread in a (dim, d_state) matrix.
template <int S> __device__ __forceinline__ void load_states(const float* from, int n, int d_state, float (&to)[S]) {
#pragma unroll
    for (int s = 0; s < S; s++) to[s] = n + s < d_state ? from[s] : 0.0f;
}
template <int S> __device__ __forceinline__ void store_states(float* to, int n, int d_state, const float (&from)[S]) {
    if (S == 4 && d_state % 4 == 0) {
        if (n < d_state) *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2 % S], from[3 % S]);
        return;
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
        if (n + s < d_state) to[s] = from[s];
    }
}

template <typename T, typename C> __device__ __forceinline__ void forward(const SelectiveScan& p) {
    constexpr int S = C::S, SUB = C::SUB;
    extern __shared__ __align__(16) float shared[];
    float* const delta_tile = shared;  // then y
    float* const u_tile = delta_tile + C::ACTIVATIONS;
    float* const skip = u_tile + C::ACTIVATIONS;
    float* const bias = skip + (C::CHANNELS + 3) / 4 * 4;
    float* const b_tile = bias + (C::CHANNELS + 3) / 4 * 4;
    float* const c_tile = b_tile + C::COEFFICIENTS;

    const Place at = Place::of(p, C());
    const bool time_is_contiguous = p.y_stride[2] == 1;
    const int lane = threadIdx.x % 32, lane_of_channel = lane % C::LANES;
    const int channel = threadIdx.x / C::LANES, n = lane_of_channel * S;
    const bool exists = channel < at.channels;
    const int64_t state = (int64_t(at.batch) * p.dim + at.first + channel) * p.d_state + n;

    const Coefficients<C, T> b(p.b, p.b_constant, p.b_stride, p.b_group_len, at, time_is_contiguous, b_tile);
    const Coefficients<C, T> c(p.c, p.c_constant, p.c_stride, p.c_group_len, at, time_is_contiguous, c_tile);
    b.stage_constant(p, at);
    c.stage_constant(p, at);
    for (int i = threadIdx.x; i < C::CHANNELS; i += C::THREADS) {
        skip[i] = p.d && i < at.channels ? p.d[at.first + i] : 0.0f;
        bias[i] = p.delta_bias && i < at.channels ? p.delta_bias[at.first + i] : 0.0f;
    }
    __syncthreads();

    float a[S], h[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        a[s] = exists && n + s < p.d_state ? p.a[int64_t(at.first + channel) * p.d_state + n + s] * LOG2_E : 0.0f;
        h[s] = exists && n + s < p.d_state && p.initial_state ? p.initial_state[state + s] : 0.0f;
    }

    const Staged<C> staged(time_is_contiguous);
    using Staging = Activation<T, C>;
    const Staging u(p.u, p.u_stride, at, staged), delta(p.delta, p.delta_stride, at, staged);
    const Staging y(p.y, p.y_stride, at, staged), z(p.z, p.z_stride, at, staged);
    const bool all_channels = p.packs && at.channels == C::CHANNELS;
    Raw<T, C::PACK> next_u, next_delta;
    typename Coefficients<C, T>::Packs next_b, next_c;
    const auto fetch = [&](int64_t first) {
        const int tokens = min(int64_t(TILE), p.seqlen - first);
        const bool whole = all_channels && tokens == TILE;
        u.load(next_u, staged, first, whole, at.channels, tokens);
        delta.load(next_delta, staged, first, whole, at.channels, tokens);
        b.fetch(next_b, p, first, tokens), c.fetch(next_c, p, first, tokens);
    };
    if (C::AHEAD && p.seqlen > 0) fetch(0);

    const int tiles = (p.seqlen + TILE - 1) / TILE;
    for (int tile = 0; tile < tiles; tile++) {
        const int64_t first = int64_t(tile) * TILE;
        const int tokens = min(int64_t(TILE), p.seqlen - first);
        const bool whole = all_channels && tokens == TILE;
        if (!C::AHEAD) fetch(first);
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            float step = next_delta.get(k) + bias[staged.channel + k * staged.channel_step];
            if (p.delta_softplus) step = softplus_unit(step);
            const int i = staged.shared + k * staged.shared_step;
            delta_tile[i] = whole || staged.exists(k, at.channels, tokens) ? step : 0.0f;
            u_tile[i] = next_u.get(k);
        }
        b.stage(next_b, p, first, tokens), c.stage(next_c, p, first, tokens);
        __syncthreads();
        Raw<T, C::PACK> gate;
        if (p.z) z.load(gate, staged, first, whole, at.channels, tokens);
        if (C::AHEAD && tile + 1 < tiles) fetch(first + TILE);
        if (p.checkpoints && exists) {
            const int64_t before = (int64_t(at.batch) * tiles + tile) * p.dim + at.first + channel;
            store_states(p.checkpoints + before * p.d_state + n, n, p.d_state, h);
        }

        const float *b_row = b.of(channel, n), *c_row = c.of(channel, n);
#pragma unroll 1
        for (int sub = 0; sub < TILE; sub += SUB) {
            float sums[SUB];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const float step = delta_tile[channel * ROW + sub + i];
                const float input = step * u_tile[channel * ROW + sub + i];
                float bs[S], cs[S];
                load_row(b_row, bs), load_row(c_row, cs);
                b_row += b.step, c_row += c.step;
                sums[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = fmaf(fast_exp2(step * a[s]), h[s], input * bs[s]);
                    sums[i] = fmaf(cs[s], h[s], sums[i]);
                }
            }
            reduce_scatter<SUB, C::LANES, 1>(sums, lane);
            __syncwarp();
            if (lane_of_channel % C::LANES_PER_TOKEN == 0) {
                const int t = sub + lane_of_channel / C::LANES_PER_TOKEN * C::TOKENS_PER_LANE;
#pragma unroll
                for (int i = 0; i < C::TOKENS_PER_LANE; i++) delta_tile[channel * ROW + t + i] = sums[i];
            }
        }
        __syncthreads();
        Pack<T, C::PACK> out;
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            const int i = staged.shared + k * staged.shared_step;
            float value = fmaf(skip[staged.channel + k * staged.channel_step], u_tile[i], delta_tile[i]);
            if (p.z) {
                const float x = gate.get(k);
                value *= x * sigmoid(x);
            }
            out.values[k] = from_float<T>(value);
        }
        y.store(out, staged, first, whole, at.channels, tokens);
        __syncthreads();
    }
    if (exists) store_states(p.final_state + state, n, p.d_state, h);
}

template <typename T, typename C> __device__ __forceinline__ void backward(const SelectiveScan& p) {
    constexpr int S = C::S, SUB = C::SUB, PIECES = TILE / SUB;
    extern __shared__ __align__(16) float shared[];
    float* const delta_tile = shared;                     // then its gradient
    float* const u_tile = delta_tile + C::ACTIVATIONS;    // then its gradient
    float* const g_tile = u_tile + C::ACTIVATIONS;        // the gradient of y before the gate
    float* const slope_tile = g_tile + C::ACTIVATIONS;    // of the softplus
    float* const gate_tile = slope_tile + C::ACTIVATIONS; // grad_y · silu'(z), then the gradient of z
    float* const b_tile = gate_tile + (C::ACTIVATIONS + 3) / 4 * 4;
    float* const c_tile = b_tile + C::COEFFICIENTS;
    float* const kept = c_tile + C::COEFFICIENTS;               // (piece, state, thread)
    float* const sums = kept + PIECES * S * C::THREADS;         // (2, warp, token, 2, state)
    float* const bias = sums + 2 * C::WARPS * SUB * 2 * C::STATES;
    constexpr int SUMS = C::WARPS * SUB * 2 * C::STATES;

    const Place at = Place::of(p, C());
    const bool time_is_contiguous = p.y_stride[2] == 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lane_of_channel = lane % C::LANES;
    const int channel = threadIdx.x / C::LANES, n = lane_of_channel * S;
    const bool exists = channel < at.channels;
    const int64_t row = int64_t(at.batch) * p.dim + at.first + channel, state = row * p.d_state + n;
    const bool varying = !p.b_constant || !p.c_constant;

    const Coefficients<C, T> b(p.b, p.b_constant, p.b_stride, p.b_group_len, at, time_is_contiguous, b_tile);
    const Coefficients<C, T> c(p.c, p.c_constant, p.c_stride, p.c_group_len, at, time_is_contiguous, c_tile);
    b.stage_constant(p, at);
    c.stage_constant(p, at);

    float a[S], carry[S], grad_a[S], grad_b[S], grad_c[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        a[s] = exists && n + s < p.d_state ? p.a[int64_t(at.first + channel) * p.d_state + n + s] * LOG2_E : 0.0f;
        carry[s] = exists && n + s < p.d_state && p.grad_state ? p.grad_state[state + s] : 0.0f;
        grad_a[s] = grad_b[s] = grad_c[s] = 0.0f;
    }
    const float skip = exists && p.d ? p.d[at.first + channel] : 0.0f;
    float grad_skip = 0.0f, grad_bias = 0.0f;

    for (int i = threadIdx.x; i < C::CHANNELS; i += C::THREADS) {
        bias[i] = p.delta_bias && i < at.channels ? p.delta_bias[at.first + i] : 0.0f;
    }
    __syncthreads();

    const Staged<C> staged(time_is_contiguous);
    using Staging = Activation<T, C>;
    const Staging u(p.u, p.u_stride, at, staged), delta(p.delta, p.delta_stride, at, staged);
    const Staging z(p.z, p.z_stride, at, staged), grad_y(p.grad_y, p.grad_y_stride, at, staged);
    const Staging grad_u(p.grad_u, p.y_stride, at, staged), grad_delta(p.grad_delta, p.y_stride, at, staged);
    const Staging grad_z(p.grad_z, p.y_stride, at, staged);
    const bool all_channels = p.packs && at.channels == C::CHANNELS;
    constexpr bool AHEAD = S == 2;  // registers allow
    Raw<T, C::PACK> next_u, next_delta, next_z, next_g;
    typename Coefficients<C, T>::Packs next_b, next_c;
    const auto fetch = [&](int64_t first) {
        const int tokens = min(int64_t(TILE), p.seqlen - first);
        const bool whole = all_channels && tokens == TILE;
        u.load(next_u, staged, first, whole, at.channels, tokens);
        delta.load(next_delta, staged, first, whole, at.channels, tokens);
        if (p.z) z.load(next_z, staged, first, whole, at.channels, tokens);
        if (p.grad_y) grad_y.load(next_g, staged, first, whole, at.channels, tokens);
        b.fetch(next_b, p, first, tokens), c.fetch(next_c, p, first, tokens);
    };

    const int tiles = (p.seqlen + TILE - 1) / TILE;
    if (AHEAD && tiles > 0) fetch(int64_t(tiles - 1) * TILE);
    for (int tile = tiles - 1; tile >= 0; tile--) {
        const int64_t first = int64_t(tile) * TILE;
        const int tokens = min(int64_t(TILE), p.seqlen - first);
        const bool whole = all_channels && tokens == TILE;
        if (!AHEAD) fetch(first);
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            float step = next_delta.get(k) + bias[staged.channel + k * staged.channel_step];
            float slope = 1.0f, g = p.grad_y ? next_g.get(k) : 0.0f;
            if (p.delta_softplus) slope = sigmoid(step), step = softplus_unit(step);
            const int i = staged.shared + k * staged.shared_step;
            if (p.z) {
                const float x = next_z.get(k), s = sigmoid(x);
                gate_tile[i] = g * s * fmaf(x, 1.0f - s, 1.0f);
                g *= x * s;
            }
            const bool exists = whole || staged.exists(k, at.channels, tokens);
            delta_tile[i] = exists ? step : 0.0f, slope_tile[i] = exists ? slope : 0.0f;
            u_tile[i] = next_u.get(k), g_tile[i] = g;
        }
        b.stage(next_b, p, first, tokens), c.stage(next_c, p, first, tokens);
        float h[S];
        const int64_t before = (int64_t(at.batch) * tiles + tile) * p.dim + at.first + channel;
#pragma unroll
        for (int s = 0; s < S; s++) {
            h[s] = exists && n + s < p.d_state ? p.checkpoints[before * p.d_state + n + s] : 0.0f;
        }
        __syncthreads();

        if (AHEAD && tile > 0) fetch(first - TILE);
        const float *b_rows = b.of(channel, n), *c_rows = c.of(channel, n);
        const int own = channel * ROW;
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
            for (int s = 0; s < S; s++) kept[(piece * S + s) * C::THREADS + threadIdx.x] = h[s];
            if (piece == PIECES - 1 && !p.z) break;
            float y[SUB];
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = piece * SUB + i;
                const float step = delta_tile[own + t], input = step * u_tile[own + t];
                float bs[S], cs[S];
                load_row(b_rows + t * b.step, bs);
                if (p.z) load_row(c_rows + t * c.step, cs);
                y[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = fmaf(fast_exp2(step * a[s]), h[s], input * bs[s]);
                    if (p.z) y[i] = fmaf(cs[s], h[s], y[i]);
                }
            }
            if (p.z) {
                reduce_scatter<SUB, C::LANES, 1>(y, lane);
                if (lane_of_channel % C::LANES_PER_TOKEN == 0) {
                    const int t = piece * SUB + lane_of_channel / C::LANES_PER_TOKEN * C::TOKENS_PER_LANE;
#pragma unroll
                    for (int i = 0; i < C::TOKENS_PER_LANE; i++) {
                        gate_tile[own + t + i] *= fmaf(skip, u_tile[own + t + i], y[i]);
                    }
                }
            }
        }

#pragma unroll 1
        for (int piece = PIECES - 1; piece >= 0; piece--) {
            float* const piece_sums = sums + (piece % 2) * SUMS;
#pragma unroll
            for (int s = 0; s < S; s++) h[s] = kept[(piece * S + s) * C::THREADS + threadIdx.x];
            float decays[SUB][S], decayed[SUB][S];  // a_t and a_t h_{t-1}
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = piece * SUB + i;
                const float step = delta_tile[own + t], input = step * u_tile[own + t];
                float bs[S];
                load_row(b_rows + t * b.step, bs);
#pragma unroll
                for (int s = 0; s < S; s++) {
                    decays[i][s] = fast_exp2(step * a[s]);
                    decayed[i][s] = decays[i][s] * h[s];
                    h[s] = fmaf(input, bs[s], decayed[i][s]);
                }
            }
            float through_input[SUB], through_decay[SUB];
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                const int t = piece * SUB + i;
                const float step = delta_tile[own + t], input = step * u_tile[own + t], g = g_tile[own + t];
                float bs[S], cs[S], of_coefficients[2 * S];
                load_row(b_rows + t * b.step, bs), load_row(c_rows + t * c.step, cs);
                through_input[i] = through_decay[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float grad_h = fmaf(g, cs[s], carry[s]);
                    const float of_decay = grad_h * decayed[i][s];
                    of_coefficients[s] = grad_h * input;
                    of_coefficients[S + s] = g * fmaf(input, bs[s], decayed[i][s]);
                    through_input[i] = fmaf(grad_h, bs[s], through_input[i]);
                    through_decay[i] = fmaf(a[s], of_decay, through_decay[i]);
                    grad_a[s] = fmaf(step, of_decay, grad_a[s]);
                    carry[s] = decays[i][s] * grad_h;
                }
                if (p.b_constant) {
#pragma unroll
                    for (int s = 0; s < S; s++) grad_b[s] += of_coefficients[s];
                }
                if (p.c_constant) {
#pragma unroll
                    for (int s = 0; s < S; s++) grad_c[s] += of_coefficients[S + s];
                }
                if (varying) {
                    reduce_scatter<2 * S, C::PER_WARP, C::LANES>(of_coefficients, lane);
                    constexpr int COUNT = 2 * S / C::PER_WARP;
                    const int j = lane / C::LANES * COUNT;
                    float* const out = piece_sums + (warp * SUB + i) * 2 * C::STATES + n;
#pragma unroll
                    for (int k = 0; k < COUNT; k++) {
                        out[(j + k) / S * C::STATES + (j + k) % S] = of_coefficients[k];
                    }
                }
            }
            reduce_scatter<SUB, C::LANES, 1>(through_input, lane);
            reduce_scatter<SUB, C::LANES, 1>(through_decay, lane);
            __syncwarp();
            if (lane_of_channel % C::LANES_PER_TOKEN == 0) {
                const int t = own + piece * SUB + lane_of_channel / C::LANES_PER_TOKEN * C::TOKENS_PER_LANE;
#pragma unroll
                for (int i = 0; i < C::TOKENS_PER_LANE; i++) {
                    const float step = delta_tile[t + i], x = u_tile[t + i], g = g_tile[t + i];
                    const float of_step =
                        slope_tile[t + i] * fmaf(LN_2, through_decay[i], x * through_input[i]);
                    u_tile[t + i] = fmaf(skip, g, step * through_input[i]);
                    delta_tile[t + i] = of_step;
                    grad_skip = fmaf(g, x, grad_skip);
                    grad_bias += of_step;
                }
            }
            __syncthreads();
            if (varying) {
                for (int i = threadIdx.x; i < SUB * 2 * C::STATES; i += C::THREADS) {
                    const int t = piece * SUB + i / (2 * C::STATES);
                    if (t >= tokens) break;
                    float sum = 0.0f;
#pragma unroll
                    for (int w = 0; w < C::WARPS; w++) sum += piece_sums[w * SUB * 2 * C::STATES + i];
                    const int64_t block = int64_t(at.batch) * p.blocks + at.block;
                    p.partials[(block * p.seqlen + first + piece * SUB) * 2 * C::STATES + i] = sum;
                }
            }
        }
        Pack<T, C::PACK> of_u, of_delta, of_z;
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            const int i = staged.shared + k * staged.shared_step;
            of_u.values[k] = from_float<T>(u_tile[i]), of_delta.values[k] = from_float<T>(delta_tile[i]);
            if (p.z) of_z.values[k] = from_float<T>(gate_tile[i]);
        }
        grad_u.store(of_u, staged, first, whole, at.channels, tokens);
        grad_delta.store(of_delta, staged, first, whole, at.channels, tokens);
        if (p.z) grad_z.store(of_z, staged, first, whole, at.channels, tokens);
        __syncthreads();
    }
#pragma unroll
    for (int lanes = C::LANES / 2; lanes >= 1; lanes /= 2) {
        grad_skip += __shfl_xor_sync(0xffffffffu, grad_skip, lanes);
        grad_bias += __shfl_xor_sync(0xffffffffu, grad_bias, lanes);
    }
    if (exists) {
        store_states(p.grad_initial_state + state, n, p.d_state, carry);
        store_states(p.grad_a + state, n, p.d_state, grad_a);
        if (p.b_constant) store_states(p.grad_b_constant + state, n, p.d_state, grad_b);
        if (p.c_constant) store_states(p.grad_c_constant + state, n, p.d_state, grad_c);
        if (lane_of_channel == 0) {
            p.grad_d[row] = grad_skip;
            p.grad_delta_bias[row] = grad_bias;
        }
    }
}

struct SelectiveScanSum {
    const float* partials;  // (batch, blocks, seqlen, 2, states)
    void* out;
    int64_t out_stride[4];  // batch, group, state, token
    int32_t batch, groups, seqlen, d_state, blocks, states, which;
};
static_assert(sizeof(SelectiveScanSum) == 80, "as in cuda.rs");

// Adds up what the blocks of each group gave, in their order.
template <typename T> __device__ __forceinline__ void sum(const SelectiveScanSum& p) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int n = index % p.d_state;
    const int64_t t = index / p.d_state % p.seqlen;
    const int group = index / p.d_state / p.seqlen % p.groups;
    const int64_t batch = index / p.d_state / p.seqlen / p.groups;
    if (batch >= p.batch) return;
    const int per_group = p.blocks / p.groups;
    const int64_t block_stride = int64_t(p.seqlen) * 2 * p.states;
    const float* from = p.partials + (batch * p.blocks + group * per_group) * block_stride +
                        (t * 2 + p.which) * p.states + n;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < per_group; i++) sum += from[i * block_stride];
    static_cast<T*>(p.out)[batch * p.out_stride[0] + group * p.out_stride[1] + n * p.out_stride[2] +
                           t * p.out_stride[3]] = from_float<T>(sum);
}

}  // namespace

// S · LANES states at most, WARPS a block, pieces of FWD or BWD tokens; blocks a multiprocessor should hold.
#define INSTANTIATE_SHAPE(SHAPE, S, LANES, WARPS, FWD, BWD, BLOCKS, T, DTYPE)                                         \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                  \
        selective_scan_fwd_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {                               \
        forward<T, Shape<S, LANES, WARPS, FWD>>(p);                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                                                  \
        selective_scan_bwd_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {                               \
        backward<T, Shape<S, LANES, WARPS, BWD>>(p);                                                                  \
    }

#define INSTANTIATE(T, DTYPE)                                                                                         \
    INSTANTIATE_SHAPE(narrow16, 2, 8, 4, 8, 8, 2, T, DTYPE)                                                           \
    INSTANTIATE_SHAPE(wide16, 4, 4, 8, 8, 4, 2, T, DTYPE)                                                             \
    INSTANTIATE_SHAPE(wide64, 4, 16, 4, 8, 4, 3, T, DTYPE)                                                            \
    INSTANTIATE_SHAPE(wide256, 8, 32, 2, 4, 4, 2, T, DTYPE)                                                           \
    extern "C" __global__ void selective_scan_sum_##DTYPE(const __grid_constant__ SelectiveScanSum p) { sum<T>(p); }

FOR_EACH_DTYPE(INSTANTIATE)
