// attention forward: y_i = Σ_j softmax_j(scale · q_i · k_j) v_j over the keys that a query sees, on tensor cores, for 16-bit inputs.
//
// A block has QUERIES queries of a head, a warp 16 of them, and goes through the keys that any of them sees, KEYS at a time: scores in
// registers, the softmax as it comes (the sum and the result so far are scaled when the largest score grows), in f32. What the
// softmax gives goes into the second product as two 16-bit terms. The next keys are on their way while values are multiplied, the
// next values while scores are.
#include "product.cuh"

struct Attention {
    const void *q, *k, *v;  // contiguous: (b, seqlen, h, d), (b, kv_len, h_kv, d) twice
    void* y;                // as q
    int32_t seqlen, nheads, headdim, nheads_kv, kv_len;
    int32_t causal, window;  // keys that a query sees, up to its own
    float scale;             // times log2 e
};
static_assert(sizeof(Attention) == 64, "as in cuda.rs");

namespace {

constexpr int QUERIES = 64, KEYS = 64, THREADS = 128, PER_KEY = 16;

// Rows [0, rows) of (…, headdim), `stride` elements apart, as a matrix of WIDTH columns; zeros elsewhere.
template <int WIDTH, typename T>
__device__ __forceinline__ void fetch(const Matrix<1, T>& to, const T* from, int64_t stride, int rows, int headdim) {
    constexpr int PIECES = WIDTH / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        const int row = i / PIECES, column = i % PIECES * 8;
        const bool exists = row < rows && column < headdim;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.start + row * to.row + column)),
                     "l"(exists ? from + row * stride + column : from), "r"(exists ? 16 : 0) : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// All that was fetched, but for what was fetched last.
__device__ __forceinline__ void all_but_last_arrive() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
}

template <typename T, int WIDTH> __device__ __forceinline__ void attend(const Attention& args) {
    extern __shared__ __align__(16) unsigned char shared[];
    bf16* room = reinterpret_cast<bf16*>(shared);
    const Matrix<1, T> q(room, QUERIES, WIDTH), k(room, KEYS, WIDTH), v(room, KEYS, WIDTH);
    const int head = blockIdx.x % args.nheads, tiles = (args.seqlen + QUERIES - 1) / QUERIES;
    // The last queries see the most.
    const int first = (tiles - 1 - blockIdx.x / args.nheads % tiles) * QUERIES;
    const int64_t batch = blockIdx.x / args.nheads / tiles;
    const int headdim = args.headdim, columns = (headdim + 15) / 16 * 16;
    const int64_t q_stride = int64_t(args.nheads) * headdim, kv_stride = int64_t(args.nheads_kv) * headdim;
    const int64_t at = (batch * args.seqlen + first) * q_stride + int64_t(head) * headdim;
    const int64_t kv_at = batch * args.kv_len * kv_stride + int64_t(head / (args.nheads / args.nheads_kv)) * headdim;
    const T* const keys = static_cast<const T*>(args.k) + kv_at;
    const T* const values = static_cast<const T*>(args.v) + kv_at;

    // The keys that a query sees, by its place in the block.
    const int queries = min(QUERIES, args.seqlen - first), position = args.kv_len - args.seqlen + first;
    const auto begin_of = [&](int i) { return max(0, position + i + 1 - args.window); };
    const auto end_of = [&](int i) { return args.causal ? min(position + i + 1, args.kv_len) : args.kv_len; };
    const int begin = begin_of(0) / KEYS * KEYS, end = end_of(queries - 1);
    const auto fetch_keys = [&](int j) { fetch<WIDTH>(k, keys + j * kv_stride, kv_stride, args.kv_len - j, headdim); };
    const auto fetch_values = [&](int j) { fetch<WIDTH>(v, values + j * kv_stride, kv_stride, args.kv_len - j, headdim); };
    const int row0 = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;

    Tile<WIDTH / 8> y;
    y.clear();
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    fetch<WIDTH>(q, static_cast<const T*>(args.q) + at, q_stride, queries, headdim);
    if (begin < end) fetch_keys(begin), fetch_values(begin);
    for (int j = begin; j < end; j += KEYS) {
        const bool more = j + KEYS < end;
        all_but_last_arrive();
        Tile<KEYS / 8> scores;
        scores.clear();
        multiply<AS_STORED, TRANSPOSED>(scores, q, row0, k, 0, KEYS, 0, columns);
        __syncthreads();
        if (more) fetch_keys(j + KEYS);

        const bool all_seen = j >= begin_of(queries - 1) && j + KEYS <= end_of(0);
        float peak[2] = {largest[0], largest[1]};
        scores.each([&](int, int half, int row, int column, float& a, float& b) {
            a *= args.scale, b *= args.scale;
            if (!all_seen) {
                const int from = begin_of(row0 + row), to = end_of(row0 + row), key = j + column;
                if (key < from || key >= to) a = -INFINITY;
                if (key + 1 < from || key + 1 >= to) b = -INFINITY;
            }
            peak[half] = fmaxf(peak[half], fmaxf(a, b));
        });
        float base[2];  // of the exponents: 0 while nothing has been seen
#pragma unroll
        for (int half = 0; half < 2; half++) {
            peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 1));
            peak[half] = fmaxf(peak[half], __shfl_xor_sync(0xffffffffu, peak[half], 2));
            base[half] = peak[half] == -INFINITY ? 0.0f : peak[half];
            const float before = fast_exp2(largest[half] - base[half]);
            largest[half] = peak[half], sum[half] *= before;
            peak[half] = before;
        }
        y.scale_rows(peak[0], peak[1]);
        scores.each([&](int, int half, int, int, float& a, float& b) {
            a = fast_exp2(a - base[half]), b = fast_exp2(b - base[half]);
            sum[half] += a + b;
        });

        // The values of these keys, with the next keys perhaps still on their way.
        if (more) {
            all_but_last_arrive();
        } else {
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncthreads();
        }
        const T* const b_at = v.start + lane % 16 * v.row + lane / 16 * 8;
#pragma unroll
        for (int key = 0; key < KEYS; key += PER_KEY) {
            uint32_t terms[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* const two = scores.v[key / 8 + i / 2] + i % 2 * 2;
                const auto upper = pair_of(T(), two[0], two[1]);
                const float2 kept = floats_of(upper);
                const auto lower = pair_of(T(), two[0] - kept.x, two[1] - kept.y);
                terms[0][i] = *reinterpret_cast<const uint32_t*>(&upper), terms[1][i] = *reinterpret_cast<const uint32_t*>(&lower);
            }
#pragma unroll
            for (int pair = 0; pair < WIDTH / 16; pair++) {
                if (16 * pair >= columns) break;
                uint32_t b[4];
                load_matrices<true>(b, b_at + key * v.row + 16 * pair);
#pragma unroll
                for (int term = 1; term >= 0; term--) {
                    multiply_add<T>(y.v[2 * pair], terms[term], b[0], b[1]);
                    multiply_add<T>(y.v[2 * pair + 1], terms[term], b[2], b[3]);
                }
            }
        }
        __syncthreads();
        if (more) fetch_values(j + KEYS);
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
        sum[half] = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];  // who sees no key gives 0
    }
    T* const out = static_cast<T*>(args.y) + at;
    y.each([&](int, int half, int row, int column, float a, float b) {
        if (row0 + row >= queries || column >= headdim) return;
        Pack<T, 2> two;
        two.values[0] = from_float<T>(a * sum[half]), two.values[1] = from_float<T>(b * sum[half]);
        *reinterpret_cast<Pack<T, 2>*>(out + (row0 + row) * q_stride + column) = two;
    });
}

}  // namespace

#define KERNEL(T, DTYPE, WIDTH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_fwd_##WIDTH##_##DTYPE(const __grid_constant__ Attention args) { \
        attend<T, WIDTH>(args);                                                                                               \
    }
#define INSTANTIATE(T, DTYPE) KERNEL(T, DTYPE, 32) KERNEL(T, DTYPE, 64) KERNEL(T, DTYPE, 128) KERNEL(T, DTYPE, 256)

FOR_EACH_16_BIT(INSTANTIATE)
