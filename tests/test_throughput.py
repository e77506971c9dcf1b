"""The benchmark of `predict`: both ways do the same work, and its figures follow from what was timed."""

import pytest

from seg_attn import DeepLabV3, throughput
from seg_attn.cli import main
from seg_attn.data.benchmark import write_scenes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), count=3, size=(48, 64))


def test_the_ways_write_the_same_masks(pairs):
    folder = pairs[0].image.parent
    rows = throughput.measure([pair.image for pair in pairs], rounds=1, labels=folder)
    by_way = {row["way"]: row for row in rows}
    assert list(by_way) == [throughput.LOOP, *throughput.OURS]
    loop = by_way[throughput.LOOP]
    assert loop["ratio"] == loop["equal"] == 1
    assert sum(loop["shares"].values()) == pytest.approx(1)
    assert loop["bound"] == pytest.approx(1 / loop["shares"]["network"])
    for way in ("predict", "predict --optimize"):
        assert by_way[way]["equal"] >= 0.999
        assert by_way[way]["miou"] == pytest.approx(loop["miou"], abs=1e-3)
        assert by_way[way]["ratio"] == pytest.approx(by_way[way]["images_per_s"] / loop["images_per_s"])
    assert 0.8 < by_way["predict --precision bfloat16"]["equal"] < 1


def _rest(rows):
    """What the rows' peaks were without the image and its mask, in bytes; printed."""
    for row in rows:
        peak, rest = row["peak_bytes"], row["peak_bytes"] - row["image_and_mask_bytes"]
        print(f"{row['width']}x{row['height']}: {peak / 2**20:.0f} MiB, {rest / 2**20:.0f} but for image and mask")
    return [row["peak_bytes"] - row["image_and_mask_bytes"] for row in rows]


def test_memory_is_flat_but_for_the_image_and_its_mask():
    """The default network: a skip from stride 4, joined by AFF."""
    sizes = ((500, 500), (1000, 1000), (1700, 1700))
    small, middle, large = _rest(throughput.peak_memory(sizes, 256, backbone="resnet18"))
    assert small > 100e6
    # The scores of all pixels alone would be 4 * 21 * 1700 * 1700 bytes, 243 MB.
    assert max(middle, large) - small < 100e6


def test_memory_is_that_of_the_default_network(monkeypatch):
    built = []
    monkeypatch.setattr(throughput, "save_model", lambda _, model, data: built.append(model))
    assert throughput.peak_memory((), 256, backbone="resnet18") == []
    assert built[0].config == DeepLabV3("resnet18").config


@pytest.mark.exhaustive
def test_memory_of_huge_images():
    rest = _rest(rows := throughput.peak_memory(throughput.HUGE, 1024, backbone="resnet18"))
    assert all(row["peak_bytes"] < 4 * 2**30 for row in rows)
    assert rest[-1] - rest[0] < 1e9  # rows of tiles share 256 rows of 21 scores, 258 MB at a width of 12,000, twice


def test_bad_arguments(capsys):
    assert main(["benchmark", "predict", "--rounds", "0"]) == 2
    assert "--rounds and --limit must be at least 1" in capsys.readouterr().err
