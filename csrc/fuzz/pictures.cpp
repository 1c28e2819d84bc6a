// Anything at all as pixels: the PNG file stays within its buffers, is framed as the format asks, and its stream is
// what inflating it gives back.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../deflate.h"
#include "../png_file.h"

namespace {

using namespace datasetdm;

void demand(bool holds) {
    if (!holds) std::abort();
}

// RFC 1951 the slow and plain way: one bit at a time, codes looked up by length and value.
class Inflating {
public:
    explicit Inflating(const std::vector<uint8_t>& stream) : stream_(stream) {}

    std::vector<uint8_t> run() {
        bool is_last = false;
        while (!is_last) {
            is_last = bits(1);
            switch (bits(2)) {
                case 0:
                    stored();
                    break;
                case 1:
                    fixed();
                    break;
                case 2:
                    dynamic();
                    break;
                default:
                    std::abort();
            }
        }
        return out_;
    }

    size_t used() const { return (place_ + 7) / 8; }

private:
    struct Code {
        std::vector<int> counts = std::vector<int>(16), symbols;
        explicit Code(const std::vector<int>& lengths) {
            for (const int length : lengths) ++counts[length];
            counts[0] = 0;
            for (int length = 1; length < 16; ++length)
                for (size_t symbol = 0; symbol < lengths.size(); ++symbol)
                    if (lengths[symbol] == length) symbols.push_back(static_cast<int>(symbol));
        }
    };

    int bits(int count) {
        int value = 0;
        for (int k = 0; k < count; ++k, ++place_) {
            demand(place_ / 8 < stream_.size());
            value |= (stream_[place_ / 8] >> place_ % 8 & 1) << k;
        }
        return value;
    }

    int symbol(const Code& code) {
        int value = 0, first = 0, index = 0;
        for (int length = 1; length < 16; ++length) {
            value |= bits(1);
            const int count = code.counts[length];
            if (value - count < first) return code.symbols[index + value - first];
            index += count;
            first = (first + count) << 1;
            value <<= 1;
        }
        std::abort();
    }

    void stored() {
        place_ = (place_ + 7) / 8 * 8;
        const int size = bits(16), check = bits(16);
        demand(size == (check ^ 0xffff));
        for (int k = 0; k < size; ++k) out_.push_back(static_cast<uint8_t>(bits(8)));
    }

    void fixed() {
        std::vector<int> lengths(288, 8);
        std::fill(lengths.begin() + 144, lengths.begin() + 256, 9);
        std::fill(lengths.begin() + 256, lengths.begin() + 280, 7);
        coded(Code(lengths), Code(std::vector<int>(30, 5)));
    }

    void dynamic() {
        const int literals = bits(5) + 257, distances = bits(5) + 1, count = bits(4) + 4;
        constexpr int kOrder[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
        std::vector<int> own(19), lengths;
        for (int k = 0; k < count; ++k) own[kOrder[k]] = bits(3);
        const Code code(own);
        while (static_cast<int>(lengths.size()) < literals + distances) {
            const int found = symbol(code);
            if (found < 16) {
                lengths.push_back(found);
                continue;
            }
            demand(found != 16 || !lengths.empty());
            const int repeated = found == 16 ? lengths.back() : 0, times = found == 16   ? 3 + bits(2)
                                                                           : found == 17 ? 3 + bits(3)
                                                                                         : 11 + bits(7);
            lengths.insert(lengths.end(), times, repeated);
        }
        demand(static_cast<int>(lengths.size()) == literals + distances);
        coded(Code({lengths.begin(), lengths.begin() + literals}), Code({lengths.begin() + literals, lengths.end()}));
    }

    void coded(const Code& literals, const Code& distances) {
        constexpr int kLength[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                     31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
        constexpr int kLengthBits[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                         2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
        constexpr int kDistance[30] = {1,    2,    3,    4,    5,    7,    9,    13,    17,    25,
                                       33,   49,   65,   97,   129,  193,  257,  385,   513,   769,
                                       1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
        while (true) {
            const int found = symbol(literals);
            if (found == 256) return;
            if (found < 256) {
                out_.push_back(static_cast<uint8_t>(found));
                continue;
            }
            demand(found < 286);
            const int length = kLength[found - 257] + bits(kLengthBits[found - 257]), code = symbol(distances);
            demand(code < 30);
            const size_t distance = kDistance[code] + bits(code < 4 ? 0 : code / 2 - 1);
            demand(distance <= out_.size());
            for (int k = 0; k < length; ++k) out_.push_back(out_[out_.size() - distance]);
        }
    }

    const std::vector<uint8_t>& stream_;
    size_t place_ = 16;  // bits, behind zlib's two bytes
    std::vector<uint8_t> out_;
};

uint32_t big_endian(const uint8_t* data) {
    return uint32_t{data[0]} << 24 | uint32_t{data[1]} << 16 | uint32_t{data[2]} << 8 | data[3];
}

void check_stream(const std::vector<uint8_t>& stream, const std::vector<uint8_t>& expected) {
    Inflating inflating(stream);
    demand(inflating.run() == expected);
    demand(inflating.used() + 4 == stream.size() &&
           big_endian(stream.data() + stream.size() - 4) == adler32(expected.data(), expected.size()));
}

void compress(const uint8_t* data, size_t size) {
    std::vector<uint8_t> stream;
    append_zlib(data, size, stream);
    check_stream(stream, {data, data + size});
}

void frame(const uint8_t* data, size_t size) {
    if (size < 3) return;
    constexpr size_t kSteps[] = {1, 3, 2, 1};
    constexpr Colour kColours[] = {kGrey, kRgb, kGrey, kPalette};
    const size_t kind = data[0] % 4, width = data[1] + 1, step = kSteps[kind],
                 height = std::max<size_t>((size - 2) / (width * step), 1);
    std::vector<uint8_t> pixels(data + 2, data + size);
    pixels.resize(height * width * step);
    const std::vector<uint8_t> file = png_file(pixels.data(), height, width, step, kind == 2 ? 16 : 8, kColours[kind],
                                               kind == 3 ? std::string(768, '\1') : std::string());
    size_t place = 8;
    std::string names;
    while (place < file.size()) {
        demand(place + 12 <= file.size());
        const size_t length = big_endian(file.data() + place);
        demand(length <= file.size() - place - 12);
        names += std::string(file.begin() + static_cast<std::ptrdiff_t>(place) + 4,
                             file.begin() + static_cast<std::ptrdiff_t>(place) + 8) +
                 " ";
        if (names.size() >= 5 && names.compare(names.size() - 5, 5, "IDAT ") == 0) {
            const std::vector<uint8_t> stream(file.begin() + static_cast<std::ptrdiff_t>(place) + 8,
                                              file.begin() + static_cast<std::ptrdiff_t>(place + 8 + length));
            const std::vector<uint8_t> rows = Inflating(stream).run();
            demand(rows.size() == height * (width * step + 1));
            check_stream(stream, rows);
            for (size_t y = 0; y < height; ++y) demand(rows[y * (width * step + 1)] <= 4);
        }
        place += 12 + length;
    }
    demand(names == (kind == 3 ? "IHDR PLTE IDAT IEND " : "IHDR IDAT IEND "));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) {
        compress(data, 0);
        return 0;
    }
    (data[0] % 2 ? compress : frame)(data + 1, size - 1);
    return 0;
}
