"""Real handwritten digits: scikit-learn's 1,797, their split, and pictures made of them.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
"""

import json
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

# The canvas of a picture with one digit.
SIZE = 32
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "pink")
_RGB = torch.tensor(
    [
        [230, 40, 40], [40, 190, 60], [60, 100, 240], [240, 225, 50],
        [245, 140, 30], [150, 60, 200], [245, 245, 245], [250, 150, 195],
    ]
) / 255.0  # fmt: skip
MIDDLE = "middle"
PLACES = ("top left", "top right", "bottom left", "bottom right", MIDDLE)
# Centre (x, y) of a place, from -1 to 1, and how much of the canvas a digit covers there.
_CENTRES = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5], [0.0, 0.0]])
_SCALES = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.8])
# Of the set's end, written by other people and harder; reported apart.
HARDER_FROM = 1797 - 360


@dataclass
class Digits:
    """Images of digits.

    Attributes:
        images: (N, 8, 8) float32 in [0, 1], bright strokes on dark ground.
        labels: (N,) the digits.
        index: (N,) which of scikit-learn's set they are.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def take(self, index: Tensor) -> "Digits":
        """Those at `index`."""
        return Digits(self.images[index], self.labels[index], self.index[index])


def load() -> Digits:
    """All 1,797 digits of scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    return Digits(images, torch.from_numpy(data.target).long(), torch.arange(len(images)))


def split() -> dict[str, Digits]:
    """The digits to train on and those to test on, 80 to 20, stratified: "train" and "test".

    The indices are committed in digits_split.json: those of scikit-learn's `train_test_split`,
    stratified, with seed 0.
    """
    text = resources.files("mmkernels.training").joinpath("digits_split.json").read_text()
    digits = load()
    return {name: digits.take(torch.tensor(index)) for name, index in json.loads(text).items()}


def render(
    images: Tensor, colours: Tensor, places: Tensor, *, generator: torch.Generator, train: bool
) -> Tensor:
    """Pictures of one digit each.

    Args:
        images: (B, 8, 8).
        colours: (B,) indices of `COLOURS`.
        places: (B,) indices of `PLACES`.
        generator: of all chance.
        train: vary size, angle, slant, stroke, colour and ground more than a test does.

    Returns:
        (B, 3, 32, 32) uint8.
    """
    return _paint(
        images, colours, _CENTRES[places], _SCALES[places], SIZE, generator=generator, train=train
    )


def render_whole(images: Tensor, colours: Tensor, *, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 32, 32) uint8 that a digit fills, about as `drawing` draws it."""
    batch = len(images)
    return _paint(
        images, colours, torch.zeros(batch, 2), torch.ones(batch), SIZE,
        generator=generator, train=False,
    )  # fmt: skip


def render_row(
    images: Tensor, colours: Tensor, *, generator: torch.Generator, train: bool
) -> Tensor:
    """Pictures of a row of digits, one colour for each row.

    Args:
        images: (B, n, 8, 8).
        colours: (B,) indices of `COLOURS`.
        generator: of all chance.
        train: as of `render`.

    Returns:
        (B, 3, 32, 32 n) uint8.
    """
    batch, count = images.shape[:2]
    cells = _paint(
        images.flatten(0, 1),
        colours.repeat_interleave(count),
        torch.zeros(batch * count, 2),
        torch.full((batch * count,), 0.85),
        SIZE,
        generator=generator,
        train=train,
        grounds=batch,
    )
    return cells.unflatten(0, (batch, count)).permute(0, 2, 3, 1, 4).flatten(3)


def drawing(images: Tensor, colours: Tensor) -> Tensor:
    """The form in which digits are learned to be drawn: large, on black, without any chance.

    Args:
        images: (B, 8, 8).
        colours: (B,) indices of `COLOURS`.

    Returns:
        (B, 3, 32, 32) uint8.
    """
    large = F.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear")
    return (large * _RGB[colours][:, :, None, None] * 255).round().to(torch.uint8)


def as_digit(pictures: Tensor) -> Tensor:
    """Drawings (B, 3, 32, 32) as 8 × 8 images in [0, 1], as the data set has them."""
    grey = pictures.float().amax(1, keepdim=True)
    small = F.avg_pool2d(grey, SIZE // 8)[:, 0]
    return small / small.amax((1, 2), keepdim=True).clamp(min=1.0)


def colour_of(pictures: Tensor) -> Tensor:
    """Which of `COLOURS` the bright pixels of drawings (B, 3, 32, 32) have: (B,)."""
    pixels = pictures.float().flatten(2) / 255
    weight = pixels.amax(1, keepdim=True) ** 4
    mean = (pixels * weight).sum(2) / weight.sum(2).clamp(min=1e-6)
    mean = mean / mean.amax(1, keepdim=True).clamp(min=1e-6)
    known = _RGB / _RGB.amax(1, keepdim=True)
    return torch.cdist(mean, known).argmin(1)


def _paint(
    images: Tensor,
    colours: Tensor,
    centres: Tensor,
    scales: Tensor,
    size: int,
    *,
    generator: torch.Generator,
    train: bool,
    grounds: int | None = None,
) -> Tensor:
    """Digits (B, 8, 8) at centres (B, 2) on canvases of their own.

    `grounds`: how many grounds there are, each for as many neighbouring canvases.
    """
    batch = len(images)

    def chance(*shape: int, spread: float) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * spread

    shift, grow, turn, slant = (0.06, 0.12, 0.2, 0.15) if train else (0.03, 0.05, 0.05, 0.0)
    scale = scales * (1 + chance(batch, spread=grow))
    stretch = 1 + chance(batch, spread=grow / 2)
    angle, shear = chance(batch, spread=turn), chance(batch, spread=slant)
    centre = centres + chance(batch, 2, spread=shift)
    cos, sin = angle.cos(), angle.sin()
    # From a place on the canvas to one in the digit: the inverse of turn, slant and scale.
    matrix = torch.stack((cos + shear * sin, sin, shear * cos - sin, cos), -1).view(batch, 2, 2)
    matrix = matrix / torch.stack((scale * stretch, scale / stretch), -1)[:, :, None]
    offset = -(matrix @ centre[:, :, None])
    theta = torch.cat((matrix, offset), 2)
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    ink = F.grid_sample(images[:, None], grid, mode="bilinear", align_corners=False)
    if train:  # thicker and thinner strokes
        ink = ink.clamp(min=0) ** torch.exp(chance(batch, 1, 1, 1, spread=0.5))
    spread = 0.06 if train else 0.03
    colour = (_RGB[colours] + chance(batch, 3, spread=spread)).clamp(0, 1)[:, :, None, None]
    grounds = grounds or batch
    ground = torch.rand(grounds, 3, 1, 1, generator=generator) * 0.12
    ground = ground.repeat_interleave(batch // grounds, 0)
    noise = torch.randn(batch, 3, size, size, generator=generator) * 0.02
    picture = ground + (colour - ground) * ink + noise
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
