"""`python -m mmkernels [verb]`: the command line. Without a verb it is the doctor."""

import argparse
import sys

from mmkernels import __version__

# A verb is imported when it runs, so that a library missing for one stops no other.
VERBS = {
    "doctor": "what is installed, which backend would run, and why not the others",
    "demo": "real weights, real text and a real photograph, beside eager PyTorch and SDPA",
    "bench": "time attention, patch embedding and whole models beside their best peers",
    "chat": "ask the reference model, with pictures and sounds, in the terminal",
    "serve": "the reference model over HTTP, with a page to chat with it",
    "train": "the reference multimodal model, from nothing to a table of what it can do",
    "tune": "measure the Triton kernels' tile sizes on this GPU and keep the best",
}


def run(verb: str, argv: list[str]) -> int:
    """Runs a verb with its arguments and returns its exit code."""
    if verb == "demo":
        from mmkernels import demo

        return demo.main(argv)
    if verb == "bench":
        from mmkernels.bench import cli

        return cli.main(argv)
    if verb == "chat":
        from mmkernels.serving import chat

        return chat.main(argv)
    if verb == "serve":
        from mmkernels.serving import serve

        return serve.main(argv)
    if verb == "train":
        from mmkernels.training import cli as training

        return training.main(argv)
    if verb == "tune":
        from mmkernels import tune

        return tune.main(argv)
    from mmkernels import doctor

    return doctor.main(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line of `python -m mmkernels`.

    Args:
        argv: its arguments; None: the process's.

    Returns:
        The exit code: the verb's own, 2 where a library is missing, 130 on Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels",
        description="Fused attention and patch embedding for multimodal transformers.",
        epilog="Every verb has a --help of its own.",
    )
    parser.add_argument("--version", action="version", version=f"mmkernels {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", title="verbs")
    for verb, summary in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    known, rest = parser.parse_known_args(argv)
    verb = known.verb or "doctor"
    try:
        return run(verb, rest)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            message = 'torch is not installed: pip install "torch>=2.11"'
        elif error.name is None:  # raised by the verb itself; says what is missing and the fix
            message = str(error)
        else:
            raise
        print(f"mmkernels {verb}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
