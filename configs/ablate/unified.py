"""What a unified model shares between words and pictures: encoder, tables and head, MLPs.

python -m experiments.ablate --study configs/ablate/unified.py --workdir runs/unified_study

Arms differ in three ways: whether images that are named are read as codes or through an encoder of
their own (`decoupled`, Janus), whether codes have tables and a head of their own (`apart`), and
whether they have MLPs of their own (`experts`, MoMa). An image tokenizer and an encoder that judges
are trained first. `:score=names` compares arms by how they name pictures, `:score=drawings` by what
they draw of held-out compositions.
"""

from mmjax.config import ConfigError, parse_arg
from mmjax.registry import nearest
from mmjax.study import Study

SCORES = {
    "names": "eval/names/accuracy",
    "drawings": "eval/drawings_composition/guidance_3/R@1",
}


def get_study(arg: str | None = None) -> Study:
    """See the module.

    Args:
      arg: score; steps, batch, eval, of the arms; seeds; before (steps of what is trained first).
    """
    arg = parse_arg(arg, score="drawings", steps=1000, batch=16, eval=100, seeds=3, before=2000)
    if arg.score not in SCORES:
        raise ConfigError(f"{arg.score!r} is no score of this study; {nearest(arg.score, SCORES)}")
    return Study(
        config="configs/unified/openmoji.py",
        axes=dict(decoupled=(False, True), apart=(False, True), experts=(False, True)),
        metric=SCORES[arg.score],
        rates=(1e-3, 3e-3),
        seeds=arg.seeds,
        before=dict(
            tokenizer=f"configs/vq/openmoji.py:steps={arg.before}",
            judge=f"configs/siglip/openmoji.py:tinted,steps={arg.before // 2}",
        ),
        arguments=dict(steps=arg.steps, batch=arg.batch, eval=arg.eval),
        slurm=dict(timeout_min=120, cpus_per_task=2),
    )
