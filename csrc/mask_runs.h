// Masks as runs and run-length strings, without Python: what the bindings of mask_rle.h call, and what csrc/fuzz feeds
// with anything.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace datasetdm {

// Bits of one mask: column x has its row y in bit y % 64 of bits[y / 64][x], zero beyond H; `words` 64-bit words a
// column.
struct Columns {
    int64_t height, width, words;
    std::vector<uint8_t> strip;
    std::vector<uint64_t> bits;

    Columns(int64_t height, int64_t width);
    void load(const uint8_t* mask);
};

struct Summary {
    int64_t area = 0;
    double box[4] = {0, 0, 0, 0};  // x, y, width, height
};

// Runs, area and extent of the mask in `columns`; `rows` has one word for every word of a column.
Summary scan(const Columns& columns, std::vector<int64_t>& runs, std::vector<uint64_t>& rows);

void write_counts(const std::vector<int64_t>& runs, std::string& counts);

// The runs of a string; refuses one that is malformed or does not sum to `pixels`.
std::vector<int64_t> read_counts(const std::string& counts, int64_t pixels);

void check_runs(const int64_t* runs, int64_t count, int64_t pixels);

// Writes the mask [height, width] of runs that sum to its pixels.
void paint(const std::vector<int64_t>& runs, int64_t height, int64_t width, uint8_t* mask);

}  // namespace datasetdm
