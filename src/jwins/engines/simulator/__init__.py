"""The simulated driver: all nodes on a virtual clock."""

from jwins.engines.simulator.driver import Outcome, Progress, SimulatedDriver, StalledError
from jwins.scenario import Compute, Fault, Faults, Links

__all__ = ["Compute", "Fault", "Faults", "Links", "Outcome", "Progress", "SimulatedDriver", "StalledError"]
