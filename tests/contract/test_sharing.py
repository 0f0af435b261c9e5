"""Every sharing algorithm keeps the contract of ``jwins.sharing.Sharing``. A new one is a row of ALGORITHMS."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from jwins.errors import ConfigError, UsageError
from jwins.ops.wavelet import Wavelet
from jwins.rng import RoundContext, stream
from jwins.run_folder import checkpoint
from jwins.sharing import (
    ROBUST_MERGES,
    AbsmaxQuantizer,
    FixedCutoff,
    Jwins,
    Moniqua,
    PowerGossip,
    RandomCutoff,
    UniformQuantizer,
    beer,
    choco,
    closed_loop,
    demo,
    full,
    jwins,
    moniqua,
    noloco,
    power_gossip,
    random_k,
    sparse_loco,
    stateless,
    top_k,
)
from jwins.sharing.update import Quantized, Received, Update, dither
from jwins.topology import FullyConnected, Ring
from jwins.wire import codec
from updates import identical

P = 61  # odd and prime: no level of a transform divides it


@dataclass(frozen=True)
class Steps:
    """A dithered quantizer for tests, one step per subband: a fraction of the subband's largest value."""

    fraction: float = 0.1

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Quantized:
        largest = [
            float(subband.abs().max()) if len(subband) else 1.0 for subband in values.split(list(subbands))
        ]
        scales = torch.tensor(
            [max(self.fraction * value, 1e-6) for value in largest], dtype=torch.float32, device=values.device
        )
        seed = int(ctx.rng("dither").integers(2**64, dtype="uint64"))
        steps = values / scales.repeat_interleave(torch.tensor(subbands, device=values.device)) + dither(
            seed, len(values)
        )
        return Quantized(steps.round().to(torch.int32), scales, subbands, seed, offset=0.05)


QUANTIZERS: dict[str, Any] = {
    "uniform": UniformQuantizer(0.01, dead_zone=0.6, offset=0.1),
    "dithered": UniformQuantizer(0.05, "dithered"),
    "2 bits": AbsmaxQuantizer(2, block=16),
}
ALGORITHMS: dict[str, Any] = {
    "full": full(),
    "full, bfloat16": full(values="bfloat16"),
    **{f"full, {kind}": full(robust=merge()) for kind, merge in ROBUST_MERGES.items()},
    "random_k": random_k(0.2),
    "random_k, all": random_k(1.0),
    "random_k, none": random_k(0.001),
    "random_k, bfloat16": random_k(0.2, values="bfloat16"),
    "top_k": top_k(0.2),
    "top_k, accumulated": top_k(0.2, accumulate=True),
    "top_k, all": top_k(1.0),
    "top_k, none": top_k(0.001),
    "top_k, bfloat16": top_k(0.2, accumulate=True, values="bfloat16"),
    "choco": choco(0.2, 0.5),
    "choco, all": choco(1.0, 1.0),
    "choco, none": choco(0.001, 0.5),
    "choco, bfloat16": choco(0.2, 0.5, values="bfloat16"),
    "jwins": jwins(),
    "jwins, reference": jwins(score="reference"),
    "jwins, training_only": jwins(score="training_only"),
    "jwins, no wavelet": jwins(wavelet=None),
    "jwins, no wavelet, reference": jwins(wavelet="none", score="reference"),
    "jwins, no wavelet, training_only": jwins(wavelet=None, score="training_only"),
    "jwins, no accumulation": jwins(accumulate=False),
    "jwins, fixed": jwins(FixedCutoff(0.3)),
    "jwins, periodization": jwins(mode="periodization", levels=3),
    "jwins, db4": jwins(RandomCutoff((0.1, 0.9)), wavelet="db4", levels=2),
    "jwins, bior2.2": jwins(wavelet="bior2.2", levels=6, dense_above=2.0),
    "jwins, bfloat16": jwins(values="bfloat16"),
    "full, quantized": full(values=Steps()),
    "random_k, quantized": random_k(0.2, values=Steps()),
    "random_k, all, quantized": random_k(1.0, values=Steps()),
    "top_k, quantized": top_k(0.2, accumulate=True, values=Steps()),
    "top_k, none, quantized": top_k(0.001, values=Steps()),
    "choco, quantized": choco(0.2, 0.5, values=Steps()),
    "jwins, quantized": jwins(values=Steps()),
    "jwins, periodization, quantized": jwins(mode="periodization", levels=3, values=Steps()),
    "closed_loop": closed_loop(),
    "closed_loop, fixed": closed_loop(0.03),
    "closed_loop, budget": closed_loop(budget=4.0),
    "closed_loop, sent": closed_loop(step_ratio=0.5, residual_rate=1.0, gamma=0.7, dead_zone=0.5),
    "closed_loop, no wavelet": closed_loop(budget_bytes=100, wavelet=None, history=1),
    "closed_loop, rank": closed_loop(wavelet=None, gamma=0.3, residual_rate=1.0, rank=2),
    "closed_loop, symmetric": closed_loop(0.1, mode="symmetric", levels=2, history=0, residual_rate=0.0),
    "stateless": stateless(),
    "stateless, fixed": stateless(0.03, self_term="sent", rounding="dither"),
    "stateless, budget": stateless(budget=6.0, mode="symmetric"),
    "stateless, seconds": stateless(budget_seconds=0.002, link_mbps=1.0),
    "stateless, no wavelet": stateless(budget_bytes=150, wavelet=None),
    "beer": beer(0.2, 0.5),
    "beer, all": beer(1.0, 1.0),
    "beer, none": beer(0.001, 0.5),
    "beer, bfloat16": beer(0.2, 0.5, values="bfloat16"),
    "beer, 2 bits": beer(0.2, 0.5, momentum=0.1, values=AbsmaxQuantizer(2, block=16)),
    "sparse_loco": sparse_loco(0.1, 0.5),
    "sparse_loco, chunks": sparse_loco(0.1, 0.5, decay=0.5, chunk=16),
    "sparse_loco, all": sparse_loco(1.0, 1.0, decay=1.0, chunk=20),
    "sparse_loco, common": sparse_loco(0.1),
    "sparse_loco, common, all": sparse_loco(1.0, decay=0.5, chunk=20),
    "noloco": noloco(),
    "noloco, bfloat16": noloco(lr=1.0, momentum=0.0, gamma=0.5, values="bfloat16"),
    "noloco, quantized": noloco(values=Steps()),
    "demo": demo(gamma=0.5, k=4, block=4),
    "demo, all": demo(gamma=1.0, k=64, block=7, decay=0.0),
    "demo, quantized": demo(gamma=0.5, k=8, block=5, values=Steps()),
    "demo, common": demo(0.1, k=4),
    "demo, common, all": demo(1.0, sign=False, k=64, decay=0.9),
    "demo, common, bfloat16": demo(1.0, sign=False, k=2, block=3, values="bfloat16"),
    "moniqua": moniqua(2.0),
    "moniqua, 4 bits": moniqua(2.0, bits=4),
    "power_gossip": power_gossip(),
    "power_gossip, bfloat16": power_gossip(values="bfloat16"),
    "power_gossip, quantized": power_gossip(values=Steps()),
}
for name, quantizer in QUANTIZERS.items():
    ALGORITHMS |= {
        f"full, {name}": full(values=quantizer),
        f"random_k, {name}": random_k(0.2, values=quantizer),
        f"top_k, {name}": top_k(0.2, accumulate=True, values=quantizer),
        f"choco, {name}": choco(0.4, 0.5, values=quantizer),
        f"jwins, {name}": jwins(values=quantizer),
    }
RATED = {name: algorithm for name, algorithm in ALGORITHMS.items() if hasattr(algorithm, "rule")}
"""Those that always send symbols, of changes since the common start."""
OWN_FORM = ("beer", "demo", "moniqua", "noloco", "power_gossip", "sparse_loco")
"""Those whose updates mean something of their own; tests/sharing/test_baselines.py has what they are."""
WEIGHTS = {1: 0.25, 4: 0.5}
ROUNDS = 5


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> Any:
    return ALGORITHMS[request.param]


def vector(purpose: str, node: int, round: int, scale: float = 0.1) -> Tensor:
    return torch.from_numpy(stream(7, purpose, node=node, round=round).normal(size=P, scale=scale)).float()


def context(node: int, round: int) -> RoundContext:
    weights = {0: WEIGHTS[node]} if node in WEIGHTS else WEIGHTS
    return RoundContext(seed=3, node=node, round=round, weights=weights, sent_bytes=100 * round)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a state, an update or a list of them; caches, which are no arguments, are left out."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if is_dataclass(value):
        return [t for f in fields(value) if f.init for t in tensors(getattr(value, f.name))]
    return []


def bits(value: Any) -> list[bytes]:
    return [t.detach().clone().view(torch.uint8).numpy().tobytes() for t in tensors(value)]


class Pair:
    """A node and two neighbours over several rounds, and everything that happened."""

    def __init__(
        self,
        algorithm: Any,
        *,
        reload: bool = False,
        late: tuple[tuple[int, int], ...] = (),
        lost: tuple[tuple[int, int], ...] = (),
    ) -> None:
        start = vector("start", 0, 0, scale=1.0)
        nodes = (0, *WEIGHTS)
        self.params = dict.fromkeys(nodes, start)
        self.state = {i: algorithm.init(start) for i in nodes}
        self.updates: list[Update] = []
        self.merged: list[Tensor] = []
        delayed: list[Received] = []
        for r in range(ROUNDS):
            sent = {}
            for i in nodes:
                self.params[i] = self.params[i] + vector("training", i, r)
                sent[i], self.state[i] = algorithm.share(self.state[i], self.params[i], context(i, r))
            if reload:
                self.state = {i: reloaded(algorithm, s) for i, s in self.state.items()}
            received = delayed + [
                Received(j, r, w, sent[j]) for j, w in WEIGHTS.items() if (j, r) not in (*late, *lost)
            ]
            received.sort(key=lambda item: (item.sender, item.round))
            delayed = [Received(j, r, 0.0, sent[j]) for j in WEIGHTS if (j, r) in late]
            self.params[0], self.state[0] = algorithm.merge(
                self.state[0], self.params[0], received, context(0, r)
            )
            for i in WEIGHTS:
                self.params[i], self.state[i] = algorithm.merge(
                    self.state[i], self.params[i], [], context(i, r)
                )
            if reload:
                self.state = {i: reloaded(algorithm, s) for i, s in self.state.items()}
            self.updates.append(sent[0])
            self.merged.append(self.params[0])


@cache
def played(algorithm: Any) -> Pair:
    """A pair that many tests look at and none changes."""
    return Pair(algorithm)


def reloaded(algorithm: Any, state: Any) -> Any:
    return checkpoint.load(checkpoint.dump(state), algorithm.state_types)


def test_is_deterministic_and_holds_no_state(algorithm: Any) -> None:
    one = played(algorithm)
    two = Pair(algorithm)
    assert all(identical(a, b) for a, b in zip(one.updates, two.updates, strict=True))
    assert bits(one.merged) == bits(two.merged)


def test_draws_from_no_global_generator(algorithm: Any) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    seeded = Pair(algorithm)
    assert torch.equal(torch.get_rng_state(), before)
    assert bits(seeded.merged) == bits(played(algorithm).merged)


def test_does_not_depend_on_what_torch_takes_for_granted(algorithm: Any) -> None:
    """A program around it may have set another device or type for new tensors."""
    plain = played(algorithm)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # what is made there holds no numbers, so its use is an error
            changed = Pair(algorithm, reload=True)
            through = [codec("pco").decode(codec("pco").encode(u).data, dim=u.dim) for u in changed.updates]
    finally:
        torch.set_default_dtype(before)
    assert bits(changed.merged) == bits(plain.merged)
    assert all(identical(a, b) for a, b in zip(plain.updates, through, strict=True))


def test_is_frozen_picklable_and_printable(algorithm: Any) -> None:
    again = pickle.loads(pickle.dumps(algorithm))
    assert again == algorithm
    assert hash(again) == hash(algorithm)
    assert type(algorithm).__name__ in repr(algorithm)
    assert "0x" not in repr(algorithm)
    with pytest.raises((AttributeError, TypeError)):
        algorithm.values = "float32"
    assert bits(Pair(again).merged) == bits(played(algorithm).merged)


def test_leaves_its_inputs_alone(algorithm: Any) -> None:
    pair = played(algorithm)
    ctx, params = context(0, ROUNDS), pair.params[0] + 0.5
    state = algorithm.init(params)
    for step in (
        lambda: algorithm.init(params),
        lambda: algorithm.share(state, params, ctx),
        lambda: algorithm.share(pair.state[0], params, ctx),
    ):
        before = bits([state, pair.state[0], params])
        step()
        assert bits([state, pair.state[0], params]) == before
    update, shared = algorithm.share(pair.state[0], params, ctx)
    _, of_peer = algorithm.share(pair.state[1], params, context(1, ROUNDS))
    from_peer, _ = algorithm.share(pair.state[1], params, context(1, ROUNDS))
    received = [Received(1, ROUNDS, 0.25, from_peer)]
    held = [update, shared, of_peer, [item.update for item in received], params]
    before, weights = bits(held), dict(ctx.weights)
    for _ in range(2):
        algorithm.merge(shared, params, received, ctx)
        algorithm.merge(shared, params, [], ctx)
        if algorithm.remembers_peers:
            algorithm.keyframe(shared, ctx)
    assert bits(held) == before
    assert len(received) == 1
    assert ctx.weights == weights


def test_results_do_not_alias_the_parameters(algorithm: Any) -> None:
    """A state may keep the vector that merge returned, as it is, and no other memory of the caller."""
    start = vector("start", 0, 0)
    state = algorithm.init(start)
    initial = bits(state)
    start.zero_()
    assert bits(state) == initial
    params = vector("training", 0, 0)
    update, state = algorithm.share(state, params, context(0, 0))
    sent = bits(update)
    merged, state = algorithm.merge(state, params, [], context(0, 0))
    own = [tensor for tensor in tensors(state) if tensor is not merged]
    after, given = bits(own), bits(params)
    merged.zero_()
    assert bits(own) == after
    assert bits(update) == sent
    assert bits(params) == given


def test_states_the_memory_of_its_state(algorithm: Any) -> None:
    """As in the table of docs/explanation/assumptions.md, which tests/test_docs.py compares."""
    pair = played(algorithm)
    kept = {
        t.data_ptr(): t.numel() * t.element_size() for t in tensors(pair.state[0]) if t is not pair.params[0]
    }
    vectors = sum(kept.values()) / 4 / algorithm.update_dim(P)
    stated = algorithm.vectors(len(WEIGHTS)).state
    history = getattr(algorithm, "history", 0)  # with so few parameters the share of zeros varies
    assert stated - 1.1 - history <= vectors <= stated + 0.1 + 0.5 * history


def test_keeps_dtypes_and_shapes(algorithm: Any) -> None:
    pair = played(algorithm)
    for update, merged in zip(pair.updates, pair.merged, strict=True):
        if not isinstance(getattr(algorithm, "values", None), str):
            assert isinstance(update.values, Quantized)
        else:
            assert isinstance(update.values, Tensor)
            bfloat16 = algorithm.values == "bfloat16"
            assert update.values.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        assert (merged.dtype, merged.shape) == (torch.float32, (P,))
        positions = update.indices()
        if positions is not None:
            assert positions.dtype == torch.int64
            assert bool((positions[1:] > positions[:-1]).all())
            assert len(positions) == 0 or 0 <= int(positions[0]) <= int(positions[-1]) < update.dim
    kinds = {torch.float32, torch.int32} if algorithm in RATED.values() else {torch.float32}
    assert all(t.dtype in kinds and not t.requires_grad for t in tensors(pair.state))


def test_update_dim_is_that_of_the_updates(algorithm: Any) -> None:
    for size in (1, 2, 5, P, 200):
        params = torch.linspace(-1, 1, size)
        update, _ = algorithm.share(algorithm.init(torch.zeros(size)), params, context(0, 0))
        assert update.dim == algorithm.update_dim(size)


def test_updates_travel_through_every_codec(algorithm: Any) -> None:
    for update in played(algorithm).updates:
        for name in ("raw", "pco"):
            assert identical(
                update, codec(name).decode(codec(name).encode(update).data, dim=algorithm.update_dim(P))
            )


@pytest.mark.parametrize("name", ["raw", "pco"])
def test_what_is_merged_after_a_codec_is_what_was_sent(algorithm: Any, name: str) -> None:
    """share, encode, decode, merge: nothing is lost on the way; the sender knows what its neighbours read."""
    pair = played(algorithm)
    params = pair.params[0] + 0.5
    _, state = algorithm.share(pair.state[0], params, context(0, ROUNDS))
    sent, _ = algorithm.share(pair.state[1], pair.params[1] - 0.5, context(1, ROUNDS))
    through = codec(name).decode(codec(name).encode(sent).data, dim=sent.dim)
    results = [
        algorithm.merge(state, params, [Received(1, ROUNDS, 0.25, update)], context(0, ROUNDS))
        for update in (sent, through)
    ]
    assert bits(results[0]) == bits(results[1])
    assert algorithm.stale_peers(results[0][1]) == frozenset(), "a replica at the receiver is the sender's"


ONE, THREE = ((1, 2),), ((1, 0), (4, 0), (4, 3))


@pytest.mark.parametrize(
    ("how", "gone"),
    [
        ("late", ()),
        ("late", THREE),
        ("lost", THREE),
        *(pytest.param(how, ONE, marks=pytest.mark.slow) for how in ("late", "lost")),
    ],
)
def test_states_survive_a_checkpoint_at_any_time(
    algorithm: Any, how: str, gone: tuple[tuple[int, int], ...]
) -> None:
    through = Pair(algorithm, reload=True, **{how: gone})
    without = Pair(algorithm, **{how: gone}) if gone else played(algorithm)
    assert all(identical(a, b) for a, b in zip(through.updates, without.updates, strict=True))
    assert bits(through.merged) == bits(without.merged)
    assert bits(through.state) == bits(without.state)
    assert checkpoint.dump(through.state) == checkpoint.dump(without.state)


def test_nothing_received_changes_nothing(algorithm: Any) -> None:
    pair = played(algorithm)
    params = pair.params[0] + 1.0
    _, state = algorithm.share(pair.state[0], params, context(0, ROUNDS))
    merged, _ = algorithm.merge(state, params, [], context(0, ROUNDS))
    assert torch.equal(merged, params)


def test_what_has_no_weight_changes_nothing(algorithm: Any) -> None:
    pair = played(algorithm)
    params = pair.params[0] + 1.0
    _, state = algorithm.share(pair.state[0], params, context(0, ROUNDS))
    far = Update(algorithm.update_dim(P), None, torch.full((algorithm.update_dim(P),), 50.0))
    merged, _ = algorithm.merge(state, params, [Received(1, ROUNDS - 1, 0.0, far)], context(0, ROUNDS))
    assert torch.equal(merged, params)


def test_merging_is_pulled_towards_what_was_received(algorithm: Any) -> None:
    """One dense update of a constant offset, which stands alone: x + W_ij (v_j - v_i), scaled by gamma."""
    if algorithm in RATED.values():
        pytest.skip("its updates are symbols: see test_symbols_of_a_neighbour_are_pulled_towards")
    if type(algorithm).__module__.rpartition(".")[2] in OWN_FORM:
        pytest.skip("see tests/sharing/test_baselines.py")
    if getattr(algorithm, "robust", None) is not None:
        pytest.skip("a robust merge is not pulled by one neighbour alone: see tests/sharing/test_robust.py")
    params = vector("start", 0, 0)
    update, state = algorithm.share(algorithm.init(params), params, context(0, 0))
    start = torch.zeros(P) if algorithm.remembers_peers else params
    transform = getattr(algorithm, "transform", None) or Wavelet("haar", levels=0)
    own = transform.forward(start)
    if algorithm.remembers_peers:
        own = (
            own.index_add(0, update.indices(), update.dense_values())
            if update.indices() is not None
            else params
        )
    elif algorithm.values != "float32":
        # what was sent counts as quantized, at the sender too
        positions = update.indices()
        own = (
            update.dense_values() if positions is None else own.index_copy(0, positions, update.dense_values())
        )
    offset = transform.forward(torch.full((P,), 2.0))
    merged, _ = algorithm.merge(
        state, params, [Received(1, 0, 0.25, Update(len(own), None, own + offset))], context(0, 0)
    )
    torch.testing.assert_close(merged, params + 0.5 * getattr(algorithm, "gamma", 1.0), rtol=0, atol=1e-5)


def test_missing_and_keys_belong_to_those_that_remember(algorithm: Any) -> None:
    state = algorithm.init(torch.zeros(P))
    assert algorithm.stale_peers(state) == frozenset()
    pair = Pair(algorithm, lost=((1, 2),))
    if not algorithm.remembers_peers:
        assert algorithm.replica_round(pair.state[0], 1) is None
        assert algorithm.stale_peers(pair.state[0]) == frozenset()
        checked = isinstance(algorithm, Moniqua | PowerGossip)
        assert all(update.base is None and (update.check is not None) == checked for update in pair.updates)
        with pytest.raises(TypeError, match="no keyframe"):
            algorithm.keyframe(pair.state[0], context(0, 0))
        return
    assert algorithm.stale_peers(pair.state[0]) == {1}, "nothing heals without a keyframe"
    with pytest.raises(UsageError, match="shared nothing yet"):
        algorithm.keyframe(state, context(0, 0))
    keyframe = algorithm.keyframe(pair.state[1], context(1, ROUNDS - 1))
    assert keyframe.base is None
    _, state = algorithm.share(pair.state[0], pair.params[0], context(0, ROUNDS))
    _, healed = algorithm.merge(
        state, pair.params[0], [Received(1, ROUNDS - 1, 0.0, keyframe)], context(0, ROUNDS)
    )
    assert algorithm.stale_peers(healed) == frozenset()
    assert bits(healed.replicas[1].x_hat) == bits(pair.state[1].x_hat)
    for update in pair.updates:
        assert update.check is not None
    assert [update.base for update in pair.updates] == [None, *range(ROUNDS - 1)]


REMEMBERING = [name for name, algorithm in ALGORITHMS.items() if algorithm.remembers_peers]


@pytest.mark.parametrize("name", REMEMBERING)
def test_late_updates_are_caught_up_with(name: str) -> None:
    late, in_time = Pair(ALGORITHMS[name], late=((1, 2),)), played(ALGORITHMS[name])
    assert ALGORITHMS[name].stale_peers(late.state[0]) == frozenset()
    assert bits(late.state[0].replicas) == bits(in_time.state[0].replicas)


@pytest.mark.parametrize("name", REMEMBERING)
def test_peers_that_are_no_neighbours_any_more_are_forgotten(name: str) -> None:
    algorithm = ALGORITHMS[name]
    pair = Pair(algorithm, lost=((1, 2),))
    assert pair.state[0].stale_peers == {1}
    params = pair.params[0]
    ctx = RoundContext(3, 0, ROUNDS, {})
    _, state = algorithm.share(pair.state[0], params, ctx)
    _, state = algorithm.merge(state, params, [], ctx)
    assert state.replicas == {}
    assert algorithm.stale_peers(state) == frozenset()


@pytest.mark.parametrize("name", RATED)
def test_symbols_of_a_neighbour_are_pulled_towards(name: str) -> None:
    """Two nodes that have moved apart by far more than a step: x + gamma W (x_j - x), but for roundings."""
    algorithm = RATED[name]
    if algorithm == closed_loop(budget_bytes=100, wavelet=None, history=1):
        pytest.skip("with so few bytes its steps are as long as the way")
    start = vector("start", 0, 0)
    params = {0: start + 0.01, 1: start + 0.01 * (1 + vector("apart", 1, 0, scale=1.0))}
    sent, state = {}, {}
    for i in (0, 1):
        sent[i], state[i] = algorithm.share(algorithm.init(start), params[i], context(i, 0))
    merged, after = algorithm.merge(state[0], params[0], [Received(1, 0, 0.25, sent[1])], context(0, 0))
    assert algorithm.stale_peers(after) == frozenset()
    gamma = getattr(algorithm, "gamma", 1.0)
    steps = [float(sent[i].values.scales.max()) for i in (0, 1)]
    expected = params[0] + 0.25 * gamma * (params[1] - params[0])
    most = 0.25 * gamma * sum(steps) * 2
    assert float((merged - expected).abs().max()) <= most


@dataclass(frozen=True)
class Noting:
    """Leaves values as they are, and notes what it was asked."""

    asked: list[tuple[int, tuple[int, ...]]]

    def __call__(self, values: Tensor, subbands: tuple[int, ...], ctx: RoundContext) -> Tensor:
        self.asked.append((len(values), subbands))
        return values


@pytest.mark.parametrize("kind", ["full", "random_k", "top_k", "choco"])
def test_parameters_are_one_subband(kind: str) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []
    build = {"full": full, "random_k": lambda **more: random_k(0.2, **more)}
    build |= {"top_k": lambda **more: top_k(0.2, **more), "choco": lambda **more: choco(0.2, 0.5, **more)}
    algorithm = build[kind](values=Noting(asked))
    update, _ = algorithm.share(algorithm.init(torch.zeros(P)), vector("training", 0, 0), context(0, 0))
    assert asked == [(update.count, (update.count,))]


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("mode", ["symmetric", "periodization"])
def test_a_quantizer_gets_the_number_of_values_in_each_subband(fraction: float, mode: Any) -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []
    algorithm = jwins(FixedCutoff(fraction), mode=mode, levels=3, values=Noting(asked))
    plain = jwins(FixedCutoff(fraction), mode=mode, levels=3)
    params = vector("training", 0, 0)
    update, _ = algorithm.share(algorithm.init(torch.zeros(P)), params, context(0, 0))
    assert identical(update, plain.share(plain.init(torch.zeros(P)), params, context(0, 0))[0])
    subband = torch.repeat_interleave(torch.tensor(Wavelet("sym2", 3, mode).subbands(P)))
    positions = update.indices()
    chosen = subband if positions is None else subband[positions]
    assert asked == [(update.count, tuple(torch.bincount(chosen, minlength=4).tolist()))]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, a in ALGORITHMS.items()
        if isinstance(getattr(a, "values", None), Steps)
        and type(a).__module__.rpartition(".")[2] not in OWN_FORM  # they send no parameters
    ],
)
def test_a_quantizer_errs_by_half_a_step_and_its_offset(name: str) -> None:
    """The sender goes on with what its neighbours read, so what they hold is near what it has."""
    algorithm = ALGORITHMS[name]
    params = vector("training", 0, 0)
    update, _ = algorithm.share(algorithm.init(torch.zeros(P)), params, context(0, 0))
    assert isinstance(update.values, Quantized)
    coefficients = algorithm.transform.forward(params) if getattr(algorithm, "transform", None) else params
    positions = update.indices()
    exact = coefficients if positions is None else coefficients[positions]
    steps = update.values.scales.repeat_interleave(torch.tensor(update.values.runs))
    assert bool(((update.dense_values() - exact).abs() <= 0.5501 * steps + 1e-6).all())


# --- Parameters that are changed behind an algorithm ------------------------------------------------------


def test_projected_parameters_leave_a_state_as_if_merged_so(algorithm: Any) -> None:
    """State that depends on merged parameters must use those from which the next round starts."""
    pair = played(algorithm)
    params, state = pair.params[0], pair.state[0]
    changed = params.clamp(min=0.0)
    before = bits(state)
    after = algorithm.projected(state, changed)
    assert bits(state) == before
    kept = getattr(after, "start", None)
    if kept is None:
        assert bits(after) == before
        return
    in_parameters = algorithm in RATED.values() or getattr(algorithm, "transform", None) is None
    expected = bits(changed if in_parameters else algorithm.transform.forward(changed))
    assert bits(kept) == expected
    assert bits(getattr(after, "since", None)) == bits(getattr(state, "since", None))
    changed.zero_()  # as training does, in place
    assert bits(kept) == expected


@pytest.mark.parametrize("score", ["reference", "training_only"])
def test_a_projection_is_no_training(score: Any) -> None:
    """Clamped variances were scored as if the round's training had changed them, and sent for it."""
    algorithm = jwins(FixedCutoff(0.05), wavelet=None, score=score)
    x = vector("start", 0, 0)
    _, state = algorithm.share(algorithm.init(x), x, context(0, 0))
    merged, state = algorithm.merge(state, x, [], context(0, 0))
    clamped = merged.index_fill(0, torch.tensor([3, 30]), 50.0)
    state = algorithm.projected(state, clamped)
    trained = clamped.index_add(0, torch.tensor([7, 8, 9]), torch.full((3,), 0.5))
    update, state = algorithm.share(state, trained, context(0, 1))
    sent = update.indices().tolist()
    if score == "training_only":
        assert sent == [7, 8, 9]
    else:  # measured from the start of the round in which it was last sent
        assert {3, 30} < set(sent)
        assert state.since[sent].tolist() == clamped[sent].tolist()


def test_nodes_and_rounds_draw_for_themselves() -> None:
    params = vector("training", 0, 0)
    for algorithm in (random_k(0.2), jwins(wavelet=None)):
        drawn = {
            tuple(update.indices().tolist()) if update.indices() is not None else None
            for node in range(4)
            for r in range(4)
            for update in [algorithm.share(algorithm.init(torch.zeros(P)), params, context(node, r))[0]]
        }
        assert len(drawn) > 3


# --- Arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: random_k(0.0), "sharing.fraction = 0.0"),
        (lambda: random_k(20), r"sharing.fraction = 20: .* did you mean 0.2\?"),
        (lambda: random_k(float("nan")), "sharing.fraction = nan"),
        (lambda: top_k(-0.5), "sharing.cutoff.fraction = -0.5"),
        (lambda: choco(1.5, 0.5), "sharing.fraction = 1.5"),
        (lambda: choco(0.5, 0.0), "sharing.gamma = 0.0"),
        (lambda: choco(0.5, 1.1), "sharing.gamma = 1.1"),
        (lambda: full(values="float16"), "sharing.values = 'float16'"),  # type: ignore[arg-type]
        (lambda: jwins(score="best"), "sharing.score = 'best': .*since_sent"),  # type: ignore[arg-type]
        (lambda: jwins(dense_above=0.0), "sharing.dense_above = 0.0"),
        (lambda: jwins(dense_above=float("nan")), "sharing.dense_above = nan"),
        (lambda: jwins(wavelet="morlet"), "sharing.wavelet = 'morlet'"),
        (lambda: RandomCutoff(()), "sharing.cutoff.fractions"),
        (lambda: RandomCutoff((0.1, 1.4)), r"sharing.cutoff.fractions\[1\] = 1.4"),
    ],
)
def test_arguments_out_of_range_name_their_path(build: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        build()


@pytest.mark.parametrize("fraction", [-0.1, float("nan")])
def test_a_cutoff_out_of_range_is_misuse(fraction: float) -> None:
    algorithm = jwins(lambda ctx: fraction)
    with pytest.raises(UsageError, match="fraction"):
        algorithm.share(algorithm.init(torch.zeros(P)), torch.ones(P), context(0, 0))


def test_dense_above_sends_everything_without_positions() -> None:
    params = vector("training", 0, 0)
    for fraction, dense in ((0.49, False), (0.5, True), (0.7, True)):
        algorithm = jwins(FixedCutoff(fraction), dense_above=0.5)
        update, _ = algorithm.share(algorithm.init(torch.zeros(P)), params, context(0, 0))
        assert (update.positions is None) == dense
        assert update.count == (update.dim if dense else round(fraction * update.dim))


def test_topologies_give_weights_that_a_context_takes() -> None:
    for graph in (Ring(5).at(0), FullyConnected(4).at(0)):
        ctx = RoundContext(1, 0, 0, graph.senders[0])
        assert ctx.own_weight == pytest.approx(graph.matrix()[0, 0])


def test_the_names_of_algorithms_are_their_constructors() -> None:
    assert isinstance(top_k(0.1), Jwins)
    assert top_k(0.1).transform is None
    assert jwins().transform == Wavelet("sym2", 4, "symmetric")
