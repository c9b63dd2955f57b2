"""The report of a study: its figures are those of its rows, and it needs no other file."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from mmjax.study import Answers, Results, Study, StudyError, plan, write_report
from mmjax.study.comparison import Comparison
from mmjax.study.statistics import mean_errors, steps_to
from mmjax.study.tables import make_tables

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
            row |= dict(order=f"digest {seed}", seconds=60.0, code="abc", devices="", packages="")
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
        for row in rows:
            if row["rate"] == rates[row["arm"]]:
                row["eval/x/accuracy"] = scores[row["arm"]].loc[row["seed"]].mean()
        answers = Answers(scores, groups, images)
    return Results(pd.DataFrame(rows), rates, costs, losses, answers)


def test_steps_to_a_loss():
    losses = pd.DataFrame({0: [3.0, 2.0, 1.0], 1: [3.0, 1.0, 1.0]}, index=[10, 20, 30])
    # Means of the seeds are 3, 1.5, 1; of these and the rows before, 3, 2.25, 1.83.
    assert steps_to(losses, 2.25) == 20 and np.isnan(steps_to(losses, 1.5))


def test_tables():
    results = make_results(False)
    found = Comparison(STUDY, results)
    main, controls, costs, tokens, parameters, effects = make_tables(found)
    assert [row[0] for row in main.rows] == NAMES[::-1]
    chosen = results.chosen
    own = chosen[chosen.arm == main.rows[0][0]]["eval/x/accuracy"]
    assert main.rows[0][1] == "0.001 (lowest)"
    assert main.rows[0][3] == f"{own.mean():.4g} ± {own.std():.2g}"
    assert main.rows[0][5:] == ["", ""] and main.rows[3][4] == "4.00"
    # Far apart beside their noise: paired, they are told apart.
    assert float(main.rows[3][5]) == pytest.approx(
        found.mean[NAMES[0]] - found.mean[NAMES[3]], abs=1e-4
    )
    assert main.rows[3][6] == "< 0.001" and "with other seeds too" in main.note
    assert [row[2] for row in controls.rows] == ["0.25 ± 0"] * 4
    assert costs.head == (
        "arm", "parameters", "visual tokens", "connector parameters", "seconds a run",
        "hours in all", "steps to loss 1.58",
    )  # fmt: skip
    # Five runs of a minute.
    assert costs.rows[0] == [NAMES[3], "40", "16", "300", "60", "0.08333", "1"]
    # Best first among those that cost the same.
    assert [row[0] for row in tokens.rows] == [NAMES[2], NAMES[0], NAMES[3], NAMES[1]]
    assert [row[:2] for row in parameters.rows] == [
        [NAMES[1], "100 to 105"], [NAMES[0], "100 to 105"],
    ]  # fmt: skip
    assert [row[:3] for row in effects.rows] == [
        ["connector", "mlp to linear", "2"], ["tokens", "4 to 16", "2"],
    ]  # fmt: skip
    latex = main.latex()
    assert r"connector=linear,tokens=16 & 0.001 (lowest) & 4 &" in latex and r"$\pm$" in latex
    assert latex.count(r"\\") == 5 and "±" not in latex


def test_effects_and_interactions():
    """Tokens add to one connector and take from the other."""
    results = make_results(False)
    score = "eval/x/accuracy"
    last = (results.rows.arm == NAMES[3]) & (results.rows.rate == results.rates[NAMES[3]])
    results.rows.loc[last, score] -= 0.04
    found = Comparison(STUDY, results)
    connector, tokens = found.effects()
    mean = found.mean
    by = {"mlp": mean[NAMES[1]] - mean[NAMES[0]], "linear": mean[NAMES[3]] - mean[NAMES[2]]}
    assert tokens.by == pytest.approx(by) and by["linear"] < 0 < by["mlp"]
    assert tokens.interval.mean == pytest.approx(np.mean(list(by.values())))
    assert not tokens.interval.tells and tokens.p > 0.1 and tokens.p_alike < 0.001
    assert connector.interval.tells and connector.p_alike == pytest.approx(tokens.p_alike)
    # Half of the variance of a difference of two arms.
    half = found.difference(NAMES[0], NAMES[1])
    width = (half.high - half.low) / np.sqrt(2)
    assert tokens.interval.high - tokens.interval.low == pytest.approx(width)


def test_contrasts():
    contrasts = {"a": ([NAMES[2], NAMES[3]], [NAMES[0], NAMES[1]]), "b": (NAMES[1], NAMES[0])}
    study = dataclasses.replace(STUDY, contrasts=contrasts)
    found = Comparison(study, make_results(True))
    first, second = found.contrasts()
    mean = found.mean
    assert first.interval.mean == pytest.approx(mean[NAMES[2:]].mean() - mean[NAMES[:2]].mean())
    # With the error of its own arms.
    table = np.stack([found.results.answers.scores[arm] for arm in NAMES[:2]])
    own = mean_errors(table, found.clusters, found.asked)
    assert second.interval == pytest.approx(own.interval(mean[NAMES[1]] - mean[NAMES[0]]))
    alone = found.errors.p(first.interval.mean, 1.0), own.p(second.interval.mean)
    assert sorted([first.p, second.p])[0] == pytest.approx(min(1, 2 * min(alone)))
    assert make_tables(found)[1].title == "Contrasts"
    assert plan_fails(dataclasses.replace(study, contrasts={"a": ("connector=mlp", NAMES[0])}))


def plan_fails(study):
    with pytest.raises(StudyError, match="contrast 'a': no arm is 'connector=mlp'; did you mean"):
        plan(study)
    return True


def test_groups_of_questions():
    results = make_results(True)
    rows = results.rows
    for group in ("counting", "text"):
        # One baseline for all arms: the mean of theirs, 0.2.
        rows[f"eval/x/{group}/blind/accuracy"] = np.where(rows.arm == NAMES[0], 0.5, 0.1)
    groups = make_tables(Comparison(STUDY, results))[1]
    assert groups.head == ["arm", "counting", "text", "mean", "normalised"]
    answers = results.answers
    scores = answers.scores[NAMES[3]]
    text = scores.loc[:, (answers.groups == "text").to_numpy()].to_numpy().mean()
    counting = scores.loc[:, (answers.groups == "counting").to_numpy()].to_numpy().mean()
    said = [float(cell.split()[0]) for cell in next(r for r in groups.rows if r[0] == NAMES[3])[1:]]
    mean = (text + counting) / 2
    assert said == pytest.approx([counting, text, mean, (mean - 0.2) / 0.8], abs=1e-4)


@pytest.mark.parametrize("group", ["text", "macro"])
def test_arms_compared_by_a_part_of_the_questions(group):
    """Differences are those of the score that is printed."""
    study = dataclasses.replace(STUDY, metric=f"eval/x/{group}/accuracy")
    results = make_results(True)
    answers, rows = results.answers, results.rows
    names = ["text"] if group == "text" else ["counting", "text"]
    for arm in NAMES:
        parts = [answers.scores[arm].loc[:, (answers.groups == n).to_numpy()] for n in names]
        means = sum(part.mean(axis=1) for part in parts) / len(parts)
        rows.loc[rows.arm == arm, study.metric] = rows[rows.arm == arm].seed.map(means)
    found = Comparison(study, results)
    one, other = found.mean.index[:2]
    images = found.over_images(one, other)
    assert images.low < images.mean == found.mean[one] - found.mean[other] < images.high
    assert found.asked.sum() == pytest.approx(1)
    assert (found.asked > 0).sum() == (20 if group == "text" else 30)
    # A score that is no mean of these answers has no such intervals.
    rows[study.metric] += 0.1
    assert np.isnan(Comparison(study, results).over_images(one, other).low)


def test_above_a_control():
    results = make_results(True)
    scores = results.answers.scores
    blind = {arm: table * 0 + 0.25 for arm, table in scores.items()}
    blind[NAMES[0]].iloc[:, 0] = np.nan  # one that could not be asked, of one arm
    answers = dataclasses.replace(results.answers, controls={"blind": blind})
    found = Comparison(STUDY, dataclasses.replace(results, answers=answers))
    above = found.above("blind", "")
    assert above[NAMES[3]].mean == pytest.approx(
        scores[NAMES[3]].iloc[:, 1:].to_numpy().mean() - 0.25
    )
    assert above[NAMES[3]].low < above[NAMES[3]].mean < above[NAMES[3]].high
    assert above[NAMES[3]].tells
    titles = [table.title for table in make_tables(found)]
    assert "Above blind" in titles and "Above shuffled" not in titles


def test_an_arm_that_lacks_a_seed():
    results = make_results(False)
    keep = (results.rows.arm != NAMES[1]) | (results.rows.seed < 3)
    found = Comparison(STUDY, dataclasses.replace(results, rows=results.rows[keep]))
    assert found.whole == [NAMES[3], NAMES[2], NAMES[0]] and NAMES[1] not in found.ranks().mean
    short, full = found.difference(NAMES[1], NAMES[0]), found.difference(NAMES[2], NAMES[0])
    assert short.high - short.low == pytest.approx(
        (full.high - full.low) * np.sqrt((1 + 4 / 3) / 2)
    )
    assert found.p(NAMES[1], NAMES[0]) < 1


def test_orders_of_data_are_compared(tmp_path):
    results = make_results(False)
    write_report(tmp_path, STUDY, results, {})
    assert "same records in the same order" in (tmp_path / "report.md").read_text()
    results.rows.loc[results.rows.index[-1], "order"] = "another"
    write_report(tmp_path, STUDY, results, {})
    assert f"ORDER OF THE DATA DIFFERS: {NAMES[3]} saw" in (tmp_path / "report.md").read_text()
    assert "Code of all runs: abc." in (tmp_path / "report.md").read_text()
    results.rows.loc[0, "code"] = "def"
    write_report(tmp_path, STUDY, results, {})
    assert "CODE OF RUNS DIFFER: def; abc." in (tmp_path / "report.md").read_text()


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
        "arms", "groups", "interaction_connector_tokens", "losses", "pareto_connector_parameters",
        "pareto_parameters", "pareto_visual_tokens", "ranks", "search", "tokens",
    ]  # fmt: skip
    for figure in figures:
        words = " ".join(ElementTree.parse(figure).getroot().itertext())
        assert any(word in words for word in ("eval/x/accuracy", "train/loss", "mean rank"))
    assert len(pd.read_csv(tmp_path / "one" / "pairs.csv")) == 6
    text = (tmp_path / "one" / "report.md").read_text()
    assert "16 runs" not in text and "20 runs finished, 1 failed" in text
    assert all(f"figures/{figure.name}" in text for figure in figures)


def test_nothing_finished(tmp_path):
    empty = pd.DataFrame()
    write_report(tmp_path, STUDY, Results(empty, {}, empty, {}), {"a": "no"})
    assert "0 runs finished, 1 failed" in (tmp_path / "report.md").read_text()
