"""The reference multimodal transformer: embeddings of text, images and sound, and one decoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.models import checkpoint as files
from mmkernels.models.batch import IGNORED, Batch
from mmkernels.models.cache import KVCache
from mmkernels.models.chat_format import Document, Message, encode
from mmkernels.models.config import ModelConfig
from mmkernels.models.decoder import AdaptedLinear, Attend, Decoder, initialise
from mmkernels.models.embedders import Embedder
from mmkernels.models.generators import AudioCodec, ImageCodec
from mmkernels.models.kernels import EAGER, MMKERNELS, Kernels
from mmkernels.models.tokenizer import Tokenizer, Vocabulary

__all__ = ["MultimodalModel"]

# A layer's number -> what its attention calls.
AttendOf = Callable[[int], Attend]


class MultimodalModel(nn.Module):
    """Text, images and sound in; text, and codes of images and sounds, out.

    Images and sounds that are given become embeddings in the place of placeholders; those that the
    model makes are codes, tokens like any other. A mask lets text be causal and each given image
    and sound be seen whole; it is built once for a forward, and every layer uses it.

    Args:
        config: all sizes.
        tokenizer: of text; its size must be the vocabulary's.

    Attributes:
        vocabulary: where codes and placeholders are among the ids.

    Raises:
        ValueError: tokenizer and vocabulary differ in size.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vocabulary = Vocabulary.of(config)
        if len(tokenizer) != self.vocabulary.text_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} ids and the configuration room for "
                f"{self.vocabulary.text_size}; they must be the same"
            )
        width = config.decoder.hidden_size
        self.decoder = Decoder(config.decoder, config.lora_rank)
        self.image_embedder = Embedder(config.image, width)
        self.audio_embedder = Embedder(config.audio, width)
        initialise(self.decoder, config.decoder.num_hidden_layers)
        for embedder in (self.image_embedder, self.audio_embedder):
            initialise(embedder, max(embedder.config.num_layers, 1))
        self.image_codec = ImageCodec(config.image_codec) if config.image_codec else None
        self.audio_codec = AudioCodec(config.audio_codec) if config.audio_codec else None
        self.kernels: Kernels = MMKERNELS
        self.checkpointing = False

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.decoder.embed_tokens.weight.device

    def use_kernels(self, on: bool) -> None:
        """Runs on mmkernels or, with `on` False, on eager PyTorch."""
        self.kernels = MMKERNELS if on else EAGER

    def document(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Document:
        """A conversation in this model's tokens.

        Args:
            messages: dicts with "role" and "content", as of `chat_format.encode`.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            ValueError, TypeError: as of `chat_format.encode`.
        """
        return encode(
            self.tokenizer,
            self.vocabulary,
            messages,
            patch_size=self.config.image.patch_size,
            default_system=self.config.default_system,
            add_generation_prompt=add_generation_prompt,
        )

    def embed(self, batch: Batch) -> Tensor:
        """Embeds a batch: (B, S, E), images and sounds at their placeholders.

        Raises:
            ValueError: there are more or fewer placeholders than images and sounds need.
        """
        ids = batch.held(batch.ids)
        x = self.decoder.embed_tokens(ids.clamp(max=self.vocabulary.size - 1))
        for inputs, embedder, placeholder in (
            (batch.images, self.image_embedder, self.vocabulary.image_patch),
            (batch.audios, self.audio_embedder, self.vocabulary.audio_patch),
        ):
            if inputs:
                places = batch.ids == placeholder
                embeddings = embedder(inputs, self.kernels)
                if len(embeddings) != places.sum():
                    raise ValueError(
                        f"the batch has {int(places.sum())} placeholders for {len(embeddings)} "
                        "embeddings; they must be as many"
                    )
                if batch.part is not None:
                    number = places.flatten().cumsum(0).view_as(places) - 1
                    embeddings = embeddings[batch.held(number)[batch.held(places)]]
                where = (ids == placeholder).nonzero(as_tuple=True)
                x = x.index_put(where, embeddings.to(x.dtype))
        return x

    def hidden(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """The decoder's output (B, S, E) for a batch, normalised; fills the cache, if any."""
        attend: AttendOf
        if cache is None:
            attend = self._masked(batch)
        elif batch.images or batch.audios:
            attend = self._prefill(batch, cache)
        else:
            attend = self._cached(cache)
        if cache is not None:
            cache.adapted = batch.adapted.any(1)
        positions, adapted = batch.held(batch.positions), batch.held(batch.adapted)
        hidden = self._run(self.embed(batch), positions, attend, adapted)
        if cache is not None:
            cache.lengths = batch.lengths.clone()
        return hidden

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy, float32, over the tokens of a batch that are learned.

        Raises:
            ValueError: none is learned.
        """
        learned = int((batch.targets != IGNORED).sum())
        if not learned:
            raise ValueError("loss: the batch has no token that is learned, so it has no mean")
        return self(batch, learned)

    def forward(self, batch: Batch, learned: int) -> Tensor:
        """What a batch adds to the mean cross entropy, float32, over so many learned tokens.

        Every parameter that is trained gets a gradient from it, 0 where it took no part: processes
        that train together wait for each other's.
        """
        targets = batch.held(batch.targets)
        where = targets != IGNORED
        logits = self.decoder.logits(self.hidden(batch)[where]).float()
        loss = F.cross_entropy(logits, targets[where], reduction="sum") / learned
        for inputs, embedder in (
            (batch.images, self.image_embedder),
            (batch.audios, self.audio_embedder),
        ):
            if not inputs and torch.is_grad_enabled():
                loss = loss + 0.0 * sum(x.sum() for x in embedder.parameters() if x.requires_grad)
        return loss

    @torch.no_grad()
    def prefill(self, batch: Batch, cache: KVCache) -> Tensor:
        """Reads a batch of prompts, one a row, into the cache: logits (B, V) of what comes next.

        Raises:
            ValueError: the cache has another batch size, or a prompt is empty or does not fit.
        """
        size, seqlen = batch.ids.shape
        if not batch.lengths.all():
            raise ValueError("prefill: a prompt has no tokens; leave it out of the batch")
        if cache.lengths.shape[0] != size or seqlen > cache.capacity:
            raise ValueError(
                f"prefill: the cache holds {cache.lengths.shape[0]} sequences of "
                f"{cache.capacity} tokens, the prompts are {size} of {seqlen}; make a larger cache"
            )
        cache.lengths.zero_()
        hidden = self.hidden(batch, cache)
        last = (batch.lengths.long() - 1)[:, None, None].expand(-1, 1, hidden.shape[2])
        return self.decoder.logits(hidden.gather(1, last)[:, 0])

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Appends ids (B,) to the sequences of the cache: logits (B, V) of what follows."""
        x = self.decoder.embed_tokens(ids[:, None])
        positions = cache.lengths[:, None]
        hidden = self._run(x, positions, self._cached(cache), cache.adapted[:, None])
        cache.lengths = cache.lengths + 1
        return self.decoder.logits(hidden[:, 0])

    def _run(self, x: Tensor, positions: Tensor, attend: AttendOf, adapted: Tensor) -> Tensor:
        rotary = self.decoder.rotary(positions)
        adapters = [m for m in self.decoder.modules() if isinstance(m, AdaptedLinear)]

        def run(layer: nn.Module, x: Tensor, attend: Attend) -> Tensor:
            # Here, for it runs again in the backward, when other batches may have been seen.
            for module in adapters:
                module.gate = adapted[..., None]
            return layer(x, rotary, attend)

        for index, layer in enumerate(self.decoder.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, layer, x, attend(index), use_reentrant=False)
            else:
                x = run(layer, x, attend(index))
        return self.decoder.norm(x)

    def _masked(self, batch: Batch) -> AttendOf:
        mask = batch.mask()
        return lambda _: lambda q, k, v: self.kernels.attention(q, k, v, mask)

    def _prefill(self, batch: Batch, cache: KVCache) -> AttendOf:
        """Masked, for `attention_with_kvcache` knows text alone; keys go into the empty cache."""
        mask = batch.mask()

        def attend(layer: int) -> Attend:
            def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                cache.k[layer, :, : k.shape[1]], cache.v[layer, :, : k.shape[1]] = k, v
                return self.kernels.attention(q, k, v, mask)

            return call

        return attend

    def _cached(self, cache: KVCache) -> AttendOf:
        """Appends to the cache. Rows that end early leave keys that the next tokens overwrite."""

        def attend(layer: int) -> Attend:
            def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                k_cache, v_cache = cache.k[layer], cache.v[layer]
                return self.kernels.attention_with_kvcache(q, k_cache, v_cache, k, v, cache.lengths)

            return call

        return attend

    def own_weights(self) -> dict[str, Tensor]:
        """The state dict without what the backbone brings."""
        backbone = self._backbone()
        return {name: x for name, x in self.state_dict().items() if name not in backbone}

    def load_own_weights(self, weights: dict[str, Tensor]) -> None:
        """Takes weights that `own_weights` gave.

        Raises:
            RuntimeError: names or shapes differ.
        """
        self.load_state_dict(weights | self._backbone())

    def _backbone(self) -> dict[str, Tensor]:
        if self.config.backbone is None:
            return {}
        decoder = self.decoder.state_dict(prefix="decoder.")
        return {name: x for name, x in decoder.items() if "lora" not in name}

    def save_pretrained(
        self,
        folder: Path,
        dtype: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes config.json, tokenizer.json and model.safetensors; a backbone is in none of them.

        Args:
            folder: made if it is not there; what it holds is replaced only once all is written.
            dtype: of the weights in the file; None: as they are.
            weights: those of `own_weights`, where the model holds but a part of each; None: its
                own.
        """
        written = {
            name: x.detach().to("cpu", dtype if x.is_floating_point() else None).contiguous()
            for name, x in (self.own_weights() if weights is None else weights).items()
        }
        files.save(
            folder, written, config=self.config.to_dict(), tokenizer=self.tokenizer.to_json()
        )

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "MultimodalModel":
        """Reads what `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: where it is.
            dtype: of the weights in memory.

        Raises:
            ValueError: a file is missing, cut off or of another model; the message names it.
            ModuleNotFoundError: it has a backbone, which needs a package that is not installed.
        """
        loaded = files.load(folder)
        config = ModelConfig.from_dict(loaded.config)
        model = cls(config, Tokenizer.load(loaded.folder / files.TOKENIZER))
        backbone: dict[str, Tensor] = {}
        if config.backbone is not None:
            from mmkernels.models import smollm

            backbone = smollm.backbone(config)
        files.restore(model, loaded.weights | backbone, loaded.folder / files.WEIGHTS)
        return model.to(dtype).eval()
