"""Forms: what conversations records become, and what is wrong with them."""

import base64
import codecs
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from samples import encode, picture

from mmjax.data.conversations import MARKER, Turn, read_image, upright_size
from mmjax.data.records import BadRecordError, DataNotFoundError
from mmjax.data.sources import open_source
from mmjax.data.spec import make_form, parse
from mmjax.registry import UnknownNameError

IMAGE = encode(picture(1))


def say(text, speaker="human"):
    return {"from": speaker, "value": text}


def matched(place, similarity, image=b"1"):
    return {"image": image, "matched_text_index": place, "matched_sim": similarity}


def test_documents_of_images_and_texts():
    """OBELICS' and MMC4's forms; both are answers to nobody."""
    record = {
        "texts": ["a", None, "b", "c", None, None, "d", None],
        "images": [None, b"1", None, None, b"2", b"3", None, b"4"],
    }
    document = make_form("interleaved")(record, "r", None)
    # The last image has no text.
    assert document.turns == (Turn("assistant", ("a", 0, "b\n\nc", 1, 2, "d")),)
    assert document.images == (b"1", b"2", b"3")
    first = make_form(dict(name="interleaved", images=1))(record, "r", None)
    assert first.turns[0].parts == ("a", 0, "b\n\nc") and first.images == (b"1",)
    drawn = make_form(dict(name="interleaved", drawn=True))(record, "r", None)
    assert drawn.turns[0].parts == ("a", 0, "b\n\nc", 1, 2, "d", 3)
    assert drawn.images == (b"1", b"2", b"3", b"4")
    record = {
        "text_list": ["one.", "two.", "three."],
        "image_info": [matched(2, 0.3, b"c"), matched(1, 0.24, b"b"), matched(0, 0.23, b"a")],
    }
    document = make_form("mmc4")(record, "r", None)
    assert document.turns[0].parts == ("one.", 0, "two.", 1, "three.")
    assert document.images == (b"b", b"c")
    assert make_form(dict(name="mmc4", images=1))(record, "r", None).images == (b"b",)


def test_llava_with_one_image_several_and_none():
    form = make_form("llava")
    record = {
        "image": [b"1", b"2"],
        "conversations": [
            say("be brief", "system"),
            say(f"{MARKER}\ncompare with {MARKER}."),
            say("the same", "gpt"),
        ],
    }
    conversation = form(record, "r", None)
    assert conversation.turns == (
        Turn("system", ("be brief",)),
        Turn("user", (0, "\ncompare with ", 1, ".")),
        Turn("assistant", ("the same",)),
    )
    assert conversation.images == (b"1", b"2")
    one = {"image": b"1", "conversations": [say(f"what?\n{MARKER}"), say("a", "gpt")]}
    assert form(one, "r", None).turns[0].parts == ("what?\n", 0)
    assert form({"conversations": [say("hi"), say("a", "gpt")]}, "r", None).images == ()


def test_messages_of_both_kinds():
    form = make_form("messages")
    inline = [
        {"type": "image", "image": b"1"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": b"2"}},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
    got = form({"messages": [{"role": "user", "content": inline}, answer]}, "r", None)
    assert got.turns[0].parts == (0, "and", 1) and got.images == (b"1", b"2")
    beside = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this"}]},
            answer,
            {"role": "user", "content": f"and {MARKER}?"},
            {"role": "assistant", "content": "one more"},
        ],
        "images": [b"1", b"2"],
    }
    got = form(beside, "r", None)
    assert [turn.parts for turn in got.turns[::2]] == [(0, "this"), ("and ", 1, "?")]
    assert got.images == (b"1", b"2")


@pytest.mark.parametrize(
    "form,record,error",
    [
        ("llava", {"conversations": [say(MARKER), say("a", "gpt")]}, "places for 1 images"),
        (
            "llava",
            {"image": b"1", "conversations": [say("hi"), say("a", "gpt")]},
            "0 images, but there are 1",
        ),
        ("llava", {"conversations": [say("a", "gpt"), say("hi")]}, "turns out of order"),
        ("llava", {"conversations": [say("a"), say("b"), say("c", "gpt")]}, "turns out of order"),
        ("llava", {"conversations": [say("hi")]}, "nothing to supervise"),
        ("llava", {"conversations": []}, "nothing to supervise"),
        (
            "llava",
            {"conversations": [say("hi"), say(" ", "gpt")]},
            r"turn 1 \(assistant\) is empty",
        ),
        ("llava", {"conversations": [say("hi", "bot")]}, "from 'bot'"),
        ("llava", {"conversations": [say(None), say("a", "gpt")]}, "holds no text but None"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video'"),
        (
            "messages",
            {
                "messages": [{"role": "user", "content": [{"type": "image", "image": b"1"}]}],
                "images": [b"2"],
            },
            "both in its messages",
        ),
        ("caption", {"image": b"1", "text": []}, "'text' holds no text"),
        ("caption", {"image": [b"1", b"2"], "text": "a"}, "takes one"),
        ("vqa", {"image": b"1", "question": "", "answer": "a"}, "'question' holds no text"),
        ("questions", {"image": b"1", "questions": []}, "nothing to supervise"),
        ("described", {"captions": ["a"], "questions": []}, "nothing to supervise"),
        (
            "described",
            {"captions": [], "questions": [{"question": "q?", "answer": "a"}]},
            "'captions' holds no text",
        ),
        (
            "described",
            {"captions": "a", "questions": [{"question": "q?", "answer": " "}]},
            "'answer' holds no text",
        ),
        ("text", {"text": None}, "'text' holds no text"),
        ("interleaved", {"texts": ["a", None], "images": [None]}, "2 places, 'images' 1"),
        ("interleaved", {"texts": ["a"], "images": [b"1"]}, "either a text or an image"),
        ("interleaved", {"texts": [None], "images": [b"1"]}, "no text after its images"),
        ("mmc4", {"text_list": ["a"], "image_info": [matched(1, 0.3)]}, "the text 1 of 1"),
        ("mmc4", {"text_list": ["a"], "image_info": [matched(0, 0.2)]}, "similar enough"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(form, record, error):
    with pytest.raises(BadRecordError, match=error):
        make_form(form)(record, "r", None)


def test_questions_in_both_shapes_and_drawn_anew():
    rows = [
        {"question": f"q{i}?", "answer": f"a{i}", "group": "g", "choices": ["a", "b"][: i % 3]}
        for i in range(5)
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}  # as TFDS gives a Sequence
    form = make_form(dict(name="questions", turns=3, suffix="!"))
    for questions in (rows, columns):
        record = {"image": IMAGE, "questions": questions}
        first = form(record, "r", None)
        assert [turn.parts for turn in first.turns[:3]] == [(0, "\nq0?!"), ("a0",), ("q1?!",)]
        drawn = [form(record, "r", np.random.default_rng(seed)) for seed in range(30)]
        assert all(len(one.turns) == 6 for one in drawn)
        asked = [turn.text for one in drawn for turn in one.turns[::2]]
        assert len(set(asked)) == 2 * 5  # each question first (after a line break) and later
        for one in drawn:
            pairs = zip(one.turns[::2], one.turns[1::2], strict=True)
            assert all(q.text.strip("\n!?q") == a.text[1:] for q, a in pairs)
        evaluated = list(form.questions(record, "r"))
        assert [one.text for one in evaluated] == [f"q{i}?" for i in range(5)]
        assert [one.choices for one in evaluated[:2]] == [None, ("a",)]
    with pytest.raises(UnknownNameError, match="did you mean 'turns'"):
        make_form(dict(name="questions", turn=3))


def test_the_share_of_captions():
    form = make_form(dict(name="questions", caption=0.25, prompts=["Tell.", "Say."]))
    record = {
        "image": IMAGE,
        "caption": "a dog",
        "questions": [{"question": "q?", "answer": "a"}],
    }
    rng = np.random.default_rng(0)
    drawn = [form(record, "r", rng) for _ in range(400)]
    assert all(one.turns[0].text == "\nq?" for one in drawn)
    about = [one for one in drawn if len(one.turns) == 4]
    assert 70 < len(about) < 130
    assert {one.turns[2].text for one in about} == {"Tell.", "Say."}
    assert {one.turns[3].text for one in about} == {"a dog"}


def test_questions_about_a_description():
    """The description stands where the image would: once, before the first of them."""
    rows = [
        {"question": f"q{i}?", "answer": f"a{i}", "group": "g", "choices": ["a", ""][: i % 3]}
        for i in range(4)
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}  # as TFDS gives a Sequence
    form = make_form(dict(name="described", turns=3))
    for questions in (rows, columns):
        record = {"captions": ["a dog; a cat", "cat and dog"], "questions": questions}
        said = form(record, "r", None)
        assert said.images == () and [(turn.role, turn.text) for turn in said.turns] == [
            ("user", "a dog; a cat\nq0?"), ("assistant", "a0"),
            ("user", "q1?"), ("assistant", "a1"),
            ("user", "q2?"), ("assistant", "a2"),
        ]  # fmt: skip
        drawn = [form(record, "r", np.random.default_rng(seed)).turns for seed in range(30)]
        assert len({tuple(turn.text for turn in turns[::2]) for turns in drawn}) > 12  # of 24
        for turns in drawn:
            asked = [turn.text for turn in turns[::2]]
            assert len(set(asked)) == 3 and asked[0].startswith("a dog; a cat\nq")
            answers = [turn.text for turn in turns[1::2]]
            assert [text[-3:] for text in asked] == [f"q{text[1:]}?" for text in answers]
        evaluated = list(form.questions(record, "r"))
        assert [one.key for one in evaluated] == ["0", "1", "2", "3"]
        assert [one.choices for one in evaluated[:3]] == [None, ("a",), ("a",)]
        # Each stands alone, with the description.
        for i, one in enumerate(evaluated):
            assert (one.text, one.answers, one.group) == (f"q{i}?", (f"a{i}",), "g")
            assert one.image is None and one.question.role == "user"
            assert one.conversation("yes").turns == (
                Turn("user", (f"a dog; a cat\nq{i}?",)),
                Turn("assistant", ("yes",)),
            )
            assert one.conversation("yes").images == ()
    elsewhere = dict(name="described", description_field="told", questions_field="asked")
    other = make_form(elsewhere)({"told": "a dog", "asked": rows}, "r", None)
    assert [turn.text for turn in other.turns] == ["a dog\nq0?", "a0"]
    with pytest.raises(UnknownNameError, match="no field 'captions'; did you mean 'caption'"):
        form({"caption": "a", "questions": rows}, "r", None)
    for options in (dict(turns=0), dict(retell=1.5)):
        with pytest.raises(ValueError, match=r"asks nothing|must be in"):
            make_form(dict(name="described") | options)


def test_the_share_of_descriptions_told_again():
    form = make_form(dict(name="described", retell=0.25, prompts=["Tell.", "Say."]))
    record = {"captions": ["dog", "a", "b"], "questions": [{"question": "q?", "answer": "yes"}]}
    rng = np.random.default_rng(0)
    drawn = [form(record, "r", rng).turns for _ in range(400)]
    assert all([turn.text for turn in turns[:2]] == ["dog\nq?", "yes"] for turns in drawn)
    told = [[turn.text for turn in turns[2:]] for turns in drawn if len(turns) == 4]
    assert 70 < len(told) < 130
    # Never in the words that were read.
    assert {prompt for prompt, _ in told} == {"Tell.", "Say."}
    assert {answer for _, answer in told} == {"a", "b"}
    always = make_form(dict(name="described", retell=1.0))
    assert len(always(record, "r", rng).turns) == 4
    assert len(always(record, "r", None).turns) == 2
    assert len(always(record | {"captions": "dog"}, "r", rng).turns) == 2


def test_vqa_learns_the_most_frequent_answer():
    form = make_form(dict(name="vqa", answer_field="answers"))
    record = {
        "image": IMAGE,
        "question": "what?",
        "answers": [{"answer": a} for a in ("cat", "dog", "dog", "hare")],
    }
    assert form(record, "r", None).turns[1].text == "dog"
    asked = next(iter(form.questions(record, "r")))
    assert asked.answers == ("dog", "cat", "dog", "hare")


# --- images and files


def test_sizes_are_read_from_the_beginning_of_a_file(tmp_path):
    """Upright sizes, whatever the pixels lie like; nothing but the header need be there."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", exif=exif, quality=95)
    assert len(data) > 1 << 16
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "half.jpg").write_bytes(data[: 1 << 16])
    assert upright_size(tmp_path / "whole.jpg") == upright_size(tmp_path / "half.jpg") == (300, 400)
    assert upright_size(data) == (300, 400)
    assert upright_size(encode(picture(1), "PNG")) == (40, 30)
    for read in (upright_size, read_image):
        with pytest.raises(BadRecordError, match=r"gone\.jpg cannot be read: No such file"):
            read(tmp_path / "gone.jpg")


def test_json_lists_and_lines(tmp_path):
    records = [
        {"id": "ä€𝄞", "image": "a b.jpg", "conversations": [say('"],[{}\u2028')]},
        {"id": "2", "images": ["x/1.png"], "nested": [{"image": "c.jpg", "kind": "image"}]},
        {"id": "3", "url": "data:image/png;base64," + base64.b64encode(b"pixels").decode()},
    ]
    files = {
        "list.json": json.dumps(records, ensure_ascii=False, indent=2),
        "ascii.json": json.dumps(records),
        "lines.jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n",
    }
    encoded = {name: text.encode() for name, text in files.items()}
    # A byte order mark, and the line ends of Windows, as some programs write them.
    encoded |= {f"marked-{name}": codecs.BOM_UTF8 + file for name, file in encoded.items()}
    encoded |= {f"wide-{n}": file.replace(b"\n", b"\r\n") for n, file in encoded.items()}
    for name, file in encoded.items():
        (tmp_path / name).write_bytes(file)
        opened, _ = open_source(dict(name="json", path=str(tmp_path / name), root=str(tmp_path)))
        assert len(opened) == 3 and opened.id(1) == f"{tmp_path / name}[1]"
        for source in (opened, pickle.loads(pickle.dumps(opened))):
            assert source[0] == records[0] | {"image": tmp_path / "a b.jpg"}
            assert source[1]["images"] == [tmp_path / "x" / "1.png"]
            assert source[1]["nested"] == [{"image": tmp_path / "c.jpg", "kind": "image"}]
            assert source[2]["url"] == b"pixels"
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    broken, _ = open_source(dict(name="json", path=str(tmp_path / "bad.jsonl")))
    with pytest.raises(BadRecordError, match="not JSON"):
        broken[1]
    for text, error in (("[]", "no records"), ('[{"a": 1}, {', "not JSON after 1 records")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataNotFoundError, match=error):
            open_source(dict(name="json", path=str(tmp_path / "bad.json")))


def test_what_bad_configs_say():
    source = dict(name="json", path="x.json")
    layout = dict(name="whole", preset="clip", size=16, tokens=4)

    def says(kind, pattern, sources=None, **conversation):
        conversation = dict(template="chatml", max_len=64) | conversation
        with pytest.raises(kind, match=pattern):
            parse(dict(sources=sources or [source | dict(form="llava")], conversation=conversation))

    says(ValueError, "needs a form", sources=[source])
    says(UnknownNameError, "did you mean 'llava'", sources=[source | dict(form="lava")])
    says(UnknownNameError, "did you mean 'layout'", layou=layout)
    says(UnknownNameError, "did you mean 'whole'", layout=layout | dict(name="hole"), images=1)
    says(ValueError, "go together", images=2)
    says(ValueError, "go together", layout=layout)
    says(ValueError, "must be max_len=64", lengths=(16, 32))
    says(ValueError, "no meaning with pack", lengths=(16, 64), pack=True)
    says(UnknownNameError, "did you mean 'skip'", too_long="skp")
    with pytest.raises(ValueError, match="takes no `image`"):
        parse(
            dict(
                sources=[source | dict(form="text")],
                conversation=dict(template="chatml", max_len=64),
                image=dict(preset="clip", size=16),
            )
        )
