"""The three parsers of foreign files on drawn and damaged input; ``make fuzz`` goes on for ten minutes."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import PARSERS, check

from mens_core.errors import MensError


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_are_a_value_or_an_error_of_ours(name, data, tmp_path):
    inputs, file, read = PARSERS[name]
    check(read, tmp_path / file, data.draw(inputs))


@pytest.mark.parametrize("name", PARSERS)
def test_the_inputs_reach_beyond_the_first_check(name, tmp_path):
    """The twin: some drawn input is taken, and a parser that raises anything else is found out."""
    inputs, file, read = PARSERS[name]
    taken = []

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def look(raw):
        taken.append(check(read, tmp_path / file, raw))

    look()
    assert any(taken)
    assert not all(taken)


def test_another_error_is_found_out(tmp_path):
    def broken(_path):
        raise KeyError("x")

    with pytest.raises(KeyError):
        check(broken, tmp_path / "x", b"")

    def honest(_path):
        raise MensError("no")

    assert check(honest, tmp_path / "x", b"") is False
