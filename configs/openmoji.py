"""What the two-tower experiments on OpenMoji share."""

import math

from ml_collections import ConfigDict

from configs import weights
from mmjax.config import parse_arg
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.models.sizes import text_size, vit_size
from mmjax.train.experiment import base_config

VOCABULARY, MAX_LEN = 2048, 12


def two_towers(model: str, arg: str | None) -> ConfigDict:
    """A SigLIP or CLIP on OpenMoji.

    Args:
      model: "siglip" or "clip".
      arg: size (of both towers), res (pixels), patch, batch, steps, lr, drop (share of the patches
        left out in training), chunked, dtype; tinted (also icons in eight colours, for an encoder
        that judges drawings); weights and towers (see `configs.weights`).
    """
    arg = parse_arg(
        arg,
        size="Xs",
        res=48,
        patch=12,
        batch=128,
        steps=700,
        lr=3e-3,
        drop=0.0,
        chunked=False,
        dtype="float32",
        tinted=False,
        **weights.ARGUMENTS,
    )
    common = dict(activation="gelu_tanh", norm_eps=1e-6, dtype=arg.dtype)
    image = dict(
        image_size=arg.res,
        **vit_size(f"{arg.size}/{arg.patch}"),
        # Of the published choices those that learn most in minutes: SigLIP's attention pooling and
        # learned positions start more slowly (at 200 steps of AdamW the loss is 4.5, not 4.2).
        pooling="mean",
        position="sincos2d",
        patch_dropout=arg.drop,
        **common,
    )
    text = dict(vocab_size=VOCABULARY, max_len=MAX_LEN, **text_size(arg.size), **common)
    # Names are short and simple.
    text["depth"] = max(text["depth"] // 2, 1)
    if model == "siglip":
        text |= dict(attention="bidirectional", pooling="mean", padding="mask")
        # The published bias of -10 suits batches of 32,768; this is the same prior for small ones.
        fields = dict(image=image, text=text, init_bias=-math.log(arg.batch))
        loss = "sigmoid"
    else:
        # 3 is <eos> of the tokenizers that mmjax trains.
        text |= dict(attention="causal", pooling="eos", eos_id=3, padding="attend")
        fields = dict(image=image, text=text, embed_dim=image["width"])
        loss = "softmax"
    fields, init = weights.pair(dict(name=model, **fields), arg.weights, arg.towers)
    max_len = fields["text"]["max_len"]
    tokenizer = dict(name="wordpiece", vocab_size=VOCABULARY)
    if init and arg.towers != "image":  # a text tower comes with its words
        tokenizer = dict(name="hf", directory=arg.weights)

    def data(split: str, augment: tuple = ()) -> dict:
        return dict(
            sources=[dict(name="tfds", dataset="openmoji", split=split)],
            image=dict(preset="siglip", size=arg.res, augment=augment),
            text=dict(max_len=max_len),
            label=dict(),
        )

    train = data("train", (dict(name="icon_view"),))
    train["text"] |= dict(also="aliases", also_share=0.3)
    if arg.tinted:
        train["sources"].append(dict(name="tfds", dataset="tinted", split="all_glyphs", weight=0.5))
    every = max(arg.steps // 4, 1)
    return base_config(
        task=dict(name="contrastive", loss=loss, chunked=arg.chunked),
        model=fields,
        init=init,
        data=dict(
            tokenizer=tokenizer,
            train=train,
            workers=0,
            threads=2,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            # In the same number of steps it goes about twice as far as AdamW.
            name="muon",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.1,
        ),
        # Scale and bias have far to go in few steps.
        rules=dict(learning_rate=(("logit_.*", 10.0), (".*", 1.0))),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=every),
        evals=dict(
            seen=dict(
                name="retrieval",
                every=every,
                queries=data("seen_views"),
                distractors=data("heldout"),
                reference=data("train"),
                title="OpenMoji, new views of seen concepts among all concepts",
                note=ICONS_NOTE,
            ),
            heldout=dict(
                name="retrieval",
                every=every,
                queries=data("heldout"),
                reference=data("train"),
                sheet="heldout.png",
                title="OpenMoji, held-out concepts",
                note=ICONS_NOTE,
            ),
            heldout_among_all=dict(
                name="retrieval",
                every=arg.steps,
                queries=data("heldout"),
                distractors=data("seen_views"),
                title="OpenMoji, held-out concepts among all concepts",
                note=ICONS_NOTE,
            ),
        ),
    )
