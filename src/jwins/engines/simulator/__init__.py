"""All nodes on a virtual clock: event queue, links, faults."""

from jwins.engines.simulator.faults import Fault, Faults
from jwins.engines.simulator.links import Compute, Links
from jwins.engines.simulator.simulator import Outcome, Progress, Simulator, StalledError

__all__ = ["Compute", "Fault", "Faults", "Links", "Outcome", "Progress", "Simulator", "StalledError"]
