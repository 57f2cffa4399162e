// Linear layers over packed weights, for the few rows of a step and the many of a prompt.
//
// A row's result is one chain of sums over its inputs, in order, whatever rows stand beside it: a token evaluated alone
// and the same token evaluated in a block get the same bits, in any dtype. Few rows read the weights once, in order, and
// are done when memory is; many work through them block by block (`tiles.h`).

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "tiles.h"

namespace {

// Tiles of bfloat16, two inputs to an entry.
struct Bfloat16Tiles {
    typedef Bfloat16 Value;
    static constexpr int kDepth = 2;

    static Words pairs(const Value* entry) {
        Words words;
        std::memcpy(&words, entry, sizeof words);
        return words;
    }

#ifdef __AVX512BF16__
    typedef Bfloat16 Input;
    static constexpr bool kIsWidened = true;  // what the processor multiplies as it is needs no widening

    template <int kVectors, int kRows>
    static inline __attribute__((always_inline)) void add(Floats (&sums)[kVectors][kRows], const Value* entry,
                                                          int64_t tile_stride, const Input* input, int64_t row_stride) {
        Words weights[kVectors];
#pragma GCC unroll 16
        for (int each = 0; each < kVectors; ++each) weights[each] = pairs(entry + each * tile_stride);
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
            int32_t pair;
            std::memcpy(&pair, input + row * row_stride, sizeof pair);
#pragma GCC unroll 16
            for (int each = 0; each < kVectors; ++each)
                sums[each][row] = (Floats)_mm512_dpbf16_ps((__m512)sums[each][row], (__m512bh)(__m512i)weights[each],
                                                           (__m512bh)_mm512_set1_epi32(pair));
        }
    }
#else
    typedef float Input;
    static constexpr bool kIsWidened = false;

    template <int kVectors, int kRows>
    static inline __attribute__((always_inline)) void add(Floats (&sums)[kVectors][kRows], const Value* entry,
                                                          int64_t tile_stride, const Input* input, int64_t row_stride) {
        Words weights[kVectors];
#pragma GCC unroll 16
        for (int each = 0; each < kVectors; ++each)
            weights[each] = pairs(entry + each / kParts * tile_stride + each % kParts * kLanes * kDepth);
#pragma GCC unroll 2
        for (int input_of = 0; input_of < kDepth; ++input_of)
#pragma GCC unroll 6
            for (int row = 0; row < kRows; ++row) {
                const Floats value = broadcast(input[row * row_stride + input_of]);
#pragma GCC unroll 16
                for (int each = 0; each < kVectors; ++each)
                    sums[each][row] = fused(sums[each][row], one_of(weights[each], input_of), value);
            }
    }

    // `count` entries, as they stand in tiles of float32
    static void widen(float* to, const Value* entries, int64_t count) {
        for (int64_t at = 0; at < count; ++at)
            for (int part = 0; part < kParts; ++part) {
                const Words weights = pairs(entries + (at * kTile + part * kLanes) * kDepth);
                for (int input_of = 0; input_of < kDepth; ++input_of)
                    store(to + (at * kDepth + input_of) * kTile + part * kLanes, one_of(weights, input_of));
            }
    }

    static Floats one_of(Words weights, int input_of) {
        return (Floats)(input_of ? weights & 0xffff0000u : weights << 16);
    }
#endif
};

template <typename Tiles, typename T>
void linear(const T* from, const T* weights, const T* bias, T* to, int64_t rows, int64_t width, int64_t outputs) {
    const typename Tiles::Input* input = inputs_of<Tiles>(from, rows * width);
    for_tiles(outputs / kTile, is_worth_threads(rows, width, outputs), [&](int64_t first, int64_t last) {
        compute_range<Tiles>(input, weights, rows, width, first, last,
                             [&](int64_t tile, int64_t row, int lane, Floats sums) {
                                 const int64_t output = tile * kTile + lane;
                                 store(to + row * outputs + output, bias ? sums + load(bias + output) : sums);
                             });
    });
}

}  // namespace

SPACE_LINEAR(space_linear_float32) {
    linear<Float32Tiles>(static_cast<const float*>(input), static_cast<const float*>(packed),
                         static_cast<const float*>(bias), static_cast<float*>(output), rows, width, outputs);
}

SPACE_LINEAR(space_linear_bfloat16) {
    linear<Bfloat16Tiles>(static_cast<const Bfloat16*>(input), static_cast<const Bfloat16*>(packed),
                          static_cast<const Bfloat16*>(bias), static_cast<Bfloat16*>(output), rows, width, outputs);
}
