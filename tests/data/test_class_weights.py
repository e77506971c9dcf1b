import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seg_attn.data.class_weights import ClassCounts, cached_counts, class_weights, count_classes
from seg_attn.data.images import read_mask, voc_palette, write_mask


def test_counts():
    masks = [np.array([[0, 0, 2], [255, 2, 2]], np.uint8), np.array([[0, 1, 255]], np.uint8)]
    assert count_classes(masks, 4) == ClassCounts([3, 1, 3, 0], [2, 1, 1, 0], 2)


def test_inverse_frequency():
    weights = class_weights(ClassCounts([100, 50, 0, 25], [1, 1, 0, 1], 0), "inverse_frequency")
    assert weights[2] == 1
    seen = np.array(weights)[[0, 1, 3]]
    assert seen.mean() == pytest.approx(1)
    np.testing.assert_allclose(seen * [100, 50, 25], seen[0] * 100)


@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=20), st.floats(0, 0.9999))
def test_effective_number_is_cuis_formula(images, beta):
    weights = class_weights(ClassCounts([1] * len(images), images, 0), "effective_number", beta)
    # The effective number as a sum, eq. 2's geometric series, instead of its closed form.
    numbers = np.array([sum(beta**i for i in range(min(n, 200_000))) for n in images])
    expected = (1 / numbers) / (1 / numbers).mean()
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_effective_number_lies_between_no_weights_and_inverse_frequency():
    counts = ClassCounts([1, 1], [10, 1000], 0)
    assert class_weights(counts, "effective_number", 0.0) == [1.0, 1.0]
    ratios = [np.divide(*class_weights(counts, "effective_number", beta)) for beta in (0.9, 0.99, 0.999, 0.999999)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("inverse",), "scheme must be one of inverse_frequency, effective_number, got 'inverse'"),
        (("effective_number", 1.0), r"beta must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        class_weights(ClassCounts([1], [1], 0), *arguments)


class TestKeeping:
    @pytest.fixture
    def masks(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for number in range(3):
            write_mask(tmp_path / f"{number}.png", np.full((4, 5), number), voc_palette())
        return [tmp_path / f"{number}.png" for number in range(3)]

    def count(self, masks, settings=""):
        reads = []
        counts = cached_counts(masks, lambda path: reads.append(path) or read_mask(path), 3, settings=settings)
        return counts, len(reads)

    def test_a_second_pass_reads_nothing(self, masks):
        assert self.count(masks) == (ClassCounts([20, 20, 20], [1, 1, 1], 0), 3)
        assert self.count(masks) == (ClassCounts([20, 20, 20], [1, 1, 1], 0), 0)

    def test_changes_are_noticed(self, masks):
        self.count(masks)
        write_mask(masks[0], np.full((6, 5), 1), voc_palette())
        assert self.count(masks) == (ClassCounts([0, 50, 20], [0, 2, 1], 0), 3)
        assert self.count(masks[:2])[1] == 2
        assert self.count(masks, settings="remapped")[1] == 3

    def test_damaged_or_unwritable_caches_do_no_harm(self, masks, tmp_path, monkeypatch):
        expected, _ = self.count(masks)
        (kept,) = (tmp_path / "cache" / "seg_attn").iterdir()
        kept.write_text("{not json")
        assert self.count(masks) == (expected, 3)
        (tmp_path / "a file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
        assert self.count(masks) == (expected, 3)
