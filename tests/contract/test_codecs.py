"""Every codec keeps the contract of ``jwins.wire.Codec``. A new codec is one row of CODECS."""

from __future__ import annotations

import importlib.util
import pickle
import struct

import numpy as np
import pytest
import torch

from frames import pack, unpack
from jwins.errors import CodecError, ConfigError, UsageError
from jwins.sharing.update import Quantized, Sampled, Update
from jwins.wire import CODECS, MAX_RUNS, Encoded, Frame, codec, max_payload_bytes
from jwins.wire.codec import Paper, PositionsKind, ValuesKind, read_payload
from updates import identical

DIGEST = b"contract"
DIM = 3000


@pytest.fixture(params=sorted(CODECS))
def each(request):
    if request.param == "paper" and importlib.util.find_spec("fpzip") is None:
        pytest.skip("needs fpzip")
    return codec(request.param)


def values(kind: str, count: int):
    rng = np.random.default_rng(count)
    floats = torch.from_numpy(rng.normal(scale=0.1, size=count).astype(np.float32))
    bits = torch.from_numpy(rng.integers(-(2**31), 2**31, count, dtype=np.int64).astype(np.int32))
    if kind == "float32":
        return floats
    if kind == "bfloat16":
        return floats.to(torch.bfloat16)
    if kind == "any float32":  # NaN payloads, infinities, subnormals: every pattern of bits
        return bits.view(torch.float32)
    if kind == "any bfloat16":
        return bits.to(torch.int16).view(torch.bfloat16)
    if kind == "any symbols":
        return Quantized(bits, torch.tensor([1.0]), (count,))
    runs = (count // 3, 0, count - count // 3)
    symbols = torch.from_numpy(rng.integers(-7, 8, count).astype(np.int32))
    more = {
        "dithered": {"dither": 2**64 - 1},
        "offset": {"offset": 0.49},
        "both": {"dither": 0, "offset": 1e-45},
    }
    return Quantized(symbols, torch.tensor([0.5, 1e-38, 3e38]), runs, **more.get(kind, {}))


VALUES = (
    "float32",
    "bfloat16",
    "any float32",
    "any bfloat16",
    "symbols",
    "any symbols",
    "dithered",
    "offset",
    "both",
)


def positions(kind: str):
    rng = np.random.default_rng(1)
    some = {
        "all": None,
        "sampled": Sampled(seed=2**64 - 1, count=700),
        "none": torch.zeros(0, dtype=torch.int64),
        "first": torch.tensor([0]),
        "last": torch.tensor([DIM - 1]),
        "every": torch.arange(DIM),
        "random": torch.from_numpy(np.sort(rng.choice(DIM, 900, replace=False))),
        "far apart": torch.tensor([3, 299, 2990]),
    }[kind]
    count = DIM if some is None else some.count if isinstance(some, Sampled) else len(some)
    return some, count


POSITIONS = ("all", "sampled", "none", "first", "last", "every", "random", "far apart")


def update(positions_kind: str = "random", values_kind: str = "float32", **more) -> Update:
    some, count = positions(positions_kind)
    return Update(DIM, some, values(values_kind, count), **more)


@pytest.mark.parametrize("values_kind", VALUES)
@pytest.mark.parametrize("positions_kind", POSITIONS)
def test_gives_back_the_same_update(each, positions_kind, values_kind):
    before = update(positions_kind, values_kind)
    encoded = each.encode(before)
    assert identical(before, update(positions_kind, values_kind)), "the update was changed"
    after = each.decode(encoded.data, dim=DIM)
    assert identical(before, after)
    assert encoded.positions_bytes + encoded.values_bytes <= len(encoded.data)
    assert len(encoded.data) <= max_payload_bytes(DIM)


@pytest.mark.parametrize("base", [None, 0, 2**32 - 1])
@pytest.mark.parametrize("check", [None, 0, 2**32 - 1])
def test_carries_base_and_check(each, base, check):
    before = update(base=base, check=check)
    assert identical(before, each.decode(each.encode(before).data, dim=DIM))


def test_empty_vector(each):
    for before in (
        Update(0, None, torch.zeros(0)),
        Update(0, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bfloat16)),
        Update(0, Sampled(1, 0), Quantized(torch.zeros(0, dtype=torch.int32), torch.zeros(0), ())),
    ):
        assert identical(before, each.decode(each.encode(before).data, dim=0))


def test_positions_up_to_the_largest(each):
    dim = 2**32 - 1
    before = Update(dim, torch.tensor([0, 5, 2**31, dim - 1]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert identical(before, each.decode(each.encode(before).data, dim=dim))


def test_is_deterministic(each):
    for values_kind in VALUES:
        assert each.encode(update(values_kind=values_kind)) == each.encode(update(values_kind=values_kind))


def test_is_picklable_and_prints(each):
    again = pickle.loads(pickle.dumps(each))
    assert again == each
    assert again.encode(update()) == each.encode(update())
    assert repr(each)


def test_codes_and_names_are_distinct():
    assert {kind.code for kind in CODECS.values()} == {1, 2, 3}
    assert all(kind.name == name for name, kind in CODECS.items())


def test_counts_exactly_the_sections(each):
    encoded = each.encode(update("sampled", base=3))
    assert encoded.positions_bytes == 8
    assert len(encoded.data) - encoded.positions_bytes - encoded.values_bytes == 9 + 4
    payload = read_payload(each.encode(update("random", "bfloat16")).data, dim=DIM)
    assert (payload.positions_kind, payload.values_kind) == (PositionsKind.LISTED, ValuesKind.BFLOAT16)
    assert payload.count == 900


def test_results_are_writable_and_own_their_memory(each):
    data = each.encode(update()).data
    after = each.decode(data, dim=DIM)
    after.values.add_(1)
    after.positions.add_(0)
    assert identical(each.decode(data, dim=DIM), update())


def test_takes_views_and_transposed_tensors(each):
    wide = torch.arange(2 * DIM, dtype=torch.float32).reshape(DIM, 2).t()
    before = Update(DIM, None, wide[1].detach().requires_grad_())
    assert identical(before, each.decode(each.encode(before).data, dim=DIM))


def test_decodes_memoryviews_at_odd_addresses(each):
    encoded = each.encode(update())
    shifted = memoryview(b"x" + encoded.data)[1:]
    assert identical(update(), each.decode(shifted, dim=DIM))


@pytest.mark.parametrize("wrong", [[3, 2], [2, 2], [-1, 2], [2, DIM]])
def test_refuses_to_encode_positions_that_are_out_of_order_or_range(each, wrong):
    with pytest.raises(UsageError, match="position"):
        each.encode(Update(DIM, torch.tensor(wrong), torch.zeros(2)))


def test_refuses_to_encode_too_many_runs(each):
    num_runs = MAX_RUNS + 1
    quantized = Quantized(torch.zeros(0, dtype=torch.int32), torch.ones(num_runs), (0,) * num_runs)
    with pytest.raises(UsageError, match="longer runs"):
        each.encode(Update(DIM, torch.zeros(0, dtype=torch.int64), quantized))


def test_symbols_without_dither_or_offset_say_nothing_of_them(each):
    plain, both = (each.encode(update(values_kind=kind)) for kind in ("symbols", "both"))
    assert len(both.data) - len(plain.data) == 8 + 4
    assert plain.data[0] >> 6 == 0
    assert both.data[0] >> 6 == 3
    assert (plain.values_bytes, plain.positions_bytes) == (both.values_bytes, both.positions_bytes)


def test_a_codec_sees_the_runs_of_the_symbols(monkeypatch):
    """Return the bytes that an entropy coder with one model per subband needs before the symbols."""
    from jwins.wire.codec import _Plain

    seen = []
    encode, decode = _Plain.encode_symbols, _Plain.decode_symbols
    monkeypatch.setattr(
        _Plain, "encode_symbols", lambda symbols, runs: seen.append(runs) or encode(symbols, runs)
    )
    monkeypatch.setattr(
        _Plain,
        "decode_symbols",
        lambda data, *, count, runs: seen.append(runs) or decode(data, count=count, runs=runs),
    )
    before = update(values_kind="symbols")
    after = codec("raw").decode(codec("raw").encode(before).data, dim=DIM)
    assert seen == [(300, 0, 600)] * 2
    assert identical(before, after)


def damaged_head(values_kind: str, bit: int, words: bytes) -> bytes:
    """A raw payload whose layout has one more bit, and those bytes for it behind the head."""
    data = bytearray(codec("raw").encode(update("all", values_kind)).data)
    data[0] |= bit
    data[9:9] = words
    return bytes(data)


@pytest.mark.parametrize("values_kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bit", "words"), [(1 << 6, bytes(8)), (1 << 7, struct.pack("<f", 0.25))])
def test_refuses_dither_and_offset_of_values_that_are_no_symbols(values_kind, bit, words):
    with pytest.raises(CodecError, match="not quantized"):
        codec("raw").decode(damaged_head(values_kind, bit, words), dim=DIM)


@pytest.mark.parametrize("offset", [0.0, -0.0, -0.1, 0.5, 1.0, float("inf"), float("nan")])
def test_refuses_offsets_out_of_range(offset):
    with pytest.raises(CodecError, match="offset"):
        codec("raw").decode(damaged_head("symbols", 1 << 7, struct.pack("<f", offset)), dim=DIM)


def test_refuses_a_head_cut_off_in_its_fields(each):
    data = each.encode(update("none", "both", base=1, check=2)).data
    for size in range(9 + 4 + 4 + 8 + 4):
        with pytest.raises(CodecError):
            read_payload(data[:size], dim=DIM)


def test_refuses_another_dim(each):
    data = each.encode(update("all")).data
    with pytest.raises(CodecError):
        each.decode(data, dim=DIM - 1)
    with pytest.raises(CodecError):
        each.decode(each.encode(update("last")).data, dim=DIM - 1)


def test_goes_through_a_frame(each):
    frame = Frame(sender=3, round=9, update=update(), keyframe=True)
    packed = pack(frame, each, DIGEST)
    encoded: Encoded = each.encode(frame.update)
    assert (packed.positions_bytes, packed.values_bytes) == (encoded.positions_bytes, encoded.values_bytes)
    assert packed.header_bytes == 36 + 9
    after = unpack(packed.data, each, DIGEST, dim=DIM)
    assert (after.sender, after.round, after.keyframe) == (3, 9, True)
    assert identical(after.update, frame.update)


def test_unknown_codec_names_the_known_ones():
    with pytest.raises(ConfigError, match="pco, raw, paper"):
        codec("zip")


def test_paper_without_fpzip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fpzip", None)
    with pytest.raises(ConfigError, match=r"pip install 'jwins\[paper\]'"):
        codec("paper")


def test_paper_decodes_nothing_foreign(monkeypatch):
    pytest.importorskip("fpzip")
    from jwins.wire import fpzip as paper

    data = Paper().encode(update()).data
    assert identical(update(), Paper().decode(data, dim=DIM))
    with pytest.raises(CodecError, match="encoded recently"):
        Paper().decode(data[:-1] + bytes([data[-1] ^ 1]), dim=DIM)
    monkeypatch.setattr(paper, "OWN_PAYLOADS", 2)
    later = [Paper().encode(Update(DIM, Sampled(seed, 1), torch.ones(1))).data for seed in range(3)]
    assert [paper.is_own(payload) for payload in (data, *later)] == [False, False, True, True]
    with pytest.raises(CodecError, match="encoded recently"):
        Paper().decode(data, dim=DIM)
