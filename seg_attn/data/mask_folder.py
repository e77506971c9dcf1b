"""Pairs of images and masks in plain folders or a CSV file, and how they are divided into splits."""

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from seg_attn.data.voc import Listing, Pair, read_list
from seg_attn.errors import InputError

LAYOUTS = (
    ("{split}", "{split}annot"),
    ("{split}/images", "{split}/masks"),
    ("{split}/images", "{split}/labels"),
    ("images/{split}", "masks/{split}"),
    ("images/{split}", "labels/{split}"),
    ("images/{split}", "annotations/{split}"),
    ("img_dir/{split}", "ann_dir/{split}"),
    ("images", "masks"),
    ("images", "labels"),
    ("images", "annotations"),
)
"""Folders of images and masks under the root that are recognised without being named, in this order."""

_CSV_COLUMNS = ("image", "mask", "split")


def folder_listing(
    root: str | os.PathLike[str],
    split: str,
    *,
    images: str | None = None,
    masks: str | None = None,
    image_suffix: str = "",
    mask_suffix: str = "",
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> Listing:
    """List a split of two parallel folders, matched by path and name without extension.

    Folders that have `{split}` in their name hold one split each. Otherwise the list `<root>/<split>.txt` or the list
    file `split` says which names belong to it, and where there is none, `train` and `val` are a seeded division of all.

    Args:
        root: Folder that the others are relative to.
        split: Name of the split, or path of a list file.
        images: Folder of the images, may hold `{split}`; None looks for one of `LAYOUTS`.
        masks: Folder of the masks, likewise.
        image_suffix: What image names end in, before the extension, that mask names do not.
        mask_suffix: What mask names end in, before the extension, that image names do not.
        val_fraction: Share of the images that a seeded division gives to `val`.
        split_seed: Seed of that division.

    Returns:
        Pairs, sorted by name or in the list's order; what has no counterpart is named among the problems, or, for masks
        without an image, among the notes.

    Raises:
        InputError: Folders are missing or empty, names are ambiguous, or the split cannot be told.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; give the folder that holds the images and masks")
    image_template, mask_template = _layout(root, split, images, masks)
    by_folder = "{split}" in image_template
    image_folder = root / image_template.replace("{split}", split)
    mask_folder = root / mask_template.replace("{split}", split)
    image_files = image_names(image_folder, image_suffix)
    mask_files = image_names(mask_folder, mask_suffix)
    names = (
        sorted(image_files) if by_folder else _split_names(root, split, sorted(image_files), val_fraction, split_seed)
    )
    pairs, problems = [], []
    for name in names:
        if name not in image_files:
            problems.append(f"{image_folder / name}{image_suffix}: no such image, and the list of {split!r} names it")
        elif name not in mask_files:
            problems.append(
                f"{image_files[name]}: no mask of that name in {mask_folder}; add it, take the image out, or say what "
                "mask names end in with mask_suffix"
            )
        else:
            pairs.append(Pair(image_files[name], mask_files[name]))
    extra = sorted(set(mask_files) - set(image_files))
    return Listing(pairs, problems, [f"{mask_files[name]}: no image of that name in {image_folder}" for name in extra])


def csv_listing(path: str | os.PathLike[str], split: str) -> Listing:
    """List a split from a CSV file with the columns `image`, `mask` and `split`; paths are relative to the file.

    Raises:
        InputError: The file is missing, or has other columns or no such split.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            if any(column not in columns for column in _CSV_COLUMNS):
                listed = ", ".join(columns) or "none"
                raise InputError(f"{path}: the columns image, mask and split are needed, there are: {listed}")
            reader.fieldnames = columns
            rows = [{column: (row[column] or "").strip() for column in _CSV_COLUMNS} for row in reader]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such CSV file; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    pairs, problems = [], []
    for number, row in enumerate(rows, start=2):
        if row["split"] != split:
            continue
        files = [path.parent / row["image"], path.parent / row["mask"]]
        missing = [file for file in files if not file.is_file()]
        problems += [f"{file}: no such file, and line {number} of {path} names it" for file in missing]
        if not missing:
            pairs.append(Pair(*files))
    if not pairs and not problems:
        there = ", ".join(sorted({row["split"] for row in rows})) or "none"
        raise InputError(f"{path}: no row of split {split!r} (there are: {there})")
    return Listing(pairs, problems, [])


def image_names(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Image files under `folder` whose names end in `suffix`, by relative path without it and without extension.

    Raises:
        InputError: The folder is missing or holds no such image, or two files share a name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    extensions = _image_extensions()
    found: dict[str, Path] = {}
    for directory, _, files in sorted(os.walk(folder, followlinks=True)):
        for file in sorted(files):
            path = Path(directory, file)
            if file.startswith(".") or path.suffix.lower() not in extensions or not path.stem.endswith(suffix):
                continue
            name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
            if name in found:
                raise InputError(f"{path}: has the same name as {found[name].name}; keep one of them")
            found[name] = path
    if not found:
        ending = f" whose names end in {suffix!r}" if suffix else ""
        raise InputError(f"{folder}: holds no image files{ending}")
    return found


def divide(names: Iterable[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Divide names into (train, val) by the order of their hashes: exact shares, and few changes when files are added.

    Raises:
        ValueError: `val_fraction` is not inside (0, 1).
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    # Each side gets at least one where there are two.
    count = min(max(1, round(val_fraction * len(ranked))), len(ranked) - 1)
    return sorted(ranked[count:]), sorted(ranked[:count])


def _layout(root: Path, split: str, images: str | None, masks: str | None) -> tuple[str, str]:
    if (images is None) != (masks is None):
        raise InputError("images and masks must be given together: the folders of both, relative to root")
    if images is not None and masks is not None:
        if ("{split}" in images) != ("{split}" in masks):
            raise InputError(f"images and masks must both hold {{split}} or neither, got {images!r} and {masks!r}")
        return images, masks
    for candidate in LAYOUTS:
        if all((root / folder.replace("{split}", split)).is_dir() for folder in candidate):
            return candidate
    known = ", ".join(f"{a} + {b}" for a, b in LAYOUTS[:4])
    raise InputError(
        f"{root}: no folders of images and masks for split {split!r} (looked for {known}, ...); "
        "name them with images and masks, or give a CSV of pairs"
    )


def _split_names(root: Path, split: str, names: Sequence[str], val_fraction: float, seed: int) -> list[str]:
    for list_file in (root / f"{split}.txt", Path(split)):
        if list_file.is_file():
            # Lists of others often name files with their extension.
            known = set(names)
            return [name if name in known else str(Path(name).with_suffix("")) for name in read_list(list_file)]
    if split not in ("train", "val"):
        raise InputError(f"{root}: no list {split}.txt; without lists there are only the splits train and val")
    train, val = divide(names, val_fraction, seed)
    return train if split == "train" else val


def _image_extensions() -> set[str]:
    Image.init()
    return {extension.lower() for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
