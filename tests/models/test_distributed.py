"""A change of output stride between two DistributedDataParallel steps, on two processes."""

import os
import socket

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import spawn

from seg_attn.models import DeepLabV3

STRIDES = (16, 8)
WORLD = 2


def network():
    torch.manual_seed(0)
    return DeepLabV3("resnet18", num_classes=3, decoder_channels=16, dropout=0.0).double().train()


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * rank + step)
    return torch.randn(2, 3, 33, 49, generator=generator, dtype=torch.float64)


def loss_of(model, rank, step):
    return model(batch(rank, step)).square().mean()


def work(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    parallel = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step, output_stride in enumerate(STRIDES):
        parallel.module.output_stride = output_stride
        optimizer.zero_grad()
        loss_of(parallel, rank, step).backward()
        optimizer.step()
    torch.save({name: p.detach() for name, p in parallel.module.named_parameters()}, f"{path}/{rank}.pt")
    distributed.destroy_process_group()


def alone(strides):
    """The same two steps in one process, on the mean of both processes' losses."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, output_stride in enumerate(strides):
        model.output_stride = output_stride
        optimizer.zero_grad()
        sum(loss_of(model, rank, step) for rank in range(WORLD)).div(WORLD).backward()
        optimizer.step()
    return dict(model.named_parameters())


def test_two_processes_change_the_stride_together(tmp_path, error):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    expected, missed = alone(STRIDES), alone((16, 16))
    for name, parameter in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert error(first[name], parameter.detach()) <= 1e-9, name
    name = "backbone.layer4.1.conv1.weight"
    assert error(missed[name], expected[name]) > 1e-6  # a missed change would show
