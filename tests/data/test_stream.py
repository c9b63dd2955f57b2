"""Rows of conversations: what stands in them, packing, grouping, resuming, and records that cannot
be used."""

import collections
import json

import numpy as np
import pytest
from samples import data, encode, picture

from mmjax.data import TooManyBadRecordsError, open_eval, open_questions, open_train
from mmjax.data.image import decode
from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.data.spec import batch_fields
from mmjax.data.tokenizer import train_tokenizer
from mmjax.data.visual import LAYOUTS
from mmjax.evaluate.shots import with_shots

LAYOUT = dict(name="tiles", preset="siglip", size=16, tokens=2, rows=2, columns=2)
PLACEHOLDER = 77
WORDS = "a dog on the red square left of three cats and one tree what is how many there"
WORDS = WORDS.split(" ")


def text(rng, low, high):
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("bpe", [" ".join(WORDS)] * 3 + ["USER: ASSISTANT: Question Answer"], 400)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Conversations about one image, two, or none, and images with questions."""
    root = tmp_path_factory.mktemp("conversations")
    rng = np.random.default_rng(0)
    for i in range(12):
        size = tuple(int(side) for side in rng.integers(10, 50, 2))
        (root / f"{i}.png").write_bytes(encode(picture(i, size), "PNG"))

    def talk(images, turns, longest):
        markers = "".join("<image>\n" for _ in images)
        said = []
        for turn in range(turns):
            question = ("" if turn else markers) + text(rng, 2, 12)
            said += [
                {"from": "human", "value": question},
                {"from": "gpt", "value": text(rng, 1, longest)},
            ]
        record = {"conversations": said}
        return record | ({"image": images if len(images) > 1 else images[0]} if images else {})

    about = [talk([f"{i % 12}.png"], 1 + i % 3, 20) for i in range(90)]
    about += [talk([f"{i % 12}.png", f"{(i + 5) % 12}.png"], 2, 6) for i in range(20)]
    write(root / "about.json", about)
    write(root / "text.json", [talk([], 1 + i % 2, 50) for i in range(40)])
    asked = [
        {
            "image": f"{i}.png",
            "questions": [
                {"question": f"how many {w}?", "answer": w, "choices": ["dog", w], "group": w}
                for w in WORDS[: 2 + i % 4]
            ],
        }
        for i in range(12)
    ]
    write(root / "asked.json", asked)
    return root


def write(path, records):
    path.write_text(json.dumps(records))


def source(root, name, form="llava", **more):
    return dict(name="json", path=str(root / f"{name}.json"), form=form, **more)


def stream(sources, **options):
    default = dict(template="vicuna_v1", system="", max_len=160, images=12, layout=LAYOUT)
    default |= dict(window=64, image_token=PLACEHOLDER)
    return dict(sources=sources, conversation=default | options)


def mixture(root, **options):
    sources = [
        source(root, "about", weight=3.0),
        source(root, "text", weight=1.0),
        source(root, "asked", form=dict(name="questions", turns=3), weight=1.0),
    ]
    return stream(sources, pack=True, window=128, max_targets=110, **options)


def opened(train, tokenizer, *, batch=4, seed=1, index=0, count=1, **more):
    return open_train(
        data(train, **more),
        tokenizer,
        batch_size=batch,
        seed=seed,
        process_index=index,
        process_count=count,
    )


def taken(loader, count):
    return [next(loader) for _ in range(count)]


def assert_same(left, right):
    assert left.ids == right.ids and left.skipped == right.skipped
    for name, array in left.arrays.items():
        np.testing.assert_array_equal(array, right.arrays[name])


def alone(config, tokenizer):
    """Name -> the row of each conversation for itself, as evaluation has it."""
    rows = {}
    for batch in open_eval(config, tokenizer, batch_size=16):
        for row, (name, valid) in enumerate(zip(batch.ids, batch.valid, strict=True)):
            if valid:
                rows[name] = {key: array[row] for key, array in batch.arrays.items()}
    return rows


def test_packed_rows_are_conversations_side_by_side(root, tokenizer):
    sources = [source(root, "about"), source(root, "text")]
    config = stream(sources, pack=True, max_targets=90, prefix=True)
    rows = alone(config, tokenizer)
    loader = opened(config, tokenizer)
    made = taken(loader, 12)
    expected = {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in batch_fields(config, 4).items()
    }
    seen = set()
    for batch in made:
        arrays = batch.arrays
        assert {k: (a.shape, a.dtype) for k, a in arrays.items()} == expected
        names = iter(batch.ids)
        for row in range(4):
            here = {key: array[row] for key, array in arrays.items()}
            assert here["weights"].sum() <= 90
            assert (np.diff(here["segments"][here["segments"] > 0]) >= 0).all()
            shown = 0
            for segment in range(1, here["segments"].max() + 1):
                inside = here["segments"] == segment
                name = next(names)
                single = rows[name]
                length = (single["segments"] > 0).sum()
                for key in ("tokens", "weights", "prefix"):
                    np.testing.assert_array_equal(here[key][inside], single[key][:length])
                place = here["place"][inside]
                np.testing.assert_array_equal(
                    np.where(place >= 0, place - 2 * shown, place), single["place"][:length]
                )
                count = (single["place"].max() + 1) // 2
                np.testing.assert_array_equal(
                    here["images"][shown : shown + count], single["images"][:count]
                )
                shown += count
                seen.add(name)
            assert not here["images"][shown:].any()
            outside = here["segments"] == 0
            assert not here["weights"][outside].any() and (here["place"][outside] == -1).all()
        assert next(names, None) is None
    assert len(seen) > 100


def test_a_row_spelled_out(root, tokenizer):
    """One conversation beside what it should be, word by word."""
    record = {
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>\nhow many dog"},
            {"from": "gpt", "value": "three"},
            {"from": "human", "value": "what"},
            {"from": "gpt", "value": "a dog "},
        ],
    }
    write(root / "one.json", [record])
    row = alone(stream([source(root, "one")], prefix=True), tokenizer)[f"{root / 'one.json'}[0]"]
    ids = row["tokens"][row["segments"] > 0]
    layout = LAYOUTS["tiles"](**{k: v for k, v in LAYOUT.items() if k != "name"})
    pictures = [layout.pictures(decode((root / f"{i}.png").read_bytes())) for i in (0, 1)]
    counts = [2 * len(several) for several in pictures]
    visual = row["place"] >= 0
    np.testing.assert_array_equal(row["place"][visual], np.arange(sum(counts)))
    assert (row["tokens"][visual] == PLACEHOLDER).all()
    np.testing.assert_array_equal(row["images"][: sum(counts) // 2], np.concatenate(pictures))
    first, second = np.flatnonzero(visual)[[0, counts[0]]]
    texts = [
        tokenizer.decode(part)
        for part in (
            ids[:first],
            ids[first + counts[0] : second],
            ids[second + counts[1] :],
            ids[row["weights"][: len(ids)] > 0],
            ids[second + counts[1] :][row["prefix"][second + counts[1] : len(ids)]],
        )
    ]
    assert [" ".join(said.split()) for said in texts] == [
        "user:",
        "and",
        "how many dog assistant: three user: what assistant: a dog",
        "three a dog",
        "how many dog assistant:",
    ]
    assert (ids[row["weights"][: len(ids)] > 0] == tokenizer.eos_id).sum() == 2


def test_markers_and_newlines_among_visual_tokens(root, tokenizer, tmp_path):
    (tmp_path / "wide.png").write_bytes(encode(picture(0, (32, 16)), "PNG"))
    said = [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "dog"}]
    write(tmp_path / "wide.json", [{"image": "wide.png", "conversations": said}])

    def places(**layout):
        config = stream([source(tmp_path, "wide")], layout=layout)
        (row,) = alone(config, tokenizer).values()
        visual = np.flatnonzero(row["place"] != -1)
        between = slice(visual[0], visual[-1] + 1)
        return row["place"][between].tolist(), row["tokens"][between].tolist()

    place, tokens = places(**LAYOUT, markers=[["<bos>", "<eos><bos>"], ["", ""]])
    assert place == [0, 1, -1, -1, 2, 3]
    # Special tokens of the config are such; and so is the one before the first tile.
    assert tokens == [PLACEHOLDER] * 2 + [tokenizer.eos_id, tokenizer.bos_id] + [PLACEHOLDER] * 2
    anyres = dict(name="anyres", preset="clip", size=16, tokens=1, pinpoints=[[16, 32], [32, 16]])
    place, tokens = places(**anyres)
    assert place == [0, 1, 2, -2] and tokens == [PLACEHOLDER] * 4


def test_clips_count_as_one(root, tokenizer):
    """Pictures that are read together have places together; those of the next image follow."""
    record = {
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>"},
            {"from": "gpt", "value": "three"},
        ],
    }
    write(root / "clips.json", [record])
    layout = LAYOUT | dict(name="board", tokens=3)
    config = stream([source(root, "clips")], layout=layout)
    (row,) = alone(config, tokenizer).values()
    assert row["place"][row["place"] >= 0].tolist() == [0, 1, 2, 3, 4, 5]
    made = {k: v for k, v in layout.items() if k != "name"}
    pictures = [
        LAYOUTS["board"](**made).pictures(decode((root / f"{i}.png").read_bytes())) for i in (0, 1)
    ]
    np.testing.assert_array_equal(row["images"][:8], np.concatenate(pictures))
    packed = stream([source(root, "clips")], layout=layout, pack=True, window=4)
    batch = taken(opened(packed, tokenizer, batch=1), 1)[0]
    places = batch.arrays["place"][0]
    assert places[places >= 0].tolist() == list(range(6 * len(batch.ids)))


def test_rows_are_full(root, tokenizer):
    loader = opened(mixture(root), tokenizer, batch=8)
    batches = taken(loader, 20)
    shares = [(batch.arrays["segments"] > 0).mean() for batch in batches]
    assert np.mean(shares) >= 0.95
    names = collections.Counter(name for batch in batches for name in batch.ids)
    about = sum(count for name, count in names.items() if "about.json" in name)
    assert 0.55 < about / names.total() < 0.65


def test_every_record_once_in_an_epoch(root, tokenizer):
    config = stream([source(root, "text")], pack=True, window=20, max_len=250)
    batches = taken(opened(config, tokenizer, batch=1), 30)
    names = [name for batch in batches for name in batch.ids]
    for epoch in range(2):
        assert len(set(names[40 * epoch : 40 * (epoch + 1)])) == 40
    assert names[:40] != names[40:80]


def test_tokens_of_a_source_count_as_it_says(root, tokenizer):
    """Packed with others; nothing but the weights changes."""
    plain = stream([source(root, "about"), source(root, "text")])
    plain["conversation"]["pack"] = True
    weighed = dict(plain, sources=[source(root, "about"), source(root, "text", loss_weight=0.25)])
    seen = set()
    for one, other in zip(
        taken(opened(plain, tokenizer), 5), taken(opened(weighed, tokenizer), 5), strict=True
    ):
        assert one.ids == other.ids
        for row in range(4):
            segments = one.arrays["segments"][row]
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                before, after = (x.arrays["weights"][row, here] for x in (one, other))
                weight = 1 if (one.arrays["place"][row, here] >= 0).any() else 0.25
                np.testing.assert_array_equal(after, weight * before)
                seen.add(weight)
    assert seen == {1, 0.25}
    with pytest.raises(ValueError, match="loss_weight must be above 0"):
        opened(stream([source(root, "text", loss_weight=0)]), tokenizer)


@pytest.mark.parametrize("options", [{}, dict(pack=False, lengths=(40, 80, 160), max_len=160)])
def test_resuming_anywhere_and_any_number_of_processes(root, tokenizer, options):
    train = mixture(root)
    train["conversation"] = train["conversation"] | options
    loader = opened(train, tokenizer)
    states, batches = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(loader.get_state())))
        batches.append(next(loader))
    other = opened(train, tokenizer, threads=2)
    for start in (17, 29, 4, 0):
        other.set_state(states[start])
        assert other.get_state() == states[start]
        assert_same(next(other), batches[start])
    # A position alone does as well; the mark spares the way there.
    other.set_state({key: value for key, value in states[25].items() if key != "mark"})
    assert_same(next(other), batches[25])
    other.close()
    pair = [opened(train, tokenizer, batch=2, index=i, count=2) for i in range(2)]
    for part in pair:
        part.set_state(states[20])
    for expected in batches[20:23]:
        got = [next(part) for part in pair]
        assert got[0].ids + got[1].ids == expected.ids
        for name, array in expected.arrays.items():
            np.testing.assert_array_equal(np.concatenate([g.arrays[name] for g in got]), array)
    assert pair[0].get_state() == pair[1].get_state() == states[23]
    changed = train | dict(conversation=train["conversation"] | dict(window=32))
    with pytest.raises(ValueError, match="arrangement: saved"):
        opened(changed, tokenizer).set_state(states[1])


def test_a_tokenizer_trained_on_conversations(root, tmp_path):
    train = stream([source(root, "about"), source(root, "asked", form="questions")])
    config = data(train) | dict(tokenizer=dict(name="wordlevel", vocab_size=60))
    tokenizer = build_tokenizer(config, tmp_path)
    said = "how many three cats there"
    assert tokenizer.decode(tokenizer.encode([said], 9).ids[0]) == said


def trained_on(record, tmp_path, name, **options):
    """A stream of this one record, and the tokenizer trained on it."""
    write(tmp_path / "said.json", [record])
    train = stream([source(tmp_path, "said")], **options)
    config = data(train) | dict(tokenizer=dict(name="wordlevel", vocab_size=60))
    return train, build_tokenizer(config, tmp_path / name)


@pytest.mark.parametrize(
    "template,asked,words",
    [
        ("qa", "<image>colour<image>mood", {"question", "answer"}),
        ("vicuna_v1", "<image>colour<image>mood", {"user", "assistant"}),
        ("llama2", "<image>colour<image>mood", {"inst"}),
        ("paligemma", "<image><image>colour mood", set()),
        ("interleaved", "<image><image>colour mood", {"question", "answer"}),
    ],
)
def test_a_trained_tokenizer_knows_the_words_of_the_template(
    root, tmp_path, template, asked, words
):
    """Nothing that it was trained on is unknown, and no word is two that stood apart."""
    record = {
        "image": [str(root / "0.png"), str(root / "1.png")],
        "conversations": [
            {"from": "human", "value": asked},
            {"from": "gpt", "value": "spring"},
            {"from": "human", "value": "season"},
            {"from": "gpt", "value": "autumn"},
        ],
    }
    train, tokenizer = trained_on(record, tmp_path, "run", template=template)
    (row,) = alone(train, tokenizer).values()
    tokens = row["tokens"][(row["segments"] > 0) & (row["place"] < 0)]
    assert len(tokens) > 5 and tokenizer.unknown_id not in tokens
    learnt = {word for word in tokenizer.backend.get_vocab() if word.isalpha()}
    assert learnt == words | {"colour", "mood", "season", "spring", "autumn"}


def test_a_trained_tokenizer_knows_what_the_system_says(tmp_path):
    said = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "dog"}]
    words = {}
    for name, system in dict(own="Be brief.", usual=None).items():
        _, tokenizer = trained_on({"conversations": said}, tmp_path, name, system=system)
        words[name] = set(tokenizer.backend.get_vocab())
    assert {"be", "brief"} <= words["own"] and "curious" not in words["own"]
    assert "curious" in words["usual"]  # of Vicuna's own


def test_worker_processes_make_the_same(root, tokenizer):
    expected = taken(opened(mixture(root), tokenizer), 4)
    loader = opened(mixture(root), tokenizer, workers=2)
    try:
        for batch in expected:
            assert_same(next(loader), batch)
    finally:
        loader.close()


def test_batches_of_similar_length(root, tokenizer):
    lengths = (40, 80, 160)
    sources = [source(root, "about")]
    loader = opened(stream(sources, lengths=lengths, window=100), tokenizer, batch=6)
    batches = taken(loader, 48)
    widths = [batch.arrays["tokens"].shape[1] for batch in batches]
    assert set(widths) == set(lengths) and widths != sorted(widths)
    for batch, width in zip(batches, widths, strict=True):
        longest = (batch.arrays["segments"] > 0).sum(1).max()
        assert longest <= width and (width == 40 or longest > width / 2)
        assert all(array.shape[:2] == (6, width) for name, array in batch.arrays.items()
                   if name != "images")  # fmt: skip
    grouped = np.mean([(batch.arrays["segments"] > 0).mean() for batch in batches])
    plain = taken(opened(stream(sources), tokenizer, batch=6), 48)
    assert grouped > 1.2 * np.mean([(batch.arrays["segments"] > 0).mean() for batch in plain])
    assert {batch.arrays["tokens"].shape for batch in plain} == {(6, 160)}
    names = [name for batch in batches[:16] for name in batch.ids]
    assert len(names) == len(set(names)) == 96  # a window of 16 batches


# --- records that cannot be used


@pytest.fixture
def damaged(root, tmp_path):
    """100 conversations; of one the image is broken, of one missing, one is too long."""
    (tmp_path / "good.png").write_bytes(encode(picture(0), "PNG"))
    whole = encode(picture(1, (64, 64)), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    names = ["good.png"] * 100
    names[20], names[60] = "cut.png", "gone.png"
    records = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>what {i}"},
                {"from": "gpt", "value": "dog " * (300 if i == 40 else 1)},
            ],
        }
        for i, name in enumerate(names)
    ]
    write(tmp_path / "damaged.json", records)
    return tmp_path


@pytest.mark.parametrize(
    "options", [dict(pack=True), dict(lengths=(40, 160)), dict()], ids=["pack", "lengths", "plain"]
)
def test_bad_records_are_left_out_counted_and_named(damaged, tokenizer, options):
    config = stream([source(damaged, "damaged")], window=100, **options)
    loader = opened(config, tokenizer, batch=5, max_bad_share=0.2)
    skipped, names = [], []
    while len(names) < 96:
        batch = next(loader)
        skipped += batch.skipped
        names += batch.ids
    bad = {f"{damaged / 'damaged.json'}[{i}]" for i in (20, 40, 60)}
    errors = {record: error for record, error in skipped if record in bad}
    assert set(errors) == bad and not bad & set(names)
    reasons = "\n".join(errors[name] for name in sorted(bad))
    assert "OSError" in reasons or "truncated" in reasons
    assert "too long: " in reasons and "conversation.max_len is 160" in reasons
    assert "gone.png cannot be read: No such file" in reasons
    loader = opened(config, tokenizer, batch=20, max_bad_share=0.01)
    with pytest.raises(TooManyBadRecordsError, match="max_bad_share"):
        taken(loader, 10)


def test_cut_at_a_turn_or_not_at_all(root, tokenizer, tmp_path):
    turns = []
    for i in range(6):
        turns += [
            {"from": "human", "value": f"<image>\nwhat {i}"},
            {"from": "gpt", "value": "a red dog " * 4},
        ]
    images = [str(root / f"{i}.png") for i in range(6)]
    write(tmp_path / "long.json", [{"image": images, "conversations": turns}])
    config = stream([source(tmp_path, "long")], max_len=100, too_long="cut")
    (row,) = alone(config, tokenizer).values()
    said = tokenizer.decode(row["tokens"][(row["segments"] > 0) & (row["place"] < 0)])
    kept = said.count("user:")
    assert 1 <= kept < 6 and said.count("a red dog a red dog a red dog a red dog") == kept
    assert (row["tokens"] == tokenizer.eos_id).sum() == kept
    for pack in (False, True):
        config["conversation"]["pack"] = pack
        batch = next(opened(config, tokenizer, batch=1))
        assert batch.truncated == 1 and not batch.skipped
        for key in ("tokens", "images"):
            np.testing.assert_array_equal(batch.arrays[key][0], row[key])
    for less in (dict(max_len=30), dict(max_targets=5), dict(too_long="skip")):
        with pytest.raises(TooManyBadRecordsError, match="too long"):
            alone(stream([source(tmp_path, "long")], **(dict(max_len=100) | less)), tokenizer)
    with pytest.raises(TooManyBadRecordsError, match="too many pictures"):
        alone(stream([source(tmp_path, "long")], max_len=500, images=2), tokenizer)
    with pytest.raises(TooManyBadRecordsError, match="has no layout"):
        alone(stream([source(tmp_path, "long")], layout=None, images=0), tokenizer)


def test_texts_only(root, tokenizer):
    config = stream([source(root, "text")], layout=None, images=0, pack=True)
    batch = next(opened(config, tokenizer))
    assert set(batch.arrays) == {"tokens", "weights", "place", "segments"}
    assert set(batch.arrays) == set(batch_fields(config, 4))
    write(
        root / "documents.json", [{"text": text(np.random.default_rng(i), 5, 20)} for i in range(9)]
    )
    config = stream([source(root, "documents", form="text")], template="plain", pack=True)
    arrays = next(opened(config, tokenizer, batch=1)).arrays
    # All is learnt but the token that there is nothing before.
    begins = np.diff(arrays["segments"][0], prepend=0) > 0
    np.testing.assert_array_equal(arrays["weights"][0] > 0, (arrays["segments"][0] > 0) & ~begins)


def test_encoder_decoders_get_the_answer_apart(root, tokenizer):
    sources = [source(root, "asked", form="questions")]
    decoder = dict(max_len=4, start=9)
    config = stream(sources, seq2seq=decoder, lengths=(30, 160))
    rows, single = (
        alone(stream(sources, seq2seq=decoder), tokenizer),
        alone(stream(sources), tokenizer),
    )
    assert rows.keys() == single.keys()
    for name, row in rows.items():
        prompt = int(single[name]["weights"].argmax())
        answer = single[name]["tokens"][single[name]["weights"] > 0]
        length = (row["segments"] > 0).sum()
        encoder = [*single[name]["tokens"][:prompt], tokenizer.eos_id]
        assert row["tokens"][:length].tolist() == encoder
        assert row["decoder_tokens"].tolist()[: 1 + len(answer)] == [9, *answer]
        assert row["weights"].tolist() == [float(1 <= i <= len(answer)) for i in range(4)]
    question = next(iter(open_questions(config, tokenizer)))
    row = rows[question.id.rsplit("/", 1)[0]]
    np.testing.assert_array_equal(question.ids, row["tokens"][row["segments"] > 0])
    np.testing.assert_array_equal(question.answer_ids, row["decoder_tokens"][row["weights"] > 0])
    batch = next(opened(config, tokenizer))
    assert batch.arrays["decoder_tokens"].shape == (4, 4) and batch.arrays["place"].shape == (4, 30)
    with pytest.raises(TooManyBadRecordsError, match="several answers"):
        alone(stream([source(root, "about")], seq2seq=decoder), tokenizer)
    with pytest.raises(ValueError, match="decoder-only"):
        opened(stream(sources, seq2seq=decoder, pack=True), tokenizer)


# --- questions


def test_questions_are_what_training_has(root, tokenizer):
    config = stream([source(root, "asked", form="questions")])
    questions = list(open_questions(config, tokenizer))
    assert len(questions) == sum(2 + i % 4 for i in range(12))
    rows = alone(config, tokenizer)  # in evaluation the first question of each image
    for name, row in rows.items():
        question = next(q for q in questions if q.id == f"{name}/0")
        ids = np.concatenate([question.ids, question.answer_ids])
        np.testing.assert_array_equal(row["tokens"][row["segments"] > 0], ids)
        np.testing.assert_array_equal(row["place"][: len(question.place)], question.place)
        np.testing.assert_array_equal(
            row["weights"][: len(ids)] > 0, np.arange(len(ids)) >= len(question.ids)
        )
        np.testing.assert_array_equal(row["images"][: len(question.images)], question.images)
        assert question.answers == ("a",) and question.group == "a"
        assert question.choices == ("dog", "a")
        np.testing.assert_array_equal(question.choice_ids[1], question.answer_ids)
        assert tokenizer.decode(question.choice_ids[0]) == "dog"
        assert (
            question.picture
            == (root / f"{name[-2] if name[-3] == '[' else name[-3:-1]}.png").read_bytes()
        )
    first, second = questions[:2]
    assert first.images is second.images


def test_documents_are_what_few_shot_prompts_have(root, tokenizer, tmp_path):
    records = [
        {
            "image": str(root / f"{i % 12}.png"),
            "question": f"how many {w}?",
            "answer": "red " * i + w,
        }
        for i, w in enumerate(WORDS)
    ]
    write(tmp_path / "shots.json", records)
    config = stream([source(tmp_path, "shots", form="vqa")], template="interleaved", max_len=200)
    config["conversation"] |= dict(images=28, window=len(WORDS))
    asked = {question.id: question for question in open_questions(config, tokenizer)}
    packed = config | {"conversation": config["conversation"] | dict(pack=True, document=3)}
    lengths = set()
    for batch in taken(opened(packed, tokenizer, batch=1), 6):
        row = {key: array[0] for key, array in batch.arrays.items()}
        shown = 0
        for number, first in enumerate(range(0, len(batch.ids), 3)):
            *shots, last = (asked[name] for name in batch.ids[first : first + 3])
            prompt = with_shots(last, shots)
            inside = row["segments"] == number + 1
            tokens = np.concatenate([prompt.ids, last.answer_ids])
            np.testing.assert_array_equal(row["tokens"][inside], tokens)
            place = row["place"][inside][: len(prompt.place)]
            expected = np.where(prompt.place >= 0, prompt.place + shown, prompt.place)
            np.testing.assert_array_equal(place, expected)
            learnt = np.concatenate([one.answer_ids for one in (*shots, last)])
            np.testing.assert_array_equal(tokens[row["weights"][inside] > 0], learnt)
            shown += prompt.visual
            lengths.add(len(shots))
        assert row["segments"].max() == number + 1
    assert 2 in lengths and last.begin > 0
    for wrong in (dict(document=3), dict(document=0), dict(document=2, pack=True, prefix=True)):
        with pytest.raises(ValueError, match="need pack=True and prefix=False"):
            opened(config | {"conversation": config["conversation"] | wrong}, tokenizer)
    apart = source(root, "asked", form=dict(name="questions", turns=2, apart=True))
    with pytest.raises(ValueError, match="set apart=False in the form"):
        opened(stream([apart], pack=True, document=2, parents=True), tokenizer)


def test_questions_about_texts_are_what_training_has(tokenizer, tmp_path):
    """No image, no visual tokens, and the description before each question."""
    records = [
        {
            "captions": f"a red {word}",
            "questions": [
                {"question": "what is there?", "answer": word, "choices": ["square", word]},
                {"question": "how many cats?", "answer": "three"},
            ],
        }
        for word in ("dog", "tree", "cat")
    ]
    write(tmp_path / "told.json", records)
    sources = [source(tmp_path, "told", form="described")]
    config = stream(sources, template="qa", system=None, layout=None, images=0)
    questions = list(open_questions(config, tokenizer))
    assert [q.id[-4:] for q in questions] == [f"{i}]/{k}" for i in range(3) for k in range(2)]
    for i, word in enumerate(("dog", "tree", "cat")):
        first, second = questions[2 * i : 2 * i + 2]
        said = [tokenizer.decode(q.ids) for q in (first, second)]
        assert [" ".join(text.split()) for text in said] == [
            f"question: a red {word} what is there? answer:",
            f"question: a red {word} how many cats? answer:",
        ]
        assert (first.answers, second.answers) == ((word,), ("three",))
        assert first.choices == ("square", word) and second.choices is None
        np.testing.assert_array_equal(first.choice_ids[1], first.answer_ids)
    for question in questions:
        assert len(question.images) == 0 and question.images.ndim == 4
        assert question.picture is None and question.visual == 0
        assert (question.place == -1).all() and len(question.place) == len(question.ids)
    for name, row in alone(config, tokenizer).items():
        question = next(q for q in questions if q.id == f"{name}/0")
        ids = np.concatenate([question.ids, question.answer_ids])
        np.testing.assert_array_equal(row["tokens"][row["segments"] > 0], ids)
        np.testing.assert_array_equal(
            row["weights"][: len(ids)] > 0, np.arange(len(ids)) >= len(question.ids)
        )


def test_questions_asked_apart_share_the_tokens_of_their_image(root, tokenizer):
    """The image's tokens and those of one question are the question asked alone."""
    form = dict(name="questions", turns=3, apart=True)
    config = stream([source(root, "asked", form=form)], pack=True, parents=True)
    alone = {
        (*np.concatenate([q.ids, q.answer_ids]), *q.place): len(q.ids)
        for q in open_questions(config, tokenizer)
    }
    found = 0
    for batch in taken(opened(config, tokenizer), 3):
        assert batch.arrays["parents"].dtype == np.int32
        for row in range(4):
            here = {key: array[row] for key, array in batch.arrays.items()}
            tokens, segments = here["tokens"], here["segments"]
            parents = here["parents"]
            for segment in sorted(set(segments[parents > 0])):
                branch = segments == segment
                (parent,) = set(parents[branch])
                shared = segments == parent
                place = here["place"][shared | branch]
                shown = place[place >= 0].min()
                prompt = here["weights"][shared | branch] == 0
                moved = np.where(place >= 0, place - shown, place)[prompt]
                length = alone[(*tokens[shared], *tokens[branch], *moved)]
                assert prompt.sum() == length and not here["weights"][shared].any()
                found += 1
            assert (here["parents"][segments == 0] == 0).all()
    assert found > 60
    with pytest.raises(ValueError, match="parents=True"):
        opened(stream([source(root, "asked", form=form)], pack=True), tokenizer)
    plain = stream([source(root, "asked", form=form)], pack=True, parents=True, template="plain")
    with pytest.raises(ValueError, match="'plain' leaves them out"):
        opened(plain, tokenizer)


def test_some_questions_are_of_many_images(root, tokenizer):
    config = stream([source(root, "asked", form="questions")])
    everything = {q.id for q in open_questions(config, tokenizer)}
    for limit, images in ((5, 5), (12, 12), (20, 12), (999, 12)):
        some = [q.id for q in open_questions(config, tokenizer, limit=limit)]
        assert (
            len(some) == len(set(some)) == min(limit, len(everything)) and set(some) <= everything
        )
        assert len({name.rsplit("/", 1)[0] for name in some}) == images
        assert some == [q.id for q in open_questions(config, tokenizer, limit=limit)]
    with pytest.raises(ValueError, match="'llava' has no questions"):
        open_questions(stream([source(root, "about")]), tokenizer)


def test_questions_that_cannot_be_asked(root, tokenizer, tmp_path):
    records = [{"image": str(root / "0.png"), "question": "what", "answer": "dog"}] * 3
    records.append({"image": "gone.png", "question": "what", "answer": "dog"})
    write(tmp_path / "vqa.json", records)
    config = stream([source(tmp_path, "vqa", form="vqa")])
    with pytest.raises(TooManyBadRecordsError, match=r"gone\.png"):
        list(open_questions(config, tokenizer))
    with pytest.raises(ValueError, match="set data"):
        open_questions(config, None)
