"""From a config to the parts of an experiment: mesh, model, shardings, optimizer, step.

Nothing here allocates a parameter or reads data, so that `experiments.plan` can use it for a mesh
that is not there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import mmjax
from mmjax import convert, flops, rules, sharding
from mmjax.config import ConfigError, dataclass_from, split_name, type_problems
from mmjax.data.spec import batch_fields
from mmjax.data.tokenizer import Tokenizer
from mmjax.nn import backend, lora
from mmjax.nn.partition import activation_sharding
from mmjax.params import Params, abstract, merge
from mmjax.paths import located
from mmjax.registry import nearest
from mmjax.train import (  # (tasks are found by name)
    checkpoints,
    image_tasks,  # noqa: F401
    state,
    unified_task,  # noqa: F401
)
from mmjax.train.handover import (
    check_adapters,
    check_handover,
    check_tokens,
    grow,
    is_checkpoint,
    model_dataclass,
    smaller_vocabularies,
    with_tokens,
)
from mmjax.train.optimizers import OptimizerConfig, is_factor, make_optimizer, make_schedule
from mmjax.train.schedules import Schedule
from mmjax.train.step import make_step
from mmjax.train.tasks import TASKS, StatefulTask, Task


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, with how much, and what is told of it.

    Attributes:
      steps: updates in all.
      batch_size: examples per update over all devices.
      accumulate: each batch is worked on in so many parts, with the same result and less memory.
      log_every: steps between rows of metrics.
      wandb: a Weights & Biases project, or None.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    log_every: int = 50
    wandb: str | None = None


@dataclasses.dataclass(frozen=True)
class RulesConfig:
    """The rules tables: rows of (pattern over the whole parameter path, value); see mmjax.rules.

    Attributes:
      sharding: strategies of mmjax.sharding.
      trainable: True or False; frozen parameters get neither gradients nor optimizer state. All
        later tables are about trainable parameters only.
      learning_rate: factors of the learning rate.
      weight_decay: factors of the weight decay.
    """

    sharding: rules.Table = sharding.DEFAULT_RULES
    trainable: rules.Table = ((".*", True),)
    learning_rate: rules.Table = ((".*", 1.0),)
    weight_decay: rules.Table = ((r"(.*/)?kernel", 1.0), (".*", 0.0))

    def __post_init__(self):
        for name, fits, expected in (
            ("sharding", lambda value: isinstance(value, str), "a strategy (a string)"),
            ("trainable", lambda value: isinstance(value, bool), "True or False"),
            ("learning_rate", is_factor, "a factor of at least 0"),
            ("weight_decay", is_factor, "a factor of at least 0"),
        ):
            for row in getattr(self, name):
                if not fits(row[1]):
                    raise ConfigError(
                        f"The value of the row {tuple(row)!r} of config.rules.{name} must be "
                        f"{expected}."
                    )


# The groups of a config and the dataclasses that check them; None: checked where it is used.
GROUPS: dict[str, type | None] = {
    "seed": None,
    "task": None,
    "model": None,
    "init": None,
    "lora": lora.LoRAConfig,
    "data": None,
    "mesh": sharding.MeshConfig,
    "rules": RulesConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "checkpoint": checkpoints.CheckpointConfig,
    "evals": None,
}


def base_config(
    *,
    task: dict[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
    optimizer: dict[str, Any],
    train: dict[str, Any],
    checkpoint: dict[str, Any],
    evals: dict[str, Any] | None = None,
    rules: dict[str, Any] | None = None,
    mesh: dict[str, Any] | None = None,
    init: Sequence[tuple[str, str, str]] = (),
    lora: dict[str, Any] | None = None,
    seed: int = 0,
) -> ConfigDict:
    """A complete config: what is given, and the defaults of every key that is not.

    Raises:
      ConfigError: naming unknown and missing keys.
    """
    given = {
        "mesh": mesh or {},
        "rules": rules or {},
        "optimizer": optimizer,
        "train": train,
        "checkpoint": checkpoint,
    }
    if lora is not None:
        given["lora"] = lora
    full: dict[str, Any] = {
        "seed": seed,
        "task": task,
        "model": model,
        "init": tuple(init),
        "lora": None,
        "data": data,
        "evals": evals or {},
    }
    for name, fields in given.items():
        checked = dataclass_from(GROUPS[name], fields, f"config.{name}")
        full[name] = {f.name: getattr(checked, f.name) for f in dataclasses.fields(checked)}
    return ConfigDict(full)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of an experiment.

    Attributes:
      make: builds the model.
      graphdef: its structure.
      shapes: shape and dtype of every parameter.
      placed: sharding of every parameter.
      trainable: whether each parameter is trained.
      step: the training step, a pure function (state, batch) -> (state, metrics).
    """

    config: ConfigDict
    train: TrainConfig
    optimizer: OptimizerConfig
    checkpoint: checkpoints.CheckpointConfig
    mesh: Mesh
    make: Callable[[], nnx.Module]
    graphdef: nnx.GraphDef
    shapes: Params
    placed: dict[str, NamedSharding]
    trainable: dict[str, bool]
    task: Task
    tx: optax.GradientTransformation
    schedule: Schedule
    step: Callable

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a global batch, as config.data.train describes it."""
        shapes = batch_fields(self.config.data.train, self.train.batch_size)
        where = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(*shape, sharding=where) for name, shape in shapes.items()
        }

    def fresh_state(self, params: Params) -> state.TrainState:
        return state.create(
            params,
            self.trainable,
            self.tx,
            seed=self.config.seed,
            ema=self.optimizer.ema is not None,
        )

    def target_params(self) -> Params:
        """Shapes of all parameters, with their shardings."""
        return state.with_shardings(self.shapes, self.placed)

    def abstract_state(self) -> state.TrainState:
        """Shapes of the state before the first step, with their shardings."""
        shapes = jax.eval_shape(self.fresh_state, self.shapes)
        return state.with_shardings(shapes, state.shardings(shapes, self.placed, self.mesh))

    def initial_state(self, loaded: Params) -> state.TrainState:
        """The state before the first step: loaded parameters, and the others initialised."""
        target = self.abstract_state()
        params = state.initialise(self.make, self.placed, loaded)
        # Sharded and committed like every later state, or the step would compile twice.
        where = jax.tree.map(lambda leaf: leaf.sharding, target)
        return jax.jit(self.fresh_state, out_shardings=where, donate_argnums=0)(params)

    def lower_step(self, batch: Any, platform: str | None = None) -> jax.stages.Lowered:
        """The traced training step.

        Args:
          batch: arrays, or shapes with shardings.
          platform: the mesh's, if it is not the one of this process.
        """
        target = self.abstract_state()
        where = jax.tree.map(lambda leaf: leaf.sharding, target)
        jitted = jax.jit(
            self.step,
            donate_argnums=0,
            out_shardings=(where, sharding.replicated(self.mesh)),
        )
        constraint = sharding.activation_constraint(self.mesh)
        with backend.compiling_for(platform or backend.platform()), activation_sharding(constraint):
            return jitted.lower(target, batch)

    def step_flops(self, batch: Any) -> float:
        """Matmul FLOPs of one step on all devices together (see mmjax.flops)."""
        config = self.config.copy_and_resolve_references()
        # Neither kind of recomputation earns credit.
        config.train.accumulate = 1
        plain = prepare(_with_value(config, "remat", "none"), mesh=self.mesh)
        # Traced for the CPU, where attention is written out; kernels of a GPU hide their products.
        with backend.compiling_for("cpu"):
            return flops.matmul_flops(plain.step, plain.abstract_state(), batch)


def prepare(config: ConfigDict, mesh: Mesh | None = None) -> Experiment:
    """Check a config and make the parts of its experiment.

    Args:
      config: a complete config, e.g. from `mmjax.config.load`.
      mesh: a mesh instead of the one that config.mesh describes over this machine's devices.

    Raises:
      ConfigError, RuleError, MeshError, ValueError: whatever is wrong with the config.
    """
    problems = [
        f"  config.{key} is unknown; {nearest(key, GROUPS)}" for key in config if key not in GROUPS
    ]
    problems += [f"  config.{key} is missing" for key in GROUPS if key not in config]
    if problems:
        raise ConfigError("The config is not complete:\n" + "\n".join(problems))
    problems = type_problems({"seed": int, "data": Mapping, "evals": Mapping}, config, "config")
    if problems:
        raise ConfigError("The config cannot be used:\n" + "\n".join(problems))
    parts = {
        name: dataclass_from(cls, config[name], f"config.{name}")
        for name, cls in GROUPS.items()
        if cls is not None and not (name == "lora" and config.lora is None)
    }
    training, optimizer = parts["train"], parts["optimizer"]
    for name, value in (
        ("steps", training.steps),
        ("log_every", training.log_every),
        ("accumulate", training.accumulate),
        ("batch_size", training.batch_size),
    ):
        if value < 1:
            raise ConfigError(f"config.train.{name} must be at least 1, not {value}.")
    if mesh is None:
        mesh = sharding.make_mesh(parts["mesh"])
    sharding.check_batch(
        training.batch_size,
        mesh,
        accumulate=training.accumulate,
        processes=jax.process_count(),
    )

    def make() -> nnx.Module:
        rngs = nnx.Rngs(config.seed)
        model = mmjax.build(config.model, rngs=rngs)
        if config.lora is not None:
            lora.add(model, parts["lora"], rngs=rngs)
        return model

    graphdef, shapes = abstract(make)
    _init_rows(config.init, shapes)
    tables = parts["rules"]
    placed = sharding.parameter_shardings(shapes, tables.sharding, mesh)
    trainable = rules.match(tables.trainable, shapes, name="rules.trainable")
    trained = {path: leaf for path, leaf in shapes.items() if trainable[path]}
    if not trained:
        raise ConfigError(
            "config.rules.trainable freezes every parameter: nothing is left to train."
        )
    schedule = make_schedule(optimizer, training.steps)
    tx = make_optimizer(
        optimizer,
        schedule,
        trained,
        lr_table=tables.learning_rate,
        decay_table=tables.weight_decay,
    )
    name, options = split_name(config.task, "config.task")
    try:
        task = TASKS[name](mesh, **options)
    except TypeError as error:
        raise ConfigError(f"config.task {name!r}: {error}") from None
    task.check(model_dataclass(config.model.to_dict()), config.data)
    if isinstance(task, StatefulTask):
        task.check_rules(merge(graphdef, shapes), trainable)
    step = make_step(task, graphdef, tx, accumulate=training.accumulate, ema=optimizer.ema)
    return Experiment(
        config=config,
        train=training,
        optimizer=optimizer,
        checkpoint=parts["checkpoint"],
        mesh=mesh,
        make=make,
        graphdef=graphdef,
        shapes=shapes,
        placed=placed,
        trainable=trainable,
        task=task,
        tx=tx,
        schedule=schedule,
        step=step,
    )


def _init_rows(init: Any, paths: Iterable[str]) -> list[tuple[tuple, dict[str, str]]]:
    """Each row of config.init, and the parameters that it decides: {path here: path there}.

    Raises:
      ConfigError: on what is no table of rows, or a row that is none.
      RuleError: if a row matches nothing.
    """
    form = "(pattern over this model's paths, source, path there), three strings"
    if not isinstance(init, tuple | list):
        raise ConfigError(f"config.init must be a tuple of rows {form}; it is {init!r}.")
    left, rows = list(paths), []
    for row in init:
        whole = isinstance(row, tuple | list) and len(row) == 3
        if not (whole and all(isinstance(part, str | Path) for part in row)):
            raise ConfigError(
                f"The row {row!r} of config.init is not {form}. A table of one row is a tuple too: "
                r"config.init=(('image/(.*)', 'runs/vit', r'\1'),)."
            )
        pattern, _, there = row
        try:
            matches = {path: re.fullmatch(pattern, path) for path in left}
            names = {path: match.expand(there) for path, match in matches.items() if match}
        except (re.error, IndexError) as error:
            raise ConfigError(
                f"The row {tuple(row)!r} of config.init cannot be used: its first string must be a "
                f"regular expression, and its last may name only groups of that: {error}."
            ) from None
        if not names:
            raise rules.RuleError(
                f"The row {tuple(row)!r} of config.init matches no parameter of the model. Its "
                "parameters are:\n" + "\n".join(f"  {path}" for path in paths)
            )
        left = [path for path in left if path not in names]
        rows.append((tuple(row), names))
    return rows


def load_initial(experiment: Experiment, tokenizer: Tokenizer | None = None) -> Params:
    """Parameters that config.init takes from elsewhere, straight into sharded arrays.

    Rows of config.init are (pattern over this model's paths, source, path there); the third may
    refer to groups of the pattern: `("image/(.*)", "runs/vit", r"\\1")`. The first match wins; what
    no row matches is initialised at random. A source is the work directory of a run, or a
    checkpoint of Hugging Face format (its paths are those of the model that
    `mmjax.from_pretrained` makes of it); position tables of the latter are interpolated to this
    model's resolution, and tables of fewer tokens than this model has grow. Adapters of config.lora
    that a source lacks are new: they change nothing.

    Args:
      experiment: whose parameters they will be.
      tokenizer: of the run; a table of tokens must come from a run that had the same.

    Raises:
      CheckpointError: if a run has no checkpoint, or lacks a parameter.
      ConversionError: if a checkpoint cannot be read, or lacks a parameter.
      ConfigError: if what is taken was made for another computation; see `mmjax.train.handover`.
      RuleError: if a row matches nothing.
    """
    rows = _init_rows(experiment.config.init, experiment.shapes)
    wanted: dict[str, dict[str, str]] = {}
    for (_, source, _), names in rows:
        wanted.setdefault(source, {}).update(names)
    loaded: Params = {}
    targets = experiment.target_params()
    for source, names in wanted.items():
        source = located(source)
        check_handover(experiment.config.model.to_dict(), source, names)
        check_tokens(tokenizer, source, names)
        smaller = smaller_vocabularies(experiment.config.model.to_dict(), source, names)
        wanted_there = {there: targets[here] for here, there in names.items()}
        for here, tokens in smaller.items():
            wanted_there[names[here]] = with_tokens(here, targets[here], tokens)
        arrays = _read_params(source, wanted_there)
        twice = set()
        for here, there in names.items():
            if here in smaller:
                loaded[here] = grow(here, arrays[there], targets[here])
            elif there in arrays:
                # Buffers are given away when training starts, each once.
                loaded[here] = jnp.copy(arrays[there]) if there in twice else arrays[there]
                twice.add(there)
        if any(map(lora.is_adapter, arrays)):
            check_adapters(experiment.config.lora.to_dict(), source)
    for row, names in rows:
        if not loaded.keys() & names.keys():
            raise rules.RuleError(
                f"The row {row!r} of config.init takes adapters only, and its source has "
                "none of them: leave it out for new ones."
            )
    return loaded


def _read_params(source: Path, targets: Params) -> Params:
    """The parameters of a source; adapters as far as it has them."""
    if is_checkpoint(source):
        return convert.load_params(
            source, {path: leaf for path, leaf in targets.items() if not lora.is_adapter(path)}
        )
    directory = source / "checkpoints"
    return checkpoints.restore_params(directory, targets, optional=lora.is_adapter)[1]


def _with_value(config: ConfigDict, key: str, value: Any) -> ConfigDict:
    """A copy in which every field of this name, at any depth of config.model, has this value."""

    def visit(node: ConfigDict) -> None:
        for name in node:
            if name == key:
                node[name] = value
            elif isinstance(node[name], ConfigDict):
                visit(node[name])

    visit(config.model)
    return config
