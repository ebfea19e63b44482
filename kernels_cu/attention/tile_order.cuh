// In which order thread blocks take tiles of queries or of keys (cuflash/plan.py: TileOrder).
#pragma once
#include "params.cuh"

struct TileCoordinates {
    int block;  // of queries or of keys
    int head;   // counted as in TileOrder::num_heads
    int batch;
};

// The tile of a block's n-th round; num_tiles or more where there is none in this round, nor in later ones. Every other
// round runs backwards over the blocks: as tiles get lighter from first to last, each block gets its share of heavy ones.
CUFLASH_DEVICE int tile_of_round(TileOrder const& order, int round) {
    int const place = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + place;
}

// Section by section of heads; in a section from the last block (of queries: with a causal mask these see the most keys)
// to the first, and all heads of the section for each.
CUFLASH_DEVICE TileCoordinates tile_coordinates(TileOrder const& order, int index) {
    int const tiles_per_section = order.section * order.num_blocks;
    int const section = index / tiles_per_section;
    int const first_head = section * order.section;
    int const heads = min(order.section, order.num_tiles / order.num_blocks - first_head);
    int const rest = index - section * tiles_per_section;
    int const head = first_head + rest % heads;
    return TileCoordinates{order.num_blocks - 1 - rest / heads, head % order.num_heads, head / order.num_heads};
}

// The same for tiles of keys. With a causal mask the first keys are seen by the most queries, so they come first. If d_q is
// summed in a fixed order they come last: blocks wait for later keys, which are first to reach a tile of queries.
CUFLASH_DEVICE TileCoordinates tile_of_keys(TileOrder const& order, int index, bool deterministic) {
    TileCoordinates at = tile_coordinates(order, index);
    if (!deterministic) at.block = order.num_blocks - 1 - at.block;
    return at;
}
