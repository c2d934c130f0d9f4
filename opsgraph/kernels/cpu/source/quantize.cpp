// The library of FP8 copies. Its functions take one record each, see launch.py.
#include "quantize.h"

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
