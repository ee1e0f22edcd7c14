"""SSH keys through the API."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.database_state import changed, contents
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS, ed25519_line


def test_a_key_is_stored_listed_and_deleted(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    made = http.post("/ssh-keys", data={"title": " laptop ", "key": f"\n{ED25519_KEYS[0]}  \n"})
    assert made.status_code == 201, made.text
    key = made.json()["data"]
    assert set(key) == {"id", "title", "key", "type", "fingerprint", "created_at"}
    assert key["key"] == ED25519_KEYS[0]
    assert key["type"] == "ssh-ed25519"
    assert http.get("/ssh-keys").json()["data"] == [key]
    gone = http.delete(f"/ssh-keys/{key['id']}")
    assert (gone.status_code, gone.json()["data"]) == (200, key)
    assert http.delete(f"/ssh-keys/{key['id']}").status_code == 404
    assert http.get("/ssh-keys").json()["data"] == []
    again = http.post("/ssh-keys", json={"title": key["title"], "key": ED25519_KEYS[0]})
    assert again.status_code == 201
    assert again.json()["data"]["id"] != key["id"]
    assert http.get("/account").json()["data"]["quotas"]["ssh_keys"]["used"] == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"title": ""}, "title"),
        ({"title": None}, "title"),
        ({"title": "x" * 65}, "title"),
        ({"title": 5}, "title"),
        ({"title": "a\x00"}, "title"),
        ({"title": "two\nlines"}, "title"),
        ({"title": "   "}, "title"),
        ({"title": "mine"}, "title"),
        ({"key": ED25519_KEYS[0]}, "key"),
        ({"key": f"{ED25519_KEYS[0]} another comment"}, "key"),
        ({"key": ""}, "key"),
        ({"key": "ssh-ed25519 AAAA"}, "key"),
        ({"key": "-----BEGIN OPENSSH PRIVATE KEY-----"}, "key"),
        ({"key": f"{ED25519_KEYS[1]} {'x' * 9000}"}, "key"),
        ({"key": [ED25519_KEYS[1]]}, "key"),
        ({"fingerprint": "x"}, "fingerprint"),
    ],
)
def test_what_is_wrong_is_named(
    cloud: SimulatedCloud, changes: dict[str, object], field: str
) -> None:
    http = cloud.customer.http
    assert http.post("/ssh-keys", json={"title": "mine", "key": ED25519_KEYS[0]}).is_success
    before = contents()
    body = {"title": "new", "key": ED25519_KEYS[1], **changes}
    answer = http.post("/ssh-keys", json=body)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()["errors"]) == {field}
    assert changed(before) == {}


def test_two_accounts_may_have_the_same_key(cloud: SimulatedCloud) -> None:
    body = {"title": "mine", "key": ED25519_KEYS[0]}
    assert cloud.customer.http.post("/ssh-keys", json=body).is_success
    assert cloud.new_customer().http.post("/ssh-keys", json=body).is_success


def test_quota(cloud: SimulatedCloud) -> None:
    path = f"/admin/accounts/{cloud.customer.account_id}"
    assert cloud.admin.patch(path, json={"ssh_keys_max": 1}).is_success
    for number, status in ((0, 201), (1, 403)):
        body = {"title": str(number), "key": ED25519_KEYS[number]}
        assert cloud.customer.http.post("/ssh-keys", json=body).status_code == status


def test_repeats_under_one_key_have_one_effect(cloud: SimulatedCloud) -> None:
    http, headers = cloud.customer.http, {"Idempotency-Key": "a"}
    body = {"title": "mine", "key": ED25519_KEYS[0]}
    first, second = (http.post("/ssh-keys", json=body, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    path, headers = f"/ssh-keys/{first.json()['data']['id']}", {"Idempotency-Key": "b"}
    gone, again = (http.delete(path, headers=headers) for _ in range(2))
    assert gone.json() == again.json()
    assert gone.status_code == again.status_code == 200


@pytest.mark.parametrize("same", ["title", "key"])
def test_many_at_once_store_one(cloud: SimulatedCloud, same: str) -> None:
    bodies = [
        {
            "title": "mine" if same == "title" else f"key {number}",
            "key": ED25519_KEYS[0] if same == "key" else ed25519_line(100 + number),
        }
        for number in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda body: cloud.customer.http.post("/ssh-keys", json=body), bodies)
        )
    assert sorted(answer.status_code for answer in answers) == [201] + [422] * 7
    assert {tuple(a.json()["errors"]) for a in answers if a.status_code == 422} == {(same,)}
    assert cloud.customer.http.get("/account").json()["data"]["quotas"]["ssh_keys"]["used"] == 1
