"""`python -m mmkernels chat`: a conversation in the terminal, with pictures and sounds.

A question on the command line is answered and that is all; without one, lines are read until the
end of the input: from a terminal with a prompt, else one question a line. Pictures and sounds of
the answers become files.
"""

import argparse
import base64
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkernels._core.packages import require
from mmkernels.serving.load import NEEDS

HELP = """\
/image FILE   attach a picture to the next question
/audio FILE   attach a WAV file to the next question
/save FILE    write the conversation as JSON
/new          forget the conversation
/quit         end; so does Ctrl-D"""


def main(argv: list[str] | None = None) -> int:
    """Chats.

    Args:
        argv: the arguments after `chat`; None: those of the process.

    Returns:
        0; 1 where a question had no answer, 2 where there is no such model or file.

    Raises:
        ModuleNotFoundError: a package is missing; the message names all that are.
    """
    options = _parser().parse_args(argv)
    if options.url is None:
        require(NEEDS, "chat")
    from mmkernels.serving.client import Client

    asked = {
        name: getattr(options, name)
        for name in ("max_tokens", "temperature", "media_temperature", "seed")
        if getattr(options, name) is not None
    }
    try:
        with Client(options.model, options.url, api_key=options.api_key) as client:
            client.load()
            chat = Chat(client, asked, options.out, options.memory)
            for kind in ("image", "audio"):
                for path in getattr(options, kind):
                    chat.attach(kind, path)
            if options.question is not None:
                return 0 if chat.ask(options.question) else 1
            return chat.loop()
    except (ValueError, OSError) as error:
        print(f"mmkernels chat: {error}", file=sys.stderr)
        return 2


class Chat:
    """A conversation, and where its pictures and sounds go.

    Args:
        client: a `Client`.
        options: of its `chat`.
        folder: where the answers' files go.
        memory: how many earlier questions and answers the model is shown.
    """

    def __init__(self, client: Any, options: dict[str, Any], folder: Path, memory: int) -> None:
        self.client, self.options, self.folder, self.memory = client, options, folder, memory
        self.messages: list[dict[str, Any]] = []
        self.attached: list[dict[str, Any]] = []

    def attach(self, kind: str, path: Path) -> None:
        """Puts a file into the next question.

        Raises:
            OSError: it cannot be read.
        """
        self.attached.append({"type": kind, kind: path.expanduser().read_bytes()})

    def loop(self) -> int:
        """Reads questions until there are no more; 1 if one of them had no answer, else 0."""
        answered = True
        for line in self._lines():
            command, _, argument = line.strip().partition(" ")
            if command == "/quit":
                break
            if command.startswith("/"):
                self._command(command, argument.strip())
            elif line.strip() or self.attached:
                answered = self.ask(line.strip()) and answered
        return 0 if answered or sys.stdin.isatty() else 1

    def ask(self, question: str) -> bool:
        """Asks, and prints the answer as it comes; False where there was none."""
        from mmkernels.serving.errors import ServingError

        text = [{"type": "text", "text": question}] if question else []
        message = {"role": "user", "content": [*self.attached, *text]}
        self.attached = []
        recent = self.messages[max(len(self.messages) - 2 * self.memory, 0) :]
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        try:
            for chunk in self.client.chat(messages=[*recent, message], stream=True, **self.options):
                for choice in chunk["choices"]:
                    self._show(choice["delta"], answer)
        except KeyboardInterrupt:
            print("\n(stopped)")
            return False
        except (ServingError, ValueError, TypeError) as error:
            print(f"mmkernels chat: {error}", file=sys.stderr)
            return False
        print()
        self.messages += [message, answer]
        return True

    def _show(self, delta: dict[str, Any], answer: dict[str, Any]) -> None:
        if delta.get("content"):
            answer["content"] += delta["content"]
            print(delta["content"], end="", flush=True)
        for part in delta.get("images") or ():
            answer.setdefault("images", []).append(part)
            url = part["image_url"]["url"]
            self._keep(url.partition(",")[2], "png")
        if delta.get("audio"):
            answer.setdefault("audio", delta["audio"])
            self._keep(delta["audio"]["data"], "wav")

    def _keep(self, data: str, suffix: str) -> None:
        """Writes a file under a name that none has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := self.folder / f"answer-{number}.{suffix}").exists():
            number += 1
        path.write_bytes(base64.b64decode(data))
        print(f"[{path}]", end=" ", flush=True)

    def _lines(self) -> Iterator[str]:
        if not sys.stdin.isatty():
            yield from sys.stdin
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history
        print("Ask away; /help lists the commands.")
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends.")

    def _command(self, command: str, argument: str) -> None:
        try:
            if command in ("/image", "/audio"):
                self.attach(command[1:], Path(argument))
                print(f"{argument} goes with the next question.")
            elif command == "/save":
                Path(argument).expanduser().write_text(json.dumps(self._plain(), indent=1))
                print(f"The conversation is in {argument}.")
            elif command == "/new":
                self.messages, self.attached = [], []
            else:
                print(HELP)
        except OSError as error:
            print(f"{argument or command}: {error.strerror}", file=sys.stderr)

    def _plain(self) -> list[Any]:
        from mmkernels.serving.parts import plain

        return plain(self.messages)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmkernels chat", description=__doc__)
    parser.add_argument("question", nargs="?", help="what to ask")
    parser.add_argument(
        "--image", metavar="FILE", type=Path, action="append", default=[], help="a picture to show"
    )
    parser.add_argument(
        "--audio", metavar="FILE", type=Path, action="append", default=[], help="a WAV file to play"
    )
    parser.add_argument("--model", metavar="NAME|DIR", help="what answers (tiny)")
    parser.add_argument("--url", help="ask a server, as http://127.0.0.1:8000")
    parser.add_argument("--api-key", metavar="KEY", help="what the server wants to see")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="where answers' files go (.)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="of words (0)")
    parser.add_argument(
        "--media-temperature", type=float, metavar="T", help="of pictures and sounds (0.7)"
    )
    parser.add_argument("--seed", type=int, help="the same seed and question, the same answer")
    parser.add_argument(
        "--memory", type=int, default=1, metavar="N", help="earlier questions it is shown (1)"
    )
    return parser
