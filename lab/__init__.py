"""The lab: a whole Awan location (OVN central, two hypervisors, upstream router) on one machine.

lab = Lab(acquire_free_slot())
info = lab.up(lambda step, seconds: print(f"{step}: {seconds:.1f} s"))
lab.node_exec(info.nodes[0].name, ["ovs-vsctl", "show"])
lab.down()
"""

from lab.errors import CommandFailed, LabError, SlotTaken
from lab.layout import LabInfo, LabNode
from lab.location import Lab, LabStatus, Progress, acquire_free_slot
from lab.requirements import missing_packages

__all__ = [
    "CommandFailed",
    "Lab",
    "LabError",
    "LabInfo",
    "LabNode",
    "LabStatus",
    "Progress",
    "SlotTaken",
    "acquire_free_slot",
    "missing_packages",
]
