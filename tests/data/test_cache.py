import multiprocessing

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from seg_attn.data.cache import RamCache


def sample(height, width, seed, labelled=True):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 256, (height, width), dtype=np.uint8) if labelled else None


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.booleans()), min_size=1, max_size=8),
    capacity=st.integers(0, 4000),
)
def test_first_come_first_kept(sizes, capacity):
    cache = RamCache(len(sizes), capacity)
    used, kept = 0, {}
    for index, (height, width, labelled) in enumerate(sizes):
        image, mask = sample(height, width, index, labelled)
        need = height * width * (4 if labelled else 3)
        assert cache.get(index) is None
        fits = used + need <= capacity
        assert cache.put(index, image, mask) == fits
        assert cache.put(index, image, mask) is False
        if fits:
            used += need
            kept[index] = image, mask
    assert cache.used == used
    for index in range(len(sizes)):
        found = cache.get(index)
        if index not in kept:
            assert found is None
            continue
        np.testing.assert_array_equal(found[0], kept[index][0])
        assert not found[0].flags.writeable
        if kept[index][1] is None:
            assert found[1] is None
        else:
            np.testing.assert_array_equal(found[1], kept[index][1])


def fill(cache, start):
    for index in range(start, 40, 2):
        cache.put(index, *sample(8, 9, index))
        cache.put((index + 1) % 40, *sample(8, 9, (index + 1) % 40))  # what the other process also writes


def test_two_processes_fill_it(recwarn):
    cache = RamCache(40, 40 * 4 * 72)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(cache, start)) for start in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    assert cache.used == cache.capacity
    for index in range(40):
        np.testing.assert_array_equal(cache.get(index)[0], sample(8, 9, index)[0])
        np.testing.assert_array_equal(cache.get(index)[1], sample(8, 9, index)[1])
