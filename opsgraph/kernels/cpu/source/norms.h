// RMSNorm and LayerNorm: with h = x * rstd, or (x - mean) * rstd, and m = dy * gamma,
//     y = h * gamma + beta,   dx = rstd * (m - mean(m) - h * mean(m * h)) + dother
// where RMSNorm has neither mean(m) nor beta. Each row is read from memory once, then from cache.
#pragma once
#include "parallel.h"
#include "scalar.h"

struct Norm {
    int64_t dtype, center, zero_centered, threads, rows, width;
    const void *x, *other, *dy;
    int64_t x_stride, other_stride, dy_stride;
    const void *weight, *bias;
    int64_t weight_dtype, bias_dtype;
    void *y, *total, *dx;
    float *mean, *rstd, *dweight, *dbias;
    double eps;
};

// A parameter in fp32: itself, or widened, with 1 added, or the neutral value where there is none.
class Parameter {
    Room<float> made;

   public:
    const float* values;

    Parameter(const void* given, int64_t dtype, int64_t width, float added, float neutral)
        : made(given && dtype == 0 && added == 0.0f ? 0 : width) {
        const auto* fp32 = static_cast<const float*>(given);
        const auto* halves = static_cast<const bf16*>(given);
        float* to = made.data();
        for (int64_t j = 0; to && j < width; j++)
            to[j] = !given ? neutral : added + (dtype == 0 ? fp32[j] : widen(halves[j]));
        values = to ? to : fp32;
    }
};

template <class T, bool Center>
LOOP void normalize(
    const T* __restrict x, const float* __restrict gamma, const float* __restrict beta,
    float mean, float rstd, T* __restrict y, int64_t width) {
    if constexpr (Center)
        for (int64_t j = 0; j < width; j++)
            y[j] = narrow<T>((widen(x[j]) - mean) * rstd * gamma[j] + beta[j]);
    else
        for (int64_t j = 0; j < width; j++) y[j] = narrow<T>(widen(x[j]) * rstd * gamma[j]);
}

template <class T>
LOOP void add(const T* __restrict a, const T* __restrict b, T* __restrict sum, int64_t width) {
    for (int64_t j = 0; j < width; j++) sum[j] = narrow<T>(widen(a[j]) + widen(b[j]));
}

// The mean (0 without Center), and the mean square of what is left: a first estimate of the mean
// is corrected by the mean of the centred values, which is exact where |mean| >> std.
template <class T, bool Center>
LOOP float mean_square(const T* __restrict x, int64_t width, float& mean) {
    float sum = 0, square = 0, rest = 0;
    if constexpr (Center) {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) sum += widen(x[j]);
        mean = sum / float(width);
    }
#pragma omp simd reduction(+ : square, rest)
    for (int64_t j = 0; j < width; j++) {
        float centred = Center ? widen(x[j]) - mean : widen(x[j]);
        square += centred * centred;
        rest += centred;
    }
    if constexpr (!Center) return square / float(width);
    rest /= float(width);
    mean += rest;
    square = square / float(width) - rest * rest;
    return square > 0.0f ? square : 0.0f;
}

template <class T, bool Center>
static void norm_forward(const Norm& n) {
    Parameter gamma(n.weight, n.weight_dtype, n.width, n.zero_centered ? 1 : 0, 1);
    Parameter beta(n.bias, n.bias_dtype, Center ? n.width : 0, 0, 0);
    Shares shares(n.rows);
    over_rows(n.threads, shares, n.width, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; row++) {
            const T* x = static_cast<const T*>(n.x) + row * n.x_stride;
            if (n.other) {
                T* total = static_cast<T*>(n.total) + row * n.width;
                add(x, static_cast<const T*>(n.other) + row * n.other_stride, total, n.width);
                x = total;
            }
            float mean = 0, square = mean_square<T, Center>(x, n.width, mean);
            float rstd = float(1.0 / __builtin_sqrt(double(square) + n.eps));
            if (n.mean) n.mean[row] = mean;
            if (n.rstd) n.rstd[row] = rstd;
            T* y = static_cast<T*>(n.y) + row * n.width;
            normalize<T, Center>(x, gamma.values, beta.values, mean, rstd, y, n.width);
        }
    });
}

// mean(m) and mean(m * h).
template <class T, bool Center>
LOOP void dots(
    const T* __restrict dy, const T* __restrict x, const float* __restrict gamma, float mean,
    float rstd, int64_t width, float& first, float& second) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t j = 0; j < width; j++) {
        float m = widen(dy[j]) * gamma[j];
        if (Center) sum += m;
        dot += m * ((widen(x[j]) - mean) * rstd);
    }
    first = sum / float(width);
    second = dot / float(width);
}

// dx may be dy.
template <class T, bool Add>
LOOP void input_gradient(
    const T* dy, const T* __restrict x, const float* __restrict gamma, const T* __restrict other,
    float mean, float rstd, float first, float second, T* dx, int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float h = (widen(x[j]) - mean) * rstd;
        float d = rstd * (widen(dy[j]) * gamma[j] - first - h * second);
        dx[j] = narrow<T>(Add ? d + widen(other[j]) : d);
    }
}

template <class T>
LOOP void add_weight_gradient(
    const T* __restrict dy, const T* __restrict x, float mean, float rstd,
    float* __restrict sums, int64_t width) {
    for (int64_t j = 0; j < width; j++)
        sums[j] += widen(dy[j]) * ((widen(x[j]) - mean) * rstd);
}

template <class T>
LOOP void add_row(const T* __restrict dy, float* __restrict sums, int64_t width) {
    for (int64_t j = 0; j < width; j++) sums[j] += widen(dy[j]);
}

template <class T, bool Center>
LOOP void norm_backward_row(
    const Norm& n, int64_t row, const float* gamma, const float* beta, float* dweight,
    float* dbias) {
    const int64_t width = n.width;
    const T* dy = static_cast<const T*>(n.dy) + row * n.dy_stride;
    const T* x = static_cast<const T*>(n.x) + row * n.x_stride;
    const float mean = Center ? n.mean[row] : 0, rstd = n.rstd[row];
    if (dweight) add_weight_gradient(dy, x, mean, rstd, dweight, width);
    if (dbias) add_row(dy, dbias, width);
    if (n.dx) {
        float first, second;
        dots<T, Center>(dy, x, gamma, mean, rstd, width, first, second);
        T* dx = static_cast<T*>(n.dx) + row * width;
        const T* other = static_cast<const T*>(n.other) + row * n.other_stride;
        auto* function = n.other ? input_gradient<T, true> : input_gradient<T, false>;
        function(dy, x, gamma, other, mean, rstd, first, second, dx, width);
    }
    if (n.y)
        normalize<T, Center>(
            x, gamma, beta, mean, rstd, static_cast<T*>(n.y) + row * width, width);
}

template <class T, bool Center>
static void norm_backward(const Norm& n) {
    Parameter gamma(n.weight, n.weight_dtype, n.width, n.zero_centered ? 1 : 0, 1);
    Parameter beta(n.bias, n.bias_dtype, Center && n.y ? n.width : 0, 0, 0);
    Shares shares(n.rows);
    ColumnSums dweight(n.dweight, n.width, shares), dbias(n.dbias, n.width, shares);
    over_rows(n.threads, shares, n.width, [&](int64_t begin, int64_t end, int64_t share) {
        float *weight = dweight.of(share, begin), *bias = dbias.of(share, begin);
        for (int64_t row = begin; row < end; row++)
            norm_backward_row<T, Center>(n, row, gamma.values, beta.values, weight, bias);
    });
    dweight.finish(n.threads);
    dbias.finish(n.threads);
}
