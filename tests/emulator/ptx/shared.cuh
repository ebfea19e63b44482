#pragma once
#include "types.cuh"

CUFLASH_DEVICE u32 ld_shared(u32 smem) { return emulator::load_shared<u32>(smem); }
CUFLASH_DEVICE float ld_shared_f32(u32 smem) { return emulator::load_shared<float>(smem); }
CUFLASH_DEVICE uint2 ld_shared_v2(u32 smem) { return emulator::load_shared<uint2>(smem); }
CUFLASH_DEVICE uint4 ld_shared_v4(u32 smem) { return emulator::load_shared<uint4>(smem); }

CUFLASH_DEVICE void st_shared(u32 smem, u32 value) { emulator::store_shared(smem, &value, 4); }
CUFLASH_DEVICE void st_shared_v2(u32 smem, u32 x, u32 y) {
    u32 const words[] = {x, y};
    emulator::store_shared(smem, words, 8);
}
CUFLASH_DEVICE void st_shared_v4(u32 smem, uint4 v) { emulator::store_shared(smem, &v, 16); }
