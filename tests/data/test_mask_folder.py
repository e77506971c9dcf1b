import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from seg_attn.data.mask_folder import LAYOUTS, csv_listing, divide, folder_listing, image_names
from seg_attn.errors import InputError


def touch(path, kind="image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 5, 3) if kind == "image" else (4, 5)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def folder_pairs(*args, **kwargs):
    return folder_listing(*args, **kwargs).checked()


def csv_pairs(*args):
    return csv_listing(*args).checked()


def names(pairs):
    return [(pair.image.name, pair.mask.name) for pair in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised(tmp_path, layout):
    images, masks = (tmp_path / part.replace("{split}", "val") for part in layout)
    for stem in ("b", "a", "c d ü"):
        touch(images / f"{stem}.jpg")
        touch(masks / f"{stem}.png", "mask")
    if "{split}" not in layout[0]:
        (tmp_path / "val.txt").write_text("a\nb\nc d ü\n")
    pairs = folder_pairs(tmp_path, "val")
    assert names(pairs) == [("a.jpg", "a.png"), ("b.jpg", "b.png"), ("c d ü.jpg", "c d ü.png")]
    assert pairs[0].image.parent == images
    assert pairs[0].mask.parent == masks


def test_named_folders_suffixes_and_nesting(tmp_path):
    """Cityscapes' way of naming things."""
    for city, frame in (("aachen", "0001"), ("bonn", "0001"), ("bonn", "0002")):
        touch(tmp_path / "leftImg8bit" / "train" / city / f"{city}_{frame}_leftImg8bit.png")
        touch(tmp_path / "gtFine" / "train" / city / f"{city}_{frame}_gtFine_labelIds.png", "mask")
        touch(tmp_path / "gtFine" / "train" / city / f"{city}_{frame}_gtFine_instanceIds.png", "mask")
    pairs = folder_pairs(
        tmp_path,
        "train",
        images="leftImg8bit/{split}",
        masks="gtFine/{split}",
        image_suffix="_leftImg8bit",
        mask_suffix="_gtFine_labelIds",
    )
    assert names(pairs) == [
        ("aachen_0001_leftImg8bit.png", "aachen_0001_gtFine_labelIds.png"),
        ("bonn_0001_leftImg8bit.png", "bonn_0001_gtFine_labelIds.png"),
        ("bonn_0002_leftImg8bit.png", "bonn_0002_gtFine_labelIds.png"),
    ]


def test_seeded_division(tmp_path):
    for number in range(20):
        touch(tmp_path / "images" / f"{number}.jpg")
        touch(tmp_path / "masks" / f"{number}.png", "mask")
    train, val = (folder_pairs(tmp_path, split, val_fraction=0.25) for split in ("train", "val"))
    assert len(train) == 15
    assert len(val) == 5
    assert not {pair.image for pair in train} & {pair.image for pair in val}
    assert names(folder_pairs(tmp_path, "val", val_fraction=0.25)) == names(val)
    assert names(folder_pairs(tmp_path, "val", val_fraction=0.25, split_seed=1)) != names(val)
    with pytest.raises(InputError, match=r"no list test\.txt"):
        folder_pairs(tmp_path, "test")
    (tmp_path / "train.txt").write_text("3.jpg\n4\n")  # a list wins
    assert names(folder_pairs(tmp_path, "train")) == [("3.jpg", "3.png"), ("4.jpg", "4.png")]


@given(st.sets(st.text("abcü ", min_size=1), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_divide_is_a_partition(everything, fraction, seed):
    train, val = divide(everything, fraction, seed)
    assert sorted(train + val) == sorted(everything)
    assert 1 <= len(val) < len(everything)
    assert abs(len(val) - fraction * len(everything)) <= 1
    assert (train, val) == divide(sorted(everything, reverse=True), fraction, seed)


def test_divide_changes_little_when_files_are_added():
    before = set(divide(map(str, range(1000)), 0.2, 0)[1])
    after = set(divide(map(str, range(1010)), 0.2, 0)[1])
    assert len(before - after) <= 12


def test_files_that_are_no_images_are_left_out(tmp_path):
    touch(tmp_path / "a.JPG")
    for name in ("Thumbs.db", ".hidden.png", "notes.txt", "b.jpg.part"):
        (tmp_path / name).write_text("x")
    assert list(image_names(tmp_path)) == ["a"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent: there is no such folder"):
        folder_pairs(tmp_path / "absent", "train")
    with pytest.raises(InputError, match=r"no folders of images and masks for split 'train'"):
        folder_pairs(tmp_path, "train")
    with pytest.raises(InputError, match="must be given together"):
        folder_pairs(tmp_path, "train", images="images")
    with pytest.raises(InputError, match=r"must both hold \{split\} or neither"):
        folder_pairs(tmp_path, "train", images="{split}/images", masks="masks")
    (tmp_path / "train").mkdir()
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(InputError, match=r"train: holds no image files"):
        folder_pairs(tmp_path, "train")
    touch(tmp_path / "train" / "a.jpg")
    touch(tmp_path / "train" / "b.jpg")
    touch(tmp_path / "trainannot" / "b.png", "mask")
    with pytest.raises(InputError, match=r"a\.jpg: no mask of that name in .*trainannot; add it"):
        folder_pairs(tmp_path, "train")
    touch(tmp_path / "train" / "a.png")
    with pytest.raises(InputError, match=r"a\.png: has the same name as a\.jpg"):
        folder_pairs(tmp_path, "train")


def test_a_list_that_names_a_missing_image(tmp_path):
    touch(tmp_path / "images" / "a.jpg")
    touch(tmp_path / "masks" / "a.png", "mask")
    (tmp_path / "train.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"images.b: no such image, and the list of 'train' names it"):
        folder_pairs(tmp_path, "train")


def test_a_listing_names_everything(tmp_path):
    for stem in "abc":
        touch(tmp_path / "train" / f"{stem}.jpg")
    for stem in "cde":
        touch(tmp_path / "trainannot" / f"{stem}.png", "mask")
    listing = folder_listing(tmp_path, "train")
    assert names(listing.pairs) == [("c.jpg", "c.png")]
    assert [problem.partition(":")[0] for problem in listing.problems] == [
        str(tmp_path / "train" / f"{s}.jpg") for s in "ab"
    ]
    assert [note.partition(":")[0] for note in listing.notes] == [
        str(tmp_path / "trainannot" / f"{s}.png") for s in "de"
    ]
    with pytest.raises(InputError, match=r"a\.jpg: .* \(and 1 more; `seg-attn data check` lists them\)"):
        listing.checked()


class TestCsv:
    def write(self, folder, content):
        touch(folder / "photos" / "a b.jpg")
        touch(folder / "photos" / "ü.png")
        touch(folder / "m" / "a.png", "mask")
        path = folder / "pairs.csv"
        path.write_bytes(content.encode("utf-8-sig"))
        return path

    def test_pairs(self, tmp_path):
        path = self.write(
            tmp_path, "image, mask ,split\r\nphotos/a b.jpg,m/a.png,train\r\nphotos/ü.png, m/a.png, val\r\n"
        )
        assert names(csv_pairs(path, "train")) == [("a b.jpg", "a.png")]
        assert names(csv_pairs(path, "val")) == [("ü.png", "a.png")]

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("", "columns image, mask and split are needed, there are: none"),
            ("image,mask\n", "there are: image, mask"),
            ("image,mask,split\n", r"no row of split 'train' \(there are: none\)"),
            ("image,mask,split\na,b,test\n", r"no row of split 'train' \(there are: test\)"),
            ("image,mask,split\nphotos/a b.jpg,m/x.png,train\n", r"x\.png: no such file, and line 2 of"),
            ("image,mask,split\n,m/a.png,train\n", "no such file, and line 2 of"),
            ("image,mask,split\nphotos/a b.jpg\n", r"no row of split 'train'"),
        ],
    )
    def test_broken(self, tmp_path, content, match):
        with pytest.raises(InputError, match=match) as caught:
            csv_pairs(self.write(tmp_path, content), "train")
        assert "pairs.csv" in str(caught.value)

    def test_missing_and_not_utf8(self, tmp_path):
        with pytest.raises(InputError, match="no such CSV file"):
            csv_pairs(tmp_path / "absent.csv", "train")
        (tmp_path / "latin.csv").write_bytes("image,mask,split\nü,b,train\n".encode("latin1"))
        with pytest.raises(InputError, match=r"latin\.csv: not a UTF-8"):
            csv_pairs(tmp_path / "latin.csv", "train")
