// The library of FP8 copies. Its functions take one record each, see launch.py.
#include "quantize.h"

EXPORT void opsgraph_quantize(const Quantize* q) {
    auto* of_bf16 = q->e5m2 ? quantize<bf16, true> : quantize<bf16, false>;
    auto* of_fp32 = q->e5m2 ? quantize<float, true> : quantize<float, false>;
    (q->dtype ? of_bf16 : of_fp32)(*q);
}
