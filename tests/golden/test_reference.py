"""The five reference files, reproduced by the public objects with their state carried through all rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jwins.rng import RoundContext
from jwins.sharing import Sharing, choco, full, jwins, top_k
from jwins.sharing.update import Received

REFERENCE = Path(__file__).parent / "reference"


class Script:
    """A cut-off that reads the fractions the reference drew."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __call__(self, ctx: RoundContext) -> float:
        return float(self.file[f"r{ctx.round}_n{ctx.node}_alpha"])


def algorithm(name: str, file: Any) -> Sharing[Any]:
    return {
        "full": lambda: full(),
        "topk_a20": lambda: top_k(0.2, accumulate=False),
        "choco_a20_g60": lambda: choco(0.2, gamma=0.6),
        "jwins_sym2_l4_avgTrue": lambda: jwins(Script(file), "sym2", 4, score="reference"),
        "jwins_sym2_l4_avgFalse": lambda: jwins(Script(file), "sym2", 4, score="training_only"),
    }[name]()


@pytest.mark.parametrize(
    "name", ["full", "topk_a20", "choco_a20_g60", "jwins_sym2_l4_avgTrue", "jwins_sym2_l4_avgFalse"]
)
def test_reproduces_the_reference(name: str) -> None:
    with np.load(REFERENCE / f"{name}.npz") as loaded:
        file = {key: loaded[key] for key in loaded.files}
    nodes = range(int(file["n"]))
    neighbours: dict[int, set[int]] = {i: set() for i in nodes}
    for a, b in file["edges"].tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    weights = {
        i: {j: 1.0 / (1 + max(len(neighbours[i]), len(neighbours[j]))) for j in sorted(neighbours[i])}
        for i in nodes
    }
    rounds = 1 + max(int(key[1 : key.index("_")]) for key in file if key.endswith("_merged"))
    assert rounds >= 3, "the state must be carried through several rounds to be tested"
    sharing = algorithm(name, file)
    state = {i: sharing.init(torch.from_numpy(file["x0"])) for i in nodes}
    for r in range(rounds):
        ctx = {i: RoundContext(seed=0, node=i, round=r, weights=weights[i]) for i in nodes}
        trained = {i: torch.from_numpy(file[f"r{r}_n{i}_trained"]) for i in nodes}
        sent = {}
        for i in nodes:
            sent[i], state[i] = sharing.share(state[i], trained[i], ctx[i])
            expected = file.get(f"r{r}_n{i}_indices")
            where = f"{name}, round {r}, node {i}"
            if expected is None:
                assert sent[i].positions is None, where
            else:
                positions = sent[i].indices()
                assert positions is not None, where
                order = np.argsort(expected)
                np.testing.assert_array_equal(positions.numpy(), expected[order], err_msg=where)
            values = file[f"r{r}_n{i}_values"] if expected is None else file[f"r{r}_n{i}_values"][order]
            np.testing.assert_allclose(sent[i].dense_values().numpy(), values, rtol=0, atol=1e-6, err_msg=where)
        for i in nodes:
            received = [Received(j, r, w, sent[j]) for j, w in weights[i].items()]
            merged, state[i] = sharing.merge(state[i], trained[i], received, ctx[i])
            np.testing.assert_allclose(
                merged.numpy(),
                file[f"r{r}_n{i}_merged"],
                rtol=0,
                atol=1e-5,
                err_msg=f"{name}, round {r}, node {i}",
            )
            assert not sharing.stale_peers(state[i])
