// Runs kernels of some libraries for a process of another architecture, which has the tensors: reads
// calls from its standard input and writes what they leave in memory to its standard output.
//
// A call is a Head, the sizes of its blocks of memory and their addresses modulo LINE, the record's
// words, for each the block that it points into or -1, and the blocks. The answer is the blocks.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

const int64_t LINE = 64;

struct Head {
    char name[48];
    int64_t words, blocks;
};

static bool read_all(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

static std::vector<int64_t> read_words(int64_t count) {
    std::vector<int64_t> words(count);
    if (!read_all(words.data(), 8 * count)) exit(3);
    return words;
}

static void answer(void (*kernel)(const void*), const Head& head) {
    auto sizes = read_words(head.blocks), phases = read_words(head.blocks);
    auto record = read_words(head.words), pointed = read_words(head.words);
    std::vector<std::vector<char>> room;
    std::vector<char*> blocks;
    for (int64_t k = 0; k < head.blocks; k++) {
        room.emplace_back(sizes[k] + 2 * LINE);
        char* start = room.back().data();
        blocks.push_back(start + (LINE - reinterpret_cast<intptr_t>(start) % LINE) + phases[k]);
        if (!read_all(blocks[k], sizes[k])) exit(3);
    }
    for (int64_t k = 0; k < head.words; k++)
        if (pointed[k] >= 0) record[k] += reinterpret_cast<int64_t>(blocks[pointed[k]]);
    kernel(record.data());
    for (int64_t k = 0; k < head.blocks; k++) fwrite(blocks[k], 1, sizes[k], stdout);
    fflush(stdout);
}

int main(int, char** arguments) {
    std::vector<void*> libraries;
    while (*++arguments) {
        libraries.push_back(dlopen(*arguments, RTLD_NOW));
        if (!libraries.back()) return fprintf(stderr, "%s\n", dlerror()), 1;
        auto threads = reinterpret_cast<void (*)(decltype(&GOMP_parallel))>(
            dlsym(libraries.back(), "opsgraph_threads"));
        threads(GOMP_parallel);
    }
    for (Head head; read_all(&head, sizeof head);) {
        void* kernel = nullptr;
        for (void* library : libraries)
            if (!kernel) kernel = dlsym(library, head.name);
        if (!kernel) return fprintf(stderr, "no %s\n", head.name), 2;
        answer(reinterpret_cast<void (*)(const void*)>(kernel), head);
    }
}
