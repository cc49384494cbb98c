"""One answer as it is made: its tokens in, pieces of text, images and sounds out."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmkernels.models.generation import Chooser, Grammar, Sampling
from mmkernels.models.tokenizer import TextStream, Tokenizer, Vocabulary


@dataclass(frozen=True)
class Text:
    """More text."""

    text: str


@dataclass(frozen=True)
class Media:
    """A whole image or sound.

    Attributes:
        kind: "image" or "audio".
        codes: of the model's codec.
    """

    kind: str
    codes: tuple[int, ...]


@dataclass(frozen=True)
class End:
    """The answer is whole.

    Attributes:
        reason: "stop", or "length" where it was cut off.
        tokens: how many it has.
    """

    reason: str
    tokens: int


Event = Text | Media | End


class Allowed(Grammar):
    """The grammar of an answer that may be kept from images or sounds.

    Args:
        vocabulary: as of `Grammar`.
        end: likewise.
        modalities: of "text", "image" and "audio".
    """

    def __init__(self, vocabulary: Vocabulary, end: int, modalities: frozenset[str]) -> None:
        super().__init__(vocabulary, end)
        self.barred: set[int] = set()
        if vocabulary.marks:
            if "image" not in modalities or not vocabulary.image_codes:
                self.barred.add(vocabulary.image_start)
            if "audio" not in modalities or not vocabulary.audio_codes:
                self.barred.add(vocabulary.audio_start)

    def ranges(self) -> list[tuple[int, int]]:
        """As of `Grammar`, without what begins a barred kind."""
        return [(begin, end) for begin, end in super().ranges() if begin not in self.barred]


class Answer:
    """Chooses an answer's tokens and says what they add to it.

    Args:
        tokenizer: that of the model.
        vocabulary: likewise.
        sampling: how tokens are chosen.
        stop: texts at which the answer ends; they are not part of it.
        modalities: what the answer may consist of.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        sampling: Sampling,
        stop: Sequence[str] = (),
        modalities: frozenset[str] = frozenset(("text", "image", "audio")),
    ) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.grammar = Allowed(vocabulary, tokenizer.end, modalities)
        self.chooser = Chooser(self.grammar, sampling)
        self.stops = Stops(stop)
        self.text = TextStream(tokenizer)
        self.codes: list[int] = []
        self.done = False

    def next(self, logits: Tensor) -> tuple[int, list[Event]]:
        """Chooses by logits (V,) on the CPU: the token, and what it adds."""
        token = self.chooser.choose(logits)
        events = self._add(token)
        if self.grammar.ended or self.stops.found:
            events += self._finish("stop")
        elif self.chooser.done:
            events += self._finish("length")
        return token, events

    def _add(self, token: int) -> list[Event]:
        v = self.vocabulary
        if token == self.tokenizer.end:
            return []
        if token < v.text_size:
            return self._said(self.text.add([token]))
        if token in (v.image_start, v.audio_start):
            self.codes = []
            return self._flush()
        if token == v.image_end:
            first = v.first_image_code
            return [Media("image", tuple(code - first for code in self.codes))]
        if token == v.audio_end:
            first = v.first_audio_code
            return [Media("audio", tuple(code - first for code in self.codes))]
        self.codes.append(token)
        return []

    def _said(self, text: str) -> list[Event]:
        shown = self.stops.add(text)
        return [Text(shown)] if shown else []

    def _flush(self) -> list[Event]:
        """Gives out what was kept back, for no more text follows it directly."""
        events = [event for text in self.text.rest() for event in self._said(text)]
        self.text = TextStream(self.tokenizer)
        kept = self.stops.rest()
        return [*events, Text(kept)] if kept else events

    def _finish(self, reason: str) -> list[Event]:
        self.done = True
        events = self._flush()
        return [*events, End("stop" if self.stops.found else reason, self.chooser.count)]


class Stops:
    """Cuts a text off at the first of some texts; what could be their beginning is kept back.

    Args:
        stop: the texts.

    Attributes:
        found: whether one has come.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """More text: what of it and of what was kept back may be shown."""
        if self.found:
            return ""
        self.held += text
        places = [at for at in map(self.held.find, self.stop) if at >= 0]
        if places:
            self.found = True
            shown, self.held = self.held[: min(places)], ""
            return shown
        kept = max((self._beginning(stop) for stop in self.stop), default=0)
        cut = len(self.held) - kept
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def rest(self) -> str:
        """What was kept back."""
        held, self.held = self.held, ""
        return held

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of the text are the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
