// Which key tiles a query tile visits, and which of them need a mask (cuflash/scores.py: Band).
#pragma once
#include "params.cuh"

struct BlockRange {
    int k_begin, k_end;          // keys visible to at least one query of the block
    int first, last;             // key tiles [first, last)
    int full_first, full_last;   // tiles of which every query sees every key: [full_first, full_last)

    CUFLASH_DEVICE bool needs_mask(int n_block) const { return n_block < full_first || n_block >= full_last; }
};

// Keys for the queries [q_begin, q_end), in tiles of block_n.
CUFLASH_DEVICE BlockRange key_blocks(Shape const& s, int q_begin, int q_end, int block_n) {
    BlockRange r;
    r.k_begin = max(0, q_begin + s.lower);
    r.k_end = min(s.seqlen_k, q_end + s.upper);
    if (r.k_begin >= r.k_end) r.k_begin = r.k_end = 0;
    r.first = r.k_begin / block_n;
    r.last = (r.k_end + block_n - 1) / block_n;
    // The last query has the largest lower bound, the first query the smallest upper bound.
    int const full_begin = max(0, q_end - 1 + s.lower);
    int const full_end = max(0, min(s.seqlen_k, q_begin + s.upper + 1));
    r.full_first = (full_begin + block_n - 1) / block_n;
    r.full_last = full_end / block_n;
    return r;
}

// Queries that see a key of [k_begin, k_end), in tiles of block_m; k_begin and k_end mean query rows here.
CUFLASH_DEVICE BlockRange query_blocks(Shape const& s, int k_begin, int k_end, int block_m) {
    BlockRange r;
    r.k_begin = max(0, k_begin - s.upper);
    r.k_end = min(s.seqlen_q, k_end - s.lower);
    if (r.k_begin >= r.k_end) r.k_begin = r.k_end = 0;
    r.first = r.k_begin / block_m;
    r.last = (r.k_end + block_m - 1) / block_m;
    int const full_begin = max(0, k_end - 1 - s.upper);
    int const full_end = max(0, min(s.seqlen_q, k_begin - s.lower + 1));
    r.full_first = (full_begin + block_m - 1) / block_m;
    r.full_last = full_end / block_m;
    return r;
}
