// What hybrids have beside the state space blocks, for one token: attention over keys and values in blocks, gates, and the short
// convolution of LFM2. Sizes that change from token to token, positions and where blocks lie, are read from GPU memory, so that one
// graph serves all tokens.

#include "decoder.cuh"

// ---- Attention --------------------------------------------------------------------------------------------------------------

// Norms and turns queries and the new key, writes the new key and value behind the others, and attends.
struct Attention {
    const float* qkv;      // [q | k | v], rows `stride` apart
    Any y;                 // (rows, nheads·headdim), rows `y_stride` apart
    const int* positions;  // (rows): that of the new key
    // Rows `table_row` apart: the position of the first key, then where each of `most` blocks of keys lies, then each block of values. A
    // block is (BLOCK, nheads_kv, headdim).
    const int64_t* table;
    float* parts;          // (rows, groups, parts, HEADS, headdim + 2): of parts of the keys, what they sum up to, to be joined
    unsigned* done;        // (rows, groups): parts that are there; 0 between tokens
    const float *q_norm, *k_norm;  // (headdim), or absent
    const double* turns;   // (pairs): of 2π, from one position to the next
    int64_t stride, y_stride;
    int nheads, nheads_kv, headdim, most;
    int pairs, interleaved, window;  // no window: 0
    float scale, key_scale, eps, turned_by;
    int table_row;
};
static_assert(sizeof(Attention) == 144, "as in arguments.rs");

constexpr int BLOCK = 256;        // tokens of a block of keys
constexpr int ATTEND_WARPS = 4, ATTEND_THREADS = 32 * ATTEND_WARPS;
constexpr int LEAST_PART = 64;    // keys

// Turns pairs of channels of a head in shared memory by the angle of a position; all threads of a warp.
__device__ void turn(const Attention& p, float* head, int position) {
    for (int i = threadIdx.x % 32; i < p.pairs; i += 32) {
        // Whole turns are left out where they are exact; what is left is small.
        const double turns = position * p.turns[i];
        float sin, cos;
        sincospif(2.0f * static_cast<float>(turns - rint(turns)), &sin, &cos);
        sin *= p.turned_by, cos *= p.turned_by;
        const int at = p.interleaved ? 2 * i : i, other = p.interleaved ? at + 1 : at + p.pairs;
        const float a = head[at], b = head[other];
        head[at] = a * cos - b * sin;
        head[other] = b * cos + a * sin;
    }
    __syncwarp();
}

// A head of queries or keys, through its norm, its scale and its turn, to shared memory; all threads of a warp.
__device__ void prepare(const Attention& p, float* head, const float* from, const float* norm, float scale, int position) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int i = lane; i < p.headdim; i += 32) {
        const float x = from[i];
        head[i] = x;
        sum += x * x;
    }
    if (norm) scale *= rsqrtf(warp_sum(sum) / p.headdim + p.eps);
    for (int i = lane; i < p.headdim; i += 32) head[i] *= norm ? scale * norm[i] : scale;
    __syncwarp();
    turn(p, head, position);
}

// A block has HEADS heads of queries that share keys and values, and a part of the keys. Neighbouring lanes, as many as
// a head needs, share a key: each has CHUNKS packs of V channels of the head.
template <typename T, int V, int CHUNKS, int HEADS> __device__ void attend(const Attention& p) {
    constexpr int AT_ONCE = CHUNKS * HEADS >= 8 ? 2 : 4;  // keys of a lane that are on their way
    extern __shared__ float4 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, headdim = p.headdim;
    const int row = blockIdx.z, heads = p.nheads / p.nheads_kv, chunks = (heads + HEADS - 1) / HEADS;
    const int kv = blockIdx.y / chunks, head = kv * heads + blockIdx.y % chunks * HEADS;
    const int mine = min(HEADS, (kv + 1) * heads - head);
    let_next_begin();
    wait_for_previous();

    const int64_t* table = p.table + static_cast<int64_t>(row) * p.table_row;
    const int position = p.positions[row], last = position - static_cast<int>(table[0]);
    const int start = p.window ? max(0, last + 1 - p.window) : 0, count = last + 1 - start;
    const int share = (count + gridDim.x - 1) / gridDim.x, size = max(LEAST_PART, (share + 31) / 32 * 32);
    const int used = (count + size - 1) / size;  // parts
    if (blockIdx.x >= used) return;
    const int begin = start + blockIdx.x * size, end = min(begin + size, last + 1);
    const auto block = [&](int key, bool values) {
        T* from = reinterpret_cast<T*>(table[1 + (values ? p.most : 0) + key / BLOCK]);
        return from + (static_cast<int64_t>(key % BLOCK) * p.nheads_kv + kv) * headdim;
    };

    float* heads_there = reinterpret_cast<float*>(shared);  // (HEADS, headdim)
    const float* qkv = p.qkv + row * p.stride;
    for (int h = warp; h < mine; h += ATTEND_WARPS) {
        prepare(p, heads_there + h * headdim, qkv + (head + h) * headdim, p.q_norm, 1.0f, position);
    }
    if (end == last + 1) {  // the new key is in this part; where several blocks write it, they write the same
        float* key = heads_there + HEADS * headdim;
        if (warp == ATTEND_WARPS - 1) {
            prepare(p, key, qkv + (p.nheads + kv) * headdim, p.k_norm, 1.0f, position);
            for (int i = lane; i < headdim; i += 32) block(last, false)[i] = from_float<T>(p.key_scale * key[i]);
        }
        if (warp == ATTEND_WARPS - 2) {
            const float* value = qkv + (p.nheads + p.nheads_kv + kv) * headdim;
            for (int i = lane; i < headdim; i += 32) block(last, true)[i] = from_float<T>(value[i]);
        }
    }
    __syncthreads();

    int lanes = 1;  // of a key
    while (lanes * CHUNKS * V < headdim) lanes *= 2;
    const int groups = ATTEND_THREADS / lanes, group = threadIdx.x / lanes, within = threadIdx.x % lanes;
    const auto channel = [&](int c) { return (c * lanes + within) * V; };
    float q[HEADS][CHUNKS][V], sums[HEADS][CHUNKS][V] = {}, total[HEADS] = {}, most[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        most[h] = -INFINITY;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                const bool there = h < mine && channel(c) + v < headdim;
                q[h][c][v] = there ? heads_there[h * headdim + channel(c) + v] * (p.scale * LOG2_E) : 0.0f;
            }
        }
    }
    for (int base = begin; base < end; base += AT_ONCE * groups) {
        Pack<T, V> keys[AT_ONCE][CHUNKS], values[AT_ONCE][CHUNKS];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int key = min(base + u * groups + group, end - 1);
            const T *from = block(key, false), *value = block(key, true);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int at = channel(c) < headdim ? channel(c) : 0;  // there the query is 0, and the sum is not used
                keys[u][c] = *reinterpret_cast<const Pack<T, V>*>(from + at);
                values[u][c] = *reinterpret_cast<const Pack<T, V>*>(value + at);
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float scores[AT_ONCE], now = most[h];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                float score = 0.0f;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
                    for (int v = 0; v < V; v++) score = fmaf(q[h][c][v], to_float(keys[u][c].values[v]), score);
                }
                for (int offset = lanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(ALL_LANES, score, offset);
                scores[u] = score;
                if (base + u * groups + group < end) now = fmaxf(now, score);
            }
            const float kept = most[h] == now ? 1.0f : fast_exp2(most[h] - now);
            most[h] = now;
            total[h] *= kept;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
                for (int v = 0; v < V; v++) sums[h][c][v] *= kept;
            }
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                const float weight = base + u * groups + group < end ? fast_exp2(scores[u] - now) : 0.0f;
                total[h] += weight;
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
                    for (int v = 0; v < V; v++) sums[h][c][v] = fmaf(weight, to_float(values[u][c].values[v]), sums[h][c][v]);
                }
            }
        }
    }

    // What groups have found, then what parts have, is joined: sums, their total and the largest score.
    const int record = headdim + 2;
    const auto join = [&](const float* records, int count, int stride, int i, float& sum, float& total, float& largest) {
        largest = -INFINITY, sum = total = 0.0f;
        for (int g = 0; g < count; g++) largest = fmaxf(largest, records[g * stride + headdim + 1]);
        for (int g = 0; g < count; g++) {
            const float theirs = records[g * stride + headdim + 1];
            const float weight = theirs == -INFINITY ? 0.0f : fast_exp2(theirs - largest);  // NaN stays in what it is times
            sum = fmaf(weight, records[g * stride + i], sum);
            total = fmaf(weight, records[g * stride + headdim], total);
        }
    };
    float* records = heads_there;  // (groups, headdim + 2) of a head at a time
    float* part = p.parts + ((static_cast<int64_t>(row) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * HEADS * record;
    const auto answer = [&](int h, int i, float value) {
        p.y.set(row * p.y_stride + static_cast<int64_t>(head + h) * headdim + i, value);
    };
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= mine) break;
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                if (channel(c) + v < headdim) records[group * record + channel(c) + v] = sums[h][c][v];
            }
        }
        if (within == 0) records[group * record + headdim] = total[h], records[group * record + headdim + 1] = most[h];
        __syncthreads();
        for (int i = threadIdx.x; i < headdim; i += ATTEND_THREADS) {
            float sum, all, largest;
            join(records, groups, record, i, sum, all, largest);
            if (used == 1) {
                answer(h, i, sum / all);
                continue;
            }
            part[h * record + i] = sum;
            if (i == 0) part[h * record + headdim] = all, part[h * record + headdim + 1] = largest;
        }
    }
    if (used == 1) return;
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    unsigned* done = p.done + row * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) is_last = atomicAdd(done, 1) == used - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *done = 0;
    const float* first = part - static_cast<int64_t>(blockIdx.x) * HEADS * record;
    for (int h = 0; h < mine; h++) {
        for (int i = threadIdx.x; i < headdim; i += ATTEND_THREADS) {
            float sum, all, largest;
            join(first + h * record, used, HEADS * record, i, sum, all, largest);
            answer(h, i, sum / all);
        }
    }
}

#define ATTEND(T, name, how, v, chunks, heads)                                                                             \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS)                                                           \
        decoder_attend_##how##_##chunks##_##heads##_##name(const __grid_constant__ Attention args) {                       \
        attend<T, v, chunks, heads>(args);                                                                                 \
    }
// Heads whose rows are a multiple of 16 bytes, and others.
#define ATTENDS(T, name)                                                                                                   \
    ATTEND(T, name, packs, 16 / sizeof(T), 1, 1)                                                                           \
    ATTEND(T, name, packs, 16 / sizeof(T), 2, 1)                                                                           \
    ATTEND(T, name, packs, 16 / sizeof(T), 1, 4)                                                                           \
    ATTEND(T, name, packs, 16 / sizeof(T), 2, 4)                                                                           \
    ATTEND(T, name, each, 1, 4, 1)
FOR_EACH_DTYPE(ATTENDS)

// ---- Gates ------------------------------------------------------------------------------------------------------------------

enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU2 = 3 };

// y = f(scale · gate) · up, or f(scale · gate).
struct Gate {
    const float *gate, *up;  // rows `stride` apart; `up` may be absent
    Any y;                   // rows `y_stride` apart
    int64_t stride, y_stride;
    int count, activation;
    float scale;
    int end;
};
static_assert(sizeof(Gate) == 64, "as in arguments.rs");

__device__ __forceinline__ float activated(int activation, float x) {
    switch (activation) {
        case SILU: return silu(x);
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * x * (1.0f + 0.044715f * x * x)));
        default: x = x < 0.0f ? 0.0f : x; return x * x;  // NaN stays NaN
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) decoder_gate(const __grid_constant__ Gate p) {
    const int i = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    let_next_begin();
    wait_for_previous();
    if (i >= p.count) return;
    float y = activated(p.activation, p.scale * p.gate[row * p.stride + i]);
    if (p.up) y *= p.up[row * p.stride + i];
    p.y.set(row * p.y_stride + i, y);
}

// ---- The short convolution --------------------------------------------------------------------------------------------------

// y = C · conv(B · x), of [B | C | x] in rows of x; see `Project`.
extern "C" __global__ void __launch_bounds__(THREADS) decoder_short_conv(const __grid_constant__ Project p) {
    const int channel = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y, channels = p.conv_end - p.conv_begin;
    const bool there = channel < channels;
    Taps taps;
    if (there) taps.load(p, row, channel);
    let_next_begin();
    wait_for_previous();
    if (!there) return;
    const float* bcx = p.x + row * p.x_stride + channel;
    const float y = taps.step(p, row, channel, bcx[0] * bcx[2 * channels]);
    p.y.set(row * p.y_stride + channel, bcx[channels] * y);
}
