#include "tiled_convolution.h"

#include "check.h"
#include "tiles.h"

#ifdef HAS_TILES
#include <algorithm>
#include <cstring>
#include <vector>

#include "sharing.h"
#include "tiled_attention.h"
#include "timing.h"

namespace datasetdm {
namespace {

constexpr int64_t kHeld = 1 << 19;   // numbers of the input that are held in a cache
constexpr int64_t kColumns = 64;     // of a block of a wide image
constexpr int64_t kPanel = kSquare;  // outputs that are multiplied at once
constexpr int64_t kTapSteps = 90;    // pairs of tiles of a panel's weight that stay in a cache
constexpr int64_t kMargin = 2;       // cells around a block, along an axis

struct TiledConvolution {
    const uint16_t *x, *weight;
    const float* bias;
    const uint16_t* residual;
    uint16_t* out;
    int64_t images, height, width, channels, outputs, side;

    int64_t taps() const { return side * side; }
    int64_t places() const { return side == 2 ? 4 : 1; }
    int64_t steps() const { return channels / kPairs; }
    int64_t panels() const { return places() * outputs / kPanel; }
};

// The part of the images that is held at once: of `images` images, `rows` x `columns` cells.
struct Block {
    int64_t images, rows, columns;

    explicit Block(const TiledConvolution& all_of) {
        const int64_t cells = kHeld / all_of.channels;
        columns = all_of.width % kColumns == 0 ? kColumns : all_of.width;
        rows = std::min(std::max<int64_t>(cells / (columns + kMargin) - kMargin, 1), all_of.height);
        const int64_t whole = (all_of.height + kMargin) * (all_of.width + kMargin);
        const bool is_whole = rows == all_of.height && columns == all_of.width;
        images = is_whole ? std::min(std::max<int64_t>(cells / whole, 1), all_of.images) : 1;
    }
    int64_t across(const TiledConvolution& all_of) const { return (all_of.width + columns - 1) / columns; }
    int64_t along(const TiledConvolution& all_of) const { return (all_of.height + rows - 1) / rows; }
    int64_t deep(const TiledConvolution& all_of) const { return (all_of.images + images - 1) / images; }
    int64_t count(const TiledConvolution& all_of) const { return across(all_of) * along(all_of) * deep(all_of); }
};

// A block in the memory of a thread: planes of 32 channels, with a margin of zeros where the image ends.
class Held {
public:
    Held(const TiledConvolution& all_of, const Block& block)
        : all_of_(all_of),
          block_(block),
          stride_(block.columns + kMargin),
          strip_((block.rows + kMargin) * stride_),
          cells_(block.images * strip_ + 3 * kRows + 2 * stride_) {
        static thread_local KeptFloats kept;
        const int64_t of_planes = cells_ * all_of.channels / 2;
        const int64_t tiles = block.images * (block.rows * stride_ / kRows + block.rows + 2);
        float* next = kept.of(of_planes + (tiles + 1) * kRows * kSquare + kRows);
        next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / sizeof(float);
        planes_ = reinterpret_cast<uint16_t*>(next);
        sums_ = next + of_planes;
    }

    TILED void fill(int64_t index) {
        const int64_t across = block_.across(all_of_), along = block_.along(all_of_);
        const int64_t column = index % across * block_.columns, row = index / across % along * block_.rows;
        const int64_t first = index / (across * along) * block_.images;
        const int64_t rows = std::min(block_.rows, all_of_.height - row);
        const int64_t columns = std::min(block_.columns, all_of_.width - column);
        const int64_t images = std::min(block_.images, all_of_.images - first), edge = kMargin / 2;
        starts_.clear();
        cells_of_.clear();
        for (int64_t image = 0; image < images; ++image) {
            for (int64_t y = -edge; y < rows + edge; ++y)
                for (int64_t x = -edge; x < columns + edge; ++x)
                    copy_cell(first + image, row + y, column + x, image * strip_ + (y + edge) * stride_ + x + edge);
            const bool is_even = columns % kRows == 0;
            const int64_t lines = is_even ? rows : 1, length = is_even ? columns : (rows - 1) * stride_ + columns;
            for (int64_t line = 0; line < lines; ++line)
                for (int64_t x = 0; x < length; x += kRows) {
                    starts_.push_back(image * strip_ + line * stride_ + x);
                    for (int64_t i = x; i < x + kRows; ++i) {
                        const int64_t y = line + i / stride_ * !is_even, at = is_even ? i : i % stride_;
                        const bool is_cell = i < length && at < columns;
                        cells_of_.push_back(is_cell ? cell(first + image, row + y, column + at) : -1);
                    }
                }
        }
        if (starts_.size() % 2) {
            starts_.push_back(starts_.back());
            cells_of_.insert(cells_of_.end(), kRows, -1);
        }
    }

    // Writes `panel` of the outputs of the block.
    TILED void multiply(int64_t panel) {
        const int64_t per_place = all_of_.outputs / kPanel, place = panel / per_place, taps = all_of_.taps();
        int64_t offsets[9];
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t y = tap / all_of_.side + (all_of_.side == 2 ? place / 2 : 0);
            const int64_t x = tap % all_of_.side + (all_of_.side == 2 ? place % 2 : 0);
            offsets[tap] = (y * stride_ + x) * kPairs;
        }
        const int64_t steps = all_of_.steps(), size = 2 * kTile * taps, at_once = kTapSteps / taps;
        const uint16_t* weight = all_of_.weight + panel * steps * size;
        const int64_t pairs = static_cast<int64_t>(starts_.size()) / 2;
        for (int64_t first = 0; first < steps; first += at_once) {
            const int64_t last = std::min(first + at_once, steps);
            for (int64_t pair = 0; pair < pairs; ++pair) {
                float* sums = sums_ + (steps > at_once ? pair * kSquare * kSquare : 0);
                if (first) {
                    _tile_loadd(0, sums, kPanel * 4);
                    _tile_loadd(1, sums + kRows * kPanel, kPanel * 4);
                    _tile_loadd(2, sums + kRows, kPanel * 4);
                    _tile_loadd(3, sums + kRows * kPanel + kRows, kPanel * 4);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                const uint16_t* upper = planes_ + starts_[2 * pair] * kPairs;
                const uint16_t* lower = planes_ + starts_[2 * pair + 1] * kPairs;
                const uint16_t* b = weight + first * size;
                for (int64_t step = first; step < last; ++step) {
                    const int64_t plane = step * cells_ * kPairs;
                    for (int64_t tap = 0; tap < taps; ++tap, b += 2 * kTile) {
                        _tile_loadd(4, upper + plane + offsets[tap], 64);
                        _tile_loadd(5, lower + plane + offsets[tap], 64);
                        _tile_loadd(6, b, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 5, 6);
                        _tile_loadd(7, b + kTile, 64);
                        _tile_dpbf16ps(2, 4, 7);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
                _tile_stored(0, sums, kPanel * 4);
                _tile_stored(1, sums + kRows * kPanel, kPanel * 4);
                _tile_stored(2, sums + kRows, kPanel * 4);
                _tile_stored(3, sums + kRows * kPanel + kRows, kPanel * 4);
                if (last == steps) write(sums, cells_of_.data() + pair * kSquare, panel % per_place, place);
            }
        }
    }

private:
    // Where a cell of the image is written: of a doubled one, its first place.
    int64_t cell(int64_t image, int64_t y, int64_t x) const {
        const int64_t times = all_of_.side == 2 ? 2 : 1;
        return (image * all_of_.height * times + y * times) * all_of_.width * times + x * times;
    }

    INLINED void copy_cell(int64_t image, int64_t y, int64_t x, int64_t to) {
        uint16_t* place = planes_ + to * kPairs;
        const int64_t apart = cells_ * kPairs, steps = all_of_.steps();
        if (y < 0 || x < 0 || y >= all_of_.height || x >= all_of_.width) {
            for (int64_t step = 0; step < steps; ++step) _mm512_store_si512(place + step * apart, __m512i{});
            return;
        }
        const uint16_t* from = all_of_.x + ((image * all_of_.height + y) * all_of_.width + x) * all_of_.channels;
        for (int64_t step = 0; step < steps; ++step)
            _mm512_store_si512(place + step * apart, _mm512_loadu_si512(from + step * kPairs));
    }

    INLINED static __m512 widened(__m256i half) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    INLINED void write(const float* sums, const int64_t* cells, int64_t panel, int64_t place) const {
        const int64_t within = panel * kPanel, apart = (place / 2 * 2 * all_of_.width + place % 2) * all_of_.outputs;
        const __m512 first = _mm512_loadu_ps(all_of_.bias + within);
        const __m512 second = _mm512_loadu_ps(all_of_.bias + within + kRows);
        for (int64_t row = 0; row < kSquare; ++row) {
            if (cells[row] < 0) continue;
            const int64_t at = cells[row] * all_of_.outputs + within + apart;
            __m512 left = _mm512_add_ps(_mm512_load_ps(sums + row * kPanel), first);
            __m512 right = _mm512_add_ps(_mm512_load_ps(sums + row * kPanel + kRows), second);
            if (all_of_.residual) {
                const __m512i both = _mm512_loadu_si512(all_of_.residual + at);
                left = _mm512_add_ps(left, widened(_mm512_castsi512_si256(both)));
                right = _mm512_add_ps(right, widened(_mm512_extracti64x4_epi64(both, 1)));
            }
            const __m512bh rounded = _mm512_cvtne2ps_pbh(right, left);
            std::memcpy(all_of_.out + at, &rounded, sizeof rounded);
        }
    }

    const TiledConvolution& all_of_;
    const Block& block_;
    int64_t stride_, strip_, cells_;  // of a row, of an image, and of a plane
    uint16_t* planes_;
    float* sums_;
    std::vector<int64_t> starts_, cells_of_;  // of tiles, and of each of their rows, where it is written
};

}  // namespace

void tiled_convolution_cpu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
                           int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                           int64_t side, int64_t threads) {
    const Timed timed(Work::convolution);
    require(multiplies_tiles(), "tiled_convolution: this CPU or system has no tiles of bf16");
    require(threads > 0, "tiled_convolution: threads is ", threads, ", expected at least 1");
    require(side == 2 || side == 3, "tiled_convolution: side is ", side, ", expected 2 or 3");
    require(images > 0 && height > 0 && width > 0 && channels > 0 && outputs > 0 && channels % kPairs == 0 &&
                outputs % kPanel == 0,
            "tiled_convolution: ", images, " images of ", height, " x ", width, " cells, ", channels, " channels, ",
            outputs, " outputs, expected more than none of each, the last two multiples of 32");
    require(x && weight && bias && out, "a pointer is null; pass data_ptr() of a CPU tensor");
    const TiledConvolution all_of{reinterpret_cast<const uint16_t*>(x),
                                  reinterpret_cast<const uint16_t*>(weight),
                                  reinterpret_cast<const float*>(bias),
                                  reinterpret_cast<const uint16_t*>(residual),
                                  reinterpret_cast<uint16_t*>(out),
                                  images,
                                  height,
                                  width,
                                  channels,
                                  outputs,
                                  side};
    const Block block(all_of);
    const int64_t panels = all_of.panels();
    share(block.count(all_of) * panels, threads, [&](int64_t first, int64_t last) {
        Held held(all_of, block);
        const Configured configured;
        int64_t filled = -1;
        for (int64_t i = first; i < last; ++i) {
            if (i / panels != filled) held.fill(filled = i / panels);
            held.multiply(i % panels);
        }
    });
}

}  // namespace datasetdm

#else

namespace datasetdm {

void tiled_convolution_cpu(uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t, int64_t) {
    require(false, "tiled_convolution: built without tiles of bf16");
}

}  // namespace datasetdm

#endif
