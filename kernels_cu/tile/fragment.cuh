// Operand fragments of one warp: the only place that knows which register holds which element.
//
// A k-step is 32 bytes of the reduction axis (16 elements of 16 bits, 8 of 32 bits), so that loads and
// loops are the same for every element type; `Mma` says what the 32 bytes mean.
#pragma once
#include "../ptx/ldmatrix.cuh"
#include "../ptx/math.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/shared.cuh"
#include "swizzle.cuh"

enum class Mma {
    kF16,        // m16n8k16, sm_80+
    kBF16,       // m16n8k16, sm_80+
    kF16Turing,  // two m16n8k8, sm_75+
    kTF32,       // m16n8k8, operands rounded to tf32, sm_80+
    kTF32x3,     // three tf32 products with the error of a float32 product, sm_80+
};

CUFLASH_DEVICE constexpr bool is_16bit(Mma mma) { return mma != Mma::kTF32 && mma != Mma::kTF32x3; }
CUFLASH_DEVICE constexpr int elem_bytes(Mma mma) { return is_16bit(mma) ? 2 : 4; }
CUFLASH_DEVICE constexpr int step_elems(Mma mma) { return 32 / elem_bytes(mma); }

// Row and column of accumulator register i (0..3) of a 16 x 8 tile.
CUFLASH_DEVICE int acc_row(int lane, int i) { return lane / 4 + 8 * (i >> 1); }
CUFLASH_DEVICE int acc_col(int lane, int i) { return 2 * (lane % 4) + (i & 1); }

// kRegs registers of an operand; for kTF32x3 their low-order halves beside them.
template <Mma kMma, int kRegs>
struct Fragment {
    u32 x[kRegs];
    u32 small[kMma == Mma::kTF32x3 ? kRegs : 1];

    CUFLASH_DEVICE void set(int i, u32 value) {
        if constexpr (kMma == Mma::kTF32x3) {
            split_tf32(value, x[i], small[i]);
        } else if constexpr (kMma == Mma::kTF32) {
            x[i] = value + 0x1000u;  // round to nearest: the tensor core drops the low 13 bits
        } else {
            x[i] = value;
        }
    }
};

template <Mma kMma>
using FragmentA = Fragment<kMma, 4>;
template <Mma kMma>
using FragmentB = Fragment<kMma, 2>;

// c += a * b over one k-step.
template <Mma kMma>
CUFLASH_DEVICE void mma_step(float (&c)[4], FragmentA<kMma> const& a, FragmentB<kMma> const& b) {
    if constexpr (kMma == Mma::kF16) {
        mma_m16n8k16_f16(c, a.x, b.x[0], b.x[1]);
    } else if constexpr (kMma == Mma::kBF16) {
        mma_m16n8k16_bf16(c, a.x, b.x[0], b.x[1]);
    } else if constexpr (kMma == Mma::kF16Turing) {
        mma_m16n8k8_f16_twice(c, a.x, b.x[0], b.x[1]);
    } else {
        if constexpr (kMma == Mma::kTF32x3) {  // small terms first, so that they are not lost
            mma_m16n8k8_tf32(c, a.small, b.x[0], b.x[1]);
            mma_m16n8k8_tf32(c, a.x, b.small[0], b.small[1]);
        }
        mma_m16n8k8_tf32(c, a.x, b.x[0], b.x[1]);
    }
}

// The same with the small terms in an accumulator of their own (see gemm_nt).
CUFLASH_DEVICE void mma_step_split(float (&c)[4], float (&c_small)[4], FragmentA<Mma::kTF32x3> const& a,
                                   FragmentB<Mma::kTF32x3> const& b) {
    mma_m16n8k8_tf32(c_small, a.small, b.x[0], b.x[1]);
    mma_m16n8k8_tf32(c_small, a.x, b.small[0], b.small[1]);
    mma_m16n8k8_tf32(c, a.x, b.x[0], b.x[1]);
}

template <Mma kMma>
CUFLASH_DEVICE u32 pack(float low, float high) {
    if constexpr (kMma == Mma::kBF16) return pack_bf16(low, high);
    return pack_f16(low, high);
}

template <Mma kMma>
CUFLASH_DEVICE float unpack_low(u32 pair) {
    if constexpr (kMma == Mma::kBF16) return __uint_as_float(pair << 16);
    return unpack_f16(static_cast<u16>(pair));
}
template <Mma kMma>
CUFLASH_DEVICE float unpack_high(u32 pair) {
    if constexpr (kMma == Mma::kBF16) return __uint_as_float(pair & 0xffff0000u);
    return unpack_f16(static_cast<u16>(pair >> 16));
}

// ---- loads: a lane keeps one address per tile (see SmemTile::lane_address) and moves it by constants ----

// A stored [rows][k]: 16 rows of one k-step.
template <class Tile>
CUFLASH_DEVICE u32 lane_address_a(u32 tile, int lane) {
    return Tile::lane_address(tile, lane % 16, lane / 16);
}
template <Mma kMma, class Tile>
CUFLASH_DEVICE void load_a(FragmentA<kMma>& a, u32 lane_address, int row, int k_step) {
    u32 r[4];
    ldmatrix_x4(r, Tile::at(lane_address, row, 2 * k_step));
#pragma unroll
    for (int i = 0; i < 4; ++i) a.set(i, r[i]);
}

// B stored [n][k]: 16 columns n (two n8 tiles) of one k-step.
template <class Tile>
CUFLASH_DEVICE u32 lane_address_b(u32 tile, int lane) {
    return Tile::lane_address(tile, lane % 8 + (lane / 16) * 8, (lane / 8) % 2);
}
template <Mma kMma, class Tile>
CUFLASH_DEVICE void load_b(FragmentB<kMma> (&b)[2], u32 lane_address, int n, int k_step) {
    u32 r[4];
    ldmatrix_x4(r, Tile::at(lane_address, n, 2 * k_step));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, r[i]);
}

// B stored [k][n]: 16 columns n of one k-step. 32-bit elements have no transposing load: two plain ones
// each, with rows 2t and 2t+1 in the places of k = t and t + 4, the order in which accumulators hold
// their columns (acc_to_a), so A must come from there.
template <Mma kMma, class Tile>
CUFLASH_DEVICE u32 lane_address_b_trans(u32 tile, int lane) {
    if constexpr (is_16bit(kMma)) return Tile::lane_address(tile, lane % 16, lane / 16);
    return Tile::lane_address(tile, 2 * (lane % 4), lane / 16) + (lane / 4 % 4) * 4;
}
template <Mma kMma, class Tile>
CUFLASH_DEVICE void load_b_trans(FragmentB<kMma> (&b)[2], u32 lane_address, int k_step, int n) {
    if constexpr (is_16bit(kMma)) {
        u32 r[4];
        ldmatrix_x4_trans(r, Tile::at(lane_address, 16 * k_step, n / 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, r[i]);
    } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            u32 const address = Tile::at(lane_address, 8 * k_step, n / 4 + 2 * j);
            b[j].set(0, ld_shared(address));
            b[j].set(1, ld_shared((address ^ 16) + Tile::kSlabBytes));  // the next row's swizzle key differs by one
        }
    }
}

// A stored [k][rows]: 16 rows of one k-step. 32-bit elements as in load_b_trans, in the same order of k.
template <Mma kMma, class Tile>
CUFLASH_DEVICE u32 lane_address_a_trans(u32 tile, int lane) {
    if constexpr (is_16bit(kMma)) return Tile::lane_address(tile, lane % 8 + (lane / 16) * 8, (lane / 8) % 2);
    return lane_address_b_trans<kMma, Tile>(tile, lane);
}
template <Mma kMma, class Tile>
CUFLASH_DEVICE void load_a_trans(FragmentA<kMma>& a, u32 lane_address, int k_step, int row) {
    if constexpr (is_16bit(kMma)) {
        u32 r[4];
        ldmatrix_x4_trans(r, Tile::at(lane_address, 16 * k_step, row / 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) a.set(i, r[i]);
    } else {
        constexpr u32 kNextKey = Tile::kSlabBytes == 128 ? 16 : 0;  // 64-byte rows share a swizzle key in pairs
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            u32 const address = Tile::at(lane_address, 8 * k_step, row / 4 + 2 * j);
            a.set(j, ld_shared(address));
            a.set(2 + j, ld_shared((address ^ kNextKey) + Tile::kSlabBytes));
        }
    }
}

// The accumulators of k-step columns as A operand: 16-bit elements take two n8 tiles, 32-bit ones one.
template <Mma kMma, int kTiles>
CUFLASH_DEVICE void acc_to_a(FragmentA<kMma>& a, float const (&acc)[kTiles][4], int k_step) {
    if constexpr (is_16bit(kMma)) {
        a.x[0] = pack<kMma>(acc[2 * k_step][0], acc[2 * k_step][1]);
        a.x[1] = pack<kMma>(acc[2 * k_step][2], acc[2 * k_step][3]);
        a.x[2] = pack<kMma>(acc[2 * k_step + 1][0], acc[2 * k_step + 1][1]);
        a.x[3] = pack<kMma>(acc[2 * k_step + 1][2], acc[2 * k_step + 1][3]);
    } else {
        a.set(0, __float_as_uint(acc[k_step][0]));
        a.set(1, __float_as_uint(acc[k_step][2]));
        a.set(2, __float_as_uint(acc[k_step][1]));
        a.set(3, __float_as_uint(acc[k_step][3]));
    }
}

// ---- accumulators in transit to another warp with the same layout: 16 bytes per lane and k-step ----

template <Mma kMma, int kTiles>
CUFLASH_DEVICE uint4 acc_to_words(float const (&acc)[kTiles][4], int k_step) {
    if constexpr (is_16bit(kMma)) {
        FragmentA<kMma> a;
        acc_to_a(a, acc, k_step);
        return uint4{a.x[0], a.x[1], a.x[2], a.x[3]};
    } else {
        return uint4{__float_as_uint(acc[k_step][0]), __float_as_uint(acc[k_step][1]), __float_as_uint(acc[k_step][2]),
                     __float_as_uint(acc[k_step][3])};
    }
}
template <Mma kMma, int kTiles>
CUFLASH_DEVICE void words_to_acc(float (&acc)[kTiles][4], uint4 words) {
    static_assert(kTiles * 8 == step_elems(kMma), "one k-step at a time");
    u32 const w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (is_16bit(kMma)) {
            acc[i / 2][2 * (i % 2)] = unpack_low<kMma>(w[i]);
            acc[i / 2][2 * (i % 2) + 1] = unpack_high<kMma>(w[i]);
        } else {
            acc[0][i] = __uint_as_float(w[i]);
        }
    }
}
