"""`python -m experiments.evaluate --weights`: evaluations of a model that no run made."""

import json

import numpy as np
import pytest
from PIL import Image

import mmjax
from experiments import convert, evaluate
from experiments._random_vlm import write_random_vlm
from mmjax import config as configs
from mmjax.config import ConfigError
from mmjax.data import build_tokenizer, open_questions

CONFIG = """
import json
from mmjax.train.experiment import base_config

def get_config(arg):
    data = json.loads(open(arg).read())
    return base_config(
        task=dict(name="vlm"),
        model=dict(name="that of the weights"),
        data=data,
        optimizer=dict(
            name="adamw", learning_rate=1e-3, schedule=dict(name="constant", warmup=0)
        ),
        train=dict(steps=1, batch_size=8),
        checkpoint=dict(every=1),
        evals=dict(
            asked=dict(
                name="vqa", every=1, data=data["train"], batch_size=8, max_new_tokens=4,
                controls=(), shots=1, shots_from=data["train"], answers="answers.jsonl",
            )
        ),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in `model`, and a config that asks four questions."""
    place = tmp_path_factory.mktemp("weights")
    write_random_vlm(place / "model")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    records = [
        {"image": f"{i}.png", "question": word, "answer": "yes"}
        for i, word in enumerate(("circle", "square", "cat", "dog"))
    ]
    (place / "asked.json").write_text(json.dumps(records))
    layout = dict(name="whole", preset="clip", size=24, tokens=9)
    backend = build_tokenizer(tokenizer_of(place), place).backend
    conversation = dict(
        template="qa",
        system="",
        max_len=64,
        images=1,
        layout=layout,
        image_token=backend.token_to_id("<image>"),
    )
    source = dict(name="json", path=str(place / "asked.json"), form="vqa")
    train = dict(sources=[source], conversation=conversation)
    (place / "data.json").write_text(json.dumps(tokenizer_of(place) | {"train": train}))
    (place / "config.py").write_text(CONFIG)
    return place


def tokenizer_of(place):
    return {"tokenizer": {"name": "hf", "directory": str(place / "model")}}


def run(place, *arguments):
    return evaluate.main(["--config", f"{place / 'config.py'}:{place / 'data.json'}", *arguments])


def test_both_formats_answer_as_the_model_does(place, capsys):
    target = str(place / "scores")
    assert run(place, "--weights", str(place / "model"), "--workdir", target) == 0
    assert f"asked, {place / 'model'}" in capsys.readouterr().out
    lines = (place / "scores" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line)["model"] for line in lines]
    scores = json.loads((place / "scores" / "evaluation-0.json").read_text())
    assert scores["eval/asked/n"] == 4 and scores["weights"] == str(place / "model")
    # The same prompts, asked by hand.
    from mmjax.evaluate.shots import FewShot, few_shot
    from mmjax.evaluate.support import open_support

    data = json.loads((place / "data.json").read_text())
    tokenizer = build_tokenizer(data, place)
    support = open_support(data["train"], data["train"], tokenizer)
    questions = list(open_questions(data["train"], tokenizer))
    prompts = few_shot(questions, support, FewShot(1), lambda seen: None)
    made = mmjax.generate(
        mmjax.from_pretrained(place / "model"),
        [prompt.ids for prompt in prompts],
        [np.asarray(prompt.images) for prompt in prompts],
        place=[prompt.place for prompt in prompts],
        max_new_tokens=4,
        eos_id=tokenizer.eos_id,
    )
    expected = [tokenizer.decode(row) for row in made.tolist()]
    assert answers == expected and len(set(expected)) > 1
    convert.main(["--source", str(place / "model"), "--target", str(place / "orbax")])
    assert run(place, "--weights", str(place / "orbax"), "--workdir", str(place / "again")) == 0
    assert (place / "again" / "answers.jsonl").read_text().splitlines() == lines


def test_arguments_that_do_not_go_together(place, tmp_path):
    weights = ("--weights", str(place / "model"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    bad = {
        (): "Give --workdir, of a run, or --weights",
        (*weights, "--output", str(tmp_path)): "leave --output out",
        (*weights, "--workdir", str(tmp_path / "run")): "holds a run: give another --workdir",
        ("--weights", str(tmp_path / "run")): "holds a run: give it as --workdir",
        ("--workdir", str(tmp_path), "--dtype", "bfloat16"): "leave --dtype out",
    }
    for arguments, match in bad.items():
        with pytest.raises(ConfigError, match=match):
            run(place, *arguments)


def test_a_run_of_another_model_is_refused(tmp_path):
    """Its parameters would fit, and the scores would be those of nothing."""
    config = configs.load("tests/experiments/digits_config.py")
    (tmp_path / "config.json").write_text(configs.to_json(config))
    command = ["--config", "tests/experiments/digits_config.py", "--workdir", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"another model .*heads=2 \(it would be 4\)"):
        evaluate.main([*command, "--config.model.heads=4"])
    evaluate.check_model(config, tmp_path)
