// Tiles of bf16 (AMX), where the compiler knows them.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define HAS_TILES
#include <immintrin.h>

#include <cstdint>

#define TILED __attribute__((target("amx-tile,amx-bf16,avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma")))
#define INLINED TILED __attribute__((always_inline)) inline

namespace datasetdm {

constexpr int64_t kRows = 16;              // of a tile, and its columns in fp32
constexpr int64_t kPairs = 32;             // bf16 numbers of a tile's row
constexpr int64_t kTile = kRows * kPairs;  // bf16 numbers of a tile
constexpr int64_t kSquare = 2 * kRows;     // of a result that is multiplied at once

inline int64_t rounded_up(int64_t count, int64_t size) { return (count + size - 1) / size * size; }

// All eight tiles of 16 rows of 64 bytes while it lives; what another library had configured is put back.
class Configured {
public:
    TILED Configured() {
        alignas(64) static const uint8_t wanted[64] = {
            1,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,   // palette 1
            64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,  64, 0,   // bytes of a row, 16 bits each
            0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,   //
            16, 16, 16, 16, 16, 16, 16, 16};                                 // rows
        _tile_storeconfig(before_);
        _tile_loadconfig(wanted);
    }
    TILED ~Configured() {
        if (before_[0])
            _tile_loadconfig(before_);
        else
            _tile_release();
    }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;

private:
    alignas(64) uint8_t before_[64];
};

}  // namespace datasetdm
#endif
