#include "png_file.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#include "deflate.h"

namespace datasetdm {
namespace {

constexpr std::array<uint8_t, 8> kSignature = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
enum Filter : uint8_t { kNone, kSub, kUp, kAverage, kPaeth };

// CRC-32 of sixteen bytes at a time: table k holds the effect of a byte that k others follow.
struct CrcTables {
    std::array<std::array<uint32_t, 256>, 16> of{};
    constexpr CrcTables() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t rest = byte;
            for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? 0xedb88320u : 0);
            of[0][byte] = rest;
        }
        for (size_t k = 1; k < 16; ++k)
            for (size_t byte = 0; byte < 256; ++byte)
                of[k][byte] = of[k - 1][byte] >> 8 ^ of[0][of[k - 1][byte] & 0xff];
    }
};
constexpr CrcTables kCrc;

uint32_t crc32(const uint8_t* data, size_t size) {
    uint32_t rest = 0xffffffffu;
    for (; size >= 16; data += 16, size -= 16) {
        uint32_t next = 0;
        for (int k = 0; k < 4; ++k) next ^= kCrc.of[15 - k][data[k] ^ (rest >> 8 * k & 0xff)];
        for (int k = 4; k < 16; ++k) next ^= kCrc.of[15 - k][data[k]];
        rest = next;
    }
    for (; size; ++data, --size) rest = rest >> 8 ^ kCrc.of[0][(rest ^ *data) & 0xff];
    return ~rest;
}

void append_big_endian(uint32_t value, std::vector<uint8_t>& file) {
    for (int shift : {24, 16, 8, 0}) file.push_back(static_cast<uint8_t>(value >> shift));
}

// A chunk is begun with its name and ended once its content stands behind it.
size_t begin_chunk(const char* name, std::vector<uint8_t>& file) {
    append_big_endian(0, file);
    file.insert(file.end(), name, name + 4);
    return file.size();
}

void end_chunk(size_t begin, std::vector<uint8_t>& file) {
    const uint32_t size = static_cast<uint32_t>(file.size() - begin);
    for (int k = 0; k < 4; ++k) file[begin - 8 + k] = static_cast<uint8_t>(size >> (24 - 8 * k));
    append_big_endian(crc32(file.data() + begin - 4, size + 4), file);
}

inline int paeth(int left, int above, int corner) {
    const int to_left = std::abs(above - corner), to_above = std::abs(left - corner),
              to_corner = std::abs(left + above - 2 * corner);
    const int other = to_above <= to_corner ? above : corner;
    return to_left <= to_above && to_left <= to_corner ? left : other;
}

// Both instruction sets below run this very loop.
template <Filter filter>
__attribute__((always_inline)) inline uint32_t filtered(const uint8_t* __restrict row, const uint8_t* __restrict above,
                                                        size_t size, size_t step, uint8_t* __restrict target) {
    uint32_t sum = 0;
    for (size_t k = 0; k < size; ++k) {
        const int left = row[static_cast<ptrdiff_t>(k - step)], up = above[k],
                  corner = above[static_cast<ptrdiff_t>(k - step)];
        const int guess = filter == kSub       ? left
                          : filter == kUp      ? up
                          : filter == kAverage ? (left + up) / 2
                                               : paeth(left, up, corner);
        const uint8_t rest = static_cast<uint8_t>(row[k] - guess);
        target[k] = rest;
        sum += rest < 128 ? rest : 256 - rest;
    }
    return sum;
}

template <Filter filter>
uint32_t baseline(const uint8_t* row, const uint8_t* above, size_t size, size_t step, uint8_t* target) {
    return filtered<filter>(row, above, size, step, target);
}

using Filters = std::array<uint32_t (*)(const uint8_t*, const uint8_t*, size_t, size_t, uint8_t*), 4>;

#if defined(__x86_64__)
template <Filter filter>
__attribute__((target("avx2"))) uint32_t avx2(const uint8_t* row, const uint8_t* above, size_t size, size_t step,
                                              uint8_t* target) {
    return filtered<filter>(row, above, size, step, target);
}

const Filters kFilters = __builtin_cpu_supports("avx2")
                             ? Filters{avx2<kSub>, avx2<kUp>, avx2<kAverage>, avx2<kPaeth>}
                             : Filters{baseline<kSub>, baseline<kUp>, baseline<kAverage>, baseline<kPaeth>};
#else
const Filters kFilters = {baseline<kSub>, baseline<kUp>, baseline<kAverage>, baseline<kPaeth>};
#endif

constexpr size_t kBand = 4;  // rows that share a filter: trying all on every row would take longer than the compression

// Each row behind the number of its filter, of the four the one that left least of the first row of its band; label
// maps go unfiltered.
std::vector<uint8_t> filter_rows(const uint8_t* pixels, size_t height, size_t size, size_t step, bool is_label) {
    std::vector<uint8_t> rows(height * (size + 1));
    if (is_label) {
        for (size_t y = 0; y < height; ++y) std::copy_n(pixels + y * size, size, rows.data() + y * (size + 1) + 1);
        return rows;
    }
    // Pixels left of the first and above it count as zero, so both rows stand behind a margin.
    std::vector<uint8_t> lines(2 * (size + step), 0);
    uint8_t* row = lines.data() + step;
    uint8_t* above = lines.data() + size + 2 * step;
    size_t best = 0;
    for (size_t y = 0; y < height; ++y, std::swap(row, above)) {
        std::copy_n(pixels + y * size, size, row);
        uint8_t* const target = rows.data() + y * (size + 1);
        if (y % kBand == 0) {
            std::array<uint32_t, 4> rests{};
            for (size_t k = 0; k < 4; ++k) rests[k] = kFilters[k](row, above, size, step, target + 1);
            best = static_cast<size_t>(std::min_element(rests.begin(), rests.end()) - rests.begin());
        }
        target[0] = static_cast<uint8_t>(kSub + best);
        kFilters[best](row, above, size, step, target + 1);
    }
    return rows;
}

}  // namespace

std::vector<uint8_t> png_file(const uint8_t* pixels, size_t height, size_t width, size_t step, uint8_t bits,
                              Colour colour, const std::string& palette) {
    std::vector<uint8_t> file(kSignature.begin(), kSignature.end());
    file.reserve(height * width * step / 2 + palette.size() + 256);
    size_t chunk = begin_chunk("IHDR", file);
    append_big_endian(static_cast<uint32_t>(width), file);
    append_big_endian(static_cast<uint32_t>(height), file);
    file.insert(file.end(), {bits, static_cast<uint8_t>(colour), 0, 0, 0});
    end_chunk(chunk, file);
    if (colour == kPalette) {
        chunk = begin_chunk("PLTE", file);
        file.insert(file.end(), palette.begin(), palette.end());
        end_chunk(chunk, file);
    }
    const std::vector<uint8_t> rows = filter_rows(pixels, height, width * step, step, colour == kPalette);
    chunk = begin_chunk("IDAT", file);
    append_zlib(rows.data(), rows.size(), file);
    end_chunk(chunk, file);
    end_chunk(begin_chunk("IEND", file), file);
    return file;
}

}  // namespace datasetdm
