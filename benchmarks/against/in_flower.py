"""Flower on the same work, in two actors of Ray: federated averaging of all nodes in each round."""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Iterator
from functools import cache

import torch
import work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client, server = ClientApp(), ServerApp()


@cache
def given() -> work.Work:
    work.keep_freed_memory()
    return work.parsed()


@cache
def data(node: int) -> tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]:
    inputs, targets = given().of(node)
    return inputs, targets, work.batches(len(targets))


@client.train()
def train(message: Message, context: Context) -> Message:
    inputs, targets, batches = data(int(context.node_config["partition-id"]))
    net = work.model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=work.LEARNING_RATE)
    for at in itertools.islice(batches, work.STEPS):
        work.loss(net, inputs[at], targets[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {
        "arrays": ArrayRecord(net.state_dict()),
        "metrics": MetricRecord({"num-examples": work.STEPS * work.BATCH}),
    }
    return Message(content=RecordDict(found), reply_to=message)


@server.main()
def average(grid: Grid, context: Context) -> None:
    FedAvg(fraction_evaluate=0.0, min_available_nodes=given().nodes).start(
        grid=grid, initial_arrays=ArrayRecord(work.model().state_dict()), num_rounds=given().rounds
    )


if __name__ == "__main__":
    cluster = {"address": "local", "num_cpus": 2}  # not one that is running on this machine
    one_core = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": cluster}
    try:
        run_simulation(server, client, num_supernodes=given().nodes, backend_config=one_core)
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)  # the server's thread would wait for ever
