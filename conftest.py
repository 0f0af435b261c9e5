"""What has no examples to try where an extra is missing; and no test of a property fails by its time."""

import importlib.util

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

collect_ignore = [
    path for library, paths in _NEEDED.items() if not importlib.util.find_spec(library) for path in paths
]
