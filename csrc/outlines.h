// Outlines of label maps and of depth that follow the colours of the picture: joint bilateral filters near edges.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

template <typename Value>
using Plane = pybind11::array_t<Value, pybind11::array::c_style>;

// Labels [H, W] where each pixel near an edge has the label that most of its neighbourhood votes for. A vote weighs
// more the nearer the neighbour is and the more alike its colour; pixels at an edge hardly count. A label that would
// lose half of its pixels keeps them all.
Plane<uint8_t> outlines_of_labels(const Plane<uint8_t>& labels, const Plane<uint8_t>& image);

// Metres [H, W] where each pixel near a step has the mean of its neighbourhood, weighted in the same way; pixels on a
// slope hardly count, and those of 0 m are not known and stay so.
Plane<float> outlines_of_depth(const Plane<float>& metres, const Plane<uint8_t>& image);

}  // namespace datasetdm
