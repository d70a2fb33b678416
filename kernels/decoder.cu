// One token of a stack of layers, for a few sequences at once. Between kernels activations are f32; each matrix is read once,
// for all sequences. Kernels overlap: each asks for its weights before it waits for the one before it. With more sequences,
// products are those of `decoder_batch.cu`.

#include "decoder.cuh"

// ---- The embedding ----------------------------------------------------------------------------------------------------------

constexpr int MAX_ROWS = 64;

struct Embed {
    Any ids;         // (rows)
    Any embedding;   // (vocabulary, width)
    float* out;      // rows `stride` apart, of one or two copies
    int* positions;  // (rows): for the kernels of this token, whose arguments are the same for all tokens
    int64_t stride;
    int vocabulary, width, copies;
    float scale;
    int position[MAX_ROWS];
};
static_assert(sizeof(Embed) == 328, "as in arguments.rs");

extern "C" __global__ void __launch_bounds__(256) decoder_embed(const __grid_constant__ Embed args) {
    // The token before, and whatever else changed the states, is over; only then kernels may read them ahead of their wait.
    wait_for_previous();
    let_next_begin();
    const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0) args.positions[row] = args.position[row];
    if (i >= args.width) return;
    const int64_t id = args.ids.index(row);
    const bool known = 0 <= id && id < args.vocabulary;
    // Nothing can be reported from here; what follows from NaN is not mistaken for an answer.
    const float x = known ? args.embedding.get(id * args.width + i) * args.scale : __int_as_float(0x7fffffff);
    for (int copy = 0; copy < args.copies; copy++) args.out[row * args.stride + copy * args.width + i] = x;
}

// ---- Products ---------------------------------------------------------------------------------------------------------------

#ifndef PREFETCHED_BYTES
#define PREFETCHED_BYTES 16384
#endif
constexpr int PREFETCHED = PREFETCHED_BYTES;  // of each of the first outputs of a block

// A pair of outputs belongs to `split` warps, whose lanes share the inputs.
template <typename T, int ROWS> __device__ void project(const Project& p) {
    constexpr int V = 16 / sizeof(T), PAIR = 2, UNROLL = 4, SUMS = PAIR * ROWS;
    extern __shared__ float4 shared[];
    __shared__ float scratch[WARPS * SUMS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int vectors = p.inputs / V, step = 32 * p.split, first = warp % p.split * 32 + lane;
    const int tile = WARPS / p.split * PAIR;  // outputs of a block at once

    Pack<T, V> w[PAIR][UNROLL];
    const auto fetch = [&](int output, int i) {
#pragma unroll
        for (int j = 0; j < PAIR; j++) {
            const int4* row = reinterpret_cast<const int4*>(row_of<T>(p, output + j));
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int at = i + u * step;
                if (at < vectors && output + j < p.outputs) {
                    const int4 bits = __ldcs(row + at);
                    w[j][u] = *reinterpret_cast<const Pack<T, V>*>(&bits);
                }
            }
        }
    };

    int output = blockIdx.x * tile + warp / p.split * PAIR;
    fetch(output, first);
    NormAhead norm;
    norm.load(p, p.inputs / p.norm_groups / 4);
    let_next_begin();
    prefetch<T>(p, blockIdx.x * tile, tile, PREFETCHED);
    wait_for_previous();
    read_inputs<ROWS, V>(p, norm, shared, scratch);
    __syncthreads();

    // The sums end in lanes 32/SUMS apart.
    const int which = lane / (32 / SUMS), row = which % ROWS;
    const bool leads = lane % (32 / SUMS) == 0 && warp % p.split == 0 && row < p.rows;
    for (int begin = blockIdx.x * tile; begin < p.outputs; begin += gridDim.x * tile) {
        const int mine = output + which / ROWS, channel = mine - p.conv_begin;
        const bool convolves = leads && p.conv_begin <= mine && mine < p.conv_end;
        Taps taps;
        if (convolves) taps.load(p, row, channel);
        float sums[SUMS] = {};
        for (int i = first; i - lane < vectors;) {
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int at = i + u * step;
                if (at >= vectors) continue;
#pragma unroll
                for (int h = 0; h < V / 4; h++) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        const float4 values = shared[r * (p.inputs / 4) + h * vectors + at];
#pragma unroll
                        for (int j = 0; j < PAIR; j++) {
                            const T* four = w[j][u].values + 4 * h;
                            float& sum = sums[j * ROWS + r];
                            sum = fmaf(to_float(four[0]), values.x, sum);
                            sum = fmaf(to_float(four[1]), values.y, sum);
                            sum = fmaf(to_float(four[2]), values.z, sum);
                            sum = fmaf(to_float(four[3]), values.w, sum);
                        }
                    }
                }
            }
            i += UNROLL * step;
            if (i - lane < vectors) fetch(output, i);
        }
        output += gridDim.x * tile;
        fetch(output, first);  // of the next tile, while this one is summed up

        reduce_scatter<SUMS, 32, 1>(sums, lane);
        float sum = sums[0];
        if (p.split > 1) {
            __syncthreads();  // the last tile's are read
            scratch[warp * SUMS + which] = sum;
            __syncthreads();
            if (leads) {
                for (int other = 1; other < p.split; other++) sum += scratch[(warp + other) * SUMS + which];
            }
        }
        if (leads && mine < p.outputs) {
            sum = finished(p, mine, sum);
            if (convolves) sum = taps.step(p, row, channel, sum);
            const int64_t at = row * p.y_stride + mine;
            p.y.set(at, p.base ? p.base[at] + sum : sum);
        }
    }
}

#define PROJECT(T, name, rows)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                              \
        decoder_project_##rows##_##name(const __grid_constant__ Project args) {                           \
        project<T, rows>(args);                                                                           \
    }
#define PROJECTS(T, name) PROJECT(T, name, 1) PROJECT(T, name, 2)
FOR_EACH_DTYPE(PROJECTS)
// With weights of 16 bits these are for `decoder_batch.cu`.
PROJECT(float, f32, 4)
PROJECT(float, f32, 8)

// ---- Mamba-1 ----------------------------------------------------------------------------------------------------------------

// Δ from its low rank, then a step of the state: h ← exp(Δ·A) h + Δ·x ⊗ B, y = (h C + D·x)·silu(z).
struct Mamba1 {
    const void* dt_proj;  // (d_inner, dt_rank)
    const float* xz;      // [x | z], after the convolution
    const float* dbc;     // [Δ | B | C]
    float* state;         // (rows, d_inner, d_state)
    float* y;             // (rows, d_inner)
    void* rounded;        // or, in the dtype of the weights, this
    const float *dt_bias, *a, *d;
    const float* norms[3];  // of Δ, B and C; with `normed`, absent ones are of ones
    int64_t xz_stride, dbc_stride;
    int d_inner, d_state, dt_rank, normed;
    float eps;
};
static_assert(sizeof(Mamba1) == 136, "as in arguments.rs");

constexpr int UPDATE_THREADS = 128;
constexpr int LANES = 4;   // of a channel
constexpr int AHEAD = 10;  // packs of four weights of Δ that a lane asks for before it waits

template <typename T> __device__ void mamba1(const Mamba1& p) {
    extern __shared__ float dbc[];
    const int lane = threadIdx.x % LANES, row = blockIdx.y, n = p.d_state, rank = p.dt_rank;
    const int channel = blockIdx.x * (UPDATE_THREADS / LANES) + threadIdx.x / LANES;
    const bool there = channel < p.d_inner;
    const T* weight = static_cast<const T*>(p.dt_proj) + static_cast<int64_t>(channel) * rank;
    float* state = p.state + (static_cast<int64_t>(row) * p.d_inner + channel) * n;
    const bool packs = rank % 4 == 0;

    Pack<T, 4> w[AHEAD];
    float h[4], a[4], bias = 0.0f, d = 0.0f;
    const auto load_states = [&](int i) {
        load<4, true>(h, state + i);
        load<4, true>(a, p.a + static_cast<int64_t>(channel) * n + i);
    };
    if (there) {
        if (packs) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int k = (u * LANES + lane) * 4;
                if (k < rank) w[u] = *reinterpret_cast<const Pack<T, 4>*>(weight + k);
            }
        }
        if (lane * 4 < n) load_states(lane * 4);
        bias = p.dt_bias[channel];
        d = p.d[channel];
    }
    let_next_begin();
    wait_for_previous();

    const int length = rank + 2 * n;
    for (int i = threadIdx.x; i < length; i += UPDATE_THREADS) dbc[i] = p.dbc[row * p.dbc_stride + i];
    float x = 0.0f, z = 0.0f;
    if (there) {
        x = p.xz[row * p.xz_stride + channel];
        z = p.xz[row * p.xz_stride + p.d_inner + channel];
    }
    __syncthreads();
    if (p.normed) {
        const int part = threadIdx.x / 32;  // a warp a part
        if (part < 3) {
            const int begin = part == 0 ? 0 : rank + (part - 1) * n, size = part == 0 ? rank : n;
            float sum = 0.0f;
            for (int i = threadIdx.x % 32; i < size; i += 32) sum += dbc[begin + i] * dbc[begin + i];
            const float scale = rsqrtf(warp_sum(sum) / size + p.eps);
            for (int i = threadIdx.x % 32; i < size; i += 32)
                dbc[begin + i] *= scale * (p.norms[part] ? p.norms[part][i] : 1.0f);
        }
        __syncthreads();
    }

    float dt = 0.0f;
    if (there) {
        if (packs) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                const int k = (u * LANES + lane) * 4;
                if (k < rank) {
#pragma unroll
                    for (int v = 0; v < 4; v++) dt = fmaf(to_float(w[u].values[v]), dbc[k + v], dt);
                }
            }
            for (int k = (AHEAD * LANES + lane) * 4; k < rank; k += 4 * LANES) {
                float more[4];
                load<4, true>(more, weight + k);
#pragma unroll
                for (int v = 0; v < 4; v++) dt = fmaf(more[v], dbc[k + v], dt);
            }
        } else {
            for (int k = lane; k < rank; k += LANES) dt = fmaf(to_float(weight[k]), dbc[k], dt);
        }
    }
    dt = softplus(warp_sum<LANES>(dt) + bias);
    const float* b = dbc + rank;
    const float* c = b + n;
    float y = 0.0f;
    for (int i = lane * 4; i < n && there; i += 4 * LANES) {
        if (i >= 4 * LANES) load_states(i);
#pragma unroll
        for (int v = 0; v < 4; v++) {
            h[v] = fmaf(fast_exp2(dt * LOG2_E * a[v]), h[v], dt * x * b[i + v]);
            y = fmaf(h[v], c[i + v], y);
        }
        store<4, true>(state + i, h);
    }
    y = fmaf(d, x, warp_sum<LANES>(y)) * silu(z);
    if (!there || lane != 0) return;
    const int64_t at = static_cast<int64_t>(row) * p.d_inner + channel;
    if (p.rounded) {
        static_cast<T*>(p.rounded)[at] = from_float<T>(y);
    } else {
        p.y[at] = y;
    }
}

#define MAMBA1(T, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(UPDATE_THREADS) decoder_mamba1_##name(                            \
        const __grid_constant__ Mamba1 args) {                                                                     \
        mamba1<T>(args);                                                                                           \
    }
FOR_EACH_DTYPE(MAMBA1)

// ---- Mamba-2 ----------------------------------------------------------------------------------------------------------------

// A step of the state of each head: h ← exp(Δ·A) h + Δ·x ⊗ B, y = h C + D·x, gated if `z` is there.
struct Mamba2 {
    const float *x, *b, *c, *dt, *z;  // rows `stride` apart, after the convolution
    float* state;                     // (rows, nheads, headdim, d_state)
    Any y;                            // (rows, nheads·headdim)
    const float *dt_bias, *a, *d;
    int64_t stride;
    int nheads, headdim, ngroups, d_state, d_per_head;
    float low, high;  // the bounds of Δ
};
static_assert(sizeof(Mamba2) == 128, "as in arguments.rs");

constexpr int CHANNELS = 4;  // of a head, for a warp

extern "C" __global__ void __launch_bounds__(UPDATE_THREADS) decoder_mamba2(const __grid_constant__ Mamba2 p) {
    const int lane = threadIdx.x % 32, head = blockIdx.y, n = p.d_state;
    const int64_t row = blockIdx.z;
    const int first = (blockIdx.x * (UPDATE_THREADS / 32) + threadIdx.x / 32) * CHANNELS;
    const auto channel = [&](int r) { return min(first + r, p.headdim - 1); };  // some twice, written once
    float* state = p.state + (row * p.nheads + head) * p.headdim * n;

    float h[CHANNELS][4];
    const auto load_states = [&](int i) {
#pragma unroll
        for (int r = 0; r < CHANNELS; r++) load<4, true>(h[r], state + static_cast<int64_t>(channel(r)) * n + i);
    };
    if (lane * 4 < n) load_states(lane * 4);
    const float a = p.a[head], bias = p.dt_bias[head];
    let_next_begin();
    wait_for_previous();

    float dt = softplus(p.dt[row * p.stride + head] + bias);
    if (dt < p.low) dt = p.low;  // NaN stays NaN
    if (dt > p.high) dt = p.high;
    const float decay = fast_exp2(dt * LOG2_E * a);
    const int64_t at = row * p.stride + static_cast<int64_t>(head) * p.headdim;
    const int64_t group = row * p.stride + static_cast<int64_t>(head / (p.nheads / p.ngroups)) * n;
    float x[CHANNELS], y[CHANNELS] = {};
#pragma unroll
    for (int r = 0; r < CHANNELS; r++) x[r] = p.x[at + channel(r)];
    for (int i = lane * 4; i < n; i += 128) {
        float b[4], c[4];
        if (i >= 128) load_states(i);
        load<4, true>(b, p.b + group + i);
        load<4, true>(c, p.c + group + i);
#pragma unroll
        for (int r = 0; r < CHANNELS; r++) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                h[r][v] = fmaf(decay, h[r][v], dt * x[r] * b[v]);
                y[r] = fmaf(h[r][v], c[v], y[r]);
            }
            if (first + r < p.headdim) store<4, true>(state + static_cast<int64_t>(first + r) * n + i, h[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < CHANNELS; r++) {
        float sum = warp_sum(y[r]);
        if (lane != r || first + r >= p.headdim) continue;
        const int d = p.d_per_head ? head : head * p.headdim + first + r;
        sum = fmaf(p.d[d], x[r], sum);
        if (p.z) sum *= silu(p.z[at + first + r]);
        p.y.set((row * p.nheads + head) * p.headdim + first + r, sum);
    }
}
