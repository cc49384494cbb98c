"""Language models: decoders, an encoder, an encoder with a decoder."""

from typing import Any

import torch
import transformers

from tests.integrations.family import Family, Inputs, Served, padding, tokens

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8  # a third of the sequence


def packed() -> Inputs:
    """Position ids that start again mark documents, which must not see each other."""
    positions = torch.cat([torch.arange(n) for n in (5, 12, 7)])[None]
    return {"input_ids": tokens(batch=1), "position_ids": positions, "use_cache": False}


def padded(side: str) -> Inputs:
    return {"input_ids": tokens(), "attention_mask": padding(side)}


ALONE = {
    "plain": lambda: {"input_ids": tokens()},
    "left padding": lambda: padded("left"),
    "right padding": lambda: padded("right"),
}
DECODER = ALONE | {"packed": packed}


def config(name: str, **options: Any) -> Any:
    return lambda: getattr(transformers, name + "Config")(**options)


def decoder(name: str, model: str, *, inputs: Any = DECODER, **options: Any) -> Family:
    """A decoder that generates with a dynamic cache."""
    caches = options.pop("caches", ("dynamic",))
    name_of_config = options.pop("config", model)
    return Family(
        name,
        model + "ForCausalLM",
        config(name_of_config, **TEXT | options),
        inputs,
        Served(2),
        generates=lambda: padded("left"),
        caches=caches,
    )


ALTERNATING = ["sliding_attention", "full_attention"]
T5 = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

TEXT_FAMILIES = [
    decoder("Llama", "Llama", caches=("dynamic", "static")),
    decoder("Qwen2", "Qwen2"),
    decoder("Qwen3", "Qwen3"),
    decoder(
        "Gemma 2",
        "Gemma2",
        caches=("dynamic", "static"),
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
    ),
    decoder(
        "Gemma 3, text",
        "Gemma3",
        config="Gemma3Text",
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        query_pre_attn_scalar=4,
    ),
    decoder("Mistral", "Mistral", sliding_window=WINDOW),
    # It builds its masks without position ids, so its eager attention mixes packed documents.
    decoder(
        "GPT-OSS",
        "GptOss",
        inputs=ALONE,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    decoder("Phi-3", "Phi3"),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        config(
            "GPT2", vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        ALONE,
        Served(2),
        generates=lambda: padded("left"),
    ),
    Family(
        "BERT",
        "BertModel",
        config(
            "Bert", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64,
        ),
        ALONE,
        Served(2),
        output=lambda outputs: outputs.last_hidden_state,
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        config("T5", **T5),
        {
            "plain": lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(length=9)},
            "right padding": lambda: padded("right") | {"decoder_input_ids": tokens(length=9)},
        },
        Served(6),
        served_in_4=Served(0, left=6),
        generates=lambda: padded("right"),
    ),
]  # fmt: skip
