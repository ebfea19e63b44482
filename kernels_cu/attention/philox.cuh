// Random bits of dropout, the same as on the CPU (cuflash/rng.py): Philox4x32 with seven rounds, keyed by the seed and counted
// by where a weight stands, never by thread or tile.
//
// Source  Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "params.cuh"

CUFLASH_DEVICE uint4 philox(uint4 counter, u64 seed) {
    u32 key0 = static_cast<u32>(seed), key1 = static_cast<u32>(seed >> 32);
#pragma unroll
    for (int i = 0; i < 7; ++i) {
        u64 const product0 = static_cast<u64>(counter.x) * 0xD2511F53u, product1 = static_cast<u64>(counter.z) * 0xCD9E8D57u;
        counter = uint4{static_cast<u32>(product1 >> 32) ^ counter.y ^ key0, static_cast<u32>(product1),
                        static_cast<u32>(product0 >> 32) ^ counter.w ^ key1, static_cast<u32>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// The eight draws of 16 bits for what a lane holds of a block of 16 x 16 weights as accumulators: rows g and g + 8 and columns
// 2t, 2t + 1, 2t + 8 and 2t + 9 for lane 4 g + t.
struct DropoutDraws {
    uint4 words;

    // Of register `i` of the accumulator of columns 8 n and on.
    CUFLASH_DEVICE u32 of(int n, int i) const {
        u32 const word = i % 2 == 0 ? (n == 0 ? words.x : words.y) : (n == 0 ? words.z : words.w);
        return i / 2 == 0 ? word & 0xffffu : word >> 16;
    }
};

CUFLASH_DEVICE DropoutDraws dropout_draws(u64 seed, int batch, int head, int q_block, int k_block, int lane) {
    return DropoutDraws{philox(uint4{static_cast<u32>(k_block), static_cast<u32>(q_block), static_cast<u32>(batch),
                                     static_cast<u32>(head * 32 + lane)},
                               seed)};
}

// The same for a block that lies transposed, keys 16 m and on as rows: rows are keys g and g + 8, columns queries.
// What a lane needs comes from two calls, which its neighbour among the keys needs, too: each makes one of them.
struct TransposedDraws {
    u32 of_even[2], of_odd[2];  // for queries 2t and 2t + 1 of eight: words of keys g, g + 8

    // Of register `i` of the accumulator of queries 8 n and on.
    CUFLASH_DEVICE u32 of(int n, int i) const {
        u32 const word = i % 2 == 0 ? of_even[i / 2] : of_odd[i / 2];
        return n == 0 ? word & 0xffffu : word >> 16;
    }
};

CUFLASH_DEVICE TransposedDraws transposed_draws(u64 seed, int batch, int head, int q_block, int k_block, int lane) {
    int const g = lane / 4, t = lane % 4;
    bool const is_odd = g % 2 == 1;
    uint4 const w = dropout_draws(seed, batch, head, q_block, k_block, 8 * t + 4 * is_odd + g / 2).words;
    // Words x and y are of even keys, z and w of odd ones.
    u32 const mine[2] = {is_odd ? w.z : w.x, is_odd ? w.w : w.y};
    u32 const other[2] = {__shfl_xor_sync(0xffffffffu, is_odd ? w.x : w.z, 4),
                          __shfl_xor_sync(0xffffffffu, is_odd ? w.y : w.w, 4)};
    if (is_odd) return TransposedDraws{{other[0], other[1]}, {mine[0], mine[1]}};
    return TransposedDraws{{mine[0], mine[1]}, {other[0], other[1]}};
}

// One weight alone, at several times the cost.
CUFLASH_DEVICE bool is_kept(ScoreParams const& params, bool has_dropout, int batch, int head, int q_idx, int k_idx) {
    if (!has_dropout) return true;
    k_idx += params.first_key;
    int const row = q_idx % 16, col = k_idx % 16;
    DropoutDraws const draws = dropout_draws(params.current_seed(), params.first_batch + batch, head, q_idx / 16, k_idx / 16,
                                             row % 8 * 4 + col % 8 / 2);
    return draws.of(col / 8, row / 8 * 2 + col % 2) >= static_cast<u32>(params.dropped);
}
