#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device_guard.h"
#include "guided_value.h"

// Not unnamed: nvcc would call it by the folder it is compiled in, and no two builds would be equal.
namespace datasetdm::guided_kernel {

constexpr int kThreads = 256;

__device__ float wide(float value) { return value; }
__device__ float wide(__half value) { return __half2float(value); }
__device__ float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename Output>
__global__ void guided_step_kernel(const Output* output, const float* latents, const float* history, int64_t slots,
                                   const float* numbers, float* next, int64_t size, int64_t with_text) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size) return;
    const datasetdm::Stepped stepped = datasetdm::guided_value(wide(output[i]), wide(output[with_text + i]), latents[i],
                                                               history + i, slots, size, numbers);
    next[i] = stepped.latent;
    next[size + i] = stepped.entry;
}

}  // namespace datasetdm::guided_kernel

extern "C" int datasetdm_guided_step(const void* output, int kind, const float* latents, const float* history,
                                     int64_t slots, const float* numbers, float* next, int64_t size, void* stream,
                                     int64_t rows) {
    using namespace datasetdm::guided_kernel;
    const datasetdm::DeviceGuard guard(latents);
    if (guard.code != cudaSuccess) return guard.code;
    const auto run = [&](const auto* typed) {
        guided_step_kernel<<<static_cast<unsigned>((size + kThreads - 1) / kThreads), kThreads, 0,
                             static_cast<cudaStream_t>(stream)>>>(typed, latents, history, slots, numbers, next, size,
                                                                  (rows - 1) * size);
    };
    if (kind == 0) run(static_cast<const float*>(output));
    if (kind == 1) run(static_cast<const __half*>(output));
    if (kind == 2) run(static_cast<const __nv_bfloat16*>(output));
    return cudaGetLastError();
}
