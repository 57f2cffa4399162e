// What a compiled model calls: tensors unpacked for the kernels, and what the running call knows beyond its arguments.
//
// Source: AOTInductor's C shims (`torch/csrc/inductor/aoti_torch/c/shim.h`); a compiled model finds these by name when loaded.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "quantized.h"
#include "tiles.h"

namespace {

// of the call that is under way in this thread
thread_local SpaceCall current{};

struct View {
    void* data;
    const int64_t *sizes, *strides;
    int64_t dims;

    explicit View(AtenTensorHandle tensor) {
        int64_t* found;
        aoti_torch_get_data_ptr(tensor, &data);
        aoti_torch_get_sizes(tensor, &found);
        sizes = found;
        aoti_torch_get_strides(tensor, &found);
        strides = found;
        aoti_torch_get_dim(tensor, &dims);
    }

    bool is_contiguous() const {
        int64_t stride = 1;
        for (int64_t dim = dims - 1; dim >= 0; --dim) {
            if (sizes[dim] != 1 && strides[dim] != stride) return false;
            stride *= sizes[dim];
        }
        return true;
    }
};

int32_t dtype_of(AtenTensorHandle tensor) {
    int32_t dtype;
    aoti_torch_get_dtype(tensor, &dtype);
    return dtype;
}

// a contiguous tensor of at most 4 dimensions
AOTITorchError make(const int64_t* sizes, int64_t dims, int32_t dtype, AtenTensorHandle* made) {
    int64_t strides[4], stride = 1;
    for (int64_t dim = dims - 1; dim >= 0; --dim) {
        strides[dim] = stride;
        stride *= sizes[dim];
    }
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, made);
}

bool is_half(AtenTensorHandle tensor) { return dtype_of(tensor) == aoti_torch_dtype_bfloat16(); }

// makes (..., outputs) of an input (..., width) and its dtype; `rows` becomes the number of them
AOTITorchError make_output(const View& from, int32_t dtype, int64_t outputs, int64_t* rows, AtenTensorHandle* made) {
    int64_t sizes[4] = {1, 1, 1, 1};
    if (from.dims > 4 || !from.is_contiguous()) return AOTI_TORCH_FAILURE;
    *rows = 1;
    for (int64_t dim = 0; dim < from.dims - 1; ++dim) *rows *= sizes[dim] = from.sizes[dim];
    sizes[from.dims - 1] = outputs;
    return make(sizes, from.dims, dtype, made);
}

// `space_update` for rows of bfloat16
void update_halves(const Bfloat16* input, Bfloat16* output, int64_t rows, int64_t width, int64_t outputs,
                   SpaceUpdate update) {
    static thread_local std::vector<float> sums;
    const int64_t masks = rows - update.first, size = masks * outputs;
    const float* inputs = inputs_of<Float32Tiles>(input + update.first * width, masks * width);
    Bfloat16* to = output + update.first * outputs;
    sums.resize(size);
    for (int64_t at = 0; at < size; at += kLanes) store(sums.data() + at, load(to + at));
    update.first = 0;
    space_update(inputs, sums.data(), masks, width, outputs, &update);
    for (int64_t at = 0; at < size; at += kLanes) store(to + at, load(sums.data() + at));
}

const void* data_of(AtenTensorHandle* tensor) { return tensor ? View(*tensor).data : nullptr; }

}  // namespace

extern "C" {

void space_begin(const SpaceCall* call) { current = *call; }

// input (1, rows, width) contiguous, packed as `linear.cpp` has it for type 0, else `quantized.cpp`, bias (outputs); down,
// up, ends and rank as in SpaceUpdate, for rows that are masks; makes (1, rows, outputs)
AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle input, AtenTensorHandle packed, AtenTensorHandle* bias,
                                            int64_t outputs, int64_t type, AtenTensorHandle* down, AtenTensorHandle* up,
                                            AtenTensorHandle* ends, int64_t rank, AtenTensorHandle* made) {
    const View from(input);
    int64_t rows;
    const AOTITorchError failed = make_output(from, dtype_of(input), outputs, &rows, made);
    if (failed) return failed;
    const int64_t width = from.sizes[from.dims - 1];
    void* to = View(*made).data;
    const bool has_update = down && current.tokens < rows;
    SpaceUpdate update{};
    if (has_update) {
        const View of_layers(*ends);
        update = {data_of(down), data_of(up), static_cast<const int64_t*>(of_layers.data), of_layers.sizes[0], rank,
                  current.tokens};
    }
    if (type) {
        space_linear_quantized(type, static_cast<const float*>(from.data), View(packed).data,
                               static_cast<const float*>(data_of(bias)), static_cast<float*>(to), rows, width, outputs,
                               has_update ? &update : nullptr);
        return AOTI_TORCH_SUCCESS;
    }
    const auto run = is_half(input) ? space_linear_bfloat16 : space_linear_float32;
    run(from.data, View(packed).data, data_of(bias), to, rows, width, outputs);
    if (!has_update) return AOTI_TORCH_SUCCESS;
    if (is_half(input))
        update_halves(static_cast<const Bfloat16*>(from.data), static_cast<Bfloat16*>(to), rows, width, outputs, update);
    else
        space_update(static_cast<const float*>(from.data), static_cast<float*>(to), rows, width, outputs, &update);
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_quantized_linear(AtenTensorHandle input, AtenTensorHandle packed, AtenTensorHandle* bias,
                                               int64_t outputs, int64_t type, AtenTensorHandle* made) {
    return aoti_torch_cpu_packed_linear(input, packed, bias, outputs, type, nullptr, nullptr, nullptr, 0, made);
}

// ids of any shape, contiguous; makes (..., width) float32
AOTITorchError aoti_torch_cpu_quantized_rows(AtenTensorHandle ids, AtenTensorHandle packed, int64_t width, int64_t type,
                                             AtenTensorHandle* made) {
    const View from(ids);
    int64_t sizes[4], rows = 1;
    if (from.dims > 3 || !from.is_contiguous()) return AOTI_TORCH_FAILURE;
    for (int64_t dim = 0; dim < from.dims; ++dim) rows *= sizes[dim] = from.sizes[dim];
    sizes[from.dims] = width;
    const AOTITorchError failed = make(sizes, from.dims + 1, aoti_torch_dtype_float32(), made);
    if (failed) return failed;
    space_rows_quantized(type, static_cast<const int64_t*>(from.data), View(packed).data,
                         static_cast<float*>(View(*made).data), rows, width);
    return AOTI_TORCH_SUCCESS;
}

// query (1, heads, rows, width), key and value (1, key_heads, rows, ...); makes (1, rows, heads, value_width)
AOTITorchError aoti_torch_cpu_cached_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                               int64_t layer, double scaling, AtenTensorHandle* made) {
    const View queries(query), keys(key), values(value);
    if (queries.strides[3] != 1 || keys.strides[3] != 1 || values.strides[3] != 1) return AOTI_TORCH_FAILURE;
    const int64_t rows = queries.sizes[2], heads = queries.sizes[1], value_width = values.sizes[3];
    const int64_t sizes[4] = {1, rows, heads, value_width};
    const AOTITorchError failed = make(sizes, 4, dtype_of(query), made);
    if (failed) return failed;
    const auto run = is_half(query) ? space_attend_bfloat16 : space_attend_float32;
    run(queries.data, queries.strides[1], queries.strides[2], keys.data, keys.strides[1], keys.strides[2], values.data,
        values.strides[1], values.strides[2], current.keys[layer], current.values[layer], View(*made).data,
        current.parents, rows, heads, keys.sizes[1], queries.sizes[3], value_width, current.length, current.capacity,
        float(scaling));
    return AOTI_TORCH_SUCCESS;
}

// logits (rows, width) contiguous; makes tokens and probs (rows, kSpaceLikely)
AOTITorchError aoti_torch_cpu_likely(AtenTensorHandle logits, AtenTensorHandle* tokens, AtenTensorHandle* probs) {
    const View from(logits);
    if (from.dims != 2 || !from.is_contiguous()) return AOTI_TORCH_FAILURE;
    const int64_t sizes[2] = {from.sizes[0], kSpaceLikely};
    AOTITorchError failed = make(sizes, 2, aoti_torch_dtype_int64(), tokens);
    if (!failed) failed = make(sizes, 2, aoti_torch_dtype_float32(), probs);
    if (failed) return failed;
    const auto run = is_half(logits) ? space_likely_bfloat16 : space_likely_float32;
    run(from.data, static_cast<int64_t*>(View(*tokens).data), static_cast<float*>(View(*probs).data), from.sizes[0],
        from.sizes[1]);
    return AOTI_TORCH_SUCCESS;
}
}
