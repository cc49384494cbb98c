"""What comes with the package: the trained `tiny` model, and pictures and sounds to try it on."""

from pathlib import Path

# The model and run.json, which tells how it was trained and what it can do.
TINY = Path(__file__).parent / "checkpoints" / "tiny"
# {word}.png and {word}.wav, from zero to nine, which the model did not learn from.
SAMPLES = Path(__file__).parent / "samples"
