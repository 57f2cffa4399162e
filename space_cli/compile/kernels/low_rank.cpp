// What an adapter adds to linear layers over one input, for the rows that are masks.
//
// Weights are bfloat16, computed with as float32. down (ranks / 16, width, 16) has the ranks of all the layers in a row;
// up (outputs / 16, rank, 16) has for each output the weights of its own layer's ranks.

#include "low_rank.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kTile = 16, kMostRows = 8;

float widened(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

float widened(float value) { return value; }

uint16_t rounded(float value, uint16_t) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);  // to nearest, ties to even
}

float rounded(float value, float) { return value; }

// totals (rows, 16) of a tile of weights (width, 16) and inputs (rows, width) with a stride
void multiply(const uint16_t* tile, const float* input, int64_t stride, int64_t rows, int64_t width,
              float totals[kMostRows][kTile]) {
    for (int64_t row = 0; row < rows; ++row) std::fill_n(totals[row], kTile, 0.0f);
    for (int64_t at = 0; at < width; ++at) {
        float weights[kTile];
        for (int lane = 0; lane < kTile; ++lane) weights[lane] = widened(tile[at * kTile + lane]);
        for (int64_t row = 0; row < rows; ++row)
            for (int lane = 0; lane < kTile; ++lane) totals[row][lane] += weights[lane] * input[row * stride + at];
    }
}

template <typename T>
void add(const T* input, const uint16_t* down, const uint16_t* up, const int64_t* ends, T* output, int64_t layers,
         int64_t rank, int64_t rows, int64_t width) {
    static thread_local std::vector<float> inputs_of_thread, inner_of_thread;
    std::vector<float>&inputs = inputs_of_thread, &inner = inner_of_thread;
    const int64_t ranks = layers * rank, outputs = ends[layers - 1];
    inputs.resize(rows * width);
    inner.resize(rows * ranks);
    for (int64_t at = 0; at < rows * width; ++at) inputs[at] = widened(input[at]);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < ranks / kTile; ++tile)
            for (int64_t row = 0; row < rows; row += kMostRows) {
                const int64_t count = std::min<int64_t>(kMostRows, rows - row);
                float totals[kMostRows][kTile];
                multiply(down + tile * width * kTile, inputs.data() + row * width, width, count, width, totals);
                for (int64_t each = 0; each < count; ++each)
                    std::memcpy(&inner[(row + each) * ranks + tile * kTile], totals[each], sizeof totals[each]);
            }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < outputs / kTile; ++tile) {
            const int64_t layer = std::upper_bound(ends, ends + layers, tile * kTile) - ends;
            for (int64_t row = 0; row < rows; row += kMostRows) {
                const int64_t count = std::min<int64_t>(kMostRows, rows - row);
                float totals[kMostRows][kTile];
                multiply(up + tile * rank * kTile, inner.data() + row * ranks + layer * rank, ranks, count, rank, totals);
                for (int64_t each = 0; each < count; ++each) {
                    T* to = output + (row + each) * outputs + tile * kTile;
                    for (int lane = 0; lane < kTile; ++lane) to[lane] = rounded(widened(to[lane]) + totals[each][lane], T());
                }
            }
        }
    }
}

}  // namespace

void space_low_rank_float32(const float* input, const void* down, const void* up, const int64_t* ends, float* output,
                            int64_t layers, int64_t rank, int64_t rows, int64_t width) {
    add(input, static_cast<const uint16_t*>(down), static_cast<const uint16_t*>(up), ends, output, layers, rank, rows,
        width);
}

void space_low_rank_bfloat16(const void* input, const void* down, const void* up, const int64_t* ends, void* output,
                             int64_t layers, int64_t rank, int64_t rows, int64_t width) {
    add(static_cast<const uint16_t*>(input), static_cast<const uint16_t*>(down), static_cast<const uint16_t*>(up), ends,
        static_cast<uint16_t*>(output), layers, rank, rows, width);
}
