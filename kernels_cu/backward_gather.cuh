// Attention backward on Hopper, after the main step: d_k and d_v of tiles of keys that several blocks had parts of.
//
// What    the sum of what they left in the workspace, in the order of the parts, whoever came first; rounded.
// Blocks  grid.x = tiles in parts * warps of the main kernel that have d_k and d_v: 16 keys each.
// Who     each warp takes 32 of the columns, as accumulators like those of the main kernel.
//
// A kernel of its own, since in the main one, where the last block to be done with a tile could do this, ptxas then orders
// the loop over steps such that it takes 2 to 4 % longer.
#pragma once
#include "attention/epilogue.cuh"
#include "attention/config.cuh"
#include "attention/tile_order.cuh"
#include "attention/tile_parts.cuh"

template <BackwardGatherConfig cfg>
CUFLASH_DEVICE void backward_gather(BackwardWgmmaParams const& params, u32 /*smem*/) {
    using Accum = PartAccum<cfg.block_n, cfg.head_dim, cfg.head_dim_v>;
    static_assert(cfg.head_dim % 32 == 0 && cfg.head_dim_v % 32 == 0, "columns are taken 32 at a time");

    // ---- coordinates ----
    Shape const& shape = params.shape;
    int const tile = blockIdx.x / Accum::kWarps;  // of the tail
    int const warp = blockIdx.x % Accum::kWarps;  // of those that have d_k and d_v
    int const lane = threadIdx.x % 32;
    TileCoordinates const at = tile_of_keys(params.order, params.tail.first_tile + tile, cfg.deterministic);
    int const first_row = at.block * cfg.block_n + Accum::row(warp);
    Places const places = Places::of_tile(params.tail, tile);
    int const n = threadIdx.x / 32 * 4;
    bool const is_dv = Accum::is_dv(warp, n);
    int const first_byte = (n - (is_dv && !Accum::kByRole ? cfg.head_dim / 8 : 0)) * 16;
    int const row_bytes = (is_dv ? shape.head_dim_v : shape.head_dim) * 2;
    if (first_byte >= row_bytes) return;

    // ---- sum; most tiles are in two or three parts ----
    float const* const parts = reinterpret_cast<float const*>(params.parts) + Accum::offset(warp, n, lane);
    constexpr int kAtOnce = 2;
    float acc[4][4] = {};
    for (int place = places.first; place < places.end; place += kAtOnce) {
        float4 x[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                x[i][j] = place + i >= places.end ? float4{}
                                                  : __ldg(reinterpret_cast<float4 const*>(
                                                        parts + (place + i) * i64{Accum::kElems} + j * 128));
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                acc[j][0] += x[i][j].x;
                acc[j][1] += x[i][j].y;
                acc[j][2] += x[i][j].z;
                acc[j][3] += x[i][j].w;
            }
    }

    // ---- store ----
    float const scale = static_cast<float>(is_dv ? params.score.kept_scale : params.scale);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] *= scale;
    Operand const& target = is_dv ? params.d_v : params.d_k;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int const k_idx = first_row + lane / 4 + 8 * h;
        store_acc_row<cfg.mma, true>(target.at(at.batch, at.head, k_idx) + first_byte, acc, h, k_idx < shape.seqlen_k,
                                     row_bytes - first_byte, lane);
    }
}
