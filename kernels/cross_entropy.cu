// The loss of each row of logits, and its gradient by them.

#include "elem.cuh"
#include "reduce.cuh"

struct CrossEntropy {
    const float* logits;     // (rows, classes), before scaling; rows are `stride` apart, a multiple of V
    const int64_t* targets;  // (rows)
    void* grad;              // the same, may be the logits; null if it is not asked for
    float* losses;           // (rows)
    int64_t ignore_index;
    int classes, stride;
    float scale;
};
static_assert(sizeof(CrossEntropy) == 56, "as in linear_cross_entropy/cuda.rs");

constexpr int THREADS = 1024, V = 4;

// The largest so far, and the sum of exp(x - largest).
struct Total {
    float most = -INFINITY, sum = 0.0f;

    __device__ void add(float x) {
        if (x > most) {
            sum = sum * __expf(most - x) + 1.0f;
            most = x;
        } else if (x > -INFINITY) {
            sum += __expf(x - most);
        } else if (!(x == x)) {
            sum = x;
        }
    }

    __device__ void join(float other_most, float other_sum) {
        const float larger = fmaxf(most, other_most);
        if (larger == -INFINITY) {
            sum += other_sum;
            return;
        }
        sum = sum * __expf(most - larger) + other_sum * __expf(other_most - larger);
        most = larger;
    }
};

template <typename T> __device__ void cross_entropy(const CrossEntropy& p) {
    __shared__ Total of_warps[THREADS / 32];
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.stride;
    const float* x = p.logits + offset;
    const int64_t target = p.targets[blockIdx.x];
    const bool ignored = target == p.ignore_index;
    T* grad = p.grad ? static_cast<T*>(p.grad) + offset : nullptr;
    if (ignored) {
        if (threadIdx.x == 0) p.losses[blockIdx.x] = 0.0f;
        if (grad) for (int i = threadIdx.x; i < p.classes; i += THREADS) grad[i] = from_float<T>(0.0f);
        return;
    }

    Total total;
    for (int first = threadIdx.x * V; first < p.classes; first += THREADS * V) {
        float values[V];
        load<V, true>(values, x + first);
#pragma unroll
        for (int v = 0; v < V; v++) if (first + v < p.classes) total.add(p.scale * values[v]);
    }
    const auto join = [&]() {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float most = __shfl_xor_sync(ALL_LANES, total.most, offset);
            const float sum = __shfl_xor_sync(ALL_LANES, total.sum, offset);
            total.join(most, sum);
        }
    };
    join();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = total;
    __syncthreads();
    total = of_warps[threadIdx.x % 32];
    join();

    // A target that is no class gives no number, as far as it matters.
    const bool known = target >= 0 && target < p.classes;
    if (threadIdx.x == 0) {
        const float wanted = known ? p.scale * x[target] : NAN;
        p.losses[blockIdx.x] = logf(total.sum) - (wanted - total.most);
    }
    if (!grad) return;
    __syncthreads();  // the wanted logit is read: the gradient may take its place
    const float factor = known ? p.scale / total.sum : NAN;
    for (int first = threadIdx.x * V; first < p.classes; first += THREADS * V) {
        float values[V];
        load<V, true>(values, x + first);
#pragma unroll
        for (int v = 0; v < V; v++) {
            values[v] = factor * __expf(p.scale * values[v] - total.most) - (first + v == target ? p.scale : 0.0f);
        }
        store<V, true>(grad + first, values);  // behind the last class is nothing that anyone reads
    }
}

#define CROSS_ENTROPY(T, name)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                            \
        cross_entropy_##name(const __grid_constant__ CrossEntropy args) {          \
        cross_entropy<T>(args);                                                      \
    }
FOR_EACH_DTYPE(CROSS_ENTROPY)

// y = factor x.
struct Scaled {
    const void* x;
    const float* factor;
    void* y;
    int64_t len;
};
static_assert(sizeof(Scaled) == 32, "as in linear_cross_entropy/cuda.rs");

template <typename T> __device__ void scaled(const Scaled& p) {
    constexpr int PACK = 8;
    const int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * PACK;
    if (first >= p.len) return;
    const T* const x = static_cast<const T*>(p.x) + first;
    T* const y = static_cast<T*>(p.y) + first;
    const float factor = *p.factor;
    // `x` may begin anywhere: the numbers of a view.
    const bool whole = p.len - first >= PACK && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const int count = static_cast<int>(min(p.len - first, int64_t(PACK)));
    float values[PACK];
    if (whole) load<PACK, true>(values, x); else load<PACK, false>(values, x, count);
#pragma unroll
    for (int i = 0; i < PACK; i++) values[i] *= factor;
    if (whole) store<PACK, true>(y, values); else store<PACK, false>(y, values, count);
}

#define SCALED(T, name)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) scaled_##name(const __grid_constant__ Scaled args) { \
        scaled<T>(args);                                                                                  \
    }
FOR_EACH_DTYPE(SCALED)
