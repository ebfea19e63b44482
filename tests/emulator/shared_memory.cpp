#include "shared_memory.h"

#include <cstring>

#include "block.h"

namespace emulator {

SharedMemory::SharedMemory(u32 bytes)
    : memory(bytes),
      readers((bytes + kChunk - 1) / kChunk),
      writers((bytes + kChunk - 1) / kChunk),
      is_barrier(bytes / 8),
      stores(bytes / 4) {
    fill(0, bytes, kEmpty);
}

void SharedMemory::check_bounds(u32 address, u32 bytes, u32 alignment, char const* what) const {
    if (address < kSharedBase || address + u64{bytes} > memory.size())
        error("%s of %u bytes at 0x%x, outside of shared memory", what, bytes, address);
    if (address % alignment != 0) error("%s at 0x%x, which is no multiple of %u", what, address, alignment);
}

void SharedMemory::fill(u32 address, u32 bytes, u32 word) {
    for (u32 i = 0; i < bytes; i += 4) std::memcpy(&memory[address + i], &word, 4);
}

void SharedMemory::check_store(u32 address, u32 bytes, char const* what) const {
    for (u32 at = address; at < address + bytes; at += kChunk) {
        if (readers[at / kChunk] != 0) error("%s to 0x%x, which a product in flight has yet to read", what, at);
        if (writers[at / kChunk] != 0) error("%s to 0x%x, to which a copy is on its way", what, at);
    }
    for (u32 at = address; at < address + bytes; at += 8)
        if (is_barrier[at / 8]) error("%s to 0x%x, where an mbarrier is", what, at);
}

void SharedMemory::store(u32 address, void const* source, u32 bytes, Place by) {
    check_bounds(address, bytes, bytes, "store");
    check_store(address, bytes, "store");
    std::memcpy(&memory[address], source, bytes);
    for (u32 at = address; at < address + bytes; at += 4)
        stores[at / 4] = Store{current->index, current->fences, by};
}

void SharedMemory::read_chunk(u32 address, void* target, Place by, Block const& block) const {
    check_bounds(address, kChunk, kChunk, "operand of a product");
    if (writers[address / kChunk] != 0)
        error("the product of %s reads 0x%x, to which a copy is on its way", line_of(by).c_str(), address);
    for (u32 at = address; at < address + kChunk; at += 4) {
        Store const& store = stores[at / 4];
        if (store.thread >= 0 && block.threads[store.thread].fences == store.fences)
            error("the product of %s reads 0x%x, which thread %d stored at %s without a proxy_fence since",
                  line_of(by).c_str(), at, store.thread, line_of(store.by).c_str());
    }
    std::memcpy(target, &memory[address], kChunk);
}

void SharedMemory::write_chunk(u32 address, void const* source) {
    std::memcpy(&memory[address], source, kChunk);
    for (u32 at = address; at < address + kChunk; at += 4) stores[at / 4] = Store{};
}

void load_shared(u32 address, void* target, int bytes) {
    SharedMemory const& from = shared();
    from.check_bounds(address, bytes, bytes, "load");
    if (from.writers[address / from.kChunk] != 0) error("load at 0x%x, to which a copy is on its way", address);
    std::memcpy(target, &from.memory[address], bytes);
}

void store_shared(u32 address, void const* source, int bytes) {
    shared().store(address, source, bytes, EMULATOR_CALLER);
}

void* plain_shared(u32 address) { return &shared().memory[address]; }

void proxy_fence() {
    ++current->fences;
    pause();
}

}  // namespace emulator
