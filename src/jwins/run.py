"""From an experiment to a run folder and what it measured.

A run folder has ``config.toml`` (the experiment, resolved), ``partition.json`` (how many samples each node
holds), ``metrics.jsonl`` (append-only), ``checkpoints/`` and, in the end, ``final/node-<i>.safetensors``. The
experiment's digest decides whether it can be continued.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jwins.checkpoint import write_atomically
from jwins.errors import ConfigError, DataError, ResumeError
from jwins.experiment import (
    ChocoConfig,
    CrashConfig,
    DelayConfig,
    DropConfig,
    Experiment,
    FixedCutoffConfig,
    FullConfig,
    JwinsConfig,
    RandomCutoffConfig,
    RandomKConfig,
    RejoinConfig,
    RunConfig,
    TopKConfig,
    digest_of,
    what_counts,
)
from jwins.metrics import StartRow
from jwins.report import Record, flat_rows
from jwins.settings import Settings, read_toml
from jwins.tensorboard import TensorBoard

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from jwins.engines.simulator import Fault, Progress, Simulator
    from jwins.sharing import Sharing
    from jwins.tasks import Task
    from jwins.topology import Topology

__all__ = [
    "FolderState",
    "Parts",
    "Result",
    "build",
    "build_partition",
    "build_sharing",
    "build_task",
    "build_topology",
    "check_folder",
    "evaluation_rounds",
    "folder_state",
    "locked",
    "own_test_samples",
    "partition_counts",
    "raw_bytes_per_node",
    "simulate",
]

_LIBRARIES = ("jwins", "torch", "numpy", "PyWavelets", "pcodec", "networkx")


# --- Building ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What an experiment is made of.

    Attributes:
        experiment: with ``train.batching`` and ``run.device`` as they were resolved.
        task: the workload.
        parts: for each node, its training samples.
        simulator: ready to run.
        start: the first row of its log.
    """

    experiment: Experiment
    task: Task
    parts: Sequence[npt.NDArray[np.int64]]
    simulator: Simulator
    start: StartRow


def build_task(experiment: Experiment) -> Task:
    """The workload of an experiment.

    Raises:
        ConfigError: no such task, file, class or option.
        DataError: its data are missing.
    """
    from jwins.tasks import make_task, own_task

    config = experiment.task
    if config.own is not None:
        return own_task(config.own, config.options, config.data)
    return make_task(config.name, file=config.file, options=config.options, data=config.data)


def build_topology(experiment: Experiment) -> Topology:
    """The graphs of an experiment.

    Raises:
        ConfigError: there is no such graph.
    """
    from jwins.topology import make_topology

    config = experiment.topology
    if not isinstance(config, Settings):
        return config
    options = config.model_dump(exclude_none=True)
    kind = options.pop("kind")
    return make_topology(kind, options, num_nodes=experiment.nodes.count, seed=experiment.run.seed)


def build_sharing(experiment: Experiment) -> Sharing[Any]:
    """The sharing algorithm of an experiment.

    Raises:
        ConfigError: no such wavelet.
    """
    from jwins import sharing

    config = experiment.sharing
    match config:
        case FullConfig():
            return sharing.full(values=config.values)
        case RandomKConfig():
            return sharing.random_k(config.fraction, values=config.values)
        case TopKConfig():
            return sharing.top_k(config.fraction, accumulate=config.accumulate, values=config.values)
        case ChocoConfig():
            return sharing.choco(config.fraction, config.gamma, values=config.values)
        case JwinsConfig():
            cutoff: sharing.Cutoff
            match config.cutoff:
                case RandomCutoffConfig(fractions=fractions):
                    cutoff = sharing.RandomCutoff(fractions)
                case FixedCutoffConfig(fraction=fraction):
                    cutoff = sharing.FixedCutoff(fraction)
                case own:
                    cutoff = own
            return sharing.jwins(
                cutoff=cutoff,
                wavelet=config.wavelet,
                levels=config.levels,
                mode=config.mode,
                score=config.score,
                accumulate=config.accumulate,
                dense_above=config.dense_above,
                values=config.values,
            )
        case _:
            return config


def evaluation_rounds(experiment: Experiment) -> frozenset[int]:
    """Numbers of completed rounds at which all models are evaluated; 0 and the last are always among them."""
    run = experiment.run
    return frozenset({*range(0, run.rounds, run.eval_every), run.rounds, *run.eval_at})


def _first_of_last(experiment: Experiment) -> int:
    """Completed rounds at the first of the last ``run.eval_last`` evaluations."""
    return sorted(evaluation_rounds(experiment))[-experiment.run.eval_last :][0]


def evaluation_samples(experiment: Experiment, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Test samples of the last evaluations, and of those before; None for all of them.

    Returns:
        Two vectors of increasing int64; the second is some of the first, or the same.

    Raises:
        ConfigError: more than there are.
    """
    from jwins.rng import stream

    run = experiment.run
    if run.eval_samples == "all" and run.eval_samples_early is None:
        return None, None
    wanted = len(task.test) if run.eval_samples == "all" else run.eval_samples
    if wanted > len(task.test):
        problem = f'the test set has {len(task.test)} samples; write at most as many, or "all"'
        raise ConfigError("run.eval_samples", run.eval_samples, problem)
    drawn = stream(run.seed, "evaluation").choice(len(task.test), wanted, replace=False)
    last, early = _last_and_early(drawn, run)
    return None if run.eval_samples == "all" else last, early


def _last_and_early(drawn: npt.NDArray[np.int64], run: RunConfig) -> tuple[Tensor, Tensor]:
    """Of test samples in random order all, and the first few for the early evaluations; both increasing."""
    import torch

    samples = torch.from_numpy(drawn)
    return samples.sort().values, samples[: run.eval_samples_early].sort().values


def build(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Parts:
    """Build everything an experiment names.

    Args:
        experiment: what to build.
        folder: where the simulator writes; None keeps everything in memory.
        on_progress: told after every step of the clock.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
    """
    from jwins.engines.simulator import Compute, EvaluationSamples, Faults, Links, Simulator
    from jwins.train import Optimizer, Trainer
    from jwins.wire.codec import codec

    run, train, seed = experiment.run, experiment.train, experiment.run.seed
    sharing, topology = build_sharing(experiment), build_topology(experiment)
    wire = codec(experiment.wire.codec)
    optimizer = Optimizer(train.optimizer.kind, train.optimizer.options, train.optimizer_state)
    task = build_task(experiment)

    parts = build_partition(experiment, task)
    common, early_common = evaluation_samples(experiment, task)
    own, early_own = own_evaluation_samples(experiment, task, parts) if run.eval_own else (None, None)

    trainer = Trainer(
        task,
        parts,
        seed=seed,
        local_steps=train.local_steps,
        batch_size=train.batch_size,
        optimizer=optimizer,
        buffers=train.buffers,
        batching=train.batching,
        device=run.device,
        threads=run.threads,
    )
    resolved = experiment.changed({"run": {"device": trainer.device.type, "folder": experiment.folder}})
    if train.batching == "auto":
        resolved = resolved.changed({"train": {"batching": trainer.batching}})
    initial = trainer.initial()
    _check_padding(experiment, sharing, len(initial))
    start = StartRow(
        name=experiment.name,
        digest=resolved.digest().hex(),
        seed=seed,
        num_nodes=experiment.nodes.count,
        dim=len(initial),
        neighbours_mean=sum(map(len, topology.at(0).recipients)) / experiment.nodes.count,
        versions=_versions(),
        machine=_machine(trainer.device),
        fingerprints=_fingerprints(resolved, task, parts, [initial, *trainer.frozen.values()], common),
        batching=trainer.batching + (f" ({trainer.reason})" if trainer.reason else ""),
    )
    simulator = Simulator(
        trainer,
        sharing,
        wire,
        topology,
        rounds=run.rounds,
        seed=seed,
        digest=resolved.digest(),
        start=start,
        links=Links(experiment.links.uplink_mbps, experiment.links.latency_ms),
        compute=Compute(experiment.compute.step_ms, experiment.compute.spread, experiment.compute.jitter),
        faults=Faults(tuple(map(_fault, experiment.faults))),
        eval_at=evaluation_rounds(experiment),
        samples=EvaluationSamples(common, own),
        early_samples=None if run.eval_samples_early is None else EvaluationSamples(early_common, early_own),
        early_before=_first_of_last(experiment),
        deadline_s=run.deadline_s,
        threads=run.threads,
        folder=folder,
        checkpoint_every=run.checkpoint_every,
        on_progress=on_progress,
    )
    return Parts(resolved, task, parts, simulator, start)


_PADDING_UNNOTICED = 2**16
"""So many coefficients more than parameters cost nothing that matters, however small the model."""


def _check_padding(experiment: Experiment, sharing: Sharing[Any], dim: int) -> None:
    """Periodization pads to a multiple of 2^levels: refuse levels that only multiply memory and bytes."""
    config, size = experiment.sharing, sharing.update_dim(dim)
    if isinstance(config, JwinsConfig) and size > 2 * dim + _PADDING_UNNOTICED:
        problem = (
            f"{config.mode} would make {size:,} coefficients of the model's {dim:,} parameters; "
            f"use at most {dim.bit_length() - 1} levels"
        )
        raise ConfigError("sharing.levels", config.levels, problem)


def build_partition(experiment: Experiment, task: Task) -> list[npt.NDArray[np.int64]]:
    """For each node, which of the task's training samples it holds, increasing.

    Raises:
        ConfigError: there is no such partitioner, or it cannot divide these samples so.
    """
    from jwins.rng import stream
    from jwins.tasks.partition import make_partitioner

    partition = experiment.task.partition
    if isinstance(partition, Settings):
        options = partition.model_dump()
        partition = make_partitioner(options.pop("kind"), options)
    return partition.split(
        num_samples=len(task.train),
        num_nodes=experiment.nodes.count,
        labels=task.partition_labels(),
        keys=task.train.keys,
        rng=stream(experiment.run.seed, "partition"),
    )


def own_test_samples(task: Task, parts: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """For each node, the test samples of those owners of whom it has training samples, increasing.

    Raises:
        ConfigError: the task's samples have no natural owner.
    """
    import numpy as np

    train, test = task.train.keys, task.test.keys
    if train is None or test is None:
        problem = (
            "the task's samples have no natural owner; leave it out, or give task.train and task.test keys"
        )
        raise ConfigError("run.eval_own", True, problem)
    return [np.flatnonzero(np.isin(test, np.unique(train[part]))) for part in parts]


def own_evaluation_samples(
    experiment: Experiment, task: Task, parts: Sequence[npt.NDArray[np.int64]]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each node, its own test samples at the last evaluations, and at those before; see ``run.eval_own``.

    Raises:
        ConfigError: the task's samples have no natural owner.
    """
    from jwins.rng import stream

    run = experiment.run
    most = None if run.eval_samples == "all" else run.eval_samples
    pairs = [
        _last_and_early(stream(run.seed, "own evaluation", node=node).permutation(own)[:most], run)
        for node, own in enumerate(own_test_samples(task, parts))
    ]
    return [last for last, _ in pairs], [early for _, early in pairs]


_MOST_LABELS = 1000
"""More labels than these are no classes that a figure could show."""


def partition_counts(task: Task, parts: Sequence[npt.NDArray[np.int64]]) -> dict[str, Any]:
    """What ``partition.json`` says: how many samples each node holds, and of which class if there are classes.

    Returns:
        ``samples`` (one number per node) and, for up to 1,000 classes, ``labels`` and ``counts`` (per node, one
        number per label).
    """
    import numpy as np

    found: dict[str, Any] = {"samples": [len(part) for part in parts]}
    labels = task.partition_labels()
    if labels is not None:
        values = np.unique(labels)
        if len(values) <= _MOST_LABELS:
            found["labels"] = values.tolist()
            found["counts"] = [
                np.bincount(np.searchsorted(values, labels[part]), minlength=len(values)).tolist()
                for part in parts
            ]
    return found


def _fault(config: CrashConfig | RejoinConfig | DropConfig | DelayConfig) -> Fault:
    from jwins.engines.simulator import Fault

    match config:
        case CrashConfig() | RejoinConfig():
            return Fault(config.kind, config.node, config.round)
        case DropConfig():
            return Fault("drop", config.sender, config.round, config.receiver)
        case DelayConfig():
            return Fault("delay", config.sender, config.round, config.receiver, config.seconds)


def _fingerprints(
    experiment: Experiment,
    task: Task,
    parts: Sequence[npt.NDArray[np.int64]],
    model: Sequence[Tensor],
    samples: Tensor | None,
) -> dict[str, str]:
    """Hashes of what must be the same for two runs to be like for like."""
    from jwins.train import batch_indices

    train = experiment.train
    first_batches = [
        batch_indices(
            part,
            seed=experiment.run.seed,
            node=node,
            round=0,
            local_steps=train.local_steps,
            batch_size=train.batch_size,
        ).tobytes()
        for node, part in enumerate(parts)
    ]
    targets = task.test.targets if samples is None else samples
    return {
        "model": _hash(*(tensor.float().cpu().numpy().astype("<f4", copy=False).tobytes() for tensor in model)),
        "partition": _hash(*(part.astype("<i8", copy=False).tobytes() for part in parts)),
        "batches": _hash(f"{train.local_steps} x {train.batch_size}".encode(), *first_batches),
        "evaluation": _hash(f"{len(targets)}".encode(), targets.contiguous().numpy().tobytes()),
        "codec": experiment.wire.codec,
    }


def _hash(*pieces: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def _machine(device: Any) -> dict[str, str]:
    import torch

    machine = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine


def _processor() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def raw_bytes_per_node(experiment: Experiment, dim: int, rounds: int) -> float:
    """What full sharing of raw float32 would send: 4 bytes per parameter and recipient, mean over nodes.

    Args:
        experiment: its topology counts; faults do not.
        dim: parameters per model.
        rounds: how many.
    """
    topology = build_topology(experiment)
    sends = sum(len(recipients) for r in range(rounds) for recipients in topology.at(r).recipients)
    return 4.0 * dim * sends / experiment.nodes.count


# --- Run folders ------------------------------------------------------------------------------------------


class FolderState(StrEnum):
    """What a run folder holds of an experiment."""

    ABSENT = "absent"
    UNFINISHED = "unfinished"
    COMPLETE = "complete"


def check_folder(path: str, folder: Path) -> None:
    """Refuse a folder that cannot be made because a file has its name or that of a folder above it.

    Args:
        path: of the setting that names the folder.
        folder: may not exist.

    Raises:
        ConfigError: a file is in the way.
    """
    for place in (folder, *folder.parents):
        if place.is_file():
            raise ConfigError(path, str(folder), f"{place} is a file; choose another")


def folder_state(experiment: Experiment, folder: Path) -> tuple[FolderState, Experiment]:
    """What is in ``folder``.

    Args:
        experiment: that is to be run there.
        folder: may not exist.

    Returns:
        The state, and the experiment with what the earlier run resolved.

    Raises:
        ConfigError: a file has the folder's name.
        ResumeError: the folder holds another experiment, or is not a run folder.
    """
    check_folder("run.folder", folder)
    config = folder / "config.toml"
    if not config.is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ResumeError(
                f"{folder}: not empty, and not a run folder (config.toml is missing); choose another run.folder"
            )
        return FolderState.ABSENT, experiment
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ResumeError(f"{config}: not UTF-8 text; choose another run.folder, or remove this one") from None
    stored = read_toml(text, str(config))
    try:
        batching, device = stored["train"]["batching"], stored["run"]["device"]
        stored_digest = digest_of(stored)
    except (KeyError, TypeError, AttributeError):
        raise ResumeError(f"{config}: not the configuration of a run; choose another run.folder") from None
    same = experiment
    if experiment.train.batching == "auto":
        same = same.changed({"train": {"batching": batching}})
    if experiment.run.device == "auto":
        same = same.changed({"run": {"device": device}})
    if same.digest() != stored_digest:
        difference = _difference(what_counts(same.resolved()), what_counts(stored))
        raise ResumeError(
            f"{folder}: holds another experiment ({difference}); choose another run.folder, or remove this one"
        )
    with contextlib.suppress(DataError):
        if Record.read(folder).end is not None:
            return FolderState.COMPLETE, same
    return FolderState.UNFINISHED, same


def _difference(mine: dict[str, Any], stored: dict[str, Any], path: str = "") -> str:
    """The first key in which what counts of two experiments differs, for people."""
    for key in [*mine, *(key for key in stored if key not in mine)]:
        here = f"{path}.{key}" if path else key
        a, b = mine.get(key), stored.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, here):
                return found
        elif a != b:
            return f"{here} = {b!r} there, {a!r} here"
    return ""


def _check_task_unchanged(folder: Path, start: StartRow) -> None:
    """The digest covers what the experiment says, not what is in a file that it names or an object given to it.

    The initial model is not compared: its last bits may depend on the processor.
    """
    try:
        before = Record.read(folder).start
    except DataError:  # the simulator says what is wrong with the log
        return
    changed = []
    if before.dim != start.dim:
        changed.append(f"parameters per model: {before.dim} there, {start.dim} here")
    for key, what in (
        ("partition", "partitions"),
        ("batches", "batches"),
        ("evaluation", "evaluation samples"),
    ):
        if before.fingerprints.get(key) != start.fingerprints[key]:
            changed.append(f"{what} differ")
    if changed:
        raise ResumeError(
            f"{folder}: the task or its data have changed since ({', '.join(changed)}); restore them, "
            f"choose another run.folder, or remove this one"
        )


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep a second process out of the folder; the lock goes with the process, however it ends.

    Args:
        folder: where the lock is.
        what: is run in there, for the message.

    Raises:
        ResumeError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(f"{folder}: another process is running {what} here") from None
        yield


# --- Running ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run measured, read from its folder.

    Attributes:
        experiment: as resolved.
        folder: the run folder.
        status: ``finished``, ``diverged`` or ``interrupted``.
        record: the typed rows.
        was_complete: whether nothing had to be done, because the run was complete before.

    Example::

        result = jwins.simulate(jwins.Experiment(name="tiny"))
        frame = pandas.DataFrame(result.rows)
        frame.plot(x="bytes_per_node", y="accuracy_mean")
    """

    experiment: Experiment
    folder: Path
    status: str
    record: Record
    was_complete: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict per evaluation: ``round``, ``time_s``, ``accuracy_mean``, ``bytes_total``, ..."""
        return flat_rows(self.record)

    @property
    def edges(self) -> list[dict[str, int]]:
        """Bytes over the whole run for each directed edge; empty for an interrupted run."""
        if self.record.end is None:
            return []
        return [
            {
                "source": edge.source,
                "target": edge.target,
                "bytes_total": edge.bytes.total,
                "bytes_positions": edge.bytes.positions,
                "bytes_values": edge.bytes.values,
                "bytes_header": edge.bytes.header,
                "bytes_key": edge.bytes.key,
                "bytes_control": edge.bytes.control,
            }
            for edge in self.record.end.traffic
        ]

    @property
    def sha256(self) -> str | None:
        """Of all final parameters, hex; None for an interrupted run."""
        return None if self.record.end is None else self.record.end.sha256

    def parameters(self, node: int) -> dict[str, Tensor]:
        """A node's final tensors by name.

        Raises:
            DataError: the run has no final model of that node.
        """
        from safetensors.torch import load_file

        path = self.folder / "final" / f"node-{node}.safetensors"
        if not path.is_file():
            raise DataError(f"{path}: no final model of node {node}; the run is {self.status}")
        tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def model(self, node: int) -> nn.Module:
        """A node's final model.

        Raises:
            DataError: the run has no final model of that node.
        """
        import torch

        tensors = self.parameters(node)
        task = build_task(self.experiment)
        with torch.random.fork_rng(devices=[]):
            model = task.model()
        # Not strict: tied parameters are stored once.
        unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unexpected:
            raise DataError(
                f"{self.folder}: the task's model has no {unexpected[0]}; it has changed since the run"
            )
        return model.eval()


def simulate(
    experiment: Experiment,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run an experiment in its folder.

    Args:
        experiment: what to run; ``experiment.folder`` is where.
        resume: go on from the newest checkpoint; from the start if there is none yet; and if the run is
            complete, only read it.
        progress: told after every step of the virtual clock.

    Returns:
        What was measured. Ctrl-C leaves a checkpoint and returns with status ``interrupted``.

    Raises:
        ConfigError: the experiment cannot be built as written.
        DataError: data are missing.
        ResumeError: the folder holds another experiment, or this one and ``resume`` was not asked for.
    """
    folder = experiment.folder
    state, experiment = folder_state(experiment, folder)
    if state is not FolderState.ABSENT and not resume:
        raise ResumeError(
            f"{folder}: this experiment is {state.value} there; "
            + (
                "read it with --resume (resume=True), "
                if state is FolderState.COMPLETE
                else "go on with --resume (resume=True), "
            )
            + "choose another run.folder, or remove it"
        )
    if state is FolderState.COMPLETE:
        record = Record.read(folder)
        assert record.end is not None
        if experiment.run.tensorboard:
            with TensorBoard(folder) as written:
                written.replay()
        return Result(experiment, folder, record.end.status, record, was_complete=True)

    board = TensorBoard(folder) if experiment.run.tensorboard else contextlib.nullcontext()

    def tell(now: Progress) -> None:
        if now.row is not None and isinstance(board, TensorBoard):
            board.add(now.row)
        if progress is not None:
            progress(now)

    with _callers_threads(), board:
        return _simulate(experiment, folder, state, tell)


@contextlib.contextmanager
def _callers_threads() -> Iterator[None]:
    """Training sets torch to one thread; give the caller its own number back."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _simulate(
    experiment: Experiment, folder: Path, state: FolderState, tell: Callable[[Progress], None]
) -> Result:
    parts = build(experiment, folder=folder, on_progress=tell)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "this experiment"):
        if folder_state(experiment, folder)[0] is not state:
            raise ResumeError(f"{folder}: another process has just run this experiment here; look again")
        if state is FolderState.ABSENT:
            write_atomically(folder / "config.toml", parts.experiment.to_toml(folder).encode())
        if not (folder / "partition.json").is_file():
            counts = partition_counts(parts.task, parts.parts)
            write_atomically(folder / "partition.json", (json.dumps(counts) + "\n").encode())
        going_on = state is FolderState.UNFINISHED and any((folder / "checkpoints").glob("round-*.safetensors"))
        if going_on:
            _check_task_unchanged(folder, parts.start)
        else:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        outcome = parts.simulator.run(resume=going_on)
    return Result(parts.experiment, folder, outcome.status, Record.read(folder))
