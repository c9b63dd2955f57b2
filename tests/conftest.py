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

jax.config.update("jax_num_cpu_devices", 8)
