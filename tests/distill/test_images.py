"""Damaged files are an error that names them, never other pixels; turned files are turned; nothing else is opened."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image, ImageOps

from dsct_kernels.distill import data, images
from dsct_kernels.distill.datasets import dubai

from .test_data import make_tile

PALETTE = np.array(dubai.PALETTE, np.uint8)
RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 5, (96, 120))
NOISE = RNG.integers(0, 256, (96, 120, 4), dtype=np.uint8)


def palette_image(bits: int) -> Image.Image:
    picture = Image.fromarray((CLASSES % 2**bits).astype(np.uint8), mode="P")
    picture.putpalette(PALETTE.tobytes())
    return picture


def draw(kind: str, path: Path) -> None:
    if kind.startswith("palette"):
        palette_image(int(kind[-1])).save(path, bits=int(kind[-1]))
    elif kind == "16 bit":
        Image.fromarray(RNG.integers(0, 2**16, (96, 120), dtype=np.uint16)).save(path)
    elif kind == "1 bit":
        Image.fromarray(NOISE[..., 0] > 128).save(path)
    else:
        bands = {"grey": NOISE[..., 0], "grey and alpha": NOISE[..., :2], "RGB": NOISE[..., :3], "RGBA": NOISE}[kind]
        Image.fromarray(bands).save(path)


PNGS = ["palette2", "palette4", "palette8", "1 bit", "grey", "grey and alpha", "RGB", "RGBA"]


def assert_whole_or_named(path: Path, good: np.ndarray) -> bool:
    """Whole and window reads; the parts that are read are right. True if everything was."""
    whole = True
    for y, x, height, width in ((0, 0, 96, 120), (0, 0, 96, 120), (80, 60, 16, 60), (0, 0, 8, 8)):
        try:
            pixels = images.read_rgb(path, y, x, height, width)
        except data.DataError as error:
            assert str(path) in str(error)
            whole = False
        else:
            assert np.array_equal(pixels, good[y : y + height, x : x + width]), "other pixels, silently"
    return whole


@pytest.mark.parametrize("kind", PNGS)
def test_a_cut_png_is_named_wherever_it_was_cut(tmp_path, kind):
    path = tmp_path / "cut.png"
    draw(kind, path)
    content, good = path.read_bytes(), images.read_rgb(path, 0, 0, 96, 120)
    for percent in (0, 5, 30, 50, 75, 90, 97, 99):
        path.write_bytes(content[: len(content) * percent // 100])
        assert not assert_whole_or_named(path, good), f"{percent}%"
    for lost in range(1, 13):  # IEND is 12 bytes, and holds nothing
        path.write_bytes(content[:-lost])
        assert assert_whole_or_named(path, good), f"{lost} bytes of IEND"


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_with_a_flipped_bit_is_named(tmp_path, kind):
    path = tmp_path / "flipped.png"
    draw(kind, path)
    content, good = path.read_bytes(), images.read_rgb(path, 0, 0, 96, 120)
    start = content.index(b"IDAT") + 4
    for position in np.linspace(start, len(content) - 21, 9).astype(int):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        assert not assert_whole_or_named(path, good), position


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("kind", ["grey", "RGB"])
def test_a_cut_jpeg_or_tiff_is_named(tmp_path, suffix, kind):
    path = tmp_path / f"cut{suffix}"
    draw(kind, path)
    content, good = path.read_bytes(), images.read_rgb(path, 0, 0, 96, 120)
    for percent in (0, 5, 30, 50, 75, 90, 97):
        path.write_bytes(content[: len(content) * percent // 100])
        assert not assert_whole_or_named(path, good), f"{percent}%"


def test_a_cut_sixteen_bit_image_is_refused_for_its_samples_or_its_cut(tmp_path):
    path = tmp_path / "cut.png"
    draw("16 bit", path)
    content = path.read_bytes()
    for percent in (0, 50, 99, 100):
        path.write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(data.DataError, match=r"cut\.png"):
            images.read_rgb(path, 0, 0, 96, 120)


@pytest.mark.parametrize("which", ["images/image_part_001.jpg", "masks/image_part_001.png"])
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_a_cut_file_of_a_data_set_is_named_with_and_without_the_cache(tmp_path, which, cache_mb):
    """The worker threads that fill the cache see the same settings of GDAL."""
    for group in ("Tile 1", "Tile 2", "Tile 3", "Tile 4"):
        folder = make_tile(tmp_path, group, size=(96, 120))
        Image.fromarray(PALETTE[CLASSES]).save(folder / "masks/image_part_001.png")
    bad = tmp_path / "Tile 3" / which
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size * 6 // 10])
    with pytest.raises(data.DataError, match=f"Tile 3/{which}"):
        pixels = data.Pixels(dubai.tiles(tmp_path), cache_mb)
        for i in range(4):
            pixels.window(i, 0, 0, 96, 120)


def test_a_cut_file_is_named_whatever_the_user_set_in_gdal(tmp_path):
    path = tmp_path / "cut.png"
    draw("RGB", path)
    path.write_bytes(path.read_bytes()[:-100])
    other = rasterio.Env(GDAL_PNG_WHOLE_IMAGE_OPTIM="YES", GDAL_ERROR_ON_LIBJPEG_WARNING="FALSE")
    with other, pytest.raises(data.DataError, match=r"cut\.png"):
        images.read_rgb(path, 0, 0, 96, 120)
    with pytest.raises(data.DataError, match=r"cut\.png"):  # that Env took our options back when it closed
        images.read_rgb(path, 0, 0, 96, 120)


def test_a_cut_file_is_named_whatever_the_environment_says(tmp_path):
    """rasterio imported first, and both options set the other way in the environment."""
    for kind, name in (("RGB", "cut.png"), ("RGB", "cut.jpg")):
        path = tmp_path / name
        draw(kind, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    code = (
        "import sys, rasterio, pathlib\nfrom dsct_kernels.distill import images, files\n"
        "for p in map(pathlib.Path, sys.argv[1:]):\n"
        "    try: images.read_rgb(p, 0, 0, 96, 120); print('read')\n"
        "    except files.DataError as error: print('named' if str(p) in str(error) else error)\n"
    )
    other = {"GDAL_PNG_WHOLE_IMAGE_OPTIM": "YES", "GDAL_ERROR_ON_LIBJPEG_WARNING": "FALSE"}
    command = [sys.executable, "-c", code, str(tmp_path / "cut.png"), str(tmp_path / "cut.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **other})
    assert done.stdout.split() == ["named", "named"], done.stderr


# ---- orientation


def save_turned(picture: Image.Image, path: Path, value: int, big_endian: bool = False) -> None:
    exif = Image.Exif()
    if big_endian:
        exif.endian = ">"
    exif[images.ORIENTATION] = value
    if path.suffix == ".tif":
        picture.save(path, tiffinfo={images.ORIENTATION: value})
    else:
        picture.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("size", [(40, 56)])
def test_an_image_is_turned_as_viewers_turn_it(tmp_path, suffix, value, size):
    path = tmp_path / f"turned{suffix}"
    save_turned(Image.fromarray(NOISE[: size[0], : size[1], :3]), path, value, big_endian=value % 2 == 0)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    height, width = shown.shape[:2]
    assert images.image_size(path) == (height, width)
    tolerance = 3 if suffix == ".jpg" else 0  # two JPEG decoders need not agree to the last bit
    for y, x, h, w in ((0, 0, height, width), (3, 5, 20, 30), (height - 7, 0, 7, width), (0, width - 1, 1, 1)):
        pixels = images.read_rgb(path, y, x, h, w)
        assert pixels.shape == (h, w, 3)
        assert np.abs(pixels.astype(int) - shown[y : y + h, x : x + w]).max() <= tolerance


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_a_turned_photograph_and_its_upright_mask_agree(tmp_path, value, cache_mb):
    """The camera stored the photograph turned; whoever labelled it saw it upright, and saved the mask that way."""
    upright = PALETTE[np.kron(RNG.integers(0, 5, (4, 6)), np.ones((16, 16), int))]
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's inverse transpositions
    photograph = Image.fromarray(upright)
    if value != 1:
        photograph = photograph.transpose(Image.Transpose(stored[value]))
    folder = make_tile(tmp_path, size=(64, 96))
    exif = Image.Exif()
    exif[images.ORIENTATION] = value
    photograph.save(folder / "images/image_part_001.jpg", quality=100, subsampling=0, exif=exif)
    Image.fromarray(upright).save(folder / "masks/image_part_001.png")
    (tile,) = dubai.tiles(tmp_path)
    assert (tile.height, tile.width) == (64, 96)
    pixels = data.Pixels([tile], cache_mb).window(0, 5, 9, 50, 80).numpy()
    assert np.abs(pixels[..., :3].astype(int) - PALETTE[pixels[..., 3]]).mean() < 8
    assert np.array_equal(PALETTE[pixels[..., 3]], upright[5:55, 9:89])


@pytest.mark.parametrize("value", [3, 6])
def test_a_mask_may_be_turned_as_well(tmp_path, value):
    folder = make_tile(tmp_path, size=(40, 50))
    mask = Image.fromarray(PALETTE[CLASSES[:50, :40] if value == 6 else CLASSES[:40, :50]])
    save_turned(mask, folder / "masks/image_part_001.png", value)
    (tile,) = dubai.tiles(tmp_path)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(folder / "masks/image_part_001.png")))
    assert np.array_equal(PALETTE[tile.read(0, 0, 40, 50)[..., 3]], turned)


def test_a_size_that_only_differs_by_the_turn_is_told_as_it_is_shown(tmp_path):
    folder = make_tile(tmp_path, size=(40, 50))
    save_turned(Image.fromarray(NOISE[:40, :50, :3]), folder / "images/image_part_001.jpg", 6)
    with pytest.raises(data.DataError, match=r"masks/image_part_001.png: 50 x 40, but its image .* is 40 x 50"):
        dubai.tiles(tmp_path)


@pytest.mark.parametrize("value", [0, 9, 65535])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_an_orientation_that_is_none_leaves_the_image_as_it_is(tmp_path, value, suffix):
    path = tmp_path / f"odd{suffix}"
    save_turned(Image.fromarray(NOISE[:40, :56, :3]), path, value)
    assert images.image_size(path) == (40, 56)


def test_broken_exif_is_no_orientation(tmp_path):
    path = tmp_path / "odd.png"
    Image.fromarray(NOISE[:40, :56, :3]).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(images.read_rgb(path, 0, 0, 40, 56), NOISE[:40, :56, :3])


# ---- what is no image


def test_a_text_that_names_code_is_not_opened_under_an_images_name(tmp_path):
    """GDAL's virtual format may name a Python function; a data set's files are images and nothing else."""
    ran = tmp_path / "ran"
    folder = make_tile(tmp_path / "set")
    for name in ("images/image_part_001.jpg", "masks/image_part_001.png"):
        good = (folder / name).read_bytes()
        (folder / name).write_text(
            '<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1" '
            'subClass="VRTDerivedRasterBand"><PixelFunctionType>f</PixelFunctionType>'
            "<PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionCode><![CDATA[\n"
            f"open({str(ran)!r}, 'w')\ndef f(*args, **kwargs): pass\n]]>"
            "</PixelFunctionCode></VRTRasterBand></VRTDataset>"
        )
        with rasterio.Env(GDAL_VRT_ENABLE_PYTHON="YES"), pytest.raises(data.DataError, match=name):
            data.Pixels(dubai.tiles(tmp_path / "set"), 64)
        (folder / name).write_bytes(good)
    assert not ran.exists()


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["npy", "torch"])
def test_a_pickle_under_an_images_name_does_not_run(tmp_path, kind):
    ran = tmp_path / "ran"
    folder = make_tile(tmp_path / "set")
    path = folder / "masks/image_part_001.png"
    with open(path, "wb") as file:
        if kind == "npy":
            np.save(file, np.array([Hostile(ran)], object), allow_pickle=True)
        else:
            torch.save(Hostile(ran), file)
    with pytest.raises(data.DataError, match=r"image_part_001\.png"):
        dubai.tiles(tmp_path / "set")
    assert not ran.exists()


def test_a_png_that_claims_a_size_it_does_not_hold_is_named(tmp_path):
    path = tmp_path / "large.png"
    draw("RGB", path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 120, 97)
    path.write_bytes(bytes(content))
    with pytest.raises(data.DataError, match=r"large\.png"):
        images.read_rgb(path, 0, 0, 97, 120)
