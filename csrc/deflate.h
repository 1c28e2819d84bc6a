// A zlib stream (RFC 1950, 1951) by integer arithmetic alone: the same bytes on every machine, whatever zlib is
// installed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace datasetdm {

// Appends the zlib stream of the bytes; made for pictures: fast, and nearly as small as zlib's default.
void append_zlib(const uint8_t* data, size_t size, std::vector<uint8_t>& stream);

uint32_t adler32(const uint8_t* data, size_t size);

}  // namespace datasetdm
