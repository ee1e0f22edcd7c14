"""What supervisord reads of an environment that was written for it."""

from __future__ import annotations

import pytest
from supervisor.datatypes import dict_of_key_value_pairs

from awan.runtime.supervisor import SupervisorError, _quoted


@pytest.mark.parametrize(
    "value", ["", "a", "a b,c=d", '["10.77.1.1:5300"]', "it's", "https://x.example/?a=1", "{}"]
)
def test_a_value_is_read_as_it_was_written(value: str) -> None:
    assert dict_of_key_value_pairs(f"A={_quoted(value)},B=1") == {"A": value, "B": "1"}


@pytest.mark.parametrize("value", ['"it\'s" x', '"a"', "'a'", 'a"'])
def test_a_value_that_it_would_change_is_refused(value: str) -> None:
    with pytest.raises(SupervisorError):
        _quoted(value)
