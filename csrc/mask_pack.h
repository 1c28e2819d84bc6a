// Logits -> boolean masks and their areas: a pixel is set where its logit is above the threshold (NaN never is).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

pybind11::tuple threshold_masks(const pybind11::array_t<float, pybind11::array::c_style>& logits, float threshold);
void threshold_masks_cuda(uintptr_t logits, int64_t count, int64_t height, int64_t width, float threshold, uintptr_t masks, uintptr_t areas, uintptr_t stream);

}  // namespace datasetdm

// Returns a CUDA error code, 0 for success: no CUDA header is needed to call it.
extern "C" int datasetdm_threshold_masks(const float* logits, int64_t count, int64_t pixels, float threshold, uint8_t* masks, int64_t* areas, void* stream);
