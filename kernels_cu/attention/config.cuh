// Compile-time configurations: what changes the shape of the code. The same fields, in the same order,
// as the dataclasses in cuflash/configs.py; everything else is a run-time parameter (params.cuh).
#pragma once
#include "../tile/copy.cuh"
#include "../tile/element.cuh"
#include "../tile/fragment.cuh"

// What is done to scores and weights beside scaling (attention/score.cuh).
enum class Bias { kNone, kF16, kBF16, kF32, kF64 };

constexpr Dtype bias_dtype(Bias bias) {
    return bias == Bias::kF16 ? Dtype::kF16 : bias == Bias::kBF16 ? Dtype::kBF16 : bias == Bias::kF64 ? Dtype::kF64 : Dtype::kF32;
}

struct ScoreConfig {
    bool softcap;
    bool mod;  // an expression of the user's
    bool mask;
    Bias bias;
    bool alibi;
    bool sinks;
    bool dropout;

    // Whether scores change before the softmax.
    constexpr bool changes() const { return softcap || mod || mask || bias != Bias::kNone || alibi; }
    // Whether their derivatives by q.k are not all the scale.
    constexpr bool bends() const { return softcap || mod; }
    constexpr bool any() const { return changes() || dropout; }  // between q.k and P V; sinks are elsewhere
};

struct ForwardMmaConfig {
    Mma mma;
    Copy copy;
    int head_dim;    // padded: a tile row of q and k
    int head_dim_v;  // padded: a tile row of v and out
    int block_m;     // query rows of a thread block
    int block_n;     // keys of one step
    int num_warps;   // each owns block_m / num_warps query rows
    int num_stages;  // key/value tiles in flight
    bool overlap;    // P V of a tile runs beside the softmax of the next one
    ScoreConfig score;

    constexpr int threads() const { return 32 * num_warps; }
};

struct ForwardWgmmaConfig {
    Mma mma;
    Copy copy;       // kTma, or kElement by all threads of the producer
    int head_dim;    // padded to a multiple of 16
    int head_dim_v;  // padded to a multiple of 32
    int block_m;     // query rows of a tile: 64 for each consumer warpgroup
    int block_n;     // keys of one step
    int num_stages;  // key/value tiles in flight
    int q_stages;    // query tiles in flight; with two, the first scores of a tile run beside the end of the one before
    bool ping_pong;  // warpgroups take turns: products of one beside the softmax of the other
    int bias_stages;  // tiles of a 16-bit bias in flight; 0 if it is read from global memory
    ScoreConfig score;

    constexpr int consumers() const { return block_m / 64; }
    constexpr int threads() const { return 128 * (consumers() + 1); }
};

struct BackwardMmaConfig {
    Mma mma;
    Copy copy;
    int head_dim;        // padded: a tile row of q and k
    int head_dim_v;      // padded: a tile row of v and out
    int block_m;         // query rows of one step
    int block_n;         // keys of a thread block
    int num_warps;       // one half computes d_v, the other d_k
    int num_stages;      // query tiles in flight
    int dq_warps_m;      // warps along the rows of a d_q tile; the others split its columns
    int reduce_width;    // floats that one instruction adds to d_q: 1; from sm_90 on also 2, 4
    bool deterministic;  // d_q is summed in a fixed order
    ScoreConfig score;

    // Whether tiles that a mask hides are skipped: turns are counted by the band alone.
    constexpr bool listed() const { return score.mask && !deterministic; }
    constexpr int threads() const { return 32 * num_warps; }
};

struct BackwardWgmmaConfig {
    Mma mma;
    Copy copy;           // kTma
    int head_dim;        // these two padded to a multiple of 32
    int head_dim_v;
    int block_m;         // query rows of one step
    int block_n;         // keys of a tile
    int kv_stages;       // tiles of keys here or in flight
    int num_stages;      // query tiles in flight
    bool overlap;        // S of a step runs beside dK of the one before
    bool deterministic;  // d_q is summed in a fixed order
    ScoreConfig score;   // by role only

    // Two warpgroups share the work on 64 keys by what they compute; on more, each has 64 keys of its own.
    constexpr bool by_role() const { return block_n == 64; }
    constexpr int consumers() const { return by_role() ? 2 : block_n / 64; }
    constexpr int threads() const { return 128 * (consumers() + 1); }
    // Warpgroups share a d_q tile by 64 rows if that makes all of it, else by 64 columns, transposed.
    constexpr bool dq_transposed() const { return by_role() || block_m != 64 * consumers(); }
    constexpr int dq_warps() const { return dq_transposed() ? (head_dim + 63) / 64 * 4 : 4 * consumers(); }
    // Whether tiles that a mask hides are skipped: turns are counted by the band alone.
    constexpr bool listed() const { return score.mask && !deterministic; }
    constexpr int dq_columns() const { return dq_transposed() ? 16 * dq_warps() : head_dim; }
};

// block_m of the main kernel, as every layout of the workspace depends on it.
struct BackwardPreprocessConfig {
    Mma mma;  // only the element type matters
    Copy copy;
    int dq_columns;  // floats per row of dq_accum
    int head_dim_v;
    int block_m;
    int num_warps;
    int semaphores;  // per query tile; 0 unless deterministic

    constexpr int threads() const { return 32 * num_warps; }
};

struct BackwardConvertConfig {
    Mma mma;
    Copy copy;
    int head_dim;
    int block_m;       // these four as in the main kernel
    int num_warps;
    int dq_warps_m;
    int reduce_width;
    bool transposed;   // warps hold columns of d_q as rows

    constexpr int threads() const { return 32 * num_warps; }
};

struct MaskBlocksConfig {
    int block_m;  // these two as in the main kernel
    int block_n;
    bool by_keys;    // lists are those of tiles of keys
    bool by_blocks;  // an element of the mask stands for more than one pair
    int num_warps;
};

struct BackwardGatherConfig {
    Mma mma;
    int head_dim;  // these four as in the main kernel
    int head_dim_v;
    int block_n;
    bool deterministic;
};

struct BackwardCapturedConfig {
    Mma mma;
    Copy copy;
    int head_dim;    // padded: a tile row of q and k
    int head_dim_v;  // padded: a tile row of v and out
    int block_m;     // query rows of a thread block
    int block_n;     // keys of one step
    ScoreConfig score;

    constexpr int num_warps() const { return block_m / 16; }
    constexpr int threads() const { return 2 * block_m; }
};

using BackwardBiasConfig = BackwardCapturedConfig;

struct WeightsConfig {
    Mma mma;
    Copy copy;
    int head_dim;  // padded: a tile row of q and k
    int block_m;   // rows of a tile
    int block_n;   // keys of a tile
    bool sums;     // over queries, instead of rows
    ScoreConfig score;

    constexpr int threads() const { return 2 * block_m; }
};

struct WeightsSimtConfig {
    Dtype dtype;
    int block_m;  // these three as for the forward
    int block_n;
    int columns;
    int num_warps;
    bool sums;
    ScoreConfig score;

    constexpr int threads() const { return 32 * num_warps; }
};

struct ForwardSimtConfig {
    Dtype dtype;  // stored; arithmetic is float64 for float64, float32 for the others
    int block_m;  // query rows of a thread block
    int block_n;  // keys of one step
    int columns;  // elements of an output row that a thread block computes
    int num_warps;
    ScoreConfig score;

    constexpr int threads() const { return 32 * num_warps; }
};

enum class BackwardStep { kDelta, kDKDV, kDQ, kCaptured, kBias };

struct BackwardSinksConfig {
    Dtype dtype;  // of the LSE: kF32 or kF64
    int num_warps;

    constexpr int threads() const { return 32 * num_warps; }
};

struct BackwardSimtConfig {
    BackwardStep step;
    Dtype dtype;
    int block_m;  // query rows of a thread block (kDQ, kCaptured), of one step (kDKDV, kBias)
    int block_n;  // keys of a thread block (kDKDV), of one step (kDQ, kCaptured, kBias)
    int columns;  // elements of a gradient row that a thread block computes
    int num_warps;
    ScoreConfig score;

    constexpr int threads() const { return 32 * num_warps; }
};
