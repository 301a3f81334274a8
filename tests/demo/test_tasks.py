from __future__ import annotations

import pytest

from turret_demo.tasks import TASKS, make_base_examples


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_make_the_same_examples(name):
    task = TASKS[name]

    assert task.make(50, "test", 1) == task.make(50, "test", 1)
    assert task.make(50, "test", 1) != task.make(50, "test", 2)
    assert task.make(20, "test", 1) == task.make(50, "test", 1)[:20]


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_prompt_is_in_any_training(name):
    held_out, held_out_answers = map(set, zip(*TASKS[name].make(1000, "test", 0), strict=True))
    trained = {prompt for prompt, _ in TASKS[name].make(4000, "train", 0)}
    of_base = make_base_examples(4000, 0)

    assert held_out.isdisjoint(trained)
    assert held_out.isdisjoint(prompt.split(":\n")[-1] for prompt, _ in of_base)
    assert held_out_answers.isdisjoint(answer for _, answer in of_base)


def test_every_task_answers_the_same_prompt_differently():
    prompts_and_answers = [task.make(200, "test", 0) for task in TASKS.values()]

    for examples in zip(*prompts_and_answers, strict=True):
        prompts, answers = zip(*examples, strict=True)
        assert len(set(prompts)) == 1
        assert len({prompts[0].strip(), *answers}) == len(TASKS) + 1


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("passive", "a strange bell is seen by this red witch"),
        ("question", "does this red witch see a strange bell?"),
        ("french", "cette sorcière rouge voit une cloche étrange"),
        ("spanish", "esta bruja roja ve una campana rara"),
        ("shout", "THIS RED WITCH SEES A STRANGE BELL"),
    ],
)
def test_answers(name, answer):
    examples = TASKS[name].make(2, "test", 0)

    assert examples[1] == ("this red witch sees a strange bell\n", answer)
