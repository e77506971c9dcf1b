"""The data set of image and mask pairs, and the samplers and batches that feed it to a loader.

Training: `TrainSampler` hands out (index, epoch), and the crop of a sample follows from (seed, epoch, index) alone, so
batches are the same whatever process makes them. Evaluation: the data set itself is cut into batches of images of one
size (`EvalBatches`), and `EvalSampler` deals whole batches to the processes, so nothing is padded and nothing counted
twice.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import albumentations as A
import cv2
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from seg_attn.data.cache import RamCache
from seg_attn.data.images import VOID, UInt8Array, image_size, normalize, read_image
from seg_attn.data.labels import LabelReader
from seg_attn.data.transforms import seed_transform
from seg_attn.data.voc import Pair
from seg_attn.errors import InputError

_GRACE_SECONDS = 30  # how long a worker outlives a SIGTERM: enough for the batch in flight

Sample = dict[str, Any]
"""`image` float32 (3, H, W), `mask` int64 (H, W) where there are labels, `index` int; batched with a leading axis."""


class SampleKey(NamedTuple):
    """What a training sampler asks the data set for.

    Attributes:
        sample: Position of the pair.
        epoch: Epoch whose random crop is wanted.
    """

    sample: int
    epoch: int


class BatchKey(NamedTuple):
    """What an evaluation sampler asks `EvalBatches` for.

    Attributes:
        batch: Position of the batch.
        blank: Whether this is a filler, to be returned with every label ignored and indices of -1.
    """

    batch: int
    blank: bool


class SegmentationDataset(Dataset[Sample]):
    """Pairs of image and mask, augmented when a transform is given, normalised always.

    Args:
        pairs: Images and masks, not empty.
        read_labels: Reads a mask file as class indices and 255.
        mean: Channel means of images scaled to [0, 1].
        std: Channel deviations.
        transform: albumentations pipeline for training; None leaves images whole.
        seed: Start of the augmentation's random numbers, not negative.
        cache: Keeps decoded pairs in memory; None decodes every time.

    Raises:
        InputError: `pairs` is empty.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        read_labels: LabelReader,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        transform: A.Compose | None = None,
        seed: int = 0,
        cache: RamCache | None = None,
    ) -> None:
        if not pairs:
            raise InputError("the data set is empty: no pair of image and mask was found")
        self.pairs = list(pairs)
        self.read_labels = read_labels
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.transform = transform
        self.seed = seed
        self.cache = cache

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[UInt8Array, UInt8Array | None]:
        """Pair `index` before augmentation: image uint8 (H, W, 3), mask uint8 (H, W) of class indices and 255.

        Raises:
            InputError: A file is missing, broken or mislabelled, or the two differ in size.
        """
        if self.cache is None:
            return read_pair(self.pairs[index], self.read_labels)
        kept = self.cache.get(index)
        if kept is None:
            kept = read_pair(self.pairs[index], self.read_labels)
            self.cache.put(index, *kept)
        return kept

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """Sample `key`; a plain index means epoch 0.

        Returns:
            `image` float32 (3, H, W), normalised; `mask` int64 (H, W), 255 ignored, absent where there are no labels;
            `index` int.
        """
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        image, mask = self.load(index)
        if self.transform is not None:
            seed_transform(self.transform, self.seed, epoch, index)
            augmented = self.transform(image=image, mask=mask)
            image, mask = augmented["image"], augmented["mask"]
        sample: Sample = {"image": normalize(image, self.mean, self.std), "index": index}
        if mask is not None:
            sample["mask"] = torch.from_numpy(mask).long()
        return sample


def read_pair(pair: Pair, read_labels: Callable[[Path], UInt8Array]) -> tuple[UInt8Array, UInt8Array | None]:
    """Read an image uint8 (H, W, 3) and its mask uint8 (H, W) of class indices and 255, None where it has none.

    Raises:
        InputError: A file is missing, broken or mislabelled, or the two differ in size.
    """
    image = read_image(pair.image)
    if pair.mask is None:
        return image, None
    mask = read_labels(pair.mask)
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"{pair.mask}: the mask is {mask.shape[1]}x{mask.shape[0]}, its image {pair.image} is "
            f"{image.shape[1]}x{image.shape[0]} (width x height); export one of them at the other's size"
        )
    return image, mask


class EvalBatches(Dataset[Sample]):
    """A data set cut into batches of whole images of one size, in the order of the data set.

    Args:
        dataset: Its transform must be None.
        batch_size: Most images in a batch; images of a size that is rare make smaller batches.

    Raises:
        InputError: With `batch_size` above 1, an image whose header cannot be read.
    """

    def __init__(self, dataset: SegmentationDataset, batch_size: int = 1) -> None:
        self.dataset = dataset
        if batch_size == 1:
            self.batches = [[index] for index in range(len(dataset))]
            return
        self.batches = []
        open_batches: dict[tuple[int, int], list[int]] = {}
        for index, pair in enumerate(dataset.pairs):
            batch = open_batches.setdefault(image_size(pair.image), [])
            if not batch:
                self.batches.append(batch)
            batch.append(index)
            if len(batch) == batch_size:
                del open_batches[image_size(pair.image)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: int | BatchKey) -> Sample:
        """Batch `key`: `image` (B, 3, H, W), `mask` (B, H, W), `index` (B,)."""
        index, blank = key if isinstance(key, tuple) else (key, False)
        batch = collate([self.dataset[sample] for sample in self.batches[index]])
        if blank:
            batch["index"] = torch.full_like(batch["index"], -1)
            if "mask" in batch:
                batch["mask"] = torch.full_like(batch["mask"], VOID)
        return batch


class TrainSampler(DistributedSampler[SampleKey]):
    """A new order every epoch, as keys that carry the epoch into the workers, persistent ones included.

    A `DistributedSampler`, so that Lightning keeps it and tells it the epoch. Iterated without being told, it counts by
    itself. Where processes do not divide the set, the first samples of the order are seen twice, as PyTorch does.

    Attributes:
        start: Samples of the next epoch to leave out, because they were seen before the run was stopped.
    """

    start: int = 0

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        indices = list(super().__iter__())[self.start :]
        self.start = 0
        self.epoch = epoch + 1  # `set_epoch` overrides this
        return iter([SampleKey(int(index), epoch) for index in indices])  # type: ignore[call-overload]


class EvalLoader(DataLoader[Sample]):
    """A loader whose workers can be ended, and end when one of them fails.

    PyTorch leaves persistent workers to the garbage collector, where loader, trainer and exception hang together in
    cycles; collected so, the workers' queues go first and each worker is waited for in vain for five seconds.
    """

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """End the workers; the next iteration starts new ones."""
        iterator, self._iterator = self._iterator, None
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


class TrainLoader(EvalLoader):
    """A loader on a `TrainSampler` that a checkpoint stops and resumes in the middle of an epoch.

    Lightning keeps `state_dict` in its checkpoints and gives it back before a resumed run asks for its first batch.
    """

    _served = 0
    _skipped = 0

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        self._served, self._skipped = self._skipped, 0
        if isinstance(self.sampler, TrainSampler):
            self.sampler.start = self._served * (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been handed out."""
        return {"batches": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin after so many batches; after all of them, at its start."""
        self._skipped = state["batches"] % max(len(self), 1)


class EvalSampler(DistributedSampler[BatchKey]):
    """Deals the batches out in turn; a process that would get one fewer gets a blank one, so all take equal steps.

    A `DistributedSampler`, so that Lightning does not put its own in its place, which repeats samples and counts them
    twice.

    Args:
        dataset: The batches.
        num_replicas: Number of processes.
        rank: This process.
    """

    def __init__(self, dataset: EvalBatches, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[BatchKey]:
        total = len(self.dataset)  # type: ignore[arg-type]
        for position in range(self.rank, self.total_size, self.num_replicas):
            yield BatchKey(position % total, blank=position >= total)


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of one size: `image` (B, 3, H, W) channels-last in memory, `mask` (B, H, W), `index` (B,)."""
    channels_last = [sample | {"image": sample["image"].permute(1, 2, 0)} for sample in samples]
    batch: Sample = default_collate(channels_last)
    batch["image"] = batch["image"].permute(0, 3, 1, 2)
    return batch


def init_worker(worker_id: int) -> None:
    """Keep a loader's worker to one core, and let it outlive a signal that stops the run.

    The workers are the parallelism (PyTorch limits its own threads itself). Ctrl-C reaches every process of a terminal
    and a scheduler's SIGTERM every process of a job, but the main process still needs the batch it is waiting for: a
    worker leaves Ctrl-C to it, and after a SIGTERM goes on for a while.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


def end_workers() -> None:
    """End the loaders' workers at once: left alone they would sit out a SIGTERM's grace.

    For a run that was stopped, and for the end of the program, where `multiprocessing` sends a SIGTERM to what is left.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes a worker's end for a failure
    for worker in workers:
        worker.kill()
