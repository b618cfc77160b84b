"""
Child processes: starting, adopting, watching and ending them.
"""

from clawker_cp.processes.health import HealthCheck
from clawker_cp.processes.lasting import LastingProcess
from clawker_cp.processes.manager import ManagedSubprocess, SubprocessManager

__all__ = ["HealthCheck", "LastingProcess", "ManagedSubprocess", "SubprocessManager"]
