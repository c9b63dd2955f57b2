"""PaliGemma of transformers, both ways: Gemma 1 and 2, whose prefixes see themselves."""

import hf
import numpy as np
import processors
import pytest
from towers import long, refused
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, Stream, check

from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor

transformers = hf.transformers()
pytestmark = pytest.mark.torch

NAME = "PaliGemmaForConditionalGeneration"

# name -> class of the language model's config, and options as in `test_llava`
CASES = {
    "gemma": ("GemmaConfig", {}, {"head_dim": 10, "num_key_value_heads": 1}, {}),
    "gemma, not tied": (
        "GemmaConfig",
        {"hidden_size": 24, "num_attention_heads": 3, "image_size": 20},
        {"head_dim": 6, "vocab_size": IMAGE_TOKEN - 2},  # the placeholder has no vector
        {"tie_word_embeddings": False},
    ),
    "gemma 2": (
        "Gemma2Config",
        {"num_hidden_layers": 3},
        {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}
        | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 12},
        {},
    ),
}


def config_of(name):
    text, vision_options, text_options, options = CASES[name]
    vision = VISION | {"vision_use_head": False} | vision_options
    return transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**vision),
        text_config=getattr(transformers, text)(**LANGUAGE | text_options),
        image_token_index=IMAGE_TOKEN,
        projection_dim=LANGUAGE["hidden_size"],
        **options,
    )


def reference(name):
    # "eager": the other ways do not cap attention.
    return getattr(transformers, NAME)._from_config(config_of(name), attn_implementation="eager")


def prefix(stream: Stream):
    """With what says that all is prefix, as the processor does."""
    return stream.theirs | {"token_type_ids": long(np.zeros_like(stream.tokens))}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    origin, generator = name != "gemma 2", name == "gemma"
    check(reference(name), tmp_path, theirs=prefix, origin=origin, generator=generator)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """(processor of transformers, directory of a case without weights)"""
    letters = [*"abcdefghijklmnopqrstuvwxyz ", "\n"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = [*special, *(letter.replace(" ", "\u2581") for letter in letters)]
    tokenizer = transformers.GemmaTokenizer({word: i for i, word in enumerate(vocabulary)}, [])
    images = transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images.image_seq_length = 9
    theirs = transformers.PaliGemmaProcessor(images, tokenizer)
    config = config_of("gemma")
    config.image_token_index = theirs.image_token_id
    config.text_config.vocab_size = theirs.image_token_id  # the image's token has no vector
    return theirs, processors.save(tmp_path_factory.mktemp("paligemma"), theirs, config)


def test_processor(directory):
    theirs, path = directory
    images = [[processors.picture(0, 40, 30)], [processors.picture(1, 9, 61)]]
    inferred = processors.check(path, theirs, images, ["answer en where", "caption\nit"])
    said = processors.check(path, theirs, images, ["<image>answer en where", "<image>caption\nit"])
    for name, value in inferred.items():
        np.testing.assert_array_equal(value, said[name])
    images = [[processors.picture(2, 24, 24), processors.picture(3, 50, 50)], images[0]]
    batch = processors.check(path, theirs, images, ["<image><image>which", "<image>a"])
    assert (batch["place"] >= 0).sum(1).tolist() == [18, 9]
    inferred = load_processor(path)(images=images, text=["which", "a"])["tokens"]
    np.testing.assert_array_equal(
        inferred, theirs(images, ["which", "a"], padding=True)["input_ids"]
    )
    text = load_processor(path)(text="where")["tokens"]
    assert theirs.tokenizer.decode(text[0]) == "<bos>where\n"


def test_what_does_not_fit_is_refused(directory, tmp_path):
    theirs, _ = directory
    config = config_of("gemma")
    config.image_token_index = theirs.image_token_id
    config.projection_dim = 20
    with pytest.raises(ValueError, match="projection_dim=20 must be the width"):
        refused(NAME, config)
    config.vision_config.image_size = 16
    with pytest.raises(ProcessorConfigError, match=r"size of pictures is 24 .* and 16"):
        load_processor(processors.save(tmp_path, theirs, config))
