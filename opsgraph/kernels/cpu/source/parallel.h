// Rows shared out among the threads that PyTorch has: its own OpenMP runtime is used, found by the
// caller, so that no second pool of threads waits beside it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Fork fork_join = nullptr;  // GOMP_parallel, or null: one thread

const int64_t WORTH = 32768;  // elements below which waking a thread costs more than it does
const int64_t BLOCK = 128;    // rows at a time: some lines of each column of a transposed copy

// Calls run(k) for every k below count. Which thread takes which k varies; results must not.
template <class Run>
static void parallel(int64_t threads, int64_t count, int64_t work, const Run& run) {
    threads = std::min(threads, count);
    if (threads <= 1 || fork_join == nullptr || work < WORTH) {
        for (int64_t k = 0; k < count; k++) run(k);
        return;
    }
    struct Team {
        const Run& run;
        int64_t count;
        std::atomic<int64_t> next;
    } team{run, count, {0}};
    auto member = [](void* given) {
        Team& team = *static_cast<Team*>(given);
        for (int64_t k; (k = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;)
            team.run(k);
    };
    fork_join(member, &team, unsigned(threads), 0);
}

// Shares of rows: as many whatever the number of threads, so that sums over rows are the same bits.
struct Shares {
    int64_t rows, step, count;
    explicit Shares(int64_t rows) : rows(rows) {
        int64_t unit = rows >= 8 * BLOCK ? BLOCK : rows >= 2 * BLOCK ? BLOCK / 4 : 8;
        step = std::max(unit, (rows + 64 * unit - 1) / (64 * unit) * unit);
        count = (rows + step - 1) / step;
    }
};

// Calls run(begin, end, share) for blocks of at most BLOCK rows, those of a share in order.
template <class Run>
static void over_rows(int64_t threads, const Shares& shares, int64_t width, const Run& run) {
    parallel(threads, shares.count, shares.rows * width, [&](int64_t share) {
        int64_t end = std::min(shares.rows, (share + 1) * shares.step);
        for (int64_t row = share * shares.step; row < end; row += BLOCK)
            run(row, std::min(end, row + BLOCK), share);
    });
}

// Column sums: a partial row for each share, added up in the order of the shares.
class ColumnSums {
    float* out;
    int64_t width;
    Shares shares;
    std::unique_ptr<float[]> partial;

   public:
    ColumnSums(float* out, int64_t width, const Shares& shares)
        : out(out), width(width), shares(shares) {
        if (out && shares.count > 1) partial.reset(new float[shares.count * width]);
    }

    // Where a share sums up; zero when the share begins, which is when it asks for its first block.
    float* of(int64_t share, int64_t row) {
        if (!out) return nullptr;
        float* sums = shares.count > 1 ? partial.get() + share * width : out;
        if (row == share * shares.step) std::fill(sums, sums + width, 0.0f);
        return sums;
    }

    void finish(int64_t threads) {
        if (!out || shares.count <= 1) return;
        const int64_t block = 1024;
        parallel(threads, (width + block - 1) / block, shares.count * width, [&](int64_t k) {
            int64_t first = k * block, count = std::min(block, width - first);
            std::copy_n(partial.get() + first, count, out + first);
            for (int64_t share = 1; share < shares.count; share++) {
                const float* __restrict from = partial.get() + share * width + first;
                float* __restrict to = out + first;
                for (int64_t j = 0; j < count; j++) to[j] += from[j];
            }
        });
    }
};
