// The kernels' C interface; `compiled_model.py` and `shims.cpp` call it.

#pragma once

#include <cstdint>

// multiplications from which on a loop is shared among threads: waking a second one costs some microseconds
constexpr int64_t kWorthThreads = 400000;

// whether a product of so many rows is shared among threads; its weights, read once, count as three rows more
inline bool is_worth_threads(int64_t rows, int64_t width, int64_t outputs) {
    return width * outputs * (rows + 3) > kWorthThreads;
}

extern "C" {

// what a layer's attention must know of a call: buffers (key_heads, capacity, ...) by layer, `length` slots of which are
// in use, the parent of each of the call's slots, -1 the root, and how many of them are tokens; masks follow them
struct SpaceCall {
    void* const* keys;
    void* const* values;
    const int32_t* parents;
    int64_t length, capacity, tokens;
};

// of the calls to come in this thread
void space_begin(const SpaceCall* call);

// query (heads, rows, width), key and value (key_heads, rows, ...), each with a stride per head and per row; keys and
// values (key_heads, capacity, ...) contiguous; output (rows, heads, value_width) contiguous
#define SPACE_ATTEND(NAME)                                                                                           \
    void NAME(const void* query, int64_t query_head, int64_t query_row, const void* key, int64_t key_head,           \
              int64_t key_row, const void* value, int64_t value_head, int64_t value_row, void* keys, void* values,   \
              void* output, const int32_t* parents, int64_t rows, int64_t heads, int64_t key_heads, int64_t width,   \
              int64_t value_width, int64_t length, int64_t capacity, float scale)
SPACE_ATTEND(space_attend_float32);
SPACE_ATTEND(space_attend_bfloat16);

// input (rows, width), packed (outputs / 16, width / depth, 16, depth), bias (outputs) or null, output (rows, outputs)
#define SPACE_LINEAR(NAME)                                                                                         \
    void NAME(const void* input, const void* packed, const void* bias, void* output, int64_t rows, int64_t width, \
              int64_t outputs)
SPACE_LINEAR(space_linear_float32);
SPACE_LINEAR(space_linear_bfloat16);

// logits (rows, width); tokens and probs (rows, kSpaceLikely), the most probable first; as many as `sampling.TOP_K`
constexpr int kSpaceLikely = 16;
#define SPACE_LIKELY(NAME) void NAME(const void* logits, int64_t* tokens, float* probs, int64_t rows, int64_t width)
SPACE_LIKELY(space_likely_float32);
SPACE_LIKELY(space_likely_bfloat16);
}
