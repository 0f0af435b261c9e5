"""Frames as committed bytes: what this release writes, and what it must go on reading.

``python tests/golden/test_frames.py`` writes the files anew, which is a change of the wire format.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from frames import pack, unpack
from jwins.sharing.update import Quantized, Sampled, Update, dither
from jwins.wire import HEADER_BYTES, Bye, Frame, Hello, KeyframeRequest, codec
from jwins.wire.codec import ValuesKind, read_payload
from jwins.wire.frame import RoundRequest, SignedRound
from updates import identical

FOLDER = Path(__file__).parent / "frames"
DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "wire.md"
DIGEST = bytes(range(8))
DIM = 40
DITHER = [11762495, -13561627, -2110381, 206295, 7047691]  # in units of 2^-25
SPECIAL = np.array(
    [0, 1 << 31, 1, 0x7F800000, 0x7FC00001, 0xFF800001], dtype=np.uint32
)  # zeros to NaN payloads


def updates() -> dict[str, Update]:
    floats = torch.arange(DIM, dtype=torch.float32) / 8 - 2
    floats[:6] = torch.from_numpy(SPECIAL.view(np.int32)).view(torch.float32)
    symbols = torch.arange(-10, 10, dtype=torch.int32) ** 3
    symbols[:2] = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    scales = torch.tensor([0.25, 3.0])
    quantized = Quantized(symbols, scales, (15, 5))
    listed = torch.tensor([0, 1, 2, 5, 6, 9, 10, 11, 12, 14, 17, 20, 22, 23, 26, 30, 31, 33, 38, 39])
    sampled = Sampled(seed=0x0123456789ABCDEF, count=20)
    half = floats.to(torch.bfloat16)
    return {
        "all-float32": Update(DIM, None, floats),
        "all-bfloat16": Update(DIM, None, half),
        "listed-float32": Update(DIM, listed, floats[:20], base=6, check=0xDEADBEEF),
        "listed-bfloat16": Update(DIM, listed, half[:20], base=6),
        "listed-quantized": Update(DIM, listed, quantized, check=1),
        "sampled-float32": Update(DIM, sampled, floats[:20]),
        "sampled-bfloat16": Update(DIM, sampled, half[:20]),
        "sampled-quantized": Update(DIM, sampled, quantized),
        "listed-dithered": Update(DIM, listed, Quantized(symbols, scales, (15, 5), dither=2**64 - 2), check=1),
        "sampled-offset": Update(DIM, sampled, Quantized(symbols, scales, (15, 5), offset=0.1), base=6),
        "all-dithered-offset": Update(
            DIM, None, Quantized(symbols.repeat(2), scales, (15, 25), dither=7, offset=0.125), base=6, check=1
        ),
        "listed-none": Update(DIM, torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
    }


SYMBOLS = ("listed-quantized", "sampled-quantized", "listed-dithered", "sampled-offset", "all-dithered-offset")
READ = {f"pco-{kind}-pcodec": kind for kind in SYMBOLS}  # through pcodec, where their entropy is shorter


def messages() -> dict[str, tuple[str, object]]:
    """Codec and message by file name."""
    some = {
        f"{name}-{kind}": (name, Frame(sender=3, round=7, update=update, keyframe=update.base is None))
        for name in ("pco", "raw", "paper")
        for kind, update in updates().items()
    }
    some["hello"] = ("pco", Hello(3, 7, DIM, "pco", {"jwins": "0.1.0", "torch": "2.6.0"}, bytes(range(32))))
    some["keyframe_request"] = ("pco", KeyframeRequest(3, 7))
    some["round_request"] = ("pco", RoundRequest(3, 7, 3, bytes(range(16))))
    some["signed_round"] = ("pco", SignedRound(3, 7, 2, 5, bytes(range(70))))
    some["bye"] = ("pco", Bye(3, 7, "stopped: Zürich"))
    return some


@pytest.mark.parametrize("file", messages())
def test_frame(file):
    name, message = messages()[file]
    if name == "paper":
        pytest.importorskip("fpzip")
    committed = (FOLDER / f"{file}.bin").read_bytes()
    made = pack(message, codec(name), DIGEST).data
    if name == "pco" and made != committed:  # another pcodec may choose other bytes; ours around them stay
        assert made[:28] == committed[:28]
        head, old = (read_payload(data[HEADER_BYTES:], dim=DIM) for data in (made, committed))
        assert (head.positions_kind, head.values_kind, head.count) == (
            old.positions_kind,
            old.values_kind,
            old.count,
        )
    else:
        assert made == committed
    after = unpack(committed, codec(name), DIGEST, dim=DIM)
    if isinstance(message, Frame):
        assert (after.sender, after.round, after.keyframe) == (message.sender, message.round, message.keyframe)
        assert identical(after.update, message.update)
    else:
        assert after == message


def test_no_file_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.bin")} == {*messages(), *READ}


@pytest.mark.parametrize("file", READ)
def test_symbols_through_pcodec_are_read_too(file):
    committed = (FOLDER / f"{file}.bin").read_bytes()
    assert read_payload(committed[HEADER_BYTES:], dim=DIM).values_kind is ValuesKind.QUANTIZED
    after = unpack(committed, codec("pco"), DIGEST, dim=DIM)
    assert identical(after.update, updates()[READ[file]])


@pytest.mark.parametrize("kind", SYMBOLS)
def test_the_same_bytes_for_symbols_on_every_machine(kind):
    """Unlike what goes through pcodec, whose other versions may choose other bytes."""
    committed = (FOLDER / f"pco-{kind}.bin").read_bytes()
    assert read_payload(committed[HEADER_BYTES:], dim=DIM).values_kind is ValuesKind.CODED
    made, old = (
        read_payload(codec("pco").encode(updates()[kind]).data, dim=DIM),
        read_payload(committed[HEADER_BYTES:], dim=DIM),
    )
    assert bytes(made.values) == bytes(old.values)


def test_sampled_positions_never_change():
    assert Sampled(seed=0x0123456789ABCDEF, count=8).positions(40).tolist() == [2, 11, 18, 20, 28, 30, 33, 37]


def test_dither_never_changes():
    assert dither(seed=0x0123456789ABCDEF, count=5).mul(2**25).tolist() == DITHER
    assert dither(seed=7, count=3).tolist() == pytest.approx(
        [0.288516909, 0.388383299, -0.0500049293], rel=1e-8
    )
    text = DOCUMENT.read_text()
    assert "Seed 7 gives 0.288516909, 0.388383299, -0.0500049293" in text


def test_what_dithered_symbols_mean_never_changes():
    """Bit for bit, as two implementations must agree on what a node's neighbours hold of it."""
    quantized = updates()["all-dithered-offset"].values
    u = dither(7, DIM).numpy()
    symbol = quantized.symbols.to(torch.float32).numpy()
    scale = np.repeat(np.array([0.25, 3.0], dtype=np.float32), [15, 25])
    expected = ((symbol - np.sign(symbol) * np.float32(0.125)) - u) * scale
    assert expected.dtype == np.float32
    assert quantized.dense().numpy().tobytes() == expected.tobytes()


def test_the_example_in_the_document_is_what_the_code_does():
    text = DOCUMENT.read_text().split("## Example", 1)[1]
    dump = "".join(re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", text, flags=re.MULTILINE))
    update = Update(8, torch.tensor([0, 2, 7]), torch.tensor([1.0, -0.0, 0.5]), base=4)
    frame = Frame(sender=1, round=5, update=update)
    made = pack(frame, codec("raw"), b"example!").data
    assert made.hex(" ") == bytes.fromhex(dump).hex(" ")
    assert identical(unpack(bytes.fromhex(dump), codec("raw"), b"example!", dim=8).update, update)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, (name, message) in messages().items():
        (FOLDER / f"{file}.bin").write_bytes(pack(message, codec(name), DIGEST).data)
