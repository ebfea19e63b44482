// Numbers of the kernels that C++ does not have: integers by the names of kernels_cu/ptx/types.cuh, and 16-bit floats.
#pragma once
#include <bit>

using i32 = int;
using i64 = long long;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace emulator {

inline float from_bf16(u16 bits) { return std::bit_cast<float>(u32{bits} << 16); }

inline u16 to_bf16(float x) {
    u32 const bits = std::bit_cast<u32>(x);
    return static_cast<u16>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_f16(u16 bits) { return std::bit_cast<_Float16>(bits); }
inline u16 to_f16(float x) { return std::bit_cast<u16>(static_cast<_Float16>(x)); }

}  // namespace emulator
