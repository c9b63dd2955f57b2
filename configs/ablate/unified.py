"""What a unified model has apart for words and pictures: encoder, tables and head, MLPs.

python -m experiments.ablate --study configs/ablate/unified.py --workdir runs/unified_study \\
    --processes 2

Arms of one transformer, `encoder`: images that are named are read through an encoder of their own,
not as codes (Janus); `tables`: codes have a table and a head of their own; `experts`: they have
MLPs of their own (MoMa); `all` of these, or `nothing`. An image tokenizer and an encoder that
judges come first.

Rates are chosen by pictures of seen concepts, and arms are compared by those of held-out
compositions; `:score=names` does both by names instead. summary.csv has all scores either way.
"""

from mmjax.config import ConfigError, parse_arg
from mmjax.registry import nearest
from mmjax.study import Study

# What rates are chosen by, and what arms are compared by.
SCORES = {
    "drawings": ("eval/drawings/guidance_3/CLIPScore", "eval/drawings_composition/guidance_3/R@1"),
    "names": ("eval/name_choice/accuracy", "eval/name_choice_composition/accuracy"),
}
OWN = dict(
    nothing={},
    encoder=dict(decoupled=True, encoder="Xxs"),
    tables=dict(apart=True),
    experts=dict(experts=True),
    all=dict(decoupled=True, encoder="Xxs", apart=True, experts=True),
)


def get_study(arg: str | None = None) -> Study:
    """See the module.

    Args:
      arg: score; steps, batch, width, depth, eval, of the arms; seeds; tokenizer, judge, the steps
        of what comes first.
    """
    arg = parse_arg(
        arg,
        score="drawings",
        steps=500,
        batch=16,
        width=128,
        depth=4,
        eval=100,
        seeds=3,
        tokenizer=2000,
        judge=900,
    )
    if arg.score not in SCORES:
        raise ConfigError(f"{arg.score!r} is no score of this study; {nearest(arg.score, SCORES)}")
    metric, score = SCORES[arg.score]
    judge = "configs/siglip/openmoji.py:tinted,res=64,patch=16"
    return Study(
        config="configs/unified/openmoji.py",
        axes=dict(own=OWN),
        metric=metric,
        score=score,
        rates=(3e-3, 1e-2),
        seeds=arg.seeds,
        before=dict(
            tokenizer=f"configs/vq/openmoji.py:steps={arg.tokenizer}",
            judge=f"{judge},steps={arg.judge}",
        ),
        arguments={name: arg[name] for name in ("steps", "batch", "width", "depth", "eval")},
        slurm=dict(timeout_min=120, cpus_per_task=2),
    )
