"""The registry of evaluators and what an evaluator is."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping
from typing import Any

from mmjax.config import ConfigError, split_name
from mmjax.evaluate.context import EvalContext
from mmjax.params import Params
from mmjax.registry import Registry, nearest


class Evaluator(abc.ABC):
    """Made once per run from its config's fields and the context, then run at chosen steps.

    `__init__` checks the fields and calls `context.compile`, so that a mistake shows before
    training and nothing is compiled twice.
    """

    @classmethod
    def check_data(cls, data: Mapping[str, Any], context: EvalContext) -> None:
        """Opens a data config, so that a mistake in it is told before training."""
        context.open(data)

    @abc.abstractmethod
    def run(self, params: Params) -> dict[str, float]:
        """The scores of the model with these parameters (by path), the same on every process."""

    def describe(self, scores: Mapping[str, float]) -> str:
        """The scores as text to print."""
        return "\n".join(f"{name:<40} {value:.4g}" for name, value in scores.items())


EVALUATORS: Registry[type[Evaluator]] = Registry("evaluator")


def make_evaluator(config: Mapping[str, Any], context: EvalContext, where: str) -> Evaluator:
    """An evaluator from its config.

    Args:
      config: `name` says which (see EVALUATORS), the other fields are its keyword arguments.
      context: where it runs.
      where: the place in the config, for error messages, e.g. "config.evals.heldout".

    Raises:
      UnknownNameError: if there is no such evaluator.
      ConfigError: naming every unknown and missing field.
    """
    name, fields = split_name(config, where)
    evaluator = EVALUATORS[name]
    parameters = dict(inspect.signature(evaluator).parameters)
    del parameters["context"]
    problems = [
        f"  {where}.{key} is unknown; {nearest(key, parameters)}"
        for key in fields
        if key not in parameters
    ]
    problems += [
        f"  {where}.{key} is missing"
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and key not in fields
    ]
    if problems:
        raise ConfigError(
            f"{where} does not describe the evaluator {name!r}:\n" + "\n".join(problems)
        )
    for value in fields.values():
        if isinstance(value, Mapping) and "sources" in value:
            # A path that does not exist is told now, not at the first evaluation, hours later.
            evaluator.check_data(value, context)
    return evaluator(context=context, **fields)
