"""Windows of image files, turned as every viewer shows them; a damaged file is an error, never other pixels."""

import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError

# Without the first, a truncated JPEG reads as grey, without the second, a truncated PNG as whatever the buffer held:
# both in silence. The third is in MB: windows are read at random, and GDAL would keep 5% of the machine's memory of
# their blocks, in every process.
_GDAL = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE", "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO", "GDAL_CACHEMAX": 64}
# And no others: GDAL also opens, whatever the file is called, texts that name files, hosts and Python functions.
_DRIVERS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
}

# EXIF orientation: transpose the stored image, then flip its rows, then its columns.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
ORIENTATION = 0x0112


def _set_gdal() -> None:
    """Before every file, since an Env of the caller's that closes takes its options back, for all threads.

    Not with a rasterio.Env of our own: it would do just that under the threads that decode beside this one.
    """
    from rasterio._env import set_gdal_config

    for name, value in _GDAL.items():
        set_gdal_config(name, value)


def open_image(path: Path) -> Any:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    # For good, not with catch_warnings: several threads decode at once, and it would undo the filter under another.
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened as an image ({error.strerror})") from error
    driver = next((name for start, name in _DRIVERS.items() if head.startswith(start)), None)
    if driver is None:
        what = f"it starts with {head!r}" if head else "it is empty"
        raise DataError(f"{path}: cannot be opened as an image, expected JPEG, PNG or TIFF, but {what}")
    _set_gdal()
    try:
        return rasterio.open(path, driver=driver)
    except RasterioError as error:
        raise DataError(f"{path}: cannot be opened as an image ({error})") from error


def orientation(path: Path, driver: str, tags: dict[str, str]) -> int:
    """The EXIF orientation 1 to 8; 1 where the file has none, or nonsense."""
    try:
        if driver == "JPEG":
            value: object = int(tags.get("EXIF_Orientation", 1))
        else:
            with open(path, "rb") as file:
                value = _of_png(file) if driver == "PNG" else _of_tiff(file.read(16), file)
    except (OSError, ValueError, SyntaxError, struct.error):
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _of_png(file: Any) -> object:
    import io

    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            content = io.BytesIO(file.read(length))
            return _of_tiff(content.read(8), content)
        file.seek(length + 4, 1)
    return 1


def _of_tiff(head: bytes, file: Any) -> object:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    directory = ImageFileDirectory_v2(head[:16] if head[2:4] in (b"\x2b\x00", b"\x00\x2b") else head[:8])
    file.seek(directory.next)
    directory.load(file)
    return directory.get(ORIENTATION, 1)


@dataclass(frozen=True)
class Shape:
    """What can be said of an image without decoding it; height and width as it is shown."""

    height: int
    width: int
    bands: int
    samples: str  # numpy's name of the type: uint8, uint16, ...
    mask: str  # what says where it holds data: "nodata", "alpha", "mask", or "" for everywhere
    place: tuple[float, ...] | None  # the six numbers of its georeference; None where it has none


def shape_of(path: Path) -> Shape:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened as an image ({error.strerror})") from error
    return _shape_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2**16)  # sets of thousands of files are listed more than once in a run
def _shape_of(path: Path, _changed: int, _size: int) -> Shape:
    with open_image(path) as image:
        transposed = _TURNS[orientation(path, image.driver, image.tags())][0]
        size = (image.width, image.height) if transposed else (image.height, image.width)
        place = None if image.transform.is_identity else tuple(image.transform)[:6]
        return Shape(*size, image.count, image.dtypes[0], _mask_of(image), place)


def _mask_of(image: Any) -> str:
    from rasterio.enums import MaskFlags

    flags = {flag for band in image.mask_flag_enums for flag in band}
    names = {MaskFlags.nodata: "nodata", MaskFlags.alpha: "alpha", MaskFlags.per_dataset: "mask"}
    return next((name for flag, name in names.items() if flag in flags), "")


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the image as it is shown."""
    shape = shape_of(path)
    return shape.height, shape.width


def read_rgb(path: Path, y: int, x: int, height: int, width: int) -> np.ndarray:
    """A window of an image as (height, width, 3) uint8; palette and grey images are expanded to RGB."""
    return _read(path, y, x, height, width, lambda image, window: _expanded(path, image, window))


def read_bands(path: Path, bands: tuple[int, ...], y: int, x: int, height: int, width: int) -> np.ndarray:
    """A window of some bands, counted from 1, as they are stored: (height, width, bands)."""
    return _read(path, y, x, height, width, lambda image, window: _bands(path, image, bands, window))


def read_valid(path: Path, y: int, x: int, height: int, width: int) -> np.ndarray:
    """Where a window holds data, by the file's nodata value, alpha band or mask."""
    return (
        _read(path, y, x, height, width, lambda image, window: image.dataset_mask(window=window)[..., None])[..., 0] > 0
    )


def _read(path: Path, y: int, x: int, height: int, width: int, read: Callable[[Any, Any], np.ndarray]) -> np.ndarray:
    """What `read` makes of the stored window that is shown at y, x, turned as it is shown."""
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    with open_image(path) as image:
        transpose, flip_y, flip_x = _TURNS[orientation(path, image.driver, image.tags())]
        full_height, full_width = (image.width, image.height) if transpose else (image.height, image.width)
        if flip_y:
            y = full_height - y - height
        if flip_x:
            x = full_width - x - width
        window = Window(y, x, height, width) if transpose else Window(x, y, width, height)
        _set_gdal()
        try:
            pixels = read(image, window)
        except RasterioError as error:
            why = error.__cause__ or error
            raise DataError(f"{path}: cannot be decoded, is the file truncated? ({why})") from error
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _expanded(path: Path, image: Any, window: Any) -> np.ndarray:
    if image.dtypes[0] != "uint8":
        raise DataError(f"{path}: samples are {image.dtypes[0]}, expected uint8")
    if image.count >= 3:
        return image.read((1, 2, 3), window=window).transpose(1, 2, 0)
    band = image.read(1, window=window)
    try:
        table = np.zeros((256, 3), np.uint8)
        for value, colour in image.colormap(1).items():
            table[value] = colour[:3]
    except ValueError:  # no palette: a grey image
        return np.repeat(band[..., None], 3, axis=2)
    return table[band]


def _bands(path: Path, image: Any, bands: tuple[int, ...], window: Any) -> np.ndarray:
    if max(bands) > image.count:
        raise DataError(
            f"{path}: has {image.count} bands, so there is no band {max(bands)}; choose others with --bands"
        )
    return image.read(bands, window=window).transpose(1, 2, 0)
