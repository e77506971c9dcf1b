"""Lightning data modules: Pascal VOC development kits, the sample devkit and folders of images and masks."""

import atexit
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from seg_attn.data import sample as sample_devkit
from seg_attn.data.cache import RamCache
from seg_attn.data.check import check_sample
from seg_attn.data.class_weights import ClassCounts, cached_counts, class_weights
from seg_attn.data.dataset import (
    EvalBatches,
    EvalLoader,
    EvalSampler,
    Sample,
    SegmentationDataset,
    TrainLoader,
    TrainSampler,
    collate,
    end_workers,
    init_worker,
)
from seg_attn.data.images import VOID, image_size, voc_palette
from seg_attn.data.labels import LabelReader
from seg_attn.data.mask_folder import csv_listing, folder_listing
from seg_attn.data.transforms import train_transform
from seg_attn.data.voc import CLASS_NAMES_FILE, Listing, Pair, read_list, voc_class_names, voc_listing
from seg_attn.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SegmentationDataModule(LightningDataModule):
    """What all data modules share: loaders, augmentation, and the description of the classes.

    A subclass calls `__init__` with its classes and answers `listing(split)`.

    Args:
        class_names: One name per class, in the order of the indices.
        palette: RGB per class; None takes VOC's colours.
        label_reader: Reads a mask file as class indices; None expects indices and 255.
        train_split: What `train_dataloader` shows.
        val_split: What `val_dataloader` shows.
        test_split: What `test_dataloader` shows; None means `val_split`.
        batch_size: Images per training batch and process.
        eval_batch_size: Most images per evaluation batch; only images of equal size share one, and none is padded.
        num_workers: Loader processes, at most one per core; 0 loads in the main process.
        crop_size: Side of the training crop, or [height, width].
        mean: Channel means of images scaled to [0, 1].
        std: Channel deviations.
        scale: Range of the random scale factor, uniform.
        flip: Probability of a horizontal flip.
        color_jitter: Greatest changes of [brightness, contrast, saturation, hue]; all 0 leaves colours alone.
        crop_class_max: Crops that one class fills to a greater share are drawn again; 1 takes every crop.
        seed: Seed of order and augmentation; None takes that of `seed_everything`, 0 without one.
        cache: "ram" keeps decoded images and masks in memory shared by the workers, "none" decodes them every time.
        cache_bytes: Most bytes that the cache takes, over all splits.

    Attributes:
        class_names: One name per class.
        num_classes: Number of classes.
        palette: RGB per class.
        mean: Channel means.
        std: Channel deviations.
        ignore_index: The label of pixels without a class, always 255, whatever value the files hold for it.
        recipe: The arguments that shape what is trained on, as plain values.

    Raises:
        ValueError: An argument is out of its range.
    """

    ignore_index: int = VOID

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        palette: Sequence[Sequence[int]] | None = None,
        label_reader: LabelReader | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        crop_size: int | Sequence[int] = 513,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
        crop_class_max: float = 1.0,
        seed: int | None = None,
        cache: Literal["none", "ram"] = "none",
        cache_bytes: int = 2_000_000_000,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed or 0, 0),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must hold three numbers each, std positive, got {mean} and {std}")
        size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"crop_size must be a positive number or [height, width], got {crop_size}")
        if cache not in ("none", "ram"):
            raise ValueError(f'cache must be "none" or "ram", got {cache!r}')
        if len(scale) != 2:
            raise ValueError(f"scale must be [smallest, largest], got {scale}")
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.palette: list[list[int]] = (
            voc_palette(self.num_classes).tolist() if palette is None else [list(color) for color in palette]
        )
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split or val_split
        self.seed = seed
        self.cache = cache
        self.cache_bytes = cache_bytes
        self.label_reader = label_reader or LabelReader(self.num_classes)
        self.recipe: dict[str, Any] = {
            "train_split": train_split,
            "batch_size": batch_size,
            "crop_size": list(size),
            "scale": list(scale),
            "flip": flip,
            "color_jitter": list(color_jitter),
            "crop_class_max": crop_class_max,
        }
        self.train_transform = train_transform(
            (size[0], size[1]),
            mean=self.mean,
            scale=(scale[0], scale[1]),
            flip=flip,
            color_jitter=color_jitter,
            class_max=crop_class_max,
        )
        self._datasets: dict[tuple[str, bool], SegmentationDataset] = {}
        self._loaders: WeakSet[EvalLoader] = WeakSet()

    def listing(self, split: str) -> Listing:
        """List the pairs of image and mask of a split, and what is missing."""
        raise NotImplementedError

    def pairs(self, split: str) -> list[Pair]:
        """List the pairs of image and mask of a split.

        Raises:
            InputError: The split cannot be found, is empty, or misses files.
        """
        return self.listing(split).checked()

    def dataset(self, split: str, *, augment: bool = False) -> SegmentationDataset:
        """The data set of a split: random crops where `augment`, whole images otherwise.

        Raises:
            InputError: The split cannot be found or is empty.
        """
        key = (split, augment)
        if key not in self._datasets:
            pairs = self.pairs(split)
            self._datasets[key] = SegmentationDataset(
                pairs,
                self.label_reader,
                mean=self.mean,
                std=self.std,
                transform=self.train_transform if augment else None,
                seed=self._run_seed(),
                cache=self._new_cache(pairs),
            )
        return self._datasets[key]

    def class_counts(self, split: str | None = None) -> ClassCounts:
        """Pixels and images per class in a split (None: `train_split`), counted once and kept for later runs.

        Raises:
            InputError: The split has no masks, or one of them is broken or mislabelled.
        """
        split = split or self.train_split
        self._labelled(split)
        paths = [pair.mask for pair in self.dataset(split).pairs if pair.mask is not None]
        return cached_counts(paths, self.label_reader, self.num_classes, settings=self.label_reader.settings)

    def class_weights(self, scheme: str = "inverse_frequency", beta: float = 0.999) -> list[float]:
        """Loss weights from the training split's frequencies; see `seg_attn.data.class_weights`.

        Raises:
            ValueError: An unknown scheme, or `beta` out of range.
        """
        return class_weights(self.class_counts(), scheme, beta)

    def setup(self, stage: str | None = None) -> None:
        """List the files of what `stage` needs (`fit`, `validate`, `test`, `predict`; None: all but `predict`).

        Raises:
            InputError: A split is missing or empty, or has no labels where labels are needed; for `fit`, also where
                one of a few pairs that are read to the end is broken.
        """
        if stage in ("fit", None):
            train, val = self._labelled(self.train_split, augment=True), self._labelled(self.val_split)
            if stage == "fit":  # better now than in the middle of an epoch
                check_sample(train.pairs, self.label_reader)
                check_sample(val.pairs, self.label_reader)
        if stage == "validate":
            self._labelled(self.val_split)
        if stage in ("test", None):
            self._labelled(self.test_split)
        if stage == "predict":
            self.dataset(self.test_split)

    def teardown(self, stage: str | None = None) -> None:
        """End the workers of all loaders handed out."""
        for loader in self._loaders:
            loader.close()

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled random crops; a last partial batch is dropped unless it is the only one."""
        dataset = self._labelled(self.train_split, augment=True)
        world, rank = self._processes()
        sampler = TrainSampler(dataset, num_replicas=world, rank=rank, shuffle=True, seed=self._run_seed())
        loader = TrainLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) > self.batch_size,
            collate_fn=collate,
            **self._loading(),
        )
        self._loaders.add(loader)
        return loader

    def val_dataloader(self) -> DataLoader[Sample]:
        """Whole images of `val_split`."""
        return self._eval_loader(self._labelled(self.val_split))

    def test_dataloader(self) -> DataLoader[Sample]:
        """Whole images of `test_split`."""
        return self._eval_loader(self._labelled(self.test_split))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Whole images of `test_split`, which may have no masks."""
        return self._eval_loader(self.dataset(self.test_split))

    def _labelled(self, split: str, *, augment: bool = False) -> SegmentationDataset:
        dataset = self.dataset(split, augment=augment)
        if dataset.pairs[0].mask is None:
            raise InputError(f"split {split!r} has no masks, so it serves to predict only; name a labelled split")
        return dataset

    def _eval_loader(self, dataset: SegmentationDataset) -> DataLoader[Sample]:
        batches = EvalBatches(dataset, self.eval_batch_size)
        world, rank = self._processes()
        loader = EvalLoader(
            batches, batch_size=None, sampler=EvalSampler(batches, num_replicas=world, rank=rank), **self._loading()
        )
        self._loaders.add(loader)
        return loader

    def _new_cache(self, pairs: list[Pair]) -> RamCache | None:
        if self.cache == "none" or not pairs:
            return None
        left = self.cache_bytes - sum(d.cache.capacity for d in self._datasets.values() if d.cache is not None)
        # What the set would need: three bytes of image and one of mask per pixel.
        need = sum(4 * height * width for height, width in (image_size(pair.image) for pair in pairs))
        return RamCache(len(pairs), min(left, need))

    def _loading(self) -> dict[str, Any]:
        workers = min(self.num_workers, _cores())
        if workers:
            # Persistent workers that nobody ended: registered anew, so that it runs before multiprocessing's own.
            atexit.unregister(end_workers)
            atexit.register(end_workers)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": init_worker,
            # Its own: without one each epoch draws a number from the stream that dropout draws from, and a resumed run
            # would not be the run that was stopped.
            "generator": torch.Generator(),
        }

    def _processes(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _run_seed(self) -> int:
        # Not torch.initial_seed(): the processes of one run must agree.
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed


class VOCDataModule(SegmentationDataModule):
    """Pascal VOC segmentation: palette masks by index, borders (255) ignored.

    Args:
        root: The folder that contains `VOCdevkit/VOC<year>`.
        year: 2007 to 2012.
        train_split: A list in `ImageSets/Segmentation` (`train`, `trainaug`, `trainval`) or the path of a list file.
        val_split: Likewise, for validation.
        test_split: Likewise, for `test`; null means `val_split`.
        batch_size: Images per training batch and process.
        eval_batch_size: Most images per evaluation batch; only images of equal size share one, and none is padded.
        num_workers: Loader processes, at most one per core; 0 loads in the main process.
        crop_size: Side of the training crop, or [height, width].
        mean: Channel means of images scaled to [0, 1].
        std: Channel deviations.
        scale: Range of the random scale factor, uniform.
        flip: Probability of a horizontal flip.
        color_jitter: Greatest changes of [brightness, contrast, saturation, hue]; all 0 leaves colours alone.
        crop_class_max: Crops that one class fills to a greater share are drawn again; 1 takes every crop.
        seed: Seed of order and augmentation; null takes that of `seed_everything`, 0 without one.
        cache: "ram" keeps decoded images and masks in memory shared by the workers, "none" decodes them every time.
        cache_bytes: Most bytes that the cache takes, over all splits.
        class_names: For a devkit of other classes than VOC's; null reads its `class_names.txt`, or takes VOC's 21.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        year: int = 2012,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        crop_size: int | list[int] = 513,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
        crop_class_max: float = 1.0,
        seed: int | None = None,
        cache: Literal["none", "ram"] = "none",
        cache_bytes: int = 2_000_000_000,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(
            voc_class_names(root, year) if class_names is None else class_names,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            mean=mean,
            std=std,
            scale=scale,
            flip=flip,
            color_jitter=color_jitter,
            crop_class_max=crop_class_max,
            seed=seed,
            cache=cache,
            cache_bytes=cache_bytes,
        )
        self.root = root
        self.year = year

    def listing(self, split: str) -> Listing:
        """List the pairs of a split; see `voc_listing`."""
        return voc_listing(self.root, self.year, split)


class SampleDataModule(VOCDataModule):
    """The sample devkit, written to `root` when it is not there yet, then read as VOC is.

    Args:
        root: The folder that holds, or will hold, `VOCdevkit/VOC2012`.
        batch_size: Images per training batch and process.
        eval_batch_size: Most images per evaluation batch; only images of equal size share one, and none is padded.
        num_workers: Loader processes, at most one per core; 0 loads in the main process.
        crop_size: Side of the training crop, or [height, width].
        mean: Channel means of images scaled to [0, 1].
        std: Channel deviations.
        scale: Range of the random scale factor, uniform.
        flip: Probability of a horizontal flip.
        color_jitter: Greatest changes of [brightness, contrast, saturation, hue]; all 0 leaves colours alone.
        crop_class_max: Crops that one class fills to a greater share are drawn again; 1 takes every crop.
        seed: Seed of order and augmentation; null takes that of `seed_everything`, 0 without one.
        cache: "ram" keeps decoded images and masks in memory shared by the workers, "none" decodes them every time.
        cache_bytes: Most bytes that the cache takes, over all splits.
        sample_seed: Seed of the pictures, where they are yet to be drawn.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: int | list[int] = 128,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
        crop_class_max: float = 1.0,
        seed: int | None = None,
        cache: Literal["none", "ram"] = "none",
        cache_bytes: int = 2_000_000_000,
        sample_seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            mean=mean,
            std=std,
            scale=scale,
            flip=flip,
            color_jitter=color_jitter,
            crop_class_max=crop_class_max,
            seed=seed,
            cache=cache,
            cache_bytes=cache_bytes,
            class_names=list(sample_devkit.SAMPLE_CLASSES),
        )
        self.sample_seed = sample_seed

    def prepare_data(self) -> None:
        """Write the sample where it is missing.

        Raises:
            InputError: `root` holds something else.
        """
        sample_devkit.write_sample(self.root, seed=self.sample_seed)


class MaskFolderDataModule(SegmentationDataModule):
    """Any folder of images and masks: parallel folders matched by name, `train` + `trainannot`, or a CSV of pairs.

    Args:
        root: Folder that `images`, `masks` and lists are relative to.
        class_names: One name per class, in the order of the indices; null reads `<root>/class_names.txt`.
        images: Folder of the images, may hold `{split}`; null finds `train` + `trainannot`, `images` + `masks`, ...
        masks: Folder of the masks, likewise.
        image_suffix: What image names end in, before the extension, that mask names do not.
        mask_suffix: What mask names end in, before the extension, that image names do not.
        csv: A CSV file with the columns image, mask and split, in place of folders.
        ignore_index: Value or values in the mask files that mean "no class", besides 255.
        label_map: Value in the mask files to class index, or to 255; others stand for themselves.
        colors: RGB per class: needed to read masks that hold colours, and used to draw predictions.
        ignore_colors: RGB of pixels without a class, in masks that hold colours.
        train_split: Name of the training split, or path of a list file.
        val_split: Likewise, for validation.
        test_split: Likewise, for `test`; null means `val_split`.
        val_fraction: Share of `val` where neither folders nor lists tell the splits.
        split_seed: Seed of that division.
        batch_size: Images per training batch and process.
        eval_batch_size: Most images per evaluation batch; only images of equal size share one, and none is padded.
        num_workers: Loader processes, at most one per core; 0 loads in the main process.
        crop_size: Side of the training crop, or [height, width].
        mean: Channel means of images scaled to [0, 1].
        std: Channel deviations.
        scale: Range of the random scale factor, uniform.
        flip: Probability of a horizontal flip.
        color_jitter: Greatest changes of [brightness, contrast, saturation, hue]; all 0 leaves colours alone.
        crop_class_max: Crops that one class fills to a greater share are drawn again; 1 takes every crop.
        seed: Seed of order and augmentation; null takes that of `seed_everything`, 0 without one.
        cache: "ram" keeps decoded images and masks in memory shared by the workers, "none" decodes them every time.
        cache_bytes: Most bytes that the cache takes, over all splits.

    Raises:
        ValueError: An argument is out of its range.
        InputError: There are no class names.
    """

    def __init__(
        self,
        root: str,
        class_names: list[str] | None = None,
        images: str | None = None,
        masks: str | None = None,
        image_suffix: str = "",
        mask_suffix: str = "",
        csv: str | None = None,
        ignore_index: int | list[int] = VOID,
        label_map: dict[int, int] | None = None,
        colors: list[list[int]] | None = None,
        ignore_colors: list[list[int]] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        crop_size: int | list[int] = 513,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        scale: Sequence[float] = (0.5, 2.0),
        flip: float = 0.5,
        color_jitter: Sequence[float] = (0.2, 0.2, 0.2, 0.05),
        crop_class_max: float = 1.0,
        seed: int | None = None,
        cache: Literal["none", "ram"] = "none",
        cache_bytes: int = 2_000_000_000,
    ) -> None:
        names = read_list(Path(root) / CLASS_NAMES_FILE) if class_names is None else class_names
        reader = LabelReader(
            len(names),
            ignore=[ignore_index] if isinstance(ignore_index, int) else ignore_index,
            label_map=label_map,
            colors=colors,
            ignore_colors=ignore_colors or (),
        )
        super().__init__(
            names,
            palette=colors,
            label_reader=reader,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            mean=mean,
            std=std,
            scale=scale,
            flip=flip,
            color_jitter=color_jitter,
            crop_class_max=crop_class_max,
            seed=seed,
            cache=cache,
            cache_bytes=cache_bytes,
        )
        self.root = root
        self.images = images
        self.masks = masks
        self.image_suffix = image_suffix
        self.mask_suffix = mask_suffix
        self.csv = csv
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def listing(self, split: str) -> Listing:
        """List the pairs of a split; see `folder_listing` and `csv_listing`."""
        if self.csv is not None:
            return csv_listing(Path(self.root) / self.csv, split)
        return folder_listing(
            self.root,
            split,
            images=self.images,
            masks=self.masks,
            image_suffix=self.image_suffix,
            mask_suffix=self.mask_suffix,
            val_fraction=self.val_fraction,
            split_seed=self.split_seed,
        )


def _cores() -> int:
    """Cores that this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
