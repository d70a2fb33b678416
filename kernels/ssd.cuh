// What the kernels of ssd_chunk_scan share: arguments, steps and decays, tiles from memory. The derivation is in
// crates/mamba-ops/src/ssd/README.md.
//
// Sizes: q tokens of a chunk, n d_state, p headdim; each is padded to a multiple of 16 in shared memory.
#pragma once

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
    Step* steps;          // (batch, nheads, chunks · q)
    bf16* states;         // (batch, chunks, nheads, terms, p, n), padded: before each chunk
    bf16* grad_states;    // the same: gradients of those after each chunk
    void *grad_x, *grad_dt, *grad_z;  // contiguous
    float* grad_initial_state;
    float *grad_b_rows, *grad_c_rows;       // (splits, batch, seqlen, ngroups, d_state)
    float *grad_a_rows, *grad_dt_bias_rows;  // (batch, chunks, nheads)
    float* grad_d_rows;                      // (batch, chunks, nheads, headdim)
    // In elements: batch, token, head or group; neighbouring channels are neighbours in memory. dt: batch, token, head.
    int64_t x_stride[3], z_stride[3], grad_y_stride[3], b_stride[3], c_stride[3], dt_stride[3];
    int32_t batch, seqlen, nheads, headdim, ngroups, d_state;
    int32_t q, chunks;
    int32_t p_tile;  // channels of a head that a block owns, in the kernels that walk over chunks
    int32_t splits;  // blocks among which the heads of a group are divided, in the kernel of gradients
    int32_t d_per_channel, dt_softplus;
    float dt_low, dt_high;
    int32_t aligned;  // rows of x, b, c, z and grad_y begin at multiples of 16 bytes
};

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

__device__ __forceinline__ int padded(int x) { return (x + 15) / 16 * 16; }

// 2^(high + low): exponents are sums and differences of many, so they come in two parts.
__device__ __forceinline__ float decay(float high, float low) { return exp2_unit(high + low); }

// f(row, column, values) for each piece of eight neighbouring columns of a padded matrix, zeros where nothing exists.
template <typename T, typename F>
__device__ __forceinline__ void each_piece(const T* from, int64_t stride, int rows, int columns, int padded_rows,
                                           int padded_columns, bool aligned, F f) {
    const int pieces = padded_columns / 8;
    for (int i = threadIdx.x; i < padded_rows * pieces; i += THREADS) {
        const int row = i / pieces, column = i % pieces * 8;
        float values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (row < rows && column < columns) {
            const T* at = from + row * stride + column;
            if (aligned && column + 8 <= columns) {
                union { int4 all[sizeof(T) / 2]; T each[8]; } piece;
#pragma unroll
                for (int k = 0; k < int(sizeof(T)) / 2; k++) piece.all[k] = reinterpret_cast<const int4*>(at)[k];
#pragma unroll
                for (int k = 0; k < 8; k++) values[k] = to_float(piece.each[k]);
            } else {
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    if (column + k < columns) values[k] = to_float(at[k]);
                }
            }
        }
        f(row, column, values);
    }
}

// Rows [0, rows) and columns [0, columns) of a matrix in memory, the rest zeros.
template <typename T, int TERMS>
__device__ __forceinline__ void load_rows(const Matrix<TERMS>& to, const T* from, int64_t stride, int rows, int columns,
                                     int padded_rows, int padded_columns, bool aligned) {
    if constexpr (TERMS == 1) {  // as it is
        if (aligned && columns % 8 == 0) {
            const int pieces = padded_columns / 8;
            for (int i = threadIdx.x; i < padded_rows * pieces; i += THREADS) {
                const int row = i / pieces, column = i % pieces * 8;
                const bool exists = row < rows && column < columns;
                const T* at = exists ? from + row * stride + column : from;
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 shared_address(to.start + row * to.row + column)),
                             "l"(at), "r"(exists ? 16 : 0) : "memory");
            }
            return;
        }
    }
    each_piece(from, stride, rows, columns, padded_rows, padded_columns, aligned,
               [&](int row, int column, float(&values)[8]) { to.set8(row, column, values); });
}

// Before the barrier after which what `load_rows` brought is read.
__device__ __forceinline__ void loads_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The steps of a chunk of a head in shared memory, and the decays that follow from them.
struct Steps {
    float *dt, *high, *low, *slope, *from_start, *to_end;

    __device__ Steps(float*& room, int q)
        : dt(room), high(room + q), low(room + 2 * q), slope(room + 3 * q), from_start(room + 4 * q),
          to_end(room + 5 * q) {
        room += 6 * q;
    }
    __device__ __forceinline__ void load(const Step* from, int q) const {
        const Step last = from[q - 1];
        for (int i = threadIdx.x; i < q; i += THREADS) {
            const Step step = from[i];
            dt[i] = step.dt, high[i] = step.high, low[i] = step.low, slope[i] = step.slope;
            from_start[i] = decay(step.high, step.low);
            to_end[i] = decay(last.high - step.high, last.low - step.low);
        }
    }
    // From after token j to after token i.
    __device__ __forceinline__ float between(int i, int j) const { return decay(high[i] - high[j], low[i] - low[j]); }
};

__device__ __forceinline__ const Step* steps_of(const Ssd& p, int batch, int head, int chunk) {
    return p.steps + (int64_t(batch) * p.nheads + head) * p.chunks * p.q + int64_t(chunk) * p.q;
}

// Where a matrix of one chunk of one head is among kept states.
__device__ __forceinline__ int64_t state_at(const Ssd& p, int batch, int chunk, int head, int terms) {
    const int64_t size = int64_t(terms) * padded(p.headdim) * padded(p.d_state);
    return ((int64_t(batch) * p.chunks + chunk) * p.nheads + head) * size;
}

template <typename T> __device__ __forceinline__ const T* offset(const void* x, int64_t by) {
    return static_cast<const T*>(x) + by;
}
template <typename T>
__device__ __forceinline__ const T* row_of(const void* x, const int64_t (&stride)[3], int batch, int64_t token, int head) {
    return static_cast<const T*>(x) + batch * stride[0] + token * stride[1] + head * stride[2];
}

}  // namespace
