"""What the three conversations share: asking, and printing who says what."""

from pathlib import Path
from typing import Any

from mmkernels.models.trained import SAMPLES
from mmkernels.serving.client import Client


class Conversation:
    """A conversation that is printed while it goes on.

    Args:
        user: what the one who asks is called.
        assistant: what the model is called.
        model: folder of a model; None: the one that comes with the package.
    """

    def __init__(self, user: str, assistant: str, model: Path | None = None) -> None:
        self.user, self.assistant = user, assistant
        self.client = Client(model)

    def ask(
        self, text: str, *, picture: Path | None = None, sound: Path | None = None
    ) -> dict[str, Any]:
        """Asks anew, for the model was trained on short conversations; gives its message."""
        content: list[dict[str, Any]] = []
        if picture is not None:
            content.append({"type": "image", "image": picture})
        if sound is not None:
            content.append({"type": "audio", "audio": sound})
        content.append({"type": "text", "text": text})
        shown = [f"[{path.name}]" for path in (picture, sound) if path is not None]
        print(f"{self.user}: {' '.join([*shown, text])}")
        answer = self.client.chat(messages=[{"role": "user", "content": content}])
        message: dict[str, Any] = answer["choices"][0]["message"]
        made = "".join(
            [" [a picture]" * bool(message.get("images")), " [a sound]" * ("audio" in message)]
        )
        print(f"{self.assistant}: {message['content'].strip()}{made}")
        return message


def sample(word: str, kind: str) -> Path:
    """A picture ("png") or a sound ("wav") of a digit, by its word."""
    return SAMPLES / f"{word}.{kind}"
