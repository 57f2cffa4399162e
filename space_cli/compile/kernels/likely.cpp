// The most probable tokens of each row of logits, and their probabilities.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "lanes.h"

namespace {

// logits, the largest first; of equal ones the first
struct Best {
    float values[kSpaceLikely];
    int64_t tokens[kSpaceLikely];

    float least() const { return values[kSpaceLikely - 1]; }

    void add(float value, int64_t token) {
        int place = kSpaceLikely - 1;
        for (; place && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            tokens[place] = tokens[place - 1];
        }
        values[place] = value;
        tokens[place] = token;
    }
};

bool any_above(Floats values, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(SPACE_AVX2)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(bound), _CMP_GT_OQ));
#elif defined(__aarch64__)
    return vmaxvq_u32(vcgtq_f32((float32x4_t)values, vdupq_n_f32(bound)));
#else
    for (int lane = 0; lane < kLanes; ++lane)
        if (values[lane] > bound) return true;
    return false;
#endif
}

template <typename T>
void likely_of_row(const T* logits, int64_t width, int64_t* tokens, float* probs) {
    Best best;
    std::fill_n(best.values, kSpaceLikely, -INFINITY);
    std::fill_n(best.tokens, kSpaceLikely, 0);
    // the last vector, filled up
    T rest[kLanes];
    const int64_t whole = width - width % kLanes;
    for (int lane = 0; lane < kLanes; ++lane) store_one(rest + lane, whole + lane < width ? logits + whole + lane : nullptr);
    const auto at = [&](int64_t token) { return load(token < whole ? logits + token : rest); };
    for (int64_t token = 0; token < width; token += kLanes) {
        const Floats values = at(token);
        if (any_above(values, best.least()))
            for (int lane = 0; lane < kLanes; ++lane)
                if (values[lane] > best.least()) best.add(values[lane], token + lane);
    }
    Floats totals{};
    for (int64_t token = 0; token < width; token += kLanes) {
        const Floats values = at(token);
        const Floats weights = exponential(values - broadcast(best.values[0]));
        totals += values == -INFINITY ? Floats{} : weights;
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += totals[lane];
    for (int place = 0; place < kSpaceLikely; ++place) {
        tokens[place] = best.tokens[place];
        probs[place] = std::exp(best.values[place] - best.values[0]) / total;
    }
}

template <typename T>
void likely(const T* logits, int64_t* tokens, float* probs, int64_t rows, int64_t width) {
    // waking a second thread costs some microseconds
    const bool pays = rows * width > 65536;
#pragma omp parallel for schedule(static) if (pays)
    for (int64_t row = 0; row < rows; ++row)
        likely_of_row(logits + row * width, width, tokens + row * kSpaceLikely, probs + row * kSpaceLikely);
}

}  // namespace

SPACE_LIKELY(space_likely_float32) { likely(static_cast<const float*>(logits), tokens, probs, rows, width); }
SPACE_LIKELY(space_likely_bfloat16) { likely(static_cast<const Bfloat16*>(logits), tokens, probs, rows, width); }
