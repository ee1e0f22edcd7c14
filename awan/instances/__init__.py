"""Instances: the virtual machines that customers buy."""
