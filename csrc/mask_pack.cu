#include <cstdint>

#include "device_guard.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kPixelsPerBlock = 16 * kThreads;

// blockIdx.x = mask, blockIdx.y = piece of it; one atomic a block keeps the areas exact and the traffic negligible.
__global__ void threshold_masks_kernel(const float* logits, int64_t pixels, float threshold, uint8_t* masks, unsigned long long* areas) {
    const int64_t base = static_cast<int64_t>(blockIdx.x) * pixels;
    int set = 0;
    for (int64_t start = blockIdx.y * kPixelsPerBlock; start < pixels; start += gridDim.y * kPixelsPerBlock) {
        const int64_t end = min(start + kPixelsPerBlock, pixels);
        for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
            const bool above = logits[base + i] > threshold;
            masks[base + i] = above;
            set += above;
        }
    }
    for (int offset = 16; offset; offset >>= 1) set += __shfl_down_sync(0xffffffffu, set, offset);
    __shared__ int warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = set;
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long total = 0;
        for (int warp : warps) total += warp;
        if (total) atomicAdd(areas + blockIdx.x, total);
    }
}

}  // namespace

extern "C" int datasetdm_threshold_masks(const float* logits, int64_t count, int64_t pixels, float threshold, uint8_t* masks, int64_t* areas, void* stream) {
    const datasetdm::DeviceGuard guard(logits);
    if (guard.code != cudaSuccess) return guard.code;
    const cudaStream_t current = static_cast<cudaStream_t>(stream);
    const cudaError_t cleared = cudaMemsetAsync(areas, 0, count * sizeof(int64_t), current);
    if (cleared != cudaSuccess) return cleared;
    const int64_t pieces = (pixels + kPixelsPerBlock - 1) / kPixelsPerBlock;
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(pieces < 65535 ? pieces : 65535));
    threshold_masks_kernel<<<grid, kThreads, 0, current>>>(logits, pixels, threshold, masks, reinterpret_cast<unsigned long long*>(areas));
    return cudaGetLastError();
}
