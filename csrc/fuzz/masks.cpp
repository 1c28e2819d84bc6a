// Anything at all as run-length strings, runs and masks: refused with std::invalid_argument, or read, and then the
// round trip holds.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "../mask_runs.h"

namespace {

using namespace datasetdm;

void demand(bool holds) {
    if (!holds) std::abort();
}

// Bytes of the input, taken from the front; zeros when it is used up.
struct Input {
    const uint8_t* data;
    size_t size;

    template <typename Value>
    Value take() {
        Value value{};
        const size_t count = std::min(sizeof value, size);
        std::memcpy(&value, data, count);
        data += count;
        size -= count;
        return value;
    }

    template <typename Value>
    std::vector<Value> rest() {
        std::vector<Value> values(size / sizeof(Value));
        if (!values.empty()) std::memcpy(values.data(), data, values.size() * sizeof(Value));
        return values;
    }
};

void check_round_trip(const std::vector<int64_t>& runs, int64_t height, int64_t width) {
    std::vector<uint8_t> mask(height * width);
    paint(runs, height, width, mask.data());
    Columns columns(height, width);
    columns.load(mask.data());
    std::vector<int64_t> found;
    std::vector<uint64_t> rows(columns.words);
    const Summary summary = scan(columns, found, rows);
    demand(summary.area == std::count(mask.begin(), mask.end(), 1));
    std::string counts;
    write_counts(found, counts);
    demand(read_counts(counts, height * width) == found);
    std::vector<uint8_t> again(mask.size());
    paint(found, height, width, again.data());
    demand(again == mask);
}

void read_string(Input input) {
    const int64_t height = input.take<uint16_t>(), width = input.take<uint16_t>();
    require_size("fuzz", height, width);
    const std::vector<uint8_t> bytes = input.rest<uint8_t>();
    const std::vector<int64_t> runs = read_counts(std::string(bytes.begin(), bytes.end()), height * width);
    if (height * width <= 1 << 20) check_round_trip(runs, height, width);
}

void read_runs(Input input) {
    const int64_t height = input.take<uint8_t>(), width = input.take<uint8_t>();
    require_size("fuzz", height, width);
    const std::vector<int64_t> runs = input.rest<int64_t>();
    check_runs(runs.data(), static_cast<int64_t>(runs.size()), height * width);
    check_round_trip(runs, height, width);
}

// The runs of the word-wise walk paint the pixels they were read from.
void read_mask(Input input) {
    const int64_t height = input.take<uint8_t>(), width = input.take<uint8_t>();
    require_size("fuzz", height, width);
    std::vector<uint8_t> mask = input.rest<uint8_t>();
    mask.resize(height * width);
    Columns columns(height, width);
    columns.load(mask.data());
    std::vector<int64_t> runs;
    std::vector<uint64_t> rows(columns.words);
    const Summary summary = scan(columns, runs, rows);
    demand(summary.area == static_cast<int64_t>(mask.size()) - std::count(mask.begin(), mask.end(), 0));
    std::vector<uint8_t> painted(mask.size());
    paint(runs, height, width, painted.data());
    for (size_t i = 0; i < mask.size(); ++i) demand(painted[i] == (mask[i] != 0));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 1) return 0;
    void (*const readers[])(Input) = {read_string, read_runs, read_mask};
    try {
        readers[data[0] % 3](Input{data + 1, size - 1});
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
