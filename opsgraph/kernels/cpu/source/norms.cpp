// The library of norms. Its functions take one record each, see launch.py.
#include "norms.h"

template <class T>
static void norm(const Norm& n, bool backward) {
    auto* function = backward ? (n.center ? norm_backward<T, true> : norm_backward<T, false>)
                              : (n.center ? norm_forward<T, true> : norm_forward<T, false>);
    function(n);
}

EXPORT void opsgraph_norm_forward(const Norm* n) {
    n->dtype ? norm<bf16>(*n, false) : norm<float>(*n, false);
}

EXPORT void opsgraph_norm_backward(const Norm* n) {
    n->dtype ? norm<bf16>(*n, true) : norm<float>(*n, true);
}
