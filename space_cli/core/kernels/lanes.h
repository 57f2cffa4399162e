// Vectors of 16 lanes, and bfloat16 in and out of them.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline void store_float32(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline void store_bfloat16(void* to, Floats values) {
    Words words;
    std::memcpy(&words, &values, sizeof words);
    words += 0x7fff + ((words >> 16) & 1);  // to nearest, ties to even
    Halves halves = __builtin_convertvector(words >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

struct Bfloat16 {
    uint16_t bits;
};

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Floats load(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
#ifdef __AVX512F__
    // compilers make four instructions of the conversion
    Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves) << 16;
#else
    Words words = __builtin_convertvector(halves, Words) << 16;
#endif
    Floats values;
    std::memcpy(&values, &words, sizeof values);
    return values;
}

inline void store(float* to, Floats values) { store_float32(to, values); }

inline void store(Bfloat16* to, Floats values) { store_bfloat16(to, values); }

// one value, or minus infinity where there is none
inline void store_one(float* to, const float* from) { *to = from ? *from : -__builtin_inff(); }

inline void store_one(Bfloat16* to, const Bfloat16* from) { *to = from ? *from : Bfloat16{0xff80}; }

// e^x for x <= 0, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2
inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    Floats whole = __builtin_convertvector(n, Floats);
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Ints power = (n + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}
