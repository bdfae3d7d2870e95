"""Sources: reading on from any position gives exactly the rest."""

import gzip
import http.server
import json
import threading
from functools import partial

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mamba3_train.data import text_sources
from mamba3_train.data.text_sources import TextSource
from mamba3_train.errors import UserError

TEXTS = [f"text {number} " * (number % 5 + 1) for number in range(50)]


def write(kind, folder):
    lines = [json.dumps({"number": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)]
    if kind == "texts":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02d}.txt").write_text(text)
    elif kind == "parquet":
        for part in range(2):
            table = pyarrow.table({"text": TEXTS[part * 25 : part * 25 + 25]})
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=4)
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(lines[:30]))
        (folder / "b.jsonl").write_text("".join(lines[30:]))
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))


@pytest.mark.parametrize("kind", ["texts", "parquet", "jsonl", "jsonl.gz"])
def test_reading_on_gives_the_rest(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text_sources, "ROWS_A_BATCH", 7)
    write(kind, tmp_path)
    source = TextSource(str(tmp_path), min_characters=8, max_bytes=900)
    batches = list(source.read())
    texts = [text for batch, _ in batches for text in batch]
    assert texts == [text for text in TEXTS if len(text) >= 8][: len(texts)]
    assert 900 <= sum(map(len, texts)) < 950
    for number in range(0, len(batches), 3):
        position = json.loads(json.dumps(batches[number][1]))
        rest = [text for batch, _ in source.read(position) for text in batch]
        assert rest == [text for batch, _ in batches[number + 1 :] for text in batch]


def test_reading_on_in_the_standard_library():
    source = TextSource("python_stdlib", max_bytes=400_000)
    batches = list(source.read())
    assert len(batches) > 1
    rest = [text for batch, _ in source.read(batches[0][1]) for text in batch]
    assert rest == [text for batch, _ in batches[1:] for text in batch]


@pytest.mark.parametrize(("kind", "known"), [("texts", True), ("jsonl", True), ("parquet", False), ("jsonl.gz", False)])
def test_size_is_known_where_it_can_be(tmp_path, kind, known):
    write(kind, tmp_path)
    assert (TextSource(str(tmp_path)).size() is not None) == known
    assert TextSource(str(tmp_path), max_bytes=5).size() == 5


def test_address_and_glob(tmp_path):
    write("jsonl", tmp_path)
    assert list(TextSource(f"file://{tmp_path}/a.jsonl").documents()) == TEXTS[:30]
    assert list(TextSource(f"{tmp_path}/*.jsonl").documents()) == TEXTS


class BucketFileSystem(MemoryFileSystem):
    """Objects in memory; takes no option that it does not know, as s3fs."""

    protocol = "bucket"
    store: dict = {}  # noqa: RUF012

    def __init__(self, client_kwargs=None, **options):
        assert not client_kwargs, f"unexpected keyword arguments {client_kwargs}"
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("bucket://", "memory://"))


def test_compressed_in_a_bucket(tmp_path):
    write("jsonl.gz", tmp_path)
    fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
    fsspec.filesystem("bucket").pipe_file("bucket://text/a.jsonl.gz", (tmp_path / "a.jsonl.gz").read_bytes())
    assert list(TextSource("bucket://text/*.jsonl.gz").documents()) == TEXTS


def test_over_http(tmp_path):
    write("jsonl", tmp_path)
    write("jsonl.gz", tmp_path)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert list(TextSource(f"{address}/a.jsonl").documents()) == TEXTS[:30]
        assert list(TextSource(f"{address}/a.jsonl.gz").documents()) == TEXTS
        with pytest.raises(UserError, match=rf"source\.path={address}/none\.jsonl cannot be read"):
            list(TextSource(f"{address}/none.jsonl").documents())
        server.shutdown()
