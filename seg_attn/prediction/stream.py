"""Many inputs through one network: reading ahead, batching, predicting and writing at the same time, in order."""

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from seg_attn.data.images import UInt8Array, read_image
from seg_attn.errors import InputError
from seg_attn.prediction.inference import Inference, Strip
from seg_attn.prediction.inputs import Source, size_of
from seg_attn.prediction.outputs import Outputs, Seen
from seg_attn.prediction.summary import Summary

_READERS, _WRITERS = 2, 2
# Bytes of photographs that are decoded ahead, and of predictions that wait to be written, at most; one may be larger.
_BYTES_AHEAD = 192_000_000
_BYTES_BEHIND = 1 << 30
# The disk or the folder is at an end: no other image could be written either.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# How PyTorch's allocators, CUDA's libraries and the processor's say that there is no more.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")

Advance = Callable[[int], object]


class OutputError(InputError):
    """No output at all can be written."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input: the files written, or the reason why there are none.

    Attributes:
        source: The file.
        written: The files that it became; those found, where it was skipped.
        error: Why there are none.
        skipped: Whether they were there before.
    """

    source: Path
    written: list[Path]
    error: str | None = None
    skipped: bool = False


@dataclass
class _Job:
    index: int
    source: Source
    pixels: int
    tiles: int
    image: "Future[UInt8Array]"


class Stream:
    """Predicts sources in order.

    Args:
        inference: What predicts.
        outputs: What is written.
        batch_size: Images of one size, or tiles of one image, per batch.
        max_pixels: A larger image is refused.
        summary: Where each image's row goes, if anywhere.
        advance: Told the number of tiles done (an image predicted whole is one), each time some are.
    """

    def __init__(
        self,
        inference: Inference,
        outputs: Outputs,
        batch_size: int,
        max_pixels: int,
        summary: Summary | None = None,
        advance: Advance | None = None,
    ) -> None:
        self.inference = inference
        self.outputs = outputs
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self.summary = summary
        self.advance: Advance = advance or (lambda _: None)

    def __call__(self, sources: Sequence[Source]) -> Generator[Outcome, None, None]:
        """Predict and write; yield what became of each source, in their order.

        Raises:
            OutputError: If nothing more can be written.
        """
        waiting: deque[_Job] = deque()
        ahead = max(4, 2 * self.batch_size)
        upcoming = ((index, source, size_of(source)) for index, source in enumerate(sources))
        with (
            pillow_without_limit(),
            ThreadPoolExecutor(_READERS, "read") as readers,
            ThreadPoolExecutor(1, "video") as frames,
            ThreadPoolExecutor(_WRITERS, "write") as writers,
        ):
            video = _VideoReader()
            backlog = _Backlog(writers, ahead)
            head = next(upcoming, None)
            try:
                while head is not None or waiting:
                    while head is not None and _may_read(waiting, head[2], ahead):
                        waiting.append(self._submit(*head, readers, frames, video))
                        head = next(upcoming, None)
                    self._predict(self._batch(waiting), backlog)
                    yield from backlog.settled()
                yield from backlog.settled(to_the_end=True)
            finally:
                for job in waiting:
                    job.image.cancel()
                frames.submit(video.close)

    def _submit(
        self,
        index: int,
        source: Source,
        size: tuple[int, int] | None,
        readers: ThreadPoolExecutor,
        frames: ThreadPoolExecutor,
        video: "_VideoReader",
    ) -> _Job:
        pixels = _pixels(size)
        tiles = self.inference.settings.number_of_tiles(*size) if size else 1
        if source.frame is None:
            return _Job(index, source, pixels, tiles, readers.submit(self._read, source, pixels, _read_photograph))
        return _Job(index, source, pixels, tiles, frames.submit(self._read, source, pixels, video.read))

    def _read(self, source: Source, pixels: int, read: Callable[[Source], UInt8Array]) -> UInt8Array:
        if pixels > self.max_pixels:
            raise InputError(
                f"{source}: {pixels:,} pixels, more than --max_pixels {self.max_pixels:,}: raise it if the file is "
                "what it claims to be"
            )
        return read(source)

    def _batch(self, waiting: "deque[_Job]") -> list[_Job]:
        """The first job, and those of the jobs that wait whose images have its size."""
        first = waiting.popleft()
        shape = _shape(first)
        batch = [first]
        if self.batch_size == 1 or shape is None or self.inference.settings.is_tiled(*shape[:2]):
            return batch
        for job in list(waiting):
            if len(batch) == self.batch_size:
                break
            if _shape(job) == shape:
                batch.append(job)
                waiting.remove(job)
        return batch

    def _predict(self, jobs: Sequence[_Job], backlog: "_Backlog") -> None:
        """Predict images of one size: together, or one after the other where that cannot be."""
        try:
            self._predict_together(jobs, backlog)
            return
        except OutputError:
            raise
        except InputError as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            reason = self._too_large(jobs[0])
        # Not in the handlers: what has been raised holds on to what the network had allocated.
        if len(jobs) > 1:
            for job in jobs:
                self._predict([job], backlog)
        else:
            backlog.add(jobs[0].index, Outcome(jobs[0].source.path, [], reason))
            self.advance(jobs[0].tiles)

    def _predict_together(self, jobs: Sequence[_Job], backlog: "_Backlog") -> None:
        images = [job.image.result() for job in jobs]
        height, width = images[0].shape[:2]
        is_tiled = self.inference.settings.is_tiled(height, width)
        self.outputs.check_size(jobs[0].source, height, width, is_tiled)
        size = self.outputs.bytes_held(height, width, is_tiled)
        backlog.make_room(len(jobs) * size)
        if is_tiled:
            told = _Told(self.advance)
            strips = self.inference.strips(images[0], self.outputs.needs_probabilities, self.batch_size, told)
            backlog.add(jobs[0].index, self._write(jobs[0], strips))
            self.advance(jobs[0].tiles - told.count)
            return
        for job, strip in zip(jobs, self.inference.whole(images, self.outputs.needs_probabilities), strict=True):
            backlog.submit(job.index, size, partial(self._write, job, [strip]))
            self.advance(job.tiles)

    def _write(self, job: _Job, strips: Sequence[Strip] | Iterator[Strip]) -> Outcome:
        note: Callable[[Seen], None] | None = None
        if self.summary is not None:
            note = partial(self.summary.add, job.source.name.as_posix())
        files = self.outputs.files(job.source)
        try:
            self.outputs.write(job.source, job.image.result(), strips, note)
        except InputError as error:
            reason = str(error)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise OutputError(
                    f"{self.outputs.folder}: {error.strerror}: make room, then go on with --skip_existing"
                ) from error
            reason = f"{job.source}: cannot be written to {files[0]} ({error.strerror}): mend the folder or the name"
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            reason = self._too_large(job)
        else:
            return Outcome(job.source.path, files)
        return Outcome(job.source.path, [], reason)

    def _too_large(self, job: _Job) -> str:
        shape = _shape(job)
        if shape is not None and self.inference.settings.is_tiled(*shape[:2]):
            return f"{job.source}: its tiles need more memory than there is: try a smaller --tile, or --batch_size 1"
        return f"{job.source}: at once it needs more memory than there is: try --tile 1024"


class _Backlog:
    """Outcomes in the inputs' order, and the predictions that wait to be written: no more bytes than a limit.

    Args:
        writers: What writes them.
        number: The most predictions that wait.
    """

    def __init__(self, writers: ThreadPoolExecutor, number: int) -> None:
        self._writers = writers
        self._number = number
        self._outcomes: dict[int, Outcome | Future[Outcome]] = {}
        self._sizes: dict[Future[Outcome], int] = {}
        self._following = 0

    def make_room(self, size: int) -> None:
        """Wait until so many bytes more may be held, or none are."""
        while self._sizes and (len(self._sizes) >= self._number or sum(self._sizes.values()) + size > _BYTES_BEHIND):
            for future in wait(self._sizes, return_when=FIRST_COMPLETED).done:
                del self._sizes[future]

    def submit(self, index: int, size: int, write: Callable[[], Outcome]) -> None:
        """Let an input's outputs be written, which hold so many bytes until then."""
        future = self._writers.submit(write)
        self._outcomes[index] = future
        self._sizes[future] = size

    def add(self, index: int, outcome: Outcome) -> None:
        """Take what became of an input."""
        self._outcomes[index] = outcome

    def settled(self, to_the_end: bool = False) -> Iterator[Outcome]:
        """Yield what became of the next inputs, as far as it is known, or wait for the rest."""
        while self._following in self._outcomes:
            outcome = self._outcomes[self._following]
            if isinstance(outcome, Future):
                if not (to_the_end or outcome.done()):
                    return
                outcome = outcome.result()
            del self._outcomes[self._following]
            self._following += 1
            yield outcome


class _Told:
    """Passes numbers on and keeps their sum."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.count = 0

    def __call__(self, number: int) -> None:
        self.count += number
        self.advance(number)


class _VideoReader:
    """Frames of videos, asked for in order; used by one thread."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._video: cv2.VideoCapture | None = None
        self._next = 0

    def read(self, source: Source) -> UInt8Array:
        assert source.frame is not None
        if self._video is None or source.path != self._path or source.frame < self._next:
            self.close()
            self._path, self._video, self._next = source.path, cv2.VideoCapture(str(source.path)), 0
        while self._next < source.frame and self._video.grab():
            self._next += 1
        read, frame = self._video.read()
        self._next += 1
        if not read:
            raise InputError(f"{source}: the frame cannot be read; convert the video again")
        return np.ascontiguousarray(frame[..., ::-1])

    def close(self) -> None:
        if self._video is not None:
            self._video.release()
            self._video = None


_limit_lock = threading.Lock()
_limit_users = 0
_limit_before: int | None = None


@contextlib.contextmanager
def pillow_without_limit() -> Iterator[None]:
    """Suspend Pillow's limit on pixels, which `max_pixels` takes the place of."""
    global _limit_users, _limit_before
    with _limit_lock:
        if _limit_users == 0:
            _limit_before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if _limit_users == 0:
                Image.MAX_IMAGE_PIXELS = _limit_before


def _read_photograph(source: Source) -> UInt8Array:
    return read_image(source.path)


def _shape(job: _Job) -> tuple[int, ...] | None:
    return None if job.image.exception() is not None else job.image.result().shape


def _pixels(size: tuple[int, int] | None) -> int:
    return size[0] * size[1] if size else 0


def _may_read(waiting: Sequence[_Job], size: tuple[int, int] | None, ahead: int) -> bool:
    bytes_ahead = 3 * (_pixels(size) + sum(job.pixels for job in waiting))
    return not waiting or (len(waiting) < ahead and bytes_ahead <= _BYTES_AHEAD)


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
