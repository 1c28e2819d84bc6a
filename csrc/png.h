// PNG files of images and label maps; the bytes depend on the pixels alone.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

using Bytes = pybind11::array_t<uint8_t, pybind11::array::c_style>;
using Words = pybind11::array_t<uint16_t, pybind11::array::c_style>;

// [H, W, 3] as a colour image, [H, W] as a grey one, or as palette numbers where `palette` holds 3 bytes a colour.
pybind11::bytes png_encode(const Bytes& pixels, const std::string& palette);
pybind11::bytes png_encode_words(const Words& pixels);  // [H, W] as 16-bit grey

// How often each value stands in the pixels: [256] int64.
pybind11::array_t<int64_t> count_bytes(const Bytes& pixels);

}  // namespace datasetdm
