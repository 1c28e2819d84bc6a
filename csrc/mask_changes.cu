#include "mask_columns.h"

#include "device_guard.h"

namespace {

using datasetdm::Column;

constexpr int kThreads = 128;
constexpr int kScanThreads = 1024;

__global__ void clear_kernel(int64_t count, int64_t* starts, unsigned long long* areas, int32_t* extents) {
    const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (n == 0) starts[0] = 0;
    if (n >= count) return;
    areas[n] = 0;
    extents[n * 4] = extents[n * 4 + 1] = INT32_MAX;
    extents[n * 4 + 2] = extents[n * 4 + 3] = -1;
}

// A thread walks one column: neighbouring threads read neighbouring bytes of each row. blockIdx.y goes on from mask to mask.
__global__ void count_kernel(const uint8_t* masks, int64_t count, int64_t height, int64_t width, int64_t* starts, unsigned long long* areas, int32_t* extents) {
    const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (x >= width) return;
    for (int64_t n = blockIdx.y; n < count; n += gridDim.y) {
        const Column column = datasetdm::read_column(masks + n * height * width, height, width, x);
        starts[n * width + x + 1] = column.changes;
        if (!column.area) continue;
        atomicAdd(areas + n, static_cast<unsigned long long>(column.area));
        atomicMin(extents + n * 4, static_cast<int32_t>(x));
        atomicMin(extents + n * 4 + 1, column.top);
        atomicMax(extents + n * 4 + 2, static_cast<int32_t>(x));
        atomicMax(extents + n * 4 + 3, column.bottom);
    }
}

__device__ int64_t warp_scan(int64_t value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const int64_t earlier = __shfl_up_sync(0xffffffffu, value, offset);
        if (threadIdx.x % 32 >= offset) value += earlier;
    }
    return value;
}

// Running sums in place, by one block: a hundred masks of 512 columns are fifty rounds of it.
__global__ void scan_kernel(int64_t* values, int64_t count) {
    __shared__ int64_t warps[kScanThreads / 32];
    int64_t carried = 0;
    for (int64_t start = 0; start < count; start += kScanThreads) {
        const int64_t i = start + threadIdx.x;
        int64_t value = warp_scan(i < count ? values[i] : 0);
        if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = value;
        __syncthreads();
        if (threadIdx.x < 32) warps[threadIdx.x] = warp_scan(warps[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x >= 32) value += warps[threadIdx.x / 32 - 1];
        if (i < count) values[i] = carried + value;
        carried += warps[kScanThreads / 32 - 1];
        __syncthreads();
    }
}

__global__ void write_kernel(const uint8_t* masks, int64_t count, int64_t height, int64_t width, const int64_t* starts, int32_t* places) {
    const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (x >= width) return;
    for (int64_t n = blockIdx.y; n < count; n += gridDim.y) {
        const int64_t at = n * width + x;
        if (starts[at + 1] > starts[at]) datasetdm::write_column(masks + n * height * width, height, width, x, places + starts[at]);
    }
}

dim3 column_grid(int64_t count, int64_t width) {
    return dim3(static_cast<unsigned>((width + kThreads - 1) / kThreads), static_cast<unsigned>(count < 65535 ? count : 65535));
}

}  // namespace

extern "C" int datasetdm_mask_starts(const uint8_t* masks, int64_t count, int64_t height, int64_t width, int64_t* starts, int64_t* areas, int32_t* extents, void* stream) {
    const datasetdm::DeviceGuard guard(masks);
    if (guard.code != cudaSuccess) return guard.code;
    const cudaStream_t current = static_cast<cudaStream_t>(stream);
    unsigned long long* const sums = reinterpret_cast<unsigned long long*>(areas);
    clear_kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, current>>>(count, starts, sums, extents);
    count_kernel<<<column_grid(count, width), kThreads, 0, current>>>(masks, count, height, width, starts, sums, extents);
    scan_kernel<<<1, kScanThreads, 0, current>>>(starts + 1, count * width);
    return cudaGetLastError();
}

extern "C" int datasetdm_mask_places(const uint8_t* masks, int64_t count, int64_t height, int64_t width, const int64_t* starts, int32_t* places, void* stream) {
    const datasetdm::DeviceGuard guard(masks);
    if (guard.code != cudaSuccess) return guard.code;
    write_kernel<<<column_grid(count, width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(masks, count, height, width, starts, places);
    return cudaGetLastError();
}
