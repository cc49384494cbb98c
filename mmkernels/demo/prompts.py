"""The texts: a conversation, and a long prompt of real English."""

import pydoc_data.topics
from typing import Any

CHAT = (
    "What is the capital of France?",
    "Which river flows through it?",
    "Name three famous sights there.",
    "Which of the three would you visit with children, and why?",
)
QUESTION = "Question: what is a code block? Answer from the text above in one sentence."


def long_prompt(tokenizer: Any, tokens: int) -> list[int]:
    """Token ids of a chat prompt: whole paragraphs of the Python reference, and a question on them.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        tokens: lowest number of tokens of the whole prompt.
    """
    topics = pydoc_data.topics.topics
    # "exceptions" and "execmodel" answer the question; the others are there for the length.
    order = ["exceptions", "execmodel", "naming", "objects", *sorted(topics)]
    text = "\n\n".join(topics[name] for name in dict.fromkeys(order) if name in topics)
    paragraphs: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        if length >= tokens:
            break
        paragraphs.append(paragraph)
        length += len(tokenizer(paragraph + "\n\n").input_ids)
    content = "\n\n".join([*paragraphs, QUESTION])
    message = {"role": "user", "content": content}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
