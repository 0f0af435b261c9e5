"""pfl on the same work, in two processes: federated averaging of all nodes in each round."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

RANK, ADDRESSES = "PFL_WORKER_RANK", "PFL_WORKER_ADDRESSES"


def worker() -> None:
    import torch
    import work
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    given = work.parsed()
    work.keep_freed_memory()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.model()

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return work.loss(self.net, inputs, targets)

        def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, object]:
            return {}

    net = Net()
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    users = [Dataset(given.of(node), user_id=str(node)) for node in range(given.nodes)]
    data = FederatedDataset(
        lambda user: users[int(user)],
        get_user_sampler("minimize_reuse", [str(node) for node in range(given.nodes)]),
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=given.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=given.nodes,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=work.STEPS,
            local_learning_rate=work.LEARNING_RATE,
            local_batch_size=work.BATCH,
        ),
    )


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        first = free.getsockname()[1]
    settings = os.environ | {ADDRESSES: f"127.0.0.1:{first},127.0.0.1:{first + 1}"}
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=settings | {RANK: str(r)}) for r in range(2)]
    sys.exit(max(abs(rank.wait()) for rank in ranks))


if __name__ == "__main__":
    worker() if RANK in os.environ else main()
