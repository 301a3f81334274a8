"""The soak's model of a name has the states of the real one."""

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
def test_states_are_those_of_the_names_database(tmp_path_factory, steps):
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


def test_both_states_are_possible_during_a_change_and_only_the_result_after_it():
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


def test_an_unacknowledged_change_may_have_been_applied():
    timeline = Timeline()
    timeline.put("n", State(("a",)))
    with pytest.raises(ZeroDivisionError), timeline.change("n", State(("b", "a"))):
        1 / 0  # noqa: B018
    assert timeline.final_states() == {"n": [State(("a",)), State(("b", "a"))]}
    with timeline.change("n", State()) as change:
        change.done = True
    assert timeline.final_states() == {"n": [State()]}
