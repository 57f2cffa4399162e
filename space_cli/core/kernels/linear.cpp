// Linear layers over packed weights, for the few rows of a step.
//
// A row's result is one chain of sums over its inputs, in order, whatever rows stand beside it: a token evaluated alone
// and the same token evaluated in a block get the same bits, in any dtype. Weights lie in tiles of 16 outputs, so that a
// step reads them once, in order, and is done when memory is.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "lanes.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int kTile = kLanes;

struct InFloat32 {
    typedef float Value;
    static constexpr int kDepth = 1;  // inputs of one entry of a tile
    typedef Floats Entry;
    static Entry entry(const Value* from) {
        Entry values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static Floats add(Floats total, Entry weights, const Value* input) { return total + weights * input[0]; }
    static void store(Value* to, Floats values) { store_float32(to, values); }
    static float widened(Value value) { return value; }
};

struct InBfloat16 {
    typedef uint16_t Value;
    static constexpr int kDepth = 2;
    typedef Words Entry;
    static Entry entry(const Value* from) {
        Entry values;
        std::memcpy(&values, from, sizeof values);
        return values;
    }
    static Floats add(Floats total, Entry weights, const Value* input) {
        uint32_t pair;
        std::memcpy(&pair, input, sizeof pair);
#ifdef __AVX512BF16__
        return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)(__m512i)weights, (__m512bh)_mm512_set1_epi32(pair));
#else
        const Words first = weights << 16, second = weights & 0xffff0000u;
        total += (Floats)first * widened(input[0]);
        return total + (Floats)second * widened(input[1]);
#endif
    }
    static void store(Value* to, Floats values) { store_bfloat16(to, values); }
    static float widened(Value value) {
        const uint32_t word = uint32_t(value) << 16;
        float wide;
        std::memcpy(&wide, &word, sizeof wide);
        return wide;
    }
};

// `kTiles` tiles of outputs for `kRows` rows
template <typename Type, int kTiles, int kRows>
void multiply(const typename Type::Value* input, const typename Type::Value* packed, const typename Type::Value* bias,
              typename Type::Value* output, int64_t width, int64_t outputs) {
    Floats totals[kTiles][kRows];
#pragma GCC unroll 4
    for (int tile = 0; tile < kTiles; ++tile)
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) totals[tile][row] = Floats{};
    for (int64_t at = 0; at < width; at += Type::kDepth)
        for (int tile = 0; tile < kTiles; ++tile) {
            const typename Type::Entry weights = Type::entry(packed + (tile * width + at) * kTile);
            for (int row = 0; row < kRows; ++row)
                totals[tile][row] = Type::add(totals[tile][row], weights, input + row * width + at);
        }
    for (int tile = 0; tile < kTiles; ++tile) {
        Floats shift{};
        if (bias)
            for (int lane = 0; lane < kTile; ++lane) shift[lane] = Type::widened(bias[tile * kTile + lane]);
        for (int row = 0; row < kRows; ++row)
            Type::store(output + row * outputs + tile * kTile, totals[tile][row] + shift);
    }
}

template <typename Type, int kTiles>
void multiply_rows(const typename Type::Value* input, const typename Type::Value* packed,
                   const typename Type::Value* bias, typename Type::Value* output, int64_t rows, int64_t width,
                   int64_t outputs) {
    int64_t row = 0;
    const auto run = [&](auto count) {
        multiply<Type, kTiles, decltype(count)::value>(input + row * width, packed, bias, output + row * outputs, width,
                                                       outputs);
        row += decltype(count)::value;
    };
    while (rows - row >= 6) run(std::integral_constant<int, 6>());
    if (rows - row >= 4) run(std::integral_constant<int, 4>());
    if (rows - row >= 2) run(std::integral_constant<int, 2>());
    if (rows - row >= 1) run(std::integral_constant<int, 1>());
}

template <typename Type>
void linear(const typename Type::Value* from, const typename Type::Value* weights, const typename Type::Value* bias,
            typename Type::Value* to, int64_t rows, int64_t width, int64_t outputs) {
    constexpr int kTogether = 4;
    const int64_t tiles = outputs / kTile, groups = (tiles + kTogether - 1) / kTogether;
    // waking a second thread costs some microseconds
    const bool pays = width * outputs * (rows + 3) > 400000;
#pragma omp parallel for schedule(static) if (pays)
    for (int64_t group = 0; group < groups; ++group) {
        int64_t tile = group * kTogether;
        const auto run = [&](auto count) {
            constexpr int kTiles = decltype(count)::value;
            multiply_rows<Type, kTiles>(from, weights + tile * width * kTile, bias ? bias + tile * kTile : nullptr,
                                        to + tile * kTile, rows, width, outputs);
            tile += kTiles;
        };
        if (tiles - tile >= kTogether) {
            run(std::integral_constant<int, kTogether>());
        } else {
            while (tile < tiles) run(std::integral_constant<int, 1>());
        }
    }
}

}  // namespace

#define SPACE_LINEAR_OF(NAME, TYPE)                                                                              \
    SPACE_LINEAR(NAME) {                                                                                         \
        typedef TYPE::Value Value;                                                                               \
        linear<TYPE>(static_cast<const Value*>(input), static_cast<const Value*>(packed),                        \
                     static_cast<const Value*>(bias), static_cast<Value*>(output), rows, width, outputs);        \
    }

SPACE_LINEAR_OF(space_linear_float32, InFloat32)
SPACE_LINEAR_OF(space_linear_bfloat16, InBfloat16)
