"""Layers are compiled one by one, each whole."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mamba3_train.training.compilation import compile_layers


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Model(nn.Module):
    """Two layers of four buckets each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)]) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_ddp_cuts_no_layer(one_process):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = Model()
    compile_layers(model, backend)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    x = torch.randn(2, 512)
    wrapped(x).sum().backward()
    products = [sum(node.target is torch._C._nn.linear for node in graph.graph.nodes) for graph in graphs]
    assert products == [4] * len(products)
    assert all(parameter.grad is not None for parameter in model.parameters())
