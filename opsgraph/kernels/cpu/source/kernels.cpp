// The CPU's kernels behind a plain C interface: each takes one record, see launch.py.
#include "activation_rows.h"
#include "dequantize.h"
#include "norms.h"
#include "quantize.h"

template <class T>
static void norm(const Norm& n, bool backward) {
    auto* function = backward ? (n.center ? norm_backward<T, true> : norm_backward<T, false>)
                              : (n.center ? norm_forward<T, true> : norm_forward<T, false>);
    function(n);
}

struct Transpose {
    int64_t threads, size, rows, width;
    const void* x;
    int64_t stride;
    void* y;
};

template <class T>
static void transpose(const Transpose& t) {
    over_rows(t.threads, Shares(t.rows), t.width, [&](int64_t begin, int64_t end, int64_t) {
        transpose_block(
            static_cast<const T*>(t.x) + begin * t.stride, t.stride, end - begin, t.width,
            static_cast<T*>(t.y) + begin, t.rows);
    });
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void opsgraph_threads(Fork found) { fork_join = found; }

EXPORT void opsgraph_norm_forward(const Norm* n) {
    n->dtype ? norm<bf16>(*n, false) : norm<float>(*n, false);
}

EXPORT void opsgraph_norm_backward(const Norm* n) {
    n->dtype ? norm<bf16>(*n, true) : norm<float>(*n, true);
}

EXPORT void opsgraph_activation_forward(const Activation* a) {
    a->dtype ? activation_forward<bf16>(*a) : activation_forward<float>(*a);
}

EXPORT void opsgraph_activation_backward(const Activation* a) {
    a->dtype ? activation_backward<bf16>(*a) : activation_backward<float>(*a);
}

EXPORT void opsgraph_transpose(const Transpose* t) {
    t->size == 2 ? transpose<uint16_t>(*t) : transpose<float>(*t);
}

static void quantize(const Quantize& q, const Activation* made) {
    auto* of_bf16 = q.e5m2 ? quantize<bf16, true> : quantize<bf16, false>;
    auto* of_fp32 = q.e5m2 ? quantize<float, true> : quantize<float, false>;
    (q.dtype ? of_bf16 : of_fp32)(q, made);
}

EXPORT void opsgraph_quantize(const Quantize* q) { quantize(*q, nullptr); }

struct ActivationQuantize {
    Activation activation;
    Quantize quantize;
};

EXPORT void opsgraph_activation_quantize(const ActivationQuantize* both) {
    quantize(both->quantize, &both->activation);
}

EXPORT void opsgraph_dequantize(const Dequantize* d) {
    auto* to_bf16 = d->e5m2 ? dequantize<bf16, true> : dequantize<bf16, false>;
    auto* to_fp32 = d->e5m2 ? dequantize<float, true> : dequantize<float, false>;
    (d->dtype ? to_bf16 : to_fp32)(*d);
}
