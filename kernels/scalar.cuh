// What scans compute token by token: powers, steps, and sums over lanes.
#pragma once

#include "elem.cuh"
#include "reduce.cuh"

constexpr float LN_2 = 0.693147180559945309f;

// ln(1 + e^x), relative to its value: ln(1 + e) for e in [0, 1] is e times a polynomial.
__device__ __forceinline__ float softplus_unit(float x) {
    const float e = fast_exp2(-LOG2_E * fabsf(x));
    float y = -0.0031760570127516985f;
    y = fmaf(y, e, 0.019542528316378593f);
    y = fmaf(y, e, -0.05637361481785774f);
    y = fmaf(y, e, 0.10543623566627502f);
    y = fmaf(y, e, -0.1526966691017151f);
    y = fmaf(y, e, 0.1966327428817749f);
    y = fmaf(y, e, -0.24951615929603577f);
    y = fmaf(y, e, 0.33329710364341736f);
    y = fmaf(y, e, -0.49999892711639404f);
    y = fmaf(y, e, 1.0f);
    return fmaf(y, e, fmaxf(x, 0.0f));
}

// N neighbouring elements on their way from memory, as they came: to unpack them is to wait for them.
template <typename T, int N> struct Raw {
    static constexpr int BYTES = N * sizeof(T);
    uint32_t words[(BYTES + 3) / 4];

    __device__ __forceinline__ void load(const T* from) {
        if constexpr (BYTES == 2) {
            words[0] = *reinterpret_cast<const uint16_t*>(from);
        } else if constexpr (BYTES == 4) {
            words[0] = *reinterpret_cast<const uint32_t*>(from);
        } else if constexpr (BYTES == 8) {
            const uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[1] = v.y;
        } else {
#pragma unroll
            for (int i = 0; i < BYTES / 16; i++) {
                const uint4 v = reinterpret_cast<const uint4*>(from)[i];
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (uint32_t& word : words) word = 0;
    }
    // Of a cleared one.
    __device__ __forceinline__ void set(int k, T x) {
        if constexpr (sizeof(T) == 4) {
            words[k] = __float_as_uint(to_float(x));
        } else {
            words[k / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(&x)) << (k % 2 * 16);
        }
    }
    __device__ __forceinline__ float get(int k) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[k]);
        } else {
            const uint16_t bits = words[k / 2] >> (k % 2 * 16);
            return to_float(*reinterpret_cast<const T*>(&bits));
        }
    }
};
