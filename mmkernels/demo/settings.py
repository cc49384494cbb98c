"""What the demo compares, and how much it does."""

from dataclasses import dataclass

IMPLEMENTATIONS = ("eager", "sdpa", "mmkernels")


@dataclass(frozen=True)
class Settings:
    """How much the demo does.

    Attributes:
        prompt_tokens: length of the long prompt, at least.
        answer_tokens: tokens of the answer to it, at most.
        chat_turns: turns of the conversation.
        chat_tokens: tokens of each answer in it, at most.
        rounds: how often each implementation answers the long prompt.
        image_rounds: how often each implementation reads the photograph.
    """

    prompt_tokens: int = 2000
    answer_tokens: int = 32
    chat_turns: int = 4
    chat_tokens: int = 64
    rounds: int = 3
    image_rounds: int = 5


QUICK = Settings(
    prompt_tokens=256, answer_tokens=8, chat_turns=2, chat_tokens=16, rounds=1, image_rounds=2
)
