"""The Pascal VOC development kit on disk: its classes, its folders and its split lists."""

import os
from dataclasses import dataclass
from pathlib import Path

from seg_attn.errors import InputError

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 21 classes of VOC segmentation in the order of their indices."""

VOC_YEARS = range(2007, 2013)
"""The years whose development kits hold segmentation masks in this layout."""

CLASS_NAMES_FILE = "class_names.txt"
"""Inside VOC<year>/: one class name per line, for devkits of other classes than VOC's."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask; `mask` is None where labels are not published.

    Attributes:
        image: Path of the photograph.
        mask: Path of the label mask.
    """

    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Listing:
    """What a split consists of, and what is wrong with it.

    Attributes:
        pairs: Images that are there, with their masks.
        problems: One line each: a file, and what is wrong with it.
        notes: Likewise, for what is odd and does no harm.
    """

    pairs: list[Pair]
    problems: list[str]
    notes: list[str]

    def checked(self) -> list[Pair]:
        """The pairs, where nothing is wrong.

        Raises:
            InputError: Something is; the first problem, and how many more there are.
        """
        if self.problems:
            more = (
                f" (and {len(self.problems) - 1} more; `seg-attn data check` lists them)" if self.problems[1:] else ""
            )
            raise InputError(self.problems[0] + more)
        return self.pairs


def voc_folder(root: str | os.PathLike[str], year: int = 2012) -> Path:
    """Find `VOCdevkit/VOC<year>` under `root`.

    Args:
        root: The folder that contains `VOCdevkit`.
        year: 2007 to 2012.

    Raises:
        ValueError: `year` is out of range.
        InputError: There is no such devkit.
    """
    if year not in VOC_YEARS:
        raise ValueError(f"year must lie in [{VOC_YEARS[0]}, {VOC_YEARS[-1]}], got {year}")
    root = Path(root)
    folder = root / "VOCdevkit" / f"VOC{year}"
    if (folder / "JPEGImages").is_dir() and (folder / "ImageSets" / "Segmentation").is_dir():
        return folder
    inside = f"VOCdevkit/VOC{year}"
    if not root.exists():
        problem = "there is no such folder"
    elif root.name == "VOCdevkit" or root.name.startswith("VOC20"):
        problem = f"this lies inside the devkit: give the folder that contains {inside}"
    elif folder.is_dir():
        problem = f"{inside} has no JPEGImages and ImageSets/Segmentation"
    else:
        problem = f"it does not contain {inside}"
    raise InputError(
        f"{root}: not a VOC data root ({problem}); `seg-attn data voc DIR` fetches VOC 2012, "
        "`seg-attn data sample DIR` writes a small sample in the same layout"
    )


def voc_listing(root: str | os.PathLike[str], year: int = 2012, split: str = "train") -> Listing:
    """List a split's images and masks.

    A mask is looked for in `SegmentationClass` first and then in `SegmentationClassAug` (SBD's), so that VOC's own mask
    is preferred where both exist. A split that has no masks at all (`test`) gives pairs whose mask is None.

    Args:
        root: The folder that contains `VOCdevkit`.
        year: 2007 to 2012.
        split: A list in `ImageSets/Segmentation` (`train`, `trainaug`, `val`, `trainval`, `test`), or the path of a
            text file with one image name per line.

    Raises:
        InputError: No devkit, no such list or an empty one.
    """
    folder = voc_folder(root, year)
    list_file = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not list_file.is_file():
        list_file = Path(split)
        if not list_file.is_file():
            raise InputError(_missing_split(folder, split))
    names = read_list(list_file)
    images = _files_by_stem(folder / "JPEGImages")
    masks = _files_by_stem(folder / "SegmentationClassAug") | _files_by_stem(folder / "SegmentationClass")
    labelled = any(name in masks for name in names)
    pairs, problems = [], []
    for name in names:
        if name not in images:
            missing = folder / "JPEGImages" / f"{name}.jpg"
            problems.append(f"{missing}: no such file, and {list_file} names it; add it or take the name out")
        elif labelled and name not in masks:
            problems.append(
                f"{images[name]}: has no mask in SegmentationClass or SegmentationClassAug, and {list_file} names it; "
                "run `seg-attn data voc` or take the name out"
            )
        else:
            pairs.append(Pair(images[name], masks[name] if labelled else None))
    return Listing(pairs, problems, [])


def voc_class_names(root: str | os.PathLike[str], year: int = 2012) -> list[str]:
    """The devkit's own class names where it brings a `class_names.txt`, VOC's 21 otherwise."""
    path = Path(root) / "VOCdevkit" / f"VOC{year}" / CLASS_NAMES_FILE
    return read_list(path) if path.is_file() else list(VOC_CLASSES)


def read_list(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file of one name per line: UTF-8 with or without BOM, any line ends, blank lines skipped.

    Raises:
        InputError: The file is missing, empty, no UTF-8 text, or names something twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such list file; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; save the list as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    names = [name for line in text.splitlines() if (name := line.strip())]
    if not names:
        raise InputError(f"{path}: the list is empty; put one name on each line")
    if len(set(names)) != len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise InputError(f"{path}: names {twice} twice; remove one")
    return names


def _missing_split(folder: Path, split: str) -> str:
    present = ", ".join(sorted(path.stem for path in (folder / "ImageSets" / "Segmentation").glob("*.txt"))) or "none"
    mend = "run `seg-attn data voc` to build it from SBD" if split == "trainaug" else "name one of them or a list file"
    return f"{folder}: no split {split!r} (there are: {present}); {mend}"


def _files_by_stem(folder: Path) -> dict[str, Path]:
    # One directory listing instead of a stat per name: the lists have ten thousand.
    return {path.stem: path for path in folder.iterdir()} if folder.is_dir() else {}
