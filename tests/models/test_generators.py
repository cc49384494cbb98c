"""Codes: what they stand for, that they go both ways, and what is refused."""

import math

import pytest
import torch

from mmkernels.models.audio import silence
from mmkernels.models.config import CodecConfig, tiny
from mmkernels.models.generators import FSQ, AudioCodec, Codec, ImageCodec

LEVELS = [(2,), (3,), (8, 5, 5, 5), (5, 5, 5), (2, 7), (4, 4, 3, 2)]


@pytest.fixture
def image_codec() -> ImageCodec:
    return ImageCodec(CodecConfig(3, (8, 8), (8, 5, 5), hidden_size=16)).eval()


@pytest.fixture
def audio_codec() -> AudioCodec:
    return AudioCodec(CodecConfig(1, (40, 4), (8, 5, 5), hidden_size=16)).eval()


def pictures(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_comes_back(levels: tuple[int, ...]) -> None:
    quantise = FSQ(levels)
    assert quantise.num_codes == math.prod(levels)
    codes = torch.arange(quantise.num_codes)
    values = quantise.values(codes)
    assert torch.equal(quantise.codes(values), codes)
    assert len(values.unique(dim=0)) == quantise.num_codes


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_levels_lie_evenly_and_reach_both_ends(levels: int) -> None:
    values = FSQ((levels,)).values(torch.arange(levels))[:, 0]
    torch.testing.assert_close(values, torch.linspace(-1, 1, levels))


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8])
def test_the_nearest_level_is_taken(levels: int) -> None:
    quantise = FSQ((levels,))
    bounded = torch.linspace(-1, 1, 997)[:, None]
    every = quantise.values(torch.arange(levels))  # (levels, 1)
    found = quantise.values(quantise.codes(bounded))
    torch.testing.assert_close((found - bounded).abs(), (bounded - every.T).abs().amin(1)[:, None])


def test_any_number_has_a_code() -> None:
    quantise = FSQ((8, 5))
    x = torch.tensor([-torch.inf, -1e30, 0.0, 1e30, torch.inf])[:, None].expand(-1, 2)
    codes = quantise.codes(torch.tanh(x))
    assert codes.min() == 0 and codes.max() == quantise.num_codes - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_lets_the_bound_s_gradient_pass(dtype: torch.dtype) -> None:
    quantise = FSQ((8, 5, 3))
    x = torch.randn(50, 3, dtype=dtype, requires_grad=True)
    out = quantise(x)
    out.sum().backward()
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.detach(), quantise.values(quantise.codes(torch.tanh(x.detach()))).to(dtype)
    )
    bounded = x.detach().clone().requires_grad_()
    torch.tanh(bounded).sum().backward()
    torch.testing.assert_close(x.grad, bounded.grad)


@pytest.mark.parametrize("levels", [(), (1,), (8, 1), (0, 5)])
def test_levels_that_quantise_nothing_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="levels"):
        FSQ(levels)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (16, 40), (32, 96)])
def test_images_go_both_ways(image_codec: ImageCodec, height: int, width: int) -> None:
    codes = image_codec.encode(pictures(2, height, width))
    assert codes.dtype == torch.int64 and codes.shape == (2, height * width // 64)
    assert codes.min() >= 0 and codes.max() < image_codec.config.num_codes
    back = image_codec.decode(codes, columns=width // 8)
    assert back.dtype == torch.uint8 and back.shape == (2, 3, height, width)


def test_a_code_stands_for_its_patch_in_rows() -> None:
    # Without layers a patch sees itself alone.
    codec = ImageCodec(CodecConfig(3, (8, 8), (8, 5, 5), hidden_size=16, num_layers=0)).eval()
    codes = torch.zeros(1, 16, dtype=torch.int64)
    other = codes.clone()
    other[0, 6] = 137  # row 1, column 2
    changed = (codec.reconstruct(codec.quantise.values(other.view(1, 4, 4)))
               != codec.reconstruct(codec.quantise.values(codes.view(1, 4, 4))))  # fmt: skip
    rows, columns = changed[0].any(0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 15, 16, 23)
    image = pictures(1)
    edited = image.clone()
    edited[:, :, 8:16, 16:24] = 255 - edited[:, :, 8:16, 16:24]
    where = (codec.latent(image) != codec.latent(edited)).any(-1).flatten().nonzero()
    assert where.flatten().tolist() == [6]


def test_layers_let_patches_see_their_neighbours(image_codec: ImageCodec) -> None:
    image = pictures(1)
    edited = image.clone()
    edited[:, :, :8, :8] = 255 - edited[:, :, :8, :8]
    different = (image_codec.latent(image) != image_codec.latent(edited)).any(-1)[0]
    assert different[1, 1] and not different[3, 3]


@pytest.mark.parametrize("frames", [4, 8, 44, 120])
def test_sounds_go_both_ways(audio_codec: AudioCodec, frames: int) -> None:
    codes = audio_codec.encode(torch.randn(3, frames, 40))
    assert codes.dtype == torch.int64 and codes.shape == (3, frames // 4)
    assert codes.min() >= 0 and codes.max() < audio_codec.config.num_codes
    back = audio_codec.decode(codes)
    assert back.dtype == torch.float32 and back.shape == (3, frames, 40)


@pytest.mark.parametrize(("bias", "pixel"), [(-10.0, 0), (10.0, 255)])
def test_pixels_beyond_black_and_white_do_not_wrap(
    image_codec: ImageCodec, bias: float, pixel: int
) -> None:
    torch.nn.init.constant_(image_codec.to_patch.bias, bias)
    assert (image_codec.decode(torch.zeros(1, 16, dtype=torch.int64)) == pixel).all()


def test_nothing_is_softer_than_silence(audio_codec: AudioCodec) -> None:
    torch.nn.init.constant_(audio_codec.to_patch.bias, -10.0)
    back = audio_codec.decode(torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(back[0], silence(12))


def test_what_comes_after_a_sound_changes_codes_near_its_end_alone(
    audio_codec: AudioCodec,
) -> None:
    mel = torch.randn(1, 40, 40)
    longer = torch.cat((mel, silence(80)[None]), 1)
    alone, followed = audio_codec.latent(laid(mel)), audio_codec.latent(laid(longer))
    # Two layers, each of which sees one code to the right.
    torch.testing.assert_close(alone[:, :, :8], followed[:, :, :8])
    codes = audio_codec.encode(mel)
    more = torch.cat((codes, audio_codec.encode(longer)[:, 10:]), 1)
    torch.testing.assert_close(audio_codec.decode(codes)[:, :32], audio_codec.decode(more)[:, :32])


def test_a_batch_changes_nothing(image_codec: ImageCodec) -> None:
    images = pictures(5)
    together = image_codec.latent(images)
    alone = torch.cat([image_codec.latent(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_strides_change_nothing(image_codec: ImageCodec) -> None:
    images = pictures(2)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(image_codec.latent(strided), image_codec.latent(images))


def test_bytes_are_numbers_from_0_to_1(image_codec: ImageCodec) -> None:
    images = pictures(2)
    torch.testing.assert_close(image_codec.latent(images), image_codec.latent(images.float() / 255))


def test_every_weight_learns(image_codec: ImageCodec, audio_codec: AudioCodec) -> None:
    for codec, x in (
        (image_codec, torch.rand(2, 3, 32, 32)),
        (audio_codec, torch.rand(2, 1, 40, 16)),
    ):
        codec(x).square().mean().backward()
        for name, parameter in codec.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_preset_s_codecs_are_small() -> None:
    config = tiny(1000)
    assert config.image_codec is not None and config.audio_codec is not None
    codecs: list[Codec] = [ImageCodec(config.image_codec), AudioCodec(config.audio_codec)]
    assert sum(p.numel() for codec in codecs for p in codec.parameters()) <= 600_000


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 30, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 32, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(image_codec: ImageCodec, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"ImageCodec.encode: images"):
        image_codec.encode(images)


@pytest.mark.parametrize(
    "mels",
    [
        torch.zeros(40, 40),
        torch.zeros(1, 42, 40),
        torch.zeros(1, 40, 80),
        torch.zeros(1, 0, 40),
        torch.zeros(1, 40, 40, dtype=torch.int64),
    ],
)
def test_other_sounds_are_refused(audio_codec: AudioCodec, mels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"AudioCodec.encode: mels"):
        audio_codec.encode(mels)


@pytest.mark.parametrize(
    "codes",
    [
        torch.full((1, 16), 200),
        torch.full((1, 16), -1),
        torch.zeros(16, dtype=torch.int64),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 16),
    ],
)
def test_other_codes_are_refused(
    image_codec: ImageCodec, audio_codec: AudioCodec, codes: torch.Tensor
) -> None:
    for codec in (image_codec, audio_codec):
        with pytest.raises(ValueError, match=r"decode: codes"):
            codec.decode(codes)


@pytest.mark.parametrize("columns", [0, 3, 32])
def test_rows_that_are_not_whole_are_refused(image_codec: ImageCodec, columns: int) -> None:
    with pytest.raises(ValueError, match="columns"):
        image_codec.decode(torch.zeros(1, 16, dtype=torch.int64), columns=columns)


def laid(mels: torch.Tensor) -> torch.Tensor:
    """(B, T, 40) as the codec's layers take them."""
    return mels.transpose(1, 2)[:, None]
