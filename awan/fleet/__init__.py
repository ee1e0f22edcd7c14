"""Fleet: the operator's nodes, what fits on them, and what is placed where."""

from awan.fleet.models import Node, NodeImage
from awan.fleet.service import (
    Demand,
    NodeThreads,
    endpoint,
    forget_copies,
    node_threads,
    place,
    release,
)

__all__ = [
    "Demand",
    "Node",
    "NodeImage",
    "NodeThreads",
    "endpoint",
    "forget_copies",
    "node_threads",
    "place",
    "release",
]
