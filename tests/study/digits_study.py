"""A study of the smallest classifier; `broken`: with an arm that fails when it runs."""

from mmjax.config import parse_arg
from mmjax.study import Study


def get_study(arg: str | None = None) -> Study:
    arg = parse_arg(arg, broken=False, seeds=1, rates=1, steps=20)
    width = {"narrow": {"model.mlp_width": 32}, "wide": {"model.mlp_width": 64}}
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
