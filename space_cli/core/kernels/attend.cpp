// One layer's attention of one block: append the block's keys and values to the cache, then attend.
//
// A row's result is a function of its query and of the keys it sees, in their order, and of nothing else: neither the
// number of rows in the call nor the length of the buffer changes a bit. A token evaluated alone and the same token
// evaluated in a block therefore get the same bits, in any dtype. Only the part of the cache in use is read.
//
// Plain C interface, loaded with ctypes: no torch headers, one second to compile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

struct Bfloat16 {
    uint16_t bits;
};

Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

Floats load(const Bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Floats values;
    std::memcpy(&values, &words, sizeof values);
    return values;
}

void store(float* to, Floats values) { store_float32(to, values); }

void store(Bfloat16* to, Floats values) { store_bfloat16(to, values); }

#if defined(__clang__)
#define SPACE_ROTATED(values, by)                                                                                    \
    __builtin_shufflevector(values, values, (by), (by) + 1, (by) + 2, (by) + 3, (by) + 4, (by) + 5, (by) + 6, (by) + 7, \
                            (by) + 8, (by) + 9, (by) + 10, (by) + 11, (by) + 12, (by) + 13, (by) + 14, (by) + 15)
#else
constexpr Ints kFirst = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#define SPACE_ROTATED(values, by) __builtin_shuffle(values, (kFirst + (by)) & (kLanes - 1))
#endif

float sum(Floats values) {
    values += SPACE_ROTATED(values, 8);
    values += SPACE_ROTATED(values, 4);
    values += SPACE_ROTATED(values, 2);
    values += SPACE_ROTATED(values, 1);
    return values[0];
}

// e^x for x <= 0, within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2
Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    Floats whole = __builtin_convertvector(n, Floats);
    Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    Ints power = (n + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

template <typename T>
struct States {
    const T* data;
    int64_t head_stride, row_stride;
    const T* at(int64_t head, int64_t row) const { return data + head * head_stride + row * row_stride; }
};

// some queries of one key head, worked on together so that a key is read once for all of them
template <int kQueries>
struct Queries {
    std::vector<float> queries[kQueries];
    std::vector<float> weights[kQueries];
    std::vector<int64_t> tails[kQueries];  // slots of the block that a query sees, in order

    // scores[at] of these queries for one key
    template <typename T>
    void score(const T* key, int first, int last, int64_t at, int64_t width, float scale) {
        Floats totals[kQueries] = {};
        for (int64_t lane = 0; lane < width; lane += kLanes) {
            Floats part = load(key + lane);
            for (int query = first; query < last; ++query) totals[query] += load(&queries[query][lane]) * part;
        }
        for (int query = first; query < last; ++query) weights[query][at] = sum(totals[query]) * scale;
    }

    // turn the first `count` scores of a query into weights; return one over their sum
    float normalise(int query, int64_t count) {
        std::vector<float>& scores = weights[query];
        float most = -INFINITY;
        for (int64_t key = 0; key < count; ++key) most = scores[key] > most ? scores[key] : most;
        for (int64_t key = count; key % kLanes; ++key) scores[key] = -INFINITY;
        Floats totals{};
        for (int64_t key = 0; key < count; key += kLanes) {
            Floats part = load(&scores[key]);
            Floats share = exponential(part - most);
            share = part == -INFINITY ? Floats{} : share;
            totals += share;
            store(&scores[key], share);
        }
        return 1.0f / sum(totals);
    }

    // whether the same slot stands at `at` in all tails
    bool all_see(size_t at) const {
        for (int query = 0; query < kQueries; ++query)
            if (at >= tails[query].size() || tails[query][at] != tails[0][at]) return false;
        return true;
    }

    // place of the key that query `query` sees at `at`
    int64_t place(int query, int64_t at, int64_t length) const {
        return at < length ? at : length + tails[query][at - length];
    }

    // the weighted sum of `kParts` vectors of the values, from lane `lane` on; all see the first `shared` keys
    template <int kParts, typename T>
    void mix(const T* values, int64_t length, int64_t shared, int64_t width, int64_t lane, const float* inverses,
             T* const* outputs) {
        Floats mixed[kQueries][kParts] = {};
        for (int64_t at = 0; at < shared; ++at)
            for (int part = 0; part < kParts; ++part) {
                Floats value = load(values + place(0, at, length) * width + lane + part * kLanes);
                for (int query = 0; query < kQueries; ++query) mixed[query][part] += value * weights[query][at];
            }
        for (int query = 0; query < kQueries; ++query)
            for (int64_t at = shared; at < length + int64_t(tails[query].size()); ++at)
                for (int part = 0; part < kParts; ++part) {
                    Floats value = load(values + place(query, at, length) * width + lane + part * kLanes);
                    mixed[query][part] += value * weights[query][at];
                }
        for (int query = 0; query < kQueries; ++query)
            for (int part = 0; part < kParts; ++part)
                store(outputs[query] + lane + part * kLanes, mixed[query][part] * inverses[query]);
    }
};

struct Sizes {
    int64_t rows, heads, key_heads, width, value_width, length, capacity;
};

// attend with queries `first` to `first + kQueries` of a key head; query i is row i / per_group of head i % per_group
template <int kQueries, typename T>
void attend_some(States<T> query, const T* keys, const T* values, T* output, const int32_t* parents, const Sizes& sizes,
                 int64_t key_head, int64_t first, float scale) {
    thread_local Queries<kQueries> some;
    const int64_t per_group = sizes.heads / sizes.key_heads, length = sizes.length;
    T* outputs[kQueries];
    float inverses[kQueries];
    for (int each = 0; each < kQueries; ++each) {
        const int64_t row = (first + each) / per_group, head = key_head * per_group + (first + each) % per_group;
        outputs[each] = output + (row * sizes.heads + head) * sizes.value_width;
        some.queries[each].resize(sizes.width);
        for (int64_t lane = 0; lane < sizes.width; lane += kLanes)
            store(&some.queries[each][lane], load(query.at(head, row) + lane));
        some.tails[each].clear();
        for (int32_t slot = row; slot >= 0; slot = parents[slot]) some.tails[each].push_back(slot);
        std::reverse(some.tails[each].begin(), some.tails[each].end());
        some.weights[each].resize(length + sizes.rows + kLanes);
    }
    int64_t shared = length;
    while (some.all_see(shared - length)) ++shared;
    for (int64_t at = 0; at < shared; ++at)
        some.score(keys + some.place(0, at, length) * sizes.width, 0, kQueries, at, sizes.width, scale);
    for (int each = 0; each < kQueries; ++each) {
        const int64_t count = length + some.tails[each].size();
        for (int64_t at = shared; at < count; ++at)
            some.score(keys + some.place(each, at, length) * sizes.width, each, each + 1, at, sizes.width, scale);
        inverses[each] = some.normalise(each, count);
    }
    int64_t lane = 0;
    for (; lane + 4 * kLanes <= sizes.value_width; lane += 4 * kLanes)
        some.template mix<4>(values, length, shared, sizes.value_width, lane, inverses, outputs);
    for (; lane < sizes.value_width; lane += kLanes)
        some.template mix<1>(values, length, shared, sizes.value_width, lane, inverses, outputs);
}

template <typename T>
void attend(States<T> query, States<T> key, States<T> value, T* keys, T* values, T* output, const int32_t* parents,
            const Sizes& sizes, float scale) {
    const int64_t keys_of_head = sizes.capacity * sizes.width, values_of_head = sizes.capacity * sizes.value_width;
    for (int64_t head = 0; head < sizes.key_heads; ++head)
        for (int64_t row = 0; row < sizes.rows; ++row) {
            std::memcpy(keys + head * keys_of_head + (sizes.length + row) * sizes.width, key.at(head, row),
                        sizes.width * sizeof(T));
            std::memcpy(values + head * values_of_head + (sizes.length + row) * sizes.value_width, value.at(head, row),
                        sizes.value_width * sizeof(T));
        }
    constexpr int kTogether = 4;
    const int64_t queries = sizes.rows * sizes.heads / sizes.key_heads, whole = queries / kTogether;
    const int64_t calls = whole + queries % kTogether;
    // waking a second thread costs some microseconds
    const bool pays = sizes.heads * sizes.rows * (sizes.length + sizes.rows) * (sizes.width + sizes.value_width) > 400000;
#pragma omp parallel for collapse(2) schedule(static) if (pays)
    for (int64_t head = 0; head < sizes.key_heads; ++head)
        for (int64_t call = 0; call < calls; ++call) {
            const T *own_keys = keys + head * keys_of_head, *own_values = values + head * values_of_head;
            if (call < whole)
                attend_some<kTogether>(query, own_keys, own_values, output, parents, sizes, head, call * kTogether, scale);
            else
                attend_some<1>(query, own_keys, own_values, output, parents, sizes, head,
                               whole * kTogether + call - whole, scale);
        }
}

}  // namespace

// query (heads, rows, width), key and value (key_heads, rows, ...), each with a stride per head and per row; keys and
// values (key_heads, capacity, ...) contiguous; output (rows, heads, value_width) contiguous; parents (rows), -1 the root
#define SPACE_ATTEND(NAME, TYPE)                                                                                        \
    extern "C" void NAME(const TYPE* query, int64_t query_head, int64_t query_row, const TYPE* key, int64_t key_head,   \
                         int64_t key_row, const TYPE* value, int64_t value_head, int64_t value_row, TYPE* keys,         \
                         TYPE* values, TYPE* output, const int32_t* parents, int64_t rows, int64_t heads,               \
                         int64_t key_heads, int64_t width, int64_t value_width, int64_t length, int64_t capacity,       \
                         float scale) {                                                                                 \
        attend<TYPE>({query, query_head, query_row}, {key, key_head, key_row}, {value, value_head, value_row}, keys,    \
                     values, output, parents, {rows, heads, key_heads, width, value_width, length, capacity}, scale);   \
    }

SPACE_ATTEND(space_attend_float32, float)
SPACE_ATTEND(space_attend_bfloat16, Bfloat16)
