"""What is said of differences: beside scipy's tests, published values, and how often it errs."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmjax.study.statistics import (
    Errors,
    bootstrap_means,
    holm,
    mean_errors,
    percentile_interval,
    rank_arms,
)


def uniform(count):
    return np.full(count, 1 / count)


def test_two_arms_are_compared_as_by_a_paired_t_test():
    rng = np.random.default_rng(0)
    # Noise that seeds share is larger than what arms differ by.
    scores = rng.normal(size=(1, 5)) + rng.normal(size=(2, 5)) * 0.1 + np.array([[0.0], [0.2]])
    for table in (scores[:, :, None], scores[:, None, :]):  # five seeds, or one seed, five images
        clusters = np.arange(table.shape[2])
        errors = mean_errors(table, clusters, uniform(len(clusters)))
        expected = stats.ttest_rel(*scores)
        difference = scores[0].mean() - scores[1].mean()
        assert errors.freedom == expected.df == 4
        assert errors.p(difference) == pytest.approx(expected.pvalue)
        assert errors.p_of_all(difference) == pytest.approx(expected.pvalue)
        low, high = expected.confidence_interval()
        assert errors.interval(difference)[1:] == pytest.approx((low, high))
    alone = mean_errors(scores[:, :1, None], np.zeros(1, int), np.ones(1))
    assert np.isnan(alone.interval(0.1)[1:]).all() and not alone.interval(0.1).tells
    assert np.isnan([alone.distance, alone.p_of_all(0.1)]).all()


def test_published_quantiles():
    """q of the studentized range at 5%: 3.877 for three means and ten degrees of freedom."""
    errors = Errors(variance=4.0, freedom=10, arms=3)
    assert errors.distance == pytest.approx(2 * 3.877, abs=2e-3)
    assert errors.p_of_all(2 * 3.877) == pytest.approx(0.05, abs=1e-4)
    # F at 5% with 2 and 10 degrees of freedom is 4.103.
    spread = np.sqrt(4.103 * 8.0) * np.array([-1.0, 0.0, 1.0])
    assert errors.p_alike(spread) == pytest.approx(0.05, abs=1e-4)
    # The example of Holm's method in R's p.adjust.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def simulate(rng, arms, seeds, images, questions, of_seeds, of_images):
    """Equal arms that interact with seeds and images; images have one question or more."""
    parts = rng.normal(size=(arms, seeds, 1)) * of_seeds + rng.normal(size=(1, seeds, 1)) * 0.1
    parts = parts + rng.normal(size=(arms, 1, images)) * of_images
    parts = parts + rng.normal(size=(1, 1, images)) * 0.3
    clusters = np.concatenate([np.arange(images), rng.integers(0, images, questions - images)])
    return parts[..., clusters] + rng.normal(size=(arms, seeds, questions)) * 0.5, clusters


@pytest.mark.parametrize(
    ("of_seeds", "of_images"), [(0.0, 0.0), (0.05, 0.0), (0.0, 0.4), (0.05, 0.2)]
)
def test_intervals_hold_as_often_as_they_say(of_seeds, of_images):
    """And of eight equal arms, the best and the worst are told apart about as rarely as they say.

    Of 500 studies, 95% is 475 with a deviation of 5; of 100, 5 with a deviation of 2."""
    rng, held, wrong = np.random.default_rng(1), 0, 0
    for number in range(500):
        scores, clusters = simulate(rng, 8, 3, 60, 120, of_seeds, of_images)
        errors = mean_errors(scores, clusters, uniform(120))
        mean = scores.mean(axis=(1, 2))
        held += not errors.interval(mean[0] - mean[1]).tells
        if number < 100:  # scipy integrates anew for each
            wrong += errors.p_of_all(np.ptp(mean)) < 0.05
    assert 0.925 <= held / 500 <= 0.995
    assert wrong <= 11


def test_weights_of_groups():
    """A score that is the mean of two groups, one with three times as many questions."""
    rng = np.random.default_rng(2)
    few, many = rng.normal(size=(4, 3, 10)), rng.normal(size=(4, 3, 30))
    weights = np.concatenate([np.full(10, 1 / 20), np.full(30, 1 / 60)])
    both = np.concatenate([few, many], axis=2)
    errors = mean_errors(both, np.arange(40), weights)
    alone = [
        mean_errors(part, np.arange(part.shape[2]), uniform(part.shape[2])) for part in (few, many)
    ]
    # Nothing but chance: variances of means add up.
    expected = sum(part.variance for part in alone) / 4
    assert errors.variance == pytest.approx(expected, rel=0.35)


def test_images_are_drawn_with_all_of_their_questions():
    """The interval is that of the means of images, as by scipy; questions of an image agree."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 5)
    right = np.repeat(rng.random(40) < 0.6, 5)[None].astype(float)
    mean = right.mean()
    found = percentile_interval(mean, bootstrap_means(right, clusters, uniform(200))[:, 0])
    expected = stats.bootstrap(
        (right[0, ::5],), np.mean, method="percentile", random_state=0
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.015)
    narrow = percentile_interval(mean, bootstrap_means(right, np.arange(200), uniform(200))[:, 0])
    assert narrow.high - narrow.low < 0.6 * (found.high - found.low)
    # The same images for all arms.
    drawn = bootstrap_means(np.concatenate([right, right + 1]), clusters, uniform(200))
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 1)


def test_ranks():
    """The example of Demšar (2006), table 2: four algorithms on fourteen data sets. (Its ranks tell
    that the two 0.975 of one row differ.) Where blocks are independent, permutations say what
    Friedman's and Nemenyi's tests say."""
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
    blocks.index = pd.MultiIndex.from_product([range(14), [""]])
    ranks = rank_arms(blocks)
    assert ranks.mean.round(3).to_dict() == {
        "C4.5+m+cf": 1.964, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5": 3.143,
    }  # fmt: skip
    assert ranks.blocks == 14
    assert ranks.p == pytest.approx(stats.friedmanchisquare(*blocks.to_numpy().T).pvalue, abs=0.01)
    # Table 5 of the paper: q = 2.569 for four.
    assert ranks.distance == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=0.08)
    # An arm that lacks a score is left out; one seed tells of no other.
    blocks.iloc[3, 0] = np.nan
    assert set(rank_arms(blocks).mean.index) == {"C4.5+m+cf", "C4.5+m", "C4.5+cf"}
    assert np.isnan(rank_arms(blocks[:1]).distance)


def test_ranks_of_equal_arms_differ_as_rarely_as_they_say():
    """Groups of questions of one run go together: Nemenyi's distance would tell most of these
    arms apart."""
    rng, wrong, nemenyi = np.random.default_rng(3), 0, 0
    index = pd.MultiIndex.from_product([range(3), range(6)])
    limit = stats.studentized_range.ppf(0.95, 6, np.inf) / np.sqrt(2) * np.sqrt(6 * 7 / (6 * 18))
    for _ in range(150):
        runs = rng.normal(size=(3, 1, 6)) * 0.1 + rng.normal(size=(3, 6, 6)) * 0.05
        ranks = rank_arms(pd.DataFrame(runs.reshape(18, 6), index))
        apart = np.ptp(ranks.mean)
        wrong += apart > ranks.distance
        nemenyi += apart > limit
    assert wrong / 150 <= 0.1 and nemenyi / 150 >= 0.3
