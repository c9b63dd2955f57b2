"""What is wrong with the values of a config is said before anything is compiled."""

import pytest
import tiny

from mmjax.config import ConfigError
from mmjax.rules import RuleError
from mmjax.train.experiment import _init_rows, prepare

PATHS = ["image/head/kernel", "image/head/bias", "scale"]


@pytest.mark.parametrize(
    "groups, message",
    [
        (dict(rules=dict(trainable=((".*", "no"),))),
         "('.*', 'no') of config.rules.trainable must be True or False"),
        (dict(rules=dict(trainable=((".*", 1),))), "rules.trainable must be True or False"),
        (dict(rules=dict(trainable=(".*", True))), "config.rules.trainable must be a tuple, each"),
        (dict(rules=dict(learning_rate=((".*", "x"),))),
         "rules.learning_rate must be a factor of at least 0"),
        (dict(rules=dict(learning_rate=((".*", -1.0),))), "a factor of at least 0"),
        (dict(rules=dict(weight_decay=((".*", True),))), "a factor of at least 0"),
        (dict(rules=dict(sharding=((".*", 1),))), "config.rules.sharding must be a strategy"),
        (dict(optimizer=dict(ema=2.0)), "config.optimizer.ema must be at least 0 and below 1"),
        (dict(optimizer=dict(ema=1.0)), "config.optimizer.ema"),
        (dict(optimizer=dict(learning_rate=-1.0)), "learning_rate must be at least"),
        (dict(optimizer=dict(learning_rate=float("nan"))), "config.optimizer.learning_rate"),
        (dict(optimizer=dict(weight_decay=-1.0)), "weight_decay must be at least 0"),
        (dict(optimizer=dict(clip_norm=0.0)), "config.optimizer.clip_norm must be above 0"),
        (dict(train=dict(steps="10")), "config.train.steps must be a whole number, not '10'"),
    ],
)  # fmt: skip
def test_values(groups, message):
    with pytest.raises(ValueError) as error:
        tiny.classification(**groups)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("seed", "3", "config.seed must be a whole number"),
        ("evals", 4, "config.evals must be a group of keys"),
        ("lora", 4, "config.lora must be a group of keys, not 4"),
        ("init", (("head/.*", "runs/a"),), "('head/.*', 'runs/a') of config.init is not (pattern"),
    ],
)
def test_whole_groups(key, value, message):
    config = tiny.classification(mesh=dict(data=8))
    with config.ignore_type():
        config[key] = value
    with pytest.raises(ConfigError) as error:
        prepare(config)
    assert message in str(error.value)


def test_rows_of_init():
    rows = _init_rows(((r"image/(.*)/bias", "a", r"\1/b"), ["image/(.*)", "b", r"\1"]), PATHS)
    assert [(row[1], names) for row, names in rows] == [
        ("a", {"image/head/bias": "head/b"}),
        ("b", {"image/head/kernel": "head/kernel"}),
    ]
    assert _init_rows((), PATHS) == []


@pytest.mark.parametrize(
    "init, error, message",
    [
        ("runs/a", ConfigError, "config.init must be a tuple of rows (pattern"),
        (("image/.*", "a", "x"), ConfigError, "'image/.*' of config.init is not (pattern"),
        ((("image/.*", "a"),), ConfigError, "A table of one row is a tuple too"),
        ((("image/.*", "a", None),), ConfigError, "three strings"),
        ((("image/(", "a", "x"),), ConfigError, "its first string must be a regular expression"),
        ((("image/(.*)", "a", r"\3"),), ConfigError, "invalid group reference 3"),
        ((("image/(.*)", "a", r"\g<x>"),), ConfigError, "may name only groups of that"),
        ((("text/.*", "a", "x"),), RuleError, "matches no parameter"),
        (((".*", "a", "x"), ("image/.*", "a", "x")), RuleError, "matches no parameter"),
    ],
)
def test_rows_of_init_that_are_none(init, error, message):
    with pytest.raises(error) as caught:
        _init_rows(init, PATHS)
    assert message in str(caught.value)
