// The selective scan of Mamba-1 forward: outputs and final state, the states before each tile for the backward pass, and for
// sequences in splits the pass before, which finds what each split adds.
#include "selective_scan.cuh"

namespace {

// ENDS: only what the split adds to the state after it.
template <typename T, typename C, bool VARYING, bool ENDS> __device__ __forceinline__ void forward(const SelectiveScan& p) {
    constexpr int S = C::S, SUB = C::SUB;
    extern __shared__ __align__(16) float shared[];
    float* const delta_tile = shared;  // then y
    float* const input_tile = delta_tile + C::ACTIVATIONS;  // delta · u
    float* const skip = input_tile + C::ACTIVATIONS;
    float* const bias = skip + (C::CHANNELS + 3) / 4 * 4;
    float* const b_tile = bias + (C::CHANNELS + 3) / 4 * 4;
    float* const c_tile = b_tile + C::COEFFICIENTS;

    const Place at = Place::of(p, C());
    if (ENDS && at.split + 1 == at.splits) return;  // nobody needs it
    const bool time_is_contiguous = p.y_stride[2] == 1;
    const int lane = threadIdx.x % 32, lane_of_channel = lane % C::LANES;
    const int channel = threadIdx.x / C::LANES, n = lane_of_channel * S;
    const bool exists = channel < at.channels;
    const int64_t state = at.state_of(p, channel, n);

    using Rows = Coefficients<C, T, VARYING>;
    const Rows b(p.b, p.b_constant, p.b_stride, p.b_group_len, at, time_is_contiguous, b_tile);
    const Rows c(p.c, p.c_constant, p.c_stride, p.c_group_len, at, time_is_contiguous, c_tile);
    b.stage_constant(p, at);
    if (!ENDS) c.stage_constant(p, at);
    for (int i = threadIdx.x; i < C::CHANNELS; i += C::THREADS) {
        skip[i] = p.d && i < at.channels ? p.d[at.first + i] : 0.0f;
        bias[i] = p.delta_bias && i < at.channels ? p.delta_bias[at.first + i] : 0.0f;
    }
    __syncthreads();

    float a[S], h[S], span = 0.0f;
#pragma unroll
    for (int s = 0; s < S; s++) {
        a[s] = exists && n + s < p.d_state ? p.a[int64_t(at.first + channel) * p.d_state + n + s] * LOG2_E : 0.0f;
        h[s] = !ENDS && exists && n + s < p.d_state && p.initial_state ? p.initial_state[state + s] : 0.0f;
    }
    if (!ENDS && exists) {
        for (int split = 0; split < at.split; split++) {
            const int64_t row = at.row_of(p, split, channel);
            float end[S];
            load_states(p.ends + row * p.d_state + n, n, p.d_state, end);
            decay_over(p.spans[row], a, h);
#pragma unroll
            for (int s = 0; s < S; s++) h[s] += end[s];
        }
    }

    const Staged<C> staged(time_is_contiguous);
    using Staging = Activation<T, C>;
    const Staging u(p.u, p.u_stride, at, staged), delta(p.delta, p.delta_stride, at, staged);
    const Staging y(p.y, p.y_stride, at, staged), z(p.z, p.z_stride, at, staged);
    const bool all_channels = p.packs && at.channels == C::CHANNELS;
    Raw<T, C::PACK> next_u, next_delta;
    typename Rows::Packs next_b, next_c;
    const auto fetch = [&](int64_t first) {
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        u.load(next_u, staged, first, whole, at.channels, tokens);
        delta.load(next_delta, staged, first, whole, at.channels, tokens);
        b.fetch(next_b, p, first, tokens);
        if (!ENDS) c.fetch(next_c, p, first, tokens);
    };
    if (C::AHEAD && at.begin < at.end) fetch(int64_t(at.begin) * TILE);

    for (int tile = at.begin; tile < at.end; tile++) {
        const int64_t first = int64_t(tile) * TILE;
        const int tokens = min(int64_t(TILE), at.length - first);
        const bool whole = all_channels && tokens == TILE;
        if (!C::AHEAD) fetch(first);
        const Raw<T, C::PACK> own_u = next_u;
        {
            float steps[C::PACK], inputs[C::PACK];
#pragma unroll
            for (int k = 0; k < C::PACK; k++) {
                float step = next_delta.get(k) + bias[staged.channel + k * staged.channel_step];
                if (p.delta_softplus) step = softplus_unit(step);
                steps[k] = whole || staged.exists(k, at.channels, tokens) ? step : 0.0f;
                inputs[k] = steps[k] * own_u.get(k);
            }
            staged.put(delta_tile, steps), staged.put(input_tile, inputs);
        }
        b.stage(next_b, p, first, tokens);
        if (!ENDS) c.stage(next_c, p, first, tokens);
        __syncthreads();
        Raw<T, C::PACK> gate;
        if (!ENDS && p.z) z.load(gate, staged, first, whole, at.channels, tokens);
        if (C::AHEAD && tile + 1 < at.end) fetch(first + TILE);
        if (!ENDS && p.checkpoints && exists) {
            store_states(p.checkpoints + at.checkpoint_of(p, tile, channel, n), n, p.d_state, h);
        }

        const float *b_row = b.of(channel, n), *c_row = c.of(channel, n);
        // The next piece is on its way while one is computed; after the last the first is read again, for nothing.
        float next_steps[SUB], next_inputs[SUB];
        const auto load_piece = [&](int token) {
            load_tokens<C>(delta_tile, channel, token % TILE, next_steps);
            load_tokens<C>(input_tile, channel, token % TILE, next_inputs);
        };
        load_piece(0);
        float tile_span = 0.0f;
#pragma unroll 1
        for (int sub = 0; sub < TILE; sub += SUB) {
            float sums[SUB], steps[SUB], inputs[SUB];
#pragma unroll
            for (int i = 0; i < SUB; i++) steps[i] = next_steps[i], inputs[i] = next_inputs[i];
            load_piece(sub + SUB);
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                float bs[S], cs[S];
                load_row(b_row + i * b.step(), bs);
                if (!ENDS) load_row(c_row + i * c.step(), cs);
                sums[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < S; s++) {
                    h[s] = fmaf(fast_exp2(steps[i] * a[s]), h[s], inputs[i] * bs[s]);
                    if (!ENDS) sums[i] = fmaf(cs[s], h[s], sums[i]);
                }
                if (ENDS) tile_span += steps[i];
            }
            b_row += SUB * b.step(), c_row += SUB * c.step();
            if (ENDS) continue;
            reduce_scatter<SUB, C::LANES, 1>(sums, lane);
            __syncwarp();
            if (lane_of_channel % C::LANES_PER_TOKEN == 0) {
                const int t = sub + lane_of_channel / C::LANES_PER_TOKEN * C::TOKENS_PER_LANE;
#pragma unroll
                for (int i = 0; i < C::TOKENS_PER_LANE; i++) delta_tile[place_of<C>(channel, t + i)] = sums[i];
            }
        }
        __syncthreads();
        span += tile_span;
        if (ENDS) continue;
        float sums[C::PACK];
        staged.get(delta_tile, sums);
        Pack<T, C::PACK> out;
#pragma unroll
        for (int k = 0; k < C::PACK; k++) {
            float value = fmaf(skip[staged.channel + k * staged.channel_step], own_u.get(k), sums[k]);
            if (p.z) {
                const float x = gate.get(k);
                value *= x * sigmoid(x);
            }
            out.values[k] = from_float<T>(value);
        }
        y.store(out, staged, first, whole, at.channels, tokens);
        __syncthreads();
    }
    if (!exists) return;
    if (ENDS) {
        const int64_t row = at.row_of(p, at.split, channel);
        store_states(p.ends + row * p.d_state + n, n, p.d_state, h);
        if (lane_of_channel == 0) p.spans[row] = span;
    } else if (at.split + 1 == at.splits) {
        store_states(p.final_state + state, n, p.d_state, h);
    }
}

template <typename T, typename C, bool ENDS> __device__ __forceinline__ void any_forward(const SelectiveScan& p) {
    if (p.b_constant || (!ENDS && p.c_constant)) {
        forward<T, C, false, ENDS>(p);
    } else {
        forward<T, C, true, ENDS>(p);
    }
}

}  // namespace

#define INSTANTIATE_SHAPE(SHAPE, S, LANES, WARPS, PIECE, BLOCKS, BWD_PIECE, BWD_BLOCKS, T, DTYPE) \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                       \
        selective_scan_fwd_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {    \
        any_forward<T, Shape<S, LANES, WARPS, PIECE>, false>(p);                             \
    }                                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                       \
        selective_scan_ends_##SHAPE##_##DTYPE(const __grid_constant__ SelectiveScan p) {   \
        any_forward<T, Shape<S, LANES, WARPS, PIECE>, true>(p);                              \
    }
#define INSTANTIATE(T, DTYPE) FOR_EACH_SHAPE(INSTANTIATE_SHAPE, T, DTYPE)

FOR_EACH_DTYPE(INSTANTIATE)
