"""MovieLens: ratings from half a star to five stars, by user.

Source: F. M. Harper, J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015,
doi 10.1145/2827872. The data may be used for research, not for commercial purposes; see its README.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from jwins.errors import ConfigError, DataError
from jwins.tasks.base import Batch, Dataset, Task
from jwins.tasks.source import key_numbers, split_within_keys, zip_member

URL = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
"""Download address of the ratings."""
_MEMBER = "ml-latest-small/ratings.csv"
_TEST_FRACTION = 0.3
_LOWEST, _HIGHEST = 0.5, 5.0


class MatrixFactorization(nn.Module):
    """Model whose ratings are inner products of a user's and a film's factors, without biases.

    Source: Koren, Bell, Volinsky, "Matrix Factorization Techniques for Recommender Systems", Computer 42(8),
    2009, equation 1.
    """

    def __init__(self, num_users: int, num_films: int, factors: int) -> None:
        super().__init__()
        self.users = nn.Embedding(num_users, factors)
        self.films = nn.Embedding(num_films, factors)
        for table in (self.users, self.films):  # as in the paper's experiments
            nn.init.uniform_(table.weight, -0.05, 0.05)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, 2) int64 users and films to (B,) float32 ratings."""
        products: Tensor = self.users(inputs[:, 0]) * self.films(inputs[:, 1])
        return products.sum(dim=1)


class MovieLens(Task):
    """Ratings of ml-latest-small: 610 users, 9,724 films, 100,836 ratings, divided by user.

    30 % of each user's ratings are for testing, drawn once with a fixed seed. ``test.keys`` has their users,
    so that a node can be tested on its own users. The model is a matrix factorization without biases:
    206,680 parameters. The loss is the squared error.

    Args:
        data: ``ratings.csv`` (columns ``userId``, ``movieId``, ``rating``), or a folder with it at any
            depth; None downloads ml-latest-small once.
        factors: factors of each user and film.

    Raises:
        ConfigError: factors out of range.
        DataError: no data, or data of another schema.
    """

    def __init__(self, *, data: Path | None = None, factors: int = 20) -> None:
        if factors < 1:
            raise ConfigError("task.options.factors", factors, "expected at least 1")
        self.name = "movielens"
        names, ratings = _read(_find(data))
        users, films = key_numbers(names[:, 0]), key_numbers(names[:, 1])
        self._num_users, self._num_films, self._factors = int(users.max()) + 1, int(films.max()) + 1, factors
        pairs = np.stack([users, films], axis=1)
        train, test = split_within_keys(self.name, users, _TEST_FRACTION)
        if not len(test):
            raise DataError(
                "movielens: no user has two ratings; each user needs one for training and one for testing"
            )
        self.train = Dataset(torch.from_numpy(pairs[train]), torch.from_numpy(ratings[train]), users[train])
        self.test = Dataset(torch.from_numpy(pairs[test]), torch.from_numpy(ratings[test]), users[test])

    better = {"within_half_star": "higher", "squared_error": "lower"}  # noqa: RUF012

    def model(self) -> nn.Module:
        """Make a matrix factorization."""
        return MatrixFactorization(self._num_users, self._num_films, self._factors)

    def loss(
        self, model: Callable[[Tensor], Tensor], batch: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean squared error, in stars squared."""
        return functional.mse_loss(model(batch.inputs), batch.targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the metrics of each rating: the paper's and two more.

        Returns:
            ``accuracy``: is the prediction, clamped to the scale and rounded to half a star, the rating?
            ``within_half_star``: is it at most half a star away? ``squared_error``: of the clamped prediction,
            stars squared; the root of its mean is the RMSE. ``loss``: of the prediction as it is.
        """
        clamped = outputs.clamp(_LOWEST, _HIGHEST)
        rounded = (2.0 * clamped).round() / 2.0
        return {
            "accuracy": (rounded == targets).float(),
            "within_half_star": ((rounded - targets).abs() <= 0.5).float(),
            "squared_error": (clamped - targets).square(),
            "loss": (outputs - targets).square(),
        }


def _find(data: Path | None) -> Path:
    if data is None:
        return zip_member("movielens", URL, _MEMBER)
    if data.is_file():
        return data
    found = sorted(data.rglob("ratings.csv"))
    if not found:
        raise DataError(f"movielens: {data} has no ratings.csv; download {URL}, unpack it, and name its folder")
    if len(found) > 1:
        raise DataError(
            f"movielens: {data} has several ratings.csv: {found[0]}, {found[1]}; name one of their folders"
        )
    return found[0]


def _read(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Read (n, 2) user and film identifiers, and (n,) ratings."""
    lines: dict[tuple[int, int], int] = {}
    ratings: list[float] = []
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as opened:
            rows = csv.reader(opened, strict=True)
            header = next(rows, [])
            _check_text("".join(header))
            for name in ("userId", "movieId", "rating"):
                if name not in header:
                    raise ValueError(f"{name!r} is not in list {','.join(header)}")
                if header.count(name) > 1:
                    raise ValueError(f"{header.count(name)} columns {name!r}; keep one")
            user, film, rating = (header.index(name) for name in ("userId", "movieId", "rating"))
            line = rows.line_num + 1
            for row in rows:
                if not row:
                    raise ValueError("a blank line")
                _check_text("".join(row))
                if rows.line_num > line:
                    raise ValueError("a quotation mark that is not closed on its line")
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields, but the header has {len(header)}")
                pair = _identifier(row[user], "userId"), _identifier(row[film], "movieId")
                if (before := lines.setdefault(pair, line)) != line:
                    problem = f"a second rating of movieId {pair[1]} by userId {pair[0]}"
                    raise ValueError(f"{problem}, after that in line {before}; keep one of the two")
                ratings.append(_stars(row[rating]))
                line = rows.line_num + 1
    except csv.Error as error:
        unclosed = "field limit" in str(error) or "end of data" in str(error)
        problem = "a quotation mark that is not closed" if unclosed else str(error)
        raise _wrong(path, line, problem) from error
    except ValueError as error:
        raise _wrong(path, line, str(error)) from error
    except OSError as error:
        raise DataError(f"movielens: {path} cannot be read ({error})") from error
    if not ratings:
        raise DataError(f"movielens: {path} holds no ratings; download {URL} again")
    return np.array(list(lines), dtype=np.int64), np.array(ratings, dtype=np.float32)


def _wrong(path: Path, line: int, problem: str) -> DataError:
    return DataError(f"movielens: {path}, line {line}: {problem}; expected userId,movieId,rating,timestamp")


def _check_text(text: str) -> None:
    if not text.isascii():
        stray = re.search("[\udc80-\udcff]", text)  # as surrogateescape has bytes that are not UTF-8
        if stray is not None:
            raise ValueError(f"the byte 0x{ord(stray[0]) - 0xDC00:02x} is not UTF-8")


def _identifier(text: str, column: str) -> int:
    try:
        number = int("" if "_" in text else text)  # int() would read 1_0 as 10
    except ValueError:
        raise ValueError(f"{text[:60]!r} in column {column} is not a whole number") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{number} in column {column} does not fit into 64 bits")
    return number


def _stars(text: str) -> float:
    try:
        stars = float(text)
    except ValueError:
        raise ValueError(f"could not read {text[:60]!r} in column rating as a number") from None
    if not _LOWEST <= stars <= _HIGHEST:
        raise ValueError(f"a rating of {text}; expected {_LOWEST} to {_HIGHEST} stars")
    return stars
