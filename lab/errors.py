"""Errors of the lab: one sentence each, fit to be shown to whoever ran the command."""


class LabError(Exception):
    """The lab could not do what was asked; the text says what and why in one sentence."""


class SlotTaken(LabError):
    """The slot belongs to another checkout."""


class CommandFailed(LabError):
    """A command of the system (ip, ovs-vsctl, virsh, ...) ended with an error or too late."""
