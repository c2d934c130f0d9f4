// The library of scales by columns. Its functions take one record each, see launch.py.
#include "scales.h"

EXPORT void opsgraph_scale_forward(const Scale* s) {
    if (!s->dtype)
        s->x_dtype ? scale_forward<bf16, float>(*s) : scale_forward<float, float>(*s);
    else
        scale_forward<bf16, bf16>(*s);
}

EXPORT void opsgraph_scale_backward(const Scale* s) {
    if (!s->dtype)
        s->x_dtype ? scale_backward<bf16, float>(*s) : scale_backward<float, float>(*s);
    else
        scale_backward<bf16, bf16>(*s);
}
