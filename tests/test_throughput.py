"""The benchmark of `predict`: both ways do the same work, and its figures follow from what was timed."""

import pytest

from seg_attn import throughput
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


def test_memory_is_flat_but_for_the_image_and_its_mask():
    small, large = throughput.peak_memory(((500, 500), (1700, 1700)), 256, backbone="resnet18", decoder_channels=16)
    growth = (large["peak_bytes"] - large["image_and_mask_bytes"]) - (
        small["peak_bytes"] - small["image_and_mask_bytes"]
    )
    assert small["peak_bytes"] > 100e6
    assert growth < 100e6  # the scores of all pixels alone would be 4 * 21 * 1700 * 1700 bytes, 243 MB


@pytest.mark.exhaustive
def test_memory_of_huge_images():
    rows = throughput.peak_memory(throughput.HUGE, 1024, backbone="resnet18")
    assert all(row["peak_bytes"] < 4 * 2**30 for row in rows)


def test_bad_arguments(capsys):
    assert main(["benchmark", "predict", "--rounds", "0"]) == 2
    assert "--rounds and --limit must be at least 1" in capsys.readouterr().err
