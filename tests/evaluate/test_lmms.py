"""The adapter for lmms-eval, on a stand-in for its interface: what requests hold and get."""

import sys
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from experiments._random_vlm import write_random_vlm
from mmjax.evaluate.chat import Dialogue
from mmjax.models.vlm import TEXT

WORDS = ("where are they ?", "compare colour and detail please .")


class Request(NamedTuple):
    """lmms-eval's `Instance`, as far as models see it."""

    args: tuple


class Base:
    """lmms-eval's `lmms`, as far as models inherit it."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    @property
    def rank(self):
        return 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_random_vlm(tmp_path_factory.mktemp("models") / "llava")
    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api")}
    modules["lmms_eval.api.model"] = types.SimpleNamespace(lmms=Base)
    modules["lmms_eval.models"] = types.ModuleType("lmms_eval.models")
    modules["lmms_eval.models.registry_v2"] = types.SimpleNamespace(ModelManifest=dict)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        from mmjax.evaluate import lmms

        jax.config.update("jax_disable_most_optimizations", True)
        # What its command line gives.
        result = lmms.MMJax(pretrained=str(directory), batch_size=2, device="cuda:0")
        pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
        documents = [
            {"images": [Image.fromarray(pixels)], "text": WORDS[0]},
            {"images": None, "text": WORDS[1]},
        ]
        result.task_dict = {"task": {"test": documents}}
        assert lmms.manifest() == {
            "model_id": "mmjax",
            "simple_class_path": "mmjax.evaluate.lmms.MMJax",
        }
        yield result
        jax.config.update("jax_disable_most_optimizations", False)
    sys.modules.pop("mmjax.evaluate.lmms")


def seen(document):
    return document["images"]


def said(model, document, **options):
    """The answer of one conversation."""
    return Dialogue(model.speaker).say(document["text"], document["images"] or (), **options)


def test_generate_until(model):
    """A batch of unequal requests; each is answered as if it were alone, up to a stop string."""
    documents = model.task_dict["task"]["test"]
    expected = [said(model, document, max_new_tokens=8) for document in documents]
    stop = expected[0].split()[2]
    options = {"max_new_tokens": 8, "temperature": 0, "until": [f" {stop}", ""], "other": 1}
    requests = [
        Request((document["text"], options, seen, row, "task", "test"))
        for row, document in enumerate(documents)
    ]
    cut = [text.split(f" {stop}")[0] for text in expected]
    assert cut[0] != expected[0] and cut[0] != cut[1]
    assert model.generate_until(requests) == cut


SETTINGS = {
    "greedy": (
        {"temperature": 0, "top_p": 1.0, "num_beams": 3, "do_sample": False, "until": "x"},
        {"num_beams": 3},
        ("x",),
    ),
    "drawn": (
        {"temperature": 0.2, "top_p": 0, "top_k": 5, "num_beams": 3, "until": []},
        {"temperature": 0.2, "top_p": None, "top_k": 5},
        (),
    ),
    "drawn without a word about how": (
        {"do_sample": True, "top_p": 0.9, "max_new_tokens": 7},
        {"temperature": 1.0, "top_p": 0.9, "top_k": None, "max_new_tokens": 7},
        (),
    ),
    "not drawn": ({"do_sample": False, "temperature": 0.7}, {}, ()),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(model, case):
    """What tasks say, as `Generator` takes it."""
    options, given, stops = SETTINGS[case]
    defaults = {"max_new_tokens": 1024, "num_beams": 1}
    found, until = sys.modules[type(model).__module__]._settings(options)
    assert dict(found) == defaults | given and until == stops


def test_rounds(model):
    """The task asks again until it has enough, with what was answered before."""
    documents = model.task_dict["task"]["test"]

    def following(document, previous_output, round_idx, previous_round_info):
        if round_idx == document["rounds"]:
            return None, None, True, previous_output, None
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        return document["images"], previous_output[-1], False, previous_output, round_idx

    options = {"max_new_tokens": 8}
    requests = []
    for row, rounds in ((0, 3), (1, 1)):
        documents[row]["rounds"] = rounds
        text = documents[row]["text"]
        requests.append(Request((text, options, seen, following, row, "task", "test")))
    found = model.generate_until_multi_round(requests)
    assert [len(texts) for texts in found] == [3, 1]
    for row, texts in zip((0, 1), found, strict=True):
        text = documents[row]["text"]
        for answer in texts:
            assert answer == said(model, documents[row] | {"text": text}, max_new_tokens=8)
            text = answer


def test_loglikelihood(model):
    """The loss of each choice, beside the model's own logits of prompt and answer together."""
    documents = model.task_dict["task"]["test"]
    greedy = said(model, documents[0], max_new_tokens=4)
    choices = ["a red cat", greedy, "no"]
    requests = [
        Request((documents[0]["text"], choice, seen, 0, "task", "test")) for choice in choices
    ]
    requests.append(Request((documents[1]["text"], lambda doc: "yes", seen, 1, "task", "test")))
    requests.append(Request(("", "no")))
    found = model.loglikelihood(requests)
    asked = model._asked(documents[0]["text"], seen, 0, "task", "test")
    pairs = [model._answered(asked, choice) for choice in choices]
    length = max(len(prompt.ids) + len(ids) for prompt, ids in pairs)
    tokens, place = np.zeros((2, 3, length), np.int32)
    place[:] = TEXT
    for row, (prompt, ids) in enumerate(pairs):
        tokens[row, : len(prompt.ids) + len(ids)] = np.concatenate([prompt.ids, ids])
        place[row, : len(prompt.ids)] = prompt.place
    # Padding on the right is seen by none of them.
    read = jax.jit(lambda tokens, images, place: model.speaker.model(tokens, images, place=place))
    logits = read(tokens, np.stack([prompt.images for prompt, _ in pairs]), place)
    for row, (prompt, ids) in enumerate(pairs):
        here = logits[row, len(prompt.ids) - 1 :][: len(ids)]
        log_p = jax.nn.log_softmax(here)[np.arange(len(ids)), ids]
        np.testing.assert_allclose(found[row][0], -log_p.mean(), rtol=1e-5)
        assert found[row][1] is bool((here.argmax(axis=1) == ids).all())
        assert model.speaker.speech.decode(ids) == choices[row] and ids[-1] == 3  # its end
    # Nothing is said of images or of a document.
    assert np.isfinite([loss for loss, _ in found]).all() and len(found) == 5


def test_what_is_no_image_is_told(model):
    model.task_dict["task"]["test"][1]["video"] = ["clip.mp4"]
    request = Request(("what ?", {}, lambda doc: doc["video"], 1, "task", "test"))
    with pytest.raises(ValueError, match=r"shows a str \('clip.mp4'\).*images only"):
        model.generate_until([request])
