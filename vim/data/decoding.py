"""From a file to an upright image with 8 bits a channel: the one way for training, evaluation and prediction."""

import logging
import os
import struct
import zlib
from typing import IO

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import get_worker_info

_logger = logging.getLogger(__name__)

# What Pillow raises, over all of its formats, for a file that is missing, no image, cut short, damaged or too large.
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
# What makes an image upright, by the orientation in its EXIF data.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow finds an orientation in an image that it has opened.
_EXIF_DATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_DARK = 64  # a photograph is brighter than a quarter somewhere
_said: set[str] = set()


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Return the image in a file, decoded and upright; raises what is in `BAD_IMAGE`."""
    if isinstance(file, (str, os.PathLike)) and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("it is not a regular file")  # a pipe that nobody writes to would be read for ever
    with Image.open(file) as image:
        has_16_bits = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(image.tile)
        image.load()
        if has_16_bits:
            _check_colours(image)
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Return the image as it is meant to be seen: turned and mirrored as its EXIF data says.

    Cameras store what the sensor saw, and write into the EXIF data how they were held. An image that is upright already
    is returned as it is. (`ImageOps.exif_transpose` also rewrites the EXIF data, which fails where they are odd.)
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BAD_IMAGE as error:  # the pixels are there, and damaged EXIF data say nothing about them
        _say_once("exif", f"an image has EXIF data that cannot be read, and is taken to be upright: {error}")
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _EXIF_DATA:
        turned.info.pop(name, None)
    return turned


def to_color_mode(image: Image.Image, mode: str, bits: int = 16) -> Image.Image:
    """Return the image with 8 bits a channel in a mode of PIL; of 16 grey bits the upper 8 that are in use are kept.

    Args:
        image: An image of any mode.
        mode: `L`, `RGB` or `RGBA`.
        bits: Bits in use of a grey image with 16 bits a pixel; what is brighter becomes white.

    Raises:
        ValueError: Its pixels have 32 bits, which say nothing about their range.
        OSError: The file is damaged.
    """
    if image.mode.startswith("I;16"):  # PIL itself would cut what is over 255
        pixels = np.asarray(image)
        _check_bits(int(pixels.max(initial=0)), bits)
        image = Image.fromarray((pixels >> (bits - 8)).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}) of unknown range: convert it to 8 or 16 bits"
        )
    return image.convert(mode)


def _check_bits(brightest: int, bits: int) -> None:
    """Say once when 16-bit pixels seem to use other bits than the setting says."""
    used = max(8, brightest.bit_length())
    if brightest == 0:
        return
    if used > bits:
        _say_once("too few", f"an image has pixels of {brightest:,}, and data.bits = {bits} cuts them to white")
    elif used < bits and brightest >> (bits - 8) < _DARK:
        levels = (brightest >> (bits - 8)) + 1
        _say_once(
            "too many",
            f"an image with 16 bits a pixel is no brighter than {brightest:,}, of which data.bits = {bits} leaves "
            f"{levels} grey levels: if its camera gives {used} bits, set --data.bits {used}",
        )


def _check_colours(image: Image.Image) -> None:
    """Say once when few levels are left of an image with 16 bits a channel, of which Pillow keeps the upper 8."""
    colours = 3 if image.mode.startswith("RGB") else 1
    brightest = int(np.asarray(image)[..., :colours].max(initial=0))
    if 0 < brightest < _DARK:
        _say_once(
            "colours",
            f"an image with 16 bits a channel is so dark that {brightest + 1} of 256 levels are left of it: if its "
            "camera gives fewer bits, scale its pixels up, or convert them to 8 bits",
        )


def _say_once(what: str, message: str) -> None:
    """Write a warning once a process, and only by the first of the processes that read for a loader."""
    worker = get_worker_info()
    if what not in _said and (worker is None or worker.id == 0):
        _said.add(what)
        _logger.warning("%s", message)
