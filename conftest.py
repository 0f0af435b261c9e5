"""What has no examples to try where an extra is missing; and no test of a property fails by its time."""

import gc
import importlib.util
import sys
import traceback
from collections.abc import Generator
from types import SimpleNamespace

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_NEEDED = {
    "ray": (
        "src/jwins/engines/ray",
        "src/jwins/compare/on_ray.py",
        "src/jwins/run/on_ray.py",
    ),
    "transformers": ("src/jwins/integrations/transformers.py",),
    "lightning": ("src/jwins/integrations/lightning.py",),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the million objects of all tests and modules out of every later search for reference cycles."""
    gc.disable()
    try:
        return (yield)
    finally:
        _trace_without_stacks()
        gc.freeze()
        gc.enable()


def _trace_without_stacks() -> None:
    """Have torch keep no call stack, deep as it is in tests, of each tensor in a stacked step that it records.

    They are for debugging, and took half of the time.
    """
    if "torch" in sys.modules:
        from torch._subclasses import fake_tensor

        fake_tensor.traceback = SimpleNamespace(extract_stack=list, format_list=traceback.format_list)


collect_ignore = [
    path for library, paths in _NEEDED.items() if not importlib.util.find_spec(library) for path in paths
]
