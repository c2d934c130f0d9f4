// Transposed copies at the speed of memory: tiles of one cache line by STEP rows go through a
// buffer, in squares of one 16-byte vector by as many rows, so that every line is touched once.
#pragma once
#include <cstring>

#include "parallel.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// As many elements as 16 bytes hold; half of two vectors interleaved, element by element.
template <class T>
struct Vector;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(mask, a, b, ...) __builtin_shuffle(a, b, mask{__VA_ARGS__})
#endif

template <>
struct Vector<uint8_t> {
    typedef uint8_t V __attribute__((vector_size(16)));
    static V low(V a, V b) {
        return SHUFFLE(V, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    }
    static V high(V a, V b) {
        return SHUFFLE(V, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
};

template <>
struct Vector<uint16_t> {
    typedef uint16_t V __attribute__((vector_size(16)));
    static V low(V a, V b) { return SHUFFLE(V, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
    static V high(V a, V b) { return SHUFFLE(V, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};

template <>
struct Vector<float> {
    typedef float V __attribute__((vector_size(16)));
    typedef int32_t Mask __attribute__((vector_size(16)));
    static V low(V a, V b) { return SHUFFLE(Mask, a, b, 0, 4, 1, 5); }
    static V high(V a, V b) { return SHUFFLE(Mask, a, b, 2, 6, 3, 7); }
};

#define UNROLL _Pragma("GCC unroll 16")  // vectors are registers only then

// A square: interleaving each vector with the one half the square further on, once for every bit
// of the index, moves each element to its transposed place.
template <class T>
static inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    using Lanes = Vector<T>;
    constexpr int N = 16 / sizeof(T);
    typename Lanes::V v[N], w[N];
    UNROLL for (int i = 0; i < N; i++) memcpy(&v[i], from + i * from_stride, 16);
    UNROLL for (int size = 1; size < N; size *= 2) {
        UNROLL for (int i = 0; i < N / 2; i++) {
            w[2 * i] = Lanes::low(v[i], v[i + N / 2]);
            w[2 * i + 1] = Lanes::high(v[i], v[i + N / 2]);
        }
        UNROLL for (int i = 0; i < N; i++) v[i] = w[i];
    }
    UNROLL for (int i = 0; i < N; i++) memcpy(to + i * to_stride, &v[i], 16);
}

// A tile of up to STEP rows and one cache line of columns: a line of each column at least.
template <class T>
constexpr int64_t STEP = sizeof(T) == 1 ? 64 : 32;

// A line (or two) to memory, past the caches where there is an instruction for it: a column's line
// need then not be read from memory before it is written, which no prefetcher sees coming.
static inline void stream(const void* from, void* to, int64_t bytes) {
#ifdef __AVX512F__
    if ((reinterpret_cast<uintptr_t>(to) | uintptr_t(bytes)) % 64 == 0) {  // whole lines
        typedef char Line __attribute__((vector_size(64)));
        for (int64_t k = 0; k < bytes; k += 64) {
            Line line;
            memcpy(&line, static_cast<const char*>(from) + k, sizeof line);
            asm volatile("vmovntdq %1, %0" : "=m"(*reinterpret_cast<Line*>(static_cast<char*>(to) + k)) : "v"(line));
        }
        return;
    }
#endif
#ifdef __SSE2__
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        for (int64_t k = 0; k < bytes; k += 16)
            _mm_stream_si128(
                reinterpret_cast<__m128i*>(static_cast<char*>(to) + k),
                _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + k)));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

template <class T>
static inline void transpose_tile(
    const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
    constexpr int N = 16 / sizeof(T), LINE = 64 / sizeof(T), STEP = ::STEP<T>;
    alignas(64) T tile[LINE * STEP];
    alignas(64) T edge[STEP * LINE];
    const bool whole = rows == STEP && columns == LINE;
    if (!whole)
        for (int64_t i = 0; i < rows; i++)
            memcpy(edge + i * LINE, from + i * from_stride, columns * sizeof(T));
    const T* source = whole ? from : edge;
    const int64_t stride = whole ? from_stride : LINE;
    for (int i = 0; i < STEP; i += N)
        for (int j = 0; j < LINE; j += N)
            transpose_square<T>(source + i * stride + j, stride, tile + j * STEP + i, STEP);
    if (whole)
        for (int64_t j = 0; j < LINE; j++)
            stream(tile + j * STEP, to + j * to_stride, STEP * sizeof(T));
    else
        for (int64_t j = 0; j < columns; j++)
            memcpy(to + j * to_stride, tile + j * STEP, rows * sizeof(T));
}

// to[j * to_stride + i] = from[i * from_stride + j] for all rows i and columns j. As many rows as
// BLOCK at a time keep the lines of a page of `to` together: it has a page for every column.
template <class T>
static __attribute__((noinline)) void transpose_block(
    const T* from, int64_t from_stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
    constexpr int64_t LINE = 64 / sizeof(T), STEP = ::STEP<T>;
    for (int64_t j = 0; j < width; j += LINE)
        for (int64_t i = 0; i < rows; i += STEP)
            transpose_tile(
                from + i * from_stride + j, from_stride, min(STEP, rows - i),
                min(LINE, width - j), to + j * to_stride + i, to_stride);
#ifdef __SSE2__
    _mm_sfence();
#endif
}
