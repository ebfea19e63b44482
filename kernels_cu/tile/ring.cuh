// Position in a ring of stages: how many tiles have gone through it. Each time round, barriers are waited for with the
// other parity.
#pragma once
#include "../ptx/types.cuh"

template <int kStages>
struct Ring {
    u32 count = 0;

    CUFLASH_DEVICE int stage() const { return count % kStages; }
    CUFLASH_DEVICE u32 parity() const { return count / kStages & 1; }
    CUFLASH_DEVICE Ring operator+(int tiles) const { return Ring{count + tiles}; }
};
