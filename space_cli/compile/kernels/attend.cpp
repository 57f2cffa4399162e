// One layer's attention of one block: append the block's keys and values to the cache, then attend.
//
// A row's result is a function of its query and of the keys it sees, in their order, and of nothing else: neither the
// number of rows in the call nor the length of the buffer changes a bit. A token evaluated alone and the same token
// evaluated in a block therefore get the same bits, in any dtype. Only the part of the cache in use is read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tiles.h"

namespace {

// lanes of two vectors, those of the second from kLanes up
#if defined(__clang__)
#define SPACE_MIXED(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define SPACE_MIXED(one, other, ...) __builtin_shuffle(one, other, Ints{__VA_ARGS__})
#endif

// interleave two vectors: the low (kSecond 0) or the high halves of each run of 2 * kHalf lanes
template <int kHalf, int kSecond, int... kLane>
inline __attribute__((always_inline)) Floats halves_of(Floats one, Floats other, std::integer_sequence<int, kLane...>) {
    return SPACE_MIXED(one, other, (kLane % (2 * kHalf) % kHalf + kLane / (2 * kHalf) * 2 * kHalf + kSecond * kHalf +
                                    (kLane % (2 * kHalf) < kHalf ? 0 : kLanes))...);
}

// The sums of kLanes vectors' lanes: by halves (lanes kLanes / 2 apart, then half as far, down to neighbours), whichever
// of the vectors it is.
template <int kHalf = kLanes / 2>
inline __attribute__((always_inline)) Floats sums(Floats* of) {
    constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 8
    for (int at = 0; at < kHalf; ++at)
        of[at] = halves_of<kHalf, 0>(of[at], of[at + kHalf], kAll) + halves_of<kHalf, 1>(of[at], of[at + kHalf], kAll);
    if constexpr (kHalf == 1)
        return of[0];
    else
        return sums<kHalf / 2>(of);
}

float sum(Floats values) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += values[lane];
    return total;
}

#ifdef __AVX512BF16__
constexpr bool kMultipliesPairs = true;

// total + the products of 2 * kLanes entries, pairs of neighbours together
inline Floats product_of_pairs(Floats total, const Bfloat16* one, const Bfloat16* other) {
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_loadu_si512(one),
                                    (__m512bh)_mm512_loadu_si512(other));
}
#else
constexpr bool kMultipliesPairs = false;
#endif

// what queries and keys are multiplied as
template <typename T>
using Factor = std::conditional_t<kMultipliesPairs, T, float>;

template <typename T>
void copy_as(float* to, const T* from, int64_t count) {
    for (int64_t at = 0; at < count; at += kLanes) store(to + at, load(from + at));
}

inline void copy_as(Bfloat16* to, const Bfloat16* from, int64_t count) { std::memcpy(to, from, count * sizeof *to); }

template <typename T>
struct States {
    const T* data;
    int64_t head_stride, row_stride;
    const T* at(int64_t head, int64_t row) const { return data + head * head_stride + row * row_stride; }
};

struct Sizes {
    int64_t rows, heads, key_heads, width, value_width, length, capacity;
    float scale;
    int64_t chained;  // so many of the first slots follow one another
};

// Some queries of one key head, worked on together so that keys and values are read once for all of them.
//
// The keys that a query sees are numbered in their order: those of the prefix, then its own ancestors in the block.
template <int kQueries, typename T>
struct Queries {
    std::vector<Factor<T>> queries[kQueries];
    std::vector<float> weights[kQueries];   // by key: scores, then weights
    std::vector<Bfloat16> halves[kQueries];  // the weights again, where pairs are multiplied
    int64_t straight[kQueries];             // so many of the first keys lie in the cache in their order
    std::vector<int32_t> tails[kQueries];   // slots of the block that a query sees behind those
    int64_t length;

    int64_t count(int query) const { return straight[query] + int64_t(tails[query].size()); }

    // how many of the first keys are the same for all queries
    int64_t shared() const {
        const int64_t least = *std::min_element(straight, straight + kQueries);
        if (least < *std::max_element(straight, straight + kQueries)) return least;
        const auto all_see = [&](size_t at) {
            for (const std::vector<int32_t>& tail : tails)
                if (at >= tail.size() || tail[at] != tails[0][at]) return false;
            return true;
        };
        int64_t found = least;
        while (all_see(found - least)) ++found;
        return found;
    }

    // row of the cache in which key `at` of a query lies
    int64_t place(int query, int64_t at) const {
        return at < straight[query] ? at : length + tails[query][at - straight[query]];
    }

    // scores of queries `first` to `last` for kLanes keys, from `at` on, that lie in a row
    template <int kWidth>
    void score_tile(const Factor<T>* keys, int first, int last, int64_t at, int64_t given_width, float scale) {
        const int64_t width = kWidth ? kWidth : given_width;
        for (int query = first; query < last; ++query) {
            const Factor<T>* own = queries[query].data();
            Floats totals[kLanes] = {};
            int64_t lane = 0;
#ifdef __AVX512BF16__
            if constexpr (std::is_same_v<Factor<T>, Bfloat16>)
                for (; lane + 2 * kLanes <= width; lane += 2 * kLanes)
#pragma GCC unroll 16
                    for (int key = 0; key < kLanes; ++key)
                        totals[key] = product_of_pairs(totals[key], own + lane, keys + key * width + lane);
#endif
            for (; lane < width; lane += kLanes) {
                const Floats part = load(own + lane);
#pragma GCC unroll 16
                for (int key = 0; key < kLanes; ++key)
                    totals[key] = fused(totals[key], part, load(keys + key * width + lane));
            }
            store(&weights[query][at], sums(totals) * scale);
        }
    }

    // scores of queries `first` to `last` for the keys from `from` to `to`
    template <int kWidth>
    void score(const T* keys, int first, int last, int64_t from, int64_t to, const Sizes& sizes) {
        const int64_t width = sizes.width;
        int64_t at = from;
        if constexpr (std::is_same_v<Factor<T>, T>) {
            const int64_t end = std::min(to, straight[first]);
            for (; at < end && at + kLanes <= sizes.capacity; at += kLanes)
                score_tile<kWidth>(keys + at * width, first, last, at, width, sizes.scale);
            // what was read behind them is no key of the query's
            at = std::min(at, std::max(from, end));
        }
        thread_local std::vector<Factor<T>> tile;
        tile.resize(kLanes * width);
        for (; at < to; at += kLanes) {
            for (int key = 0; key < kLanes; ++key)
                copy_as(&tile[key * width], keys + place(first, std::min(at + key, to - 1)) * width, width);
            score_tile<kWidth>(tile.data(), first, last, at, width, sizes.scale);
        }
    }

    // turn the scores of a query into weights; return one over their sum
    float normalise(int query) {
        std::vector<float>& scores = weights[query];
        const int64_t end = count(query);
        for (int64_t key = end; key % kLanes; ++key) scores[key] = -INFINITY;
        Floats most = load(&scores[0]);
        for (int64_t key = kLanes; key < end; key += kLanes) {
            Floats part = load(&scores[key]);
            most = part > most ? part : most;
        }
        float largest = most[0];
        for (int lane = 1; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
        Floats totals{};
        for (int64_t key = 0; key < end; key += kLanes) {
            Floats part = load(&scores[key]);
            Floats weight = exponential(part - broadcast(largest));
            weight = part == -INFINITY ? Floats{} : weight;
            totals += weight;
            store(&scores[key], weight);
            if (std::is_same_v<Factor<T>, Bfloat16>) store(&halves[query][key], weight);
        }
        return 1.0f / sum(totals);
    }

    // the weighted sum of `kParts` vectors of the values, from lane `lane` on; all see the first `shared` keys
    template <int kParts>
    void mix(const T* values, int64_t shared, int64_t width, int64_t lane, const float* inverses, T* const* outputs) {
        Floats mixed[kQueries][kParts] = {};
        const float* by_key[kQueries];
        for (int query = 0; query < kQueries; ++query) by_key[query] = weights[query].data();
        const auto add = [&](auto first, auto last, int64_t at, const T* from) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
                const Floats value = load(from + part * kLanes);
#pragma GCC unroll 8
                for (int query = first; query < last; ++query)
                    mixed[query][part] = fused(mixed[query][part], value, broadcast(by_key[query][at]));
            }
        };
        const int64_t before = std::min(shared, straight[0]);
        for (int64_t at = 0; at < before; ++at) add(0, kQueries, at, values + at * width + lane);
        for (int64_t at = before; at < shared; ++at) add(0, kQueries, at, values + place(0, at) * width + lane);
#pragma GCC unroll 8
        for (int query = 0; query < kQueries; ++query)
            for (int64_t at = shared; at < count(query); ++at)
                add(query, query + 1, at, values + place(query, at) * width + lane);
        for (int query = 0; query < kQueries; ++query)
            for (int part = 0; part < kParts; ++part)
                store(outputs[query] + lane + part * kLanes, mixed[query][part] * inverses[query]);
    }

#ifdef __AVX512BF16__
    // the same of 4 vectors of bfloat16, two keys at a time; weights are rounded to bfloat16 as well
    void mix_pairs(const T* values, int64_t shared, int64_t width, int64_t lane, const float* inverses,
                   T* const* outputs) {
        __m512 mixed[kQueries][4];
#pragma GCC unroll 4
        for (int query = 0; query < kQueries; ++query)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) mixed[query][part] = _mm512_setzero_ps();
        const auto add = [&](int first, int last, int64_t at, const T* one, const T* other)
                             __attribute__((always_inline)) {
            __m512bh pairs[4];
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m512i of_one = _mm512_loadu_si512(one + half * 2 * kLanes);
                const __m512i of_other = _mm512_loadu_si512(other + half * 2 * kLanes);
                pairs[2 * half] = (__m512bh)_mm512_unpacklo_epi16(of_one, of_other);
                pairs[2 * half + 1] = (__m512bh)_mm512_unpackhi_epi16(of_one, of_other);
            }
#pragma GCC unroll 4
            for (int query = first; query < last; ++query) {
                int two_weights;
                std::memcpy(&two_weights, &halves[query][at], sizeof two_weights);
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part)
                    mixed[query][part] =
                        _mm512_dpbf16_ps(mixed[query][part], pairs[part], (__m512bh)_mm512_set1_epi32(two_weights));
            }
        };
        const T* own = values + lane;
        const int64_t before = std::min(shared, straight[0]) & ~1, together = shared & ~1;
        for (int64_t at = 0; at < before; at += 2) add(0, kQueries, at, own + at * width, own + (at + 1) * width);
        for (int64_t at = before; at < together; at += 2)
            add(0, kQueries, at, own + place(0, at) * width, own + place(0, at + 1) * width);
#pragma GCC unroll 4
        for (int query = 0; query < kQueries; ++query)
            for (int64_t at = together; at < count(query); at += 2)  // the weight behind an odd last key is 0
                add(query, query + 1, at, own + place(query, at) * width,
                    own + place(query, std::min(at + 1, count(query) - 1)) * width);
        for (int query = 0; query < kQueries; ++query)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const Floats low = (Floats)mixed[query][2 * half], high = (Floats)mixed[query][2 * half + 1];
                T* to = outputs[query] + lane + half * 2 * kLanes;
                store(to, SPACE_MIXED(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23) * inverses[query]);
                store(to + kLanes, SPACE_MIXED(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31) *
                                       inverses[query]);
            }
    }
#endif
};

// attend with queries `first` to `first + kQueries` of a key head; query i is row i / per_group of head i % per_group
template <int kQueries, int kWidth, typename T>
void attend_some(States<T> query, const T* keys, const T* values, T* output, const int32_t* parents, const Sizes& sizes,
                 int64_t key_head, int64_t first) {
    thread_local Queries<kQueries, T> some;
    const int64_t per_group = sizes.heads / sizes.key_heads;
    T* outputs[kQueries];
    float inverses[kQueries];
    some.length = sizes.length;
    for (int each = 0; each < kQueries; ++each) {
        const int64_t row = (first + each) / per_group, head = key_head * per_group + (first + each) % per_group;
        outputs[each] = output + (row * sizes.heads + head) * sizes.value_width;
        some.queries[each].resize(sizes.width);
        copy_as(some.queries[each].data(), query.at(head, row), sizes.width);
        some.tails[each].clear();
        int32_t slot = row;
        for (; slot >= sizes.chained; slot = parents[slot]) some.tails[each].push_back(slot);
        std::reverse(some.tails[each].begin(), some.tails[each].end());
        some.straight[each] = sizes.length + slot + 1;
        some.weights[each].resize(sizes.length + sizes.rows + 2 * kLanes);
        if (std::is_same_v<Factor<T>, Bfloat16>) some.halves[each].resize(sizes.length + sizes.rows + 2 * kLanes);
    }
    const int64_t shared = some.shared();
    some.template score<kWidth>(keys, 0, kQueries, 0, shared, sizes);
    for (int each = 0; each < kQueries; ++each) {
        some.template score<kWidth>(keys, each, each + 1, shared, some.count(each), sizes);
        inverses[each] = some.normalise(each);
    }
    int64_t lane = 0;
    constexpr int kParts = (kRegisters == 32 ? 16 : 8) / std::max(kQueries, 4);  // what the queries' sums leave room for
    for (; lane + kParts * kLanes <= sizes.value_width; lane += kParts * kLanes) {
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<T, Bfloat16>) {
            some.mix_pairs(values, shared, sizes.value_width, lane, inverses, outputs);
            continue;
        }
#endif
        some.template mix<kParts>(values, shared, sizes.value_width, lane, inverses, outputs);
    }
    for (; lane < sizes.value_width; lane += kLanes)
        some.template mix<1>(values, shared, sizes.value_width, lane, inverses, outputs);
}

// how many of the first slots follow one another
int64_t chained(const int32_t* parents, int64_t rows) {
    int64_t found = 0;
    while (found < rows && parents[found] == found - 1) ++found;
    return found;
}

// queries of a key head from which on they are not simply cut into as many parts as there are threads
constexpr int64_t kManyQueries = 64;

template <typename T>
void attend(States<T> query, States<T> key, States<T> value, T* keys, T* values, T* output, const int32_t* parents,
            const Sizes& sizes) {
    const int64_t keys_of_head = sizes.capacity * sizes.width, values_of_head = sizes.capacity * sizes.value_width;
    for (int64_t head = 0; head < sizes.key_heads; ++head)
        for (int64_t row = 0; row < sizes.rows; ++row) {
            std::memcpy(keys + head * keys_of_head + (sizes.length + row) * sizes.width, key.at(head, row),
                        sizes.width * sizeof(T));
            std::memcpy(values + head * values_of_head + (sizes.length + row) * sizes.value_width, value.at(head, row),
                        sizes.value_width * sizeof(T));
        }
    // pairs are mixed four vectors at a time
    constexpr int kTogether = std::is_same_v<Factor<T>, Bfloat16> ? 4 : 8;
    const int64_t queries = sizes.rows * sizes.heads / sizes.key_heads;
    const int64_t seen = sizes.heads * sizes.rows * (sizes.length + sizes.rows);
    // exponentials and sums take longer than the products
    const bool pays = seen * (sizes.width + sizes.value_width) > kWorthThreads / 3;
    const auto work = [&](int64_t head, int64_t first, int64_t last) {
        const auto run = [&](auto count) {
            constexpr int kQueries = decltype(count)::value;
            const T *own_keys = keys + head * keys_of_head, *own_values = values + head * values_of_head;
            // the usual widths, known to the compiler
            const auto some = sizes.width == 64    ? attend_some<kQueries, 64, T>
                              : sizes.width == 128 ? attend_some<kQueries, 128, T>
                                                   : attend_some<kQueries, 0, T>;
            some(query, own_keys, own_values, output, parents, sizes, head, first);
            first += kQueries;
        };
        while (last - first >= kTogether) run(std::integral_constant<int, kTogether>());
        if (last - first >= 4) run(std::integral_constant<int, 4>());
        if (last - first >= 2) run(std::integral_constant<int, 2>());
        if (last - first >= 1) run(std::integral_constant<int, 1>());
    };
    if (queries < kManyQueries) {
        for_tiles(sizes.key_heads * queries, pays, [&](int64_t first, int64_t last) {
            for (int64_t at = first; at < last; at = std::min(last, (at / queries + 1) * queries))
                work(at / queries, at % queries, std::min(last - at / queries * queries, queries));
        });
        return;
    }
    // later queries see more keys: threads take turns
    const int64_t calls = (queries + kTogether - 1) / kTogether;
#pragma omp parallel for collapse(2) schedule(static, 1) if (pays)
    for (int64_t head = 0; head < sizes.key_heads; ++head)
        for (int64_t call = 0; call < calls; ++call)
            work(head, call * kTogether, std::min<int64_t>((call + 1) * kTogether, queries));
}

}  // namespace

#define SPACE_ATTEND_OF(NAME, TYPE)                                                                                   \
    SPACE_ATTEND(NAME) {                                                                                              \
        attend<TYPE>({static_cast<const TYPE*>(query), query_head, query_row},                                        \
                     {static_cast<const TYPE*>(key), key_head, key_row},                                              \
                     {static_cast<const TYPE*>(value), value_head, value_row}, static_cast<TYPE*>(keys),              \
                     static_cast<TYPE*>(values), static_cast<TYPE*>(output), parents,                                 \
                     {rows, heads, key_heads, width, value_width, length, capacity, scale, chained(parents, rows)});  \
    }

SPACE_ATTEND_OF(space_attend_float32, float)
SPACE_ATTEND_OF(space_attend_bfloat16, Bfloat16)
