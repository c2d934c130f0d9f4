// The passes over rows that run a kind of activation on chunks of columns.
#pragma once
#include "activations.h"

const int64_t CHUNK = 512;

template <class T>
static inline T* offset(T* pointer, int64_t by) { return pointer ? pointer + by : nullptr; }

static inline const float* loaded(const float* from, float*, int64_t) { return from; }

LOOP const float* loaded(const bf16* __restrict from, float* __restrict to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = widen(from[j]);
    return to;
}

// The same n columns in the buffer, where they are not yet: what they are read from is written to.
static inline const float* apart(const float* from, float* buffer, int64_t n) {
    return from == buffer ? from : static_cast<float*>(memcpy(buffer, from, n * sizeof(float)));
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

// first: of y's columns, where the block begins that they are in.
static inline Chunk chunk_of(const Activation& t, int64_t y, int64_t first, int64_t n) {
    int64_t block = t.gated ? y + first : y, gate = t.value < 0 ? block - t.value : block;
    return {y, gate, gate + t.value, n};
}

// Calls run(rows from, to, chunk) for a block of rows: row by row, or, where a transposed copy is
// wanted, chunk by chunk, so that what is to be copied is still in the cache. Gates come in blocks of
// `period` columns, which for halves is the width.
template <class Run>
static inline void over_chunks(
    const Activation& t, int64_t begin, int64_t end, bool copies, const Run& run) {
    const int64_t rows = copies ? end - begin : 1;
    for (int64_t row = begin; row < end; row += rows)
        for (int64_t first = 0; first < t.width; first += t.period)
            for (int64_t y = first; y < first + t.period; y += CHUNK)
                run(row, row + rows, chunk_of(t, y, first, min(CHUNK, first + t.period - y)));
}

static const struct Ones {
    float values[CHUNK];
    Ones() {
        for (float& value : values) value = 1.0f;
    }
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

// y of a chunk, row by row to where it is wanted.
template <class T>
LOOP void activation_forward_rows(
    const Activation& t, const Kind& kind, const float* p, int64_t begin, int64_t end, Chunk c,
    T* y, int64_t stride) {
    alignas(64) float buffers[3][CHUNK];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    for (int64_t row = begin; row < end; row++) {
        const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
        T* pre = offset(static_cast<T*>(t.pre), row * total);
        auto load = [&](int64_t column, float* buffer) {
            return t.bias ? biased(x + column, t.bias + column, buffer, offset(pre, column), c.n)
                          : loaded(x + column, buffer, c.n);
        };
        const float* gate = load(c.a, buffers[0]);
        const float* value = t.gated ? load(c.b, buffers[1]) : ones.values;
        T* to = y + (row - begin) * stride;
        float* into = target(to, buffers[2]);
        kind.forward(gate, value, into, c.n, p);
        stored(into, to, c.n);
    }
}

// Of the thread's: a block of rows of a chunk.
template <class T>
static T* room() {
    static thread_local Room<T> found(BLOCK * CHUNK);
    return found.data();
}

// y of a chunk in the tensor; or, where its transpose is wanted in its place, in a buffer, of which
// that is a copy.
template <class T>
static void activation_forward_chunk(
    const Activation& t, const Kind& kind, const float* p, int64_t begin, int64_t end, Chunk c) {
    const int64_t stride = t.y ? t.width : CHUNK;
    T* y = t.y ? static_cast<T*>(t.y) + begin * t.width + c.y : room<T>();
    activation_forward_rows(t, kind, p, begin, end, c, y, stride);
    if (t.yt)
        transpose_block(
            y, stride, end - begin, c.n, static_cast<T*>(t.yt) + c.y * t.rows + begin, t.rows);
}

template <class T>
static void activation_forward(const Activation& t) {
    const Params params(t.params);
    const float* p = params.p;
    over_rows(t.threads, Shares(t.rows), t.width, [&](int64_t begin, int64_t end, int64_t) {
        over_chunks(t, begin, end, t.yt, [&](int64_t from, int64_t to, const Chunk& chunk) {
            activation_forward_chunk<T>(t, kind_of(t), p, from, to, chunk);
        });
    });
}

template <class T>
LOOP void activation_backward_chunk(
    const Activation& t, const Kind& kind, const float* p, int64_t row, Chunk c, float* sums) {
    alignas(64) float buffers[6][CHUNK];
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
    const T* dy = static_cast<const T*>(t.dy) + row * t.dy_stride + c.y;
    T* y = offset(static_cast<T*>(t.y), row * t.width + c.y);
    T* dxa = offset(static_cast<T*>(t.dx), row * total + c.a);
    T* dxb = t.gated ? offset(static_cast<T*>(t.dx), row * total + c.b) : nullptr;
    const float* gradient = loaded(dy, buffers[0], c.n);
    const float* gate = loaded(x + c.a, buffers[1], c.n);
    const float* value = t.gated ? loaded(x + c.b, buffers[2], c.n) : ones.values;
    if (dxa == dy) gradient = apart(gradient, buffers[0], c.n);
    if (dxa == x + c.a) {
        gate = apart(gate, buffers[1], c.n);
        if (t.gated) value = apart(value, buffers[2], c.n);
    }
    float* da = target(dxa, buffers[3]);
    float* db = target(dxb, buffers[4]);
    float* out = target(y, buffers[5]);
    kind.backward(gradient, gate, value, da, db, out, c.n, p);
    stored(da, dxa, c.n);
    stored(db, dxb, c.n);
    stored(out, y, c.n);
    if (sums) accumulate(da, sums + c.a, c.n);
    if (sums && t.gated) accumulate(db, sums + c.b, c.n);
}

template <class T>
static void activation_backward(const Activation& t) {
    const int64_t total = t.gated ? 2 * t.width : t.width;
    const Params params(t.params);
    const float* p = params.p;
    Shares shares(t.rows);
    ColumnSums dbias(t.dbias, total, shares);
    over_rows(t.threads, shares, total, [&](int64_t begin, int64_t end, int64_t share) {
        float* sums = dbias.of(share, begin);
        over_chunks(t, begin, end, false, [&](int64_t row, int64_t, const Chunk& chunk) {
            activation_backward_chunk<T>(t, kind_of(t), p, row, chunk, sums);
        });
    });
    dbias.finish(t.threads);
}
