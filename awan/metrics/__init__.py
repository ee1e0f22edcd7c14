"""Room: what instances use, measured on their nodes and kept for a year.

collector    each worker reads the nodes that are due, one bulk call a node, and stores what the counters grew by
history      partitions made ahead and dropped, roll-ups from minutes to weeks
service      the points that a chart shows
export       the same figures for Prometheus: a customer's instances, and the control plane itself
"""
