"""Janus, both ways: reading, drawing with guidance, gradients, its image tower alone."""

import dataclasses
import functools
import json

import hf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import processors
import pytest
from towers import QUICK, check, long, quick, refused, rewrite, same_files, saved_without_origin
from vlms import LANGUAGE, NEW_TOKENS, greedy, stream

import mmjax.convert
from mmjax import params
from mmjax.config import dataclass_from, split_name
from mmjax.connectors import LinearConfig, PixelShuffleConfig
from mmjax.data.load_processor import load_processor
from mmjax.models import MODELS, Janus

transformers = hf.transformers()
pytestmark = pytest.mark.torch

NAME = "JanusForConditionalGeneration"
# Text has the ids 3 to 48.
PAD, BOS, BEGIN, PLACEHOLDER = 0, 1, 2, 49
ROWS = ([3, "image", 4], ["image", 2, "image", 5], [6])
VISION = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 1.5},
    **{"image_size": 8, "patch_size": 2, "projection_dim": 32, "num_image_tokens": 16},
}
# Group norms of transformers have 32 groups.
TOKENIZER = {
    **{"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1},
    **{"num_embeddings": 19, "embed_dim": 6, "latent_channels": 10},
    **{"projection_dim": 32, "image_token_embed_dim": 32},
}
# name -> options of the image tower, of the tokenizer, of the language model, of the whole
CASES = {
    "as published": ({}, {}, {}, {"tie_word_embeddings": False}),
    "norms of queries and keys, one linear map each, tied": (
        {"use_qk_norm": True, "num_attention_heads": 1, "attention_bias": False, "depth": 1},
        {"num_hidden_layers": 1, "hidden_act": "silu", "num_res_blocks": 2},
        {"num_key_value_heads": 4},
        {},
    ),
    "deeper, three levels, narrow qwen2": (
        {
            **{"image_size": 12, "patch_size": 4, "num_image_tokens": 9, "projection_dim": 24},
            **{"depth": 3, "num_hidden_layers": 3, "hidden_act": "gelu_pytorch_tanh"},
        },
        {
            **{"channel_multiplier": [1, 1, 2], "num_hidden_layers": 3, "num_embeddings": 40},
            **{"projection_dim": 24, "image_token_embed_dim": 24},
        },
        {"class": "Qwen2Config", "hidden_size": 24, "num_attention_heads": 6},
        {},
    ),
}


def config_of(name):
    vision, tokenizer, text, options = CASES[name]
    text = LANGUAGE | text
    return transformers.JanusConfig(
        vision_config=transformers.JanusVisionConfig(**VISION | vision),
        vq_config=transformers.JanusVQVAEConfig(**TOKENIZER | tokenizer),
        text_config=getattr(transformers, text.pop("class", "LlamaConfig"))(**text),
        image_token_id=PLACEHOLDER,
        **options,
    )


def reference(name):
    theirs = getattr(transformers, NAME)(config_of(name))
    # Codes that differ more than they do at first.
    aligner = theirs.model.generation_aligner
    for linear in (aligner.fc1, *aligner.hidden_layers):
        linear.weight.data *= 10
    theirs.model.generation_embeddings.weight.data *= 50
    theirs.model.generation_head.vision_head.weight.data *= 20
    settings = theirs.generation_config
    # Else transformers does not read what it has written.
    settings._from_model_config = False
    settings.bos_token_id, settings.pad_token_id = BOS, PAD
    settings.generation_kwargs = {"boi_token_id": BEGIN}
    return theirs


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Theirs, ours and the directory of one config."""
    theirs = reference(request.param)
    directory = parity.save_hf(theirs, tmp_path_factory.mktemp("janus") / "source")
    return theirs, mmjax.convert.from_pretrained(directory), directory


def run(model, tokens, images, mask, place=None):
    def call(model, tokens, images, mask, place):
        return model.run(tokens, images, mask, place=place)

    return quick(model, tokens, images, mask, place, function=call)


def drawing(ids, first):
    """A prompt for an image, and the ids of its codes but the last, padded on the left."""
    rng = np.random.default_rng(2)
    prompts = [[BOS, *rng.integers(3, 49, count), BEGIN] for count in (2, 4)]
    length = max(map(len, prompts))
    tokens = np.array([[PAD] * (length - len(row)) + row for row in prompts], np.int32)
    mask = np.arange(length) >= length - np.array([[len(row)] for row in prompts])
    codes = ids[:, :-1] + first
    return tokens, mask, np.concatenate([tokens, codes], axis=1).astype(np.int32)


def drawn(theirs, tokens, mask, ids):
    """The logits of transformers for the codes after such rows."""
    import torch

    words = theirs.get_input_embeddings()(long(tokens))
    codes = theirs.prepare_embeddings_for_image_generation(long(ids[:, :-1]))
    out = theirs.model.language_model(
        inputs_embeds=torch.cat([words, codes], dim=1),
        attention_mask=long(np.pad(mask, ((0, 0), (0, codes.shape[1])), constant_values=1)),
    )
    hidden = out.last_hidden_state[:, tokens.shape[1] - 1 :]
    return theirs.model.generation_head(hidden)


def test_reads_as_transformers_does(pair):
    import torch

    theirs, model, _ = pair
    batch = stream(model.config, ROWS)
    words = model.config.lm.vocab_size
    with torch.no_grad():
        expected = theirs(**batch.theirs).logits
        written = theirs.generate(
            **batch.theirs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
    never = model.following("never")
    # The model finds the places, or is told.
    for place in (None, batch.place):
        out = run(never, batch.tokens, batch.images, batch.mask, place)
        parity.close(NAME, "logits", out.logits[..., :words], expected, batch.mask)
        parity.same_argmax(out.logits, expected, batch.mask)
    np.testing.assert_array_equal(greedy(never, batch), written[:, -NEW_TOKENS:])


def test_draws_as_transformers_does(pair):
    import torch

    theirs, model, _ = pair
    config, first = model.config, model.config.lm.vocab_size
    ids = np.random.default_rng(1).integers(0, config.image.size, (2, config.image.length))
    tokens, mask, whole = drawing(ids, first)
    with torch.no_grad():
        expected = drawn(theirs, tokens, mask, ids)
        picture = theirs.decode_image_tokens(long(ids))
    valid = np.pad(mask, ((0, 0), (0, ids.shape[1] - 1)), constant_values=True)
    out = run(model, whole, None, valid)
    logits = out.logits[:, tokens.shape[1] - 1 :]
    parity.close(NAME, "logits of codes", logits[..., first:], expected)
    # Words do not follow there.
    assert np.all(logits[..., :first] < -1e38)
    image = quick(model, ids + first, function=Janus.images_of)
    parity.close(NAME, "drawn images", image, picture)


@pytest.mark.parametrize("pair", ["as published"], indirect=True)
@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_guidance(pair, guidance):
    """Without a prompt is, in transformers, a prompt of padding that counts."""
    import torch

    theirs, model, _ = pair
    rng = np.random.default_rng(4)
    rows = [[BOS, *rng.integers(3, 49, count), BEGIN] for count in (3, 6, 1)]
    length = max(map(len, rows))
    tokens = np.array([[PAD] * (length - len(row)) + row for row in rows])
    mask = np.arange(length) >= length - np.array([[len(row)] for row in rows])
    with torch.no_grad():
        expected = theirs.generate(
            long(tokens),
            attention_mask=long(mask),
            generation_mode="image",
            do_sample=False,
            guidance_scale=guidance,
        )
    ids = mmjax.generate(
        model,
        rows,
        max_new_tokens=model.config.image.length,
        guidance=guidance,
        negative=[[token if token in (BOS, BEGIN) else PAD for token in row] for row in rows],
    )
    np.testing.assert_array_equal(ids - model.config.lm.vocab_size, expected)
    assert len(np.unique(expected)) > 3, "codes that are all the same show nothing"


@pytest.mark.parametrize("pair", list(CASES)[1:], indirect=True)
def test_gradients(pair):
    """Of random sums of the logits of words after images, and of codes."""
    import torch

    theirs, model, _ = pair
    config, first = model.config, model.config.lm.vocab_size
    batch = stream(config, ROWS[1:2])
    ids = np.random.default_rng(1).integers(0, config.image.size, (2, config.image.length))
    tokens, mask, whole = drawing(ids, first)
    theirs.zero_grad()
    both = theirs(**batch.theirs).logits, drawn(theirs, tokens, mask, ids)
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in both]
    sum((out * torch.tensor(w)).sum() for out, w in zip(both, weights, strict=True)).backward()
    valid = np.pad(mask, ((0, 0), (0, ids.shape[1] - 1)), constant_values=True)
    graph, arrays = params.split(model.following("any"))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def slopes(arrays, tokens, images, mask, whole, valid):
        def loss(arrays):
            model = params.merge(graph, arrays)
            read = model(tokens, images, mask)[..., :first]
            codes = model(whole, mask=valid)[:, -ids.shape[1] :, first:]
            return jnp.sum(read * weights[0]) + jnp.sum(codes * weights[1])

        return jax.grad(loss)(arrays)

    found = slopes(arrays, batch.tokens, batch.images, batch.mask, whole, valid)
    parity.check_gradients(NAME, model, found, theirs)


def test_round_trips(pair, tmp_path):
    _, model, directory = pair
    batch = stream(model.config, ROWS[1:2])
    call = lambda model: model(**batch.theirs).logits  # noqa: E731
    parity.check_round_trip(directory, tmp_path / "target", call)
    same_files(directory, tmp_path / "target")
    settings = [d / "generation_config.json" for d in (directory, tmp_path / "target")]
    assert settings[0].read_text() == settings[1].read_text()
    again = mmjax.convert.from_pretrained(directory)
    saved_without_origin(again, directory, tmp_path / "alone")
    assert mmjax.convert.from_pretrained(tmp_path / "alone").config == model.config
    # What transformers needs to draw is where it looks for it.
    theirs = getattr(transformers, NAME).from_pretrained(tmp_path / "alone")
    assert theirs.generation_config.generation_kwargs == {"boi_token_id": BEGIN}


@pytest.mark.parametrize("pair", ["as published"], indirect=True)
def test_another_begin_is_saved_where_transformers_reads_it(pair, tmp_path):
    _, _, directory = pair
    model = mmjax.convert.from_pretrained(directory)
    image = dataclasses.replace(model.config.image, begin=7)
    model.config = dataclasses.replace(model.config, image=image)
    mmjax.convert.save_pretrained(model, tmp_path / "target")
    settings = getattr(transformers, NAME).from_pretrained(tmp_path / "target").generation_config
    assert settings.generation_kwargs == {"boi_token_id": 7}
    assert (settings.bos_token_id, settings.pad_token_id) == (BOS, PAD)
    assert "generation_kwargs" not in json.loads((tmp_path / "target/config.json").read_text())


@pytest.mark.parametrize("pair", ["as published"], indirect=True)
def test_a_directory_must_say_what_begins_an_image(pair, tmp_path):
    _, _, directory = pair
    other = rewrite(directory, tmp_path / "other", lambda tensors: tensors)
    with pytest.raises(mmjax.convert.ConversionError, match=r"'generation_kwargs':.*boi_token_id"):
        mmjax.convert.from_pretrained(other)


@pytest.mark.parametrize("pair", ["as published"], indirect=True)
def test_an_experiment_takes_the_model(pair):
    _, model, directory = pair
    name, fields = split_name(mmjax.convert.model_config(directory), "config.model")
    assert dataclass_from(MODELS[name][0], fields, "config.model") == model.config


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("vision_config", {"use_qk_norm": True}, "use_qk_norm=True with num_attention_heads=3"),
        ("vision_config", {"projection_dim": 24}, "vision_config.projection_dim=24 is not the"),
        ("vision_config", {"num_image_tokens": 25}, "but an image has 16 codes"),
        ("vision_config", {"hidden_act": "mish"}, "vision_config: hidden_act='mish'"),
        ("vq_config", {"projection_dim": 48}, "vq_config.projection_dim=48 is not the width"),
        ("vq_config", {"image_token_embed_dim": 48}, "image_token_embed_dim=48 is not"),
        ("vq_config", {"double_latent": True}, "vq_config: double_latent=True"),
        ("vq_config", {"channel_multiplier": [1]}, r"takes images of \(8, 8, 3\).*of \(4, 4, 3\)"),
    ],
)
def test_what_cannot_be_computed_is_refused(part, options, message):
    config = config_of("as published")
    config.generation_kwargs = {"boi_token_id": BEGIN}
    for name, value in options.items():
        setattr(getattr(config, part), name, value)
    with pytest.raises(ValueError, match=message):
        refused(NAME, config)


@pytest.mark.parametrize("pair", ["as published"], indirect=True)
def test_what_the_format_cannot_say(pair):
    family, ours = mmjax.convert.family.families()[NAME], pair[1].config
    apart, encoder = ours.apart, ours.encoder
    for changes, message in (
        (dict(apart=None, image=dataclasses.replace(ours.image, ids=30)), "apart=None"),
        (dict(connector=PixelShuffleConfig()), "the connector is 'pixel_shuffle'"),
        (dict(connector=LinearConfig(bias=False)), "connector.bias=False"),
        (dict(features=(0,)), r"features=\(0,\)"),
        (dict(features_norm=False), "features_norm=False"),
        (dict(grid_positions=True), "grid_positions=True"),
        (dict(image=dataclasses.replace(ours.image, end=5)), "image.end=5"),
        (dict(apart=dataclasses.replace(apart, head_hidden=None)), "apart.head_hidden=None"),
        (dict(apart=dataclasses.replace(apart, embed_width=7)), "apart.embed_width=7"),
        (
            dict(encoder=dataclasses.replace(encoder, qk_norm_eps=1e-5)),
            "with num_attention_heads=3",
        ),
        (dict(encoder=dataclasses.replace(encoder, pooling="cls")), "encoder is none of those"),
    ):
        config = dataclasses.replace(ours, **changes)
        with pytest.raises(ValueError, match=message):
            mmjax.convert.save.say(family, config, frozenset())


@pytest.mark.parametrize(
    "options", [{}, {"use_qk_norm": True, "num_attention_heads": 1, "mlp_ratio": 2.3}]
)
def test_the_image_tower_alone(options, tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)

    def theirs(model, images):
        import torch

        out = model(torch.tensor(np.asarray(images).transpose(0, 3, 1, 2)))
        return {"tokens": out.last_hidden_state}

    check(
        "JanusVisionModel",
        transformers.JanusVisionModel(transformers.JanusVisionConfig(**VISION | options)),
        tmp_path,
        (jnp.asarray(images),),
        lambda model, images: {"tokens": model(images).tokens},
        theirs,
        gradients=bool(options),
    )


NAMED = {"image_token": "<image>", "boi_token": "<begin>", "eoi_token": "<end>"}
PICTURES = [
    [processors.picture(0, 30, 20)],
    [processors.picture(1, 9, 14), processors.picture(2, 80, 3)],
    [],
]
TEXTS = ["a red <image> dog", "<image> a <image> ; cat", "bot : !"]


@pytest.fixture(scope="module")
def directory_and_processor(tmp_path_factory):
    """A model with the processor of its tokens, as transformers writes them."""
    directory, theirs = tmp_path_factory.mktemp("processor"), reference("as published")
    tokenizer = processors.tokenizer(*NAMED.values(), extra_special_tokens=NAMED)
    images = transformers.JanusImageProcessorPil(
        size={"height": 8, "width": 8}, min_size=3, image_mean=[0.4, 0.5, 0.6]
    )
    theirs.config.image_token_id, begin = tokenizer.convert_tokens_to_ids(["<image>", "<begin>"])
    theirs.generation_config.generation_kwargs = {"boi_token_id": begin}
    parity.save_hf(theirs, directory)
    processor = transformers.JanusProcessor(images, tokenizer, num_image_tokens=16)
    return processors.save(directory, processor), theirs, processor


def test_what_the_processor_makes_the_model_reads(directory_and_processor):
    import torch

    directory, model, theirs = directory_and_processor
    batch = processors.check(directory, theirs, PICTURES, TEXTS)
    assert batch["images"].shape == (3, 2, 8, 8, 3)
    flat = [image for group in PICTURES for image in group]
    inputs = theirs(images=flat, text=TEXTS, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    ours = mmjax.convert.from_pretrained(directory).following("never")
    out = run(ours, *(batch[name] for name in ("tokens", "images", "mask", "place")))
    parity.close(NAME, "logits", out.logits[..., : expected.shape[-1]], expected, batch["mask"])


def test_texts_to_read_and_to_draw_from(directory_and_processor, tmp_path):
    """What transformers is told by an option is said here by the end of the text."""
    _, model, theirs = directory_and_processor
    theirs = transformers.JanusProcessor(
        theirs.image_processor,
        theirs.tokenizer,
        use_default_system_prompt=True,
        num_image_tokens=16,
        chat_template=processors.TEMPLATE,
    )
    directory = processors.save(tmp_path / "whole", theirs, model.config)
    batch = processors.check(directory, theirs, PICTURES, TEXTS)
    given = {"padding": True, "padding_side": "left", "return_tensors": "np"}
    wanted = theirs(text=["a dog", "a red cat !"], generation_mode="image", **given)
    drawn = load_processor(directory)(text=["a dog<begin>", "a red cat !<begin>"])
    np.testing.assert_array_equal(drawn["tokens"], wanted["input_ids"])
    assert drawn["tokens"].shape[1] < batch["tokens"].shape[1]


@pytest.mark.parametrize(
    ("processor", "images", "message"),
    [
        ({"num_image_tokens": 9}, {}, r"num_image_tokens is 9 .* and 16 in config.json"),
        ({}, {"do_pad": False}, "do_pad=False: images of Janus are fitted into squares"),
        ({}, {"size": {"height": 16, "width": 16}}, r"the size of pictures is 16 .* and 8"),
        ({}, {"max_size": 14}, "the option 'max_size' = 14 is not known"),
    ],
)
def test_processors_that_do_not_fit(processor, images, message, directory_and_processor, tmp_path):
    _, model, theirs = directory_and_processor
    directory = processors.save(tmp_path / "changed", theirs, model.config)
    path = directory / "processor_config.json"
    content = json.loads(path.read_text()) | processor
    content["image_processor"] |= images
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_processor(directory)


def test_the_published_shapes():
    """Every tensor of the default configs, with the language model of Janus-Pro-1B."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out

    text = transformers.LlamaConfig(
        **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "vocab_size": 102400, "max_position_embeddings": 16384},
    )
    config = transformers.JanusConfig(
        text_config=text,
        vision_config=transformers.JanusVisionConfig(),
        vq_config=transformers.JanusVQVAEConfig(),
        tie_word_embeddings=False,
        generation_kwargs={"boi_token_id": 100016},
    )
    with torch.device("meta"):
        theirs = getattr(transformers, NAME)(config)
    family = mmjax.convert.family.families()[NAME]
    source = mmjax.convert.Source(config, frozenset(theirs.state_dict()), None)
    ours = family.from_hf(source)
    assert (ours.image_tokens, ours.image.length, ours.vocab_size) == (576, 576, 118784)
    _, shapes = structure(Janus, ours)
    found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
    assert found == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours
