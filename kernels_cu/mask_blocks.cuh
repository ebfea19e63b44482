// Before attention with a mask: which tiles of keys the queries of a tile see (or, by keys, the other way round).
//
// What    for each tile a list: its length, and that many tiles in ascending order, 2 * tile + (1 if the mask hides some of it).
//         Tiles that the mask hides wholly, or that lie outside of the band, are not in it.
// Blocks  grid.x = tiles * heads * batch, where heads and batch count only if the mask differs among them.
// Who     a warp per tile looks at the mask's elements, 32 tiles at a time by all warps; then the first warp adds to the list
//         those with anything to see.
#pragma once
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "ptx/shared.cuh"

template <MaskBlocksConfig cfg, class Params>
CUFLASH_DEVICE void mask_blocks(Params const& params, u32 smem) {
    static_assert(cfg.block_n % 16 == 0, "16 elements of the mask are looked at together");
    // ---- coordinates ----
    Shape const& shape = params.shape;
    Pairs const& mask = params.score.mask;
    Pairs const& lists = params.score.mask_blocks;
    int const own_size = cfg.by_keys ? cfg.block_n : cfg.block_m, own_length = cfg.by_keys ? shape.seqlen_k : shape.seqlen_q;
    int const num_tiles = (own_length + own_size - 1) / own_size;
    int const tile = blockIdx.x % num_tiles;
    int const num_heads = lists.head_stride != 0 ? shape.num_heads : 1;
    int const head = blockIdx.x / num_tiles % num_heads;
    int const batch = blockIdx.x / num_tiles / num_heads;
    int const begin = tile * own_size, end = min(begin + own_size, own_length);
    BlockRange const range = cfg.by_keys ? query_blocks(shape, begin, end, cfg.block_m) : key_blocks(shape, begin, end, cfg.block_n);
    i32* const list = reinterpret_cast<i32*>(lists.at(batch, head) + tile * lists.query_stride);
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    int length = 0;
    for (int first = range.first; first < range.last; first += 32) {
        // ---- a warp per tile: 0 if nothing of it is seen, 1 if all, 2 if some ----
        for (int i = warp; i < 32; i += cfg.num_warps) {
            int const other = first + i;
            int const q_begin = cfg.by_keys ? other * cfg.block_m : begin, k_begin = cfg.by_keys ? begin : other * cfg.block_n;
            int const q_end = other < range.last ? min(q_begin + cfg.block_m, shape.seqlen_q) : q_begin;
            int const k_end = min(k_begin + cfg.block_n, shape.seqlen_k);
            char const* const origin = mask.of_pair(mask.at(batch, head), q_begin, k_begin);
            int const rows = q_end - q_begin, columns = k_end - k_begin;
            bool any = false, all = true;
            auto look = [&](u32 word) {  // four elements, each of them 0 or not
                any |= word != 0;
                all &= ((((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u) == 0x80808080u;
            };
            bool const are_words = mask.key_stride == 1 && columns == cfg.block_n &&
                                   (reinterpret_cast<u64>(origin) | static_cast<u64>(mask.query_stride)) % 16 == 0;
            if (are_words) {
                constexpr int kPerRow = cfg.block_n / 16;
#pragma unroll 8
                for (int at = lane; at < rows * kPerRow; at += 32) {
                    uint4 const words = __ldg(
                        reinterpret_cast<uint4 const*>(origin + at / kPerRow * mask.query_stride + at % kPerRow * 16));
                    look(words.x);
                    look(words.y);
                    look(words.z);
                    look(words.w);
                }
            } else {
                for (int k = lane; k < columns; k += 32)
#pragma unroll 8
                    for (int q = 0; q < rows; ++q)
                        look(__ldg(reinterpret_cast<unsigned char const*>(mask.of_pair(origin, q, k))) * 0x01010101u);
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
