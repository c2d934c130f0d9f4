// Products by AMX: two tiles of a times two of b.
//
// A task packs its part of b into the second cache. Then it takes 32 rows of a at a time: it packs
// a part of them into the first cache, where each of b's panels meets it, while the part after it
// is fetched. So a large factor, a weight or a gradient, is best on the left: it is read once.
#pragma once
#include "product.h"
#include "tiles.h"

#ifdef TILES
struct Tiled {
    static constexpr int64_t PER = 2, STEP = 16, COLUMNS = 1024;  // of `pack`; most of a task
    static constexpr int64_t ROWS = 32, WIDE = 32;                 // of a, and k of a tile
    static constexpr int64_t DEPTH = 512;                          // of a packed block
    static constexpr int64_t B = 1 << 19;                          // elements of a packed part of b
    static constexpr int64_t WHOLE = 1024;  // depth up to which sums need not wait for another part
    static constexpr int64_t WAITING = 1 << 18;  // sums that wait, of a task
    static constexpr int64_t NARROW = 64;        // columns for which packing a costs more than it saves

    static int64_t part(int64_t k) { return k <= WHOLE ? round_up(k, WIDE) : WHOLE; }

    // Multiples of a tile: what a task has is rounded up to them, and must fit all the same.
    static int64_t columns(int64_t k) { return min(COLUMNS, B / part(k) / WIDE * WIDE); }
    static int64_t waiting_rows(int64_t columns) { return WAITING / columns / ROWS * ROWS; }

    static bool waits(int64_t k) { return k > part(k); }

    static int64_t bytes(int64_t k) {
        return B * sizeof(bf16) + ROWS * DEPTH * sizeof(bf16)
               + (waits(k) ? WAITING : ROWS * COLUMNS) * sizeof(float);
    }
};

// 32 rows of a, some of k: tiles below each other, `step` elements from one to the next in k.
struct Block {
    const bf16* first;
    int64_t stride, step;
};

// What of a comes next, a line from two rows with every tile.
struct Ahead {
    const bf16* at;
    int64_t step, other;
};

// 32 rows of a, or fewer, as they lie.
static void pack_block_of_rows(const bf16* from, int64_t stride, int64_t rows, int64_t depth, bf16* to) {
    constexpr int64_t ROWS = Tiled::ROWS, WIDE = Tiled::WIDE;
    const int64_t whole = depth / WIDE * WIDE;
    if (rows < ROWS || whole < depth) memset(to, 0, ROWS * round_up(depth, WIDE) * sizeof *to);
    for (int64_t r = 0; r < rows; r++, from += stride, to += WIDE) {
        for (int64_t p = 0; p < whole; p += WIDE) memcpy(to + p * ROWS, from + p, WIDE * sizeof *to);
        if (whole < depth) memcpy(to + whole * ROWS, from + whole, (depth - whole) * sizeof *to);
    }
}

// The same of 32 columns, or fewer.
static void pack_block_of_columns(const bf16* from, int64_t stride, int64_t columns, int64_t depth, bf16* to) {
    constexpr int64_t ROWS = Tiled::ROWS, WIDE = Tiled::WIDE, N = 8;
    for (int64_t p = 0; p < depth; p += WIDE, to += ROWS * WIDE) {
        alignas(64) bf16 edge[WIDE * ROWS];
        const bf16* source = from + p * stride;
        int64_t apart = stride;
        if (columns < ROWS || depth - p < WIDE) {
            memset(edge, 0, sizeof edge);
            for (int64_t q = 0; q < min(WIDE, depth - p); q++)
                memcpy(edge + q * ROWS, source + q * stride, columns * sizeof *to);
            source = edge, apart = ROWS;
        }
        for (int64_t q = 0; q < WIDE; q += N)
            for (int64_t r = 0; r < ROWS; r += N)
                transpose_square<bf16>(source + q * apart + r, apart, to + r * WIDE + q, WIDE);
    }
}

// c = (c +) a * b, for 32 rows and one or two panels, `apart` elements from one to the other. c: four
// tiles, left above, right above, left below, right below.
template <int PANELS>
static void multiply_tiles(
    const Block& a, const float* b, int64_t apart, int64_t steps, float* c, bool more, const Ahead& ahead) {
    constexpr bool TWO = PANELS == 2;
    constexpr int64_t LINE = 64, TILE = 16 * LANES;
    const int64_t stride = a.stride * sizeof *a.first;
    if (more) {
        tile_load<0>(c, LINE), tile_load<2>(c + 2 * TILE, LINE);
        if (TWO) tile_load<1>(c + TILE, LINE), tile_load<3>(c + 3 * TILE, LINE);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    const bf16 *high = a.first, *low = a.first + 16 * a.stride, *next = ahead.at;
    const float *left = b, *right = b + apart;
    tile_load<4>(high, stride), tile_load<6, ONCE>(left, LINE);
    tile_load<5>(low, stride);
    if (TWO) tile_load<7, ONCE>(right, LINE);
    for (int64_t p = 1; p < steps; p++) {  // a tile's next load follows its last use
        high += a.step, low += a.step, left += TILE, right += TILE;
        tile_multiply<0, 4, 6>(), tile_multiply<2, 5, 6>();
        tile_load<6, ONCE>(left, LINE);
        if (TWO) tile_multiply<3, 5, 7>();
        tile_load<5>(low, stride);
        if (TWO) tile_multiply<1, 4, 7>();
        tile_load<4>(high, stride);
        if (TWO) tile_load<7, ONCE>(right, LINE);
        fetch(next), fetch(next + ahead.other);
        next += ahead.step;
    }
    tile_multiply<0, 4, 6>(), tile_multiply<2, 5, 6>();
    if (TWO) tile_multiply<3, 5, 7>(), tile_multiply<1, 4, 7>();
    tile_store<0>(c, LINE), tile_store<2>(c + 2 * TILE, LINE);
    if (TWO) tile_store<1>(c + TILE, LINE), tile_store<3>(c + 3 * TILE, LINE);
    fetch(next), fetch(next + ahead.other);
}

// Sums of a row and a pair of panels, with what is added, as bf16.
static inline void finish_row(
    const Product& g, const float* sums, int64_t i, int64_t j, int64_t width, bf16* __restrict to) {
    alignas(64) float row[2 * LANES];
    for (int64_t c = 0; c < LANES; c++) row[c] = sums[c];
    for (int64_t c = 0; c < LANES; c++) row[LANES + c] = sums[16 * LANES + c];
    if (g.bias)
        for (int64_t c = 0; c < width; c++) row[c] += g.bias[g.bias_of_rows ? i : j + c];
    if (g.other) {
        const bf16* other = g.other + i * g.other_down + j * g.other_across;
        for (int64_t c = 0; c < width; c++) row[c] += widen(other[c * g.other_across]);
    }
    for (int64_t c = 0; c < 2 * LANES; c++) to[c] = narrow<bf16>(row[c]);
}

// Sums of 32 rows, or fewer, and columns j0 to j1, with what is added, to c.
static void finish_tiles(const Product& g, const float* sums, int64_t i, int64_t rows, int64_t j0, int64_t j1) {
    constexpr int64_t TILE = 16 * LANES, WIDE = 2 * LANES, ROWS = Tiled::ROWS;
    auto row_of = [&](int64_t r, int64_t j) { return sums + (j - j0) * ROWS + r / 16 * 2 * TILE + r % 16 * LANES; };
    if (g.c_by_columns) {
        alignas(64) bf16 block[ROWS * WIDE];
        for (int64_t j = j0; j < j1; j += WIDE) {
            const int64_t width = min(WIDE, j1 - j);
            for (int64_t r = 0; r < rows; r++) finish_row(g, row_of(r, j), i + r, j, width, block + r * WIDE);
            transpose_tile(block, WIDE, rows, width, g.c + j * g.c_stride + i, g.c_stride);
        }
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = j0; j < j1; j += WIDE) {
            alignas(64) bf16 line[WIDE];
            bf16* to = g.c + (i + r) * g.c_stride + j;
            finish_row(g, row_of(r, j), i + r, j, min(WIDE, j1 - j), line);
            if (j1 - j < WIDE) memcpy(to, line, (j1 - j) * sizeof *to);
            else stream(line, to, sizeof line);
        }
}

static void task_of_tiles(const Product& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1, char* room) {
    constexpr int64_t ROWS = Tiled::ROWS, WIDE = Tiled::WIDE, PAIR = 2 * LANES, PER = Tiled::PER;
    const int64_t part = Tiled::part(g.k), stride = g.a_stride, width = round_up(j1 - j0, PAIR);
    float* b = reinterpret_cast<float*>(room);
    bf16* some = reinterpret_cast<bf16*>(b) + Tiled::B;
    float* waiting = reinterpret_cast<float*>(some + ROWS * Tiled::DEPTH);
    Tiles scope;
    for (int64_t k = 0; k < g.k; k += part) {
        const int64_t depth = min(part, g.k - k), count = round_up(depth, WIDE) / PER;
        pack<Tiled>(g, k, depth, j0, j1, count, b, nullptr);
        for (int64_t i = i0; i < i1; i += ROWS) {
            const int64_t rows = min(ROWS, i1 - i);
            float* sums = waiting + (Tiled::waits(g.k) ? (i - i0) * width : 0);
            for (int64_t p = 0; p < depth; p += Tiled::DEPTH) {
                const int64_t deep = min(Tiled::DEPTH, depth - p);
                const bool in_place = j1 - j0 <= Tiled::NARROW && rows == ROWS && deep % WIDE == 0
                                      && !g.a_by_columns;
                Block a{g.a + i * stride + k + p, stride, WIDE};
                if (!in_place) {
                    if (g.a_by_columns)
                        pack_block_of_columns(g.a + (k + p) * stride + i, stride, rows, deep, some);
                    else
                        pack_block_of_rows(g.a + i * stride + k + p, stride, rows, deep, some);
                    a = {some, WIDE, ROWS * WIDE};
                }
                const bool below = p + Tiled::DEPTH >= depth;
                const int64_t next_i = below ? i + ROWS : i, next_k = below ? k : k + p + Tiled::DEPTH;
                for (int64_t j = 0; j < j1 - j0; j += PAIR) {
                    Ahead ahead{a.first, 0, 0};
                    const int64_t pair = j / PAIR;
                    if (next_i < i1 && pair < 16) {
                        if (g.a_by_columns)
                            ahead = {g.a + (next_k + pair * 32) * stride + next_i, 2 * stride, stride};
                        else
                            ahead = {g.a + (next_i + 2 * pair) * stride + next_k, WIDE, stride};
                    }
                    auto multiply = j1 - j0 - j > LANES ? multiply_tiles<2> : multiply_tiles<1>;
                    multiply(
                        a, b + j * count + p / PER * LANES, count * LANES, blocks(deep, WIDE),
                        sums + j * ROWS, k + p > 0, ahead);
                }
            }
            if (k + part >= g.k)
                finish_tiles(g, sums, i, rows, j0, j1);
        }
    }
#ifdef __SSE2__
    _mm_sfence();
#endif
}

static void product_of_tiles(const Product& g) {
    if (!g.m || !g.n) return;
    const int64_t PAIR = 2 * LANES, most = Tiled::columns(g.k), bytes = Tiled::bytes(g.k);
    int64_t across = blocks(g.n, most), down = blocks(g.m, FEW_ROWS);
    while (across * down < 2 * g.threads && g.n > 2 * PAIR * across) across *= 2;  // some for each thread
    const int64_t columns = round_up(blocks(g.n, across), PAIR);
    across = blocks(g.n, columns);
    int64_t slab = max(FEW_ROWS, blocks(g.m, blocks(2 * g.threads, across)));
    if (Tiled::waits(g.k)) slab = min(slab, Tiled::waiting_rows(columns));
    down = blocks(g.m, slab);
    slab = round_up(blocks(g.m, down), Tiled::ROWS);
    members(g.threads, across * down, g.m * g.n * g.k / 16, [&](int64_t k, int64_t member) {
        const int64_t i = k % down * slab, j = k / down * columns;
        if (i < g.m && j < g.n)
            task_of_tiles(
                g, i, min(g.m, i + slab), j, min(g.n, j + columns), g.room + member * bytes);
    });
}
#endif
