#include "label_bytes.h"

#include "device_guard.h"

namespace {

constexpr int kThreads = 256;

// A thread walks the classes of one pixel: neighbouring threads read neighbouring scores of each class.
__global__ void pack_labels_kernel(const float* scores, int64_t total, int64_t classes, int64_t pixels, uint8_t* labels, float* largest) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= total) return;
    const datasetdm::Best best = datasetdm::best_class(scores + i / pixels * classes * pixels + i % pixels, classes, pixels);
    labels[i] = best.label;
    if (largest) largest[i] = best.score;
}

__global__ void pack_image_kernel(const float* decoded, int64_t total, int64_t pixels, uint8_t* bytes) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= total) return;
    const float* source = decoded + i / pixels * 3 * pixels + i % pixels;
    for (int c = 0; c < 3; ++c) bytes[i * 3 + c] = datasetdm::image_byte(source[c * pixels]);
}

unsigned blocks(int64_t total) { return static_cast<unsigned>((total + kThreads - 1) / kThreads); }

}  // namespace

extern "C" int datasetdm_pack_labels(const float* scores, int64_t images, int64_t classes, int64_t pixels, uint8_t* labels, float* largest, void* stream) {
    const datasetdm::DeviceGuard guard(scores);
    if (guard.code != cudaSuccess) return guard.code;
    const int64_t total = images * pixels;
    pack_labels_kernel<<<blocks(total), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(scores, total, classes, pixels, labels, largest);
    return cudaGetLastError();
}

extern "C" int datasetdm_pack_image(const float* decoded, int64_t images, int64_t pixels, uint8_t* bytes, void* stream) {
    const datasetdm::DeviceGuard guard(decoded);
    if (guard.code != cudaSuccess) return guard.code;
    const int64_t total = images * pixels;
    pack_image_kernel<<<blocks(total), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(decoded, total, pixels, bytes);
    return cudaGetLastError();
}
