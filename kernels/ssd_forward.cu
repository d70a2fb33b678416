// ssd_chunk_scan forward: steps once for all, then one block for each head (or part of its channels) walks over the chunks
// with the state in shared memory, so states cross no other memory. The same walk without outputs keeps the states before
// each chunk for the backward pass and, from the last chunk, the gradients of the states after each.
#include "ssd.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// One warp for each chunk of each head.
template <typename T> __device__ __forceinline__ void steps(const Ssd& p) {
    const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32, head = index % p.nheads;
    if (index / p.nheads >= p.count) return;
    const Piece piece = piece_of(p.pieces, index / p.nheads, p.chunks, p.seqlen);
    const Sequence of(p, piece);
    const int tokens = of.tokens(p, piece.piece);
    const double a = double(p.a[head]) * 1.4426950408889634;
    const float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    const T* dt = row_of<T>(p.dt, p.dt_stride, of.row, of.first(p, piece.piece), head);
    Step* out = of.steps(p, head, piece.piece);
    double before = 0.0;
    for (int first = 0; first < p.q; first += 32) {
        const int i = first + lane;
        float step = 0.0f, slope = 0.0f;
        if (i < tokens) {
            const float raw = to_float(dt[i * p.dt_stride[1]]) + bias;
            const float free = p.dt_softplus ? softplus_unit(raw) : raw;
            step = free < p.dt_low ? p.dt_low : free > p.dt_high ? p.dt_high : free;
            slope = free < p.dt_low || free > p.dt_high ? 0.0f : p.dt_softplus ? sigmoid(raw) : 1.0f;
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

// Who owns what in a walk over chunks.
struct Walk {
    Sequence of;
    int head, group, first, channels, p, n;  // p and n are padded

    __device__ explicit Walk(const Ssd& args, int tiles)
        : of(args, piece_of(args.sequences, blockIdx.x / tiles / args.nheads, 1, args.seqlen)) {
        first = blockIdx.x % tiles * args.p_tile;
        head = blockIdx.x / tiles % args.nheads;
        group = head / (args.nheads / args.ngroups);
        channels = min(args.p_tile, args.headdim - first);
        p = padded(channels), n = padded(args.d_state);
    }
    __device__ explicit Walk(const Ssd& args) : Walk(args, (args.headdim + args.p_tile - 1) / args.p_tile) {}
};

// The state, (p, n), in the registers of the block: each warp keeps some tiles. p · n is at most 8192.
struct State {
    static constexpr int KEPT = 2;
    Tile<4> tiles[KEPT];

    // f(tile, row, column) for each tile of this warp.
    template <typename F> __device__ __forceinline__ void each(const Walk& at, F f) {
        const int columns = (at.n + 31) / 32;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const int i = threadIdx.x / 32 + k * WARPS;
            if (i < at.p / 16 * columns) f(tiles[k], i / columns * 16, i % columns * 32);
        }
    }
    // f(row, column, x, y) for each pair of neighbours.
    template <typename F> __device__ __forceinline__ void each_pair(const Walk& at, F f) {
        each(at, [&](Tile<4>& tile, int row0, int column0) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int column = column0 + 8 * k + tile.column();
                    if (column < at.n) f(row0 + tile.row(half), column, tile.v[k][2 * half], tile.v[k][2 * half + 1]);
                }
            }
        });
    }
    // Reads a state of (sequences, nheads, headdim, d_state); zeros if there is none.
    __device__ __forceinline__ void begin(const Ssd& args, const Walk& at, const float* from) {
        if (from) from += ((int64_t(at.of.index) * args.nheads + at.head) * args.headdim + at.first) * args.d_state;
        each_pair(at, [&](int row, int column, float& x, float& y) {
            const bool exists = from && row < at.channels;
            x = exists && column < args.d_state ? from[int64_t(row) * args.d_state + column] : 0.0f;
            y = exists && column + 1 < args.d_state ? from[int64_t(row) * args.d_state + column + 1] : 0.0f;
        });
    }
    __device__ __forceinline__ void end(const Ssd& args, const Walk& at, float* to) {
        to += ((int64_t(at.of.index) * args.nheads + at.head) * args.headdim + at.first) * args.d_state;
        each_pair(at, [&](int row, int column, float x, float y) {
            if (row >= at.channels) return;
            if (column < args.d_state) to[int64_t(row) * args.d_state + column] = x;
            if (column + 1 < args.d_state) to[int64_t(row) * args.d_state + column + 1] = y;
        });
    }
    // The largest number of the warp.
    __device__ __forceinline__ float largest(const Walk& at) {
        float largest = 0.0f;
        each_pair(at, [&](int, int, float x, float y) { largest = fmaxf(largest, fmaxf(fabsf(x), fabsf(y))); });
        return warp_max(largest);
    }
    // state = decay · state + Σ_j inputs[j] ⊗ b[j], where inputs are scaled. Tensor cores do not round their sums but cut them off, which adds up over a
    // long sequence: in f32 each chunk has a sum of its own.
    template <int TI, int TC, typename Term>
    __device__ __forceinline__ void advance(const Walk& at, const Matrix<TC, Term>& inputs, const Matrix<TI, Term>& b,
                                            ChunkDecay decay, int q, [[maybe_unused]] Scale scale = Scale::none()) {
        constexpr bool SCALED = std::is_same_v<Term, f16>;
        if constexpr (TI < 3) {
            const float before = SCALED ? decay.factor * scale.factor : decay.factor;
            // Where all tiles of a warp have the same columns, it reads those of b once.
            const int columns = (at.n + 31) / 32, warp = threadIdx.x / 32;
            if (at.p / 16 * columns == KEPT * WARPS && WARPS % columns == 0) {
                for (Tile<4>& tile : tiles) tile.scale(before);
                multiply<TRANSPOSED, AS_STORED>(tiles, inputs, warp / columns * 16, WARPS / columns * 16, b, warp % columns * 32,
                                                at.n, 0, q);
                if (SCALED) {
                    for (Tile<4>& tile : tiles) tile.scale(scale.inverse);
                }
                return;
            }
            each(at, [&](Tile<4>& tile, int row0, int column0) {
                tile.scale(before);
                multiply<TRANSPOSED, AS_STORED>(tile, inputs, row0, b, column0, at.n, 0, q);
                if (SCALED) tile.scale(scale.inverse);
            });
        } else {
            each(at, [&](Tile<4>& tile, int row0, int column0) {
                Tile<4> sum;
                sum.clear();
                multiply<TRANSPOSED, AS_STORED>(sum, inputs, row0, b, column0, at.n, 0, q);
#pragma unroll
                for (int k = 0; k < 4; k++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) tile.v[k][i] = decay.advance(tile.v[k][i], sum.v[k][i]);
                }
            });
        }
    }
};

// The scales of what a chunk is worked out with: the largest input and state, as bits, for even and odd chunks, and a scale
// for each tile of scores. They are where rows of a matrix are padded, 16 bytes each: with room of their own a multiprocessor
// would hold one block less.
struct Scales {
    unsigned *inputs, *states;
    float2* scores;
    int row;  // from 16 rows of scores to the next

    template <int TERMS, typename Term>
    __device__ Scales(const Matrix<TERMS, Term>& padded, int columns)
        : inputs(reinterpret_cast<unsigned*>(padded.start + columns)), states(inputs + 2),
          scores(reinterpret_cast<float2*>(padded.start + padded.row + columns)), row(padded.row * sizeof(Term) / sizeof(float2)) {}
    // Of a tile of 16 rows and 32 columns, and its inverse.
    __device__ __forceinline__ float2& of_scores(int row0, int column0) const { return scores[row0 / 16 * row + column0 / 32]; }
    // Takes part in the largest of all warps.
    __device__ __forceinline__ static void join(unsigned& largest, float x) {
        x = warp_max(x);
        if (threadIdx.x % 32 == 0) atomicMax(&largest, __float_as_uint(x));
    }
    __device__ __forceinline__ static Scale of(unsigned largest) { return Scale(__uint_as_float(largest)); }
};

// One tile of outputs: rows row0.., columns column0.. of y before skip and gate, then those.
template <int N, typename T, int TI, int TC, typename Term>
__device__ __forceinline__ void outputs(const Ssd& args, const Walk& at, const Steps& steps, const Matrix<TI, Term>& c,
                                        const Matrix<TI, Term>& x, const Matrix<TC, Term>& state, float state_scale,
                                        const Matrix<TC, Term>& scores, const Scales& scales, int row0, int column0,
                                        bool has_state, int first, int tokens) {
    constexpr bool SCALED = std::is_same_v<Term, f16>;
    const bool gated = args.z && !args.y_ungated;
    Pack<T, 2> gates[N][2];
    if (gated) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = row0 + Tile<N>::row(half);
            const T* z = row_of<T>(args.z, args.z_stride, at.of.row, first + min(i, tokens - 1), at.head) + at.first;
#pragma unroll
            for (int k = 0; k < N; k++) {
                const int j = column0 + 8 * k + Tile<N>::column();
                gates[k][half].values[0] = z[min(j, at.channels - 1)];
                gates[k][half].values[1] = z[min(j + 1, at.channels - 1)];
            }
        }
    }
    Tile<N> tile;
    tile.clear();
    if (has_state) {
        multiply<AS_STORED, TRANSPOSED>(tile, c, row0, state, column0, at.p, 0, at.n);
        const float scale = SCALED ? state_scale : 1.0f;
        tile.scale_rows(scale * steps.from_start(row0 + tile.row(0)), scale * steps.from_start(row0 + tile.row(1)));
    }
    if constexpr (SCALED) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (32 * k >= row0 + 16) break;
            const float2 scale = scales.of_scores(row0, 32 * k);
            tile.scale(scale.x);
            multiply<AS_STORED, AS_STORED>(tile, scores, row0, x, column0, at.p, 32 * k, min(32 * k + 32, row0 + 16));
            tile.scale(scale.y);
        }
    } else {
        multiply<AS_STORED, AS_STORED>(tile, scores, row0, x, column0, at.p, 0, row0 + 16);
    }
    if (args.d) {
        const float* const d = args.d + (args.d_per_channel ? int64_t(at.head) * args.headdim + at.first : at.head);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const int j = column0 + 8 * k + tile.column();
            const float d0 = d[args.d_per_channel ? min(j, at.channels - 1) : 0];
            const float d1 = d[args.d_per_channel ? min(j + 1, at.channels - 1) : 0];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 xs = x.at2(row0 + tile.row(half), min(j, at.p - 2));
                tile.v[k][2 * half] = fmaf(d0, xs.x, tile.v[k][2 * half]);
                tile.v[k][2 * half + 1] = fmaf(d1, xs.y, tile.v[k][2 * half + 1]);
            }
        }
    }
    if (gated) {
#pragma unroll
        for (int k = 0; k < N; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int w = 0; w < 2; w++) {
                    const float gate = to_float(gates[k][half].values[w]);
                    tile.v[k][2 * half + w] *= gate * sigmoid(gate);
                }
            }
        }
    }
    const bool pairs = args.headdim % 2 == 0 && column0 + 8 * N <= at.channels;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = row0 + tile.row(half), j = column0 + tile.column();
        if (i >= tokens) break;
        const int64_t to =
            ((int64_t(at.of.row) * args.seqlen + first + i) * args.nheads + at.head) * args.headdim + at.first + j;
        const auto store = [&](auto* y) {
            using Y = std::remove_pointer_t<decltype(y)>;
            if (pairs) {
#pragma unroll
                for (int k = 0; k < N; k++) {
                    Pack<Y, 2> out;
                    out.values[0] = from_float<Y>(tile.v[k][2 * half]), out.values[1] = from_float<Y>(tile.v[k][2 * half + 1]);
                    *reinterpret_cast<Pack<Y, 2>*>(y + 8 * k) = out;
                }
            } else {
#pragma unroll
                for (int k = 0; k < N; k++) {
                    if (j + 8 * k < at.channels) y[8 * k] = from_float<Y>(tile.v[k][2 * half]);
                    if (j + 8 * k + 1 < at.channels) y[8 * k + 1] = from_float<Y>(tile.v[k][2 * half + 1]);
                }
            }
        };
        if (args.y_ungated) {
            store(args.y_ungated + to);
        } else {
            store(static_cast<T*>(args.y) + to);
        }
    }
}

template <typename T> __device__ __forceinline__ void scan(const Ssd& args) {
    using Operands = ScaledTerms<T>;
    using Term = typename Operands::Term;
    constexpr int TI = Operands::INPUT, TC = Operands::COMPUTED;
    constexpr bool SCALED = std::is_same_v<Term, f16>;
    extern __shared__ __align__(16) unsigned char shared[];
    const Walk at(args);
    const int q = args.q, p = at.p, n = at.n, warp = threadIdx.x / 32;
    const Pieces of_n(n), of_p(p);

    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<TI, Term> c(room, q, n), x(room, q, p), both_b(room, 2 * q, n);
    const Matrix<TC, Term> operand(room, p, n);
    // First scores, then what the state receives.
    const Matrix<TC, Term> scores(room, q, q, 0), inputs(room, q, p, 0);
    float* numbers = reinterpret_cast<float*>(room + TC * q * padded_row(max(q, p)));
    const Steps steps(numbers, q);
    const Scales scales(x, p);

    const auto tokens_of = [&](int chunk) { return at.of.tokens(args, chunk); };
    const auto load_b = [&](int chunk) {
        load_rows(both_b.rows_from(chunk % 2 * q), of_n,
                  row_of<T>(args.b, args.b_stride, at.of.row, at.of.first(args, chunk), at.group), args.b_stride[1],
                  tokens_of(chunk), args.d_state, q, n, args.aligned);
    };
    const auto load_c = [&](int chunk) {
        load_rows(c, of_n, row_of<T>(args.c, args.c_stride, at.of.row, at.of.first(args, chunk), at.group), args.c_stride[1],
                  tokens_of(chunk), args.d_state, q, n, args.aligned);
    };
    const auto load_x = [&](int chunk) {
        load_rows(x, of_p, row_of<T>(args.x, args.x_stride, at.of.row, at.of.first(args, chunk), at.head) + at.first,
                  args.x_stride[1], tokens_of(chunk), at.channels, q, p, args.aligned);
    };
    State state;
    state.begin(args, at, args.initial_state);
    if (SCALED) {
        if (threadIdx.x < 2) scales.inputs[threadIdx.x] = scales.states[threadIdx.x] = 0;
        __syncthreads();
        Scales::join(scales.states[0], state.largest(at));
    }
    const int chunks = at.of.chunks;
    if (chunks > 0) {
        load_b(0), load_c(0), load_x(0);
        steps.load(at.of.steps(args, at.head, 0), q);
    }
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int first = at.of.first(args, chunk);
        const Matrix<TI, Term> b = both_b.rows_from(chunk % 2 * q);
        const bool more = chunk + 1 < chunks;
        loads_arrive();
        __syncthreads();
        Steps::Next next_steps;
        if (more) {
            load_b(chunk + 1);
            next_steps = Steps::fetch(at.of.steps(args, at.head, chunk + 1), q);
        }
        const int even = chunk % 2;
        const Scale of_state = SCALED ? Scales::of(scales.states[even]) : Scale::none();
        state.each_pair(at, [&](int row, int column, float x, float y) {
            operand.set2(row, column, SCALED ? x * of_state.factor : x, SCALED ? y * of_state.factor : y);
        });
        if constexpr (SCALED) {
            if (threadIdx.x == 0) scales.states[1 - even] = scales.inputs[1 - even] = 0;
            float largest = 0.0f;
            of_p.each(q, p, [&](int token, int column) {
                float values[8];
                x.at8(token, column, values);
                const float weight = steps.dt[token] * steps.to_end[token];
#pragma unroll
                for (int k = 0; k < 8; k++) largest = fmaxf(largest, fabsf(weight * values[k]));
            });
            Scales::join(scales.inputs[even], largest);
        }
        {
            const int columns = (q + 31) / 32;
            for (int i = warp; i < q / 16 * columns; i += WARPS) {
                const int row0 = i / columns * 16, column0 = i % columns * 32;
                if (column0 > row0 + 15) continue;
                Tile<4> tile;
                tile.clear();
                multiply<AS_STORED, TRANSPOSED>(tile, c, row0, b, column0, min(q, row0 + 16), 0, n);
                float largest = 0.0f;
                each_decay<4>(steps, row0, column0, q, [&](int i, int j, int k, int half, float first, float second) {
                    const float2 dt = *reinterpret_cast<const float2*>(steps.dt + j);
                    const float x = tile.v[k][2 * half] * first * dt.x, y = tile.v[k][2 * half + 1] * second * dt.y;
                    if (SCALED) {
                        tile.v[k][2 * half] = x, tile.v[k][2 * half + 1] = y;
                        largest = fmaxf(largest, fmaxf(fabsf(x), fabsf(y)));
                    } else {
                        scores.set2(i, j, x, y);
                    }
                });
                if constexpr (SCALED) {
                    const Scale scale(warp_max(largest));
                    tile.each([&](int, int, int row, int column, float x, float y) {
                        if (column0 + column < q) scores.set2(row0 + row, column0 + column, x * scale.factor, y * scale.factor);
                    });
                    if (threadIdx.x % 32 == 0) scales.of_scores(row0, column0) = {scale.factor, scale.inverse};
                }
            }
        }
        __syncthreads();
        const bool has_state = chunk > 0 || args.initial_state;
        if (p > 32) {
            const int columns = (p + 31) / 32;
            for (int i = warp; i < q / 16 * columns; i += WARPS) {
                outputs<4, T>(args, at, steps, c, x, operand, of_state.inverse, scores, scales, i / columns * 16, i % columns * 32, has_state, first,
                              tokens_of(chunk));
            }
        } else {
            const int columns = p / 16;
            for (int i = warp; i < q / 16 * columns; i += WARPS) {
                outputs<2, T>(args, at, steps, c, x, operand, of_state.inverse, scores, scales, i / columns * 16, i % columns * 16, has_state, first,
                              tokens_of(chunk));
            }
        }
        __syncthreads();
        if (more) load_c(chunk + 1);
        const Scale of_inputs = SCALED ? Scales::of(scales.inputs[even]) : Scale::none();
        of_p.each(q, p, [&](int token, int column) {
            float values[8];
            x.at8(token, column, values);
            float weight = steps.dt[token] * steps.to_end[token];
            if (SCALED) weight *= of_inputs.factor;
#pragma unroll
            for (int k = 0; k < 8; k++) values[k] *= weight;
            inputs.set8(token, column, values);
        });
        const ChunkDecay total(steps.exponent[q - 1]);
        __syncthreads();
        if (more) load_x(chunk + 1), steps.put(next_steps, q);
        state.advance(at, inputs, b, total, q, of_inputs);
        if (SCALED && more) Scales::join(scales.states[1 - even], state.largest(at));
    }
    if (args.final_state) state.end(args, at, args.final_state);
}

// From the first chunk, with b and x, the states before each; from the last, with c and the gradients of y before the gate,
// the gradients of the states after each.
template <typename T> __device__ __forceinline__ void states(const Ssd& args) {
    constexpr int TI = Terms<T>::INPUT, TC = Terms<T>::COMPUTED;
    extern __shared__ __align__(16) unsigned char shared[];
    const Walk at(args);
    const bool reverse = blockIdx.y;
    const int q = args.q, p = at.p, n = at.n, whole_p = padded(args.headdim);
    const Pieces of_n(n), of_p(p);

    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<TI> both_b(room, 2 * q, n);
    const Matrix<TC> inputs(room, q, p);
    float* numbers = reinterpret_cast<float*>(room);
    const Steps steps(numbers, q);

    const void* const rows = reverse ? args.c : args.b;
    const void* const values = reverse ? args.grad_y : args.x;
    int64_t row_stride[3], stride[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        row_stride[i] = reverse ? args.c_stride[i] : args.b_stride[i];
        stride[i] = reverse ? args.grad_y_stride[i] : args.x_stride[i];
    }
    const int chunks = at.of.chunks;
    const auto chunk_of = [&](int i) { return reverse ? chunks - 1 - i : i; };
    const auto tokens_of = [&](int chunk) { return at.of.tokens(args, chunk); };
    const auto load_b = [&](int i) {
        const int chunk = chunk_of(i);
        load_rows(both_b.rows_from(i % 2 * q), of_n, row_of<T>(rows, row_stride, at.of.row, at.of.first(args, chunk), at.group),
                  row_stride[1], tokens_of(chunk), args.d_state, q, n, args.aligned);
    };

    // Pieces of the values of a chunk, and of its gates, on their way: two a thread at most.
    constexpr int PIECES = 2;
    struct Piece { Raw<T, 8> values, gates; };
    Piece pieces[PIECES];
    Steps::Next next_steps;
    const auto fetch = [&](int i) {
        const int chunk = chunk_of(i), tokens = tokens_of(chunk);
        load_b(i);
        next_steps = Steps::fetch(at.of.steps(args, at.head, chunk), q);
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            const int token = of_p.row + k * of_p.rows;
            if (!values || token >= tokens || of_p.column >= at.channels) continue;
            const int t = at.of.first(args, chunk) + token;
            fetch_piece(pieces[k].values, row_of<T>(values, stride, at.of.row, t, at.head) + at.first, of_p.column, at.channels,
                        args.aligned);
            if (!reverse || !args.z) continue;
            fetch_piece(pieces[k].gates, row_of<T>(args.z, args.z_stride, at.of.row, t, at.head) + at.first, of_p.column,
                        at.channels, args.aligned);
        }
    };

    State state;
    state.begin(args, at, reverse ? args.grad_state : args.initial_state);
    if (chunks > 0) fetch(0);
    for (int i = 0; i < chunks; i++) {
        const int chunk = chunk_of(i), tokens = tokens_of(chunk);
        steps.put(next_steps, q);
        __syncthreads();
        bf16* const to = (reverse ? args.grad_states : args.states) + at.of.state(args, chunk, at.head, TC) +
                         int64_t(at.first) * n;
        state.each(at, [&](Tile<4>& tile, int row0, int column0) {
            const bool whole = column0 + 32 <= n;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bf16* const row = to + int64_t(row0 + tile.row(half)) * n + column0;
                float left[8];
#pragma unroll
                for (int k = 0; k < 8; k++) left[k] = tile.v[k / 2][2 * half + k % 2];
#pragma unroll
                for (int term = 0; term < TC; term++) {
                    uint32_t words[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const __nv_bfloat162 part = __floats2bfloat162_rn(left[2 * k], left[2 * k + 1]);
                        left[2 * k] -= __low2float(part), left[2 * k + 1] -= __high2float(part);
                        words[k] = *reinterpret_cast<const uint32_t*>(&part);
                    }
                    bf16* const out = row + int64_t(term) * whole_p * n;
                    if (whole) {
                        reinterpret_cast<uint4*>(out)[threadIdx.x % 4] = gather_part(words);
                    } else {
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            const int column = 8 * k + tile.column();
                            if (column0 + column < n) *reinterpret_cast<uint32_t*>(out + column) = words[k];
                        }
                    }
                }
            }
        });
        if (!reverse && i + 1 == chunks) break;
#pragma unroll
        for (int k = 0; k < PIECES; k++) {
            const int token = of_p.row + k * of_p.rows;
            if (token >= q || of_p.column >= p) continue;
            const bool exists = values && token < tokens && of_p.column < at.channels;
            const float weight = reverse ? steps.from_start(token) : steps.dt[token] * steps.to_end[token];
            float v[8];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                v[c] = exists ? weight * pieces[k].values.get(c) : 0.0f;
                if (exists && reverse && args.z) {
                    const float gate = pieces[k].gates.get(c);
                    v[c] *= gate * sigmoid(gate);
                }
            }
            inputs.set8(token, of_p.column, v);
        }
        const ChunkDecay total(steps.exponent[q - 1]);
        loads_arrive();
        __syncthreads();
        if (i + 1 < chunks) fetch(i + 1);
        state.advance(at, inputs, both_b.rows_from(i % 2 * q), total, q);
    }
    if (reverse) state.end(args, at, args.grad_initial_state);
}

}  // namespace

#define WALK(symbol, body, T, USUAL)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) symbol(const __grid_constant__ Ssd p) {       \
        body<T>(known<USUAL>(p));                                                                          \
    }
#define INSTANTIATE(T, DTYPE)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) ssd_steps_##DTYPE(const __grid_constant__ Ssd p) { steps<T>(p); } \
    WALK(ssd_scan_##DTYPE, scan, T, false)                                                                 \
    WALK(ssd_states_##DTYPE, states, T, false)
#define INSTANTIATE_USUAL(T, DTYPE)               \
    WALK(ssd_scan_usual_##DTYPE, scan, T, true)   \
    WALK(ssd_states_usual_##DTYPE, states, T, true)

FOR_EACH_DTYPE(INSTANTIATE)
FOR_EACH_16_BIT(INSTANTIATE_USUAL)
