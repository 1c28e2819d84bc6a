// Products of bf16 pairs, added in fp32: at twice the rate where the processor has them, else of the same factors in
// fp32. Included after vectors.h.

typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
constexpr int32_t kUpper = static_cast<int32_t>(0xffff0000);

INLINE Integers bits_of(const Vector& value) {
    Integers bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
INLINE Vector numbers_of(const Integers& bits) {
    Vector value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
// To the nearest bf16, in the upper halves; what is below is no part of it.
INLINE Integers rounded_bits(const Vector& value) {
    const Integers bits = bits_of(value);
    return bits + 0x7fff + (bits >> 16 & 1);
}

struct Both {
    Vector first, second;
};
INLINE Both unpaired(const int32_t* from) {
    Integers bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return {numbers_of(bits << 16), numbers_of(bits & kUpper)};
}
INLINE void store_both(int32_t* to, const Vector& first, const Vector& second) {
    const Integers pairs = (rounded_bits(first) >> 16 & 0xffff) | (rounded_bits(second) & kUpper);
    __builtin_memcpy(to, &pairs, sizeof pairs);
}

INLINE Vector load(const Bfloat* from) {
    Halves bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return numbers_of(__builtin_convertvector(bits, Integers) << 16);
}

#ifdef HAS_DOTS
typedef int32_t Paired;           // a pair of one row
constexpr int64_t kPairSize = 1;  // so many of them
struct Factors {                  // a pair of each column
    __m512bh pairs;
};
INLINE Factors factors(const int32_t* from) {
    Factors answer;
    __builtin_memcpy(&answer, from, sizeof answer);
    return answer;
}
INLINE void add_product(Vector& sum, const Paired* pair, const Factors& columns) {
    sum = (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(*pair), columns.pairs);
}
INLINE void store_paired(Paired* to, const Vector& value) {
    const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)value);
    __builtin_memcpy(to, &narrowed, sizeof narrowed);
}
INLINE void store(Bfloat* to, const Vector& value) {
    const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)value);
    __builtin_memcpy(to, &narrowed, sizeof narrowed);
}
#else
typedef float Paired;
constexpr int64_t kPairSize = 2;
typedef Both Factors;
INLINE Factors factors(const int32_t* from) { return unpaired(from); }
INLINE void add_product(Vector& sum, const Paired* pair, const Factors& columns) {
    sum += pair[0] * columns.first;
    sum += pair[1] * columns.second;
}
INLINE void store_paired(Paired* to, const Vector& value) {
    store(to, value == value ? numbers_of(rounded_bits(value) & kUpper) : value);
}  // a NaN stays one
INLINE void store(Bfloat* to, const Vector& value) {
    const Halves bits = __builtin_convertvector((value == value ? rounded_bits(value) : bits_of(value)) >> 16, Halves);
    __builtin_memcpy(to, &bits, sizeof bits);
}
#endif

INLINE int64_t paired_size(int64_t count) { return (count + 1) / 2 * kPairSize; }

// Numbers in the form of one row, the last pair filled up with a zero.
INSTRUCTIONS inline void pair_up(const float* from, int64_t count, Paired* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_paired(to + i / 2 * kPairSize, load(from + i));
    if (i == count) return;
    float last[kLanes] = {};
    Paired pairs[kLanes / 2 * kPairSize];
    std::memcpy(last, from + i, (count - i) * sizeof(float));
    store_paired(pairs, load(last));
    std::memcpy(to + i / 2 * kPairSize, pairs, paired_size(count - i) * sizeof(Paired));
}
