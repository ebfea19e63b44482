// Integer names of fixed width: NVRTC has no <cstdint>, and pulling one in costs more than all of this.
#pragma once

using i32 = int;
using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define CUFLASH_DEVICE __device__ __forceinline__

// Shared-memory address of a pointer, as the 32-bit number that PTX instructions take.
CUFLASH_DEVICE u32 smem_address(void const* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// A compile-time integer as a function argument.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};
