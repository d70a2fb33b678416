// A token of each row, drawn from what temperature, top-k, top-p and min-p leave of it: a row a block.
//
// Masses are integers, exp(s - max s) in units of 2^-40, so that sums do not depend on the order of additions, and the same draw gives
// the same token each time. Whatever is looked for, the last token that top-k or top-p keeps or the one that is drawn, is the first in
// an order at which a running sum reaches a number. So it is found in three steps: sums of 2048 bins, the bin in which the sum is
// reached, and the few tokens of that bin one by one.

#include "elem.cuh"
#include "reduce.cuh"

constexpr int THREADS = 1024, BINS = 2 * THREADS, LIST = THREADS, ROWS = 64;
constexpr uint32_t NO_TOKEN = 0xffffffffu;

struct Draw {
    double top_p;     // 1 for all
    double min_p;     // its logarithm; minus infinity for all
    double uniform;   // at least 0, below 1
    float temperature;  // 0 for the likeliest
    int top_k;        // len for all
};
static_assert(sizeof(Draw) == 32, "as in sample/cuda.rs");

struct Sample {
    const void* logits;  // (rows, len)
    uint32_t* ids;       // (rows)
    int64_t len;
    Draw draws[ROWS];
};
static_assert(sizeof(Sample) == 24 + 32 * ROWS, "as in sample/cuda.rs");

// Bits that are the smaller the larger x is; of no NaN.
__device__ inline uint32_t descending(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

// A number for all threads, made by an associative operation from one of each.
template <typename X, typename Op> __device__ X block_reduce(X x, Op op) {
    __shared__ X of_warps[THREADS / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, offset));
    __syncthreads();  // what was there has been read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// The sum of what the threads before this one have.
__device__ inline uint64_t sum_before(uint64_t own) {
    __shared__ uint64_t of_warps[THREADS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t x = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(ALL_LANES, x, offset);
        if (lane >= offset) x += other;
    }
    __syncthreads();
    if (lane == 31) of_warps[warp] = x;
    __syncthreads();
    for (int w = 0; w < warp; w++) x += of_warps[w];
    return x - own;
}

// What tokens count for, up to and with one in an order.
struct Sum {
    uint64_t mass;
    uint64_t count;
};

enum class By { MASS, COUNT };

// A token in an order: keys are different for different tokens, and smaller for those that come first.
struct Found {
    uint64_t key;
    Sum sum;
};

// Sums of bins, then of all bins up to one; the tokens of one bin; what was found among them.
struct Shared {
    uint32_t count[BINS], low[BINS], high[BINS];
    uint64_t key[LIST], mass[LIST];
    int listed, bin;
    Sum before;
    Found found;
};

template <typename T> struct Row {
    const T* logits;
    int len;
    float scale;        // what logits are divided by
    float largest;      // of the logits
    float top;          // of the scaled ones
    double min_p;
    uint64_t last;      // the key of the last token that is kept, in the order of ranks
    float bins_a_unit;  // how finely differences to the largest are told apart at first

    // As Temperature in mamba-generate.
    __device__ float scaled(int i) const {
        const float x = to_float(logits[i]) + 0.0f;  // -0 is 0
        const bool fits = isfinite(largest / scale);
        return fits ? x / scale : static_cast<float>((static_cast<double>(x) - largest) / scale);
    }
    // Larger logits first, then smaller ids.
    __device__ uint64_t rank(float s, int i) const { return static_cast<uint64_t>(descending(s)) << 32 | i; }
    __device__ bool kept(float s, int i) const {
        return rank(s, i) <= last && static_cast<double>(s) - top >= min_p;
    }
    __device__ uint64_t mass(float s) const { return static_cast<uint64_t>(expf(s - top) * 1099511627776.0f); }

    __device__ uint64_t kept_mass() const {
        uint64_t sum = 0;
        for (int i = threadIdx.x; i < len; i += THREADS) {
            const float s = scaled(i);
            if (kept(s, i)) sum += mass(s);
        }
        return block_reduce(sum, [](uint64_t a, uint64_t b) { return a + b; });
    }
};

// A range of keys, cut into bins of one width.
struct Range {
    uint64_t first, width;

    __device__ int bin(uint64_t key) const { return static_cast<int>((key - first) / width); }
};

// Sums up masses and counts by bins: `at(i)` says whether token i takes part, in which bin, and with what mass.
template <typename At> __device__ void fill(Shared& shared, int len, At at) {
    for (int b = threadIdx.x; b < BINS; b += THREADS) shared.count[b] = shared.low[b] = shared.high[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < len; i += THREADS) {
        int bin;
        uint64_t mass;
        if (!at(i, bin, mass)) continue;
        atomicAdd(&shared.count[bin], 1);
        if (mass == 0) continue;
        const uint32_t low = static_cast<uint32_t>(mass), old = atomicAdd(&shared.low[bin], low);
        const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old);
        if (high) atomicAdd(&shared.high[bin], high);
    }
    __syncthreads();
}

// The bin in which the sum reaches `wanted`, and the sum before it; the sum of all bins reaches it.
__device__ inline void find_bin(Shared& shared, By by, uint64_t wanted, Sum before) {
    const int b = 2 * threadIdx.x;
    const auto mass = [&](int b) { return static_cast<uint64_t>(shared.high[b]) << 32 | shared.low[b]; };
    const uint64_t masses[2] = {mass(b), mass(b + 1)};
    const uint64_t counts[2] = {shared.count[b], shared.count[b + 1]};
    Sum sum = {before.mass + sum_before(masses[0] + masses[1]), before.count + sum_before(counts[0] + counts[1])};
    for (int i = 0; i < 2; i++) {
        const Sum next = {sum.mass + masses[i], sum.count + counts[i]};
        const bool here = by == By::MASS ? sum.mass < wanted && wanted <= next.mass : sum.count < wanted && wanted <= next.count;
        if (here) {
            shared.bin = b + i;
            shared.before = sum;
        }
        sum = next;
    }
    __syncthreads();
}

// The first token at which the sum over all in the order of `key` reaches `wanted`: `key(i, k, mass)` says whether token i takes part,
// with its key and its mass; `first(k, mass)` is its bin at first, by any function that does not fall while keys rise.
template <typename Key, typename First>
__device__ Found find(Shared& shared, int len, By by, uint64_t wanted, Key key, First first) {
    Range range = {0, 0};  // of the first bins, none
    const auto bin_of = [&](int i, int& bin, uint64_t& mass) {
        uint64_t k;
        if (!key(i, k, mass)) return false;
        if (range.width == 0) {
            bin = first(i, k);
            return true;
        }
        if (k < range.first || (k - range.first) / range.width >= BINS) return false;
        bin = range.bin(k);
        return true;
    };
    Sum before = {0, 0};
    while (true) {
        fill(shared, len, bin_of);
        find_bin(shared, by, wanted, before);
        const int bin = shared.bin;
        before = shared.before;
        if (shared.count[bin] <= LIST) break;
        // Too many, as where all logits are alike: the keys of this bin into bins again.
        uint64_t least = ~0ull, most = 0;
        for (int i = threadIdx.x; i < len; i += THREADS) {
            int b;
            uint64_t k, mass;
            if (!bin_of(i, b, mass) || b != bin) continue;
            key(i, k, mass);
            least = min(least, k), most = max(most, k);
        }
        least = block_reduce(least, [](uint64_t a, uint64_t b) { return min(a, b); });
        most = block_reduce(most, [](uint64_t a, uint64_t b) { return max(a, b); });
        range = {least, (most - least) / BINS + 1};
    }
    const int bin = shared.bin;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < len; i += THREADS) {
        int b;
        uint64_t k, mass;
        if (!bin_of(i, b, mass) || b != bin) continue;
        key(i, k, mass);
        const int at = atomicAdd(&shared.listed, 1);
        shared.key[at] = k;
        shared.mass[at] = mass;
    }
    __syncthreads();
    // In no order: each finds its own place among the others.
    const int listed = shared.listed, own = threadIdx.x;
    if (own < listed) {
        const uint64_t k = shared.key[own], mass = shared.mass[own];
        Sum sum = before;
        for (int other = 0; other < listed; other++) {
            if (shared.key[other] > k) continue;
            sum.mass += shared.mass[other];
            sum.count++;
        }
        const bool here = by == By::MASS ? sum.mass - mass < wanted && wanted <= sum.mass : sum.count == wanted;
        if (here) shared.found = {k, sum};
    }
    __syncthreads();
    return shared.found;
}

// The first sum that is at least a part of a whole which is not 0.
__device__ inline uint64_t at_least(double part, uint64_t whole) {
    const auto sum = static_cast<uint64_t>(ceil(part * static_cast<double>(whole)));
    return min(max(sum, static_cast<uint64_t>(1)), whole);
}

template <typename T> __device__ uint32_t sample(const T* logits, int len, const Draw& draw) {
    __shared__ Shared shared;
    // The likeliest, and whether there is anything to choose from.
    uint64_t best = ~0ull;
    float least = INFINITY;
    bool numbers = true;
#pragma unroll 4
    for (int i = threadIdx.x; i < len; i += THREADS) {
        const float x = to_float(logits[i]) + 0.0f;
        numbers &= x < INFINITY;
        if (isfinite(x)) {
            best = min(best, static_cast<uint64_t>(descending(x)) << 32 | i);
            least = fminf(least, x);
        }
    }
    if (!__syncthreads_and(numbers)) return NO_TOKEN;
    best = block_reduce(best, [](uint64_t a, uint64_t b) { return min(a, b); });
    if (best == ~0ull) return NO_TOKEN;
    const auto likeliest = static_cast<uint32_t>(best);
    if (draw.temperature == 0.0f) return likeliest;
    least = block_reduce(least, [](float a, float b) { return fminf(a, b); });

    Row<T> row = {logits, len, draw.temperature, to_float(logits[likeliest]), 0.0f, -INFINITY, ~0ull, 0.0f};
    row.top = row.scaled(likeliest);
    // What is 28 below the largest has no mass.
    const float spread = fminf((row.largest - least) / draw.temperature, 28.0f);
    row.bins_a_unit = spread > 0.0f ? (BINS - 1) / spread : 0.0f;
    const auto by_rank = [&](int i, uint64_t& key, uint64_t& mass) {
        const float s = row.scaled(i);
        key = row.rank(s, i);
        mass = row.mass(s);
        return true;
    };
    const auto rank_bin = [&](int i, uint64_t) {
        return static_cast<int>(fminf((row.top - row.scaled(i)) * row.bins_a_unit, BINS - 1));
    };

    bool ranked = false;
    uint64_t whole = 0;
    if (draw.top_k < len) {
        const Found last = find(shared, len, By::COUNT, draw.top_k, by_rank, rank_bin);
        row.last = last.key, whole = last.sum.mass, ranked = true;
    }
    if (draw.top_p < 1.0) {
        if (!ranked) whole = row.kept_mass();
        const Found last = find(shared, len, By::MASS, at_least(draw.top_p, whole), by_rank, rank_bin);
        row.last = last.key, whole = last.sum.mass, ranked = true;
    }
    if (isfinite(draw.min_p)) row.min_p = draw.min_p;
    if (!ranked || isfinite(draw.min_p)) whole = row.kept_mass();
    // The first sum that is above the drawn part.
    const auto wanted = min(static_cast<uint64_t>(draw.uniform * static_cast<double>(whole)), whole - 1) + 1;
    if (ranked) return static_cast<uint32_t>(find(shared, len, By::MASS, wanted, by_rank, rank_bin).key);
    const auto by_id = [&](int i, uint64_t& key, uint64_t& mass) {
        const float s = row.scaled(i);
        key = i;
        mass = row.kept(s, i) ? row.mass(s) : 0;
        return mass > 0;
    };
    const int width = len / BINS + 1;
    const auto id_bin = [&](int i, uint64_t) { return i / width; };
    return static_cast<uint32_t>(find(shared, len, By::MASS, wanted, by_id, id_bin).key);
}

#define SAMPLE(T, name)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_##name(const __grid_constant__ Sample args) { \
        const T* logits = static_cast<const T*>(args.logits) + blockIdx.x * args.len;                             \
        const uint32_t id = sample<T>(logits, static_cast<int>(args.len), args.draws[blockIdx.x]);                \
        if (threadIdx.x == 0) args.ids[blockIdx.x] = id;                                                           \
    }
FOR_EACH_DTYPE(SAMPLE)
