// What a launch passes to a kernel, by value. cuflash/launch.py holds the same structs as NumPy dtypes
// and the generated entry asserts that sizes and offsets agree.
#pragma once
#include "../ptx/tma.cuh"
#include "../ptx/types.cuh"

// A (batch, heads, seqlen, dim) operand with contiguous dim; strides in bytes.
struct Operand {
    char* pointer;
    i64 batch_stride;
    i64 head_stride;
    i64 row_stride;

    CUFLASH_DEVICE char* at(int batch, int head, i64 row) const {
        return pointer + batch * batch_stride + head * head_stride + row * row_stride;
    }
};

// The lengths and the visibility of one call. Query i sees key j when i + lower <= j <= i + upper.
struct Shape {
    i32 num_heads;
    i32 group_size;  // query heads per key/value head
    i32 seqlen_q;
    i32 seqlen_k;
    i32 head_dim;
    i32 head_dim_v;
    i32 lower;  // open sides are far outside any length, and stay far enough from overflow
    i32 upper;
};

// Numbers of (batch, head, query, key) pairs, or of the first of these; strides in bytes, 0 where they are broadcast.
struct Pairs {
    char* pointer;
    i64 batch_stride;
    i64 head_stride;
    i64 query_stride;
    i64 key_stride;

    CUFLASH_DEVICE char* at(int batch, int head) const { return pointer + batch * batch_stride + head * head_stride; }
    CUFLASH_DEVICE char const* of_pair(char const* origin, int q_idx, int k_idx) const {
        return origin + q_idx * query_stride + k_idx * key_stride;
    }
};

// What mask_blocks.cuh makes of a mask: a bit per pair, 1 where it is seen; a row per row of the main kernel's accumulators,
// in which each tile has bytes of its own. Strides in bytes, 0 where rows or tiles are all alike.
struct MaskBits {
    char* pointer;
    i64 batch_stride;
    i64 head_stride;
    i64 row_stride;
    i64 tile_stride;

    CUFLASH_DEVICE char* at(int batch, int head) const { return pointer + batch * batch_stride + head * head_stride; }
};

// What attention/score.cuh and dropout read. Slopes and sinks are of the accumulator's type.
struct ScoreParams {
    Pairs mask;  // by blocks of mask_block_q queries and mask_block_k keys
    Pairs bias, alibi_slopes, sinks;
    Pairs mask_blocks;  // lists of mask_blocks.cuh; query_stride is that of tiles
    MaskBits mask_bits;
    u64 seed;
    char* seed_at;      // where the seed is, if it is on the device
    double softcap;
    double kept_scale;  // 1 / (1 - dropout_p)
    // The same for what is held in float32. A conversion from double is slow enough to hold up a step of the main kernels.
    float factor;       // of q.k: scale, or of what tanh is taken scale / softcap
    float softcap_f32;
    float kept_scale_f32;
    i32 dropped;       // how many of the draws of 16 bits drop a weight
    i32 first_batch;   // number of the first batch entry, as the generator counts
    i32 q_offset;      // where query 0 stands among the keys
    i32 first_key;     // number of the first key, as the generator counts: a multiple of 16
    i32 mask_block_q;  // 1 where each query, or key, has elements of its own
    i32 mask_block_k;
    i32 mask_first_key;  // number of the first key in its block of the mask

    // The mask's element for a pair that exists.
    CUFLASH_DEVICE char const* in_mask(char const* origin, int q_idx, int k_idx) const {
        if ((mask_block_q | mask_block_k) != 1) {
            q_idx = static_cast<u32>(q_idx) / static_cast<u32>(mask_block_q);
            k_idx = static_cast<u32>(k_idx + mask_first_key) / static_cast<u32>(mask_block_k);
        }
        return mask.of_pair(origin, q_idx, k_idx);
    }
    CUFLASH_DEVICE u64 current_seed() const {
        return seed_at == nullptr ? seed : __ldg(reinterpret_cast<u64 const*>(seed_at));
    }
};

struct ForwardParams {
    Operand q, k, v, out;
    char* lse;  // (batch, num_heads, seqlen_q), natural log, or null
    Shape shape;
    double scale;        // of q.k
    float scale_log2;    // |scale| * log2(e), never 0: see softmax.cuh
    float score_sign;    // sign of scale
    ScoreParams score;
};

// How tiles are numbered, and which rows they have.
struct TileOrder {
    i32 num_tiles;     // in all
    i32 num_blocks;    // per head
    i32 num_heads;     // heads with tiles of their own: key/value heads in the backward, and where query heads are packed
    i32 section;       // heads (of all batches) that are worked on together, so that what they read stays in L2
    i32 pack;          // query heads that share a tile: row r is query r / pack of head r % pack
};

struct ForwardWgmmaParams {
    TensorMap q_map, k_map, v_map, bias_map;
    Operand q, k, v, out;
    char* lse;
    Shape shape;
    float scale_log2;  // scale * log2(e) with its sign, never 0: see softmax.cuh
    TileOrder order;
    double scale;
    ScoreParams score;
};

struct WeightsParams {
    Operand q, k;
    char* lse;      // (batch, num_heads, seqlen_q), natural log
    char* weights;  // (batch, num_heads, num_rows, seqlen_k), or without rows their sums
    Shape shape;    // of all queries
    i32 first_row;  // row r is query first_row + r * row_step
    i32 row_step;
    i32 num_rows;
    double scale;
    ScoreParams score;
};

struct BackwardParams {
    Operand q, k, v, out, d_out, d_q, d_k, d_v;
    char* lse;        // (batch, num_heads, seqlen_q), natural log
    char* d_lse;      // the same shape, or null
    char* delta;      // float workspace (batch, num_heads, rows): rowsum(d_out * out) - d_lse
    char* lse_log2;   // float workspace of the same shape: lse * log2(e), +inf where P must be 0
    char* dq_accum;   // float workspace (batch, num_heads, rows, padded head_dim), see dq_accum.cuh
    char* semaphore;  // int workspace (batch, num_heads, m_blocks, warps or 1), only if deterministic
    char* counters;   // int workspace, zeros at first; see backward_steps.cuh
    char* parts;      // float workspace of backward_wgmma.cuh, for what blocks that share a tile have of d_k and d_v
    Shape shape;
    i32 rows;          // seqlen_q rounded up to block_m of the main kernel
    i32 num_counters;
    i32 num_emptied;   // the first tiles of dq_accum, which hold zeros when the main kernel begins
    float scale_log2;  // scale * log2(e), with its sign
    i32 num_batches;
    double scale;
    ScoreParams score;
    Pairs d_bias;       // of float32 or float64, added to; null where it is not wanted
    Pairs bias_sums;    // what backward_bias.cuh adds to instead
    char* slope_sums;   // of the gradient by ALiBi's slopes, (batch, num_heads, so many as tiles of keys leave); null likewise
    char* sink_sums;    // of the gradient by the sinks, (batch, num_heads, warps of backward_sinks.cuh)
};

// The last tiles of keys, laid end to end and cut into parts of equal length, so that all blocks end at the same time.
struct TileParts {
    i32 first_tile;  // those before are whole
    i32 tile_steps;  // steps of one of these tiles
    i32 num_steps;   // of all of them
    i32 part_steps;  // a part may go on in the next tile
};

// The first part is what the kernels before and after the main one read.
struct BackwardWgmmaParams : BackwardParams {
    TensorMap d_out_map, q_map, k_map, v_map;  // of what somebody sees; see backward_wgmma.cuh
    TileOrder order;                           // of tiles of keys
    TileParts tail;
    i32 sections_ahead;                        // tiles of keys fill with zeros what belongs to heads so many sections later
};
