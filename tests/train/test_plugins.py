"""A connector in a module of the user's own: trained, and found again by what reads the run."""

import os
import subprocess
import sys
from pathlib import Path

from mmjax.train.runs import import_plugins

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
CONFIG = """
import own_connector

from configs.connectors import scenes


def get_config(arg=None):
    config = scenes.get_config("connector=pooling,tokens=36,steps=2,batch=2,eval=4")
    tower = dict(width=16, depth=1, heads=2, mlp_width=16)
    with config.unlocked():
        config.init = ()
        config.model.connector.whole = dict(name="every_second")
        config.model.encoder.update(tower)
        config.model.lm.update(tower | dict(vocab_size=400))
        config.data.tokenizer = dict(name="wordlevel", vocab_size=320, captions=200)
        config.data.train.conversation.update(max_len=400)
        config.data.train.conversation.layout.tokens = 72
        config.evals = {}
    return config
"""


def call(folder, *arguments):
    env = dict(os.environ, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}", JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


def test_the_connector_of_the_readme(tmp_path):
    code = README.split("# own_connector.py\n")[1].split("```")[0]
    (tmp_path / "own_connector.py").write_text(code)
    (tmp_path / "own_config.py").write_text(CONFIG)
    done = call(tmp_path, "experiments.train", "--config", "own_config.py", "--workdir", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    # In a process that has not seen the config.
    code = "import mmjax; print(type(mmjax.read_run('run').connector.whole).__name__)"
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "EverySecond", done.stderr


def test_a_module_that_is_not_here(tmp_path, caplog):
    (tmp_path / "manifest.json").write_text('[{"plugins": ["no_such_module"]}]')
    import_plugins(tmp_path)
    assert "'no_such_module', which cannot be imported here" in caplog.text
