"""Contract of every task, from one table; loaders on tiny files; a user's own task."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import pickle
import re
import shutil
import sys
import unicodedata
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import evaluate
from jwins.errors import ConfigError, DataError, UsageError
from jwins.tasks import TASKS, Batch, Dataset, Task, make_task, movielens, own_task, parquet, source
from jwins.tasks.base import partition_labels_of
from jwins.tasks.partition import PARTITIONERS
from jwins.tasks.plays import bundled_plays, codes
from jwins.training.optimizer import Optimizer
from jwins.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWINS_DATA", str(tmp_path / "cache"))


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("the network is unreachable")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **o: unreachable())


# --- tiny files of the schemas that users have -------------------------------------------------------------


def image(rng: np.random.Generator, height: int, width: int, mode: str = "RGB") -> dict[str, Any]:
    Image = pytest.importorskip("PIL.Image")
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    packed = io.BytesIO()
    Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(packed, format="PNG")
    return {"bytes": packed.getvalue(), "path": None}


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def cifar10_files(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for split, n in (("train", 30), ("test", 10)):
        images = [image(rng, 32, 32) for _ in range(n)]
        name = f"plain_text/{split}-00000-of-00001.parquet"
        write_parquet(folder / name, {"img": images, "label": [i % 10 for i in range(n)]})


def femnist_files(folder: Path) -> None:
    rng = np.random.default_rng(2)
    for part in range(2):
        columns: dict[str, list[Any]] = {
            "image": [image(rng, 28, 28, "L") for _ in range(30)],
            "writer_id": [f"f{i % 3:04}_{part:02}" for i in range(30)],
            "hsf_id": [0] * 30,
            "character": [2 * i for i in range(30)],
        }
        write_parquet(folder / "data" / f"train-{part:05}-of-00002.parquet", columns)


def celeba_files(folder: Path) -> None:
    rng = np.random.default_rng(3)
    for number, split in enumerate(("train", "valid", "test")):
        columns: dict[str, list[Any]] = {
            "image": [image(rng, 109, 89) for _ in range(20)],
            "celeb_id": [5000 + 10 * number + i % 2 for i in range(20)],
            "Male": [True] * 20,
            "Smiling": [i % 3 == 0 for i in range(20)],
        }
        write_parquet(folder / f"img_align+identity+attr/{split}-00000-of-00001.parquet", columns)


def shakespeare_text(folder: Path) -> None:
    speeches = [
        f"{'AB'[i % 2]}ERTRAM:\nLine {i} has an end:\nwhich the next one tells, o é!\n" for i in range(24)
    ]
    (folder / "plays.txt").write_text("A stage.\n\n" + "\n".join(speeches), encoding="utf-8")
    (folder / "README.txt").write_text("NOT:\na play\n" * 100)


def shakespeare_files(folder: Path) -> None:
    texts = {
        "OTHELLO_Iago": "I am not what I am. " * 6,
        "HAMLET_Hamlet": "To be, or not to be, that is it. " * 5,
    }
    windows = [
        (role, text[i : i + 80], text[i + 80]) for role, text in texts.items() for i in range(len(text) - 80)
    ]
    roles, xs, ys = (list(column) for column in zip(*windows, strict=True))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", {"character_id": roles, "x": xs, "y": ys})


def movielens_files(folder: Path) -> None:
    rng = np.random.default_rng(4)
    (folder / "ml-latest-small").mkdir()
    with (folder / "ml-latest-small" / "ratings.csv").open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["userId", "movieId", "rating", "timestamp"])
        for user in (1, 2, 5, 9):
            for film in rng.permutation([1, 3, 6, 110, 193609, 47, 50, 70, 163, 223])[: 5 + user % 5]:
                writer.writerow([user, film, rng.integers(1, 11) / 2, 964982703])


@dataclass(frozen=True)
class Row:
    """A workload on tiny files, and what must come of it."""

    files: Callable[[Path], None] | None
    inputs: tuple[int, ...]  # of one sample, as stored
    dtype: torch.dtype
    sizes: tuple[int, int]  # of training and test samples
    parameters: int
    outputs: tuple[int, ...]  # of one sample
    owners: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stacks: bool = True  # torch.func.vmap has rules for all of the model


TABLE = {
    "digits": Row(None, (1, 8, 8), torch.uint8, (1437, 360), 12_010, (10,)),
    "digits, cnn": Row(None, (1, 8, 8), torch.uint8, (1437, 360), 6_186, (10,), options={"model": "cnn"}),
    "cifar10": Row(cifar10_files, (3, 32, 32), torch.uint8, (30, 10), 89_834, (10,)),
    "femnist": Row(femnist_files, (1, 28, 28), torch.uint8, (54, 6), 1_690_046, (62,), 6),
    "femnist, some": Row(femnist_files, (1, 28, 28), torch.uint8, (36, 4), 1_690_046, (62,), 4, {"writers": 4}),
    "celeba": Row(celeba_files, (3, 84, 84), torch.uint8, (54, 6), 30_242, (2,), 6),
    "celeba, some": Row(celeba_files, (3, 84, 84), torch.uint8, (18, 2), 30_242, (2,), 2, {"celebrities": 2}),
    "shakespeare": Row(shakespeare_text, (80,), torch.uint8, (948, 106), 824_425, (97,), 2, stacks=False),
    "shakespeare, parquet": Row(
        shakespeare_files, (80,), torch.uint8, (113, 12), 824_425, (97,), 2, stacks=False
    ),
    "shakespeare, some": Row(
        shakespeare_text, (80,), torch.uint8, (95, 11), 824_425, (97,), 1, {"roles": 1, "stride": 5}, False
    ),
    "gpt": Row(None, (64,), torch.uint8, (49400, 1370), 808_192, (64, 97), 8),
    "gpt, roles": Row(
        None,
        (16,),
        torch.uint8,
        (46887, 4986),
        16_000,
        (16, 97),
        481,
        {"owners": "role", "layers": 1, "heads": 2, "width": 32, "context": 16, "stride": 16},
    ),
    "gpt, own text": Row(
        shakespeare_text,
        (16,),
        torch.uint8,
        (326, 9),
        16_000,
        (16, 97),
        1,
        {"layers": 1, "heads": 2, "width": 32, "context": 16},
    ),
    "movielens": Row(movielens_files, (2,), torch.int64, (18, 9), (4 + 10) * 20, (), 4),
}


def build(row: str, folder: Path) -> Task:
    files = TABLE[row].files
    if files is None:
        return make_task(row.split(",")[0], options=TABLE[row].options)
    if not (folder / "data").exists():
        (folder / "data").mkdir(parents=True)
        files(folder / "data")
    return make_task(row.split(",")[0], options=TABLE[row].options, data=folder / "data")


def first(data: Dataset, n: int) -> Batch:
    return Batch(data.inputs[:n], data.targets[:n])


def equal(a: Dataset, b: Dataset) -> bool:
    keys = a.keys is b.keys or np.array_equal(a.keys, b.keys)
    return keys and torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_table_has_every_task() -> None:
    assert {row.split(",")[0] for row in TABLE} == set(TASKS)


@pytest.mark.parametrize("row", TABLE)
class TestEveryTask:
    def test_data_and_model_are_as_documented(self, row: str, tmp_path: Path) -> None:
        task, expected = build(row, tmp_path), TABLE[row]
        assert task.name == row.split(",")[0]
        assert (len(task.train), len(task.test)) == expected.sizes
        for data in (task.train, task.test):
            assert data.inputs.shape[1:] == expected.inputs
            assert data.inputs.dtype == expected.dtype
            assert (data.keys is None) == (expected.owners is None)
        if task.train.keys is not None:
            assert len(np.unique(task.train.keys)) == expected.owners
            assert set(task.test.keys.tolist()) <= set(task.train.keys.tolist())
        model = task.model()
        assert sum(p.numel() for p in model.parameters()) == expected.parameters
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert not list(model.buffers())
        assert model(task.prepare(task.test.inputs[:2])).shape == (2, *expected.outputs)

    def test_training_and_test_samples_are_different(self, row: str, tmp_path: Path) -> None:
        task = build(row, tmp_path)
        if row.startswith(("shakespeare", "gpt")):
            return  # characters are common; test_shakespeare_* and test_gpt_* look at the texts
        samples = [
            (inputs.numpy().tobytes(), key)
            for data in (task.train, task.test)
            for inputs, key in zip(
                data.inputs, data.keys if data.keys is not None else data.targets, strict=True
            )
        ]
        assert len(set(samples)) == len(samples)

    def test_deterministic(self, row: str, tmp_path: Path) -> None:
        one, again = build(row, tmp_path), build(row, tmp_path)
        assert equal(one.train, again.train)
        assert equal(one.test, again.test)
        states = []
        for task in (one, again):
            torch.manual_seed(5)
            states.append(task.model().state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def test_building_does_not_move_global_streams(self, row: str, tmp_path: Path) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        build(row, tmp_path)
        assert torch.equal(torch.rand(3), expected)

    def test_loss_and_metrics(self, row: str, tmp_path: Path) -> None:
        task = build(row, tmp_path)
        torch.manual_seed(1)
        model, batch = task.model(), first(task.train, 4)
        before = [tensor.clone() for tensor in batch]
        loss = task.loss(model, batch, None)
        assert loss.shape == ()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        with torch.no_grad():
            outputs = model(task.prepare(batch.inputs))
            metrics = task.metrics(outputs, batch.targets)
        assert {"accuracy", "loss"} <= set(metrics)
        assert all(values.shape == (4,) and values.dtype == torch.float32 for values in metrics.values())
        # The reported loss is the one that is trained, on the same samples.
        torch.testing.assert_close(metrics["loss"].mean(), loss.detach())
        assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))

    def test_works_for_many_nodes_at_once(self, row: str, tmp_path: Path) -> None:
        if not TABLE[row].stacks:
            pytest.skip("torch.func has no batching rule for LSTMs: such nodes are trained one by one")
        task = build(row, tmp_path)
        torch.manual_seed(1)
        models = [task.model() for _ in range(2)]
        batches = [first(task.train, 4), Batch(task.train.inputs[4:8], task.train.targets[4:8])]
        params, _ = torch.func.stack_module_state(models)
        stacked = Batch(*(torch.stack(tensors) for tensors in zip(*batches, strict=True)))

        def loss(own: dict[str, torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return task.loss(
                lambda x: torch.func.functional_call(models[0], own, (x,)), Batch(inputs, targets), None
            )

        together = torch.func.vmap(loss)(params, *stacked)
        apart = torch.stack([task.loss(m, b, None) for m, b in zip(models, batches, strict=True)])
        torch.testing.assert_close(together, apart)

    def test_picklable(self, row: str, tmp_path: Path) -> None:
        task = build(row, tmp_path)
        copy = pickle.loads(pickle.dumps(task))
        assert equal(copy.train, task.train)
        assert type(copy) is type(task)

    @pytest.mark.parametrize("kind", ["iid", "contiguous", "shards", "dirichlet", "by_key"])
    def test_can_be_partitioned(self, row: str, kind: str, tmp_path: Path) -> None:
        task = build(row, tmp_path)
        labels, keys = task.partition_labels(), task.train.keys
        assert (labels is None) == row.startswith(("movielens", "gpt"))
        if (labels is None and kind in ("shards", "dirichlet")) or (keys is None and kind == "by_key"):
            return
        num_nodes = min(2, TABLE[row].owners or 2)
        parts = PARTITIONERS[kind]().split(
            num_samples=len(task.train),
            num_nodes=num_nodes,
            labels=labels,
            keys=keys,
            rng=np.random.default_rng(1),
        )
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(task.train)))


# --- what the workloads promise on their own ---------------------------------------------------------------


def test_digits_are_divided_class_by_class() -> None:
    task = make_task("digits")
    assert np.bincount(task.test.targets.numpy()).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    prepared = task.prepare(task.train.inputs)
    assert abs(prepared.mean()) < 0.01
    assert abs(prepared.std() - 1) < 0.01


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_digits_can_be_learnt(model: str) -> None:
    task = make_task("digits", options={"model": model})
    torch.manual_seed(0)
    net = task.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for order in torch.stack([torch.randperm(1437)[:1424] for _ in range(3)]).reshape(-1, 16):
        optimizer.zero_grad()
        task.loss(net, Batch(task.train.inputs[order], task.train.targets[order]), None).backward()
        optimizer.step()
    outputs = net(task.prepare(task.test.inputs))
    assert task.metrics(outputs, task.test.targets)["accuracy"].mean() > 0.9


def test_images_keep_their_pixels_and_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)  # as cifar10_files draws them
    expected = torch.from_numpy(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).permute(2, 0, 1)
    task = build("cifar10", tmp_path)
    assert torch.equal(task.train.inputs[0], expected)
    assert task.train.targets.tolist() == [i % 10 for i in range(30)]
    prepared = task.prepare(task.train.inputs)
    assert torch.equal(prepared, task.train.inputs.float() / 127.5 - 1.0)
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert task.prepare(ends).flatten().tolist() == [-1.0, 1.0]


def test_labels_and_owners_stay_with_their_images(tmp_path: Path) -> None:
    task = build("femnist", tmp_path)
    again = {}
    rng = np.random.default_rng(2)  # as femnist_files draws them
    for part in range(2):
        for i in range(30):
            pixels = rng.integers(256, size=(28, 28), dtype=np.uint8)
            again[pixels.tobytes()] = (
                2 * i,
                (i % 3) * 2 + part,
            )  # writers by name: f0000_00, f0000_01, f0001_00…
    for data in (task.train, task.test):
        for pixels, label, key in zip(data.inputs, data.targets.tolist(), data.keys, strict=True):
            assert again[pixels.numpy().tobytes()] == (label, key)


def test_movielens_metrics_are_those_of_the_authors() -> None:
    outputs = torch.tensor([3.2, 3.3, 7.0, -1.0, 4.0])
    targets = torch.tensor([3.0, 3.0, 5.0, 0.5, 3.5])
    metrics = movielens.MovieLens.metrics(None, outputs, targets)  # type: ignore[arg-type]
    assert metrics["accuracy"].tolist() == [1, 0, 1, 1, 0]
    assert metrics["within_half_star"].tolist() == [1, 1, 1, 1, 1]
    torch.testing.assert_close(metrics["squared_error"], torch.tensor([0.04, 0.09, 0.0, 0.0, 0.25]))
    torch.testing.assert_close(metrics["loss"], torch.tensor([0.04, 0.09, 4.0, 2.25, 0.25]))


def test_movielens_splits_each_users_ratings(tmp_path: Path) -> None:
    task = build("movielens", tmp_path)
    for user, ratings in enumerate((6, 7, 5, 9)):
        tested = int((task.test.keys == user).sum())
        assert tested == round(0.3 * ratings)
        assert int((task.train.keys == user).sum()) == ratings - tested
        assert (task.test.inputs[task.test.keys == user, 0] == user).all()


def decode(codes: torch.Tensor) -> str:
    return "".join(("\n" + "".join(map(chr, range(32, 127))) + "*")[code] for code in codes.tolist())


def test_shakespeare_joins_a_roles_speeches(tmp_path: Path) -> None:
    task = build("shakespeare", tmp_path)
    said = "".join(f"Line {i} has an end:\nwhich the next one tells, o *!\n" for i in range(0, 24, 2))
    texts = [
        decode(torch.cat([x, y[None]])) for x, y in zip(task.train.inputs, task.train.targets, strict=True)
    ]
    of_first = [text for text, key in zip(texts, task.train.keys, strict=True) if key == 0]
    assert of_first == [said[i : i + 81] for i in range(len(of_first))]


TINY_GPT = {"layers": 1, "heads": 2, "width": 32, "context": 16}


def test_gpt_predicts_each_next_character_and_is_tested_on_the_end_of_each_play() -> None:
    task = make_task("gpt", options=TINY_GPT | {"stride": 16})
    plays = [codes(play) for play in bundled_plays()]
    assert len(plays) == 8
    for number, play in enumerate(plays):
        cut = len(play) - round(0.1 * len(play))
        for data, text in ((task.train, play[:cut]), (task.test, play[cut:])):
            rows = np.flatnonzero(data.keys == number)
            pieces = data.inputs[rows].numpy().reshape(-1)
            np.testing.assert_array_equal(pieces, text[: len(pieces)])
            np.testing.assert_array_equal(data.targets[rows].numpy().reshape(-1), text[1 : len(pieces) + 1])
            assert len(text) - len(pieces) <= 16


def test_gpt_sees_no_later_character() -> None:
    model = make_task("gpt", options=TINY_GPT).model().eval()
    text = torch.arange(16)[None]
    changed = text.clone()
    changed[0, 9:] += 40
    with torch.no_grad():
        before, after = model(text), model(changed)
    torch.testing.assert_close(before[0, :9], after[0, :9])
    assert (before[0, 9] - after[0, 9]).abs().max() > 1e-4
    assert model.characters.weight.shape == (97, 32)  # which also predicts: there is no second matrix


def test_gpt_reports_bits_and_perplexity_of_the_whole_test_set() -> None:
    task = make_task("gpt", options=TINY_GPT)
    parts = PARTITIONERS["contiguous"]().split(
        num_samples=len(task.train), num_nodes=4, labels=None, keys=None, rng=np.random.default_rng(1)
    )
    optimizer = Optimizer("adamw", {"lr": 3e-3})
    trainers = {
        batching: Trainer(
            task,
            parts,
            seed=1,
            local_steps=20,
            batch_size=16,
            optimizer=optimizer,
            batching=batching,
            device="cpu",
        )
        for batching in ("auto", "loop")
    }
    assert trainers["auto"].batching == "stacked", trainers["auto"].reason
    found = {}
    for batching, trainer in trainers.items():
        before = evaluate(trainer, trainer.params[:1], [0], torch.arange(200))
        trainer.train(dict.fromkeys(range(4), 0))
        trainer.train(dict.fromkeys(range(4), 1))
        found[batching] = evaluate(trainer, trainer.params, list(range(4)), torch.arange(200))
        assert float(found[batching]["loss"].max()) < 0.8 * float(before["loss"])
        torch.testing.assert_close(found[batching]["perplexity"], found[batching]["loss"].exp())
        bits = found[batching]["loss"] / np.log(2.0)
        torch.testing.assert_close(found[batching]["bits_per_character"], bits, atol=1e-5, rtol=0)
    for name, values in found["loop"].items():
        torch.testing.assert_close(found["auto"][name], values, atol=2e-2, rtol=1e-2)
    assert {"bits_per_character": "lower", "perplexity": "lower"}.items() <= type(task).directions().items()


def test_gpt_takes_any_text_and_refuses_what_is_none(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("No play, but a long enough text. " * 30, encoding="utf-8")
    assert len(make_task("gpt", options=TINY_GPT, data=text).train) > 100
    with pytest.raises(DataError, match=r"gpt: .*book.txt: no speech; expected lines such as 'HAMLET:'"):
        make_task("gpt", options=TINY_GPT | {"owners": "role"}, data=text)
    text.write_text("Short.", encoding="utf-8")
    with pytest.raises(DataError, match="no play has enough text for pieces of 16 characters and a test"):
        make_task("gpt", options=TINY_GPT, data=text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"gpt: .*empty is neither a text nor a folder with \*.txt"):
        make_task("gpt", data=tmp_path / "empty")


@pytest.mark.parametrize("row", ["shakespeare", "shakespeare, parquet"])
def test_shakespeare_never_trains_on_a_character_it_is_tested_on(row: str, tmp_path: Path) -> None:
    task = build(row, tmp_path)
    for role in np.unique(task.test.keys):
        own = task.train.inputs[task.train.keys == role]
        tested = task.test.inputs[task.test.keys == role]
        whole = torch.cat([own[:, 0], tested[:, 0], tested[-1, 1:]])  # sequences follow each other one by one
        last = [*own[-1].tolist(), int(task.train.targets[task.train.keys == role][-1])]
        assert whole[len(own) - 1 : len(own) + 80].tolist() == last
        assert tested[0].tolist() == last[1:]


# --- where data come from ----------------------------------------------------------------------------------


def test_images_are_decoded_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = build("cifar10", tmp_path)
    kept = list((tmp_path / "cache" / "decoded").iterdir())
    assert [path.suffix for path in kept] == [".safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "decode_image", None)
        assert equal(build("cifar10", tmp_path).train, task.train)
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        assert equal(make_task("cifar10", data=tmp_path / "elsewhere").train, task.train)
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # damaged
    assert equal(make_task("cifar10", data=tmp_path / "elsewhere").train, task.train)
    train = next((tmp_path / "elsewhere").rglob("train*"))
    write_parquet(train, {"img": [image(np.random.default_rng(9), 32, 32)], "label": [3]})
    assert len(make_task("cifar10", data=tmp_path / "elsewhere").train) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JWINS_DATA", str(tmp_path / "file"))
    assert len(build("cifar10", tmp_path).train) == 30


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"JWINS_DATA": "/data"}, "/data"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/jwins"),
        ("linux", {}, "/home/me/.cache/jwins"),
        ("darwin", {}, "/home/me/Library/Caches/jwins"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/jwins/Cache"),
    ],
)
def test_cache_stands_where_the_platform_has_it(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JWINS_DATA", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert source.cache_folder() == Path(expected)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("digits", "gpt")])
class TestWithoutData:
    def test_no_network_and_no_folder(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=f"{name}: no data, and the download") as caught:
            make_task(name)
        assert "https://" in str(caught.value)
        assert "--data" in str(caught.value)
        assert not list(tmp_path.rglob("partial-*"))

    def test_folder_without_the_files(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=re.escape(str(tmp_path))) as caught:
            make_task(name, data=tmp_path)
        assert "https://" in str(caught.value)

    def test_no_such_folder(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="nowhere"):
            make_task(name, data=tmp_path / "nowhere")


def test_hub_download_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    cifar10_files(tmp_path / "hub")
    asked = []

    def download(repo: str, *, local_dir: Path, **options: object) -> None:
        asked.append((repo, options))
        shutil.copytree(tmp_path / "hub", local_dir, dirs_exist_ok=True)
        if len(asked) == 1:
            next(local_dir.rglob("test*")).unlink()
            raise ConnectionError("broken off")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(DataError, match=r"failed \(broken off\)"):
        make_task("cifar10")
    downloaded, again = make_task("cifar10"), make_task("cifar10")
    assert asked == 2 * [("uoft-cs/cifar10", {"repo_type": "dataset", "allow_patterns": "*.parquet"})]
    assert equal(downloaded.train, make_task("cifar10", data=tmp_path / "hub").train)
    assert equal(downloaded.train, again.train)
    assert not list(tmp_path.rglob("*partial*"))


def test_the_hub_is_asked_as_it_understands() -> None:
    """The stand-in above takes any argument; the real function must know these."""
    hub = pytest.importorskip("huggingface_hub")
    known = inspect.signature(hub.snapshot_download).parameters
    assert {"repo_id", "repo_type", "allow_patterns", "local_dir"} <= set(known)
    assert next(iter(known)) == "repo_id"


def zipped(path: Path, member: str, text: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, text)
    return path


RATINGS = "userId,movieId,rating,timestamp\n" + "".join(f"1,{film},4.0,0\n" for film in range(1, 6))


def test_zip_download_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "small.zip", "ml-latest-small/ratings.csv", RATINGS)
    monkeypatch.setattr(movielens, "URL", archive.as_uri())
    assert len(make_task("movielens").train) == 3  # of five; 30 % are 1.5, rounded to even: two for testing
    archive.unlink()
    assert len(make_task("movielens").train) == 3


class Broken(io.BytesIO):
    """A response that ends early."""

    headers = {"Content-Length": "1000"}  # noqa: RUF012


@pytest.mark.parametrize("case", ["broken off", "not a zip", "another zip", "404"])
def test_bad_downloads_are_not_kept(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def response(*args: object, **options: object) -> io.BytesIO:
        if case == "404":
            raise urllib.error.HTTPError("https://x", 404, "Not Found", None, None)  # type: ignore[arg-type]
        content = b"<html>" if case != "another zip" else zipped(tmp_path / "a.zip", "b", "c").read_bytes()
        opened = Broken(content)
        if case != "broken off":
            opened.headers = {"Content-Length": str(len(content))}
        return opened

    monkeypatch.setattr("urllib.request.urlopen", response)
    with pytest.raises(DataError, match="--data") as caught:
        make_task("movielens")
    if case == "broken off":
        assert "after 6 of 1000 bytes" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.csv"))


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("cifar10", lambda d: next(d.rglob("train*")).write_bytes(b"PAR1"), "cannot be read as parquet"),
        ("cifar10", lambda d: write_parquet(next(d.rglob("test*")), {"img": [1]}), "has no column 'label'"),
        ("cifar10", lambda d: next(d.rglob("test*")).unlink(), "has no test-*.parquet"),
        (
            "cifar10",
            lambda d: write_parquet(next(d.rglob("test*")), {"img": [{"bytes": b"x"}], "label": [1]}),
            "an image cannot be decoded",
        ),
        (
            "cifar10",
            lambda d: write_parquet(next(d.rglob("test*")), {"img": [{"bytes": b"x"}], "label": [10]}),
            "'label' is 0 to 9",
        ),
        ("femnist", lambda d: (d / "data/train-00001-of-00002.parquet").unlink(), "lacks train-00001-of-00002"),
        (
            "shakespeare, parquet",
            lambda d: write_parquet(next(d.rglob("train*")), {"character_id": ["a"], "x": ["b"], "y": ["c"]}),
            "x of 80 characters",
        ),
        ("shakespeare", lambda d: (d / "plays.txt").write_text("Once upon a time"), "no speech; expected"),
        ("shakespeare", lambda d: (d / "plays.txt").write_bytes(b"\xff"), "UTF-8"),
        ("shakespeare", lambda d: (d / "plays.txt").write_text("A:\nToo short.\n"), "no role has enough text"),
        (
            "movielens",
            lambda d: next(d.rglob("*.csv")).write_text("a,b\n1,2\n"),
            "line 1: 'userId' is not in list",
        ),
        (
            "movielens",
            lambda d: next(d.rglob("*.csv")).write_text(RATINGS.replace("timestamp", "rating")),
            "line 1: 2 columns 'rating'; keep one",
        ),
        ("movielens", lambda d: next(d.rglob("*.csv")).write_text(RATINGS + "1,7,x,0\n"), "line 7: could not"),
        (
            "movielens",
            lambda d: next(d.rglob("*.csv")).write_text(RATINGS + "1,7,6.0,0\n"),
            "line 7: a rating of",
        ),
        ("movielens", lambda d: next(d.rglob("*.csv")).write_text(RATINGS + "1,7\n"), "line 7: "),
        ("movielens", lambda d: next(d.rglob("*.csv")).write_text(RATINGS[:32]), "holds no ratings"),
        ("movielens", lambda d: next(d.rglob("*.csv")).write_text(RATINGS[:42]), "no user has two"),
        ("movielens", lambda d: (d / "ratings.csv").write_text(RATINGS), "several ratings.csv"),
    ],
)
def test_damaged_data_are_refused(
    name: str, damage: Callable[[Path], object], problem: str, tmp_path: Path
) -> None:
    files = TABLE[name].files
    assert files is not None
    files(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        make_task(name.split(",")[0], data=tmp_path)
    assert problem in str(caught.value)


def copied(pattern: str, to: str) -> Callable[[Path], object]:
    """Makes a copy of the first file of a pattern, named from its folder; ``{}`` is the file's own stem."""

    def copy(folder: Path) -> None:
        file = sorted(folder.rglob(pattern))[0]
        target = file.parent / to.format(file.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)

    return copy


@pytest.mark.parametrize(
    "to",
    [
        "{} (1).parquet",
        "{}(2).parquet",
        "{} - Copy.parquet",
        "{} copy 2.parquet",
        "{}.bak.parquet",
        "{}_old.parquet",
        "train-again.parquet",
        "backup/{}.parquet",
        "backup/train-again.parquet",
    ],
)
@pytest.mark.parametrize("same", [True, False], ids=["same bytes", "other bytes"])
@pytest.mark.parametrize("name", ["cifar10", "femnist", "celeba", "shakespeare, parquet"])
def test_data_are_never_read_twice(name: str, same: bool, to: str, tmp_path: Path) -> None:
    files = TABLE[name].files
    assert files is not None
    files(tmp_path)
    originals = set(tmp_path.rglob("train*.parquet"))
    copied("train*.parquet", to)(tmp_path)
    copies = sorted(tmp_path.rglob("train*.parquet"))
    if not same:  # as if it were written by another version of a library
        pq = pytest.importorskip("pyarrow.parquet")
        other = next(path for path in copies if path not in originals)
        pq.write_table(pq.read_table(other), other, compression="gzip")
    with pytest.raises(DataError, match="the samples would be read twice") as caught:
        make_task(name.split(",")[0], data=tmp_path)
    assert sum(str(path) in str(caught.value) for path in copies) >= 2


@pytest.mark.parametrize("to", ["train-0 (1).parquet", "more/train-0.parquet", "train-1.parquet"])
def test_files_without_shard_numbers_are_not_read_twice_either(to: str, tmp_path: Path) -> None:
    cifar10_files(tmp_path)
    train = next(tmp_path.rglob("train*"))
    train = train.rename(train.with_name("train-0.parquet"))
    copied("train*", to)(tmp_path)
    with pytest.raises(DataError, match="read twice") as caught:
        make_task("cifar10", data=tmp_path)
    assert str(train) in str(caught.value)
    assert str(train.parent / to) in str(caught.value)


def test_files_without_shard_numbers_are_read_together(tmp_path: Path) -> None:
    cifar10_files(tmp_path)
    train = next(tmp_path.rglob("train*"))
    train.rename(train.with_name("train-0.parquet"))
    images = [image(np.random.default_rng(8), 32, 32) for _ in range(5)]
    write_parquet(train.with_name("train-1.parquet"), {"img": images, "label": [1] * 5})
    assert len(make_task("cifar10", data=tmp_path).train) == 35


@pytest.mark.parametrize(
    ("name", "source", "to"),
    [
        ("cifar10", "train-00000-of-00001", "test-00000-of-00001"),
        ("cifar10", "train-00000-of-00001", "train-1"),
        ("femnist", "train-00000-of-00002", "train-00001-of-00002"),
        ("celeba", "train-00000-of-00001", "valid-00000-of-00001"),
        ("shakespeare, parquet", "train-00000-of-00001", "train-1"),
    ],
)
@pytest.mark.parametrize("rows", ["same bytes", "compressed", "backwards", "most of them"])
def test_rows_are_never_read_twice(name: str, source: str, to: str, rows: str, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    TABLE[name].files(tmp_path)  # type: ignore[misc]
    file = next(tmp_path.rglob(f"{source}.parquet"))
    if to == "train-1":  # not one of a numbered set
        file = file.rename(file.with_stem("train-0"))
    table = pq.read_table(file)
    if rows == "backwards":
        table = table.take(list(range(len(table)))[::-1])
    elif rows == "most of them":
        table = table.slice(0, len(table) - 2)
    other = next(tmp_path.rglob(f"{to}.parquet"), file.with_stem(to))
    if rows == "same bytes":
        shutil.copy(file, other)
    else:
        pq.write_table(table, other, compression="gzip", row_group_size=7)
    with pytest.raises(DataError, match=r"read twice, from .*parquet and .*parquet") as caught:
        make_task(name.split(",")[0], data=tmp_path)
    assert str(file) in str(caught.value)
    assert str(other) in str(caught.value)


def test_a_file_of_images_may_repeat_some_of_another(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    femnist_files(tmp_path)
    first, other = (pq.read_table(file) for file in sorted(tmp_path.rglob("train*")))
    pq.write_table(pa.concat_tables([first.slice(0, 15), other]), sorted(tmp_path.rglob("train*"))[1])
    task = make_task("femnist", data=tmp_path)
    assert len(task.train) + len(task.test) == 75


def test_a_few_equal_samples_do_not_make_a_file_a_copy(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    femnist_files(tmp_path)
    first, other = sorted(tmp_path.rglob("train*"))
    table = pq.read_table(first)
    pq.write_table(pa.concat_tables([table, *[table.slice(0, 1)] * 20]), first)  # as often blank
    pq.write_table(pa.concat_tables([table.slice(0, 1)] * 20), other)
    task = make_task("femnist", data=tmp_path)
    assert len(task.train) + len(task.test) == len(table) + 40


@pytest.mark.parametrize("name", ["shakespeare", "gpt"])
@pytest.mark.parametrize("change", ["line ends", "byte order mark", "encoding of accents", "joined"])
def test_texts_are_not_read_twice_either(name: str, change: str, tmp_path: Path) -> None:
    shakespeare_text(tmp_path)
    text = (tmp_path / "plays.txt").read_text(encoding="utf-8")
    other = {
        "line ends": text.replace("\n", "\r\n"),
        "byte order mark": "\ufeff" + text,
        "encoding of accents": unicodedata.normalize("NFD", text),
        "joined": text + "\n" + text.replace("B", "C").replace("Line", "A line"),
    }[change]
    (tmp_path / "all.txt").write_bytes(other.encode())
    with pytest.raises(DataError, match=r"read twice, from .*all.txt and .*plays.txt"):
        make_task(name, data=tmp_path)


@pytest.mark.parametrize("to", ["{} (1).txt", "backup/{}.txt", "again.txt"])
def test_plays_are_not_read_twice(to: str, tmp_path: Path) -> None:
    shakespeare_text(tmp_path)
    copied("plays.txt", to)(tmp_path)
    with pytest.raises(DataError, match=r"read twice, from .*txt and .*txt"):
        make_task("shakespeare", data=tmp_path)


def test_plays_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    for folder, said in (("a", "one "), ("b", "two ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "play.txt").write_text(f"ANNA:\n{said * 50}")
    assert len(np.unique(make_task("shakespeare", data=tmp_path).train.keys)) == 2


# --- cells of a wrong type ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column", "cells", "problem"),
    [
        ("femnist", "writer_id", [None], "row 3 (the first is 0): the cell is empty"),
        ("femnist", "writer_id", [b"f1"] * 30, "row 0 (the first is 0): plain bytes, 2 of them"),
        ("femnist", "writer_id", [float(i) for i in range(30)], "row 0 (the first is 0): float 0.0"),
        ("femnist", "writer_id", [True] * 30, "row 0 (the first is 0): bool True"),
        ("femnist", "writer_id", [["f1"]] * 30, "row 0 (the first is 0): list ['f1']"),
        ("femnist", "writer_id", list(range(30)), "row 0 (the first is 0): int 0"),  # the other file has text
        ("femnist", "character", [None], "row 3 (the first is 0): the cell is empty"),
        ("femnist", "character", [62], "row 3 (the first is 0): int 62"),
        ("femnist", "character", [-1], "row 3 (the first is 0): int -1"),
        ("femnist", "character", ["a"] * 30, "row 0 (the first is 0): str 'a'"),
        ("femnist", "character", [1.0] * 30, "row 0 (the first is 0): float 1.0"),
        ("femnist", "image", [None], "row 3 (the first is 0): the cell is empty"),
        ("femnist", "image", [b"PNG"] * 30, "row 0 (the first is 0): plain bytes, 3 of them"),
        ("femnist", "image", [{"path": "x.png"}] * 30, "row 0 (the first is 0): dict"),
        ("femnist", "image", [{"bytes": b"PNG"}] * 30, "an image cannot be decoded"),
        (
            "celeba",
            "celeb_id",
            [2**63 + i for i in range(20)],
            "row 0 (the first is 0): int 9223372036854775808",
        ),
        ("celeba", "celeb_id", [None], "row 3 (the first is 0): the cell is empty"),
        ("celeba", "Smiling", [None], "row 3 (the first is 0): the cell is empty"),
        ("celeba", "Smiling", ["yes"] * 20, "row 0 (the first is 0): str 'yes'"),
        ("cifar10", "img", [[1, 2]] * 30, "row 0 (the first is 0): list [1, 2]"),
        ("cifar10", "label", [None], "row 3 (the first is 0): the cell is empty"),
        ("shakespeare, parquet", "character_id", [None], "row 3 (the first is 0): the cell is empty"),
        ("shakespeare, parquet", "x", [None], "row 3 (the first is 0): the cell is empty"),
        ("shakespeare, parquet", "x", ["short"], "row 3 (the first is 0): str 'short'"),
        ("shakespeare, parquet", "y", [None], "row 3 (the first is 0): the cell is empty"),
        ("shakespeare, parquet", "y", [""], "row 3 (the first is 0): str ''"),
        ("shakespeare, parquet", "y", list(range(125)), "row 0 (the first is 0): int 0"),
        ("shakespeare, parquet", "y", "not UTF-8", "row 3 (the first is 0): a string that cannot be read"),
    ],
)
def test_wrong_cells_are_named(name: str, column: str, cells: Any, problem: str, tmp_path: Path) -> None:
    """One cell takes the place of the fourth, a list that of all."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = TABLE[name].files
    assert files is not None
    files(tmp_path)
    file = sorted(tmp_path.rglob("train*"))[-1]
    columns = pq.read_table(file).to_pydict()
    if cells == "not UTF-8":
        encoded = [text.encode() for text in columns[column]]
        encoded[3] = b"\xe9"
        columns[column] = pa.Array.from_buffers(
            pa.utf8(), len(encoded), pa.array(encoded, pa.binary()).buffers()
        )
    elif len(cells) == 1:
        columns[column][3] = cells[0]
    else:
        columns[column] = pa.array(cells, pa.uint64()) if cells[0] == 2**63 else cells
    write_parquet(file, columns)
    with pytest.raises(DataError) as caught:
        make_task(name.split(",")[0], data=tmp_path)
    assert f"{file}, column {column!r}, row " in str(caught.value)
    assert problem in str(caught.value)


def test_a_row_is_counted_in_its_file_through_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 7)
    assert len(build("femnist", tmp_path / "good").train) == 54
    femnist_files(tmp_path / "bad")
    file = tmp_path / "bad" / "data" / "train-00001-of-00002.parquet"
    columns = pytest.importorskip("pyarrow.parquet").read_table(file).to_pydict()
    columns["image"][24] = {"bytes": b"PNG", "path": None}
    write_parquet(file, columns)
    with pytest.raises(DataError, match=re.escape(f"{file}, column 'image', row 24 (")):
        make_task("femnist", data=tmp_path / "bad")


@pytest.mark.parametrize("name", ["femnist", "celeba"])
def test_owners_with_few_images_cannot_be_tested(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for split in ("train", "valid", "test"):
        columns = {
            "image": [image(rng, 28, 28) for _ in range(5)],
            "writer_id": [split] * 5,
            "celeb_id": [split] * 5,
            "character": [1] * 5,
            "Smiling": [True] * 5,
        }
        write_parquet(tmp_path / f"{split}-0.parquet", columns)
    for _ in range(2):  # what is kept in the cache is refused as well
        with pytest.raises(DataError, match=f"{name}: every owner has fewer than six images"):
            make_task(name, data=tmp_path)


@pytest.mark.parametrize(
    ("line", "number", "problem"),
    [
        (b"", 7, "line 7: a blank line; expected"),
        (b"caf\xe9,1,3,1", 7, "line 7: the byte 0xe9 is not UTF-8"),
        (b"1,7,3,\xff", 7, "line 7: the byte 0xff is not UTF-8"),
        (b"1,7,3.5", 7, "line 7: 3 fields, but the header has 4"),
        (b"1,7,3,5,0", 7, "line 7: 5 fields, but the header has 4"),
        (b"x,7,3,0", 7, "line 7: 'x' in column userId is not a whole number"),
        (b"1,7.0,3,0", 7, "line 7: '7.0' in column movieId is not a whole number"),
        (b"1_0,7,3,0", 7, "line 7: '1_0' in column userId is not a whole number"),
        (b"1,,3,0", 7, "line 7: '' in column movieId is not a whole number"),
        (b"1,7,,0", 7, "line 7: could not read '' in column rating"),
        (b"1,7,nan,0", 7, "line 7: a rating of nan"),
        (b"9223372036854775808,7,3,0", 7, "line 7: 9223372036854775808 in column userId does not fit"),
        (b"1,-9223372036854775809,3,0", 7, "line 7: -9223372036854775809 in column movieId does not fit"),
        (b"1,5,3,0", 7, "line 7: a second rating of movieId 5 by userId 1, after that in line 6;"),
        (b'1,7,"3,0', 7, "line 7: a quotation mark that is not closed"),
        (b'1,7,3,"0', 7, "line 7: a quotation mark that is not closed"),
        (b'1,7,3,"0\n1,8,3,0"', 7, "line 7: a quotation mark that is not closed"),
        (b'1,7,3,"' + 50_000 * b"0,0\n", 7, "line 7: a quotation mark that is not closed"),
    ],
)
@pytest.mark.parametrize("after", [b"", b"\n", b"\n2,1,3,0\n2,2,3,0\n"], ids=["end", "last", "middle"])
def test_a_wrong_line_of_ratings_is_named(
    line: bytes, number: int, problem: str, after: bytes, tmp_path: Path
) -> None:
    if not line and not after:
        return  # a file may end in a line break
    (tmp_path / "ratings.csv").write_bytes(RATINGS.encode() + line + after)
    with pytest.raises(DataError) as caught:
        make_task("movielens", data=tmp_path)
    assert problem in str(caught.value)
    assert str(tmp_path / "ratings.csv") in str(caught.value)


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    for name, file, text in (
        ("movielens", "ratings.csv", RATINGS),
        ("shakespeare", "play.txt", "\n\n".join(f"{role}:\n{role * 100}" for role in ("ANNA", "BERT"))),
    ):
        tasks = []
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / encoding).mkdir(exist_ok=True)
            (tmp_path / encoding / file).write_text(text, encoding=encoding)
            tasks.append(make_task(name, data=tmp_path / encoding / file))
        assert equal(tasks[0].train, tasks[1].train)
        assert equal(tasks[0].test, tasks[1].test)


def test_a_byte_order_mark_between_joined_plays_is_no_part_of_a_name(tmp_path: Path) -> None:
    plays = (f"\ufeff{role}:\n{role * 100}\n\n" for role in ("ANNA", "BERT", "ANNA"))
    (tmp_path / "play.txt").write_text("".join(plays), encoding="utf-8")
    assert len(np.unique(make_task("shakespeare", data=tmp_path).train.keys)) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("ÉLISE", "ÅSA"),
        ("1ST LORD", "2ND LORD"),
        ("second lord", "de bois"),
        ("Ωμέγα", "Жанна"),
        ("山田", "_ITALIC_"),
        ("É", "1"),
    ],
)
def test_a_role_may_have_any_name(names: tuple[str, ...], tmp_path: Path) -> None:
    speeches = [
        f"{name}:\nspeech of {number} " + f"{number} says " * 20 for number, name in enumerate(names, 1)
    ]
    (tmp_path / "play.txt").write_text("ANNA:\n" + "0 says " * 20 + "\n\n" + "\n\n".join(speeches), "utf-8")
    train = make_task("shakespeare", data=tmp_path).train
    texts = {key: "".join(map(decode, train.inputs[train.keys == key])) for key in np.unique(train.keys)}
    assert sorted("".join(sorted(set(text) & set("012"))) for text in texts.values()) == ["0", "1", "2"]


@pytest.mark.parametrize("mark", ["\u200b", "\u200f", "\u200e\u2060"])
def test_marks_of_direction_and_width_before_a_name_are_no_part_of_it(mark: str, tmp_path: Path) -> None:
    plays = (
        f"{before}{role}:\n{role * 100}\n\n" for before, role in (("", "ANNA"), (mark, "BERT"), (mark, "ANNA"))
    )
    (tmp_path / "play.txt").write_text("".join(plays), encoding="utf-8")
    assert len(np.unique(make_task("shakespeare", data=tmp_path).train.keys)) == 2


def test_a_name_is_one_however_its_accent_is_written(tmp_path: Path) -> None:
    speech = "so it is said " * 10
    (tmp_path / "play.txt").write_text(f"\u00c9LISE:\n{speech}\n\nE\u0301LISE:\n{speech}", encoding="utf-8")
    assert len(np.unique(make_task("shakespeare", data=tmp_path).train.keys)) == 1


@pytest.mark.parametrize("line", ['"ANNA":', "[Exit]:", "ANNA：", "A" * 62 + ":", "KING: ASIDE:"])
def test_a_line_that_is_no_name_is_said_not_to_be_one(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "play.txt").write_text(f"BERT:\n{'so it is ' * 20}\n\n{line}\nhere", encoding="utf-8")
    make_task("shakespeare", data=tmp_path)
    assert repr(line)[:80] in caplog.text
    assert str(tmp_path / "play.txt") in caplog.text


def test_names_without_an_empty_line_before_are_said_to_count_as_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    speech = "so it is " * 20
    (tmp_path / "play.txt").write_text(f"ANNA:\n{speech}\nBERT:\n{speech}\nHe said:\nno", encoding="utf-8")
    make_task("shakespeare", data=tmp_path)
    assert "1 lines look like names of roles but follow no empty line; the first is 'BERT:'" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "path", "problem"),
    [
        ("mnist", {}, "task.name", "expected one of digits"),
        ("digits", {"model": "vit"}, "task.options.model", "'mlp' or 'cnn'"),
        ("digits", {"model": 3}, "task.options.model", "expected str"),
        ("digits", {"depth": 3}, "task.options.depth", "Digits takes only model"),
        ("femnist", {"writers": 7}, "task.options.writers", "expected 1 to 6"),
        ("femnist", {"writers": "7"}, "task.options.writers", "expected int"),
        ("shakespeare", {"stride": 0}, "task.options.stride", "at least 1"),
        ("gpt", {"stride": 0}, "task.options.stride", "at least 1"),
        ("gpt", {"layers": 0}, "task.options.layers", "at least 1"),
        ("gpt", {"width": 100, "heads": 3}, "task.options.width", "a multiple of heads = 3, such as 102"),
        ("gpt", {"dropout": 1.0}, "task.options.dropout", r"a fraction in \[0, 1\)"),
        ("gpt", {"owners": "act"}, "task.options.owners", "'play' or 'role'"),
        ("movielens", {"factors": 0}, "task.options.factors", "at least 1"),
    ],
)
def test_bad_options_are_refused(
    name: str, options: dict[str, Any], path: str, problem: str, tmp_path: Path
) -> None:
    row = TABLE.get(name)
    if row is not None and row.files is not None:
        row.files(tmp_path)
    data = tmp_path if row is not None and row.files is not None else None
    with pytest.raises(ConfigError, match=problem) as caught:
        make_task(name, options=options, data=data)
    assert caught.value.path == path


def test_data_for_a_task_that_has_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Digits does not take a data folder") as caught:
        make_task("digits", data=tmp_path)
    assert caught.value.path == "task.data"


# --- a user's own task -------------------------------------------------------------------------------------


def test_documented_example_runs_and_is_short() -> None:
    path = ROOT / "experiments" / "my_task.py"
    code = path.read_text()
    assert len(code.splitlines()) < 40
    assert f"```python\n{code}```" in (ROOT / "docs" / "how-to" / "own-task.md").read_text()
    task = make_task(file="my_task.py:Spirals", folder=path.parent, options={"noise": 0.02})
    torch.manual_seed(0)
    net = task.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for step in range(600):
        at = torch.arange(step * 32, step * 32 + 32) % len(task.train)
        optimizer.zero_grad()
        task.loss(net, Batch(task.train.inputs[at], task.train.targets[at]), None).backward()
        optimizer.step()
    outputs = net(task.prepare(task.test.inputs))
    assert task.metrics(outputs, task.test.targets)["accuracy"].mean() > 0.95


def test_own_task_reads_what_the_workload_reads(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    cifar10_files(tmp_path)
    own = make_task(file="cifar10_task.py:Cifar10", folder=ROOT / "experiments", data=tmp_path / "plain_text")
    task = make_task("cifar10", data=tmp_path)
    assert equal(own.train, task.train)
    assert equal(own.test, task.test)
    assert str(own.model()) == str(task.model())
    assert torch.equal(own.prepare(own.train.inputs), task.prepare(task.train.inputs))


START = "import torch\nfrom jwins.tasks import Dataset, Task\n"
DATA = "        self.train = self.test = Dataset(torch.zeros(5, 3), torch.arange(5) % 2)\n"
INIT = f"class Mine(Task):\n    def __init__(self):\n{DATA}"
MODEL = "    def model(self):\n        return torch.nn.Linear(3, 2)\n"


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("mine.py", START, "as in 'my_task.py:MyTask'"),
        ("mine:Mine", START, "as in 'my_task.py:MyTask'"),
        ("other.py:Mine", START, "there is no file .*other.py"),
        (
            "mine.py:Mine",
            "import nonesuch_module\n",
            r"does not run: ModuleNotFoundError: .* \(mine.py, line 1\)",
        ),
        ("mine.py:Mine", "x = 1\nif x\n", r"does not run: SyntaxError: .* \(mine.py, line 2\)"),
        ("mine.py:Mine", START + INIT.replace("Mine", "Yours") + MODEL, "has no class Mine; it has Yours"),
        ("mine.py:Mine", START, "has no class Mine; no class in it subclasses"),
        ("mine.py:Mine", "class Mine: pass\n", "Mine in .*mine.py does not subclass jwins.tasks.Task"),
        ("mine.py:Mine", START + INIT, r"Mine in .*mine.py lacks model\(\)"),
        ("mine.py:Mine", START + "class Mine(Task):\n" + MODEL, "does not set self.train"),
        (
            "mine.py:Mine",
            START + INIT.replace("self.train = ", "") + MODEL,
            "does not set self.train; set it to a jwins.tasks.Dataset",
        ),
        ("mine.py:Mine", START + INIT + "        self.test = [1, 2]\n" + MODEL, "sets self.test to a list"),
        ("mine.py:Mine", START + INIT.replace("5", "0") + MODEL, "self.train to an empty data set"),
        (
            "mine.py:Mine",
            START + INIT + "        self.better = {'f1': 'higher'}\n" + MODEL,
            "sets self.better; declare it in the class",
        ),
        ("mine.py:Mine", START + INIT.replace("(5, 3)", "(4, 3)") + MODEL, "Dataset: inputs of shape"),
        (
            "mine.py:Mine",
            START + INIT + "        1 / 0\n" + MODEL,
            r"cannot be built: ZeroDiv.*\(mine.py, line 6\)",
        ),
        (
            "mine.py:Mine",
            START + INIT + MODEL.replace("Linear(3, 2)", "Flatten()"),
            "without parameters to train",
        ),
        (
            "mine.py:Mine",
            START + INIT + MODEL.replace("torch.nn.Linear(3, 2)", "3"),
            r"returns a int from model\(\); expected a torch.nn.Module",
        ),
        (
            "mine.py:Mine",
            START + INIT + MODEL.replace("(3, 2)", "(4, 2)"),
            r"Mine fails in loss\(\) on the first two samples: RuntimeError: mat1 and mat2",
        ),
        (
            "mine.py:Mine",
            START
            + INIT
            + MODEL
            + "    def loss(self, model, batch, generator):\n        return model(batch.inputs)\n",
            r"no scalar to differentiate from loss\(\)",
        ),
        (
            "mine.py:Mine",
            START + INIT + MODEL + "    def metrics(self, o, t):\n        return {'loss': o.mean()}\n",
            r"returns \(\) as metrics\(\)\['loss'\]; expected one value per sample",
        ),
        (
            "mine.py:Mine",
            START + INIT + MODEL + "    def metrics(self, o, t):\n        return {'error': o[:, 0]}\n",
            r"no 'loss' from metrics\(\)",
        ),
    ],
)
def test_what_is_missing_is_said(file: str, code: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UsageError, match=problem) as caught:
        make_task(file=file, folder=tmp_path)
    if "Dataset: inputs" not in problem:
        assert isinstance(caught.value, ConfigError)
        assert caught.value.path == "task.file"


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], torch.tensor([0, 1, 0, 1]), np.array([0, 1, 0, 1], "uint8")])
def test_labels_to_divide_by_may_be_a_list_an_array_or_a_tensor(labels: Any) -> None:
    found = partition_labels_of(labelled(labels))
    assert found is not None
    assert (found.tolist(), found.dtype) == ([0, 1, 0, 1], np.int64)


@pytest.mark.parametrize(
    "labels", [[0, 1], np.zeros((4, 1), int), np.full(4, np.nan), [0.5] * 4, ["a"] * 4, [[0], []]]
)
def test_labels_that_are_none_are_refused_by_name(labels: Any) -> None:
    with pytest.raises(
        UsageError, match=r"^Labelled\.partition_labels\(\) (returned .*expected \(4,\) int|failed)"
    ):
        partition_labels_of(labelled(labels))


def test_an_error_in_partition_labels_is_one_line_with_its_place() -> None:
    task = labelled([0] * 4)

    def fails() -> Any:
        raise KeyError("two\nlines") from None

    task.partition_labels = fails  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"failed: KeyError: 'two\\nlines' \(test_tasks.py, line \d+\)$"):
        partition_labels_of(task)


def labelled(labels: Any) -> Task:
    class Labelled(Task):
        train = test = Dataset(torch.zeros(4, 1), torch.zeros(4))

        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(1, 1)

        def partition_labels(self) -> Any:
            return labels

    return Labelled()


def test_what_is_missing_in_a_task_from_python_is_said_as_well() -> None:
    class Whole(Task):
        def __init__(self, classes: int = 2) -> None:
            self.train = self.test = Dataset(torch.zeros(5, 3), torch.arange(5) % classes)

        def model(self) -> torch.nn.Module:
            return torch.nn.Linear(3, 2)

    class NoTest(Whole):
        def __init__(self) -> None:
            self.train = Dataset(torch.zeros(5, 3), torch.arange(5) % 2)

    class Scalar(Whole):
        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": outputs.mean()}

    class Nameless(Whole):
        name = "two\nlines"

    class OddMetric(Whole):
        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> Any:
            return {**super().metrics(outputs, targets), 3: outputs[:, 0]}

    class InPlace(Whole):
        def prepare(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.add_(1)

    class TargetsInPlace(Whole):
        def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            targets.fill_(1)
            return super().metrics(outputs, targets)

    class NoModel(Task):
        pass

    assert isinstance(own_task(Whole, {"classes": 1}, None), Whole)
    whole = Whole()
    assert own_task(whole, {}, None) is whole
    for own, problem in (
        (NoTest, "NoTest does not set self.test; set it to a"),
        (NoTest(), "NoTest does not set self.test; set it to a"),
        (Scalar, r"Scalar returns \(\) as metrics\(\)\['loss'\]; expected one value per sample"),
        (Nameless, r"Nameless sets self\.name to 'two\\nlines'; expected a text of one line"),
        (OddMetric, "OddMetric returns a metric called 3; expected a name of printable characters"),
        (InPlace, r"InPlace changes inputs of test samples in place in prepare\(\) or metrics\(\)"),
        (TargetsInPlace, "TargetsInPlace changes targets of test samples in place"),
        (NoModel, r"NoModel lacks model\(\)"),
        (torch.nn.Linear, "Linear does not subclass jwins.tasks.Task"),
        (3, "int does not subclass jwins.tasks.Task"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            own_task(own, {}, None)
        assert caught.value.path == "task.own"
    with pytest.raises(ConfigError, match=r"task\.options\.classes = .3.: expected int"):
        own_task(Whole, {"classes": "3"}, None)


@pytest.mark.parametrize(
    ("options", "data", "path", "problem"),
    [
        ({}, None, "task.options.width", "requires it"),
        ({"width": "3"}, None, "task.options.width", "expected int"),
        ({"width": 3, "depth": 1}, None, "task.options.depth", "takes only width, names"),
        ({"width": 3, "names": [1]}, None, "task.options.names", "expected list"),
        ({"width": 3}, Path("folder"), "task.data", "does not take a data folder"),
    ],
)
def test_options_of_an_own_task_are_checked(
    options: dict[str, Any], data: Path | None, path: str, problem: str, tmp_path: Path
) -> None:
    init = f"class Mine(Task):\n    def __init__(self, width: int, names: list[str] = ()):\n{DATA}"
    (tmp_path / "mine.py").write_text(START + init + MODEL)
    make_task(file="mine.py:Mine", folder=tmp_path, options={"width": 3, "names": ["a"]})
    with pytest.raises(ConfigError, match=problem) as caught:
        make_task(file="mine.py:Mine", folder=tmp_path, options=options, data=data)
    assert caught.value.path == path


def test_own_tasks_of_one_name_do_not_meet(tmp_path: Path) -> None:
    tasks = []
    for folder, n in (("a", 5), ("b", 6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(START + INIT.replace("5", str(n)) + MODEL)
        tasks.append(make_task(file=str(tmp_path / folder / "mine.py") + ":Mine"))
    assert [len(task.train) for task in tasks] == [5, 6]
    assert [len(pickle.loads(pickle.dumps(task)).train) for task in tasks] == [5, 6]


@pytest.mark.parametrize("given", [{}, {"name": "digits", "file": "mine.py:Mine"}])
def test_either_a_name_or_a_file(given: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="either the name of a task or the file"):
        make_task(**given)


def test_dataset_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"Dataset.inputs is of type ndarray.*torch.as_tensor"):
        Dataset(np.zeros(3), torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one target per input"):
        Dataset(torch.zeros(3), torch.zeros(4))
    with pytest.raises(UsageError, match=r"expected \(3,\) int64"):
        Dataset(torch.zeros(3), torch.zeros(3), np.zeros(3))
    for keys in (torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"Dataset.keys: .*expected \(3,\) int64"):
            Dataset(torch.zeros(3), torch.zeros(3), keys)
    for other in ([1, 2, 3], "abc", 3):
        with pytest.raises(UsageError, match=r"Dataset.keys is of type .*torch.as_tensor"):
            Dataset(torch.zeros(3), torch.zeros(3), other)  # type: ignore[arg-type]


def test_owners_may_be_a_tensor() -> None:
    data = Dataset(torch.zeros(3), torch.zeros(3), torch.tensor([7, 8, 7]))
    assert isinstance(data.keys, np.ndarray)
    assert data.keys.dtype == np.int64
    assert data.keys.tolist() == [7, 8, 7]
    assert pickle.loads(pickle.dumps(data)).keys.tolist() == [7, 8, 7]
    parts = PARTITIONERS["by_key"]().split(
        num_samples=3, num_nodes=2, labels=None, keys=data.keys, rng=np.random.default_rng(0)
    )
    assert sorted(part.tolist() for part in parts) == [[0, 2], [1]]


# --- real data ---------------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return SHARED


@pytest.mark.shared
def test_movielens_small(shared: Path) -> None:
    task = make_task("movielens", data=shared / "movielens-small")
    assert (len(task.train), len(task.test)) == (70595, 30241)
    assert sum(p.numel() for p in task.model().parameters()) == 206_680
    assert len(np.unique(task.train.keys)) == len(np.unique(task.test.keys)) == 610


@pytest.mark.shared
def test_shakespeares_plays(shared: Path) -> None:
    task = make_task("shakespeare", data=shared / "shakespeare", options={"stride": 10})
    assert (len(task.train), len(task.test)) == (90619, 10063)
    assert len(np.unique(task.train.keys)) == 256
    content = hashlib.sha256()
    for data in (task.train, task.test):
        for array in (data.inputs.numpy(), data.targets.numpy(), data.keys):
            content.update(array.tobytes())
    assert content.hexdigest().startswith("159d2c1f16f0ae6c")


@pytest.mark.shared
@pytest.mark.slow
def test_cifar10_images(shared: Path) -> None:
    task = make_task("cifar10", data=shared / "cifar10")
    assert np.bincount(task.train.targets.numpy()).tolist() == [5000] * 10
    assert np.bincount(task.test.targets.numpy()).tolist() == [1000] * 10
    prepared = task.prepare(task.train.inputs[:5000])
    assert abs(prepared.mean()) < 0.1
    assert 0.4 < prepared.std() < 0.6
    assert isinstance(task.model(), nn.Module)
