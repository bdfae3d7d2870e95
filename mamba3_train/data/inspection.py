"""A look at a prepared corpus: what it holds, some of its rows as text, and how long its documents are."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mamba3_train.data.corpus_files import is_remote
from mamba3_train.data.packing import CutRows
from mamba3_train.data.sampler import permute
from mamba3_train.data.token_shards import Manifest, TokenSplit, read_manifest
from mamba3_train.data.tokenizer import Tokenizer
from mamba3_train.errors import UserError

HISTOGRAM = "document_lengths.png"


def show(folder: str | Path, console: Console, rows: int = 3, sequence_length: int = 256, seed: int = 0) -> None:
    """Print tokens per source and a few rows with document boundaries marked; draw document lengths as a PNG there."""
    if is_remote(folder):
        raise UserError(f"show={folder} reads a folder of this machine: copy the corpus, or some of it, here first")
    folder = Path(folder)
    manifest = read_manifest(folder)
    console.print(source_table(manifest))
    split = TokenSplit(folder, manifest, "train")
    packed = CutRows(split, sequence_length)
    if not packed.count:
        raise UserError(
            f"{folder} has {split.tokens:,} training tokens, fewer than a row: give a shorter sequence_length than "
            f"{sequence_length}"
        )
    tokenizer = Tokenizer.of_corpus(folder, manifest.end_of_document_id)
    numbers = permute(np.arange(min(rows, packed.count)), packed.count, seed, epoch=0)
    for number in numbers.tolist():
        console.rule(f"row {number:,} of {packed.count:,}")
        console.print(row_text(packed, number, tokenizer))
    lengths = {name: document_lengths(folder, manifest, name) for name in manifest.sources()}
    draw_lengths(lengths, folder / HISTOGRAM)
    console.print(f"document lengths: {folder / HISTOGRAM}")


def source_table(manifest: Manifest) -> Table:
    """Documents and tokens of every source and split."""
    table = Table(title=f"vocabulary {manifest.vocab_size:,}, stored as {manifest.dtype}")
    table.add_column("source")
    for name in ("split", "documents", "tokens", "tokens a document", "share"):
        table.add_column(name, justify="right")
    for source in manifest.sources():
        for split, shards in manifest.splits.items():
            mine = [shard for shard in shards if shard.source == source]
            documents, tokens = sum(s.documents for s in mine), sum(s.tokens for s in mine)
            share = tokens / max(manifest.tokens(split), 1)
            mean = tokens / max(documents, 1)
            table.add_row(source, split, f"{documents:,}", f"{tokens:,}", f"{mean:,.0f}", f"{share:.1%}")
    return table


def row_text(packed: CutRows, number: int, tokenizer: Tokenizer) -> Text:
    """One row decoded, with a mark wherever a document begins."""
    rows = packed.read(np.array([number]))
    text = Text()
    for count, piece in enumerate(np.split(rows.tokens[0], rows.boundary_columns)):
        if count:
            text.append("▌document begins▐", style="reverse bold")
        text.append(tokenizer.decode(piece))
    return text


def document_lengths(folder: Path, manifest: Manifest, source: str, most: int = 1_000_000) -> np.ndarray:
    """Tokens in each training document of a source; of a large one, of its first shards."""
    split = TokenSplit(folder, manifest, "train", source)
    found, count = [], 0
    for number in range(len(split.shards)):
        found.append(np.diff(split.shard(number)[1]))
        count += len(found[-1])
        if count >= most:
            break
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def draw_lengths(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Draw the histogram of document lengths, one line a source, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws without a display
    from matplotlib.figure import Figure

    longest = max((values.max(initial=1) for values in lengths.values()), default=1)
    edges = np.geomspace(1, longest + 1, 60)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="tokens in a document", ylabel="documents")
    for name, values in lengths.items():
        axes.stairs(np.histogram(values, edges)[0], edges, label=f"{name}, median {np.median(values):,.0f}", fill=False)
    axes.legend()
    figure.savefig(path, dpi=150)
