"""IDEFICS of transformers, both ways."""

import json

import hf
import numpy as np
import parity
import processors
import pytest
from towers import refused
from vlms import IMAGE, check, forward

import mmjax.convert
from experiments import generate
from mmjax.convert import ConversionError
from mmjax.data.idefics3 import AROUND
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor
from mmjax.evaluate.chat import open_speaker

transformers = hf.transformers()
pytestmark = pytest.mark.torch

VISION = {
    "embed_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
RESAMPLER = {
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 3,
    "resampler_head_dim": 10,
}
LANGUAGE = {
    "vocab_size": 50,
    "additional_vocab_size": 2,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "alpha_initializer": "normal",
    "alphas_initializer_range": 0.5,
    "alpha_type": "vector",
}
# name -> options of the tower, of the resampler (None: there is none) and of the whole
CASES = {
    "as published": (
        {"hidden_act": "gelu"},
        {"qk_layer_norms_perceiver": True},
        {
            "cross_layer_interval": 2,
            "qk_layer_norms": True,
            "alpha_type": "float",
            "alpha_initializer": "zeros",
        },
    ),
    "every block, tied": (
        {"image_size": 28, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
        {},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "no resampler, another width, nothing new": (
        {"embed_dim": 24, "num_attention_heads": 3, "num_channels": 1},
        None,
        {"cross_layer_interval": 4, "additional_vocab_size": 0, "hidden_act": "gelu"},
    ),
}
# Text before the first image, several images, and one without any.
ROWS = ([3, IMAGE, 4], [IMAGE, 2, IMAGE, 5], [6], [2, IMAGE, IMAGE, 1])


def config_for(name):
    vision, resampler, options = CASES[name]
    return transformers.IdeficsConfig(
        vision_config=VISION | vision,
        perceiver_config=RESAMPLER | (resampler or {}),
        use_resampler=resampler is not None,
        **LANGUAGE | options,
    )


def theirs(stream):
    """Who sees what: each token the last image before it, as their processor says it."""
    import torch

    count = stream.images.shape[1]
    last = np.maximum.accumulate(stream.place, axis=1)
    seen = last[:, :, None] == np.arange(count)
    pixels = stream.images.transpose(0, 1, 4, 2, 3)
    return {
        **stream.theirs,
        "pixel_values": torch.tensor(pixels),
        "image_attention_mask": torch.tensor(seen.astype(np.int64)),
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    reference = transformers.IdeficsForVisionText2Text(config_for(name))
    check(reference, tmp_path, rows=ROWS, theirs=theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: setattr(hf, "cross_layer_interval", 3), "every=3 is no divisor"),
        (lambda hf: setattr(hf.vision_config, "image_size", [24, 16]), "equal height and width"),
    ],
)
def test_refused(change, message):
    config = config_for("as published")
    change(config)
    with pytest.raises(ValueError, match=message):
        refused("IdeficsForVisionText2Text", config)


# Two images one after the other, apart, none, and one at the end; as a text, and as theirs.
IMAGES = [processors.picture(seed, 20 + 9 * seed, 40) for seed in range(5)]
TEXTS = ["a red <image> <image>dog :", "<image>\n cat\n<image>", "cat", " user : <image>"]
PARTS = [
    ["a red ", IMAGES[0], IMAGES[1], "dog :"],
    [IMAGES[2], "\n cat\n", IMAGES[3]],
    ["cat"],
    [" user : ", IMAGES[4]],
]


def saved_processor(directory, words=(AROUND, "<image>"), **options):
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    theirs = transformers.IdeficsProcessor(
        IdeficsImageProcessorPil(**options), processors.tokenizer(*words)
    )
    return theirs, processors.save(directory, theirs)


@pytest.mark.parametrize(
    "options",
    [{"image_size": 24}, {"size": {"height": 18, "width": 18}, "image_mean": [0.1] * 3}],
)
def test_processor(options, tmp_path):
    original, directory = saved_processor(tmp_path, **options)
    wanted = original(text=PARTS, padding=True, padding_side="left", return_tensors="pt")
    batch = load_processor(directory)(images=IMAGES, text=TEXTS)
    np.testing.assert_array_equal(batch["tokens"], wanted["input_ids"])
    np.testing.assert_array_equal(batch["mask"], wanted["attention_mask"].bool())
    pixels = wanted["pixel_values"].numpy().transpose(0, 1, 3, 4, 2)
    np.testing.assert_array_equal(batch["images"], pixels)
    seen = np.maximum.accumulate(batch["place"], axis=1)[:, :, None] == np.arange(pixels.shape[1])
    np.testing.assert_array_equal(seen, wanted["image_attention_mask"].bool())


def test_processor_refuses(tmp_path):
    _, directory = saved_processor(tmp_path, image_size=24, image_num_channels=1)
    with pytest.raises(ProcessorConfigError, match="image_num_channels=1"):
        load_processor(directory)


END_OF_UTTERANCE = "<end_of_utterance>"


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    """A model whose last token is not that of images, its processor, and the directory of both.

    Its images' tokens are the most probable ones: their rows of the head are large.
    """
    directory = tmp_path_factory.mktemp("instructed")
    words = (AROUND, "<image>", END_OF_UTTERANCE)
    original, _ = saved_processor(directory, words, image_size=VISION["image_size"])
    config, ids = config_for("as published"), original.tokenizer.get_vocab()
    config.vocab_size, config.additional_vocab_size = len(ids) - len(words), len(words)
    config.eos_token_id = ids["</s>"]
    reference = hf.randomise(transformers.IdeficsForVisionText2Text(config))
    for name, parameter in reference.named_parameters():
        if "alpha" in name:
            parameter.data.fill_(0.7)
        if name == "lm_head.additional_fc.weight":
            parameter.data[:2] *= 20
    reference.save_pretrained(directory)
    return reference, original, directory


def test_what_follows_an_end_sees_no_image_until_the_next(instructed):
    """The id of images is the tokenizer's, and who sees what is as their processor says it."""
    import torch

    reference, original, directory = instructed
    parts = ["a", IMAGES[0], "dog</s> cat", IMAGES[1], "red</s> dog a"]
    inputs = original(text=[parts], return_tensors="pt")
    seen = inputs["image_attention_mask"][0].any(-1).numpy()
    assert (np.diff(seen.astype(int)) != 0).sum() == 4
    with torch.no_grad():
        expected = reference(**inputs).logits
    model, ids = mmjax.convert.from_pretrained(directory), original.tokenizer.get_vocab()
    assert (model.config.image_token, model.config.sight_ends) == (ids["<image>"], (ids["</s>"],))
    texts = "a <image> dog</s> cat <image> red</s> dog a"
    batch = load_processor(directory)(images=IMAGES[:2], text=texts)
    np.testing.assert_array_equal(batch["tokens"], inputs["input_ids"])
    logits = forward(model, batch["tokens"], batch["images"], batch["mask"])
    parity.close("IdeficsForVisionText2Text", "logits", logits, expected)


def test_special_tokens_are_saved(instructed, tmp_path):
    """Beside the tokenizer, and without one."""
    directory, ids = instructed[2], instructed[1].tokenizer.get_vocab()
    config = mmjax.convert.from_pretrained(directory).config
    for name, like in (("with", directory), ("without", tmp_path)):
        model = mmjax.convert.from_pretrained(directory)
        mmjax.convert.save_pretrained(model, tmp_path / name, like=like)
        said = json.loads((tmp_path / name / "config.json").read_text())
        assert (said["image_token_id"], said["eos_token_id"]) == (ids["<image>"], ids["</s>"])
        assert mmjax.convert.from_pretrained(tmp_path / name).config == config
    load_processor(tmp_path / "with")
    file = tmp_path / "with" / "config.json"
    file.write_text(json.dumps(said | {"image_token_id": ids[END_OF_UTTERANCE]}))
    with pytest.raises(ConversionError, match="'<image>' is 15 in the tokenizer"):
        mmjax.convert.from_pretrained(tmp_path / "with")
    with pytest.raises(ProcessorConfigError, match="the id of '<image>' is 15"):
        load_processor(tmp_path / "with")
    file.write_text(json.dumps(said | {"vocab_size": 10}))
    with pytest.raises(ValueError, match="do not belong together"):
        load_processor(tmp_path / "with")


def test_what_an_instructed_model_says(instructed):
    """It ends with an utterance, and says no image, as their guide bans those words."""
    reference, original, directory = instructed
    ids = original.tokenizer.get_vocab()
    images, end = [ids[AROUND], ids["<image>"]], ids[END_OF_UTTERANCE]
    inputs = original(text=[["a", IMAGES[0], "dog"]], return_tensors="pt")
    start = inputs["input_ids"].shape[1]

    def written(**options):
        given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
        return reference.generate(**inputs, **given, eos_token_id=[ids["</s>"], end])[0, start:]

    assert np.isin(written(), images).any()
    said = written(bad_words_ids=[[image] for image in images]).tolist()
    speaker = open_speaker(directory)
    assert speaker.speech.ends == [ids["</s>"], end]
    prompt = speaker.speech.text("a <image> dog", IMAGES[:1])
    np.testing.assert_array_equal(speaker([prompt], max_new_tokens=6).tokens, [said])
    # More may be suppressed beside.
    others = speaker([prompt], max_new_tokens=1, suppress=[said[0]]).tokens[0, 0]
    assert others not in {said[0], *images}


def test_generate(tmp_path, capsys):
    """The command, on a directory as transformers writes it; the tokens of images are new ones."""
    config = config_for("as published")
    original, directory = saved_processor(tmp_path, image_size=VISION["image_size"])
    config.vocab_size = len(original.tokenizer) - config.additional_vocab_size
    reference = transformers.IdeficsForVisionText2Text(config)
    parity.save_hf(reference, directory)
    file = tmp_path / "picture.png"
    IMAGES[0].save(file)
    inputs = original(text=[["a", IMAGES[0], "dog"]], return_tensors="pt")
    images = [[token] for token in original.tokenizer.convert_tokens_to_ids([AROUND, "<image>"])]
    options = {"do_sample": False, "pad_token_id": 0, "bad_words_ids": images}
    ids = reference.generate(**inputs, max_new_tokens=4, **options)
    said = original.tokenizer.decode(ids[0, -4:], skip_special_tokens=True)
    assert said.strip()
    options = ("--image", str(file), "--prompt", "a <image> dog", "--max-new-tokens", "4")
    assert generate.main(["--weights", str(directory), *options]) == 0
    assert capsys.readouterr().out == f"{said}\n"
