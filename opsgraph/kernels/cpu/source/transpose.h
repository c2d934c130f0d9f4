// Transposed copies at the speed of memory: tiles of one cache line by BLOCK rows go through a
// buffer, in squares of one 16-byte vector by as many rows, so that every line is touched once.
#pragma once
#include <cstring>

#include "parallel.h"

// As many elements as 16 bytes hold; half of two vectors interleaved, element by element.
template <class T>
struct Vector;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(mask, a, b, ...) __builtin_shuffle(a, b, mask{__VA_ARGS__})
#endif

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

// A square: interleaving each vector with the one half the square further on, once for every bit
// of the index, moves each element to its transposed place.
template <class T>
static inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    using Lanes = Vector<T>;
    constexpr int N = 16 / sizeof(T);
    typename Lanes::V v[N], w[N];
    for (int i = 0; i < N; i++) memcpy(&v[i], from + i * from_stride, 16);
    for (int size = 1; size < N; size *= 2) {
        for (int i = 0; i < N / 2; i++) {
            w[2 * i] = Lanes::low(v[i], v[i + N / 2]);
            w[2 * i + 1] = Lanes::high(v[i], v[i + N / 2]);
        }
        for (int i = 0; i < N; i++) v[i] = w[i];
    }
    for (int i = 0; i < N; i++) memcpy(to + i * to_stride, &v[i], 16);
}

// to[j * to_stride + i] = from[i * from_stride + j] for up to BLOCK rows i and all columns j.
template <class T>
static __attribute__((noinline)) void transpose_block(
    const T* from, int64_t from_stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
    constexpr int N = 16 / sizeof(T), LINE = 64 / sizeof(T);
    alignas(64) T tile[LINE * BLOCK];
    alignas(64) T edge[BLOCK * LINE];
    for (int64_t column = 0; column < width; column += LINE) {
        const T* source = from + column;
        int64_t stride = from_stride, columns = std::min<int64_t>(LINE, width - column);
        if (columns < LINE || rows < BLOCK) {
            for (int64_t i = 0; i < rows; i++)
                memcpy(edge + i * LINE, source + i * from_stride, columns * sizeof(T));
            source = edge;
            stride = LINE;
        }
        for (int i = 0; i < BLOCK; i += N)
            for (int j = 0; j < LINE; j += N)
                transpose_square<T>(source + i * stride + j, stride, tile + j * BLOCK + i, BLOCK);
        T* target = to + column * to_stride;
        if (rows == BLOCK)
            for (int64_t j = 0; j < columns; j++)
                memcpy(target + j * to_stride, tile + j * BLOCK, BLOCK * sizeof(T));
        else
            for (int64_t j = 0; j < columns; j++)
                memcpy(target + j * to_stride, tile + j * BLOCK, rows * sizeof(T));
    }
}

// The transposed copy of some rows of a result, if it is wanted: `to` is [width, rows].
template <class T>
static void transposed_copy(
    const void* from, int64_t width, int64_t begin, int64_t end, void* to, int64_t rows) {
    if (to)
        transpose_block(
            static_cast<const T*>(from) + begin * width, width, end - begin, width,
            static_cast<T*>(to) + begin, rows);
}
