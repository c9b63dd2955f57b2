"""Where files are: on disk, or in an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "package:"


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
        distribution = name.replace("_", "-")
        raise FileNotFoundError(
            f"{text}: the package {name} is not installed: pip install {distribution}, or name "
            "another place."
        )
    found = Path(spec.origin).parent / file
    if not found.exists():
        raise FileNotFoundError(f"{text}: the installed package {name} has no {file!r}.")
    return found
