"""Remote corpora: the batches of a local one, through a cache smaller than they, or an error that names the shard."""

import http.server
import io
import multiprocessing
import shutil
from functools import partial

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mamba3_train.data import TokenDataModule, corpus_files, verify
from mamba3_train.data.best_fit import write_plans
from mamba3_train.data.corpus_files import RemoteFiles
from mamba3_train.data.packing import unpack
from mamba3_train.data.shard_cache import ShardCache
from mamba3_train.data.token_shards import TokenSplit, read_manifest
from mamba3_train.errors import UserError


class FaultyFileSystem(MemoryFileSystem):
    """Objects in memory; reading one spoils, as often as `faults` says, in the way it says."""

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    faults: dict[str, list[str]] = {}  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://"))

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        name = path.rsplit("/", 1)[-1]
        self.opened.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault == "unreachable":
            raise ConnectionError("connection reset by peer")
        if fault == "forbidden":
            raise PermissionError("access denied")
        if path not in self.store:
            raise FileNotFoundError(path)
        content = self.store[path].getvalue()
        if fault == "flipped":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "truncated":
            content = content[:-10]
        return io.BytesIO(content)

    def cat_file(self, path, **options):
        return self._open(self._strip_protocol(path)).read()


@pytest.fixture
def remote(corpus, monkeypatch):
    """The corpus at an address; its file system, to spoil."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(corpus_files, "RETRY_DELAYS", (0, 0, 0))
    system = fsspec.filesystem("faulty")
    system.store.clear()
    system.faults.clear()
    system.opened.clear()
    upload(system, corpus)
    return system


ADDRESS = "faulty://bucket/corpus"


def upload(system, folder) -> None:
    """Put every file of a folder, and of folders in it, at the address."""
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{ADDRESS}/{path.relative_to(folder)}", path.read_bytes())


def bytes_of(corpus, shards: int) -> int:
    """Size of the largest shards."""
    return sum(
        sorted((sum(f.bytes for f in s.files("uint16")) for s in read_manifest(corpus).shards()), reverse=True)[:shards]
    )


def module(path, cache=None, limit=1 << 30, **settings) -> TokenDataModule:
    defaults = {"sequence_length": 32, "global_batch_size": 16, "micro_batch_size": 2, "num_workers": 0, "seed": 3}
    data = TokenDataModule(
        path=str(path), cache_dir=str(cache), cache_gib=limit / 2**30, validation_sequences=4, **(defaults | settings)
    )
    data.total_steps = 200  # several epochs
    data.prepare_data()
    data.setup()
    return data


def batches(data: TokenDataModule) -> list[bytes]:
    return [unpack(batch)["labels"].numpy().tobytes() for batch in data.train_dataloader()]


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_same_batches_through_a_cache_smaller_than_the_corpus(corpus, remote, tmp_path, packing):
    local = shutil.copytree(corpus, tmp_path / "local")
    if packing == "best_fit":
        write_plans(local, read_manifest(local), 32)
        upload(remote, local)
    settings = {"shuffle_shards": 1, "packing": packing}
    limit = int(1.2 * bytes_of(corpus, 4))  # two of training, one of validation; there are five and one
    data = module(ADDRESS, tmp_path / "cache", limit, **settings)
    sizes = []
    cache_fetch = data.files.cache._fetch

    def fetch(*arguments, **options):
        done = cache_fetch(*arguments, **options)
        sizes.append(sum(size for _, size, _ in data.files.cache._files()))
        return done

    data.files.cache._fetch = fetch
    assert batches(data) == batches(module(local, **settings))
    names = [name for name in remote.opened if name.endswith(".bin")]
    assert len(names) > len(set(names)) >= 4, "shards were fetched again after they had been removed"
    assert max(sizes) <= limit


def test_shards_come_ahead_of_their_need(remote, tmp_path):
    data = module(ADDRESS, tmp_path / "cache", shuffle_shards=1)
    training = data.training
    training[range(2)]
    order = training._orders["all"]
    now, then = order.shards_from(0)[:2]
    training.sources["all"].split.files._ahead.join(10)
    fetched = {name for name in remote.opened if name.endswith(".bin")}
    shards = training.sources["all"].split.shards
    assert fetched == {f"{shards[now].name}.bin", f"{shards[then].name}.bin"}


@pytest.mark.parametrize("faults", [["unreachable"], ["flipped", "truncated"], ["unreachable"] * 3])
def test_what_passes_is_tried_again(corpus, remote, tmp_path, faults):
    for shard in read_manifest(corpus).shards():
        remote.faults[f"{shard.name}.bin"] = list(faults)
    assert batches(module(ADDRESS, tmp_path)) == batches(module(corpus))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("unreachable", ["connection reset by peer", "run the same command again"]),
        ("flipped", ["SHA-256"]),
        ("truncated", ["bytes came"]),
        ("forbidden", ["access denied", "credentials"]),
    ],
)
def test_what_does_not_pass_names_the_shard(corpus, remote, tmp_path, fault, words):
    name = read_manifest(corpus).splits["train"][2].name
    data = module(ADDRESS, tmp_path)
    remote.faults[f"{name}.bin"] = [fault] * 1000
    with pytest.raises(UserError) as error:
        batches(data)
    assert all(word in str(error.value) for word in [f"{name}.bin of {ADDRESS}", *words])
    assert "\n" not in str(error.value)
    data.files._ahead.join(10)
    assert not list(tmp_path.rglob("*.partial"))
    remote.faults.clear()
    assert batches(data) == batches(module(corpus)), "the same command again goes on"


@pytest.mark.parametrize("damage", ["missing", "longer"])
def test_missing_and_wrong_shards_are_named_at_the_start(corpus, remote, tmp_path, damage):
    name = read_manifest(corpus).splits["train"][1].name
    if damage == "missing":
        remote.rm(f"{ADDRESS}/{name}.bin")
    else:
        remote.pipe_file(f"{ADDRESS}/{name}.bin", b"0" * 99)
    with pytest.raises(UserError, match=rf"{name}\.bin"):
        module(ADDRESS, tmp_path)


def test_a_shard_that_goes_missing_later_is_named(corpus, remote, tmp_path):
    data = module(ADDRESS, tmp_path)
    name = read_manifest(corpus).splits["train"][1].name
    remote.rm(f"{ADDRESS}/{name}.bin")
    with pytest.raises(UserError, match=rf"missing: .*{name}\.bin"):
        batches(data)


def test_one_file_system_a_process_that_remembers_no_listing(remote):
    """s3fs would read a shard that is uploaded again by its old size and tag, at every attempt."""
    system = corpus_files._file_system(ADDRESS)
    assert corpus_files._file_system(ADDRESS) is system
    assert system is not remote
    assert not system.dircache.use_listings_cache


def test_unreachable_and_unknown_addresses(remote, tmp_path):
    with pytest.raises(UserError, match=r"no prepared corpus at faulty://bucket/nothing"):
        module("faulty://bucket/nothing", tmp_path)
    remote.faults["manifest.json"] = ["unreachable"] * 100
    with pytest.raises(UserError, match=r"manifest\.json of faulty://bucket/corpus cannot be had \(connection reset"):
        module(ADDRESS, tmp_path)
    with pytest.raises(UserError, match=r"nosuch://bucket cannot be opened: Protocol not known"):
        module("nosuch://bucket", tmp_path)


def test_a_cache_too_small_for_the_order_is_refused(corpus, remote, tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_gib=.*data\.shuffle_shards=None: set data\.cache_gib"):
        module(ADDRESS, tmp_path, limit=bytes_of(corpus, 3))
    with pytest.raises(UserError, match=r"prepare plan=DIR sequence_length=32"):
        module(ADDRESS, tmp_path, packing="best_fit")


def test_verify_reads_every_remote_byte(corpus, remote):
    assert verify(ADDRESS) == read_manifest(corpus)
    name = f"{read_manifest(corpus).splits['train'][1].name}.offsets.npy"
    remote.faults[name] = ["flipped"]
    with pytest.raises(UserError, match=name):
        verify(ADDRESS)


class FaultyServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; every third answer is an error."""

    def do_GET(self):
        with self.answers:
            self.answers.value += 1
            faulty = self.answers.value % 3 == 0
        if faulty:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *arguments):
        pass


def serve(folder, answers, port) -> None:
    """Serve until the process is ended."""
    FaultyServer.answers = answers
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(FaultyServer, directory=str(folder))) as server:
        port.put(server.server_address[1])
        server.serve_forever()


def test_over_http_with_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_files, "RETRY_DELAYS", (0.01,) * 5)
    context = multiprocessing.get_context("fork")
    answers, port = context.Value("i", 0), context.SimpleQueue()
    server = context.Process(target=serve, args=(corpus, answers, port), daemon=True)
    server.start()
    data = module(f"http://127.0.0.1:{port.get()}", tmp_path, shuffle_shards=2, num_workers=2)
    assert batches(data) == batches(module(corpus, shuffle_shards=2))
    server.terminate()
    assert answers.value > 10


def test_maps_outlive_removal_from_the_cache(corpus, remote, tmp_path):
    """Shards beyond `most_open` are let go, and only then removed."""
    manifest = read_manifest(corpus)
    cache = ShardCache(tmp_path, bytes_of(corpus, 2))
    split = TokenSplit(RemoteFiles(ADDRESS, cache), manifest, "train", most_open=1)
    whole = np.concatenate([np.fromfile(corpus / f"{s.name}.bin", "<u2") for s in split.shards])
    for start in np.random.default_rng(0).integers(0, split.tokens - 50, 30):
        tokens, _, _ = split.read(np.array([start]), 50)
        assert np.array_equal(tokens[0], whole[start : start + 50])
    assert len(split._open) == 1
