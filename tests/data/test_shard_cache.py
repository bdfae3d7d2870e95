"""The cache of fetched shards: whole or absent, within its limit, shared by processes however they end."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from mamba3_train.data import shard_cache
from mamba3_train.data.shard_cache import PARTIAL, ShardCache
from mamba3_train.errors import UserError

SIZE = 1000


def content(name: str) -> bytes:
    return name.encode().ljust(SIZE, b".")


def fetcher(name: str, log=None):
    def fetch(file):
        if log is not None:
            log.append(name)
        file.write(content(name))

    return fetch


def read(cache: ShardCache, name: str, log=None) -> bytes:
    with cache.open(name, SIZE, fetcher(name, log)) as file:
        return file.read()


def stored(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.name != ".lock"}


def test_the_longest_unused_goes_first(tmp_path):
    cache, log = ShardCache(tmp_path, 3 * SIZE), []
    for name in ("a", "b", "c", "a", "d", "a", "b"):
        assert read(cache, name, log) == content(name)
        time.sleep(0.01)  # times of use are those of the file system
    assert log == ["a", "b", "c", "d", "b"]
    assert stored(cache) == {"a", "b", "d"}


def test_what_is_mapped_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "PATIENCE_SECONDS", 0.2)
    cache = ShardCache(tmp_path, 2 * SIZE)
    with cache.open("a", SIZE, fetcher("a")) as file:
        mapped = np.memmap(file, mode="r")
    for name in ("b", "c", "d"):
        read(cache, name)
        assert "a" in stored(cache)
    with cache.open("d", SIZE, fetcher("d")), pytest.raises(UserError, match=r"data\.cache_gib.*data\.shuffle_shards"):
        read(cache, "e")
    assert stored(cache) == {"a", "d"}
    assert mapped.tobytes() == content("a")
    del mapped
    read(cache, "e")
    assert stored(cache) == {"d", "e"}


def test_ahead_takes_only_free_room_and_what_is_not_held(tmp_path):
    cache = ShardCache(tmp_path, SIZE)
    with cache.open("a", SIZE, fetcher("a")):
        assert not cache.fetch_ahead("b", SIZE, fetcher("b"))
    assert cache.fetch_ahead("b", SIZE, fetcher("b"))
    assert not cache.fetch_ahead("b", SIZE, fetcher("b"))
    assert stored(cache) == {"b"}


def test_a_failed_fetch_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path, 10 * SIZE)

    def fail(file):
        file.write(b"half")
        raise UserError("the network is gone")

    with pytest.raises(UserError, match="network is gone"):
        cache.open("a", SIZE, fail)
    assert stored(cache) == set()
    assert read(cache, "a") == content("a")


def test_a_full_disk_is_told_from_a_full_cache(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"disk of the shard cache .* is full before data\.cache_gib"):
        ShardCache(tmp_path, 10 * SIZE).open("a", SIZE, full)


def test_killed_while_fetching(tmp_path):
    cache = ShardCache(tmp_path, 2 * SIZE)

    def die():
        def fetch(file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        cache.open("a", SIZE, fetch)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(30)
    assert stored(cache) == {"a" + PARTIAL}
    for name in ("a", "b", "c"):
        assert read(cache, name) == content(name)
    assert len(stored(cache)) == 2


def test_what_a_killed_process_left_makes_room(tmp_path):
    cache = ShardCache(tmp_path, SIZE)
    (tmp_path / ("gone" + PARTIAL)).write_bytes(b"half")
    assert read(cache, "a") == content("a")
    assert stored(cache) == {"a"}


def test_who_waits_for_a_fetch_is_not_held_up_by_readers(tmp_path):
    cache, begun = ShardCache(tmp_path, 2 * SIZE), threading.Event()

    def slow(file):
        begun.set()
        time.sleep(0.2)
        file.write(content("a"))

    def fetch_and_hold():
        file = cache.open("a", SIZE, slow)
        held.append(np.memmap(file, mode="r"))

    held = []
    thread = threading.Thread(target=fetch_and_hold)
    thread.start()
    begun.wait()
    assert read(cache, "a") == content("a")
    thread.join()
    assert len(held) == 1


def reader(folder, seed: int, fetching, failures) -> None:
    """Read files in an order of its own, holding the newest; report what is wrong."""
    cache, chance, held = ShardCache(folder, 5 * SIZE), random.Random(seed), []

    def fetch_of(name):
        def fetch(file):
            if fetching[int(name)]:
                failures.put(f"{name} is fetched by two")
            fetching[int(name)] = 1
            time.sleep(0.002)
            file.write(content(name))
            fetching[int(name)] = 0

        return fetch

    for _ in range(60):
        name = str(chance.randrange(12))
        with cache.open(name, SIZE, fetch_of(name)) as file:
            held = [np.memmap(file, mode="r")]
        if held[0].tobytes() != content(name):
            failures.put(f"{name} holds something else")
        with cache._alone():  # nothing comes or goes
            total = sum(size for _, size, _ in cache._files())
        if total > 5 * SIZE:
            failures.put(f"{total} bytes in the cache")


def test_processes_share_it(tmp_path):
    context = multiprocessing.get_context("fork")
    fetching, failures = context.Array("b", 12, lock=False), context.SimpleQueue()
    processes = [context.Process(target=reader, args=(tmp_path, seed, fetching, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert not list(tmp_path.glob("*" + PARTIAL))
