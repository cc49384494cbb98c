"""The last part of the demo: the reference model sees and hears, on and off the kernels."""

import time
from dataclasses import dataclass, field
from typing import Any

from mmkernels.demo.measure import in_fresh_process, spread
from mmkernels.demo.report import Section
from mmkernels.models.answers import pieces
from mmkernels.models.audio import prepare, read_wav
from mmkernels.models.generation import Sampling, generate
from mmkernels.models.images import fit, read_image
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.trained import SAMPLES, TINY

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip

ABOUT = """\
The reference model's `tiny` preset, {parameters:,} parameters, trained from nothing by
`python -m mmkernels train`. It is shown ten handwritten digits and hears ten voices that were held
out of its training, and is asked about each pair: what it sees, what it hears, and their sum. The
same model runs on mmkernels, and with eager attention and convolutions.

- Right: answers that name the right number, of {questions}.
- Ten answers: seconds for the ten pairs in one batch, prompts read and answers written; median and
  range over the three questions and {rounds} rounds.
- Same tokens: every answer is token for token that of the eager model."""

QUESTIONS = {
    "see": "What digit do you see?",
    "hear": "What digit do you hear?",
    "sum": "Add the digit you see to the digit you hear.",
}


@dataclass
class Outcome:
    """What the model did on one set of kernels.

    Attributes:
        seconds: for ten answers, of each question and round.
        tokens: of every answer.
        texts: of the answers of the last round, question by question.
        right: answers of the last round that name the right number.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    right: int = 0


def run(rounds: int) -> Section:
    """Runs in a process of its own.

    Args:
        rounds: how often every question is answered.
    """
    print("The reference model sees and hears, with eager PyTorch and on the kernels", flush=True)
    outcomes, parameters = in_fresh_process(compare, rounds)
    eager, ours = outcomes["eager"], outcomes["mmkernels"]
    questions = 10 * len(QUESTIONS)
    failures = []
    if ours.tokens != eager.tokens:
        failures.append("reference model: the tokens are not those of eager PyTorch")
    if ours.right < questions * 0.8:
        failures.append(f"reference model: only {ours.right} of {questions} answers are right")
    return Section(
        title="Reference multimodal model",
        about=ABOUT.format(parameters=parameters, rounds=rounds, questions=questions),
        header=("attention and patches", "right", "ten answers, s", "same tokens"),
        rows=[
            (
                name,
                f"{outcome.right} of {questions}",
                spread(outcome.seconds, digits=3),
                "yes" if outcome.tokens == eager.tokens else "NO",
            )
            for name, outcome in outcomes.items()
        ],
        bars={},
        text="\n>\n".join(f"> {text}" for text in ours.texts),
        failures=failures,
    )


def compare(rounds: int) -> tuple[dict[str, Outcome], int]:
    """Asks about every pair, in turns, with and without the kernels; and counts parameters."""
    model = MultimodalModel.from_pretrained(TINY)
    outcomes = {"eager": Outcome(), "mmkernels": Outcome()}
    conversations = {
        question: [_conversation(seen, (seen + 3) % 10, words) for seen in range(10)]
        for question, words in QUESTIONS.items()
    }
    for number in range(rounds + 1):  # the first starts the threads
        for name, outcome in outcomes.items():
            model.use_kernels(name == "mmkernels")
            outcome.texts, outcome.right = [], 0
            for question, messages in conversations.items():
                began = time.perf_counter()
                prompts = [model.document([m], add_generation_prompt=True) for m in messages]
                answers = generate(model, prompts, [Sampling(max_tokens=24)] * len(prompts))
                if number:
                    outcome.seconds.append(time.perf_counter() - began)
                outcome.tokens += answers
                _note(outcome, question, answers, model)
    return outcomes, sum(x.numel() for x in model.parameters())


def _conversation(seen: int, heard: int, question: str) -> dict[str, Any]:
    picture = read_image((SAMPLES / f"{NUMBERS[seen]}.png").read_bytes())
    sound = read_wav(SAMPLES / f"{NUMBERS[heard]}.wav")
    return {
        "role": "user",
        "content": [
            {"type": "image", "image": fit(picture)},
            {"type": "audio", "audio": prepare(sound)},
            {"type": "text", "text": question},
        ],
    }


def _note(
    outcome: Outcome, question: str, answers: list[list[int]], model: MultimodalModel
) -> None:
    for seen, answer in enumerate(answers):
        heard = (seen + 3) % 10
        text = "".join(p.text for p in pieces(answer, model.tokenizer, model.vocabulary))
        wanted = NUMBERS[{"see": seen, "hear": heard, "sum": seen + heard}[question]]
        outcome.right += wanted in text.rstrip(". \n").split(" ")[-1:]
        if seen in (2, 7):
            outcome.texts.append(
                f"*picture of {NUMBERS[seen]}, sound of {NUMBERS[heard]}*: "
                f"**{QUESTIONS[question]}** {text.strip()}"
            )
