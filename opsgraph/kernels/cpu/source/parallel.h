// Rows shared out among the threads that PyTorch has: its own OpenMP runtime is used, found by the
// caller, so that no second pool of threads waits beside it.
#pragma once
#include <cstdint>
#include <cstring>

// What another language calls.
#define EXPORT extern "C" __attribute__((visibility("default")))

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Fork fork_join = nullptr;  // GOMP_parallel, or null: one thread

EXPORT void opsgraph_threads(Fork found) { fork_join = found; }

const int64_t WORTH = 32768;  // elements below which waking a thread costs more than it does
const int64_t BLOCK = 128;    // rows at a time: some lines of each column of a transposed copy

// Here and not from <algorithm> and <memory>: to parse these takes longer than to compile a kernel.
template <class T>
static constexpr inline T min(T a, T b) { return b < a ? b : a; }

template <class T>
static constexpr inline T max(T a, T b) { return a < b ? b : a; }

// An array with memory of its own, which is not there for a count of 0.
template <class T>
class Room {
    T* const first;

   public:
    explicit Room(int64_t count) : first(count ? new T[count] : nullptr) {}
    Room(const Room&) = delete;
    ~Room() { delete[] first; }
    T* data() const { return first; }
};

// Calls run(k, member) for every k below count. Which member, of as many as threads, takes which k
// varies; results must not.
template <class Run>
static void members(int64_t threads, int64_t count, int64_t work, const Run& run) {
    threads = min(threads, count);
    if (threads <= 1 || fork_join == nullptr || work < WORTH) {
        for (int64_t k = 0; k < count; k++) run(k, 0);
        return;
    }
    struct Team {
        const Run& run;
        int64_t count, next, members;
    } team{run, count, 0, 0};
    auto member = [](void* given) {
        Team& team = *static_cast<Team*>(given);
        const int64_t own = __atomic_fetch_add(&team.members, 1, __ATOMIC_RELAXED);
        for (int64_t k; (k = __atomic_fetch_add(&team.next, 1, __ATOMIC_RELAXED)) < team.count;)
            team.run(k, own);
    };
    fork_join(member, &team, unsigned(threads), 0);
}

// Calls run(k) for every k below count.
template <class Run>
static void parallel(int64_t threads, int64_t count, int64_t work, const Run& run) {
    members(threads, count, work, [&](int64_t k, int64_t) { run(k); });
}

// Shares of rows: as many whatever the number of threads, so that sums over rows are the same bits.
struct Shares {
    int64_t rows, step, count;
    explicit Shares(int64_t rows) : rows(rows) {
        int64_t unit = rows >= 8 * BLOCK ? BLOCK : rows >= 2 * BLOCK ? BLOCK / 4 : 8;
        step = max(unit, (rows + 64 * unit - 1) / (64 * unit) * unit);
        count = (rows + step - 1) / step;
    }
};

// Calls run(begin, end, share) for blocks of at most BLOCK rows, those of a share in order.
template <class Run>
static void over_rows(int64_t threads, const Shares& shares, int64_t width, const Run& run) {
    parallel(threads, shares.count, shares.rows * width, [&](int64_t share) {
        int64_t end = min(shares.rows, (share + 1) * shares.step);
        for (int64_t row = share * shares.step; row < end; row += BLOCK)
            run(row, min(end, row + BLOCK), share);
    });
}

// Column sums: a partial row for each share, added up in the order of the shares.
class ColumnSums {
    float* out;
    int64_t width;
    Shares shares;
    Room<float> partial;

   public:
    ColumnSums(float* out, int64_t width, const Shares& shares)
        : out(out), width(width), shares(shares),
          partial(out && shares.count > 1 ? shares.count * width : 0) {}

    // Where a share sums up; zero when the share begins, which is when it asks for its first block.
    float* of(int64_t share, int64_t row) {
        if (!out) return nullptr;
        float* sums = shares.count > 1 ? partial.data() + share * width : out;
        if (row == share * shares.step) memset(sums, 0, width * sizeof *sums);
        return sums;
    }

    void finish(int64_t threads) {
        if (!out || shares.count <= 1) return;
        const int64_t block = 1024;
        parallel(threads, (width + block - 1) / block, shares.count * width, [&](int64_t k) {
            int64_t first = k * block, count = min(block, width - first);
            memcpy(out + first, partial.data() + first, count * sizeof *out);
            for (int64_t share = 1; share < shares.count; share++) {
                const float* __restrict from = partial.data() + share * width + first;
                float* __restrict to = out + first;
                for (int64_t j = 0; j < count; j++) to[j] += from[j];
            }
        });
    }
};
