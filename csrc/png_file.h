// The bytes of a PNG file, without Python: what the bindings of png.h call, and what csrc/fuzz feeds with anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace datasetdm {

enum Colour : uint8_t { kGrey = 0, kRgb = 2, kPalette = 3 };

// Pixels of `step` bytes and `bits` a channel, row by row; `palette` holds 3 bytes a colour where the colours are
// numbers.
std::vector<uint8_t> png_file(const uint8_t* pixels, size_t height, size_t width, size_t step, uint8_t bits,
                              Colour colour, const std::string& palette);

}  // namespace datasetdm
