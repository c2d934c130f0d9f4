// The library of norms. Its functions take one record each, see launch.py.
#include "norms.h"

template <class T, class Y>
static void norm(const Norm& n, bool backward) {
    auto* function = backward ? (n.center ? norm_backward<T, Y, true> : norm_backward<T, Y, false>)
                              : (n.center ? norm_forward<T, Y, true> : norm_forward<T, Y, false>);
    function(n);
}

template <class T>
static void norm_to(const Norm& n, bool backward) {
    n.y_dtype ? norm<T, bf16>(n, backward) : norm<T, float>(n, backward);
}

EXPORT void opsgraph_norm_forward(const Norm* n) {
    n->dtype ? norm_to<bf16>(*n, false) : norm_to<float>(*n, false);
}

EXPORT void opsgraph_norm_backward(const Norm* n) {
    n->dtype ? norm_to<bf16>(*n, true) : norm_to<float>(*n, true);
}
