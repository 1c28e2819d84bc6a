// Where the pixels of batched masks change value, column after column: all that a run-length string needs to know of a mask.
#pragma once

#include <cstdint>

#include "both_sides.h"

namespace datasetdm {

// One column of a mask: how often it changes value, what it covers.
struct Column {
    int32_t changes = 0, area = 0, top = INT32_MAX, bottom = -1;
};

// The first pixel is compared with the last of the column before, the very first with zero.
DATASETDM_BOTH inline bool before_column(const uint8_t* mask, int64_t height, int64_t width, int64_t x) { return x > 0 && mask[(height - 1) * width + x - 1]; }

DATASETDM_BOTH inline Column read_column(const uint8_t* mask, int64_t height, int64_t width, int64_t x) {
    Column column;
    bool before = before_column(mask, height, width, x);
    for (int32_t y = 0; y < height; ++y) {
        const bool now = mask[y * width + x];
        column.changes += now != before;
        if (now) {
            if (column.bottom < 0) column.top = y;
            column.bottom = y;
            ++column.area;
        }
        before = now;
    }
    return column;
}

// Writes the column-major places of this column's changes, as many as read_column counted.
DATASETDM_BOTH inline void write_column(const uint8_t* mask, int64_t height, int64_t width, int64_t x, int32_t* places) {
    bool before = before_column(mask, height, width, x);
    for (int64_t y = 0; y < height; ++y) {
        const bool now = mask[y * width + x];
        if (now != before) *places++ = static_cast<int32_t>(x * height + y);
        before = now;
    }
}

}  // namespace datasetdm

// Both return a CUDA error code, 0 for success. Masks [count, height, width] of bytes, row-major, any value but zero is set.
// The first fills starts [count * width + 1]: changes before each column of each mask, the last entry all of them; areas [count];
// extents [count, 4]: left, top, right, bottom, the last pixels included, right -1 in an empty mask. The second fills places [starts[-1]].
extern "C" int datasetdm_mask_starts(const uint8_t* masks, int64_t count, int64_t height, int64_t width, int64_t* starts, int64_t* areas, int32_t* extents, void* stream);
extern "C" int datasetdm_mask_places(const uint8_t* masks, int64_t count, int64_t height, int64_t width, const int64_t* starts, int32_t* places, void* stream);
