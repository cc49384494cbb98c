"""Are picture files read as they look, within bounds, and fitted to what the model looks at?"""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch

from mmkernels.models import images

Image = pytest.importorskip("PIL.Image")

# Upper left red, upper right green, lower left blue, lower right white.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))


def quarters(width=48, height=32):
    """A picture of four colours."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(CORNERS):
        top, left = number // 2 * (height // 2), number % 2 * (width // 2)
        pixels[top : top + height // 2, left : left + width // 2] = colour
    return Image.fromarray(pixels)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def assert_quarters(read, tolerance=0):
    """The middle of each quarter has its colour."""
    height, width = read.shape[1:]
    for number, colour in enumerate(CORNERS):
        found = read[
            :, height // 4 + number // 2 * (height // 2), width // 4 + number % 2 * (width // 2)
        ]
        assert (found.int() - torch.tensor(colour)).abs().max() <= tolerance, number


def a_png_of(width, height):
    """A PNG of 16 × 16 pixels that claims so many."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "form, options, tolerance",
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("GIF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
    ],
)
def test_reads_each_format(form, options, tolerance):
    read = images.read_image(encoded(quarters(), form, **options))
    assert read.dtype == torch.uint8 and read.shape == (3, 32, 48) and read.is_contiguous()
    assert_quarters(read, tolerance)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_reads_the_first_frame(form):
    other = Image.new("RGB", (48, 32), (9, 9, 9))
    options = {} if form != "WEBP" else {"lossless": True}
    read = images.read_image(
        encoded(quarters(), form, save_all=True, append_images=[other], **options)
    )
    assert_quarters(read)


def test_reads_palettes_and_what_of_them_is_transparent():
    palette = quarters().quantize(8)
    assert_quarters(images.read_image(encoded(palette, "PNG")))
    white = palette.getpixel((47, 31))
    read = images.read_image(encoded(palette, "PNG", transparency=white))
    assert read[:, 0, 0].tolist() == [255, 0, 0] and read[:, 31, 47].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode, opaque", [("RGBA", (200, 100, 50)), ("LA", (200, 200, 200))])
def test_what_is_transparent_lies_on_black(mode, opaque):
    value = (200, 100, 50) if mode == "RGBA" else (200,)
    image = Image.new(mode, (4, 1))
    for x, alpha in enumerate((0, 51, 255, 128)):
        image.putpixel((x, 0), (*value, alpha))
    read = images.read_image(encoded(image, "PNG"))[:, 0].T
    wanted = torch.tensor([[round(c * a / 255) for c in opaque] for a in (0, 51, 255, 128)])
    assert (read.int() - wanted).abs().max() <= 1


def test_a_transparent_colour_of_a_picture_without_alpha_lies_on_black():
    image = Image.new("RGB", (2, 1), (200, 0, 0))
    image.putpixel((1, 0), (0, 200, 0))
    read = images.read_image(encoded(image, "PNG", transparency=(200, 0, 0)))
    assert read[:, 0].T.tolist() == [[0, 0, 0], [0, 200, 0]]


def test_of_16_bits_the_upper_8_count():
    values = np.array([[0, 255, 256, 0x1234, 0x80FF, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert data[24] == 16  # bits, as PNG's head has them
    read = images.read_image(data)
    assert read[:, 0].tolist() == [[0, 0, 1, 0x12, 0x80, 255]] * 3


def test_16_bits_with_a_transparent_grey():
    values = np.array([[0x8000, 0x4000]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    note = b"tRNS" + struct.pack(">H", 0x8000)
    end = data.index(b"IDAT") - 4
    data = (
        data[:end] + struct.pack(">I", 2) + note + struct.pack(">I", zlib.crc32(note)) + data[end:]
    )
    assert images.read_image(data)[0, 0].tolist() == [0, 0x40]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_reads_grey_and_black_and_white(mode):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), 255)
    assert images.read_image(encoded(image, "PNG"))[:, 0].T.tolist() == [[0] * 3, [255] * 3]


def test_reads_cmyk():
    read = images.read_image(encoded(quarters().convert("CMYK"), "JPEG", quality=95))
    assert_quarters(read, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_put_upright(form, orientation):
    turned_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    held = quarters()
    if orientation > 1:
        held = held.transpose(turned_back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    read = images.read_image(encoded(held, form, exif=exif, **options))
    assert read.shape == (3, 32, 48)
    assert_quarters(read, 6)


def test_damaged_notes_of_a_camera_spoil_no_picture():
    # Type 2 is text, where a number should be; the tag's count runs out of the note.
    note = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\xff\xff\xff\xff\0\x06\0\0\0\0\0\0"
    for exif in (note, note[:20], b"Exif\0\0nonsense"):
        assert_quarters(images.read_image(encoded(quarters(), "PNG", exif=exif)))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_large_pictures_are_made_smaller(form):
    read = images.read_image(encoded(quarters(2000, 1000), form))
    assert read.shape == (3, 256, 512)
    assert_quarters(read, 6)


def test_palettes_are_blended_as_they_are_made_smaller():
    stripes = np.zeros((2048, 2048), np.uint8)
    stripes[:, ::2] = 255
    for mode in ("1", "P"):
        read = images.read_image(encoded(Image.fromarray(stripes).convert(mode), "PNG"))
        lowest, highest = read[:, 5:-5, 5:-5].aminmax()
        assert lowest >= 120 and highest <= 135


@pytest.mark.parametrize("size", [(50_000, 50_000), (100_000, 1_000), (5001, 5000)])
def test_refuses_too_many_pixels_before_decoding(size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="pixels; at most 25,000,000 are read"):
        images.read_image(a_png_of(*size))


def test_says_how_many_pixels_there_are():
    with pytest.raises(ValueError, match="has 5001 × 5000 pixels"):
        images.read_image(a_png_of(5001, 5000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WAVE",
        b"<svg/>",
        encoded(Image.new("L", (2, 2)), "TIFF"),
    ],
    ids=["nothing", "a head alone", "a sound", "SVG", "TIFF"],
)
def test_refuses_what_is_no_such_picture(data):
    with pytest.raises(ValueError, match="none of PNG, JPEG, GIF, BMP, WEBP"):
        images.read_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_refuses_what_is_cut_off(form):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    with pytest.raises(ValueError, match="the picture"):
        images.read_image(data[: len(data) // 2])


def test_damage_raises_nothing_but_value_errors():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    files = [
        encoded(quarters(), "PNG", exif=exif),
        encoded(quarters(), "JPEG", exif=exif),
        encoded(quarters(), "WEBP", exif=exif),
        encoded(quarters(), "GIF"),
        encoded(quarters(), "BMP"),
        encoded(quarters().quantize(8), "PNG", transparency=1),
    ]
    chance = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        data = bytearray(chance.choice(files))
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.choice((1, 2, 8)) if data else 0):
            data[chance.randrange(min(len(data), 120))] = chance.choice(
                (0, 255, chance.randrange(256))
            )
        try:
            read = images.read_image(bytes(data))
        except ValueError:
            outcomes[False] += 1
        else:
            assert read.dtype == torch.uint8 and read.shape[0] == 3
            outcomes[True] += 1
    assert min(outcomes.values()) > 300  # both were seen


def test_png_out_and_in_again_is_the_same():
    image = torch.randint(256, (3, 17, 5), dtype=torch.uint8)
    assert torch.equal(images.read_image(images.write_png(image)), image)
    turned = image.transpose(1, 2)  # not contiguous
    assert torch.equal(images.read_image(images.write_png(turned)), turned)


@pytest.mark.parametrize("function", [images.write_png, images.fit])
def test_refuses_tensors_that_are_no_pictures(function):
    with pytest.raises(TypeError, match=r"it must be torch\.uint8"):
        function(torch.zeros(3, 4, 4))
    for shape in ((4, 4), (1, 4, 4), (4, 4, 3), (3, 0, 4), (1, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"it must be \(3, H, W\)"):
            function(torch.zeros(shape, dtype=torch.uint8))


def on_dark(height, width):
    """A bright bar on dark ground."""
    image = torch.full((3, height, width), 12, dtype=torch.uint8)
    image[
        :, height // 4 : height - height // 4, width // 2 - width // 8 : width // 2 + width // 8
    ] = 230
    return image


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fitting_keeps_what_the_model_was_trained_on(count):
    image = on_dark(32, 32 * count)
    assert torch.equal(images.fit(image), image)


@pytest.mark.parametrize(
    "height, width, columns",
    [
        (100, 100, 1), (480, 640, 1), (1080, 1920, 1), (300, 100, 1), (100, 180, 2), (100, 200, 2),
        (100, 300, 3), (100, 400, 4), (100, 900, 4), (1, 512, 4), (512, 1, 1), (1, 1, 1), (5, 7, 1),
    ],
)  # fmt: skip
def test_fitting_gives_a_cell_to_each_digit_of_a_row(height, width, columns):
    fitted = images.fit(torch.full((3, height, width), 200, dtype=torch.uint8))
    assert fitted.dtype == torch.uint8 and fitted.shape == (3, 32, 32 * columns)


def test_fitting_keeps_proportions_and_the_middle():
    fitted = images.fit(on_dark(64, 32))[0]  # becomes 32 × 16, with 8 columns on both sides
    where = (fitted > 120).nonzero()
    assert where.amin(0).tolist() == [8, 14] and where.amax(0).tolist() == [23, 17]
    assert torch.equal(fitted, fitted.flip(1))
    assert set(fitted[:, :8].flatten().tolist()) == {12}  # the border's colour goes on


def test_strokes_on_light_ground_are_put_on_black():
    picture = 255 - on_dark(32, 32)
    fitted = images.fit(picture)
    assert fitted[:, 0].max() == 0  # the ground, 243, counts as white
    assert fitted[:, 16, 16].tolist() == [255] * 3
    dark = on_dark(32, 32)
    assert torch.equal(images.fit(dark), dark)


@pytest.mark.parametrize(
    "colour",
    [(230, 40, 40), (40, 190, 60), (60, 100, 240), (240, 225, 50), (150, 60, 200), (250, 150, 195)],
)
@pytest.mark.parametrize("paper", [255, 225])
def test_strokes_on_light_ground_keep_their_colour(colour, paper):
    picture = torch.full((3, 64, 64), paper, dtype=torch.uint8)
    wanted = torch.tensor(colour, dtype=torch.uint8)
    picture[:, 16:48, 27:37] = wanted[:, None, None]
    fitted = images.fit(picture).float()
    assert (fitted[:, 16, 16] - wanted).abs().max() < 12
    edge = fitted[:, 16, 18]  # half covered: darker, and of the same colour
    assert edge.max() < 0.8 * wanted.max()
    assert torch.cosine_similarity(edge, wanted.float(), dim=0) > 0.98


def test_an_empty_sheet_stays_empty():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-4, 5, (3, 32, 32), generator=generator)
    assert images.fit((240 + noise).to(torch.uint8)).max() < 60
