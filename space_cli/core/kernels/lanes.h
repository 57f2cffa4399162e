// Vectors of 16 lanes, and bfloat16 in and out of them.

#pragma once

#include <cstdint>
#include <cstring>

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
