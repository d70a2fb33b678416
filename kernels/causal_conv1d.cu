// The convolution, channels first (b, d, l) and last (b, l, d), its backward and its one-token step.
//
// With `m`, the distance of a tap into the past: pre_t = bias + Σ_m w_m x_{t-m}, y = activation(pre); backward, with
// g = grad_y · activation'(pre): dx_t = Σ_m w_m g_{t+m}, dw_m = Σ_t g_t x_{t-m}, dbias = Σ_t g_t, where x_{-1}, x_{-2}, …
// are the window. Kernels are compiled for at most TAPS taps, 4 or 8; of narrower filters (not ALL) the last taps are skipped.
// What a thread or block computes is of one sequence, a row or one of those packed in it; times count from its first token.

#include "elem.cuh"
#include "packing.cuh"
#include "reduce.cuh"
#include "scalar.cuh"

#include <type_traits>

struct Conv {
    const void* x;
    Any weight;                  // (d, width)
    Any bias;                    // (d), or absent
    const float* initial_state;  // (sequences, d, width - 1), or null
    const Piece* pieces;         // null if each row is a sequence
    int64_t token_stride;        // channels last: from one token of x to the next; of the others it is dim
    int batch, dim, seqlen, width;
    int silu;
    int run;    // channels last: tokens of a thread
    int count;  // of pieces
    int padding;
};
static_assert(sizeof(Conv) == 96, "as in cuda.rs");

struct ConvForward {
    Conv conv;
    void* y;
    float* final_state;  // (sequences, d, width - 1)
};
static_assert(sizeof(ConvForward) == 112, "as in cuda.rs");

struct ConvBackward {
    Conv conv;
    const void* grad_y;       // or null
    const float* grad_state;  // or null
    void* dx;                 // or null
    float* dinitial;          // or null
    Any dweight, dbias;       // one partial sum a block along the grid's reduced axis, or absent
};
static_assert(sizeof(ConvBackward) == 160, "as in cuda.rs");

struct ConvUpdate {
    const void* x;
    void* y;
    float* state;       // (b, d, width - 1), or of a pool
    const int* states;  // (b): indices into it, negative ones of padding; or null
    Any weight, bias;
    int64_t token_stride, channel_stride;  // of x and y
    int batch, dim, seqlen, width;
    int silu;
    int padding;
};
static_assert(sizeof(ConvUpdate) == 104, "as in cuda.rs");

// w_m of channel c.
__device__ inline float tap(const Conv& conv, int c, int m) {
    return m < conv.width ? conv.weight.get(static_cast<int64_t>(c) * conv.width + conv.width - 1 - m) : 0.0f;
}

// The input `m` tokens before the first of a sequence and channel.
__device__ inline float before(const Conv& conv, int64_t row, int m) {
    const int window = conv.width - 1;
    return conv.initial_state && m <= window ? conv.initial_state[row * window + window - m] : 0.0f;
}

// The entry of the final window that is the input at time t, which may be before the first; negative if none.
__device__ inline int final_entry(const Conv& conv, int length, int t) { return t - (length - (conv.width - 1)); }

// The row of a channel of a sequence in the windows.
__device__ inline int64_t window_row(const Conv& conv, int sequence, int c) {
    return static_cast<int64_t>(sequence) * conv.dim + c;
}

// Channels first: where the times of a channel of a sequence begin in x, y and their gradients.
__device__ inline int64_t first_time(const Conv& conv, const Piece& at, int c) {
    return (static_cast<int64_t>(at.row) * conv.dim + c) * conv.seqlen + at.start;
}

// Channels last: a sequence.
struct Tokens {
    int64_t first;  // token, among all
    int length, sequence;

    __device__ Tokens(const Conv& conv, const Piece& at)
        : first(static_cast<int64_t>(at.row) * conv.seqlen + at.start), length(at.length), sequence(at.sequence) {}
};

// bias + Σ_m w_m x_{-m} over the values that end at x[last].
template <int TAPS, bool ALL>
__device__ inline float sum_taps(const float* w, float bias, const float* x, int width) {
    float sum = bias;
#pragma unroll
    for (int m = 0; m < TAPS; m++)
        if (ALL || m < width) sum = fmaf(w[m], x[-m], sum);
    return sum;
}

__device__ inline float activate(float pre, int with_silu) { return with_silu ? silu(pre) : pre; }

__device__ inline float slope(float pre, int with_silu) { return with_silu ? silu_slope(pre) : 1.0f; }

// ---- Channels first: a thread has STEPS neighbouring times of a row.

constexpr int STEPS = 8;

// The STEPS inputs from t0 on and those before them, in x[BEFORE..] and x[..BEFORE].
template <int BEFORE, bool VECTOR, typename T>
__device__ inline void load_times(float* x, const Conv& conv, const T* row_x, int64_t row, int t0, int length) {
    float part[BEFORE], own[STEPS];
    if (t0 > 0) {
        load<BEFORE, VECTOR>(part, row_x + t0 - BEFORE);
    } else {
#pragma unroll
        for (int i = 0; i < BEFORE; i++) part[i] = before(conv, row, BEFORE - i);
    }
    load<STEPS, VECTOR>(own, row_x + t0, length - t0);
#pragma unroll
    for (int i = 0; i < BEFORE; i++) x[i] = part[i];
#pragma unroll
    for (int i = 0; i < STEPS; i++) x[BEFORE + i] = own[i];
}

template <typename T, int TAPS, bool VECTOR, bool ALL>
__device__ void forward_first(const ConvForward& args) {
    constexpr int BEFORE = TAPS;
    const Conv& conv = args.conv;
    const int c = blockIdx.x % conv.dim;
    const Piece at = piece_of<!VECTOR>(conv.pieces, blockIdx.x / conv.dim, 1, conv.seqlen);
    const int length = at.length;
    const int64_t row = VECTOR ? blockIdx.x : window_row(conv, at.sequence, c);
    const int64_t begin = VECTOR ? row * conv.seqlen : first_time(conv, at, c);
    const T* x = static_cast<const T*>(conv.x) + begin;
    T* y = static_cast<T*>(args.y) + begin;

    // The next times are on their way while these are computed.
    const int stride = gridDim.y * blockDim.x * STEPS;
    int t0 = (blockIdx.y * blockDim.x + threadIdx.x) * STEPS;
    Raw<T, BEFORE> next_before;
    Raw<T, STEPS> next;
    const auto fetch_times = [&](int t) {
        if (t >= length) return;
        if (t > 0) next_before.template fetch<VECTOR>(x + t - BEFORE);
        next.template fetch<VECTOR>(x + t, length - t);
    };
    fetch_times(t0);
    float w[TAPS];
#pragma unroll
    for (int m = 0; m < TAPS; m++) w[m] = tap(conv, c, m);
    const float bias = conv.bias ? conv.bias.get(c) : 0.0f;

    for (; t0 < length; t0 += stride) {
        float window[BEFORE + STEPS], out[STEPS];
#pragma unroll
        for (int i = 0; i < BEFORE; i++) window[i] = t0 > 0 ? next_before.get(i) : before(conv, row, BEFORE - i);
#pragma unroll
        for (int i = 0; i < STEPS; i++) window[BEFORE + i] = next.get(i);
        fetch_times(t0 + stride);
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            out[i] = activate(sum_taps<TAPS, ALL>(w, bias, window + BEFORE + i, conv.width), conv.silu);
        store<STEPS, VECTOR>(y + t0, out, length - t0);
    }
    const int window = conv.width - 1;
    if (blockIdx.y == 0 && threadIdx.x < window) {
        const int t = length - window + static_cast<int>(threadIdx.x);
        args.final_state[row * window + threadIdx.x] = t >= 0 ? to_float(x[t]) : before(conv, row, -t);
    }
}

template <typename T, int TAPS, bool VECTOR, bool ALL>
__device__ void backward_first(const ConvBackward& args) {
    __shared__ float scratch[32 * (TAPS + 1)];
    const Conv& conv = args.conv;
    const int c = blockIdx.x;
    float w[TAPS];
#pragma unroll
    for (int m = 0; m < TAPS; m++) w[m] = tap(conv, c, m);
    const float bias = conv.bias ? conv.bias.get(c) : 0.0f;
    const int window = conv.width - 1;

    constexpr int BEFORE = TAPS, AFTER = TAPS;
    float sums[TAPS + 1] = {};  // dw, then dbias
    const int pieces = max((conv.seqlen + STEPS - 1) / STEPS, 1);  // an empty sequence has a window
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < conv.count; i += gridDim.y * blockDim.x) {
        const Piece at = piece_of<!VECTOR>(conv.pieces, i, pieces, conv.seqlen);
        const int t0 = at.piece * STEPS, length = at.length;
        const int64_t row = window_row(conv, at.sequence, c), begin = first_time(conv, at, c);
        const T* x = static_cast<const T*>(conv.x) + begin;
        float inputs[BEFORE + STEPS + AFTER], g[STEPS + AFTER];
        load_times<BEFORE, VECTOR>(inputs, conv, x, row, t0, length);
        const int left = length - t0 - STEPS;  // tokens after these
        float after[AFTER] = {};
        if (left > 0) load<AFTER, VECTOR>(after, x + t0 + STEPS, left);
#pragma unroll
        for (int i = 0; i < AFTER; i++) inputs[BEFORE + STEPS + i] = after[i];
#pragma unroll
        for (int i = 0; i < STEPS + AFTER; i++) g[i] = 0.0f;
        if (args.grad_y) {
            const T* grad = static_cast<const T*>(args.grad_y) + begin + t0;
            float own[STEPS], next[AFTER] = {};
            load<STEPS, VECTOR>(own, grad, length - t0);
            if (left > 0) load<AFTER, VECTOR>(next, grad + STEPS, left);
#pragma unroll
            for (int i = 0; i < STEPS + TAPS - 1; i++) {
                const float pre = sum_taps<TAPS, ALL>(w, bias, inputs + BEFORE + i, conv.width);
                g[i] = (i < STEPS ? own[i] : next[i - STEPS]) * slope(pre, conv.silu);
                if (t0 + i >= length) g[i] = 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            sums[TAPS] += g[i];
#pragma unroll
            for (int m = 0; m < TAPS; m++) sums[m] = fmaf(g[i], inputs[BEFORE + i - m], sums[m]);
        }
        if (args.dx) {
            float dx[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                dx[i] = 0.0f;
#pragma unroll
                for (int m = 0; m < TAPS; m++)
                    if (ALL || m < conv.width) dx[i] = fmaf(w[m], g[i + m], dx[i]);
                const int entry = final_entry(conv, length, t0 + i);
                if (args.grad_state && entry >= 0 && t0 + i < length)
                    dx[i] += args.grad_state[row * window + entry];
            }
            store<STEPS, VECTOR>(static_cast<T*>(args.dx) + begin + t0, dx, length - t0);
        }
        if (args.dinitial && t0 == 0) {
#pragma unroll
            for (int j = 1; j < TAPS; j++) {
                if (j > window) continue;
                float sum = 0.0f;
#pragma unroll
                for (int m = j; m < TAPS; m++)
                    if (m < conv.width) sum = fmaf(w[m], g[m - j], sum);
                const int entry = final_entry(conv, length, -j);
                if (args.grad_state && entry >= 0) sum += args.grad_state[row * window + entry];
                args.dinitial[row * window + window - j] = sum;
            }
        }
    }
    block_sum(sums, scratch, threadIdx.x / 32, blockDim.x / 32);
    if (threadIdx.x == 0) {
        const int64_t at = static_cast<int64_t>(blockIdx.y) * conv.dim + c;
        if (args.dweight) {
#pragma unroll
            for (int m = 0; m < TAPS; m++)
                if (m < conv.width) args.dweight.set(at * conv.width + conv.width - 1 - m, sums[m]);
        }
        if (args.dbias) args.dbias.set(at, sums[TAPS]);
    }
}

// ---- Channels last: a thread has V neighbouring channels of a run of times, through which its window slides.

constexpr int UNROLL = 4;  // times whose inputs are on their way at once

// V channels from c on of the input at time t of a sequence, from the window if t is before the first.
template <int V, typename T>
__device__ inline void load_token(float (&out)[V], const Conv& conv, const Tokens& of, int64_t t, int c) {
    if (t >= 0 && t < of.length) {
        load<V, true>(out, static_cast<const T*>(conv.x) + (of.first + t) * conv.token_stride + c);
    } else {
#pragma unroll
        for (int v = 0; v < V; v++)
            out[v] = t < 0 ? before(conv, window_row(conv, of.sequence, c + v), -t) : 0.0f;
    }
}

template <int V, int TAPS, bool ALL>
__device__ inline void load_taps(float (&w)[V][TAPS], float (&bias)[V], const Conv& conv, int c) {
    if (ALL && V > 1 && reinterpret_cast<uintptr_t>(conv.weight.data) % 16 == 0) {
        // The filters of neighbouring channels are neighbours.
        float taps[V * TAPS];
        conv.weight.get<V * TAPS, true>(taps, static_cast<int64_t>(c) * TAPS);
#pragma unroll
        for (int v = 0; v < V; v++) {
            bias[v] = conv.bias ? conv.bias.get(c + v) : 0.0f;
#pragma unroll
            for (int m = 0; m < TAPS; m++) w[v][m] = taps[v * TAPS + TAPS - 1 - m];
        }
        return;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
        bias[v] = conv.bias ? conv.bias.get(c + v) : 0.0f;
#pragma unroll
        for (int m = 0; m < TAPS; m++) w[v][m] = tap(conv, c + v, m);
    }
}

template <typename T, int TAPS, int V, bool ALL>
__device__ void forward_last(const ConvForward& args) {
    const Conv& conv = args.conv;
    const int runs = (conv.seqlen + conv.run - 1) / conv.run;
    const Piece at = piece_of(conv.pieces, blockIdx.x, max(runs, 1), conv.seqlen);
    const Tokens of(conv, at);
    const int start = at.piece * conv.run, end = min(start + conv.run, of.length);
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * V;
    if (c >= conv.dim) return;
    const int64_t first = of.first + start;
    const T* inputs = static_cast<const T*>(conv.x) + first * conv.token_stride + c;
    // The next tokens are on their way while these are computed.
    Raw<T, V> next[UNROLL];
    const auto fetch_tokens = [&](int t) {
        if (t >= end) return;
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int64_t token = min(t + i, end - 1) - start;
            next[i].load(inputs + token * conv.token_stride);
        }
    };
    fetch_tokens(start);
    float w[V][TAPS], bias[V];
    load_taps<V, TAPS, ALL>(w, bias, conv, c);

    // x[v][TAPS - 1 + i] is the input at time t + i.
    float x[V][TAPS - 1 + UNROLL];
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) {
        float token[V];
        load_token<V, T>(token, conv, of, start - (TAPS - 1) + i, c);
#pragma unroll
        for (int v = 0; v < V; v++) x[v][i] = token[v];
    }
    T* out = static_cast<T*>(args.y) + first * conv.dim + c;
    for (int t = start; t < end; t += UNROLL) {
        const int left = end - t;
        Raw<T, V> tokens[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) tokens[i] = next[i];
        fetch_tokens(t + UNROLL);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            float y[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                x[v][TAPS - 1 + i] = tokens[i].get(v);
                y[v] = activate(sum_taps<TAPS, ALL>(w[v], bias[v], x[v] + TAPS - 1 + i, conv.width), conv.silu);
            }
            if (i < left) store<V, true>(out, y);
            out += conv.dim;
        }
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
            for (int i = 0; i < TAPS - 1; i++) x[v][i] = x[v][UNROLL + i];
    }
    if (end == of.length) {
        const int window = conv.width - 1;
        for (int i = 0; i < window; i++) {
            float token[V];
            load_token<V, T>(token, conv, of, of.length - window + i, c);
#pragma unroll
            for (int v = 0; v < V; v++)
                args.final_state[window_row(conv, of.sequence, c + v) * window + i] = token[v];
        }
    }
}

// Rows of a block of the backward: each a run, whose sums are added before they are written.
constexpr int RUNS = 8;

template <typename T, int TAPS, int V, bool ALL>
__device__ void backward_last(const ConvBackward& args) {
    __shared__ float scratch[RUNS][(TAPS + 1) * V][33];
    const Conv& conv = args.conv;
    const int runs = max((conv.seqlen + conv.run - 1) / conv.run, 1);
    const int index = blockIdx.x * RUNS + threadIdx.y;
    const int c = (blockIdx.y * 32 + threadIdx.x) * V;
    const int window = conv.width - 1;
    float dw[V][TAPS] = {}, db[V] = {};
    if (index < conv.count && c < conv.dim) {
        const Piece at = piece_of(conv.pieces, index, runs, conv.seqlen);
        const Tokens of(conv, at);
        const int own = at.piece * conv.run;  // the first time of the run
        float w[V][TAPS], bias[V];
        load_taps<V, TAPS, ALL>(w, bias, conv, c);
        const int end = min(own + conv.run, of.length);
        const int start = own == 0 ? -window : own;  // the first run has the window too
        // At step s, g_s is computed and dx_{s - TAPS + 1} finished; x[v][TAPS - 1 + i], g[v][TAPS - 1 + i] are of time s + i.
        float x[V][TAPS - 1 + UNROLL], g[V][TAPS - 1 + UNROLL];
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) {
            float token[V];
            load_token<V, T>(token, conv, of, start - (TAPS - 1) + i, c);
#pragma unroll
            for (int v = 0; v < V; v++) {
                x[v][i] = token[v];
                g[v][i] = 0.0f;
            }
        }
        // UNROLL steps from s on; INTERIOR: all of them inside the run, and so are the tokens that they finish.
        const auto steps = [&](auto interior, int s) {
            constexpr bool INTERIOR = decltype(interior)::value;
            float tokens[UNROLL][V], grads[UNROLL][V];
            const int64_t first = (of.first + s) * conv.dim + c;
            const T* inputs = static_cast<const T*>(conv.x) + (of.first + s) * conv.token_stride + c;
            const T* outputs = static_cast<const T*>(args.grad_y) + first;
#pragma unroll
            for (int i = 0; i < UNROLL; i++) {
                if (INTERIOR) {
                    load<V, true>(tokens[i], inputs + i * conv.token_stride);
                } else {
                    load_token<V, T>(tokens[i], conv, of, s + i, c);
                }
                if (args.grad_y && (INTERIOR || (s + i >= 0 && s + i < of.length))) {
                    load<V, true>(grads[i], outputs + static_cast<int64_t>(i) * conv.dim);
                } else {
#pragma unroll
                    for (int v = 0; v < V; v++) grads[i][v] = 0.0f;
                }
            }
            T* finished = static_cast<T*>(args.dx) + first - static_cast<int64_t>(TAPS - 1) * conv.dim;
#pragma unroll
            for (int i = 0; i < UNROLL; i++) {
                const bool inside = INTERIOR || (s + i >= own && s + i < end);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    x[v][TAPS - 1 + i] = tokens[i][v];
                    const float* newest = x[v] + TAPS - 1 + i;
                    const float value =
                        grads[i][v] * slope(sum_taps<TAPS, ALL>(w[v], bias[v], newest, conv.width), conv.silu);
                    g[v][TAPS - 1 + i] = INTERIOR || (s + i >= 0 && s + i < of.length) ? value : 0.0f;
                    if (inside) {
                        db[v] += value;
#pragma unroll
                        for (int m = 0; m < TAPS; m++) dw[v][m] = fmaf(value, newest[-m], dw[v][m]);
                    }
                }
                const int t = s + i - (TAPS - 1);
                if (!INTERIOR && (t < start || t >= end)) continue;
                const int entry = !INTERIOR && args.grad_state ? final_entry(conv, of.length, t) : -1;
                float dx[V];
#pragma unroll
                for (int v = 0; v < V; v++) {
                    dx[v] = entry >= 0
                                ? args.grad_state[window_row(conv, of.sequence, c + v) * window + entry]
                                : 0.0f;
#pragma unroll
                    for (int m = 0; m < TAPS; m++)
                        if (ALL || m < conv.width) dx[v] = fmaf(w[v][m], g[v][i + m], dx[v]);
                }
                if (INTERIOR || t >= 0) {
                    if (args.dx) store<V, true>(finished + static_cast<int64_t>(i) * conv.dim, dx);
                } else if (args.dinitial) {
#pragma unroll
                    for (int v = 0; v < V; v++)
                        args.dinitial[window_row(conv, of.sequence, c + v) * window + window + t] = dx[v];
                }
            }
#pragma unroll
            for (int v = 0; v < V; v++)
#pragma unroll
                for (int i = 0; i < TAPS - 1; i++) {
                    x[v][i] = x[v][UNROLL + i];
                    g[v][i] = g[v][UNROLL + i];
                }
        };
        // Tokens near the end, to which the final window belongs, are finished by the last steps.
        for (int s = start; s < end + TAPS - 1; s += UNROLL) {
            if (s >= own + TAPS - 1 && s + UNROLL <= end)
                steps(std::true_type{}, s);
            else
                steps(std::false_type{}, s);
        }
    }
    if (!args.dweight && !args.dbias) return;
#pragma unroll
    for (int v = 0; v < V; v++) {
        scratch[threadIdx.y][TAPS * V + v][threadIdx.x] = db[v];
#pragma unroll
        for (int m = 0; m < TAPS; m++) scratch[threadIdx.y][m * V + v][threadIdx.x] = dw[v][m];
    }
    __syncthreads();
    for (int k = threadIdx.y; k < (TAPS + 1) * V; k += RUNS) {
        float sum = 0.0f;
        for (int run = 0; run < RUNS; run++) sum += scratch[run][k][threadIdx.x];
        const int m = k / V, channel = c + k % V;
        if (channel >= conv.dim) continue;
        const int64_t at = static_cast<int64_t>(blockIdx.x) * conv.dim + channel;
        if (m == TAPS) {
            if (args.dbias) args.dbias.set(at, sum);
        } else if (m < conv.width && args.dweight) {
            args.dweight.set(at * conv.width + conv.width - 1 - m, sum);
        }
    }
}

// ---- The step: a thread has a channel of a batch element.

template <typename T, int TAPS>
__device__ void update(const ConvUpdate& args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= static_cast<int64_t>(args.batch) * args.dim) return;
    const int b = row / args.dim, c = row % args.dim;
    const int window = args.width - 1, place = args.states ? args.states[b] : b;
    const int64_t first = static_cast<int64_t>(b) * args.dim * args.seqlen + c * args.channel_stride;
    if (place < 0) {
        for (int t = 0; t < args.seqlen; t++) static_cast<T*>(args.y)[first + t * args.token_stride] = from_float<T>(0.0f);
        return;
    }
    float* state = args.state + (static_cast<int64_t>(place) * args.dim + c) * window;
    float w[TAPS], x[TAPS];  // x[m] is the input m tokens ago
#pragma unroll
    for (int m = 0; m < TAPS; m++) {
        w[m] = m <= window ? args.weight.get(static_cast<int64_t>(c) * args.width + window - m) : 0.0f;
        x[m] = m > 0 && m <= window ? state[window - m] : 0.0f;
    }
    const float bias = args.bias ? args.bias.get(c) : 0.0f;
    for (int t = 0; t < args.seqlen; t++) {
        if (t > 0) {
#pragma unroll
            for (int m = TAPS - 1; m > 0; m--) x[m] = x[m - 1];
        }
        const int64_t at = first + t * args.token_stride;
        x[0] = to_float(static_cast<const T*>(args.x)[at]);
        float sum = bias;
#pragma unroll
        for (int m = 0; m < TAPS; m++)
            if (m <= window) sum = fmaf(w[m], x[m], sum);
        static_cast<T*>(args.y)[at] = from_float<T>(activate(sum, args.silu));
    }
    if (args.seqlen == 0) return;
#pragma unroll
    for (int m = 0; m < TAPS - 1; m++)
        if (m < window) state[window - 1 - m] = x[m];
}

// A filter of exactly TAPS taps has a body of its own.
#define SEQUENCE_KERNEL(symbol, bound, Args, body, T, taps, packs)                                  \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Args args) { \
        if (args.conv.width == taps)                                                               \
            body<T, taps, packs, true>(args);                                                      \
        else                                                                                       \
            body<T, taps, packs, false>(args);                                                     \
    }
// Of one width, or of narrower filters.
#define WIDTH_KERNEL(symbol, bound, Args, body, T, taps, packs, all)                               \
    extern "C" __global__ void __launch_bounds__ bound symbol(const __grid_constant__ Args args) { \
        body<T, taps, packs, all>(args);                                                           \
    }
#define UPDATE_KERNEL(symbol, T, taps)                                                                \
    extern "C" __global__ void __launch_bounds__(128) symbol(const __grid_constant__ ConvUpdate args) { \
        update<T, taps>(args);                                                                        \
    }
#define INSTANTIATE(T, name)                                                                                              \
    SEQUENCE_KERNEL(causal_conv1d_fwd_first4v_##name, (128, 16), ConvForward, forward_first, T, 4, true)                      \
    SEQUENCE_KERNEL(causal_conv1d_fwd_first4_##name, (128), ConvForward, forward_first, T, 4, false)                      \
    SEQUENCE_KERNEL(causal_conv1d_fwd_first8_##name, (128), ConvForward, forward_first, T, 8, false)                      \
    SEQUENCE_KERNEL(causal_conv1d_bwd_first4v_##name, (128), ConvBackward, backward_first, T, 4, true)                    \
    SEQUENCE_KERNEL(causal_conv1d_bwd_first4_##name, (128), ConvBackward, backward_first, T, 4, false)                    \
    SEQUENCE_KERNEL(causal_conv1d_bwd_first8_##name, (128), ConvBackward, backward_first, T, 8, false)                    \
    WIDTH_KERNEL(causal_conv1d_fwd_last4v_##name, (128), ConvForward, forward_last, T, 4, 4, true)                        \
    WIDTH_KERNEL(causal_conv1d_fwd_last3v_##name, (128), ConvForward, forward_last, T, 4, 4, false)                       \
    SEQUENCE_KERNEL(causal_conv1d_fwd_last4_##name, (128), ConvForward, forward_last, T, 4, 1)                            \
    SEQUENCE_KERNEL(causal_conv1d_fwd_last8_##name, (128), ConvForward, forward_last, T, 8, 1)                            \
    SEQUENCE_KERNEL(causal_conv1d_bwd_last4v_##name, (256, 2), ConvBackward, backward_last, T, 4, 4)                      \
    SEQUENCE_KERNEL(causal_conv1d_bwd_last4_##name, (256, 2), ConvBackward, backward_last, T, 4, 1)                       \
    SEQUENCE_KERNEL(causal_conv1d_bwd_last8_##name, (256, 2), ConvBackward, backward_last, T, 8, 1)                       \
    UPDATE_KERNEL(causal_conv1d_update4_##name, T, 4)                                                                     \
    UPDATE_KERNEL(causal_conv1d_update8_##name, T, 8)

FOR_EACH_DTYPE(INSTANTIATE)
