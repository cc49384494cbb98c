"""`python -m tools.samples`: pictures and sounds of digits that the model has not seen or heard.

They come with the package, for its demo, examples and page: test digits of scikit-learn, and
synthetic voices that are held out of training.
"""

import torch

from mmkernels.models.audio import trim, write_wav
from mmkernels.models.images import write_png
from mmkernels.training import digits, espeak, speech
from mmkernels.training.digits import COLOURS
from mmkernels.training.phrases import DIGITS
from tools.generated import ROOT

FOLDER = ROOT / "mmkernels" / "models" / "samples"


def main() -> None:
    """Writes the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    test = digits.split()["test"]
    rows = torch.stack([(test.labels == digit).nonzero()[3, 0] for digit in range(10)])
    generator = torch.Generator().manual_seed(0)
    pictures = digits.render(
        test.images[rows],
        torch.arange(10) % len(COLOURS),
        torch.full((10,), digits.PLACES.index(digits.MIDDLE)),
        generator=generator,
        train=False,
    )
    speaker = espeak.Espeak()
    voices = espeak.voices(speech.HELD_OUT_ACCENTS, speech.HELD_OUT_VARIANTS)
    for digit, word in enumerate(DIGITS):
        (FOLDER / f"{word}.png").write_bytes(write_png(pictures[digit]))
        sound = speaker.say(word, voices[digit], rate=150, pitch=50, pitch_range=50)
        (FOLDER / f"{word}.wav").write_bytes(write_wav(trim(sound)))


if __name__ == "__main__":
    main()
