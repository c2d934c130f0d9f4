// The passes over rows that run a kind of activation on chunks of columns.
#pragma once
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

template <class T>
static inline T* offset(T* pointer, int64_t by) { return pointer ? pointer + by : nullptr; }

LOOP void accumulate(const float* __restrict from, float* __restrict sums, int64_t n) {
    for (int64_t j = 0; j < n; j++) sums[j] += from[j];
}

// Calls run(column of y, column of a, column of b, how many) for the chunks of a row; gate and
// value alternate in blocks of `period` columns, which for halves is the width.
template <class Run>
static inline void over_chunks(const Activation& t, const Run& run) {
    for (int64_t first = 0; first < t.width; first += t.period)
        for (int64_t j = first; j < first + t.period; j += CHUNK) {
            int64_t a = t.gated ? j + first : j;
            run(j, a, a + t.period, std::min(CHUNK, first + t.period - j));
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

template <class T>
static void activation_forward(const Activation& t) {
    const Kind kind = kinds[t.kind];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const float p[3] = {float(t.params[0]), float(t.params[1]), float(t.params[2])};
    const float* bias = t.bias;
    over_rows(t.threads, Shares(t.rows), total, [&](int64_t begin, int64_t end, int64_t) {
        alignas(64) float buffers[3][CHUNK];
        for (int64_t row = begin; row < end; row++) {
            const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
            T* y = static_cast<T*>(t.y) + row * t.width;
            T* pre = offset(static_cast<T*>(t.pre), row * total);
            auto load = [&](int64_t column, float* buffer, int64_t n) {
                return bias ? biased(x + column, bias + column, buffer, offset(pre, column), n)
                            : loaded(x + column, buffer, n);
            };
            over_chunks(t, [&](int64_t j, int64_t a, int64_t b, int64_t n) {
                const float* gate = load(a, buffers[0], n);
                const float* value = t.gated ? load(b, buffers[1], n) : ones.values;
                float* into = target(y + j, buffers[2]);
                kind.forward(gate, value, into, n, p);
                stored(into, y + j, n);
            });
        }
        transposed_copy<T>(t.y, t.width, begin, end, t.yt, t.rows);
    });
}

template <class T>
LOOP void activation_backward_row(
    const Activation& t, const Kind& kind, const float* p, int64_t row, float* sums) {
    alignas(64) float buffers[6][CHUNK];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
    const T* dy = static_cast<const T*>(t.dy) + row * t.dy_stride;
    T* y = offset(static_cast<T*>(t.y), row * t.width);
    T* dx = offset(static_cast<T*>(t.dx), row * total);
    over_chunks(t, [&](int64_t j, int64_t a, int64_t b, int64_t n) {
        const float* gradient = loaded(dy + j, buffers[0], n);
        const float* gate = loaded(x + a, buffers[1], n);
        const float* value = t.gated ? loaded(x + b, buffers[2], n) : ones.values;
        float* da = target(offset(dx, a), buffers[3]);
        float* db = t.gated ? target(offset(dx, b), buffers[4]) : buffers[4];
        float* out = target(offset(y, j), buffers[5]);
        kind.backward(gradient, gate, value, da, db, out, n, p);
        stored(da, offset(dx, a), n);
        if (t.gated) stored(db, offset(dx, b), n);
        stored(out, offset(y, j), n);
        if (sums) accumulate(da, sums + a, n);
        if (sums && t.gated) accumulate(db, sums + b, n);
    });
}

template <class T>
static void activation_backward(const Activation& t) {
    const Kind kind = kinds[t.kind];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const float p[3] = {float(t.params[0]), float(t.params[1]), float(t.params[2])};
    Shares shares(t.rows);
    ColumnSums dbias(t.dbias, total, shares);
    over_rows(t.threads, shares, total, [&](int64_t begin, int64_t end, int64_t share) {
        float* sums = dbias.of(share, begin);
        for (int64_t row = begin; row < end; row++)
            activation_backward_row<T>(t, kind, p, row, sums);
        transposed_copy<T>(t.dx, total, begin, end, t.dxt, t.rows);
        transposed_copy<T>(t.y, t.width, begin, end, t.yt, t.rows);
    });
    dbias.finish(t.threads);
}
