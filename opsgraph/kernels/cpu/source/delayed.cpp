// The library of delayed scaling: the update of states, and the noting of amaxes. Its functions
// take one record each, see launch.py; kernels/reference/quantize.py has the formulas.
#include "parallel.h"

const float LARGEST = 3.4028234663852886e38f;

struct Update {
    int64_t states, length, forward, backward, latest;
    double forward_max, backward_max, factor;
    const int64_t* table;  // addresses of each state's scale, both buffers of amaxes, and history
    const float* reduced;  // the amaxes of what is updated, or null: those of the states
    float* fixed;
};

// The new scale of a column: its history moves by a slot, and the amax is the latest one.
static float moved(const Update& u, float* history, float amax, float scale, float limit) {
    float top = amax;
    bool usable = amax == amax;
    for (int64_t slot = 0; slot + 1 < u.length; slot++) {
        const float later = history[(slot + 1) * 3];
        if (!u.latest) {
            usable = usable && later == later;
            top = later > top ? later : top;
        }
        history[slot * 3] = later;
    }
    history[(u.length - 1) * 3] = amax;
    history[0] = 0;
    const float next = limit / top * float(u.factor);
    return usable && top > 0 && top <= LARGEST ? min(next, LARGEST) : scale;
}

EXPORT void opsgraph_delayed_update(const Update* given) {
    const Update& u = *given;
    const int64_t first = u.backward ? u.states : 0;
    for (int64_t state = 0; state < u.states; state++) {
        float* scale = reinterpret_cast<float*>(u.table[state * 4]);
        float* history = reinterpret_cast<float*>(u.table[state * 4 + 3]);
        for (int64_t column = 0; column < 3; column++) {
            const bool gradient = column == 2;
            if (u.forward) u.fixed[((u.states + state) * 3 + column) * 4] = scale[column];
            if (gradient ? u.backward : u.forward) {
                float* seen = reinterpret_cast<float*>(u.table[state * 4 + 1 + gradient]);
                seen += gradient ? 0 : column;
                const float* from = u.reduced;
                if (from != nullptr) from += gradient ? state : first + state * 2 + column;
                const float amax = from != nullptr ? *from : *seen;
                const double limit = gradient ? u.backward_max : u.forward_max;
                if (!(amax < 0))
                    scale[column] = moved(u, history + column, amax, scale[column], float(limit));
                *seen = -1;
            }
            u.fixed[(state * 3 + column) * 4] = scale[column];
        }
    }
}

const int PAIRS = 8;

struct Raise {
    int64_t count;
    float* seen[PAIRS];
    const float* amax[PAIRS];
};

EXPORT void opsgraph_raise(const Raise* r) {
    for (int64_t k = 0; k < r->count; k++) {
        const float amax = *r->amax[k];
        if (amax > *r->seen[k] || amax != amax) *r->seen[k] = amax;
    }
}
