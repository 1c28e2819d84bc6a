#include "tiled_attention.h"

#include "check.h"
#include "tiles.h"

#ifdef HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "sharing.h"
#include "timing.h"

namespace datasetdm {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;  // whose scores are held at once, in 36 KB
constexpr int64_t kScoreStride = kKeys + 16;   // a power of two would send all rows to the same few lines of the cache

constexpr float kInfinite = std::numeric_limits<float>::infinity();

struct TiledAttention {
    const uint16_t *q, *k, *v;
    uint16_t* out;
    const std::vector<int64_t>&q_strides, &k_strides, &v_strides, &out_strides;  // of image, head and row
    int64_t heads, queries, keys, width;
    float scale;  // of scores that are powers of two

    int64_t key_steps() const { return rounded_up(width, kPairs) / kPairs; }  // tiles along the channels of a key
    int64_t value_tiles() const { return rounded_up(width, kRows) / kRows; }  // along those of a value
    int64_t padded_keys() const { return rounded_up(keys, kPairs); }
};

uint16_t* place_of(uint16_t* data, const std::vector<int64_t>& strides, int64_t image, int64_t head) {
    return data + image * strides[0] + head * strides[1];
}
const uint16_t* place_of(const uint16_t* data, const std::vector<int64_t>& strides, int64_t image, int64_t head) {
    return data + image * strides[0] + head * strides[1];
}

// Keys [S, d] in tiles of 16 keys and 32 channels, those of the same keys side by side: row r of a tile holds the
// channels 2 r and 2 r + 1 of each key. What is beyond the keys and the channels is zero.
void pack_keys(const uint16_t* from, int64_t stride, int64_t keys, int64_t width, int64_t steps, uint16_t* to) {
    std::memset(to, 0, rounded_up(keys, kPairs) * steps * kPairs * sizeof *to);
    for (int64_t key = 0; key < keys; ++key) {
        uint16_t* tile = to + key / kRows * steps * kTile + key % kRows * 2;
        for (int64_t channel = 0; channel < width; channel += 2)
            std::memcpy(tile + channel / 2 * kPairs, from + key * stride + channel, 4);
    }
}

// Values [S, d] in tiles of 32 keys and 16 channels, those of the same channels side by side: row r of a tile holds
// the keys 2 r and 2 r + 1 of each channel.
TILED void pack_values(const uint16_t* from, int64_t stride, int64_t keys, int64_t width, uint16_t* to) {
    const int64_t padded = rounded_up(keys, kPairs);
    for (int64_t channel = 0; channel < width; channel += kRows) {
        const __mmask16 mask = static_cast<__mmask16>((1u << std::min(width - channel, kRows)) - 1);
        uint16_t* rows = to + channel * padded;
        for (int64_t key = 0; key < padded; key += 2) {
            const uint16_t* place = from + key * stride + channel;
            const __mmask16 is_first = key < keys ? mask : 0, is_second = key + 1 < keys ? mask : 0;
            const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_first, place));
            const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_second, place + stride));
            _mm512_storeu_si512(rows + key * kRows, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
    }
}

// c [32, 16 or 32] = or += a [32, 32 steps] times `steps` tiles that begin at b, and as many at b + `apart` where the
// result has 32 columns.
template <bool kAdds, bool kIsWide>
INLINED void multiply(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t apart, int64_t steps, float* c,
                      int64_t c_stride) {
    const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
    float* lower = c + kRows * c_stride;
    if constexpr (kAdds) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, lower, c_bytes);
        if constexpr (kIsWide) {
            _tile_loadd(2, c + kRows, c_bytes);
            _tile_loadd(3, lower + kRows, c_bytes);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(4, a + step * kPairs, a_bytes);
        _tile_loadd(5, a + kRows * a_stride + step * kPairs, a_bytes);
        _tile_loadd(6, b + step * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (kIsWide) {
            _tile_loadd(7, b + apart + step * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, lower, c_bytes);
    if constexpr (kIsWide) {
        _tile_stored(2, c + kRows, c_bytes);
        _tile_stored(3, lower + kRows, c_bytes);
    }
}

// 2^x to 1e-4 of it, a tenth of what its rounding to bf16 loses: a polynomial of x - floor(x), times 2^floor(x).
INLINED __m512 power_of_two(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // zero of infinities
    __m512 sum = _mm512_set1_ps(0.078024521f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.22606716f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69583356f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.9999252f));
    return _mm512_scalef_ps(sum, x);
}

// The largest of `count` scores.
INLINED float largest(const float* scores, int64_t count) {
    __m512 top = _mm512_set1_ps(-kInfinite);
    int64_t i = 0;
    for (; i + kRows <= count; i += kRows) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
    const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
    top = _mm512_mask_max_ps(top, rest, top, _mm512_maskz_loadu_ps(rest, scores + i));
    return _mm512_reduce_max_ps(top);
}

// 2^(score * scale - top) of the first `count` of 16 scores, and zeros.
INLINED __m512 weights_of(const float* scores, int64_t count, __m512 scale, __m512 top) {
    const __m512 weights = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(scores), scale, top));
    if (count >= kRows) return weights;
    return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << std::max(count, int64_t{0})) - 1), weights);
}

// Writes the weights of `count` scores over these in bf16, and zeros up to a multiple of 32; their sum.
INLINED float weigh(float* scores, int64_t count, float scale, float top) {
    const __m512 factor = _mm512_set1_ps(scale), highest = _mm512_set1_ps(top);
    __m512 total = _mm512_setzero_ps(), other = total;
    for (int64_t i = 0; i < count; i += kPairs) {
        const __m512 first = weights_of(scores + i, count - i, factor, highest);
        const __m512 second = weights_of(scores + i + kRows, count - i - kRows, factor, highest);
        total = _mm512_add_ps(total, first);
        other = _mm512_add_ps(other, second);
        const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
        std::memcpy(reinterpret_cast<uint16_t*>(scores) + i, &both, sizeof both);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(total, other));
}

// What lies in the memory of a thread, each part at a multiple of 64 bytes.
struct Memory {
    uint16_t *keys, *values, *queries;
    float *scores, *answer;

    Memory(const TiledAttention& all_of, KeptFloats& kept) {
        const int64_t of_keys = all_of.padded_keys() * all_of.key_steps() * kPairs / 2;
        const int64_t of_values = all_of.padded_keys() * all_of.value_tiles() * kRows / 2;
        const int64_t of_queries = kQueries * all_of.key_steps() * kPairs / 2;
        const int64_t of_answer = kQueries * all_of.value_tiles() * kRows;
        float* next = kept.of(of_keys + of_values + of_queries + of_answer + kQueries * kScoreStride + kRows);
        next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / sizeof(float);
        const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
        keys = reinterpret_cast<uint16_t*>(take(of_keys));
        values = reinterpret_cast<uint16_t*>(take(of_values));
        queries = reinterpret_cast<uint16_t*>(take(of_queries));
        scores = take(kQueries * kScoreStride);
        answer = take(of_answer);
    }
};

// `rows` queries, at most 64, against all keys, which are packed.
TILED void attend_rows(const TiledAttention& all_of, const Memory& memory, const uint16_t* q, uint16_t* out,
                       int64_t rows) {
    const int64_t steps = all_of.key_steps(), tiles = all_of.value_tiles(), answer_width = tiles * kRows;
    const int64_t q_width = steps * kPairs;
    std::memset(memory.queries, 0, kQueries * q_width * sizeof *q);
    for (int64_t row = 0; row < rows; ++row)
        std::memcpy(memory.queries + row * q_width, q + row * all_of.q_strides[2], all_of.width * sizeof *q);
    std::memset(memory.answer, 0, kQueries * answer_width * sizeof(float));
    alignas(64) float highest[kQueries], next[kQueries], share[kQueries], totals[kQueries] = {};
    std::fill_n(highest, kQueries, -kInfinite);
    for (int64_t first = 0; first < all_of.keys; first += kKeys) {
        const int64_t count = std::min(all_of.keys - first, kKeys), padded = rounded_up(count, kPairs);
        const uint16_t* keys = memory.keys + first * q_width;
        for (int64_t key = 0; key < padded; key += kPairs)
            for (int64_t row = 0; row < kQueries; row += kSquare)
                multiply<false, true>(memory.queries + row * q_width, q_width, keys + key * q_width, steps * kTile,
                                      steps, memory.scores + row * kScoreStride + key, kScoreStride);
        for (int64_t row = 0; row < kQueries; ++row)
            next[row] = std::max(highest[row], largest(memory.scores + row * kScoreStride, count) * all_of.scale);
        for (int64_t row = 0; row < kQueries; row += kRows) {
            const __m512 before = _mm512_load_ps(highest + row), now = _mm512_load_ps(next + row);
            _mm512_store_ps(share + row, power_of_two(_mm512_sub_ps(before, now)));
        }
        for (int64_t row = 0; row < kQueries; ++row) {
            // scores of which none is more than minus infinity weigh nothing beside later ones
            const float top = next[row] == -kInfinite ? 0.0f : next[row];
            const float total = weigh(memory.scores + row * kScoreStride, count, all_of.scale, top);
            if (next[row] != highest[row]) {
                const __m512 factor = _mm512_set1_ps(share[row]);
                float* sums = memory.answer + row * answer_width;
                for (int64_t i = 0; i < answer_width; i += kRows)
                    _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), factor));
                totals[row] *= share[row];
            }
            totals[row] += total;
            highest[row] = next[row];
        }
        const int64_t apart = all_of.padded_keys() * kRows;
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const uint16_t* values = memory.values + tile * apart + first * kRows;
            for (int64_t row = 0; row < kQueries; row += kSquare) {
                const auto* weights = reinterpret_cast<const uint16_t*>(memory.scores + row * kScoreStride);
                float* sums = memory.answer + row * answer_width + tile * kRows;
                const int64_t weight_stride = 2 * kScoreStride, key_steps = padded / kPairs;
                if (tile + 1 < tiles)
                    multiply<true, true>(weights, weight_stride, values, apart, key_steps, sums, answer_width);
                else
                    multiply<true, false>(weights, weight_stride, values, apart, key_steps, sums, answer_width);
            }
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float divisor = highest[row] == -kInfinite ? std::numeric_limits<float>::quiet_NaN() : totals[row];
        for (int64_t i = 0; i < all_of.width; i += kRows) {
            const __m512 answer = _mm512_loadu_ps(memory.answer + row * answer_width + i);
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_div_ps(answer, _mm512_set1_ps(divisor)));
            std::memcpy(out + row * all_of.out_strides[2] + i, &rounded,
                        std::min(all_of.width - i, kRows) * sizeof *out);
        }
    }
}

TILED void attend_tiles(const TiledAttention& all_of, int64_t pair, int64_t first, int64_t last) {
    static thread_local KeptFloats kept;
    const Memory memory(all_of, kept);
    const int64_t image = pair / all_of.heads, head = pair % all_of.heads;
    pack_keys(place_of(all_of.k, all_of.k_strides, image, head), all_of.k_strides[2], all_of.keys, all_of.width,
              all_of.key_steps(), memory.keys);
    pack_values(place_of(all_of.v, all_of.v_strides, image, head), all_of.v_strides[2], all_of.keys, all_of.width,
                memory.values);
    const uint16_t* q = place_of(all_of.q, all_of.q_strides, image, head);
    uint16_t* out = place_of(all_of.out, all_of.out_strides, image, head);
    const Configured configured;
    for (int64_t row = first; row < last; row += kQueries)
        attend_rows(all_of, memory, q + row * all_of.q_strides[2], out + row * all_of.out_strides[2],
                    std::min(last - row, kQueries));
}

bool ask_for_tiles() {
    constexpr unsigned kBf16Products = 1u << 22, kTiles = 1u << 24;  // CPUID 7, edx
    constexpr long kAsk = 0x1023, kTileData = 18;                    // ARCH_REQ_XCOMP_PERM of Linux, <asm/prctl.h>
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16Products) || !(d & kTiles)) return false;
    return __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

}  // namespace

bool multiplies_tiles() {
    static const bool allowed = ask_for_tiles();
    return allowed;
}

void tiled_attention_cpu(uintptr_t q, const std::vector<int64_t>& q_strides, uintptr_t k,
                         const std::vector<int64_t>& k_strides, uintptr_t v, const std::vector<int64_t>& v_strides,
                         uintptr_t out, const std::vector<int64_t>& out_strides, int64_t images, int64_t heads,
                         int64_t queries, int64_t keys, int64_t width, double scale, int64_t threads) {
    const Timed timed(Work::attention);
    require(multiplies_tiles(), "tiled_attention: this CPU or system has no tiles of bf16");
    require(threads > 0, "tiled_attention: threads is ", threads, ", expected at least 1");
    require(images > 0 && heads > 0 && queries > 0 && keys > 0 && width > 0 && width % 2 == 0 && scale > 0,
            "tiled_attention: ", images, " images, ", heads, " heads, ", queries, " queries, ", keys, " keys of ",
            width, " channels, expected more than none of each and an even number of channels");
    for (const auto* strides : {&q_strides, &k_strides, &v_strides, &out_strides})
        require(strides->size() == 3, "tiled_attention: ", strides->size(), " strides, expected image, head and row");
    require(q && k && v && out, "a pointer is null; pass data_ptr() of a CPU tensor");
    const TiledAttention work{reinterpret_cast<const uint16_t*>(q),
                              reinterpret_cast<const uint16_t*>(k),
                              reinterpret_cast<const uint16_t*>(v),
                              reinterpret_cast<uint16_t*>(out),
                              q_strides,
                              k_strides,
                              v_strides,
                              out_strides,
                              heads,
                              queries,
                              keys,
                              width,
                              static_cast<float>(scale * 1.4426950408889634)};
    const int64_t pairs = images * heads, blocks = (queries + kQueries - 1) / kQueries;
    const int64_t parts = std::min((threads + pairs - 1) / pairs, blocks);  // of a head, where there are more threads
    share(pairs * parts, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t part = i % parts;
            attend_tiles(work, i / parts, blocks * part / parts * kQueries,
                         std::min(blocks * (part + 1) / parts * kQueries, queries));
        }
    });
}

}  // namespace datasetdm

#else

namespace datasetdm {

bool multiplies_tiles() { return false; }

void tiled_attention_cpu(uintptr_t, const std::vector<int64_t>&, uintptr_t, const std::vector<int64_t>&, uintptr_t,
                         const std::vector<int64_t>&, uintptr_t, const std::vector<int64_t>&, int64_t, int64_t, int64_t,
                         int64_t, int64_t, double, int64_t) {
    require(false, "tiled_attention: built without tiles of bf16");
}

}  // namespace datasetdm

#endif
