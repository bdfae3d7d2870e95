"""Attention by blocks is attention through a mask: which blocks are passed over, and what comes out."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mamba3_train.model import AttentionConfig, Mamba3Config, Mamba3LM, initialize
from mamba3_train.model.attention import _visible
from mamba3_train.model.document_attention import BLOCK, attend_within_documents, document_blocks
from mamba3_train.training.activation_checkpointing import recompute_activations
from mamba3_train.training.compilation import compile_layers

# Lengths of a row's documents: at a block's edges and next to them, in one block, over many, one token each.
PACKED = {
    "one": [700],
    "edges": [BLOCK, 2 * BLOCK, BLOCK - 1, 1, BLOCK + 1, 5],
    "short": [1] * 40 + [3] * 50 + [60] * 6,
    "long": [5, 600, 30],
    "less than a block": [40, 33],
}


def ids_of(*rows: list[int], device: str = "cpu") -> torch.Tensor:
    """Document ids of rows, cut to the shortest one's length."""
    ids = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    length = min(map(len, ids))
    return torch.stack([row[:length] for row in ids]).to(torch.int32).to(device)


@pytest.mark.parametrize("other", PACKED)
@pytest.mark.parametrize("documents", PACKED)
def test_blocks_are_those_of_the_mask(documents, other):
    ids = ids_of(PACKED[documents], PACKED[other])
    seqlen = ids.shape[1]
    visible = _visible(ids, seqlen, None, "cpu")[:, 0]
    blocks = -(-seqlen // BLOCK)
    tiles = [tile for rows in visible.split(BLOCK, 1) for tile in rows.split(BLOCK, 2)]
    seen = torch.stack([tile.flatten(1).any(1) for tile in tiles], 1).unflatten(1, (blocks, blocks))
    whole = torch.stack([tile.flatten(1).all(1) for tile in tiles], 1).unflatten(1, (blocks, blocks))
    whole &= ~torch.eye(blocks, dtype=torch.bool)  # a block of one token, whole by chance, goes through the mask
    found = document_blocks(ids)

    def listed(counts, indices):
        dense = torch.zeros(len(ids), blocks, blocks, dtype=torch.bool)
        for row, block in ((r, b) for r in range(len(ids)) for b in range(blocks)):
            dense[row, block, indices[row, 0, block, : counts[row, 0, block]].long()] = True
        return dense

    partly = seen & ~whole
    assert torch.equal(listed(found.whole_keys, found.whole_key_list), whole)
    assert torch.equal(listed(found.keys, found.key_list), partly)
    assert torch.equal(listed(found.whole_queries, found.whole_query_list), whole.mT)
    assert torch.equal(listed(found.queries, found.query_list), partly.mT)


@pytest.mark.parametrize("documents", PACKED)
def test_by_blocks_as_by_mask(documents):
    ids = ids_of(PACKED[documents], PACKED["edges"])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, ids.shape[1], 16) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, _visible(ids, ids.shape[1], None, "cpu"), enable_gqa=True)
    torch.testing.assert_close(
        attend_within_documents(q, k, v, ids, document_blocks(ids)), expected, rtol=1e-5, atol=1e-5
    )


def test_layers_make_no_angles_of_their_own():
    """Compiled, they would make them for every number of q and k, which took a sixth of a Transformer's step."""
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, rotary=True)
    model = Mamba3LM(
        Mamba3Config(vocab_size=64, d_model=16, d_mlp=16, n_layers=2, layer_pattern="*", attention=attention)
    )
    initialize(model, model.config, seed=0)
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compile_layers(model, backend)
    model(torch.randint(0, 64, (1, 40)), ids_of([30, 10]))
    assert any("scaled_dot_product_attention" in name for name in called)
    assert not [name for name in called if name in ("cos", "sin", "pow")]


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", ["edges", "short"])
def test_compiled_layers_go_by_blocks_on_a_gpu(documents, recompute, monkeypatch):
    attention = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=64, rotary=True)
    config = Mamba3Config(vocab_size=256, d_model=512, n_layers=2, d_mlp=512, layer_pattern="*", attention=attention)
    plain = Mamba3LM(config)
    initialize(plain, config, seed=0)
    plain.cuda()
    ids = ids_of(PACKED[documents], PACKED["long"], device="cuda")
    tokens = torch.randint(0, 256, ids.shape, device="cuda")
    compiled = copy.deepcopy(plain)
    recompute_activations(compiled, recompute)
    torch._dynamo.reset()
    compile_layers(compiled)
    results = []
    for model in (plain, compiled):
        called = []
        monkeypatch.setattr(
            "mamba3_train.model.attention.F.scaled_dot_product_attention",
            lambda *a, sdpa=F.scaled_dot_product_attention, called=called, **k: called.append(1) or sdpa(*a, **k),
        )
        with torch.no_grad():
            seen = model(tokens, ids)
        logits = model(tokens, ids)
        torch.testing.assert_close(seen, logits, rtol=1e-3, atol=1e-4)
        logits.float().log_softmax(-1)[..., 7].mean().backward()
        monkeypatch.undo()
        assert bool(called) == (model is plain or recompute != "none")
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        scale = expected.abs().max()
        # Two kernels' rounding; what another document's tokens would add is a hundred times as much.
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-3)
