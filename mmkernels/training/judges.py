"""Independent classifiers, which judge what the model draws and says. They share nothing with it.

Each is trained on real digits or recordings alone, and tells how well it does on those that it has
not seen; what it grants the model can be no surer than that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models import audio
from mmkernels.training import speech
from mmkernels.training.digits import Digits, as_digit
from mmkernels.training.speech import SpeechBank


class DigitJudge:
    """A support vector machine on 8 × 8 pixels.

    Args:
        train: real digits to learn from.

    Attributes:
        trained_on: what it learned from, in words.
    """

    def __init__(self, train: Digits) -> None:
        from sklearn.svm import SVC

        self.trained_on = f"{len(train.labels):,} real digits"
        self._svm = SVC(C=10.0, gamma=0.3)
        self._svm.fit(train.images.flatten(1).numpy(), train.labels.numpy())

    def predict(self, images: Tensor) -> Tensor:
        """The digits (N,) of images (N, 8, 8) in [0, 1]."""
        return torch.from_numpy(self._svm.predict(images.flatten(1).numpy())).long()

    def judge(self, drawings: Tensor) -> Tensor:
        """The digits (N,) of drawings (N, 3, 32, 32) uint8."""
        return self.predict(as_digit(drawings))

    def accuracy(self, digits: Digits) -> float:
        """On digits that it should not know."""
        return float((self.predict(digits.images) == digits.labels).float().mean())


class SpeechJudge:
    """A small convolutional network on log-mels.

    Args:
        banks: of `speech.load`; where there are real recordings, it learns from them alone.
        steps: of its training.
        seed: of all chance.

    Attributes:
        trained_on: what it learned from, in words.
    """

    def __init__(self, banks: dict[str, SpeechBank], *, steps: int = 400, seed: int = 0) -> None:
        bank = banks["train"]
        real = [i for i, source in enumerate(bank.sources) if source != "espeak"]
        if real:
            bank = bank.take(real)
        self.trained_on = f"{len(bank.digits):,} {'real' if real else 'synthetic'} recordings"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._net = _net()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self._net.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(steps):
            index = torch.randint(len(bank.digits), (64,), generator=generator)
            mels, _ = speech.augment(bank.mels[index], bank.lengths[index], generator)
            F.cross_entropy(self._net(mels.transpose(1, 2)), bank.digits[index]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        self._net.eval()

    @torch.no_grad()
    def predict(self, mels: Tensor) -> Tensor:
        """The digits (N,) of log-mels (N, FRAMES, 40)."""
        return self._net(mels.transpose(1, 2)).argmax(1)

    def judge(self, waveforms: Sequence[Tensor]) -> Tensor:
        """The digits (N,) of waveforms; -1 for one in which nothing is to be heard."""
        answers = torch.full((len(waveforms),), -1)
        heard, mels = [], []
        for index, waveform in enumerate(waveforms):
            try:
                mel = audio.prepare(waveform)[: speech.FRAMES]
            except ValueError:
                continue
            heard.append(index)
            mels.append(torch.cat((mel, audio.silence(speech.FRAMES - len(mel)))))
        if heard:
            answers[heard] = self.predict(torch.stack(mels))
        return answers

    def accuracy(self, bank: SpeechBank) -> float:
        """On recordings that it should not know."""
        return float((self.predict(bank.mels) == bank.digits).float().mean())


def _net() -> nn.Module:
    """Log-mels (B, 40, T) -> scores (B, 10)."""
    layers: list[nn.Module] = []
    for width_in, width_out in ((audio.N_MELS, 96), (96, 128), (128, 128)):
        layers += [
            nn.Conv1d(width_in, width_out, 5, padding=2), nn.BatchNorm1d(width_out), nn.ReLU(),
            nn.MaxPool1d(2), nn.Dropout(0.1),
        ]  # fmt: skip
    head = [nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head)
