// The last step of sums over blocks: adds the rows of a matrix of partial sums, always in the same order; and, where outputs are
// sums over neighbouring columns too, those.

#include "elem.cuh"
#include "reduce.cuh"

struct SumRows {
    const float* matrix;  // (rows, columns)
    Any out;              // (columns)
    int64_t rows, columns;
};
static_assert(sizeof(SumRows) == 40, "as in device.rs");

constexpr int COLUMNS = 32, LANES = 16;

extern "C" __global__ void __launch_bounds__(COLUMNS* LANES) sum_rows(const SumRows args) {
    __shared__ float sums[LANES][COLUMNS + 1];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < args.columns) {
#pragma unroll 4
        for (int64_t row = threadIdx.y; row < args.rows; row += LANES) sum += args.matrix[row * args.columns + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < args.columns) {
        for (int lane = 1; lane < LANES; lane++) sum += sums[lane][threadIdx.x];
        args.out.set(column, sum);
    }
}

struct SumGroups {
    const float* matrix;  // (rows, groups, columns)
    Any out;              // (groups)
    int64_t rows, columns;
};
static_assert(sizeof(SumGroups) == 40, "as in device.rs");

constexpr int THREADS = 512;

extern "C" __global__ void __launch_bounds__(THREADS) sum_groups(const SumGroups args) {
    __shared__ float scratch[THREADS / 32];
    const int64_t group = blockIdx.x, groups = gridDim.x;
    float sum[1] = {0.0f};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < args.rows * args.columns; i += THREADS) {
        const int64_t row = i / args.columns;
        sum[0] += args.matrix[(row * groups + group) * args.columns + (i - row * args.columns)];
    }
    block_sum(sum, scratch, threadIdx.x / 32, THREADS / 32);
    if (threadIdx.x == 0) args.out.set(group, sum[0]);
}
