// The depth head after its matrix products: resize, shift and add the nine taps, ReLU, second convolution, without the
// wide map between; and the same backwards.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace datasetdm {

template <typename Real>
using Array = pybind11::array_t<Real, pybind11::array::c_style>;

// Adds the second convolution's answer for one slice of hidden channels to `logits` [B, H, H].
// `products` [B, h, h, 9, C]: what each of the 3 x 3 taps of the first convolution, bias aside, says of each cell;
// `bias` [C]; `last` [9, C]. The cells are resized to middle x middle, then to H x H. `vector_bytes` 0 takes the widest
// instructions of this CPU.
template <typename Real>
void depth_head_add(const Array<Real>& products, const Array<Real>& bias, const Array<Real>& last, int64_t middle,
                    Array<Real> logits, int64_t threads, int64_t vector_bytes);

// Writes what a gradient [B, H, H] of those logits is to `products`, `bias` and `last`, each into an array of its
// shape.
template <typename Real>
void depth_head_gradient(const Array<Real>& products, const Array<Real>& bias, const Array<Real>& last, int64_t middle,
                         const Array<Real>& gradient, Array<Real> to_products, Array<Real> to_bias, Array<Real> to_last,
                         int64_t threads, int64_t vector_bytes);

std::vector<int64_t> depth_head_vector_bytes();  // that this CPU has, widest first

// The width of vectors to take: `vector_bytes`, which this CPU must have, or its widest for 0.
int64_t chosen_vector_bytes(const char* name, int64_t vector_bytes);

}  // namespace datasetdm
