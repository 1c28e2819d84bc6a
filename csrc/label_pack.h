// What leaves the GPU as bytes: the class of every pixel, and the picture.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

// scores [B, K, P] -> labels [B, P] uint8 and the largest score [B, P]; of equals the lowest class, of NaNs the first.
pybind11::tuple pack_labels(const pybind11::array_t<float, pybind11::array::c_style>& scores);
void pack_labels_cuda(uintptr_t scores, int64_t images, int64_t classes, int64_t pixels, uintptr_t labels, uintptr_t largest, uintptr_t stream);

// decoded [B, 3, P] of -1 .. 1 -> [B, P, 3] uint8, cut off as upstream does it; a NaN becomes 0.
pybind11::array_t<uint8_t> pack_image(const pybind11::array_t<float, pybind11::array::c_style>& decoded);
void pack_image_cuda(uintptr_t decoded, int64_t images, int64_t pixels, uintptr_t bytes, uintptr_t stream);

}  // namespace datasetdm

// Both return a CUDA error code, 0 for success; `largest` may be null.
extern "C" int datasetdm_pack_labels(const float* scores, int64_t images, int64_t classes, int64_t pixels, uint8_t* labels, float* largest, void* stream);
extern "C" int datasetdm_pack_image(const float* decoded, int64_t images, int64_t pixels, uint8_t* bytes, void* stream);
