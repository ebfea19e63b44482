// Attention forward on warp-level tensor-core instructions (mma.sync): Turing and everything after it.
//
// What    out = softmax(scale * q k^T over visible keys) v and lse, for one (batch, head) and block_m
//         query rows per thread block; the scores live in registers only.
// Maths   for each key tile:  S = Q K^T                               [block_m, block_n]
//                             m' = max(m, rowmax S), P = exp2((S - m') scale_log2)
//                             l = l alpha + rowsum P,  O = O alpha + P V   [block_m, head_dim_v]
//         and at the end      out = O / l,  lse = scale m + ln l.
// Blocks  grid.x = m_blocks * num_heads * batch. The last query block comes first: with a causal mask it
//         has the most keys, and the short ones then fill the gaps at the end.
// Who     each warp owns block_m / num_warps query rows from load to store: softmax needs no exchange
//         beyond a quad of lanes. All threads copy K and V tiles, num_stages ahead.
// Order   keys run from the last tile to the first. With `overlap` the loop departs from the plain order:
//         P V of the previous tile is issued between the exponentials of the current one, because
//         they use different pipes and do not depend on each other.
// Source  Dao 2023 (FlashAttention-2), algorithm 1; overlap after Shah et al. 2024 (FlashAttention-3), 3.2.
#pragma once
#include "attention/block_list.cuh"
#include "attention/block_range.cuh"
#include "attention/config.cuh"
#include "attention/epilogue.cuh"
#include "attention/mask.cuh"
#include "attention/philox.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "tile/gemm.cuh"

template <ForwardMmaConfig cfg>
struct ForwardMmaTiles {
    static constexpr int kElemBytes = elem_bytes(cfg.mma);
    using Q = SmemTile<cfg.block_m, cfg.head_dim, kElemBytes>;
    using K = SmemTile<cfg.block_n, cfg.head_dim, kElemBytes>;
    using V = SmemTile<cfg.block_n, cfg.head_dim_v, kElemBytes>;
    using O = SmemTile<cfg.block_m, cfg.head_dim_v, kElemBytes>;
    // O is staged where Q was; K and V follow.
    static constexpr int kQBytes = Q::kBytes > O::kBytes ? Q::kBytes : O::kBytes;
    static constexpr int kBytes = kQBytes + cfg.num_stages * (K::kBytes + V::kBytes);
};

template <ForwardMmaConfig cfg>
CUFLASH_DEVICE void forward_mma(ParamsOf<cfg.score, ForwardParams> const& params, u32 smem) {
    static_assert(cfg.block_m % (16 * cfg.num_warps) == 0, "every warp owns a multiple of 16 query rows");
    static_assert(cfg.block_n % 16 == 0, "keys are consumed 16 at a time");
    static_assert(!cfg.overlap || is_16bit(cfg.mma), "overlap keeps P packed in 16 bits");
    static_assert(cfg.num_stages >= 2, "one tile is computed while the next ones arrive");
    static_assert(!cfg.overlap || cfg.num_stages == 2, "overlap reads V one tile later than K: two stages of each");
    using Tiles = ForwardMmaTiles<cfg>;
    using TileQ = typename Tiles::Q;
    using TileK = typename Tiles::K;
    using TileV = typename Tiles::V;
    using TileO = typename Tiles::O;
    constexpr Mma kMma = cfg.mma;
    constexpr int kThreads = cfg.threads();
    constexpr int kM = cfg.block_m / (16 * cfg.num_warps);
    constexpr int kN = cfg.block_n / 8;
    constexpr int kNV = cfg.head_dim_v / 8;
    constexpr int kStepsQK = cfg.head_dim / step_elems(kMma);
    constexpr int kStepsPV = cfg.block_n / step_elems(kMma);

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const num_m_blocks = (shape.seqlen_q + cfg.block_m - 1) / cfg.block_m;
    int const m_block = num_m_blocks - 1 - static_cast<int>(blockIdx.x % num_m_blocks);
    int const head = blockIdx.x / num_m_blocks % shape.num_heads;
    int const batch = blockIdx.x / num_m_blocks / shape.num_heads;
    int const thread = threadIdx.x;
    int const lane = thread % 32;
    int const warp_row = (thread / 32) * (16 * kM);
    int const q_begin = m_block * cfg.block_m;
    int const q_end = min(shape.seqlen_q, q_begin + cfg.block_m);
    int const head_kv = head / shape.group_size;
    int const qk_bytes = shape.head_dim * Tiles::kElemBytes;
    int const v_bytes = shape.head_dim_v * Tiles::kElemBytes;
    BlockRange const range = key_blocks(shape, q_begin, q_end, cfg.block_n);
    BlockList<cfg.score.mask> const tiles(params.score, batch, head, m_block);
    int const first = tiles.first(range.first), last = tiles.last(range.last);

    u32 const q_smem = smem;
    u32 const k_smem = q_smem + Tiles::kQBytes;
    u32 const v_smem = k_smem + cfg.num_stages * TileK::kBytes;

    // ---- load: keys that no query of the block sees are not read ----
    char const* const k_gmem = params.k.at(batch, head_kv, 0);
    char const* const v_gmem = params.v.at(batch, head_kv, 0);
    auto load_k = [&](int position, int stage) {
        if (position < first) return;
        int const n = tiles[position].tile;
        load_tile<TileK, kThreads, cfg.copy>(k_smem + stage * TileK::kBytes,
                                             k_gmem + static_cast<i64>(n) * cfg.block_n * params.k.row_stride,
                                             params.k.row_stride, range.k_begin - n * cfg.block_n,
                                             range.k_end - n * cfg.block_n, qk_bytes, thread);
    };
    auto load_v = [&](int position, int stage) {
        if (position < first) return;
        int const n = tiles[position].tile;
        load_tile<TileV, kThreads, cfg.copy>(v_smem + stage * TileV::kBytes,
                                             v_gmem + static_cast<i64>(n) * cfg.block_n * params.v.row_stride,
                                             params.v.row_stride, range.k_begin - n * cfg.block_n,
                                             range.k_end - n * cfg.block_n, v_bytes, thread);
    };
    auto commit = [] {
        if constexpr (cfg.copy == Copy::kAsync) cp_async_commit();
    };
    // Waits for this thread's copies but those of the newest groups, then for everybody's: the tile has
    // arrived, and every warp has finished with the tile before it, whose stage may be refilled.
    auto wait = [](auto pending) {
        if constexpr (cfg.copy == Copy::kAsync) cp_async_wait<decltype(pending)::value>();
        __syncthreads();
    };
    constexpr Constant<0> kAll{};

    // ---- state of the warp's rows ----
    float o[kM][kNV][4];
    set_zero(o);
    OnlineSoftmax<kM> softmax;
    softmax.init();
    // Scores that are changed come out in units of log2.
    constexpr bool kChanged = cfg.score.changes();
    float const scale_log2 = kChanged ? 1.f : params.scale_log2;
    using Changes = HeadScores<cfg.score, float, is_16bit(kMma)>;
    using Fetched = typename Changes::template Fetched<false, kN>;
    Changes const head_scores(params, batch, head);
    u64 const seed = cfg.score.dropout ? params.score.current_seed() : 0;
    if constexpr (cfg.score.sinks)
        softmax.init_sink(*reinterpret_cast<float const*>(params.score.sinks.at(0, head)) * kLog2E / scale_log2, lane);

    u32 const q_lane = lane_address_a<TileQ>(q_smem + warp_row * TileQ::kSlabBytes, lane);
    u32 const k_lane = lane_address_b<TileK>(k_smem, lane);
    u32 const v_lane = lane_address_b_trans<kMma, TileV>(v_smem, lane);

    // S of tile n, masked where needed. [16 kM, block_n] per warp
    auto scores = [&](float (&s)[kM][kN][4], int position, int stage) {
        auto const [n, is_partial] = tiles[position];
        set_zero(s);
        gemm_nt<kMma, TileQ, TileK, kStepsQK>(s, q_lane, k_lane + stage * TileK::kBytes);
        if constexpr (kChanged) {
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                int const q_first = q_begin + warp_row + 16 * m;
                Fetched fetched;
                fetched.fetch(head_scores, shape, q_first, n * cfg.block_n, n, is_partial, lane);
                float derivative[kN][4];
                head_scores.change(s[m], derivative, fetched, 0, q_first, n * cfg.block_n, lane);
            }
        } else if (params.score_sign < 0.f) {
            float flip[kM][2];
#pragma unroll
            for (int m = 0; m < kM; ++m) flip[m][0] = flip[m][1] = -1.f;
            scale_rows(s, flip);
        }
        if (range.needs_mask(n)) {
            int q_idx[kM][2];
#pragma unroll
            for (int m = 0; m < kM; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) q_idx[m][h] = q_begin + warp_row + 16 * m + acc_row(lane, 2 * h);
            mask_scores(s, shape, q_idx, n * cfg.block_n, lane);
        }
    };
    // P of the columns of one k-step, from S and the row shifts; adds to the row sums.
    auto probabilities = [&](float (&s)[kM][kN][4], int k_step) {
        constexpr int kTiles = step_elems(kMma) / 8;
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float const shift = softmax.shift_log2(m, h, scale_log2);
#pragma unroll
                for (int n = k_step * kTiles; n < (k_step + 1) * kTiles; ++n)
#pragma unroll
                    for (int i = 2 * h; i < 2 * h + 2; ++i) {
                        s[m][n][i] = exp2_approx(s[m][n][i] * scale_log2 - shift);
                        softmax.row_sum[m][h] += s[m][n][i];
                    }
            }
    };

    // Dropped weights become 0, of the columns of tiles t and t + 1 of tile n; their sums are taken before.
    auto drop = [&](float (&s)[kM][kN][4], int position, int t) {
        if constexpr (cfg.score.dropout) {
            int const k_first = params.score.first_key + tiles[position].tile * cfg.block_n + 8 * t;
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                DropoutDraws const draws =
                    dropout_draws(seed, params.score.first_batch + batch, head,
                                  (q_begin + warp_row) / 16 + m, k_first / 16, lane);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (draws.of(j, i) < static_cast<u32>(params.score.dropped)) s[m][t + j][i] = 0.f;
            }
        }
    };

    load_tile<TileQ, kThreads, cfg.copy>(q_smem, params.q.at(batch, head, q_begin), params.q.row_stride, 0,
                                         q_end - q_begin, qk_bytes, thread);

    // ---- mainloop ----
    int n = last - 1;
    float alpha[kM][2];
    if constexpr (cfg.overlap) {
        if (first < last) {
            FragmentA<kMma> p[kStepsPV][kM];
            // Tile n has its K and its V in stage n % 2.
            load_k(n, n & 1);
            commit();
            wait(kAll);
            load_k(n - 1, (n - 1) & 1);
            load_v(n, n & 1);
            commit();
            {
                float s[kM][kN][4];
                scores(s, n, n & 1);
                softmax.update(s, alpha, scale_log2);
#pragma unroll
                for (int k = 0; k < kStepsPV; ++k) {
                    probabilities(s, k);
                    drop(s, n, 2 * k);
#pragma unroll
                    for (int m = 0; m < kM; ++m) acc_to_a(p[k][m], s[m], k);
                }
            }
#pragma unroll 1
            for (--n; n >= first; --n) {
                wait(kAll);
                load_k(n - 1, (n - 1) & 1);
                load_v(n, n & 1);
                commit();
                float s[kM][kN][4];
                scores(s, n, n & 1);
                bool const rescale = softmax.update(s, alpha, scale_log2);
#pragma unroll
                for (int k = 0; k < kStepsPV; ++k) {
                    gemm_nn_step<kMma, TileV>(o, p[k], v_lane + ((n + 1) & 1) * TileV::kBytes, k);
                    probabilities(s, k);
                    drop(s, n, 2 * k);
#pragma unroll
                    for (int m = 0; m < kM; ++m) acc_to_a(p[k][m], s[m], k);
                }
                if (rescale) scale_rows(o, alpha);
            }
            wait(kAll);
#pragma unroll
            for (int k = 0; k < kStepsPV; ++k)
                gemm_nn_step<kMma, TileV>(o, p[k], v_lane + ((n + 1) & 1) * TileV::kBytes, k);
        } else {
            wait(kAll);  // Q is still on its way to where O will be staged
        }
    } else {
        constexpr int kAhead = cfg.num_stages - 1;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            load_k(n - i, i);
            load_v(n - i, i);
            commit();
        }
        int stage = 0;
#pragma unroll 1
        for (; n >= first; --n, stage = stage == kAhead ? 0 : stage + 1) {
            wait(Constant<kAhead - 1>{});
            int const refill = stage == 0 ? kAhead : stage - 1;
            load_k(n - kAhead, refill);
            load_v(n - kAhead, refill);
            commit();
            float s[kM][kN][4];
            scores(s, n, stage);
            if (softmax.update(s, alpha, scale_log2)) scale_rows(o, alpha);
#pragma unroll
            for (int k = 0; k < kStepsPV; ++k) probabilities(s, k);
#pragma unroll
            for (int k = 0; k < kN; k += 2) drop(s, n, k);
            u32 const v_tile = v_lane + stage * TileV::kBytes;
            if constexpr (is_16bit(kMma)) {
#pragma unroll
                for (int k = 0; k < kStepsPV; ++k) {
                    FragmentA<kMma> p[kM];
#pragma unroll
                    for (int m = 0; m < kM; ++m) acc_to_a(p[m], s[m], k);
                    gemm_nn_step<kMma, TileV>(o, p, v_tile, k);
                }
            } else {
                FragmentA<kMma> p[kM][kStepsPV];
#pragma unroll
                for (int k = 0; k < kStepsPV; ++k)
#pragma unroll
                    for (int m = 0; m < kM; ++m) acc_to_a(p[m][k], s[m], k);
                gemm_nn_rounded<kMma, TileV>(o, p, v_tile);
            }
        }
        wait(kAll);  // with no tile at all, Q is still on its way to where O will be staged
    }

    // ---- epilogue ----
    softmax.finish();
    float inverse[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float const sum = softmax.row_sum[m][h];
            inverse[m][h] = sum == 0.f ? 0.f : (cfg.score.dropout ? params.score.kept_scale_f32 : 1.f) / sum;
            int const q_idx = q_begin + warp_row + 16 * m + acc_row(lane, 2 * h);
            if (params.lse != nullptr && lane % 4 == 0 && q_idx < q_end) {
                i64 const index = (static_cast<i64>(batch) * shape.num_heads + head) * shape.seqlen_q + q_idx;
                float const lse = (softmax.shift_log2(m, h, scale_log2) + log2_approx(sum)) * kLn2;
                reinterpret_cast<float*>(params.lse)[index] = sum == 0.f ? -infinity() : lse;
            }
        }
    scale_rows(o, inverse);
    // O replaces Q.
    if constexpr (TileO::kBytes != TileQ::kBytes) __syncthreads();  // else a warp overwrites only rows it alone read
    acc_to_smem<kMma, TileO>(q_smem, o, warp_row, lane);
    __syncthreads();
    store_tile<TileO, cfg.block_m, kThreads, cfg.copy>(params.out.at(batch, head, q_begin), params.out.row_stride,
                                                       q_smem, 0, q_end - q_begin, v_bytes, thread);
}
