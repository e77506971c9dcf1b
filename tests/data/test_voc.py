import pytest

from seg_attn.data.voc import VOC_CLASSES, read_list, voc_class_names, voc_folder, voc_listing
from seg_attn.errors import InputError


def voc_pairs(*args, **kwargs):
    return voc_listing(*args, **kwargs).checked()


def test_class_names():
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 21
    assert VOC_CLASSES[0] == "background"
    assert VOC_CLASSES[1:] == tuple(sorted(VOC_CLASSES[1:]))  # VOC orders its objects by name
    assert VOC_CLASSES[15] == "person"


def test_pairs(voc_root):
    pairs = voc_pairs(voc_root, 2012, "val")
    assert [pair.image.name for pair in pairs] == [f"2008_{number:06d}.jpg" for number in range(5)]
    assert all(pair.mask.name == f"{pair.image.stem}.png" for pair in pairs)
    assert all(pair.mask.parent.name == "SegmentationClass" for pair in pairs)


def test_own_mask_is_preferred_to_sbd(make_devkit, tmp_path):
    root = make_devkit(tmp_path, {"trainaug": [("a", 8, 9), ("b", 8, 9)]}, aug=("b",))
    folder = root / "VOCdevkit" / "VOC2012"
    (folder / "SegmentationClassAug" / "a.png").write_bytes(b"SBD's")
    assert [pair.mask.parent.name for pair in voc_pairs(root, split="trainaug")] == [
        "SegmentationClass",
        "SegmentationClassAug",
    ]


def test_other_years(make_devkit, tmp_path):
    make_devkit(tmp_path, {"train": [("a", 8, 9)]}, year=2009)
    assert len(voc_pairs(tmp_path, 2009, "train")) == 1
    with pytest.raises(InputError, match="does not contain VOCdevkit/VOC2012"):
        voc_pairs(tmp_path, 2012, "train")
    with pytest.raises(ValueError, match=r"year must lie in \[2007, 2012\], got 2013"):
        voc_pairs(tmp_path, 2013, "train")


def test_the_test_split_has_no_masks(voc_root):
    assert [pair.mask for pair in voc_pairs(voc_root, split="test")] == [None]


def test_a_list_file(voc_root, tmp_path):
    subset = tmp_path / "my subset ü.txt"
    subset.write_bytes("\ufeff2007_000004\r\n\r\n 2007_000001 \r\n".encode())
    assert [pair.image.stem for pair in voc_pairs(voc_root, split=str(subset))] == ["2007_000004", "2007_000001"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the list is empty"),
        (b"\n \r\n", "the list is empty"),
        (b"a\nb\na\n", "names a twice"),
        ("ü".encode("latin1"), "not a UTF-8 text file"),
    ],
)
def test_broken_lists(tmp_path, content, match):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"list\.txt: {match}"):
        read_list(tmp_path / "list.txt")


def test_missing_lists_images_and_masks(voc_root, make_devkit, tmp_path):
    with pytest.raises(InputError, match=r"no split 'trian' \(there are: test, train, val\)"):
        voc_pairs(voc_root, split="trian")
    with pytest.raises(InputError, match=r"no split 'trainaug' .*`seg-attn data voc` to build it from SBD"):
        voc_pairs(voc_root, split="trainaug")
    with pytest.raises(InputError, match=r"absent\.txt: no such list file"):
        read_list(tmp_path / "absent.txt")
    subset = tmp_path / "subset.txt"
    subset.write_text("2007_000001\n2007_999999\n")
    with pytest.raises(InputError, match=r"2007_999999\.jpg: no such file, and .*subset\.txt names it"):
        voc_pairs(voc_root, split=str(subset))
    root = make_devkit(tmp_path, {"train": [("a", 8, 9), ("b", 8, 9)]})
    (root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(InputError, match=r"b\.jpg: has no mask in .*train\.txt names it"):
        voc_pairs(root, split="train")


def test_a_root_that_is_not_one(voc_root, tmp_path):
    cases = {
        tmp_path / "absent": "there is no such folder",
        tmp_path: "does not contain VOCdevkit/VOC2012",
        voc_root / "VOCdevkit": "lies inside the devkit",
        voc_root / "VOCdevkit" / "VOC2012": "lies inside the devkit",
    }
    for root, match in cases.items():
        with pytest.raises(InputError, match=match) as caught:
            voc_folder(root)
        assert "seg-attn data voc DIR" in str(caught.value)
        assert str(root) in str(caught.value)
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(InputError, match="has no JPEGImages"):
        voc_folder(tmp_path)


def test_class_names_of_another_devkit(voc_root, make_devkit, tmp_path):
    assert voc_class_names(voc_root) == list(VOC_CLASSES)
    make_devkit(tmp_path, {"train": [("a", 8, 9)]})
    (tmp_path / "VOCdevkit" / "VOC2012" / "class_names.txt").write_text("background\nkite\n")
    assert voc_class_names(tmp_path) == ["background", "kite"]
