// Products of small matrices in shared memory on tensor cores, to f32.
//
// An operand is a sum of bf16 matrices, its terms: bf16 is one term, f16 two, f32 three, all exact. What is computed is
// split into two terms beside 16-bit inputs, which keeps 16 bits, and into three beside f32, which keeps 24. A product
// sums the products of terms that matter, in f32.
//
// Where terms are f16, an f16 input is one, and two keep 22 bits of what is computed; but f16 has a narrow range, so what is
// computed is scaled by a power of two that brings the largest of it to 2^13.
#pragma once

#include <type_traits>

#include "scalar.cuh"

// Terms of inputs and of computed operands, by storage type.
template <typename T> struct Terms;
template <> struct Terms<bf16> { static constexpr int INPUT = 1, COMPUTED = 2; };
template <> struct Terms<f16> { static constexpr int INPUT = 2, COMPUTED = 2; };
template <> struct Terms<float> { static constexpr int INPUT = 3, COMPUTED = 3; };

// The same with scales: terms of f16 beside f16.
template <typename T> struct ScaledTerms : Terms<T> { using Term = bf16; };
template <> struct ScaledTerms<f16> {
    using Term = f16;
    static constexpr int INPUT = 1, COMPUTED = 2;
};

// A power of two and its inverse, such that |x| · factor is in [2^13, 2^14) for x = `largest`; where `largest` is far from all
// numbers that matter, less.
struct Scale {
    float factor, inverse;

    __device__ explicit Scale(float largest) {
        const int exponent = min(max(__float_as_int(largest) >> 23, 100), 220);
        factor = __int_as_float((2 * 127 + 13 - exponent) << 23), inverse = __int_as_float((exponent - 13) << 23);
    }
    __device__ static Scale none() { return Scale(1.0f, 1.0f); }

  private:
    __device__ Scale(float factor, float inverse) : factor(factor), inverse(inverse) {}
};

// The largest of non-negative numbers over a warp.
__device__ __forceinline__ float warp_max(float x) {
    return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(x)));
}

__device__ __forceinline__ __nv_bfloat162 pair_of(bf16, float x, float y) { return __floats2bfloat162_rn(x, y); }
__device__ __forceinline__ __half2 pair_of(f16, float x, float y) { return __floats2half2_rn(x, y); }
__device__ __forceinline__ float2 floats_of(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 floats_of(__half2 x) { return __half22float2(x); }

// Rows of 16-byte pieces, of which one more than needed: eight neighbouring rows then lie in different banks.
__host__ __device__ constexpr int padded_row(int columns) { return columns + 8; }

// A matrix of TERMS terms in shared memory; rows and columns are multiples of 16, padded with zeros.
template <int TERMS, typename Term = bf16> struct Matrix {
    using Pair = decltype(pair_of(Term(), 0.0f, 0.0f));
    Term* start;
    int row, term;  // strides

    __device__ Matrix(bf16*& room, int rows, int columns) : Matrix(room, rows, columns, 0) { room += TERMS * term; }
    __device__ Matrix(bf16* start, int rows, int columns, int)
        : start(reinterpret_cast<Term*>(start)), row(padded_row(columns)), term(rows * padded_row(columns)) {}

    __device__ __forceinline__ Matrix rows_from(int i) const {
        Matrix rest = *this;
        rest.start += i * row;
        return rest;
    }
    __device__ __forceinline__ void set(int i, int j, float x) const {
#pragma unroll
        for (int k = 0; k < TERMS; k++) {
            const Term part = from_float<Term>(x);
            start[k * term + i * row + j] = part;
            x -= to_float(part);
        }
    }
    // Two neighbouring columns, the first of them even.
    __device__ __forceinline__ void set2(int i, int j, float x, float y) const {
#pragma unroll
        for (int k = 0; k < TERMS; k++) {
            const Pair part = pair_of(Term(), x, y);
            *reinterpret_cast<Pair*>(start + k * term + i * row + j) = part;
            const float2 kept = floats_of(part);
            x -= kept.x, y -= kept.y;
        }
    }
    __device__ __forceinline__ float2 at2(int i, int j) const {
        float2 sum = {0.0f, 0.0f};
#pragma unroll
        for (int k = TERMS - 1; k >= 0; k--) {
            const float2 part = floats_of(*reinterpret_cast<const Pair*>(start + k * term + i * row + j));
            sum.x += part.x, sum.y += part.y;
        }
        return sum;
    }
    // Eight columns from j on, a multiple of 8.
    __device__ __forceinline__ void at8(int i, int j, float (&x)[8]) const {
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = 0.0f;
#pragma unroll
        for (int k = TERMS - 1; k >= 0; k--) {
            const auto part = *reinterpret_cast<const Pack<Term, 8>*>(start + k * term + i * row + j);
#pragma unroll
            for (int c = 0; c < 8; c++) x[c] += to_float(part.values[c]);
        }
    }
    // Eight columns from j on, a multiple of 8; leaves what is not represented.
    __device__ __forceinline__ void set8(int i, int j, float (&x)[8]) const {
#pragma unroll
        for (int k = 0; k < TERMS; k++) {
            union { uint32_t words[4]; int4 all; } part;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const Pair pair = pair_of(Term(), x[2 * c], x[2 * c + 1]);
                const float2 kept = floats_of(pair);
                x[2 * c] -= kept.x, x[2 * c + 1] -= kept.y;
                part.words[c] = *reinterpret_cast<const uint32_t*>(&pair);
            }
            *reinterpret_cast<int4*>(start + k * term + i * row + j) = part.all;
        }
    }
};

__device__ __forceinline__ uint32_t shared_address(const void* x) { return __cvta_generic_to_shared(x); }

template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* from) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
    }
}

template <typename Term = bf16>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<Term, bf16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Sixteen rows and 8 · N columns of a product, as tensor cores leave them with a warp: element [n][2 h + w] is in row
// `row(h)`, column `8 n + column() + w`.
template <int N> struct Tile {
    float v[N][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < N; n++) v[n][0] = v[n][1] = v[n][2] = v[n][3] = 0.0f;
    }
    __device__ static __forceinline__ int row(int half) { return threadIdx.x % 32 / 4 + 8 * half; }
    __device__ static __forceinline__ int column() { return threadIdx.x % 4 * 2; }

    // f(n, half, row, column, x, y) for each pair of neighbouring columns.
    template <typename F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                f(n, half, row(half), 8 * n + column(), v[n][2 * half], v[n][2 * half + 1]);
            }
        }
    }
    __device__ __forceinline__ void scale(float by) { scale_rows(by, by); }
    __device__ __forceinline__ void scale_rows(float first, float second) {
#pragma unroll
        for (int n = 0; n < N; n++) v[n][0] *= first, v[n][1] *= first, v[n][2] *= second, v[n][3] *= second;
    }
};

// Words of four 8-column parts of a row, each lane of four with its own two columns of each, become the words of one part: lane i
// gets all eight columns of part i.
__device__ __forceinline__ uint4 gather_part(const uint32_t (&words)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const uint32_t own0 = upper ? words[2] : words[0], own1 = upper ? words[3] : words[1];
    const uint32_t other0 = __shfl_xor_sync(0xffffffffu, upper ? words[0] : words[2], 2);
    const uint32_t other1 = __shfl_xor_sync(0xffffffffu, upper ? words[1] : words[3], 2);
    const uint32_t own = odd ? own1 : own0, other = odd ? other1 : other0;
    const uint32_t next_own = __shfl_xor_sync(0xffffffffu, odd ? own0 : own1, 1);
    const uint32_t next_other = __shfl_xor_sync(0xffffffffu, odd ? other0 : other1, 1);
    const uint2 here = odd ? make_uint2(next_own, own) : make_uint2(own, next_own);
    const uint2 there = odd ? make_uint2(next_other, other) : make_uint2(other, next_other);
    return upper ? make_uint4(there.x, there.y, here.x, here.y) : make_uint4(here.x, here.y, there.x, there.y);
}

enum Order { AS_STORED, TRANSPOSED };

// tiles[r] += A[m + r · rows.., k_begin..k_end] · B[.., n..]: A is stored (m, k), or (k, m) if transposed; B is stored (k, n), or (n, k)
// if transposed, and read once for all tiles. Columns from `columns` on are left alone.
template <Order A_ORDER, Order B_ORDER, int TA, int TB, typename Term, int N, int R>
__device__ __forceinline__ void multiply(Tile<N> (&tiles)[R], const Matrix<TA, Term>& a, int m, int rows, const Matrix<TB, Term>& b,
                                         int n, int columns, int k_begin, int k_end) {
    static_assert(N % 2 == 0, "B comes in pairs of 8 columns");
    constexpr int TERMS = TA > TB ? TA : TB;
    const int lane = threadIdx.x % 32;
    const int low = lane % 16, high = lane / 16 * 8;         // 8x8 matrices down, then right
    const int right = lane / 8 % 2 * 8, down = lane % 8 + high;  // right, then down
    const Term* a_at = A_ORDER == AS_STORED ? a.start + (m + low) * a.row + high : a.start + down * a.row + m + right;
    const Term* b_at = B_ORDER == AS_STORED ? b.start + low * b.row + n + high : b.start + (n + down) * b.row + right;
    const int a_step = A_ORDER == AS_STORED ? 1 : a.row, b_step = B_ORDER == AS_STORED ? b.row : 1;
    const int a_next = A_ORDER == AS_STORED ? rows * a.row : rows;
    const int b_pair = B_ORDER == AS_STORED ? 16 : 16 * b.row;
    const auto step = [&](int k, auto whole) {
        uint32_t as[R][TA][4];
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < TA; i++)
                load_matrices<A_ORDER == TRANSPOSED>(as[r][i], a_at + r * a_next + i * a.term + k * a_step);
        }
#pragma unroll
        for (int pair = 0; pair < N / 2; pair++) {
            if (!whole() && n + 16 * pair >= columns) break;
            uint32_t bs[TB][4];
#pragma unroll
            for (int i = 0; i < TB; i++) {
                load_matrices<B_ORDER == AS_STORED>(bs[i], b_at + i * b.term + k * b_step + pair * b_pair);
            }
#pragma unroll
            for (int i = TA - 1; i >= 0; i--) {
#pragma unroll
                for (int j = TB - 1; j >= 0; j--) {
                    if (i + j >= TERMS) continue;
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        multiply_add<Term>(tiles[r].v[2 * pair], as[r][i], bs[j][0], bs[j][1]);
                        multiply_add<Term>(tiles[r].v[2 * pair + 1], as[r][i], bs[j][2], bs[j][3]);
                    }
                }
            }
        }
    };
    if (n + 8 * N <= columns) {  // without branches, so that loads run ahead
#pragma unroll 4
        for (int k = k_begin; k < k_end; k += 16) step(k, std::true_type());
    } else {
#pragma unroll 1
        for (int k = k_begin; k < k_end; k += 16) step(k, std::false_type());
    }
}

// The same of one tile.
template <Order A_ORDER, Order B_ORDER, int TA, int TB, typename Term, int N>
__device__ __forceinline__ void multiply(Tile<N>& tile, const Matrix<TA, Term>& a, int m, const Matrix<TB, Term>& b, int n,
                                         int columns, int k_begin, int k_end) {
    multiply<A_ORDER, B_ORDER>(reinterpret_cast<Tile<N>(&)[1]>(tile), a, m, 0, b, n, columns, k_begin, k_end);
}
