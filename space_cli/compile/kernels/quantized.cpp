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
typedef uint16_t Pairs __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int8_t SmallInts __attribute__((vector_size(kLanes)));

template <typename T>
T load(const void* from) {
    T values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// not a sum with zeros, which would be an instruction of its own, for the sake of the sign of zero
Floats broadcast(float value) { return value - Floats{}; }
Ints broadcast(int32_t value) { return value - Ints{}; }
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

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// Of kLanes vectors one whose lane i has all lanes of vector i combined, halves with halves.
template <int kHalf = kLanes / 2, typename V, typename Combine, int... kLane>
inline __attribute__((always_inline)) V folded(V* of, const Combine& combine, std::integer_sequence<int, kLane...> lanes) {
#pragma GCC unroll 8
    for (int at = 0; at < kHalf; ++at) {
        const V one = of[at], other = of[at + kHalf];
        of[at] = combine(__builtin_shufflevector(one, other, (kLane % (2 * kHalf) % kHalf + kLane / (2 * kHalf) * 2 * kHalf +
                                                              (kLane % (2 * kHalf) < kHalf ? 0 : kLanes))...),
                         __builtin_shufflevector(one, other,
                                                 (kLane % (2 * kHalf) % kHalf + kLane / (2 * kHalf) * 2 * kHalf + kHalf +
                                                  (kLane % (2 * kHalf) < kHalf ? 0 : kLanes))...));
    }
    if constexpr (kHalf == 1)
        return of[0];
    else
        return folded<kHalf / 2>(of, combine, lanes);
}

// the nearest whole numbers, of two as near the even one, of numbers below 2^22
Ints rounded(Floats values) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_cvtps_epi32((__m512)values);
#elif defined(__AVX__)
    return (Ints)_mm256_cvtps_epi32((__m256)values);
#else
    constexpr float kWhole = 12582912.0f;  // added and taken away, it leaves whole numbers
    return __builtin_convertvector((values + kWhole) - kWhole, Ints);
#endif
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

// compilers take them apart one by one
Ints widen(SmallInts values) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_cvtepi8_epi32((__m128i)values);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)values));
#else
    return __builtin_convertvector(values, Ints);
#endif
}

// Vector `vector` of a chunk's codes, of one part of a tile.
template <int kBits>
inline __attribute__((always_inline)) Bytes codes_at(const uint8_t* own, int vector) {
    if constexpr (kBits == 8) return load<Bytes>(own + 64 * vector);
    const Bytes both = load<Bytes>(own + 64 * (vector % 4));
    const Bytes low = (vector < 4 ? both : both >> 4) & uint8_t(15);
    if constexpr (kBits == 4) return low;
    const Bytes plane = load<Bytes>(own + 256 + (kBits == 6 ? 64 * (vector / 4) : 0));
    const Bytes high = kBits == 5 ? plane >> uint8_t(vector) & uint8_t(1) : plane >> uint8_t(2 * (vector % 4)) & uint8_t(3);
    // of bytes compilers make four additions
    return low | (Bytes)((Pairs)high << 4);
}

// kSubtracts: codes of 8 bits are multiplied as what they stand for, themselves less 128; else that is left to the caller
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SPACE_DOT_FOUR(total, codes, inputs) _mm512_dpbusd_epi32((__m512i)total, (__m512i)codes, (__m512i)inputs)
constexpr bool kSubtracts = false;
#elif defined(__AVXVNNI__)
#define SPACE_DOT_FOUR(total, codes, inputs) _mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)codes, (__m256i)inputs)
constexpr bool kSubtracts = false;
#else
constexpr bool kSubtracts = true;
#endif

// Add the products of a chunk's vectors `kFirst` to `kLast` of codes and of `kRows` rows, kChunk apart, to their totals.
// Rows stand inside, so that no sum waits for itself.
template <int kBits, int kRows, int kFirst = 0, int kLast = kVectors>
inline __attribute__((always_inline)) void dots(const uint8_t* codes, const int8_t* inputs, Ints* totals) {
    [[maybe_unused]] const auto four = [&](int row, int vector) __attribute__((always_inline)) {
        return broadcast(load<int32_t>(inputs + row * kChunk + 4 * vector));
    };
#if defined(SPACE_DOT_FOUR)
#pragma GCC unroll 8
    for (int vector = kFirst; vector < kLast; ++vector) {
        const Bytes code = codes_at<kBits>(codes, vector);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) totals[row] = (Ints)SPACE_DOT_FOUR(totals[row], code, four(row, vector));
    }
#elif defined(__AVX2__)
    // pairs of products are summed in 16 bits as long as they fit
    constexpr int kFit = std::min(kLast - kFirst, kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1);
#if defined(__AVX512BW__)
    typedef __m512i Register;
    const auto size_of = [](Register own) { return _mm512_abs_epi8(own); };
    const auto signed_as = [](Register x, Register own) {
        return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(own), _mm512_setzero_si512(), x);
    };
    const auto products = [](Register code, Register x) { return _mm512_maddubs_epi16(code, x); };
    const auto add16 = [](Register a, Register b) { return _mm512_add_epi16(a, b); };
    const auto pairs = [](Register a) { return (Ints)_mm512_madd_epi16(a, _mm512_set1_epi16(1)); };
#else
    typedef __m256i Register;
    const auto size_of = [](Register own) { return _mm256_abs_epi8(own); };
    const auto signed_as = [](Register x, Register own) { return _mm256_sign_epi8(x, own); };
    const auto products = [](Register code, Register x) { return _mm256_maddubs_epi16(code, x); };
    const auto add16 = [](Register a, Register b) { return _mm256_add_epi16(a, b); };
    const auto pairs = [](Register a) { return (Ints)_mm256_madd_epi16(a, _mm256_set1_epi16(1)); };
#endif
#pragma GCC unroll 8
    for (int start = kFirst; start < kLast; start += kFit) {
        Register sums[kRows];
#pragma GCC unroll 8
        for (int vector = start; vector < start + kFit; ++vector) {
            const Bytes code = codes_at<kBits>(codes, vector);
            const Register own = (Register)(kBits == 8 ? code ^ uint8_t(128) : code);
            const Register sized = kBits == 8 ? size_of(own) : own;
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                const Register x = (Register)four(row, vector);
                const Register some = products(sized, kBits == 8 ? signed_as(x, own) : x);
                sums[row] = vector == start ? some : add16(sums[row], some);
                asm("" : "+v"(sums[row]));  // in this order, which needs the fewest registers
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) totals[row] += pairs(sums[row]);
    }
#elif defined(__ARM_FEATURE_DOTPROD)
#pragma GCC unroll 8
    for (int vector = kFirst; vector < kLast; ++vector) {
        const Bytes code = codes_at<kBits>(codes, vector), own = kBits == 8 ? code ^ uint8_t(128) : code;
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row)
            totals[row] = (Ints)vdotq_s32((int32x4_t)totals[row], (int8x16_t)own, (int8x16_t)four(row, vector));
    }
#else
    for (int row = 0; row < kRows; ++row)
        for (int vector = kFirst; vector < kLast; ++vector)
            for (int lane = 0; lane < kLanes; ++lane)
                for (int each = 0; each < 4; ++each) {
                    const int32_t code = codes_at<kBits>(codes, vector)[4 * lane + each];
                    totals[row][lane] += (code - (kBits == 8 ? 128 : 0)) * inputs[row * kChunk + 4 * vector + each];
                }
#endif
}

// rows that the calling thread rounds: the others would wait for its floats, which are four times as many bytes
constexpr int64_t kFewRows = 16;
// rows whose chunks lie beside each other
constexpr int64_t kBlockRows = 16;
// chunks of rows that are rounded together
constexpr int64_t kBatch = 16;

// What a chunk of some rows is: their codes kChunk apart, and a number of each for each row; of halves there are two.
struct Chunk {
    const int8_t* codes;
    const float *scales, *sums, *wholes, *halves[2];

    void advance(int64_t rows) {
        codes += rows * kChunk;
        scales += rows;
        sums += rows;
        wholes += rows;
        halves[0] += rows;
        halves[1] += rows;
    }
};

// Rows of activations in int8, chunk by chunk, all rows of a chunk beside each other.
//
// Of kBlockRows rows, or of fewer where there are no more: codes (width / 32, rows, 32) int8, and floats (width / 32, rows):
// scales; wholes, the sums of codes; sums, these times the scale; halves, the sums of the first and the last 16 codes.
struct Activations {
    std::vector<int8_t> codes;
    std::vector<float> scales, sums, wholes, halves[2];
    int64_t rows = 0, chunks = 0, together = 0;

    void reserve(int64_t count, int64_t width) {
        rows = count;
        chunks = width / kChunk;
        together = std::min(rows, kBlockRows);
        const size_t size = (rows + together - 1) / together * together * width + kBatch * kChunk;
        if (codes.size() >= size) return;
        codes.resize(size);
        for (std::vector<float>* each : {&scales, &sums, &wholes, halves, halves + 1})
            each->resize(size / kChunk);
    }

    int64_t place_of(int64_t chunk, int64_t row) const {
        return (row / kBlockRows * chunks + chunk) * together + row % kBlockRows;
    }

    Chunk at(int64_t chunk, int64_t row) const {
        const int64_t place = place_of(chunk, row);
        return {codes.data() + place * kChunk, scales.data() + place, sums.data() + place, wholes.data() + place,
                {halves[0].data() + place, halves[1].data() + place}};
    }

    // how many places there are, some of them behind the last row
    int64_t places() const { return (rows + kBlockRows - 1) / kBlockRows * chunks * together; }

    // Round a batch of places, of which `input(row)` are the values.
    template <typename Input>
    void quantize(int64_t batch, const Input& input) {
        constexpr int kRegisters = kChunk / kLanes;
        constexpr auto kAll = std::make_integer_sequence<int, kLanes>();
        const auto plus = [](Ints a, Ints b) { return a + b; };
        const int64_t first = batch * kBatch, last = std::min(first + kBatch, places());
        const float* from[kBatch];
        int64_t block = first / (chunks * together), chunk = first / together % chunks, row = first % together;
        for (int64_t place = first; place < last; ++place) {
            from[place - first] = input(std::min(block * kBlockRows + row, rows - 1)) + chunk * kChunk;
            if (++row == together) row = 0, ++chunk;
            if (chunk == chunks) chunk = 0, ++block;
        }
        for (int64_t place = last; place < first + kBatch; ++place) from[place - first] = from[0];
        for (int start = 0; start < kBatch; start += kLanes) {
            Floats most[kLanes];
#pragma GCC unroll 16
            for (int each = 0; each < kLanes; ++each) {
                most[each] = Floats{};
#pragma GCC unroll 8
                for (int part = 0; part < kRegisters; ++part)
                    most[each] = larger(most[each], (Floats)(load<Ints>(from[start + each] + part * kLanes) & 0x7fffffff));
            }
            const Floats largest = folded(most, larger, kAll);
            const Floats scale = largest / 127.0f, factors = largest > 0 ? 127.0f / largest : Floats{};
            Ints both[kLanes];
#pragma GCC unroll 16
            for (int each = 0; each < kLanes; ++each) {
                // sums of both halves in one number, the second 2^16 times
                both[each] = Ints{};
#pragma GCC unroll 8
                for (int part = 0; part < kRegisters; ++part) {
                    const Ints code = rounded(load<Floats>(from[start + each] + part * kLanes) * factors[each]);
                    store_small(codes.data() + (first + start + each) * kChunk + part * kLanes, code);
                    both[each] += part * kLanes < 16 ? code : code << 16;
                }
            }
            const Ints sum = folded(both, plus, kAll), second = (sum + 0x8000) >> 16;
            const Floats one = to_floats(sum - (second << 16)), other = to_floats(second);
            const auto keep = [&](std::vector<float>& to, Floats values) {
                std::memcpy(to.data() + first + start, &values, sizeof values);
            };
            keep(scales, scale);
            keep(halves[0], one);
            keep(halves[1], other);
            keep(wholes, one + other);
            keep(sums, scale * (one + other));
        }
    }

    int64_t batches() const { return (places() + kBatch - 1) / kBatch; }
};

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
//   add<kRows>(totals, codes, scales, input): a chunk's share of a part's outputs, for so many rows;
//   value(scales, at, lane, input, code): one weight.

// scale, and where `kHasMin` a least value, per chunk: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
template <int kOfBits, bool kHasMin>
struct Plain {
    static constexpr int kBits = kOfBits, kRawChunks = 1;
    static constexpr int kHead = kHasMin ? 4 : 2;
    static constexpr int kRawBytes = kHead + (kBits == 8 ? 32 : kBits == 5 ? 20 : 16);
    static constexpr int kScaleBytes = kHasMin ? 4 * kTile : 2 * kTile;
    // codes stand for themselves less this, unless the products see to it
    static constexpr int kOffset = kHasMin || (kBits == 8 && kSubtracts) ? 0 : 1 << (kBits - 1);

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

    template <int kRows>
    static inline __attribute__((always_inline)) void add(Floats* totals, const uint8_t* codes, const Scales& own,
                                                          const Chunk& input) {
        Ints products[kRows] = {};
        dots<kBits, kRows>(codes, input.codes, products);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            Floats product = to_floats(products[row]);
            if (kOffset) product = fused(broadcast(-float(kOffset)), broadcast(input.wholes[row]), product);
            totals[row] = fused(product, own.scale * broadcast(input.scales[row]), totals[row]);
            if (kHasMin) totals[row] = fused(own.least, broadcast(input.sums[row]), totals[row]);
        }
    }

    static float value(const uint8_t* scales, int64_t at, int lane, int, int code) {
        const float scale = half_to_float(half_at(scales + at * kScaleBytes + 2 * lane));
        const float least = kHasMin ? half_to_float(half_at(scales + at * kScaleBytes + 2 * (kTile + lane))) : 0.0f;
        return scale * float(code - (kHasMin ? 0 : 1 << (kBits - 1))) + least;
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
            scale = load_halves(own + 2 * kLanes * part) * to_floats(widen(load<SmallInts>(of_chunk)));
            least = load_halves(own + 2 * (kTile + kLanes * part)) * to_floats(widen(load<SmallInts>(of_chunk + kTile)));
        }
    };

    template <int kRows>
    static inline __attribute__((always_inline)) void add(Floats* totals, const uint8_t* codes, const Scales& own,
                                                          const Chunk& input) {
        Ints products[kRows] = {};
        dots<kBits, kRows>(codes, input.codes, products);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            totals[row] = fused(to_floats(products[row]), own.scale * broadcast(input.scales[row]), totals[row]);
            totals[row] = fused(own.least, broadcast(-input.sums[row]), totals[row]);
        }
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
        Floats halves[2];
        Scales(const uint8_t* scales, int64_t at, int part) {
            const uint8_t* own = scales + at / kRawChunks * kSuperBytes;
            scale = load_halves(own + 2 * kLanes * part);
            for (int half = 0; half < 2; ++half)
                halves[half] = to_floats(widen(load<SmallInts>(own + 2 * kTile + (2 * (at % kRawChunks) + half) * kTile +
                                                               kLanes * part)));
        }
    };

    // All numbers up to the last sum are whole and below 2^24, so floats are exact.
    template <int kRows>
    static inline __attribute__((always_inline)) void add(Floats* totals, const uint8_t* codes, const Scales& own,
                                                          const Chunk& input) {
        Ints products[2][kRows] = {};
        dots<kBits, kRows, 0, kVectors / 2>(codes, input.codes, products[0]);
        dots<kBits, kRows, kVectors / 2, kVectors>(codes, input.codes, products[1]);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
            const auto of = [&](int half) {
                return fused(broadcast(-32.0f), broadcast(input.halves[half][row]), to_floats(products[half][row]));
            };
            const Floats both = fused(of(1), own.halves[1], of(0) * own.halves[0]);
            totals[row] = fused(both, own.scale * broadcast(input.scales[row]), totals[row]);
        }
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

// one part of a tile of outputs for `kRows` rows; `kAdds` to what the outputs are
template <typename Format, int kRows, bool kAdds>
void multiply(const Activations& input, int64_t row, const uint8_t* tile, int part, int64_t width, float* output,
              int64_t outputs, int lanes, bool asks) {
    const int64_t chunks = width / kChunk;
    const uint8_t* scales = tile + chunks * code_bytes(Format::kBits);
    Floats totals[kRows] = {};
    if (kAdds)
        for (int each = 0; each < kRows; ++each) std::memcpy(&totals[each], output + each * outputs, lanes * sizeof(float));
    Chunk at = input.at(0, row);
    const uint8_t* codes = tile + part * sizeof(Bytes);
    for (int64_t chunk = 0; chunk < chunks; ++chunk, codes += code_bytes(Format::kBits), at.advance(input.together)) {
        if (asks)
            for (int line = 0; line < code_bytes(Format::kBits); line += 64) __builtin_prefetch(codes + kAhead + line, 0, 3);
        Format::template add<kRows>(totals, codes, typename Format::Scales(scales, chunk, part), at);
    }
    if (asks)
        for (int64_t line = 0; line < Format::scale_bytes(chunks); line += 64) __builtin_prefetch(codes + kAhead + line, 0, 3);
    // a length that compilers know is a store, any other a call
    if (lanes == kLanes) {
#pragma GCC unroll 8
        for (int each = 0; each < kRows; ++each) std::memcpy(output + each * outputs, &totals[each], sizeof totals[each]);
        return;
    }
    for (int each = 0; each < kRows; ++each) std::memcpy(output + each * outputs, &totals[each], lanes * sizeof(float));
}

// the 16 outputs of a tile for the rows of the input from `first` on, of which `output` has the first
template <typename Format, bool kAdds = false>
void multiply_tile(const Activations& input, int64_t first, int64_t rows, const uint8_t* tile, int64_t width,
                   float* output, int64_t outputs, int64_t tile_index) {
    constexpr int kMost = 8;
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
        while (row < rows) {
            const int64_t left = std::min(rows - row, kBlockRows - (first + row) % kBlockRows);
            switch (std::min<int64_t>(left, kMost)) {
                case 1: run(std::integral_constant<int, 1>()); break;
                case 2: run(std::integral_constant<int, 2>()); break;
                case 3: run(std::integral_constant<int, 3>()); break;
                case 4: run(std::integral_constant<int, 4>()); break;
                case 5: run(std::integral_constant<int, 5>()); break;
                case 6: run(std::integral_constant<int, 6>()); break;
                case 7: run(std::integral_constant<int, 7>()); break;
                default: run(std::integral_constant<int, kMost>());
            }
        }
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
        const auto row_of = [&](int64_t row) { return between_ + (row % masks_ * layers + row / masks_) * rank; };
        for (int64_t batch = 0; batch < own.batches(); ++batch) own.quantize(batch, row_of);
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
        const auto quantize = [&](int64_t batch) {
            activations.quantize(batch, [&](int64_t row) { return input + row * width; });
        };
        const bool is_many = rows > kFewRows;
        if (!is_many)
            for (int64_t batch = 0; batch < activations.batches(); ++batch) quantize(batch);
        const int64_t tiles = (outputs + kTile - 1) / kTile, bytes = tile_bytes<Format>(width);
        const Update added(update, rows, outputs);
#pragma omp parallel if (is_worth_threads(rows, width, outputs))
        {
            if (is_many) {
#pragma omp for schedule(static)
                for (int64_t batch = 0; batch < activations.batches(); ++batch) quantize(batch);
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
        for (int64_t batch = 0; batch < activations.batches(); ++batch)
            activations.quantize(batch, [&](int64_t row) { return states + row * padded; });
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
