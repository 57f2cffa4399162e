// Weights of 4 to 16 bits in the types of ggml, packed for the kernels.

#pragma once

#include <cstdint>

extern "C" {

// bytes of a packed (outputs, width) matrix of a type; 0 where the type is none of ours
int64_t space_packed_bytes(int64_t type, int64_t outputs, int64_t width);

// blocks: the file's rows, each of width / (inputs of a block) blocks; order (outputs) names the file's row of each
// output, null: as they lie
void space_pack(int64_t type, const void* blocks, const int64_t* order, void* packed, int64_t outputs, int64_t width);

// an adapter's low-rank updates of `layers` layers over one input, for the rows from `first` on; packed as type Q8_0: down
// (layers * rank, width filled up with zeros to a multiple of 32) and up (outputs, rank), rank a multiple of 32; ends
// (layers): where the outputs of each layer end, multiples of 16
struct SpaceUpdate {
    const void* down;
    const void* up;
    const int64_t* ends;
    int64_t layers, rank, first;
};

// input (rows, width), bias (outputs) or null, output (rows, outputs), update or null
void space_linear_quantized(int64_t type, const float* input, const void* packed, const float* bias, float* output,
                            int64_t rows, int64_t width, int64_t outputs, const SpaceUpdate* update);

// adds an update to output (rows, outputs) of input (rows, width)
void space_update(const float* input, float* output, int64_t rows, int64_t width, int64_t outputs,
                  const SpaceUpdate* update);

// output (rows, width): the weights of the outputs `ids`
void space_rows_quantized(int64_t type, const int64_t* ids, const void* packed, float* output, int64_t rows,
                          int64_t width);
}
