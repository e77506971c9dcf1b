"""The benchmark of `predict`: both ways do the same work, and its figures follow from what was timed."""

import pytest
import torch

from seg_attn import DeepLabV3, throughput
from seg_attn.checkpoint import DataInfo
from seg_attn.cli import main
from seg_attn.data.benchmark import write_scenes
from seg_attn.errors import InputError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), count=3, size=(48, 64))


@pytest.mark.parametrize("peer", ["torchvision", "smp"])
def test_the_ways_write_the_same_masks(pairs, peer):
    folder = pairs[0].image.parent
    rows = throughput.measure([pair.image for pair in pairs], rounds=1, labels=folder, peer=peer)
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
    small, middle, large = _rest(throughput.memory_by_size(sizes, 256, backbone="resnet18"))
    assert small > 100e6
    # The scores of all pixels alone would be 4 * 21 * 1700 * 1700 bytes, 243 MB.
    assert max(middle, large) - small < 100e6


def test_memory_is_that_of_the_default_network(monkeypatch):
    built = []
    monkeypatch.setattr(throughput, "save_model", lambda _, model, data: built.append(model))
    assert throughput.memory_by_size((), 256, backbone="resnet18") == []
    assert built[0].config == DeepLabV3("resnet18").config


@pytest.mark.exhaustive
def test_memory_of_huge_images():
    """As wide and as high as they come, but not both: strips are as wide as the image, and there are many of them."""
    sizes = ((1500, 1500), (9000, 1500), (1500, 12_000))
    square, high, wide = _rest(rows := throughput.memory_by_size(sizes, 1024, backbone="resnet18"))
    assert all(row["peak_bytes"] < 4 * 2**30 for row in rows)
    assert high - square < 100e6
    assert wide - square < 1e9  # rows of tiles share 256 rows of 21 scores, 258 MB at a width of 12,000, twice


def test_weights_and_sizes_are_the_peers(tmp_path, pairs):
    one = [pairs[0].image]
    network = throughput.peer_network("smp", None, one, DataInfo.default(3))
    assert all(value.isfinite().all() for value in network.state_dict().values())  # one image has a deviation too
    torch.save(network.state_dict(), tmp_path / "smp.pth")
    again = throughput.peer_network("smp", tmp_path / "smp.pth", [], DataInfo.default(21))
    assert all(again.state_dict()[key].equal(value) for key, value in network.state_dict().items())
    with pytest.raises(InputError, match=r"smp.pth does not hold the weights of torchvision's DeepLabV3"):
        throughput.measure(one, 1, tmp_path / "smp.pth")
    (odd,) = write_scenes(tmp_path, count=1, size=(45, 64))
    with pytest.raises(InputError, match="is 64x45: SMP's network takes sizes that 8 divides"):
        throughput.measure([odd.image], 1, peer="smp")


def test_bad_arguments(capsys):
    assert main(["benchmark", "predict", "--rounds", "0"]) == 2
    assert "--rounds and --limit must be at least 1" in capsys.readouterr().err
