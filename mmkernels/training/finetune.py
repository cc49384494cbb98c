"""Fine-tuning on conversations, with loss on the assistant's tokens only."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.training.examples import Material, make
from mmkernels.training.phrases import TASKS
from mmkernels.training.pretrain import seeded

# Part of the conversations that go on to a second question.
TWO_TURNS = 0.1


@dataclass
class Finetuning:
    """Conversations of a stage; an instance is a stage's `documents`.

    Attributes:
        model: whose chat format is used.
        material: images, recordings and their codes.
        shares: task -> its weight among the conversations.
        seed: of all chance.
        count: questions of a micro-batch.
    """

    model: MultimodalModel
    material: Material
    shares: Mapping[str, float]
    seed: int
    count: int = 96

    def __call__(self, step: int, micro: int) -> list[Document]:
        """The documents of a micro-batch."""
        generator = seeded(self.seed, step, micro)
        weights = torch.tensor([float(self.shares.get(task, 0)) for task in TASKS])
        drawn = torch.multinomial(weights, self.count, replacement=True, generator=generator)
        examples = make([TASKS[i] for i in drawn.tolist()], self.material, generator)
        pairs = int(self.count * TWO_TURNS)
        conversations = [
            first.messages + second.messages
            for first, second in zip(examples[:pairs], examples[pairs : 2 * pairs], strict=True)
        ]
        conversations += [example.messages for example in examples[2 * pairs :]]
        return [self.model.document(messages) for messages in conversations]
