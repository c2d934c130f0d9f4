// The library that replays a stretch of a pass: one call for all of its launches and products.
//
// A stretch is a program of 8-byte words, written by `opsgraph/replay/native.py`. Nothing in it
// changes from call to call but where buffers begin, which the caller hands over. So a replay copies
// each step's record, writes addresses into the copy, and calls. It keeps no state: any number of
// threads may replay one program. Neither CUDA's headers nor PyTorch's are needed; what is called is
// declared here, and its address given once, by `opsgraph_replay_bind`.
#include "parallel.h"

using Word = int64_t;
using Tensor = struct Opaque*;

enum Opcode : Word { END, KERNEL, LAUNCH, ATEN, MATMUL };
enum Aten : Word { MM, ADDMM, BMM, COPY, ZERO, BADDBMM };
const int MOST_WORDS = 96, MOST_TENSORS = 8;
const Word NONE = -2, ARENA = -1;  // in the place of a buffer's number
const Word ALIGNMENT = 64;
const int DESCRIPTION = 64;  // words of a product's description, see library.py

// What is called, in the order in which `native.py` gives the addresses.
struct Called {
    int32_t (*from_blob)(
        void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
        Tensor*);
    int32_t (*release)(Tensor);
    int32_t (*copy)(Tensor, Tensor, int32_t);
    int32_t (*zero)(Tensor);
    // For the CPU, then for CUDA.
    int32_t (*mm[2])(Tensor, Tensor, Tensor);
    int32_t (*addmm[2])(Tensor, Tensor, Tensor, Tensor, double, double);
    int32_t (*bmm[2])(Tensor, Tensor, Tensor);
    int32_t (*baddbmm[2])(Tensor, Tensor, Tensor, Tensor, double, double);
    int32_t (*launch)(
        void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
        void**);
    int32_t (*matmul)(
        void*, void*, const float*, const void*, void*, const void*, void*, const float*,
        const void*, void*, void*, void*, const void*, void*, size_t, void*);
    int32_t (*attribute)(void*, int32_t, const void*, size_t);
    int32_t (*context)(void**);
    int32_t (*device)(int*, int);
    int32_t (*retain)(void**, int);
    int32_t (*set_context)(void*);
};
static Called called;

EXPORT void opsgraph_replay_bind(const Called* given) { called = *given; }

// Where buffers begin: the caller's, and the arena, which on the CPU is a block that a thread keeps.
class Buffers {
    const Word* given;
    Word arena = 0;

   public:
    Buffers(const Word* given, Word size) : given(given) {
        struct Block {
            char* memory = nullptr;
            Word size = 0;
            ~Block() { delete[] memory; }
        };
        static thread_local Block block;
        if (size > block.size) {
            delete[] block.memory;
            block.memory = new char[size + ALIGNMENT];
            block.size = size;
        }
        if (size) {
            Word start = reinterpret_cast<Word>(block.memory) + ALIGNMENT - 1;
            arena = start - start % ALIGNMENT;
        }
    }

    Word operator[](Word number) const {
        return number == ARENA ? arena : given[number];
    }
};

// A tensor over a caller's memory, for one call of PyTorch's: [buffer, offset, dtype, device type,
// device index, dimensions, sizes, strides].
class Tensors {
    Tensor made[MOST_TENSORS];
    int count = 0;

   public:
    bool failed = false;

    ~Tensors() {
        for (int i = 0; i < count; i++)
            if (made[i]) called.release(made[i]);
    }

    const Word* add(const Word* at, const Buffers& buffers) {
        Tensor tensor = nullptr;
        Word dimensions = at[5];
        if (at[0] != NONE) {
            void* data = reinterpret_cast<void*>(buffers[at[0]] + at[1]);
            failed |= called.from_blob(
                data, dimensions, at + 6, at + 6 + dimensions, 0, static_cast<int32_t>(at[2]),
                static_cast<int32_t>(at[3]), static_cast<int32_t>(at[4]), &tensor);
        }
        made[count++] = tensor;
        return at + 6 + 2 * dimensions;
    }

    Tensor operator[](int i) const { return made[i]; }
};

// [kind, on CUDA, count of tensors, tensors, beta, alpha]; returns an error code, 0 for none.
static int64_t aten(const Word* at, const Buffers& buffers) {
    Word kind = at[0], cuda = at[1], count = at[2];
    Tensors t;
    at += 3;
    for (Word i = 0; i < count; i++) at = t.add(at, buffers);
    if (t.failed) return 1;
    double scalars[2];
    std::memcpy(scalars, at, sizeof scalars);
    switch (kind) {
        case MM: return called.mm[cuda](t[0], t[1], t[2]);
        case ADDMM: return called.addmm[cuda](t[0], t[1], t[2], t[3], scalars[0], scalars[1]);
        case BMM: return called.bmm[cuda](t[0], t[1], t[2]);
        case BADDBMM: return called.baddbmm[cuda](t[0], t[1], t[2], t[3], scalars[0], scalars[1]);
        case COPY: return called.copy(t[0], t[1], 0);
        case ZERO: return called.zero(t[0]);
    }
    return -1;
}

// A thread that has done nothing on CUDA has no context: it gets the device's.
static int64_t in_context(Word device) {
    void* context = nullptr;
    int number = 0;
    if (int32_t error = called.context(&context)) return error;
    if (context) return 0;
    if (int32_t error = called.device(&number, static_cast<int>(device))) return error;
    if (int32_t error = called.retain(&context, number)) return error;
    return called.set_context(context);
}

// [handle, description, layouts of b, a, c and the result, algorithm, addresses of alpha and beta,
// bytes of the workspace, (buffer, offset) of b, a, c, the result and the workspace, count of
// pointers, (attribute, buffer, offset) of each]
static int64_t matmul(const Word* at, const Buffers& buffers, void* stream) {
    void* fixed[9];
    void* memory[5];
    Word description[DESCRIPTION];
    for (int i = 0; i < 9; i++) fixed[i] = reinterpret_cast<void*>(at[i]);
    for (int i = 0; i < 5; i++) {
        const Word* place = at + 10 + 2 * i;
        memory[i] = place[0] == NONE ? nullptr
                                     : reinterpret_cast<void*>(buffers[place[0]] + place[1]);
    }
    const Word *pointer = at + 21, *end = pointer + 3 * at[20];
    if (pointer < end) {  // other threads set other addresses: it gets a copy
        std::memcpy(description, fixed[1], sizeof description);
        fixed[1] = description;
    }
    for (; pointer < end; pointer += 3) {
        Word address = buffers[pointer[1]] + pointer[2];
        if (int32_t error = called.attribute(
                description, static_cast<int32_t>(pointer[0]), &address, sizeof address))
            return error;
    }
    return called.matmul(
        fixed[0], fixed[1], static_cast<const float*>(fixed[7]), memory[0], fixed[2], memory[1],
        fixed[3], static_cast<const float*>(fixed[8]), memory[2], fixed[4], memory[3], fixed[5],
        fixed[6], memory[4], static_cast<size_t>(at[9]), stream);
}

// Runs a program: the bytes of an arena that the library is to provide and CUDA's device or -1, then steps
// of [opcode, line, length of the rest, rest]. given: where each buffer begins. stream: CUDA's. Returns 0, or, where
// something failed, its line + 1 and what it returned times 2^32.
EXPORT int64_t opsgraph_replay(const Word* at, const Word* given, void* stream) {
    Buffers buffers(given, at[0]);
    Word words[MOST_WORDS];
    void* parameters[MOST_WORDS];
    if (at[1] >= 0)
        if (int64_t error = in_context(at[1])) return (error << 32) + 1;
    for (at += 2; at[0] != END; at += 3 + at[2]) {
        const Word* rest = at + 3;
        int64_t error = 0;
        if (at[0] == ATEN) {
            error = aten(rest, buffers);
        } else if (at[0] == MATMUL) {
            error = matmul(rest, buffers, stream);
        } else {
            // [function, grid (3), threads, shared memory, count of words, of addresses among them,
            // (word, buffer, offset) of each, words]
            Word count = rest[6], addresses = rest[7];
            const Word* place = rest + 8;
            std::memcpy(words, place + 3 * addresses, sizeof(Word) * count);
            for (; addresses; addresses--, place += 3)
                words[place[0]] = buffers[place[1]] + place[2];
            if (at[0] == KERNEL) {
                reinterpret_cast<void (*)(const Word*)>(rest[0])(words);
            } else {
                for (Word i = 0; i < count; i++) parameters[i] = words + i;
                error = called.launch(
                    reinterpret_cast<void*>(rest[0]), static_cast<unsigned>(rest[1]),
                    static_cast<unsigned>(rest[2]), static_cast<unsigned>(rest[3]),
                    static_cast<unsigned>(rest[4]), 1, 1, static_cast<unsigned>(rest[5]), stream,
                    parameters, nullptr);
            }
        }
        if (error) return (error << 32) + at[1] + 1;
    }
    return 0;
}

// The same for callers in Python: functions that CPython calls as its own, with tensors as they are.
// Where each begins is found here, which in Python takes most of a call's time. CPython's headers
// are not needed either: objects are opaque, and these of its functions and PyTorch's are declared.
using Object = struct PyObject*;

struct Python {
    void* (*begins)(Object);  // PyTorch's, of a tensor; raises for one without memory
    Word (*to_number)(Object);
    Object (*from_number)(Word);
    void* (*release)();  // the interpreter's lock, and takes it again
    void (*acquire)(void*);
    void (*set_error)(Object, const char*);
    Object (*element)(Object, Word);  // of a tuple, borrowed
    Word (*size)(Object);
    Object (*item)(Object, Object);  // of a dict, borrowed; null for none
    const char* (*bytes)(Object);
    Object (*truth)(long);
    Object runtime_error;
    // PyTorch's, of the C++ tensor that a tensor's object holds so many bytes from where it begins.
    int32_t (*storage_size)(Tensor, int64_t*);
    int32_t (*storage_offset)(Tensor, int64_t*);
    int32_t (*elements)(Tensor, int64_t*);
    Word held;

    Tensor tensor(Object object) const {
        return reinterpret_cast<Tensor>(reinterpret_cast<char*>(object) + held);
    }

    Object no_memory() const {
        set_error(runtime_error, "got a tensor without memory");
        return nullptr;
    }
};
static Python python;

EXPORT void opsgraph_python_bind(const Python* given) { python = *given; }

// Where tensors begin; `failed` where one has no memory, and then Python has the error.
class Beginnings {
    Word few[64];
    Room<Word> many;

   public:
    Word* const at;
    bool failed = false;

    Beginnings(const Object* tensors, Word count) : many(count > 64 ? count : 0), at(count > 64 ? many.data() : few) {
        try {
            for (Word i = 0; i < count; i++)
                at[i] = reinterpret_cast<Word>(python.begins(tensors[i]));
        } catch (...) {
            python.no_memory();
            failed = true;
        }
    }
};

static Object run(Object program, const Beginnings& given, Object on) {
    auto at = reinterpret_cast<const Word*>(python.to_number(program));
    auto stream = reinterpret_cast<void*>(python.to_number(on));
    void* thread = python.release();
    int64_t failed = opsgraph_replay(at, given.at, stream);
    python.acquire(thread);
    return python.from_number(failed);
}

// program(stream, *tensors): runs the program at the address that `program` is, see opsgraph_replay.
EXPORT Object opsgraph_call(Object program, const Object* arguments, Word count) {
    Beginnings given(arguments + 1, count - 1);
    return given.failed ? nullptr : run(program, given, arguments[0]);
}

// launch(stream, *tensors): the same, unless one begins below `page` or where bits of its own are not 0:
// then it does nothing, and returns -1. known: the program; `page`; the bits of each.
EXPORT Object opsgraph_launch(Object known, const Object* arguments, Word count) {
    Beginnings given(arguments + 1, count - 1);
    if (given.failed) return nullptr;
    Word below = python.to_number(python.element(known, 1));
    auto bits = reinterpret_cast<const Word*>(python.bytes(python.element(known, 2)));
    for (Word i = 0; i < count - 1; i++)
        if (given.at[i] < below || given.at[i] & bits[i]) return python.from_number(-1);
    return run(python.element(known, 0), given, arguments[0]);
}

// bits(*tensors): the low bits of where they begin, below `page`, joined; -1 where one begins there.
EXPORT Object opsgraph_bits(Object page, const Object* tensors, Word count) {
    Beginnings given(tensors, count);
    if (given.failed) return nullptr;
    Word below = python.to_number(page), joined = 0;
    for (Word i = 0; i < count; i++) {
        if (given.at[i] < below) return python.from_number(-1);
        joined |= given.at[i] % below;
    }
    return python.from_number(joined);
}

// unmoved(): whether modules hold the tensors that they held, where these began and of as many elements.
// known: the modules' own dicts; "_buffers" and the names of some; the tensors, of each module in order;
// where they began; how many elements they had.
EXPORT Object opsgraph_unmoved(Object known, const Object*, Word) {
    Object hosts = python.element(known, 0), names = python.element(known, 1);
    Object tensors = python.element(known, 2);
    auto began = reinterpret_cast<const Word*>(python.bytes(python.element(known, 3)));
    auto sizes = reinterpret_cast<const Word*>(python.bytes(python.element(known, 4)));
    Object place = python.element(names, 0);
    Word count = python.size(names), number = 0;
    for (Word i = 0; i < python.size(hosts); i++) {
        Object buffers = python.item(python.element(hosts, i), place);
        for (Word k = 1; k < count; k++, number++) {
            Object tensor = python.element(tensors, number);
            if (!buffers || python.item(buffers, python.element(names, k)) != tensor)
                return python.truth(0);
            Beginnings now(&tensor, 1);
            if (now.failed) return nullptr;
            int64_t size = 0;
            if (python.elements(python.tensor(tensor), &size)) return python.no_memory();
            if (*now.at != began[number] || size != sizes[number]) return python.truth(0);
        }
    }
    return python.truth(1);
}

// short(*tensors): whether the storage of one ends before it does. needed: the bytes of an element and
// from its first to its last one's end, of each.
EXPORT Object opsgraph_short(Object needed, const Object* tensors, Word count) {
    auto bytes = reinterpret_cast<const Word*>(python.bytes(needed));
    for (Word i = 0; i < count; i++, bytes += 2) {
        Tensor tensor = python.tensor(tensors[i]);
        int64_t size = 0, first = 0;
        if (python.storage_size(tensor, &size) || python.storage_offset(tensor, &first))
            return python.no_memory();
        if (size - first * bytes[0] < bytes[1]) return python.truth(1);
    }
    return python.truth(0);
}
