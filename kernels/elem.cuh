// Elements as they are stored, f32, f16 or bf16, and as they are computed with, f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

using f16 = __half;
using bf16 = __nv_bfloat16;

// Expands M(type, name) for each type of activations; kernels are called `op_name`.
#define FOR_EACH_DTYPE(M) M(float, f32) M(f16, f16) M(bf16, bf16)
#define FOR_EACH_16_BIT(M) M(f16, f16) M(bf16, bf16)

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(double x) { return static_cast<float>(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline double from_float<double>(float x) { return x; }
template <>
__device__ inline f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

__device__ inline void from_float2(f16* out, float a, float b) {
    *reinterpret_cast<__half2*>(out) = __floats2half2_rn(a, b);
}
__device__ inline void from_float2(bf16* out, float a, float b) {
    *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(a, b);
}

// N neighbours that are read or written at once, in accesses of at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    T values[N];
};

// N neighbouring elements. With VECTOR, `x` is aligned to a pack; else only the first `count` are there.
template <int N, bool VECTOR, typename T>
__device__ inline void load(float (&out)[N], const T* x, int count = N) {
    if constexpr (VECTOR) {
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(x);
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = to_float(pack.values[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = i < count ? to_float(x[i]) : 0.0f;
    }
}

template <int N, bool VECTOR, typename T>
__device__ inline void store(T* x, const float (&values)[N], int count = N) {
    if constexpr (VECTOR) {
        Pack<T, N> pack;
        if constexpr (sizeof(T) == 2 && N % 2 == 0) {
            // Two at once is one instruction.
#pragma unroll
            for (int i = 0; i < N; i += 2) from_float2(pack.values + i, values[i], values[i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) pack.values[i] = from_float<T>(values[i]);
        }
        *reinterpret_cast<Pack<T, N>*>(x) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < count) x[i] = from_float<T>(values[i]);
    }
}

// As `Pointer::new` in device.rs.
enum Dtype : int64_t { F32 = 0, F16 = 1, BF16 = 2, F64 = 3, U32 = 4, I64 = 5, I32 = 6 };

// A tensor whose dtype is known at run time alone, as parameters have it; null if absent.
struct Any {
    void* data;
    Dtype dtype;

    __device__ explicit operator bool() const { return data != nullptr; }

    // Calls f with the data as a typed pointer; all threads take the same branch.
    template <typename F>
    __device__ void visit(F f) const {
        switch (dtype) {
            case F32: return f(static_cast<float*>(data));
            case F16: return f(static_cast<f16*>(data));
            case BF16: return f(static_cast<bf16*>(data));
            default: return f(static_cast<double*>(data));
        }
    }

    __device__ float get(int64_t i) const {
        float value;
        visit([&](auto* x) { value = to_float(x[i]); });
        return value;
    }

    __device__ void set(int64_t i, float value) const {
        visit([&](auto* x) { x[i] = from_float<std::remove_pointer_t<decltype(x)>>(value); });
    }

    // N neighbours, as `load` and `store`.
    template <int N, bool VECTOR>
    __device__ void get(float (&out)[N], int64_t i, int count = N) const {
        visit([&](auto* x) { load<N, VECTOR>(out, x + i, count); });
    }

    template <int N, bool VECTOR>
    __device__ void set(int64_t i, const float (&values)[N], int count = N) const {
        visit([&](auto* x) { store<N, VECTOR>(x + i, values, count); });
    }

    // An index, of a tensor of integers.
    __device__ int64_t index(int64_t i) const {
        switch (dtype) {
            case U32: return static_cast<const uint32_t*>(data)[i];
            case I32: return static_cast<const int32_t*>(data)[i];
            default: return static_cast<const int64_t*>(data)[i];
        }
    }
};
static_assert(sizeof(Any) == 16, "as Pointer in device.rs");

// 2^x and 1/x on the special function unit, of which there are 16 a multiprocessor and clock: within 2 units of the last
// place; what is below the smallest normal number is 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(-LOG2_E * x)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }

// The derivative of silu.
__device__ inline float silu_slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// ln(1 + e^x); beyond 20 the difference to x is below the precision of x.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
