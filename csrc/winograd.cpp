#include "winograd.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bfloat.h"
#include "check.h"
#include "depth_head.h"
#include "sharing.h"
#include "timing.h"

namespace datasetdm {
namespace {

constexpr int64_t kTile = 4;  // results along each side of a tile
constexpr int64_t kSide = 6;  // cells along each side that they are computed from
constexpr int64_t kPlaces = kSide * kSide;
constexpr int64_t kPairedWide = 2,
                  kPairedAcross = 4;  // along a row, of bf16 pairs: less is lost where they are rounded
constexpr int64_t kPanel = 16;        // outputs that lie side by side in the weight
constexpr int64_t kTiles = 48;        // tiles that share one reading of the weight; a multiple of every kRows
constexpr int64_t kChannels = 256;    // channels of a panel that stay in the first-level cache
constexpr int64_t kApart = 16;      // floats between places, which would otherwise fall on the same lines of the caches
constexpr int64_t kMostTiles = 96;  // that are multiplied with two panels of taps at once; a multiple of kTiles
constexpr int64_t kTapChannels =
    128;  // of two panels that are transformed at once: with the products they stay in the second-level cache

int64_t panels_of(int64_t outputs) {
    return (outputs + 2 * kPanel - 1) / (2 * kPanel) * 2;
}  // an even number, as the widest vectors take two

struct Tile {
    int64_t image, y, x;
};

template <typename Cell>
struct Winograd {
    const Cell* x;
    const float *weight, *bias;
    const Cell* residual;
    Cell* out;
    int64_t height, width, channels, outputs;
    bool is_doubled;
    int64_t wide;  // results along a row of a tile

    int64_t down() const { return (height + kTile - 1) / kTile; }
    int64_t across() const { return (width + wide - 1) / wide; }
    int64_t tiles(int64_t images) const { return images * down() * across(); }
    int64_t panels() const { return panels_of(outputs); }
    Tile tile(int64_t index) const {
        const int64_t row = index / across();
        return {row / down(), row % down() * kTile, index % across() * wide};
    }
};

// G of Lavin & Gray (2016): from 3 taps to the 6 values that are multiplied, for the points 0, +-1/2, +-3/2, infinity.
constexpr double kG[kSide][3] = {{16.0 / 9, 0, 0},         {-1, -0.5, -0.25},         {-1, 0.5, -0.25},
                                 {1.0 / 9, 1.0 / 6, 0.25}, {1.0 / 9, -1.0 / 6, 0.25}, {0, 0, 1}};

struct Weight {
    const float* plain;
    float* target;
    int64_t channels, outputs, panels;
};

constexpr int64_t kWeightPitch = 2 * kTapChannels * kPanel + kApart;

// What a call from taps needs: for each part of the channels tiles [36, rows, 128], then for each thread that part of
// two panels and their products [36, rows, 32].
struct Shares {
    int64_t rows, left_pitch, parts, products_pitch, own;

    Shares(int64_t tiles, int64_t channels) : rows((std::min(tiles, kMostTiles) + kTiles - 1) / kTiles * kTiles) {
        left_pitch = rows * kTapChannels + kApart;
        parts = (channels + kTapChannels - 1) / kTapChannels;
        products_pitch = rows * 2 * kPanel + kApart;
        own = kPlaces * (kWeightPitch + products_pitch);
    }
};

float* scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

template <typename Cell>
Winograd<Cell> winograd_of(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
                           int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                           bool is_doubled, bool is_paired) {
    require(x && weight && bias && out, "winograd: a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && height > 0 && width > 0, "winograd: an empty tensor, ", images, " images of ", height, " x ",
            width);
    require(!is_doubled || (height % 2 == 0 && width % 2 == 0), "winograd: ", height, " x ", width,
            " cells are no doubled ones");
    return {reinterpret_cast<const Cell*>(x),
            reinterpret_cast<const float*>(weight),
            reinterpret_cast<const float*>(bias),
            reinterpret_cast<const Cell*>(residual),
            reinterpret_cast<Cell*>(out),
            height,
            width,
            channels,
            outputs,
            is_doubled,
            is_paired ? kPairedWide : kTile};
}

// What every call is asked of; the width of vectors to take.
int64_t checked(const char* name, int64_t channels, int64_t outputs, int64_t threads, int64_t vector_bytes) {
    require(channels > 0 && channels % kPanel == 0 && outputs > 0 && outputs % kPanel == 0, name, ": ", channels,
            " channels to ", outputs, ", expected multiples of ", kPanel);
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
    return chosen_vector_bytes(name, vector_bytes);
}

}  // namespace
}  // namespace datasetdm

#define WITH_DOTS
#define ROWS "winograd_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {

void winograd_cpu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out, int64_t images,
                  int64_t height, int64_t width, int64_t channels, int64_t outputs, bool is_doubled, int64_t storage,
                  int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::convolution);
    require(storage == kFp32 || storage == kBf16 || storage == kRounded, "winograd: storage is ", storage,
            ", expected 0, 1 or 2");
    vector_bytes = checked("winograd", channels, outputs, threads, vector_bytes);
    const auto convolve_all = [&](auto cell) {
        const auto work = winograd_of<decltype(cell)>(x, weight, bias, residual, out, images, height, width, channels,
                                                      outputs, is_doubled, storage != kFp32);
        share(work.tiles(images), threads, [&](int64_t first, int64_t last) {
            WITH_VECTORS(vector_bytes, convolve_in, work, storage == kRounded, first, last);
        });
    };
    storage == kBf16 ? convolve_all(Bfloat{}) : convolve_all(float{});
}

void winograd_taps_cpu(uintptr_t x, uintptr_t taps, uintptr_t bias, uintptr_t residual, uintptr_t out, uintptr_t memory,
                       int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                       bool is_doubled, int64_t storage, int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::convolution);
    require(memory, "winograd: a pointer is null; pass data_ptr() of a CPU tensor");
    require(storage == kFp32 || storage == kBf16, "winograd: storage is ", storage, ", expected 0 or 1");
    vector_bytes = checked("winograd", channels, outputs, threads, vector_bytes);
    const auto convolve_all = [&](auto cell) {
        const auto work = winograd_of<decltype(cell)>(x, taps, bias, residual, out, images, height, width, channels,
                                                      outputs, is_doubled, storage != kFp32);
        const Shares shares(work.tiles(images), channels);
        float *left = reinterpret_cast<float*>(memory), *own = left + shares.parts * kPlaces * shares.left_pitch;
        const int64_t twos = work.panels() / 2, users = std::min(threads, twos);
        for (int64_t tile = 0; tile < work.tiles(images); tile += shares.rows) {
            const int64_t count = std::min(shares.rows, work.tiles(images) - tile);
            share(count, threads, [&](int64_t first, int64_t last) {
                WITH_VECTORS(vector_bytes, transform_part, work, tile, first, last, left, shares);
            });
            share(users, users, [&](int64_t user, int64_t) {
                WITH_VECTORS(vector_bytes, convolve_part, work, tile, count, left, shares, twos * user / users,
                             twos * (user + 1) / users, own + user * shares.own);
            });
        }
    };
    storage == kBf16 ? convolve_all(Bfloat{}) : convolve_all(float{});
}

int64_t winograd_memory(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t storage,
                        int64_t threads) {
    const Winograd<float> work{nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               height,
                               width,
                               channels,
                               0,
                               false,
                               storage == kFp32 ? kTile : kPairedWide};
    const Shares shares(work.tiles(images), channels);
    return shares.parts * kPlaces * shares.left_pitch + threads * shares.own;
}

void winograd_gradient(uintptr_t x, uintptr_t out, uintptr_t weight, int64_t images, int64_t height, int64_t width,
                       int64_t channels, int64_t outputs, int64_t threads, int64_t vector_bytes) {
    require(x && out && weight, "winograd_gradient: a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && height > 0 && width > 0, "winograd_gradient: an empty tensor, ", images, " images of ",
            height, " x ", width);
    vector_bytes = checked("winograd_gradient", channels, outputs, threads, vector_bytes);
    const Winograd<float> work{reinterpret_cast<const float*>(x),
                               nullptr,
                               nullptr,
                               nullptr,
                               reinterpret_cast<float*>(out),
                               height,
                               width,
                               channels,
                               outputs,
                               false,
                               kTile};
    share(channels / kPanel, threads, [&](int64_t first, int64_t last) {
        WITH_VECTORS(vector_bytes, gather, work, reinterpret_cast<float*>(weight), work.tiles(images), first, last);
    });
}

void winograd_weight(uintptr_t plain, uintptr_t weight, int64_t channels, int64_t outputs, int64_t threads,
                     int64_t vector_bytes) {
    require(plain && weight, "winograd_weight: a pointer is null; pass data_ptr() of a CPU tensor");
    vector_bytes = checked("winograd_weight", channels, outputs, threads, vector_bytes);
    const Weight work{reinterpret_cast<const float*>(plain), reinterpret_cast<float*>(weight), channels, outputs,
                      panels_of(outputs)};
    share(work.panels, threads,
          [&](int64_t first, int64_t last) { WITH_VECTORS(vector_bytes, transform_panels, work, first, last); });
}

}  // namespace datasetdm
