"""The report of a study: its figures are those of its rows, and it needs no other file."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmjax.study import Study, write_report
from mmjax.study.report import chosen_runs, make_tables, paired_difference, ranks

STUDY = Study(
    config="configs/a_b.py",
    axes={"connector": ("mlp", "linear"), "tokens": (4, 16)},
    metric="eval/x/accuracy",
    rates=(1e-3, 1e-2),
    seeds=4,
)


@pytest.fixture(scope="module")
def study():
    """Rows, rates, costs and losses; noise that seeds share is larger than what arms differ by."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4) * 0.1
    arms = [(c, t) for c in ("mlp", "linear") for t in ("4", "16")]
    rows, rates = [], {}
    for number, (connector, tokens) in enumerate(arms):
        name = f"connector={connector},tokens={tokens}"
        rates[name] = 1e-3 if number % 2 else 1e-2
        for rate, seed in [(1e-3, 0), (1e-2, 0), *((rates[name], s) for s in (1, 2, 3))]:
            score = 0.5 + noise[seed] + 0.02 * number + 0.004 * rng.normal()
            score -= 0.3 * (rate != rates[name])
            row = dict(arm=name, connector=connector, tokens=tokens, rate=rate, seed=seed)
            rows.append(row | {"eval/x/accuracy": score, "eval/x/counting": 1 - score})
    names = list(rates)
    costs = pd.DataFrame({"arm": names, "parameters": [10, 20, 30, 40]})
    losses = {name: pd.DataFrame({s: [2.0, 1.0 + s / 9] for s in range(4)}) for name in names}
    return pd.DataFrame(rows), rates, costs, losses


def test_differences_are_paired_by_seed(study):
    rows, rates, *_ = study
    chosen = chosen_runs(rows, rates)
    assert len(chosen) == 16
    one, other = (
        chosen[chosen.arm == arm].set_index("seed")["eval/x/accuracy"]
        for arm in ("connector=mlp,tokens=4", "connector=linear,tokens=16")
    )
    difference, low, high = paired_difference(one, other, np.random.default_rng(0))
    assert difference == pytest.approx((one - other).mean())
    # The bootstrap of scipy; unpaired, the interval would hold 0.
    expected = stats.bootstrap(
        ((one - other).to_numpy(),), np.mean, method="percentile", random_state=0
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=2e-3)
    assert high < 0 < one.std()
    # Rows in another order, and a seed that one of them lacks.
    again = paired_difference(one[::-1], other[:3], np.random.default_rng(0))
    assert again[0] == pytest.approx((one - other)[:3].mean())
    alone = paired_difference(one[:1], other[:1], np.random.default_rng(0))
    assert np.isnan(alone[1:]).all()
    place = ranks(chosen, "eval/x/accuracy")
    assert place["connector=linear,tokens=16"] == 1 and place["connector=mlp,tokens=4"] == 4


def test_tables(study):
    rows, rates, costs, _ = study
    main, others, effects = make_tables(STUDY, rows, rates, costs)
    assert [row[0] for row in main.rows] == list(rates)[::-1]
    chosen = chosen_runs(rows, rates)
    own = chosen[chosen.arm == main.rows[0][0]]["eval/x/accuracy"]
    assert main.rows[0][3] == f"{own.mean():.4g} ± {own.std():.2g}"
    assert main.rows[0][5] == "" and main.rows[3][-1] == "10"
    assert [row[0] for row in others.rows] == ["eval/x/counting"]
    means = {(row[0], row[1]): float(row[3].split()[0]) for row in effects.rows}
    for axis, level in means:
        part = chosen[chosen[axis] == level]["eval/x/accuracy"]
        assert means[axis, level] == pytest.approx(part.mean(), abs=1e-4)
    latex = main.latex()
    assert r"connector=linear,tokens=16 & 0.001 & 4 &" in latex and r"$\pm$" in latex
    assert latex.count(r"\\") == 5 and "±" not in latex


def test_a_page_of_its_own(study, tmp_path):
    failures = {"connector=q/lr=1/seed=0": "train ended:\nerror: 1 < 2 & 3"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, STUDY, *study, failures)
    page = (tmp_path / "one" / "report.html").read_text()
    assert page == (tmp_path / "two" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)(?!data:)[^"]', page)
    assert page.count("<svg") == 5 and "error: 1 &lt; 2 &amp; 3" in page
    figures = sorted((tmp_path / "one" / "figures").iterdir())
    assert [figure.stem for figure in figures] == [
        "arms", "interaction", "losses", "pareto_parameters", "search",
    ]  # fmt: skip
    for figure in figures:
        words = " ".join(ElementTree.parse(figure).getroot().itertext())
        assert "eval/x/accuracy" in words or "train/loss" in words
    text = (tmp_path / "one" / "report.md").read_text()
    assert "16 runs" not in text and "20 runs finished, 1 failed" in text
    assert all(f"figures/{figure.name}" in text for figure in figures)


def test_nothing_finished(tmp_path):
    empty = pd.DataFrame()
    write_report(tmp_path, STUDY, empty, {}, empty, {}, {"a": "no"})
    assert "0 runs finished, 1 failed" in (tmp_path / "report.md").read_text()
