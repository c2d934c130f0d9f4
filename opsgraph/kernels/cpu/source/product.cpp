// The library of matrix products of bf16: a stored by rows, b by rows or by columns.
//
// A task is a block of the result: some rows by a few columns. It packs the block of b, as many rows
// of it at a time as fit the cache, into panels of LANES columns, and multiplies some rows of a with
// two panels, or the last one, after another. Packed elements have 4 bytes: floats, or pairs of bf16 from two rows for
// the instructions that multiply pairs. Sums are fp32 and go over k in its order, whatever the task
// and the thread: the same bits for every number of threads.
#include "parallel.h"
#include "scalar.h"
#include "tiles.h"
#include "transpose.h"

struct Product {
    int64_t threads, unit, m, n, k;
    const bf16* a;
    int64_t a_stride;
    const bf16* b;
    int64_t b_stride, b_by_columns;
    const float* bias;  // may be null, as other may
    int64_t bias_of_rows;
    const bf16* other;
    int64_t other_down, other_across;
    bf16* c;
    int64_t c_stride, c_by_columns;
    char* room;
};

// Floats in a register, and as many rows of sums as leave registers for b.
#if defined(__AVX512F__) || defined(EMULATE_TILES)
constexpr int64_t LANES = 16, SUMS = 12;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, SUMS = 6;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, SUMS = 12;
#else
constexpr int64_t LANES = 4, SUMS = 6;
#endif
constexpr int64_t SLAB = 1024;     // rows of a task whose sums wait for the next part of k
constexpr int64_t FEW_ROWS = 512;  // with fewer, a task's time is that of packing b

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES)));

static constexpr int64_t blocks(int64_t count, int64_t of) { return (count + of - 1) / of; }

static constexpr int64_t round_up(int64_t count, int64_t of) { return blocks(count, of) * of; }

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

#ifdef TILES
// Two tiles of a times two of b. A task has its part of b in the second cache, and loads it from
// there past the first, which is for the rows of a.
struct Tiled {
    static constexpr int64_t PER = 2, STEP = 16, ROWS = 32, DEPTH = 1024, COLUMNS = 256;
    using Scope = Tiles;

    // Rows of a as they are, or a copy where there are fewer, or a last tile is not whole.
    static Rows rows(Rows a, int64_t count, int64_t depth, char* room) {
        if (count == ROWS && depth % (2 * STEP) == 0) return a;
        bf16* to = reinterpret_cast<bf16*>(room);
        memset(to, 0, ROWS * 2 * DEPTH * sizeof *to);
        for (int64_t i = 0; i < count; i++)
            memcpy(to + i * 2 * DEPTH, a.first + i * a.stride, depth * sizeof *to);
        return {to, 2 * DEPTH};
    }

    template <int PANELS>
    static void multiply(Rows a, const float* b, int64_t count, float* c, bool more) {
        constexpr bool TWO = PANELS == 2;
        const int64_t row = COLUMNS * sizeof *c, stride = a.stride * sizeof *a.first, line = 64;
        float* low = c + 16 * COLUMNS;
        if (more) {
            tile_load<0>(c, row), tile_load<2>(low, row);
            if (TWO) tile_load<1>(c + 16, row), tile_load<3>(low + 16, row);
        } else {
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        }
        const bf16 *high_rows = a.first, *low_rows = a.first + 16 * a.stride;
        const float *left = b, *right = b + count * LANES;
        tile_load<4>(high_rows, stride), tile_load<6, ONCE>(left, line);
        tile_load<5>(low_rows, stride);
        if (TWO) tile_load<7, ONCE>(right, line);
        for (int64_t p = STEP; p < count; p += STEP) {  // a tile's next load follows its last use
            high_rows += 2 * STEP, low_rows += 2 * STEP, left += STEP * LANES, right += STEP * LANES;
            tile_multiply<0, 4, 6>(), tile_multiply<2, 5, 6>();
            tile_load<6, ONCE>(left, line);
            if (TWO) tile_multiply<3, 5, 7>();
            tile_load<5>(low_rows, stride);
            if (TWO) tile_multiply<1, 4, 7>();
            tile_load<4>(high_rows, stride);
            if (TWO) tile_load<7, ONCE>(right, line);
        }
        tile_multiply<0, 4, 6>(), tile_multiply<2, 5, 6>();
        if (TWO) tile_multiply<3, 5, 7>(), tile_multiply<1, 4, 7>();
        tile_store<0>(c, row), tile_store<2>(low, row);
        if (TWO) tile_store<1>(c + 16, row), tile_store<3>(low + 16, row);
    }
};
#endif

// -- packing b --

// Pairs of rows k.. of a panel from column j, `count` of them; zero where b has none.
static void pack_columns(const Product& g, int64_t k, int64_t depth, int64_t j, int64_t count, uint32_t* to) {
    const int64_t width = min(LANES, g.n - j), stride = g.b_stride, line = 16;
    const int64_t whole = width == LANES && stride % 2 == 0 ? depth / (2 * line) * line : 0;
    const bf16* from = g.b + j * stride + k;
    for (int64_t p = 0; p < whole; p += line)  // a line of every column
        for (int64_t c = 0; c < LANES; c += 4)
            for (int64_t q = p; q < p + line; q += 4)
                transpose_square<float>(
                    reinterpret_cast<const float*>(from + c * stride + 2 * q), stride / 2,
                    reinterpret_cast<float*>(to + q * LANES + c), LANES);
    memset(to + whole * LANES, 0, (count - whole) * LANES * sizeof *to);
    for (int64_t c = 0; c < width; c++)
        for (int64_t i = 2 * whole; i < depth; i++)
            to[i / 2 * LANES + c] |= uint32_t(from[c * stride + i]) << i % 2 * 16;
}

// Two rows of b as pairs, or as elements of their own; `count` apart from one panel to the next.
template <class Unit>
static inline void pack_rows(const bf16* low, const bf16* high, int64_t width, int64_t count, float* to) {
    for (; width > 0; width -= LANES, low += LANES, high += LANES, to += count * LANES)
        for (int64_t c = 0; c < min(LANES, width); c++) {
            if (Unit::PER == 2) to[c] = bits<float>(low[c] | uint32_t(high[c]) << 16);
            else to[c] = widen(low[c]), to[LANES + c] = widen(high[c]);
        }
}

// Rows k.. of columns j0.. to j1 of b as panels of `count` elements. room: for half of a panel.
template <class Unit>
static void pack(
    const Product& g, int64_t k, int64_t depth, int64_t j0, int64_t j1, int64_t count, float* to, char* room) {
    const int64_t panels = blocks(j1 - j0, LANES);
    if (!g.b_by_columns) {
        const bf16 none[Unit::COLUMNS] = {};
        if (depth % (Unit::STEP * Unit::PER) || (j1 - j0) % LANES)
            memset(to, 0, panels * count * LANES * sizeof *to);
        for (int64_t i = 0; i < depth; i += 2) {
            const bf16* low = g.b + (k + i) * g.b_stride + j0;
            const bf16* high = i + 1 < depth ? low + g.b_stride : none;
            pack_rows<Unit>(low, high, j1 - j0, count, to + i / Unit::PER * LANES);
        }
        return;
    }
    for (int64_t panel = 0; panel < panels; panel++, to += count * LANES) {
        const int64_t j = j0 + panel * LANES;
        if (Unit::PER == 2) {
            pack_columns(g, k, depth, j, count, reinterpret_cast<uint32_t*>(to));
            continue;
        }
        uint32_t* pairs = reinterpret_cast<uint32_t*>(room);
        pack_columns(g, k, depth, j, count / 2, pairs);
        for (int64_t p = 0; p < count / 2; p++)
            for (int64_t c = 0; c < LANES; c++) {
                to[2 * p * LANES + c] = bits<float>(pairs[p * LANES + c] << 16);
                to[(2 * p + 1) * LANES + c] = bits<float>(pairs[p * LANES + c] & 0xffff0000u);
            }
    }
}

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
        case 2: return tiles_allowed() ? Size<Tiled>::bytes(k) : 0;
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
        case 2: return product<Tiled>(*g);
#endif
    }
}
