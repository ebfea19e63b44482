// Products of one thread block on ordinary FMA instructions, for what tensor cores do not take: any
// element type, any alignment, any length of the reduction.
//
// A block keeps kRows "stationary" rows and meets kCols "moving" rows at a time:
//   multiply_nt   S[kRows, kCols]    += A[kRows, dim] B[kCols, dim]^T      both operands from global memory
//   multiply_nn   O[kRows, kColumns] += P[kRows, kCols] B[kCols, kColumns]  P from shared memory
// Operands pass through shared memory in pieces of the reduction axis. kThreads / 16 x 16 threads share
// a tile; a thread owns kM neighbouring rows of it and
//   of S:  columns c + 16 j, where c is its place among the 16;
//   of O:  columns (16 g + c) kVec + e, which are 16 bytes per g.
// Shared memory is read 16 bytes at a time along rows; the padding of a row makes sixteen of them one
// after the other free of bank conflicts.
#pragma once
#include "element.cuh"

// Rows of an operand with contiguous elements; those outside [begin, end) count as zero and are not read.
struct RowTile {
    char const* gmem;  // row 0
    i64 stride;        // in bytes
    int begin, end;
};

template <class T>
struct alignas(16) Vector {
    T x[16 / sizeof(T)];
};

template <Dtype kDtype, int kTileRows, int kTileCols, int kTileColumns, int kBlockThreads>
struct BlockGemm {
    using Stored = typename Element<kDtype>::Stored;
    using Acc = typename Element<kDtype>::Acc;

    static constexpr int kRows = kTileRows;
    static constexpr int kCols = kTileCols;
    static constexpr int kColumns = kTileColumns;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kVec = 16 / sizeof(Acc);
    static constexpr int kM = kRows * 16 / kThreads;
    static constexpr int kN = kCols / 16;
    static constexpr int kGroups = kColumns / (16 * kVec);
    static constexpr int kDepthNt = 64 / sizeof(Acc);                 // of dim, per piece
    static constexpr int kDepthNn = 8192 / (kColumns * sizeof(Acc));  // of the moving rows, per piece
    static constexpr int kPitchNt = kDepthNt + kVec;
    static constexpr int kPitchP = kCols + kVec;
    static constexpr int kStageNt = (kRows + kCols) * kPitchNt;
    static constexpr int kStageNn = kDepthNn * kColumns;
    static constexpr int kStage = kStageNt > kStageNn ? kStageNt : kStageNn;
    static constexpr int kBytes = (kStage + kRows * kPitchP) * sizeof(Acc);
    static_assert(kRows * 16 % kThreads == 0 && kThreads % 32 == 0, "16 threads share a row");
    static_assert(kCols % 16 == 0 && kColumns % (16 * kVec) == 0, "a thread owns the same share of every row");
    static_assert(kCols % kDepthNn == 0 && kDepthNn % kVec == 0, "pieces of P are whole and start on 16 bytes");
    static_assert(kBytes <= 48 * 1024, "fits every device without asking");

    using TileS = Acc[kM][kN];
    using TileO = Acc[kM][kGroups][kVec];

    Acc* stage;  // pieces of the operands
    Acc* p;      // [kRows][kPitchP]
    int thread;

    CUFLASH_DEVICE BlockGemm(u32 smem, int thread)
        : stage(static_cast<Acc*>(__cvta_shared_to_generic(smem))), p(stage + kStage), thread(thread) {}

    // Places in the tile that belong to this thread.
    CUFLASH_DEVICE int row(int i) const { return thread / 16 * kM + i; }
    CUFLASH_DEVICE int col(int j) const { return thread % 16 + 16 * j; }
    CUFLASH_DEVICE int column(int g, int e) const { return (16 * g + thread % 16) * kVec + e; }
    CUFLASH_DEVICE Acc& p_at(int i, int j) const { return p[row(i) * kPitchP + col(j)]; }

    static CUFLASH_DEVICE Vector<Acc> load_vector(Acc const* smem) {
        return *reinterpret_cast<Vector<Acc> const*>(smem);
    }

    // kCount rows from `first_row`, kWidth elements of each from `first`; what does not exist becomes zero.
    // A thread keeps one column and steps down the rows.
    template <int kCount, int kWidth, int kPitch>
    CUFLASH_DEVICE void stage_rows(Acc* smem, RowTile const& tile, int first_row, int first, int dim) const {
        constexpr int kRowsPerStep = kThreads / kWidth;
        constexpr int kSteps = kCount / kRowsPerStep;
        static_assert(kThreads % kWidth == 0 && kCount % kRowsPerStep == 0, "every thread loads as many elements");
        int const row = first_row + thread / kWidth;
        int const column = first + thread % kWidth;
        char const* source = tile.gmem + row * tile.stride + column * sizeof(Stored);
        Acc values[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i, source += kRowsPerStep * tile.stride) {
            int const r = row + i * kRowsPerStep;
            bool const exists = r >= tile.begin && r < tile.end && column < dim;
            values[i] = exists ? Element<kDtype>::widen(__ldg(reinterpret_cast<Stored const*>(source))) : Acc(0);
        }
        Acc* const target = smem + thread / kWidth * kPitch + thread % kWidth;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) target[i * kRowsPerStep * kPitch] = values[i];
    }

    // s += a b^T over the elements [0, dim) of their rows.
    CUFLASH_DEVICE void multiply_nt(TileS& s, RowTile const& a, RowTile const& b, int dim) const {
        Acc* const a_smem = stage;
        Acc* const b_smem = stage + kRows * kPitchNt;
#pragma unroll 1
        for (int first = 0; first < dim; first += kDepthNt) {
            __syncthreads();  // the stage is free
            stage_rows<kRows, kDepthNt, kPitchNt>(a_smem, a, 0, first, dim);
            stage_rows<kCols, kDepthNt, kPitchNt>(b_smem, b, 0, first, dim);
            __syncthreads();
            // Unrolled, the loads of all steps move up front and take the registers.
#pragma unroll 1
            for (int k = 0; k < kDepthNt; k += kVec) {
                Vector<Acc> a_frag[kM], b_frag[kN];
#pragma unroll
                for (int i = 0; i < kM; ++i) a_frag[i] = load_vector(a_smem + row(i) * kPitchNt + k);
#pragma unroll
                for (int j = 0; j < kN; ++j) b_frag[j] = load_vector(b_smem + col(j) * kPitchNt + k);
#pragma unroll
                for (int e = 0; e < kVec; ++e)
#pragma unroll
                    for (int i = 0; i < kM; ++i)
#pragma unroll
                        for (int j = 0; j < kN; ++j) s[i][j] += a_frag[i].x[e] * b_frag[j].x[e];
            }
        }
    }

    // o += p b over the kCols moving rows, for the elements [first, first + kColumns) of the rows of b.
    // P may have been written just before, by any thread; it may be overwritten after the next barrier.
    CUFLASH_DEVICE void multiply_nn(TileO& o, RowTile const& b, int first, int dim) const {
#pragma unroll 1
        for (int depth = 0; depth < kCols; depth += kDepthNn) {
            __syncthreads();  // the stage is free and P is complete
            stage_rows<kDepthNn, kColumns, kColumns>(stage, b, depth, first, dim);
            __syncthreads();
            // A piece is summed from zero before it joins o: over thousands of moving rows, most additions then
            // round a small number.
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                Acc piece[kM][kVec] = {};
#pragma unroll 1
                for (int k = 0; k < kDepthNn; k += kVec) {
                    Vector<Acc> p_frag[kM];
#pragma unroll
                    for (int i = 0; i < kM; ++i) p_frag[i] = load_vector(p + row(i) * kPitchP + depth + k);
#pragma unroll
                    for (int e = 0; e < kVec; ++e) {
                        Vector<Acc> const b_frag = load_vector(stage + (k + e) * kColumns + column(g, 0));
#pragma unroll
                        for (int i = 0; i < kM; ++i)
#pragma unroll
                            for (int v = 0; v < kVec; ++v) piece[i][v] += p_frag[i].x[e] * b_frag.x[v];
                    }
                }
#pragma unroll
                for (int i = 0; i < kM; ++i)
#pragma unroll
                    for (int v = 0; v < kVec; ++v) o[i][g][v] += piece[i][v];
            }
        }
    }

    // Rows [0, row_end) of o, each times its factor, to the elements [first, first + kColumns) of the rows at
    // `gmem`. A factor of 0 writes 0 whatever o holds.
    CUFLASH_DEVICE void store(char* gmem, i64 stride, TileO const& o, Acc const (&factor)[kM], int row_end, int first,
                              int dim) const {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            if (row(i) >= row_end) return;
            Stored* const target = reinterpret_cast<Stored*>(gmem + row(i) * stride) + first;
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
#pragma unroll
                for (int e = 0; e < kVec; ++e)
                    if (first + column(g, e) < dim)
                        target[column(g, e)] = Element<kDtype>::round(factor[i] == 0 ? Acc(0) : o[i][g][e] * factor[i]);
        }
    }

    // Over the 16 threads that share a row.
    static CUFLASH_DEVICE Acc max_of_row(Acc x) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
        return x;
    }

    static CUFLASH_DEVICE Acc sum_of_row(Acc x) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
        return x;
    }
};
