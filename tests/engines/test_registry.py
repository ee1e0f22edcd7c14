"""What options of an engine are accepted: wrong ones are refused when they are stored."""

from __future__ import annotations

from typing import Any

import pytest

from awan.engines.registry import check_options
from awan.errors import Invalid
from tests.support.simulated_cloud import SimulatedCloud

TCP = {"northbound": "tcp:10.0.0.1:6641", "southbound": "tcp:10.0.0.1:6642"}
SSL = {"northbound": "ssl:10.0.0.1:6641", "southbound": "ssl:10.0.0.1:6642"}
KEYS = {
    "private_key": "/etc/awan/ovn.key",
    "certificate": "/etc/awan/ovn.pem",
    "ca_certificate": "/etc/awan/ovn-ca.pem",
}


@pytest.mark.parametrize(
    "options",
    [
        TCP,
        {"northbound": "unix:/run/nb.sock", "southbound": "unix:/run/sb.sock"},
        {**SSL, **KEYS},
        {**TCP, "southbound": SSL["southbound"], **KEYS},
        {**SSL, "northbound": "ssl:10.0.0.1:6641,ssl:10.0.0.2:6641", **KEYS},
    ],
)
def test_endpoints_that_can_be_reached(options: dict[str, Any]) -> None:
    checked = check_options("fabric", "ovn", options)
    assert {**checked, **options} == checked


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (SSL, "options"),
        ({**TCP, "southbound": SSL["southbound"]}, "options"),
        ({**TCP, "northbound": "tcp:10.0.0.1:6641,ssl:10.0.0.2:6641"}, "options"),
        *[({**SSL, **KEYS, name: None}, "options") for name in KEYS],
        ({**TCP, **KEYS}, "options"),
        *[({**SSL, **KEYS, name: "relative.pem"}, f"options.{name}") for name in KEYS],
        ({**SSL, **KEYS, "private_key": "/etc/\n"}, "options.private_key"),
        ({**TCP, "northbound": "udp:10.0.0.1:6641"}, "options.northbound"),
        ({**TCP, "northbound": "tcp:10.0.0.1:6641,nonsense"}, "options.northbound"),
        ({**TCP, "keys": "/etc"}, "options.keys"),
        ({"northbound": TCP["northbound"]}, "options.southbound"),
    ],
)
def test_endpoints_that_cannot(options: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_options("fabric", "ovn", options)
    assert set(refused.value.errors or {}) == {field}


def test_tls_without_keys_is_refused_in_words(cloud: SimulatedCloud) -> None:
    path = f"/admin/locations/{cloud.location_id}/engines/fabric"
    refused = cloud.admin.put(path, json={"driver": "ovn", "options": SSL})
    assert (refused.status_code, refused.json()["type"]) == (422, "VALIDATION_ERROR")
    assert refused.json()["errors"] == {
        "options": ["ssl: needs private_key, certificate and ca_certificate."]
    }
    stored = cloud.admin.put(path, json={"driver": "ovn", "options": {**SSL, **KEYS}})
    assert stored.is_success, stored.text
