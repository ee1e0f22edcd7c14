"""Bodies: the same meaning in JSON, urlencoded and multipart; everything else refused by name."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from awan.errors import BadRequest, Invalid
from awan.kit import forms
from tests.support.probe_app import Everything
from tests.support.tenants import make_tenant

FORM = "application/x-www-form-urlencoded"


def read(content: str | bytes, content_type: str = FORM) -> Everything:
    """The model of a body."""
    raw = content.encode() if isinstance(content, str) else content
    model, _ = forms.build(Everything, forms.parse_body(content_type, raw))
    return model


def read_json(**values: Any) -> Everything:
    """The model of a JSON body."""
    return read(json.dumps({"name": "n", "count": 1, **values}), "application/json")


def refused(content: str | bytes, content_type: str = FORM) -> set[str]:
    """The fields that are refused."""
    with pytest.raises(Invalid) as caught:
        read(content, content_type)
    assert caught.value.errors
    return set(caught.value.errors)


@pytest.mark.parametrize(
    "form",
    [
        "ids[]=1&ids[]=2",
        "ids[0]=1&ids[1]=2",
        "ids=1&ids=2",
        "ids[1]=2&ids[0]=1",
        "ids%5B%5D=1&ids=2",
    ],
)
def test_arrays_of_forms(form: str) -> None:
    assert read(f"name=n&count=3&{form}").ids in ([1, 2], [2, 1])


def test_indexed_arrays_keep_their_order() -> None:
    assert read("name=n&count=1&ids[10]=3&ids[2]=2&ids[0]=1").ids == [1, 2, 3]


def test_one_value_of_an_array() -> None:
    assert read("name=n&count=1&ids=7&names=x").ids == [7]


def test_empty_array() -> None:
    assert read("name=n&count=1&ids=").ids == []
    assert read("name=n&count=1&ids[]=").ids == []


def test_objects_in_forms() -> None:
    body = read("name=n&count=1&labels[env]=prod&labels[tier]=a&inner[port]=22&inner[note]=")
    assert body.labels == {"env": "prod", "tier": "a"}
    assert body.inner is not None
    assert (body.inner.port, body.inner.note) == (22, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, True) for text in ("true", "TRUE", "1", "on", "On")],
        *[(text, False) for text in ("false", "0", "off", "OFF")],
    ],
)
def test_booleans(text: str, value: bool) -> None:
    assert read(f"name=n&count=1&flag={text}").flag is value
    assert read_json(flag=text).flag is value
    assert read_json(flag=value).flag is value


@pytest.mark.parametrize("text", ["yes", "2", "t", "tru", "None", "01"])
def test_no_booleans(text: str) -> None:
    assert refused(f"name=n&count=1&flag={text}") == {"flag"}


@pytest.mark.parametrize(
    "text",
    ["+5", "-5", "5.0", "1e1", " 5", "5 ", "5_0", "0x5", "٥", "５", "five", "True", "9" * 5000],
)
def test_no_integers(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        forms.build(Everything, forms.form_tree([("name", "n"), ("count", text)]))
    assert set(caught.value.errors or ()) == {"count"}


@pytest.mark.parametrize("value", [True, 1.0, 1.5, [1], {"a": 1}, "1.0", 2**63, -(2**70)])
def test_no_integers_in_json(value: Any) -> None:
    with pytest.raises(Invalid) as caught:
        read_json(big=value)
    assert next(iter(caught.value.errors or ())).startswith("big")


def test_numeric_texts_in_json() -> None:
    assert read_json(count="12", ids=["1", 2], size="4", big=-3).model_dump(
        include={"count", "ids", "size", "big"}
    ) == {"count": 12, "ids": [1, 2], "size": 4, "big": -3}


def test_empty_text_is_null_or_not_given() -> None:
    body = read("name=n&count=1&maybe=&title=&colour=&flag=&size=&uuid=&at=&big=")
    assert (body.maybe, body.title, body.colour, body.uuid, body.at) == (None,) * 5
    assert (body.flag, body.size, body.big) == (False, 1, 1)
    assert read_json(maybe="", title="").title is None


def test_empty_text_of_a_required_field() -> None:
    assert refused("name=&count=1") == {"name"}
    assert refused("name=n&count=") == {"count"}


def test_missing_fields_are_named() -> None:
    assert refused(b"") == {"name", "count"}
    assert refused("{}", "application/json") == {"name", "count"}


@pytest.mark.parametrize("body", ["name=n&count=1&extra=1&_token=x&_method=POST"])
def test_unknown_fields_are_named(body: str) -> None:
    assert refused(body) == {"extra"}


def test_unknown_fields_inside() -> None:
    body = {"name": "n", "count": 1, "inner": {"port": 1, "x": 1}}
    assert refused(json.dumps(body), "application/json") == {"inner.x"}


def test_token_and_method_are_no_fields() -> None:
    assert read("name=n&count=1&_token=x").name == "n"


def test_a_scalar_comes_once() -> None:
    assert refused("name=a&name=b&count=1") == {"name"}
    assert refused("name=a&count[]=1&count[]=2") == {"count"}
    assert refused("name[x]=a&count=1") == {"name"}
    assert refused('{"name": "a", "name": "b", "count": 1}', "application/json") == {"name"}


@pytest.mark.parametrize("value", ["a\x00b", "a\ud800b"])
def test_texts_that_cannot_be_stored(value: str) -> None:
    for field in ("name", "title", "anything", "password"):
        with pytest.raises(Invalid) as caught:
            read_json(**{field: value})
        assert set(caught.value.errors or ()) == {field}
    for nested in (
        {"labels": {"a": value}},
        {"labels": {value: "a"}},
        {"anything": [{"b": value}]},
    ):
        with pytest.raises(Invalid):
            read_json(**nested)


def test_null_byte_in_a_form() -> None:
    assert refused("name=a%00b&count=1") == {"name"}
    with pytest.raises(Invalid):
        read("name=a&count=1&x%00y=1")


@pytest.mark.parametrize(
    "raw",
    [
        *[b"{", b"nul", b'{"a": NaN}', b'{"a": 1} x', b"\xff\xfe", b'{"a": "\xff"}'],
        *[b"[" * 100_000, b'{"name": ' + b"9" * 5000 + b"}"],
    ],
)
def test_broken_json(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read(raw, "application/json")


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"x"', b"3", b"true"])
def test_json_that_is_no_object(raw: bytes) -> None:
    assert refused(raw, "application/json") == {"body"}


def test_deep_json() -> None:
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Invalid):
        read_json(anything=deep)
    with pytest.raises(Invalid):
        read("name=n&count=1&labels" + "[a]" * 200 + "=1")


@pytest.mark.parametrize("raw", [b"name=%ff&count=1", b"name=\xff", b"a=1&" * 2000])
def test_broken_forms(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read(raw)


def test_multipart(probe: TestClient) -> None:
    fields = [("name", "n"), ("count", "3"), ("ids[]", "1"), ("ids[]", "2"), ("title", "é\n")]
    answer = probe.post("/everything", files=[(name, (None, text)) for name, text in fields])
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == {"name": "n", "count": 3, "ids": [1, 2], "title": "é\n"}


@pytest.mark.parametrize(
    ("content_type", "raw"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"name=n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\nn',
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="name"\r\n\r\n\xff\r\n--x--\r\n',
        ),
    ],
)
def test_broken_multipart(content_type: str, raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read(raw, content_type)


def test_files_are_refused(probe: TestClient) -> None:
    answer = probe.post("/everything", data={"count": "1"}, files={"name": ("a.txt", b"x")})
    assert answer.status_code == 422
    assert answer.json()["errors"] == {"name": ["The name must not be a file."]}


@pytest.mark.parametrize(
    "content_type", ["text/plain", "", "application/xml", "application/json; charset=latin-1"]
)
def test_other_media_types(probe: TestClient, content_type: str) -> None:
    answer = probe.post("/everything", content=b"x", headers={"content-type": content_type})
    assert (answer.status_code, answer.json()["type"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


def test_streamed_media_type(probe: TestClient) -> None:
    headers = {"content-type": "application/octet-stream"}
    assert probe.post("/everything", content=b"x", headers=headers).status_code == 415


def test_moments() -> None:
    assert read("name=n&count=1&at=2026-11-24T10:00:00Z").at is not None
    for text in ("1764000000", "2026-11-24T10:00:00", "tomorrow"):
        assert refused(f"name=n&count=1&at={text}") == {"at"}


def test_errors_repeat_no_input(probe: TestClient) -> None:
    answer = probe.post("/everything", json={"name": "n", "count": 1, "password": ["marker-x"]})
    assert answer.status_code == 422
    assert "marker" not in answer.text


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


def sentences(
    content: str | bytes, content_type: str = "application/json", model: Any = Everything
) -> dict[str, list[str]]:
    """The refused fields with their sentences."""
    raw = content.encode() if isinstance(content, str) else content
    with pytest.raises(Invalid) as caught:
        forms.build(model, forms.parse_body(content_type, raw))
    return {name: list(texts) for name, texts in (caught.value.errors or {}).items()}


@pytest.mark.parametrize(
    "body",
    ['{"title":"x","password":"marker-x"}', ' \n{"a":"b&c=d%ff"}', "[1]", "%7B%22a%22%3A1%7D"],
)
def test_json_sent_as_a_form_is_told_its_type(probe: TestClient, body: str) -> None:
    answer = probe.post("/everything", content=body, headers={"content-type": FORM})
    assert answer.status_code == 415
    assert "send the header Content-Type: application/json" in answer.json()["message"]
    assert "marker" not in answer.text


@pytest.mark.parametrize("content_type", [FORM, "application/json"])
def test_unknown_names_are_not_repeated_whole(content_type: str) -> None:
    name = "x" * 39 + "marker"
    body = f"name=n&count=1&{name}=1"
    if content_type != FORM:
        body = json.dumps({"name": "n", "count": 1, name: 1})
    assert "marker" not in str(sentences(body, content_type))


def test_unknown_fields_are_answered_with_the_known_ones(probe: TestClient) -> None:
    known = "known are: page, search, flag."
    errors = probe.get("/search?per_page=5").json()["errors"]
    assert errors == {"per_page": [f"The field per_page is not known; {known}"]}
    tenant = make_tenant()
    errors = probe.get("/who?x=1", headers=tenant.headers).json()["errors"]
    assert errors == {"x": ["The query parameter x is not known; known are: none."]}
    errors = probe.post("/start", json={"x": 1}).json()["errors"]
    assert errors == {"x": ["The field x is not known; known are: none."]}


@pytest.mark.parametrize(
    ("given", "name", "sentence"),
    [
        ({"count": -1}, "count", "The count must be at least 1."),
        ({"count": 65}, "count", "The count must be at most 64."),
        ({"uuid": "nope"}, "uuid", "The uuid must be a UUID."),
        ({"at": "x"}, "at", "The at must be an ISO 8601 date or time."),
        (
            {"at": "2026-11-24T10:00:00"},
            "at",
            "The at must have a time zone, as in 2026-11-24T10:00:00Z.",
        ),
        ({"labels": 5}, "labels", "The labels must be an object."),
        ({"inner": [1]}, "inner", "The inner must be an object."),
        ({"ids": 1}, "ids", "The ids must be a list."),
        ({"name": ""}, "name", "The name must have 1 character or more."),
        ({"name": "n" * 21}, "name", "The name must have 20 characters or fewer."),
        ({"title": 1}, "title", "The title must be a text."),
        ({"colour": "x"}, "colour", "The colour must be 'red' or 'blue'."),
        ({"size": 3}, "size", "The size must be 1, 2 or 4."),
        ({"either": "x"}, "either", "The either must be an integer or a UUID."),
        ({"inner": {"note": "x"}}, "inner.port", "The inner.port field is required."),
    ],
)
def test_what_is_wrong_is_said_plainly(given: dict[str, Any], name: str, sentence: str) -> None:
    body = {"name": "n", "count": 1, **given}
    assert sentences(json.dumps(body)) == {name: [sentence]}


def test_negative_numbers_are_refused_in_the_same_words() -> None:
    assert sentences("name=n&count=-1", FORM) == sentences('{"name": "n", "count": -1}')
    for text in ("-0", "-01", "--1", "- 1"):
        assert sentences(f"name=n&count={text}", FORM) == {
            "count": ["The count must be an integer."]
        }


class Worded(BaseModel):
    """Fields that say themselves what they take."""

    code: Annotated[str, forms.Matching("^[a-z]+$", "The code must be small letters.")] | None = (
        None
    )
    several: Annotated[str, forms.CommaList()] | None = None
    texts: Annotated[list[str], Field(min_length=1)] | None = None
    networks: list[IPv4Network | IPv6Network] | None = None


def test_fields_say_themselves_what_they_take() -> None:
    assert sentences('{"code": "a\\n"}', model=Worded) == {
        "code": ["The code must be small letters."]
    }
    assert forms.build(Worded, {"code": "abc"})[0].code == "abc"
    assert "'pattern': '^[a-z]+$'" in str(Worded.model_json_schema())
    assert sentences("several[]=a&several[]=b", FORM, Worded) == {
        "several": ["The several must be given only once, with commas between what it lists."]
    }
    assert sentences('{"texts": []}', model=Worded) == {
        "texts": ["The texts must have 1 entry or more."]
    }
    found = sentences('{"networks": ["10.0.0.1/8"]}', model=Worded)
    network = "network without host bits"
    assert found == {
        "networks.0": [f"The networks.0 must be an IPv4 {network} or an IPv6 {network}."]
    }


@given(
    st.dictionaries(
        st.sampled_from(list(Everything.model_fields)) | st.text(max_size=3), values, max_size=6
    )
)
def test_any_json_is_taken_or_refused(body: dict[str, Any]) -> None:
    try:
        model, plain = forms.build(
            Everything, forms.parse_body("application/json", json.dumps(body).encode())
        )
    except (Invalid, BadRequest):
        return
    assert isinstance(model, Everything)
    json.dumps(plain)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=6))
def test_any_form_is_taken_or_refused(pairs: list[tuple[str, str]]) -> None:
    try:
        forms.build(Everything, forms.form_tree(pairs))
    except (Invalid, BadRequest):
        return


@given(
    st.binary(max_size=80),
    st.sampled_from(["multipart/form-data; boundary=x", FORM, "application/json"]),
)
def test_any_bytes_are_taken_or_refused(raw: bytes, content_type: str) -> None:
    try:
        forms.parse_body(content_type, raw)
    except (Invalid, BadRequest):
        return


@given(st.integers(1, 64), st.booleans(), st.lists(st.integers(0, 2**63 - 1), max_size=4))
def test_json_and_form_say_the_same(count: int, flag: bool, ids: list[int]) -> None:
    pairs = [
        ("name", "n"),
        ("count", str(count)),
        ("flag", str(flag)),
        *(("ids[]", str(i)) for i in ids),
    ]
    body = {"name": "n", "count": count, "flag": flag, **({"ids": ids} if ids else {})}
    of_form = forms.build(Everything, forms.form_tree(pairs))
    of_json = forms.build(
        Everything, forms.parse_body("application/json", json.dumps(body).encode())
    )
    assert of_form == of_json
