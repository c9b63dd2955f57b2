"""The report of a study: report.html, which needs no other file, report.md and table.tex; its
figures as vector drawings; and pairs.csv, the differences of all pairs of arms."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmjax.study.comparison import Comparison
from mmjax.study.figures import draw_figures
from mmjax.study.grid import Study
from mmjax.study.results import SAME, Results
from mmjax.study.tables import Table, make_tables
from mmjax.train.workdir import write_atomically

FIGURES = "figures"
_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 62em; margin: 2em auto; color: #222; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; text-align: right }
th { border-bottom: 1px solid #444 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f4f4 } pre { background: #f4f4f4; padding: .7em }
figure { margin: 1.5em 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
"""


def write_report(
    directory: Path, study: Study, results: Results, failures: Mapping[str, str]
) -> None:
    """See the module's docstring.

    Args:
      directory: of the study.
      results: of its runs.
      failures: {run: why}.
    """
    tables, figures = [], {}
    if results.rates:
        found = Comparison(study, results)
        tables, figures = make_tables(found), draw_figures(found)
        write_atomically(directory / "pairs.csv", found.pairs().to_csv(index=False))
    budget = _about(study, results, failures)
    (directory / FIGURES).mkdir(exist_ok=True)
    for name, (drawing, _) in figures.items():
        write_atomically(directory / FIGURES / f"{name}.svg", drawing)
    write_atomically(directory / "table.tex", "\n\n".join(t.latex() for t in tables) + "\n")
    parts = [f"# {study.config}", budget, *(table.markdown() for table in tables)]
    parts += [f"![{name}]({FIGURES}/{name}.svg)\n\n{text}" for name, (_, text) in figures.items()]
    if failures:
        parts.append("## Failed")
        parts += [
            f"`{name}`\n\n" + "\n".join(f"    {line}" for line in reason.splitlines())
            for name, reason in failures.items()
        ]
    write_atomically(directory / "report.md", "\n\n".join(parts) + "\n")
    body = "".join(_html(study, budget, tables, figures, failures))
    write_atomically(
        directory / "report.html",
        f"<!doctype html><meta charset=utf-8><title>{html.escape(study.config)}</title>"
        f"<style>{_STYLE}</style>{body}",
    )


def _html(
    study: Study,
    budget: str,
    tables: Iterable[Table],
    figures: Mapping[str, tuple[str, str]],
    failures: Mapping[str, str],
) -> Iterable[str]:
    yield f"<h1>{html.escape(study.config)}</h1><p>{html.escape(budget)}</p>"
    for table in tables:
        yield table.html()
    for drawing, caption in figures.values():
        # Without the XML prologue, which has no place within a page.
        inner = drawing[drawing.index("<svg") :]
        yield f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>"
    if failures:
        yield "<h2>Failed</h2>"
    for name, reason in failures.items():
        yield f"<p><code>{html.escape(name)}</code></p><pre>{html.escape(reason)}</pre>"
    yield f"<h2>Study</h2><pre>{html.escape(study.to_json())}</pre>"


def _about(study: Study, results: Results, failures: Mapping[str, str]) -> str:
    """What was run, and whether all arms had the same data."""
    text = (
        f"{len(study.rates)} rates x 1 seed, then {study.seeds - 1} further seeds at the best "
        f"rate by {study.metric}; {len(results.rates)} arms, {len(results.rows)} runs finished, "
        f"{len(failures)} failed. The seed decides initial parameters and the order of the data. "
    )
    if results.rows.empty:
        return text.strip()
    # Of each seed, the order that most arms have.
    digests = results.rows.groupby("seed").order.transform(lambda own: own.mode()[0])
    odd = results.rows[results.rows.order != digests].arm.unique()
    if len(odd):
        text += f"THE ORDER OF THE DATA DIFFERS: {', '.join(odd)} saw other records than the rest."
    else:
        text += "All arms saw the same records in the same order (as digests of them say)."
    for name in SAME:
        values = results.rows[name].unique()
        if len(values) > 1:
            text += f" {name.upper()} OF RUNS DIFFER: {'; '.join(values)}."
        elif name != "packages" and values[0]:
            text += f" {name.capitalize()} of all runs: {values[0]}."
    return text
