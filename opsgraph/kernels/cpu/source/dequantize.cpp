// The library of values of FP8 copies. Its function takes one record, see launch.py.
#include "dequantize.h"

EXPORT void opsgraph_dequantize(const Dequantize* d) {
    auto* to_bf16 = d->e5m2 ? dequantize<bf16, true> : dequantize<bf16, false>;
    auto* to_fp32 = d->e5m2 ? dequantize<float, true> : dequantize<float, false>;
    (d->dtype ? to_bf16 : to_fp32)(*d);
}
