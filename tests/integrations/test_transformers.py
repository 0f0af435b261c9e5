"""A peer in Hugging Face's ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pairs import both, check_shared, models, peers_of, samples

from jwins.errors import UsageError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from jwins.integrations.transformers import PeerCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def trainer(folder: Path, model: Any, rank: int, callback: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 0.1}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / str(rank)),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **(options | more),
    )
    data = samples(rank, 24)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]
    )


@pytest.mark.parametrize(
    ("every_steps", "rounds"),
    [(None, 3), (6, 3), (4, 5), (100, 1)],
    ids=["epoch", "6", "4 and the rest", "end"],
)
@pytest.mark.parametrize("wait", [True, False], ids=["wait", "overlap"])
def test_adapters_are_exchanged_and_the_peer_is_closed(
    every_steps: int | None, rounds: int, wait: bool, tmp_path: Path
) -> None:
    modules = models()
    peers = peers_of(tmp_path, modules)
    callbacks = [PeerCallback(peer, every_steps=every_steps, wait=wait) for peer in peers]
    trainers = [trainer(tmp_path, modules[rank], rank, callbacks[rank]) for rank in range(2)]
    both(lambda rank: trainers[rank].train())
    check_shared(*modules)
    for callback, peer in zip(callbacks, peers, strict=True):
        report = callback.exchange_times.report
        late = not wait and 18 % (every_steps or 6) == 0  # one more, which takes the last merge in
        assert report is not None
        assert report.round == rounds - 1 + late
        assert report.timed_out == ()
        with pytest.raises(UsageError, match="the peer is closed"):
            peer.exchange()


def test_an_evaluation_sees_the_merged_model(tmp_path: Path) -> None:
    modules = models()
    peers = peers_of(tmp_path, modules)
    seen: dict[int, list[Any]] = {0: [], 1: []}

    class Noting(PeerCallback):
        def __init__(self, rank: int) -> None:
            super().__init__(peers[rank])
            self.rank = rank

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[self.rank].append(modules[self.rank].lora_a.weight.detach().clone())

    trainers = [
        trainer(tmp_path, modules[rank], rank, Noting(rank), eval_strategy="epoch") for rank in range(2)
    ]
    both(lambda rank: trainers[rank].train())
    assert len(seen[0]) == 3
    for one, other in zip(seen[0], seen[1], strict=True):
        assert (one - other).abs().max() < 1e-6
