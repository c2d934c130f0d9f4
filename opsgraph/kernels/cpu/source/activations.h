// Activations, plain y = f(x) and gated y = f(a) * g(b). All arithmetic is on fp32 columns, a chunk
// at a time: fp32 tensors are read and written where they are, bf16 through buffers in the cache.
#pragma once
#include "parallel.h"
#include "scalar.h"
#include "transpose.h"

struct Activation {
    int64_t dtype, kind, gated, rounded, threads, rows, width;  // width: of y
    int64_t period, value;  // columns of a gate's block, and from a gate to its value, maybe backwards
    const void *x, *dy;
    const float* bias;
    int64_t x_stride, dy_stride;
    void *y, *yt, *pre, *dx;
    float* dbias;
    double params[3];
};

// f(x), f'(x), and whether x is where a gradient is 0 whatever it is multiplied with.
struct Slope {
    float value, slope;
    bool off = false;
};

// Where f is 0 or x within an ulp, and f' 0 or 1, x is clamped: a 0 is multiplied with no infinity.

// x * sigmoid(u); minus: e^-u; steep: x times u's slope. Up to 2.5 the error of s nearly cancels in
// s + steep * s * (1 - s); ROUND: near 0, where it does not, what the division lacks counts, too.
template <bool ROUND>
SHORT Slope by_sigmoid(float x, float u, const Power& minus, float steep) {
    float divisor = minus.plus_one(), s = 1.0f / divisor, near = 1.0f - s, far = minus.value() * s;
    float more = steep * (u < 2.5f ? near : far);
    if (ROUND) more += fmadd(-finite(divisor), s, 1.0f);  // 1 of an infinite divisor, whose s is 0
    return {x / divisor, fmadd(more, s, s)};
}

struct Swish {  // x * sigmoid(alpha * x), alpha > 0: p[0] and what that lacks, p[3]
    SHORT Slope at(float x, const float* p) {
        const Rate minus = rate(-(double(p[0]) + double(p[3])));
        const float low = -89.0f / p[0], high = 88.0f / p[0];
        float above = x < low ? low : x, inner = above > high ? high : above, u = p[0] * inner;
        return by_sigmoid<false>(above, u, power_of(inner, minus), u);
    }
};

struct Sigmoid {
    SHORT Slope at(float x, const float*) {
        Logistic s = logistic(x);
        return {s.value, s.value * s.other};
    }
};

struct Gelu {  // 0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
    SHORT Slope at(float x, const float*) {
        float above = x < LOW ? LOW : x, inner = above > HIGH ? HIGH : above;
        float square = inner * inner;
        float u = inner * fmadd(0.0713548128f, square, 1.59576912f);
        float steep = inner * fmadd(0.214064438f, square, 1.59576912f);
        return by_sigmoid<true>(above, u, power_of(-u, NATURAL), steep);
    }
    static constexpr float LOW = -10.0731f, HIGH = 10.0296f;  // where 2u is -89 and 88
};

// x * Phi(x), Phi the normal distribution function: below -1 it is e^(-x^2 / 2) * t * p(t) with
// t = 1 / (1 + 0.35 |x|), up to 1 it is 0.5 + x * q(x^2), p and q fitted for relative errors of 4e-8.
struct GeluErf {
    SHORT Slope at(float x, const float*) {
        float above = x < -LARGE ? -LARGE : x, inner = above > LARGE ? LARGE : above, e;
        float phi = normal(inner, e);
        return {above * phi, phi + inner * 0.398942280f * e};
    }
    // Phi of x that is no further out than LARGE, and e^(-x^2 / 2).
    SHORT float normal(float x, float& e) {
        float size = x < 0.0f ? -x : x, square = size * size, rest = fmadd(size, size, -square);
        float t = 1.0f / fmadd(0.35f, size, 1.0f);
        float p = fmadd(t, -2.915957015e-2f, 1.440392480e-1f);
        p = fmadd(p, t, -2.558565116e-1f);
        p = fmadd(p, t, 1.593400730e-1f);
        p = fmadd(p, t, -2.322667073e-2f);
        p = fmadd(p, t, 1.055586986e-1f);
        p = fmadd(p, t, 1.198196804e-1f);
        p = fmadd(p, t, 1.398637431e-1f);
        p = fmadd(p, t, 1.396212934e-1f);
        e = exponential_within(-0.5f * square);
        e = fmadd(-0.5f * rest, e, e);
        float tail = p * t * e, q = fmadd(square, -7.654208275e-6f, 1.134863705e-4f);
        q = fmadd(q, square, -1.186329988e-3f);
        q = fmadd(q, square, 9.973322973e-3f);
        q = fmadd(q, square, -6.649035960e-2f);
        q = fmadd(q, square, 3.989422917e-1f);
        float near = fmadd(x, q, 0.5f), above = 1.0f - tail, far = x < 0.0f ? tail : above;
        return size < 1.0f ? near : far;
    }
    static constexpr float LARGE = 13.2665f;  // where e^(-x^2 / 2) counts as 0
};

// Values by PyTorch's formulas, which cancel far below 0: for gates that round as it does.
struct GeluAsPyTorch {
    SHORT Slope at(float x, const float* p) {
        float above = x < Gelu::LOW ? Gelu::LOW : x, inner = above > Gelu::HIGH ? Gelu::HIGH : above;
        float u = 0.79788456f * (inner + 0.044715f * (inner * inner * inner));
        return {0.5f * above * (1.0f + hyperbolic_tangent(u)), Gelu::at(x, p).slope};
    }
};

struct GeluErfAsPyTorch {
    SHORT Slope at(float x, const float* p) {
        constexpr float LARGE = GeluErf::LARGE;
        float above = x < -LARGE ? -LARGE : x, inner = above > LARGE ? LARGE : above, e;
        float erf = 2.0f * GeluErf::normal(inner, e) - 1.0f;
        return {above * 0.5f * (1.0f + erf), GeluErf::at(x, p).slope};
    }
};

template <bool R, class F, class AsPyTorch>
struct Either {
    SHORT Slope at(float x, const float* p) { return R ? AsPyTorch::at(x, p) : F::at(x, p); }
};

struct Relu {
    SHORT Slope at(float x, const float*) {
        return {x <= 0.0f ? 0.0f : x, 1.0f, x <= 0.0f};  // a NaN stays one
    }
};

struct SquaredRelu {
    SHORT Slope at(float x, const float*) {
        float positive = x <= 0.0f ? 0.0f : x;
        return {positive * positive, 2.0f * positive, x <= 0.0f};
    }
};

template <class F>
struct Clamped {  // swish of min(a, limit); p: limit, alpha, offset
    SHORT Slope at(float a, const float* p) {
        Slope swish = F::at(a > p[0] ? p[0] : a, p + 1);
        return {swish.value, swish.slope, a > p[0]};
    }
};

struct AnySwish {  // of an alpha that is not positive
    SHORT Slope at(float x, const float* p) {
        float u = clamp(p[0] * x, -89.0f, 88.0f);
        Logistic s = logistic_within(u);
        return {x * s.value, fmadd(u * s.other, s.value, s.value)};
    }
};

struct Clip {
    SHORT Slope at(float b, const float* p) {
        float inside = b > p[0] ? p[0] : b < -p[0] ? -p[0] : b;
        return {inside + p[2], 1.0f, (b < 0.0f ? -b : b) > p[0]};
    }
};

struct Situ {  // beta * tanh(a / beta) * sigmoid(a)
    SHORT Slope at(float a, const float* p) {
        Logistic s = logistic(a);
        Hyperbolic t = hyperbolic(a / p[0]);
        float wide = p[0] * t.value;
        return {wide / s.divisor, s.value * fmadd(wide, s.other, t.slope)};
    }
};

struct SoftClip {  // beta * tanh(b / beta)
    SHORT Slope at(float b, const float* p) {
        Hyperbolic t = hyperbolic(b / p[1]);
        return {p[1] * t.value, t.slope};
    }
};

struct Tanh {
    SHORT Slope at(float x, const float*) {
        Hyperbolic t = hyperbolic(x);
        return {t.value, t.slope};
    }
};

struct Relu6 {
    SHORT Slope at(float x, const float*) {
        return {clamp(x, 0.0f, 6.0f), 1.0f, x <= 0.0f || x >= 6.0f};
    }
};

struct HardSwish {  // x * clamp(x + 3, 0, 6) / 6
    SHORT Slope at(float x, const float*) {
        float slope = x > 3.0f ? 1.0f : x / 3.0f + 0.5f, above = x < -3.0f ? -3.0f : x;
        return {above * clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f, slope, x <= -3.0f};
    }
};

struct LeakyRelu {  // p: the slope below 0
    SHORT Slope at(float x, const float* p) {
        return {x > 0.0f ? x : x * p[0], x > 0.0f ? 1.0f : p[0]};
    }
};

// x * tanh(log(1 + e^x)) = x * h / (1 + h), h = e^x * (e^x / 2 + 1); its slope t + x * (e^2x + e^x) / d^2
// with t = h / d, d = 1 + h. off: what i = 1 / d lacks, relative to it; rest: what t does.
struct Mish {
    SHORT Slope at(float x, const float*) {
        float above = x < LOW ? LOW : x, inner = above > HIGH ? HIGH : above;
        float e = power_of<64>(inner, NATURAL).value() * 0x1p-64f;  // down to the smallest numbers
        float h = fmadd(0.5f * e, e, e), d = 1.0f + h, i = 1.0f / d, t = h * i;
        float off = fmadd(-d, i, 1.0f) - i * (h - (d - 1.0f)), rest = fmadd(t, off, fmadd(h, i, -t));
        float a = inner * i, b = fmadd(e, e, e) * i, more = fmadd(a * b, 2.0f * off, rest);
        return {fmadd(above, t, inner * rest), t + fmadd(a, b, more)};
    }
    static constexpr float LOW = -104.0f, HIGH = 20.0f;  // where t is 0, and 1 within an ulp
};

template <class F>
struct Between {  // F between two bounds; p: the upper one, minus the lower one
    SHORT Slope at(float x, const float* p) {
        Slope f = F::at(x, p);
        return {clamp(f.value, -p[0], p[0]), f.slope, f.value > p[0] || f.value < -p[0]};
    }
};

template <class F>
struct After {  // as Clamped, but the swish is what is clamped
    SHORT Slope at(float a, const float* p) {
        Slope swish = F::at(a, p + 1);
        return {swish.value > p[0] ? p[0] : swish.value, swish.slope, swish.value > p[0]};
    }
};

// Values as transformers composes them of PyTorch's operations on bf16, each of which rounds; their
// slopes are those of the functions.

static inline float stored(float x) { return widen(narrow<bf16>(x)); }

struct GeluSteps {
    SHORT Slope at(float x, const float* p) {
        float cube = stored(stored(x * x) * x);
        float u = stored(0.79788456f * stored(x + stored(0.044715f * cube)));
        float more = stored(1.0f + stored(hyperbolic_tangent(u)));
        return {stored(0.5f * x) * more, Gelu::at(x, p).slope};
    }
};

struct GeluFastSteps {
    SHORT Slope at(float x, const float* p) {
        float inner = stored(1.0f + stored(stored(0.044715f * x) * x));
        float u = stored(stored(x * 0.7978845608f) * inner);
        float more = stored(1.0f + stored(hyperbolic_tangent(u)));
        return {stored(0.5f * x) * more, Gelu::at(x, p).slope};
    }
};

struct GeluErfSteps {
    SHORT Slope at(float x, const float* p) {
        float u = clamp(stored(x / 1.41421356f) * 1.41421356f, -GeluErf::LARGE, GeluErf::LARGE), e;
        float erf = 2.0f * GeluErf::normal(u, e) - 1.0f;
        return {stored(x * 0.5f) * stored(1.0f + stored(erf)), GeluErf::at(x, p).slope};
    }
};

struct SwishSteps {  // p: alpha
    SHORT Slope at(float x, const float* p) {
        return {x * stored(sigmoid(stored(p[0] * x))), AnySwish::at(x, p).slope};
    }
};

struct Line {
    SHORT Slope at(float b, const float*) { return {b, 1.0f}; }
};

// A factor or a product of a gated kind, rounded as bf16 where PyTorch would store it.
template <bool ROUNDED>
static inline float step(float x) { return ROUNDED ? stored(x) : x; }

// n columns of one row. A plain activation is a gated one whose b are ones: that changes no bit.
template <class F, class G, bool ROUNDED>
static void forward_columns(
    const float* __restrict a, const float* __restrict b, float* __restrict y, int64_t n,
    const float* p) {
    for (int64_t j = 0; j < n; j++)
        y[j] = step<ROUNDED>(F::at(a[j], p).value) * step<ROUNDED>(G::at(b[j], p).value);
}

template <class F, class G, bool ROUNDED>
static void backward_columns(
    const float* __restrict dy, const float* __restrict a, const float* __restrict b,
    float* __restrict da, float* __restrict db, float* __restrict y, int64_t n, const float* p) {
    for (int64_t j = 0; j < n; j++) {
        Slope f = F::at(a[j], p), g = G::at(b[j], p);
        float gate = step<ROUNDED>(f.value), line = step<ROUNDED>(g.value);
        y[j] = gate * line;
        da[j] = f.off ? 0.0f : step<ROUNDED>(dy[j] * line) * f.slope;
        db[j] = g.off ? 0.0f : step<ROUNDED>(dy[j] * gate) * g.slope;
    }
}

// The constants of a kind as fp32, and then what each of them lacks.
struct Params {
    float p[6];
    explicit Params(const double* g)
        : p{float(g[0]), float(g[1]), float(g[2]), rest(g[0]), rest(g[1]), rest(g[2])} {}
    // Not inlined: GCC 12 makes vectors of such differences, and drops the conversion to float.
    static __attribute__((noinline)) float rest(double x) { return float(x - double(float(x))); }
};

struct Kind {
    void (*forward)(const float*, const float*, float*, int64_t, const float*);
    void (*backward)(
        const float*, const float*, const float*, float*, float*, float*, int64_t, const float*);
};

template <bool ROUNDED, class F, class G = Line>
constexpr Kind kind() {
    return {forward_columns<F, G, ROUNDED>, backward_columns<F, G, ROUNDED>};
}

// In the order of FUNCTIONS in activations.py.
template <bool R>
static const Kind kinds[] = {
    kind<R, Swish>(), kind<R, Either<R, Gelu, GeluAsPyTorch>>(),
    kind<R, Either<R, GeluErf, GeluErfAsPyTorch>>(), kind<R, Relu>(),
    kind<R, SquaredRelu>(), kind<R, Sigmoid>(), kind<R, Clamped<Swish>, Clip>(),
    kind<R, Situ, SoftClip>(), kind<R, Clamped<AnySwish>, Clip>(), kind<R, Tanh>(),
    kind<R, Relu6>(), kind<R, HardSwish>(), kind<R, LeakyRelu>(), kind<R, Mish>(),
    kind<R, Between<GeluErf>>(), kind<R, After<Swish>, Clip>(), kind<R, After<AnySwish>, Clip>(),
    kind<R, GeluSteps>(), kind<R, GeluFastSteps>(), kind<R, GeluErfSteps>(),
    kind<R, SwishSteps>(), kind<R, Clamped<SwishSteps>, Clip>(), kind<R, After<SwishSteps>, Clip>(),
};

static inline const Kind& kind_of(const Activation& t) {
    return (t.rounded ? kinds<true> : kinds<false>)[t.kind];
}
