"""Validation and arithmetic of instances. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID
from zoneinfo import ZoneInfo

from awan.instances.models import DesiredState, ObservedState

HOSTNAME_MAX = 64
"""Linux's HOST_NAME_MAX."""
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
USERNAME = re.compile(r"[a-z_][a-z0-9_-]{0,29}")
RESERVED_USERNAMES = frozenset(
    {
        "daemon",
        "bin",
        "sys",
        "sync",
        "games",
        "man",
        "lp",
        "mail",
        "news",
        "uucp",
        "proxy",
        "www-data",
        "backup",
    }
    | {"list", "irc", "gnats", "nobody", "sshd", "messagebus", "_apt"}
)
PASSWORD_MIN, PASSWORD_MAX = 8, 64
MEMORY_GIB_PLAUSIBLE = 1024
SSH_KEYS_MAX = 10
LABELS_MAX = 32
SERIAL_LOG_KIB, SERIAL_LOG_KIB_MAX = 64, 256
# Control sequences of terminals: CSI; strings (OSC, DCS, SOS, PM, APC), of which an unended one ends with its line; the
# others. Source: ECMA-48, sections 5.4 and 5.6.
_CONTROL_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_LINE_END = re.compile(r"\r*\n|\r+")
LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")

NIC_HELD = "The guest does not let go of the network card. Try again once it has booted, or stop the instance first."
STATUS_OF_OPERATION = {
    "instance.create": "provisioning",
    "instance.delete": "terminating",
    "instance.start": "starting",
    "instance.stop": "stopping",
    "instance.restart": "restarting",
    "instance.reset": "restarting",
    "instance.recover": "starting",
}
STATUSES = (
    "provisioning",
    "running",
    "paused",
    "stopped",
    "starting",
    "stopping",
    "restarting",
    "terminating",
    "unknown",
    "error",
)
PAUSED = "The instance was paused from outside: its guest stands still. Start it to let it go on."
PAUSED_BY_DISK = (
    "The instance is paused, because its server could not write to its disk. It goes on once that is possible again;"
    " the operator has been informed."
)
CRASHED_AGAIN = "The instance crashed again soon after it was restarted, so it was left stopped."
NODE_UNREACHABLE = (
    "The server of the instance does not answer at the moment; its state is not known."
)


SETTLED_STATES = (ObservedState.RUNNING, ObservedState.PAUSED, ObservedState.STOPPED)
"""Those of an instance that was made, and whose domain may be looked at."""


def check_hostname(text: str) -> str:
    """The host name in lower case. Raises: ValueError. Source: RFC 1123 section 2.1."""
    name = text.lower()
    if not 1 <= len(name) <= HOSTNAME_MAX:
        raise ValueError(f"The hostname must have 1 to {HOSTNAME_MAX} characters.")
    if not all(LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(
            "The hostname may hold letters, digits and hyphens in labels joined by dots;"
            " a label neither begins nor ends with a hyphen."
        )
    if name.replace(".", "").isdigit():
        raise ValueError("The hostname must not be a number.")
    return name


def check_username(text: str) -> str:
    """A Linux login name that is not a system account's. Raises: ValueError. Source: useradd(8)."""
    if not USERNAME.fullmatch(text):
        raise ValueError(
            "The username begins with a lower-case letter or underscore, followed by up to 29 lower-case letters,"
            " digits, hyphens or underscores."
        )
    if text in RESERVED_USERNAMES or text.startswith("systemd-"):
        raise ValueError("The username belongs to the system.")
    return text


def check_password(password: str, *, username: str, hostname: str) -> list[str]:
    """What is wrong with a password, as sentences; empty when it is fine.

    The colon separates fields in chpasswd(8)'s input, so it cannot be part of a password.
    """
    problems = []
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        problems.append(f"The password must have {PASSWORD_MIN} to {PASSWORD_MAX} characters.")
    if any(not 0x20 <= ord(character) < 0x7F or character == ":" for character in password):
        problems.append("The password may hold printable ASCII characters except the colon.")
    if not (
        re.search(r"[a-z]", password)
        and re.search(r"[A-Z]", password)
        and re.search(r"[0-9]", password)
    ):
        problems.append("The password needs a lower-case letter, an upper-case letter and a digit.")
    if password.lower() in {username.lower(), hostname.lower()}:
        problems.append("The password must differ from username and hostname.")
    return problems


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels, if keys and values are such that a filter can name them. Raises: ValueError."""
    if len(labels) > LABELS_MAX:
        raise ValueError(f"There may be {LABELS_MAX} labels at most.")
    for key, value in labels.items():
        if not LABEL_KEY.fullmatch(key):
            raise ValueError(
                "A label's key has 1 to 63 ASCII letters, digits, dots, hyphens, underscores and slashes, and begins"
                " and ends with a letter or digit."
            )
        if not LABEL_VALUE.fullmatch(value):
            raise ValueError(
                "A label's value is empty or has 1 to 63 ASCII letters, digits, dots, hyphens and underscores, and"
                " begins and ends with a letter or digit."
            )
    return dict(labels)


@dataclass(frozen=True)
class Filters:
    """Which instances are wanted; what is absent does not matter.

    `search` is a case-blind part of the hostname; `statuses` are values of `STATUSES`; of `labels` all must be
    there, with any value where None.
    """

    search: str | None = None
    statuses: Sequence[str] | None = None
    labels: Mapping[str, str | None] | None = None
    account_id: UUID | None = None
    location_id: int | None = None
    node_id: UUID | None = None


def parse_label_filter(text: str) -> dict[str, str | None]:
    """`"env:prod,tier"` -> `{"env": "prod", "tier": None}`; None stands for any value. Raises: ValueError."""
    wanted: dict[str, str | None] = {}
    for part in text.split(","):
        key, colon, value = part.strip().partition(":")
        if key in wanted:
            raise ValueError(f"The label names {key} twice.")
        wanted[key] = value if colon else None
    check_labels({key: value or "" for key, value in wanted.items()})
    return wanted


def status_of(
    desired: str, observed: str, operation_kind: str | None, *, is_node_silent: bool = False
) -> str:
    """The status that the API shows (lower case), from what is wanted, what is seen and what is running.

    What was seen of an instance is not known to be true any more once its node does not answer.
    """
    if operation_kind in STATUS_OF_OPERATION:
        return STATUS_OF_OPERATION[operation_kind]
    if observed in SETTLED_STATES:
        return "unknown" if is_node_silent else observed
    if desired == DesiredState.DELETED and observed == ObservedState.DELETED:
        return "terminated"
    return "error"


def readable_serial(content: bytes, bytes_max: int) -> str:
    """The end of what a guest printed on its serial console, as text that does nothing to whoever looks at it.

    A guest prints what it likes, also what would move a terminal's cursor, rename its window, answer in its place or
    turn the direction of writing. Of it all only printable characters, tabs and ends of lines are left. A line that
    begins before the last `bytes_max` bytes is left out, if the end of another is among them.
    """
    end = content[-bytes_max:]
    if len(content) > bytes_max:
        end = end.partition(b"\n")[2] or end
    text = _LINE_END.sub("\n", end.decode("utf-8", "replace"))
    text = _CONTROL_SEQUENCE.sub("", text)
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


def repair_delay_s(failures: int, first_s: float) -> float:
    """How long to wait after the last of so many (>= 1) failures: doubled each time, an hour or `first_s` at most."""
    longest_s = max(first_s, 3600.0)
    return min(longest_s, first_s * 2.0 ** min(failures - 1, 30))


def display_memory(memory_mib: int) -> str:
    """`2048` -> `"2 GB"`, as the API has always shown it."""
    gib = memory_mib / 1024
    return f"{gib:g} GB"


def display_storage(storage_gib: int) -> str:
    """`30` -> `"30GB"`, as the API has always shown it."""
    return f"{storage_gib}GB"


def display_time(moment: datetime, zone: str) -> str:
    """`"25 January 2024, 14:43"` in the given zone."""
    local = moment.astimezone(ZoneInfo(zone))
    return f"{local.day} {local:%B %Y, %H:%M}"


def cpu_shares(vcpus: int) -> int:
    """The relative weight of an instance with shared CPUs. Source: libvirt's cpu_tune, shares 2 to 262144."""
    return min(262_144, 1024 * vcpus)
