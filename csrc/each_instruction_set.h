// Includes the file that ROWS names once for each instruction set: in a namespace WITH_INSTRUCTIONS, for functions with
// the attribute INSTRUCTIONS over vectors of VECTOR_BYTES; where WITH_DOTS is defined once more for AVX-512 with
// products of bf16 pairs (HAS_DOTS).

#if defined(__x86_64__)
#ifdef WITH_DOTS
#define WITH_INSTRUCTIONS avx512_dots
#define INSTRUCTIONS __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,fma")))
#define VECTOR_BYTES 64
#define HAS_DOTS
#include ROWS
#undef WITH_INSTRUCTIONS
#undef INSTRUCTIONS
#undef VECTOR_BYTES
#undef HAS_DOTS
#endif

#define WITH_INSTRUCTIONS avx512
#define INSTRUCTIONS __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma")))
#define VECTOR_BYTES 64
#include ROWS
#undef WITH_INSTRUCTIONS
#undef INSTRUCTIONS
#undef VECTOR_BYTES

#define WITH_INSTRUCTIONS avx2
#define INSTRUCTIONS __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#include ROWS
#undef WITH_INSTRUCTIONS
#undef INSTRUCTIONS
#undef VECTOR_BYTES
#endif

#define WITH_INSTRUCTIONS baseline
#define INSTRUCTIONS
#define VECTOR_BYTES 16
#include ROWS
#undef WITH_INSTRUCTIONS
#undef INSTRUCTIONS
#undef VECTOR_BYTES

#undef ROWS

// Calls `function` of the instruction set whose vectors have this many bytes.
#if !defined(__x86_64__)
#define WITH_VECTORS(vector_bytes, function, ...) baseline::function(__VA_ARGS__)
#elif defined(WITH_DOTS)
#define WITH_VECTORS(vector_bytes, function, ...)                            \
    ((vector_bytes) == 64 && has_dots() ? avx512_dots::function(__VA_ARGS__) \
     : (vector_bytes) == 64             ? avx512::function(__VA_ARGS__)      \
     : (vector_bytes) == 32             ? avx2::function(__VA_ARGS__)        \
                                        : baseline::function(__VA_ARGS__))
#else
#define WITH_VECTORS(vector_bytes, function, ...)           \
    ((vector_bytes) == 64   ? avx512::function(__VA_ARGS__) \
     : (vector_bytes) == 32 ? avx2::function(__VA_ARGS__)   \
                            : baseline::function(__VA_ARGS__))
#endif
