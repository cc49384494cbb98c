"""The whole model's forward: the same on kernels and without, and every document by itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers")

from mmkernels.models.batch import IGNORED, Batch
from mmkernels.models.chat_format import Document
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Tokenizer
from tests.models import small
from tests.models.small import assistant, build, documents, image, mel, user


def logits(model: MultimodalModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.decoder.logits(model.hidden(batch))


def gradients(model: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(batch).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 0 and error < bound, f"{name}: {error:.1e}"


def packed(model: MultimodalModel) -> Batch:
    """Images of several sizes, sounds and text; three documents, then two, then padding."""
    text, seen, heard, turns, drawn = documents(model)
    return Batch.of([[seen, text, drawn], [turns, heard]], 130)


def test_kernels_and_eager_give_the_same_logits(shared_model: MultimodalModel) -> None:
    batch = packed(shared_model)
    inside = batch.documents >= 0
    found = []
    for on in (True, False):
        shared_model.use_kernels(on)
        found.append(logits(shared_model, batch)[inside])
    assert found[0].isfinite().all() and found[1].std() > 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=5e-5)


def test_kernels_and_eager_give_the_same_gradients(shared_model: MultimodalModel) -> None:
    batch = packed(shared_model)
    found = []
    for on in (True, False):
        shared_model.use_kernels(on)
        found.append(gradients(shared_model, batch))
    assert_same_gradients(found[0], found[1], 1e-4)
    towers = {name.split(".")[0] for name in found[0]}
    assert towers == {"decoder", "image_embedder", "audio_embedder"}  # codecs are trained alone


@pytest.mark.parametrize("changes", ["qk_norm", "no towers", "one number for pixels"])
def test_other_models_on_kernels_and_eager(changes: str) -> None:
    sizes = small.config(300)
    model = {
        "qk_norm": lambda: build(decoder=replace(sizes.decoder, qk_norm=True)),
        "no towers": lambda: build(
            image=replace(sizes.image, num_layers=0), audio=replace(sizes.audio, num_layers=0)
        ),
        "one number for pixels": lambda: build(image=replace(sizes.image, mean=None, std=None)),
    }[changes]()
    batch = packed(model)
    found = []
    for on in (True, False):
        model.use_kernels(on)
        found.append(gradients(model, batch))
    assert_same_gradients(found[0], found[1], 1e-4)


def test_a_document_is_alone_in_its_row(model: MultimodalModel) -> None:
    text, seen, heard, turns, _ = documents(model)
    batch = Batch.of([[seen, text, turns, heard]])
    before = logits(model, batch)
    for number in range(4):
        changed = Batch.of([[seen, text, turns, heard]])
        mine = changed.documents[0] == number
        words = mine & (changed.ids[0] < model.vocabulary.text_size)
        changed.ids[0, words] = (changed.ids[0, words] + 7) % model.vocabulary.text_size
        after = logits(model, changed)
        assert torch.equal(after[0, ~mine], before[0, ~mine])
        assert not torch.equal(after[0, mine], before[0, mine])


def test_another_document_s_image_and_sound_are_not_seen(model: MultimodalModel) -> None:
    _, seen, heard, turns, _ = documents(model)
    batch = Batch.of([[seen, turns, heard]])
    before = logits(model, batch)
    changed = Batch.of([[seen, turns, heard]])
    changed.images[1] = 255 - changed.images[1]  # both are of `turns`
    changed.audios[0] = -changed.audios[0]
    mine = batch.documents[0] == 1
    after = logits(model, changed)
    assert torch.equal(after[0, ~mine], before[0, ~mine])
    first = batch.spans[0].tolist().index(1)
    differ = (after != before)[0].any(-1)
    assert differ[first:][mine[first:]].all()
    assert not differ[:first].any()  # not even the text before the image


def test_padding_changes_nothing(model: MultimodalModel) -> None:
    rows = [[documents(model)[3]], [documents(model)[0]]]
    tight, wide = Batch.of(rows), Batch.of(rows, 111)
    for index, length in enumerate(tight.lengths.tolist()):
        torch.testing.assert_close(
            logits(model, wide)[index, :length], logits(model, tight)[index, :length],
            rtol=1e-5, atol=2e-5,
        )  # fmt: skip
    torch.testing.assert_close(model.loss(wide), model.loss(tight), rtol=1e-6, atol=0)


def test_an_image_is_seen_whole_by_itself_and_by_nothing_before(model: MultimodalModel) -> None:
    """Through the decoder alone, whose embedding of one placeholder is changed."""
    document = model.document([user("Look: ", image(2, 2, 1), image(1, 2, 2), "What?")])
    batch = Batch.of([[document]])
    spans = torch.tensor(document.spans)
    embedded = model.embed(batch).detach()
    last = int((spans == 0).nonzero().max())
    changed = embedded.clone()
    changed[0, last] += 1

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model._run(x, batch.positions, model._masked(batch), batch.adapted)[0]

    moved = (run(changed) != run(embedded)).any(-1)
    first = int((spans == 0).nonzero().min())
    assert not moved[:first].any()
    assert moved[first:].all()  # its own tokens before it, and all that comes after it
    # The second image does not reach the first.
    changed = embedded.clone()
    changed[0, int((spans == 1).nonzero().min())] += 1
    moved = (run(changed) != run(embedded)).any(-1)
    assert torch.equal(moved.nonzero()[:, 0], torch.arange(last + 1, len(document)))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_packing_leaves_the_loss_as_it_is(lora_rank: int) -> None:
    model = build(lora_rank=lora_rank)
    found = documents(model)
    for on in (True, False):
        model.use_kernels(on)
        with torch.no_grad():
            alone = [model.loss(Batch.of([[d]])) for d in found]
            whole = model.loss(
                Batch.of([[found[3], found[0]], [found[2], found[4], found[1]]], 150)
            )
        learned = torch.tensor([float((Batch.of([[d]]).targets != IGNORED).sum()) for d in found])
        assert learned.unique().numel() > 2  # else the weights would not matter
        want = (torch.stack(alone) * learned).sum() / learned.sum()
        torch.testing.assert_close(whole, want, rtol=2e-6, atol=0)


def test_the_loss_is_of_the_next_token(model: MultimodalModel) -> None:
    document = model.document([user(image(), "What?"), assistant("It is a four.")])
    got = logits(model, Batch.of([[document]]))[0].double().log_softmax(-1)
    chosen = [
        -got[place - 1, token]
        for place, (token, learned) in enumerate(zip(document.ids, document.learned, strict=True))
        if learned
    ]
    assert len(chosen) == len(model.tokenizer.encode("It is a four.")) + 1
    want = torch.stack(chosen).mean()
    torch.testing.assert_close(model.loss(Batch.of([[document]])).double(), want, rtol=1e-5, atol=0)


def test_adapters_are_in_force_with_images_and_sounds_alone() -> None:
    model = build(lora_rank=2)
    found = [Batch.of([[d]]) for d in documents(model)]
    before = [logits(model, batch) for batch in found]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.zero_()
    after = [logits(model, batch) for batch in found]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, False, False, False]


def test_the_order_of_images_is_that_of_the_placeholders(model: MultimodalModel) -> None:
    one, two = image(2, 2, 1), image(2, 2, 2)
    batch = Batch.of([[model.document([user(one, two)])]])
    swapped = Batch.of([[model.document([user(two, one)])]])
    got, other = model.embed(batch)[0], model.embed(swapped)[0]
    spans = batch.spans[0]
    torch.testing.assert_close(got[spans == 0], other[spans == 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[spans == 1], other[spans == 0], rtol=1e-5, atol=1e-5)
    assert (got[spans == 0] - got[spans == 1]).abs().max() > 0.1


def test_an_input_does_not_see_the_others(model: MultimodalModel) -> None:
    one, two = image(2, 3, 1), image(1, 2, 2)
    for embedder, inputs in (
        (model.image_embedder, [one, two]),
        (model.audio_embedder, [mel(3, 1).T[None], mel(2, 2).T[None]]),
    ):
        together = embedder(inputs, model.kernels)
        alone = torch.cat([embedder([x], model.kernels) for x in inputs])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        again = embedder([inputs[0], inputs[1] * 0], model.kernels)
        size = len(embedder([inputs[0]], model.kernels))
        assert torch.equal(again[:size], together[:size])


def test_patches_know_their_places(model: MultimodalModel) -> None:
    plain = torch.full((3, 24, 16), 99, dtype=torch.uint8)
    found = model.image_embedder([plain], model.kernels)
    assert len(found.detach().round(decimals=3).unique(dim=0)) == 6


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_checkpointing_gives_the_same_gradients(lora_rank: int) -> None:
    model = build(lora_rank=lora_rank)
    batch = packed(model)
    for on in (True, False):
        model.use_kernels(on)
        model.checkpointing = False
        want = gradients(model, batch)
        model.checkpointing = True
        calls: list[int] = []
        layer = model.decoder.layers[0].self_attn
        hook = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        got = gradients(model, batch)
        hook.remove()
        assert len(calls) == 2  # once more in the backward
        assert_same_gradients(got, want, 1e-6)


def test_checkpointing_of_a_batch_after_which_others_were_seen() -> None:
    model = build(lora_rank=2)
    batch, other = packed(model), Batch.of([[documents(model)[0]]])
    want = gradients(model, batch)
    model.checkpointing = True
    model.zero_grad()
    loss = model.loss(batch)
    with torch.no_grad():
        model.loss(other)
    loss.backward()
    got = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert_same_gradients(got, want, 1e-6)


@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_bfloat16(form: str) -> None:
    model = build()
    batch = packed(model)
    want = float(model.loss(batch).detach())
    if form == "weights":
        model = model.to(torch.bfloat16)
    for on in (True, False):
        model.use_kernels(on)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            loss = model.loss(batch)
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(want, rel=2e-2)
        loss.backward()
        assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


def moved(batch: Batch) -> None:
    batch.ids[batch.ids == batch.ids.max()] = 5


def dropped(batch: Batch) -> None:
    batch.images.pop()


@pytest.mark.parametrize("spoil", [moved, dropped])
def test_placeholders_and_inputs_that_do_not_match(
    model: MultimodalModel, spoil: Callable[[Batch], None]
) -> None:
    batch = packed(model)
    spoil(batch)
    with pytest.raises(ValueError, match="placeholders for"):
        model.loss(batch)


def test_a_batch_that_teaches_nothing(model: MultimodalModel) -> None:
    for rows in ([[model.document([user("Hi")])]], [[Document()]], []):
        with pytest.raises(ValueError, match="no token that is learned"):
            model.loss(Batch.of(rows))


def test_a_tokenizer_of_another_size() -> None:
    text = Tokenizer.train(small.TEXTS, 290)
    with pytest.raises(ValueError, match="290 ids and the configuration room for 300"):
        MultimodalModel(small.config(300), text)
