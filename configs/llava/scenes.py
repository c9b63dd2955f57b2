"""A vision-language model on composed scenes and easy-VQA, in stages, on two CPU cores.

An encoder of our own (configs/siglip/tiles.py), a connector, and SmolLM2-135M-Instruct:

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles
python -m experiments.train --config configs/llava/scenes.py:stage=align --workdir runs/align
python -m experiments.train --config configs/llava/scenes.py:stage=tune --workdir runs/tune

`align` trains the connector on captions, `tune` connector and language model on questions; `single`
is the second without the first. As LLaVA (Liu et al., 2023), whose figures these are not: the data
are icons.

Visual tokens are mixtures of the language model's own (AlignVLM), and alignment teaches them the
words of captions. With `connector=mlp`, and in the single stage, a connector is trained by the
language model's loss alone, as LLaVA's.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import weights
from mmjax import convert
from mmjax.config import ConfigError, parse_arg
from mmjax.data.scenes import CELLS
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.models.sizes import vit_size
from mmjax.models.vlm import VLMConfig
from mmjax.registry import nearest
from mmjax.train.experiment import base_config
from mmjax.train.handover import model_dataclass

STAGES = ("align", "tune", "single")
# The placeholder of visual tokens: a special token that no text here has ("<filename>").
IMAGE_TOKEN = 6

# A cell of a scene is a tile: 4 x 4 patches, and one visual token.
ENCODER = dict(
    image_size=48,
    **vit_size("Xs/12"),
    activation="gelu_tanh",
    norm_eps=1e-6,
    pooling="none",
    position="sincos2d",
)
CONNECTORS = {
    "align": lambda lm: dict(name="align", vocab_size=lm.vocab_size),
    "mlp": lambda lm: dict(name="mlp"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: stage; encoder, lm and start, the runs or checkpoints whose weights are taken; connector,
        what the 16 features of a tile go through together: "align" (default; not of the single
        stage) or "mlp"; steps, batch (rows), length (tokens of a row), lr; eval (questions of each
        set).
    """
    arg = parse_arg(
        arg,
        stage="align",
        encoder="runs/tiles",
        lm="",
        start="runs/align",
        connector="",
        steps=0,
        batch=0,
        length=384,
        lr=0.0,
        eval=400,
    )
    if arg.stage not in STAGES:
        raise ConfigError(f"stage={arg.stage}; {nearest(arg.stage, STAGES)}")
    connector = arg.connector or ("mlp" if arg.stage == "single" else "align")
    if connector not in CONNECTORS:
        raise ConfigError(f"connector={connector}; {nearest(connector, CONNECTORS)}")
    lm = arg.lm or weights.SMOLLM2
    lm_config = convert.open_checkpoint(lm).config
    projection = CONNECTORS[connector](lm_config)
    model = dict(
        name="vlm",
        encoder=ENCODER,
        connector=dict(name="pixel_shuffle", factor=4, projection=projection),
        lm=dataclasses.asdict(lm_config),
        image_token=IMAGE_TOKEN,
        features=(-1,),
        features_norm=True,
    )
    made: VLMConfig = model_dataclass(model)
    aligning = arg.stage == "align"
    naming = aligning and made.connector.names_words
    init = (("encoder/(.*)", arg.encoder, r"image/\1"), ("lm/(.*)", lm, r"\1"))
    tables = ()
    if made.connector.names_words:
        # The language model's own words.
        words = "connector/projection/(head|token)/embedding"
        init, tables = ((words, lm, "token/embedding"), *init), ((words, False),)
    if arg.stage == "tune":
        init = ((".*", arg.start, r"\g<0>"),)
    new = 10.0  # a new connector has far to go
    # Little of the language model may change in steps of some twenty questions. Its table of tokens
    # is to keep the words that no question of training has, the encoder what they look like.
    kept = "(encoder|lm/token)/.*" if arg.stage == "tune" else "lm/token/.*"
    trainable = (*tables, (kept, False), (".*", True))
    rates = ((".*", 0.35),)
    if arg.stage == "single":
        rates = (("connector/.*", new), *rates)
    if aligning:
        trainable = (*tables, ("connector/.*", True), (".*", False))
        rates = ((".*", new),)
    steps = arg.steps or ((800 if naming else 300) if aligning else 700)
    batch = arg.batch or (2 if naming else 1)

    def data(*sources: dict, **options) -> dict:
        conversation = dict(
            # Captions follow their image without a question, as in LLaVA's first stage.
            template="caption" if aligning else "qa",
            max_len=arg.length,
            images=64 if aligning else 28,  # more than most rows have: each costs the encoder
            layout=dict(
                name="tiles",
                preset="siglip",
                size=48,
                tokens=made.image_tokens,
                rows=3,
                columns=3,
                markers=tuple(
                    tuple(f" {cell}:" for cell in CELLS[row : row + 3]) for row in (0, 3, 6)
                ),
            ),
            parents=True,
            image_token=IMAGE_TOKEN,
        )
        return dict(sources=list(sources), conversation=conversation | options)

    def scenes(split: str, **form) -> dict:
        return dict(
            name="tfds", dataset="scenes/small", split=split, form=dict(name="questions") | form
        )

    def easy(split: str, **form) -> dict:
        return dict(name="easy_vqa", split=split, form=dict(name="questions") | form)

    tiles = dict(
        name="tfds", dataset="scene_tiles/small", split="seen+heldout+blank", form="caption"
    )
    if aligning:
        captions = easy("train", name="caption", text_field="caption")
        train = [tiles | dict(weight=10.0), captions | dict(weight=2.0)]
    else:
        train = [
            scenes("train", turns=14, apart=True, caption=0.5, caption_field="captions")
            | dict(weight=3.0),
            easy("train", turns=8, apart=True) | dict(weight=2.0),
            tiles | dict(weight=1.0),
        ]
    targets = 3 * arg.length // 4 if aligning else arg.length // 3
    evals = {}
    if not aligning:
        for key, source, title in (
            ("scenes", scenes("test"), "Scenes of concepts seen in training"),
            ("heldout", scenes("heldout"), "Scenes of held-out concepts"),
            ("easy_vqa", easy("test"), "easy-VQA"),
        ):
            evals[key] = dict(
                name="vqa",
                every=steps,
                data=data(source),
                limit=arg.eval,
                max_new_tokens=8,
                batch_size=32,
                controls=("blind",),
                answers=f"{key}.jsonl",
                sheet=f"{key}.png",
                title=title,
                note=ICONS_NOTE,
            )
    return base_config(
        task=dict(name="words") if naming else dict(name="vlm", targets=targets),
        model=model,
        init=init,
        data=dict(
            tokenizer=dict(name="gguf", path=lm),
            train=data(*train, pack=True, max_targets=targets),
            workers=0,
            threads=1,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            options=dict(b2=0.95),
            learning_rate=arg.lr or 1e-3,
            schedule=dict(name="cosine", warmup=steps // 20),
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        rules=dict(trainable=trainable, learning_rate=rates),
        train=dict(steps=steps, batch_size=batch, log_every=20),
        checkpoint=dict(every=steps),
        evals=evals,
    )
