// RMSNorm and LayerNorm: with h = x * rstd, or (x - mean) * rstd, and m = dy * gamma,
//     y = h * gamma + beta,   dx = rstd * (m - mean(m) - h * mean(m * h)) + dother
// where RMSNorm has neither mean(m) nor beta. Each row is read from memory once, then from cache.
#pragma once
#include "parallel.h"
#include "row_sums.h"
#include "scalar.h"

struct Norm {
    int64_t dtype, y_dtype;  // of what is normalized and of y
    int64_t x_dtype, other_dtype;  // of the two that are added up, where there are two
    int64_t rounds_normalized, rounds_product;  // h, and h * gamma, to bf16
    int64_t center, zero_centered, threads, rows, width;  // zero_centered: 2 rounds 1 + weight
    const void *x, *other, *dy;
    int64_t x_stride, other_stride, dy_stride;
    const void *weight, *bias;
    int64_t weight_dtype, bias_dtype;
    void *y, *total, *dx;
    float *mean, *rstd, *dweight, *dbias;
    double eps;
};

static inline float rounded(float x) { return widen(narrow<bf16>(x)); }

// A parameter in fp32: itself, or widened, with 1 added, or the neutral value where there is none.
class Parameter {
    Room<float> made;

   public:
    const float* values;

    Parameter(
        const void* given, int64_t dtype, int64_t width, float added, float neutral,
        bool rounds = false)
        : made(given && dtype == 0 && added == 0.0f ? 0 : width) {
        const auto* fp32 = static_cast<const float*>(given);
        const auto* halves = static_cast<const bf16*>(given);
        float* to = made.data();
        for (int64_t j = 0; to && j < width; j++)
            to[j] = !given ? neutral : added + (dtype == 0 ? fp32[j] : widen(halves[j]));
        if (rounds && dtype)
            for (int64_t j = 0; to && j < width; j++) to[j] = rounded(to[j]);
        values = to ? to : fp32;
    }
};

template <class T, class Y, bool Center>
LOOP void normalize(
    const T* __restrict x, const float* __restrict gamma, const float* __restrict beta,
    float mean, float rstd, Y* __restrict y, int64_t width) {
    if constexpr (Center)
        for (int64_t j = 0; j < width; j++)
            y[j] = narrow<Y>(fmadd((widen(x[j]) - mean) * rstd, gamma[j], beta[j]));
    else
        for (int64_t j = 0; j < width; j++) y[j] = narrow<Y>(widen(x[j]) * rstd * gamma[j]);
}

// With h, and perhaps its product, rounded to bf16 before what comes next.
template <class T, class Y, bool Center, bool Product>
LOOP void normalize_rounded(
    const T* __restrict x, const float* __restrict gamma, const float* __restrict beta,
    float mean, float rstd, Y* __restrict y, int64_t width) {
    for (int64_t j = 0; j < width; j++) {
        float h = rounded((Center ? widen(x[j]) - mean : widen(x[j])) * rstd) * gamma[j];
        if (Product) h = rounded(h);
        y[j] = narrow<Y>(Center ? h + beta[j] : h);
    }
}

template <class T, class Y, bool Center>
static inline void write_row(
    const Norm& n, const T* x, const float* gamma, const float* beta, float mean, float rstd,
    Y* y) {
    auto* function = !n.rounds_normalized ? normalize<T, Y, Center>
                     : n.rounds_product   ? normalize_rounded<T, Y, Center, true>
                                          : normalize_rounded<T, Y, Center, false>;
    function(x, gamma, beta, mean, rstd, y, n.width);
}

template <class A, class B, class T>
LOOP void add(const A* __restrict a, const B* __restrict b, T* __restrict sum, int64_t width) {
    for (int64_t j = 0; j < width; j++) sum[j] = narrow<T>(widen(a[j]) + widen(b[j]));
}

template <class A, class B, class T>
static void add_row(const Norm& n, int64_t row, T* total) {
    add(static_cast<const A*>(n.x) + row * n.x_stride,
        static_cast<const B*>(n.other) + row * n.other_stride, total, n.width);
}

// x + other of a row: either of T or, where that is fp32, of bf16.
static void total_of(const Norm& n, int64_t row, bf16* total) {
    add_row<bf16, bf16>(n, row, total);
}

static void total_of(const Norm& n, int64_t row, float* total) {
    if (n.x_dtype)
        add_row<bf16, float>(n, row, total);
    else if (n.other_dtype)
        add_row<float, bf16>(n, row, total);
    else
        add_row<float, float>(n, row, total);
}

// What sums over the columns of a narrow row of T are added up in: bf16 has no use for more digits.
template <class T>
struct Sums {
    using In = double;
};

template <>
struct Sums<bf16> {
    using In = float;
};

template <class T>
using Sum = typename Sums<T>::In;

constexpr double LARGEST = 3.4028234663852886e38;
// Columns from which on `row_sums` costs no more than sums in fp64: of one sum, and of two.
constexpr int64_t WIDE = 1024, WIDE_PAIR = 4096;

template <class T>
LOOP float mean_of(const T* __restrict x, int64_t width) {
    if constexpr (sizeof(T) == sizeof(float))
        if (width >= WIDE_PAIR) {
            double sum;
            row_sums<1>(width, &sum, [=](auto at, auto* to) { to[0] += at(x); });
            return float(sum / double(width));
        }
    Sum<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; j++) sum += widen(x[j]);
    return float(sum / Sum<T>(width));
}

struct Moments {  // the mean of centred values (0 without Center), and of their squares
    double first, second;
};

template <class T, bool Center>
LOOP Moments moments(const T* __restrict x, int64_t width, float center) {
    const double count = double(width);
    if constexpr (sizeof(T) == sizeof(float))
        if (width >= (Center ? WIDE_PAIR : WIDE)) {
            double sums[2] = {};
            row_sums<Center ? 2 : 1>(width, sums, [=](auto at, auto* to) {
                auto centred = at(x);
                if (Center) centred -= center, to[1] += centred;
                to[0] += centred * centred;
            });
            return {sums[1] / count, sums[0] / count};
        }
    Sum<T> square = 0, rest = 0;
#pragma omp simd reduction(+ : square, rest)
    for (int64_t j = 0; j < width; j++) {
        const Sum<T> centred = Center ? widen(x[j]) - center : widen(x[j]);
        square += centred * centred;
        if (Center) rest += centred;
    }
    return {rest / count, square / count};
}

// In fp64 no square overflows, and the mean of equal values is that value.
template <class T, bool Center>
LOOP double mean_square_in_fp64(const T* __restrict x, int64_t width, float& mean) {
    double center = 0, square = 0;
    if constexpr (Center) {
#pragma omp simd reduction(+ : center)
        for (int64_t j = 0; j < width; j++) center += double(widen(x[j]));
        center /= double(width);
        mean = float(center);
    }
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < width; j++) {
        double centred = double(widen(x[j])) - center;
        square += centred * centred;
    }
    return square / double(width);
}

// The mean (0 without Center), and the mean square of what is left: a first estimate of the mean
// is corrected by the mean of the centred values, which is exact where |mean| >> std. A row whose
// squares overflow, or consist of that correction, is read again in fp64.
template <class T, bool Center>
static inline double mean_square(const T* x, int64_t width, float& mean) {
    if (Center) mean = mean_of(x, width);
    const Moments found = moments<T, Center>(x, width, mean);
    const double shift = found.first * found.first;
    if (!(found.second <= LARGEST && found.second >= 16 * shift))
        return mean_square_in_fp64<T, Center>(x, width, mean);
    mean = float(mean + found.first);
    return found.second - shift;
}

template <class T, class Y, bool Center>
static void norm_forward(const Norm& n) {
    Parameter gamma(
        n.weight, n.weight_dtype, n.width, n.zero_centered ? 1 : 0, 1, n.zero_centered == 2);
    Parameter beta(n.bias, n.bias_dtype, Center ? n.width : 0, 0, 0);
    Shares shares(n.rows);
    over_rows(n.threads, shares, n.width, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t row = begin; row < end; row++) {
            const T* x = static_cast<const T*>(n.x) + row * n.x_stride;
            if (n.other) {
                T* total = static_cast<T*>(n.total) + row * n.width;
                total_of(n, row, total);
                x = total;
            }
            float mean = 0;
            double square = mean_square<T, Center>(x, n.width, mean);
            float rstd = float(1.0 / __builtin_sqrt(square + n.eps));
            if (n.mean) n.mean[row] = mean;
            if (n.rstd) n.rstd[row] = rstd;
            Y* y = static_cast<Y*>(n.y) + row * n.width;
            write_row<T, Y, Center>(n, x, gamma.values, beta.values, mean, rstd, y);
        }
    });
}

// mean(m) and mean(m * h).
template <class T, class Y, bool Center>
LOOP void dots(
    const Y* __restrict dy, const T* __restrict x, const float* __restrict gamma, float mean,
    float rstd, int64_t width, float& first, float& second) {
    if constexpr (sizeof(T) == sizeof(float) && sizeof(Y) == sizeof(float))
        if (width >= WIDE_PAIR) {
            double sums[2];
            row_sums<2>(width, sums, [=](auto at, auto* to) {
                auto m = at(dy) * at(gamma);
                if (Center) to[0] += m;
                to[1] += m * ((at(x) - mean) * rstd);
            });
            first = float(sums[0] / double(width));
            second = float(sums[1] / double(width));
            return;
        }
    Sum<T> sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t j = 0; j < width; j++) {
        float m = widen(dy[j]) * gamma[j];
        if (Center) sum += m;
        dot += Sum<T>(m) * ((widen(x[j]) - mean) * rstd);
    }
    first = float(sum / Sum<T>(width));
    second = float(dot / Sum<T>(width));
}

// dx may be dy.
template <class T, class Y, bool Add>
LOOP void input_gradient(
    const Y* dy, const T* __restrict x, const float* __restrict gamma, const T* __restrict other,
    float mean, float rstd, float first, float second, T* dx, int64_t width) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float h = (widen(x[j]) - mean) * rstd;
        float d = rstd * fmadd(-h, second, widen(dy[j]) * gamma[j] - first);
        dx[j] = narrow<T>(Add ? d + widen(other[j]) : d);
    }
}

template <class T, class Y, bool Rounds>
LOOP void add_weight_gradient(
    const Y* __restrict dy, const T* __restrict x, float mean, float rstd,
    float* __restrict sums, int64_t width) {
    for (int64_t j = 0; j < width; j++) {
        float h = (widen(x[j]) - mean) * rstd;
        sums[j] += widen(dy[j]) * (Rounds ? rounded(h) : h);
    }
}

template <class T>
LOOP void add_columns(const T* __restrict dy, float* __restrict sums, int64_t width) {
    for (int64_t j = 0; j < width; j++) sums[j] += widen(dy[j]);
}

template <class T, class Y, bool Center>
LOOP void norm_backward_row(
    const Norm& n, int64_t row, const float* gamma, const float* beta, float* dweight,
    float* dbias) {
    const int64_t width = n.width;
    const Y* dy = static_cast<const Y*>(n.dy) + row * n.dy_stride;
    const T* x = static_cast<const T*>(n.x) + row * n.x_stride;
    const float mean = Center ? n.mean[row] : 0, rstd = n.rstd[row];
    auto* add_weight =
        n.rounds_normalized ? add_weight_gradient<T, Y, true> : add_weight_gradient<T, Y, false>;
    if (dweight) add_weight(dy, x, mean, rstd, dweight, width);
    if (dbias) add_columns(dy, dbias, width);
    if (n.dx) {
        float first, second;
        dots<T, Y, Center>(dy, x, gamma, mean, rstd, width, first, second);
        T* dx = static_cast<T*>(n.dx) + row * width;
        const T* other = static_cast<const T*>(n.other) + row * n.other_stride;
        auto* function = n.other ? input_gradient<T, Y, true> : input_gradient<T, Y, false>;
        function(dy, x, gamma, other, mean, rstd, first, second, dx, width);
    }
    if (n.y)
        write_row<T, Y, Center>(
            n, x, gamma, beta, mean, rstd, static_cast<Y*>(n.y) + row * width);
}

template <class T, class Y, bool Center>
static void norm_backward(const Norm& n) {
    Parameter gamma(
        n.weight, n.weight_dtype, n.width, n.zero_centered ? 1 : 0, 1, n.zero_centered == 2);
    Parameter beta(n.bias, n.bias_dtype, Center && n.y ? n.width : 0, 0, 0);
    Shares shares(n.rows);
    ColumnSums dweight(n.dweight, n.width, shares), dbias(n.dbias, n.width, shares);
    over_rows(n.threads, shares, n.width, [&](int64_t begin, int64_t end, int64_t share) {
        float *weight = dweight.of(share, begin), *bias = dbias.of(share, begin);
        for (int64_t row = begin; row < end; row++)
            norm_backward_row<T, Y, Center>(n, row, gamma.values, beta.values, weight, bias);
    });
    dweight.finish(n.threads);
    dbias.finish(n.threads);
}
