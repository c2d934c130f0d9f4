// xIELU, p * x^2 + beta * x above 0 and n * (e^min(x, eps) - 1 - x) + beta * x elsewhere, with
// p = softplus(alpha_p) and n = beta + softplus(alpha_n), and its gradients.
#pragma once
#include <cmath>

#include "parallel.h"
#include "scalar.h"

struct Xielu {
    int64_t dtype, threads, rows, width;
    const void *x, *dy;
    const float *alpha_p, *alpha_n;
    int64_t x_stride, dy_stride;
    void *y, *dx;
    float *dalpha_p, *dalpha_n;
    double beta, eps;
};

struct Factors {
    float p, n, beta, eps, edge, flat, tilt;  // from eps to 0: term edge - x, y flat + tilt * x
    explicit Factors(const Xielu& t) : Factors(t, t.beta + softplus(*t.alpha_n), std::expm1(t.eps)) {}
    Factors(const Xielu& t, double n, double edge)
        : p(float(softplus(*t.alpha_p))), n(float(n)), beta(float(t.beta)), eps(float(t.eps)),
          edge(float(edge)), flat(float(n * edge)), tilt(float(t.beta - n)) {}
    static double softplus(double a) { return a > 40.0 ? a : std::log1p(std::exp(a)); }
};

// (e^u - 1 - u) / u^2 near 0, by the power series.
SHORT float series(float u) {
    float s = 2.48015873e-5f;
    s = fmadd(s, u, 1.98412698e-4f);
    s = fmadd(s, u, 1.38888889e-3f);
    s = fmadd(s, u, 8.33333333e-3f);
    s = fmadd(s, u, 4.16666667e-2f);
    s = fmadd(s, u, 1.66666667e-1f);
    return fmadd(s, u, 0.5f);
}

// e^u - 1 - u and e^u - 1, where the differences would cancel by the series.
SHORT float beyond_linear(float u) {
    return u > -0.5f ? u * u * series(u) : exponential(u) - 1.0f - u;
}

SHORT float beyond_one(float u) {
    return u > -0.5f ? fmadd(u * u, series(u), u) : exponential(u) - 1.0f;
}

// What multiplies p above 0, and n elsewhere.
SHORT float term(float x, const Factors& f) {
    float below = x > f.eps ? f.edge - x : beyond_linear(x);
    return x > 0.0f ? x * x : below;
}

template <class T>
LOOP void xielu_row(const T* __restrict x, T* __restrict y, int64_t n, const Factors& f) {
    for (int64_t j = 0; j < n; j++) {
        float v = widen(x[j]);
        float above = v * fmadd(f.p, v, f.beta);  // no square, which may overflow before the value
        float near = fmadd(f.tilt, v, f.flat), far = fmadd(beyond_linear(v), f.n, f.beta * v);
        y[j] = narrow<T>(v > 0.0f ? above : v > f.eps ? near : far);
    }
}

template <class T>
LOOP void xielu_gradient(
    const T* __restrict dy, const T* __restrict x, T* __restrict dx, int64_t n, const Factors& f) {
    for (int64_t j = 0; j < n; j++) {
        float v = widen(x[j]), below = v < f.eps ? beyond_one(v) : -1.0f;
        float slope = v > 0.0f ? fmadd(2.0f * f.p, v, f.beta) : fmadd(f.n, below, f.beta);
        dx[j] = narrow<T>(widen(dy[j]) * slope);
    }
}

template <class T>
LOOP void xielu_sums(
    const T* __restrict dy, const T* __restrict x, int64_t n, const Factors& f,
    float& above, float& below) {
    float p = 0, m = 0;
#pragma omp simd reduction(+ : p, m)
    for (int64_t j = 0; j < n; j++) {
        float v = widen(x[j]), t = widen(dy[j]) * term(v, f);
        p += v > 0.0f ? t : 0.0f;
        m += v > 0.0f ? 0.0f : t;
    }
    above += p;
    below += m;
}

template <class T>
static void xielu_forward(const Xielu& t) {
    const Factors f(t);
    over_rows(t.threads, Shares(t.rows), t.width, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; row++)
            xielu_row(
                static_cast<const T*>(t.x) + row * t.x_stride,
                static_cast<T*>(t.y) + row * t.width, t.width, f);
    });
}

template <class T>
static void xielu_backward(const Xielu& t) {
    const Factors f(t);
    Shares shares(t.rows);
    ColumnSums above(t.dalpha_p, 1, shares), below(t.dalpha_n, 1, shares);
    over_rows(t.threads, shares, t.width, [&](int64_t begin, int64_t end, int64_t share) {
        float *p = above.of(share, begin), *n = below.of(share, begin);
        for (int64_t row = begin; row < end; row++) {
            const T* x = static_cast<const T*>(t.x) + row * t.x_stride;
            const T* dy = static_cast<const T*>(t.dy) + row * t.dy_stride;
            if (t.dx) xielu_gradient(dy, x, static_cast<T*>(t.dx) + row * t.width, t.width, f);
            if (p) xielu_sums(dy, x, t.width, f, *p, *n);
        }
    });
    above.finish(t.threads);
    below.finish(t.threads);
    if (!t.dalpha_p) return;
    *t.dalpha_p *= float(1.0 / (1.0 + std::exp(-double(*t.alpha_p))));
    *t.dalpha_n *= float(1.0 / (1.0 + std::exp(-double(*t.alpha_n))));
}
