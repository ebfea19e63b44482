#include "copy_engine.h"

#include <cstring>
#include <utility>

#include "block.h"

namespace emulator {

namespace {

void mark_writes(SharedMemory& shared, Copy const& copy, int by) {
    for (int i = 0; i < copy.bytes; i += SharedMemory::kChunk)
        shared.writers[(copy.target + i) / SharedMemory::kChunk] += by;
}

// Rows of 128 bytes, the second axis of the box running fastest; what lies outside of the tensor is zero.
void write_box(SharedMemory& shared, Copy const& copy) {
    TensorMapContent const& map = *copy.map;
    for (int row = 0; row < copy.bytes / 128; ++row) {
        char const* source = map.address;
        bool is_inside = true;
        int rest = row;
        for (u32 axis = 1; axis < map.rank; ++axis) {
            i64 const place = copy.corner[axis] + rest % map.box[axis];
            rest /= map.box[axis];
            is_inside &= place >= 0 && place < static_cast<i64>(map.lengths[axis]);
            source += place * static_cast<i64>(map.strides[axis - 1]);
        }
        for (u32 column = 0; column < 64; column += 8) {
            u16 chunk[8] = {};
            for (int i = 0; i < 8; ++i) {
                i64 const place = copy.corner[0] + column + i;
                if (is_inside && place >= 0 && place < static_cast<i64>(map.lengths[0]))
                    std::memcpy(&chunk[i], source + 2 * place, 2);
            }
            shared.write_chunk(swizzled(copy.target + 128 * row + 2 * column), chunk);
        }
    }
}

}  // namespace

void CopyEngine::order(Copy const& copy) {
    block.shared.check_bounds(copy.target, copy.bytes, SharedMemory::kChunk, "copy");
    block.shared.check_store(copy.target, copy.bytes, "copy");
    block.shared.fill(copy.target, copy.bytes, SharedMemory::kComing);
    mark_writes(block.shared, copy, 1);
    copies.push_back(copy);
    trace("copy of %d bytes to 0x%x for mbarrier 0x%x", copy.bytes, copy.target, copy.barrier->address);
    pause(4);
}

// The engine does one of its copies.
void CopyEngine::step() {
    std::swap(copies[random() % copies.size()], copies.back());
    Copy const copy = copies.back();
    copies.pop_back();
    trace("copy engine of block %d: %d bytes to 0x%x", block.index, copy.bytes, copy.target);
    mark_writes(block.shared, copy, -1);
    if (copy.map != nullptr) {
        write_box(block.shared, copy);
    } else {
        for (int i = 0; i < copy.bytes; i += SharedMemory::kChunk)
            block.shared.write_chunk(copy.target + i, copy.source + i);
    }
    copy.barrier->complete_bytes(copy.bytes, copy.by);
}

void copy_box(u32 target, void const* map, u32 barrier, std::initializer_list<int> corner) {
    auto const content = static_cast<TensorMapContent const*>(map);
    if (content->rank != corner.size()) error("%zu coordinates for a map of rank %u", corner.size(), content->rank);
    if (target % 1024 != 0) error("a box at 0x%x, inside of a swizzle pattern of 1024 bytes", target);
    int bytes = 128;
    for (u32 axis = 1; axis < content->rank; ++axis) bytes *= content->box[axis];
    Block& block = *current->block;
    block.copy_engine.order({target, bytes, EMULATOR_CALLER, nullptr, &block.barriers.at(barrier), content, corner});
}

void copy_bytes(u32 target, char const* source, int bytes, u32 barrier) {
    if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<u64>(source) % 16 != 0)
        error("a copy of %d bytes from %p: multiples of 16 are wanted", bytes, static_cast<void const*>(source));
    Block& block = *current->block;
    block.copy_engine.order({target, bytes, EMULATOR_CALLER, source, &block.barriers.at(barrier)});
}

// These arrive when their thread waits for them, and no sooner.
void cp_async(u32 target, void const* source, int bytes, bool valid) {
    static char const zeros[16] = {};
    if (valid && reinterpret_cast<u64>(source) % bytes != 0) error("cp.async from %p, which is misaligned", source);
    shared().check_bounds(target, bytes, bytes, "cp.async");
    shared().check_store(target, bytes, "cp.async");
    shared().fill(target, bytes, SharedMemory::kComing);
    char const* const from = valid ? static_cast<char const*>(source) : zeros;
    current->open_copies.push_back({target, bytes, EMULATOR_CALLER, from});
}

void cp_async_commit() { current->copy_groups.push_back(std::exchange(current->open_copies, {})); }

void cp_async_wait(int pending) {
    pause();
    auto& groups = current->copy_groups;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
        for (Copy const& copy : groups.front()) shared().store(copy.target, copy.source, copy.bytes, copy.by);
}

// These, too, arrive when their thread waits for them.
void bulk_store(char* target, u32 source, int bytes) {
    if (bytes <= 0 || bytes % 16 != 0 || reinterpret_cast<u64>(target) % 16 != 0)
        error("a copy of %d bytes to %p: multiples of 16 are wanted", bytes, static_cast<void*>(target));
    shared().check_bounds(source, bytes, SharedMemory::kChunk, "copy");
    for (int i = 0; i < bytes; i += SharedMemory::kChunk) ++shared().readers[(source + i) / SharedMemory::kChunk];
    current->stores.push_back({target, source, bytes, EMULATOR_CALLER});
}

void bulk_finish() {
    if (random() % 2 == 0)
        for (u32 others = random() % 4096; others > 0; --others) pause(1);  // memory is slow
    for (BulkStore const& copy : std::exchange(current->stores, {}))
        for (int i = 0; i < copy.bytes; i += SharedMemory::kChunk) {
            shared().read_chunk(copy.source + i, copy.target + i, copy.by, *current->block);
            --shared().readers[(copy.source + i) / SharedMemory::kChunk];
        }
}

}  // namespace emulator
