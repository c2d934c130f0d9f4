// The library of activations. Its functions take one record each, see launch.py.
#include "activation_rows.h"

EXPORT void opsgraph_activation_forward(const Activation* a) {
    a->dtype ? activation_forward<bf16>(*a) : activation_forward<float>(*a);
}

EXPORT void opsgraph_activation_backward(const Activation* a) {
    a->dtype ? activation_backward<bf16>(*a) : activation_backward<float>(*a);
}
