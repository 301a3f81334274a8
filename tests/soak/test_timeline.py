"""What the soak believes of a name is what the real names say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soak.timeline import State, Timeline
from support.adapter_files import revision
from turret_adapters.store.names import Names

REVISIONS = [revision(b"%d" % index) for index in range(4)]
STEPS = st.tuples(
    st.sampled_from(["load", "roll back", "split"]), st.integers(0, 40), st.sampled_from([0, 10, 100])
)


def found(names: Names) -> State:
    history = tuple(published.revision for published in names.histories(["a"])["a"])
    split = names.splits().get("a")
    return State(history, (split.revision, split.percent) if split else None)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_a_state_changes_as_the_names_do(tmp_path_factory, steps):
    names = Names(tmp_path_factory.mktemp("names") / "names.sqlite", "base")
    state = State()
    for kind, number, percent in steps:
        match kind:
            case "load":
                loaded = REVISIONS[number % len(REVISIONS)]
                names.publish("a", loaded, "")
                state = state.loaded(loaded)
            case "roll back" if len(state.history) > 1:
                to = state.history.index(state.history[1 + number % (len(state.history) - 1)], 1)
                names.rollback("a", state.history[to])
                state = state.rolled_back(to)
            case "split" if others := [each for each in state.history if each != state.history[0]]:
                names.split("a", others[number % len(others)], percent)
                state = state.split_to(others[number % len(others)], percent)
        assert found(names) == state
    names.close()


def test_during_a_change_both_are_possible_and_afterwards_what_came_of_it():
    timeline = Timeline()
    before, after = State(("a",)), State(("b", "a"))
    timeline.put("n", before)
    with timeline.change("n", after) as change:
        assert timeline.possible("n", 1e9, 1e9) == [after, before]
        change.done = True
    assert timeline.now("n") == after
    assert timeline.possible("n", 1e9, 1e9) == [after]
    assert timeline.possible("n", 0.0, 1e9) == [before, after]
    with timeline.change("n", State()):
        pass
    assert timeline.now("n") == after
    assert timeline.possible("n", 1e9, 1e9) == [after]


def test_a_change_of_whose_end_nobody_heard_may_have_been_made():
    timeline = Timeline()
    timeline.put("n", State(("a",)))
    with pytest.raises(ZeroDivisionError), timeline.change("n", State(("b", "a"))):
        1 / 0  # noqa: B018
    assert timeline.left() == {"n": [State(("a",)), State(("b", "a"))]}
    with timeline.change("n", State()) as change:
        change.done = True
    assert timeline.left() == {"n": [State()]}
