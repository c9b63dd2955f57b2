"""Evaluators: plug-ins by name, run during training and by `experiments.evaluate`."""

from mmjax.evaluate import (  # noqa: F401
    captioning,
    choices,
    classification,
    drawing,
    likelihood,
    loss,
    probes,
    reconstruction,
    retrieval,
    vqa,
    zero_shot,
)
from mmjax.evaluate.base import EVALUATORS, Evaluator, make_evaluator
from mmjax.evaluate.context import FEATURES, Collected, EvalBatch, EvalContext
from mmjax.evaluate.sheets import ICONS_NOTE, learning_curves, retrieval_sheet

__all__ = [
    "EVALUATORS",
    "FEATURES",
    "ICONS_NOTE",
    "Collected",
    "EvalBatch",
    "EvalContext",
    "Evaluator",
    "learning_curves",
    "make_evaluator",
    "retrieval_sheet",
]
