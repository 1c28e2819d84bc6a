#include "deflate.h"

#include <algorithm>
#include <array>
#include <utility>

namespace datasetdm {
namespace {

constexpr size_t kBlock = size_t{1} << 17;  // bytes coded with one set of Huffman codes
constexpr size_t kWindow = 32768, kLongest = 258;
constexpr int kHashBits = 14, kMostBits = 15;
constexpr int kEnd = 256, kFirstLength = 257, kLengthCodes = 286, kDistanceCodes = 30, kLengthsCodes = 19;
constexpr std::array<uint8_t, kLengthsCodes> kLengthsOrder = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                              11, 4,  12, 3, 13, 2, 14, 1, 15};
constexpr std::array<uint8_t, 3> kRepeatBits = {2, 3, 7};  // after the symbols 16, 17, 18

// Literals from where the last match ended, then one match; a length of 0 ends the block.
struct Sequence {
    uint32_t literals;
    uint16_t length, distance;
};

struct Symbol {
    uint16_t number, extra;
    uint8_t extra_bits;
};

// Of the lengths 3..258 and the distances 1..32768, after the tables of RFC 1951, 3.2.5.
constexpr Symbol length_symbol(unsigned length) {
    if (length == kLongest) return {kFirstLength + 28, 0, 0};
    const unsigned value = length - 3;
    unsigned bits = 0;
    while (value >> (bits + 3)) ++bits;
    return {static_cast<uint16_t>(kFirstLength + 4 * bits + (value >> bits)),
            static_cast<uint16_t>(value & ((1u << bits) - 1)), static_cast<uint8_t>(bits)};
}

inline Symbol distance_symbol(unsigned distance) {
    const unsigned value = distance - 1;
    if (value < 4) return {static_cast<uint16_t>(value), 0, 0};
    const unsigned bits = 30 - static_cast<unsigned>(__builtin_clz(value));
    return {static_cast<uint16_t>(2 * bits + (value >> bits)), static_cast<uint16_t>(value & ((1u << bits) - 1)),
            static_cast<uint8_t>(bits)};
}

struct LengthTable {
    std::array<Symbol, kLongest + 1> of{};
    constexpr LengthTable() {
        for (unsigned length = 3; length <= kLongest; ++length) of[length] = length_symbol(length);
    }
};
constexpr LengthTable kLengthSymbols;

// Both compile to one instruction where bytes lie little end first.
inline uint64_t load64(const uint8_t* at) {
    uint64_t value = 0;
    for (int k = 0; k < 8; ++k) value |= static_cast<uint64_t>(at[k]) << 8 * k;
    return value;
}

inline void store64(uint8_t* at, uint64_t value) {
    for (int k = 0; k < 8; ++k) at[k] = static_cast<uint8_t>(value >> 8 * k);
}

// Bytes from `at` on that repeat those `distance` before, at most kLongest.
inline size_t match_length(const uint8_t* at, size_t distance, const uint8_t* end) {
    const size_t most = std::min(static_cast<size_t>(end - at), kLongest);
    const uint8_t* before = at - distance;
    size_t length = 0;
    for (; length + 8 <= most; length += 8) {
        const uint64_t difference = load64(at + length) ^ load64(before + length);
        if (difference) return length + static_cast<size_t>(__builtin_ctzll(difference)) / 8;
    }
    while (length < most && at[length] == before[length]) ++length;
    return length;
}

// Finds repeats: eight bytes of the byte before or at the distance used last, or sixteen that stood anywhere else in
// the window. Shorter ones cost more than they save: after the filters most bytes of a picture need only a few bits.
class Matcher {
public:
    explicit Matcher(const uint8_t* data) : data_(data), last_(size_t{1} << kHashBits, 0) {}

    // The sequences of data[begin, end); matches may reach back before `begin`.
    void split(size_t begin, size_t end, std::vector<Sequence>& sequences) {
        sequences.clear();
        size_t at = begin, literals = begin;
        while (at + 16 <= end) {
            const size_t distance = find(at);
            if (!distance) {
                at += 1 + (at - literals) / 16;  // where nothing repeats, looking everywhere would be most of the work
                continue;
            }
            size_t length = match_length(data_ + at, distance, data_ + end);
            while (at > literals && at > distance && length < kLongest && data_[at - 1] == data_[at - 1 - distance])
                --at, ++length;
            if (distance > 1) repeated_ = distance;
            sequences.push_back(
                {static_cast<uint32_t>(at - literals), static_cast<uint16_t>(length), static_cast<uint16_t>(distance)});
            literals = at += length;
        }
        sequences.push_back({static_cast<uint32_t>(end - literals), 0, 0});
    }

private:
    // How far back the bytes at `at` stand too, 0 where that is not known.
    size_t find(size_t at) {
        const uint64_t next = load64(data_ + at);
        uint32_t& place = last_[next * 0x9E3779B97F4A7C15ull >> (64 - kHashBits)];
        const size_t distance = place ? at + 1 - place : 0;  // a place of 0 says never
        place = static_cast<uint32_t>(at + 1);
        const auto is_at = [&](size_t back) { return load64(data_ + at - back) == next; };
        if (at && is_at(1)) return 1;
        if (repeated_ && is_at(repeated_)) return repeated_;
        const bool is_near = distance && distance <= kWindow;
        return is_near && is_at(distance) && load64(data_ + at + 8 - distance) == load64(data_ + at + 8) ? distance : 0;
    }

    const uint8_t* data_;
    std::vector<uint32_t> last_;
    size_t repeated_ = 0;
};

template <size_t N>
struct Code {
    std::array<uint8_t, N> lengths{};
    std::array<uint16_t, N> bits{};  // lowest first, as they are sent
};

// Lengths of at most `longest` bits: Huffman's, and where those are longer, the nearest that still form a code (Kraft's
// sum is 1).
template <size_t N>
void set_lengths(const std::array<uint32_t, N>& counts, int longest, Code<N>& code) {
    std::vector<std::pair<uint32_t, uint16_t>> used;
    for (size_t symbol = 0; symbol < N; ++symbol)
        if (counts[symbol]) used.emplace_back(counts[symbol], static_cast<uint16_t>(symbol));
    code.lengths.fill(0);
    if (used.size() < 2) {
        if (!used.empty()) code.lengths[used[0].second] = 1;
        return;
    }
    std::sort(used.begin(), used.end());
    const size_t leaves = used.size(), nodes = 2 * leaves - 1;
    std::vector<uint32_t> weights(nodes), parents(nodes), depths(nodes, 0);
    for (size_t k = 0; k < leaves; ++k) weights[k] = used[k].first;
    size_t leaf = 0, inner = leaves;  // the lightest leaf and the lightest inner node without a parent
    for (size_t node = leaves; node < nodes; ++node)
        for (int child = 0; child < 2; ++child) {
            const size_t lighter =
                leaf < leaves && (inner == node || weights[leaf] <= weights[inner]) ? leaf++ : inner++;
            weights[node] += weights[lighter];
            parents[lighter] = static_cast<uint32_t>(node);
        }
    std::array<uint32_t, kMostBits + 1> at_length{};
    for (size_t node = nodes - 1; node-- > 0;) {
        depths[node] = depths[parents[node]] + 1;
        if (node < leaves) ++at_length[std::min<uint32_t>(depths[node], static_cast<uint32_t>(longest))];
    }
    uint32_t sum = 0;
    for (int length = 1; length <= longest; ++length) sum += at_length[length] << (longest - length);
    for (; sum > 1u << longest;
         --sum) {  // one of the longest moves up to be the brother of a shorter one, which goes down a level
        int length = longest - 1;
        while (!at_length[length]) --length;
        --at_length[longest], --at_length[length], at_length[length + 1] += 2;
    }
    size_t k = 0;
    for (int length = longest; length > 0; --length)
        for (uint32_t n = 0; n < at_length[length]; ++n) code.lengths[used[k++].second] = static_cast<uint8_t>(length);
}

template <size_t N>
void set_bits(Code<N>& code) {
    std::array<uint16_t, kMostBits + 2> next{};
    for (uint8_t length : code.lengths)
        if (length) ++next[length + 1];
    for (int length = 1; length <= kMostBits; ++length)
        next[length + 1] = static_cast<uint16_t>((next[length] + next[length + 1]) << 1);
    for (size_t symbol = 0; symbol < N; ++symbol) {
        const int length = code.lengths[symbol];
        uint16_t turned = 0;
        if (length) {
            const uint16_t straight = next[length]++;
            for (int bit = 0; bit < length; ++bit) turned = static_cast<uint16_t>(turned << 1 | (straight >> bit & 1));
        }
        code.bits[symbol] = turned;
    }
}

// Bits into bytes, lowest first; the caller has made room.
class BitWriter {
public:
    explicit BitWriter(uint8_t* at) : at_(at) {}

    void put(uint64_t bits, unsigned count) {
        held_ |= bits << count_;
        count_ += count;
    }

    // To be called before more than 57 bits have gathered.
    void flush() {
        store64(at_, held_);
        at_ += count_ / 8;
        held_ >>= count_ & ~7u;
        count_ &= 7;
    }

    uint8_t* to_byte() {
        count_ = (count_ + 7) & ~7u;
        flush();
        return at_;
    }

private:
    uint8_t* at_;
    uint64_t held_ = 0;
    unsigned count_ = 0;
};

// One symbol of the coded code lengths, 16 to 18 with a number of repeats.
struct Step {
    uint8_t symbol, repeats;
};

std::vector<Step> steps_of(const std::vector<uint8_t>& lengths) {
    std::vector<Step> steps;
    for (size_t k = 0; k < lengths.size();) {
        size_t run = 1;
        while (k + run < lengths.size() && lengths[k + run] == lengths[k]) ++run;
        size_t left = run;
        if (lengths[k]) steps.push_back({lengths[k], 0}), --left;
        while (left >= 3) {
            const size_t most = lengths[k] ? 6 : left > 10 ? 138 : 10;
            const size_t taken = std::min(left, most);
            const uint8_t symbol = lengths[k] ? 16 : left > 10 ? 18 : 17;
            steps.push_back({symbol, static_cast<uint8_t>(taken - (symbol == 18 ? 11 : 3))});
            left -= taken;
        }
        for (; left; --left) steps.push_back({lengths[k], 0});
        k += run;
    }
    return steps;
}

class Encoder {
public:
    Encoder(const uint8_t* data, std::vector<uint8_t>& stream) : data_(data), stream_(stream), matcher_(data) {}

    // One block, beginning and ending at a whole byte: a block that is not the last is followed by an empty stored one.
    void block(size_t begin, size_t end, bool is_last) {
        matcher_.split(begin, end, sequences_);
        count(begin);
        set_lengths(literal_counts_, kMostBits, literal_);
        set_lengths(distance_counts_, kMostBits, distance_);
        describe();
        const uint64_t bits = cost();
        const size_t stored = end - begin + 5 * ((end - begin + 65534) / 65535);
        if (bits / 8 + 8 >= stored) return store(begin, end, is_last);
        const size_t before = stream_.size();
        stream_.resize(before + bits / 8 + 32);
        uint8_t* const stop = write(begin, stream_.data() + before, is_last);
        stream_.resize(static_cast<size_t>(stop - stream_.data()));
    }

    void store(size_t begin, size_t end, bool is_last) {
        do {
            const size_t size = std::min<size_t>(end - begin, 65535);
            stream_.push_back(is_last && begin + size == end);
            for (const size_t value : {size, ~size})
                for (int shift : {0, 8}) stream_.push_back(static_cast<uint8_t>(value >> shift));
            stream_.insert(stream_.end(), data_ + begin, data_ + begin + size);
            begin += size;
        } while (begin < end);
    }

private:
    void count(size_t begin) {
        std::array<std::array<uint32_t, 256>, 4> bytes{};  // four, as equal neighbours would wait for each other
        literal_counts_.fill(0);
        distance_counts_.fill(0);
        const uint8_t* at = data_ + begin;
        for (const Sequence& sequence : sequences_) {
            const uint8_t* const end = at + sequence.literals;
            for (; at + 4 <= end; at += 4) ++bytes[0][at[0]], ++bytes[1][at[1]], ++bytes[2][at[2]], ++bytes[3][at[3]];
            for (; at < end; ++at) ++bytes[0][*at];
            if (!sequence.length) break;
            ++literal_counts_[kLengthSymbols.of[sequence.length].number];
            ++distance_counts_[distance_symbol(sequence.distance).number];
            at += sequence.length;
        }
        for (size_t byte = 0; byte < 256; ++byte)
            literal_counts_[byte] = bytes[0][byte] + bytes[1][byte] + bytes[2][byte] + bytes[3][byte];
        literal_counts_[kEnd] = 1;
    }

    void describe() {
        literals_used_ = kLengthCodes;
        while (literals_used_ > kFirstLength && !literal_.lengths[literals_used_ - 1]) --literals_used_;
        distances_used_ = kDistanceCodes;
        while (distances_used_ > 1 && !distance_.lengths[distances_used_ - 1]) --distances_used_;
        std::vector<uint8_t> lengths(literal_.lengths.begin(), literal_.lengths.begin() + literals_used_);
        lengths.insert(lengths.end(), distance_.lengths.begin(), distance_.lengths.begin() + distances_used_);
        steps_ = steps_of(lengths);
        std::array<uint32_t, kLengthsCodes> counts{};
        for (const Step& step : steps_) ++counts[step.symbol];
        set_lengths(counts, 7, lengths_);
        lengths_used_ = kLengthsCodes;
        while (lengths_used_ > 4 && !lengths_.lengths[kLengthsOrder[lengths_used_ - 1]]) --lengths_used_;
    }

    uint64_t cost() const {
        uint64_t bits = 17 + 3 * static_cast<uint64_t>(lengths_used_);
        for (const Step& step : steps_)
            bits += lengths_.lengths[step.symbol] + (step.symbol > 15 ? kRepeatBits[step.symbol - 16] : 0);
        for (size_t symbol = 0; symbol < kLengthCodes; ++symbol)
            bits += static_cast<uint64_t>(literal_counts_[symbol]) * literal_.lengths[symbol];
        for (size_t symbol = 0; symbol < kDistanceCodes; ++symbol)
            bits += static_cast<uint64_t>(distance_counts_[symbol]) * distance_.lengths[symbol];
        for (const Sequence& sequence : sequences_)
            if (sequence.length)
                bits += kLengthSymbols.of[sequence.length].extra_bits + distance_symbol(sequence.distance).extra_bits;
        return bits;
    }

    uint8_t* write(size_t begin, uint8_t* target, bool is_last) {
        set_bits(literal_), set_bits(distance_), set_bits(lengths_);
        BitWriter out(target);
        out.put(is_last, 1), out.put(2, 2), out.put(literals_used_ - 257, 5), out.put(distances_used_ - 1, 5),
            out.put(lengths_used_ - 4, 4);
        for (int k = 0; k < lengths_used_; ++k) out.flush(), out.put(lengths_.lengths[kLengthsOrder[k]], 3);
        for (const Step& step : steps_) {
            out.flush();
            out.put(lengths_.bits[step.symbol], lengths_.lengths[step.symbol]);
            if (step.symbol > 15) out.put(step.repeats, kRepeatBits[step.symbol - 16]);
        }
        std::array<uint32_t, 256> codes;  // of a literal: its bits, above them how many they are
        for (size_t byte = 0; byte < 256; ++byte)
            codes[byte] = static_cast<uint32_t>(literal_.bits[byte]) | static_cast<uint32_t>(literal_.lengths[byte])
                                                                           << 16;
        const uint8_t* at = data_ + begin;
        for (const Sequence& sequence : sequences_) {
            const uint8_t* const end = at + sequence.literals;
            for (; at + 3 <= end; at += 3) {
                out.flush();
                for (int k = 0; k < 3; ++k) out.put(codes[at[k]] & 0xffff, codes[at[k]] >> 16);
            }
            for (; at < end; ++at) out.flush(), out.put(codes[*at] & 0xffff, codes[*at] >> 16);
            if (!sequence.length) break;
            out.flush();
            const Symbol length = kLengthSymbols.of[sequence.length], distance = distance_symbol(sequence.distance);
            out.put(literal_.bits[length.number], literal_.lengths[length.number]),
                out.put(length.extra, length.extra_bits);
            out.put(distance_.bits[distance.number], distance_.lengths[distance.number]),
                out.put(distance.extra, distance.extra_bits);
            at += sequence.length;
        }
        out.flush();
        out.put(literal_.bits[kEnd], literal_.lengths[kEnd]);
        if (is_last) return out.to_byte();
        out.flush();
        out.put(0, 3);  // an empty stored block, so that the next block begins at a whole byte
        uint8_t* const end = out.to_byte();
        end[0] = end[1] = 0, end[2] = end[3] = 0xff;
        return end + 4;
    }

    const uint8_t* data_;
    std::vector<uint8_t>& stream_;
    Matcher matcher_;
    std::vector<Sequence> sequences_;
    std::vector<Step> steps_;
    std::array<uint32_t, kLengthCodes> literal_counts_{};
    std::array<uint32_t, kDistanceCodes> distance_counts_{};
    Code<kLengthCodes> literal_;
    Code<kDistanceCodes> distance_;
    Code<kLengthsCodes> lengths_;
    int literals_used_ = 0, distances_used_ = 0, lengths_used_ = 0;
};

}  // namespace

void append_zlib(const uint8_t* data, size_t size, std::vector<uint8_t>& stream) {
    stream.push_back(0x78), stream.push_back(0x01);  // a window of 32 KiB, made for speed
    Encoder encoder(data, stream);
    for (size_t begin = 0; begin < size; begin += kBlock)
        encoder.block(begin, std::min(begin + kBlock, size), begin + kBlock >= size);
    if (!size) encoder.store(0, 0, true);
    const uint32_t check = adler32(data, size);
    for (int shift : {24, 16, 8, 0}) stream.push_back(static_cast<uint8_t>(check >> shift));
}

uint32_t adler32(const uint8_t* data, size_t size) {
    constexpr uint32_t kPrime = 65521, kStrip = 32;
    constexpr size_t kMost = 5536;  // bytes after which the sums may leave 32 bits
    uint32_t low = 1, high = 0;
    while (size) {
        size_t part = std::min(size, kMost);
        size -= part;
        for (; part >= kStrip; part -= kStrip, data += kStrip) {
            uint32_t sum = 0, weighted = 0;
            for (uint32_t k = 0; k < kStrip; ++k) sum += data[k], weighted += (kStrip - k) * data[k];
            high += kStrip * low + weighted;
            low += sum;
        }
        for (; part; --part) low += *data++, high += low;
        low %= kPrime, high %= kPrime;
    }
    return high << 16 | low;
}

}  // namespace datasetdm
