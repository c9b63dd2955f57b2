"""A family's table, laid out for one model: which tensor of theirs is which parameter of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from mmjax.convert.kinds import Kind, Transform
from mmjax.registry import nearest


class ConversionError(ValueError):
    """A checkpoint that does not fit the model, or a model that does not fit a format."""


class Row(NamedTuple):
    """One module of theirs and its counterpart.

    Attributes:
      theirs: its name, with a `*` for the layer where our parameters are stacked over layers.
      ours: the path of ours, or several where theirs fuses them.
      kind: what tensors it has; see `mmjax.convert.kinds`.
      first, step: our layers 0, 1, 2, ... are their layers first, first + step, ...
      layers: the numbers of theirs one by one, where they are not so regular.
    """

    theirs: str
    ours: str | tuple[str, ...]
    kind: Kind
    first: int = 0
    step: int = 1
    layers: tuple[int, ...] | None = None


class Entry(NamedTuple):
    """One tensor of theirs.

    Attributes:
      name: theirs, canonical.
      paths: the parameters of ours it fills, wholly or in one layer.
      layer: which one of them, or None.
      transform: between them.
      shape: of their tensor.
    """

    name: str
    paths: tuple[str, ...]
    layer: int | None
    transform: Transform
    shape: tuple[int, ...]


def lay_out(rows: Sequence[Row], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[Entry]:
    """All tensors that a checkpoint of this model has.

    Args:
      rows: the family's table.
      shapes: of our parameters, by path.

    Raises:
      ConversionError: if the table does not cover each parameter exactly once: a defect of the
        table.
    """
    entries, filled, problems = [], {}, []
    for row in rows:
        targets = (row.ours,) if isinstance(row.ours, str) else row.ours
        for leaf in row.kind:
            paths = tuple(target + leaf.ours for target in targets)
            present = [path for path in paths if path in shapes]
            if not present:
                continue  # an option this model does not have, such as a bias
            if len(present) < len(paths):
                problems.append(f"  {row.theirs}{leaf.theirs}: of {paths} only {present} exist")
                continue
            for path in paths:
                if path in filled:
                    problems.append(f"  {path} comes from {filled[path]} and from {row.theirs}")
                filled[path] = row.theirs
            stacked = "*" in row.theirs
            depth = shapes[paths[0]].shape[0] if stacked else 1
            one = [
                jax.ShapeDtypeStruct(s.shape[1:] if stacked else s.shape, s.dtype)
                for s in (shapes[path] for path in paths)
            ]
            shape = jax.eval_shape(leaf.transform.to_theirs, *one).shape
            for layer in range(depth):
                number = row.first + layer * row.step if row.layers is None else row.layers[layer]
                name = row.theirs.replace("*", str(number)) + leaf.theirs
                place = layer if stacked else None
                entries.append(Entry(name, paths, place, leaf.transform, shape))
    problems += [f"  no row fills {path}" for path in shapes if path not in filled]
    if problems:
        raise ConversionError(
            "The conversion table does not fit the model:\n" + "\n".join(problems)
        )
    return entries


def rename(names: Iterable[str], renames: Sequence[tuple[str, str]], where: str) -> dict[str, str]:
    """Canonical name -> the name in the file, which may be that of an older version.

    Raises:
      ConversionError: if two tensors get one name.
    """
    result: dict[str, str] = {}
    problems = []
    for name in names:
        canonical = name
        for pattern, replacement in renames:
            canonical = re.sub(pattern, replacement, canonical)
        if canonical in result:
            problems.append(f"  {result[canonical]!r} and {name!r} are both {canonical!r}")
        result[canonical] = name
    if problems:
        raise ConversionError(f"Tensors of {where} are there twice:\n" + "\n".join(problems))
    return result


def check(
    entries: Sequence[Entry],
    found: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str],
    where: str,
) -> None:
    """That a checkpoint has exactly the tensors of the model, in the right shapes.

    Args:
      found: shapes of the checkpoint's tensors by canonical name.
      ignored: patterns over whole names of tensors that are knowingly not used.
      where: names the checkpoint in messages.

    Raises:
      ConversionError: listing every tensor that is missing, surplus or of another shape.
    """
    expected = {entry.name: entry.shape for entry in entries}
    surplus = [
        name
        for name in found
        if name not in expected and not any(re.fullmatch(p, name) for p in ignored)
    ]
    missing = [name for name in expected if name not in found]
    problems = [
        f"  shape of {name!r}: {tuple(found[name])} in the file, {shape} by the config"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems += [f"  missing: {name!r} {expected[name]}" for name in missing]
    problems += [f"  not used: {name!r} {tuple(found[name])}" for name in surplus]
    if problems:
        hint = ""
        if missing and surplus:
            hint = f"\nFor the first missing one: {nearest(missing[0], surplus[:50])}"
        raise ConversionError(
            f"{where} does not fit its config ({len(problems)} problem(s)):\n"
            + "\n".join(problems[:100])
            + ("\n  ..." if len(problems) > 100 else "")
            + hint
            + "\nNothing was loaded. Is config.json that of these weights?"
        )
