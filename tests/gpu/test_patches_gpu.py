"""ops.patches on a GPU: bytes to the vision tower's input, to the last bit as on a CPU, and without waiting."""

from __future__ import annotations

import pytest
import torch

from muco_ds.ops.patches import patch_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", [14, 16])
@pytest.mark.parametrize("patches", [0, 1, 4096])
def test_equals_the_cpu_to_the_last_bit(dtype: torch.dtype, side: int, patches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels_PY = torch.randint(0, 256, (patches, side * side * 3), generator=generator, dtype=torch.uint8)
    palette_CV = torch.randn(3, 256, generator=generator)
    want = patch_values(pixels_PY, palette_CV, 2, dtype)
    pixels_PY, palette_CV = pixels_PY.cuda(), palette_CV.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = patch_values(pixels_PY, palette_CV, 2, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.dtype == dtype and got.shape == (patches, 3 * 2 * side * side)
    assert torch.equal(got.cpu(), want)
