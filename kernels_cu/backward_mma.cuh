// Attention backward on warp-level tensor-core instructions (mma.sync): Turing and everything after it.
//
// What    d_k and d_v of one (batch, key/value head) and block_n keys per thread block, summed over all query
//         heads of the group; and this block's share of d_q, added to a float32 workspace. d_q itself is
//         written by backward_convert.cuh; lse_log2 and delta come from backward_preprocess.cuh.
// Maths   for each query tile:  S^T = K Q^T,  P^T = exp2(S^T scale_log2 - lse_log2)    [block_n, block_m]
//                               dP^T = V dO^T,  dS^T = P^T o (dP^T - delta)            [block_n, block_m]
//                               dV += P^T dO, dK += dS^T Q     [block_n, head_dim_v], [block_n, head_dim]
//                               dQ  = dS K                                             [block_m, head_dim]
//         and at the end        d_k = scale dK,  d_v = dV.
// Blocks  grid.x = n_blocks * num_heads_kv * batch. The first key block comes first: with a causal mask it has
//         the most queries. The deterministic order is the reverse, see below.
// Who     K and V stay in shared memory, query tiles pass by. Warps come in pairs that own the same keys: the
//         value warp computes S, P and dV, the key warp dP, dS and dK. P and dS are transposed, so that they
//         are the A operand of the second product as they lie in registers, and a warp needs only one
//         large accumulator, which may therefore be 32 keys high: the operands read from shared memory
//         are what limits this kernel. P goes to the partner through shared memory in register order;
//         dS goes to everybody.
// Order   dQ of a tile is computed one step late, beside the next tile: by value warps after their dV, by key
//         warps before their dP, when they would wait for P. So a tile needs one barrier of the block and one
//         of each pair, where P changes hands, and the two kinds of warps are seldom in the same phase.
// d_q     is summed by reductions in memory, in no particular order. With `deterministic` each warp waits until
//         its predecessor, the same warp of the next key block, has added its part of the tile. Key
//         blocks then run from the last to the first: under a causal mask the last one is the first
//         to arrive at a tile. A block waits only for blocks launched before it, so the wait ends.
// Source  Dao 2023 (FlashAttention-2), algorithm 2.
#pragma once
#include "attention/block_list.cuh"
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/dq_accum.cuh"
#include "attention/epilogue.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "ptx/barrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/reduction.cuh"
#include "tile/gemm.cuh"

template <BackwardMmaConfig cfg>
struct BackwardMmaTiles {
    static constexpr int kElemBytes = elem_bytes(cfg.mma);
    using K = SmemTile<cfg.block_n, cfg.head_dim, kElemBytes>;
    using V = SmemTile<cfg.block_n, cfg.head_dim_v, kElemBytes>;
    using Q = SmemTile<cfg.block_m, cfg.head_dim, kElemBytes>;
    using dO = SmemTile<cfg.block_m, cfg.head_dim_v, kElemBytes>;
    using dS = SmemTile<cfg.block_n, cfg.block_m, kElemBytes>;  // transposed: [key][query]
    // P, and behind it the derivative of what was done to the scores, where there is one.
    static constexpr int kPBytes = cfg.block_n * cfg.block_m * kElemBytes * (cfg.score.bends() ? 2 : 1);
    static constexpr int kStatBytes = 2 * cfg.block_m * 4;  // lse_log2, then delta
    static constexpr int kBytes = K::kBytes + V::kBytes + kPBytes +
                                  cfg.num_stages * (Q::kBytes + dO::kBytes + dS::kBytes + kStatBytes);
};

template <BackwardMmaConfig cfg>
CUFLASH_DEVICE void backward_mma(ParamsOf<cfg.score, BackwardParams> const& params, u32 smem) {
    constexpr int kPairs = cfg.num_warps / 2;
    static_assert(cfg.num_warps % 2 == 0 && cfg.block_n % (16 * kPairs) == 0,
                  "every pair of warps owns a multiple of 16 keys");
    static_assert(kPairs <= 14, "every pair has a barrier of its own");
    static_assert(cfg.block_m % 16 == 0, "query rows are consumed 16 at a time");
    static_assert(cfg.num_stages == 1 || cfg.num_stages == 2, "dS of a tile lives until the next one");
    static_assert((cfg.dq_warps_m & (cfg.dq_warps_m - 1)) == 0 && (cfg.num_warps & (cfg.num_warps - 1)) == 0,
                  "a warp's blocks of dQ are found by XOR on the swizzled address");
    using Tiles = BackwardMmaTiles<cfg>;
    using TileK = typename Tiles::K;
    using TileV = typename Tiles::V;
    using TileQ = typename Tiles::Q;
    using TileDO = typename Tiles::dO;
    using TileDS = typename Tiles::dS;
    using Accum = DqAccum<cfg.block_m, cfg.head_dim, cfg.num_warps, cfg.dq_warps_m, cfg.reduce_width>;
    constexpr Mma kMma = cfg.mma;
    constexpr int kThreads = cfg.threads();
    constexpr int kM = cfg.block_n / (16 * kPairs);
    constexpr int kN = cfg.block_m / 8;
    constexpr int kSteps = cfg.block_m / step_elems(kMma);  // of a reduction over queries
    // Written out wholly, float32 is more code than the instruction cache holds; and where blocks are not in
    // step, as under a causal mask, they cannot share what is fetched.
    constexpr int kUnroll = is_16bit(kMma) ? 16 : 4;

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_n_blocks = (shape.seqlen_k + cfg.block_n - 1) / cfg.block_n;
    int const num_heads_kv = shape.num_heads / shape.group_size;
    int const block = blockIdx.x % num_n_blocks;
    int const n_block = cfg.deterministic ? num_n_blocks - 1 - block : block;
    int const head_kv = blockIdx.x / num_n_blocks % num_heads_kv;
    int const batch = blockIdx.x / num_n_blocks / num_heads_kv;
    int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    int lane = threadIdx.x % 32;
    int const pair = warp % kPairs;
    int const warp_row = pair * (16 * kM);
    int const k_begin = n_block * cfg.block_n;
    int const k_end = min(shape.seqlen_k, k_begin + cfg.block_n);
    int const qk_bytes = shape.head_dim * Tiles::kElemBytes;
    int const v_bytes = shape.head_dim_v * Tiles::kElemBytes;
    BlockRange const range = query_blocks(shape, k_begin, k_end, cfg.block_m);
    bool const ragged = k_end - k_begin < cfg.block_n;
    // The tiles of queries of a head: those of the range, or those of a list.
    constexpr bool kListed = cfg.listed();
    auto tiles_of = [&](int head) { return BlockList<kListed>(params.score, batch, head, n_block); };
    int num_tiles = (range.last - range.first) * shape.group_size;
    if constexpr (kListed) {
        num_tiles = 0;
#pragma unroll 1
        for (int i = 0; i < shape.group_size; ++i) num_tiles += tiles_of(head_kv * shape.group_size + i).length();
    }

    u32 const k_smem = smem;
    u32 const v_smem = k_smem + TileK::kBytes;
    u32 const q_smem = v_smem + TileV::kBytes;
    u32 const do_smem = q_smem + cfg.num_stages * TileQ::kBytes;
    u32 const ds_smem = do_smem + cfg.num_stages * TileDO::kBytes;
    u32 const p_smem = ds_smem + cfg.num_stages * TileDS::kBytes;
    u32 const stat_smem = p_smem + Tiles::kPBytes;

    // The query tiles of the whole group in one sequence.
    struct Position {
        int head, m_block, left;  // left: in a list, with this one
        bool is_partial;
    };
    // Where there is a next one.
    auto advance = [&](Position& at) {
        if constexpr (kListed) {
            --at.left;
#pragma unroll 1
            while (at.left <= 0) at.left = tiles_of(++at.head).length();
            auto const entry = tiles_of(at.head)[tiles_of(at.head).length() - at.left];
            at.m_block = entry.tile;
            at.is_partial = entry.is_partial;
        } else if (++at.m_block == range.last) {
            at.m_block = range.first;
            ++at.head;
        }
    };
    Position start = {head_kv * shape.group_size, range.first, 0, true};
    if constexpr (kListed) {
        --start.head;
        if (num_tiles > 0) advance(start);
    }
    auto stat_row = [&](Position at) {
        return (static_cast<i64>(batch) * shape.num_heads + at.head) * params.rows + at.m_block * cfg.block_m;
    };

    // ---- load: rows that see no key of this block, and keys that nobody sees, are not read ----
    auto load_queries = [&](Position at, int stage) {
        int const q_begin = at.m_block * cfg.block_m;
        int const row_begin = range.k_begin - q_begin, row_end = range.k_end - q_begin;
        load_tile<TileQ, kThreads, cfg.copy>(q_smem + stage * TileQ::kBytes, params.q.at(batch, at.head, q_begin),
                                             params.q.row_stride, row_begin, row_end, qk_bytes, 32 * warp + lane);
        load_tile<TileDO, kThreads, cfg.copy>(do_smem + stage * TileDO::kBytes,
                                              params.d_out.at(batch, at.head, q_begin), params.d_out.row_stride,
                                              row_begin, row_end, v_bytes, 32 * warp + lane);
#pragma unroll
        for (int i = 0; i < 2 * cfg.block_m; i += kThreads) {
            int const index = i + 32 * warp + lane;
            if (2 * cfg.block_m % kThreads != 0 && index >= 2 * cfg.block_m) break;
            int const row = index % cfg.block_m;
            char const* const stats = index < cfg.block_m ? params.lse_log2 : params.delta;
            char const* const source = stats + (stat_row(at) + row) * 4;
            u32 const target = stat_smem + stage * Tiles::kStatBytes + index * 4;
            bool const valid = row >= row_begin && row < row_end;
            if constexpr (cfg.copy == Copy::kAsync) {
                cp_async_4(target, source, valid);
            } else {
                st_shared(target, valid ? __ldg(reinterpret_cast<u32 const*>(source)) : 0);
            }
        }
        if constexpr (cfg.copy == Copy::kAsync) cp_async_commit();
    };
    auto wait_loads = [] {
        if constexpr (cfg.copy == Copy::kAsync) cp_async_wait<0>();
    };
    constexpr int kPairBarrier = 1;  // + pair; 0 is __syncthreads

    // dS K of a tile, added to the workspace.
    auto add_dq = [&](Position at, int stage) {
        float dq[Accum::kM][Accum::kN][4];
        set_zero(dq);
        gemm_tn<kMma, TileDS, TileK, cfg.block_n / step_elems(kMma), kUnroll, cfg.dq_warps_m, Accum::kWarpsN>(
            dq,
            TileDS::at(lane_address_a_trans<kMma, TileDS>(ds_smem + stage * TileDS::kBytes, lane), 0,
                       Accum::row(warp) * Tiles::kElemBytes / 16),
            TileK::at(lane_address_b_trans<kMma, TileK>(k_smem, lane), 0, Accum::col(warp) * Tiles::kElemBytes / 16));
        int* turn = nullptr;
        int order = 0;
        if constexpr (cfg.deterministic) {
            int const q_begin = at.m_block * cfg.block_m;
            int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
            order = key_blocks(shape, q_begin, q_end, cfg.block_n).last - 1 - n_block;
            turn = reinterpret_cast<int*>(params.semaphore) + stat_row(at) / cfg.block_m * cfg.num_warps + warp;
            if (lane == 0)
                while (load_acquire(turn) != order) {
                }
            __syncwarp();
        }
        float* const target = reinterpret_cast<float*>(params.dq_accum) + stat_row(at) * cfg.head_dim +
                              Accum::lane_offset(warp, lane);
#pragma unroll
        for (int m = 0; m < Accum::kM; ++m)
#pragma unroll
            for (int n = 0; n < Accum::kN; ++n)
#pragma unroll
                for (int part = 0; part < 4 / cfg.reduce_width; ++part)
                    reduce_add<cfg.reduce_width>(target + Accum::offset(m, n, part),
                                                 &dq[m][n][part * cfg.reduce_width]);
        if constexpr (cfg.deterministic) {
            __syncwarp();
            if (lane == 0) store_release(turn, order + 1);
        }
    };

    // Tile i (and dS of tile i - 1) is in shared memory when this returns, and the next one on its way.
    Position current = start;
    [[maybe_unused]] Position before = start;  // of a list
    auto previous = [&]() -> Position {
        if constexpr (kListed) return before;
        if (current.m_block > range.first) return {current.head, current.m_block - 1, 0, true};
        return {current.head - 1, range.last - 1, 0, true};
    };
    auto begin_tile = [&](int i) {
        opaque(lane);  // every address depends on it and is computed where it is used
        if constexpr (cfg.num_stages == 2) {
            wait_loads();
            __syncthreads();
            if (i + 1 < num_tiles) {
                Position next = current;
                advance(next);
                load_queries(next, (i + 1) & 1);
            }
        } else {
            if (i > 0) {
                __syncthreads();
                if (i < num_tiles) load_queries(current, 0);
                add_dq(previous(), 0);
            }
            wait_loads();
            __syncthreads();
        }
    };
    auto stage_of = [](int i) { return cfg.num_stages == 2 ? i & 1 : 0; };

    // ---- mainloop ----
    if (num_tiles > 0) {
        BlockRange const seen = key_blocks(shape, 0, shape.seqlen_q, cfg.block_n);
        load_tile<TileK, kThreads, cfg.copy>(k_smem, params.k.at(batch, head_kv, k_begin), params.k.row_stride,
                                             seen.k_begin - k_begin, seen.k_end - k_begin, qk_bytes, 32 * warp + lane);
        load_tile<TileV, kThreads, cfg.copy>(v_smem, params.v.at(batch, head_kv, k_begin), params.v.row_stride,
                                             seen.k_begin - k_begin, seen.k_end - k_begin, v_bytes, 32 * warp + lane);
        load_queries(start, 0);
    }
    constexpr int kCols = cfg.head_dim > cfg.head_dim_v ? cfg.head_dim : cfg.head_dim_v;
    float acc[kM][kCols / 8][4];  // dV of a value warp, dK of a key warp
    set_zero(acc);
    u64 const seed = cfg.score.dropout ? params.score.current_seed() : 0;
    float slope_sum = 0.f;  // of the gradient of ALiBi's slope of the head
#pragma unroll 1
    for (int i = 0; i <= num_tiles; ++i) {
        begin_tile(i);
        opaque(warp);  // else the loop may be split in two by role, and with it the barrier that all warps meet at
        bool const is_value_warp = warp < kPairs;
        int const stage = stage_of(i);
        u32 const stat_lane = stat_smem + stage * Tiles::kStatBytes + acc_col(lane, 0) * 4;
        u32 const p_lane = p_smem + pair * (kM * kSteps * 512) + lane * 16;
        constexpr int kSlopes = cfg.block_n * cfg.block_m * Tiles::kElemBytes;
        using Changes = HeadScores<cfg.score, float, is_16bit(kMma)>;
        using Fetched = typename Changes::template Fetched<true, kN>;
        Changes const head_scores(params, batch, min(current.head, shape.num_heads - 1));
        if (is_value_warp) {
            if (i < num_tiles) {
                float p[kM][kN][4];
                float slope[cfg.score.bends() ? kM : 1][cfg.score.bends() ? kN : 1][4];
                set_zero(p);
                gemm_nt<kMma, TileK, TileQ, cfg.head_dim / step_elems(kMma), kUnroll>(
                    p, lane_address_a<TileK>(k_smem + warp_row * TileK::kSlabBytes, lane),
                    lane_address_b<TileQ>(q_smem + stage * TileQ::kBytes, lane));
                // Scores that are changed come out in units of log2.
                float const scale_log2 = cfg.score.changes() ? 1.f : params.scale_log2;
                if constexpr (cfg.score.changes()) {
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
                        int const q_first = current.m_block * cfg.block_m, k_first = k_begin + warp_row + 16 * m;
                        Fetched fetched;
                        fetched.fetch(head_scores, shape, q_first, k_first, current.m_block, current.is_partial, lane);
                        float derivative[kN][4];
                        head_scores.change(p[m], derivative, fetched, 0, q_first, k_first, lane);
                        if constexpr (cfg.score.bends()) {
#pragma unroll
                            for (int n = 0; n < kN; ++n)
#pragma unroll
                                for (int j = 0; j < 4; ++j) slope[m][n][j] = derivative[n][j];
                        }
                    }
                }
#pragma unroll
                for (int n = 0; n < kN; ++n) {
                    uint2 const lse = ld_shared_v2(stat_lane + n * 32);
#pragma unroll
                    for (int m = 0; m < kM; ++m)
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            p[m][n][j] = exp2_approx(p[m][n][j] * scale_log2 - __uint_as_float(j % 2 == 0 ? lse.x : lse.y));
                }
                if (ragged || range.needs_mask(current.m_block))
                    mask_probabilities(p, shape, k_begin + warp_row, current.m_block * cfg.block_m, lane);
                // The sign says which weights are dropped: the partner needs them all the same.
                if constexpr (cfg.score.dropout) {
#pragma unroll
                    for (int n = 0; n < kN; n += 2)
#pragma unroll
                        for (int m = 0; m < kM; ++m) {
                            int const k_first = params.score.first_key + k_begin + warp_row;
                            TransposedDraws const draws = transposed_draws(
                                seed, params.score.first_batch + batch, current.head,
                                (current.m_block * cfg.block_m + 8 * n) / 16, k_first / 16 + m, lane);
#pragma unroll
                            for (int t = 0; t < 2; ++t)
#pragma unroll
                                for (int j = 0; j < 4; ++j)
                                    if (draws.of(t, j) < static_cast<u32>(params.score.dropped))
                                        p[m][n + t][j] = -p[m][n + t][j];
                        }
                }
#pragma unroll
                for (int k = 0; k < kSteps; ++k)
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
                        st_shared_v4(p_lane + (k * kM + m) * 512, acc_to_words<kMma>(p[m], k));
                        if constexpr (cfg.score.bends())
                            st_shared_v4(p_lane + kSlopes + (k * kM + m) * 512, acc_to_words<kMma>(slope[m], k));
                    }
                barrier_sync(kPairBarrier + pair, 64);
                if constexpr (cfg.score.dropout) {
#pragma unroll
                    for (int m = 0; m < kM; ++m)
#pragma unroll
                        for (int n = 0; n < kN; ++n)
#pragma unroll
                            for (int j = 0; j < 4; ++j) p[m][n][j] = fmaxf(p[m][n][j], 0.f);
                }
                gemm_acc_nn<kMma, TileDO>(acc, p,
                                          lane_address_b_trans<kMma, TileDO>(do_smem + stage * TileDO::kBytes, lane));
            }
            if (cfg.num_stages == 2 && i > 0) add_dq(previous(), stage ^ 1);
        } else {
            if (cfg.num_stages == 2 && i > 0) add_dq(previous(), stage ^ 1);
            if (i < num_tiles) {
                float ds[kM][kN][4];
                set_zero(ds);
                gemm_nt<kMma, TileV, TileDO, cfg.head_dim_v / step_elems(kMma), kUnroll>(
                    ds, lane_address_a<TileV>(v_smem + warp_row * TileV::kSlabBytes, lane),
                    lane_address_b<TileDO>(do_smem + stage * TileDO::kBytes, lane));
                barrier_sync(kPairBarrier + pair, 64);
                constexpr int kTiles = step_elems(kMma) / 8;
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    float delta[kTiles][2];
#pragma unroll
                    for (int n = 0; n < kTiles; ++n) {
                        uint2 const words = ld_shared_v2(stat_lane + cfg.block_m * 4 + (k * kTiles + n) * 32);
                        delta[n][0] = __uint_as_float(words.x);
                        delta[n][1] = __uint_as_float(words.y);
                    }
#pragma unroll
                    for (int m = 0; m < kM; ++m) {
                        float p[kTiles][4], slope[kTiles][4];
                        words_to_acc<kMma>(p, ld_shared_v4(p_lane + (k * kM + m) * 512));
                        if constexpr (cfg.score.bends())
                            words_to_acc<kMma>(slope, ld_shared_v4(p_lane + kSlopes + (k * kM + m) * 512));
#pragma unroll
                        for (int n = 0; n < kTiles; ++n)
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                float& x = ds[m][k * kTiles + n][j];
                                if constexpr (cfg.score.dropout) {
                                    bool const is_dropped = __float_as_uint(p[n][j]) >> 31;
                                    x = is_dropped ? 0.f : x * params.score.kept_scale_f32;
                                    p[n][j] = fabsf(p[n][j]);
                                }
                                x = p[n][j] * (x - delta[n][j % 2]);
                            }
                        float(&x)[kTiles][4] = reinterpret_cast<float(&)[kTiles][4]>(ds[m][k * kTiles]);
                        int const q_first = current.m_block * cfg.block_m + 8 * k * kTiles;
                        int const k_first = k_begin + warp_row + 16 * m;
                        if constexpr (cfg.score.bias != Bias::kNone)
                            if (params.d_bias.pointer != nullptr)
                                add_by_pairs(params.d_bias, params.d_bias.at(batch, current.head), x, q_first, k_first, lane);
                        Distances<true> const distance(params.score.q_offset, q_first, k_first, lane);
#pragma unroll
                        for (int n = 0; n < kTiles; ++n)
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                if constexpr (cfg.score.alibi) slope_sum -= x[n][j] * distance(n, j);
                                if constexpr (cfg.score.bends()) x[n][j] = by_derivative<cfg.score>(x[n][j], slope[n][j]);
                            }
                    }
                }
                acc_to_smem<kMma, TileDS>(ds_smem + stage * TileDS::kBytes, ds, warp_row, lane);
                gemm_acc_nn<kMma, TileQ>(acc, ds,
                                         lane_address_b_trans<kMma, TileQ>(q_smem + stage * TileQ::kBytes, lane));
            }
        }
        if constexpr (cfg.score.alibi) {
            // The last tile of a head: each key warp leaves its sum, for somebody to add up in a fixed order.
            bool const is_last = kListed ? current.left == 1 : current.m_block + 1 == range.last;
            if (params.slope_sums != nullptr && !is_value_warp && i < num_tiles && is_last) {
#pragma unroll
                for (int distance = 1; distance < 32; distance *= 2)
                    slope_sum += __shfl_xor_sync(0xffffffffu, slope_sum, distance);
                i64 const index =
                    ((static_cast<i64>(batch) * shape.num_heads + current.head) * num_n_blocks + n_block) * kPairs + pair;
                if (lane == 0) reinterpret_cast<float*>(params.slope_sums)[index] = slope_sum;
                slope_sum = 0.f;
            }
        }
        if constexpr (kListed) {
            before = current;
            if (i + 1 < num_tiles) advance(current);
        } else {
            advance(current);
        }
    }

    // ---- epilogue: dV replaces V, and dK replaces K, which nobody reads any more ----
    __syncthreads();
    bool const is_value_warp = warp < kPairs;
    float const value_factor = cfg.score.dropout ? params.score.kept_scale_f32 : 1.f;
    float const factor = is_value_warp ? value_factor : static_cast<float>(params.scale);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[m][n][j] *= factor;
    if (is_value_warp) {
        acc_to_smem<kMma, TileV>(v_smem, acc, warp_row, lane);
    } else {
        acc_to_smem<kMma, TileK>(k_smem, acc, warp_row, lane);
    }
    __syncthreads();
    store_tile<TileV, cfg.block_n, kThreads, cfg.copy>(params.d_v.at(batch, head_kv, k_begin), params.d_v.row_stride,
                                                       v_smem, 0, k_end - k_begin, v_bytes, 32 * warp + lane);
    store_tile<TileK, cfg.block_n, kThreads, cfg.copy>(params.d_k.at(batch, head_kv, k_begin), params.d_k.row_stride,
                                                       k_smem, 0, k_end - k_begin, qk_bytes, 32 * warp + lane);
}
