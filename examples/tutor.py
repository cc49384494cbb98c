"""A tutor: the pupil asks for sums and has them checked; the tutor draws and says the digits.

    python -m examples.tutor

Writes tutor-seven.png and tutor-three.wav, which the tutor made, into the present folder.
"""

import base64
from pathlib import Path

from examples.conversation import Conversation, sample


def main(folder: Path = Path()) -> list[str]:
    """Holds the conversation; returns what the tutor said."""
    tutor = Conversation("pupil", "tutor")
    try:
        drawn = tutor.ask("Draw a seven.")
        spoken = tutor.ask("Say three.")
        picture, sound = folder / "tutor-seven.png", folder / "tutor-three.wav"
        url = drawn["images"][0]["image_url"]["url"]
        picture.write_bytes(base64.b64decode(url.partition(",")[2]))
        sound.write_bytes(base64.b64decode(spoken["audio"]["data"]))
        said = [
            tutor.ask("What is seven plus three?"),
            # The tutor looks at and listens to what it made itself.
            tutor.ask("Add what you see and what you hear.", picture=picture, sound=sound),
            tutor.ask(
                "Add the digit you see to the digit you hear.",
                picture=sample("two", "png"),
                sound=sample("six", "wav"),
            ),
            tutor.ask("Which is larger, two or six?"),
        ]
    finally:
        tutor.client.close()
    return [message["content"] for message in said]


if __name__ == "__main__":
    main()
