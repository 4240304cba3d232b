"""Decode image files to upright images with 8 bits per channel, for training, evaluation and prediction."""

import logging
import os
import struct
import zlib
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import get_worker_info

from vim import git_lfs

_logger = logging.getLogger(__name__)

# The exceptions that Pillow raises, over all formats, for a file that is missing, truncated, damaged or too large.
BAD_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# The operation that makes an image upright, by the orientation in its EXIF data.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Entries of `Image.info` in which Pillow finds an orientation.
_EXIF_DATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_DARK = 64  # of 256: the brightest pixel of a photograph is almost always above
_warned: set[str] = set()


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Return the image in a file, decoded and upright.

    Raises:
        BAD_IMAGE: The file cannot be decoded.
    """
    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("it is not a regular file")  # reading a pipe without a writer would hang
    with _open(file) as image:
        if image.format == "PPM" and image.mode == "I":  # 16 bits; Pillow scales the largest value to 65,535
            return Image.fromarray(np.asarray(image).astype(np.uint16))
        has_16_bits = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile)
        image.load()
        if has_16_bits:
            _check_colours(image)
        return upright(image)


def _open(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:
        if isinstance(file, (str, os.PathLike)):
            is_pointer = git_lfs.is_pointer_file(file)
        else:
            file.seek(0)
            is_pointer = git_lfs.is_pointer(file.read(100))
        if is_pointer:
            raise OSError(git_lfs.POINTER) from error
        raise


def describe_bad_image(error: BaseException) -> str:
    """Return the reason why an image cannot be read, one of `BAD_IMAGE`, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Return the image rotated and mirrored as its EXIF orientation says, or unchanged if it is upright already.

    `ImageOps.exif_transpose` would also rewrite the EXIF data, and fails if they are malformed.
    """
    try:
        operation = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BAD_IMAGE as error:  # the pixels are fine: only the EXIF data are damaged
        _warn_once("exif", f"an image has EXIF data that cannot be read, and is taken to be upright: {error}")
        return image
    if operation is None:
        return image
    rotated = image.transpose(operation)
    for name in _EXIF_DATA:
        rotated.info.pop(name, None)
    return rotated


def to_color_mode(image: Image.Image, mode: str, bits: int = 16) -> Image.Image:
    """Return the image in a mode of PIL, with 8 bits per channel.

    Args:
        image: An image of any mode.
        mode: `L`, `RGB` or `RGBA`.
        bits: Bits in use of a 16-bit grey image. The upper 8 of them are kept, and brighter pixels become white.

    Raises:
        ValueError: The pixels are 32-bit numbers, whose range is unknown.
        OSError: The file is damaged.
    """
    if image.mode.startswith("I;16"):  # PIL itself would clip at 255
        pixels = np.asarray(image)
        _check_bits(int(pixels.max(initial=0)), bits)
        image = Image.fromarray((pixels >> (bits - 8)).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}) of unknown range: convert it to 8 or 16 bits"
        )
    return image.convert(mode)


def _check_bits(brightest: int, bits: int) -> None:
    """Warn once if 16-bit pixels seem to use other bits than the setting says."""
    used = max(8, brightest.bit_length())
    if brightest == 0:
        return
    if used > bits:
        _warn_once("too few", f"an image has pixels of {brightest:,}, and data.bits = {bits} clips them to white")
    elif used < bits and brightest >> (bits - 8) < _DARK:
        levels = (brightest >> (bits - 8)) + 1
        _warn_once(
            "too many",
            f"the brightest pixel of a 16-bit image is {brightest:,}, so data.bits = {bits} leaves {levels} grey "
            f"levels: if its camera gives {used} bits, set --data.bits {used}",
        )


def _check_colours(image: Image.Image) -> None:
    """Warn once if an image with 16 bits per channel keeps few levels, since Pillow keeps the upper 8 bits."""
    colours = 3 if image.mode.startswith("RGB") else 1
    brightest = int(np.asarray(image)[..., :colours].max(initial=0))
    if 0 < brightest < _DARK:
        _warn_once(
            "colours",
            f"an image with 16 bits per channel is so dark that {brightest + 1} of 256 levels are left: if its camera "
            "gives fewer bits, scale its pixels up, or convert them to 8 bits",
        )


def _warn_once(topic: str, message: str) -> None:
    """Log a warning once per process, and only in the first worker of a loader."""
    worker = get_worker_info()
    if topic not in _warned and (worker is None or worker.id == 0):
        _warned.add(topic)
        _logger.warning("%s", message)
