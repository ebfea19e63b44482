// The tensor memory accelerator (sm_90+): one thread orders a whole box of a tensor into shared memory.
// PTX ISA 9.7.9.27; the 128 bytes of a tensor map are made by the driver (cuflash/tensor_map.py).
#pragma once
#include "types.cuh"

// Describes a tensor in global memory: address, lengths, strides, box, swizzle. Lies in the kernel's parameters and is
// never copied: the engine reads it by its address.
struct alignas(64) TensorMap {
    char bytes[128];
};

CUFLASH_DEVICE void tma_prefetch(TensorMap const& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box at the given coordinates, innermost first; what lies outside the tensor becomes zero. All bytes of the box are
// counted on `barrier`.
CUFLASH_DEVICE void tma_load_4d(u32 smem, TensorMap const& map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(smem), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

CUFLASH_DEVICE void tma_load_5d(u32 smem, TensorMap const& map, u32 barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Neighbouring bytes, a multiple of 16 on a multiple of 16.
CUFLASH_DEVICE void bulk_load(u32 smem, char const* gmem, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(gmem), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The other way round, without a barrier: the thread that ordered it waits until all of it is in global memory.
CUFLASH_DEVICE void bulk_store(char* gmem, u32 smem, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(gmem), "r"(smem), "r"(bytes)
                 : "memory");
}
CUFLASH_DEVICE void bulk_finish() {
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;" ::: "memory");
}

// Makes what this thread stored to shared memory visible to the engine and to wgmma, once a barrier follows.
CUFLASH_DEVICE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
