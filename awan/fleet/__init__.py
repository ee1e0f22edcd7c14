"""Fleet: the operator's nodes, what fits on them, and what is placed where."""

from awan.fleet.models import Node, NodeHealth, NodeImage, NodeState
from awan.fleet.placement import Demand, NodeThreads, node_threads, place, release
from awan.fleet.service import abandon, endpoint, forget_copies, get_node

__all__ = [
    "Demand",
    "Node",
    "NodeHealth",
    "NodeImage",
    "NodeState",
    "NodeThreads",
    "abandon",
    "endpoint",
    "forget_copies",
    "get_node",
    "node_threads",
    "place",
    "release",
]
