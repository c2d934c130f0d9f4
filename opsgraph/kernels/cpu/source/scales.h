// y = x * weight + other, by columns, and the gradients of x * weight.
#pragma once
#include "parallel.h"
#include "scalar.h"

struct Scale {
    int64_t x_dtype, other_dtype, dtype, threads, rows, width;  // dtype: of x * weight, and of dy
    const void *x, *other, *dy;
    const float* weight;
    int64_t x_stride, other_stride, dy_stride;
    void *y, *dx;
    float* dweight;
};

// T is the product's dtype, to which it is rounded; y has that to which PyTorch promotes the sum.
template <class X, class T>
LOOP void scaled(const X* __restrict x, const float* __restrict weight, T* __restrict y, int64_t n) {
    for (int64_t j = 0; j < n; j++) y[j] = narrow<T>(widen(x[j]) * weight[j]);
}

template <class X, class T, class O, class Y>
LOOP void scaled_sum(
    const X* __restrict x, const float* __restrict weight, const O* __restrict other,
    Y* __restrict y, int64_t n) {
    for (int64_t j = 0; j < n; j++)
        y[j] = narrow<Y>(widen(narrow<T>(widen(x[j]) * weight[j])) + widen(other[j]));
}

template <class X, class T, class O, class Y>
static void scale_forward(const Scale& s) {
    over_rows(s.threads, Shares(s.rows), s.width, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; row++) {
            const X* x = static_cast<const X*>(s.x) + row * s.x_stride;
            if (s.other)
                scaled_sum<X, T, O, Y>(
                    x, s.weight, static_cast<const O*>(s.other) + row * s.other_stride,
                    static_cast<Y*>(s.y) + row * s.width, s.width);
            else
                scaled(x, s.weight, static_cast<T*>(s.y) + row * s.width, s.width);
        }
    });
}

template <class X, class T>
static void scale_forward(const Scale& s) {
    if (s.other_dtype && sizeof(T) == sizeof(bf16))
        scale_forward<X, T, bf16, T>(s);
    else if (s.other_dtype)
        scale_forward<X, T, bf16, float>(s);
    else
        scale_forward<X, T, float, float>(s);
}

template <class X, class T>
LOOP void products(
    const T* __restrict dy, const X* __restrict x, float* __restrict sums, int64_t n) {
    for (int64_t j = 0; j < n; j++) sums[j] += widen(dy[j]) * widen(x[j]);
}

template <class X, class T>
static void scale_backward(const Scale& s) {
    Shares shares(s.rows);
    ColumnSums dweight(s.dweight, s.width, shares);
    over_rows(s.threads, shares, s.width, [&](int64_t begin, int64_t end, int64_t share) {
        float* sums = dweight.of(share, begin);
        for (int64_t row = begin; row < end; row++) {
            const T* dy = static_cast<const T*>(s.dy) + row * s.dy_stride;
            if (s.dx) scaled(dy, s.weight, static_cast<X*>(s.dx) + row * s.width, s.width);
            if (sums)
                products(dy, static_cast<const X*>(s.x) + row * s.x_stride, sums, s.width);
        }
    });
    dweight.finish(s.threads);
}
