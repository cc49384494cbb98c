"""Are mmkernels and torch asked for attention as they should be, and do they say why if not?"""

import shutil

import pytest
import torch
import torch.nn.functional as F

import mmkernels as mm
from mmkernels.bench import attention_masks as masks
from mmkernels.bench import attention_peers, attention_sdpa, suite_attention
from mmkernels.bench.attention_problem import AttentionProblem, Size
from mmkernels.bench.case import OURS, Unavailable

CPU = torch.device("cpu")
SHAPES = {name: model.toy for name, model in suite_attention.BY_NAME.items()}
GROUPED = Size(1, 64, 4, 2, 16)


def problem(mask, mode, peers, size=GROUPED, dtype=torch.float32) -> AttentionProblem:
    return AttentionProblem(size, mask, dtype, mode, CPU, peers)


def results(this: AttentionProblem, name: str) -> list:
    return list(this.implementations[name]()())


@pytest.mark.parametrize("mode", ["forward", "forward + backward", "backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_peers_solve_the_problem(name, mode):
    size, mask = SHAPES[name]
    found = attention_peers.peers(mask, size, CPU, telling=True)
    compiles = {"torch.compile", "FlexAttention", INSIDE}
    chosen = {name: prepare for name, prepare in found.items() if name not in compiles}
    assert {OURS, "eager"} <= set(chosen)
    this = problem(mask, mode, chosen, size)
    for peer in chosen:
        call = this.implementations[peer]()
        call()  # a second call of a backward pass finds all that it needs
        assert this.check(call()) < 1e-4, peer


INSIDE = "FlexAttention, mask built inside"


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::torch")  # the compiler's own affair
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize(
    ("model", "mode", "names"),
    [
        ("PaliGemma 3B 448", "forward", ["torch.compile", "FlexAttention", INSIDE]),
        ("SmolLM2-135M, batch of prompts", "forward", ["FlexAttention"]),
        ("PaliGemma 3B 448", "backward", ["torch.compile"]),
    ],
)
def test_compiled_peers_solve_the_problem(model, mode, names):
    size, mask = SHAPES[model]
    found = attention_peers.peers(mask, size, CPU, telling=True)
    this = problem(mask, mode, {name: found[name] for name in names}, size)
    for name in names:
        call = this.implementations[name]()
        call()
        assert this.check(call()) < 1e-4, name


def test_flex_attention_on_a_cpu_has_no_backward_pass():
    this = problem(masks.causal(64), "forward + backward", {INSIDE: attention_peers.flex()})
    with pytest.raises(Unavailable, match="no backward pass on a CPU"):
        this.implementations[INSIDE]()


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    peers = {"torch.compile": attention_peers.compiled_eager, "Flex": attention_peers.flex()}
    this = problem(masks.causal(64), "forward", peers)
    for name in peers:
        with pytest.raises(Unavailable, match=r"needs g\+\+"):
            this.implementations[name]()


def test_who_is_asked():
    def names(mask, telling=False, device="cpu", kv_heads=4):
        size = Size(1, 64, 4, kv_heads, 16)
        return set(attention_peers.peers(mask, size, torch.device(device), telling))

    assert names(masks.full()) == {OURS, "SDPA"}
    assert names(masks.causal(64)) == {OURS, "SDPA (is_causal)"}
    window, inside = masks.window(8, 64), f"{OURS}, mask built inside"
    assert names(window) == {OURS, inside, "SDPA (dense mask)", "FlexAttention"}
    grouped = names(window, kv_heads=2)
    assert "SDPA (dense mask, repeated keys)" in grouped
    assert "SDPA (a call for each image)" in names(masks.packed("images", (32, 32)))
    assert "SDPA (a call for each image)" not in names(masks.left_padding((32,), 64))
    assert names(window, telling=True) - names(window) == {
        "SDPA math (dense mask)", "eager", "torch.compile", INSIDE,
    }  # fmt: skip
    gpu = names(masks.causal(64), device="cuda")
    assert gpu - names(masks.causal(64)) == {
        f"{OURS} triton", f"{OURS} cuda", "SDPA flash (is_causal)", "SDPA efficient (is_causal)",
        "SDPA cudnn (is_causal)", "varlen_attn", "flash-attn", "xformers", "MSLK",
    }  # fmt: skip


def test_a_backend_of_ours_that_declines_says_why():
    this = problem(masks.causal(64), "forward", {f"{OURS} cuda": attention_peers.ours("cuda")})
    reason = mm.explain(mm.attention, *this.qkv, causal=True, backend="cuda").reasons["cuda"]
    with pytest.raises(Unavailable) as caught:
        this.implementations[f"{OURS} cuda"]()
    assert str(caught.value) == reason


def test_a_backend_of_torch_that_declines_says_why(monkeypatch):
    sdpa = attention_sdpa.sdpa(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    this = problem(masks.causal(64), "forward", {"SDPA flash": sdpa})

    def declines(*args, **kwargs):
        import warnings

        where = " (Triggered internally at sdp_utils.cpp:123.)"
        for text in (
            "Memory efficient kernel not used because:", "It has been runtime disabled.",
            "Flash attention kernel not used because:", "Expected head dim <= 256.",
        ):  # fmt: skip
            warnings.warn(text + where, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", declines)
        with pytest.raises(Unavailable, match=r"^Expected head dim <= 256\.$"):
            this.implementations["SDPA flash"]()
    efficient = attention_sdpa.sdpa(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)
    this = problem(masks.causal(64), "forward", {"SDPA efficient": efficient})
    with pytest.raises(Unavailable, match=r"^No viable backend"):
        this.implementations["SDPA efficient"]()


def test_torch_is_given_its_best_form(monkeypatch):
    """What SDPA sees: transposed views of the same memory, and no mask where none is needed."""
    calls = []

    def recorded(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((attn_mask, is_causal, enable_gqa, key.shape[1]))
        assert query.shape == (1, 4, 64, 16) and query.data_ptr() == this.qkv[0].data_ptr()
        return sdpa(query, key, value, attn_mask, 0.0, is_causal, enable_gqa=enable_gqa)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    for mask in (masks.full(), masks.causal(64), masks.prefix_lm(40, 64)):
        peers = attention_peers.peers(mask, GROUPED, CPU, telling=False)
        chosen = {name: peers[name] for name in peers if "SDPA" in name}
        this = problem(mask, "forward", chosen, dtype=torch.bfloat16)
        for name in chosen:
            this.check(results(this, name))
    full, causal, dense, repeated = calls
    assert full == (None, False, True, 2) and causal == (None, True, True, 2)
    assert dense[1:] == (False, True, 2) and repeated[1:] == (False, False, 4)
    for mask in (dense[0], repeated[0]):
        assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, 64, 64)


def test_the_mask_is_built_where_it_is_said(monkeypatch):
    """Outside of the calls, and for "mask built inside" in every one of them."""
    built = []
    window = masks.masks.window

    def recorded(*args, **kwargs):
        built.append(args)
        return window(*args, **kwargs)

    monkeypatch.setattr(masks.masks, "window", recorded)
    mask = masks.window(8, 64)
    inside = f"{OURS}, mask built inside"
    this = problem(mask, "forward", attention_peers.peers(mask, GROUPED, CPU, False))
    for name, expected in ((OURS, 0), (inside, 3)):
        call = this.implementations[name]()
        built.clear()
        for _ in range(3):
            call()
        assert len(built) == expected, name
