// What the kernels of ssd_chunk_scan share: arguments, steps and decays, tiles from memory. The derivation is in
// crates/mamba-ops/src/ssd/README.md.
//
// Sizes: q tokens of a chunk, n d_state, p headdim; each is padded to a multiple of 16 in shared memory. A sequence is a row of
// the batch, or one of those packed in it; its first chunk begins with its first token.
#pragma once

#include "packing.cuh"
#include "product.cuh"

// One step of one head: dt after bias, softplus and limits; log2 of the decay from before the chunk to after the token, as
// the sum of two f32; d dt / d input.
struct __align__(16) Step {
    float dt, high, low, slope;
};

struct Ssd {
    const void *x, *dt, *b, *c, *z, *grad_y;
    const float *a, *d, *dt_bias, *initial_state, *grad_state;
    void* y;           // contiguous, as x
    float* y_ungated;  // in place of y: before the gate, f32
    float* final_state;
    Step* steps;          // (chunks of all sequences, nheads, q)
    bf16* states;         // (chunks of all sequences, nheads, terms, p, n), padded: before each chunk
    bf16* grad_states;    // the same: gradients of those after each chunk
    void *grad_x, *grad_dt, *grad_z;  // contiguous
    float* grad_initial_state;
    float *grad_b_rows, *grad_c_rows;       // (splits, batch, seqlen, ngroups, d_state)
    float *grad_a_rows, *grad_dt_bias_rows;  // (chunks of all sequences, nheads)
    float* grad_d_rows;                      // (chunks of all sequences, nheads, headdim)
    const Piece *sequences, *pieces;  // packed, and their chunks; null if each row is a sequence
    // In elements: batch, token, head or group; neighbouring channels are neighbours in memory. dt: batch, token, head.
    int64_t x_stride[3], z_stride[3], grad_y_stride[3], b_stride[3], c_stride[3], dt_stride[3];
    int32_t batch, seqlen, nheads, headdim, ngroups, d_state;
    int32_t q, chunks;  // chunks of a row that is a sequence
    int32_t p_tile;  // channels of a head that a block owns, in the kernels that walk over chunks
    int32_t splits;  // blocks among which the heads of a group are divided, in the kernel of gradients
    int32_t d_per_channel, dt_softplus;
    float dt_low, dt_high;
    int32_t aligned;  // rows of x, b, c, z and grad_y begin at multiples of 16 bytes
    int32_t count;    // chunks of all sequences
};
static_assert(sizeof(Ssd) == 432, "as in cuda.rs");

namespace {

__device__ __forceinline__ int padded(int x) { return (x + 15) / 16 * 16; }

// The arguments, of which with USUAL the compiler knows what most models have: chunks of 64 tokens, 64 channels and 128 states
// of a head, rows that are aligned. What follows from these are then numbers in the code.
template <bool USUAL> __device__ __forceinline__ decltype(auto) known(const Ssd& args) {
    if constexpr (USUAL) {
        Ssd p = args;
        p.q = 64, p.headdim = p.p_tile = 64, p.d_state = 128, p.aligned = 1;
        return p;
    } else {
        return (args);
    }
}

// 2^(high + low): exponents are sums and differences of many, so they come in two parts.
__device__ __forceinline__ float decay(float high, float low) { return fast_exp2(high + low); }

// The decay over a chunk, and what it lacks to 1: a state that hardly decays is moved on by as many factors as there are chunks,
// whose roundings would add up.
struct ChunkDecay {
    float factor, less_one;

    __device__ explicit ChunkDecay(float2 exponent)
        : factor(decay(exponent.x, exponent.y)), less_one(expm1f(fmaf(LN_2, exponent.x, LN_2 * exponent.y))) {}
    // decay · x + y
    __device__ __forceinline__ float advance(float x, float y) const {
        return less_one > -0.5f ? x + fmaf(less_one, x, y) : fmaf(factor, x, y);
    }
};

// How the threads of a block spread over the pieces, of eight neighbouring columns, of matrices of one width: each row has a
// power of two of threads, so that no thread divides.
struct Pieces {
    int row, column, rows;  // of this thread; rows from one of its pieces to the next

    __device__ explicit Pieces(int padded_columns) {
        int log = 0;
        while (8 << log < padded_columns) log++;
        row = threadIdx.x >> log, column = (threadIdx.x & ((1 << log) - 1)) * 8, rows = blockDim.x >> log;
    }
    // f(row, column) for each piece of a matrix.
    template <typename F> __device__ __forceinline__ void each(int padded_rows, int padded_columns, F f) const {
        if (column >= padded_columns) return;
        for (int i = row; i < padded_rows; i += rows) f(i, column);
    }
};

// Eight neighbouring elements of a row, zeros where there are none.
template <typename T>
__device__ __forceinline__ void load_piece(float (&to)[8], const T* from, int column, int columns, bool aligned) {
    if (aligned && column + 8 <= columns) {
        const auto pack = *reinterpret_cast<const Pack<T, 8>*>(from + column);
#pragma unroll
        for (int k = 0; k < 8; k++) to[k] = to_float(pack.values[k]);
    } else {
#pragma unroll
        for (int k = 0; k < 8; k++) to[k] = column + k < columns ? to_float(from[column + k]) : 0.0f;
    }
}

// The same, on its way.
template <typename T>
__device__ __forceinline__ void fetch_piece(Raw<T, 8>& to, const T* from, int column, int columns, bool aligned) {
    if (aligned && column + 8 <= columns) {
        to.load(from + column);
    } else {
        to.clear();
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (column + k < columns) to.set(k, from[column + k]);
        }
    }
}

__device__ __forceinline__ void copy_piece(const void* to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 16 : 0) : "memory");
}

// Rows [0, rows) and columns [0, columns) of a matrix in memory, the rest zeros.
template <typename T, int TERMS, typename Term>
__device__ __forceinline__ void load_rows(const Matrix<TERMS, Term>& to, const Pieces& pieces, const T* from, int64_t stride,
                                          int rows, int columns, int padded_rows, int padded_columns, bool aligned) {
    if constexpr (TERMS == 1) {  // as it is
        if (aligned && columns % 8 == 0) {
            if (pieces.column >= padded_columns) return;
            const bool column_exists = pieces.column < columns;
            const T* at = from + (column_exists ? pieces.row * stride + pieces.column : 0);
            const Term* place = to.start + pieces.row * to.row + pieces.column;
            const int64_t at_step = column_exists ? pieces.rows * stride : 0;
#pragma unroll 4
            for (int row = pieces.row; row < padded_rows; row += pieces.rows) {
                const bool exists = column_exists && row < rows;
                copy_piece(place, exists ? at : from, exists);
                at += at_step, place += pieces.rows * to.row;
            }
            return;
        }
    }
    pieces.each(padded_rows, padded_columns, [&](int row, int column) {
        float values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (row < rows) load_piece(values, from + row * stride, column, columns, aligned);
        to.set8(row, column, values);
    });
}

// Before the barrier after which what `load_rows` brought is read.
__device__ __forceinline__ void loads_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same of all but the loads since the last mark.
__device__ __forceinline__ void mark_loads() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void loads_before_mark_arrive() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// The steps of a chunk of a head in shared memory, and the decays that follow from them. `Next` holds those of another chunk
// until there is room.
struct Steps {
    struct Next { Step own, last; };

    float2* exponent;  // high, low
    float *dt, *to_end;

    static constexpr int NUMBERS = 4;  // a token

    __device__ Steps(float*& room, int q)
        : exponent(reinterpret_cast<float2*>(room)), dt(room + 2 * q), to_end(room + 3 * q) {
        room += NUMBERS * q;
    }
    __device__ static __forceinline__ Next fetch(const Step* from, int q) {
        Next next;
        if (threadIdx.x < q) next.own = from[threadIdx.x], next.last = from[q - 1];
        return next;
    }
    __device__ __forceinline__ void put(const Next& next, int q) const {
        const int i = threadIdx.x;
        if (i >= q) return;
        exponent[i] = make_float2(next.own.high, next.own.low);
        dt[i] = next.own.dt;
        to_end[i] = decay(next.last.high - next.own.high, next.last.low - next.own.low);
    }
    __device__ __forceinline__ void load(const Step* from, int q) const { put(fetch(from, q), q); }
    __device__ __forceinline__ float from_start(int i) const { return decay(exponent[i].x, exponent[i].y); }
};

// From after token j to after token i.
__device__ __forceinline__ float between(float2 i, float high_j, float low_j) { return decay(i.x - high_j, i.y - low_j); }

// Scores with decays, of N · 8 columns: each(row, column, k, half, first and second decay of a pair of columns), 0 above the
// diagonal.
template <int N, typename F>
__device__ __forceinline__ void each_decay(const Steps& steps, int row0, int column0, int q, F f) {
    const int i[2] = {row0 + Tile<N>::row(0), row0 + Tile<N>::row(1)};
    const float2 at[2] = {steps.exponent[i[0]], steps.exponent[i[1]]};
#pragma unroll
    for (int k = 0; k < N; k++) {
        const int j = column0 + 8 * k + Tile<N>::column();
        if (j >= q) break;
        const float4 columns = *reinterpret_cast<const float4*>(steps.exponent + j);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float first = j <= i[half] ? between(at[half], columns.x, columns.y) : 0.0f;
            const float second = j < i[half] ? between(at[half], columns.z, columns.w) : 0.0f;
            f(i[half], j, k, half, first, second);
        }
    }
}

// A sequence, and which chunks are its own.
struct Sequence {
    int row, start, length, index;  // in the batch, its first token there, its tokens, its place among states
    int chunks, chunks_before;      // of the sequences before; packed, at most so many: the last of each may not be whole

    __device__ Sequence(const Ssd& p, const Piece& piece)
        : row(piece.row), start(piece.start), length(piece.length), index(piece.sequence) {
        chunks = p.sequences ? (length + p.q - 1) / p.q : p.chunks;
        chunks_before = p.sequences ? (int64_t(row) * p.seqlen + start) / p.q + index : row * chunks;
    }
    __device__ __forceinline__ int tokens(const Ssd& p, int chunk) const { return min(p.q, length - chunk * p.q); }
    // The first token of a chunk in the row.
    __device__ __forceinline__ int first(const Ssd& p, int chunk) const { return start + chunk * p.q; }
    // The steps of a chunk of a head.
    __device__ __forceinline__ Step* steps(const Ssd& p, int head, int chunk) const {
        return p.steps + (int64_t(chunks_before + chunk) * p.nheads + head) * p.q;
    }
    // Where a matrix of one chunk of one head is among kept states.
    __device__ __forceinline__ int64_t state(const Ssd& p, int chunk, int head, int terms) const {
        const int64_t size = int64_t(terms) * padded(p.headdim) * padded(p.d_state);
        return (int64_t(chunks_before + chunk) * p.nheads + head) * size;
    }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const void* x, const int64_t (&stride)[3], int row, int64_t token, int head) {
    return static_cast<const T*>(x) + row * stride[0] + token * stride[1] + head * stride[2];
}

}  // namespace
