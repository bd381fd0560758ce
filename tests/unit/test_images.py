"""Pictures: sizes from headers equal decoded sizes, hostile files are refused, patches are the stock processor's."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muco_ds.data.decode import keep_memory
from muco_ds.data.images import ImageError, ImageLimits, ImagePipeline, Patches, decode, read_size
from muco_ds.models.backbones import load_image_processor
from muco_ds.ops.patches import patch_values

from demo import MAX_PIXELS, MIN_PIXELS, Demo, write_picture
from tiny_models import model_folder


@pytest.fixture(scope="module")
def pipeline(demo: Demo) -> ImagePipeline:
    return demo.packer().images


@pytest.fixture(params=["qwen2_vl", "qwen3_vl"])  # patches of 14 and of 16 px
def model(request: pytest.FixtureRequest) -> Path:
    return model_folder(request.param)


def limited(model: Path, minimum: int, maximum: int, short_side: int | None = None) -> ImagePipeline:
    return ImagePipeline(load_image_processor(str(model)), ImageLimits(minimum, maximum, short_side))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_pictures_have_one_size(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"rotated.{suffix}"
    picture = Image.new("RGB", (40, 30), "blue")
    picture.paste("red", (0, 0, 20, 15))
    picture.save(path, exif=exif)
    upright = decode(str(path))
    assert read_size(path) == upright.size == ((30, 40) if orientation >= 5 else (40, 30))
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    pixel = upright.getpixel((corner[0] * (upright.width - 8) + 4, corner[1] * (upright.height - 8) + 4))
    assert isinstance(pixel, tuple) and pixel[0] > 150 > pixel[2]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    for block in (b"garbage", b"MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12", b"II*\x00\xff\xff\xff\xff"):
        Image.new("RGB", (40, 30)).save(path, exif=b"Exif\x00\x00" + block)
        assert read_size(path) == decode(str(path)).size == (40, 30)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_the_same_grey(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (40, 30), 255 if mode == "1" else 100)
    if mode == "I;16":
        picture = Image.fromarray(np.full((30, 40), 100 << 8, np.uint16))
    else:
        picture = grey.convert(mode) if mode != "P" else grey.convert("RGB").quantize(8)
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    picture.save(path)
    assert Image.open(path).mode == mode
    out = decode(str(path))
    assert out.mode == "RGB" and out.size == read_size(path)
    assert np.abs(np.asarray(out, int) - (255 if mode == "1" else 100)).max() <= 1


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 20, 30))
    clear.save(tmp_path / "rgba.png")
    keyed = Image.new("L", (40, 30), 7)
    keyed.paste(0, (0, 0, 20, 30))
    keyed.save(tmp_path / "key.png", transparency=7)
    for name, left in (("rgba.png", (0, 0, 255)), ("key.png", (0, 0, 0))):
        picture = decode(str(tmp_path / name))
        assert picture.getpixel((5, 5)) == left and picture.getpixel((35, 5)) == (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"over the limit|DecompressionBomb"):
            read_size(path)
        with pytest.raises(ImageError, match=r"over the limit|DecompressionBomb"):
            decode(str(path))


def test_the_limit_holds_where_a_program_lifted_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(14_000, 14_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="14000 x 14000 pixels are over the limit"):
        read_size(tmp_path / "bomb.png")


def test_sizes_come_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif", "ppm"):
        whole = write_picture(tmp_path / f"whole.{suffix}", 300, 200)
        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
            assert read_size(whole) == (300, 200)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_does_not_decode(tmp_path: Path, suffix: str) -> None:
    path = write_picture(tmp_path / f"cut.{suffix}", 300, 200)
    path.write_bytes(path.read_bytes()[:-20_000])
    assert read_size(path) == (300, 200)
    with pytest.raises(ImageError, match="does not decode"):
        decode(str(path))


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "half.png").write_bytes(png_header(100, 100)[:20])
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    cases = {"text.jpg": "is not a picture", "empty.png": "is not a picture", "folder.png": "is not a picture"}
    cases |= {"half.png": "is not a picture", "vector.eps": "is not a picture", "absent.png": "no such file"}
    for name, reason in cases.items():
        for function in (read_size, decode):
            with pytest.raises(ImageError, match=reason):
                function(str(tmp_path / name))


def test_extreme_shapes(tmp_path: Path, pipeline: ImagePipeline) -> None:
    with pytest.raises(ImageError, match="factor of 200"):
        read_size(write_picture(tmp_path / "line.png", 6000, 30))
    assert read_size(write_picture(tmp_path / "thin.png", 5999, 30)) == (5999, 30)
    assert pipeline.patches(str(tmp_path / "thin.png")).grid == pipeline.grid(5999, 30)
    dot = write_picture(tmp_path / "dot.png", 1, 1)
    assert pipeline.patches(str(dot)).grid == pipeline.grid(1, 1) == (1, 4, 4)  # 56 x 56


def test_a_side_under_28_px_makes_56_x_56(demo: Demo) -> None:
    pipeline = limited(demo.model, 28 * 28, 1000 * 1000)
    assert pipeline.grid(27, 280) == pipeline.grid(280, 27) == (1, 4, 4)
    assert pipeline.grid(28, 280) == (1, 20, 2)


def test_a_gif_and_a_path_with_spaces(tmp_path: Path, pipeline: ImagePipeline) -> None:
    path = tmp_path / "two frames é.gif"
    frames = [Image.new("P", (60, 40), colour) for colour in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert read_size(path) == (60, 40)
    assert pipeline.patches(str(path)).grid == pipeline.grid(60, 40)


@pytest.mark.parametrize("short_side", [None, 20, 64, 200])
def test_the_grid_of_a_size_is_the_grid_of_its_patches(model: Path, short_side: int | None) -> None:
    pipeline = limited(model, MIN_PIXELS, MAX_PIXELS, short_side)
    rng = np.random.default_rng(0)
    sizes = [(1, 199), (27, 28), (28, 28), (28, 27), (41, 43), (5000, 30), (30, 5000)]
    for width, height in [*sizes, *rng.integers(1, 400, (25, 2)).tolist()]:
        if max(width, height) >= 200 * min(width, height):
            continue
        patches = pipeline.patches(Image.new("RGB", (width, height)))
        assert patches.grid == pipeline.grid(width, height), (width, height)
        assert patches.pixels_PY.shape == (np.prod(patches.grid), 3 * pipeline.patch_size**2)
        assert pipeline.tokens(patches.grid) == len(patches.pixels_PY) // 4


@pytest.mark.parametrize("minimum, maximum", [(28 * 28, 28 * 28), (56 * 56, 112 * 112), (200 * 200, 300 * 300)])
def test_limits_are_kept(model: Path, minimum: int, maximum: int) -> None:
    pipeline = limited(model, minimum, maximum)
    for width, height in ((28, 28), (60, 45), (150, 150), (640, 480), (1000, 2000)):
        _, high, wide = pipeline.grid(width, height)
        pixels = high * wide * pipeline.patch_size**2
        # A picture of one token is as small as one can be, whatever the limit.
        assert minimum <= pixels <= max(maximum, pipeline.factor**2), (width, height)


def values(pipeline: ImagePipeline, patches: list[Patches], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the vision tower reads of several pictures."""
    pixels_PY = torch.from_numpy(np.concatenate([one.pixels_PY for one in patches]))
    frames = pipeline.processor.temporal_patch_size
    return patch_values(pixels_PY, torch.from_numpy(pipeline.palette_CV), frames, dtype)


SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "other statistics, three frames, patches of 8": {
        **{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127},
        **{"temporal_patch_size": 3, "patch_size": 8, "merge_size": 3, "resample": Image.Resampling.BOX},
    },
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
}


@pytest.mark.parametrize("changed", SETTINGS.values(), ids=SETTINGS)
def test_patches_are_those_of_the_stock_processor(model: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    stock = Qwen2VLImageProcessorPil.from_pretrained(str(model), **changed)
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    pipeline = ImagePipeline(stock, ImageLimits(*size.values()))
    paths = [
        str(write_picture(tmp_path / f"{i}.png", width, height, seed=i))
        for i, (width, height) in enumerate([(84, 84), (100, 61), (333, 90), (112, 56)])
    ]
    expected = stock(images=[Image.open(path).copy() for path in paths], size=size, return_tensors="pt")
    patches = [pipeline.patches(path) for path in paths]
    assert [list(one.grid) for one in patches] == expected["image_grid_thw"].tolist()
    assert all(one.pixels_PY.dtype == np.uint8 for one in patches)
    for dtype in (torch.float32, torch.bfloat16):
        found = values(pipeline, patches, dtype)
        assert found.dtype == dtype and torch.equal(found, expected["pixel_values"].to(dtype))


def test_the_memory_of_a_picture_serves_the_next(pipeline: ImagePipeline) -> None:
    picture = Image.new("RGB", (640, 480), "red")
    first = pipeline.patches(picture)
    keep_memory()
    try:
        pipeline.patches(picture)
        before = Image.core.get_stats()
        again = pipeline.patches(picture)
        after = Image.core.get_stats()
    finally:
        Image.core.set_blocks_max(0)
    assert after["allocated_blocks"] == before["allocated_blocks"]
    assert after["reused_blocks"] > before["reused_blocks"]
    assert np.array_equal(again.pixels_PY, first.pixels_PY)


def test_the_short_side_is_resized_first(model: Path, tmp_path: Path) -> None:
    path = write_picture(tmp_path / "wide.png", 300, 150)
    resized = Image.open(path).resize((128, 64), Image.Resampling.LANCZOS)
    expected = limited(model, MIN_PIXELS, MAX_PIXELS).patches(resized)
    found = limited(model, MIN_PIXELS, MAX_PIXELS, short_side=64).patches(str(path))
    assert found.grid == expected.grid and np.array_equal(found.pixels_PY, expected.pixels_PY)


def test_the_placeholder_is_one_token(model: Path) -> None:
    pipeline = limited(model, 200 * 200, 300 * 300, short_side=500)
    placeholder = pipeline.placeholder()
    assert placeholder.grid == (1, 2, 2) and placeholder.pixels_PY.shape == (4, 3 * pipeline.patch_size**2)


def test_the_settings_of_the_folder_hold() -> None:
    """Qwen3-VL's: black is -1 and white 1; a token is 32 x 32 px."""
    pipeline = limited(model_folder("qwen3_vl"), MIN_PIXELS, MAX_PIXELS)
    pictures = [Image.new("RGB", (64, 96), colour) for colour in ("black", "white")]
    black, white = (values(pipeline, [pipeline.patches(one)]).unique().tolist() for one in pictures)
    assert black == pytest.approx([-1]) and white == pytest.approx([1])
    assert pipeline.grid(64, 96) == (1, 6, 4) and pipeline.tokens((1, 6, 4)) == 6
