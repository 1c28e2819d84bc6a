#include "mask_rle.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "mask_runs.h"
#include "released_gil.h"

namespace py = pybind11;

namespace datasetdm {

py::tuple rle_encode(const Masks& masks) {
    require(masks.ndim() == 3, "rle_encode: masks have ", masks.ndim(), " dimensions, expected 3: [N, H, W]");
    const int64_t count = masks.shape(0), height = masks.shape(1), width = masks.shape(2);
    require_size("rle_encode", height, width);
    std::vector<std::string> strings(count);
    py::array_t<int64_t> areas(count);
    py::array_t<double> boxes(std::vector<py::ssize_t>{count, 4});
    const uint8_t* source = masks.data();
    int64_t* area = areas.mutable_data();
    double* box = boxes.mutable_data();
    {
        ReleasedGil release;
        Columns columns(height, width);
        std::vector<uint64_t> rows(columns.words);
        std::vector<int64_t> runs;
        for (int64_t n = 0; n < count; ++n) {
            columns.load(source + n * height * width);
            const Summary summary = scan(columns, runs, rows);
            write_counts(runs, strings[n]);
            area[n] = summary.area;
            std::copy(summary.box, summary.box + 4, box + 4 * n);
        }
    }
    py::list counts(count);
    for (int64_t n = 0; n < count; ++n) counts[n] = py::str(strings[n]);
    return py::make_tuple(counts, areas, boxes);
}

Masks rle_decode(const std::string& counts, int64_t height, int64_t width) {
    require_size("rle_decode", height, width);
    std::vector<int64_t> runs;
    {
        ReleasedGil release;
        runs = read_counts(counts, height * width);  // refuses before anything of the claimed size is allocated
    }
    Masks mask({height, width});
    uint8_t* target = mask.mutable_data();
    ReleasedGil release;
    paint(runs, height, width, target);
    return mask;
}

Runs rle_to_runs(const std::string& counts, int64_t height, int64_t width) {
    require_size("rle_to_runs", height, width);
    const std::vector<int64_t> runs = read_counts(counts, height * width);
    return Runs(static_cast<py::ssize_t>(runs.size()), runs.data());
}

std::string rle_from_runs(const Runs& runs, int64_t height, int64_t width) {
    require_size("rle_from_runs", height, width);
    require(runs.ndim() == 1, "rle_from_runs: runs have ", runs.ndim(), " dimensions, expected 1");
    check_runs(runs.data(), runs.size(), height * width);
    std::string counts;
    write_counts(std::vector<int64_t>(runs.data(), runs.data() + runs.size()), counts);
    return counts;
}

}  // namespace datasetdm
