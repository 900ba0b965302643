"""The recorded numbers of the published optimisers are what those optimisers still give."""

import pytest

from tests.golden import RECORDS, recorded

# A path of hundreds of steps drifts with the rounding of each machine; its end hardly does.
SAME = 0.01


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        assert one == pytest.approx(other, rel=SAME)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_the_published_optimisers_give_what_was_recorded(name):
    numbers = recorded(name)
    assert numbers.pop("versions")
    same(RECORDS[name](), numbers)


def test_every_record_is_there_and_tells_its_settings():
    for name in RECORDS:
        numbers = recorded(name)
        assert numbers.pop("versions")
        for each in numbers.values() if name.startswith("tiny") else [numbers]:
            assert ("objective" in each) == ("settings" in each)
            assert ("distance" in each) == ("theta0" in each)
            assert each["steps"] >= 125
