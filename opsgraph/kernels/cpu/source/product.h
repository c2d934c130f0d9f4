// What all units share: a product's record, and the panels that b is packed into. Packed elements have
// 4 bytes: floats, or pairs of bf16 from two rows for the instructions that multiply pairs.
#pragma once
#include "parallel.h"
#include "scalar.h"
#include "transpose.h"

struct Product {
    int64_t threads, unit, m, n, k;
    const bf16* a;
    int64_t a_stride, a_by_columns;
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
constexpr int64_t FEW_ROWS = 512;  // with fewer, a task's time is that of packing b

static constexpr int64_t blocks(int64_t count, int64_t of) { return (count + of - 1) / of; }

static constexpr int64_t round_up(int64_t count, int64_t of) { return blocks(count, of) * of; }

// -- packing b --

constexpr int64_t SOON = 8;  // rows until they are packed

// A line into the second cache; of an address that nothing has, nothing.
static inline void fetch(const bf16* line) { __builtin_prefetch(line, 0, 2); }

// Pairs of rows k.. of a panel from column j, `count` of them; zero where b has none.
static void pack_columns(const Product& g, int64_t k, int64_t depth, int64_t j, int64_t count, uint32_t* to) {
    const int64_t width = min(LANES, g.n - j), stride = g.b_stride, line = 16;
    const int64_t whole = width == LANES && stride % 2 == 0 ? depth / (2 * line) * line : 0;
    const bf16* from = g.b + j * stride + k;
    for (int64_t p = 0; p < whole; p += line)  // a line of every column
        for (int64_t c = 0; c < LANES; c += 4) {
            for (int64_t i = c; i < c + 4; i++) fetch(from + (LANES + i) * stride + 2 * p);  // the next panel's
            for (int64_t q = p; q < p + line; q += 4)
                transpose_square<float>(
                    reinterpret_cast<const float*>(from + c * stride + 2 * q), stride / 2,
                    reinterpret_cast<float*>(to + q * LANES + c), LANES);
        }
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
            for (int64_t c = 0; c < j1 - j0; c += 32)  // a line of either row, long before its use
                fetch(low + SOON * g.b_stride + c), fetch(low + (SOON + 1) * g.b_stride + c);
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
