// Before attention with a mask: which tiles of keys the queries of a tile see (or, by keys, the other way round), and the mask
// in bits.
//
// What    for each tile a list: its length, and that many tiles in ascending order, 2 * tile + (1 if the mask hides some of it).
//         Tiles that the mask hides wholly, or that lie outside of the band, are not in it.
//         And for each row of a tile a bit per column, as the main kernel's accumulators lie: rows are queries (or keys).
//         There are none of these where every tile lies in one block of the mask, which hides all of a tile or nothing.
// Blocks  grid.x = tiles * heads * batch, where heads and batch count only if the mask differs among them.
// Who     a warp per tile looks at the mask's elements, 32 tiles at a time by all warps, and packs them; then the first warp
//         adds to the list those with anything to see.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "ptx/shared.cuh"

// Of four elements, each of them 0 or not: the lowest bit of each byte that is not 0.
CUFLASH_DEVICE u32 which_bytes(u32 word) { return ((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7) & 0x01010101u; }

template <MaskBlocksConfig cfg, class Params>
CUFLASH_DEVICE void mask_blocks(Params const& params, u32 smem) {
    static_assert(cfg.block_m % 16 == 0 && cfg.block_n % 16 == 0, "16 columns make up a word of bits");
    // ---- coordinates ----
    Shape const& shape = params.shape;
    Pairs const& mask = params.score.mask;
    Pairs const& lists = params.score.mask_blocks;
    MaskBits const& bits = params.score.mask_bits;
    int const own_size = cfg.by_keys ? cfg.block_n : cfg.block_m, own_length = cfg.by_keys ? shape.seqlen_k : shape.seqlen_q;
    int const num_tiles = (own_length + own_size - 1) / own_size;
    int const tile = blockIdx.x % num_tiles;
    int const num_heads = lists.head_stride != 0 ? shape.num_heads : 1;
    int const head = blockIdx.x / num_tiles % num_heads;
    int const batch = blockIdx.x / num_tiles / num_heads;
    int const begin = tile * own_size, end = min(begin + own_size, own_length);
    BlockRange const range = cfg.by_keys ? query_blocks(shape, begin, end, cfg.block_m) : key_blocks(shape, begin, end, cfg.block_n);
    i32* const list = reinterpret_cast<i32*>(lists.at(batch, head) + tile * lists.query_stride);
    char const* const origin = mask.at(batch, head);
    bool const are_words = !cfg.by_blocks && mask.key_stride == 1 &&
                           (reinterpret_cast<u64>(origin) | static_cast<u64>(mask.query_stride)) % 16 == 0;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // Of a pair that exists.
    auto is_seen = [&](int q_idx, int k_idx) {
        char const* const place =
            cfg.by_blocks ? params.score.in_mask(origin, q_idx, k_idx) : mask.of_pair(origin, q_idx, k_idx);
        return __ldg(reinterpret_cast<unsigned char const*>(place)) != 0;
    };
    // Of four pairs from a key on; of those that do not exist it is a neighbour's element.
    auto four = [&](int q_idx, int k_idx) {
        q_idx = min(q_idx, shape.seqlen_q - 1);
        if (are_words && k_idx + 4 <= shape.seqlen_k)
            return which_bytes(__ldg(reinterpret_cast<u32 const*>(origin + q_idx * mask.query_stride + k_idx)));
        u32 word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            word |= static_cast<u32>(is_seen(q_idx, min(k_idx + j, shape.seqlen_k - 1))) << 8 * j;
        return word;
    };

    int length = 0;
    for (int first = range.first; first < range.last; first += 32) {
        // ---- a warp per tile: 0 if nothing of it is seen, 1 if all, 2 if some ----
        for (int i = warp; i < 32; i += cfg.num_warps) {
            int const other = first + i;
            if (other >= range.last) {
                if (lane == 0) st_shared(smem + 4 * i, 0);
                continue;
            }
            int const q_begin = cfg.by_keys ? other * cfg.block_m : begin, k_begin = cfg.by_keys ? begin : other * cfg.block_n;
            char* const words = bits.at(batch, head) + other * bits.tile_stride;
            bool any = false, all = true;
            auto keep = [&](u32 word, int row, int chunk) {  // the bits of 16 columns of a row
                any |= word != 0;
                all &= word == 0xffffu;
                if (row < own_length) *reinterpret_cast<u16*>(words + row * bits.row_stride + 2 * chunk) = static_cast<u16>(word);
            };
            if (cfg.by_blocks && bits.pointer == nullptr) {
                any = all = is_seen(q_begin, k_begin);
            } else if constexpr (cfg.by_keys) {
                constexpr int kFours = cfg.block_n / 4;
                // Queries that are all alike are one.
                int const step = mask.query_stride == 0 ? 0 : 1;
                for (int at = lane; at < kFours * (cfg.block_m / 16); at += 32) {
                    int const k_idx = k_begin + at % kFours * 4, chunk = at / kFours;
                    u32 low = 0, high = 0;
                    if (k_idx < shape.seqlen_k) {
#pragma unroll(cfg.by_blocks ? 1 : 8)
                        for (int q = 0; q < 8; ++q) {
                            low |= four(q_begin + 16 * chunk + q * step, k_idx) << q;
                            high |= four(q_begin + 16 * chunk + (8 + q) * step, k_idx) << q;
                        }
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            if (k_idx + j < shape.seqlen_k)
                                keep((low >> 8 * j & 0xffu) | (high >> 8 * j & 0xffu) << 8, k_idx + j, chunk);
                    }
                }
            } else {
                constexpr int kChunks = cfg.block_n / 16;
                int const rows = mask.query_stride == 0 ? 1 : end - q_begin;
#pragma unroll(cfg.by_blocks ? 1 : 4)
                for (int at = lane; at < rows * kChunks; at += 32) {
                    int const q_idx = q_begin + at / kChunks, chunk = at % kChunks, k_idx = k_begin + 16 * chunk;
                    u32 word = 0;
                    auto add = [&](u32 ones, int j) { word |= (ones * 0x01020408u >> 24 & 0xfu) << 4 * j; };
                    if (are_words && k_idx + 16 <= shape.seqlen_k) {
                        uint4 const x = __ldg(reinterpret_cast<uint4 const*>(origin + q_idx * mask.query_stride + k_idx));
                        add(which_bytes(x.x), 0);
                        add(which_bytes(x.y), 1);
                        add(which_bytes(x.z), 2);
                        add(which_bytes(x.w), 3);
                    } else {
#pragma unroll(cfg.by_blocks ? 1 : 4)
                        for (int j = 0; j < 4; ++j) add(four(q_idx, k_idx + 4 * j), j);
                    }
                    keep(word, q_idx, chunk);
                }
            }
            any = __any_sync(0xffffffffu, any);
            all = __all_sync(0xffffffffu, all);
            if (lane == 0) st_shared(smem + 4 * i, any ? (all ? 1 : 2) : 0);
        }
        __syncthreads();
        // ---- the list ----
        if (warp == 0) {
            u32 const seen = ld_shared(smem + 4 * lane);
            u32 const which = __ballot_sync(0xffffffffu, seen != 0);
            int const place = 1 + length + __popc(which & ((1u << lane) - 1));
            if (seen != 0) list[place] = 2 * (first + lane) + (seen == 2);
            length += __popc(which);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) list[0] = length;
}
