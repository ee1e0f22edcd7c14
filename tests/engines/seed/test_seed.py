"""Seeds: what cloud-init will read, and that no text of a user becomes anything else than text."""

from __future__ import annotations

import dataclasses
import email
import json
import subprocess
import time
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pycdlib.pycdlib import PyCdlib

from awan.engines import seed
from awan.engines.seed import SeedNic, SeedSpec, validate_user_data

HOSTILE = [
    'x"\n  - name: root\n    hashed_passwd: evil',
    "x'\"\\\n#cloud-config\nruncmd: [evil]",
    "]]></name><hostdev mode='subsystem'/>",
    "$(reboot) `reboot` ; reboot && %s {{ ds }} {% raw %}",
    "--==awan-user-data==--\nContent-Type: text/x-shellscript\n\n#!/bin/sh\nevil",
    "\u2028\u2029\x85\x7f\x00\x1b[31m",
    "é 漢字 \U0001f600 \ufeff",
    "yes",
    "0o777",
    "~",
    "!!python/object/apply:os.system [evil]",
    "&a *a <<: {}",
    "\\u0022\\ud83d",
]


def make_spec(**changes: Any) -> SeedSpec:
    spec = SeedSpec(
        instance_id=UUID(int=7),
        hostname="web-1",
        username="budi",
        password_hash="$6$salt$hash",
        ssh_keys=("ssh-ed25519 AAAA budi@laptop",),
        nics=(SeedNic("52:54:00:AA:BB:01", True, True),),
    )
    return dataclasses.replace(spec, **changes)


def read_files(image: bytes) -> dict[str, bytes]:
    """The files of a seed, read by the image's writer through Rock Ridge names."""
    iso = PyCdlib()
    iso.open_fp(BytesIO(image))
    files = {}
    for child in iso.list_children(rr_path="/"):
        if child is not None and child.is_file():
            name = child.rock_ridge.name().decode()
            content = BytesIO()
            iso.get_file_from_iso_fp(content, rr_path=f"/{name}")
            files[name] = content.getvalue()
    iso.close()
    return files


def read_config(spec: SeedSpec) -> dict[str, Any]:
    text = seed.render_user_data(spec).decode("ascii")
    header, _, body = text.partition("\n")
    assert header == "#cloud-config"
    config: dict[str, Any] = yaml.safe_load(body)
    return config


def read_parts(content: bytes) -> list[Any]:
    """The parts of a MIME message."""
    parts: Any = email.message_from_bytes(content).get_payload()
    assert len(parts) == 2
    return list(parts)


# The image


def test_seed_holds_the_three_files() -> None:
    spec = make_spec()
    image = seed.render_seed(spec)
    assert image[16 * 2048 + 40 : 16 * 2048 + 46] == b"cidata"
    files = read_files(image)
    assert sorted(files) == ["meta-data", "network-config", "user-data"]
    assert files["user-data"] == seed.render_user_data(spec)
    assert yaml.safe_load(files["meta-data"]) == {
        "instance-id": "00000000-0000-0000-0000-000000000007",
        "local-hostname": "web-1",
    }
    assert len(image) % 2048 == 0


def test_same_spec_same_bytes_at_any_time_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    images = set()
    for zone in ("UTC", "Asia/Jakarta", "America/St_Johns"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        images.add(seed.render_seed(make_spec()))
        time.sleep(0.7)
    monkeypatch.delenv("TZ")
    time.tzset()
    assert len(images) == 1


def test_image_is_readable_by_other_programs(tmp_path: Any) -> None:
    path = tmp_path / "seed.iso"
    path.write_bytes(seed.render_seed(make_spec()))
    kind = subprocess.run(["blkid", "-p", path], check=True, capture_output=True, text=True).stdout
    assert 'LABEL="cidata"' in kind
    assert 'TYPE="iso9660"' in kind


def test_network_config_asks_for_what_each_card_has() -> None:
    nics = (
        SeedNic("52:54:00:AA:BB:01", True, False),
        SeedNic("52:54:00:aa:bb:02", False, True),
        SeedNic("52:54:00:aa:bb:03", True, True),
    )
    config = yaml.safe_load(read_files(seed.render_seed(make_spec(nics=nics)))["network-config"])
    assert config == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "52:54:00:aa:bb:01"},
                "set-name": "eth0",
                "dhcp4": True,
                "dhcp6": False,
                "dhcp4-overrides": {"use-domains": True},
            },
            "eth1": {
                "match": {"macaddress": "52:54:00:aa:bb:02"},
                "set-name": "eth1",
                "dhcp4": False,
                "dhcp6": True,
                "dhcp6-overrides": {"use-domains": True},
            },
            # netplan refuses a card whose families disagree.
            "eth2": {
                "match": {"macaddress": "52:54:00:aa:bb:03"},
                "set-name": "eth2",
                "dhcp4": True,
                "dhcp6": True,
                "dhcp4-overrides": {"use-domains": True},
                "dhcp6-overrides": {"use-domains": True},
            },
        },
    }


def test_scrubbed_seed_keeps_identity_and_network_and_no_secret() -> None:
    spec = make_spec(user_data="#!/bin/sh\necho SECRET\n", password_hash="$6$salt$SECRET")
    first, scrubbed = seed.render_seed(spec), seed.render_scrubbed_seed(spec)
    assert b"SECRET" in first
    files = read_files(scrubbed)
    assert files["user-data"] == b""
    for name in ("meta-data", "network-config"):
        assert files[name] == read_files(first)[name]
    for secret in (b"SECRET", b"ssh-ed25519", b"budi"):
        assert secret not in scrubbed


def test_spec_does_not_show_secrets_when_logged() -> None:
    text = repr(make_spec(user_data="#!/bin/sh\nSECRET", password_hash="$6$SECRET"))
    assert "SECRET" not in text


# Our cloud-config


def test_user_with_password() -> None:
    config = read_config(make_spec(hostname="web-1.example.com"))
    assert (config["hostname"], config["fqdn"]) == ("web-1", "web-1.example.com")
    assert config["preserve_hostname"] is False
    assert (config["ssh_pwauth"], config["disable_root"]) == (True, True)
    assert config["chpasswd"] == {"expire": False}
    assert config["users"] == [
        {
            "name": "budi",
            "lock_passwd": False,
            "hashed_passwd": "$6$salt$hash",
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": ["ssh-ed25519 AAAA budi@laptop"],
        }
    ]
    assert "write_files" not in config


def test_user_without_password_has_keys_only() -> None:
    config = read_config(make_spec(password_hash=None))
    assert config["ssh_pwauth"] is False
    assert config["users"][0]["lock_passwd"] is True
    assert "hashed_passwd" not in config["users"][0]


def test_root_is_let_in_and_gets_no_sudo_rule() -> None:
    config = read_config(make_spec(username="root"))
    assert config["disable_root"] is False
    assert config["users"] == [
        {
            "name": "root",
            "lock_passwd": False,
            "hashed_passwd": "$6$salt$hash",
            "ssh_authorized_keys": ["ssh-ed25519 AAAA budi@laptop"],
        }
    ]
    assert config["write_files"][0]["content"] == "PermitRootLogin yes\n"
    keys_only = read_config(make_spec(username="root", password_hash=None))
    assert "write_files" not in keys_only
    assert keys_only["disable_root"] is False


def test_one_key_per_line_and_ascii_only() -> None:
    lines = seed.render_user_data(make_spec(ssh_keys=("ssh-rsa A é", "ssh-rsa B"))).splitlines()
    assert b'  "hostname": "web-1",' in lines
    assert sum(line.count(b'": ') for line in lines) == sum(b'": ' in line for line in lines)
    assert all(line.isascii() for line in lines)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("user_data", [None, "#cloud-config\nruncmd: [ls]\n"])
def test_hostile_text_stays_text(text: str, user_data: str | None) -> None:
    spec = make_spec(
        hostname=text,
        username=text,
        password_hash=text,
        ssh_keys=(text, text),
        user_data=user_data,
    )
    content = seed.render_user_data(spec)
    if user_data is not None:
        ours, theirs = read_parts(content)
        assert theirs.get_payload(decode=True) == user_data.encode()
        content = ours.get_payload(decode=True)
    config = yaml.safe_load(content.partition(b"\n")[2])
    expected = dict(read_config(make_spec()))
    assert config["fqdn"] == text
    assert config["hostname"] == text.partition(".")[0]
    (user,) = config["users"]
    assert (user["name"], user["hashed_passwd"]) == (text, text)
    assert user["ssh_authorized_keys"] == [text, text]
    assert config.keys() == expected.keys()
    meta = yaml.safe_load(read_files(seed.render_seed(spec))["meta-data"])
    assert meta == {"instance-id": str(spec.instance_id), "local-hostname": text}


@given(text=st.text())
def test_any_text_survives_yaml(text: str) -> None:
    config = read_config(make_spec(username=text, ssh_keys=(text,)))
    assert config["users"][0]["name"] == text
    assert config["users"][0]["ssh_authorized_keys"] == [text]


# The customer's user-data


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("#cloud-config\npackages: [htop]\n", "text/cloud-config"),
        ("#!/bin/sh\necho hi\n", "text/x-shellscript"),
        ("#cloud-boothook\n#!/bin/sh\necho hi\n", "text/cloud-boothook"),
        ("## template: jinja\n#cloud-config\nruncmd: [{{ v1.x }}]\n", "text/jinja2"),
        ("## template: jinja\n#!/bin/sh\necho {{ v1.x }}\n", "text/jinja2"),
        ("#!/bin/sh\r\necho hi\r\n", "text/x-shellscript"),
        ("#!/bin/sh\necho é 漢字 \U0001f600\n", "text/x-shellscript"),
        ("#!/bin/sh\n--==awan-user-data==--\n", "text/x-shellscript"),
    ],
)
def test_customer_part_is_carried_unchanged_beside_ours(text: str, kind: str) -> None:
    assert validate_user_data(text) == []
    ours, theirs = read_parts(seed.render_user_data(make_spec(user_data=text)))
    assert ours.get_content_type() == "text/cloud-config"
    assert ours.get_payload(decode=True) == seed.render_user_data(make_spec())
    assert theirs.get_content_type() == kind
    assert theirs["Merge-Type"] == seed.MERGE_TYPE
    assert theirs.get_payload(decode=True).decode() == text.replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "begin with"),
        ("packages: [htop]\n", "begin with"),
        ("\n#cloud-config\na: 1\n", "begin with"),
        ("#include\nhttp://example.com/x\n", "begin with"),
        ("#include-once\nhttp://example.com/x\n", "begin with"),
        ("#part-handler\n", "begin with"),
        ("#cloud-config-archive\n- {}\n", "begin with"),
        ("#cloud-config-jsonp\n[]\n", "begin with"),
        ("## template: jinja\n#include\nhttp://x\n", "begin with"),
        ("## template: jinja\n## template: jinja\n#!/bin/sh\n", "begin with"),
        ("Content-Type: multipart/mixed; boundary=x\n\n--x\n", "begin with"),
        ("#cloud-config\n", "mapping"),
        ("#cloud-config\n{}\n", "mapping"),
        ("#cloud-config\n- a\n", "mapping"),
        ("#cloud-config\njust text\n", "mapping"),
        ("#cloud-config\n? [a, b]\n: c\n", "plain names"),
        ("#cloud-config\na: [1\n", "not valid YAML"),
        ("#cloud-config\na: 1\n---\nb: 2\n", "not valid YAML"),
        ("#cloud-config\na: *unknown\n", "not valid YAML"),
        ("#cloud-config\na: " + "[" * 5000, "not valid YAML"),
        ("#cloud-config\nmerge_how: 'dict(replace)'\n", "merge_how"),
        ("#!/bin/sh\n\x00\n", "control characters"),
        ("#!/bin/sh\n\x1b[31m\n", "control characters"),
        ("#!/bin/sh\n\ud83d\n", "UTF-8"),
        ("#!/bin/sh\n" + "x" * 16384, "16384 bytes"),
        ("#!/bin/sh\n" + "é" * 8190, "16384 bytes"),
    ],
)
def test_what_is_refused(text: str, word: str) -> None:
    (sentence,) = validate_user_data(text)
    assert word in sentence


def test_exactly_the_limit_is_accepted() -> None:
    text = "#!/bin/sh\n".ljust(seed.USER_DATA_MAX_BYTES, "x")
    assert validate_user_data(text) == []


def test_yaml_bombs_are_judged_quickly() -> None:
    levels = ["a0: &a0 {k: v}"]
    levels += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    merge_bomb = "#cloud-config\n" + "\n".join(levels) + "\n"
    lists = ["l0: &l0 [x]"]
    lists += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 40)]
    started_at = time.monotonic()
    validate_user_data(merge_bomb)
    validate_user_data("#cloud-config\n" + "\n".join(lists) + "\n")
    validate_user_data("#cloud-config\n" + "a: " * 5000)
    validate_user_data("#cloud-config\n" + "- " * 8000)
    assert time.monotonic() - started_at < 5


@given(text=st.text())
def test_validation_never_fails(text: str) -> None:
    for prefix in ("", "#cloud-config\n", "#!", "## template: jinja\n"):
        errors = validate_user_data(prefix + text)
        assert all(isinstance(error, str) for error in errors)
        if not errors:
            seed.render_user_data(make_spec(user_data=prefix + text))


# Passwords


@pytest.mark.parametrize("password", ["simple", 'qu"ote \\ $(x)', "é漢字😀", "x" * 128, " "])
def test_password_hash_is_what_other_programs_compute(password: str) -> None:
    hashed = seed.hash_password(password)
    _, scheme, salt, _ = hashed.split("$")
    assert scheme == "6"
    other = subprocess.run(
        ["openssl", "passwd", "-6", "-salt", salt, "-stdin"],
        input=password.encode(),
        capture_output=True,
        check=True,
    )
    assert other.stdout.decode().strip() == hashed
    assert seed.hash_password(password) != hashed, "the salt must be new each time"


def test_json_is_valid_json_for_plain_values() -> None:
    body = seed.render_user_data(make_spec()).partition(b"\n")[2]
    assert json.loads(body) == read_config(make_spec())


def test_a_password_seed_sets_the_password_at_each_boot(tmp_path: Path) -> None:
    """The boothook is run as cloud-init runs it, with a `chpasswd` that shows what it is told."""
    spec = make_spec(username="root", password_hash=seed.hash_password("""A1b'"$(id)\\"""))
    files = read_files(seed.render_password_seed(spec))
    scrubbed = read_files(seed.render_scrubbed_seed(spec))
    header, _, script = files.pop("user-data").decode("ascii").partition("\n")
    assert scrubbed.pop("user-data") == b""
    assert (header, files) == ("#cloud-boothook", scrubbed)
    assert validate_user_data(f"{header}\n{script}") == []
    hook, chpasswd = tmp_path / "hook", tmp_path / "chpasswd"
    hook.write_text(script)
    chpasswd.write_text(f'#!/bin/sh\n{{ echo "$@"; cat; }} >{tmp_path}/told\n')
    for file in (hook, chpasswd):
        file.chmod(0o700)
    subprocess.run([hook], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert (tmp_path / "told").read_text() == f"-e\nroot:{spec.password_hash}\n"


def test_a_first_seed_that_insists_sets_the_password_of_an_account_that_exists_too(
    tmp_path: Path,
) -> None:
    """Beside what a first boot does with it. An account that does not exist yet is none of the hook's business."""
    spec = make_spec(username="nobody-here", user_data="#!/bin/sh\ntrue\n")
    message = email.message_from_bytes(
        read_files(seed.render_seed(spec, insists=True))["user-data"]
    )
    ours, hook, theirs = message.get_payload()
    assert ours.get_content_type() == "text/cloud-config"
    assert hook.get_content_type() == "text/cloud-boothook"
    assert theirs.get_content_type() == "text/x-shellscript"
    plain = dataclasses.replace(spec, user_data=None)
    assert json.loads(ours.get_payload().partition("\n")[2]) == read_config(plain)
    script = tmp_path / "hook"
    script.write_text(hook.get_payload())
    script.chmod(0o700)
    done = subprocess.run([script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
    assert done.stderr == b""
    assert spec.password_hash in script.read_text()


@pytest.mark.parametrize(
    "password_hash",
    [None, "", "!", "$1$x$y", "$6$a$b\nroot:x", "$6$a$b'; reboot; '", "$6$" + "a" * 200, "$6$é"],
)
def test_a_password_seed_carries_hashes_only(password_hash: str | None) -> None:
    with pytest.raises(ValueError, match="no password hash"):
        seed.render_password_seed(make_spec(password_hash=password_hash))
