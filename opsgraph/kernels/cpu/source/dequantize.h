// The values of FP8 copies, for products in bf16 or fp32: the numbers of kernels/reference/quantize.py.
#pragma once
#include "activation_rows.h"
#include "parallel.h"
#include "scalar.h"

enum Scales { DIVISORS, E8M0, FACTORS };  // in the order of SCALES in dequantize.py

struct Dequantize {
    int64_t dtype, e5m2, scales, threads, rows, width;
    const uint8_t* data;
    int64_t stride;
    const void* scale;  // a grid of them, fp32 or E8M0; null: the values as they are
    int64_t height, side;  // rows and columns of its blocks
    void* y;
};

// A byte of FP8 in fp32. Its bits are moved to where fp32 has them; subnormals are what they add to
// the smallest normal number, so that no subnormal of fp32 is multiplied.
template <bool E5M2>
static inline float decode(uint8_t code) {
    const uint32_t mantissa = E5M2 ? 2 : 3, bias = E5M2 ? 15 : 7, least = (128 - bias) << 23;
    uint32_t size = code & 0x7f, moved = size << (23 - mantissa);
    uint32_t normal = moved + ((127 - bias) << 23);
    uint32_t tiny = bits<uint32_t>(bits<float>(moved | least) - bits<float>(least));
    uint32_t value = size < (1u << mantissa) ? tiny : normal;
    if (E5M2)
        value = size >= 0x7c ? 0x7f800000 | moved : value;
    else
        value = size == 0x7f ? 0x7fc00000 : value;
    return bits<float>(value | uint32_t(code & 0x80) << 24);
}

template <bool E5M2, class T>
LOOP void decode_all(
    const uint8_t* __restrict from, const float* __restrict factor, T* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = narrow<T>(decode<E5M2>(from[j]) * factor[j]);
}

// What a block's values are multiplied by.
static inline float factor_of(const Dequantize& d, int64_t at) {
    if (d.scales == DIVISORS) return 1.0f / static_cast<const float*>(d.scale)[at];
    if (d.scales == FACTORS) return static_cast<const float*>(d.scale)[at];
    const uint32_t exponent = static_cast<const uint8_t*>(d.scale)[at];
    return bits<float>(exponent == 255 ? 0x7fc00000u : exponent ? exponent << 23 : 1u << 22);
}

// Of n columns of a row of blocks from `first` on.
static void factors(const Dequantize& d, int64_t down, int64_t first, float* to, int64_t n) {
    const int64_t across = (d.width + d.side - 1) / d.side;
    for (int64_t j = 0; j < n;) {
        const int64_t block = (first + j) / d.side, end = min(n, (block + 1) * d.side - first);
        for (const float factor = factor_of(d, down * across + block); j < end; j++) to[j] = factor;
    }
}

template <class T, bool E5M2>
static void dequantize(const Dequantize& d) {
    over_rows(d.threads, Shares(d.rows), d.width, [&](int64_t begin, int64_t end, int64_t) {
        alignas(64) float made[CHUNK];
        for (int64_t first = 0; first < d.width; first += CHUNK) {
            const int64_t n = min(CHUNK, d.width - first);
            for (int64_t row = begin; row < end; row++) {
                if (d.scale && (row == begin || row % d.height == 0))
                    factors(d, row / d.height, first, made, n);
                decode_all<E5M2>(
                    d.data + row * d.stride + first, d.scale ? made : ones.values,
                    static_cast<T*>(d.y) + row * d.width + first, n);
            }
        }
    });
}
