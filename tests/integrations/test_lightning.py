"""A peer in Lightning's ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import both, check_shared, models, peers_of, samples

from jwins.errors import UsageError

lightning = pytest.importorskip("lightning.pytorch")

from jwins.integrations.lightning import PeerCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.seen: list[torch.Tensor] = []
        self.broken = False

    def training_step(self, batch: Any, index: int) -> Any:
        if self.broken:
            raise RuntimeError("broken")
        return self.model(**batch)["loss"]

    def validation_step(self, batch: Any, index: int) -> None:
        if index == 0:
            self.seen.append(self.model.lora_a.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(module: Module, rank: int, callback: Any, **more: Any) -> Any:
    loader = torch.utils.data.DataLoader(samples(rank, 24), batch_size=4)  # type: ignore[arg-type]
    options: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **(options | more),
    )
    trainer.fit(module, loader, loader)


@pytest.mark.parametrize(
    ("every_steps", "rounds", "batches"),
    [(None, 3, 1), (None, 3, 2), (6, 3, 1), (4, 5, 1), (2, 5, 2)],
    ids=["epoch", "epoch, two batches a step", "6", "4 and the rest", "2, two batches a step"],
)
@pytest.mark.parametrize("wait", [True, False], ids=["wait", "overlap"])
def test_adapters_are_exchanged_and_the_peer_is_closed(
    every_steps: int | None, rounds: int, batches: int, wait: bool, tmp_path: Path
) -> None:
    modules = [Module(model) for model in models()]
    peers = peers_of(tmp_path, modules)
    callbacks = [PeerCallback(peer, every_steps=every_steps, wait=wait) for peer in peers]
    both(lambda rank: fit(modules[rank], rank, callbacks[rank], accumulate_grad_batches=batches))
    check_shared(*modules)
    steps = 18 // batches
    for callback, peer in zip(callbacks, peers, strict=True):
        report = callback.exchange_times.report
        late = not wait and steps % (every_steps or steps // 3) == 0  # one more takes the last merge in
        assert report is not None
        assert report.round == rounds - 1 + late
        assert report.timed_out == ()
        with pytest.raises(UsageError, match="the peer is closed"):
            peer.exchange()


def test_a_validation_sees_the_merged_model(tmp_path: Path) -> None:
    modules = [Module(model) for model in models()]
    peers = peers_of(tmp_path, modules)
    both(lambda rank: fit(modules[rank], rank, PeerCallback(peers[rank])))
    assert len(modules[0].seen) == 3
    for one, other in zip(modules[0].seen, modules[1].seen, strict=True):
        assert (one - other).abs().max() < 1e-6


def test_a_failure_closes_the_peer(tmp_path: Path) -> None:
    modules = [Module(model) for model in models()]
    peers = peers_of(tmp_path, modules)
    modules[0].broken = True
    with pytest.raises(RuntimeError, match="broken"):
        fit(modules[0], 0, PeerCallback(peers[0]))
    with pytest.raises(UsageError, match="the peer is closed"):
        peers[0].exchange()
    peers[1].close()
