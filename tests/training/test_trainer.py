"""Both engines train as plain PyTorch does, and as repeatably as the design promises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import jwins.training.model_traits
import jwins.training.trainer
import jwins.training.training_context
from evaluation import evaluate
from jwins.errors import ConfigError, UsageError
from jwins.rng import stream
from jwins.tasks.base import Dataset, Task
from jwins.training.batches import batch_indices
from jwins.training.node_store import mean_buffers
from jwins.training.optimizer import OPTIMIZERS, Optimizer
from jwins.training.trainer import Trainer
from jwins.training.training_context import TrainingError

STEPS = 2
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Toy(Task):
    """Three classes of points in a plane, and whatever model a test needs."""

    name = "toy"

    def __init__(self, build=None, samples=60):
        generator = torch.Generator().manual_seed(3)
        self._build = build or mlp
        targets = torch.randint(3, (samples,), generator=generator)
        inputs = torch.randn(samples, 6, generator=generator) + targets[:, None]
        self.train = Dataset(inputs, targets)
        self.test = Dataset(inputs[:20] + 0.1, targets[:20])

    def model(self):
        return self._build()


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def dropping():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.norm(self.conv(x[:, None]))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.view(-1, 3, 2))[0][:, -1])


class Branching(nn.Module):
    """torch.func cannot stack it: Python asks for a number."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > -1e9 else x[:, :3]


class Counting(nn.Module):
    """Replaces its buffer instead of changing it in place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(x)
        return self.fc(x)


MODELS = {"mlp": mlp, "dropout": dropping, "norm": normed, "conv": Convolution, "counting": Counting}


def parts_of(num_nodes, samples=60):
    order = np.random.default_rng(0).permutation(samples)
    return [np.sort(part) for part in np.array_split(order, num_nodes)]


def make(build=mlp, num_nodes=5, optimizer=None, **options):
    defaults = {"seed": 7, "local_steps": STEPS, "batch_size": 4, "device": "cpu", "batching": "loop"}
    return Trainer(
        Toy(build),
        parts_of(num_nodes),
        optimizer=optimizer or Optimizer("sgd", {"lr": 0.1}),
        **defaults | options,
    )


def everyone(trainer, round):
    return dict.fromkeys(range(trainer.num_nodes), round)


def digest(trainer):
    states = [trainer.state(node) for node in trainer.nodes]
    state = [
        tensor
        for own in states
        for group in (own.moments, own.counters, own.buffers)
        for _, tensor in sorted(group.items())
    ]
    return hashlib.sha256(
        b"".join(t.contiguous().cpu().numpy().tobytes() for t in [trainer.params, *state])
    ).hexdigest()


def plain(trainer, node, rounds, *, reset=False, build=mlp):
    """The same steps of one node, in plain PyTorch."""
    task = Toy(build)
    model = build()
    trainer.layout.write(trainer.initial(), model)
    optimizer = trainer.optimizer.build(list(model.parameters()))
    for r in range(rounds):
        if reset:
            optimizer = trainer.optimizer.build(list(model.parameters()))
        for index in batch_indices(
            parts_of(trainer.num_nodes)[node], seed=7, node=node, round=r, local_steps=STEPS, batch_size=4
        ):
            optimizer.zero_grad()
            functional.cross_entropy(model(task.train.inputs[index]), task.train.targets[index]).backward()
            optimizer.step()
    return trainer.layout.flatten(model), model


# The stream of samples


def test_batches_are_slices_of_concatenated_permutations():
    part = np.array([3, 5, 8, 13, 21, 34, 55])
    endless = np.concatenate(
        [part[stream(9, "shuffle", node=2, round=epoch).permutation(7)] for epoch in range(12)]
    )
    for r in (4, 0, 1, 2, 3):
        got = batch_indices(part, seed=9, node=2, round=r, local_steps=3, batch_size=5)
        np.testing.assert_array_equal(got, endless[r * 15 : r * 15 + 15].reshape(3, 5))


def test_every_sample_is_used_once_per_epoch_and_large_batches_repeat():
    part = np.arange(4) * 10
    got = batch_indices(part, seed=1, node=0, round=0, local_steps=1, batch_size=8)
    assert sorted(got[0, :4]) == sorted(got[0, 4:]) == list(part)


# Training, against plain PyTorch

STATEFUL = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "adagrad": {"lr": 0.05, "initial_accumulator_value": 0.1, "lr_decay": 0.1},
    "rmsprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "adam": {"lr": 0.01, "amsgrad": True, "betas": [0.8, 0.99]},
}


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_every_optimizer_takes_the_steps_of_plain_pytorch(kind, state, batching):
    trainer = make(optimizer=Optimizer(kind, STATEFUL.get(kind, {}), state), batching=batching, num_nodes=2)
    assert trainer.batching == batching
    for r in range(4):  # RAdam's sixth step is its first of the second kind
        trainer.train(everyone(trainer, r))
    for node in (0, 1):
        expected, _ = plain(trainer, node, 4, reset=state == "reset")
        # Adaptive optimizers magnify rounding where a gradient is near 0.
        torch.testing.assert_close(
            trainer.params[node], expected, atol=3e-4 if batching == "stacked" else 1e-6, rtol=0
        )


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_dampening_spares_the_first_step_as_in_torch(batching, state):
    optimizer = Optimizer("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, state)
    trainer = make(optimizer=optimizer, batching=batching)
    trainer.train({0: 0, 1: 0, 2: 0})
    trainer.train({0: 1, 1: 1, 3: 0})
    for node, rounds in {0: 2, 2: 1, 3: 1, 4: 0}.items():
        expected, _ = plain(trainer, node, rounds, reset=state == "reset")
        torch.testing.assert_close(trainer.params[node], expected, atol=1e-5, rtol=0)


def test_keeping_and_resetting_differ_only_after_the_first_round():
    kept, reset = (make(optimizer=Optimizer("sgd", {"lr": 0.1, "momentum": 0.9}, s)) for s in ("keep", "reset"))
    for trainer in (kept, reset):
        trainer.train(everyone(trainer, 0))
    assert torch.equal(kept.params, reset.params)
    for trainer in (kept, reset):
        trainer.train(everyone(trainer, 1))
    assert not torch.equal(kept.params, reset.params)
    assert not reset.state(0).moments


@pytest.mark.parametrize("build", [mlp, normed, Convolution, Counting])
@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_stacked_agrees_with_loop_after_one_round(build, buffers):
    loop, stacked = (make(build, batching=b, num_nodes=7, buffers=buffers) for b in ("loop", "stacked"))
    assert stacked.batching == "stacked", stacked.reason
    losses = [trainer.train(everyone(trainer, 0)) for trainer in (loop, stacked)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(loop.params, stacked.params, atol=1e-5, rtol=0)
    for name, tensor in loop.local_buffers.items():
        torch.testing.assert_close(tensor, stacked.local_buffers[name], atol=1e-5, rtol=0)
    rows = torch.cat([loop.params, loop.params.mean(dim=0, keepdim=True)])
    scores = []
    for trainer in (loop, stacked):
        every = [trainer.buffers(node) for node in range(7)]
        scores.append(evaluate(trainer, rows, [*range(7), 0], buffers=[*every, mean_buffers(every)]))
    for name in ("accuracy", "loss"):
        torch.testing.assert_close(scores[0][name], scores[1][name], atol=1e-5, rtol=0)


def test_training_loss_falls():
    trainer = make()
    first = trainer.train(everyone(trainer, 0))
    for r in range(1, 30):
        last = trainer.train(everyone(trainer, r))
    assert list(first) == list(range(5))
    assert np.mean(list(last.values())) < 0.7 * np.mean(list(first.values()))


# Repeatability


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("model", ["dropout", "norm", "conv"])
def test_threads_do_not_change_a_bit(model, batching, monkeypatch):
    monkeypatch.setattr(jwins.training.trainer, "THREADS_MIN_PARAMETERS", 0)
    digests = set()
    for threads in (1, 3):
        trainer = make(
            MODELS[model], 11, Optimizer("adam", {"lr": 0.01}), batching=batching, threads=threads, chunk=4
        )
        assert trainer.batching == batching
        for r in range(3):
            trainer.train(everyone(trainer, r))
        trainer.close()
        digests.add(digest(trainer))
    assert len(digests) == 1


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("model", list(MODELS))
def test_a_node_does_not_depend_on_who_trains_beside_it(model, batching):
    """Also when the others are behind, after a fault, so that optimizer counters differ within a stack."""
    together, apart = (
        make(MODELS[model], 7, Optimizer("nadam", {"lr": 0.01}), batching=batching, chunk=5) for _ in range(2)
    )
    for r in range(3):
        together.train(everyone(together, r))
    apart.train({0: 0, 5: 0, 3: 0})
    apart.train({3: 1, 0: 1, 1: 0, 2: 0})
    apart.train({3: 2, 1: 1, 4: 0, 5: 1})
    apart.train({0: 2, 1: 2, 2: 1, 6: 0})
    apart.train({2: 2})
    for node in (0, 1, 2, 3):
        assert torch.equal(together.params[node], apart.params[node]), node
    apart.train({4: 1, 5: 2, 6: 1})
    apart.train({4: 2, 6: 2})
    assert digest(together) == digest(apart)


def test_a_node_of_a_loop_gets_the_same_bits_in_a_process_of_its_own():
    together = make(Convolution, 5, batching="loop")
    alone = Trainer(
        Toy(Convolution), parts_of(5)[:1], seed=7, local_steps=STEPS, batch_size=4,
        optimizer=Optimizer("sgd", {"lr": 0.1}), batching="loop", device="cpu",
    )  # fmt: skip
    for r in range(3):
        together.train(everyone(together, r))
        alone.train({0: r})
    assert torch.equal(together.params[0], alone.params[0])
    rows = [together.params[i].data_ptr() % 64 for i in range(5)]
    assert rows == [alone.params[0].data_ptr() % 64] * 5


@pytest.mark.parametrize(
    ("kind", "model"),
    [("sgd", "mlp"), ("adagrad", "mlp"), ("nadam", "dropout"), ("adam", "norm"), ("adam", "conv")],
)
@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_going_on_from_a_state_is_bit_identical(kind, batching, model):
    options = {"sgd": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}}.get(kind, {"lr": 0.01})
    whole, first, second = (
        make(MODELS[model], 5, Optimizer(kind, options), batching=batching) for _ in range(3)
    )
    for r in range(4):
        whole.train(everyone(whole, r))
    first.train(everyone(first, 0))
    first.train({0: 1, 3: 1})
    saved, rows = {node: first.state(node) for node in first.nodes}, first.params.clone()
    second.params.copy_(rows)
    for node, state in saved.items():
        second.load_state_(node, state)
    second.train({1: 1, 2: 1, 4: 1})
    for r in (2, 3):
        second.train(everyone(second, r))
    assert digest(second) == digest(whole)


def test_a_state_of_another_trainer_is_refused():
    trainer = make(normed, optimizer=Optimizer("adam"))
    with pytest.raises(UsageError, match="moments"):
        trainer.load_state_(0, make(normed).state(0))
    with pytest.raises(UsageError, match=r"node 1, moments.exp_avg: \(\d+,\) .*, not \("):
        trainer.load_state_(1, make(mlp, optimizer=Optimizer("adam")).state(1))


def test_an_earlier_state_gives_a_node_a_fresh_start():
    trainer = make(normed, optimizer=Optimizer("adagrad", {"initial_accumulator_value": 0.5}))
    fresh = [trainer.state(node) for node in range(5)]
    trainer.train(everyone(trainer, 0))
    trained = [trainer.state(node) for node in range(5)]
    trainer.load_state_(2, fresh[2])
    for node, expected in ((2, fresh[2]), (1, trained[1])):
        own = trainer.state(node)
        for group in ("moments", "counters", "buffers"):
            assert getattr(own, group).keys() == getattr(expected, group).keys()
            for name, tensor in getattr(own, group).items():
                assert torch.equal(tensor, getattr(expected, group)[name])


def test_the_initial_model_depends_on_the_seed_only():
    torch.manual_seed(1)
    a = make().initial()
    torch.manual_seed(2)
    b = make(num_nodes=3, batching="loop").initial()
    assert torch.equal(a, b)
    assert not torch.equal(a, make(seed=8).initial())
    trainer = make()
    trainer.initial().zero_()
    assert torch.equal(trainer.params[4], a)


# Random models


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_dropout_differs_between_nodes_and_rounds_and_leaves_the_global_generator_alone(batching):
    task = Toy(dropping)
    same = [np.arange(60)] * 4
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer = Trainer(
        task, same, seed=7, local_steps=1, batch_size=60, optimizer=Optimizer("sgd", {"lr": 0.1}),
        batching=batching, device="cpu",
    )  # fmt: skip
    assert trainer.traits.training
    assert not trainer.traits.evaluation
    trainer.train(everyone(trainer, 0))
    evaluate(trainer, trainer.params, range(4))
    assert torch.equal(torch.get_rng_state(), before)
    # The samples of a step are the same up to their order, so only dropout can tell nodes apart.
    assert float((trainer.params[0] - trainer.params[1]).abs().max()) > 1e-3
    first = trainer.params.clone()
    trainer.params.copy_(trainer.initial())
    trainer.train(everyone(trainer, 1))
    assert float((trainer.params[0] - first[0]).abs().max()) > 1e-3


class Augmented(Toy):
    def loss(self, model, batch, generator):
        assert generator is not None
        noise = torch.randn(batch.inputs.shape, generator=generator)
        return functional.cross_entropy(model(batch.inputs + noise), batch.targets)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_augmentation_draws_from_the_generator_it_is_given(batching):
    results = []
    for _ in range(2):
        trainer = Trainer(
            Augmented(), parts_of(4), seed=7, local_steps=2, batch_size=4,
            optimizer=Optimizer("sgd", {"lr": 0.1}), batching=batching, device="cpu",
        )  # fmt: skip
        assert trainer.batching == batching
        assert trainer.traits.loss_generator
        assert not trainer.traits.training
        trainer.train({0: 0, 1: 0, 2: 1, 3: 1} if not results else {0: 0, 1: 0})
        trainer.train({} if not results else {2: 1, 3: 1})
        results.append(digest(trainer))
    assert results[0] == results[1]


# Choosing an engine


def test_auto_is_a_rule_of_model_and_device(monkeypatch):
    small = make(batching="auto")
    assert (small.batching, small.reason) == ("stacked", "")
    convolution = make(Convolution, batching="auto")
    assert (convolution.batching, convolution.reason) == ("loop", "Conv1d is faster in a loop on CPU")
    assert make(Recurrent, batching="auto").reason == "LSTM is faster in a loop on CPU"
    assert make(batching="loop").reason == "loop was requested"
    monkeypatch.setattr(jwins.training.model_traits, "STACKED_MAX_PARAMETERS", 10)
    assert make(batching="auto").batching == "loop"
    assert make(batching="stacked").batching == "stacked"


def test_steps_that_cannot_be_recorded_are_taken_with_all_their_calls(monkeypatch):
    recorded = make(batching="stacked")
    assert recorded.recorded

    def refuse(function, example):
        raise RuntimeError("not today")

    monkeypatch.setattr(jwins.training.model_traits, "flatten_graph", refuse)
    called = make(batching="stacked")
    assert (called.batching, called.recorded) == ("stacked", [])
    for trainer in (recorded, called):
        trainer.train(everyone(trainer, 0))
    torch.testing.assert_close(recorded.params, called.params, atol=1e-6, rtol=0)


def test_large_gradients_are_written_to_the_memory_of_their_thread(monkeypatch):
    monkeypatch.setattr(jwins.training.trainer, "THREADS_MIN_PARAMETERS", 0)

    def wide():
        return nn.Sequential(nn.Linear(6, 4000), nn.ReLU(), nn.Linear(4000, 3))

    digests = set()
    for threads in (1, 2):
        trainer = make(wide, 9, batching="stacked", threads=threads, chunk=3)
        memories = [memory.data_ptr() for step in trainer.recorded for memory in step.buffers()]
        assert len(set(memories)) == len(memories) == threads
        for r in range(3):
            trainer.train(everyone(trainer, r))
        trainer.close()
        digests.add(digest(trainer))
    assert len(digests) == 1
    expected, _ = plain(trainer, 5, 3, build=wide)
    torch.testing.assert_close(trainer.params[5], expected, atol=1e-5, rtol=0)


def test_a_step_that_changes_after_it_was_recorded_is_not_used():
    class Changing(Toy):
        """Against the rules, its loss depends on what it has seen before."""

        def __init__(self, build=None):
            super().__init__(build)
            self.calls = 0

        def loss(self, model, batch, generator):
            self.calls += 1
            return super().loss(model, batch, generator) * (1.0 if self.calls < 5 else 2.0)

    trainer = Trainer(
        Changing(), parts_of(4), seed=7, local_steps=1, batch_size=4, optimizer=Optimizer(), batching="stacked",
        device="cpu",
    )  # fmt: skip
    assert not trainer.recorded


@pytest.mark.parametrize("batching", ["auto", "stacked"])
def test_a_model_that_cannot_be_stacked_falls_back_and_says_why(batching):
    trainer = make(Branching, batching=batching)
    assert trainer.batching == "loop"
    assert trainer.reason.startswith("torch.func cannot stack this model: RuntimeError: ")
    assert trainer.train({0: 0})[0] > 0


class Suspicious(nn.Module):
    """Computes something else on the tensors that vmap hands out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (2.0 if torch._C._functorch.is_batchedtensor(x) else 1.0)


def test_a_stack_that_computes_something_else_is_not_used():
    trainer = make(Suspicious, batching="stacked")
    assert trainer.batching == "loop"
    assert (
        trainer.reason == "torch.func cannot stack this model: the loss of a step differs from that in a loop"
    )


def test_recurrent_models_train_whatever_is_asked_for():
    trainers = [make(Recurrent, batching=batching) for batching in ("loop", "stacked")]
    for trainer in trainers:
        trainer.train(everyone(trainer, 0))
    torch.testing.assert_close(trainers[0].params, trainers[1].params, atol=1e-5, rtol=0)


def test_one_node_is_enough_for_a_stack():
    loop, stacked = (make(num_nodes=1, batching=b) for b in ("loop", "stacked"))
    for trainer in (loop, stacked):
        trainer.train({0: 0})
    torch.testing.assert_close(loop.params, stacked.params, atol=1e-5, rtol=0)
    assert stacked.params.shape == (1, stacked.layout.size)
    assert stacked.state(0).buffers == {}


# Buffers


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_batch_norm_statistics_stay_on_their_node(batching):
    trainer = make(normed, batching=batching)
    trainer.train({1: 0})
    mean, count = trainer.local_buffers["1.running_mean"], trainer.local_buffers["1.num_batches_tracked"]
    assert count.tolist() == [0, STEPS, 0, 0, 0]
    assert not mean[0].any()
    _, model = plain(trainer, 1, 1, build=normed)
    torch.testing.assert_close(mean[1], model[1].running_mean, atol=1e-5, rtol=0)
    before = digest(trainer)
    score = evaluate(trainer, trainer.params[1:4], [1, 1, 2])["loss"]
    assert digest(trainer) == before  # evaluation changes nothing
    with torch.no_grad():
        expected = functional.cross_entropy(model.eval()(trainer.task.test.inputs), trainer.task.test.targets)
    assert float(score[0]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_the_average_model_uses_average_buffers(batching):
    trainer = make(normed, batching=batching, num_nodes=3)
    trainer.train(everyone(trainer, 0))
    average = trainer.params.mean(dim=0)
    model = normed().eval()
    trainer.layout.write(average, model)
    model[1].running_mean = trainer.local_buffers["1.running_mean"].mean(dim=0)
    model[1].running_var = trainer.local_buffers["1.running_var"].mean(dim=0)
    with torch.no_grad():
        expected = functional.cross_entropy(model(trainer.task.test.inputs), trainer.task.test.targets)
    own = [mean_buffers([trainer.buffers(node) for node in trainer.nodes])]
    found = evaluate(trainer, average[None], [0], buffers=own)["loss"]
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_shared_statistics_are_part_of_the_row(batching):
    trainer = make(normed, buffers="shared", batching=batching)
    assert list(trainer.local_buffers) == ["1.num_batches_tracked"]
    trainer.train({2: 0})
    row = trainer.layout.views(trainer.params)["1.running_mean"]
    assert row[2].any()
    assert not row[0].any()
    before = trainer.params.clone()
    evaluate(trainer, trainer.params, range(5))
    assert torch.equal(trainer.params, before)


# Evaluation


@pytest.mark.parametrize("batching", ["loop", "stacked"])
def test_evaluation_is_the_mean_over_the_chosen_samples(batching, monkeypatch):
    monkeypatch.setattr(jwins.training.training_context, "EVALUATION_BATCH", 6)
    trainer = make(batching=batching)
    trainer.train(everyone(trainer, 0))
    samples = torch.tensor([1, 4, 9, 0, 2, 3, 19])
    for chosen in (None, samples):
        scores = evaluate(trainer, trainer.params, range(5), chosen)
        assert scores["accuracy"].dtype == torch.float64
        for node in range(5):
            model = mlp()
            trainer.layout.write(trainer.params[node], model)
            test = trainer.task.test
            index = slice(None) if chosen is None else chosen
            with torch.no_grad():
                outputs = model(test.inputs[index])
            loss = functional.cross_entropy(outputs, test.targets[index])
            accuracy = (outputs.argmax(dim=1) == test.targets[index]).double().mean()
            assert float(scores["loss"][node]) == pytest.approx(float(loss), abs=1e-5)
            assert float(scores["accuracy"][node]) == pytest.approx(float(accuracy))
    assert evaluate(trainer, trainer.params[:0], []) == {}


def test_evaluation_refuses_what_does_not_fit():
    trainer = make()
    with pytest.raises(UsageError, match=r"expected \(2, "):
        evaluate(trainer, trainer.params, [0, 1])
    with pytest.raises(UsageError, match="node 5 is not among the 5 nodes held here"):
        evaluate(trainer, trainer.params[:1], [5])
    with pytest.raises(UsageError, match="no test samples"):
        evaluate(trainer, trainer.params[:1], [0], torch.zeros(0, dtype=torch.int64))


# Mistakes and failures


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sgdd", {}, r"train.optimizer.kind = 'sgdd': expected one of sgd, adam"),
        ("sgd", {"rate": 1}, r"train.optimizer.rate = 1: unknown option of sgd; expected one of lr, momentum"),
        ("sgd", {"foreach": True}, r"train.optimizer.foreach = True: unknown option"),
        ("sgd", {"lr": -1.0}, r"train.optimizer.lr = -1.0: Invalid learning rate"),
        ("sgd", {"lr": "fast"}, r"train.optimizer.lr = 'fast': expected a finite number"),
        ("sgd", {"lr": float("nan")}, r"train.optimizer.lr = nan: expected a finite number"),
        ("sgd", {"nesterov": 1}, r"train.optimizer.nesterov = 1: expected true or false"),
        ("sgd", {"lr": 0.1, "nesterov": True}, r"train.optimizer.nesterov = True: Nesterov"),
        ("adam", {"betas": 0.9}, r"train.optimizer.betas = 0.9: expected 2 numbers, such as \[0.9, 0.999\]"),
        ("adam", {"betas": [0.9, "x"]}, r"train.optimizer.betas\[1\] = 'x': expected a finite number"),
        ("adam", {"betas": [0.9, 1.5]}, r"train.optimizer.betas = \[0.9, 1.5\]: Invalid beta"),
    ],
)  # fmt: skip
def test_optimizer_options_are_checked_by_name(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(kind, options)


def test_settings_and_parts_are_checked():
    with pytest.raises(ConfigError, match=r"train.optimizer.state = 'forget'"):
        Optimizer("sgd", {}, "forget")  # type: ignore[arg-type]
    for name, value in {"local_steps": 0, "batch_size": 1.5}.items():
        with pytest.raises(ConfigError, match=f"train.{name} = {value}"):
            make(**{name: value})
    with pytest.raises(ConfigError, match=r"run.threads = 0"):
        make(threads=0)
    with pytest.raises(ConfigError, match=r"train.batching = 'piled'"):
        make(batching="piled")
    sgd = Optimizer("sgd", {"lr": 0.1})
    rest = {"seed": 1, "local_steps": 1, "batch_size": 1, "optimizer": sgd, "device": "cpu"}
    with pytest.raises(UsageError, match="node 1 has no samples"):
        Trainer(Toy(), [np.arange(3), np.zeros(0, dtype=np.int64)], **rest)
    with pytest.raises(UsageError, match="node 0: sample indices reach beyond the 60"):
        Trainer(Toy(), [np.array([60])], **rest)
    with pytest.raises(UsageError, match="no nodes"):
        Trainer(Toy(), [], **rest)
    with pytest.raises(UsageError, match="is float64"):
        make(lambda: mlp().double())
    with pytest.raises(UsageError, match="has no parameters"):
        make(nn.ReLU)
    with pytest.raises(UsageError, match="requires_grad"):
        make(lambda: mlp().requires_grad_(False))
    with pytest.raises(UsageError, match="node 5, round 0"):
        make().train({5: 0})
    with pytest.raises(UsageError, match="node 1, round -1"):
        make().train({1: -1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error_and_auto_is_the_cpu():
    with pytest.raises(ConfigError, match=r"run.device = 'cuda': torch sees no CUDA device"):
        make(device="cuda")
    assert make(device="auto").device == torch.device("cpu")


def test_a_loss_that_is_no_scalar_names_node_round_and_stage():
    class PerSample(Toy):
        def loss(self, model, batch, generator):
            return functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")

    with pytest.raises(
        TrainingError, match=r"node 0, round 0, loss: task.loss has shape \(4,\): expected a scalar"
    ):
        Trainer(
            PerSample(), parts_of(3), seed=1, local_steps=1, batch_size=4, optimizer=Optimizer(), device="cpu"
        )


def test_a_metric_that_is_not_per_sample_is_named():
    class Averaged(Toy):
        def metrics(self, outputs, targets):
            return {"loss": functional.cross_entropy(outputs, targets)}

    with pytest.raises(
        TrainingError, match=r"evaluation: metric 'loss' has shape \(\): expected one number per sample"
    ):
        Trainer(
            Averaged(), parts_of(3), seed=1, local_steps=1, batch_size=4, optimizer=Optimizer(), device="cpu"
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_in_a_thread_names_node_and_round(threads):
    class Fragile(Toy):
        failing = False

        def loss(self, model, batch, generator):
            if self.failing:
                raise ArithmeticError("no luck")
            return super().loss(model, batch, generator)

    task = Fragile(Convolution)
    trainer = Trainer(
        task,
        parts_of(4),
        seed=1,
        local_steps=1,
        batch_size=4,
        optimizer=Optimizer(),
        threads=threads,
        device="cpu",
    )
    trainer.train({0: 0, 1: 0})
    task.failing = True
    with pytest.raises(
        TrainingError,
        match=r"node [12], round 5, loss: ArithmeticError: no luck \(test_trainer.py, line \d+\)$",
    ):
        trainer.train({1: 5, 2: 5})
    task.failing = False
    trainer.train({1: 5, 2: 5})
    trainer.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_round_can_be_taken_again(threads):
    """Ctrl-C leaves half a round behind; rows and state from before it give the result as if it never came."""

    class Interrupted(Toy):
        calls_left = 10**9

        def loss(self, model, batch, generator):
            self.calls_left -= 1
            if self.calls_left == 0:
                raise KeyboardInterrupt
            return super().loss(model, batch, generator)

    def trainer_of(task):
        adam = Optimizer("adam", {"lr": 0.01})
        return Trainer(
            task,
            parts_of(4),
            seed=1,
            local_steps=2,
            batch_size=4,
            optimizer=adam,
            threads=threads,
            device="cpu",
        )

    whole, task = trainer_of(Toy(Convolution)), Interrupted(Convolution)
    whole.train(everyone(whole, 0))
    trainer = trainer_of(task)
    rows, saved = trainer.params.clone(), [trainer.state(node) for node in trainer.nodes]
    task.calls_left = 4
    with pytest.raises(KeyboardInterrupt):
        trainer.train(everyone(trainer, 0))
    trainer.params.copy_(rows)
    for node, state in enumerate(saved):
        trainer.load_state_(node, state)
    trainer.train(everyone(trainer, 0))
    assert digest(trainer) == digest(whole)
    for each in (trainer, whole):
        each.close()


def test_rows_that_diverge_do_not_touch_their_stack():
    whole, broken = make(batching="stacked"), make(batching="stacked")
    broken.params[2] = torch.nan
    for trainer in (whole, broken):
        trainer.train(everyone(trainer, 0))
    others = [0, 1, 3, 4]
    assert torch.equal(whole.params[others], broken.params[others])
    assert torch.isnan(broken.params[2]).all()


def half_frozen():
    model = mlp()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_frozen_parameters_have_no_place_in_the_row_and_stay(state):
    adam = Optimizer("adam", {"lr": 0.05, "weight_decay": 0.1}, state)
    rows = {}
    for batching in ("loop", "stacked"):
        trainer = make(half_frozen, batching=batching, optimizer=adam)
        assert trainer.batching == batching, trainer.reason
        assert trainer.layout.frozen == ("0.weight", "0.bias")
        assert trainer.params.shape == (5, 8 * 3 + 3)
        before = {name: tensor.clone() for name, tensor in trainer.frozen.items()}
        trainer.train(everyone(trainer, 0))
        again = make(half_frozen, batching=batching, optimizer=adam)
        again.params.copy_(trainer.params)
        for node in trainer.nodes:
            again.load_state_(node, trainer.state(node))
        for each in (trainer, again):
            each.train(everyone(each, 1))
        assert torch.equal(trainer.params, again.params)
        assert not torch.equal(trainer.params[3], trainer.initial())
        assert all(torch.equal(trainer.frozen[name], tensor) for name, tensor in before.items())
        rows[batching] = trainer.params

        plain = half_frozen()
        vector = trainer.params[3]
        plain.load_state_dict(trainer.layout.state_dict(vector, {}, trainer.frozen), strict=True)
        outputs = plain(trainer.task.test.inputs)
        losses = functional.cross_entropy(outputs, trainer.task.test.targets)
        assert float(evaluate(trainer, vector[None], [3])["loss"][0]) == pytest.approx(losses.item(), abs=1e-5)
        scores = evaluate(trainer, trainer.params, range(5))
        assert float(scores["loss"][3]) == pytest.approx(losses.item(), abs=1e-5)
    torch.testing.assert_close(rows["stacked"], rows["loop"], atol=1e-4, rtol=0)


def test_frozen_parameters_train_as_in_plain_torch():
    trainer = make(half_frozen, batching="stacked", optimizer=Optimizer("sgd", {"lr": 0.1}))
    model = half_frozen()
    tensors = trainer.layout.state_dict(trainer.initial(), {}, trainer.frozen)
    model.load_state_dict(tensors, strict=True)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for index in trainer.indices(2, 0):
        sgd.zero_grad()
        inputs, targets = trainer.task.train.inputs[index], trainer.task.train.targets[index]
        functional.cross_entropy(model(inputs), targets).backward()
        sgd.step()
    trainer.train(everyone(trainer, 0))
    torch.testing.assert_close(trainer.params[2], trainer.layout.flatten(model), atol=1e-5, rtol=0)


class Averaging(nn.Module):
    """Keeps a moving average of its weights in a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.average = nn.Parameter(torch.zeros(3, 6), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.average.lerp_(self.fc.weight, 0.1)
        return self.fc(x)


def test_frozen_parameters_that_change_by_themselves_are_refused():
    with pytest.raises(UsageError, match=r"'average'.*changes in a step; register it as a buffer"):
        make(Averaging)
    draws = np.random.default_rng(1)

    def arbitrary():
        model = mlp()
        model[0].weight = nn.Parameter(torch.from_numpy(draws.random((8, 6), "float32")), requires_grad=False)
        return model

    with pytest.raises(UsageError, match=r"'0.weight'.*differs between two calls of model\(\)"):
        make(arbitrary)


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("build", [mlp, normed, Convolution, dropping])
def test_cuda_trains_as_the_cpu_does(build):
    on_cpu = make(build, batching="loop", optimizer=Optimizer("adam", {"lr": 0.01}))
    for batching in ("loop", "stacked", "auto"):
        trainer = make(build, batching=batching, device="cuda", optimizer=Optimizer("adam", {"lr": 0.01}))
        assert trainer.params.is_cuda
        before = torch.cuda.get_rng_state()
        losses = trainer.train(everyone(trainer, 0))
        assert torch.equal(torch.cuda.get_rng_state(), before)
        scores = evaluate(trainer, trainer.params, range(5), torch.arange(7))
        assert scores["loss"].device.type == "cpu"
        if build is not dropping:
            on_cpu.params.copy_(on_cpu.initial())
            fresh = make(build, batching="loop", optimizer=Optimizer("adam", {"lr": 0.01}))
            for node in on_cpu.nodes:
                on_cpu.load_state_(node, fresh.state(node))
            assert losses == pytest.approx(on_cpu.train(everyone(on_cpu, 0)), abs=1e-2)
            torch.testing.assert_close(trainer.params.cpu(), on_cpu.params, atol=1e-2, rtol=0)


# A process that holds some of the nodes


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("build", [Convolution, normed, dropping])
def test_nodes_get_the_same_bits_whoever_else_is_held(build, batching):
    options = {"batching": batching, "optimizer": Optimizer("adam", {"lr": 0.01})}
    if batching == "stacked":
        options["chunk"] = 3
    parts = dict(enumerate(parts_of(8)))
    whole = make(build, 8, **options)
    defaults = {"seed": 7, "local_steps": STEPS, "batch_size": 4, "device": "cpu", "num_nodes": 8}
    some = [
        Trainer(Toy(build), {node: parts[node] for node in nodes}, **defaults | options)
        for nodes in (range(3, 6), [0, 1, 2, 6, 7])
    ]
    for r in range(3):
        losses = whole.train(everyone(whole, r))
        for trainer in some:
            assert trainer.train(dict.fromkeys(trainer.nodes, r)) == {i: losses[i] for i in trainer.nodes}
    for trainer in some:
        scores = evaluate(trainer, trainer.params, trainer.nodes)
        expected = evaluate(whole, whole.params, whole.nodes)
        for row, node in enumerate(trainer.nodes):
            assert torch.equal(trainer.row(node), whole.row(node))
            assert torch.equal(trainer.params[row], whole.params[node])
            assert all(torch.equal(scores[name][row], values[node]) for name, values in expected.items())


def test_a_chunk_that_is_only_partly_here_is_refused():
    parts = dict(enumerate(parts_of(8)))
    rest = {"seed": 7, "local_steps": 1, "batch_size": 4, "optimizer": Optimizer(), "num_nodes": 8}
    with pytest.raises(UsageError, match=r'nodes 3 to 5 train as one stack.*train\.batching = "loop"'):
        Trainer(Toy(), {4: parts[4]}, batching="stacked", chunk=3, **rest)
    assert Trainer(Toy(), {4: parts[4]}, batching="loop", **rest).nodes == (4,)
    with pytest.raises(UsageError, match="nodes 4 to 4; expected 0 to 2"):
        Trainer(Toy(), {4: parts[4]}, **rest | {"num_nodes": 3})


@pytest.mark.parametrize("batching", ["loop", "stacked", "auto"])
def test_a_model_with_two_parameters_on_one_memory_is_refused(batching):
    def tied():
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        model[1].weight.data = model[0].weight.data[:3]
        return model

    with pytest.raises(UsageError, match=r"'0\.weight' and parameter '1\.weight' share memory|'1\.weight' and"):
        make(tied, batching=batching)


def test_a_model_that_is_made_once_is_refused():
    once = mlp()
    with pytest.raises(UsageError, match=r"task\.model\(\) returns the same Linear at each call"):
        make(lambda: once)


def test_parameters_of_another_generator_are_refused():
    draws = np.random.default_rng(1)

    def arbitrary():
        model = mlp()
        model[0].weight = nn.Parameter(torch.from_numpy(draws.random((8, 6), "float32")))
        return model

    with pytest.raises(
        UsageError, match=r"task\.model\(\) returns other parameters at each call; draw them from"
    ):
        make(arbitrary)


def test_a_trial_leaves_buffers_that_the_task_keeps_as_they_are():
    mean = torch.zeros(6)

    def build():
        model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
        model[0].running_mean = mean
        return model

    trainer = make(build, batching="auto")
    trainer.train(everyone(trainer, 0))
    assert not mean.any()
    assert trainer.state(0).buffers["0.running_mean"].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_in_torchscript_trains_as_its_module():
    def build():
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    found = []
    for own in (build, lambda: torch.jit.script(build())):
        trainer = make(own, batching="loop")
        trainer.train(everyone(trainer, 0))
        found.append(torch.cat([trainer.row(0), trainer.state(0).buffers["0.running_mean"]]))
    assert torch.allclose(*found, atol=1e-6)


def test_metrics_that_differ_between_batches_are_refused():
    class Wavering(Toy):
        def metrics(self, outputs, targets):
            found = super().metrics(outputs, targets)
            return found | {"few": found["loss"]} if len(targets) == 44 else found

    task = Wavering(samples=300)
    task.test = task.train  # 300 samples are tested in two batches
    trainer = Trainer(
        task, [np.arange(300)], seed=1, local_steps=1, batch_size=4, optimizer=Optimizer(), device="cpu"
    )
    with pytest.raises(UsageError, match=r"other metrics for some batches than for others: .*few"):
        evaluate(trainer, trainer.params, trainer.nodes)


@pytest.mark.parametrize("batching", ["loop", "stacked"])
@pytest.mark.parametrize("buffers", ["local", "shared"])
def test_one_norm_in_two_places_trains_as_in_torch_and_is_saved_under_both_names(batching, buffers):
    def build():
        norm = nn.BatchNorm1d(6)
        return nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 3))

    trainer = make(build, num_nodes=4, batching=batching, buffers=buffers)
    trainer.train(everyone(trainer, 0))
    row, local = trainer.row(1).clone(), trainer.state(1).buffers
    plain = build()
    plain.load_state_dict(trainer.layout.state_dict(row, local))
    assert int(plain[3].num_batches_tracked) == 2 * STEPS
    scores = evaluate(trainer, trainer.params, trainer.nodes)
    data = trainer._context.task.test
    expected = functional.cross_entropy(plain.eval()(data.inputs), data.targets)
    assert float(scores["loss"][1]) == pytest.approx(float(expected.detach()), rel=1e-5)


class Replacing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        self.inner.weight = nn.Parameter(self.inner.weight.detach().clone())
        return self.inner(x)


class Growing(Replacing):
    def forward(self, x):
        self.outer = nn.Linear(3, 3)
        return self.outer(self.inner(x))


@pytest.mark.parametrize(("build", "name"), [(Replacing, "inner.weight"), (Growing, "outer.weight")])
def test_a_model_that_makes_parameters_in_a_step_is_refused(build, name):
    with pytest.raises(UsageError, match=f"parameter '{name}' is replaced by another object in a step"):
        Trainer(Toy(build), [np.arange(30)], seed=1, local_steps=1, batch_size=4, optimizer=Optimizer())
