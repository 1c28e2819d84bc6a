#include "mask_runs.h"

#include <algorithm>
#include <cstring>

#include "check.h"

namespace datasetdm {

Columns::Columns(int64_t height, int64_t width)
    : height(height), width(width), words((height + 63) / 64), strip(width), bits(words * width) {}

// Eight rows at a time are folded into one byte a column: the inner loop runs along a row, which vectorises and
// reads the row-major input in order.
void Columns::load(const uint8_t* mask) {
    uint8_t* __restrict folded = strip.data();  // bytes may alias anything: without the promise the loop stays scalar
    std::fill(bits.begin(), bits.end(), 0);
    for (int64_t top = 0; top < height; top += 8) {
        std::fill(strip.begin(), strip.end(), 0);
        const int64_t rows = std::min<int64_t>(8, height - top);
        for (int64_t row = 0; row < rows; ++row) {
            const uint8_t* __restrict pixels = mask + (top + row) * width;
            const uint8_t bit = static_cast<uint8_t>(1u << row);
            for (int64_t x = 0; x < width; ++x) folded[x] |= pixels[x] != 0 ? bit : 0;
        }
        uint64_t* __restrict packed = bits.data() + top / 64 * width;
        const int64_t shift = top % 64;
        for (int64_t x = 0; x < width; ++x) packed[x] |= static_cast<uint64_t>(folded[x]) << shift;
    }
}

// One walk over the words: every change of value ends a run; area and extent fall out of the same words.
Summary scan(const Columns& columns, std::vector<int64_t>& runs, std::vector<uint64_t>& rows) {
    runs.clear();
    std::fill(rows.begin(), rows.end(), 0);
    Summary summary;
    int64_t first = -1, last = -1, run_start = 0;
    uint64_t before = 0;
    for (int64_t x = 0; x < columns.width; ++x) {
        uint64_t any = 0;
        for (int64_t k = 0; k < columns.words; ++k) {
            const uint64_t word = columns.bits[k * columns.width + x];
            const int64_t valid = std::min<int64_t>(64, columns.height - 64 * k);
            uint64_t changes = word ^ (word << 1 | before);
            if (valid < 64) changes &= (uint64_t{1} << valid) - 1;
            for (; changes; changes &= changes - 1) {
                const int64_t position = x * columns.height + 64 * k + __builtin_ctzll(changes);
                runs.push_back(position - run_start);
                run_start = position;
            }
            before = word >> (valid - 1) & 1;
            summary.area += __builtin_popcountll(word);
            rows[k] |= word;
            any |= word;
        }
        if (any) {
            if (first < 0) first = x;
            last = x;
        }
    }
    runs.push_back(columns.width * columns.height - run_start);
    if (first < 0) return summary;
    int64_t low = 0, high = columns.words - 1;
    while (!rows[low]) ++low;
    while (!rows[high]) --high;
    const int64_t top = 64 * low + __builtin_ctzll(rows[low]), bottom = 64 * high + 63 - __builtin_clzll(rows[high]);
    summary.box[0] = static_cast<double>(first);
    summary.box[1] = static_cast<double>(top);
    summary.box[2] = static_cast<double>(last - first + 1);
    summary.box[3] = static_cast<double>(bottom - top + 1);
    return summary;
}

// Five bits a character, lowest first, bit 5 set where more follow; from the fourth run on, the difference to the last
// run but one is written instead of the run.
void write_counts(const std::vector<int64_t>& runs, std::string& counts) {
    counts.clear();
    for (size_t i = 0; i < runs.size(); ++i) {
        int64_t value = i > 2 ? runs[i] - runs[i - 2] : runs[i];
        for (bool more = true; more;) {
            int64_t digit = value & 0x1f;
            value >>= 5;
            more = digit & 0x10 ? value != -1 : value != 0;
            counts.push_back(static_cast<char>((more ? digit | 0x20 : digit) + 48));
        }
    }
}

std::vector<int64_t> read_counts(const std::string& counts, int64_t pixels) {
    std::vector<int64_t> runs;
    int64_t total = 0;
    for (size_t at = 0; at < counts.size();) {
        const size_t start = at;
        int64_t value = 0, digit = 0x20;
        for (int shift = 0; digit & 0x20; shift += 5) {
            require(at < counts.size(), "RLE: the string ends inside the number that starts at character ", start);
            require(shift < 35, "RLE: the number at character ", start, " is longer than any run can be");
            digit = static_cast<unsigned char>(counts[at]) - 48;
            require(digit >= 0 && digit < 64, "RLE: character ", at, " has code ", digit + 48, ", expected 48 to 111");
            value |= (digit & 0x1f) << shift;
            if (!(digit & 0x20) && digit & 0x10) value -= int64_t{1} << (shift + 5);
            ++at;
        }
        if (runs.size() > 2) value += runs[runs.size() - 2];
        require(value >= 0 && value <= pixels - total, "RLE: run ", runs.size(), " has length ", value, ", but ",
                pixels - total, " pixels remain");
        total += value;
        runs.push_back(value);
    }
    require(total == pixels, "RLE: the runs sum to ", total, " pixels, the size says ", pixels);
    return runs;
}

void check_runs(const int64_t* runs, int64_t count, int64_t pixels) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        require(runs[i] >= 0 && runs[i] <= pixels - total, "RLE: run ", i, " has length ", runs[i], ", but ",
                pixels - total, " pixels remain");
        total += runs[i];
    }
    require(total == pixels, "RLE: the runs sum to ", total, " pixels, the size says ", pixels);
}

// A 64 x 64 tile keeps both sides of the transposition in the first-level cache. The target's rows are `stride` apart.
static void transpose(const uint8_t* source, uint8_t* target, int64_t height, int64_t width, int64_t stride) {
    constexpr int64_t kTile = 64;
    for (int64_t top = 0; top < height; top += kTile)
        for (int64_t left = 0; left < width; left += kTile)
            for (int64_t y = top; y < std::min(top + kTile, height); ++y)
                for (int64_t x = left; x < std::min(left + kTile, width); ++x)
                    target[y * stride + x] = source[x * height + y];
}

// Only the columns from the first to the last pixel are transposed: of a small thing in a large photo they are few.
void paint(const std::vector<int64_t>& runs, int64_t height, int64_t width, uint8_t* mask) {
    std::memset(mask, 0, height * width);
    int64_t first = -1, last = -1, at = 0;
    for (size_t i = 0; i < runs.size(); at += runs[i++])
        if (i % 2 && runs[i]) {
            if (first < 0) first = at / height;
            last = (at + runs[i] - 1) / height;
        }
    if (first < 0) return;
    std::vector<uint8_t> columns((last - first + 1) * height);
    at = -first * height;
    for (size_t i = 0; i < runs.size(); at += runs[i++])
        if (i % 2 && runs[i]) std::memset(columns.data() + at, 1, runs[i]);
    transpose(columns.data(), mask + first, height, last - first + 1, width);
}

}  // namespace datasetdm
