"""The parts that the Hopper kernels are made of, each alone in a kernel of a few lines, against NumPy.

Every concern has one text, with one entry per variant. Inputs are small integers wherever arithmetic takes part, so
that results are exact and compared bit by bit. `tests/cpu/test_hopper_units_compile.py` compiles all texts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from cuflash import compile as compiler
from cuflash.plan import DeviceInfo
from cuflash.tensor_map import TensorMap
from tests.gpu.harness import assert_same_bits, cupy
from tests.strategies import DTYPES, numpy_dtype

MMA = {"float16": "Mma::kF16", "bfloat16": "Mma::kBF16"}

each_dtype = pytest.mark.parametrize("dtype", [dtype for dtype in MMA if dtype in DTYPES])


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    arch = DeviceInfo.current(0).arch
    if arch != 90:
        pytest.skip(f"wgmma exists on sm_90 alone, this is sm_{arch}")


# --------------------------------------------------------------------------------------- texts, and how they are run

#: Name -> CUDA source.
TEXTS: dict[str, str] = {}


def define(name: str, headers: Iterable[str], body: str, entries: Iterable[str]) -> None:
    """Add a text."""
    includes = "\n".join(f'#include "{header}.cuh"' for header in headers)
    TEXTS[name] = "\n".join((includes, body.strip("\n"), *entries, ""))


def entry(name: str, threads: int, parameters: str, call: str) -> str:
    """A kernel that does nothing but call; `smem` is the address of its shared memory, which suits any tile."""
    smem = "    extern __shared__ __align__(1024) char memory[];\n    u32 const smem = smem_address(memory);\n"
    return (
        f'extern "C" __global__ void __launch_bounds__({threads}) {name}({parameters}) {{\n'
        f"{smem if 'smem' in call else ''}    {call};\n}}"
    )


def source(name: str) -> str:
    """The text with a hash of what it includes, which CuPy's cache does not look at."""
    return f"// headers {compiler.header_hash()}\n{TEXTS[name]}"


def compile_text(name: str) -> tuple[bytes, str]:
    """Cubin and log of a text, by NVRTC alone: needs no GPU."""
    nvrtc = compiler._nvrtc()
    options = (*compiler._OPTIONS, *compiler._CUPY_OPTIONS, "-arch=sm_90a", f"-I{compiler.kernel_root()}")
    program = nvrtc.createProgram(source(name), f"{name}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise compiler.CompileError(f"{name}:\n{nvrtc.getProgramLog(program)}") from error
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def module(name: str) -> Any:
    options = (*compiler._OPTIONS, "-arch=sm_90a", f"-I{compiler.kernel_root()}")
    return cupy.RawModule(code=source(name), options=options)


def launch(name: str, variant: str, *arguments: Any, grid: int = 1, threads: int = 128, smem: int = 0) -> None:
    """Run one entry of a text, and wait, so that an error belongs to its test. Integers are passed as int32."""
    function = module(name).get_function(variant)
    if smem > 48 * 1024:
        function.max_dynamic_shared_size_bytes = smem
    values = tuple(np.int32(value) if isinstance(value, int) else value for value in arguments)
    function((grid,), (threads,), values, shared_mem=smem)
    cupy.cuda.get_current_stream().synchronize()


def integers(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Integers that every dtype holds, and whose sums of products float32 does."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(numpy_dtype(dtype))


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The exact product, which fits float32."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)


def on_device(array: np.ndarray) -> Any:
    """The array on the GPU, 16-bit elements as plain bits."""
    return cupy.asarray(array.view(np.uint16) if array.itemsize == 2 else array)


def assert_found(found: Any, wanted: np.ndarray) -> None:
    assert_same_bits(found, cupy.asarray(wanted))


# A wait that ends in an error instead of never. It looks once more with the real wait, which then has to fall through.
BOUNDED_WAIT = """
CUFLASH_DEVICE void bounded_wait(u32 barrier, u32 parity) {
    for (int i = 0; !mbarrier_test(barrier, parity); ++i)
        if (i == 10'000'000) __trap();
    mbarrier_wait(barrier, parity);
}
"""

# Accumulators of all warps, 16 rows each, from or to a row-major matrix.
MOVE_ACC = """
template <bool kLoad, int kTiles>
CUFLASH_DEVICE void move_acc(float (&acc)[kTiles][4], float* matrix) {
    int const lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& element = matrix[(first_row + acc_row(lane, i)) * 8 * kTiles + 8 * n + acc_col(lane, i)];
            if constexpr (kLoad)
                acc[n][i] = element;
            else
                element = acc[n][i];
        }
}
"""


# --------------------------------------------------------------------------------------------------- wgmma, described

# Two warpgroups with 64 rows of A each. An operand lies [rows][k], or [k][rows] if it is transposed. It is stored with
# SmemTile::offset by ordinary instructions, so that this is also a test of the fence between them and wgmma.
PRODUCT_SS = """
template <Mma kMma, int kN, int kK, bool kTransA, bool kTransB>
CUFLASH_DEVICE void product_ss(float* d, char const* a, char const* b, u32 smem) {
    using A = SmemTile<kTransA ? kK : 128, kTransA ? 128 : kK, 2>;
    using B = SmemTile<kTransB ? kK : kN, kTransB ? (kN + 63) / 64 * 64 : kK, 2>;
    constexpr int kRowBytesB = 2 * (kTransB ? kN : kK);
    u32 const b_smem = smem + A::kBytes;
    load_tile<A, 256, Copy::kVector>(smem, a, A::kRowBytes, 0, A::kRows, A::kRowBytes, threadIdx.x);
    load_tile<B, 256, Copy::kVector>(b_smem, b, kRowBytesB, 0, B::kRows, kRowBytesB, threadIdx.x);
    proxy_fence();
    __syncthreads();

    int const warpgroup = threadIdx.x / 128;
    MatrixDescriptor<A> const a_rows(smem + warpgroup * (kTransA ? A::kSlabStride : 64 * A::kSlabBytes));
    MatrixDescriptor<B> const b_rows(b_smem);
    float acc[1][kN / 8][4];
    set_zero(acc);
    warpgroup_arrive();
    if constexpr (!kTransA && !kTransB) {
        warpgroup_gemm_nt<kMma, A, B, kK / 16>(acc[0], a_rows, b_rows);
    } else if constexpr (!kTransA && kTransB) {
        warpgroup_gemm_nn<kMma, A, B, kK / 16>(acc[0], a_rows, b_rows);
    } else if constexpr (kTransA && !kTransB) {
        warpgroup_gemm_tt<kMma, A, B, kK / 16>(acc[0], a_rows, b_rows);
    } else {
#pragma unroll
        for (int k = 0; k < kK / 16; ++k)
            wgmma_ss<kMma == Mma::kBF16, true, kTransA, kTransB>(
                acc[0], kTransA ? a_rows.across_rows(k) : a_rows.along_rows(k),
                kTransB ? b_rows.across_rows(k) : b_rows.along_rows(k));
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_pin(acc[0]);
    move_acc<false>(acc[0], d);
}
"""
PRODUCT_HEADERS = ("tile/copy", "tile/gemm", "tile/warpgroup", "ptx/tma")
# (N, K, A transposed, B transposed)
PRODUCTS_ALONG = [(n, k, False, False) for k in (64, 128, 192) for n in (16, 80, 128, 176, 256)]
PRODUCTS_ACROSS = [
    (n, k, trans_a, trans_b)
    for trans_a, trans_b in ((True, False), (False, True), (True, True))
    for n, k in ((16, 64), (80, 64), (128, 128), (256, 128))
]


def ss_variant(dtype: str, n: int, k: int, trans_a: bool, trans_b: bool) -> str:
    return f"{dtype}_{n}_{k}_{'t' if trans_a else 'n'}{'t' if trans_b else 'n'}"


for text_name, shapes in (("products_along_rows", PRODUCTS_ALONG), ("products_across_rows", PRODUCTS_ACROSS)):
    define(
        text_name,
        PRODUCT_HEADERS,
        MOVE_ACC + PRODUCT_SS,
        [
            entry(
                ss_variant(dtype, n, k, trans_a, trans_b),
                256,
                "float* d, char const* a, char const* b",
                f"product_ss<{mma}, {n}, {k}, {int(trans_a)}, {int(trans_b)}>(d, a, b, smem)",
            )
            for dtype, mma in MMA.items()
            for n, k, trans_a, trans_b in shapes
        ],
    )


def check_product_ss(text: str, dtype: str, n: int, k: int, trans_a: bool, trans_b: bool) -> None:
    a, b = integers((128, k), dtype, 1), integers((k, n), dtype, 2)
    stored_a = np.ascontiguousarray(a.T) if trans_a else a
    stored_b = b if trans_b else np.ascontiguousarray(b.T)
    d = cupy.full((128, n), cupy.nan, dtype=np.float32)
    smem = 2 * k * (128 + (-(-n // 64) * 64 if trans_b else n))
    variant = ss_variant(dtype, n, k, trans_a, trans_b)
    launch(text, variant, d, on_device(stored_a), on_device(stored_b), threads=256, smem=smem)
    assert_found(d + 0.0, product(a, b) + 0.0)  # + 0.0: a zero may have either sign


@each_dtype
@pytest.mark.parametrize(("n", "k", "trans_a", "trans_b"), PRODUCTS_ALONG)
def test_wgmma_along_rows(dtype: str, n: int, k: int, trans_a: bool, trans_b: bool) -> None:
    """S = Q K^T: one, two and three slabs."""
    check_product_ss("products_along_rows", dtype, n, k, trans_a, trans_b)


@each_dtype
@pytest.mark.parametrize(("n", "k", "trans_a", "trans_b"), PRODUCTS_ACROSS)
def test_wgmma_across_rows(dtype: str, n: int, k: int, trans_a: bool, trans_b: bool) -> None:
    check_product_ss("products_across_rows", dtype, n, k, trans_a, trans_b)


# --------------------------------------------------------------------------------------------- wgmma, A from registers

PRODUCT_RS = """
template <Mma kMma, int kN, int kK>
CUFLASH_DEVICE void product_rs(float* d, float* a, char const* b, u32 smem) {
    using B = SmemTile<kK, (kN + 63) / 64 * 64, 2>;
    load_tile<B, 128, Copy::kVector>(smem, b, kN * 2, 0, kK, kN * 2, threadIdx.x);
    proxy_fence();
    __syncthreads();

    float s[kK / 8][4], acc[kN / 8][4];
    move_acc<true>(s, a);
    move_acc<true>(acc, d);
    FragmentA<kMma> p[kK / 16];
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) acc_to_a(p[k], s, k);
    warpgroup_arrive();
    warpgroup_gemm_nn<kMma, B, kK / 16>(acc, p, MatrixDescriptor<B>(smem));
    warpgroup_commit();
    warpgroup_wait<0>();
    warpgroup_pin(acc);
    move_acc<false>(acc, d);
}
"""
PRODUCTS_RS = [(n, k) for k in (80, 128) for n in (64, 96, 128, 256)]
define(
    "products_from_registers",
    PRODUCT_HEADERS,
    MOVE_ACC + PRODUCT_RS,
    [
        entry(
            f"{dtype}_{n}_{k}",
            128,
            "float* d, float* a, char const* b",
            f"product_rs<{mma}, {n}, {k}>(d, a, b, smem)",
        )
        for dtype, mma in MMA.items()
        for n, k in PRODUCTS_RS
    ],
)


@each_dtype
@pytest.mark.parametrize(("n", "k"), PRODUCTS_RS)
def test_wgmma_from_registers(dtype: str, n: int, k: int) -> None:
    """O += P V, where P comes from the accumulators of an earlier product."""
    a, b, before = integers((64, k), dtype, 3), integers((k, n), dtype, 4), integers((64, n), "float32", 5)
    d = on_device(before)
    smem = 2 * k * (-(-n // 64) * 64)
    launch("products_from_registers", f"{dtype}_{n}_{k}", d, on_device(a.astype(np.float32)), on_device(b), smem=smem)
    assert_found(d + 0.0, before + product(a, b) + 0.0)


# ----------------------------------------------------------------------------------------------- TMA, and the swizzle

# Loads a box into memory full of ones and copies the tile row by row: what TMA stores lies where SmemTile::offset says.
LOAD_BOX = """
template <int kRank, int kCols>
CUFLASH_DEVICE void load_box(TensorMap const& map, uint4* out, int box_rows, int c1, int c2, int c3, int c4, u32 smem) {
    using Tile = SmemTile<128, kCols, 2>;
    u32 const barrier = smem + Tile::kBytes;
    if (threadIdx.x == 0) {
        tma_prefetch(map);
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    for (int i = threadIdx.x; i < Tile::kBytes / 16; i += blockDim.x)
        st_shared_v4(smem + 16 * i, uint4{~0u, ~0u, ~0u, ~0u});
    proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, box_rows * Tile::kRowBytes);
        for (int c = 0; c < kCols; c += 64) {
            u32 const slab = smem + c / 64 * Tile::kSlabStride;
            if constexpr (kRank == 4)
                tma_load_4d(slab, map, barrier, c, c1, c2, c3);
            else
                tma_load_5d(slab, map, barrier, c, c1, c2, c3, c4);
        }
    }
    bounded_wait(barrier, 0);
    for (int i = threadIdx.x; i < Tile::kBytes / 16; i += blockDim.x)
        out[i] = ld_shared_v4(smem + Tile::offset(i / Tile::kRowChunks, i % Tile::kRowChunks));
}
"""
TILE_ROWS = 128
define(
    "boxes",
    ("ptx/mbarrier", "ptx/shared", "ptx/tma", "tile/swizzle"),
    BOUNDED_WAIT + LOAD_BOX,
    [
        entry(
            f"rank{rank}_{columns}",
            128,
            "const __grid_constant__ TensorMap map, uint4* out, int box_rows, int c1, int c2, int c3, int c4",
            f"load_box<{rank}, {columns}>(map, out, box_rows, c1, c2, c3, c4, smem)",
        )
        for rank in (4, 5)
        for columns in (64, 128, 192)
    ],
)

each_layout = pytest.mark.parametrize("layout", ["bhsd", "bshd", "repeated batch", "repeated heads", "repeated rows"])


def strided(batch: int, heads: int, seqlen: int, dim: int, layout: str) -> Any:
    """A (batch, heads, seqlen, dim) view on the GPU; neighbours differ, and no element is 0 or 0xffff."""
    shape = {
        "bshd": (batch, seqlen, heads, dim),
        "repeated batch": (1, heads, seqlen, dim),
        "repeated heads": (batch, 1, seqlen, dim),
        "repeated rows": (batch, heads, 1, dim),
    }.get(layout, (batch, heads, seqlen, dim))
    memory = cupy.asarray((1 + np.arange(np.prod(shape)) % 65521).astype(np.uint16).reshape(shape))
    if layout == "bshd":
        return memory.swapaxes(1, 2)
    return cupy.broadcast_to(memory, (batch, heads, seqlen, dim))  # repeats with a stride of 0


def loaded_tile(
    dtype: str, view: Any, lengths: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], *start: int
) -> np.ndarray:
    """The tile of 128 rows after a box was loaded at coordinates (0, *start)."""
    columns = -(-lengths[0] // 64) * 64
    # A NumPy array of one element goes by value.
    tensor_map = np.frombuffer(TensorMap(dtype, lengths, strides, box).encode(view.data.ptr), "V128")
    out = cupy.zeros((TILE_ROWS, columns), dtype=np.uint16)
    coordinates = (*start, 0)[:4]
    smem = out.nbytes + 8
    launch("boxes", f"rank{len(box)}_{columns}", tensor_map, out, int(np.prod(box[1:])), *coordinates, smem=smem)
    return out.get()


@each_dtype
@each_layout
@pytest.mark.parametrize("dim", [40, 64, 96, 128, 192])
def test_tma_loads_boxes_of_keys(dtype: str, layout: str, dim: int) -> None:
    """What lies outside becomes zero, before the first row, too; what lies past the box stays."""
    batch, heads, seqlen, box_rows = 2, 3, 100, 80
    view = strided(batch, heads, seqlen, dim, layout)
    source_rows = view.get()
    for row in (-81, -13, 0, 13, 80, 160):
        for head, entry_of_batch in ((0, 1), (2, 0)):
            found = loaded_tile(
                dtype, view, view.shape[::-1], view.strides[2::-1], (64, box_rows, 1, 1), row, head, entry_of_batch
            )
            wanted = np.full_like(found, 0xFFFF)
            wanted[:box_rows] = 0
            rows = source_rows[entry_of_batch, head, max(row, 0) : max(row + box_rows, 0)]
            wanted[max(-row, 0) :][: len(rows), :dim] = rows
            assert_found(found, wanted)


@each_dtype
@each_layout
@pytest.mark.parametrize("pack", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("dim", [40, 128])
def test_tma_packs_query_heads(dtype: str, layout: str, pack: int, dim: int) -> None:
    """Row r of a tile is query r / pack of head r % pack."""
    batch, groups, seqlen = 2, 2, 50
    queries = TILE_ROWS // pack
    view = strided(batch, groups * pack, seqlen, dim, layout)
    source_rows = view.get()
    batch_stride, head_stride, row_stride, _ = view.strides
    for query in (0, queries, 30):
        for group, entry_of_batch in ((0, 1), (1, 0)):
            found = loaded_tile(
                dtype, view, (dim, pack, seqlen, groups, batch),
                (head_stride, row_stride, head_stride * pack, batch_stride), (64, pack, queries, 1, 1),
                0, query, group, entry_of_batch,
            )  # fmt: skip
            wanted = np.full_like(found, 0xFFFF)
            wanted[: queries * pack] = 0
            heads = slice(group * pack, (group + 1) * pack)
            rows = source_rows[entry_of_batch, heads, query : query + queries].swapaxes(0, 1).reshape(-1, dim)
            wanted[: len(rows), :dim] = rows
            assert_found(found, wanted)


# Bytes from global memory, counted on a barrier like a box.
LOAD_BYTES = """
CUFLASH_DEVICE void load_bytes(uint4* out, char const* source, int bytes, u32 smem) {
    u32 const barrier = smem + 4096;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(barrier, bytes);
        bulk_load(smem, source, bytes, barrier);
    }
    __syncthreads();
    bounded_wait(barrier, 0);
    for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) out[i] = ld_shared_v4(smem + 16 * i);
}
"""
# The other way round, and counted in global memory when it is done: whoever reads the count reads the bytes.
STORE_BYTES = """
CUFLASH_DEVICE void store_bytes(uint4* out, uint4 const* source, uint4* target, int* count, int bytes, u32 smem) {
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) st_shared_v4(smem + 16 * i, source[i]);
        proxy_fence();
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < bytes; i += 16) bulk_store(reinterpret_cast<char*>(target) + i, smem + i, 16);
            bulk_finish();
            add_release(count, 1);
        }
    } else {
        if (threadIdx.x == 0) {
            for (int looks = 0; load_acquire(count) == 0 && looks < 1 << 22; ++looks) {
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) out[i] = target[i];
    }
}
"""
define(
    "bytes",
    ("ptx/mbarrier", "ptx/reduction", "ptx/shared", "ptx/tma"),
    BOUNDED_WAIT + LOAD_BYTES + STORE_BYTES,
    [
        entry("load", 128, "uint4* out, char const* source, int bytes", "load_bytes(out, source, bytes, smem)"),
        entry("store", 128, "uint4* out, uint4 const* source, uint4* target, int* count, int bytes",
              "store_bytes(out, source, target, count, bytes, smem)"),
    ],
)  # fmt: skip


@pytest.mark.parametrize("size", [16, 256, 320, 4096])
def test_bulk_load(size: int) -> None:
    source_bytes = cupy.arange(size + 64, dtype=np.uint8)
    out = cupy.zeros(size, dtype=np.uint8)
    launch("bytes", "load", out, source_bytes[48:], size, smem=4096 + 8)
    assert_same_bits(out, source_bytes[48 : 48 + size])


@pytest.mark.parametrize("size", [16, 320, 4096])
def test_bulk_store(size: int) -> None:
    source_bytes = cupy.arange(size, dtype=np.uint8)
    out, target = (cupy.full(size, 0xFF, dtype=np.uint8) for _ in range(2))
    count = cupy.zeros(1, dtype=np.int32)
    launch("bytes", "store", out, source_bytes, target, count, size, smem=4096 + 8, grid=2)
    assert int(count[0]) == 1
    assert_same_bits(out, source_bytes)


# ------------------------------------------------------------------------------------------- accumulators, transposed

# Four warps with 16 columns of the target each, 32 rows of it.
STORE_TRANSPOSED = """
template <Mma kMma>
CUFLASH_DEVICE void store_transposed(u32* out, float* matrix, u32 smem) {
    using Tile = SmemTile<32, 64, 2>;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float acc[4][4];
    move_acc<true>(acc, matrix);
    for (int n = 0; n < 4; n += 2) {
        float const pair[2][4] = {{acc[n][0], acc[n][1], acc[n][2], acc[n][3]},
                                  {acc[n + 1][0], acc[n + 1][1], acc[n + 1][2], acc[n + 1][3]}};
        acc_to_smem_trans<kMma, Tile>(smem, pair, 8 * n, 16 * warp, lane);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kBytes / 4; i += blockDim.x)
        out[i] = ld_shared(smem + Tile::offset(i / 32, i % 32 / 4) + i % 4 * 4);
}
"""
define(
    "transposed",
    ("attention/epilogue", "tile/gemm"),
    MOVE_ACC + STORE_TRANSPOSED,
    [
        entry(dtype, 128, "u32* out, float* matrix", f"store_transposed<{mma}>(out, matrix, smem)")
        for dtype, mma in MMA.items()
    ],
)


@each_dtype
def test_transposed_accumulators(dtype: str) -> None:
    matrix = integers((64, 32), dtype, 6)
    out = cupy.zeros((32, 64), dtype=np.uint16)
    launch("transposed", dtype, out, on_device(matrix.astype(np.float32)), smem=32 * 64 * 2)
    assert_found(out, np.ascontiguousarray(matrix.T).view(np.uint16))


# --------------------------------------------------------------------------------------------------- rings and turns

# Warp 0 produces, the others consume every item, at different speeds.
PASS_ITEMS = """
template <int kStages>
CUFLASH_DEVICE void pass_items(int* out, int2* places, int items, u32 smem) {
    u32 const full = smem + 128 * kStages, empty = full + 8 * kStages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(full + 8 * i, 32);
            mbarrier_init(empty + 8 * i, blockDim.x / 32 - 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Ring<kStages> ring;
    for (int item = 0; item < items; ++item, ring = ring + 1) {
        int const stage = ring.stage();
        u32 const word = smem + 128 * stage + 4 * lane;
        if (warp == 0) {
            bounded_wait(empty + 8 * stage, ~ring.parity() & 1);
            st_shared(word, 100 * item + lane);
            mbarrier_arrive(full + 8 * stage);
            if (lane == 0) places[item] = int2{stage, static_cast<int>(ring.parity())};
        } else {
            bounded_wait(full + 8 * stage, ring.parity());
            __nanosleep(1000 * (warp * item % 3));
            out[((warp - 1) * items + item) * 32 + lane] = ld_shared(word);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(empty + 8 * stage);
        }
    }
}
"""
STAGES = (2, 3)
define(
    "rings",
    ("ptx/mbarrier", "ptx/shared", "tile/ring"),
    BOUNDED_WAIT + PASS_ITEMS,
    [
        entry(
            f"stages{stages}",
            128,
            "int* out, int2* places, int items",
            f"pass_items<{stages}>(out, places, items, smem)",
        )
        for stages in STAGES
    ],
)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("items", range(1, 21))
def test_ring_hands_over_every_item_once_and_in_order(stages: int, items: int) -> None:
    out = cupy.full((3, items, 32), -1, dtype=np.int32)
    places = cupy.full((items, 2), -1, dtype=np.int32)
    launch("rings", f"stages{stages}", out, places, items, smem=(128 + 16) * stages)
    item = np.arange(items, dtype=np.int32)
    assert_found(places, np.stack([item % stages, item // stages % 2], axis=1))
    wanted = 100 * item[:, None] + np.arange(32, dtype=np.int32)
    assert_found(out, np.broadcast_to(wanted, out.shape))


# Each warpgroup waits for the one before it. Only the turns keep `count`, which is no atomic, from losing steps.
TAKE_TURNS = """
CUFLASH_DEVICE void take_turns(int* out, int rounds) {
    __shared__ int volatile count;
    int const groups = blockDim.x / 128, me = threadIdx.x / 128;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (me == groups - 1) barrier_arrive(1, 256);
    for (int round = 0; round < rounds; ++round) {
        barrier_sync(1 + me, 256);
        if (threadIdx.x % 128 == 0) {
            int const place = count;
            __nanosleep(500);
            out[place] = me;
            count = place + 1;
        }
        __syncwarp();
        barrier_arrive(1 + (me + 1) % groups, 256);
    }
}
"""
define("turns", ("ptx/barrier",), TAKE_TURNS, [entry("turns", 384, "int* out, int rounds", "take_turns(out, rounds)")])


@pytest.mark.parametrize("groups", [2, 3])
def test_named_barriers_pass_a_turn_round(groups: int) -> None:
    rounds = 40
    out = cupy.full(rounds * groups, -1, dtype=np.int32)
    launch("turns", "turns", out, rounds, threads=128 * groups)
    assert_found(out, np.tile(np.arange(groups, dtype=np.int32), rounds))


# -------------------------------------------------------------------------------------------------- order of the tiles

# Goes on after the end of the tiles, where no further one may turn up.
VISIT_TILES = """
CUFLASH_DEVICE void visit_tiles(int* visits, int* coordinates, int rounds, TileOrder const& order) {
    bool ended = false;
    for (int round = 0; round < rounds; ++round) {
        int const index = tile_of_round(order, round);
        ended |= index >= order.num_tiles;
        if (index >= order.num_tiles) continue;
        TileCoordinates const at = tile_coordinates(order, index);
        atomicAdd(&visits[index], ended ? 1000 : 1);
        coordinates[3 * index] = at.block;
        coordinates[3 * index + 1] = at.head;
        coordinates[3 * index + 2] = at.batch;
    }
}
"""
define(
    "tile_order",
    ("attention/tile_order",),
    VISIT_TILES,
    [
        entry(
            "visit",
            1,
            "int* visits, int* coordinates, int rounds, int tiles, int m_blocks, int heads, int section",
            "visit_tiles(visits, coordinates, rounds, TileOrder{tiles, m_blocks, heads, section, 1})",
        )
    ],
)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 5), (3, 4), (2, 16)])
@pytest.mark.parametrize("m_blocks", [1, 2, 13])
@pytest.mark.parametrize("section", [1, 2, 3, 8, 100])
def test_tile_order_visits_every_tile_once(batch: int, heads: int, m_blocks: int, section: int) -> None:
    """Whatever the grid; sections of heads one after the other, the last queries first."""
    every_head = range(batch * heads)
    section = min(section, len(every_head))
    wanted = [
        (m_block, head % heads, head // heads)
        for first in every_head[::section]
        for m_block in reversed(range(m_blocks))
        for head in every_head[first : first + section]
    ]
    tiles = len(wanted)
    assert len(set(wanted)) == tiles == batch * heads * m_blocks
    for grid in {1, 7, 132, tiles, -(-tiles // 2)}:
        visits = cupy.zeros(tiles, dtype=np.int32)
        coordinates = cupy.full((tiles, 3), -1, dtype=np.int32)
        rounds = -(-tiles // grid) + 2
        launch(
            "tile_order", "visit", visits, coordinates, rounds, tiles, m_blocks, heads, section, grid=grid, threads=1
        )
        assert_found(visits, np.ones(tiles, dtype=np.int32))
        assert_found(coordinates, np.array(wanted, dtype=np.int32))


# ------------------------------------------------------------------------------------------------------------- softmax

# One warp goes through all tiles as the kernel does; `total` stands for P V, with the identity for every tile's V.
WEIGH_TILES = """
template <int kN>
CUFLASH_DEVICE void weigh_tiles(float* scores, int tiles, float scale_log2, float* weights, float* rows,
                                int* accepted) {
    EagerSoftmax softmax;
    softmax.init();
    float total[1][kN][4];
    set_zero(total);
    for (int tile = 0; tile < tiles; ++tile) {
        float s[kN][4], sum[2], alpha[1][2];
        move_acc<true>(s, scores + tile * 16 * 8 * kN);
        if (softmax.unseen) softmax.settle(s, scale_log2);
        softmax.weigh(s, sum, scale_log2);
        bool const good = softmax.accept(sum);
        if (threadIdx.x == 0) accepted[tile] = good;
        if (!good) {
            move_acc<true>(s, scores + tile * 16 * 8 * kN);
            softmax.raise(s, alpha[0], scale_log2);
            softmax.weigh(s, sum, scale_log2);
            softmax.add(sum);
            scale_rows(total, alpha);
        }
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[0][n][i] += s[n][i];
    }
    softmax.finish();
    move_acc<false>(total[0], weights);
    for (int h = 0; h < 2; ++h) {
        int const row = acc_row(threadIdx.x, 2 * h);
        rows[row] = softmax.shift[h];
        rows[16 + row] = softmax.row_sum[h];
        rows[32 + row] = softmax.lse(h);
    }
}
"""
SOFTMAX_COLUMNS = (16, 80, 128, 176)
define(
    "softmax",
    ("attention/softmax", "tile/gemm"),
    MOVE_ACC + WEIGH_TILES,
    [
        entry(
            f"columns{columns}",
            32,
            "float* scores, int tiles, float scale_log2, float* weights, float* rows, int* accepted",
            f"weigh_tiles<{columns // 8}>(scores, tiles, scale_log2, weights, rows, accepted)",
        )
        for columns in SOFTMAX_COLUMNS
    ],
)


def log2_scores(columns: int, *, hidden: bool, growing: bool) -> np.ndarray:
    """Scaled scores of six tiles and 16 rows, in units of log2."""
    rng = np.random.default_rng(columns)
    x = 2.0 * rng.standard_normal((6, 16, columns))
    if growing:
        x[1] += 4.0  # within the limit
        x[2, 7] += 40.0  # beyond it, in one row
        x[4] += 200.0  # beyond float32, in all
    if hidden:
        x[:, :, 1:][rng.random(x[:, :, 1:].shape) < 0.3] = -np.inf  # never all of a row
        x[1] = -np.inf
        x[:3, 3] = -np.inf  # first seen in an ordinary tile
        x[:4, 12] = -np.inf  # and in one beyond the limit of the others
        x[:, 5] = -np.inf  # never seen
    return x


@pytest.mark.parametrize("scale_log2", [0.18, -1.3])
@pytest.mark.parametrize("columns", SOFTMAX_COLUMNS)
@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_eager_softmax(hidden: bool, growing: bool, columns: int, scale_log2: float) -> None:
    scale = np.float32(scale_log2)
    scores = (log2_scores(columns, hidden=hidden, growing=growing) / scale).astype(np.float32)
    weights = cupy.full((16, columns), cupy.nan, dtype=np.float32)
    rows = cupy.full((3, 16), cupy.nan, dtype=np.float32)
    accepted = cupy.full(6, -1, dtype=np.int32)
    launch("softmax", f"columns{columns}", on_device(scores), 6, scale, weights, rows, accepted, threads=32)
    assert accepted.get().tolist() == ([1, 1, 0, 1, 0, 1] if growing else [1] * 6)

    exact = scores.astype(np.float64) * np.float64(scale)
    lse = np.logaddexp2.reduce(exact.swapaxes(0, 1).reshape(16, -1), axis=1)
    shift, row_sum, found_lse = rows.get()
    never = np.isneginf(lse)
    assert never.tolist() == [hidden and row == 5 for row in range(16)]
    assert np.array_equal(shift == np.inf, never)
    assert np.array_equal(row_sum == 0.0, never)
    np.testing.assert_allclose(found_lse, lse * np.log(2.0), rtol=1e-5, atol=1e-5)
    probabilities = np.exp2(exact - np.where(never, 0.0, lse)[:, None]).sum(axis=0)
    found = weights.get() / np.where(never, 1.0, row_sum)[:, None]
    np.testing.assert_allclose(found, probabilities, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ epilogue

STORE_ROWS = """
template <Mma kMma, bool kAligned, int kN>
CUFLASH_DEVICE void store_rows(char* out, float* values, int row_stride, int row_bytes, int rows) {
    int const lane = threadIdx.x;
    float acc[kN][4];
    move_acc<true>(acc, values);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int const row = lane / 4 + 8 * h;
        store_acc_row<kMma, kAligned>(out + row * row_stride, acc, h, row < rows, row_bytes, lane);
    }
}
"""
STORE_COLUMNS = (32, 96, 256)
define(
    "rows",
    ("attention/epilogue",),
    MOVE_ACC + STORE_ROWS,
    [
        entry(
            f"{dtype}_{columns}_{'aligned' if aligned else 'unaligned'}",
            32,
            "char* out, float* values, int row_stride, int row_bytes, int rows",
            f"store_rows<{mma}, {int(aligned)}, {columns // 8}>(out, values, row_stride, row_bytes, rows)",
        )
        for dtype, mma in MMA.items()
        for columns in STORE_COLUMNS
        for aligned in (True, False)
    ],
)


@each_dtype
@pytest.mark.parametrize(
    ("columns", "dim", "aligned"),
    [
        *((32, dim, True) for dim in (8, 24, 32)),
        *((96, dim, True) for dim in (72, 80, 96)),
        *((256, dim, True) for dim in (200, 256)),
        *((32, dim, False) for dim in (1, 17, 32)),
        *((96, dim, False) for dim in (65, 71, 95)),
        *((256, dim, False) for dim in (199, 255)),
    ],
)
def test_store_acc_row(dtype: str, columns: int, dim: int, aligned: bool) -> None:
    """Rows and columns of the tensor, rounded, and nothing else."""
    rows, gap, offset = 13, *((8, 0) if aligned else (3, 1))
    values = np.random.default_rng(dim).standard_normal((16, columns)).astype(np.float32)
    out = cupy.full(offset + 16 * (dim + gap), 0x7777, dtype=np.uint16)
    wanted = out.get()
    wanted[offset:].reshape(16, dim + gap)[:rows, :dim] = values[:rows, :dim].astype(numpy_dtype(dtype)).view(np.uint16)
    variant = f"{dtype}_{columns}_{'aligned' if aligned else 'unaligned'}"
    launch("rows", variant, out[offset:], on_device(values), 2 * (dim + gap), 2 * dim, rows, threads=32)
    assert_found(out, wanted)
