"""The sample devkit: its layout, its honesty (colour and small windows do not give the classes away), its safety."""

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import HistGradientBoostingClassifier

from seg_attn.data.images import read_image, read_mask, voc_palette
from seg_attn.data.sample import _BACKGROUNDS, _EXTENTS, SAMPLE_CLASSES, draw_scene, plan_scenes, write_sample
from seg_attn.data.voc import voc_class_names, voc_listing
from seg_attn.errors import InputError
from seg_attn.metrics import iou_from_confusion


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The whole sample, as `data sample` writes it."""
    root = tmp_path_factory.mktemp("whole")
    write_sample(root)
    return root


def test_layout_is_that_of_a_devkit(sample):
    assert voc_class_names(sample) == list(SAMPLE_CLASSES)
    assert len(SAMPLE_CLASSES) >= 9
    train, val = voc_listing(sample, 2012, "train").pairs, voc_listing(sample, 2012, "val").pairs
    assert (len(train), len(val)) == (200, 60)
    assert len(voc_listing(sample, 2012, "trainval").pairs) == 260
    for pair in (*train[::40], *val[::20]):
        with Image.open(pair.image) as image, Image.open(pair.mask) as mask:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (160, 120))
            assert (mask.format, mask.mode, mask.size) == ("PNG", "P", (160, 120))
            assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3), voc_palette(256))
    labels = {int(value) for pair in (*train, *val) for value in np.unique(read_mask(pair.mask))}
    assert labels == {*range(len(SAMPLE_CLASSES)), 255}


def test_train_and_val_share_no_scene(sample):
    pictures = {
        split: {read_image(pair.image).tobytes() for pair in voc_listing(sample, 2012, split).pairs}
        for split in ("train", "val")
    }
    assert len(pictures["train"]) == 200
    assert len(pictures["val"]) == 60
    assert not pictures["train"] & pictures["val"]


def test_every_object_boundary_is_void(sample):
    for pair in voc_listing(sample, 2012, "val").pairs[:20]:
        mask = read_mask(pair.mask)
        for before, after in ((mask[:, :-1], mask[:, 1:]), (mask[:-1], mask[1:])):
            touching = (before != after) & (before != 255) & (after != 255)
            assert not touching.any()


def test_every_class_meets_every_background_and_every_scale():
    seen = {
        (kind, plan.background, scale)
        for plan in plan_scenes(200, np.random.default_rng([0, 0]))
        for kind, scale in plan.objects
    }
    assert len(_EXTENTS) >= 3
    assert _EXTENTS[0][1] < 0.2
    assert _EXTENTS[-1][1] > 1.0
    kinds = range(1, len(SAMPLE_CLASSES))
    by_background = {(kind, background) for kind, background, _ in seen}
    by_scale = {(kind, scale) for kind, _, scale in seen}
    assert by_background == {(kind, background) for kind in kinds for background in range(len(_BACKGROUNDS))}
    assert by_scale == {(kind, scale) for kind in kinds for scale in range(len(_EXTENTS))}


def test_classes_are_balanced(sample):
    counts = np.zeros(256, dtype=np.int64)
    for pair in voc_listing(sample, 2012, "train").pairs:
        counts += np.bincount(read_mask(pair.mask).ravel(), minlength=256)
    objects = counts[1 : len(SAMPLE_CLASSES)]
    assert objects.min() > 0.4 * objects.max()


def _features(image):
    """Colour, and mean and deviation of a 5 x 5 window per channel: (H, W, 9)."""
    padded = np.pad(image.astype(np.float64), ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(0, 1))
    return np.concatenate([image, windows.mean((-2, -1)), windows.std((-2, -1))], axis=-1)


def test_colour_and_small_windows_do_not_give_the_classes_away(sample):
    rng = np.random.default_rng(0)
    values, labels = [], []
    for pair in voc_listing(sample, 2012, "train").pairs:
        mask = read_mask(pair.mask)
        features = _features(read_image(pair.image))
        for label in np.unique(mask[mask != 255]):
            rows, columns = np.nonzero(mask == label)
            taken = rng.choice(len(rows), min(len(rows), 150), replace=False)
            values.append(features[rows[taken], columns[taken]])
            labels.append(np.full(len(taken), label))
    classifier = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    classifier.fit(np.concatenate(values), np.concatenate(labels))
    confusion = np.zeros((len(SAMPLE_CLASSES),) * 2, dtype=np.int64)
    for pair in voc_listing(sample, 2012, "val").pairs:
        mask = read_mask(pair.mask)
        features = _features(read_image(pair.image))[mask != 255]
        np.add.at(confusion, (mask[mask != 255], classifier.predict(features)), 1)
    import torch

    miou = iou_from_confusion(torch.from_numpy(confusion)).nanmean().item()
    print(f"per-pixel classifier on colour and 5x5 windows: mIoU {miou:.3f}")
    assert miou <= 0.35


def test_equal_seeds_draw_equal_scenes_and_others_do_not(tmp_path):
    folders = [write_sample(tmp_path / str(index), seed=seed, train=2, val=1) for index, seed in enumerate((3, 3, 4))]
    files = [sorted(path for path in folder.rglob("*.*") if path.suffix in (".jpg", ".png")) for folder in folders]
    contents = [[path.read_bytes() for path in paths] for paths in files]
    assert contents[0] == contents[1]
    assert all(one != other for one, other in zip(contents[0], contents[2], strict=True))


def test_a_larger_set_begins_as_a_smaller_one():
    small = plan_scenes(3, np.random.default_rng(1))
    assert plan_scenes(9, np.random.default_rng(1))[:3] == small
    picture, mask = draw_scene(small[0], (64, 48), np.random.default_rng(2))
    assert picture.shape == (48, 64, 3)
    assert mask.shape == (48, 64)


def test_written_again_it_is_left_alone(tmp_path):
    folder = write_sample(tmp_path, train=2, val=1)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_sample(tmp_path, train=2, val=1) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_other_data_is_not_touched(tmp_path):
    write_sample(tmp_path, train=2, val=1)
    with pytest.raises(InputError, match="holds other data"):
        write_sample(tmp_path, seed=1, train=2, val=1)
    (tmp_path / "else" / "VOCdevkit").mkdir(parents=True)
    with pytest.raises(InputError, match="holds other data"):
        write_sample(tmp_path / "else", train=2, val=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        write_sample(tmp_path / "file")


def test_interrupted_writing_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    from seg_attn.data import sample as module

    drawn = []

    def stop(*args):
        drawn.append(args)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw_scene(*args)

    monkeypatch.setattr(module, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path, train=3, val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"train": 0}, {"val": 0}, {"size": (16, 16)}])
def test_numbers_out_of_range(tmp_path, arguments):
    with pytest.raises(ValueError, match="seed must be at least 0, train and val at least 1, size at least 32"):
        write_sample(tmp_path, **arguments)
