#pragma once
#include "types.cuh"

struct alignas(64) TensorMap {
    char bytes[128];
};

CUFLASH_DEVICE void tma_prefetch(TensorMap const&) {}
CUFLASH_DEVICE void tma_load_4d(u32 smem, TensorMap const& map, u32 barrier, int c0, int c1, int c2, int c3) {
    emulator::copy_box(smem, &map, barrier, {c0, c1, c2, c3});
}
CUFLASH_DEVICE void tma_load_5d(u32 smem, TensorMap const& map, u32 barrier, int c0, int c1, int c2, int c3, int c4) {
    emulator::copy_box(smem, &map, barrier, {c0, c1, c2, c3, c4});
}
CUFLASH_DEVICE void bulk_load(u32 smem, char const* gmem, int bytes, u32 barrier) {
    emulator::copy_bytes(smem, gmem, bytes, barrier);
}
CUFLASH_DEVICE void bulk_store(char* gmem, u32 smem, int bytes) { emulator::bulk_store(gmem, smem, bytes); }
CUFLASH_DEVICE void bulk_finish() { emulator::bulk_finish(); }
CUFLASH_DEVICE void proxy_fence() { emulator::proxy_fence(); }
