"""Windows of image files as RGB, turned as every viewer shows them; a damaged file is an error, never other pixels."""

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError

# Without the first, a truncated JPEG reads as grey, without the second, a truncated PNG as whatever the buffer held:
# both in silence.
_GDAL = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE", "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO"}
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


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of the image as it is shown."""
    with open_image(path) as image:
        transposed = _TURNS[orientation(path, image.driver, image.tags())][0]
        return (image.width, image.height) if transposed else (image.height, image.width)


def read_rgb(path: Path, y: int, x: int, height: int, width: int) -> np.ndarray:
    """A window of an image as (height, width, 3) uint8; palette and grey images are expanded to RGB."""
    with open_image(path) as image:
        transpose, flip_y, flip_x = _TURNS[orientation(path, image.driver, image.tags())]
        full_height, full_width = (image.width, image.height) if transpose else (image.height, image.width)
        if flip_y:
            y = full_height - y - height
        if flip_x:
            x = full_width - x - width
        stored = (x, y, width, height) if transpose else (y, x, height, width)
        pixels = _read_stored(path, image, *stored)
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _read_stored(path: Path, image: Any, y: int, x: int, height: int, width: int) -> np.ndarray:
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    if image.dtypes[0] != "uint8":
        raise DataError(f"{path}: samples are {image.dtypes[0]}, expected uint8")
    window = Window(x, y, width, height)
    _set_gdal()
    try:
        if image.count >= 3:
            return image.read((1, 2, 3), window=window).transpose(1, 2, 0)
        band = image.read(1, window=window)
    except RasterioError as error:
        raise DataError(f"{path}: cannot be decoded, is the file truncated? ({error.__cause__ or error})") from error
    try:
        table = np.zeros((256, 3), np.uint8)
        for value, colour in image.colormap(1).items():
            table[value] = colour[:3]
    except ValueError:  # no palette: a grey image
        return np.repeat(band[..., None], 3, axis=2)
    return table[band]
