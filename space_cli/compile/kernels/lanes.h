// Vectors as wide as the processor's registers, and bfloat16 in and out of them.
//
// What a compiler may round in two ways is spelled out: products are added by `fused`, which is one instruction where
// the processor has it, and kernels are built with `-ffp-contract=off`, so that each copy of a loop rounds alike.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
#define SPACE_AVX2 1
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

struct Bfloat16 {
    uint16_t bits;
};

inline Floats broadcast(float value) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(value);
#elif defined(SPACE_AVX2)
    return (Floats)_mm256_set1_ps(value);
#else
    return Floats{value, value, value, value};
#endif
}

// total + one * other
inline Floats fused(Floats total, Floats one, Floats other) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)one, (__m512)other, (__m512)total);
#elif defined(SPACE_AVX2)
    return (Floats)_mm256_fmadd_ps((__m256)one, (__m256)other, (__m256)total);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)total, (float32x4_t)one, (float32x4_t)other);
#else
    return total + one * other;
#endif
}

inline float widened(float value) { return value; }

inline float widened(Bfloat16 value) {
    const uint32_t word = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Floats load(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    // compilers make up to four instructions of the conversion
#if defined(__AVX512F__)
    const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(SPACE_AVX2)
    const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return (Floats)(words << 16);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void store(Bfloat16* to, Floats values) {
    Words words = (Words)values;
    words += 0x7fff + ((words >> 16) & 1);  // to nearest, ties to even
    const Halves halves = __builtin_convertvector(words >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// one value, or minus infinity where there is none
inline void store_one(float* to, const float* from) { *to = from ? *from : -__builtin_inff(); }

inline void store_one(Bfloat16* to, const Bfloat16* from) { *to = from ? *from : Bfloat16{0xff80}; }

// e^x for x <= 0, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2
inline Floats exponential(Floats x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const Ints n = __builtin_convertvector(fused(broadcast(-0.5f), x, broadcast(1.44269504f)), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    Floats r = fused(x, whole, broadcast(-0.693359375f));
    r = fused(r, whole, broadcast(2.12194440e-4f));
    Floats y = fused(broadcast(1.3981999507e-3f), r, broadcast(1.9875691500e-4f));
    y = fused(broadcast(8.3334519073e-3f), y, r);
    y = fused(broadcast(4.1665795894e-2f), y, r);
    y = fused(broadcast(1.6666665459e-1f), y, r);
    y = fused(broadcast(5.0000001201e-1f), y, r);
    y = fused(r, y * r, r) + 1.0f;
    return y * (Floats)((n + 127) << 23);
}
