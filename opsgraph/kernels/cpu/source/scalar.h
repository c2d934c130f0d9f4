// Scalar functions that compilers vectorize in loops: no branches, no calls.
//
// Multiply-adds are fused where `fmadd` says so and nowhere else (-ffp-contract=off): whatever loop a
// function is inlined into, and however wide its vectors, it gives the same bits. So an activation
// that the backward computes again equals the forward's.
#pragma once
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

// A loop over columns: compiled once, however many places call it.
#define LOOP static __attribute__((noinline))

// What such a loop calls: one with a call in it is not vectorized.
#define SHORT static inline __attribute__((always_inline))

template <class To, class From>
static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) { return bits<float>(uint32_t(x) << 16); }

template <class T>
static inline T narrow(float x);

template <>
inline float narrow<float>(float x) { return x; }

// To nearest, ties to even; a NaN becomes the quiet NaN that PyTorch writes.
template <>
inline bf16 narrow<bf16>(float x) {
    uint32_t u = bits<uint32_t>(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return bf16(x != x ? 0x7fc0 : rounded);
}

// One rounding where the machine has the instruction; elsewhere a library call would not vectorize.
// Not named fma: libc++ has that in the global namespace, with these very parameters.
static inline float fmadd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

template <class T>
void fma(T, T, T) = delete;  // the global one of libstdc++ would take floats as doubles, silently

// The lesser of x and a limit, neither below 0; of a NaN the limit. As integers, for compilers then see
// a minimum: of floats they make branches and masks.
static inline float at_most(float x, float limit) {
    int32_t own = bits<int32_t>(x), most = bits<int32_t>(limit);
    return bits<float>(own < most ? own : most);
}

static inline float finite(float x) { return at_most(x, 3.40282347e38f); }

// log2(e) * a, and log(2) / a in two parts, the first exact in n * part: with them e^(a * x) is
// computed of x, for the product a * x would be rounded (the reduction of W. J. Cody and W. Waite,
// Software Manual for the Elementary Functions, 1980).
struct Rate {
    float per, whole, rest, a;
};

const Rate NATURAL = {1.44269504f, 0.693145752f, 1.42860677e-6f, 1.0f};

static inline Rate rate(double a) {
    double each = 0.6931471805599453 / a;
    float whole = bits<float>(bits<uint32_t>(float(each)) & 0xffffff00u);
    return {float(a * 1.4426950408889634), whole, float(each - double(whole)), float(a)};
}

// e^(a * x) = 2^n * (1 + r * q), not yet added up: 1 + e^(a * x) is then rounded once.
struct Power {
    float scale, part, q;
    float value() const { return fmadd(part, q, scale); }
    float plus_one() const { return fmadd(part, q, 1.0f + scale); }
};

// For a * x from -88 to 89: r is from -log(2) / 2 to log(2) / 2, and beyond 2^127.5 up to log(2), for
// n is at most 127. 1 + r * q is e^r within 4e-9, fitted to that range. 0 below 2^-126.5, where the
// exponent's field is 0, and inf where e^(a * x) is. LIFT: the power of two that it is
// multiplied with; a * x is then at most 40.
template <int LIFT = 0>
SHORT Power power_of(float x, const Rate& t) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
    float free = fmadd(x, t.per, magic), shifted = LIFT ? free : at_most(free, magic + 127.0f);
    float n = shifted - magic;
    float r = fmadd(n, -t.rest, fmadd(n, -t.whole, x)) * t.a;
    float q = fmadd(r, 2.33273997e-4f, 1.38327607e-3f);
    q = fmadd(q, r, 8.32668878e-3f);
    q = fmadd(q, r, 4.16681804e-2f);
    q = fmadd(q, r, 1.66666999e-1f);
    q = fmadd(q, r, 4.99999940e-1f);
    q = fmadd(q, r, 1.0f);
    float scale = bits<float>((bits<uint32_t>(shifted) << 23) + ((127u + LIFT) << 23));
    return {scale, scale * r, q};
}

SHORT float exponential_within(float x) { return power_of(x, NATURAL).value(); }

// x between two bounds; a NaN stays one.
static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

SHORT float exponential(float x) { return exponential_within(clamp(x, -88.0f, 89.0f)); }

// sigmoid(x) = 1 / divisor for x from -89, where it is 0, to 88, where it is 1; other: 1 - value, by
// e^-x where that would cancel. Up to 1 it has the value's error, which then cancels in slopes.
struct Logistic {
    float divisor, value, other;
};

SHORT Logistic logistic_within(float x) {
    Power minus = power_of(-x, NATURAL);
    float divisor = minus.plus_one(), value = 1.0f / divisor;
    float near = 1.0f - value, far = minus.value() * value;
    return {divisor, value, x < 1.0f ? near : far};
}

SHORT Logistic logistic(float x) { return logistic_within(clamp(x, -89.0f, 88.0f)); }

SHORT float sigmoid(float x) { return logistic(x).value; }

// tanh and its slope: up to 1 by x + x^3 * p(x^2), where 1 - 2 / (e^2x + 1) would cancel.
struct Hyperbolic {
    float value, slope;
};

SHORT Hyperbolic hyperbolic(float x) {
    float size = x < 0.0f ? -x : x, square = x * x;
    float twice = 2.0f * size, inside = twice > 89.0f ? 89.0f : twice;  // where the rest is 0
    float rest = 2.0f / power_of(inside, NATURAL).plus_one(), far = 1.0f - rest;
    far = x < 0.0f ? -far : far;
    float p = 1.214704243e-4f;
    p = fmadd(p, square, -8.411360322e-4f);
    p = fmadd(p, square, 3.078592243e-3f);
    p = fmadd(p, square, -8.595112711e-3f);
    p = fmadd(p, square, 2.178473026e-2f);
    p = fmadd(p, square, -5.395310000e-2f);
    p = fmadd(p, square, 1.333319992e-1f);
    p = fmadd(p, square, -3.333332837e-1f);
    float near = fmadd(x * square, p, x), value = size < 1.0f ? near : far;
    float flat = fmadd(-value, value, 1.0f), steep = rest * (2.0f - rest);
    return {value, size < 0.75f ? flat : steep};
}

SHORT float hyperbolic_tangent(float x) { return hyperbolic(x).value; }
