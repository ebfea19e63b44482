// Elements one at a time: how a dtype is stored, and the type its arithmetic is done in.
#pragma once
#include "../ptx/math.cuh"

enum class Dtype { kF16, kBF16, kF32, kF64 };

template <Dtype kDtype>
struct Element;

template <>
struct Element<Dtype::kF16> {
    using Stored = u16;
    using Acc = float;
    static CUFLASH_DEVICE Acc widen(Stored x) { return unpack_f16(x); }
    static CUFLASH_DEVICE Stored round(Acc x) { return static_cast<Stored>(pack_f16(x, 0.f)); }
};

template <>
struct Element<Dtype::kBF16> {
    using Stored = u16;
    using Acc = float;
    static CUFLASH_DEVICE Acc widen(Stored x) { return unpack_bf16(x); }
    static CUFLASH_DEVICE Stored round(Acc x) { return static_cast<Stored>(pack_bf16(x, 0.f)); }
};

template <>
struct Element<Dtype::kF32> {
    using Stored = float;
    using Acc = float;
    static CUFLASH_DEVICE Acc widen(Stored x) { return x; }
    static CUFLASH_DEVICE Stored round(Acc x) { return x; }
};

template <>
struct Element<Dtype::kF64> {
    using Stored = double;
    using Acc = double;
    static CUFLASH_DEVICE Acc widen(Stored x) { return x; }
    static CUFLASH_DEVICE Stored round(Acc x) { return x; }
};

// exp2 and log2 in the precision of the accumulator, and the way to and from natural logarithms.
CUFLASH_DEVICE float exp2_acc(float x) { return exp2_approx(x); }
CUFLASH_DEVICE double exp2_acc(double x) { return exp2(x); }
CUFLASH_DEVICE float log2_acc(float x) { return log2_approx(x); }
CUFLASH_DEVICE double log2_acc(double x) { return log2(x); }

template <class Acc>
struct Log2 {
    static constexpr Acc kE = static_cast<Acc>(1.4426950408889634074);
    static constexpr Acc kLn2 = static_cast<Acc>(0.69314718055994530942);
};
