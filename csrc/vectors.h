// Vectors of floats; included in the namespace of an instruction set, see each_instruction_set.h.

#ifndef INLINE
#define INLINE INSTRUCTIONS __attribute__((always_inline)) inline
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t kLanes = VECTOR_BYTES / 4;

INLINE Vector load(const float* from) {
    Vector answer;
    __builtin_memcpy(&answer, from, sizeof answer);
    return answer;
}
INLINE void store(float* to, const Vector& value) { __builtin_memcpy(to, &value, sizeof value); }
