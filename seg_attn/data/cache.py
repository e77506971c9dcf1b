"""Decoded images and masks kept in memory that all loader processes share, up to a number of bytes."""

import ctypes
import multiprocessing
from multiprocessing.sharedctypes import RawArray

import numpy as np
from numpy.typing import NDArray

from seg_attn.data.images import UInt8Array

_FREE, _CLAIMED = -1, -2


class RamCache:
    """First come, first kept: samples go in until the memory is full, and stay.

    The memory is a shared mapping (in /dev/shm where that is large enough, in a temporary file where it is not), so
    what one worker decodes the others read. It holds what was read before augmentation, so it changes no batch.

    Args:
        samples: Number of samples that may be asked for.
        capacity: Bytes to keep at most.
    """

    def __init__(self, samples: int, capacity: int) -> None:
        self.capacity = capacity
        # Allocated unlocked: each sample is written once, by the process that claimed it under the lock.
        self._bytes = RawArray(ctypes.c_uint8, max(1, capacity))
        self._table = RawArray(ctypes.c_int64, 4 * samples + 1)
        self._lock = multiprocessing.Lock()
        index = self._index()
        index[:-1].reshape(samples, 4)[:, 0] = _FREE

    def get(self, sample: int) -> tuple[UInt8Array, UInt8Array | None] | None:
        """The kept image (H, W, 3) and mask (H, W), read-only views; None where the sample is not kept."""
        offset, height, width, labelled = self._index()[4 * sample : 4 * sample + 4].tolist()
        if offset < 0:
            return None
        pixels = height * width
        stored = self._memory()
        stored.flags.writeable = False
        image = stored[offset : offset + 3 * pixels].reshape(height, width, 3)
        mask = stored[offset + 3 * pixels : offset + 4 * pixels].reshape(height, width) if labelled else None
        return image, mask

    def put(self, sample: int, image: UInt8Array, mask: UInt8Array | None) -> bool:
        """Keep a sample where there is room; says whether it is kept by this call."""
        index = self._index()
        row = index[4 * sample : 4 * sample + 4]
        need = image.size + (0 if mask is None else mask.size)
        with self._lock:
            used = int(index[-1])
            if row[0] != _FREE or used + need > self.capacity:
                return False
            row[0] = _CLAIMED
            index[-1] = used + need
        memory = self._memory()
        memory[used : used + image.size] = image.ravel()
        if mask is not None:
            memory[used + image.size : used + need] = mask.ravel()
        row[1:] = (*image.shape[:2], mask is not None)
        row[0] = used  # last: from here on readers see it
        return True

    @property
    def used(self) -> int:
        """Bytes taken."""
        return int(self._index()[-1])

    def _index(self) -> NDArray[np.int64]:
        # Made on each call: a view is not shared when the object is sent to a worker, the memory is.
        return np.frombuffer(memoryview(self._table).cast("B"), dtype=np.int64)

    def _memory(self) -> UInt8Array:
        return np.frombuffer(memoryview(self._bytes).cast("B"), dtype=np.uint8)
