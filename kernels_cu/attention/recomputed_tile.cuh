// The scores of a tile once more, for gradients that have a kernel of their own: S = Q K^T and dP = dO V^T by warps that own
// 16 query rows each, and what follows from them pair by pair. Nothing here is tuned.
#pragma once
#include "../ptx/opaque.cuh"
#include "../tile/gemm.cuh"
#include "config.cuh"
#include "mask.cuh"
#include "philox.cuh"
#include "score.cuh"

template <auto cfg>
struct RecomputedTiles {
    static constexpr int kElemBytes = elem_bytes(cfg.mma);
    using Q = SmemTile<cfg.block_m, cfg.head_dim, kElemBytes>;
    using dO = SmemTile<cfg.block_m, cfg.head_dim_v, kElemBytes>;
    using K = SmemTile<cfg.block_n, cfg.head_dim, kElemBytes>;
    using V = SmemTile<cfg.block_n, cfg.head_dim_v, kElemBytes>;
    static constexpr int kDO = Q::kBytes;
    static constexpr int kK = kDO + dO::kBytes;
    static constexpr int kV = kK + K::kBytes;
    static constexpr int kBytes = kV + V::kBytes;
};

// `Params`: those of the main kernel, whose delta it reads.
template <auto cfg, class Params>
struct RecomputedTile {
    static_assert(cfg.block_m % 16 == 0, "every warp owns 16 query rows");
    using Tiles = RecomputedTiles<cfg>;
    using Changes = HeadScores<cfg.score, float, is_16bit(cfg.mma)>;
    static constexpr int kN = cfg.block_n / 8;

    Params const& params;
    u32 const smem;
    int const lane, warp_row;
    // Of the lane's two queries.
    int q_idx[1][2];
    float lse_log2[2], delta[2];

    CUFLASH_DEVICE RecomputedTile(Params const& params, u32 smem)
        : params(params),
          smem(smem),
          lane(threadIdx.x % 32),
          warp_row(static_cast<int>(threadIdx.x) / 32 * 16) {}

    template <class Tile>
    CUFLASH_DEVICE void load(u32 offset, Operand const& operand, int batch, int head, int row, int begin, int end,
                             int dim) const {
        int thread = threadIdx.x;
        opaque(thread);  // addresses are computed where they are used
        load_tile<Tile, cfg.threads(), cfg.copy>(smem + offset, operand.at(batch, head, row), operand.row_stride, begin,
                                                 end, dim * Tiles::kElemBytes, thread);
    }
    CUFLASH_DEVICE void load_queries(int batch, int head, int q_begin, int q_end) {
        Shape const& shape = params.shape;
        load<typename Tiles::Q>(0, params.q, batch, head, q_begin, 0, q_end - q_begin, shape.head_dim);
        load<typename Tiles::dO>(Tiles::kDO, params.d_out, batch, head, q_begin, 0, q_end - q_begin, shape.head_dim_v);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            q_idx[0][h] = q_begin + warp_row + acc_row(lane, 2 * h);
            bool const exists = q_idx[0][h] < q_end;
            i64 const of_head = static_cast<i64>(batch) * shape.num_heads + head;
            float const lse =
                exists ? __ldg(reinterpret_cast<float const*>(params.lse) + of_head * shape.seqlen_q + q_idx[0][h]) : 0.f;
            // Where nothing is seen, P is 0.
            lse_log2[h] = exists && lse != -infinity() ? lse * kLog2E : infinity();
            delta[h] = exists ? __ldg(reinterpret_cast<float const*>(params.delta) + of_head * params.rows + q_idx[0][h]) : 0.f;
        }
    }
    // Of the keys [k_begin, k_end) those of the tile from k_first on.
    CUFLASH_DEVICE void load_keys(int batch, int head_kv, int k_first, int k_begin, int k_end) const {
        Shape const& shape = params.shape;
        int const begin = k_begin - k_first, end = k_end - k_first;
        load<typename Tiles::K>(Tiles::kK, params.k, batch, head_kv, k_first, begin, end, shape.head_dim);
        load<typename Tiles::V>(Tiles::kV, params.v, batch, head_kv, k_first, begin, end, shape.head_dim_v);
    }
    CUFLASH_DEVICE static void wait_loads() {
        if constexpr (cfg.copy == Copy::kAsync) {
            cp_async_commit();
            cp_async_wait<0>();
        }
    }
    // By all lanes, of every pair that they hold as register i of columns 8 n:
    // `use(n, i, q.k times scale, gradient by the score as it is before the softmax, query, key)`; past the ends the last ones.
    template <class Use>
    CUFLASH_DEVICE void for_each_pair(Changes const& head_scores, int batch, int head, int k_first, bool is_masked,
                                      Use use) const {
        constexpr Mma kMma = cfg.mma;
        constexpr int kUnroll = 4;  // code is little beside what is done to scores
        Shape const& shape = params.shape;
        int lane = this->lane;
        opaque(lane);
        float s[1][kN][4], p[1][kN][4], dp[1][kN][4];
        set_zero(s);
        set_zero(dp);
        gemm_nt<kMma, typename Tiles::Q, typename Tiles::K, cfg.head_dim / step_elems(kMma), kUnroll>(
            s, lane_address_a<typename Tiles::Q>(smem + warp_row * Tiles::Q::kSlabBytes, lane),
            lane_address_b<typename Tiles::K>(smem + Tiles::kK, lane));
        gemm_nt<kMma, typename Tiles::dO, typename Tiles::V, cfg.head_dim_v / step_elems(kMma), kUnroll>(
            dp, lane_address_a<typename Tiles::dO>(smem + Tiles::kDO + warp_row * Tiles::dO::kSlabBytes, lane),
            lane_address_b<typename Tiles::V>(smem + Tiles::kV, lane));
        float const scale = static_cast<float>(params.scale), kept_scale = params.score.kept_scale_f32;
        auto query = [&](int i) { return min(q_idx[0][i / 2], shape.seqlen_q - 1); };
        auto key = [&](int n, int i) { return min(k_first + 8 * n + acc_col(lane, i), shape.seqlen_k - 1); };
        auto for_each = [&](auto body) {
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) body(n, i);
        };
        for_each([&](int n, int i) {
            s[0][n][i] *= scale;
            p[0][n][i] = head_scores(s[0][n][i], query(i), key(n, i));
        });
        if (is_masked) mask_scores(p, shape, q_idx, k_first, lane);
        for_each([&](int n, int i) {
            float const weight = exp2_approx(p[0][n][i] - lse_log2[i / 2]);
            float d = dp[0][n][i];
            if constexpr (cfg.score.dropout)
                d = is_kept(params.score, true, batch, head, query(i), key(n, i)) ? d * kept_scale : 0.f;
            use(n, i, s[0][n][i], weight == 0.f ? 0.f : weight * (d - delta[i / 2]), query(i), key(n, i));
        });
    }
};
