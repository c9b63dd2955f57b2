"""Idefics3 and SmolVLM of transformers, both ways."""

import json

import hf
import numpy as np
import processors
import pytest
from towers import refused
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, check

import mmjax.convert
from mmjax.convert.families.idefics3 import regular_positions
from mmjax.data.idefics3 import AROUND
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor
from mmjax.data.visual import LAYOUTS

transformers = hf.transformers()
pytestmark = pytest.mark.torch

DEPENDS_ON_THE_CPU = (19, 36, 37, 38, 40, 54, 59)
# name -> (prefix of the classes, options of the tower, of the language model and of the whole)
CASES = {
    "idefics3, every second patch": (
        "Idefics3",
        {"image_size": 32, "num_channels": 1, "hidden_act": "quick_gelu"},
        {"num_key_value_heads": 1},
        {"scale_factor": 2},
    ),
    "idefics3, pixels that fill no patch": (
        "Idefics3",
        {"image_size": 28, "layer_norm_eps": 1e-3},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "num_key_value_heads": 4,
        },
        {"scale_factor": 3, "tie_word_embeddings": True},
    ),
    "smolvlm, one token an image": (
        "SmolVLM",
        {"hidden_size": 24, "num_attention_heads": 3},
        {"hidden_size": 48, "head_dim": 10},
        {"scale_factor": 3},
    ),
    "smolvlm, tied": (
        "SmolVLM",
        {"image_size": 48, "num_hidden_layers": 1},
        {"attention_bias": True},
        {"scale_factor": 2, "tie_word_embeddings": True},
    ),
}


def config_for(name):
    prefix, vision, text, options = CASES[name]
    return getattr(transformers, f"{prefix}Config")(
        vision_config=VISION | vision,
        text_config=transformers.LlamaConfig(**LANGUAGE | text),
        image_token_id=IMAGE_TOKEN,
        **options,
    )


def theirs(stream):
    """Pictures by row; those of zeros are left out by the models."""
    import torch

    pixels = stream.images.transpose(0, 1, 4, 2, 3)
    return {**stream.theirs, "pixel_values": torch.tensor(pixels)}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    prefix = CASES[name][0]
    reference = getattr(transformers, f"{prefix}ForConditionalGeneration")(config_for(name))
    check(reference, tmp_path, theirs=theirs, origin=not name.startswith("smolvlm, tied"))


def test_first_checkpoints():
    """Those of SmolVLM 256M and 500M say of the tower what is true of the whole."""
    config = config_for("idefics3, every second patch")
    content = config.to_dict()
    content["vision_config"]["model_type"] = "idefics3"
    family = mmjax.convert.family.families()["Idefics3ForConditionalGeneration"]
    old, new = (
        family.from_hf(mmjax.convert.Source(hf_config, frozenset(), None))
        for hf_config in (transformers.Idefics3Config.from_dict(content), config)
    )
    assert old == new


def test_positions_of_patches():
    """Sides with a place for each patch are those of transformers, on CPUs of any vectors."""
    import torch
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    for side in range(1, 65):
        config = transformers.Idefics3VisionConfig(
            image_size=side, patch_size=1, hidden_size=1, num_channels=1, num_attention_heads=1
        )
        embeddings = Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            pixels = torch.zeros(1, 1, side, side)
            found = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
        regular = np.array_equal(found[0, :, 0].numpy(), np.arange(side**2))
        refused = not regular_positions(side)
        assert refused == (not regular) or (refused and side in DEPENDS_ON_THE_CPU), side
    # Those of published checkpoints: SmolVLM of 256 million and 2.2 billion parameters, Idefics3.
    assert regular_positions(32) and regular_positions(27) and regular_positions(26)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: setattr(hf.vision_config, "image_size", 200), "25 patches a side"),
        (lambda hf: setattr(hf, "scale_factor", 5), "factor=4 is the nearest"),
        (lambda hf: setattr(hf.text_config, "model_type", "t5"), "model_type='t5'"),
    ],
)
def test_refused(change, message):
    config = config_for("idefics3, every second patch")
    change(config)
    with pytest.raises(ValueError, match=message):
        refused("Idefics3ForConditionalGeneration", config)


SPECIAL = ["<image>", AROUND, "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)]


def byte_tokenizer():
    """Byte-level like Llama 3's: two line breaks are one token, and one is another."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", *SPECIAL],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["User: a red dog\n\n", "a cat\n\n"] * 9, trainer)
    assert len(backend.encode("\n\n").ids) == 1
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", additional_special_tokens=SPECIAL
    )


# A board of 2 x 3 tiles and one of 3 x 1, no image, and one that is scaled up.
IMAGES = [
    [processors.picture(0, 61, 40), processors.picture(1, 20, 90)],
    [],
    [processors.picture(2, 9, 8)],
]
TEXTS = ["User:<image>a red\n<image> dog", "a cat", "<image>\n\na red cat"]
OPTIONS = {
    "as published": {},
    "whole": {"do_image_splitting": False},
    "one tile": {"size": {"longest_edge": 16}},
    "another mean": {"size": {"longest_edge": 50}, "image_mean": [0.1, 0.2, 0.3], "resample": 3},
}


def saved_processor(directory, **options):
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
    theirs = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(**sizes | options),
        byte_tokenizer(),
        image_seq_len=4,
    )
    return theirs, processors.save(directory, theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_processor(name, tmp_path):
    theirs, directory = saved_processor(tmp_path, **OPTIONS[name])
    batch = processors.check(directory, theirs, IMAGES, TEXTS, by_row=True)
    for row, group in zip(batch["place"], IMAGES, strict=True):
        np.testing.assert_array_equal(row[row >= 0], np.arange((row >= 0).sum()))
        assert (row >= 0).any() == bool(group)
    if name == "as published":
        assert batch["images"].shape == (3, 7 + 4, 16, 16, 3)


def test_processor_of_smolvlm(tmp_path):
    """It is that of Idefics3 under another name; that of transformers needs another package."""
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    theirs, directory = saved_processor(tmp_path)
    path = directory / "processor_config.json"
    content = json.loads(path.read_text()) | {"processor_class": "SmolVLMProcessor"}
    content["image_processor"]["image_processor_type"] = "SmolVLMImageProcessor"
    path.write_text(json.dumps(content))
    image = IMAGES[0][0]
    batch = load_processor(directory)(images=image, text="a <image> dog")
    prompt = get_image_prompt_string(2, 3, 4, AROUND, "<image>", "<global-img>")
    assert batch["tokens"].tolist() == [theirs.tokenizer(f"a {prompt} dog").input_ids]
    images = transformers.SmolVLMImageProcessorPil.from_pretrained(directory)
    pixels = images([[image]], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(batch["images"], pixels.transpose(0, 1, 3, 4, 2))


@pytest.mark.parametrize("longest", [16, 33, 48, 64])
def test_layout(longest):
    """Boards and pictures of images of many shapes."""
    options = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": 16}}
    theirs = transformers.Idefics3ImageProcessorPil(**options, return_row_col_info=True)
    layout = LAYOUTS["idefics3"]("idefics3", 16, 4, longest)
    for width, height in ((48, 48), (100, 3), (3, 100), (33, 32), (32, 33), (16, 16), (1, 700)):
        image = processors.picture(width, width, height)
        wanted = theirs([[image]], return_tensors="np")
        plan, pictures = layout.plan(width, height), layout.pictures(image)
        rows, columns = wanted["rows"][0][0], wanted["cols"][0][0]
        assert plan.pictures == rows * columns + 1 == len(pictures)
        assert plan.tokens == 4 * plan.pictures
        pixels = wanted["pixel_values"][0].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(pictures, pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"size": {"height": 9, "width": 9}}, "expected longest_edge"),
        ({"size": {"longest_edge": 5000}}, "longest=5000"),
    ],
)
def test_processors_that_are_refused(options, message, tmp_path):
    _, directory = saved_processor(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        load_processor(directory)


def test_a_processor_and_a_model_that_disagree(tmp_path):
    _, directory = saved_processor(tmp_path)
    config_for("idefics3, every second patch").save_pretrained(directory)
    with pytest.raises(ProcessorConfigError, match="the size of pictures is 16 in the processor"):
        load_processor(directory)
