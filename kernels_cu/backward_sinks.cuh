// Attention backward, gradient by the sinks: the logits of keys whose value is 0.
//
// What    for each (batch, head):  -sum over rows of exp(sink - lse) delta,  as a key of value 0 has dP = 0.
// Blocks  grid.x = num_heads * batch, and nothing is done where the gradient is not wanted.
// Who     all threads take rows in turn, and each warp adds up its own. The sums over warps and batches are left to the caller.
#pragma once
#include "attention/config.cuh"
#include "attention/params.cuh"
#include "ptx/math.cuh"
#include "tile/element.cuh"

template <BackwardSinksConfig cfg>
CUFLASH_DEVICE void backward_sinks(BackwardParams const& params, u32 /*smem*/) {
    using Acc = typename Element<cfg.dtype>::Acc;
    if (params.sink_sums == nullptr) return;
    Shape const& shape = params.shape;
    int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    i64 const head = blockIdx.x;  // of all batches
    Acc const sink_log2 =
        *reinterpret_cast<Acc const*>(params.score.sinks.at(0, blockIdx.x % shape.num_heads)) * Log2<Acc>::kE;
    Acc const* const lse = reinterpret_cast<Acc const*>(params.lse) + head * shape.seqlen_q;
    Acc const* const delta = reinterpret_cast<Acc const*>(params.delta) + head * params.rows;
    Acc sum = 0;
    if (sink_log2 > -infinity())
        for (int i = thread; i < shape.seqlen_q; i += cfg.threads())
            sum -= exp2_acc(sink_log2 - lse[i] * Log2<Acc>::kE) * delta[i];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) reinterpret_cast<Acc*>(params.sink_sums)[head * cfg.num_warps + warp] = sum;
}
