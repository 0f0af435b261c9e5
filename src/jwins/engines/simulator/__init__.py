"""All nodes on a virtual clock, and the world it plays."""

from jwins.engines.simulator.driver import Outcome, Progress, SimulatedDriver, StalledError
from jwins.scenario import Compute, Fault, Faults, Links

__all__ = ["Compute", "Fault", "Faults", "Links", "Outcome", "Progress", "SimulatedDriver", "StalledError"]
