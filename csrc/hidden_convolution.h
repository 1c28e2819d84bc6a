// The end of the depth head in training: bias, ReLU and the 3x3 convolution to one plane, forwards and backwards, in one pass each over the
// wide map.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

template <typename Real>
using Array = pybind11::array_t<Real, pybind11::array::c_style>;

// Writes the convolution of relu(hidden + bias) into `out` [B, H, W]. `hidden` [B, C, H, W], `bias` [C], `last` [9, C].
// `vector_bytes` 0 takes the widest instructions of this CPU.
template <typename Real>
void hidden_convolution(const Array<Real>& hidden, const Array<Real>& bias, const Array<Real>& last, Array<Real> out, int64_t threads, int64_t vector_bytes);

// Writes what a gradient [B, H, W] of that answer is to `hidden`, `bias` and `last`, each into an array of its shape.
template <typename Real>
void hidden_convolution_gradient(const Array<Real>& hidden, const Array<Real>& bias, const Array<Real>& last, const Array<Real>& gradient,
                                 Array<Real> to_hidden, Array<Real> to_bias, Array<Real> to_last, int64_t threads, int64_t vector_bytes);

}  // namespace datasetdm
