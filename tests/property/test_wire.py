"""Properties of the wire format: lossless for every update, CodecError for everything else."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frames import pack, unpack
from jwins.errors import CodecError, FrameError, UsageError
from jwins.sharing.update import MAX_DIM, Quantized, Sampled, Update
from jwins.wire import (
    HEADER_BYTES,
    Bye,
    Frame,
    Hello,
    KeyframeRequest,
    codec,
    describe,
    max_frame_bytes,
)
from jwins.wire.elias import (
    LARGEST,
    decode_integers,
    decode_positions,
    encode_integers,
    encode_positions,
)
from jwins.wire.frame import MAX_SIGNATURE_BYTES, RoundRequest, SignedRound
from updates import identical

CODEC_NAMES = ["pco", "raw", *(["paper"] if importlib.util.find_spec("fpzip") else [])]
DIGEST = b"property"
FUZZER = Path(__file__).parents[2] / "benchmarks" / "fuzz_codec.py"
quick = settings(max_examples=60, deadline=None)


def bits32(count: int):
    special = st.sampled_from([0, 0x80000000, 1, 0x80000001, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001])
    return st.lists(st.one_of(special, st.integers(0, 2**32 - 1)), min_size=count, max_size=count)


@st.composite
def updates(draw):
    dim = draw(st.integers(0, 200))
    kind = draw(st.sampled_from(["all", "listed", "sampled"]))
    listed = sorted(draw(st.sets(st.integers(0, dim - 1)))) if dim and kind == "listed" else []
    count = {"all": dim, "listed": len(listed), "sampled": draw(st.integers(0, dim))}[kind]
    positions = None
    if kind == "listed":
        positions = torch.tensor(listed, dtype=torch.int64)
    elif kind == "sampled":
        positions = Sampled(draw(st.integers(0, 2**64 - 1)), count)
    words = torch.from_numpy(np.array(draw(bits32(count)), dtype=np.uint32).view(np.int32))
    values = {
        "float32": lambda: words.view(torch.float32),
        "bfloat16": lambda: words.to(torch.int16).view(torch.bfloat16),
        "quantized": lambda: quantized(draw, words),
    }[draw(st.sampled_from(["float32", "bfloat16", "quantized"]))]()
    word = st.one_of(st.none(), st.integers(0, 2**32 - 1))
    return Update(dim, positions, values, draw(word), draw(word))


def quantized(draw, symbols):
    cuts = sorted(draw(st.lists(st.integers(0, len(symbols)), max_size=4)))
    runs = tuple(b - a for a, b in zip([0, *cuts], [*cuts, len(symbols)], strict=True))
    # As patterns of bits: from the smallest subnormal to the largest finite number.
    scales = draw(st.lists(st.integers(1, 0x7F7FFFFF), min_size=len(runs), max_size=len(runs)))
    dither = draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))
    offset = draw(st.one_of(st.just(0.0), st.floats(0, 0.5, exclude_max=True, width=32)))
    return Quantized(symbols, torch.tensor(scales, dtype=torch.int32).view(torch.float32), runs, dither, offset)


@pytest.mark.parametrize("name", CODEC_NAMES)
@given(update=updates())
@quick
def test_decode_inverts_encode(name, update):
    data = codec(name).encode(update).data
    assert identical(codec(name).decode(data, dim=update.dim), update)
    frame = unpack(pack(Frame(1, 2, update), codec(name), DIGEST).data, codec(name), DIGEST, dim=update.dim)
    assert identical(frame.update, update)


@pytest.mark.parametrize("name", CODEC_NAMES)
@given(data=st.binary(max_size=80), dim=st.integers(0, 1000))
@quick
def test_garbage_is_refused_or_decodes(name, data, dim):
    try:
        update = codec(name).decode(data, dim=dim)
    except CodecError:
        return
    assert update.dim == dim
    where = update.indices()
    if where is not None and len(where):
        assert int(where[0]) >= 0
        assert int(where[-1]) < dim
        assert bool((where[1:] > where[:-1]).all())


@pytest.mark.parametrize("name", CODEC_NAMES)
@given(update=updates(), seed=st.integers(0, 2**32 - 1))
@quick
def test_truncated_payloads_are_refused(name, update, seed):
    data = codec(name).encode(update).data
    cut = seed % len(data)
    try:
        after = codec(name).decode(data[:cut], dim=update.dim)
    except CodecError:
        return
    # pcodec may end with a byte that says nothing new; what decodes is then the same.
    assert identical(after, update)


@given(data=st.binary(max_size=200))
@quick
def test_garbage_is_no_frame(data):
    assume(not data.startswith(b"JWNS"))
    for call in (lambda: unpack(data, codec("pco"), DIGEST, dim=10), lambda: describe(data)):
        with pytest.raises(FrameError):
            call()


@given(update=updates(), where=st.integers(0, 10**6), bit=st.integers(0, 7))
@quick
def test_a_flipped_bit_is_noticed(update, where, bit):
    data = bytearray(pack(Frame(1, 2, update), codec("raw"), DIGEST).data)
    data[where % len(data)] ^= 1 << bit
    with pytest.raises(FrameError):
        unpack(bytes(data), codec("raw"), DIGEST, dim=update.dim)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
words = st.integers(0, 2**32 - 1)
messages = st.one_of(
    st.builds(
        Hello,
        words,
        words,
        st.integers(0, MAX_DIM),
        names,
        st.dictionaries(names, names, max_size=4),
        st.binary(max_size=64),
    ),
    st.builds(KeyframeRequest, words, words),
    st.builds(RoundRequest, words, words, words, st.binary(min_size=16, max_size=16)),
    st.builds(SignedRound, words, words, words, words, st.binary(max_size=MAX_SIGNATURE_BYTES)),
    st.builds(Bye, words, words, st.text(st.characters(exclude_categories=["Cs"]), max_size=500)),
)


@given(message=messages)
@quick
def test_control_messages_come_back(message):
    packed = pack(message, codec("pco"), DIGEST)
    assert packed.header_bytes == len(packed.data) <= max_frame_bytes(0)
    assert unpack(packed.data, codec("raw"), DIGEST, dim=5) == message
    assert describe(packed.data)["sender"] == message.sender


@pytest.mark.parametrize(
    "message",
    [
        KeyframeRequest(-1, 0),
        KeyframeRequest(0, 2**32),
        Hello(0, 0, 2**32, "pco", {}, b""),
        Hello(0, 0, 1, "p" * 65, {}, b""),
        Hello(0, 0, 1, "pco", {str(i): "" for i in range(17)}, b""),
        Hello(0, 0, 1, "pco", {str(i): "\N{PILE OF POO}" * 64 for i in range(16)}, b""),
        Hello(0, 0, 1, "pco", {}, bytes(65)),
        RoundRequest(0, 0, 0, bytes(15)),
        SignedRound(0, 0, 0, 0, bytes(MAX_SIGNATURE_BYTES + 1)),
        SignedRound(0, 0, 2**32, 0, b""),
        Bye(0, 0, "x" * 501),
        Bye(0, 0, "\ud800"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_control_messages_over_the_limits_are_not_packed(message):
    with pytest.raises(UsageError):
        pack(message, codec("pco"), DIGEST)


def test_pack_wants_eight_bytes_of_digest():
    with pytest.raises(UsageError, match="expected 8"):
        pack(KeyframeRequest(0, 0), codec("raw"), b"short")


@given(st.lists(st.integers(1, LARGEST), max_size=60), st.integers(0, 33))
@quick
def test_elias_gamma_is_the_textbook_code(values, shift):
    values = [max(1, value >> shift) for value in values]
    text = "".join("0" * (value.bit_length() - 1) + format(value, "b") for value in values)
    text += "0" * (-len(text) % 8)
    expected = int(text, 2).to_bytes(len(text) // 8, "big") if text else b""
    coded = encode_integers(np.array(values, dtype=np.int64))
    assert coded == expected
    assert decode_integers(coded, count=len(values)).tolist() == values


def test_elias_gamma_across_blocks():
    rng = np.random.default_rng(3)
    for bound in (2, 3, 40, 2**32):
        values = np.minimum(1 + (rng.pareto(1.0, 60_000) * bound / 2).astype(np.int64), LARGEST)
        assert np.array_equal(decode_integers(encode_integers(values), count=len(values)), values)
    positions = np.sort(rng.choice(400_000, 100_000, replace=False))
    coded = encode_positions(positions)
    assert np.array_equal(decode_positions(coded, count=100_000, dim=400_000), positions)


@given(data=st.binary(max_size=60), count=st.integers(0, 500), dim=st.integers(0, 2000))
@quick
def test_elias_gamma_accepts_exactly_its_own_codes(data, count, dim):
    try:
        positions = decode_positions(data, count=count, dim=dim)
    except CodecError:
        return
    assert encode_positions(positions) == data
    assert len(positions) == count
    assert count == 0 or int(positions[-1]) < dim


def test_elias_gamma_refuses_integers_out_of_range():
    for value in (0, -1, LARGEST + 1):
        with pytest.raises(UsageError):
            encode_integers(np.array([value]))


@pytest.mark.parametrize("name", ["pco", "raw"])
def test_claims_of_billions_are_refused(name):
    for layout in [*range(12), 0x48, 0x88, 0xC8, 0xC9, 0xFA]:
        for count in (2**32 - 1, 10**9):
            payload = struct.pack("<BII", layout, count, 0) + bytes(40)
            with pytest.raises(CodecError):
                codec(name).decode(payload, dim=MAX_DIM if count == 10**9 else 5)


def test_frames_of_others_are_refused():
    update = Update(3, None, torch.ones(3))
    data = pack(Frame(1, 2, update), codec("raw"), DIGEST).data
    for call, problem in (
        (lambda: unpack(data, codec("raw"), b"another.", dim=3), "experiment"),
        (lambda: unpack(data, codec("pco"), DIGEST, dim=3), "codec"),
        (lambda: unpack(data, codec("raw"), DIGEST, dim=4), "vector of 3"),
        (lambda: unpack(data + b"x", codec("raw"), DIGEST, dim=3), "announces"),
        (lambda: unpack(data[: HEADER_BYTES - 1], codec("raw"), DIGEST, dim=3), "at least 36"),
        (lambda: unpack(b"HTTP" + data[4:], codec("raw"), DIGEST, dim=3), "not a frame"),
        (lambda: unpack(data[:4] + b"\x01" + data[5:], codec("raw"), DIGEST, dim=3), "version 1"),
        (lambda: unpack(data[:5] + b"\x09" + data[6:], codec("raw"), DIGEST, dim=3), "kind 9"),
        (lambda: unpack(data[:-1] + b"\x00", codec("raw"), DIGEST, dim=3), "checksum"),
    ):
        with pytest.raises(FrameError, match=problem):
            call()


@given(update=updates(), keyframe=st.booleans(), roster_version=st.integers(0, 127))
@quick
def test_a_frame_names_the_version_of_the_roster(update, keyframe, roster_version):
    packed = pack(Frame(1, 2, update, keyframe, roster_version), codec("raw"), DIGEST)
    found = unpack(packed.data, codec("raw"), DIGEST, dim=update.dim)
    assert (found.keyframe, found.roster_version) == (keyframe, roster_version)
    assert describe(packed.data)["roster_version"] == roster_version


@pytest.mark.parametrize("roster_version", [-1, 128])
def test_a_roster_version_that_does_not_fit_is_misuse(roster_version):
    with pytest.raises(UsageError, match=r"Frame\.roster_version"):
        pack(Frame(1, 2, Update(3, None, torch.ones(3)), roster_version=roster_version), codec("raw"), DIGEST)


def test_describe_tells_what_is_inside():
    values = torch.tensor([1.0, float("nan"), -2.0])
    update = Update(12, torch.tensor([1, 5, 11]), values, base=4)
    about = describe(pack(Frame(1, 2, update, keyframe=True), codec("pco"), DIGEST).data)
    assert about["kind"] == "frame"
    assert (about["codec"], about["positions"], about["values"]) == ("pco", "listed", "float32")
    assert (about["count"], about["density"], about["base"], about["check"]) == (3, 0.25, 4, None)
    assert (about["value_min"], about["value_max"], about["not_finite"]) == (-2.0, 1.0, 1)
    assert about["frame_bytes"] == about["header_bytes"] + about["positions_bytes"] + about["values_bytes"]


def test_describe_never_gives_foreign_bytes_to_fpzip(monkeypatch):
    paper = pytest.importorskip("jwins.wire.fpzip")
    pytest.importorskip("fpzip")
    data = pack(Frame(1, 2, Update(3, None, torch.ones(3))), codec("paper"), DIGEST).data

    def forbidden(*_):
        raise AssertionError("decoded")

    for decode in ("decode_floats", "decode_halves", "decode_symbols"):
        monkeypatch.setattr(paper, decode, forbidden)
    about = describe(data)
    assert about["codec"] == "paper"
    assert "value_min" not in about


def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_codec", FUZZER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_codec"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dim", [300, 5000])
def test_short_fuzz(dim):
    fuzz = fuzzer()
    tally = fuzz.run(fuzz.Corpus.of(dim, fuzz.SEED), dim, fuzz.SEED, seconds=1.0)
    assert tally.failures == []
    assert tally.past_header() >= fuzz.MIN_PAST_HEADER
    assert all(tally.of(name).get("codec error") for name in fuzz.TARGETS)


def test_a_changed_bit_of_a_message_without_payload_is_noticed():
    data = pack(KeyframeRequest(1, 7), codec("raw"), b"8 bytes.").data
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            unpack(bytes(changed), codec("raw"), b"8 bytes.", dim=10)


@pytest.mark.parametrize("failing", [False, True])
def test_the_fuzzer_leaves_only_failing_inputs(failing, tmp_path, monkeypatch):
    fuzz = fuzzer()

    def round_of(dim, seed, seconds, folder):
        (folder / "current").write_bytes(b"x")
        if failing:
            (folder / "dim300-seed1.bin").write_bytes(b"x")
        return fuzz.Tally(failures=["failed"] if failing else [])

    monkeypatch.setattr(fuzz, "round_of", round_of)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fuzz_codec.py", "--minutes", "0", "--dims", "300"])
    assert fuzz.main() == int(failing)
    left = [path.name for path in tmp_path.glob("jwins-fuzz-*/*")]
    assert left == (["dim300-seed1.bin"] if failing else [])
    assert len(list(tmp_path.iterdir())) == int(failing)


@pytest.mark.slow
def test_fuzz_in_a_process_of_its_own_within_memory(tmp_path):
    command = [sys.executable, str(FUZZER), "--minutes", "0.02", "--dims", "1000000", "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
