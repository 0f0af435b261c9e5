"""What of the package has no examples to try where an extra is missing."""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("ray")
    else [
        "src/jwins/engines/ray",
        "src/jwins/compare/on_ray.py",
        "src/jwins/run/elsewhere.py",
        "src/jwins/run/on_ray.py",
    ]
)
