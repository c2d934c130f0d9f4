// Sums over the columns of a wide row in fp32, to an ulp however wide it is.
#pragma once
#include "scalar.h"

// As many columns at a time as a register has floats.
#if defined(__AVX512F__)
constexpr int64_t COLUMNS = 16;
#elif defined(__AVX__)
constexpr int64_t COLUMNS = 8;
#else
constexpr int64_t COLUMNS = 4;
#endif
constexpr int64_t TERMS = 16;  // that a sum in fp32 adds up before it goes into one in fp64

typedef float Floats __attribute__((vector_size(4 * COLUMNS)));
typedef double Doubles __attribute__((vector_size(8 * COLUMNS)));

// What terms read with: the columns from j on, or one column.
struct Several {
    int64_t j;
    Floats operator()(const float* __restrict x) const {
        Floats values;
        memcpy(&values, x + j, sizeof values);
        return values;
    }
};

struct One {
    int64_t j;
    float operator()(const float* __restrict x) const { return x[j]; }
};

// N sums of what `terms(at, to)` adds to `to[0]` and so on; `at(x)` is the columns of a row x.
template <int N, class Terms>
static inline void row_sums(int64_t width, double* sums, const Terms& terms) {
    constexpr int64_t STEP = 2 * COLUMNS;  // of two chains of additions
    const int64_t whole = width / STEP * STEP;
    Doubles total[N] = {};
    int64_t j = 0;
    while (j < whole) {
        const int64_t end = j + STEP * TERMS < whole ? j + STEP * TERMS : whole;
        Floats even[N] = {}, odd[N] = {};
        for (; j < end; j += STEP) terms(Several{j}, even), terms(Several{j + COLUMNS}, odd);
        for (int i = 0; i < N; i++)
            total[i] += __builtin_convertvector(even[i], Doubles) +
                        __builtin_convertvector(odd[i], Doubles);
    }
    float last[N] = {};
    for (; j < width; j++) terms(One{j}, last);
    for (int i = 0; i < N; i++) {
        double each[COLUMNS];
        memcpy(each, &total[i], sizeof each);
        for (int64_t half = COLUMNS / 2; half; half /= 2)
            for (int64_t k = 0; k < half; k++) each[k] += each[k + half];
        sums[i] = each[0] + double(last[i]);
    }
}
