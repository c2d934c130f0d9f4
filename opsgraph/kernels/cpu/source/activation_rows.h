// The passes over rows that run a kind of activation on chunks of columns.
#pragma once
#include <vector>

#include "activations.h"

const int64_t CHUNK = 512;

static inline const float* loaded(const float* from, float*, int64_t) { return from; }

LOOP const float* loaded(const bf16* __restrict from, float* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = widen(from[j]);
    return to;
}

// Where to write n columns: the tensor itself, or a buffer that `stored` then narrows into it.
static inline float* target(float* tensor, float* buffer) { return tensor ? tensor : buffer; }
static inline float* target(bf16*, float* buffer) { return buffer; }

static inline void stored(const float*, float*, int64_t) {}

LOOP void stored(const float* __restrict from, bf16* __restrict to, int64_t n) {
    if (to)
        for (int64_t j = 0; j < n; j++) to[j] = narrow<bf16>(from[j]);
}

LOOP void accumulate(const float* __restrict from, float* __restrict sums, int64_t n) {
    for (int64_t j = 0; j < n; j++) sums[j] += from[j];
}

// n columns of y from y on, and where their gates (a) and values (b) are in x.
struct Chunk {
    int64_t y, a, b, n;
};

// Calls run(rows from, to, chunk) for a block of rows: row by row, or, where a transposed copy is
// wanted, chunk by chunk, so that what is to be copied is still in the cache. Gate and value
// alternate in blocks of `period` columns, which for halves is the width.
template <class Run>
static inline void over_chunks(
    const Activation& t, int64_t begin, int64_t end, bool copies, const Run& run) {
    const int64_t rows = copies ? end - begin : 1;
    for (int64_t row = begin; row < end; row += rows)
        for (int64_t first = 0; first < t.width; first += t.period)
            for (int64_t y = first; y < first + t.period; y += CHUNK) {
                int64_t a = t.gated ? y + first : y;
                run(row, row + rows, Chunk{y, a, a + t.period, std::min(CHUNK, first + t.period - y)});
            }
}

static const struct Ones {
    float values[CHUNK];
    Ones() { std::fill(values, values + CHUNK, 1.0f); }
} ones;

// x + bias, rounded as the tensor is; into pre as well, if that is wanted.
template <class T>
LOOP const float* biased(
    const T* __restrict x, const float* __restrict bias, float* __restrict buffer, T* pre,
    int64_t n) {
    for (int64_t j = 0; j < n; j++) buffer[j] = widen(narrow<T>(widen(x[j]) + bias[j]));
    if (pre)
        for (int64_t j = 0; j < n; j++) pre[j] = narrow<T>(buffer[j]);
    return buffer;
}

// A result's rows of one chunk: in the tensor or, where only the transposed copy is wanted, in a
// buffer of the thread's; and that copy's first element.
template <class T>
struct Part {
    T* at;
    int64_t stride;
    T* copy;
    const Activation& t;

    Part(const Activation& t, void* tensor, void* copied, int64_t width, int64_t row, int64_t column,
         T* buffer)
        : at(offset(static_cast<T*>(tensor), row * width + column)), stride(width),
          copy(offset(static_cast<T*>(copied), column * t.rows + row)), t(t) {
        if (!at && copy) at = buffer, stride = CHUNK;
    }

    T* row(int64_t k) const { return offset(at, k * stride); }

    void transpose(int64_t rows, int64_t n) const {
        if (copy) transpose_block(at, stride, rows, n, copy, t.rows);
    }
};

template <class T>
LOOP void activation_forward_chunk(
    const Activation& t, const Kind& kind, const float* p, int64_t begin, int64_t end, Chunk c) {
    alignas(64) float buffers[3][CHUNK];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const Part<T> y(t, t.y, t.yt, t.width, begin, c.y, nullptr);
    for (int64_t row = begin; row < end; row++) {
        const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
        T* pre = offset(static_cast<T*>(t.pre), row * total);
        auto load = [&](int64_t column, float* buffer) {
            return t.bias ? biased(x + column, t.bias + column, buffer, offset(pre, column), c.n)
                          : loaded(x + column, buffer, c.n);
        };
        const float* gate = load(c.a, buffers[0]);
        const float* value = t.gated ? load(c.b, buffers[1]) : ones.values;
        float* into = target(y.row(row - begin), buffers[2]);
        kind.forward(gate, value, into, c.n, p);
        stored(into, y.row(row - begin), c.n);
    }
    y.transpose(end - begin, c.n);
}

template <class T>
static void activation_forward(const Activation& t) {
    const float p[3] = {float(t.params[0]), float(t.params[1]), float(t.params[2])};
    over_rows(t.threads, Shares(t.rows), t.width, [&](int64_t begin, int64_t end, int64_t) {
        over_chunks(t, begin, end, t.yt, [&](int64_t from, int64_t to, const Chunk& chunk) {
            activation_forward_chunk<T>(t, kinds[t.kind], p, from, to, chunk);
        });
    });
}

template <class T>
LOOP void activation_backward_chunk(
    const Activation& t, const Kind& kind, const float* p, int64_t begin, int64_t end, Chunk c,
    float* sums) {
    alignas(64) float buffers[6][CHUNK];
    static thread_local std::vector<T> copied(3 * BLOCK * CHUNK);
    T* room = copied.data();
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const Part<T> y(t, t.y, t.yt, t.width, begin, c.y, room);
    const Part<T> dxa(t, t.dx, t.dxt, total, begin, c.a, room + BLOCK * CHUNK);
    const Part<T> dxb(
        t, t.gated ? t.dx : nullptr, t.gated ? t.dxt : nullptr, total, begin, c.b,
        room + 2 * BLOCK * CHUNK);
    for (int64_t row = begin; row < end; row++) {
        const int64_t k = row - begin;
        const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
        const T* dy = static_cast<const T*>(t.dy) + row * t.dy_stride;
        const float* gradient = loaded(dy + c.y, buffers[0], c.n);
        const float* gate = loaded(x + c.a, buffers[1], c.n);
        const float* value = t.gated ? loaded(x + c.b, buffers[2], c.n) : ones.values;
        float* da = target(dxa.row(k), buffers[3]);
        float* db = target(dxb.row(k), buffers[4]);
        float* out = target(y.row(k), buffers[5]);
        kind.backward(gradient, gate, value, da, db, out, c.n, p);
        stored(da, dxa.row(k), c.n);
        stored(db, dxb.row(k), c.n);
        stored(out, y.row(k), c.n);
        if (sums) accumulate(da, sums + c.a, c.n);
        if (sums && t.gated) accumulate(db, sums + c.b, c.n);
    }
    y.transpose(end - begin, c.n);
    dxa.transpose(end - begin, c.n);
    dxb.transpose(end - begin, c.n);
}

template <class T>
static void activation_backward(const Activation& t) {
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const float p[3] = {float(t.params[0]), float(t.params[1]), float(t.params[2])};
    Shares shares(t.rows);
    ColumnSums dbias(t.dbias, total, shares);
    over_rows(t.threads, shares, total, [&](int64_t begin, int64_t end, int64_t share) {
        float* sums = dbias.of(share, begin);
        bool copies = t.dxt || t.yt;
        over_chunks(t, begin, end, copies, [&](int64_t from, int64_t to, const Chunk& chunk) {
            activation_backward_chunk<T>(t, kinds[t.kind], p, from, to, chunk, sums);
        });
    });
    dbias.finish(t.threads);
}
