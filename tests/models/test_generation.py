"""Answers: the cache against the whole forward, batches against one, grammar and sampling."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers")

from mmkernels.models.batch import Batch
from mmkernels.models.cache import KVCache
from mmkernels.models.chat_format import Document
from mmkernels.models.generation import (
    IMAGE_CODES,
    MAX_AUDIO_CODES,
    Chooser,
    Grammar,
    Sampling,
    generate,
    stream,
)
from mmkernels.models.multimodal import MultimodalModel
from mmkernels.models.tokenizer import Vocabulary
from tests.models.small import assistant, build, image, mel, user

FREE = Sampling(max_tokens=24, temperature=1.0, media_temperature=1.0)


def prompts(model: MultimodalModel) -> list[Document]:
    """Ragged: text, an image, a sound, and several turns with both."""
    found = [
        [user("What digit?")],
        [user(image(2, 3, 1), "What do you see?")],
        [user("Hear: ", mel(5, 2))],
        [
            user(image(1, 2, 3), mel(2, 4)),
            assistant("Seven plus four"),
            user("How much is that together?", image(1, 1, 5)),
        ],
        [user("?")],
    ]
    return [model.document(messages, add_generation_prompt=True) for messages in found]


def new_cache(model: MultimodalModel, batch: int, capacity: int) -> KVCache:
    return KVCache(model.config.decoder, batch, capacity)


def with_tokens(document: Document, tokens: list[int]) -> Document:
    longer = Document(
        list(document.ids), list(document.learned), list(document.spans),
        document.images, document.audios,
    )  # fmt: skip
    longer.add(tokens, False)
    return longer


def assert_steps_are_the_whole_forward(
    model: MultimodalModel, documents: list[Document], steps: int = 6
) -> None:
    """Prefill, then decode random tokens of every kind; all logits against forwards of one."""
    tokens = torch.randint(model.vocabulary.size, (steps, len(documents)))
    batch = Batch.of([[document] for document in documents])
    cache = new_cache(model, len(documents), batch.ids.shape[1] + steps)
    found = [model.prefill(batch, cache)]
    assert cache.lengths.tolist() == [len(document) for document in documents]
    found += [model.decode(column, cache) for column in tokens]
    assert cache.lengths.tolist() == [len(document) + steps for document in documents]
    got = torch.stack(found, 1)  # (B, steps + 1, V)
    for row, document in enumerate(documents):
        whole = Batch.of([[with_tokens(document, tokens[:, row].tolist())]])
        with torch.no_grad():
            want = model.decoder.logits(model.hidden(whole))[0, len(document) - 1 :]
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=5e-5)


def test_the_cache_gives_what_the_whole_forward_gives(model: MultimodalModel) -> None:
    for document in prompts(model):
        assert_steps_are_the_whole_forward(model, [document])


@pytest.mark.parametrize("rows", [[0, 4], [0, 1, 2, 3, 4], [3, 0]], ids=str)
def test_ragged_batches(model: MultimodalModel, rows: list[int]) -> None:
    """[0, 4] have no media, and are read by the kernel with a cache; the others by the mask."""
    assert_steps_are_the_whole_forward(model, [prompts(model)[row] for row in rows])


@pytest.mark.parametrize("changes", ["adapters", "qk_norm"])
def test_the_cache_of_other_models(changes: str) -> None:
    model = build(lora_rank=2)
    if changes == "qk_norm":
        model = build(decoder=replace(model.config.decoder, qk_norm=True))
    for on in (True, False):
        model.use_kernels(on)
        assert_steps_are_the_whole_forward(model, prompts(model))


def test_a_cache_is_used_again(model: MultimodalModel) -> None:
    """What an earlier prompt left in it is not seen."""
    found = prompts(model)
    cache = new_cache(model, 2, 96)
    model.prefill(Batch.of([[found[3]], [found[1]]]), cache)
    model.decode(torch.tensor([5, 6]), cache)
    batch = Batch.of([[found[4]], [found[0]]])
    got = model.prefill(batch, cache), model.decode(torch.tensor([7, 8]), cache)
    fresh = new_cache(model, 2, 96)
    assert torch.equal(got[0], model.prefill(batch, fresh))
    assert torch.equal(got[1], model.decode(torch.tensor([7, 8]), fresh))


def test_rows_of_one_cache_in_another(model: MultimodalModel) -> None:
    found = prompts(model)
    cache = new_cache(model, 3, 96)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    for documents, rows in ((found[:2], [2, 0]), (found[3:4], [1])):
        batch = Batch.of([[document] for document in documents])
        part = new_cache(model, len(rows), batch.ids.shape[1])
        model.prefill(batch, part)
        cache.take(torch.tensor(rows), part)
    tokens = torch.tensor([9, 10, 11])
    cache.k, cache.v = cache.k.nan_to_num(1e3), cache.v.nan_to_num(1e3)  # beyond the lengths
    got = model.decode(tokens, cache)
    for row, document in enumerate((found[1], found[3], found[0])):
        alone = new_cache(model, 1, 96)
        model.prefill(Batch.of([[document]]), alone)
        want = model.decode(tokens[row : row + 1], alone)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-5, atol=5e-5)
    assert cache.adapted.tolist() == [True, True, False]


def test_greedy_is_the_likeliest_token_of_the_whole_forward(model: MultimodalModel) -> None:
    (answer,) = generate(model, prompts(model)[:1], [Sampling(max_tokens=8, media_temperature=0)])
    grammar = Grammar(model.vocabulary, model.tokenizer.end)
    tokens: list[int] = []
    for token in answer:
        batch = Batch.of([[with_tokens(prompts(model)[0], tokens)]])
        with torch.no_grad():
            logits = model.decoder.logits(model.hidden(batch))[0, -1]
        allowed = [i for begin, end in grammar.ranges() for i in range(begin, end)]
        assert token == allowed[int(logits[allowed].argmax())]
        grammar.advance(token)
        tokens.append(token)
    assert len(tokens) == 8 or grammar.ended


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_answers_of_a_batch_are_those_alone(model: MultimodalModel, sampled: bool) -> None:
    found = prompts(model)
    samplings = [
        replace(FREE, max_tokens=12 + 3 * row, seed=row)
        if sampled
        else Sampling(max_tokens=12 + 3 * row, media_temperature=0.0)
        for row in range(len(found))
    ]
    together = generate(model, found, samplings)
    alone = [generate(model, [p], [s])[0] for p, s in zip(found, samplings, strict=True)]
    assert together == alone
    backwards = generate(model, found[::-1], samplings[::-1])
    assert backwards[::-1] == alone
    assert len({tuple(answer) for answer in alone}) > 2


def test_kernels_and_eager_answer_alike(shared_model: MultimodalModel) -> None:
    answers = []
    for on in (True, False):
        shared_model.use_kernels(on)
        answers.append(generate(shared_model, prompts(shared_model), [FREE] * 5))
    assert answers[0] == answers[1]


def test_the_seed_alone_decides(model: MultimodalModel) -> None:
    found, sampling = prompts(model)[:1], replace(FREE, temperature=5.0)
    torch.manual_seed(1)
    one = generate(model, found, [sampling])
    torch.manual_seed(2)
    torch.rand(7)
    assert generate(model, found, [sampling]) == one
    others = [generate(model, found, [replace(sampling, seed=seed)]) for seed in range(1, 6)]
    assert len({str(answer) for answer in others}) == 5


def test_a_stream_gives_the_end_and_then_nothing(model: MultimodalModel) -> None:
    """The mark of the end is likely here, so answers end at different steps."""
    found = prompts(model)
    samplings = [replace(FREE, seed=seed, max_tokens=60) for seed in range(5)]
    end = model.tokenizer.end
    row = model.decoder.embed_tokens.weight.data[end].clone()
    try:
        model.decoder.embed_tokens.weight.data[end] = model.decoder.embed_tokens.weight.data.mean(0)
        columns = list(stream(model, found, samplings))
        answers = generate(model, found, samplings)
    finally:
        model.decoder.embed_tokens.weight.data[end] = row
    for row_number, answer in enumerate(answers):
        tokens = [column[row_number] for column in columns]
        said = [token for token in tokens if token is not None]
        assert tokens == said + [None] * (len(tokens) - len(said))
        assert end not in said[:-1] and said in (answer, [*answer, end])


def test_at_most_max_tokens(model: MultimodalModel) -> None:
    for count in (1, 2, 9):
        columns = list(stream(model, prompts(model)[:2], [replace(FREE, max_tokens=count)] * 2))
        assert len(columns) <= count
    lengths = [len(a) for a in generate(model, prompts(model)[:1] * 3, [
        replace(FREE, max_tokens=count, temperature=0) for count in (1, 4, 6)
    ])]  # fmt: skip
    assert lengths == [1, 4, 6]


def assert_well_formed(tokens: list[int], v: Vocabulary, end: int) -> dict[str, int]:
    """Reads an answer as its grammar says; how many images and sounds it has, and if one is cut."""
    found = {"image": 0, "audio": 0, "open": 0}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token < v.text_size:
            assert token != end or position == len(tokens)
            continue
        assert token in (v.image_start, v.audio_start), "a code or an end in a text"
        kind = "image" if token == v.image_start else "audio"
        first = v.first_image_code if kind == "image" else v.first_audio_code
        count = v.image_codes if kind == "image" else v.audio_codes
        codes = 0
        while position < len(tokens) and first <= tokens[position] < first + count:
            codes += 1
            position += 1
        if position == len(tokens):
            found["open"] += 1
            assert codes <= (IMAGE_CODES if kind == "image" else MAX_AUDIO_CODES)
            continue
        assert tokens[position] == (v.image_end if kind == "image" else v.audio_end)
        position += 1
        found[kind] += 1
        assert codes == IMAGE_CODES if kind == "image" else 0 < codes <= MAX_AUDIO_CODES
    return found


BIASES = {"none": {}, "start": {"starts": 8.0}, "end late": {"starts": 8.0, "ends": -1e4},
          "end soon": {"starts": 8.0, "ends": 1e4}}  # fmt: skip


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("codes", [(15, 7), (15, 0), (0, 7), (0, 0)], ids=str)
def test_whatever_the_logits_are_answers_are_well_formed(codes: tuple[int, int], bias: str) -> None:
    v = Vocabulary(50, *codes)
    end = 1
    total = {"image": 0, "audio": 0, "open": 0}
    for seed in range(6):
        chooser = Chooser(Grammar(v, end), replace(FREE, seed=seed, max_tokens=150))
        tokens = []
        while not chooser.done:
            logits = torch.randn(v.size) * 3
            logits[end] = -6
            if v.marks:
                logits[[v.image_start, v.audio_start]] += BIASES[bias].get("starts", 0)
                logits[[v.image_end, v.audio_end]] += BIASES[bias].get("ends", 0)
            tokens.append(chooser.choose(logits))
        assert len(tokens) == chooser.count <= 150
        for key, count in assert_well_formed(tokens, v, end).items():
            total[key] += count
    assert (total["image"] > 0) == (codes[0] > 0) or bias == "none"
    assert (total["audio"] > 0) == (codes[1] > 0) or bias == "none"


@pytest.mark.parametrize("ends", [1e4, -1e4], ids=["at once", "never"])
def test_a_sound_has_from_1_to_40_codes(ends: float) -> None:
    v = Vocabulary(50, 15, 7)
    chooser = Chooser(Grammar(v, 1), replace(FREE, max_tokens=200))
    logits = torch.zeros(v.size)
    logits[v.audio_start] = 100
    logits[v.audio_end] = ends
    tokens = [chooser.choose(logits) for _ in range(2 + (1 if ends > 0 else MAX_AUDIO_CODES))]
    assert tokens[0] == v.audio_start and tokens[-1] == v.audio_end
    assert all(v.first_audio_code <= token < v.size for token in tokens[1:-1])
    assert chooser.grammar.ranges()[0] == (0, 50)  # text again


def test_an_image_has_16_codes_although_its_end_is_likelier() -> None:
    v = Vocabulary(50, 15, 7)
    chooser = Chooser(Grammar(v, 1), Sampling(media_temperature=0.0))
    logits = torch.zeros(v.size)
    logits[v.image_start], logits[v.image_end], logits[1] = 5, 100, 4
    tokens = [chooser.choose(logits) for _ in range(18)]
    assert tokens == [v.image_start, *[v.first_image_code] * 16, v.image_end]
    logits[v.image_start] = 0
    assert chooser.choose(logits) == 1 and chooser.done


@pytest.mark.parametrize("kernels", [True, False])
def test_models_without_codecs_answer_in_text(kernels: bool) -> None:
    model = build(codecs=False)
    model.use_kernels(kernels)
    answers = generate(model, prompts(model), [FREE] * 5)
    assert model.vocabulary.size == 300
    assert all(0 <= token < 300 for answer in answers for token in answer)


def test_answers_of_the_model_are_well_formed(model: MultimodalModel) -> None:
    samplings = [replace(FREE, seed=seed, max_tokens=60, temperature=3.0) for seed in range(5)]
    for answer in generate(model, prompts(model), samplings):
        assert_well_formed(answer, model.vocabulary, model.tokenizer.end)


def counts(logits: Tensor, draws: int = 2500, **options: Any) -> Tensor:
    """How often each text token is chosen, as a part of all draws."""
    v = Vocabulary(len(logits), 0, 0)
    sampling = Sampling(max_tokens=1 << 20, **options)
    chooser = Chooser(Grammar(v, -1), sampling)
    found = torch.zeros(len(logits))
    for _ in range(draws):
        found[chooser.choose(logits)] += 1
    return found / draws


LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5, -torch.inf])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    want = (LOGITS / temperature).softmax(0)
    # Four standard deviations of a frequency of 2500 draws are at most 0.04.
    torch.testing.assert_close(counts(LOGITS, temperature=temperature), want, rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 4]),
        ({"top_k": 6}, [0, 1, 2, 3, 4]),
        ({"top_k": 1000}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.46}, [1]),  # the likeliest has 0.463
        ({"top_p": 0.47}, [1, 4]),
        ({"top_p": 0.9}, [1, 2, 4]),
        ({"top_k": 2, "top_p": 0.99}, [1, 4]),
        # The top_p is of what top_k left: the likeliest of two has 0.62.
        ({"top_k": 2, "top_p": 0.6}, [1]),
    ],
)
def test_what_is_cut_off(options: dict[str, Any], kept: list[int]) -> None:
    want = torch.full_like(LOGITS, -torch.inf)
    want[kept] = LOGITS[kept]
    got = counts(LOGITS, temperature=1.0, **options)
    assert got.nonzero()[:, 0].tolist() == kept
    torch.testing.assert_close(got, want.softmax(0), rtol=0, atol=0.04)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-30, 1e-3])
def test_low_temperatures_take_the_likeliest(temperature: float) -> None:
    assert counts(LOGITS * 30, 20, temperature=temperature)[1] == 1


def test_codes_have_a_temperature_of_their_own() -> None:
    v = Vocabulary(6, 15, 15)
    logits = torch.zeros(v.size)
    logits[3], logits[v.image_start], logits[v.first_image_code + 4] = 1.0, 2.0, 0.5
    for media, several in ((0.0, False), (1.0, True)):
        chooser = Chooser(Grammar(v, 1), Sampling(temperature=0.0, media_temperature=media))
        first, *codes = [chooser.choose(logits) for _ in range(17)]
        assert first == v.image_start
        assert (len(set(codes)) > 3) == several
        assert several or set(codes) == {v.first_image_code + 4}


def test_choosing_leaves_the_logits_alone() -> None:
    logits = LOGITS.clone()
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}):
        counts(logits, 3, **options)
        assert torch.equal(logits, LOGITS)
    assert counts(LOGITS.bfloat16(), 5, temperature=0.0)[1] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"media_temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 1 << 63},
        {"seed": -(1 << 63) - 1},
    ],
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is "):
        Sampling(**wrong)


def test_any_seed_in_range_can_be_used() -> None:
    for seed in (-(1 << 63), -1, 0, (1 << 63) - 1):
        counts(LOGITS, 1, temperature=1.0, seed=seed)


def test_more_than_the_model_was_made_for(model: MultimodalModel) -> None:
    longest = model.config.decoder.max_position_embeddings
    document = prompts(model)[0]
    room = longest - len(document)
    with pytest.raises(
        ValueError, match=rf"{len(document)} tokens .* {room + 1}.*at most {longest}"
    ):
        generate(model, [document], [Sampling(max_tokens=room + 1)])
    next(stream(model, [document], [Sampling(max_tokens=room)]))
    with pytest.raises(ValueError, match=f"capacity is {longest + 1}.* at most {longest}"):
        new_cache(model, 1, longest + 1)


def test_prompts_that_do_not_fit_the_cache(model: MultimodalModel) -> None:
    batch = Batch.of([[prompts(model)[0]]])
    for size, capacity in ((2, 96), (1, batch.ids.shape[1] - 1)):
        with pytest.raises(ValueError, match=f"holds {size} sequences of {capacity} tokens"):
            model.prefill(batch, new_cache(model, size, capacity))
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        model.prefill(Batch.of([[prompts(model)[0]], [Document()]]), new_cache(model, 2, 96))


def test_a_cache_that_is_full(model: MultimodalModel) -> None:
    batch = Batch.of([[prompts(model)[0]]])
    cache = new_cache(model, 1, batch.ids.shape[1])
    model.prefill(batch, cache)
    with pytest.raises((ValueError, IndexError), match=r"cache_seqlens is|out of bounds"):
        model.decode(torch.tensor([5]), cache)


def test_as_many_samplings_as_prompts(model: MultimodalModel) -> None:
    for documents, samplings in (([], []), (prompts(model)[:2], [FREE])):
        with pytest.raises(ValueError, match="one sampling for each prompt"):
            generate(model, documents, samplings)
