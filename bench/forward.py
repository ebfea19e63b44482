"""Forward: output only, without a graph, for every provider on the same tensors."""

from __future__ import annotations

from .providers import GPU_PROVIDERS, select
from .rows import Row
from .runner import Options, run_providers
from .shapes import default_grid
from .timing import CudaTimer


def run(options: Options, measure: str = "forward") -> list[Row]:
    """Rows of the whole grid."""
    providers = select(options.providers or GPU_PROVIDERS)
    timer = CudaTimer()
    rows = []
    for dtype in options.dtype or (("bfloat16",) if options.quick else ("bfloat16", "float32")):
        for workload in default_grid(dtype, options.dims, options.lens, options.quick):
            rows += run_providers(measure, (measure,), workload, providers, timer, options.num_rounds())
    return rows
