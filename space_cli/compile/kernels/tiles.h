// Sums over tiles of weights, held in registers: what the kernels of linear layers share.
//
// Packed weights lie in tiles of 16 outputs: (outputs / 16, inputs / depth, 16, depth). A sum is one chain of fused
// products over its inputs, in order, whatever the number of rows. A chain may be interrupted anywhere: in between, its
// partial sum lies in memory as it was in its register.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "lanes.h"
#ifdef _OPENMP
#include <omp.h>
#endif

constexpr int kTile = 16;               // outputs of a tile
constexpr int kParts = kTile / kLanes;  // vectors of a tile's outputs

// Tiles of float32, or of what was widened to it, for rows of float32.
struct Float32Tiles {
    typedef float Value;
    typedef float Input;
    static constexpr int kDepth = 1;  // inputs of one entry of a tile
    static constexpr bool kIsWidened = true;

    // sums[vector of outputs][row] of one entry more; tiles lie `tile_stride` values apart, rows `row_stride`
    template <int kVectors, int kRows, typename Stored>
    static inline __attribute__((always_inline)) void add(Floats (&sums)[kVectors][kRows], const Stored* entry,
                                                          int64_t tile_stride, const Input* input, int64_t row_stride) {
        Floats weights[kVectors];
#pragma GCC unroll 16
        for (int each = 0; each < kVectors; ++each)
            weights[each] = load(entry + each / kParts * tile_stride + each % kParts * kLanes);
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
            const Floats value = broadcast(input[row * row_stride]);
#pragma GCC unroll 16
            for (int each = 0; each < kVectors; ++each) sums[each][row] = fused(sums[each][row], weights[each], value);
        }
    }
};

// What a call asks of a tile's sums: `count` entries of weights for `rows` rows.
template <typename Tiles>
struct TileCall {
    const typename Tiles::Input* input;
    const typename Tiles::Value* packed;
    int64_t row_stride, tile_stride, count;
};

// bytes ahead of their use at which weights are asked for: from memory, which few rows wait for (a fourth to a half faster
// than what processors foresee), or from the second cache, where those of a block lie while many rows pass
constexpr int kAhead = 16384, kAheadInBlock = 512;

// Add to the sums of `kTiles` tiles and `kRows` rows; `before` are earlier ones (kRows, kTiles * kTile), or null.
template <typename Tiles, int kTiles, int kRows, bool kInBlock, typename Finish>
inline void multiply(const TileCall<Tiles>& call, const float* before, const Finish& finish) {
    constexpr int kVectors = kTiles * kParts;
    Floats sums[kVectors][kRows];
#pragma GCC unroll 16
    for (int each = 0; each < kVectors; ++each)
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row)
            sums[each][row] = before ? load(before + row * kTiles * kTile + each * kLanes) : Floats{};
    for (int64_t at = 0; at < call.count; ++at) {
        const auto* entry = call.packed + at * kTile * Tiles::kDepth;
#pragma GCC unroll 4
        for (int tile = 0; tile < kTiles; ++tile)
            __builtin_prefetch(reinterpret_cast<const char*>(entry + tile * call.tile_stride) +
                                   (kInBlock ? kAheadInBlock : kAhead),
                               0, kInBlock ? 3 : 2);
        Tiles::add(sums, entry, call.tile_stride, call.input + at * Tiles::kDepth, call.row_stride);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
        for (int each = 0; each < kVectors; ++each) finish(row, each * kLanes, sums[each][row]);
}

constexpr int kMostTiles = 4, kMostRows = 6;
// sums that leave registers for weights and inputs
constexpr int kMostSums = kRegisters == 32 ? 24 : 12;

constexpr int most_rows(int tiles) { return std::min(kMostRows, kMostSums / (tiles * kParts)); }

// how many tiles are worked on together for so many rows: more where rows are too few to keep the multipliers busy
constexpr int tiles_together(int64_t rows) {
    int tiles = kMostTiles;
    while (tiles > 1 && most_rows(tiles) < std::min<int64_t>(rows, most_rows(1))) tiles /= 2;
    return tiles;
}

// Work on `rows` rows of `kTiles` tiles, some rows at a time, as alike in number as can be: run(from, how many).
template <int kTiles, typename Run>
inline void for_rows(int64_t rows, const Run& run) {
    constexpr int kMost = most_rows(kTiles);
    static_assert(kMost >= 1);
    int64_t row = 0;
    for (int64_t left = (rows + kMost - 1) / kMost; left > 0; --left) {
        const int64_t some = (rows - row + left - 1) / left;
        const auto call = [&](auto count) {
            if constexpr (decltype(count)::value <= kMost) run(row, count);
        };
        switch (some) {
            case 1: call(std::integral_constant<int, 1>()); break;
            case 2: call(std::integral_constant<int, 2>()); break;
            case 3: call(std::integral_constant<int, 3>()); break;
            case 4: call(std::integral_constant<int, 4>()); break;
            case 5: call(std::integral_constant<int, 5>()); break;
            default: call(std::integral_constant<int, 6>());
        }
        row += some;
    }
}

// entries of a block of inputs: its weights stay in the first cache while rows pass
constexpr int64_t kBlock = 256;
// rows from which on it pays to widen a block's weights once
constexpr int64_t kRowsWorthWidening = 12;

// Compute `kTiles` tiles of outputs for some rows: output(row, first of kLanes outputs, their sums). They are worked on in
// blocks of inputs where they are more than one look at the weights serves.
template <typename Tiles, int kTiles, bool kInBlocks, typename Output>
void compute_tiles(const typename Tiles::Input* input, const typename Tiles::Value* packed, int64_t rows, int64_t width,
                   const Output& output) {
    constexpr int kDepth = Tiles::kDepth;
    const int64_t entries = width / kDepth, block = kInBlocks ? kBlock / kDepth : entries;
    thread_local std::vector<float> partial, panel;
    partial.resize(block < entries ? rows * kTiles * kTile : 0);
    for (int64_t from = 0; from < entries; from += block) {
        const int64_t count = std::min(block, entries - from);
        const bool is_first = from == 0, is_last = from + count == entries;
        const auto run_with = [&](auto tiles, const auto* weights, int64_t tile_stride) {
            typedef decltype(tiles) Some;
            for_rows<kTiles>(rows, [&](int64_t row, auto some) {
                const TileCall<Some> call{input + row * width + from * kDepth, weights, width, tile_stride,
                                          count * kDepth / Some::kDepth};
                float* between = partial.data() + row * kTiles * kTile;
                const float* before = is_first ? nullptr : between;
                constexpr int kRows = decltype(some)::value;
                if (is_last)
                    multiply<Some, kTiles, kRows, kInBlocks>(call, before, [&](int each, int lane, Floats sums) {
                        output(row + each, lane, sums);
                    });
                else
                    multiply<Some, kTiles, kRows, kInBlocks>(call, before, [&](int each, int lane, Floats sums) {
                        store(between + each * kTiles * kTile + lane, sums);
                    });
            });
        };
        const typename Tiles::Value* weights = packed + from * kDepth * kTile;
        if constexpr (!Tiles::kIsWidened) {
            if (rows >= kRowsWorthWidening) {
                panel.resize(kTiles * kBlock * kTile);
                for (int tile = 0; tile < kTiles; ++tile)
                    Tiles::widen(panel.data() + tile * kBlock * kTile, weights + tile * width * kTile, count);
                run_with(Float32Tiles(), panel.data(), kBlock * kTile);
                continue;
            }
        }
        run_with(Tiles(), weights, width * kTile);
    }
}

// bytes of weights, and of inputs, that the second cache holds beside each other
constexpr int64_t kHeld = 512 * 1024;
// rows that weights of any width are read for at least
constexpr int64_t kLeastHeldRows = 96;

// Compute tiles `first` to `last`: output(tile, row, first of kLanes outputs, their sums). Of many rows and wide layers
// so many are worked on together as the second cache holds; each weight is then read from memory once.
template <typename Tiles, typename Output>
void compute_range(const typename Tiles::Input* input, const typename Tiles::Value* packed, int64_t rows, int64_t width,
                   int64_t first, int64_t last, const Output& output) {
    const int together = tiles_together(rows);
    const int64_t row_size = width * sizeof(typename Tiles::Input);
    const int64_t group_size = width * kTile * kMostTiles * sizeof(typename Tiles::Value);
    const int64_t held_rows = std::max(kHeld / row_size / kMostRows * kMostRows, kLeastHeldRows);
    const int64_t held_tiles = rows <= held_rows ? last - first : std::max<int64_t>(kHeld / group_size, 1) * kMostTiles;
    for (int64_t tile = first; tile < last;) {
        const int64_t end = std::min(tile + held_tiles, last), start = tile;
        for (int64_t row = 0; row < rows; row += held_rows) {
            const int64_t some = std::min(held_rows, rows - row);
            tile = start;
            const auto run = [&](auto count) {
                constexpr int kTiles = decltype(count)::value;
                const auto compute = [&](auto in_blocks) {
                    compute_tiles<Tiles, kTiles, decltype(in_blocks)::value>(
                        input + row * width, packed + tile * width * kTile, some, width,
                        [&](int64_t each, int lane, Floats sums) { output(tile, row + each, lane, sums); });
                };
                for (; tile + kTiles <= end; tile += kTiles)
                    if (rows > most_rows(kTiles))
                        compute(std::true_type());
                    else
                        compute(std::false_type());
            };
            if (together >= 4) run(std::integral_constant<int, most_rows(4) ? 4 : 1>());
            if (together >= 2) run(std::integral_constant<int, most_rows(2) ? 2 : 1>());
            run(std::integral_constant<int, 1>());
        }
    }
}

// rows as tiles take them
template <typename Tiles, typename T>
const typename Tiles::Input* inputs_of(const T* rows, int64_t count) {
    if constexpr (std::is_same_v<typename Tiles::Input, T>) {
        return rows;
    } else {
        thread_local std::vector<float> wide;
        wide.resize(count);
        for (int64_t at = 0; at < count; ++at) wide[at] = widened(rows[at]);
        return wide.data();
    }
}

// Share the tiles among threads where that pays, a run of neighbours each: work(first, last).
template <typename Work>
void for_tiles(int64_t tiles, bool pays, const Work& work) {
#ifdef _OPENMP
    const int64_t threads = pays ? std::min<int64_t>(omp_get_max_threads(), tiles) : 1;
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t thread = 0; thread < threads; ++thread)
            work(tiles * thread / threads, tiles * (thread + 1) / threads);
        return;
    }
#endif
    (void)pays;
    work(0, tiles);
}
