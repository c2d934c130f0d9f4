// AMX's eight tiles of 16 rows by 64 bytes, as instructions or, where a test asks for it
// (-DEMULATE_TILES), in plain C++: the blocking around them is the same.
#pragma once
#include <cstdint>
#include <cstring>

#include "scalar.h"

enum Use { AGAIN, ONCE };  // what is loaded once need not stay in the first cache

#if defined(EMULATE_TILES)
#define TILES 1

static thread_local uint8_t tile_bytes[8][16][64];

static inline bool tiles_allowed() { return true; }

class Tiles {};

template <int T>
static inline void tile_zero() { memset(tile_bytes[T], 0, sizeof tile_bytes[T]); }

template <int T, Use = AGAIN>
static inline void tile_load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; i++)
        memcpy(tile_bytes[T][i], static_cast<const char*>(from) + i * stride, 64);
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(static_cast<char*>(to) + i * stride, tile_bytes[T][i], 64);
}

template <int C, int A, int B>
static inline void tile_multiply() {
    float c[16][16];
    bf16 a[16][16][2], b[16][16][2];
    memcpy(c, tile_bytes[C], sizeof c);
    memcpy(a, tile_bytes[A], sizeof a);
    memcpy(b, tile_bytes[B], sizeof b);
    for (int i = 0; i < 16; i++)
        for (int p = 0; p < 16; p++)
            for (int j = 0; j < 16; j++)
                for (int half = 0; half < 2; half++)
                    c[i][j] += widen(a[i][p][half]) * widen(b[p][j][half]);
    memcpy(tile_bytes[C], c, sizeof c);
}

#elif defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>

// Whether the system lets this process use tiles: it must be asked, once.
static inline bool tiles_allowed() {
    const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, request, tile_data) == 0;
    return allowed;
}

// All tiles at their full size, until the end of the scope: a library may rely on its own setting.
class Tiles {
    struct alignas(64) Setting {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } before;

    static void set(const Setting& setting) { asm volatile("ldtilecfg %0" ::"m"(setting)); }

   public:
    Tiles() {
        asm volatile("sttilecfg %0" : "=m"(before));
        Setting full = {};
        full.palette = 1;
        for (int t = 0; t < 8; t++) full.bytes[t] = 64, full.rows[t] = 16;
        set(full);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() {
        if (before.palette)
            set(before);
        else
            asm volatile("tilerelease");
    }
};

template <int T>
static inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }

template <int T, Use USE = AGAIN>
static inline void tile_load(const void* from, int64_t stride) {
    if (USE == ONCE)
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    else
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A times B: A 16 rows of 16 pairs, B 16 rows (of pairs) of 16 columns.
template <int C, int A, int B>
static inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else
static inline bool tiles_allowed() { return false; }
#endif
