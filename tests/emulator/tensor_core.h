// Products of warpgroups (wgmma), which a tensor core computes some time after all four warps have issued them.
//
// Registers that belong to a product in flight hold a pattern that shows when they are written, and results appear in
// them when the thread has waited.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "report.h"
#include "scheduler.h"

namespace emulator {

// Accumulators of a warpgroup, by row.
using Sums = std::vector<float>;

struct Product {
    ProductKind kind;
    Place by;
    std::shared_ptr<Sums> sums;
    int issued = 0;   // threads that have issued it
    int settled = 0;  // threads that have seen its end
    u32 const* a_registers[128] = {};
    u32 a_words[128][4] = {};  // what was in them
};

struct TensorCore : Agent {
    Block& block;
    int warpgroup;
    int registers;                 // per thread
    std::deque<Product> products;  // that some thread has not seen the end of
    u64 first = 0;                 // number of the first of them
    u64 executed = 0;              // how many are done, of all
    Waiters waiters;

    TensorCore(Block& block, int warpgroup, int registers) : block(block), warpgroup(warpgroup), registers(registers) {}
    bool ready() const override;
    void step() override;
    Product& product(u64 number) { return products[number - first]; }
    void mark_reads(Product const& product, int by);
};

// What a thread has issued.
struct IssuedProducts {
    struct Accumulator {
        std::shared_ptr<Sums> sums;
        float* registers;
        int tiles;
        u64 last;  // number of the last product on it
    };
    u64 issued = 0, settled = 0;
    std::deque<u64> commits;  // what was issued up to the end of each group
    bool has_arrived = false;
    std::vector<Accumulator> accumulators;
};

}  // namespace emulator
