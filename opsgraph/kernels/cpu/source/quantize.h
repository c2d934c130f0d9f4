// FP8 copies of a tensor: the formulas, and the bits, of kernels/reference/quantize.py.
//
// Work is cut into tiles of BLOCK rows by SPAN columns, which hold whole blocks of every scaling; or
// of one row, if no scale and no copy needs more. A
// column copy is made as rows: with a scale for each column, then its bytes are transposed.
#pragma once
#include <algorithm>
#include <vector>

#include "activation_rows.h"
#include "parallel.h"
#include "scalar.h"
#include "transpose.h"

enum Scaling { TENSOR, ROWS, BLOCKS, SQUARE, MX };  // in the order of SCALINGS in quantize.py

struct Quantize {
    int64_t dtype, e5m2, scaling, power_of_two, threads, rows, width;
    const void* x;
    int64_t stride;
    const float* given;  // the scale of TENSOR, or null: x's own, which goes to row_scale
    uint8_t *row, *col;
    void *row_scale, *col_scale;
    float *amax, *inverse;
    double eps;
};

const int64_t SPAN = 512;
const int64_t SIDE = 128, MX_SIDE = 32;  // elements of a block of BLOCKS and SQUARE, and of MX
const uint32_t INFINITE = 0x7f800000;

// |x| as an integer: it orders like the magnitudes, a NaN above infinity.
static inline uint32_t magnitude(float x) { return bits<uint32_t>(x) & 0x7fffffff; }
static inline uint16_t magnitude(bf16 x) { return x & 0x7fff; }

static inline uint32_t widened(uint32_t magnitude) { return magnitude; }
static inline uint32_t widened(uint16_t magnitude) { return uint32_t(magnitude) << 16; }

template <class T>
using Magnitude = decltype(magnitude(T()));

// fp32 to a byte of FP8: saturated, rounded to nearest even, 0x7f for a NaN. Subnormals are rounded
// by adding a number whose unit in the last place is their step, the others as integers.
template <bool E5M2>
static inline uint8_t encode(float x) {
    const uint32_t largest = E5M2 ? 0x47600000 : 0x43e00000;  // 57344 and 448
    const uint32_t mantissa = E5M2 ? 2 : 3, bias = E5M2 ? 15 : 7, dropped = 23 - mantissa;
    const uint32_t step = (151 - bias - mantissa) << 23;
    uint32_t all = bits<uint32_t>(x), whole = all & 0x7fffffff;
    uint32_t size = std::min(whole, largest);  // a NaN's too: not through a branch on floats
    uint32_t tiny = bits<uint32_t>(bits<float>(size) + bits<float>(step)) - step;
    uint32_t rounded = size + ((1u << (dropped - 1)) - 1) + ((size >> dropped) & 1);
    uint32_t normal = (rounded >> dropped) - ((127 - bias) << mantissa);
    uint32_t code = size < ((128 - bias) << 23) ? tiny : normal;
    code |= (all >> 24) & 0x80;
    return uint8_t(whole > INFINITE ? 0x7f : code);
}

static inline float scale_of(const Quantize& q, uint32_t size) {
    float amax = bits<float>(size), eps = float(q.eps);
    amax = amax < eps ? eps : amax;
    float scale = (q.e5m2 ? 57344.0f : 448.0f) / amax;
    scale = scale > 3.4028234663852886e38f ? 3.4028234663852886e38f : scale;
    scale = amax > 0.0f && bits<uint32_t>(amax) < INFINITE ? scale : 1.0f;
    return q.power_of_two ? bits<float>(bits<uint32_t>(scale) & 0xff800000u) : scale;
}

static inline uint8_t e8m0_of(bool e5m2, uint32_t size) {
    int32_t exponent = int32_t(size >> 23) - (e5m2 ? 15 : 8) + ((size & 0x7fffff) > 0x600000);
    exponent = std::max(exponent, 0);
    return uint8_t(size < INFINITE ? exponent : size > INFINITE ? 255 : 254);
}

// Of a block with that amax: writes its scale into the grid, returns what values are multiplied by.
static inline float multiplier(const Quantize& q, uint32_t size, void* grid, int64_t at) {
    if (q.scaling != MX) return static_cast<float*>(grid)[at] = scale_of(q, size);
    uint8_t exponent = static_cast<uint8_t*>(grid)[at] = e8m0_of(q.e5m2, size);
    if (exponent == 255) return bits<float>(uint32_t(0x7fc00000));
    return bits<float>(exponent == 254 ? 1u << 22 : (254u - exponent) << 23);
}

// What was saturated and should not have been: an overflow has to show in what is made of it.
template <class T>
LOOP void mark_infinities(const T* __restrict x, uint8_t* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = widened(magnitude(x[j])) == INFINITE ? 0x7f : to[j];
}

template <class T>
static inline uint32_t largest_of(const T* __restrict x, int64_t n) {
    Magnitude<T> most = 0;
    for (int64_t j = 0; j < n; j++) {
        Magnitude<T> size = magnitude(x[j]);
        most = size > most ? size : most;
    }
    return widened(most);
}

template <class T>
LOOP uint32_t largest(const T* x, int64_t n) { return largest_of(x, n); }

template <bool E5M2, class T>
LOOP void encode_all(const T* __restrict x, float scale, uint8_t* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = encode<E5M2>(widen(x[j]) * scale);
}

template <bool E5M2>
LOOP void encode_columns(
    const float* __restrict x, const float* __restrict scale, uint8_t* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = encode<E5M2>(x[j] * scale[j]);
}

// Blocks of a row, each with its scale at the grid's next place, which is repeated for its columns.
// Returns whether all are finite.
LOOP bool block_scales(
    const Quantize& q, const float* x, void* grid, int64_t at, float* to, int64_t n) {
    const int64_t side = q.scaling == MX ? MX_SIDE : SIDE;
    bool finite = true;
    for (int64_t j = 0; j < n; j += side) {
        const int64_t end = std::min(n, j + side);
        const uint32_t size = largest(x + j, end - j);
        const float by = multiplier(q, size, grid, at++);
        for (int64_t k = j; k < end; k++) to[k] = by;
        finite &= size < INFINITE;
    }
    return finite;
}

template <class T>
LOOP void raise_columns(const T* __restrict x, Magnitude<T>* __restrict most, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        Magnitude<T> size = magnitude(x[j]);
        most[j] = size > most[j] ? size : most[j];
    }
}

static inline int64_t blocks(int64_t count, int64_t side) { return (count + side - 1) / side; }

// A tile of x: where it lies in the tensor, and its elements, at x or in a buffer.
struct Tile {
    int64_t row, col, rows, cols;
    const void* x;
    int64_t stride;
};

template <class T>
static inline const T* at(const Tile& t, int64_t row, int64_t col) {
    return static_cast<const T*>(t.x) + row * t.stride + col;
}

template <class T>
static inline const T* at(const Quantize& q, int64_t row, int64_t col) {
    return static_cast<const T*>(q.x) + row * q.stride + col;
}

// Whether nothing needs more than a row at a time: rows are then read and written from end to end,
// as the machine fetches ahead, where tiles begin in a page of their own for every row.
static bool by_rows(const Quantize& q) { return !q.col && q.scaling != SQUARE; }

const int64_t FEW = 8;  // rows for a thread to take, by rows

static int64_t shares(const Quantize& q) {
    return by_rows(q) ? blocks(q.rows, FEW) : blocks(q.rows, BLOCK) * blocks(q.width, SPAN);
}

// Calls run(tile, share) for all tiles.
template <class T, class Run>
static void over_tiles(const Quantize& q, const Run& run) {
    const int64_t across = blocks(q.width, SPAN), down = by_rows(q) ? 1 : BLOCK;
    auto tile = [&](int64_t row, int64_t col, int64_t k) {
        int64_t rows = std::min(down, q.rows - row), cols = std::min(SPAN, q.width - col);
        run(Tile{row, col, rows, cols, at<T>(q, row, col), q.stride}, k);
    };
    parallel(q.threads, shares(q), q.rows * q.width, [&](int64_t k) {
        if (!by_rows(q)) return tile(k / across * BLOCK, k % across * SPAN, k);
        for (int64_t row = k * FEW; row < std::min(q.rows, (k + 1) * FEW); row++)
            for (int64_t col = 0; col < q.width; col += SPAN) tile(row, col, k);
    });
}

template <class T>
static uint32_t largest_in(const Tile& t) {
    uint32_t most = 0;
    for (int64_t i = 0; i < t.rows; i++) most = std::max(most, largest(at<T>(t, i, 0), t.cols));
    return most;
}

// Bytes of a tile's rows, where the row copy has them or in a buffer of the thread's.
class Bytes {
    static inline thread_local uint8_t room[BLOCK * SPAN];

   public:
    uint8_t* first;
    int64_t stride;

    Bytes(const Quantize& q, const Tile& t, bool kept)
        : first(kept ? q.row + t.row * q.width + t.col : room), stride(kept ? q.width : SPAN) {}

    void transpose(const Quantize& q, const Tile& t) const {
        uint8_t* to = q.col + t.col * q.rows + t.row;
        transpose_block(first, stride, t.rows, t.cols, to, q.rows);
    }
};

// A scale for all of the tensor, or for each square: both copies have the same bytes. most: the amax
// of what the scale is for, or of the tile.
template <class T, bool E5M2>
static void shared_tile(const Quantize& q, const Tile& t, float scale, uint32_t most) {
    Bytes bytes(q, t, q.row);
    const int64_t side = q.scaling == SQUARE ? SIDE : SPAN;
    for (int64_t j = 0; j < t.cols; j += side) {
        const int64_t n = std::min(side, t.cols - j), row = t.row / SIDE, col = (t.col + j) / SIDE;
        if (q.scaling == SQUARE) {
            most = 0;
            for (int64_t i = 0; i < t.rows; i++)
                most = std::max(most, largest(at<T>(t, i, j), n));
            scale = scale_of(q, most);
            if (q.row) static_cast<float*>(q.row_scale)[row * blocks(q.width, SIDE) + col] = scale;
            if (q.col) static_cast<float*>(q.col_scale)[col * blocks(q.rows, SIDE) + row] = scale;
        }
        for (int64_t i = 0; i < t.rows; i++) {
            uint8_t* to = bytes.first + i * bytes.stride + j;
            encode_all<E5M2>(at<T>(t, i, j), scale, to, n);
            if (most >= INFINITE) mark_infinities(at<T>(t, i, j), to, n);
        }
    }
    if (q.col) bytes.transpose(q, t);
}

template <class T, bool E5M2>
static void row_tile(const Quantize& q, const Tile& t) {
    alignas(64) float buffer[SPAN], scale[SPAN];
    const int64_t side = q.scaling == MX ? MX_SIDE : SIDE, across = blocks(q.width, side);
    for (int64_t i = 0; i < t.rows; i++) {
        const int64_t row = t.row + i;
        uint8_t* to = q.row + row * q.width + t.col;
        if (q.scaling == ROWS) {
            float given = static_cast<float*>(q.row_scale)[row];
            encode_all<E5M2>(at<T>(t, i, 0), given, to, t.cols);
            if (given == 1.0f) mark_infinities(at<T>(t, i, 0), to, t.cols);
        } else {
            const float* x = loaded(at<T>(t, i, 0), buffer, t.cols);
            const bool finite =
                block_scales(q, x, q.row_scale, row * across + t.col / side, scale, t.cols);
            encode_columns<E5M2>(x, scale, to, t.cols);
            if (!finite) mark_infinities(x, to, t.cols);
        }
    }
}

template <class T, bool E5M2>
static void col_tile(const Quantize& q, const Tile& t) {
    Bytes bytes(q, t, false);
    const int64_t side = q.scaling == MX ? MX_SIDE : BLOCK;
    alignas(64) float buffer[SPAN], made[SPAN];
    const float* scale = made;
    bool finite = true;
    if (q.scaling == ROWS) {
        scale = static_cast<float*>(q.col_scale) + t.col;
        finite = std::find(scale, scale + t.cols, 1.0f) == scale + t.cols;
    }
    for (int64_t first = 0; first < t.rows; first += side) {
        const int64_t end = std::min(t.rows, first + side), block = (t.row + first) / side;
        if (q.scaling != ROWS) {
            Magnitude<T> most[SPAN] = {};
            for (int64_t i = first; i < end; i++)
                raise_columns(at<T>(t, i, 0), most, t.cols);
            Magnitude<T> top = 0;
            for (int64_t j = 0; j < t.cols; j++) top = most[j] > top ? most[j] : top;
            finite = widened(top) < INFINITE;
            for (int64_t j = 0; j < t.cols; j++)
                made[j] = multiplier(
                    q, widened(most[j]), q.col_scale, (t.col + j) * blocks(q.rows, side) + block);
        }
        for (int64_t i = first; i < end; i++) {
            const float* x = loaded(at<T>(t, i, 0), buffer, t.cols);
            uint8_t* to = bytes.first + i * bytes.stride;
            encode_columns<E5M2>(x, scale, to, t.cols);
            if (!finite) mark_infinities(x, to, t.cols);
        }
    }
    bytes.transpose(q, t);
}

// The scale of each row and of each column, before data can be made.
template <class T>
static void row_scales(const Quantize& q) {
    parallel(q.threads, blocks(q.rows, BLOCK), q.rows * q.width, [&](int64_t k) {
        for (int64_t row = k * BLOCK; row < std::min(q.rows, (k + 1) * BLOCK); row++)
            multiplier(q, largest(at<T>(q, row, 0), q.width), q.row_scale, row);
    });
}

template <class T>
static void col_scales(const Quantize& q) {
    parallel(q.threads, blocks(q.width, SIDE), q.rows * q.width, [&](int64_t k) {
        const int64_t first = k * SIDE, n = std::min(SIDE, q.width - first);
        Magnitude<T> most[SIDE] = {};
        for (int64_t row = 0; row < q.rows; row++) raise_columns(at<T>(q, row, first), most, n);
        for (int64_t j = 0; j < n; j++) multiplier(q, widened(most[j]), q.col_scale, first + j);
    });
}

// The amax of the tensor, from those of the tiles; a NaN as PyTorch writes it.
static void note(const Quantize& q, const std::vector<uint32_t>& found) {
    uint32_t most = *std::max_element(found.begin(), found.end());
    *q.amax = bits<float>(most > INFINITE ? 0x7fc00000u : most);
}

// A tile of what an activation makes: it is computed into a buffer of the thread's, and is not stored.
template <class T>
static void activation_tile(const Activation& a, Tile& t) {
    const Params params(a.params);
    Chunk chunk = chunk_of(a, t.col, 0, t.cols);
    T* y = room<T>();
    activation_forward_rows<T>(a, kind_of(a), params.p, t.row, t.row + t.rows, chunk, y, SPAN);
    t.x = y;
    t.stride = SPAN;
}

// The scale of TENSOR where that is x's own, and with it the amax.
template <class T>
static float own_scale(const Quantize& q, uint32_t& most) {
    std::vector<uint32_t> found(shares(q));
    over_tiles<T>(q, [&](const Tile& t, int64_t k) { found[k] = std::max(found[k], largest_in<T>(t)); });
    most = *std::max_element(found.begin(), found.end());
    float scale = scale_of(q, most);
    if (q.row_scale) *static_cast<float*>(q.row_scale) = scale;
    if (q.amax) note(q, found);
    return scale;
}

// The copies of x, or of what an activation makes: its tiles are quantized out of the cache. Scales
// that all of a row or of the tensor makes must be known first, and are for an x that is there.
template <class T, bool E5M2>
static void quantize(Quantize q, const Activation* made = nullptr) {
    float scale = q.given ? *q.given : 1.0f;
    uint32_t most = 0;
    if (q.scaling == TENSOR && !q.given) {
        scale = own_scale<T>(q, most);
        q.amax = nullptr;
    }
    if (q.scaling == ROWS && q.row) row_scales<T>(q);
    if (q.scaling == ROWS && q.col) col_scales<T>(q);
    if (q.inverse) *q.inverse = 1.0f / scale;
    std::vector<uint32_t> found(q.amax ? shares(q) : 0);
    if (!q.row && !q.col && !q.amax) return;
    over_tiles<T>(q, [&](Tile t, int64_t k) {
        if (made) activation_tile<T>(*made, t);
        const uint32_t size = q.amax || q.given ? largest_in<T>(t) : most;
        if (q.amax) found[k] = std::max(found[k], size);
        if (q.scaling == TENSOR || q.scaling == SQUARE) {
            if (q.row || q.col) shared_tile<T, E5M2>(q, t, scale, size);
            return;
        }
        if (q.row) row_tile<T, E5M2>(q, t);
        if (q.col) col_tile<T, E5M2>(q, t);
    });
    if (q.amax) note(q, found);
}
