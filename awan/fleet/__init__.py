"""Fleet: the operator's nodes, what fits on them, and what is placed where."""

from awan.fleet.models import Node, NodeHealth
from awan.fleet.service import Demand, endpoint, get_node, list_nodes, place, release

__all__ = ["Demand", "Node", "NodeHealth", "endpoint", "get_node", "list_nodes", "place", "release"]
