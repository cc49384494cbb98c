"""Transformers models give the logits, gradients and tokens of their own eager attention."""

import warnings

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


@pytest.fixture
def reads(monkeypatch):
    """The shapes of the dense masks that are read."""
    from mmkernels.integrations import mask_reading

    shapes, read = [], mask_reading._read
    monkeypatch.setattr(
        mask_reading, "_read", lambda mask, rows: shapes.append(mask.shape) or read(mask, rows)
    )
    return shapes


def test_masks_come_as_bounds(reads, monkeypatch):
    """The mask function's own are never read, nor made dense by anybody."""
    from mmkernels.integrations.interval_tensor import IntervalTensor

    monkeypatch.setattr(IntervalTensor, "dense", lambda mask: pytest.fail("made dense"))
    model = on(build(gemma2), "mmkernels")
    model(tokens(), attention_mask=padding("left")).logits.sum().backward()
    model(tokens(), attention_mask=padding("right"))
    assert reads == []


def test_mask_read_once_for_all_layers(reads):
    model, ids = on(build(llama), "mmkernels"), tokens()
    assert model.config.num_hidden_layers == 2
    lower = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    for mask in (lower, torch.where(lower, 0.0, -torch.inf)):
        model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
        assert len(reads) == 1
        reads.clear()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_views_of_one_mask_read_once(reads, mode):
    """Layers may slice the mask themselves, or have fewer keys than it has."""
    generator = torch.Generator().manual_seed(9)
    q, k, v = torch.randn(3, 2, 4, 6, 16, generator=generator)
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool).tril(1)
    layers = [torch.nn.Module() for _ in range(3)]
    with mode():
        outs = [attention_forward(x, q, k, v, mask[:, :, :, :6])[0] for x in layers]
        assert len(reads) == 1
        outs += [attention_forward(x, q, k, v, mask)[0] for x in layers]
        assert len(reads) == 2
        wanted = attention_forward(layers[0], q, k, v, mask[..., :6].clone())[0]
        for out in outs:
            assert torch.equal(out, wanted)
        mask[..., 0] = False  # seen through the view as well
        changed = attention_forward(layers[0], q, k, v, mask[:, :, :, :6])[0]
        assert not torch.equal(changed, wanted)
        assert torch.equal(changed, attention_forward(layers[0], q, k, v, mask[..., :6].clone())[0])


def test_inference_mask_read_once_a_forward(reads):
    """An inference tensor does not tell that it has changed."""
    model, ids = on(build(llama), "mmkernels"), tokens()
    with torch.inference_mode():
        mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
        first = model(ids, attention_mask=mask).logits
        assert len(reads) == 1
        mask[..., 0] = False
        second = model(ids, attention_mask=mask).logits
    assert len(reads) == 2
    assert (first - second).abs().max() > 1e-3


def test_findings_do_not_keep_masks_alive():
    from mmkernels.integrations.mask_reading import _findings

    q, k, v = torch.randn(3, 1, 2, 5, 16)
    layer, before = torch.nn.Module(), len(_findings)
    for dtype in (torch.bool, torch.float32):
        for density in (1.0, 0.5):
            mask = torch.rand(1, 1, 5, 9) <= density
            mask = mask if dtype == torch.bool else torch.where(mask, 0.0, -torch.inf)
            attention_forward(layer, q, k, v, mask)
            attention_forward(layer, q, k, v, mask[..., :5])
            assert len(_findings) == before + 1
            del mask
            assert len(_findings) == before


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


def gemma3():
    """A window of 8 in all layers but every sixth; a cache that keeps as much."""
    config = transformers.Gemma3TextConfig(
        **TEXT | {"num_hidden_layers": 6}, sliding_window=8, query_pre_attn_scalar=4
    )
    return transformers.Gemma3ForCausalLM(config)


def mistral():
    """A window of 8 in every layer."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=8))


@pytest.mark.parametrize("factory", [*TEXT_MODELS, gemma3, mistral])
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = build(llama).train()
    inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "use_cache": False}
    _, wanted = logits_and_gradients(on(model, "eager"), **inputs)
    with warnings.catch_warnings():  # transformers 5 has renamed it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, gradients = logits_and_gradients(on(model, "mmkernels"), **inputs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_compiled_layer_of_an_eager_model():
    """Masks made outside of the graph come into it as bounds."""
    model, inputs = on(build(gemma2), "mmkernels"), {"input_ids": tokens(), "use_cache": False}
    inputs["attention_mask"] = padding("right")
    wanted, gradients = logits_and_gradients(model, **inputs)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    logits, compiled = logits_and_gradients(model, **inputs)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_from_pretrained(tmp_path):
    build(llama).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="mmkernels").eval()
    assert model.config._attn_implementation == "mmkernels"
    wanted = load(tmp_path, attn_implementation="eager").eval()(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, wanted, **CLOSE)


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
