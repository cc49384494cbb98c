"""What is asked and answered about digits: the words of every task, and how an answer is read."""

import re

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
DIGITS = NUMBERS[:10]

TASKS = ("see", "hear", "read", "sum", "same", "describe", "draw", "say", "talk")

# Task -> questions; {digit}, {colour}, {a} and {b} are filled in.
QUESTIONS = {
    "see": (
        "What digit do you see?",
        "Which digit is this?",
        "What number is in the picture?",
        "What do you see?",
        "Can you tell me the digit in the image?",
    ),
    "hear": (
        "What digit do you hear?",
        "Which digit was said?",
        "What number did they say?",
        "What do you hear?",
        "Can you tell me the digit in the recording?",
    ),
    "read": (
        "Read the number.",
        "Read the digits from left to right.",
        "Which digits are written here?",
        "What does it say?",
    ),
    "sum": (
        "Add the digit you see to the digit you hear.",
        "What is the sum of the digit in the picture and the spoken digit?",
        "Add what you see and what you hear.",
        "How much is the digit you see plus the digit you hear?",
    ),
    "same": (
        "Are they the same digit or different?",
        "Same or different?",
        "Is the digit you see the digit you hear?",
    ),
    "describe": (
        "Describe the picture.",
        "Which digit is it, in which colour, and where?",
        "Describe colour and place.",
        "What is in the picture, and where?",
    ),
    "draw": (
        "Draw a {colour} {digit}.",
        "Please draw a {colour} {digit}.",
        "Paint a {colour} {digit}.",
    ),
    "draw plain": ("Draw a {digit}.", "Please draw a {digit}.", "Draw the digit {digit}."),
    "say": ("Say {digit}.", "Please say {digit}.", "Say the digit {digit}.", "Speak: {digit}."),
}

# Without a colour, the digit is drawn in this one.
PLAIN = "white"

_TALK = (
    ("Hello!", "Hello! Show me a digit, or say one."),
    ("Hi there.", "Hello! Show me a digit, or say one."),
    ("Good morning!", "Good morning! Show me a digit, or say one."),
    ("Who are you?", "I am a small model. I see, hear, draw and say digits."),
    ("What are you?", "I am a small model. I see, hear, draw and say digits."),
    ("What can you do?", "I tell digits that you show or say, add them, draw them and say them."),
    (
        "How can you help me?",
        "I tell digits that you show or say, add them, draw them and say them.",
    ),
    ("How are you?", "I am well, thank you. Shall we count?"),
    ("Thank you!", "You are welcome."),
    ("Thanks a lot.", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("Bye.", "Goodbye! Come back soon."),
)
_SUMS = ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.")
_NEXT = ("What comes after {a}?", "Which number follows {a}?")
_BEFORE = ("What comes before {a}?", "Which number is just before {a}?")
_LARGER = ("Which is larger, {a} or {b}?", "What is more, {a} or {b}?")


def talk() -> list[tuple[str, str]]:
    """Every question of plain talk, with its answer."""
    pairs = list(_TALK)
    for a, first in enumerate(DIGITS):
        pairs += [(q.format(a=first), f"{NUMBERS[a + 1]}.") for q in _NEXT]
        pairs += [(q.format(a=first), f"{NUMBERS[a - 1]}.") for q in _BEFORE if a]
        for b, second in enumerate(DIGITS):
            total = NUMBERS[a + b]
            pairs += [
                (q.format(a=first, b=second), f"{first} plus {second} is {total}.") for q in _SUMS
            ]
            if a != b:
                larger = f"{NUMBERS[max(a, b)]} is larger."
                pairs += [(q.format(a=first, b=second), larger) for q in _LARGER]
    return pairs


def numbers_in(text: str) -> list[int]:
    """The numbers that a text names, in words or figures, in their order."""
    found = re.findall(rf"\b(?:{'|'.join(NUMBERS)}|\d+)\b", text.lower())
    return [NUMBERS.index(word) if word in NUMBERS else int(word) for word in found]
