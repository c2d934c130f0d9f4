// The library of xIELU. Its functions take one record each, see launch.py.
#include "xielu.h"

EXPORT void opsgraph_xielu_forward(const Xielu* t) {
    t->dtype ? xielu_forward<bf16>(*t) : xielu_forward<float>(*t);
}

EXPORT void opsgraph_xielu_backward(const Xielu* t) {
    t->dtype ? xielu_backward<bf16>(*t) : xielu_backward<float>(*t);
}
