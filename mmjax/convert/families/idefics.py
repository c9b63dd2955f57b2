"""IDEFICS, the open Flamingo: CLIP's image tower, Perceiver resampler, gated blocks, Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.connectors import IdentityConfig, PerceiverConfig
from mmjax.convert.activations import NAMES, activation
from mmjax.convert.families import _decoder, clip
from mmjax.convert.families._towers import POSITION_IDS
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.kinds import ARRAY, EMBEDDING, LINEAR, NORM, array
from mmjax.convert.table import Row
from mmjax.data.tokenizer import HF_TOKENIZER_FILES, open_hf_tokenizer
from mmjax.models import Flamingo, FlamingoConfig, LMConfig
from mmjax.models.flamingo import GatedConfig

# Of the resampler, which transformers' config does not say.
RESAMPLER = dict(mlp_ratio=4, activation="relu", norm_eps=1e-5, projection=None)
IMAGE = "<image>"
VISION, CONNECTOR = "model.vision_model.", "model.perceiver_resampler."
LOOK = "model.gated_cross_attn_layers.*."


def special_tokens(source: Source) -> tuple[int, tuple[int, ...]]:
    """The id of "<image>", and those after which a text sees no image before them.

    In transformers the processor says who sees what, by its tokenizer; no config has them. We write
    `image_token_id`. Where neither says it, "<image>" is taken for the last of the additional
    tokens, as it is in the first models.

    Raises:
      ValueError: if tokenizer and config disagree.
    """
    hf, path = source.config, source.directory
    here, there, ends = None, hf.to_dict().get("image_token_id"), hf.eos_token_id
    if path is not None and any((path / name).exists() for name in HF_TOKENIZER_FILES):
        tokenizer = open_hf_tokenizer(path)
        here = tokenizer.get_vocab().get(IMAGE)
        ends = ends if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if None not in (here, there) and here != there:
        raise ValueError(
            f"{IMAGE!r} is {here} in the tokenizer, but config.json has image_token_id={there}: "
            "take the tokenizer that the model was saved with."
        )
    last = hf.vocab_size + hf.additional_vocab_size - 1
    image_token = next(token for token in (there, here, last) if token is not None)
    if isinstance(ends, list):  # of several that end what is said, the first ends a document
        ends = next(iter(ends), None)
    return image_token, () if ends is None else (ends,)


def from_hf(source: Source) -> FlamingoConfig:
    """
    Raises:
      ValueError: see `special_tokens`; an option that ours does not have.
    """
    hf = source.config
    image_token, sight_ends = special_tokens(source)
    perceiver = hf.perceiver_config
    scalar = hf.alpha_type == "float"
    return FlamingoConfig(
        encoder=clip.vision_from_hf(hf.vision_config),
        connector=PerceiverConfig(
            latents=perceiver.resampler_n_latents,
            depth=perceiver.resampler_depth,
            heads=perceiver.resampler_n_heads,
            head_dim=perceiver.resampler_head_dim,
            qk_norm=perceiver.qk_layer_norms_perceiver,
            **RESAMPLER,
        )
        if hf.use_resampler
        else IdentityConfig(),
        lm=LMConfig(
            vocab_size=hf.vocab_size,
            max_len=hf.max_position_embeddings,
            width=hf.hidden_size,
            depth=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            activation=activation(hf.hidden_act, "hidden_act"),
            norm_eps=hf.rms_norm_eps,
            tied=hf.tie_word_embeddings,
            **_decoder.rope_fields(hf),
        ),
        image_token=image_token,
        features=(-1,),
        class_token=True,
        gated=GatedConfig(
            heads=hf.num_attention_heads,
            head_dim=hf.hidden_size // hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            activation=activation(hf.hidden_act, "hidden_act"),
            norm="rmsnorm",
            norm_eps=hf.rms_norm_eps,
            mlp_gated=True,
            qk_norm=hf.qk_layer_norms,
            gate="scalar" if scalar else "vector",
        ),
        new_tokens=hf.additional_vocab_size,
        every=hf.cross_layer_interval,
        sight_ends=sight_ends,
        context_width=hf.vision_config.embed_dim,
    )


def to_hf(config: FlamingoConfig) -> Any:
    """
    Raises:
      ValueError: if the connector is not one that the format has.
    """
    from transformers import IdeficsConfig

    connector, lm = config.connector, config.lm
    resampler: dict[str, Any] = {}
    if isinstance(connector, PerceiverConfig):
        resampler = {
            "resampler_n_latents": connector.latents,
            "resampler_depth": connector.depth,
            "resampler_n_heads": connector.heads,
            "resampler_head_dim": connector.head_dim,
            "qk_layer_norms_perceiver": connector.qk_norm,
        }
    elif not isinstance(connector, IdentityConfig):
        raise ValueError(
            f"the connector is {connector.name!r}; the format has 'perceiver' and 'identity' only"
        )
    vision = clip.vision_to_hf(config.encoder)
    vision["embed_dim"] = vision.pop("hidden_size")
    return IdeficsConfig(
        vision_config=vision,
        perceiver_config=resampler,
        use_resampler=bool(resampler),
        vocab_size=lm.vocab_size,
        additional_vocab_size=config.new_tokens,
        max_position_embeddings=lm.max_len,
        hidden_size=lm.width,
        num_hidden_layers=lm.depth,
        num_attention_heads=lm.heads,
        intermediate_size=lm.mlp_width,
        hidden_act=NAMES[lm.activation],
        rms_norm_eps=lm.norm_eps,
        tie_word_embeddings=lm.tied,
        alpha_type="float" if config.gated.gate == "scalar" else "vector",
        cross_layer_interval=config.every,
        qk_layer_norms=config.gated.qk_norm,
        image_token_id=config.image_token,
        **_decoder.rope_options(lm),
        **_decoder.NO_TOKENS | {"eos_token_id": next(iter(config.sight_ends), None)},
    )


def resampler_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    block, here = theirs + "blocks.*.", ours + "blocks/layers/"
    return (
        Row(theirs + "latents", ours + "latents", ARRAY),
        Row(block + "0.context_layer_norm", here + "context_norm", NORM),
        Row(block + "0.latents_layer_norm", here + "attention_norm", NORM),
        Row(block + "0.q_proj", here + "attention/query", LINEAR),
        Row(block + "0.k_proj", here + "attention/key", LINEAR),
        Row(block + "0.v_proj", here + "attention/value", LINEAR),
        Row(block + "0.output_proj", here + "attention/out", LINEAR),
        Row(block + "0.q_layer_norm", here + "attention/query_norm", NORM),
        Row(block + "0.k_layer_norm", here + "attention/key_norm", NORM),
        Row(block + "1.ln", here + "mlp_norm", NORM),
        Row(block + "1.fc", here + "mlp/up", LINEAR),
        Row(block + "1.c_proj", here + "mlp/down", LINEAR),
        Row(theirs + "layer_norm", ours + "final_norm", NORM),
    )


def gated_rows(config: FlamingoConfig) -> tuple[Row, ...]:
    ours = "gated/layers/"
    scalar = config.gated.gate == "scalar"
    gate = array((1,), ()) if scalar else array((1, 1, -1), (-1,))
    return (
        Row(LOOK + "input_layernorm", ours + "attention_norm", NORM),
        Row(LOOK + "cross_attn.q_proj", ours + "attention/query", LINEAR),
        Row(LOOK + "cross_attn.k_proj", ours + "attention/key", LINEAR),
        Row(LOOK + "cross_attn.v_proj", ours + "attention/value", LINEAR),
        Row(LOOK + "cross_attn.o_proj", ours + "attention/out", LINEAR),
        Row(LOOK + "cross_attn.q_layer_norm", ours + "attention/query_norm", NORM),
        Row(LOOK + "cross_attn.k_layer_norm", ours + "attention/key_norm", NORM),
        Row(LOOK + "alpha_cross_attn", ours + "attention_gate", gate),
        Row(LOOK + "post_attention_layernorm", ours + "mlp_norm", NORM),
        Row(LOOK + "mlp.gate_proj", ours + "mlp/gate", LINEAR),
        Row(LOOK + "mlp.up_proj", ours + "mlp/up", LINEAR),
        Row(LOOK + "mlp.down_proj", ours + "mlp/down", LINEAR),
        Row(LOOK + "alpha_dense", ours + "mlp_gate", gate),
    )


def rows(config: FlamingoConfig) -> Sequence[Row]:
    language = _decoder.rows(_decoder.PRE_NORMS)
    return (
        *clip.vision_rows(config.encoder, VISION, "encoder/"),
        *resampler_rows(CONNECTOR, "connector/resampler/"),
        *gated_rows(config),
        *(row._replace(ours=f"lm/{row.ours}") for row in language),
        Row("model.embed_tokens.additional_embedding", "new_token", EMBEDDING),
        Row("lm_head.additional_fc", "new_head", LINEAR),
    )


def ignored(config: FlamingoConfig) -> Sequence[str]:
    tied = (r"lm_head\.additional_fc\.weight",) if config.lm.tied else ()
    return (
        POSITION_IDS,
        r".*rotary_emb\.inv_freq",
        *_decoder.tied_head(config.lm),
        *tied,
    )


FAMILIES.register("IdeficsForVisionText2Text")(
    Family(
        model_type="idefics",
        model=Flamingo,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        ignored=ignored,
    )
)
