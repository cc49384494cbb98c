"""Towers that pack images or sounds of mixed size call attention once a layer."""

import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57")

from transformers import AttentionInterface  # noqa: E402

from mmkernels.integrations import transformers as ours  # noqa: E402
from mmkernels.integrations.switches import PREVIOUS, Previous  # noqa: E402
from mmkernels.integrations.transformers import (  # noqa: E402
    VARLEN_NAME,
    varlen_forward,
    varlen_implementation,
)

FOUR = transformers.__version__.startswith("4.")
# (frames, height, width) in patches, of three images.
GRID = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 4]])
VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}


def qwen2_vl():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen

    config = qwen.Qwen2VLVisionConfig(**VISION, embed_dim=32, hidden_size=24)
    return qwen.Qwen2VisionTransformerPretrainedModel._from_config(config)


def qwen2_5_vl():
    """Windows of 2 × 2 merged patches in all layers but one."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = qwen.Qwen2_5_VLVisionConfig(
        **VISION, hidden_size=32, intermediate_size=48, out_hidden_size=24, window_size=16,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    return qwen.Qwen2_5_VisionTransformerPretrainedModel._from_config(config)


def qwen3_vl():
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    config = qwen.Qwen3VLVisionConfig(
        **VISION, hidden_size=32, intermediate_size=48, out_hidden_size=24,
        num_position_embeddings=64, deepstack_visual_indexes=[1],
    )  # fmt: skip
    return qwen.Qwen3VLVisionModel._from_config(config)


def glm4v():
    from transformers.models.glm4v import modeling_glm4v as glm

    config = glm.Glm4vVisionConfig(
        **VISION, hidden_size=32, intermediate_size=48, out_hidden_size=24, image_size=32
    )
    return glm.Glm4vVisionModel._from_config(config)


def qwen2_5_omni_audio():
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen

    config = qwen.Qwen2_5OmniAudioEncoderConfig(
        num_mel_bins=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=48,
        d_model=32, output_dim=24, n_window=10, max_source_positions=60,
    )  # fmt: skip
    return qwen.Qwen2_5OmniAudioEncoder._from_config(config)


TOWERS = [qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, qwen2_5_omni_audio]


def build(factory):
    """With weights that keep the size of what they multiply, so that attention matters."""
    torch.manual_seed(0)
    model = factory().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def run(model):
    """The output, and the gradient of every parameter."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    if hasattr(model, "conv1"):
        lengths = torch.tensor([50, 33])  # frames; pieces of at most 20 are packed
        halved = (lengths - 1) // 2 + 1
        sound = torch.randn(16, 83, generator=generator)
        out = model(sound, feature_lens=lengths, aftercnn_lens=halved)
    else:
        patches = torch.randn(int(GRID.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
        out = model(patches, grid_thw=GRID)
    for attribute in ("pooler_output", "last_hidden_state"):
        out = out if getattr(out, attribute, None) is None else getattr(out, attribute)
    out = out[0] if isinstance(out, tuple) else out
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return out.detach(), gradients


def mark(model):
    """As `mmkernels.replace` does."""
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            setattr(module, PREVIOUS, Previous("eager", varlen_implementation()))


@pytest.fixture(autouse=True)
def registrations():
    """Leaves the table of attention functions as it was."""
    before = dict(AttentionInterface._global_mapping)
    yield
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(before)


@pytest.mark.parametrize("factory", TOWERS)
def test_one_call_a_layer(factory, monkeypatch):
    model = build(factory)
    model.config._attn_implementation = "eager"
    wanted, wanted_gradients = run(model)

    calls = []
    attend = ours.attention_forward

    def counted(module, query, *args, **kwargs):
        calls.append((module, query.shape[2]))
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(ours, "attention_forward", counted)
    model.config._attn_implementation = varlen_implementation()
    mark(model)
    out, gradients = run(model)
    modules = [module for module, _ in calls]
    assert len(modules) == len(set(modules)) == 3
    assert len({rows for _, rows in calls}) == 1
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=2e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        size = wanted_gradients[name].abs().max().item()
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=1e-3, atol=2e-5 * (1 + size), msg=name
        )


def test_packing_is_built_once_for_all_layers(monkeypatch):
    from mmkernels.integrations import mask_reading

    built = []
    packed = mask_reading.masks.packed
    monkeypatch.setattr(
        mask_reading.masks,
        "packed",
        lambda *args, **sizes: built.append(1) or packed(*args, **sizes),
    )
    model = build(qwen2_vl)
    model.config._attn_implementation = varlen_implementation()
    mark(model)
    run(model)
    assert len(built) == 1


def test_names():
    assert varlen_implementation() == ("flash_attention_2" if FOUR else VARLEN_NAME)


def test_neither_bounds_nor_mask():
    """One image alone; but position ids say that there may be more."""
    layer = torch.nn.Module()
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids and neither cu_seq_lens_q nor a mask"):
        varlen_forward(layer, q, k, v, None, position_ids=positions)
    alone, _ = varlen_forward(layer, q, k, v, None)
    torch.testing.assert_close(alone, ours.attention_forward(layer, q, k, v, None)[0])
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    varlen_forward(layer, q, k, v, seen, position_ids=positions)


def test_bounds_of_queries_and_keys_may_differ():
    """Sequences of 2 and 4 queries over 5 and 1 keys."""
    q, k = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    rows, keys = torch.tensor([0, 2, 6]), torch.tensor([0, 5, 6])
    layer = torch.nn.Module()
    out, _ = varlen_forward(
        layer, q, k, k, None, is_causal=False, cu_seq_lens_q=rows, cu_seq_lens_k=keys
    )
    first, _ = ours.attention_forward(
        layer, q[:, :, :2], k[:, :, :5], k[:, :, :5], None, is_causal=False
    )
    torch.testing.assert_close(out[:, :2], first)
    torch.testing.assert_close(out[:, 2:], k[:, :, 5:].transpose(1, 2).expand(1, 4, 2, 16))
    rows[1] = 3  # written in place: what was kept for it is void
    changed, _ = varlen_forward(
        layer, q, k, k, None, is_causal=False, cu_seq_lens_q=rows, cu_seq_lens_k=rows
    )
    assert not torch.equal(changed, out)


def test_bounds_changed_in_place():
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    layer, bounds = torch.nn.Module(), torch.tensor([0, 2, 6])
    given = {"is_causal": False, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    varlen_forward(layer, q, k, v, None, **given)
    bounds[1] = 4
    out, _ = varlen_forward(layer, q, k, v, None, **given)
    alone, _ = ours.attention_forward(
        layer, q[:, :, :4], k[:, :, :4], v[:, :, :4], None, is_causal=False
    )
    torch.testing.assert_close(out[:, :4], alone)


@pytest.mark.skipif(not FOUR, reason="transformers 5 takes any name that contains flash")
def test_flash_attention_2_of_other_modules_stays():
    """Only marked modules are served; another call, from any thread, registers nothing new."""
    seen = []
    AttentionInterface.register("flash_attention_2", lambda module, *args, **kwargs: seen.append(1))
    threads = [threading.Thread(target=varlen_implementation) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forward = AttentionInterface._global_mapping["flash_attention_2"]
    varlen_implementation()
    assert AttentionInterface._global_mapping["flash_attention_2"] is forward
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    module = torch.nn.Module()
    assert forward(module, q, k, v, None) is None
    assert seen == [1], "handed on once, through one function"
    module._mmkernels_previous = "eager"
    out, _ = forward(module, q, k, v, None)
    torch.testing.assert_close(out, ours.attention_forward(module, q, k, v, None)[0])
    assert seen == [1]
