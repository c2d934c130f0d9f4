// Activations, plain y = f(x) and gated y = f(a) * g(b). All arithmetic is on fp32 columns, a chunk
// at a time: fp32 tensors are read and written where they are, bf16 through buffers in the cache.
#pragma once
#include "parallel.h"
#include "scalar.h"
#include "transpose.h"

struct Activation {
    int64_t dtype, kind, gated, threads, rows, width;  // width: of y
    int64_t period, value;  // columns of a gate's block, and from a gate to its value
    const void *x, *dy;
    const float* bias;
    int64_t x_stride, dy_stride;
    void *y, *yt, *pre, *dx;
    float* dbias;
    double params[3];
};

struct Slope {
    float value, slope;
};

struct Swish {  // x * sigmoid(alpha * x)
    static inline Slope at(float x, const float* p) {
        float s = sigmoid(p[0] * x), value = x * s;
        return {value, s + p[0] * value * (1.0f - s)};
    }
};

struct Sigmoid {
    static inline Slope at(float x, const float*) {
        float s = sigmoid(x);
        return {s, s * (1.0f - s)};
    }
};

struct Gelu {  // 0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
    static inline Slope at(float x, const float*) {
        float square = x * x, s = sigmoid(1.59576912f * x * (1.0f + 0.044715f * square));
        float value = x * s;
        return {value, s + value * (1.0f - s) * (1.59576912f * (1.0f + 0.134145f * square))};
    }
};

// x * Phi(x), Phi the normal distribution function by Abramowitz and Stegun, 7.1.26: within 1.5e-7.
struct GeluErf {
    static inline Slope at(float x, const float*) {
        float size = (x < 0.0f ? -x : x) * 0.707106781f;
        float t = 1.0f / fmadd(0.3275911f, size, 1.0f);
        float p = fmadd(t, 1.061405429f, -1.453152027f);
        p = fmadd(p, t, 1.421413741f);
        p = fmadd(p, t, -0.284496736f);
        p = fmadd(p, t, 0.254829592f);
        float e = exponential(-size * size);
        float tail = 0.5f * p * t * e;
        float phi = x < 0.0f ? tail : 1.0f - tail;
        return {x * phi, phi + x * 0.398942280f * e};
    }
};

struct Relu {
    static inline Slope at(float x, const float*) {
        return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};  // a NaN stays one
    }
};

struct SquaredRelu {
    static inline Slope at(float x, const float*) {
        float positive = x <= 0.0f ? 0.0f : x;
        return {positive * positive, 2.0f * positive};
    }
};

struct Clamped {  // swish of min(a, limit); p: limit, alpha, offset
    static inline Slope at(float a, const float* p) {
        Slope swish = Swish::at(a > p[0] ? p[0] : a, p + 1);
        return {swish.value, a > p[0] ? 0.0f : swish.slope};
    }
};

struct Clip {
    static inline Slope at(float b, const float* p) {
        float inside = b > p[0] ? p[0] : b < -p[0] ? -p[0] : b;
        return {inside + p[2], inside == b || b != b ? 1.0f : 0.0f};
    }
};

struct Situ {  // beta * tanh(a / beta) * sigmoid(a)
    static inline Slope at(float a, const float* p) {
        float s = sigmoid(a), t = hyperbolic_tangent(a / p[0]);
        return {p[0] * t * s, s * (1.0f - t * t) + p[0] * t * s * (1.0f - s)};
    }
};

struct SoftClip {  // beta * tanh(b / beta)
    static inline Slope at(float b, const float* p) {
        float t = hyperbolic_tangent(b / p[1]);
        return {p[1] * t, 1.0f - t * t};
    }
};

struct Line {
    static inline Slope at(float b, const float*) { return {b, 1.0f}; }
};

// n columns of one row. A plain activation is a gated one whose b are ones: that changes no bit.
template <class F, class G>
static void forward_columns(
    const float* __restrict a, const float* __restrict b, float* __restrict y, int64_t n,
    const float* p) {
    for (int64_t j = 0; j < n; j++) y[j] = F::at(a[j], p).value * G::at(b[j], p).value;
}

template <class F, class G>
static void backward_columns(
    const float* __restrict dy, const float* __restrict a, const float* __restrict b,
    float* __restrict da, float* __restrict db, float* __restrict y, int64_t n, const float* p) {
    for (int64_t j = 0; j < n; j++) {
        Slope f = F::at(a[j], p), g = G::at(b[j], p);
        y[j] = f.value * g.value;
        da[j] = dy[j] * g.value * f.slope;
        db[j] = dy[j] * f.value * g.slope;
    }
}

struct Kind {
    void (*forward)(const float*, const float*, float*, int64_t, const float*);
    void (*backward)(
        const float*, const float*, const float*, float*, float*, float*, int64_t, const float*);
};

template <class F, class G = Line>
constexpr Kind kind() {
    return {forward_columns<F, G>, backward_columns<F, G>};
}

// In the order of FUNCTIONS in activations.py.
static const Kind kinds[] = {
    kind<Swish>(), kind<Gelu>(), kind<GeluErf>(), kind<Relu>(), kind<SquaredRelu>(),
    kind<Sigmoid>(), kind<Clamped, Clip>(), kind<Situ, SoftClip>(),
};
