// The selective scan of Mamba-1 backward, through the tiles from the last, from the states that the forward pass kept before
// each. Within a tile it steps forward once, keeping the states before every SUB tokens, then takes these pieces from the last:
// steps forward again with everything in registers, and back. With g the gradient of y before the gate, H_t = C_t g_t +
// a_{t+1} H_{t+1} and a_t = exp(delta_t A):
//   dC_t = sum of g h_t, dB_t = sum of H delta u over channels; dA = sum of delta H a_t h_{t-1} over time;
//   du = D g + delta sum_n H B, ddelta = u sum_n H B + sum_n A H a_t h_{t-1}, dD = sum of g u.
// Sums over channels of a block are formed in a fixed order and written out; selective_scan_sum adds blocks up.
#include "selective_scan.cuh"

namespace {

template <typename T, typename C, bool VARYING> __device__ __forceinline__ void backward(const SelectiveScan& p) {
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
    const int64_t state = at.state_of(p, channel, n);
    const bool varying = VARYING || !p.b_constant || !p.c_constant;

    using Rows = Coefficients<C, T, VARYING>;
    const Rows b(p.b, p.b_constant, p.b_stride, p.b_group_len, at, time_is_contiguous, b_tile);
    const Rows c(p.c, p.c_constant, p.c_stride, p.c_group_len, at, time_is_contiguous, c_tile);
    b.stage_constant(p, at);
    c.stage_constant(p, at);

    float a[S], carry[S], grad_a[S];
    [[maybe_unused]] float grad_b[S], grad_c[S];
#pragma unroll
    for (int s = 0; s < S; s++) {
        a[s] = exists && n + s < p.d_state ? p.a[int64_t(at.first + channel) * p.d_state + n + s] * LOG2_E : 0.0f;
        carry[s] = exists && n + s < p.d_state && p.grad_state ? p.grad_state[state + s] : 0.0f;
        grad_a[s] = grad_b[s] = grad_c[s] = 0.0f;
    }
    if (exists) {
        for (int split = at.splits - 1; split > at.split; split--) {
            const int64_t row = at.row_of(p, split, channel);
            float end[S];
            load_states(p.ends + row * p.d_state + n, n, p.d_state, end);
            decay_over(p.spans[row], a, carry);
#pragma unroll
            for (int s = 0; s < S; s++) carry[s] += end[s];
        }
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
    typename Rows::Packs next_b, next_c;
    const auto fetch = [&](int64_t first) {
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        u.load(next_u, staged, first, whole, at.channels, tokens);
        delta.load(next_delta, staged, first, whole, at.channels, tokens);
        if (p.z) z.load(next_z, staged, first, whole, at.channels, tokens);
        if (p.grad_y) grad_y.load(next_g, staged, first, whole, at.channels, tokens);
        b.fetch(next_b, p, first, tokens), c.fetch(next_c, p, first, tokens);
    };

    if (AHEAD && at.begin < at.end) fetch(int64_t(at.end - 1) * TILE);
    for (int tile = at.end - 1; tile >= at.begin; tile--) {
        const int64_t first = int64_t(tile) * TILE;
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        if (!AHEAD) fetch(first);
        float steps[C::PACK], slopes[C::PACK], inputs[C::PACK], gs[C::PACK];
        [[maybe_unused]] float gates[C::PACK];
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            float step = next_delta.get(k) + bias[staged.channel + k * staged.channel_step];
            float slope = 1.0f, g = p.grad_y ? next_g.get(k) : 0.0f;
            if (p.delta_softplus) slope = sigmoid(step), step = softplus_unit(step);
            if (p.z) {
                const float x = next_z.get(k), s = sigmoid(x);
                gates[k] = g * s * fmaf(x, 1.0f - s, 1.0f);
                g *= x * s;
            }
            const bool exists = whole || staged.exists(k, at.channels, tokens);
            steps[k] = exists ? step : 0.0f, slopes[k] = exists ? slope : 0.0f;
            inputs[k] = next_u.get(k), gs[k] = g;
        }
        staged.put(delta_tile, steps), staged.put(slope_tile, slopes), staged.put(u_tile, inputs), staged.put(g_tile, gs);
        if (p.z) staged.put(gate_tile, gates);
        b.stage(next_b, p, first, tokens), c.stage(next_c, p, first, tokens);
        float h[S];
        const float* const before = p.checkpoints + at.checkpoint_of(p, tile, channel, n);
#pragma unroll
        for (int s = 0; s < S; s++) {
            h[s] = exists && n + s < p.d_state ? before[s] : 0.0f;
        }
        __syncthreads();

        if (AHEAD && tile > at.begin) fetch(first - TILE);
        const float *b_rows = b.of(channel, n), *c_rows = c.of(channel, n);
#pragma unroll 1
        for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
            for (int s = 0; s < S; s++) kept[(piece * S + s) * C::THREADS + threadIdx.x] = h[s];
            if (piece == PIECES - 1 && !p.z) break;
            float y[SUB], steps[SUB], xs[SUB];
            load_tokens<C>(delta_tile, channel, piece * SUB, steps), load_tokens<C>(u_tile, channel, piece * SUB, xs);
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = piece * SUB + i;
                const float step = steps[i], input = step * xs[i];
                float bs[S], cs[S];
                load_row(b_rows + t * b.step(), bs);
                if (p.z) load_row(c_rows + t * c.step(), cs);
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
                        const int place = place_of<C>(channel, t + i);
                        gate_tile[place] *= fmaf(skip, u_tile[place], y[i]);
                    }
                }
            }
        }

        // Sums over time are added tile by tile, lest many small terms meet one large sum.
        float of_tile[S], of_skip = 0.0f, of_bias = 0.0f;
#pragma unroll
        for (int s = 0; s < S; s++) of_tile[s] = 0.0f;
#pragma unroll 1
        for (int piece = PIECES - 1; piece >= 0; piece--) {
            float* const piece_sums = sums + (piece % 2) * SUMS;
#pragma unroll
            for (int s = 0; s < S; s++) h[s] = kept[(piece * S + s) * C::THREADS + threadIdx.x];
            float decays[SUB][S], decayed[SUB][S];  // a_t and a_t h_{t-1}
            float steps[SUB], xs[SUB], gs[SUB];
            load_tokens<C>(delta_tile, channel, piece * SUB, steps), load_tokens<C>(u_tile, channel, piece * SUB, xs);
            load_tokens<C>(g_tile, channel, piece * SUB, gs);
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const int t = piece * SUB + i;
                const float step = steps[i], input = step * xs[i];
                float bs[S];
                load_row(b_rows + t * b.step(), bs);
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
                const float step = steps[i], input = step * xs[i], g = gs[i];
                float bs[S], cs[S], of_coefficients[2 * S];
                load_row(b_rows + t * b.step(), bs), load_row(c_rows + t * c.step(), cs);
                through_input[i] = through_decay[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    const float grad_h = fmaf(g, cs[s], carry[s]);
                    const float of_decay = grad_h * decayed[i][s];
                    of_coefficients[s] = grad_h * input;
                    of_coefficients[S + s] = g * fmaf(input, bs[s], decayed[i][s]);
                    through_input[i] = fmaf(grad_h, bs[s], through_input[i]);
                    through_decay[i] = fmaf(a[s], of_decay, through_decay[i]);
                    of_tile[s] = fmaf(step, of_decay, of_tile[s]);
                    carry[s] = decays[i][s] * grad_h;
                }
                if (b.constant()) {
#pragma unroll
                    for (int s = 0; s < S; s++) grad_b[s] += of_coefficients[s];
                }
                if (c.constant()) {
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
                const int t = piece * SUB + lane_of_channel / C::LANES_PER_TOKEN * C::TOKENS_PER_LANE;
#pragma unroll
                for (int i = 0; i < C::TOKENS_PER_LANE; i++) {
                    const int place = place_of<C>(channel, t + i);
                    const float step = delta_tile[place], x = u_tile[place], g = g_tile[place];
                    const float of_step = slope_tile[place] * fmaf(LN_2, through_decay[i], x * through_input[i]);
                    u_tile[place] = fmaf(skip, g, step * through_input[i]);
                    delta_tile[place] = of_step;
                    of_skip = fmaf(g, x, of_skip);
                    of_bias += of_step;
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
                    const int64_t block = int64_t(at.row) * p.blocks + at.block;
                    p.partials[(block * p.seqlen + at.start + first + piece * SUB) * 2 * C::STATES + i] = sum;
                }
            }
        }
#pragma unroll
        for (int s = 0; s < S; s++) grad_a[s] += of_tile[s];
        grad_skip += of_skip, grad_bias += of_bias;
        const auto write = [&](const Staging& to, const float* tile) {
            float values[C::PACK];
            staged.get(tile, values);
            Pack<T, C::PACK> pack;
#pragma unroll
            for (int k = 0; k < C::PACK; k++) pack.values[k] = from_float<T>(values[k]);
            to.store(pack, staged, first, whole, at.channels, tokens);
        };
        write(grad_u, u_tile), write(grad_delta, delta_tile);
        if (p.z) write(grad_z, gate_tile);
        __syncthreads();
    }
#pragma unroll
    for (int lanes = C::LANES / 2; lanes >= 1; lanes /= 2) {
        grad_skip += __shfl_xor_sync(0xffffffffu, grad_skip, lanes);
        grad_bias += __shfl_xor_sync(0xffffffffu, grad_bias, lanes);
    }
    if (exists) {
        const int64_t row = at.row_of(p, at.split, channel), states = row * p.d_state + n;
        if (at.split == 0) store_states(p.grad_initial_state + state, n, p.d_state, carry);
        store_states(p.grad_a + states, n, p.d_state, grad_a);
        if (b.constant()) store_states(p.grad_b_constant + states, n, p.d_state, grad_b);
        if (c.constant()) store_states(p.grad_c_constant + states, n, p.d_state, grad_c);
        if (lane_of_channel == 0) {
            p.grad_d[row] = grad_skip;
            p.grad_delta_bias[row] = grad_bias;
        }
    }
}

// What a split adds to the gradient of the state before it, from a gradient of zeros after it.
template <typename T, typename C, bool VARYING> __device__ __forceinline__ void ends(const SelectiveScan& p) {
    constexpr int S = C::S, SUB = C::SUB;
    extern __shared__ __align__(16) float shared[];
    float* const delta_tile = shared;
    float* const g_tile = delta_tile + C::ACTIVATIONS;
    float* const bias = g_tile + C::ACTIVATIONS;
    float* const c_tile = bias + (C::CHANNELS + 3) / 4 * 4;

    const Place at = Place::of(p, C());
    if (at.split == 0) return;  // nobody needs it
    const bool time_is_contiguous = p.y_stride[2] == 1;
    const int lane_of_channel = threadIdx.x % C::LANES, channel = threadIdx.x / C::LANES, n = lane_of_channel * S;
    const bool exists = channel < at.channels;
    using Rows = Coefficients<C, T, VARYING>;
    const Rows c(p.c, p.c_constant, p.c_stride, p.c_group_len, at, time_is_contiguous, c_tile);
    c.stage_constant(p, at);
    for (int i = threadIdx.x; i < C::CHANNELS; i += C::THREADS) {
        bias[i] = p.delta_bias && i < at.channels ? p.delta_bias[at.first + i] : 0.0f;
    }
    float a[S], carry[S], span = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        a[s] = exists && n + s < p.d_state ? p.a[int64_t(at.first + channel) * p.d_state + n + s] * LOG2_E : 0.0f;
        carry[s] = 0.0f;
    }
    __syncthreads();

    const Staged<C> staged(time_is_contiguous);
    using Staging = Activation<T, C>;
    const Staging delta(p.delta, p.delta_stride, at, staged), z(p.z, p.z_stride, at, staged);
    const Staging grad_y(p.grad_y, p.grad_y_stride, at, staged);
    const bool all_channels = p.packs && at.channels == C::CHANNELS;
    Raw<T, C::PACK> next_delta, next_z, next_g;
    typename Rows::Packs next_c;
    const auto fetch = [&](int64_t first) {
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        delta.load(next_delta, staged, first, whole, at.channels, tokens);
        if (p.z) z.load(next_z, staged, first, whole, at.channels, tokens);
        if (p.grad_y) grad_y.load(next_g, staged, first, whole, at.channels, tokens);
        c.fetch(next_c, p, first, tokens);
    };
    if (C::AHEAD && at.begin < at.end) fetch(int64_t(at.end - 1) * TILE);
    for (int tile = at.end - 1; tile >= at.begin; tile--) {
        const int64_t first = int64_t(tile) * TILE;
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        if (!C::AHEAD) fetch(first);
        float steps[C::PACK], gs[C::PACK];
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            float step = next_delta.get(k) + bias[staged.channel + k * staged.channel_step];
            float g = p.grad_y ? next_g.get(k) : 0.0f;
            if (p.delta_softplus) step = softplus_unit(step);
            if (p.z) g *= silu(next_z.get(k));
            steps[k] = whole || staged.exists(k, at.channels, tokens) ? step : 0.0f, gs[k] = g;
        }
        staged.put(delta_tile, steps), staged.put(g_tile, gs);
        c.stage(next_c, p, first, tokens);
        __syncthreads();
        if (C::AHEAD && tile > at.begin) fetch(first - TILE);
        const float* const c_rows = c.of(channel, n);
        float tile_span = 0.0f;
#pragma unroll 1
        for (int sub = TILE - SUB; sub >= 0; sub -= SUB) {
            float steps[SUB], gs[SUB];
            load_tokens<C>(delta_tile, channel, sub, steps), load_tokens<C>(g_tile, channel, sub, gs);
#pragma unroll
            for (int i = SUB - 1; i >= 0; i--) {
                float cs[S];
                load_row(c_rows + (sub + i) * c.step(), cs);
#pragma unroll
                for (int s = 0; s < S; s++) carry[s] = fast_exp2(steps[i] * a[s]) * fmaf(gs[i], cs[s], carry[s]);
                tile_span += steps[i];
            }
        }
        __syncthreads();
        span += tile_span;
    }
    if (!exists) return;
    const int64_t row = at.row_of(p, at.split, channel);
    store_states(p.ends + row * p.d_state + n, n, p.d_state, carry);
    if (lane_of_channel == 0) p.spans[row] = span;
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

#define INSTANTIATE_SHAPE(SHAPE, S, LANES, WARPS, FWD_PIECE, FWD_BLOCKS, PIECE, BLOCKS, T, DTYPE) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                             \
        selective_scan_bwd_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {          \
        using C = Shape<S, LANES, WARPS, PIECE>;                                                   \
        p.b_constant || p.c_constant ? backward<T, C, false>(p) : backward<T, C, true>(p);       \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                             \
        selective_scan_bwd_ends_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {     \
        using C = Shape<S, LANES, WARPS, PIECE>;                                                   \
        p.c_constant ? ends<T, C, false>(p) : ends<T, C, true>(p);                               \
    }
#define INSTANTIATE(T, DTYPE)                                                                                         \
    FOR_EACH_SHAPE(INSTANTIATE_SHAPE, T, DTYPE)                                                                       \
    extern "C" __global__ void selective_scan_sum_##DTYPE(const __grid_constant__ SelectiveScanSum p) { sum<T>(p); }

FOR_EACH_DTYPE(INSTANTIATE)
