"""Compile loops with numba, at their first call and once per machine, without changing a bit of the results.

A kernel is a Python function whose loops numba compiles to machine code. The code is kept on disk, beside the
module or, if that folder is read-only, in the user's cache folder. Fast-math and contraction are off,
so every operation rounds as in IEEE 754, and a result does not depend on the processor. The
interpreter lock is released while a kernel runs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, update_wrapper
from pathlib import Path
from typing import IO, Any, ClassVar, Generic, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


class Kernel(Generic[P, R]):
    """A function that is compiled when it is first called; numba is not imported before.

    A kernel may call only kernels of the same file, because numba notices changes of that file alone.

    Attributes:
        plain: the Python function, for reading and debugging. Its results differ where the code relies on the
            machine's integers, which wrap around.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        update_wrapper(self, function)
        self.plain = function
        self._dispatcher: Any = None
        self._starting = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the machine code."""
        if self._dispatcher is None:
            return self._first(*args, **kwargs)
        result: R = self._dispatcher(*args, **kwargs)
        return result

    def _first(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compile, or load the code of another process; other processes wait."""
        dispatcher = compiled(self)
        with self._starting, _one_at_a_time(self.plain.__module__):
            result: R = dispatcher(*args, **kwargs)
        self._dispatcher = dispatcher
        return result

    @property
    def _numba_type_(self) -> Any:
        """Return numba's type of a kernel that another kernel calls."""
        from numba.core import types

        return types.Dispatcher(compiled(self))


class Inlined(Kernel[P, R]):
    """A kernel that numba copies into the kernels that call it, before it assigns types.

    Otherwise each call would count references to its arrays, which costs more than the few operations of a
    small function in an inner loop.
    """

    targetoptions: ClassVar = {"inline": "always"}  # what numba asks a function for

    @property
    def py_func(self) -> Callable[P, R]:
        """The function that numba copies."""
        return self.plain


def kernel(function: Callable[P, R]) -> Kernel[P, R]:
    """Make a kernel of a function; nothing is compiled yet."""
    return Kernel(function)


def inlined(function: Callable[P, R]) -> Inlined[P, R]:
    """Make a kernel for inner loops of other kernels of the same file."""
    return Inlined(function)


@cache
def compiled(of: Kernel[Any, Any]) -> Any:
    """Return the numba dispatcher of a kernel; its machine code is kept on disk if possible."""
    import numba

    config: Any = numba.config
    _teach_fma()
    dispatcher: Any = numba.njit(nogil=True)(of.plain)
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # neither the package's folder nor the user's is writable
        folder = _private_folder()
        if folder is not None:
            usual = config.CACHE_DIR
            config.CACHE_DIR = str(folder)
            try:
                dispatcher.enable_caching()
            finally:
                config.CACHE_DIR = usual
    _survive(dispatcher._cache)
    return dispatcher


def _survive(cache: Any) -> None:
    """Compile without the cache if the disk is full or the cache is damaged."""
    load, save = cache.load_overload, cache.save_overload

    def load_or_compile(*where: Any) -> Any:
        try:
            return load(*where)
        except Exception:  # pickle may raise anything
            with contextlib.suppress(Exception):
                cache.flush()
            return None

    def save_if_possible(*what: Any) -> None:
        with contextlib.suppress(OSError):
            save(*what)

    cache.load_overload, cache.save_overload = load_or_compile, save_if_possible


def _private_folder() -> Path | None:
    """Return a folder for temporary files that only this user can write to, or None.

    Its files are executed, so a folder of another user is not accepted.
    """
    name = f"jwins-kernels-{os.getuid()}" if hasattr(os, "getuid") else "jwins-kernels"
    try:
        folder = Path(tempfile.gettempdir(), name)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    return folder if ours and stat.S_ISDIR(found.st_mode) else None


@contextlib.contextmanager
def _one_at_a_time(module: str) -> Iterator[None]:
    """Let one process compile a module's kernels while others wait for its code on disk.

    Without file locks none waits.
    """
    file: IO[bytes] | None = None
    try:
        import fcntl

        folder = _private_folder()
        if folder is not None:
            file = (folder / f"{module}.lock").open("ab")
            fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if file is not None:
            file.close()


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` of float32, rounded once, as torch's ``add(alpha=...)`` does.

    This function is for numbers and arrays of numpy. In kernels it is one instruction, or a function of the C
    library, with the same bits.
    """
    product = np.float64(a) * np.float64(b)  # exact: 48 bits at most
    total = product + np.float64(c)
    back = total - product
    lost = (product - (total - back)) + (np.float64(c) - back)
    # Rounded to odd, so that the second rounding, to float32, gives the result of a single rounding.
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    even = np.bitwise_and(np.asarray(total).view(np.int64), 1) == 0
    return np.float32(np.where(even & (lost != 0), odd, total))


@lru_cache(maxsize=1)
def _teach_fma() -> None:
    """Define :func:`fma` for numba."""
    from numba.core import types
    from numba.extending import intrinsic, overload

    @intrinsic
    def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fma(*arguments)

        return types.float32(types.float32, types.float32, types.float32), code

    instruction: Any = fused

    @overload(fma, inline="always", strict=False)
    def in_kernel(a: Any, b: Any, c: Any) -> Any:
        return lambda a, b, c: instruction(a, b, c)
