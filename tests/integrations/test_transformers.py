"""Transformers models give the logits, gradients and tokens of their own eager attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

from mmkernels.integrations.transformers import attention_forward  # noqa: E402

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = SMALL | {"num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}
# fp32 on both sides, and another order of summation: logits are of order one.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def gemma2():
    """Softcapped scores, and a window of 8 in every other layer."""
    config = transformers.Gemma2Config(
        **TEXT, attn_logit_softcapping=2.0, sliding_window=8, query_pre_attn_scalar=4
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss():
    """A learned sink per head, and a window of 8 in every other layer."""
    config = transformers.GptOssConfig(
        **TEXT, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


TEXT_MODELS = [llama, gemma2, gpt_oss]


def build(factory):
    """The model with weights large enough that attention matters, in evaluation mode."""
    torch.manual_seed(0)
    model = factory().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def on(model, implementation):
    model.set_attn_implementation(implementation)
    return model


def tokens(batch=2, length=24):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(side, lengths=(24, 15), length=24):
    """(B, S) 1 at real tokens."""
    position = torch.arange(length)
    if side == "left":
        position = position.flip(0)
    return (position < torch.tensor(lengths)[:, None]).long()


def logits_and_gradients(model, **inputs):
    """The logits, and the gradients of a fixed projection of them, of real tokens only."""
    model.zero_grad()
    logits = model(**inputs).logits
    real = inputs.get("attention_mask")
    if real is not None:  # what a padded row holds is nobody's business
        logits = logits[real.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


def assert_same(model, **inputs):
    logits, gradients = logits_and_gradients(on(model, "mmkernels"), **inputs)
    wanted_logits, wanted_gradients = logits_and_gradients(on(model, "eager"), **inputs)
    torch.testing.assert_close(logits, wanted_logits, **CLOSE)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        size = wanted_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=1e-4, atol=1e-5 * (1 + size), msg=name
        )


@pytest.mark.parametrize("factory", TEXT_MODELS)
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_text_model(factory, pad):
    inputs = {"input_ids": tokens()}
    if pad:
        inputs["attention_mask"] = padding(pad)
    assert_same(build(factory), **inputs)


@pytest.mark.parametrize("factory", [llama, gemma2])
def test_packed_sequences(factory):
    """Position ids that start again mark packed documents, which must not see each other.

    (GptOss builds its masks without position ids, so its eager attention mixes the documents.)
    """
    positions = torch.cat([torch.arange(n) for n in (5, 12, 7)])[None]
    model = build(factory)
    assert_same(model, input_ids=tokens(batch=1), position_ids=positions, use_cache=False)

    bounds = torch.tensor([0, 5, 17, 24], dtype=torch.int32)
    described = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 12,
        "max_length_k": 12,
    }
    on(model, "mmkernels")
    both = model(tokens(batch=1), position_ids=positions, use_cache=False, **described).logits
    on(model, "eager")
    wanted = model(tokens(batch=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(both, wanted, **CLOSE)


def test_packed_sequences_from_bounds_alone():
    model = on(build(llama), "mmkernels")
    bounds = torch.tensor([0, 5, 24], dtype=torch.int32)
    ids = tokens(batch=1)
    packed = model(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits[:, :5]
    torch.testing.assert_close(packed, model(ids[:, :5]).logits, **CLOSE)
    with pytest.raises(ValueError, match="batch of one"):
        model(tokens(), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)


def test_own_mask():
    """A four-dimensional mask reaches the layers as it is: bool, or added to the scores."""
    model, ids = build(llama), tokens()
    holes = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(3)) < 0.6
    holes |= torch.eye(24, dtype=torch.bool)
    added = torch.where(holes, 0.0, torch.finfo(torch.float32).min)
    wanted = on(model, "eager")(ids, attention_mask=added).logits
    on(model, "mmkernels")
    torch.testing.assert_close(model(ids, attention_mask=added).logits, wanted, **CLOSE)
    torch.testing.assert_close(model(ids, attention_mask=holes).logits, wanted, **CLOSE)


def test_mask_read_once_for_all_layers(monkeypatch):
    from mmkernels.attention.interval import IntervalMask

    seen = []
    read = IntervalMask.from_dense
    monkeypatch.setattr(IntervalMask, "from_dense", lambda mask: seen.append(mask) or read(mask))
    model = on(build(llama), "mmkernels")
    model(tokens(), attention_mask=padding("left"))
    assert len(seen) == 1
    assert model.config.num_hidden_layers == 2


def test_mask_changed_in_place():
    """The interval form that is kept for a mask does not outlive its contents."""
    model, ids = on(build(llama), "mmkernels"), tokens()
    mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    first = model(ids, attention_mask=mask).logits
    mask[:, :, :, 1] = False
    mask[:, :, 1, 1] = True
    second = model(ids, attention_mask=mask).logits
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(second, model(ids, attention_mask=mask.clone()).logits)


def test_position_bias():
    """T5 adds a learned bias, in its decoder together with a causal mask; its scale is 1."""
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = build(lambda: transformers.T5ForConditionalGeneration(config))
    assert_same(model, input_ids=tokens(), decoder_input_ids=tokens(length=9))


def test_vision_model():
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=10)
    model = build(lambda: transformers.ViTForImageClassification(config))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    assert_same(model, pixel_values=pixels)


@pytest.mark.parametrize("factory", TEXT_MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pad", [None, "left"])
def test_generate(factory, cache, pad):
    """Same tokens. A static cache has an empty tail, which the prompt must not see."""
    model = build(factory)
    inputs = {"inputs": tokens(), "max_new_tokens": 12, "do_sample": False}
    inputs |= {"cache_implementation": cache, "disable_compile": True, "pad_token_id": 0}
    if pad:
        inputs["attention_mask"] = padding(pad)
    wanted = on(model, "eager").generate(**inputs)
    assert torch.equal(on(model, "mmkernels").generate(**inputs), wanted)


def test_prompt_into_filled_cache():
    """The second turn of a chat: new rows see the cache and, among themselves, the past only."""
    model = build(llama)
    ids = tokens()
    on(model, "mmkernels")
    first = model(ids[:, :14], use_cache=True)
    second = model(ids[:, 14:], past_key_values=first.past_key_values)
    wanted = on(model, "eager")(ids).logits
    torch.testing.assert_close(second.logits, wanted[:, 14:], **CLOSE)


@pytest.mark.parametrize("pad", [None, "left"])
def test_compiled_without_a_graph_break(pad):
    model = on(build(llama), "mmkernels")
    inputs = {"input_ids": tokens(), "use_cache": False}
    if pad:
        inputs["attention_mask"] = padding(pad)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits, wanted = compiled(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(logits, wanted, **CLOSE)


def test_inference_mode():
    model, inputs = build(llama), {"input_ids": tokens(), "attention_mask": padding("left")}
    with torch.inference_mode():
        logits = on(model, "mmkernels")(**inputs).logits
        wanted = on(model, "eager")(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], wanted[real], **CLOSE)


def test_dropout_in_training_only():
    layer = torch.nn.Module().eval()
    q, k, v = torch.randn(3, 1, 4, 6, 16, generator=torch.Generator().manual_seed(5))
    kept = attention_forward(layer, q, k, v, None, dropout=0.0)[0]
    torch.testing.assert_close(attention_forward(layer, q, k, v, None, dropout=0.9)[0], kept)
    dropped = attention_forward(layer.train(), q, k, v, None, dropout=0.9)[0]
    assert (dropped - kept).abs().max() > 0.1


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(4, 9), (9, 4), (5, 5)])
def test_causal_without_a_mask_aligns_the_first_key(seqlen_q, seqlen_k):
    """As torch's is_causal does; the output is contiguous, heads last but one."""
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 4, seqlen_q, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, seqlen_k, 16, generator=generator)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out, weights = attention_forward(torch.nn.Module(), q, k, v, None)
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_query_shared_by_the_batch():
    q = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(7))
    k, v = torch.randn(2, 5, 4, 8, 16, generator=torch.Generator().manual_seed(8))
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.expand(5, -1, -1, -1), k, v)
    torch.testing.assert_close(out, wanted.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:.*output_attentions")  # transformers 4 warns before we raise
def test_what_is_not_served_raises():
    model = on(build(llama), "mmkernels")
    with pytest.raises(ValueError, match="LlamaAttention passes block_indices to its attention"):
        model(tokens(), block_indices=torch.zeros(1))
    with pytest.raises(ValueError, match='set_attn_implementation\\("eager"\\)'):
        model(tokens(), output_attentions=True)


@pytest.mark.filterwarnings("ignore:.*output_attentions")
def test_weights_asked_for_in_the_config_raise():
    model = on(build(llama), "eager")
    model.config.output_attentions = True
    on(model, "mmkernels")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(tokens())
