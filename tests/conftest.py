"""Every test runs on 8 simulated CPU devices, with shapes and dtypes checked."""

import os

# Before JAX starts: the tests never look for an accelerator, and worker processes inherit this.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

# Continuous shape checks: annotations of these packages are verified at each call.
_hook = install_import_hook(
    [
        "mmjax.nn",
        "mmjax.connectors",
        "mmjax.models",
        "mmjax.losses",
        "mmjax.train",
        "mmjax.generation",
    ],
    "beartype.beartype",
)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Of pytest-xdist: a process has ended, and left what its tests have found."""
    del error
    ours = vars(node.config).setdefault("workeroutput", {}).setdefault("differences", [])
    ours += node.workeroutput.get("differences", [])


def pytest_terminal_summary(terminalreporter, config):
    """The largest differences from transformers that the tests of conversion saw."""
    largest = {}
    for family, what, value in vars(config).get("workeroutput", {}).get("differences", []):
        largest[family, what] = max(largest.get((family, what), 0.0), value)
    if largest:
        terminalreporter.section("largest differences from transformers")
        for (family, what), difference in sorted(largest.items()):
            terminalreporter.write_line(f"{family:28} {what:36} {difference:.1e}")
