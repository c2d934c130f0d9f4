// The library of matrix products of bf16: a stored by rows, b by rows or by columns; with tiles, see
// `tiled.h`, a by columns too.
//
// A task is a block of the result: some rows by a few columns. It packs the block of b, as many rows
// of it at a time as fit the cache, into panels of LANES columns, and multiplies some rows of a with
// two panels, or the last one, after another. Sums are fp32 and go over k in its order, whatever the
// task and the thread: the same bits for every number of threads.
#include "product.h"
#include "tiled.h"

constexpr int64_t SLAB = 1024;  // rows of a task whose sums wait for the next part of k

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

// Some rows of a, or of a copy.
struct Rows {
    const bf16* first;
    int64_t stride;
};

// -- units: what multiplies --
//
// PER: k in an element of b. ROWS: of a at a time. DEPTH: elements of k at a time, a multiple of
// STEP. COLUMNS: of a task.

template <class Unit>
struct Registers {
    static constexpr int64_t ROWS = SUMS, DEPTH = 512, COLUMNS = 128;
    using Scope = char;

    // Rows of a as elements, with zeros where there are no rows and no k.
    static Rows rows(Rows a, int64_t count, int64_t depth, char* room) {
        float* to = reinterpret_cast<float*>(room);
        for (int64_t i = 0; i < ROWS; i++)
            Unit::elements(a.first + i * a.stride, i < count ? depth : 0, to + i * DEPTH);
        return {reinterpret_cast<bf16*>(to), 0};
    }

    // c = (c +) a * b, for ROWS rows, `count` elements of k and one or two panels of b.
    template <int PANELS>
    static void multiply(Rows rows, const float* b, int64_t count, float* c, bool more) {
        const float* a = reinterpret_cast<const float*>(rows.first);
        Lanes sums[ROWS][PANELS];
        UNROLL for (int i = 0; i < ROWS; i++)
            UNROLL for (int j = 0; j < PANELS; j++) {
                sums[i][j] = Lanes{};
                if (more) memcpy(&sums[i][j], c + i * COLUMNS + j * LANES, sizeof(Lanes));
            }
        for (int64_t p = 0; p < count; p++, b += LANES) {
            Lanes line[PANELS];
            UNROLL for (int j = 0; j < PANELS; j++)
                memcpy(&line[j], b + j * count * LANES, sizeof(Lanes));
            UNROLL for (int i = 0; i < ROWS; i++) {
                Lanes each = (Lanes)(Bits{} + bits<int32_t>(a[i * DEPTH + p]));
                UNROLL for (int j = 0; j < PANELS; j++) Unit::add(sums[i][j], each, line[j]);
            }
        }
        UNROLL for (int i = 0; i < ROWS; i++)
            UNROLL for (int j = 0; j < PANELS; j++)
                memcpy(c + i * COLUMNS + j * LANES, &sums[i][j], sizeof(Lanes));
    }
};

struct Floats : Registers<Floats> {
    static constexpr int64_t PER = 1, STEP = 2;

    static void elements(const bf16* from, int64_t depth, float* to) {
        for (int64_t k = 0; k < depth; k++) to[k] = widen(from[k]);
        for (int64_t k = depth; k < DEPTH; k++) to[k] = 0;
    }

    static void add(Lanes& sum, Lanes a, Lanes b) {
#if defined(__FMA__)
        asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__aarch64__)
        asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(a), "w"(b));
#else
        sum += a * b;
#endif
    }
};

#if defined(__AVX512BF16__)
#define PAIRS 1

struct Pairs : Registers<Pairs> {
    static constexpr int64_t PER = 2, STEP = 1;

    static void elements(const bf16* from, int64_t depth, float* to) {
        memset(to, 0, DEPTH * sizeof *to);
        memcpy(to, from, depth * sizeof *from);
    }

    static void add(Lanes& sum, Lanes a, Lanes b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    }
};
#endif

// -- a task --

// Sums of rows i.. and columns j0 to j1, with what is added, to c.
template <class Unit>
static void finish(const Product& g, float* sums, int64_t i, int64_t rows, int64_t j0, int64_t j1) {
    constexpr int64_t COLUMNS = Unit::COLUMNS;
    const int64_t width = j1 - j0;
    alignas(64) bf16 block[Unit::ROWS * COLUMNS];
    for (int64_t r = 0; r < rows; r++) {
        float* __restrict row = sums + r * COLUMNS;
        if (g.bias)
            for (int64_t c = 0; c < width; c++) row[c] += g.bias[g.bias_of_rows ? i + r : j0 + c];
        if (g.other) {
            const bf16* other = g.other + (i + r) * g.other_down + j0 * g.other_across;
            for (int64_t c = 0; c < width; c++) row[c] += widen(other[c * g.other_across]);
        }
        bf16* __restrict to = g.c_by_columns ? block + r * COLUMNS : g.c + (i + r) * g.c_stride + j0;
        for (int64_t c = 0; c < width; c++) to[c] = narrow<bf16>(row[c]);
    }
    if (g.c_by_columns) transpose_block(block, COLUMNS, rows, width, g.c + j0 * g.c_stride + i, g.c_stride);
}

// Bytes that a thread needs: a part of b, some rows of a (or pairs to be widened), sums.
template <class Unit>
struct Size {
    static constexpr int64_t B = Unit::DEPTH * Unit::COLUMNS * sizeof(float),
                             A = max(Unit::ROWS, LANES) * Unit::DEPTH * sizeof(float);

    static bool parts(int64_t k) { return k > Unit::DEPTH * Unit::PER; }

    static int64_t bytes(int64_t k) {
        return B + A + round_up(parts(k) ? SLAB : 1, Unit::ROWS) * Unit::COLUMNS * sizeof(float);
    }
};

template <class Unit>
static void task(const Product& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, char* room) {
    constexpr int64_t ROWS = Unit::ROWS, DEPTH = Unit::DEPTH * Unit::PER;
    float* b = reinterpret_cast<float*>(room);
    char* some = room + Size<Unit>::B;
    float* waiting = reinterpret_cast<float*>(some + Size<Unit>::A);
    const bool parts = Size<Unit>::parts(g.k);
    typename Unit::Scope scope;
    (void)scope;
    for (int64_t k = 0; k < g.k; k += DEPTH) {
        const int64_t depth = min(DEPTH, g.k - k);
        const int64_t count = round_up(blocks(depth, Unit::PER), Unit::STEP);
        pack<Unit>(g, k, depth, j0, j1, count, b, some);
        for (int64_t i = i0; i < i1; i += ROWS) {
            const int64_t rows = min(ROWS, i1 - i);
            const Rows a = Unit::rows({g.a + i * g.a_stride + k, g.a_stride}, rows, depth, some);
            float* sums = waiting + (parts ? (i - i0) * Unit::COLUMNS : 0);
            for (int64_t j = 0; j < j1 - j0; j += 2 * LANES) {
                const bool two = j1 - j0 - j > LANES;
                auto multiply = two ? Unit::template multiply<2> : Unit::template multiply<1>;
                multiply(a, b + j * count, count, sums + j, k > 0);
            }
            if (k + DEPTH >= g.k) finish<Unit>(g, sums, i, rows, j0, j1);
        }
    }
}

template <class Unit>
static void product(const Product& g) {
    if (!g.m || !g.n) return;
    int64_t columns = Unit::COLUMNS;  // fewer, where there are many threads
    while (columns > 2 * LANES && blocks(g.n, columns) * blocks(g.m, FEW_ROWS) < g.threads) columns /= 2;
    const int64_t across = blocks(g.n, columns);
    int64_t slab = max(FEW_ROWS, blocks(g.m, blocks(4 * g.threads, across)));  // some for each thread
    if (Size<Unit>::parts(g.k)) slab = min(slab, SLAB);
    const int64_t down = blocks(g.m, slab), bytes = Size<Unit>::bytes(g.k);
    slab = round_up(blocks(g.m, down), Unit::ROWS);
    members(g.threads, across * down, g.m * g.n * g.k / 16, [&](int64_t k, int64_t member) {
        const int64_t i = k % down * slab, j = k / down * columns;
        if (i < g.m)
            task<Unit>(
                g, i, min(g.m, i + slab), j, min(g.n, j + columns), g.room + member * bytes);
    });
}

// -- what Python calls --

// Bytes of room that a thread needs for sums over k, or 0 where the machine has no such unit.
EXPORT int64_t opsgraph_product_room(int64_t unit, int64_t k) {
    switch (unit) {
        case 0: return Size<Floats>::bytes(k);
#ifdef PAIRS
        case 1: return Size<Pairs>::bytes(k);
#endif
#ifdef TILES
        case 2: return tiles_allowed() ? Tiled::bytes(k) : 0;
#endif
    }
    return 0;
}

EXPORT void opsgraph_product(const Product* g) {
    switch (g->unit) {
        case 0: return product<Floats>(*g);
#ifdef PAIRS
        case 1: return product<Pairs>(*g);
#endif
#ifdef TILES
        case 2: return product_of_tiles(*g);
#endif
    }
}
