"""A unified model on OpenMoji: names of pictures and pictures of names, by one transformer.

python -m experiments.train --config configs/vq/openmoji.py --workdir runs/vq
python -m experiments.train --config configs/siglip/openmoji.py:tinted,res=64,patch=16,steps=900 \\
    --workdir runs/judge
python -m experiments.train --config configs/unified/openmoji.py --workdir runs/unified

The stream is text and the codes of the image tokenizer of the first run; the second one's encoder
judges what is drawn. Icons are those of OpenMoji, and 64 of them in eight colours, of which each
lacks one: "green cat" is held out, "green dog" and "red cat" are not.
"""

from ml_collections import ConfigDict

from configs.vq import openmoji as vq
from mmjax.config import parse_arg
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.models.sizes import vit_size
from mmjax.train.experiment import base_config

# Of text; <image>, </image> and <code> are its tokens 4 to 6.
VOCABULARY = 2048
SPECIAL = ("<image>", "</image>", "<code>")
BEGIN, END, CODE = 4, 5, 6


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: tokenizer, the run whose image tokenizer is taken; quantizer, codes, of that run; judge,
        the run of an encoder; steps, batch (rows), length (tokens of a row), lr; width, depth,
        heads; drop (dropout), apart, experts, positions (options of `UnifiedConfig`); decoupled
        (images that are named go through an encoder, as in Janus); encoder, its size; eval (texts
        and pictures of each evaluation).
    """
    arg = parse_arg(
        arg,
        tokenizer="runs/vq",
        judge="runs/judge",
        quantizer="ema",
        codes=512,
        steps=2000,
        batch=16,
        length=152,
        lr=3e-3,
        width=256,
        depth=6,
        heads=4,
        drop=0.0,
        apart=False,
        experts=False,
        positions=True,
        decoupled=False,
        encoder="Xs",
        eval=100,
    )
    tokenizer = vq.get_config(f"quantizer={arg.quantizer},codes={arg.codes}").model.tokenizer
    tokenizer = tokenizer.to_dict()
    side = tokenizer["image_size"]
    model = dict(
        name="unified",
        lm=dict(
            vocab_size=VOCABULARY + (0 if arg.apart else arg.codes),
            max_len=arg.length,
            width=arg.width,
            depth=arg.depth,
            heads=arg.heads,
            mlp_width=arg.width * 8 // 3 // 64 * 64,
            activation="silu",
            norm_eps=1e-5,
            tied=False,
            rope=dict(theta=10_000.0),
            qk_norm=True,
            dropout=arg.drop,
            experts=2 if arg.experts else 1,
        ),
        image=dict(tokenizer=tokenizer, ids=VOCABULARY, begin=BEGIN, end=END),
        image_token=CODE,
        apart=dict() if arg.apart else None,
        modality_embeddings=arg.positions,
        grid_positions=arg.positions,
    )
    codes = (side // 8) ** 2
    layout = dict(name="codes", tokens=codes)
    if arg.decoupled:
        encoder = dict(
            image_size=side,
            **vit_size(f"{arg.encoder}/8"),
            activation="gelu_tanh",
            norm_eps=1e-6,
            pooling="none",
            position="sincos2d",
        )
        model |= dict(name="janus", encoder=encoder, connector=dict(name="mlp"))
        layout = dict(name="decoupled", read=codes, codes=codes)
    layout |= dict(preset="siglip", size=side, begin=SPECIAL[0], end=SPECIAL[1])

    def source(dataset: str, split: str, form: dict, weight: float = 1.0, augment=()) -> dict:
        found = dict(name="tfds", dataset=dataset, split=split, form=form, weight=weight)
        return found | dict(augment=augment) if augment else found

    def data(*sources: dict, **options) -> dict:
        conversation = dict(
            template="stream",
            max_len=arg.length,
            images=2,
            layout=layout,
            image_token=CODE,
        )
        return dict(sources=list(sources), conversation=conversation | options)

    # What is drawn is seen upright and of one size, what is named is seen as the demo of SigLIP
    # sees it. Of tinted icons the colour is told: it stays.
    upright = dict(name="icon_view", rotate=4.0, zoom=(0.92, 0.98), shift=0.02, ground=235)
    keep = dict(tint=0.0, brightness=0.0)
    draw, name = dict(name="drawing", alone=0.1), dict(name="caption", prompts=("",))
    train = data(
        source("openmoji", "train", draw, 1.5, (upright | dict(tint=0.03, brightness=0.03),)),
        source("openmoji", "train", name, 1.5, (dict(name="icon_view"),)),
        source("tinted", "train", draw, 1.0, (upright | keep,)),
        source("tinted", "train", name, 0.5, (dict(name="icon_view") | keep,)),
        pack=True,
    )
    every = -(-arg.steps // 3)  # the last of three is the end

    def views(dataset: str, split: str, **form) -> dict:
        return data(source(dataset, split, name | form))

    def glyphs(dataset: str, split: str) -> dict:
        return data(source(dataset, split, dict(name="drawing")))

    seen = views("openmoji", "seen_views", also_field="aliases")
    held = views("tinted", "composition")
    judged = dict(
        name="drawing",
        every=arg.steps,
        encoder=arg.judge,
        limit=arg.eval,
        guidance=(1.0, 3.0),
        sheet_rows=10,
        note=ICONS_NOTE,
    )
    named = dict(
        name="naming",
        every=every,
        limit=2 * arg.eval,
        max_new_tokens=12,
        controls=("shuffled",),
        note=ICONS_NOTE,
    )
    chosen = dict(every=arg.steps, limit=arg.eval, controls=("shuffled",), note=ICONS_NOTE)
    return base_config(
        task=dict(name="unified", z_loss=1e-5),
        model=model,
        init=(("tokenizer/(.*)", arg.tokenizer, r"tokenizer/\1"),),
        data=dict(
            tokenizer=dict(name="wordpiece", vocab_size=VOCABULARY, special_tokens=SPECIAL),
            train=train,
            workers=0,
            threads=2,
            prefetch=4,
        ),
        optimizer=dict(
            name="muon",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        rules=dict(trainable=(("tokenizer/.*", False), (".*", True))),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=every),
        evals=dict(
            names=named
            | dict(data=seen, sheet="names.png", title="New views of seen concepts, named"),
            names_composition=named
            | dict(data=held, title="Icons in colours that were held out of them, named"),
            name_choice=chosen
            | dict(name="name_choice", data=seen, title="The name of a view, among 20"),
            name_choice_composition=chosen
            | dict(
                name="name_choice",
                data=held,
                others_from=views("tinted", "all_glyphs"),
                title="The name of a held-out composition, among 20",
            ),
            picture_choice=chosen
            | dict(
                name="picture_choice",
                data=glyphs("tinted", "composition_glyphs"),
                title="The picture of a held-out composition, among 20",
            ),
            drawings=judged
            | dict(
                data=glyphs("openmoji", "train"),
                sheet="drawings.png",
                title="Pictures drawn of the names of seen concepts",
            ),
            drawings_composition=judged
            | dict(
                data=glyphs("tinted", "composition_glyphs"),
                distractors=glyphs("tinted", "all_glyphs"),
                sheet="compositions.png",
                title="Pictures drawn of compositions that were held out",
            ),
        ),
    )
