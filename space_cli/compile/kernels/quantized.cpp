// Linear layers over weights of 4 to 8 bits, as GGUF files have them.
//
// Rows of activations are rounded to int8 in chunks of 32 inputs with a scale of their own. The products of a chunk are
// summed as integers, which is exact in any order; the sums of chunks are added as floats in one order. So a row gets the
// same bits whatever rows stand beside it.
//
// A tile holds 16 outputs: first the codes of all its chunks, then their scales. Vector v (64 bytes) of a chunk's codes
// has inputs 4 v to 4 v + 3 of each of the 16 outputs. Nibbles of vectors v and v + 4 share bytes; a fifth bit, or bits
// five and six, stand in planes behind the nibbles.
//
// Source: block formats of ggml (`ggml-common.h`, `ggml-quants.c`).

#include "quantized.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int kTile = 16, kChunk = 32, kSuper = 256, kVectors = kChunk / 4;

// A register's part of a tile's outputs.
#if defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 8;
#endif
constexpr int kParts = kTile / kLanes;

typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint8_t SmallBytes __attribute__((vector_size(kLanes)));
typedef int8_t SmallInts __attribute__((vector_size(kLanes)));

template <typename T>
T load(const void* from) {
    T values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// not a sum with zeros, which would be an instruction of its own, for the sake of the sign of zero
Floats broadcast(float value) { return value - Floats{}; }
Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// one rounding, whatever the compiler makes of the code around
Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int lane = 0; lane < kLanes; ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
    return c;
#endif
}

template <int kBy, typename V, int... kLane>
V rotated(V values, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(values, values, (kLane + kBy) % kLanes...);
}

// one value of all lanes, halves with halves by `combine`
template <int kBy = kLanes / 2, typename V, typename Combine>
auto reduced(V values, const Combine& combine) {
    if constexpr (kBy == 0)
        return values[0];
    else
        return reduced<kBy / 2>(combine(values, rotated<kBy>(values, std::make_integer_sequence<int, kLanes>())), combine);
}

float largest_of(Floats values) {
    return reduced(values, [](Floats a, Floats b) { return b > a ? b : a; });
}

int32_t sum_of(Ints values) {
    return reduced(values, [](Ints a, Ints b) { return a + b; });
}

// numbers of 8 bits; compilers take them apart one by one
void store_small(int8_t* to, Ints values) {
#if defined(__AVX512BW__)
    const __m128i small = _mm512_cvtepi32_epi8((__m512i)values);
    std::memcpy(to, &small, sizeof small);
#elif defined(__AVX2__)
    const __m256i own = (__m256i)values;
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(own), _mm256_extracti128_si256(own, 1));
    const int64_t small = _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves));
    std::memcpy(to, &small, sizeof small);
#else
    const SmallInts small = __builtin_convertvector(values, SmallInts);
    std::memcpy(to, &small, sizeof small);
#endif
}

float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 0) {
        const float small = std::ldexp(float(fraction), -24);
        return sign ? -small : small;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

Floats load_halves(const uint8_t* from) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
#else
    Floats values;
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = half_to_float(load<uint16_t>(from + 2 * lane));
    return values;
#endif
}

Ints widen(SmallBytes values) { return __builtin_convertvector(values, Ints); }
Ints widen(SmallInts values) { return __builtin_convertvector(values, Ints); }

// sums of codes (below 2^kBits) times activations over `kCount` vectors; codes of 8 bits stand for themselves less 128
template <int kBits, int kCount>
Ints dot(const Bytes* codes, const int8_t* inputs, int32_t input_sum) {
    [[maybe_unused]] const auto four = [&](int vector) { return load<int32_t>(inputs + 4 * vector); };
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    __m512i total = _mm512_set1_epi32(kBits == 8 ? -128 * input_sum : 0);
#pragma GCC unroll 8
    for (int vector = 0; vector < kCount; ++vector)
        total = _mm512_dpbusd_epi32(total, (__m512i)codes[vector], _mm512_set1_epi32(four(vector)));
    return (Ints)total;
#elif defined(__AVXVNNI__)
    __m256i total = _mm256_set1_epi32(kBits == 8 ? -128 * input_sum : 0);
#pragma GCC unroll 8
    for (int vector = 0; vector < kCount; ++vector)
        total = _mm256_dpbusd_avx_epi32(total, (__m256i)codes[vector], _mm256_set1_epi32(four(vector)));
    return (Ints)total;
#elif defined(__AVX2__)
    // pairs of products are summed in 16 bits as long as they fit
    constexpr int kFit = std::min(kCount, kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1);
#if defined(__AVX512BW__)
    typedef __m512i Register;
    const auto products = [](Register code, int32_t input) {
        const Register x = _mm512_set1_epi32(input);
        if constexpr (kBits < 8) return _mm512_maddubs_epi16(code, x);
        const Register own = _mm512_xor_si512(code, _mm512_set1_epi8(-128));
        const Register signs = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(own), _mm512_setzero_si512(), x);
        return _mm512_maddubs_epi16(_mm512_abs_epi8(own), signs);
    };
    const auto add16 = [](Register a, Register b) { return _mm512_add_epi16(a, b); };
    const auto pairs = [](Register a) { return (Ints)_mm512_madd_epi16(a, _mm512_set1_epi16(1)); };
#else
    typedef __m256i Register;
    const auto products = [](Register code, int32_t input) {
        const Register x = _mm256_set1_epi32(input);
        if constexpr (kBits < 8) return _mm256_maddubs_epi16(code, x);
        const Register own = _mm256_xor_si256(code, _mm256_set1_epi8(-128));
        return _mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(x, own));
    };
    const auto add16 = [](Register a, Register b) { return _mm256_add_epi16(a, b); };
    const auto pairs = [](Register a) { return (Ints)_mm256_madd_epi16(a, _mm256_set1_epi16(1)); };
#endif
    Ints total{};
#pragma GCC unroll 8
    for (int start = 0; start < kCount; start += kFit) {
        Register sum = products((Register)codes[start], four(start));
#pragma GCC unroll 8
        for (int vector = start + 1; vector < start + kFit; ++vector)
            sum = add16(sum, products((Register)codes[vector], four(vector)));
        total = start ? total + pairs(sum) : pairs(sum);
    }
    return total;
#elif defined(__ARM_FEATURE_DOTPROD)
    int32x4_t total = vdupq_n_s32(0);
#pragma GCC unroll 8
    for (int vector = 0; vector < kCount; ++vector) {
        const Bytes own = kBits == 8 ? codes[vector] ^ uint8_t(128) : codes[vector];
        total = vdotq_s32(total, (int8x16_t)own, vreinterpretq_s8_s32(vdupq_n_s32(four(vector))));
    }
    return (Ints)total;
#else
    Ints total{};
    for (int vector = 0; vector < kCount; ++vector)
        for (int lane = 0; lane < kLanes; ++lane)
            for (int each = 0; each < 4; ++each)
                total[lane] += int32_t(codes[vector][4 * lane + each]) * inputs[4 * vector + each];
    return kBits == 8 ? total - 128 * input_sum : total;
#endif
}

// Rows of activations in int8.
//
// codes (rows, width) int8; scales and sums (rows, width / 32): a chunk's scale, and scale times sum of codes; halves
// (rows, width / 16): sums of the codes of 16 inputs.
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scales, sums;
    std::vector<int32_t> halves;

    void reserve(int64_t rows, int64_t width) {
        const size_t size = rows * width;
        if (codes.size() >= size) return;
        codes.resize(size);
        scales.resize(size / kChunk);
        sums.resize(size / kChunk);
        halves.resize(2 * size / kChunk);
    }

    void quantize_row(const float* values_of, int64_t row, int64_t width) {
        constexpr int kRegisters = kChunk / kLanes;
        for (int64_t chunk = 0; chunk < width / kChunk; ++chunk) {
            const int64_t at = row * (width / kChunk) + chunk;
            Floats values[kRegisters], most{};
            for (int part = 0; part < kRegisters; ++part) {
                values[part] = load<Floats>(values_of + chunk * kChunk + part * kLanes);
                const Floats size = values[part] < 0.0f ? -values[part] : values[part];
                most = size > most ? size : most;
            }
            const float largest = largest_of(most);
            const float factor = largest > 0 ? 127.0f / largest : 0.0f;
            Ints sums_of_half[2] = {};
            for (int part = 0; part < kRegisters; ++part) {
                // added and taken away, it leaves whole numbers, rounded to nearest
                constexpr float kWhole = 12582912.0f;
                const Floats whole = (values[part] * factor + kWhole) - kWhole;
                const Ints code = __builtin_convertvector(whole, Ints);
                store_small(codes.data() + row * width + chunk * kChunk + part * kLanes, code);
                sums_of_half[part * kLanes / 16] += code;
            }
            const int32_t sum[2] = {sum_of(sums_of_half[0]), sum_of(sums_of_half[1])};
            scales[at] = largest / 127.0f;
            sums[at] = scales[at] * float(sum[0] + sum[1]);
            halves[2 * at] = sum[0];
            halves[2 * at + 1] = sum[1];
        }
    }
};

// A chunk's codes of one part of a tile.
template <int kBits>
void unpack(const uint8_t* from, int part, Bytes* codes) {
    const uint8_t* own = from + part * sizeof(Bytes);
    if constexpr (kBits == 8) {
#pragma GCC unroll 8
        for (int vector = 0; vector < kVectors; ++vector) codes[vector] = load<Bytes>(own + 64 * vector);
        return;
    }
#pragma GCC unroll 4
    for (int vector = 0; vector < 4; ++vector) {
        const Bytes both = load<Bytes>(own + 64 * vector);
        codes[vector] = both & uint8_t(15);
        codes[vector + 4] = (both >> 4) & uint8_t(15);
    }
    if constexpr (kBits == 5) {
        const Bytes plane = load<Bytes>(own + 256);
#pragma GCC unroll 8
        for (int vector = 0; vector < kVectors; ++vector)
            codes[vector] |= ((plane >> uint8_t(vector)) & uint8_t(1)) << 4;
    }
    if constexpr (kBits == 6) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const Bytes plane = load<Bytes>(own + 256 + 64 * half);
#pragma GCC unroll 4
            for (int vector = 0; vector < 4; ++vector)
                codes[4 * half + vector] |= ((plane >> uint8_t(2 * vector)) & uint8_t(3)) << 4;
        }
    }
}

template <int kBits>
void pack(const uint8_t* values, int lane, uint8_t* to) {
    for (int input = 0; input < kChunk; ++input) {
        const int vector = input / 4, byte = 4 * lane + input % 4;
        const uint8_t value = values[input];
        if (kBits == 8) {
            to[64 * vector + byte] = value;
            continue;
        }
        to[64 * (vector % 4) + byte] |= (value & 15) << (vector < 4 ? 0 : 4);
        if (kBits == 5) to[256 + byte] |= (value >> 4) << vector;
        if (kBits == 6) to[256 + 64 * (vector / 4) + byte] |= (value >> 4) << (2 * (vector % 4));
    }
}

template <int kBits>
uint8_t unpack_one(const uint8_t* from, int lane, int input) {
    const int vector = input / 4, byte = 4 * lane + input % 4;
    if (kBits == 8) return from[64 * vector + byte];
    uint8_t value = from[64 * (vector % 4) + byte] >> (vector < 4 ? 0 : 4) & 15;
    if (kBits == 5) value |= (from[256 + byte] >> vector & 1) << 4;
    if (kBits == 6) value |= (from[256 + 64 * (vector / 4) + byte] >> (2 * (vector % 4)) & 3) << 4;
    return value;
}

constexpr int code_bytes(int bits) { return bits == 8 ? 512 : bits == 6 ? 384 : bits == 5 ? 320 : 256; }

uint16_t half_at(const uint8_t* from) { return load<uint16_t>(from); }

// What the formats differ in. A format has
//   kBits, kRawChunks (chunks of a block of the file), kRawBytes (bytes of it);
//   scale_bytes(chunks): of a tile's scales;
//   raw(block, chunk, codes): the codes of a chunk of a block;
//   pack_scales(block, chunk, lane, scales, at): put scales of chunk `at` of the row where the kernel wants them;
//   add(total, codes, row, ...): the chunk's share of an output;
//   value(scales, at, lane, input, code): one weight.

// scale, and where `kHasMin` a least value, per chunk: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
template <int kOfBits, bool kHasMin>
struct Plain {
    static constexpr int kBits = kOfBits, kRawChunks = 1;
    static constexpr int kHead = kHasMin ? 4 : 2;
    static constexpr int kRawBytes = kHead + (kBits == 8 ? 32 : kBits == 5 ? 20 : 16);
    static constexpr int kScaleBytes = kHasMin ? 4 * kTile : 2 * kTile;
    // codes stand for themselves less this; of 8 bits the dot product does it
    static constexpr int kOffset = kHasMin || kBits == 8 ? 0 : 1 << (kBits - 1);

    static int64_t scale_bytes(int64_t chunks) { return chunks * kScaleBytes; }

    static void raw(const uint8_t* block, int, uint8_t* codes) {
        if (kBits == 8) {
            for (int input = 0; input < kChunk; ++input) codes[input] = block[2 + input] ^ 128;
            return;
        }
        const uint8_t* nibbles = block + kHead + (kBits == 5 ? 4 : 0);
        for (int input = 0; input < 16; ++input) {
            codes[input] = nibbles[input] & 15;
            codes[input + 16] = nibbles[input] >> 4;
        }
        if (kBits == 5) {
            const uint32_t high = load<uint32_t>(block + kHead);
            for (int input = 0; input < kChunk; ++input) codes[input] |= (high >> input & 1) << 4;
        }
    }

    static void pack_scales(const uint8_t* block, int, int lane, uint8_t* scales, int64_t at) {
        std::memcpy(scales + at * kScaleBytes + 2 * lane, block, 2);
        if (kHasMin) std::memcpy(scales + at * kScaleBytes + 2 * (kTile + lane), block + 2, 2);
    }

    struct Scales {
        Floats scale, least;
        Scales(const uint8_t* scales, int64_t at, int part)
            : scale(load_halves(scales + at * kScaleBytes + 2 * kLanes * part)), least{} {
            if (kHasMin) least = load_halves(scales + at * kScaleBytes + 2 * (kTile + kLanes * part));
        }
    };

    static Floats add(Floats total, const Bytes* codes, const Scales& own, const int8_t* inputs, float scale, float sum,
                      const int32_t* halves) {
        const int32_t input_sum = halves[0] + halves[1];
        Ints products = dot<kBits, kVectors>(codes, inputs, input_sum);
        if (kOffset) products -= kOffset * input_sum;
        total = fused(to_floats(products), own.scale * scale, total);
        return kHasMin ? fused(own.least, broadcast(sum), total) : total;
    }

    static float value(const uint8_t* scales, int64_t at, int lane, int, int code) {
        const float scale = half_to_float(half_at(scales + at * kScaleBytes + 2 * lane));
        const float least = kHasMin ? half_to_float(half_at(scales + at * kScaleBytes + 2 * (kTile + lane))) : 0.0f;
        return scale * float(code - (kBits == 8 ? 128 : kOffset)) + least;
    }
};

// scales and least values of 6 bits per chunk, those of 256 inputs with a factor each: Q4_K, Q5_K
template <int kOfBits>
struct Scaled {
    static constexpr int kBits = kOfBits, kRawChunks = 8, kRawBytes = kBits == 5 ? 176 : 144;
    static constexpr int kSuperBytes = 4 * kTile + 8 * 2 * kTile;

    static int64_t scale_bytes(int64_t chunks) { return chunks / kRawChunks * kSuperBytes; }

    static void raw(const uint8_t* block, int chunk, uint8_t* codes) {
        const uint8_t* nibbles = block + 16 + (kBits == 5 ? 32 : 0) + chunk / 2 * 32;
        for (int input = 0; input < kChunk; ++input) {
            codes[input] = nibbles[input] >> (chunk % 2 ? 4 : 0) & 15;
            if (kBits == 5) codes[input] |= (block[16 + input] >> chunk & 1) << 4;
        }
    }

    static void pack_scales(const uint8_t* block, int chunk, int lane, uint8_t* scales, int64_t at) {
        uint8_t* own = scales + at / kRawChunks * kSuperBytes;
        if (chunk == 0) {
            std::memcpy(own + 2 * lane, block, 2);
            std::memcpy(own + 2 * (kTile + lane), block + 2, 2);
        }
        const uint8_t* six = block + 4;
        uint8_t* to = own + 4 * kTile + chunk * 2 * kTile + lane;
        to[0] = chunk < 4 ? six[chunk] & 63 : (six[chunk + 4] & 15) | six[chunk - 4] >> 6 << 4;
        to[kTile] = chunk < 4 ? six[chunk + 4] & 63 : six[chunk + 4] >> 4 | six[chunk] >> 6 << 4;
    }

    struct Scales {
        Floats scale, least;
        Scales(const uint8_t* scales, int64_t at, int part) {
            const uint8_t* own = scales + at / kRawChunks * kSuperBytes;
            const uint8_t* of_chunk = own + 4 * kTile + at % kRawChunks * 2 * kTile + kLanes * part;
            scale = load_halves(own + 2 * kLanes * part) * to_floats(widen(load<SmallBytes>(of_chunk)));
            least = load_halves(own + 2 * (kTile + kLanes * part)) * to_floats(widen(load<SmallBytes>(of_chunk + kTile)));
        }
    };

    static Floats add(Floats total, const Bytes* codes, const Scales& own, const int8_t* inputs, float scale, float sum,
                      const int32_t*) {
        total = fused(to_floats(dot<kBits, kVectors>(codes, inputs, 0)), own.scale * scale, total);
        return fused(own.least, broadcast(-sum), total);
    }

    static float value(const uint8_t* scales, int64_t at, int lane, int, int code) {
        const uint8_t* own = scales + at / kRawChunks * kSuperBytes;
        const uint8_t* of_chunk = own + 4 * kTile + at % kRawChunks * 2 * kTile + lane;
        return half_to_float(half_at(own + 2 * lane)) * float(of_chunk[0]) * float(code) -
               half_to_float(half_at(own + 2 * (kTile + lane))) * float(of_chunk[kTile]);
    }
};

// scales of 8 bits per 16 inputs, those of 256 inputs with a factor: Q6_K
struct Sixteens {
    static constexpr int kBits = 6, kRawChunks = 8, kRawBytes = 210;
    static constexpr int kSuperBytes = 2 * kTile + 8 * 2 * kTile;

    static int64_t scale_bytes(int64_t chunks) { return chunks / kRawChunks * kSuperBytes; }

    static void raw(const uint8_t* block, int chunk, uint8_t* codes) {
        // 128 inputs at a time: nibbles of inputs l and l + 64 share bytes, two more bits stand in 32 bytes of four
        const int of = chunk % 4;
        const uint8_t *low = block + chunk / 4 * 64 + of % 2 * 32, *high = block + 128 + chunk / 4 * 32;
        for (int input = 0; input < kChunk; ++input)
            codes[input] = (low[input] >> (of < 2 ? 0 : 4) & 15) | (high[input] >> (2 * of) & 3) << 4;
    }

    static void pack_scales(const uint8_t* block, int chunk, int lane, uint8_t* scales, int64_t at) {
        uint8_t* own = scales + at / kRawChunks * kSuperBytes;
        if (chunk == 0) std::memcpy(own + 2 * lane, block + 208, 2);
        for (int half = 0; half < 2; ++half)
            own[2 * kTile + (2 * chunk + half) * kTile + lane] = block[192 + 2 * chunk + half];
    }

    struct Scales {
        Floats scale;
        Ints halves[2];
        Scales(const uint8_t* scales, int64_t at, int part) {
            const uint8_t* own = scales + at / kRawChunks * kSuperBytes;
            scale = load_halves(own + 2 * kLanes * part);
            for (int half = 0; half < 2; ++half)
                halves[half] = widen(load<SmallInts>(own + 2 * kTile + (2 * (at % kRawChunks) + half) * kTile +
                                                     kLanes * part));
        }
    };

    static Floats add(Floats total, const Bytes* codes, const Scales& own, const int8_t* inputs, float scale, float,
                      const int32_t* halves) {
        const Ints first = dot<kBits, kVectors / 2>(codes, inputs, 0) - 32 * halves[0];
        const Ints second = dot<kBits, kVectors / 2>(codes + kVectors / 2, inputs + 16, 0) - 32 * halves[1];
        return fused(to_floats(first * own.halves[0] + second * own.halves[1]), own.scale * scale, total);
    }

    static float value(const uint8_t* scales, int64_t at, int lane, int input, int code) {
        const uint8_t* own = scales + at / kRawChunks * kSuperBytes;
        const int8_t scale = int8_t(own[2 * kTile + (2 * (at % kRawChunks) + input / 16) * kTile + lane]);
        return half_to_float(half_at(own + 2 * lane)) * float(scale) * float(code - 32);
    }
};

template <typename Format>
int64_t tile_bytes(int64_t width) {
    const int64_t chunks = width / kChunk, bytes = chunks * code_bytes(Format::kBits) + Format::scale_bytes(chunks);
    return (bytes + 63) / 64 * 64;
}

// bytes ahead of their use at which weights are asked for: up to a half faster than what processors foresee
constexpr int kAhead = 16384;

template <typename Format>
void ask_ahead(const uint8_t* tile, int64_t chunk, int64_t chunks) {
    const int64_t bytes = tile_bytes<Format>(chunks * kChunk);
    const char* from = reinterpret_cast<const char*>(tile) + chunk * bytes / chunks + kAhead;
    for (int line = 0; line < code_bytes(Format::kBits) + 64; line += 64) __builtin_prefetch(from + line, 0, 3);
}

// one part of a tile of outputs for `kRows` rows; `kAdds` to what the outputs are
template <typename Format, int kRows, bool kAdds>
void multiply(const Activations& input, int64_t row, const uint8_t* tile, int part, int64_t width, float* output,
              int64_t outputs, int lanes, bool asks) {
    const int64_t chunks = width / kChunk;
    const uint8_t* scales = tile + chunks * code_bytes(Format::kBits);
    const int8_t* codes_of = input.codes.data() + row * width;
    const float *scales_of = input.scales.data() + row * chunks, *sums_of = input.sums.data() + row * chunks;
    const int32_t* halves_of = input.halves.data() + row * chunks * 2;
    Floats totals[kRows];
#pragma GCC unroll 8
    for (int each = 0; each < kRows; ++each) {
        totals[each] = Floats{};
        if (kAdds) std::memcpy(&totals[each], output + each * outputs, lanes * sizeof(float));
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (asks) ask_ahead<Format>(tile, chunk, chunks);
        Bytes codes[kVectors];
        unpack<Format::kBits>(tile + chunk * code_bytes(Format::kBits), part, codes);
        const typename Format::Scales own(scales, chunk, part);
#pragma GCC unroll 8
        for (int each = 0; each < kRows; ++each) {
            const int64_t at = each * chunks + chunk;
            totals[each] = Format::add(totals[each], codes, own, codes_of + each * width + chunk * kChunk, scales_of[at],
                                       sums_of[at], halves_of + 2 * at);
        }
    }
    for (int each = 0; each < kRows; ++each)
        std::memcpy(output + each * outputs, &totals[each], lanes * sizeof(float));
}

// the 16 outputs of a tile for the rows of the input from `first` on, of which `output` has the first
template <typename Format, bool kAdds = false>
void multiply_tile(const Activations& input, int64_t first, int64_t rows, const uint8_t* tile, int64_t width,
                   float* output, int64_t outputs, int64_t tile_index) {
    constexpr int kMost = kParts == 1 ? 8 : 4;
    for (int part = 0; part < kParts; ++part) {
        const int64_t at = tile_index * kTile + part * kLanes;
        const int lanes = int(std::min<int64_t>(kLanes, outputs - at));
        if (lanes <= 0) return;
        int64_t row = 0;
        const auto run = [&](auto count) {
            multiply<Format, decltype(count)::value, kAdds>(input, first + row, tile, part, width,
                                                            output + row * outputs + at, outputs, lanes,
                                                            row == 0 && part == 0);
            row += decltype(count)::value;
        };
        while (rows - row >= kMost) run(std::integral_constant<int, kMost>());
        if (kMost > 4 && rows - row >= 4) run(std::integral_constant<int, 4>());
        if (rows - row == 3) run(std::integral_constant<int, 3>());
        if (rows - row == 2) run(std::integral_constant<int, 2>());
        if (rows - row == 1) run(std::integral_constant<int, 1>());
    }
}

// What an adapter adds to the rows that are masks: their inputs times down, and the results, rounded in turn, times up.
class Update {
    typedef Plain<8, false> Format;

  public:
    Update(const SpaceUpdate* update, int64_t rows, int64_t outputs) : update_(update), outputs_(outputs) {
        if (!update) return;
        static thread_local std::vector<float> own;
        masks_ = rows - update->first;
        own.resize(masks_ * update->layers * update->rank);
        between_ = own.data();
    }

    // called by all threads of a region; the masks are the rows of the input from `first` on
    void add(const Activations& input, int64_t first, int64_t width, float* output) const {
        const int64_t rank = update_->rank, layers = update_->layers, ranks = layers * rank;
        const auto *down = static_cast<const uint8_t*>(update_->down), *up = static_cast<const uint8_t*>(update_->up);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < ranks / kTile; ++tile)
            multiply_tile<Format>(input, first, masks_, down + tile * tile_bytes<Format>(width), width, between_, ranks,
                                  tile);
        // each thread for itself: they are few
        static thread_local Activations own;
        own.reserve(layers * masks_, rank);
        for (int64_t row = 0; row < layers * masks_; ++row)
            own.quantize_row(between_ + (row % masks_ * layers + row / masks_) * rank, row, rank);
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < outputs_ / kTile; ++tile) {
            const int64_t* end = std::upper_bound(update_->ends, update_->ends + layers, tile * kTile);
            multiply_tile<Format, true>(own, (end - update_->ends) * masks_, masks_,
                                        up + tile * tile_bytes<Format>(rank), rank, output, outputs_, tile);
        }
    }

  private:
    const SpaceUpdate* update_;
    int64_t outputs_, masks_ = 0;
    float* between_ = nullptr;  // (masks, layers, rank)
};

template <typename Format>
struct Quantized {
    static int64_t packed_bytes(int64_t outputs, int64_t width) {
        return (outputs + kTile - 1) / kTile * tile_bytes<Format>(width);
    }

    static void pack_rows(const uint8_t* blocks, const int64_t* order, uint8_t* packed, int64_t outputs, int64_t width) {
        const int64_t chunks = width / kChunk, row_bytes = chunks / Format::kRawChunks * Format::kRawBytes;
        const int64_t tiles = (outputs + kTile - 1) / kTile;
        std::memset(packed, 0, packed_bytes(outputs, width));
#pragma omp parallel for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            uint8_t* own = packed + tile * tile_bytes<Format>(width);
            uint8_t* scales = own + chunks * code_bytes(Format::kBits);
            for (int lane = 0; lane < kTile && tile * kTile + lane < outputs; ++lane) {
                const int64_t output = tile * kTile + lane;
                const uint8_t* from = blocks + (order ? order[output] : output) * row_bytes;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                    const uint8_t* block = from + chunk / Format::kRawChunks * Format::kRawBytes;
                    uint8_t codes[kChunk];
                    Format::raw(block, chunk % Format::kRawChunks, codes);
                    pack<Format::kBits>(codes, lane, own + chunk * code_bytes(Format::kBits));
                    Format::pack_scales(block, chunk % Format::kRawChunks, lane, scales, chunk);
                }
            }
        }
    }

    static void linear(const float* input, const uint8_t* packed, float* output, int64_t rows, int64_t width,
                       int64_t outputs, const SpaceUpdate* update) {
        static thread_local Activations own;
        Activations& activations = own;
        activations.reserve(rows, width);
        const int64_t tiles = (outputs + kTile - 1) / kTile, bytes = tile_bytes<Format>(width);
        if (rows == 1) activations.quantize_row(input, 0, width);
        const Update added(update, rows, outputs);
#pragma omp parallel if (is_worth_threads(rows, width, outputs))
        {
            if (rows > 1) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; ++row) activations.quantize_row(input + row * width, row, width);
            }
#pragma omp for schedule(static) nowait
            for (int64_t tile = 0; tile < tiles; ++tile)
                multiply_tile<Format>(activations, 0, rows, packed + tile * bytes, width, output, outputs, tile);
            if (update) added.add(activations, update->first, width, output + update->first * outputs);
        }
    }

    static void row(const uint8_t* packed, int64_t output, int64_t width, float* to) {
        const int64_t chunks = width / kChunk;
        const uint8_t* tile = packed + output / kTile * tile_bytes<Format>(width);
        const uint8_t* scales = tile + chunks * code_bytes(Format::kBits);
        const int lane = output % kTile;
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int input = 0; input < kChunk; ++input) {
                const int code = unpack_one<Format::kBits>(tile + chunk * code_bytes(Format::kBits), lane, input);
                to[chunk * kChunk + input] = Format::value(scales, chunk, lane, input, code);
            }
    }
};

Floats load_weights(const uint16_t* from, std::true_type) { return load_halves(reinterpret_cast<const uint8_t*>(from)); }

Floats load_weights(const uint16_t* from, std::false_type) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// weights of 16 bits, float16 or bfloat16, as (outputs / 16, width, 16); products are computed in float32
template <bool kIsFloat16>
struct Halved {
    typedef std::integral_constant<bool, kIsFloat16> Kind;

    static int64_t packed_bytes(int64_t outputs, int64_t width) { return (outputs + kTile - 1) / kTile * width * 2 * kTile; }

    static void pack_rows(const uint8_t* blocks, const int64_t* order, uint8_t* packed, int64_t outputs, int64_t width) {
        const int64_t tiles = (outputs + kTile - 1) / kTile;
        std::memset(packed, 0, packed_bytes(outputs, width));
#pragma omp parallel for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int lane = 0; lane < kTile && tile * kTile + lane < outputs; ++lane) {
                const int64_t output = tile * kTile + lane, from = (order ? order[output] : output) * width;
                for (int64_t input = 0; input < width; ++input)
                    std::memcpy(packed + ((tile * width + input) * kTile + lane) * 2, blocks + 2 * (from + input), 2);
            }
    }

    template <int kRows>
    static void multiply(const float* input, const uint16_t* weights, float* output, int64_t width, int64_t outputs,
                         int lanes) {
        Floats totals[kRows] = {};
        for (int64_t at = 0; at < width; ++at) {
            const Floats own = load_weights(weights + at * kTile, Kind());
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row)
                totals[row] = fused(own, broadcast(input[row * width + at]), totals[row]);
        }
        for (int row = 0; row < kRows; ++row)
            std::memcpy(output + row * outputs, &totals[row], lanes * sizeof(float));
    }

    static void linear(const float* input, const uint8_t* packed, float* output, int64_t rows, int64_t width,
                       int64_t outputs, const SpaceUpdate* update) {
        const int64_t tiles = (outputs + kTile - 1) / kTile;
#pragma omp parallel for schedule(static) if (is_worth_threads(rows, width, outputs))
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int part = 0; part < kParts; ++part) {
                const int64_t first = tile * kTile + part * kLanes;
                const int lanes = int(std::min<int64_t>(kLanes, outputs - first));
                if (lanes <= 0) break;
                const uint16_t* weights =
                    reinterpret_cast<const uint16_t*>(packed) + tile * width * kTile + part * kLanes;
                int64_t row = 0;
                const auto run = [&](auto count) {
                    multiply<decltype(count)::value>(input + row * width, weights, output + row * outputs + first, width,
                                                     outputs, lanes);
                    row += decltype(count)::value;
                };
                while (rows - row >= 8) run(std::integral_constant<int, 8>());
                if (rows - row >= 4) run(std::integral_constant<int, 4>());
                if (rows - row >= 2) run(std::integral_constant<int, 2>());
                if (rows - row >= 1) run(std::integral_constant<int, 1>());
            }
        if (update) space_update(input, output, rows, width, outputs, update);
    }

    static void row(const uint8_t* packed, int64_t output, int64_t width, float* to) {
        for (int64_t input = 0; input < width; ++input) {
            const uint16_t bits = load<uint16_t>(packed + ((output / kTile * width + input) * kTile + output % kTile) * 2);
            const uint32_t wide = uint32_t(bits) << 16;
            if (kIsFloat16)
                to[input] = half_to_float(bits);
            else
                std::memcpy(to + input, &wide, sizeof wide);
        }
    }
};

// calls `run` with the format of a ggml type; returns false where there is none
template <typename Run>
bool with_format(int64_t type, const Run& run) {
    switch (type) {
        case 1: run(Halved<true>()); return true;
        case 2: run(Quantized<Plain<4, false>>()); return true;
        case 3: run(Quantized<Plain<4, true>>()); return true;
        case 6: run(Quantized<Plain<5, false>>()); return true;
        case 7: run(Quantized<Plain<5, true>>()); return true;
        case 8: run(Quantized<Plain<8, false>>()); return true;
        case 12: run(Quantized<Scaled<4>>()); return true;
        case 13: run(Quantized<Scaled<5>>()); return true;
        case 14: run(Quantized<Sixteens>()); return true;
        case 30: run(Halved<false>()); return true;
        default: return false;
    }
}

}  // namespace

int64_t space_packed_bytes(int64_t type, int64_t outputs, int64_t width) {
    int64_t bytes = 0;
    with_format(type, [&](auto format) { bytes = decltype(format)::packed_bytes(outputs, width); });
    return bytes;
}

void space_pack(int64_t type, const void* blocks, const int64_t* order, void* packed, int64_t outputs, int64_t width) {
    with_format(type, [&](auto format) {
        decltype(format)::pack_rows(static_cast<const uint8_t*>(blocks), order, static_cast<uint8_t*>(packed), outputs,
                                    width);
    });
}

void space_linear_quantized(int64_t type, const float* input, const void* packed, const float* bias, float* output,
                            int64_t rows, int64_t width, int64_t outputs, const SpaceUpdate* update) {
    with_format(type, [&](auto format) {
        decltype(format)::linear(input, static_cast<const uint8_t*>(packed), output, rows, width, outputs, update);
    });
    if (!bias) return;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < outputs; ++at) output[row * outputs + at] += bias[at];
}

void space_update(const float* input, float* output, int64_t rows, int64_t width, int64_t outputs,
                  const SpaceUpdate* update) {
    static thread_local Activations own;
    static thread_local std::vector<float> filled_up;
    Activations& activations = own;
    const int64_t masks = rows - update->first, padded = (width + kChunk - 1) / kChunk * kChunk;
    const float* states = input + update->first * width;
    if (padded > width) {
        filled_up.assign(masks * padded, 0.0f);
        for (int64_t row = 0; row < masks; ++row)
            std::copy_n(states + row * width, width, filled_up.data() + row * padded);
        states = filled_up.data();
    }
    activations.reserve(masks, padded);
    const Update added(update, rows, outputs);
#pragma omp parallel if (is_worth_threads(masks, padded, outputs))
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < masks; ++row) activations.quantize_row(states + row * padded, row, padded);
        added.add(activations, 0, padded, output + update->first * outputs);
    }
}

void space_rows_quantized(int64_t type, const int64_t* ids, const void* packed, float* output, int64_t rows,
                          int64_t width) {
    with_format(type, [&](auto format) {
        for (int64_t row = 0; row < rows; ++row)
            decltype(format)::row(static_cast<const uint8_t*>(packed), ids[row], width, output + row * width);
    });
}
