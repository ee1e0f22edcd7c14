"""Bodies and query strings as validated models: JSON, urlencoded and multipart mean the same.

What clients may write:

- Arrays in forms: `k[]=a&k[]=b`, `k[0]=a&k[1]=b` or a repeated `k`. Objects: `k[name]=value`. A field that is no array
  may come once.
- Integers: a JSON integer or ASCII digits, without plus, exponent, space or other scripts' digits. A minus is read, so
  that a negative number is refused in the same words in both.
- Booleans: a JSON boolean, or true/false/1/0/on/off in any case.
- An empty string is null for a field that may be null, and "not given" for one with another default.
- Unknown fields are refused by name, with the known ones, at every depth, except `_method` and `_token` at the top.
- NUL and half surrogates are refused everywhere: no store of ours can hold them.

`parse_body` and `parse_query` give plain values, `build` makes the model of them.
"""

from __future__ import annotations

import json
import re
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Any, Literal, NewType, TypeVar, Union, get_args, get_origin
from urllib.parse import parse_qsl

from pydantic import (
    AwareDatetime,
    BaseModel,
    FutureDate,
    FutureDatetime,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    NaiveDatetime,
    PastDate,
    PastDatetime,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails
from pydantic_core.core_schema import no_info_after_validator_function
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, MultipartState

from awan.errors import BadRequest, Invalid, UnsupportedMediaType

JSON_TYPE = "application/json"
URLENCODED_TYPE = "application/x-www-form-urlencoded"
MULTIPART_TYPE = "multipart/form-data"
MEDIA_TYPES = (URLENCODED_TYPE, MULTIPART_TYPE, JSON_TYPE)

# Not part of any model: the verb that a form stands for, and the token that web frameworks add.
FORM_EXTRAS = frozenset({"_method", "_token"})
FIELDS_MAX = 1000
DEPTH_MAX = 16
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1
BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
UNKNOWN_NAMED_MAX = 20
KNOWN_NAMED_MAX = 40
# Long enough for every field there is; what a client took for a name may be its whole body, passwords included.
NAME_SHOWN_MAX = 40

_DIGITS = re.compile(r"[0-9]+")
_INTEGER = re.compile(r"[0-9]+|-[1-9][0-9]*")
# No field's name begins like this, as it stands or percent-encoded.
_LOOKS_LIKE_JSON = re.compile(rb"\s*(?:[{\[]|%7b|%5b)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+")
_FORM_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

ModelT = TypeVar("ModelT", bound=BaseModel)
Errors = defaultdict[str, list[str]]


@dataclass(frozen=True)
class Matching:
    """Metadata of a text field: the pattern it must match as a whole, and the sentence that says so in words."""

    pattern: str
    sentence: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """The field's own schema and then the check."""
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """As any field with a pattern."""
        return {**handler(schema), "pattern": self.pattern}

    def _check(self, text: str) -> str:
        if not re.fullmatch(self.pattern, text):
            raise ValueError(self.sentence)
        return text


@dataclass(frozen=True)
class CommaList:
    """Metadata of a text that lists things with commas: who gives the field several times is told so."""


@dataclass
class FormNode:
    """What a form said under one name: plain texts (`k`, `k[]`) and named parts (`k[0]`, `k[name]`)."""

    texts: list[str] = field(default_factory=list)
    parts: dict[str, FormNode] = field(default_factory=dict)


Values = dict[str, Any]
"""A body taken apart. Values of a form are `FormNode`s; which type each should have, only the model knows."""


def media_type_of(content_type: str) -> str:
    """The media type without its parameters, lower case."""
    return content_type.partition(";")[0].strip().lower()


def parse_body(content_type: str, raw: bytes) -> Values:
    """Takes a body apart by its content type. An empty body is an object without fields, whatever its type.

    Raises: BadRequest when it cannot be parsed, Invalid when it is JSON but no object, UnsupportedMediaType.
    """
    if not raw:
        return {}
    media_type = media_type_of(content_type)
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", content_type, re.IGNORECASE)
    if media_type not in MEDIA_TYPES or (charset and charset[1].lower() not in {"utf-8", "utf8"}):
        raise UnsupportedMediaType(f"The body must be one of {', '.join(MEDIA_TYPES)}, in UTF-8.")
    if media_type == JSON_TYPE:
        return _parse_json(raw)
    if media_type == MULTIPART_TYPE:
        return form_tree(_parse_multipart(content_type, raw))
    if _LOOKS_LIKE_JSON.match(raw):
        raise UnsupportedMediaType(
            f"The body looks like JSON but was sent as a form: send the header Content-Type: {JSON_TYPE}."
        )
    return form_tree(_parse_urlencoded(raw))


def parse_query(raw: bytes) -> Values:
    """Takes a query string apart, by the rules of forms. Raises: BadRequest."""
    return form_tree(_parse_urlencoded(raw))


def build(model: type[ModelT], given: Values) -> tuple[ModelT, dict[str, Any]]:
    """The validated model, and the plain values it was made of (the same for the same meaning in JSON and forms).

    Raises: Invalid with all fields' errors.
    """
    errors: Errors = defaultdict(list)
    known = {_wire_name(name, info.alias) for name, info in model.model_fields.items()}
    wanted = {
        name: value for name, value in given.items() if name in known or name not in FORM_EXTRAS
    }
    values = _object(model, wanted, "", errors)
    if errors:
        raise Invalid(errors)
    try:
        return model.model_validate(values), values
    except ValidationError as err:
        details = err.errors(include_url=False, include_input=False)
        raise Invalid(field_errors(details, values)) from err


def field_errors(details: list[ErrorDetails], values: Any = None) -> dict[str, list[str]]:
    """Pydantic's errors as sentences per field. Repeats no input: it may be a password.

    `values` is what was judged: where a union failed, pydantic names its members after the field, and they are not in
    there.
    """
    errors: Errors = defaultdict(list)
    choices: Errors = defaultdict(list)
    for detail in details:
        path, is_choice = _place(detail, values)
        name = ".".join(shown(str(part)) for part in path) or "request"
        (choices if is_choice else errors)[name].append(_sentence(name, detail))
    for name, sentences in choices.items():
        first, *others = [sentence.removesuffix(".") for sentence in dict.fromkeys(sentences)]
        rest = [other.removeprefix(f"The {name} must be ") for other in others]
        errors[name].append(f"{' or '.join([first, *rest])}.")
    return dict(errors)


def _place(detail: ErrorDetails, values: Any) -> tuple[list[int | str], bool]:
    """Where in the values the error is, and whether it is about one of several types there."""
    *parents, last = detail["loc"] or ("request",)
    if values is None:
        return [*parents, last], False
    path: list[int | str] = []
    inside = values
    for part in [*parents, last]:
        is_there = (isinstance(inside, dict) and part in inside) or (
            isinstance(inside, list) and isinstance(part, int) and part < len(inside)
        )
        if is_there:
            inside = inside[part]
        if is_there or (part == last and detail["type"] == "missing"):
            path.append(part)
    return path, len(path) < len(detail["loc"])


def unknown_field(name: str, known: Iterable[str], kind: str = "field") -> str:
    """The sentence on a `kind` that there is not: it names those that there are."""
    names = list(known)
    named = ", ".join(names[:KNOWN_NAMED_MAX]) + (", ..." if len(names) > KNOWN_NAMED_MAX else "")
    return f"The {kind} {shown(name)} is not known; known are: {named or 'none'}."


_UUID = "must be a UUID."
_MOMENT = "must be an ISO 8601 date or time."
_OBJECT = "must be an object."
_LIST = "must be a list."
_SENTENCES = {
    "missing": "field is required.",
    "extra_forbidden": "is not known.",
    "string_pattern_mismatch": "does not have the form that it must have.",
    "string_type": "must be a text.",
    "string_too_short": "must have {min_length} characters or more.",
    "string_too_long": "must have {max_length} characters or fewer.",
    "too_short": "must have {min_length} entries or more.",
    "too_long": "must have {max_length} entries or fewer.",
    "greater_than_equal": "must be at least {ge}.",
    "greater_than": "must be greater than {gt}.",
    "less_than_equal": "must be at most {le}.",
    "less_than": "must be less than {lt}.",
    "literal_error": "must be {expected}.",
    "enum": "must be {expected}.",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be an integer."),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false."),
    **dict.fromkeys(("uuid_parsing", "uuid_type", "uuid_version"), _UUID),
    **dict.fromkeys(("datetime_parsing", "datetime_from_date_parsing", "datetime_type"), _MOMENT),
    **dict.fromkeys(("date_parsing", "date_from_datetime_parsing", "date_type"), _MOMENT),
    "datetime_object_invalid": _MOMENT,
    "timezone_aware": "must have a time zone, as in 2026-11-24T10:00:00Z.",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _OBJECT),
    **dict.fromkeys(("list_type", "set_type", "tuple_type"), _LIST),
    "ip_v4_address": "must be an IPv4 address.",
    "ip_v6_address": "must be an IPv6 address.",
    "ip_v4_network": "must be an IPv4 network without host bits.",
    "ip_v6_network": "must be an IPv6 network without host bits.",
}
"""Pydantic's types of errors in our words: its own speak to who writes the model, and change with it."""


def _sentence(name: str, detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] in {"value_error", "assertion_error"}:
        text = str(context["error"])  # raised by a check of ours, in its own sentence
        return text if text.endswith((".", "!")) else f"{text}."
    words = _SENTENCES.get(detail["type"], "is not valid.").format_map(context)
    return f"The {name} {words}".replace(" 1 characters or", " 1 character or").replace(
        " 1 entries or", " 1 entry or"
    )


def _wire_name(name: str, alias: str | None) -> str:
    return alias or name


# --- taking bodies apart ---


def _parse_json(raw: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    repeated: set[str] = set()

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated.update(name for name, count in counts.items() if count > 1)
        return built

    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse_constant
        )
    except (ValueError, RecursionError) as err:
        raise BadRequest("The body is not valid JSON in UTF-8.") from err
    if not isinstance(value, dict):
        raise Invalid.field("body", "The body must be a JSON object.")
    if repeated:
        raise Invalid({shown(name): [f"The {shown(name)} is given twice."] for name in repeated})
    return value


def _parse_urlencoded(raw: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            raw.decode("utf-8"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=FIELDS_MAX,
        )
    except ValueError as err:
        raise BadRequest(
            f"The form is not valid UTF-8 or has more than {FIELDS_MAX} fields."
        ) from err


def _parse_multipart(content_type: str, raw: bytes) -> list[tuple[str, str]]:
    fields: list[tuple[bytes, bytes]] = []
    files: list[bytes] = []
    boundary = re.search(r"boundary\s*=\s*(?:\"([^\"]+)\"|([^\s;]+))", content_type, re.IGNORECASE)
    if boundary is None:
        raise BadRequest("The multipart body names no boundary.")

    def on_field(part: Field) -> None:
        fields.append((part.field_name or b"", part.value or b""))

    def on_file(part: File) -> None:
        files.append(part.field_name or b"")
        part.close()

    try:
        parser = FormParser(MULTIPART_TYPE, on_field, on_file, boundary=boundary[1] or boundary[2])
        parser.write(raw)
        parser.finalize()
        is_whole = getattr(parser.parser, "state", None) == MultipartState.END
        pairs = [(name.decode("utf-8"), value.decode("utf-8")) for name, value in fields]
        file_names = [name.decode("utf-8") for name in files]
    except (FormParserError, ValueError) as err:
        raise BadRequest("The multipart body cannot be parsed.") from err
    if not is_whole or len(pairs) > FIELDS_MAX or not all(name for name, _ in pairs):
        raise BadRequest("The multipart body is cut off, has a nameless part or too many of them.")
    if file_names:
        raise Invalid(
            {shown(name): [f"The {shown(name)} must not be a file."] for name in file_names}
        )
    return pairs


def form_tree(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Pairs as a tree: `a[b][]=c` is part `b` of `a` with the text `c`."""
    root = FormNode()
    for name, text in pairs:
        match = _FORM_NAME.fullmatch(name)
        keys = [match[1], *_BRACKET.findall(match[2])] if match else [name]
        if len(keys) > DEPTH_MAX:
            raise Invalid.field(shown(name), "The field is nested too deeply.")
        node = root
        for position, key in enumerate(keys):
            if key == "" and position:
                break  # `[]` and what follows it: one more text of the same name
            node = node.parts.setdefault(key, FormNode())
        node.texts.append(text)
    return dict(root.parts)


# --- giving values their types ---


def _object(
    model: type[BaseModel], given: Mapping[str, Any], path: str, errors: Errors
) -> dict[str, Any]:
    """The object's values with the types of the model's fields; unknown names become errors."""
    values: dict[str, Any] = {}
    fields = {_wire_name(name, info.alias): info for name, info in model.model_fields.items()}
    unknown = [name for name in given if name not in fields]
    for name in unknown[:UNKNOWN_NAMED_MAX]:
        errors[_join(path, shown(name))].append(unknown_field(name, fields))
    for name, info in fields.items():
        if name not in given:
            continue
        here = _join(path, name)
        annotation: Any = info.annotation
        value = given[name]
        if isinstance(value, FormNode):
            value = _form_value(value, annotation, here, errors)
        if value == "" and not info.is_required() and not _admits(annotation, str):
            if _is_nullable(annotation):
                values[name] = None
            continue
        values[name] = _typed(value, annotation, here, errors)
    return values


def _form_value(node: FormNode, annotation: Any, path: str, errors: Errors) -> Any:
    """What a form said, as JSON would have: a text, a list or an object, whichever the type asks for."""
    kind, inner = _kind_of(annotation)
    if kind is list:
        parts = node.parts
        if not all(_DIGITS.fullmatch(key) for key in parts):
            errors[path].append(f"The {path} must be a list.")
            return []
        texts = [] if node.texts == [""] else node.texts
        ordered = [parts[key] for key in sorted(parts, key=int)]
        return [
            *texts,
            *(_form_value(part, inner, f"{path}.{n}", errors) for n, part in enumerate(ordered)),
        ]
    if kind is dict and not node.texts:
        return {
            key: _form_value(part, _value_type(inner, key), _join(path, key), errors)
            for key, part in node.parts.items()
        }
    if node.parts:
        errors[path].append(f"The {path} must be a single value.")
        return None
    if len(node.texts) > 1:
        how = ", with commas between what it lists" if _is_comma_list(annotation) else ""
        errors[path].append(f"The {path} must be given only once{how}.")
        return None
    return node.texts[0]


def _value_type(inner: Any, key: str) -> Any:
    """The type of one value of an object: a model's field, or the dict's value type."""
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        info = inner.model_fields.get(key)
        return info.annotation if info else str
    return inner


def _typed(value: Any, annotation: Any, path: str, errors: Errors, depth: int = 0) -> Any:
    """`value` as the annotation's type where a text or a number can mean it; else unchanged, for pydantic to judge."""
    if depth > DEPTH_MAX:
        errors[path].append(f"The {path} is nested too deeply.")
        return None
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            errors[path].append(f"The {path} has characters that cannot be stored.")
            return None
        if value == "" and _is_nullable(annotation):
            return None
    if value is None:
        return None
    kind, inner = _kind_of(annotation)
    if kind is list and isinstance(value, list):
        return [
            _typed(item, inner, f"{path}.{n}", errors, depth + 1) for n, item in enumerate(value)
        ]
    if kind is dict and isinstance(value, dict):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return _object(inner, value, path, errors)
        return {
            _typed(key, str, path, errors): _typed(
                item, inner, _join(path, shown(key)), errors, depth + 1
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, dict)):
        return _untyped(value, path, errors, depth)
    convert = _CONVERTERS.get(kind)
    if convert is None:
        return value
    try:
        return convert(value)
    except ValueError as err:
        errors[path].append(f"The {path} {err}")
        return None


def _untyped(value: Any, path: str, errors: Errors, depth: int) -> Any:
    """A list or object where no type says what is inside: its texts are still checked."""
    if isinstance(value, list):
        return [_typed(item, Any, path, errors, depth + 1) for item in value]
    return {
        _typed(key, Any, path, errors): _typed(item, Any, path, errors, depth + 1)
        for key, item in value.items()
    }


def integer(value: Any) -> int:
    """An integer as clients may write it. Raises: ValueError, the rest of a sentence about the field."""
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        # Far more digits than fit would cost time to read.
        value = int(value) if len(value) <= 40 else INTEGER_MAX + 1
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be an integer.")
    if not INTEGER_MIN <= value <= INTEGER_MAX:
        raise ValueError("is out of range.")
    return value


def boolean(value: Any) -> bool:
    """A boolean as clients may write it. Raises: ValueError, the rest of a sentence about the field."""
    if isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if isinstance(value, bool) or (isinstance(value, int) and value in {0, 1}):
        return bool(value)
    raise ValueError("must be true or false.")


def _moment(value: Any) -> Any:
    # Pydantic would also take seconds since 1970.
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return value
    raise ValueError("must be an ISO 8601 date or time.")


def _text(value: Any) -> Any:
    # Pydantic would also take an address's number.
    if isinstance(value, str):
        return value
    raise ValueError("must be a text.")


_TEXT_ONLY = frozenset({IPv4Address, IPv6Address, IPv4Network, IPv6Network})
_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    **dict.fromkeys(_TEXT_ONLY, _text),
    int: integer,
    bool: boolean,
    **dict.fromkeys(
        (
            datetime,
            date,
            AwareDatetime,
            NaiveDatetime,
            FutureDatetime,
            PastDatetime,
            FutureDate,
            PastDate,
        ),
        _moment,
    ),
}


def _bare(annotation: Any) -> Any:
    """Without Annotated and NewType."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        else:
            return annotation


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union; a list of one for anything else."""
    bare = _bare(annotation)
    if get_origin(bare) in {Union, types.UnionType}:
        return [member for arg in get_args(bare) for member in _alternatives(arg)]
    return [bare]


def _is_nullable(annotation: Any) -> bool:
    return type(None) in _alternatives(annotation)


def _is_comma_list(annotation: Any) -> bool:
    members = [annotation, *get_args(annotation)]
    return any(isinstance(mark, CommaList) for member in members for mark in get_args(member))


def _admits(annotation: Any, kind: type) -> bool:
    return kind in _alternatives(annotation) and not _is_nullable(annotation)


def _kind_of(annotation: Any) -> tuple[Any, Any]:
    """What to convert to (int, bool, list, dict, datetime or None for "as it is") and the type inside.

    Of a model: (dict, the model). A union of several types is left to pydantic.
    """
    members = [member for member in _alternatives(annotation) if member is not type(None)]
    if members and all(member in _TEXT_ONLY for member in members):
        return members[0], Any
    if len(members) != 1:
        return None, Any
    bare = members[0]
    origin, args = get_origin(bare), get_args(bare)
    if bare in {list, set, tuple, frozenset} or origin in {list, set, tuple, frozenset}:
        return list, args[0] if args else Any
    if bare is dict or origin is dict:
        return dict, args[1] if len(args) == 2 else Any
    if origin is Literal:
        return (int, Any) if all(type(arg) is int for arg in args) else (None, Any)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return dict, bare
    return (bare if bare in _CONVERTERS else None), Any


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def shown(name: str) -> str:
    """A client's field name as it may be repeated in an answer."""
    return _UNSTORABLE.sub("?", name)[:NAME_SHOWN_MAX]
