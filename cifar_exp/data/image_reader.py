"""Decode image files: one reader and one resize rule for training, evaluation and prediction.

The rule is stored with every network (:class:`Preprocessing`), so that other programs can read images as training did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cifar_exp.errors import StorageError
from cifar_exp.system.printable import printable

_DECODERS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not EPS and the like, which start other programs
MAX_PIXELS = 2**26  # cameras make 50 million; a small file can claim gigabytes of pixels
MAX_BYTES = 8 * MAX_PIXELS  # of a file, as of 16-bit RGBA; some decoders read a file whole or byte by byte
_RULE = "cover, crop"


@dataclass(frozen=True)
class Preprocessing:
    """How images are read. It is stored with a network.

    An image is rotated as its EXIF data says, converted to RGB with 8 bits per channel, resized with antialiasing until
    it just covers ``image_size``, and cropped at its centre.

    Attributes:
        image_size: height and width in pixels after the crop.
        turned: whether the EXIF orientation is applied; networks without a stored rule were trained without it.
    """

    image_size: tuple[int, int]
    turned: bool = True

    def stored(self) -> dict[str, Any]:
        """As JSON and a checkpoint hold it."""
        return {
            "image_size": list(self.image_size),
            "resize": _RULE,
            "orientation": "exif" if self.turned else "ignored",
        }

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None, image_size: tuple[int, int]) -> "Preprocessing":
        """The rule from :meth:`stored`. None, as in checkpoints of version 0.1: ``image_size``, EXIF ignored.

        Raises:
            StorageError: it is none that this version knows.
        """
        if stored is None:
            return cls(image_size, turned=False)
        try:
            height, width = stored["image_size"]
            turned = {"exif": True, "ignored": False}[stored["orientation"]]
            whole = type(height) is type(width) is int
            if stored["resize"] != _RULE or not (whole and height > 0 < width and height * width <= MAX_PIXELS):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"the checkpoint's preprocessing {printable(str(dict(stored)))[:200]} is unknown to this version. "
                f"Update cifar-exp to the version that trained it"
            ) from error
        return cls((height, width), turned)


@dataclass(frozen=True)
class EncodedImage:
    """An image file inside another file, such as a shard.

    Attributes:
        name: for messages.
        content: the bytes of the image file.
    """

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def opened(self) -> Image.Image:
        return _opened(BytesIO(self.content))


def _opened(file: Path | BytesIO) -> Image.Image:
    return Image.open(file, formats=_DECODERS)  # reads the header alone


def _bytes(file: Path | EncodedImage) -> int:
    return file.stat().st_size if isinstance(file, Path) else len(file.content)


def decode_image(file: Path | EncodedImage, turned: bool = True) -> NDArray[np.uint8] | str:
    """The image (3, H, W) uint8, or a description of the problem.

    ``turned``: apply the EXIF orientation.
    """
    try:
        if (size := _bytes(file)) > MAX_BYTES:
            return f"has {size:,} bytes, more than {MAX_BYTES:,}"
        with _opened(file) if isinstance(file, Path) else file.opened() as image:
            if image.width * image.height > MAX_PIXELS:
                return f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} in all"
            shallow = _eight_bits(_turned(image) if turned else image, image.format)
            if isinstance(shallow, str):
                return shallow
            # A copy even of a single pixel: Pillow's own array is read-only, and torch warns of that.
            return np.array(np.asarray(_rgb(shallow)).transpose(2, 0, 1), order="C")
    except (ImportError, NameError):  # no file raises these
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        if (not isinstance(file, Path) or file.exists()) and _bytes(file) == 0:
            return "is empty"
        return (
            "is not an image in a known format" if isinstance(error, UnidentifiedImageError) else printable(str(error))
        )


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image | str:
    """The image with 8 bits per channel, or the reason why it cannot be converted.

    Of 16 bits the upper 8 are kept, as Pillow does for colours; Pillow's own conversion would clip grey to white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        return (
            f"has {'32-bit integers' if image.mode == 'I' else 'floating-point numbers'} as pixels (mode {image.mode}) "
            f"whose range is unknown; convert it to 8 or 16 bits"
        )
    return image


def _turned(image: Image.Image) -> Image.Image:
    """The image, rotated by its EXIF orientation; unchanged if its EXIF data are damaged."""
    image.load()  # TIFF files are turned by Pillow as they are loaded
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data can raise many kinds of errors
        return image


def _rgb(image: Image.Image) -> Image.Image:
    # A palette may have transparency; Pillow warns if it is converted to RGB directly.
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def read_image(file: Path | EncodedImage, rule: Preprocessing) -> Tensor | str:
    """The image (3, *rule.image_size) uint8, or a description of the problem that begins with the name.

    Training, evaluation and prediction all read images of a set size by this function. An image of that size stays
    unchanged.
    """
    from torchvision.transforms.v2 import functional  # imported here: it takes 1.5 s, and only this needs it

    decoded = decode_image(file, rule.turned)
    if isinstance(decoded, str):
        return f"{printable(file)}: {decoded}"
    (height, width), (own_height, own_width) = rule.image_size, decoded.shape[1:]
    if height * own_width >= width * own_height:  # wider than the target
        covering = [height, int(height * own_width / own_height)]
    else:
        covering = [int(width * own_height / own_width), width]
    if covering[0] * covering[1] > MAX_PIXELS:
        return f"{printable(file)}: has {own_width} x {own_height} pixels, too long and narrow to be resized"
    resized = functional.resize(torch.from_numpy(decoded), covering, antialias=True)
    cropped: Tensor = functional.center_crop(resized, list(rule.image_size))
    return cropped
