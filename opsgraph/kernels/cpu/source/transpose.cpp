// The library of transposed copies. Its function takes one record, see launch.py.
#include "transpose.h"

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

EXPORT void opsgraph_transpose(const Transpose* t) {
    t->size == 2 ? transpose<uint16_t>(*t) : transpose<float>(*t);
}
