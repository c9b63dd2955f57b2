"""The report of a study: its figures are those of its rows, and it needs no other file."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmjax.study import Answers, Results, Study, write_report
from mmjax.study.statistics import paired_difference, rank_arms, steps_to
from mmjax.study.tables import Comparison, make_tables

STUDY = Study(
    config="configs/a_b.py",
    axes={"connector": ("mlp", "linear"), "tokens": (4, 16)},
    metric="eval/x/accuracy",
    rates=(1e-3, 1e-2),
    seeds=4,
)
ARMS = [(c, t) for c in ("mlp", "linear") for t in ("4", "16")]
NAMES = [f"connector={connector},tokens={tokens}" for connector, tokens in ARMS]


def make_results(answered: bool) -> Results:
    """Noise that seeds share is larger than what arms differ by."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4) * 0.1
    rows, rates = [], {}
    for number, ((connector, tokens), name) in enumerate(zip(ARMS, NAMES, strict=True)):
        rates[name] = 1e-3 if number % 2 else 1e-2
        for rate, seed in [(1e-3, 0), (1e-2, 0), *((rates[name], s) for s in (1, 2, 3))]:
            score = 0.5 + noise[seed] + 0.02 * number + 0.004 * rng.normal()
            score -= 0.3 * (rate != rates[name])
            row = dict(arm=name, connector=connector, tokens=tokens, rate=rate, seed=seed)
            row |= dict(order=f"digest {seed}", seconds=60.0)
            rows.append(row | {"eval/x/accuracy": score, "eval/x/blind/accuracy": 0.25})
    costs = pd.DataFrame({"arm": NAMES, "parameters": [10, 20, 30, 40]})
    costs["visual tokens"] = [4, 16, 4, 16]
    costs["connector parameters"] = [100, 105, 150, 300]
    losses = {name: pd.DataFrame({s: [2.0, 1.0 + s / 9] for s in range(4)}) for name in NAMES}
    answers = None
    if answered:
        ids = [f"scene/{i}/{q}" for i in range(10) for q in range(3)]
        groups = pd.Series(["counting", "text", "text"] * 10, ids)
        images = pd.Series([name.rsplit("/", 1)[0] for name in ids], ids)
        scores = {
            name: pd.DataFrame(rng.random((4, 30)) < 0.3 + 0.1 * n, range(4), ids, dtype=float)
            for n, name in enumerate(NAMES)
        }
        answers = Answers(scores, groups, images)
    return Results(pd.DataFrame(rows), rates, costs, losses, answers)


def test_differences_are_paired_by_seed():
    results = make_results(False)
    assert len(results.chosen) == 16
    one, other = (
        results.chosen[results.chosen.arm == arm].set_index("seed")[["eval/x/accuracy"]]
        for arm in (NAMES[0], NAMES[3])
    )
    found = paired_difference(one, other)
    differences = (one - other).to_numpy().ravel()
    assert found.mean == pytest.approx(differences.mean())
    # The bootstrap of scipy; unpaired, the interval would hold 0.
    expected = stats.bootstrap(
        (differences,), np.mean, method="percentile", random_state=0
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=2e-3)
    assert found.tells and found.high < 0 < one.std().item()
    # Rows in another order, and a seed that one of them lacks.
    again = paired_difference(one[::-1], other[:3])
    assert again.mean == pytest.approx(differences[:3].mean())
    alone = paired_difference(one[:1], other[:1])
    assert np.isnan(alone[1:]).all() and not alone.tells


def test_images_are_drawn_with_all_of_their_questions():
    """With one seed, the interval is that of the means of images; questions of an image agree."""
    rng = np.random.default_rng(1)
    images = pd.Series(np.repeat(np.arange(40), 5), [f"q{i}" for i in range(200)])
    right = pd.DataFrame([np.repeat(rng.random(40) < 0.6, 5)], columns=images.index, dtype=float)
    found = paired_difference(right, right * 0, images)
    expected = stats.bootstrap(
        (right.to_numpy()[0, ::5],), np.mean, method="percentile", random_state=0
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.015)
    narrow = paired_difference(right, right * 0)
    assert narrow.high - narrow.low < 0.6 * (found.high - found.low)


def test_ranks():
    """The example of Demšar (2006), table 2: four algorithms on fourteen data sets. (Its ranks tell
    that the two 0.975 of one row differ.)"""
    blocks = pd.DataFrame(
        [
            (0.763, 0.768, 0.771, 0.798), (0.599, 0.591, 0.590, 0.569),
            (0.954, 0.971, 0.968, 0.967), (0.628, 0.661, 0.654, 0.657),
            (0.882, 0.888, 0.886, 0.898), (0.936, 0.931, 0.916, 0.931),
            (0.661, 0.668, 0.609, 0.685), (0.583, 0.583, 0.563, 0.625),
            (0.775, 0.838, 0.866, 0.875), (1.000, 1.000, 1.000, 1.000),
            (0.940, 0.962, 0.965, 0.962), (0.619, 0.666, 0.614, 0.669),
            (0.972, 0.981, 0.9751, 0.975), (0.957, 0.978, 0.946, 0.970),
        ],
        columns=["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"],
    )  # fmt: skip
    ranks = rank_arms(blocks)
    assert ranks.mean.round(3).to_dict() == {
        "C4.5+m+cf": 1.964, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5": 3.143,
    }  # fmt: skip
    assert ranks.blocks == 14
    assert ranks.p == pytest.approx(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue)
    # Table 5 of the paper: q = 2.569 for four; its own example, of 0.10, has 2.291.
    assert ranks.distance == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert rank_arms(blocks.iloc[:1, :1]).blocks == 1


def test_steps_to_a_loss():
    losses = pd.DataFrame({0: [3.0, 2.0, 1.0], 1: [3.0, 1.0, 1.0]}, index=[10, 20, 30])
    assert steps_to(losses, 1.5) == 20 and np.isnan(steps_to(losses, 0.5))


def test_tables():
    results = make_results(False)
    main, controls, costs, tokens, parameters, effects = make_tables(Comparison(STUDY, results))
    assert [row[0] for row in main.rows] == NAMES[::-1]
    chosen = results.chosen
    own = chosen[chosen.arm == main.rows[0][0]]["eval/x/accuracy"]
    assert main.rows[0][3] == f"{own.mean():.4g} ± {own.std():.2g}"
    assert main.rows[0][5] == "" and main.rows[3][4] == "4.00"
    assert [row[2] for row in controls.rows] == ["0.25 ± 0"] * 4
    assert costs.head == (
        "arm", "parameters", "visual tokens", "connector parameters", "seconds a run",
        "steps to loss 1.17",
    )  # fmt: skip
    assert costs.rows[0] == [NAMES[3], "40", "16", "300", "60", "1"]
    # Best first among those that cost the same.
    assert [row[0] for row in tokens.rows] == [NAMES[2], NAMES[0], NAMES[3], NAMES[1]]
    assert [row[:2] for row in parameters.rows] == [
        [NAMES[1], "100 to 105"], [NAMES[0], "100 to 105"],
    ]  # fmt: skip
    means = {(row[0], row[1]): float(row[3].split()[0]) for row in effects.rows}
    for axis, level in means:
        part = chosen[chosen[axis] == level]["eval/x/accuracy"]
        assert means[axis, level] == pytest.approx(part.mean(), abs=1e-4)
    latex = main.latex()
    assert r"connector=linear,tokens=16 & 0.001 & 4 &" in latex and r"$\pm$" in latex
    assert latex.count(r"\\") == 5 and "±" not in latex


def test_groups_of_questions():
    results = make_results(True)
    rows = results.rows
    for group in ("counting", "text"):
        rows[f"eval/x/{group}/blind/accuracy"] = 0.2
    groups = make_tables(Comparison(STUDY, results))[1]
    assert groups.head == ["arm", "counting", "text", "mean", "normalised"]
    answers = results.answers
    scores = answers.scores[NAMES[3]]
    text = scores.loc[:, (answers.groups == "text").to_numpy()].to_numpy().mean()
    counting = scores.loc[:, (answers.groups == "counting").to_numpy()].to_numpy().mean()
    said = [float(cell.split()[0]) for cell in groups.rows[0][1:]]
    mean = (text + counting) / 2
    assert said == pytest.approx([counting, text, mean, (mean - 0.2) / 0.8], abs=1e-4)


def test_orders_of_data_are_compared(tmp_path):
    results = make_results(False)
    write_report(tmp_path, STUDY, results, {})
    assert "same records in the same order" in (tmp_path / "report.md").read_text()
    results.rows.loc[results.rows.index[-1], "order"] = "another"
    write_report(tmp_path, STUDY, results, {})
    assert f"ORDER OF THE DATA DIFFERS: {NAMES[3]} saw" in (tmp_path / "report.md").read_text()


def test_a_page_of_its_own(tmp_path):
    failures = {"connector=q/lr=1/seed=0": "train ended:\nerror: 1 < 2 & 3"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, STUDY, make_results(True), failures)
    page = (tmp_path / "one" / "report.html").read_text()
    assert page == (tmp_path / "two" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)(?!data:)[^"]', page)
    assert page.count("<svg") == 10 and "error: 1 &lt; 2 &amp; 3" in page
    figures = sorted((tmp_path / "one" / "figures").iterdir())
    assert [figure.stem for figure in figures] == [
        "arms", "groups", "interaction", "losses", "pareto_connector_parameters",
        "pareto_parameters", "pareto_visual_tokens", "ranks", "search", "tokens",
    ]  # fmt: skip
    for figure in figures:
        words = " ".join(ElementTree.parse(figure).getroot().itertext())
        assert any(word in words for word in ("eval/x/accuracy", "train/loss", "mean rank"))
    text = (tmp_path / "one" / "report.md").read_text()
    assert "16 runs" not in text and "20 runs finished, 1 failed" in text
    assert all(f"figures/{figure.name}" in text for figure in figures)


def test_nothing_finished(tmp_path):
    empty = pd.DataFrame()
    write_report(tmp_path, STUDY, Results(empty, {}, empty, {}), {"a": "no"})
    assert "0 runs finished, 1 failed" in (tmp_path / "report.md").read_text()
