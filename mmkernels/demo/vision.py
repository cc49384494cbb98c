"""The second half of the demo: a vision transformer on a photograph."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mmkernels as mm
from mmkernels.demo.measure import in_fresh_process, peak_rise, spread
from mmkernels.demo.report import Section
from mmkernels.demo.settings import IMPLEMENTATIONS

MODEL = "vit_base_patch16_384"
# A logit may differ this much from eager attention's: float32, 12 layers, logits of order one.
BOUND = 1e-4

ABOUT = """\
timm's `{model}` on scikit-learn's photograph `china.jpg`, prepared as the model wants it: {tokens}
tokens. timm brings no trained weights, so they are random (and seeded): the image is real, what the
model would say of it is not. One line puts its attention and its patch embedding on
mmkernels, and tells what it found:

```python
import mmkernels as mm

print(mm.replace(model))
```
```text
{report}
```

- One image: in one process where the implementations take turns; median and range of {rounds}.
- Peak memory: how far resident memory rose above the loaded model, in a fresh process for each.
- Logit difference: the largest from eager attention, which is timm after `set_fused_attn(False)`.
  It must stay below {bound:g}; the largest logit is {largest:.2g}."""


@dataclass
class Outcome:
    """What one implementation did.

    Attributes:
        seconds: time of each round.
        logits: of the photograph.
    """

    seconds: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)


def run(rounds: int) -> Section:
    """Runs everything in processes of its own.

    Args:
        rounds: how often each implementation reads the photograph.
    """
    memory = {}
    for name in IMPLEMENTATIONS:
        print(f"ViT: memory of {name}", flush=True)
        memory[name] = in_fresh_process(image_memory, name)
    print("ViT: the photograph on each implementation", flush=True)
    outcomes, tokens, report = in_fresh_process(compare, rounds)

    eager = torch.tensor(outcomes["eager"].logits)
    difference = {
        name: (torch.tensor(outcome.logits) - eager).abs().max().item()
        for name, outcome in outcomes.items()
    }
    failures = []
    if not difference["mmkernels"] < BOUND:
        failures.append(f"ViT: a logit is off by {difference['mmkernels']:.1e}; bound {BOUND:g}")
    largest = eager.abs().max().item()
    return Section(
        title="Vision transformer",
        about=ABOUT.format(
            model=MODEL, tokens=tokens, rounds=rounds, bound=BOUND, largest=largest, report=report
        ),
        header=("attention", "one image, s", "peak memory, MiB", "logit difference"),
        rows=[
            (
                name,
                spread(outcome.seconds),
                "unknown" if memory[name] is None else f"{memory[name]:.0f}",
                f"{difference[name]:.1e}" if name != "eager" else "–",
            )
            for name, outcome in outcomes.items()
        ],
        bars={
            "one image, s": {n: statistics.median(o.seconds) for n, o in outcomes.items()},
            "peak memory, MiB": {n: m for n, m in memory.items() if m is not None},
        },
        failures=failures,
    )


def image_memory(name: str) -> float | None:
    """MiB by which resident memory rises while the photograph is read; None where not known."""
    forward, *_ = _model(name)
    forward()  # starts the threads
    return peak_rise(forward)


def compare(rounds: int) -> tuple[dict[str, Outcome], int, str]:
    """Reads the photograph on every implementation, in turns.

    Args:
        rounds: how often each of them reads it.

    Returns:
        Their outcomes, the number of tokens, and what `mmkernels.replace` reported.
    """
    from tqdm import tqdm

    outcomes = {name: Outcome() for name in IMPLEMENTATIONS}
    models = {name: _model(name) for name in IMPLEMENTATIONS}
    for name, (forward, *_) in models.items():  # starts the threads, too
        outcomes[name].logits = forward()[0].tolist()
    with tqdm(total=rounds * len(models), unit="image", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, (forward, *_) in models.items():
                bar.set_postfix_str(name)
                began = time.perf_counter()
                forward()
                outcomes[name].seconds.append(time.perf_counter() - began)
                bar.update()
    return outcomes, models["eager"][1], models["mmkernels"][2]


def _model(name: str) -> tuple[Callable[[], Tensor], int, str]:
    """A call for the photograph's logits, the number of tokens, and what was swapped."""
    import timm
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_model_data_config

    timm.layers.set_fused_attn(name != "eager")  # read when the model is built
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    prepare = create_transform(**resolve_model_data_config(model), is_training=False)
    report = str(mm.replace(model)) if name == "mmkernels" else ""
    image = prepare(Image.fromarray(load_sample_image("china.jpg")))[None]

    def forward() -> Tensor:
        with torch.no_grad():
            return model(image)

    return forward, model.patch_embed.num_patches + model.num_prefix_tokens, report
