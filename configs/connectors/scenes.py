"""A vision-language model on composed scenes whose connector is the question: the arms of
configs/ablate/connectors.py.

python -m experiments.train --config configs/siglip/tiles.py:size=Xxs,concepts=tiny,steps=400 \
    --workdir runs/encoder
python -m experiments.train --config configs/lm/scenes.py --workdir runs/reader
python -m experiments.train --workdir runs/perceiver \
    --config configs/connectors/scenes.py:connector=perceiver,tokens=36

The encoder stays as it is. It reads a scene tile by tile, and its features are one grid of 12 x 12
(6 x 6 where tiles are small), which a connector makes `tokens` of. All connectors are about equally
large where they have a size to choose. Connector and language model are trained, by the loss of
answers alone.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from configs import weights
from configs.lm import scenes as reader
from mmjax import convert
from mmjax.config import ConfigError, parse_arg
from mmjax.data.scenes import CELL
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.models.sizes import vit_size
from mmjax.registry import nearest
from mmjax.train.experiment import base_config

PATCH, SIDE = 12, 3  # pixels of a patch; tiles along a side of the board


def _mlp(hidden: int) -> dict[str, Any]:
    return dict(name="mlp", hidden=hidden)


def _side(name: str, tokens: int, grid: int, sides: Iterable[int]) -> int:
    """Of a square grid of so many tokens.

    Args:
      name: of the connector.
      grid: side of the grid of features.
      sides: that the connector can make of it.

    Raises:
      ConfigError: it is none of them.
    """
    found = {side**2: side for side in sides}
    if tokens not in found:
        best = min(found, key=lambda count: abs(count - tokens))
        raise ConfigError(
            f"The connector {name!r} makes a square grid of tokens, and no {tokens} of "
            f"{grid} x {grid} features: the nearest that it can is tokens={best}."
        )
    return found[tokens]


def _kept(connector: dict[str, Any]) -> Callable[[int, int], dict[str, Any]]:
    def make(tokens: int, grid: int) -> dict[str, Any]:
        if tokens != grid**2:
            raise ConfigError(
                f"The connector {connector['name']!r} makes a token of each of the {grid} x {grid} "
                f"features: tokens={grid**2}, not {tokens}; or tiles of another size, with res."
            )
        return connector

    return make


def _pixel_shuffle(tokens: int, grid: int) -> dict[str, Any]:
    divisors = (side for side in range(1, grid + 1) if grid % side == 0)
    factor = grid // _side("pixel_shuffle", tokens, grid, divisors)
    # Wide squares need a narrow layer between them and the tokens.
    return dict(name="pixel_shuffle", factor=factor, projection=_mlp(128 if factor > 2 else 416))


def _averaged(name: str, **options: Any) -> Callable[[int, int], dict[str, Any]]:
    def make(tokens: int, grid: int) -> dict[str, Any]:
        side = _side(name, tokens, grid, range(1, grid + 1))
        return dict(name=name, grid=(side, side), **options)

    return make


def _perceiver(depth: int) -> Callable[[int, int], dict[str, Any]]:
    return lambda tokens, grid: dict(
        name="perceiver", latents=tokens, depth=depth, heads=4, head_dim=32, mlp_ratio=2
    )


# {name: (tokens, side of the grid of features) -> the connector}
CONNECTORS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "linear": _kept(dict(name="linear")),
    "mlp": _kept(_mlp(1024)),
    "pooling": _averaged("pooling", projection=_mlp(1024)),
    "pixel_shuffle": _pixel_shuffle,
    "c_abstractor": _averaged("c_abstractor", width=144, depth=2),
    "perceiver": _perceiver(2),
    "qformer": lambda tokens, grid: dict(
        name="qformer", queries=tokens, width=112, depth=2, heads=4, mlp_width=128, cross_every=1
    ),
    # Gated cross-attention between the language model's blocks, as Flamingo: its visual tokens are
    # those of a resampler, which is smaller by what the gated block has.
    "cross_attention": _perceiver(1),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: connector, a name in `CONNECTORS`; tokens, that it makes of a scene; res, the side of a
        tile in pixels: 48, as drawn, or 24; feature, the block of the encoder whose output is read
        (-1: the last); freeze, of the language model: "no" or "yes"; encoder, the run whose image
        tower is taken; size, of it; lm, a run of configs/lm/scenes.py or "smollm2"; concepts;
        steps, batch (scenes), questions (of each scene), lr; dtype; eval (questions of new scenes;
        half as many choose between rates).
    """
    arg = parse_arg(
        arg,
        connector="mlp",
        tokens=144,
        res=CELL,
        feature=-1,
        freeze="no",
        encoder="runs/encoder",
        size="Xxs",
        lm="runs/reader",
        concepts="tiny",
        steps=300,
        batch=8,
        questions=12,
        lr=3e-3,
        dtype="float32",
        eval=300,
    )
    if arg.connector not in CONNECTORS:
        raise ConfigError(f"connector={arg.connector}; {nearest(arg.connector, CONNECTORS)}")
    if arg.res < PATCH or arg.res % PATCH:
        raise ConfigError(f"res={arg.res} is no multiple of the patch of {PATCH} pixels.")
    if arg.freeze not in ("no", "yes"):
        raise ConfigError(f"freeze={arg.freeze}; {nearest(arg.freeze, ('no', 'yes'))}")
    tokenizer: dict[str, Any] = dict(name="run", directory=arg.lm)
    lm, words, image_token = reader.MODEL, arg.lm, 1  # "<unk>", which no text has
    if arg.lm == "smollm2":
        words, image_token = weights.SMOLLM2, 6  # "<filename>"
        tokenizer = dict(name="gguf", path=words)
        lm = dataclasses.asdict(convert.open_checkpoint(words).config)
    grid = SIDE * arg.res // PATCH
    crosses = arg.connector == "cross_attention"
    connector = CONNECTORS[arg.connector](arg.tokens, grid)
    model = dict(
        name="vlm",
        encoder=dict(
            image_size=arg.res,
            **vit_size(f"{arg.size}/{PATCH}"),
            activation="gelu_tanh",
            norm_eps=1e-6,
            pooling="none",
            position="sincos2d",
            dtype=arg.dtype,
        ),
        connector=dict(name="board", rows=SIDE, columns=SIDE, whole=connector),
        lm=lm | dict(dtype=arg.dtype),
        image_token=image_token,
        features=(arg.feature,),
        features_norm=True,
    )
    if crosses:
        model |= dict(
            name="flamingo",
            gated=dict(heads=4, head_dim=32, mlp_width=256),
            every=lm["depth"],  # one block: two would be larger than other connectors
            after=0,
        )
    # What is asked of a scene has twelve tokens a question, at most seventeen; of these, seven are
    # learnt at most.
    length = (1 if crosses else arg.tokens) + 18 * arg.questions
    targets = 8 * arg.questions

    def data(split: str, **form) -> dict:
        source = dict(
            name="tfds",
            dataset=f"scenes/{arg.concepts}",
            split=split,
            form=dict(name="questions") | form,
        )
        conversation = dict(
            template="interleaved" if crosses else "qa",
            max_len=length,
            images=SIDE**2,
            layout=dict(
                name="board",
                preset="siglip",
                size=arg.res,
                tokens=1 if crosses else arg.tokens,
                rows=SIDE,
                columns=SIDE,
            ),
            parents=True,
            image_token=image_token,
        )
        return dict(sources=[source], conversation=conversation)

    train = data("train", turns=arg.questions, apart=True)
    train["conversation"] |= dict(max_targets=targets)
    asked = dict(
        name="vqa",
        every=arg.steps,
        max_new_tokens=6,
        batch_size=32,
        note=ICONS_NOTE,
    )
    # The language model knows what is asked for, and a connector has far to go: at one rate for
    # both it has forgotten how to answer before it is shown anything that it can read.
    kept, rates = "encoder/.*", (("lm/.*", 0.1), (".*", 1.0))
    if arg.freeze == "yes":
        kept, rates = "(encoder|lm)/.*", ((".*", 1.0),)
    if crosses:
        # Gates open from zero, as far as the rate takes them in so few steps.
        rates = (("gated/.*_gate", 10.0), *rates)
    return base_config(
        task=dict(name="vlm", targets=targets),
        model=model,
        init=(("encoder/(.*)", arg.encoder, r"image/\1"), ("lm/(.*)", words, r"\1")),
        data=dict(
            tokenizer=tokenizer,
            train=train,
            workers=0,
            threads=1,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            options=dict(b2=0.95),
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        rules=dict(trainable=((kept, False), (".*", True)), learning_rate=rates),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=max(arg.steps // 20, 1)),
        checkpoint=dict(every=arg.steps),
        evals=dict(
            validation=asked
            | dict(data=data("validation"), limit=arg.eval // 2, controls=(), title="Validation"),
            test=asked
            | dict(
                data=data("test"),
                limit=arg.eval,
                controls=("blind", "shuffled"),
                answers="test.jsonl",
                title="New scenes",
            ),
        ),
    )
