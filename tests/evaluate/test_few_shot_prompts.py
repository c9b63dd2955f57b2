"""Prompts of examples and a question, of data on a disk: what stands in them, and what is held."""

import functools
import io
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmjax.data import TooManyBadRecordsError, open_questions
from mmjax.data.spec import LoadingSpec
from mmjax.evaluate import support as supports
from mmjax.evaluate.controls import CONTROLS, image_names
from mmjax.evaluate.lazy_images import LazyImages
from mmjax.evaluate.shots import FewShot, few_shot
from mmjax.evaluate.support import open_support

SEEN, TOKENS = 9999, 2  # what stands for visual tokens, and how many an image has
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endofchunk|>"]


@pytest.fixture(scope="module")
def tokenizer():
    """Of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    bos, eos = (backend.token_to_id(token) for token in ("<s>", "</s>"))
    return SimpleNamespace(backend=backend, pad_id=0, bos_id=bos, eos_id=eos)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty records, of which two follow each other about one image."""
    root = tmp_path_factory.mktemp("few")
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (root / f"{number}.png").write_bytes(file.getvalue())
    records = [
        {"image": f"{i // 2}.png", "question": f"what is {i}?", "answer": f"red {i}"}
        for i in range(20)
    ]
    (root / "all.json").write_text(json.dumps(records))
    broken = [record | {"image": f"{i // 2}.png"} for i, record in enumerate(records)]
    broken[7]["image"] = "broken.png"
    (root / "broken.png").write_bytes((root / "3.png").read_bytes()[:120])
    (root / "broken.json").write_text(json.dumps(broken))
    described = [
        {"captions": [f"red {i}"], "questions": [{"question": "what?", "answer": f"{i}"}]}
        for i in range(5)
    ]
    (root / "described.json").write_text(json.dumps(described))
    return root


def config(root, name="all", form="vqa", template="chatml", **options):
    layout = dict(name="whole", preset="siglip", size=8, tokens=TOKENS)
    conversation = dict(template=template, max_len=90, images=1, layout=layout, image_token=SEEN)
    source = dict(name="json", path=str(root / f"{name}.json"), form=form)
    return dict(sources=[source], conversation=conversation | options)


def written(tokenizer, question):
    """The prompt as text; visual tokens in order are "<0>", "<1>", ..."""
    text, run = "", []
    for token, place in [*zip(question.ids, question.place, strict=True), (None, None)]:
        if place == -1:
            run.append(int(token))
            continue
        text += tokenizer.backend.decode(run, skip_special_tokens=False) if run else ""
        run = []
        if place is not None:
            assert token == SEEN
            text += f"<{place}>"
    return text


def shown(root, number):
    pixels = np.asarray(Image.open(root / f"{number}.png"), np.float32)
    return (pixels / 255 - 0.5) / 0.5


def test_turns_of_one_conversation(root, tokenizer):
    data = config(root, system="Look.")
    asked = list(open_questions(data, tokenizer))[5]
    made = open_support(data, data, tokenizer).prompt(asked, [2, 9])
    # The system speaks once, and turns end as in a conversation.
    assert written(tokenizer, made) == (
        "<|im_start|>system\nLook.<|im_end|>\n"
        "<|im_start|>user\n<0><1>\nwhat is 2?<|im_end|>\n<|im_start|>assistant\nred 2<|im_end|>\n"
        "<|im_start|>user\n<2><3>\nwhat is 9?<|im_end|>\n<|im_start|>assistant\nred 9<|im_end|>\n"
        "<|im_start|>user\n<4><5>\nwhat is 5?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = np.stack([shown(root, number) for number in (1, 4, 2)])
    np.testing.assert_allclose(np.asarray(made.images), expected, atol=1e-6)
    assert made.images.shape == expected.shape and made.visual == 3 * TOKENS
    assert made.answers == asked.answers and made.answer_ids is asked.answer_ids
    alone = open_support(data, data, tokenizer).prompt(asked, [])
    np.testing.assert_array_equal(alone.ids, asked.ids)
    assert alone.images is asked.images
    with pytest.raises(ValueError, match="'chatml' says itself what stands between"):
        open_support(data, data, tokenizer).prompt(asked, [2], between="\n")


def test_text_that_a_run_of_tokens_crosses(root, tokenizer):
    """In this template the system speaks within the user's first turn."""
    data = config(root, template="llama2", system="Look.")
    asked = list(open_questions(data, tokenizer))[5]
    made = open_support(data, data, tokenizer).prompt(asked, [2])
    text = written(tokenizer, made)
    assert text.count("<<SYS>>") == 1 and text.index("<<SYS>>") < text.index("<0>")
    assert text.index("red 2") < text.index("<2>")


def test_the_prompts_of_open_flamingo(root, tokenizer):
    """Its evaluation writes, of each example, get_vqa_prompt and a line break; zero-shot it takes
    two examples and removes "<image>" from their texts."""
    data = config(root, template="openflamingo")
    asked = list(open_questions(data, tokenizer))[5]
    support = open_support(data, data, tokenizer)
    made = support.prompt(asked, [2, 9], between="\n")
    assert written(tokenizer, made) == (
        "<0><1>Question:what is 2? Short answer:red 2<|endofchunk|>\n"
        "<2><3>Question:what is 9? Short answer:red 9<|endofchunk|>\n"
        "<4><5>Question:what is 5? Short answer:"
    )
    made = support.prompt(asked, [2, 9], between="\n", text_only=True)
    assert written(tokenizer, made) == (
        "Question:what is 2? Short answer:red 2<|endofchunk|>\n"
        "Question:what is 9? Short answer:red 9<|endofchunk|>\n"
        "<0><1>Question:what is 5? Short answer:"
    )
    assert made.images is asked.images and made.visual == TOKENS


def test_a_support_set_of_the_same_data(root, tokenizer):
    data = config(root)
    asked = list(open_questions(data, tokenizer, limit=6))
    support = open_support(data, data, tokenizer)
    for by in ("random", "rices"):
        made = few_shot(asked, support, FewShot(18, by), pixels)
        for question, prompt in zip(asked, made, strict=True):
            others = set(range(20)) - {int(question.text[8:-1])}
            text = written(tokenizer, prompt)
            # The other question about this image is left out, too.
            assert sum(f"is {number}?" in text for number in others) == 18
            with pytest.raises(ValueError, match="19 examples were asked for"):
                few_shot([question], support, FewShot(19, by), pixels)
    pools = [open_support(data, data, tokenizer, pool=6, seed=seed) for seed in (0, 0, 1)]
    rows = [sorted(pool.entry(row).record for row in range(6)) for pool in pools]
    assert rows[0] == rows[1] != rows[2]
    assert all(rows != sorted(question.id for question in asked) for rows in rows)
    assert len(open_support(data, data, tokenizer, pool=100)) == 20


def pixels(seen):
    rows = np.stack([np.asarray(one.images).reshape(-1) for one in seen])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_images_are_read_when_they_are_looked_at(root, tokenizer, monkeypatch):
    monkeypatch.setattr(supports, "_KEPT", 1000)  # one image of 768 bytes
    data = config(root)
    asked = list(open_questions(data, tokenizer))
    support = open_support(data, data, tokenizer)
    made = few_shot(asked, support, FewShot(8), pixels)
    assert all(isinstance(prompt.images, LazyImages) for prompt in made)
    assert len(support._decoded) == 1
    again = few_shot(asked, open_support(data, data, tokenizer), FewShot(8), pixels)
    names = image_names(made)
    assert names == image_names(again) and len(set(names)) == 20
    # Controls change the images of examples as well, whole prompts at a time.
    following = dict(zip(names, image_names(CONTROLS["shuffled"](made)), strict=True))
    assert all(name != other for name, other in following.items())
    blind = CONTROLS["blind"](made)
    assert all(one.images.shape == (9, 8, 8, 3) and not one.images.any() for one in blind)


def test_a_broken_image_is_no_example(root, tokenizer, caplog, monkeypatch):
    data, broken = config(root), config(root, "broken")
    asked = list(open_questions(data, tokenizer, limit=2))
    with pytest.raises(TooManyBadRecordsError, match=r"broken.json\[7\]"):
        few_shot(asked, open_support(broken, data, tokenizer), FewShot(17), pixels)
    lenient = functools.partial(LoadingSpec, max_bad_share=0.1)
    monkeypatch.setattr(supports, "LoadingSpec", lenient)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made = few_shot(asked, open_support(broken, data, tokenizer), FewShot(17), pixels)
    assert all("is 7?" not in written(tokenizer, prompt) for prompt in made)
    assert caplog.text.count("Left out of the examples") == 1


def test_examples_without_images(root, tokenizer):
    described = config(root, "described", form="described", layout=None, images=0)
    data = config(root)
    asked = list(open_questions(data, tokenizer, limit=2))
    support = open_support(described, data, tokenizer)
    (made, _) = few_shot(asked, support, FewShot(2), pixels)
    assert made.images is asked[0].images and written(tokenizer, made).count("<0>") == 1
    with pytest.raises(ValueError, match=r"'rices' compares images, but .*described.* has none"):
        few_shot(asked, support, FewShot(2, "rices"), pixels)
    texts = list(open_questions(described, tokenizer))
    support = open_support(data, described, tokenizer)
    with pytest.raises(ValueError, match="give other data in `shots_from`"):
        few_shot(texts, support, FewShot(2), pixels)


def test_forms_without_questions(root, tokenizer):
    with pytest.raises(ValueError, match="'llava' has no questions"):
        open_support(config(root, form="llava"), config(root), tokenizer)
