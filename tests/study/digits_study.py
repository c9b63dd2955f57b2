"""A study of the smallest classifier, of two arms and `more`; `broken`: with one that fails when it
runs.

python -m experiments.ablate --study tests/study/digits_study.py:broken,more=17 --workdir runs/many
"""

from mmjax.config import parse_arg
from mmjax.study import Study


def get_study(arg: str | None = None) -> Study:
    arg = parse_arg(arg, broken=False, more=0, seeds=1, rates=1, steps=20)
    width = {"narrow": {"model.mlp_width": 32}, "wide": {"model.mlp_width": 64}}
    width |= {f"wider {n}": {"model.mlp_width": 64 + 8 * n} for n in range(1, arg.more + 1)}
    if arg.broken:
        width["broken"] = {"model.mlp_width": 48, "optimizer.name": "adamx"}
    return Study(
        config="tests/experiments/digits_config.py",
        axes={"width": width},
        metric="eval/test/top1",
        rates=(2e-3, 4e-3)[: arg.rates],
        seeds=arg.seeds,
        arguments={"steps": arg.steps},
    )
