// ssd_chunk_scan forward: steps once for all, then one block for each head (or part of its channels) walks over the chunks
// with the state in shared memory, so states cross no other memory. The same walk without outputs keeps the states before
// each chunk for the backward pass and, from the last chunk, the gradients of the states after each.
#include "ssd.cuh"

namespace {

// One warp for each chunk of each head.
template <typename T> __device__ __forceinline__ void steps(const Ssd& p) {
    const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32, head = index % p.nheads;
    const int64_t chunk = index / p.nheads % p.chunks, batch = index / p.nheads / p.chunks;
    if (batch >= p.batch) return;
    const double a = double(p.a[head]) * 1.4426950408889634;
    const float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    const T* dt = static_cast<const T*>(p.dt) + batch * p.dt_stride[0] + head * p.dt_stride[2];
    Step* out = p.steps + ((batch * p.nheads + head) * p.chunks + chunk) * p.q;
    double before = 0.0;
    for (int first = 0; first < p.q; first += 32) {
        const int i = first + lane;
        const int64_t t = chunk * p.q + i;
        float step = 0.0f, slope = 0.0f;
        if (i < p.q && t < p.seqlen) {
            const float raw = to_float(dt[t * p.dt_stride[1]]) + bias;
            const float free = p.dt_softplus ? softplus_unit(raw) : raw;
            step = free < p.dt_low ? p.dt_low : free > p.dt_high ? p.dt_high : free;
            slope = free < p.dt_low || free > p.dt_high ? 0.0f : p.dt_softplus ? sigmoid_unit(raw) : 1.0f;
        }
        double sum = step * a;
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const double other = __shfl_up_sync(0xffffffffu, sum, lanes);
            if (lane >= lanes) sum += other;
        }
        sum += before;
        before = __shfl_sync(0xffffffffu, sum, 31);
        const float high = sum;
        if (i < p.q) out[i] = {step, high, float(sum - high), slope};
    }
}

// The state, f32 and as an operand: (p, n).
template <int TERMS> struct State {
    Matrix<TERMS> operand;
    float* value;
    int row;

    __device__ State(bf16*& room, int p, int n) : operand(room, p, n), value(nullptr), row(n + 8) {}
};

// state = decay · state + Σ_j inputs[j] ⊗ b[j]
template <int TI, int TC>
__device__ __forceinline__ void advance(const State<TC>& state, const Matrix<TC>& inputs, const Matrix<TI>& b, float decay,
                                        int p, int n, int q) {
    const int columns = (n + 31) / 32;
    for (int i = threadIdx.x / 32; i < p / 16 * columns; i += WARPS) {
        const int row0 = i / columns * 16, column0 = i % columns * 32;
        Tile<4> tile;
        tile.clear();
        multiply<TRANSPOSED, AS_STORED>(tile, inputs, row0, b, column0, n, 0, q);
        tile.each([&](int, int, int row, int column, float x, float y) {
            row += row0, column += column0;
            if (column >= n) return;
            float2* const at = reinterpret_cast<float2*>(state.value + row * state.row + column);
            x = fmaf(decay, at->x, x), y = fmaf(decay, at->y, y);
            *at = make_float2(x, y);
            state.operand.set2(row, column, x, y);
        });
    }
}

// Who owns what in a walk over chunks.
struct Walk {
    int batch, head, group, first, channels, p, n;  // p and n are padded

    __device__ explicit Walk(const Ssd& args) {
        const int tiles = (args.headdim + args.p_tile - 1) / args.p_tile;
        first = blockIdx.x % tiles * args.p_tile;
        head = blockIdx.x / tiles % args.nheads;
        batch = blockIdx.x / tiles / args.nheads;
        group = head / (args.nheads / args.ngroups);
        channels = min(args.p_tile, args.headdim - first);
        p = padded(channels), n = padded(args.d_state);
    }
    // Where this block's part of a (batch, nheads, headdim, d_state) state begins.
    __device__ int64_t state(const Ssd& args) const {
        return ((int64_t(batch) * args.nheads + head) * args.headdim + first) * args.d_state;
    }
    template <int TERMS> __device__ void begin(const Ssd& args, const State<TERMS>& to, const float* from) const {
        for (int i = threadIdx.x; i < p * n; i += THREADS) {
            const int row = i / n, column = i % n;
            const bool exists = from && row < channels && column < args.d_state;
            const float x = exists ? from[state(args) + int64_t(row) * args.d_state + column] : 0.0f;
            to.value[row * to.row + column] = x;
            to.operand.set(row, column, x);
        }
    }
    template <int TERMS> __device__ void end(const Ssd& args, const State<TERMS>& from, float* to) const {
        for (int i = threadIdx.x; i < channels * args.d_state; i += THREADS) {
            const int row = i / args.d_state, column = i % args.d_state;
            to[state(args) + int64_t(row) * args.d_state + column] = from.value[row * from.row + column];
        }
    }
};

template <typename T> __device__ __forceinline__ void scan(const Ssd& args) {
    constexpr int TI = Terms<T>::INPUT, TC = Terms<T>::COMPUTED;
    extern __shared__ __align__(16) unsigned char shared[];
    const Walk at(args);
    const int q = args.q, p = at.p, n = at.n;

    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<TI> c(room, q, n), b(room, q, n), x(room, q, p);
    State<TC> state(room, p, n);
    bf16* const both = room;  // first scores, then inputs of the state
    const Matrix<TC> scores(both, q, q, 0), inputs(both, q, p, 0);
    float* numbers = reinterpret_cast<float*>(both + TC * q * padded_row(max(q, p)));
    state.value = numbers;
    numbers += p * state.row;
    const Steps steps(numbers, q);
    float* const skip = numbers;

    const int warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < p; i += THREADS) {
        const int64_t at_d = args.d_per_channel ? int64_t(at.head) * args.headdim + at.first + i : at.head;
        skip[i] = args.d && i < at.channels ? args.d[at_d] : 0.0f;
    }
    at.begin(args, state, args.initial_state);
    bool has_state = args.initial_state;

    for (int chunk = 0; chunk < args.chunks; chunk++) {
        const int64_t first = int64_t(chunk) * q;
        const int tokens = min(int64_t(q), args.seqlen - first);
        load_rows(c, row_of<T>(args.c, args.c_stride, at.batch, first, at.group), args.c_stride[1], tokens, args.d_state, q, n,
             args.aligned);
        load_rows(b, row_of<T>(args.b, args.b_stride, at.batch, first, at.group), args.b_stride[1], tokens, args.d_state, q, n,
             args.aligned);
        load_rows(x, row_of<T>(args.x, args.x_stride, at.batch, first, at.head) + at.first, args.x_stride[1], tokens,
             at.channels, q, p, args.aligned);
        steps.load(steps_of(args, at.batch, at.head, chunk), q);
        loads_arrive();
        __syncthreads();

        {
            const int columns = (q + 31) / 32;
            for (int i = warp; i < q / 16 * columns; i += WARPS) {
                const int row0 = i / columns * 16, column0 = i % columns * 32;
                if (column0 > row0 + 15) continue;
                Tile<4> tile;
                tile.clear();
                multiply<AS_STORED, TRANSPOSED>(tile, c, row0, b, column0, min(q, row0 + 16), 0, n);
                tile.each([&](int, int, int i, int j, float x, float y) {
                    i += row0, j += column0;
                    if (j >= q) return;
                    x = j <= i ? x * steps.between(i, j) * steps.dt[j] : 0.0f;
                    y = j + 1 <= i ? y * steps.between(i, j + 1) * steps.dt[j + 1] : 0.0f;
                    scores.set2(i, j, x, y);
                });
            }
        }
        __syncthreads();

        {
            const int columns = (p + 15) / 16;
            for (int i = warp; i < q / 16 * columns; i += WARPS) {
                const int row0 = i / columns * 16, column0 = i % columns * 16;
                Tile<2> tile;
                tile.clear();
                if (has_state) {
                    multiply<AS_STORED, TRANSPOSED>(tile, c, row0, state.operand, column0, p, 0, n);
                    tile.scale_rows(steps.from_start[row0 + tile.row(0)], steps.from_start[row0 + tile.row(1)]);
                }
                multiply<AS_STORED, AS_STORED>(tile, scores, row0, x, column0, p, 0, row0 + 16);
                tile.each([&](int, int, int i, int j, float y0, float y1) {
                    i += row0, j += column0;
                    if (i >= tokens) return;
                    const float2 xs = x.at2(i, j);
                    const float out[2] = {fmaf(skip[j], xs.x, y0), fmaf(skip[j + 1], xs.y, y1)};
                    const int64_t row = ((int64_t(at.batch) * args.seqlen + first + i) * args.nheads + at.head);
                    const int64_t to = row * args.headdim + at.first + j;
                    const T* z = args.z ? row_of<T>(args.z, args.z_stride, at.batch, first + i, at.head) : nullptr;
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        if (j + k >= at.channels) continue;
                        if (args.y_ungated) {
                            args.y_ungated[to + k] = out[k];
                            continue;
                        }
                        float y = out[k];
                        if (z) {
                            const float gate = to_float(z[at.first + j + k]);
                            y *= gate * sigmoid_unit(gate);
                        }
                        static_cast<T*>(args.y)[to + k] = from_float<T>(y);
                    }
                });
            }
        }
        __syncthreads();

        for (int i = threadIdx.x; i < q * p / 2; i += THREADS) {
            const int token = i / (p / 2), column = i % (p / 2) * 2;
            const float weight = steps.dt[token] * steps.to_end[token];
            const float2 v = x.at2(token, column);
            inputs.set2(token, column, weight * v.x, weight * v.y);
        }
        __syncthreads();
        advance(state, inputs, b, steps.from_start[q - 1], p, n, q);
        has_state = true;
        __syncthreads();
    }
    if (args.final_state) at.end(args, state, args.final_state);
}

// From the first chunk, with b and x, the states before each; from the last, with c and the gradients of y before the gate,
// the gradients of the states after each.
template <typename T> __device__ __forceinline__ void states(const Ssd& args) {
    constexpr int TI = Terms<T>::INPUT, TC = Terms<T>::COMPUTED;
    extern __shared__ __align__(16) unsigned char shared[];
    const Walk at(args);
    const bool reverse = blockIdx.y;
    const int q = args.q, p = at.p, n = at.n;

    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<TI> b(room, q, n);
    State<TC> state(room, p, n);
    const Matrix<TC> inputs(room, q, p);
    float* numbers = reinterpret_cast<float*>(room);
    state.value = numbers;
    numbers += p * state.row;
    const Steps steps(numbers, q);

    at.begin(args, state, reverse ? args.grad_state : args.initial_state);
    __syncthreads();
    for (int i = 0; i < args.chunks; i++) {
        const int chunk = reverse ? args.chunks - 1 - i : i;
        const int64_t first = int64_t(chunk) * q;
        const int tokens = min(int64_t(q), args.seqlen - first);
        {
            const int whole_p = padded(args.headdim);
            bf16* const to = (reverse ? args.grad_states : args.states) + state_at(args, at.batch, chunk, at.head, TC);
            const int pieces = n / 8;
            for (int i = threadIdx.x; i < TC * p * pieces; i += THREADS) {
                const int term = i / (p * pieces), row = i / pieces % p, column = i % pieces * 8;
                *reinterpret_cast<int4*>(to + (int64_t(term) * whole_p + at.first + row) * n + column) =
                    *reinterpret_cast<const int4*>(state.operand.start + term * state.operand.term +
                                                   row * state.operand.row + column);
            }
        }
        if (!reverse && i + 1 == args.chunks) break;
        const void* rows = reverse ? args.c : args.b;
        const int64_t(&row_stride)[3] = reverse ? args.c_stride : args.b_stride;
        load_rows(b, row_of<T>(rows, row_stride, at.batch, first, at.group), row_stride[1], tokens, args.d_state, q, n,
             args.aligned);
        steps.load(steps_of(args, at.batch, at.head, chunk), q);
        loads_arrive();
        __syncthreads();
        const void* values = reverse ? args.grad_y : args.x;
        const int64_t(&stride)[3] = reverse ? args.grad_y_stride : args.x_stride;
        if (values) {
            each_piece(row_of<T>(values, stride, at.batch, first, at.head) + at.first, stride[1], tokens, at.channels, q, p,
                       args.aligned, [&](int token, int column, float(&v)[8]) {
                           const float weight = reverse ? steps.from_start[token] : steps.dt[token] * steps.to_end[token];
                           if (reverse && args.z && token < tokens) {
                               const T* z = row_of<T>(args.z, args.z_stride, at.batch, first + token, at.head);
#pragma unroll
                               for (int k = 0; k < 8; k++) {
                                   if (column + k >= at.channels) continue;
                                   const float gate = to_float(z[at.first + column + k]);
                                   v[k] *= gate * sigmoid_unit(gate);
                               }
                           }
#pragma unroll
                           for (int k = 0; k < 8; k++) v[k] *= weight;
                           inputs.set8(token, column, v);
                       });
        } else {
            for (int i = threadIdx.x; i < q * p; i += THREADS) inputs.set(i / p, i % p, 0.0f);
        }
        __syncthreads();
        advance(state, inputs, b, steps.from_start[q - 1], p, n, q);
        __syncthreads();
    }
    if (reverse) at.end(args, state, args.grad_initial_state);
}

}  // namespace

#define INSTANTIATE(DTYPE, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) ssd_steps_##DTYPE(const __grid_constant__ Ssd p) {          \
        steps<T>(p);                                                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) ssd_scan_##DTYPE(const __grid_constant__ Ssd p) {        \
        scan<T>(p);                                                                                                   \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) ssd_states_##DTYPE(const __grid_constant__ Ssd p) {      \
        states<T>(p);                                                                                                 \
    }

INSTANTIATE(f32, float)
INSTANTIATE(f16, f16)
INSTANTIATE(bf16, bf16)
