// Low-rank updates of linear layers.

#pragma once

#include <cstdint>

extern "C" {

// input (rows, width); down (layers * rank / 16, width, 16) and up (outputs / 16, rank, 16) bfloat16; ends (layers): where
// the outputs of each layer end, multiples of 16; adds to output (rows, outputs)
void space_low_rank_float32(const float* input, const void* down, const void* up, const int64_t* ends, float* output,
                            int64_t layers, int64_t rank, int64_t rows, int64_t width);
void space_low_rank_bfloat16(const void* input, const void* down, const void* up, const int64_t* ends, void* output,
                             int64_t layers, int64_t rank, int64_t rows, int64_t width);
}
