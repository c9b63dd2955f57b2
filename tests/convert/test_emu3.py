"""Emu3, both ways: logits, gradients, generation of text and of images; its language model alone."""

import dataclasses
import re

import hf
import numpy as np
import parity
import pytest
import unified
from towers import long, pixels, quick, refused, same_files
from vlms import LANGUAGE, forward

import mmjax
import mmjax.convert
from mmjax.data.visual import TEXT
from mmjax.models import LM, Unified

transformers = hf.transformers()
pytestmark = pytest.mark.torch

CODES = 20
TOKENIZER = {
    **{"base_channels": 32, "codebook_size": CODES, "num_res_blocks": 1, "hidden_size": 64},
    **{"channel_multiplier": [1, 2], "attn_resolutions": [1], "temporal_downsample_factor": 2},
}
# Ids of text are 8 to 20.
WORDS = (8, 20)
MARKS = {"<|image token|>": 3, "<|extra_201|>": 7, "<|extra_200|>": 6}
AROUND = {"<image>": 5, "<|image start|>": 21, "<|image end|>": 2}
ORDER = np.random.default_rng(3).permutation(CODES)


def vocabulary(order=ORDER, first=25):
    """Codes whose ids are in this order, among other names."""
    codes = {f"<|visual token {code:06d}|>": first + int(at) for code, at in enumerate(order)}
    return {"word": 9, **MARKS, **AROUND, **codes}


def text_config(**changes):
    # Here the ids of padding and of the beginning must be numbers.
    options = LANGUAGE | {"pad_token_id": 0, "bos_token_id": 1}
    return transformers.Emu3TextConfig(**options | changes)


def config(*, text=(), tokenizer=(), **changes):
    options = {
        "text_config": text_config(**dict(text)),
        "vq_config": transformers.Emu3VQVAEConfig(**TOKENIZER | dict(tokenizer)),
        "vocabulary_map": vocabulary(),
    }
    return transformers.Emu3Config(**options | changes)


# name -> options, and the size of the images.
CASES = {
    "grouped heads": ({}, (4, 6)),
    "biases, codes in order": (
        {
            "text": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
            "vocabulary_map": vocabulary(range(CODES), first=30),
        },
        (6, 4),
    ),
    "one head of keys, tied, narrow": (
        {
            "text": {
                **{"num_key_value_heads": 1, "hidden_size": 24, "num_attention_heads": 3},
                **{"num_hidden_layers": 3, "hidden_act": "gelu"},
            },
            "tokenizer": {"channel_multiplier": [1, 1, 2], "attn_resolutions": []},
            "tie_word_embeddings": True,
        },
        (8, 12),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_generation(name, tmp_path):
    options, size = CASES[name]
    reference = transformers.Emu3ForConditionalGeneration(config(**options))
    index = list(CASES).index(name)
    unified.check(
        reference,
        tmp_path,
        lambda ours: unified.stream(ours, size=size, words=WORDS, seed=index),
        lambda inputs: reference.model.get_image_tokens(
            inputs["pixel_values"], inputs["image_sizes"]
        ),
        unified.sizes,
        derived=index != 1,
        generator=index == 0,
        gradients=index == 1,
        origin=index != 2,
    )


def test_images_of_several_sizes(tmp_path):
    """They are padded to the largest, and their places are those of the codes that count."""
    import torch

    reference = transformers.Emu3ForConditionalGeneration(config())
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "theirs"))
    sizes, largest = [(4, 6), (6, 2), (8, 4)], (8, 6)
    padded = np.zeros((3, *largest, 3), np.float32)
    for index, (height, width) in enumerate(sizes):
        padded[index, :height, :width] = pixels(height, width, 3, seed=index)
    columns = largest[1] // 2 + 1
    tokens, place = [], []
    for number, (height, width) in enumerate(sizes):
        rows = np.arange(height // 2)[:, None] * columns
        # Codes of its own columns, then the end of the row.
        codes = rows + np.append(np.arange(width // 2), columns - 1)
        codes = codes.reshape(-1) + number * largest[0] // 2 * columns
        tokens += [9, MARKS["<|image token|>"], *[AROUND["<image>"]] * len(codes), 7, 2]
        place += [TEXT, TEXT, *codes, TEXT, TEXT]
    tokens, place = np.array([tokens], np.int32), np.array([place], np.int32)
    x = torch.tensor(padded.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = reference(input_ids=long(tokens), pixel_values=x, image_sizes=long(sizes)).logits
        ids = reference.model.get_image_tokens(x, long(sizes))

    def run(model, tokens, images, place):
        return model.run(tokens, images, place=place)

    out = quick(model, tokens, padded[None], place, function=run)
    np.testing.assert_array_equal(out.tokens[place >= 0], ids)
    parity.close("Emu3ForConditionalGeneration", "logits", out.logits, expected)


def test_images_are_drawn(tmp_path):
    """Greedily, with guidance, under the grammar of its streams; and the pixels of their codes."""
    import torch

    reference = transformers.Emu3ForConditionalGeneration(config())
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "theirs"))
    height, width = 3, 4
    start, wrapper = [AROUND["<|image start|>"], 10, 11], MARKS["<|image token|>"]
    prompts = [[9, 12, 13, *start, wrapper], [14, *start, wrapper]]
    negative = [[15, 16, *start, wrapper], [17, *start, wrapper]]
    tokens, mask = left_padded(prompts)
    other, other_mask = left_padded(negative)
    visual = sorted(number for name, number in vocabulary().items() if "visual" in name)
    ends = [MARKS["<|extra_201|>"], AROUND["<|image end|>"], 0]

    def allowed(row, ids):
        """As the documentation of transformers has it."""
        since = len(ids) - int(torch.nonzero(ids == wrapper)[0, 0])
        after = since - height * (width + 1) - 1
        if after >= 0:
            return [ends[after]]
        return [MARKS["<|extra_200|>"]] if since % (width + 1) == 0 else visual

    count = height * (width + 1) + len(ends)
    with torch.no_grad():
        written = reference.generate(
            input_ids=long(tokens),
            attention_mask=long(mask),
            max_new_tokens=count,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            guidance_scale=3.0,
            negative_prompt_ids=long(other),
            negative_prompt_attention_mask=long(other_mask),
            pad_token_id=0,
            eos_token_id=None,
        )[:, -count:]
        drawn = reference.decode_image_tokens(image_tokens=written, height=height, width=width)
    painter = model.sized(2 * height, 2 * width).following("grammar")
    ours = mmjax.generate(
        painter, prompts, guidance=3.0, negative=negative, max_new_tokens=count - 2
    )
    np.testing.assert_array_equal(ours, written[:, :-2])
    assert len(np.unique(ours)) > 4, "codes that are all the same show nothing"
    images = quick(painter, ours[:, :-1], function=Unified.images_of)
    parity.close("Emu3ForConditionalGeneration", "images", images, drawn.permute(0, 2, 3, 1))


def left_padded(rows):
    """Ids [B, T] and their mask."""
    length = max(map(len, rows))
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    return tokens, mask


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "num_key_value_heads": 1},
        {"mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    ],
)
def test_language_model_alone(changes, tmp_path):
    import torch

    reference = transformers.Emu3ForCausalLM(text_config(**changes))
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    assert isinstance(model, LM)
    tokens, mask = left_padded([[8, 9, 30, 11, 5], [40, 3]])
    inputs = {"input_ids": long(tokens), "attention_mask": long(mask)}
    with torch.no_grad():
        expected = reference(**inputs).logits
    parity.close("Emu3ForCausalLM", "logits", forward(model, tokens, mask), expected, mask)
    parity.check_round_trip(directory, tmp_path / "ours", lambda model: model(**inputs).logits)
    same_files(directory, tmp_path / "ours")
    parity.check_saving_without_origin(directory, tmp_path / "alone")


def test_what_is_not_supported():
    names = vocabulary()
    wrong = {name: number for name, number in names.items() if name != "<|visual token 000012|>"}
    for changes, message in (
        ({"vocabulary_map": wrong}, "names of 19 codes, but the image tokenizer has 20"),
        ({"vocabulary_map": names | {"<|extra_200|>": None}}, "has no '<|extra_200|>'"),
        ({"tokenizer": {"double_latent": True}}, "vq_config: double_latent=True"),
        ({"text": {"hidden_act": "mish"}}, "text_config: hidden_act='mish'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused("Emu3ForConditionalGeneration", config(**changes))


def test_what_the_format_cannot_say():
    family = mmjax.convert.family.families()["Emu3ForConditionalGeneration"]
    ours = family.from_hf(mmjax.convert.Source(config(), frozenset(), None))
    say = mmjax.convert.save.say
    tokenizer = dataclasses.replace(ours.image.tokenizer, image_size=48)
    image = dataclasses.replace(ours.image, tokenizer=tokenizer)
    said = say(family, dataclasses.replace(ours, image=image, follow="grammar"), frozenset())
    assert said.to_dict()["vq_config"]["image_size"] == 48
    for wrong, message in (
        (dataclasses.replace(ours, modality_embeddings=True), "modality_embeddings=True"),
        (dataclasses.replace(ours, image=dataclasses.replace(image, row=None)), "'NoneType'|row"),
    ):
        with pytest.raises(ValueError, match=message):
            say(family, wrong, frozenset())


def test_the_published_shapes():
    """Every tensor of the default config, whose image tokenizer has 32768 codes."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out, rename

    names = vocabulary(range(32768), first=151_854)
    hf_config = transformers.Emu3Config(vocabulary_map=names)
    with torch.device("meta"):
        reference = transformers.Emu3ForConditionalGeneration(hf_config)
    family = mmjax.convert.family.families()["Emu3ForConditionalGeneration"]
    source = mmjax.convert.Source(hf_config, frozenset(), None)
    ours = family.from_hf(source)
    assert (ours.image.ids, ours.image.length, ours.vocab_size) == (151_854, 90 * 91, 184_622)
    _, shapes = structure(Unified, ours)
    found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
    state = reference.state_dict()
    canonical = rename(state, family.renames, "")
    assert found == {name: tuple(state[there].shape) for name, there in canonical.items()}
    assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours
