"""What owners change inside guests of the lab, through the API as they do it."""

from __future__ import annotations

from typing import Any

from tests.support.lab_cloud import LabCloud


def put(cloud: LabCloud, uuid: str, what: str, **body: Any) -> dict[str, Any]:
    """The answer of a change that has succeeded; on a busy machine it may be a 202, and is waited for."""
    answer = cloud.client.put(f"/instances/{uuid}/{what}", json=body)
    assert answer.status_code in (200, 202), answer.text
    ended = cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "succeeded", ended
    return dict(answer.json())


def rename(cloud: LabCloud, uuid: str, hostname: str) -> str:
    """Another name; when the guest has it."""
    put(cloud, uuid, "hostname", hostname=hostname)
    shown = cloud.show(uuid)
    assert shown["hostname"] == hostname
    return str(shown["hostname_applied"])


def set_password(cloud: LabCloud, uuid: str, password: str) -> dict[str, Any]:
    """Another password."""
    return put(cloud, uuid, "password", password=password, password_confirmation=password)


def logs_in(cloud: LabCloud, address: str, password: str) -> bool:
    """Whether the account can log in with this password alone."""
    return cloud.ssh(address, "id -un", password=password).stdout == "budi\n"
