// What the kernels of selective_scan share: arguments, who owns what, tiles from memory.
//
// A thread owns S states of one channel and steps through time with them in registers; LANES neighbouring lanes own one
// channel. A block owns CHANNELS neighbouring channels of one sequence, whose b and c are of one group, and walks
// over tiles of TILE tokens that it stages in shared memory: there each step size, gate and output is worked out once.
// A sequence is a row of the batch, or one of those packed in it; its first tile begins with its first token.
//
// Where channels are too few to fill the GPU, time is cut into splits of whole tiles, and a pass before finds what each adds to
// the state after it, from a state of zeros: with the decay over a split, a power of the sum of its steps, each block then
// works out the state that its split begins with. The backward pass does the same from the end.
#pragma once

#include "packing.cuh"
#include "scalar.cuh"

struct SelectiveScan {
    const void *u, *delta, *z, *b, *c, *grad_y;
    const float *a, *d, *delta_bias, *initial_state, *grad_state;
    const float *b_constant, *c_constant;  // (dim, d_state), in place of b and c
    void *y, *grad_u, *grad_delta, *grad_z;
    float *final_state;
    float *checkpoints;  // (tiles of all sequences, dim, d_state), states before each; null if not wanted
    float *grad_initial_state;
    float *grad_a, *grad_b_constant, *grad_c_constant;  // (splits of all sequences, dim, d_state)
    float *grad_d, *grad_delta_bias;                    // (splits of all sequences, dim)
    float *partials;                                    // (batch, blocks, seqlen, 2, STATES)
    float *ends;   // (splits, dim, d_state): what each split adds to the state after it, or its gradient before it
    float *spans;  // (splits, dim): the steps of each, summed
    const Piece *pieces;  // each a split; null if each row is a sequence
    // In elements: batch, channel, token; b and c: batch, group, state, token.
    int64_t u_stride[3], delta_stride[3], z_stride[3], grad_y_stride[3], y_stride[3];
    int64_t b_stride[4], c_stride[4];
    int32_t batch, dim, seqlen, d_state;
    int32_t unit;    // channels that share a group of b and one of c; a divisor of dim
    int32_t blocks;  // of one sequence
    int32_t b_group_len, c_group_len;
    int32_t delta_softplus;
    int32_t splits, split_tiles;  // of a row that is a sequence; tiles of each but the last
    int32_t packs;  // every activation, and varying b and c, may be read in packs of 16 bytes along its layout's last axis
};
static_assert(sizeof(SelectiveScan) == 464, "as in cuda.rs");

namespace {

constexpr int TILE = 32;
constexpr int ROW = TILE + 4;  // of staged activations, (channel, token)

template <int S_, int LANES_, int WARPS_, int SUB_> struct Shape {
    static constexpr int S = S_, LANES = LANES_, WARPS = WARPS_, SUB = SUB_;
    static constexpr int STATES = S * LANES, THREADS = WARPS * 32, PER_WARP = 32 / LANES, CHANNELS = WARPS * PER_WARP;
    static constexpr int COEFFICIENT_ROW = STATES + 4;
    static constexpr int COEFFICIENTS = (TILE > CHANNELS ? TILE : CHANNELS) * COEFFICIENT_ROW;
    static constexpr int ACTIVATIONS = CHANNELS * ROW;
    static constexpr int PACK = CHANNELS * TILE / THREADS;  // neighbouring elements of a tile that a thread stages
    static constexpr int COEFFICIENT_PACK = TILE * STATES / THREADS < 8 ? TILE * STATES / THREADS : 8;
    static constexpr int COEFFICIENT_PACKS = TILE * STATES / THREADS / COEFFICIENT_PACK;
    // Tiles are fetched while the one before is computed, where registers allow.
    static constexpr bool AHEAD = COEFFICIENT_PACKS <= 2;
    static constexpr int TOKENS_PER_LANE = SUB > LANES ? SUB / LANES : 1;
    static constexpr int LANES_PER_TOKEN = LANES > SUB ? LANES / SUB : 1;
};

// Which channels a block owns, and which tiles of tokens.
struct Place {
    int row, start, length, sequence;  // of the sequence: in the batch, its first token there, its tokens, its place among states
    int block, first, channels, split, splits, begin, end;
    int rows_before, tiles_before;  // splits and tiles of the sequences before

    template <typename C> __device__ static Place of(const SelectiveScan& p, C) {
        const int block = blockIdx.x % p.blocks, per_unit = (p.unit + C::CHANNELS - 1) / C::CHANNELS;
        const int within = (block % per_unit) * C::CHANNELS, index = blockIdx.x / p.blocks;
        const Piece piece = piece_of(p.pieces, p.pieces ? index : index * p.splits + blockIdx.y, p.splits, p.seqlen);
        const int tiles = (piece.length + TILE - 1) / TILE, split = piece.piece;
        Place at;
        at.row = piece.row, at.start = piece.start, at.length = piece.length, at.sequence = piece.sequence;
        at.block = block, at.first = block / per_unit * p.unit + within, at.channels = min(C::CHANNELS, p.unit - within);
        at.split = split, at.splits = max((tiles + p.split_tiles - 1) / p.split_tiles, 1);
        at.begin = split * p.split_tiles, at.end = min((split + 1) * p.split_tiles, tiles);
        at.rows_before = piece.place - split;
        // Of packed sequences at most so many: each ends with one tile that may not be whole.
        at.tiles_before = p.pieces ? (int64_t(at.row) * p.seqlen + at.start) / TILE + at.sequence : at.row * tiles;
        return at;
    }
    // A channel of the block among those of a split.
    __device__ int64_t row_of(const SelectiveScan& p, int split, int channel) const {
        return (int64_t(rows_before) + split) * p.dim + first + channel;
    }
    // Where the states of a thread are among those of all sequences.
    __device__ int64_t state_of(const SelectiveScan& p, int channel, int n) const {
        return (int64_t(sequence) * p.dim + first + channel) * p.d_state + n;
    }
    // The same among those before each tile.
    __device__ int64_t checkpoint_of(const SelectiveScan& p, int tile, int channel, int n) const {
        return ((int64_t(tiles_before) + tile) * p.dim + first + channel) * p.d_state + n;
    }
};

// Where an activation is in a tile in shared memory. Four neighbouring tokens are read at once. The order of these fours is
// such that no two threads of a warp share a bank, neither where they read a token of its channels nor where they write one.
template <typename C> __device__ __forceinline__ int place_of(int channel, int token) {
    return channel * ROW + ((token / 4) ^ (channel / C::PACK % (TILE / 4))) * 4 + token % 4;
}

// N neighbouring tokens of a channel, from a multiple of 4 on.
template <typename C, int N> __device__ __forceinline__ void load_tokens(const float* tile, int channel, int token, float (&to)[N]) {
    static_assert(N % 4 == 0, "in fours");
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(tile + place_of<C>(channel, token + i));
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}

// The elements of a tile of activations that a thread stages: a pack of neighbours along the axis that is contiguous.
template <typename C> struct Staged {
    int channel, token;              // of the first
    int channel_step, token_step;    // from one to the next

    __device__ explicit Staged(bool time_is_contiguous) {
        const int i = threadIdx.x;
        if (time_is_contiguous) {
            channel = i / (TILE / C::PACK), token = i % (TILE / C::PACK) * C::PACK;
            channel_step = 0, token_step = 1;
        } else {
            channel = i % (C::CHANNELS / C::PACK) * C::PACK, token = i / (C::CHANNELS / C::PACK);
            channel_step = 1, token_step = 0;
        }
    }
    __device__ __forceinline__ int place(int k) const {
        return place_of<C>(channel + k * channel_step, token + k * token_step);
    }
    // The elements of a tile in shared memory.
    __device__ __forceinline__ void put(float* tile, const float (&values)[C::PACK]) const {
        if (C::PACK % 4 == 0 && token_step) {
#pragma unroll
            for (int k = 0; k + 3 < C::PACK; k += 4) {
                *reinterpret_cast<float4*>(tile + place(k)) =
                    make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < C::PACK; k++) tile[place(k)] = values[k];
        }
    }
    __device__ __forceinline__ void get(const float* tile, float (&values)[C::PACK]) const {
        if (C::PACK % 4 == 0 && token_step) {
#pragma unroll
            for (int k = 0; k + 3 < C::PACK; k += 4) {
                const float4 four = *reinterpret_cast<const float4*>(tile + place(k));
                values[k] = four.x, values[k + 1] = four.y, values[k + 2] = four.z, values[k + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int k = 0; k < C::PACK; k++) values[k] = tile[place(k)];
        }
    }
    __device__ __forceinline__ bool exists(int k, int channels, int tokens) const {
        return channel + k * channel_step < channels && token + k * token_step < tokens;
    }
};

// What a thread stages of one activation.
template <typename T, typename C> struct Activation {
    T* start;  // of the thread's elements of the first tile
    int64_t step, token_stride;

    __device__ Activation(const void* x, const int64_t (&stride)[3], const Place& at, const Staged<C>& staged)
        : start(const_cast<T*>(static_cast<const T*>(x)) + at.row * stride[0] +
                (at.first + staged.channel) * stride[1] + (at.start + staged.token) * stride[2]),
          step(staged.token_step ? stride[2] : stride[1]), token_stride(stride[2]) {}

    // `whole` if the tile is and packs are aligned.
    __device__ __forceinline__ void load(Raw<T, C::PACK>& raw, const Staged<C>& staged, int64_t first, bool whole,
                                         int channels, int tokens) const {
        const T* at = start + first * token_stride;
        if (whole) {
            raw.load(at);
        } else {
            raw.clear();
#pragma unroll
            for (int k = 0; k < C::PACK; k++) {
                if (staged.exists(k, channels, tokens)) raw.set(k, at[k * step]);
            }
        }
    }
    __device__ __forceinline__ void store(const Pack<T, C::PACK>& pack, const Staged<C>& staged, int64_t first, bool whole,
                                          int channels, int tokens) const {
        T* at = start + first * token_stride;
        if (whole) {
            *reinterpret_cast<Pack<T, C::PACK>*>(at) = pack;
        } else {
#pragma unroll
            for (int k = 0; k < C::PACK; k++) {
                if (staged.exists(k, channels, tokens)) at[k * step] = pack.values[k];
            }
        }
    }
};

template <int S> __device__ __forceinline__ void load_row(const float* from, float (&to)[S]) {
    if constexpr (S % 4 == 0) {
#pragma unroll
        for (int i = 0; i < S / 4; i++) {
            const float4 v = reinterpret_cast<const float4*>(from)[i];
            to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < S / 2; i++) {
            const float2 v = reinterpret_cast<const float2*>(from)[i];
            to[2 * i] = v.x, to[2 * i + 1] = v.y;
        }
    }
}

// b or c in shared memory: rows of a tile's tokens, or, if constant, of the block's channels. VARYING: known not to be constant.
template <typename C, typename T, bool VARYING> struct Coefficients {
    const float* constant_values;
    const T* start;
    int64_t state_stride, token_stride;
    float* shared;
    bool time_is_contiguous;

    __device__ Coefficients(const void* x, const float* constant, const int64_t (&stride)[4], int group_len,
                            const Place& at, bool time_is_contiguous, float* shared)
        : constant_values(constant), start(static_cast<const T*>(x)), state_stride(stride[2]), token_stride(stride[3]),
          shared(shared), time_is_contiguous(time_is_contiguous) {
        if (!this->constant()) {
            start += at.row * stride[0] + (at.first / group_len) * stride[1] + at.start * stride[3];
        }
    }

    __device__ __forceinline__ bool constant() const { return !VARYING && constant_values; }
    // From token to token.
    __device__ __forceinline__ int step() const { return constant() ? 0 : C::COEFFICIENT_ROW; }

    __device__ void stage_constant(const SelectiveScan& p, const Place& at) const {
        if (!constant()) return;
        for (int i = threadIdx.x; i < C::CHANNELS * C::STATES; i += C::THREADS) {
            const int channel = i / C::STATES, n = i % C::STATES;
            const bool exists = channel < at.channels && n < p.d_state;
            shared[channel * C::COEFFICIENT_ROW + n] =
                exists ? constant_values[int64_t(at.first + channel) * p.d_state + n] : 0.0f;
        }
    }

    // What a thread stages of a tile: packs along the axis that is contiguous.
    using One = Raw<T, C::COEFFICIENT_PACK>;
    struct Packs { One packs[C::AHEAD ? C::COEFFICIENT_PACKS : 1]; };

    __device__ __forceinline__ void place(int i, int& state, int& token) const {
        constexpr int PACK = C::COEFFICIENT_PACK;
        i = i * C::THREADS + threadIdx.x;
        if (time_is_contiguous) {
            state = i / (TILE / PACK), token = i % (TILE / PACK) * PACK;
        } else {
            state = i % (C::STATES / PACK) * PACK, token = i / (C::STATES / PACK);
        }
    }
    __device__ __forceinline__ void load(One& raw, int i, const SelectiveScan& p, int64_t first, int tokens) const {
        int n, t;
        place(i, n, t);
        const T* at = start + n * state_stride + (first + t) * token_stride;
        if (p.packs && tokens == TILE && p.d_state == C::STATES) {
            raw.load(at);
        } else {
            raw.clear();
#pragma unroll
            for (int k = 0; k < C::COEFFICIENT_PACK; k++) {
                const int nk = time_is_contiguous ? n : n + k, tk = time_is_contiguous ? t + k : t;
                if (nk < p.d_state && tk < tokens) raw.set(k, at[k * (time_is_contiguous ? token_stride : state_stride)]);
            }
        }
    }
    __device__ __forceinline__ void stage(int i, const One& pack) const {
        int n, t;
        place(i, n, t);
        float* const to = shared + t * C::COEFFICIENT_ROW + n;
#pragma unroll
        for (int k = 0; k < C::COEFFICIENT_PACK; k++) {
            to[time_is_contiguous ? k * C::COEFFICIENT_ROW : k] = pack.get(k);
        }
    }
    // Fetches a tile into registers, if there is room; `stage` then brings it to shared memory.
    __device__ __forceinline__ void fetch(Packs& packs, const SelectiveScan& p, int64_t first, int tokens) const {
        if (!C::AHEAD || constant()) return;
#pragma unroll
        for (int i = 0; i < C::COEFFICIENT_PACKS; i++) load(packs.packs[i], i, p, first, tokens);
    }
    __device__ __forceinline__ void stage(const Packs& packs, const SelectiveScan& p, int64_t first, int tokens) const {
        if (constant()) return;
        if constexpr (C::AHEAD) {
#pragma unroll
            for (int i = 0; i < C::COEFFICIENT_PACKS; i++) stage(i, packs.packs[i]);
        } else {
#pragma unroll 2
            for (int i = 0; i < C::COEFFICIENT_PACKS; i++) {
                One raw;
                load(raw, i, p, first, tokens);
                stage(i, raw);
            }
        }
    }

    // Where the states of a thread begin; advance by `step()` a token.
    __device__ const float* of(int channel, int state) const {
        return shared + (constant() ? channel * C::COEFFICIENT_ROW : 0) + state;
    }
};

// Reads or writes the states of a thread in a (dim, d_state) matrix.
template <int S> __device__ __forceinline__ void load_states(const float* from, int n, int d_state, float (&to)[S]) {
#pragma unroll
    for (int s = 0; s < S; s++) to[s] = n + s < d_state ? from[s] : 0.0f;
}
template <int S> __device__ __forceinline__ void store_states(float* to, int n, int d_state, const float (&from)[S]) {
    if (S == 4 && d_state % 4 == 0) {
        if (n < d_state) *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2 % S], from[3 % S]);
        return;
    }
#pragma unroll
    for (int s = 0; s < S; s++) {
        if (n + s < d_state) to[s] = from[s];
    }
}

// The decay of states over a split. Where it is a growth beyond all numbers, nothing stays nothing.
template <int S> __device__ __forceinline__ void decay_over(float span, const float (&a)[S], float (&x)[S]) {
#pragma unroll
    for (int s = 0; s < S; s++) x[s] = x[s] == 0.0f ? 0.0f : x[s] * fast_exp2(span * a[s]);
}

}  // namespace

// Name; S, LANES and WARPS: S · LANES states at most; of the forward pass tokens of a piece and blocks that a multiprocessor should
// hold; the same of the backward pass.
#define FOR_EACH_SHAPE(M, T, DTYPE)               \
    M(narrow16, 2, 8, 4, 8, 3, 8, 2, T, DTYPE)    \
    M(wide16, 4, 4, 8, 4, 2, 4, 2, T, DTYPE)      \
    M(wide64, 4, 16, 4, 8, 3, 4, 3, T, DTYPE)     \
    M(wide256, 8, 32, 2, 4, 2, 4, 2, T, DTYPE)
