"""Which connector, with how many tokens: the study of connectors, on two CPU cores.

python -m experiments.ablate --study configs/ablate/connectors.py --workdir runs/connectors \
    --processes 2

An image encoder and a small language model are trained first; then, for each arm, connector and
language model on questions about composed scenes (configs/connectors/scenes.py). Rates are chosen
on validation scenes, arms are compared on others.

- `:smoke` is for tests: a few steps, and one budget a connector.
- `:full` is for one GPU: SmolLM2-135M-Instruct, 105 concepts and a larger encoder, one budget a
  connector, several processes at a time (`--processes 6`).
"""

from configs.connectors.scenes import CONNECTORS
from mmjax.config import ConfigError
from mmjax.registry import nearest
from mmjax.study import Study

KEEPS = ("linear", "mlp")  # a token of each feature
TOKENS, ALL = (9, 36), 144
# As few tokens as the middle budget by half the resolution; and a language model that stays as it
# is.
BESIDE = {"mlp,tokens=36,res=24": dict(connector="mlp", tokens=36, res=24)} | {
    f"{name},tokens=36,frozen LM": dict(connector=name, tokens=36, freeze="yes")
    for name in ("perceiver", "cross_attention")
}
SKIP = [dict(connector=name, tokens=tokens) for name in KEEPS for tokens in TOKENS] + [
    dict(connector=name, tokens=ALL) for name in CONNECTORS if name not in KEEPS
]


def _both(*names: str) -> list[str]:
    """The arms of connectors at the smaller two budgets."""
    return [f"connector={name},tokens={tokens}" for name in names for tokens in TOKENS]


SIZED = [name for name in CONNECTORS if name not in KEEPS]
# What the literature has found, as questions to this study.
CONTRASTS = {
    "resolution (MM1): pixel shuffle - MLP of half the resolution, 36 tokens": (
        "connector=pixel_shuffle,tokens=36",
        "mlp,tokens=36,res=24",
    ),
    "tokens (MM1): 36 - 9, all connectors": (
        [f"connector={name},tokens=36" for name in SIZED],
        [f"connector={name},tokens=9" for name in SIZED],
    ),
    "pooling - Q-Former (DeCo)": (_both("pooling"), _both("qformer")),
    "locality (Honeybee): pooling, pixel shuffle, C-Abstractor - Perceiver, Q-Former": (
        _both("pooling", "pixel_shuffle", "c_abstractor"),
        _both("perceiver", "qformer"),
    ),
    "C-Abstractor - Perceiver (Honeybee)": (_both("c_abstractor"), _both("perceiver")),
    "cross-attention - Perceiver, language model trained (Idefics2), 36 tokens": (
        "connector=cross_attention,tokens=36",
        "connector=perceiver,tokens=36",
    ),
    "cross-attention - Perceiver, language model frozen (Idefics2), 36 tokens": (
        "cross_attention,tokens=36,frozen LM",
        "perceiver,tokens=36,frozen LM",
    ),
    "MLP - linear (LLaVA-1.5), 144 tokens": (
        "connector=mlp,tokens=144",
        "connector=linear,tokens=144",
    ),
}
# Without these, a connector has one budget.
SECOND_BUDGET = [dict(tokens=TOKENS[0])]

SIZES = {
    "": dict(
        steps=250,
        batch=8,
        rates=(5e-4, 1e-3, 2e-3),
        seeds=3,
        eval=300,
        encoder=400,
        reader=1500,
    ),
    "smoke": dict(steps=2, batch=2, rates=(1e-3,), seeds=1, eval=4, encoder=2, reader=2),
    "full": dict(steps=300, batch=16, rates=(3e-4, 1e-3), seeds=3, eval=400, encoder=800),
}


def get_study(arg: str | None = None) -> Study:
    """See the module.

    Args:
      arg: "smoke", "full", or nothing.
    """
    size, full, every = arg or "", arg == "full", not arg
    if size not in SIZES:
        raise ConfigError(f"{size!r} is no size of this study; {nearest(size, SIZES)}")
    sizes = SIZES[size]
    concepts, encoder = ("small", "Xs") if full else ("tiny", "Xxs")
    before = dict(
        encoder=f"configs/siglip/tiles.py:concepts={concepts},size={encoder},"
        f"steps={sizes['encoder']}"
    )
    arguments = dict(concepts=concepts, size=encoder)
    if full:
        arguments |= dict(lm="smollm2", dtype="bfloat16")
    else:
        before["lm"] = f"configs/lm/scenes.py:concepts={concepts},steps={sizes['reader']}"
    return Study(
        config="configs/connectors/scenes.py",
        axes=dict(connector=tuple(CONNECTORS), tokens=(*TOKENS, ALL)),
        metric="eval/validation/accuracy",
        score="eval/test/accuracy",
        rates=sizes["rates"],
        seeds=sizes["seeds"],
        before=before,
        skip=SKIP if every else SKIP + SECOND_BUDGET,
        beside=BESIDE if every else {},
        contrasts=CONTRASTS if every else {},
        arguments=arguments | {name: sizes[name] for name in ("steps", "batch", "eval")},
        slurm=dict(timeout_min=60, cpus_per_task=2),
    )
