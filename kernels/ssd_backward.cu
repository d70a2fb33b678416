// ssd_chunk_scan backward: chunks are independent once the states before them and the gradients of the states after them
// are known. A block owns one chunk and some heads of one group, takes the heads one after another, and keeps in registers
// what it sums over them: the gradients of b and c and of the scores.
//
// Within a chunk, with g the gradient of y before the gate, G = C Bᵀ, L_ij = decay from after j to after i, M = G L for
// j ≤ i, S the state before the chunk and R the gradient of the state after it:
//   of scores  dG_ij = L_ij dt_j g_i·x_j          T_ij = M_ij dt_j g_i·x_j
//   dC = Σ_heads (from_start_i S g_i) + dG B      dB = Σ_heads (to_end_j dt_j R x_j) + dGᵀ C
//   e_j = Mᵀ g + to_end_j R B_j                   dx_j = dt_j e_j + D g_j
// and of the logarithm of the decay of token k
//   Σ_{j<k≤i} T_ij + Σ_{i≥k} from_start_i C_i S g_i + Σ_{j<k} to_end_j dt_j B_j R x_j + decay of the chunk · ⟨R, S⟩.
#include "ssd.cuh"

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;

// The sum over the four lanes that hold one row of a tile.
__device__ __forceinline__ float over_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
    for (int lanes = 16; lanes >= 1; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// A kept state, (terms, p, n), as an operand.
template <int TERMS>
__device__ __forceinline__ void load_state(const Matrix<TERMS>& to, const Pieces& of_n, const bf16* from, int p, int n) {
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
        of_n.each(p, n, [&](int row, int column) {
            copy_piece(to.start + term * to.term + row * to.row + column, from + int64_t(term * p + row) * n + column, true);
        });
    }
}

// What a tile of T adds to the sums Σ_{j<k≤i} T_ij: within its own 16 columns by `columns`, Σ_{i≥k} Σ_{j<k} over the tile, and to
// all k beyond them by `rows`, Σ_j. Differences of sums over rows and columns would say the same, but cancel.
template <int TERMS>
__device__ __forceinline__ void add_across(Tile<2> t, bool on_diagonal, float* columns, float* rows) {
    const int lane = threadIdx.x % 32, i = Tile<2>::row(0), j = Tile<2>::column();
    float sums[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sums[half] = over_row(t.v[0][2 * half] + t.v[0][2 * half + 1] + (t.v[1][2 * half] + t.v[1][2 * half + 1]));
        if (lane % 4 == 0) rows[i + 8 * half] = sums[half];
    }
    // Σ_{j<k} of each row: the tile times ones above the diagonal.
    uint32_t terms[TERMS][4];
#pragma unroll
    for (int term = 0; term < TERMS; term++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float *x = &t.v[k][2 * half];
                const __nv_bfloat162 part = __floats2bfloat162_rn(x[0], x[1]);
                x[0] -= __low2float(part), x[1] -= __high2float(part);
                terms[term][2 * k + half] = *reinterpret_cast<const uint32_t*>(&part);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int k = 8 * n + lane / 4;
        const auto ones = [&](int j) { return (j < k ? 0x3f80u : 0u) | (j + 1 < k ? 0x3f800000u : 0u); };
        float before[4] = {};
#pragma unroll
        for (int term = TERMS - 1; term >= 0; term--) multiply_add(before, terms[term], ones(j), ones(j + 8));
#pragma unroll
        for (int w = 0; w < 2; w++) {
            const int k = 8 * n + j + w;
            float sum = (on_diagonal && i < k ? 0.0f : before[w]) + (on_diagonal && i + 8 < k ? 0.0f : before[2 + w]);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
            if (lane < 4) columns[k] = sum;
        }
    }
}

template <typename T, bool GATED> __device__ __forceinline__ void gradients(const Ssd& args) {
    // Without a gate, gradients of y are an input as it is.
    constexpr int TI = Terms<T>::INPUT, TC = Terms<T>::COMPUTED, TG = GATED ? TC : TI;
    extern __shared__ __align__(16) unsigned char shared[];
    const int split = blockIdx.x % args.splits;
    const int group = blockIdx.x / args.splits % args.ngroups;
    const Piece piece = piece_of(args.pieces, blockIdx.x / args.splits / args.ngroups, args.chunks, args.seqlen);
    const Sequence of(args, piece);
    const int chunk = piece.piece, row = of.row;
    const int q = args.q, p = padded(args.headdim), n = padded(args.d_state);
    const int q_tiles = q / 16, p_tiles = p / 16, n_columns = (n + 31) / 32;
    const int first = of.first(args, chunk);
    const int tokens = of.tokens(args, chunk);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Pieces of_n(n), of_p(p);

    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<TI> c(room, q, n), b(room, q, n), x(room, q, p);
    const Matrix<TG> g(room, q, p);
    const Matrix<TC> state(room, p, n), grad_state(room, p, n), scores(room, q, q);
    float* numbers = reinterpret_cast<float*>(room);
    const Steps steps(numbers, q);
    float* const of_columns = numbers;               // (q_tiles, q): by tile of rows, as `add_across` leaves them
    float* const of_rows = of_columns + q_tiles * q; // (q_tiles, q): by tile of columns
    float* const of_start = of_rows + q_tiles * q;   // (n_columns, q): from_start_i C_i S g_i
    float* const of_end = of_start + n_columns * q;  // (n_columns, q): to_end_j dt_j B_j R x_j
    float* const of_step = of_end + n_columns * q;   // (p_tiles, q): x_j · e_j
    float* const of_total = of_step + p_tiles * q;   // (WARPS): ⟨R, S⟩
    float* const across = of_total + WARPS;          // (q): Σ_{j<k≤i} T_ij
    float* const of_skip = across + q;               // (q_tiles, p): g_i x_i, summed over 16 tokens

    // What a head is worked out from, on its way; first what is needed first.
    const auto load_head = [&](int head) {
        load_rows(x, of_p, row_of<T>(args.x, args.x_stride, row, first, head), args.x_stride[1], tokens, args.headdim, q, p,
             args.aligned);
        const int64_t out_row = (int64_t(row) * args.seqlen + first) * args.nheads + head;
        if (!args.grad_y) {
            for (int i = threadIdx.x; i < q * p; i += THREADS) g.set(i / p, i % p, 0.0f);
            if (GATED) {
                for (int i = threadIdx.x; i < tokens * args.headdim; i += THREADS) {
                    const int64_t at = (out_row + int64_t(i / args.headdim) * args.nheads) * args.headdim;
                    static_cast<T*>(args.grad_z)[at + i % args.headdim] = from_float<T>(0.0f);
                }
            }
        } else if constexpr (GATED) {
            of_p.each(q, p, [&](int token, int column) {
                float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
                if (token < tokens) {
                    float gates[8];
                    load_piece(v, row_of<T>(args.grad_y, args.grad_y_stride, row, first + token, head), column,
                               args.headdim, args.aligned);
                    load_piece(gates, row_of<T>(args.z, args.z_stride, row, first + token, head), column, args.headdim,
                               args.aligned);
                    const int64_t at = (out_row + int64_t(token) * args.nheads) * args.headdim + column;
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        if (column + k >= args.headdim) break;
                        const float gate = gates[k], s = sigmoid(gate);
                        const float of_gate = v[k] * args.y_ungated[at + k] * s * fmaf(gate, 1.0f - s, 1.0f);
                        static_cast<T*>(args.grad_z)[at + k] = from_float<T>(of_gate);
                        v[k] *= gate * s;
                    }
                }
                g.set8(token, column, v);
            });
        } else {
            load_rows(g, of_p, row_of<T>(args.grad_y, args.grad_y_stride, row, first, head), args.grad_y_stride[1], tokens,
                      args.headdim, q, p, args.aligned);
        }
        mark_loads();
        load_state(state, of_n, args.states + of.state(args, chunk, head, TC), p, n);
        load_state(grad_state, of_n, args.grad_states + of.state(args, chunk, head, TC), p, n);
        mark_loads();
    };

    const int per_group = args.nheads / args.ngroups, per_split = (per_group + args.splits - 1) / args.splits;
    const int first_head = group * per_group + split * per_split;
    const int last_head = group * per_group + min(per_group, (split + 1) * per_split);
    load_rows(c, of_n, row_of<T>(args.c, args.c_stride, row, first, group), args.c_stride[1], tokens, args.d_state, q, n,
         args.aligned);
    load_rows(b, of_n, row_of<T>(args.b, args.b_stride, row, first, group), args.b_stride[1], tokens, args.d_state, q, n,
         args.aligned);
    if (first_head < last_head) {
        load_head(first_head);
        steps.load(of.steps(args, first_head, chunk), q);
    }
    for (int i = threadIdx.x; i < q * q; i += THREADS) scores.set(i / q, i % q, 0.0f);

    // This warp's tile of the scores, if it has one, and of the gradients of b and c: q · n is at most 8192.
    const int row0 = warp / q_tiles * 16, column0 = warp % q_tiles * 16;
    const bool has_scores = warp < q_tiles * q_tiles && column0 <= row0;
    const int n_row0 = warp / n_columns * 16, n_column0 = warp % n_columns * 32;
    const bool has_coefficients = warp < q_tiles * n_columns;
    Tile<2> plain_scores, grad_scores;
    Tile<4> grad_b, grad_c;
    plain_scores.clear(), grad_scores.clear(), grad_b.clear(), grad_c.clear();

#pragma unroll 1
    for (int head = first_head; head < last_head; head++) {
        const Step* const head_steps = of.steps(args, head, chunk);
        const int64_t out_row = (int64_t(row) * args.seqlen + first) * args.nheads + head;
        const bool more = head + 1 < last_head;
        loads_before_mark_arrive();
        __syncthreads();

        Steps::Next next_steps;
        if (more) next_steps = Steps::fetch(of.steps(args, head + 1, chunk), q);
        if (has_scores) {
            if (head == first_head) {
                multiply<AS_STORED, TRANSPOSED>(plain_scores, c, row0, b, column0, q, 0, n);
            }
            Tile<2> products, t;  // g_i · x_j
            products.clear();
            multiply<AS_STORED, TRANSPOSED>(products, g, row0, x, column0, q, 0, p);
            each_decay<2>(steps, row0, column0, q, [&](int i, int j, int k, int half, float first, float second) {
                const float2 dt = *reinterpret_cast<const float2*>(steps.dt + j);
                const float m0 = first * plain_scores.v[k][2 * half], m1 = second * plain_scores.v[k][2 * half + 1];
                const float v0 = dt.x * products.v[k][2 * half], v1 = dt.y * products.v[k][2 * half + 1];
                scores.set2(i, j, m0, m1);
                t.v[k][2 * half] = m0 * v0, t.v[k][2 * half + 1] = m1 * v1;
                grad_scores.v[k][2 * half] = fmaf(first, v0, grad_scores.v[k][2 * half]);
                grad_scores.v[k][2 * half + 1] = fmaf(second, v1, grad_scores.v[k][2 * half + 1]);
            });
            add_across<TC>(t, row0 == column0, of_columns + row0 / 16 * q + column0, of_rows + column0 / 16 * q + row0);
        }
        loads_arrive();
        __syncthreads();

        if (has_coefficients) {
            Tile<4> tile;
            float sums[2] = {0.0f, 0.0f};
            // The two differ in what they take and where they go.
            const auto add = [&](Tile<4>& total, const Matrix<TI>& coefficients, float first, float second) {
                tile.scale_rows(first, second);
                sums[0] = sums[1] = 0.0f;
                tile.each([&](int m, int half, int row, int column, float v0, float v1) {
                    if (n_column0 + column >= n) return;
                    const float2 of = coefficients.at2(n_row0 + row, n_column0 + column);
                    sums[half] = fmaf(of.x, v0, fmaf(of.y, v1, sums[half]));
                    total.v[m][2 * half] += v0, total.v[m][2 * half + 1] += v1;
                });
                sums[0] = over_row(sums[0]), sums[1] = over_row(sums[1]);
            };
            const int i[2] = {n_row0 + tile.row(0), n_row0 + tile.row(1)};
            const int place = n_column0 / 32 * q;
            tile.clear();
            multiply<AS_STORED, AS_STORED>(tile, g, n_row0, state, n_column0, n, 0, p);
            add(grad_c, c, steps.from_start(i[0]), steps.from_start(i[1]));
            if (lane % 4 == 0) of_start[place + i[0]] = sums[0], of_start[place + i[1]] = sums[1];
            tile.clear();
            multiply<AS_STORED, AS_STORED>(tile, x, n_row0, grad_state, n_column0, n, 0, p);
            add(grad_b, b, steps.to_end[i[0]] * steps.dt[i[0]], steps.to_end[i[1]] * steps.dt[i[1]]);
            if (lane % 4 == 0) of_end[place + i[0]] = sums[0], of_end[place + i[1]] = sums[1];
        }
        for (int i = warp; i < q_tiles * p_tiles; i += WARPS) {
            const int row0 = i / p_tiles * 16, column0 = i % p_tiles * 16;
            Tile<2> tile;
            tile.clear();
            multiply<AS_STORED, TRANSPOSED>(tile, b, row0, grad_state, column0, p, 0, n);
            tile.scale_rows(steps.to_end[row0 + tile.row(0)], steps.to_end[row0 + tile.row(1)]);
            multiply<TRANSPOSED, AS_STORED>(tile, scores, row0, g, column0, p, row0, q);
            float sums[2] = {0.0f, 0.0f}, skips[2][2] = {};
            const bool pairs = args.headdim % 2 == 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int j = row0 + tile.row(half);
                const float dt = steps.dt[j];
                T* const out = static_cast<T*>(args.grad_x) + (out_row + int64_t(j) * args.nheads) * args.headdim;
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int column = column0 + 8 * k + tile.column();
                    const float e0 = tile.v[k][2 * half], e1 = tile.v[k][2 * half + 1];
                    const float2 xs = x.at2(j, column), gs = g.at2(j, column);
                    sums[half] = fmaf(xs.x, e0, fmaf(xs.y, e1, sums[half]));
                    skips[k][0] = fmaf(xs.x, gs.x, skips[k][0]), skips[k][1] = fmaf(xs.y, gs.y, skips[k][1]);
                    if (j >= tokens || column >= args.headdim) continue;
                    const bool both = column + 1 < args.headdim;
                    float x0 = dt * e0, x1 = dt * e1;
                    if (args.d) {
                        const float* d = args.d + (args.d_per_channel ? int64_t(head) * args.headdim + column : head);
                        x0 = fmaf(d[0], gs.x, x0);
                        if (both) x1 = fmaf(d[args.d_per_channel], gs.y, x1);
                    }
                    Pack<T, 2> pack;
                    pack.values[0] = from_float<T>(x0), pack.values[1] = from_float<T>(x1);
                    if (pairs) {
                        *reinterpret_cast<Pack<T, 2>*>(out + column) = pack;
                    } else {
                        out[column] = pack.values[0];
                        if (both) out[column + 1] = pack.values[1];
                    }
                }
            }
            if (args.d) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
#pragma unroll
                    for (int w = 0; w < 2; w++) {
                        float sum = skips[k][w];
#pragma unroll
                        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
                        if (lane < 4) of_skip[row0 / 16 * p + column0 + 8 * k + tile.column() + w] = sum;
                    }
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = over_row(sums[half]);
                if (lane % 4 == 0) of_step[i % p_tiles * q + row0 + tile.row(half)] = sum;
            }
        }
        {
            float sum = 0.0f;
            of_n.each(p, n, [&](int row, int column) {
                float before[8], after[8];
                state.at8(row, column, before), grad_state.at8(row, column, after);
#pragma unroll
                for (int k = 0; k < 8; k++) sum = fmaf(before[k], after[k], sum);
            });
            sum = over_warp(sum);
            if (lane == 0) of_total[warp] = sum;
        }
        // Four neighbouring lanes add up what tiles left for one token.
        if (threadIdx.x < 4 * q) {
            const int k = threadIdx.x / 4, own = k / 16;
            float sum = 0.0f;
            for (int tile = own + threadIdx.x % 4; tile < q_tiles; tile += 4) sum += of_columns[tile * q + k];
            for (int tile = 0; tile < own; tile++) {
                for (int i = k + threadIdx.x % 4; i < q; i += 4) sum += of_rows[tile * q + i];
            }
            const unsigned lanes = __activemask();
            sum += __shfl_xor_sync(lanes, sum, 1);
            sum += __shfl_xor_sync(lanes, sum, 2);
            if (threadIdx.x % 4 == 0) across[k] = sum;
        }
        __syncthreads();

        if (more) load_head(head + 1);
        const int64_t chunk_row = int64_t(of.chunks_before + chunk) * args.nheads + head;
        if (args.d) {
            for (int column = int(threadIdx.x) - 32; column < args.headdim; column += THREADS - 32) {
                if (column < 0) break;  // of the warp below
                float sum = 0.0f;
                for (int i = 0; i < q_tiles; i++) sum += of_skip[i * p + column];
                args.grad_d_rows[chunk_row * args.headdim + column] = sum;
            }
        }
        // One warp finishes the gradients of steps; each lane has neighbouring tokens.
        if (warp == 0) {
            const int each = (q + 31) / 32, begin = lane * each;
            float starts[2] = {0.0f, 0.0f}, ends[2] = {0.0f, 0.0f}, start_sum = 0.0f, end_sum = 0.0f;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (k >= each || begin + k >= q) break;
                for (int m = 0; m < n_columns; m++) {
                    starts[k] += of_start[m * q + begin + k], ends[k] += of_end[m * q + begin + k];
                }
                start_sum += starts[k], end_sum += ends[k];
            }
            float after = start_sum, before = end_sum;  // of this lane and those after it; before it
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const float above = __shfl_down_sync(0xffffffffu, after, lanes);
                const float below = __shfl_up_sync(0xffffffffu, before, lanes);
                if (lane + lanes < 32) after += above;
                if (lane >= lanes) before += below;
            }
            const float next = __shfl_down_sync(0xffffffffu, after, 1), previous = __shfl_up_sync(0xffffffffu, before, 1);
            after = lane < 31 ? next : 0.0f, before = lane > 0 ? previous : 0.0f;  // without this lane
            const float afters[2] = {after + starts[1] + starts[0], after + starts[1]};
            const float befores[2] = {before, before + ends[0]};
            const float total = over_warp(lane < WARPS ? of_total[lane] : 0.0f) * steps.from_start(q - 1);
            const float a = args.a[head];
            float of_a = 0.0f, of_bias = 0.0f;
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const int i = begin + k;
                if (k >= each || i >= tokens) break;
                const float of_decay = across[i] + afters[k] + befores[k] + total;
                float of_dt = a * of_decay;
                for (int m = 0; m < p_tiles; m++) of_dt += of_step[m * q + i];
                of_a = fmaf(steps.dt[i], of_decay, of_a);
                of_dt *= head_steps[i].slope;
                of_bias += of_dt;
                static_cast<T*>(args.grad_dt)[out_row + int64_t(i) * args.nheads] = from_float<T>(of_dt);
            }
            of_a = over_warp(of_a), of_bias = over_warp(of_bias);
            if (lane == 0) args.grad_a_rows[chunk_row] = of_a, args.grad_dt_bias_rows[chunk_row] = of_bias;
        }
        __syncthreads();
        if (more) steps.put(next_steps, q);
    }

    // What the scores, summed over heads, give to b and c.
    if (has_scores) {
        grad_scores.each([&](int, int, int i, int j, float v0, float v1) { scores.set2(row0 + i, column0 + j, v0, v1); });
    }
    loads_arrive();  // those of a block without a head
    __syncthreads();
    if (!has_coefficients) return;
    multiply<AS_STORED, AS_STORED>(grad_c, scores, n_row0, b, n_column0, n, 0, n_row0 + 16);
    multiply<TRANSPOSED, AS_STORED>(grad_b, scores, n_row0, c, n_column0, n, n_row0, q);
    const auto store = [&](Tile<4>& tile, float* out) {
        tile.each([&](int, int, int token, int column, float v0, float v1) {
            token += n_row0, column += n_column0;
            if (token >= tokens) return;
            const int64_t at = (int64_t(split) * args.batch + row) * args.seqlen + first + token;
            float* const to = out + (at * args.ngroups + group) * args.d_state + column;
            if (column < args.d_state) to[0] = v0;
            if (column + 1 < args.d_state) to[1] = v1;
        });
    };
    store(grad_c, args.grad_c_rows);
    store(grad_b, args.grad_b_rows);
}

// Two matrices of f32 rows, summed over the rows in their order.
struct SsdSum {
    const float* rows[2];
    void* out[2];
    int64_t columns, count;
};
static_assert(sizeof(SsdSum) == 48, "as in cuda.rs");

template <typename T> __device__ __forceinline__ void sum(const SsdSum& p) {
    const int64_t column = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (column >= p.columns) return;
    const float* from = p.rows[blockIdx.y] + column;
    float sum = 0.0f;
    for (int64_t i = 0; i < p.count; i++) sum += from[i * p.columns];
    static_cast<T*>(p.out[blockIdx.y])[column] = from_float<T>(sum);
}

}  // namespace

#define GRADIENTS(symbol, T, GATED, USUAL)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) symbol(const __grid_constant__ Ssd p) {       \
        gradients<T, GATED>(known<USUAL>(p));                                                              \
    }
#define INSTANTIATE(T, DTYPE)                                                                              \
    GRADIENTS(ssd_gradients_##DTYPE, T, false, false)                                                      \
    GRADIENTS(ssd_gradients_gated_##DTYPE, T, true, false)                                                 \
    extern "C" __global__ void ssd_sum_##DTYPE(const __grid_constant__ SsdSum p) { sum<T>(p); }

#define INSTANTIATE_USUAL(T, DTYPE) GRADIENTS(ssd_gradients_usual_##DTYPE, T, false, true)

FOR_EACH_DTYPE(INSTANTIATE)
FOR_EACH_16_BIT(INSTANTIATE_USUAL)
