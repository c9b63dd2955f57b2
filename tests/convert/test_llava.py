"""LLaVA of transformers, both ways: towers, language models and options of both; its processor."""

import dataclasses
import json
import re

import hf
import numpy as np
import parity
import processors
import pytest
from flax import nnx
from towers import refused, rewrite, same_parameters
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, check

import mmjax.convert
from mmjax.config import dataclass_from, split_name
from mmjax.connectors import LinearConfig, MLPConfig, make_connector
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor
from mmjax.models import MODELS

transformers = hf.transformers()
pytestmark = pytest.mark.torch

NAME = "LlavaForConditionalGeneration"

# name -> (class of the tower's config, of the language model's, options of each and of the whole)
CASES = {
    "as published": ("CLIPVisionConfig", "LlamaConfig", {}, {}, {}),
    "last block and class token, qwen2": (
        "CLIPVisionConfig",
        "Qwen2Config",
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "several blocks, mistral": (
        "CLIPVisionConfig",
        "MistralConfig",
        {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3},
        {"sliding_window": 7},
        {"vision_feature_layer": [1, -1, -3], "multimodal_projector_bias": False},
    ),
    "siglip, gemma 2": (
        "SiglipVisionConfig",
        "Gemma2Config",
        {"image_size": 20},
        {"head_dim": 10, "final_logit_softcapping": 1.0, "attn_logit_softcapping": None},
        {"vision_feature_layer": 2, "vision_feature_select_strategy": "full"},
    ),
}


def config_of(name):
    vision, text, vision_options, text_options, options = CASES[name]
    return transformers.LlavaConfig(
        vision_config=getattr(transformers, vision)(**VISION | vision_options),
        text_config=getattr(transformers, text)(**LANGUAGE | text_options),
        image_token_index=IMAGE_TOKEN,
        **options,
    )


def reference(name):
    return getattr(transformers, NAME)(config_of(name))


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    origin, generator = name != "siglip, gemma 2", name == "as published"
    check(reference(name), tmp_path, origin=origin, generator=generator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return parity.save_hf(reference("as published"), tmp_path_factory.mktemp("llava") / "source")


@pytest.mark.parametrize(
    "changes",
    [
        # Of transformers 4.52 to 4.57, and as published before.
        (
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head", "lm_head"),
            (r"^(vision_tower\.)", r"model.\1vision_model."),
            (r"^(multi_modal_projector)", r"model.\1"),
        ),
        ((r"^(vision_tower\.)", r"\1vision_model."),),
    ],
)
def test_names_of_other_versions(saved, changes, tmp_path):
    def change(tensors):
        for pattern, replacement in changes:
            tensors = {re.sub(pattern, replacement, name): x for name, x in tensors.items()}
        return tensors

    other = rewrite(saved, tmp_path / "other", change)
    same_parameters(*map(mmjax.convert.from_pretrained, (saved, other)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("as published", {"vision_feature_layer": 0}, "0 is not the output of one of the 2"),
        ("as published", {"vision_feature_layer": [-1, -3]}, "-3 is not the output"),
        ("as published", {"vision_feature_layer": 3}, "3 is not the output"),
        ("as published", {"projector_hidden_act": "mish"}, "projector_hidden_act='mish'"),
        ("siglip, gemma 2", {"vision_feature_select_strategy": "default"}, "has none"),
        (
            "as published",
            {"text_config": transformers.FalconConfig()},
            "text_config has model_type='falcon'",
        ),
        (
            "as published",
            {"vision_config": transformers.Siglip2VisionConfig()},
            "vision_config has model_type='siglip2_vision_model'.*did you mean 'siglip_vision",
        ),
        (
            "as published",
            {"vision_config": transformers.CLIPVisionConfig(hidden_act="mish")},
            "vision_config: hidden_act='mish'",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(name, options, message):
    config = config_of(name)
    for field, value in options.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        refused(NAME, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"connector": MLPConfig(layers=3)}, r"connector\.layers=3"),
        ({"connector": LinearConfig()}, "the connector is 'linear'; the format has 'mlp' only"),
        ({"features_norm": True}, "features_norm=True"),
    ],
)
def test_a_model_that_the_format_cannot_say_is_not_saved(saved, change, message, tmp_path):
    model = mmjax.convert.from_pretrained(saved)
    model.config = dataclasses.replace(model.config, **change)
    model.connector = make_connector(model.config.connector, 32, 32, rngs=nnx.Rngs(0))
    with pytest.raises(mmjax.convert.ConversionError, match=message):
        mmjax.convert.save_pretrained(model, tmp_path / "target")


def test_another_resolution(saved, tmp_path):
    model = mmjax.convert.from_pretrained(saved, image_size=40)
    assert model.config.image_tokens == 25
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    theirs = getattr(transformers, NAME).from_pretrained(tmp_path / "target")
    assert theirs.config.vision_config.image_size == 40 and theirs.config.image_seq_length == 25
    positions = theirs.model.vision_tower.embeddings.position_embedding.weight
    np.testing.assert_array_equal(positions.detach(), model.encoder.position.embedding)


def test_an_experiment_takes_the_model(saved):
    model = mmjax.convert.from_pretrained(saved)
    name, fields = split_name(mmjax.convert.model_config(saved), "config.model")
    assert dataclass_from(MODELS[name][0], fields, "config.model") == model.config


def image_processor(kind, **options):
    sizes = {"size": {"shortest_edge": 24}, "crop_size": 24}
    sizes = {"size": {"height": 24, "width": 24}} if kind.startswith("Siglip") else sizes
    return getattr(transformers, f"{kind}ImageProcessorPil")(**sizes, **options)


# class of the image processor, its options, those of the processor; config as in `CASES`
PROCESSORS = {
    "as published": ("CLIP", {}, {"num_additional_image_tokens": 1}),
    "last block and class token, qwen2": ("CLIP", {}, {"num_additional_image_tokens": 1}),
    "several blocks, mistral": ("Llava", {"do_pad": True}, {"num_additional_image_tokens": 1}),
    "siglip": ("Siglip", {}, {"image_token": "<picture>"}),
}
IMAGES = [
    [processors.picture(0, 40, 30)],
    [processors.picture(1, 24, 61).convert("L").convert("RGB"), processors.picture(2, 24, 24)],
    [],
]
TEXTS = ["user: <image> a red dog", "<image>\na cat <image> red; user: a dog !", "dog"]


def directory_of(name, directory):
    kind, image_options, options = PROCESSORS[name]
    config = config_of(name if name in CASES else "as published")
    if kind == "Siglip":
        config.vision_config = transformers.SiglipVisionConfig(**VISION)
        config.vision_feature_select_strategy = "full"
    token = options.get("image_token", "<image>")
    tokenizer = processors.tokenizer(token)
    config.image_token_index = tokenizer.convert_tokens_to_ids(token)
    theirs = transformers.LlavaProcessor(
        image_processor(kind, **image_options),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=processors.TEMPLATE,
        **options,
    )
    return theirs, processors.save(directory, theirs, config)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor(name, tmp_path):
    theirs, directory = directory_of(name, tmp_path)
    texts = [text.replace("<image>", theirs.image_token) for text in TEXTS]
    batch = processors.check(directory, theirs, IMAGES, texts)
    assert batch["images"].shape == (3, 2, 24, 24, 3)
    counts = (batch["place"] >= 0).sum(1)
    each = counts[0]
    assert counts.tolist() == [each, 2 * each, 0] and each == (10 if "class" in name else 9)
    for row, count in zip(batch["place"], counts, strict=True):
        np.testing.assert_array_equal(row[row >= 0], np.arange(count))


def test_chat(tmp_path):
    theirs, directory = directory_of("as published", tmp_path)
    processor = load_processor(directory)
    image = processors.picture(3, 50, 20)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "a red dog"}]
    talk = [{"role": "user", "content": parts}]
    options = {"add_generation_prompt": True}
    wanted = theirs.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_tensors="np", **options
    )
    places = [{"role": "user", "content": [{"type": "image"}, parts[1]]}]
    for batch in (
        processor.apply_chat_template(talk, **options),
        processor.apply_chat_template(places, images=image, **options),
    ):
        np.testing.assert_array_equal(batch["tokens"], wanted["input_ids"])
        pixels = wanted["pixel_values"].transpose(0, 2, 3, 1)[None]
        np.testing.assert_array_equal(batch["images"], pixels)
    # As older versions wrote templates.
    (directory / "chat_template.jinja").unlink()
    template = json.dumps({"chat_template": processors.TEMPLATE})
    (directory / "chat_template.json").write_text(template)
    text = load_processor(directory).apply_chat_template(talk, tokenize=False, **options)
    assert text == theirs.apply_chat_template(talk, **options)
    with pytest.raises(ValueError, match="without an image"):
        processor.apply_chat_template(places)


def test_batches_that_cannot_be_made(tmp_path):
    _, directory = directory_of("as published", tmp_path)
    processor = load_processor(directory)
    image = processors.picture(0, 30, 30)

    def says(message, kind=ValueError, **call):
        with pytest.raises(kind, match=message):
            processor(**call)

    says("neither images nor text")
    says("1 image.s., but 1 text.s. with places for 2", images=image, text="<image> a <image>")
    says("2 lists of images for 1 text", images=[[image], [image]], text="<image>")
    says("has 1 '<image>' but 0 image", text="<image> a dog")
    says("has 0 '<image>' but 1 image.s.: 'b'", images=[[image], [image]], text=["<image>", "b"])
    says("images and lists of images", images=[image, [image]], text=["<image>", "<image>"])
    says("must not cut images", images=image, text="<image> a", truncation=True, max_length=7)
    says("has 11 tokens where the model takes 7", images=image, text="<image> a", max_length=7)
    says("9 x 9|24 x 24", ProcessorConfigError, images=image, text="<image>", crop_size=9)
    assert processor(text="a dog").keys() == {"tokens", "mask"}
    assert processor(images=[image, image])["images"].shape == (2, 1, 24, 24, 3)


def test_directories_that_disagree(tmp_path):
    _, directory = directory_of("as published", tmp_path)
    path = directory / "processor_config.json"
    content = json.loads(path.read_text())

    def says(message, **changes):
        changed = {k: v for k, v in (content | changes).items() if v is not None}
        path.write_text(json.dumps(changed))
        with pytest.raises(ProcessorConfigError, match=message):
            load_processor(directory)

    says("patch_size is 7 in the processor's files and 8 in config.json", patch_size=7)
    says("select_strategy is 'full' in the", vision_feature_select_strategy="full")
    images = content["image_processor"] | {"crop_size": {"height": 16, "width": 16}}
    says("the size of pictures is 16 in the processor's files and 24", image_processor=images)
    says("squares of one size", image_processor=images | {"do_center_crop": False})
    model = transformers.LlavaConfig.from_pretrained(directory)
    model.image_token_index = 3
    model.save_pretrained(directory)
    says("the id of '<image>' is 14 in the processor's files and 3")
    model.image_token_index = 14
    model.save_pretrained(directory)
    # An old directory says little; the model says the rest.
    path.write_text(json.dumps({"image_processor": content["image_processor"]}))
    batch = load_processor(directory)(images=IMAGES[0], text=TEXTS[0])
    assert (batch["place"] >= 0).sum() == 9
