#include "png.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "check.h"
#include "png_file.h"
#include "released_gil.h"

namespace py = pybind11;

namespace datasetdm {
namespace {

py::bytes as_bytes(const std::vector<uint8_t>& file) {
    return py::bytes(reinterpret_cast<const char*>(file.data()), file.size());
}

}  // namespace

py::bytes png_encode(const Bytes& pixels, const std::string& palette) {
    require(pixels.ndim() == 2 || (pixels.ndim() == 3 && pixels.shape(2) == 3),
            "png_encode: pixels must be [H, W] or [H, W, 3]");
    require(palette.size() % 3 == 0 && palette.size() <= 768, "png_encode: ", palette.size(),
            " bytes of palette, expected 3 for each of at most 256 colours");
    require(palette.empty() || pixels.ndim() == 2, "png_encode: only pixels [H, W] can have a palette");
    const int64_t height = pixels.shape(0), width = pixels.shape(1);
    require_size("png_encode", height, width);
    const uint8_t* source = pixels.data();
    const Colour colour = !palette.empty() ? kPalette : pixels.ndim() == 3 ? kRgb : kGrey;
    if (colour == kPalette) {
        const uint8_t largest = *std::max_element(source, source + pixels.size());
        require(largest < palette.size() / 3, "png_encode: pixel value ", int{largest},
                " has no colour in a palette of ", palette.size() / 3);
    }
    std::vector<uint8_t> file;
    {
        ReleasedGil release;
        file = png_file(source, height, width, colour == kRgb ? 3 : 1, 8, colour, palette);
    }
    return as_bytes(file);
}

py::bytes png_encode_words(const Words& pixels) {
    require(pixels.ndim() == 2, "png_encode_words: pixels have ", pixels.ndim(), " dimensions, expected 2: [H, W]");
    const int64_t height = pixels.shape(0), width = pixels.shape(1);
    require_size("png_encode_words", height, width);
    const uint16_t* source = pixels.data();
    std::vector<uint8_t> file;
    {
        ReleasedGil release;
        std::vector<uint8_t> bytes(2 * height * width);
        for (int64_t k = 0; k < height * width; ++k)
            bytes[2 * k] = static_cast<uint8_t>(source[k] >> 8), bytes[2 * k + 1] = static_cast<uint8_t>(source[k]);
        file = png_file(bytes.data(), height, width, 2, 16, kGrey, "");
    }
    return as_bytes(file);
}

py::array_t<int64_t> count_bytes(const Bytes& pixels) {
    py::array_t<int64_t> counts(256);
    const uint8_t* source = pixels.data();
    int64_t* target = counts.mutable_data();
    ReleasedGil release;
    std::array<std::array<uint32_t, 256>, 4> parts{};  // four, as equal neighbours would wait for each other
    const int64_t size = pixels.size();
    for (int64_t k = 0; k < size; ++k) ++parts[k & 3][source[k]];
    for (size_t value = 0; value < 256; ++value)
        target[value] = int64_t{parts[0][value]} + parts[1][value] + parts[2][value] + parts[3][value];
    return counts;
}

}  // namespace datasetdm
