// What an adapter adds to linear layers over one input, for the rows that are masks.
//
// Weights are bfloat16, computed with as float32. down (ranks / 16, width, 16) has the ranks of all the layers in a row;
// up (outputs / 16, rank, 16) has for each output the weights of its own layer's ranks.

#include "low_rank.h"

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace {

// Tiles of bfloat16 for rows of float32.
struct StoredTiles : Float32Tiles {
    typedef Bfloat16 Value;
    static constexpr bool kIsWidened = false;

    static void widen(float* to, const Value* entries, int64_t count) {
        for (int64_t at = 0; at < count * kTile; at += kLanes) store(to + at, load(entries + at));
    }
};

template <typename T>
void add(const T* input, const Bfloat16* down, const Bfloat16* up, const int64_t* ends, T* output, int64_t layers,
         int64_t rank, int64_t rows, int64_t width) {
    static thread_local std::vector<float> inner_of_thread;
    std::vector<float>& inner = inner_of_thread;
    const int64_t outputs = ends[layers - 1];
    const float* inputs = inputs_of<StoredTiles>(input, rows * width);
    inner.resize(layers * rows * rank);  // (layers, rows, rank)
    // waking a second thread costs some microseconds
    const auto pays = [&](int64_t inputs, int64_t outputs) { return inputs * outputs * (rows + 3) > 100000; };
    for_tiles(layers * rank / kTile, pays(width, layers * rank), [&](int64_t first, int64_t last) {
        compute_range<StoredTiles>(inputs, down, rows, width, first, last,
                                   [&](int64_t tile, int64_t row, int lane, Floats sums) {
                                       const int64_t at = tile * kTile + lane;
                                       store(&inner[(at / rank * rows + row) * rank + at % rank], sums);
                                   });
    });
    for_tiles(outputs / kTile, pays(rank, outputs), [&](int64_t first, int64_t last) {
        for (int64_t layer = 0, start = 0; layer < layers; start = ends[layer++] / kTile) {
            const int64_t from = std::max(first, start), to = std::min(last, ends[layer] / kTile);
            if (from >= to) continue;
            compute_range<StoredTiles>(&inner[layer * rows * rank], up, rows, rank, from, to,
                                       [&](int64_t tile, int64_t row, int lane, Floats sums) {
                                           T* at = output + row * outputs + tile * kTile + lane;
                                           store(at, load(at) + sums);
                                       });
        }
    });
}

}  // namespace

void space_low_rank_float32(const float* input, const void* down, const void* up, const int64_t* ends, float* output,
                            int64_t layers, int64_t rank, int64_t rows, int64_t width) {
    add(input, static_cast<const Bfloat16*>(down), static_cast<const Bfloat16*>(up), ends, output, layers, rank, rows,
        width);
}

void space_low_rank_bfloat16(const void* input, const void* down, const void* up, const int64_t* ends, void* output,
                             int64_t layers, int64_t rank, int64_t rows, int64_t width) {
    add(static_cast<const Bfloat16*>(input), static_cast<const Bfloat16*>(down), static_cast<const Bfloat16*>(up), ends,
        static_cast<Bfloat16*>(output), layers, rank, rows, width);
}
