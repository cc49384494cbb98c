"""Pictures: files in, within bounds, and PNG out.

A picture is uint8 (3, H, W), RGB. What the model looks at is `SIZE` pixels high, bright strokes on
dark ground; a row of digits is as many times as wide.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["fit", "read_image", "write_png"]

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
# Most pixels of a file that is opened; a bomb claims more than it weighs.
MAX_PIXELS = 25_000_000
SIZE = 32
# Larger pictures are made smaller as they are read: the model looks at far fewer pixels.
LARGEST = 512
# A row of so many digits is the widest that is read.
MAX_ROW = 4
# EXIF's tag for how the camera was held.
_ORIENTATION = 0x0112


def read_image(data: bytes) -> Tensor:
    """Reads a picture file.

    Args:
        data: PNG, JPEG, GIF (its first frame), BMP or WEBP, of any mode; of 16 bits the upper 8
            count. What is transparent lies on black; a photograph is turned as its camera says,
            unless that note is damaged.

    Returns:
        (3, H, W) uint8, neither of H and W above `LARGEST`.

    Raises:
        ValueError: it is no such file, is broken or cut off, or claims more than `MAX_PIXELS`,
            which is found out before anything is decoded.
        ModuleNotFoundError: pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ModuleNotFoundError(
            "reading pictures needs a package that is not installed: pip install pillow"
        ) from error
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"the picture cannot be read: it is none of {', '.join(FORMATS)}, or its head is broken"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large("far too many")) from error
    except Exception as error:  # what damage makes Pillow raise is of any type
        raise ValueError(f"the picture's head cannot be read: {_reason(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{width} × {height}"))
    try:
        image.draft(None, (LARGEST, LARGEST))  # a large JPEG is decoded at a fraction of its size
        image.load()
        turn = _turn(image)
        flat = _small_over_black(image)
    except Exception as error:
        raise ValueError(
            f"the picture is broken or cut off: {_reason(error)}; save it anew"
        ) from error
    if turn is not None:
        flat = flat.transpose(turn)
    pixels = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
    return pixels.view(flat.height, flat.width, 3).permute(2, 0, 1).contiguous()


def write_png(image: Tensor) -> bytes:
    """Writes a PNG file.

    Args:
        image: (3, H, W) uint8.

    Returns:
        The file's bytes.

    Raises:
        ValueError, TypeError: image has another shape or dtype.
    """
    from PIL import Image

    _check(image)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def fit(image: Tensor, size: int = SIZE) -> Tensor:
    """A picture as the model looks at it.

    The whole picture is scaled into the canvas, with the colour of its border around it; strokes on
    light ground are put on black.

    Args:
        image: (3, H, W) uint8, of any size.
        size: height of the canvas.

    Returns:
        (3, size, size) uint8, or (3, size, n * size) where the picture is at least n - 0.2 times as
        wide as high, n at most `MAX_ROW`.

    Raises:
        ValueError, TypeError: image has another shape or dtype, or no pixels.
    """
    _check(image)
    height, width = image.shape[1:]
    columns = min(max(int(width / height + 0.2), 1), MAX_ROW)
    pixels = image.float()
    scale = min(size / height, size * columns / width)
    new = tuple(max(round(n * scale), 1) for n in (height, width))
    if new != (height, width):
        pixels = F.interpolate(pixels[None], size=new, mode="bilinear", antialias=True)[0]
    sides = (pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1])
    ground = torch.cat(sides, dim=1).median(1).values[:, None, None]
    if float(ground.mean()) > 127:
        pixels, ground = _on_black(pixels, ground), torch.zeros_like(ground)
    canvas = ground.repeat(1, size, size * columns)
    top, left = (size - new[0]) // 2, (size * columns - new[1]) // 2
    canvas[:, top : top + new[0], left : left + new[1]] = pixels
    return canvas.round().clamp(0, 255).to(torch.uint8)


def _on_black(pixels: Tensor, ground: Tensor) -> Tensor:
    """Strokes on light ground, put on black: colours stay, dark ones become white."""
    cover = ((ground - pixels) / ground.clamp(min=1)).amax(0).clamp(0, 1)
    # The darkest place is all ink, else pink would be red that covers half. Empty paper has none.
    cover = cover / cover.max().clamp(min=0.2)
    ink = (pixels - (1 - cover) * ground) / cover.clamp(min=1e-3)
    dark = ink.amax(0) < 100
    return ink.clamp(0, 255).masked_fill(dark, 255.0) * cover


def _check(image: Tensor) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"image is {image.dtype}; it must be torch.uint8, 0 to 255")
    if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(
            f"image is {tuple(image.shape)}; it must be (3, H, W) with H and W above 0"
        )


def _too_large(pixels: str) -> str:
    return f"the picture has {pixels} pixels; at most {MAX_PIXELS:,} are read. Make it smaller"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _turn(image: "Image.Image") -> "Image.Transpose | None":
    """What puts a photograph upright."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged notes of a camera are common, and its pixels are whole
        return None


def _small_over_black(image: "Image.Image") -> "Image.Image":
    """Any mode as RGB within `LARGEST`; what is transparent lies on black."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, of which Pillow's own conversion keeps the lower
        values = np.asarray(image).copy()
        values[values == image.info.get("transparency", -1)] = 0
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    transparent = image.has_transparency_data
    image = image.convert("RGBA" if transparent else "RGB")  # before it shrinks: a palette cannot
    image.thumbnail((LARGEST, LARGEST))
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")
