"""Chameleon: a Llama with norms of queries and keys, over text tokens and the codes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmjax.convert.families import _decoder
from mmjax.convert.families._codes import check_marks, code_ids, id_of
from mmjax.convert.families._vlm import Part
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.convert.table import Row
from mmjax.models import VQGAN, LMConfig, Unified, UnifiedConfig
from mmjax.models.lm import QKNorm
from mmjax.models.unified import CodesConfig

TOKENIZER = Part("vq_config", VQGAN, "tokenizer/", "model.vqmodel.", types=("chameleon_vqgan",))
LANGUAGE = tuple(row._replace(ours=f"lm/{row.ours}") for row in _decoder.rows(_decoder.PRE_NORMS))
# Whatever `rms_norm_eps` says.
QK_NORM = QKNorm("layernorm", eps=1e-5, each=True)
PLACEMENTS = {False: "pre", True: "res_post"}
# Tokens by name: what holds the places of an image, and what stands around its codes.
IMAGE, BEGIN, END = "<image>", "<racm3:break>", "<eoss>"
# The code 305 is "IMGIMGDAFZ".
CODE = "IMGIMG([A-J]+)Z"
DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


def from_hf(source: Source) -> UnifiedConfig:
    """Raises ValueError if `vocabulary_map` lacks tokens, or heads are not as wide as the model
    reads them."""
    hf = source.config
    lm = LMConfig(
        **_decoder.fields(hf),
        **_decoder.rope_fields(hf),
        qkv_bias=hf.attention_bias,
        out_bias=hf.attention_bias,
        mlp_bias=hf.mlp_bias,
        norm_placement=PLACEMENTS[hf.swin_norm],
        qk_norm=True,
        qk_norm_as=QK_NORM,
    )
    if lm.head_dim is not None:
        raise ValueError(
            f"head_dim={lm.head_dim} with {lm.heads} heads does not make hidden_size={lm.width}."
        )
    tokenizer, names = TOKENIZER.from_hf(source), hf.vocabulary_map
    return UnifiedConfig(
        lm=lm,
        image=CodesConfig(
            tokenizer=tokenizer,
            ids=code_ids(
                names, CODE, lambda text: int(text.translate(DIGITS)), tokenizer.quantizer.size
            ),
            begin=id_of(names, BEGIN),
            end=id_of(names, END),
        ),
        image_token=id_of(names, IMAGE),
        follow="never",
    )


def to_hf(config: UnifiedConfig) -> Any:
    """The inverse of `from_hf`; `vocabulary_map` has the names that it reads, and no others.

    Raises:
      ValueError: if images have no end; see `Part.to_hf` as well.
    """
    from transformers import ChameleonConfig

    lm, image = config.lm, config.image
    check_marks(image, "end")
    options = _decoder.options(lm) | _decoder.rope_options(lm)
    del options["head_dim"]
    names = {IMAGE: config.image_token, BEGIN: image.begin, END: image.end}
    for code, number in enumerate(image.all_ids.tolist()):
        names[f"IMGIMG{str(code).translate(LETTERS)}Z"] = number
    return ChameleonConfig(
        **options,
        attention_bias=lm.out_bias,
        mlp_bias=lm.mlp_bias,
        swin_norm=lm.norm_placement == PLACEMENTS[True],
        vq_config=TOKENIZER.to_hf(image.tokenizer),
        vocabulary_map=names,
    )


def rows(config: UnifiedConfig) -> Sequence[Row]:
    return (*TOKENIZER.rows(config.image.tokenizer), *LANGUAGE)


FAMILIES.register("ChameleonForConditionalGeneration")(
    Family(
        model_type="chameleon",
        model=Unified,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=rows,
        ignored=lambda config: (r".*rotary_emb\.inv_freq", *_decoder.tied_head(config.lm)),
    )
)
