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

// e^x for x from -88 to 88.7, by 2^n * e^r, |r| <= log(2) / 2, and the Taylor polynomial of e^r to its
// seventh power, within 2e-7 relative. 0 below 2^-126.5 and inf above 2^127.5, where the exponent's
// field is 0 or full.
SHORT float exponential_within(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the lowest bits
    float shifted = fmadd(x, 1.44269504f, magic);
    float n = shifted - magic;
    float r = fmadd(n, -0.693145752f, x);  // log(2) in two parts, the first exact in n * part
    r = fmadd(n, -1.42860677e-6f, r);
    float p = 1.98412698e-4f;
    p = fmadd(p, r, 1.38888889e-3f);
    p = fmadd(p, r, 8.33333333e-3f);
    p = fmadd(p, r, 4.16666667e-2f);
    p = fmadd(p, r, 1.66666667e-1f);
    p = fmadd(p, r, 0.5f);
    p = fmadd(r * r, p, r) + 1.0f;
    return p * bits<float>((bits<uint32_t>(shifted) << 23) + 0x3f800000u);
}

// x between two bounds; a NaN stays one.
static inline float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

static inline float exponential(float x) { return exponential_within(clamp(x, -88.0f, 88.7f)); }

// sigmoid(x) = 1 / divisor for x from -88.7, where it is 0, to 88, where it is 1; other: 1 - value, by
// e^-x where that would cancel. Up to 1 it has the value's error, which then cancels in slopes.
struct Logistic {
    float divisor, value, other;
};

SHORT Logistic logistic_within(float x) {
    float e = exponential_within(-x), divisor = 1.0f + e, value = 1.0f / divisor;
    float near = 1.0f - value, far = e * value;
    return {divisor, value, x < 1.0f ? near : far};
}

static inline Logistic logistic(float x) { return logistic_within(clamp(x, -88.7f, 88.0f)); }

static inline float sigmoid(float x) { return logistic(x).value; }

// tanh and its slope: up to 1 by x + x^3 * p(x^2), where 1 - 2 / (e^2x + 1) would cancel.
struct Hyperbolic {
    float value, slope;
};

SHORT Hyperbolic hyperbolic(float x) {
    float size = x < 0.0f ? -x : x, square = x * x;
    float rest = 2.0f / (exponential(2.0f * size) + 1.0f), far = 1.0f - rest;
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

static inline float hyperbolic_tangent(float x) { return hyperbolic(x).value; }
