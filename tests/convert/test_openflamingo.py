"""OpenFlamingo's checkpoints beside its own code, around models of transformers.

The judge is the package open_flamingo, which asks for an old PyTorch and is therefore installed
without what it asks for.
"""

import dataclasses
import importlib
import sys
import types
from typing import Any, NamedTuple

import hf
import numpy as np
import parity
import processors
import pytest
from safetensors.numpy import load_file, save_file
from towers import long, same_parameters
from vlms import IMAGE, NEW_TOKENS, VISION, forward, greedy, stream

import mmjax.convert
from experiments import convert
from mmjax.config import ConfigError
from mmjax.convert import ConversionError, load_openflamingo, save_openflamingo
from mmjax.evaluate.chat import open_speaker

transformers = hf.transformers()
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

INSTALL = "pip install --no-deps open_flamingo==2.0.1"
NEW = 3  # "<|endofchunk|>", "<image>" and one for padding
OWN = len(processors.tokenizer())
# As in published models, the table has more rows than the tokenizer has tokens.
NEOX = {
    "vocab_size": OWN + 10,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 36,
    "rotary_pct": 0.5,
}
MPT = {"vocab_size": OWN, "d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 64}
CLIP = VISION | {"hidden_act": "quick_gelu"}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
# Text before the first image, two images, none, and two one after the other.
ROWS = ([3, IMAGE, 4], [IMAGE, 2, IMAGE, 5], [6], [2, IMAGE, IMAGE, 1])


def neox():
    """A whole CLIP, and a gated block before every second block."""
    clip = transformers.CLIPConfig(vision_config=CLIP, text_config=TEXT)
    config = transformers.GPTNeoXConfig(**NEOX)
    return transformers.GPTNeoXForCausalLM(config), transformers.CLIPModel(clip), 2


def mpt():
    """CLIP's tower alone, and a gated block before each block."""
    clip = transformers.CLIPVisionConfig(**CLIP)
    config = transformers.MptConfig(**MPT)
    return transformers.MptForCausalLM(config), transformers.CLIPVisionModel(clip), 1


class Case(NamedTuple):
    """A model of theirs, and where its parts are saved: `load_openflamingo(*paths)`."""

    theirs: Any
    paths: tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def package():
    """open_flamingo, with empty modules for what it imports and is not used here."""
    # Else these look for wandb while it is an empty module.
    importlib.import_module("transformers.modeling_utils")

    names = ("open_clip", "wandb")
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update({name: types.ModuleType(name) for name in absent})
    yield pytest.importorskip("open_flamingo", reason=INSTALL)
    for name in absent:
        del sys.modules[name]


def build(package, make, directory) -> Case:
    """As `create_model_and_transforms` of the package joins the parts, and as it saves them."""
    from open_flamingo.src.factory import _infer_decoder_layers_attr_name
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance
    from open_flamingo.train.train_utils import filter_state_dict_to_trainable

    language, clip, every = make()
    paths = directory / "trained.safetensors", directory / "text", directory / "clip"
    parity.save_hf(language, paths[1])
    processors.tokenizer().save_pretrained(paths[1])
    parity.save_hf(clip, paths[2])

    class Visual(torch.nn.Module):
        """What open_clip gives: something pooled, and the patches before the final norm."""

        def forward(self, pixels):
            tower = clip.vision_model if isinstance(clip, transformers.CLIPModel) else clip
            return None, tower(pixels).last_hidden_state[:, 1:]

    extend_instance(language, FlamingoLMMixin)
    language.set_decoder_layers_attr_name(_infer_decoder_layers_attr_name(language))
    language.resize_token_embeddings(OWN + NEW)
    vision = types.SimpleNamespace(visual=Visual())
    width = VISION["hidden_size"]
    model = package.Flamingo(vision, language, OWN, OWN + 1, width, cross_attn_every_n_layers=every)
    model.requires_grad_(False)
    tables = {id(part): part for part in (language.get_input_embeddings(), language.lm_head)}
    for part in (model.perceiver, language.gated_cross_attn_layers, *tables.values()):
        hf.randomise(part.requires_grad_(True))
    state = filter_state_dict_to_trainable(model, model.state_dict())
    if language.lm_head.weight is not language.get_input_embeddings().weight:
        # By the name it had then, by which it is kept whether it is trained or not.
        state["lang_encoder.embed_out.weight"] = state.pop("lang_encoder.lm_head.weight")
    save_file({name: value.numpy().copy() for name, value in state.items()}, paths[0])
    return Case(model.eval(), paths)


@pytest.fixture(scope="module")
def case(package, tmp_path_factory) -> Case:
    return build(package, neox, tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="module")
def model(case):
    return load_openflamingo(*case.paths)


def run(theirs, batch, tokens, mask):
    images = torch.tensor(batch.images.transpose(0, 1, 4, 2, 3))[:, :, None]
    with torch.no_grad():
        return theirs(images, long(tokens), long(mask)).logits


def check(case, model, directory):
    """Logits, what is generated, and the tensors that are written."""
    batch = stream(model.config, ROWS)
    expected = run(case.theirs, batch, batch.tokens, batch.mask)
    logits = forward(model, batch.tokens, batch.images, batch.mask)
    parity.close("OpenFlamingo", "logits", logits, expected, batch.mask)
    parity.same_argmax(logits, expected, batch.mask)
    tokens, mask = batch.tokens, batch.mask
    for _ in range(NEW_TOKENS):  # their `generate` is not one of today's transformers
        last = run(case.theirs, batch, tokens, mask)[:, -1:].argmax(-1).numpy()
        tokens, mask = np.append(tokens, last, 1), np.append(mask, np.ones_like(last), 1)
    np.testing.assert_array_equal(greedy(model, batch), tokens[:, -NEW_TOKENS:])
    save_openflamingo(model, directory / "saved.safetensors")
    before, after = load_file(case.paths[0]), load_file(directory / "saved.safetensors")
    before.pop("lang_encoder.lm_head.weight", None)  # of tied tables, a second time
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    with pytest.raises(FileExistsError):
        save_openflamingo(model, directory / "saved.safetensors")


def test_gpt_neox(case, model, tmp_path):
    config = model.config
    assert (config.every, config.after, config.sees) == (2, 1, "last")
    assert (config.lm.vocab_size, config.new_tokens, config.image_token) == (OWN, NEW, OWN + 1)
    check(case, model, tmp_path)


def test_mpt(package, tmp_path):
    case = build(package, mpt, tmp_path)
    check(case, load_openflamingo(*case.paths, new_tokens=NEW), tmp_path)


LISTED, PLACE = "lang_encoder.gated_cross_attn_layers.", "lang_encoder.gpt_neox.layers."


def listed(name):
    return name.replace(PLACE, LISTED).replace(".gated_cross_attn_layer.", ".")


def twice(tensors):
    """Gated blocks under both names, frozen parts, buffers, and wrappers' names."""
    gated = {listed(name): value for name, value in tensors.items() if "gated" in name}
    more = {
        "vision_encoder.proj": np.zeros((2, 2), np.float32),
        "lang_encoder.old_decoder_blocks.0.attention.dense.bias": np.zeros(2, np.float32),
        PLACE + "0.decoder_layer.attention.masked_bias": np.zeros(1, np.float32),
    }
    return {f"module.{name}": value.copy() for name, value in (tensors | gated | more).items()}


@pytest.mark.parametrize(
    "change", [twice, lambda tensors: {listed(name): value for name, value in tensors.items()}]
)
def test_other_names(case, model, tmp_path, change):
    file, text, clip = tmp_path / "other.safetensors", *case.paths[1:]
    save_file(change(load_file(case.paths[0])), file)
    same_parameters(load_openflamingo(file, text, clip), model)


def test_a_pickle_is_converted_by_the_command_of_the_error(case, model, tmp_path):
    state = {name: torch.tensor(value) for name, value in load_file(case.paths[0]).items()}
    pickle = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": state, "epoch": 1}, pickle)
    with pytest.raises(ConversionError, match="no safetensors file") as error:
        load_openflamingo(pickle, *case.paths[1:])
    exec(str(error.value).split('python -c "')[1].split('"')[0])
    converted = load_openflamingo(pickle.with_suffix(".safetensors"), *case.paths[1:])
    same_parameters(converted, model)


def test_what_does_not_fit(case, model, tmp_path):
    file, text, clip = case.paths
    tensors = load_file(file)

    def fails(message, *paths, **options):
        with pytest.raises(ConversionError, match=message):
            load_openflamingo(*paths, **options)

    def without(name):
        target = tmp_path / f"{name}.safetensors"
        save_file({key: value for key, value in tensors.items() if name not in key}, target)
        return target

    fails("There is no file", tmp_path / "none.safetensors", text, clip)
    fails("is a GPTNeoXForCausalLM: take", file, text, text)
    fails("is a CLIPModel: take", file, clip, clip)
    fails(
        "lacks lang_encoder.embed_out.weight: it has no vectors", without("embed_out"), text, clip
    )
    fails("lacks 'perceiver.latents'", without("latents"), text, clip)
    fails("no gated block stands among", without("gated"), text, clip)
    fails("missing: 'perceiver.norm.bias'", without("perceiver.norm.bias"), text, clip)
    fails("every=4 is no divisor|missing", without("layers.1."), text, clip)
    mmjax.convert.save_pretrained(
        mmjax.convert.from_pretrained(text), tmp_path / "text", like=tmp_path
    )
    fails("has no tokenizer", file, tmp_path / "text", clip)
    processors.tokenizer("<image>").save_pretrained(tmp_path / "text")
    load_openflamingo(file, tmp_path / "text", clip)  # 2 new ones, as far as this one knows
    processors.tokenizer("<image>", "more").save_pretrained(tmp_path / "text")
    fails("adds 2, or 3", file, tmp_path / "text", clip)


def test_what_it_cannot_say(model, tmp_path):
    config = model.config
    changes = (
        ({"sees": "all"}, "cannot say sees='all'"),
        ({"features": (-2,), "after": 0}, "cannot say every=2 .*features"),
        ({"image_token": 3, "new_tokens": 0}, "but there are new_tokens=0"),
    )
    for change, message in changes:
        model.config = dataclasses.replace(config, **change)
        try:
            with pytest.raises(ConversionError, match=message):
                save_openflamingo(model, tmp_path / "no.safetensors")
        finally:
            model.config = config
    assert not list(tmp_path.iterdir())


def test_the_commands(case, model, tmp_path):
    """To Orbax, with what prompts and images need, and back."""
    trained, text, clip = case.paths
    side = VISION["image_size"]
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    images.save_pretrained(clip)
    ours, back = tmp_path / "ours", tmp_path / "back.safetensors"
    parts = ["--language-model", str(text), "--image-encoder", str(clip)]
    assert convert.main(["--source", str(trained), *parts, "--target", str(ours)]) == 0
    to = ["--to", "openflamingo", "--target", str(back)]
    assert convert.main(["--source", str(ours), *to]) == 0
    before = load_file(trained)
    for name, value in load_file(back).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)

    speaker = open_speaker(ours)
    same_parameters(speaker.model, model)
    assert (speaker.speech.ends, speaker.speech.unsaid) == ([OWN], [OWN + 1])
    # As the package's factory does it.
    tokenizer = processors.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    shown = [processors.picture(0, 30, 40), processors.picture(1, 50, 26)]
    words = "<image>a red dog<|endofchunk|><image>a cat:"
    prompt = speaker.speech.text(words, shown)
    assert prompt.ids.tolist() == tokenizer(words)["input_ids"]
    assert prompt.place.tolist() == [-1, 0, -1, -1, -1, -1, 1, -1, -1, -1]
    expected = images(shown, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(prompt.images, expected)
    result = speaker([prompt], max_new_tokens=NEW_TOKENS)
    batch = {"tokens": prompt.ids[None], "images": prompt.images[None], "place": prompt.place[None]}
    tokens = mmjax.generate(model, **batch, max_new_tokens=NEW_TOKENS, suppress=[OWN + 1])
    np.testing.assert_array_equal(result.tokens, tokens)

    for wrong, message in (
        (["--source", str(trained), *parts[:2], "--target", "x"], "Give both"),
        (["--source", str(trained), *parts, "--verify"], "has no OpenFlamingo"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert.main(wrong)
