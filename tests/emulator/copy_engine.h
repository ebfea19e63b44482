// Copies from global to shared memory that run beside the threads: boxes of tensors and plain bytes by the engine of a
// block (TMA), in any order, and those that a thread orders and waits for itself (cp.async). And copies the other way
// round, of bytes, which a thread waits for, too.
#pragma once
#include <vector>

#include "barriers.h"

namespace emulator {

// What tests/emulator/device.py writes where the driver would write its descriptor; innermost axis first.
struct TensorMapContent {
    char const* address;
    u64 lengths[5];
    u64 strides[4];  // in bytes; elements of 2 bytes are neighbours
    u32 box[5];
    u32 rank;
};

struct Copy {
    u32 target;
    int bytes;
    Place by;
    char const* source;                     // of plain bytes
    Mbarrier* barrier = nullptr;            // null if a thread waits for it itself
    TensorMapContent const* map = nullptr;  // of a box
    std::vector<int> corner = {};
};

// From shared to global memory.
struct BulkStore {
    char* target;
    u32 source;
    int bytes;
    Place by;
};

struct CopyEngine : Agent {
    Block& block;
    std::vector<Copy> copies;

    explicit CopyEngine(Block& block) : block(block) {}
    bool ready() const override { return !copies.empty(); }
    void step() override;
    void order(Copy const& copy);
};

}  // namespace emulator
