"""The paired bootstrap: against a loop in plain NumPy, on cases known by hand, and its coverage on simulated sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seg_attn.statistics import Counts, Difference, paired_difference, resamples, verdict


def simulated_population(seed, images=20_000, classes=9, most_objects=3):
    """Confusion matrices (images, C, C) of two settings of one network: errors of an image go together.

    Every image has background and a few objects of lognormal area; how hard an image, a class and an object are is
    shared by both settings, each adds errors of its own; lost pixels go to what else is in the image, now and then to a
    class that is not.
    """
    generator = np.random.default_rng(seed)
    objects = generator.integers(1, most_objects + 1, images)
    order = generator.random((images, classes - 1)).argsort(axis=1).argsort(axis=1)
    present = np.concatenate([np.ones((images, 1), bool), order < objects[:, None]], axis=1)
    area = np.where(present, generator.lognormal(7.5, 0.9, (images, classes)), 0.0)
    area[:, 0] = generator.lognormal(9.5, 0.3, images)
    shared = generator.normal(0, 0.7, (images, 1)) + generator.normal(0, 0.5, (1, classes))
    shared = shared + generator.normal(0, 0.6, (images, classes))
    elsewhere = present + 0.3 * (generator.random((images, classes)) < 0.03)
    diagonal = np.arange(classes)
    matrices = []
    for level in (-1.60, -1.55):
        own = generator.normal(0, 0.35, (images, classes))
        error = 1 / (1 + np.exp(-(level + shared + own)))
        error[:, 0] *= 0.25
        share = generator.gamma(0.5, size=(images, classes, classes)) * elsewhere[:, None, :]
        share[:, diagonal, diagonal] = 0
        share /= np.maximum(share.sum(axis=2, keepdims=True), 1e-12)
        matrix = np.rint(area[:, :, None] * error[:, :, None] * share).astype(np.int64)
        matrix[:, diagonal, diagonal] = np.rint(area * (1 - error)).astype(np.int64)
        matrices.append(matrix)
    return matrices


def miou(confusion):
    """Mean IoU of one matrix, by its definition."""
    values = []
    for index in range(len(confusion)):
        union = confusion[index].sum() + confusion[:, index].sum() - confusion[index, index]
        if union:
            values.append(confusion[index, index] / union)
    return sum(values) / len(values)


def class_iou(confusion, index):
    union = confusion[index].sum() + confusion[:, index].sum() - confusion[index, index]
    return confusion[index, index] / union if union else float("nan")


def looped_bootstrap(row, baseline, replicates, seed):
    """The definition, draw by draw and class by class: differences of mean IoU and of each class's."""
    images, classes = row.shape[:2]
    counts = np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=replicates)
    full = [{c for c in range(classes) if class_iou(m.sum(0), c) == class_iou(m.sum(0), c)} for m in (row, baseline)]
    means, per_class = [], []
    for count in counts:
        drawn = np.repeat(np.arange(images), count)
        ious = [[class_iou(m[drawn].sum(0), c) for c in range(classes)] for m in (row, baseline)]
        per_class.append([left - right for left, right in zip(*ious, strict=True)])
        common = {c for c in full[0] & full[1] if per_class[-1][c] == per_class[-1][c]}
        sums = [sum(iou[c] for c in common) for iou in ious]
        means.append(
            sums[0] / (len(common) + len(full[0] - full[1])) - sums[1] / (len(common) + len(full[1] - full[0]))
        )
    return np.array(means), np.array(per_class)


@pytest.fixture(scope="module")
def population():
    return simulated_population(0, images=2_000)


def test_counts_are_the_matrix(population):
    confusion = population[0][:50]
    counts = Counts.of(confusion)
    assert counts.miou == pytest.approx(miou(confusion.sum(0)), abs=1e-15)
    assert counts.intersection.shape == counts.union.shape == (50, 9)
    assert counts.iou[3] == class_iou(confusion.sum(0), 3)


@pytest.mark.parametrize("images", [2, 60])
def test_equals_the_loop_with_the_same_seed(population, images):
    row, baseline = (matrix[:images] for matrix in population)
    found = paired_difference(Counts.of(row), Counts.of(baseline), replicates=400, seed=7)
    means, per_class = looped_bootstrap(row, baseline, 400, seed=7)
    assert found.value == pytest.approx(miou(row.sum(0)) - miou(baseline.sum(0)), abs=1e-15)
    np.testing.assert_allclose(found.interval, np.quantile(means, [0.025, 0.975]), rtol=0, atol=1e-12)
    for index in range(9):
        values = per_class[:, index][~np.isnan(per_class[:, index])]
        if len(values):
            np.testing.assert_allclose(
                found.per_class_interval[index], np.quantile(values, [0.025, 0.975]), rtol=0, atol=1e-12
            )
        else:
            assert np.isnan(found.per_class_interval[index]).all()


def test_draws_are_one_multinomial_however_many():
    together = np.concatenate(list(resamples(5, 2_345, seed=3)))
    assert np.array_equal(together, np.random.default_rng(3).multinomial(5, [0.2] * 5, size=2_345))


def test_a_class_that_only_one_row_predicts_counts_as_zero_in_every_draw():
    # Two classes; class 2 occurs nowhere, but the row predicts it in the first image.
    row = np.zeros((6, 3, 3), dtype=np.int64)
    row[:, 0, 0], row[:, 1, 1] = 50, 50
    baseline = row.copy()
    row[0, 0, 0], row[0, 0, 2] = 40, 10
    found = paired_difference(Counts.of(row), Counts.of(baseline), replicates=500)
    assert found.value == pytest.approx((290 / 300 + 1 + 0) / 3 - 1)
    assert found.interval[1] == pytest.approx(2 / 3 - 1)  # a draw without the first image: still three classes
    assert found.kind != "none"


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_swapped_rows_swap_the_interval_and_equal_rows_do_not_differ(images, classes, seed):
    generator = np.random.default_rng(seed)
    left, right = (Counts.of(generator.integers(0, 4, (images, classes, classes))) for _ in range(2))
    forth = paired_difference(left, right, replicates=200, seed=1)
    back = paired_difference(right, left, replicates=200, seed=1)
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-12)
    same = paired_difference(left, left, replicates=200, seed=1)
    assert (same.value, same.interval) == (0.0, (0.0, 0.0))
    assert same.kind == "none"


def test_one_image_has_no_interval():
    counts = Counts.of(np.array([[[5, 1], [0, 4]]]))
    better = Counts.of(np.array([[[6, 0], [0, 4]]]))
    found = paired_difference(better, counts)
    assert np.isnan(found.interval).all()
    assert found.kind == "none"
    assert verdict(found, "8", "16") == "on this one image: 8 minus 16 is +18.33; one image has no interval"


def test_arguments_are_checked():
    counts = Counts.of(np.ones((3, 2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"same images and classes, got \(3, 2\) and \(2, 2\)"):
        paired_difference(counts, Counts.of(np.ones((2, 2, 2), dtype=np.int64)))
    with pytest.raises(ValueError, match="replicates must be positive"):
        paired_difference(counts, counts, replicates=0)


NOTHING = np.zeros(0)


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.0084, (0.0053, 0.0115), "for it, on these 60 images: 8 is better than 16 by 0.84 ± 0.31"),
        (-0.052, (-0.0734, -0.0326), "for it, on these 60 images: 8 is worse than 16 by 5.20 ± 2.04"),
        (
            0.0017,
            (-0.0045, 0.0079),
            "for it, on these 60 images: no difference shown between 8 and 16 (+0.17, 95 % interval −0.45 to +0.79)",
        ),
        (0.0, (0.0, 0.0), "for it, on these 60 images: 8 and 16 count the same"),
    ],
)
def test_verdict(value, interval, text):
    assert verdict(Difference(value, interval, NOTHING, NOTHING, 60), "8", "16", "it") == text


@pytest.mark.parametrize("images", [200, 60])
def test_coverage_in_a_few_sets(population, images):
    assert 0.88 <= coverage(population, images, sets=100, replicates=200) <= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("classes", "most_objects"), [(9, 3), (21, 2)], ids=["as the sample", "as VOC"])
@pytest.mark.parametrize("images", [200, 60])
def test_coverage_of_two_thousand_sets(classes, most_objects, images, capsys):
    found = coverage(simulated_population(1, classes=classes, most_objects=most_objects), images, 2_000, 2_000)
    with capsys.disabled():
        print(
            f"\n{classes} classes, {images} images: the 95 % interval covers the truth in {100 * found:.2f} % of sets"
        )
    assert 0.93 <= found <= 0.97


def coverage(population, images, sets, replicates):
    """Share of simulated sets, drawn from the population, whose interval holds the population's difference."""
    row, baseline = (Counts.of(matrix) for matrix in population)
    truth = row.miou - baseline.miou
    generator = np.random.default_rng(2)
    held = 0
    for number in range(sets):
        drawn = generator.integers(0, len(row.union), images)
        left, right = (Counts(c.intersection[drawn], c.union[drawn]) for c in (row, baseline))
        low, high = paired_difference(left, right, replicates, seed=number).interval
        held += low <= truth <= high
    return held / sets
