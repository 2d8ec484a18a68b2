"""Which builds two generations differ by, and what is known of a mirror."""

from datetime import UTC, datetime, timedelta

from pkgci.mirrors.records import State
from pkgci.released.records import Generation, ReleasedBuild, difference

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def build(name: str) -> ReleasedBuild:
    return ReleasedBuild(key=name * 64, source=name, target="t", version="1", packages=())


def generation(number: int, added: str, removed: str = "") -> Generation:
    about = {"number": number, "time": NOW, "stamp": number, "kind": "publish", "by": "me"}
    return Generation(**about, added=tuple(map(build, added)), removed=tuple(map(build, removed)))


def test_what_comes_and_goes_again_is_no_difference():
    history = [generation(2, "b", "a"), generation(3, "c", "b"), generation(4, "a", "c"), generation(5, "de", "f")]
    added, removed = difference(history)
    assert ({one.source for one in added.values()}, {one.source for one in removed.values()}) == (set("de"), {"f"})


def test_a_mirror_is_known_by_where_it_was_led_and_by_what_it_was_prepared_for():
    one = State().sending(1, ("a",), NOW).switched(1, 0, NOW)
    assert one.settled
    two = one.sending(2, ("b",), NOW + timedelta(days=1))
    assert not two.settled
    assert (two.known(1), two.known(2)) == (True, False)
    prepared = two.model_copy(update={"prepared": 2})
    assert (prepared.known(1), prepared.known(2)) == (True, True)
    switched = prepared.switched(2, 0, NOW + timedelta(days=2))
    assert [(one.number, one.replaced) for one in switched.kept] == [(1, NOW + timedelta(days=2)), (2, None)]
    back = switched.switched(1, 2, NOW + timedelta(days=3))
    assert (back.generation, back.known(2), back.settled) == (1, True, False)
    assert [(one.number, one.replaced) for one in back.kept] == [(1, None), (2, NOW + timedelta(days=3))]
    assert not State().known(0)
