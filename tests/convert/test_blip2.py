"""BLIP-2 of transformers, both ways: with OPT, and with Flan-T5."""

import hf
import numpy as np
import processors
import pytest
from towers import refused
from vlms import IMAGE_TOKEN, VISION, check

from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor

transformers = hf.transformers()
pytestmark = pytest.mark.torch

QFORMER = {
    **{"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2},
    "intermediate_size": 20,
}
OPT = {
    **{"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    **{"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None},
}
T5 = {
    **{"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0},
}
# name -> (the language model's config, options of tower, Q-Former, language model and the whole)
CASES = {
    "opt": ("OPTConfig", {}, {}, {}, {"num_query_tokens": 5}),
    "opt with post-norm, cross-attention everywhere": (
        "OPTConfig",
        {"qkv_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
        {"cross_attention_frequency": 1, "hidden_act": "relu", "layer_norm_eps": 1e-5},
        {"do_layer_norm_before": False, "enable_bias": False},
        {"num_query_tokens": 1},
    ),
    "flan-t5, a group of blocks is not whole": (
        "T5Config",
        {"hidden_size": 24, "num_attention_heads": 3},
        {"num_hidden_layers": 3, "cross_attention_frequency": 2},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 5},
        {"num_query_tokens": 3},
    ),
    "t5 without gates, cross-attention once": (
        "T5Config",
        {"image_size": 16},
        {"cross_attention_frequency": 4, "num_attention_heads": 2},
        {"feed_forward_proj": "relu", "num_decoder_layers": 1, "decoder_start_token_id": 2},
        {"num_query_tokens": 4},
    ),
}


def config_for(name):
    text, vision_options, qformer_options, text_options, options = CASES[name]
    base = {"OPTConfig": OPT, "T5Config": T5}[text]
    return transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION | vision_options),
        qformer_config=transformers.Blip2QFormerConfig(**QFORMER | qformer_options),
        text_config=getattr(transformers, text)(**base | text_options),
        image_token_index=IMAGE_TOKEN,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    import torch

    reference = transformers.Blip2ForConditionalGeneration(config_for(name))
    if name.startswith("flan"):
        # transformers 5 ties at birth; checkpoints with a head of its own untie.
        head = reference.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    check(reference, tmp_path, origin=name in ("opt", "flan-t5, a group of blocks is not whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: setattr(hf, "image_token_index", None), "50265 in Salesforce's"),
        (lambda hf: setattr(hf.qformer_config, "use_qformer_text_input", True), "retrieval"),
        (lambda hf: setattr(hf.text_config, "model_type", "bert"), "model_type='bert'"),
        (lambda hf: setattr(hf.text_config, "word_embed_proj_dim", 20), "embed_width=20"),
    ],
)
def test_refused(change, message):
    config = config_for("opt")
    change(config)
    with pytest.raises(ValueError, match=message):
        refused("Blip2ForConditionalGeneration", config)


IMAGES = [processors.picture(0, 40, 30), processors.picture(1, 20, 61)]
TEXTS = ["a red dog", "user: a cat ; bot:"]


def saved_processor(directory, template, **changes):
    """`template`: of the tokenizer, which decides what stands before and after a text."""
    import tokenizers

    tokenizer = processors.tokenizer("<image>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    theirs = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer,
        num_query_tokens=5,
    )
    config = config_for("opt")
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    for field, value in changes.items():
        setattr(config, field, value)
    return theirs, processors.save(directory, theirs, config)


@pytest.mark.parametrize("template", ["<s> $A", "$A </s>", "<s> <s> $A </s>"])
def test_processor(template, tmp_path):
    """Of one text each: in a batch transformers pads between image and text."""
    theirs, directory = saved_processor(tmp_path, template)
    processor = load_processor(directory)
    batch = processor(images=IMAGES, text=TEXTS)
    for row, (image, text) in enumerate(zip(IMAGES, TEXTS, strict=True)):
        one = processors.check(directory, theirs, [[image]], [text])
        own = batch["mask"][row]
        np.testing.assert_array_equal(batch["tokens"][row][own], one["tokens"][0])
        np.testing.assert_array_equal(batch["place"][row][own], one["place"][0])
        np.testing.assert_array_equal(batch["images"][row], one["images"][0])
    # Placeholders may be there, and several of them.
    again = processor(images=IMAGES, text=["<image>" + text for text in TEXTS])
    np.testing.assert_array_equal(again["tokens"], batch["tokens"])
    several = processor(images=[IMAGES], text=["<image><image>a dog"])
    assert (several["place"][0, :10] == np.arange(10)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_tokens": 4}, "num_query_tokens is 5 in the processor's files and 4"),
        ({"image_token_index": 3}, "the id of '<image>' is 14 in the processor's files and 3"),
    ],
)
def test_a_processor_and_a_model_that_disagree(changes, message, tmp_path):
    _, directory = saved_processor(tmp_path, "<s> $A", **changes)
    with pytest.raises(ProcessorConfigError, match=message):
        load_processor(directory)
