"""Pictures of a run: learning curves, and what a retrieval model finds."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = 8
# For data sets of icons; a score is worth no more than its data.
ICONS_NOTE = "Scores on icons say nothing about photographs: not comparable with COCO or ImageNet."

GREEN, RED, GREY = "#1a9850", "#c0392b", "#666666"
# Last parts of metric names that are shares between 0 and 1 and worth a curve.
SHARES = ("R@1", "R@5", "R@10", "mAP", "top1", "top5", "accuracy")
# What stands beside a score in metric names, and gets no curve of its own.
BESIDE = {"chance", "pixels", "blind", "shuffled", "majority"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One text query and what it found.

    Attributes:
      query: the text.
      images: the best candidates, best first, [H, W, 3] uint8 each.
      scores: their cosine similarities.
      right: whether each is a right one.
      answer: the best right candidate, and its rank (from 1) and score.
    """

    query: str
    images: Sequence[np.ndarray]
    scores: Sequence[float]
    right: Sequence[bool]
    answer: np.ndarray
    answer_rank: int
    answer_score: float


def retrieval_sheet(
    rows: Sequence[Row], path: str | Path, *, title: str, candidates: int, note: str = ""
) -> None:
    """Draw text queries with their top images; right ones are framed in green.

    Where no right image is among the top ones, the best right one stands at the side with its rank.

    Args:
      rows: at least one query, all with the same number of images.
      path: of the PNG; its directory must exist.
      title: the data set and split the queries are from.
      candidates: how many images were ranked.
      note: a line at the bottom, e.g. ICONS_NOTE.
    """
    columns = max(len(row.images) for row in rows)
    # In inches: a column of text, the images, a gap, the missed answer.
    cell, label, gap, top, bottom = 1.0, 2.1, 0.35, 0.95, 0.4
    pitch = cell + 0.32
    width = label + columns * (cell + 0.1) + gap + cell + 0.3
    height = top + len(rows) * pitch + bottom
    figure = figure_class()(figsize=(width, height), dpi=110, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, **style)

    def picture(x: float, y: float, image: np.ndarray, frame: str, thick: float) -> None:
        axes = figure.add_axes((x / width, 1 - (y + cell) / height, cell / width, cell / height))
        axes.imshow(image, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(edgecolor=frame, linewidth=thick)

    hits = sum(row.answer_rank == 1 for row in rows)
    shown = sum(row.answer_rank <= columns for row in rows)
    write(0.2, 0.32, title, fontsize=14, weight="bold", va="center")
    write(
        0.2,
        0.62,
        f"Text queries spread evenly over the data, their first {columns} of {candidates} images, "
        f"cosine similarity below. Green: right. Of these {len(rows)} queries {hits} have it "
        f"first, {shown} among the first {columns}.",
        fontsize=9.5,
        color=GREY,
        va="center",
    )
    answer_x = label + columns * (cell + 0.1) + gap
    if any(row.answer_rank > columns for row in rows):
        header = {"fontsize": 8.5, "ha": "center", "va": "center", "color": RED}
        write(answer_x + cell / 2, top - 0.12, "right one, if missed", **header)
    for number, row in enumerate(rows):
        y = top + number * pitch
        lines = textwrap.wrap(row.query, 24)[:4]
        write(label - 0.12, y + cell / 2, "\n".join(lines), fontsize=10.5, ha="right", va="center")
        for column, image in enumerate(row.images):
            x = label + column * (cell + 0.1)
            right = bool(row.right[column])
            picture(x, y, image, GREEN if right else "#cccccc", 4.0 if right else 0.8)
            score = f"{row.scores[column]:.3f}"
            style = {"color": GREEN, "weight": "bold"} if right else {"color": GREY}
            write(
                x + cell / 2,
                y + cell + 0.12,
                score,
                fontsize=8.5,
                ha="center",
                va="center",
                **style,
            )
        if row.answer_rank > columns:
            picture(answer_x, y, row.answer, RED, 2.0)
            text = f"{row.answer_score:.3f}, rank {row.answer_rank}"
        else:
            text = ""
        write(
            answer_x + cell / 2,
            y + cell + 0.12,
            text,
            fontsize=8,
            ha="center",
            va="center",
            color=RED,
        )
    write(0.2, height - 0.2, note, fontsize=9, color=GREY, va="center", style="italic")
    figure.savefig(path, metadata={"Software": None})


def learning_curves(
    metrics_path: str | Path, path: str | Path, *, title: str = "", note: str = ""
) -> None:
    """Draw a run's metrics.jsonl: losses, learning rate, and the scores of each evaluator.

    Chance levels, where an evaluator gives them, are dotted in the colour of the score.

    Args:
      metrics_path: rows {"step": ..., "train/loss": ..., "eval/<evaluator>/<score>": ...}.
      path: of the PNG; its directory must exist.
      title: what was trained, on what.
      note: a line under the title, e.g. ICONS_NOTE.

    Raises:
      ValueError: if there is nothing to draw.
    """
    curves = _read_curves(metrics_path)
    losses = {k: v for k, v in curves.items() if k == "train/loss" or _ends(k, "eval/", "loss")}
    rates = {k: v for k, v in curves.items() if k in ("train/learning_rate", "train/lr")}
    evaluators: dict[str, dict[str, list]] = {}
    for name, curve in curves.items():
        parts = name.split("/")
        if parts[0] == "eval" and len(parts) >= 3 and parts[-1] in SHARES:
            evaluators.setdefault(parts[1], {})["/".join(parts[2:])] = curve
    panels = [("loss", losses), ("learning rate", rates), *evaluators.items()]
    panels = [(name, group) for name, group in panels if group]
    if not panels:
        raise ValueError(f"{metrics_path} holds no metrics to draw yet.")

    across = 2 if len(panels) <= 4 else 3
    down = math.ceil(len(panels) / across)
    figure = figure_class()(
        figsize=(6.0 * across, 3.9 * down + 0.4), dpi=100, facecolor="white", layout="constrained"
    )
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.ravel()[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, group) in zip(grid.ravel(), panels, strict=False):
        if name in evaluators:
            _draw_shares(axes, group)
        else:
            for label, curve in group.items():
                axes.plot(*zip(*curve, strict=True), label=label, **_marker(curve))
        if name == "loss" and all(y > 0 for curve in group.values() for _, y in curve):
            axes.set_yscale("log")
            for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                ticks(lambda value, _: f"{value:g}")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, framealpha=0.6)
    figure.suptitle("\n".join(filter(None, (title, note))), fontsize=11)
    figure.savefig(path, metadata={"Software": None})


def _draw_shares(axes: Any, group: Mapping[str, list]) -> None:
    """Scores in per cent. One colour for each kind of score, one line style for each direction; of
    one kind of score, one colour for each direction or group."""
    scores = {
        name: curve for name, curve in group.items() if not BESIDE & set(name.split("/")[:-1])
    }
    kinds = sorted({name.split("/")[-1] for name in scores}, key=SHARES.index)
    ways = sorted({name.rpartition("/")[0] for name in scores}, reverse=True)
    styles = dict(zip(ways, ["-", "--", "-.", (0, (1, 1)), (0, (5, 1))] * len(ways), strict=False))
    for name in sorted(scores, key=lambda name: _place(name, ways)):
        way, _, kind = name.rpartition("/")
        curve = scores[name]
        steps, values = zip(*curve, strict=True)
        axes.plot(
            steps,
            [100 * value for value in values],
            color=f"C{kinds.index(kind) if len(kinds) > 1 else ways.index(way)}",
            linestyle=styles[way] if len(kinds) > 1 else "-",
            label=name.replace("_to_", " -> ").replace("/", " "),
            **_marker(curve),
        )
        chance = group.get(f"chance/{name}")
        if chance and way == ways[0]:
            axes.axhline(
                100 * chance[-1][1], color=f"C{kinds.index(kind)}", linestyle=":", linewidth=1
            )
    axes.set_ylabel("%  (dotted: chance)" if any(k.startswith("chance/") for k in group) else "%")
    axes.set_ylim(0, None)


def _place(name: str, ways: Sequence[str]) -> tuple[int, int]:
    """Where a score's name comes in the legend."""
    way, _, kind = name.rpartition("/")
    return ways.index(way), SHARES.index(kind)


def _marker(curve: Sequence) -> dict[str, Any]:
    """Few points are marked: a line through one point does not show."""
    return {"marker": "o", "markersize": 3.5} if len(curve) <= 30 else {}


def _ends(name: str, start: str, end: str) -> bool:
    return name.startswith(start) and name.rpartition("/")[2] == end


def _read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """name -> [(step, value), ...]; values that are not finite numbers are left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in Path(path).read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a last line cut short by a kill
            break
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def figure_class() -> type:
    """matplotlib's Figure, which draws without a display and without pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Drawing pictures needs matplotlib, with which mmjax is normally installed: "
            "pip install matplotlib, or set `sheet` of the evaluator to None."
        ) from None
    return Figure
