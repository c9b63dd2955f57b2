"""Adapters beside PEFT: what it computes with ours, what we compute with its."""

import functools
import json

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import QUICK
from safetensors.numpy import load_file, save_file
from vlms import IMAGE_TOKEN, LANGUAGE, VISION

import mmjax
from experiments import convert
from mmjax import params
from mmjax.config import ConfigError
from mmjax.convert import ConversionError, load_adapter, save_adapter
from mmjax.convert.peft import CONFIG, WEIGHTS
from mmjax.nn import lora
from mmjax.nn.lora import LoRAConfig

LM = dict(
    name="lm",
    vocab_size=40,
    max_len=64,
    width=32,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=48,
    activation="silu",
    norm_eps=1e-6,
    tied=False,
    rope=dict(theta=1e4),
)
TOKENS = np.arange(1, 13).reshape(2, 6)
KINDS = {
    "lora": LoRAConfig(4, 8, r"decoder/layers/(attention/(query|value)|mlp/.*)|head"),
    "dora": LoRAConfig(2, 3, r"decoder/layers/attention/.*", dora=True, rslora=True),
}


@functools.cache
def base():
    graph, shapes = params.abstract(lambda: mmjax.build(LM, rngs=nnx.Rngs(0)))
    return graph, noise(shapes, 0.2)


def noise(shapes, scale):
    rng = np.random.default_rng(0)
    return {k: jnp.float32(scale * rng.normal(size=v.shape)) for k, v in shapes.items()}


def adapted(model, config):
    """The model with random adapters."""
    lora.add(model, config, rngs=nnx.Rngs(0))
    graph, arrays = params.split(model)
    moved = noise(arrays, 0.1)
    return params.merge(
        graph, {k: v + moved[k] if lora.is_adapter(k) else v for k, v in arrays.items()}
    )


@functools.partial(jax.jit, compiler_options=QUICK)
def logits(model):
    return model(jnp.asarray(TOKENS))


def same(one, other):
    one, other = params.split(one)[1], params.split(other)[1]
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The base model as a directory of transformers."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    mmjax.save_pretrained(params.merge(*base()), directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, source, tmp_path):
    model = adapted(mmjax.from_pretrained(source), KINDS[kind])
    save_adapter(model, tmp_path / "first")
    loaded = mmjax.from_pretrained(source)
    load_adapter(loaded, tmp_path / "first")
    # DoRA's lengths are sums, which each program rounds in its own way.
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)
    if kind == "lora":
        same(loaded, model)
    save_adapter(loaded, tmp_path / "second")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    content = json.loads((tmp_path / "first" / CONFIG).read_text())
    assert content["base_model_name_or_path"] == str(source)
    with pytest.raises(FileExistsError):
        save_adapter(model, tmp_path / "first")


def peft_of(directory, adapter):
    transformers = hf.transformers()
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same(kind, source, tmp_path):
    model = adapted(mmjax.from_pretrained(source), KINDS[kind])
    save_adapter(model, tmp_path / "ours")
    theirs = peft_of(source, tmp_path / "ours")
    import torch

    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model), expected, atol=1e-5)
    assert np.abs(expected - logits(mmjax.from_pretrained(source))).max() > 0.1
    # What it saves of ours is what we saved, and is read as such.
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = load_file(tmp_path / "ours" / WEIGHTS)
    again = load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(again[name], tensor)
    loaded = mmjax.from_pretrained(source)
    load_adapter(loaded, tmp_path / "theirs")
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)
    # What we merge is what it merges.
    merged = theirs.merge_and_unload().model.layers[1].self_attn.q_proj.weight
    kernel = lora.merge(model).decoder.layers.attention.query.kernel[1]
    np.testing.assert_allclose(kernel, merged.detach().numpy().T, atol=1e-6)


@pytest.mark.torch
def test_adapters_that_peft_made(source, tmp_path):
    """Its own initial values and its own choice of names, where DoRA's lengths are its own too."""
    transformers = hf.transformers()
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    options = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules="all-linear", init_lora_weights=False
    )
    theirs = peft.get_peft_model(model, options).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = mmjax.from_pretrained(source)
    load_adapter(loaded, tmp_path / "theirs")
    assert len(lora.adapted_maps(loaded)) == 7
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("architecture", ["Llava", "LlavaNext", "PaliGemma", "Blip2"])
def test_modules_of_vision_language_models_are_found(architecture):
    """Their tensors are not always stored by the names of their modules, which PEFT goes by."""
    transformers = hf.transformers()
    import torch

    from mmjax.convert.family import Source, families
    from mmjax.convert.load import structure
    from mmjax.convert.peft import _counterparts, _modules

    towers = {
        "Llava": ("CLIPVisionConfig", "LlamaConfig"),
        "LlavaNext": ("CLIPVisionConfig", "LlamaConfig"),
        "PaliGemma": ("SiglipVisionConfig", "GemmaConfig"),
        "Blip2": ("Blip2VisionConfig", "OPTConfig"),
    }
    vision, text = (getattr(transformers, name) for name in towers[architecture])
    options = {"projection_dim": LANGUAGE["hidden_size"]} if architecture == "PaliGemma" else {}
    config = getattr(transformers, f"{architecture}Config")(
        vision_config=vision(**VISION).to_dict(),
        text_config=text(**LANGUAGE, head_dim=8).to_dict(),
        image_token_index=IMAGE_TOKEN,
        **options,
    )
    name = f"{architecture}ForConditionalGeneration"
    with torch.device("meta"):
        reference = getattr(transformers, name)(config)
    family = families()[name]
    ours = family.from_hf(Source(config, frozenset(), None))
    model = params.merge(*structure(family.module(ours), ours))
    _, family, counterparts = _counterparts(model, name)
    found = set(_modules(family, counterparts.values(), name).values())
    there = {
        path for path, module in reference.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert found and found <= there
    # What is fused, or tied to the table of tokens, is no linear layer of its own.
    assert all(path.endswith(("qkv", "lm_head")) for path in there - found)


def edited(directory, target, change, **options):
    """A copy of an adapter with other tensors and options."""
    target.mkdir()
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, target / WEIGHTS)
    content = json.loads((directory / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**content, **options}))
    return target


PREFIX = "base_model.model.model.layers."
BAD = {
    "a layer without": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{PREFIX}1.mlp.up_proj")],
        {},
        r"'model\.layers\.1\.mlp\.up_proj' has no adapter, but other layers' have",
    ),
    "another module": (
        lambda t: t.update(
            {k.replace("up_proj", "upp_proj"): t.pop(k) for k in list(t) if "0.mlp.up_proj" in k}
        ),
        {},
        r"'model\.layers\.0\.mlp\.upp_proj' is no linear layer of its own here; did you mean",
    ),
    "another rank": (lambda t: None, {"r": 8}, r"\(4, 32\).*not \{.*\(8, 32\)"),
    "half an adapter": (
        lambda t: t.pop(f"{PREFIX}0.mlp.up_proj.lora_B.weight"),
        {},
        r"'model\.layers\.0\.mlp\.up_proj'",
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(3)}),
        {},
        "no part of an adapter",
    ),
    "another kind": (lambda t: None, {"peft_type": "IA3"}, "only 'LORA' is read"),
    "several ranks": (lambda t: None, {"rank_pattern": {"up_proj": 2}}, "rank_pattern="),
    "biases": (lambda t: None, {"bias": "all"}, "bias='all'"),
    "another base": (lambda t: None, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
}


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter") / "lora"
    save_adapter(adapted(mmjax.from_pretrained(source), KINDS["lora"]), directory)
    return directory


@pytest.mark.parametrize("what", BAD)
def test_adapters_that_do_not_fit(what, saved, tmp_path):
    change, options, message = BAD[what]
    directory = edited(saved, tmp_path / "edited", change, **options)
    model = params.merge(*base())
    with pytest.raises(ConversionError, match=message):
        load_adapter(model, directory)
    assert not lora.adapted_maps(model)


def test_what_cannot_be_saved(tmp_path):
    model = params.merge(*base())
    with pytest.raises(ConversionError, match="has no adapters"):
        save_adapter(model, tmp_path / "x")
    lora.add(model, LoRAConfig(2, 4, "head"), rngs=nnx.Rngs(0))
    lora.add(model, LoRAConfig(4, 4, "decoder/.*/query"), rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match="adapters of one kind"):
        save_adapter(model, tmp_path / "x")
    fields = dict(LM, kv_heads=None, gated=False, norm="layernorm", rope=None, tied=True)
    biases = dict(qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu_tanh")
    gpt2 = params.merge(
        *params.abstract(lambda: mmjax.build({**fields, **biases}, rngs=nnx.Rngs(0)))
    )
    lora.add(gpt2, LoRAConfig(2, 4, r"decoder/layers/attention/.*"), rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match=r"attention/key\n.*attention/query\n.*/value\nWrite"):
        save_adapter(gpt2, tmp_path / "x", architecture="GPT2LMHeadModel")
    assert not (tmp_path / "x").exists()


def test_the_command(source, saved, tmp_path):
    def run(*arguments):
        assert convert.main([*map(str, arguments)]) == 0

    # Merged, and as adapters again.
    run("--source", source, "--adapter", saved, "--target", tmp_path / "hf", "--to", "hf")
    expected = mmjax.from_pretrained(source)
    load_adapter(expected, saved)
    same(mmjax.from_pretrained(tmp_path / "hf"), lora.merge(expected))
    peft = ("--to", "peft", "--base", "some/llama")
    run("--source", source, "--adapter", saved, "--target", tmp_path / "peft", *peft)
    assert (tmp_path / "peft" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    content = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert content["base_model_name_or_path"] == "some/llama"
    with pytest.raises(ConfigError, match="leave out --adapter"):
        run("--source", source, "--adapter", saved, "--verify")
    with pytest.raises(ConfigError, match="--base"):
        run("--source", source, "--target", tmp_path / "y", "--base", "some/llama")


def test_a_run_that_trained_more_is_no_adapter(tmp_path):
    model = adapted(params.merge(*base()), KINDS["lora"])
    run = tmp_path / "run"
    config = {"model": LM, "lora": {**vars(KINDS["lora"])}}

    def write(trainable):
        import orbax.checkpoint as ocp

        with ocp.PyTreeCheckpointer() as checkpointer:
            state = {"trainable": params.split(model)[1]}
            checkpointer.save(run / "checkpoints" / "0" / "state", state, force=True)
        table = {"trainable": trainable}
        (run / "config.json").write_text(json.dumps({**config, "rules": table}))

    command = ["--source", str(run), "--to", "peft", "--target", str(tmp_path / "adapter")]
    write([[".*/lora/.*", True], ["final_norm/.*", True], [".*", False]])
    with pytest.raises(ConfigError, match=r"final_norm/scale\nWrite the merged model"):
        convert.main(command)
    write([[".*/lora/.*", True], [".*", False]])
    assert convert.main(command) == 0
    again = params.merge(*base())
    load_adapter(again, tmp_path / "adapter")
    same(again, model)
