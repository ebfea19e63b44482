"""The kernel texts of `tests/gpu/test_hopper_units.py` compile for sm_90a. NVRTC needs no GPU for this."""

import pytest

pytest.importorskip("cupy")

from tests.gpu import test_hopper_units as units


@pytest.mark.parametrize("name", units.TEXTS)
def test_compiles(name: str) -> None:
    try:
        cubin, log = units.compile_text(name)
    except ImportError as error:
        pytest.skip(f"no NVRTC: {error}")
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in log
