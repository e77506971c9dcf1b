"""Many inputs through one network: reading ahead, batching, predicting and writing at the same time, in order."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from seg_attn.data.images import UInt8Array, read_image
from seg_attn.errors import InputError
from seg_attn.prediction.inference import Inference, Strip
from seg_attn.prediction.inputs import Source, pixels_of
from seg_attn.prediction.outputs import Outputs, Seen
from seg_attn.prediction.summary import Summary

_READERS, _WRITERS = 2, 2
# Pixels that are decoded ahead, at most: 192 MB of photographs.
_PIXELS_AHEAD = 64_000_000

Advance = Callable[[int], object]


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

    def __call__(self, sources: Sequence[Source]) -> Iterator[Outcome]:
        """Predict and write; yield what became of each source, in their order."""
        waiting: deque[_Job] = deque()
        finished: dict[int, Future[Outcome]] = {}
        upcoming = iter(enumerate(sources))
        following = 0
        with (
            pillow_without_limit(),
            ThreadPoolExecutor(_READERS, "read") as readers,
            ThreadPoolExecutor(1, "video") as frames,
            ThreadPoolExecutor(_WRITERS, "write") as writers,
        ):
            video = _VideoReader()
            ahead = max(4, 2 * self.batch_size)
            head = next(upcoming, None)
            try:
                while head is not None or waiting:
                    while head is not None and self._may_read(waiting, head[1], ahead):
                        waiting.append(self._submit(*head, readers, frames, video))
                        head = next(upcoming, None)
                    self._predict(self._batch(waiting), writers, finished)
                    pending = [future for future in finished.values() if not future.done()]
                    while following in finished and (finished[following].done() or len(pending) > ahead):
                        yield finished.pop(following).result()
                        following += 1
                        pending = [future for future in finished.values() if not future.done()]
                while following in finished:
                    yield finished.pop(following).result()
                    following += 1
            finally:
                for job in waiting:
                    job.image.cancel()
                frames.submit(video.close)

    def _may_read(self, waiting: Sequence[_Job], source: Source, ahead: int) -> bool:
        if not waiting:
            return True
        size = pixels_of(source.path) if source.frame is None else None
        pixels = size[0] * size[1] if size else 0
        return len(waiting) < ahead and pixels + sum(job.pixels for job in waiting) <= _PIXELS_AHEAD

    def _submit(
        self,
        index: int,
        source: Source,
        readers: ThreadPoolExecutor,
        frames: ThreadPoolExecutor,
        video: "_VideoReader",
    ) -> _Job:
        if source.frame is not None:
            return _Job(index, source, 0, 1, frames.submit(video.read, source))
        size = pixels_of(source.path)
        tiles = self.inference.settings.number_of_tiles(*size) if size else 1
        pixels = size[0] * size[1] if size else 0
        return _Job(index, source, pixels, tiles, readers.submit(self._read, source, pixels))

    def _read(self, source: Source, pixels: int) -> UInt8Array:
        if pixels > self.max_pixels:
            raise InputError(
                f"{source}: {pixels:,} pixels, more than --max_pixels {self.max_pixels:,}: raise it if the file is "
                "what it claims to be"
            )
        return read_image(source.path)

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

    def _predict(
        self, jobs: Sequence[_Job], writers: ThreadPoolExecutor, finished: dict[int, "Future[Outcome]"]
    ) -> None:
        first = jobs[0]
        try:
            image = first.image.result()
            height, width = image.shape[:2]
            is_tiled = self.inference.settings.is_tiled(height, width)
            self.outputs.check_size(first.source, height, width, is_tiled)
            if is_tiled:
                told = _Told(self.advance)
                strips = self.inference.strips(image, self.outputs.needs_probabilities, self.batch_size, told)
                finished[first.index] = _done(self._write(first, strips))
                self.advance(first.tiles - told.count)
                return
            images = [job.image.result() for job in jobs]
            predicted = self.inference.whole(images, self.outputs.needs_probabilities)
        except InputError as error:
            finished[first.index] = _done(Outcome(first.source.path, [], str(error)))
            self.advance(first.tiles)
            return
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            message = f"{height}x{width} pixels at once need more memory than there is: try --tile 1024"
            for job in jobs:
                finished[job.index] = _done(Outcome(job.source.path, [], f"{job.source}: {message}"))
                self.advance(job.tiles)
            return
        for job, strip in zip(jobs, predicted, strict=True):
            finished[job.index] = writers.submit(self._write, job, [strip])
            self.advance(job.tiles)

    def _write(self, job: _Job, strips: Sequence[Strip] | Iterator[Strip]) -> Outcome:
        note: Callable[[Seen], None] | None = None
        if self.summary is not None:
            summary, name = self.summary, job.source.name.as_posix()
            note = lambda seen: summary.add(name, seen)  # noqa: E731
        self.outputs.write(job.source, job.image.result(), strips, note)
        return Outcome(job.source.path, self.outputs.files(job.source))


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


def _shape(job: _Job) -> tuple[int, ...] | None:
    return None if job.image.exception() is not None else job.image.result().shape


def _done(outcome: Outcome) -> "Future[Outcome]":
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future


def _is_lack_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text
