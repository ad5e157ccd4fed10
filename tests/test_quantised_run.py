"""A recipe whose student ends its training in the integers that ship."""

import json
from pathlib import Path

import pytest

from stillroom.errors import UsageError
from stillroom.plan import Plan
from stillroom.recipes.quantising import in_two
from stillroom.recipes.recipe import Quantise
from stillroom.recipes.yaml_file import check_recipe
from stillroom.run import open_run

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ("seeds=[0]", "fit.epochs=2", "record.views=1", "teacher.steps=40", "alone.objective={use: hard_labels}")


def test_both_parts_take_the_steps_of_the_plan():
    """The same budget as without: 30 steps are 24 in float and 6 rounded, at the lower learning rate."""
    first, last = in_two(Plan(steps=30, learning_rate=0.1, warmup=0.1), Quantise(share=0.2, learning_rate=0.5), 100)
    assert (first.steps, last.steps) == (24, 6)
    assert (first.learning_rate, last.learning_rate) == (0.1, 0.05)
    assert in_two(Plan(epochs=1, batch_size=10), Quantise(share=0.01), 100)[1].steps == 1


def recipe_of(**changes):
    content = {"name": "r", "data": {"train": {"use": "csv"}, "test": {"use": "csv"}}, "teacher": {"use": "t.py:t"}}
    return check_recipe({**content, "student": {"use": "mlp", "quantise": "int8"}, **changes})


def test_a_name_is_enough_and_what_cannot_ship_is_refused_at_once():
    assert recipe_of().student.quantise == Quantise(precision="int8")
    assert "quantise" not in recipe_of().student.arguments
    with pytest.raises(UsageError, match=r"trained in int8, not fp32"):
        recipe_of(export=[{"target": "onnx", "precision": "fp32"}])
    with pytest.raises(UsageError, match="int9"):
        recipe_of(student={"use": "mlp", "quantise": "int9"})
    with pytest.raises(UsageError, match="share"):
        recipe_of(student={"use": "mlp", "quantise": {"share": 1.0}})
    with pytest.raises(UsageError, match="is for networks"):
        recipe_of(tokens={"length": 8})


def test_a_run_trains_student_and_control_in_integers(tmp_path):
    """Float first, in a folder of its own; both ends know their rounding, and opened again they answer the same."""
    overrides = (*SMALL, "student.quantise={precision: int8, share: 0.5}", "export=[]")
    run = open_run(EXAMPLES / "digits.yaml", tmp_path / "run", overrides, progress=False)
    run.record()
    trained = run.fit()
    batch = run.data["test"].batch(range(20))
    for role in ("student", "alone"):
        said = json.loads((tmp_path / "run" / role / "student.json").read_text())
        before = json.loads((tmp_path / "run" / f"float-{role}" / "student.json").read_text())
        assert said["rounding"]["precision"] == "int8"
        assert said["made_by"]["rounded_after"] == {"folder": f"float-{role}", "steps": before["steps"]}
        assert "rounding" not in before
        again = run.trained()[role][0]
        assert again.predict(batch).logits.values.equal(trained[role][0].predict(batch).logits.values)
    assert said["steps"] + before["steps"] == Plan(epochs=2).total_steps(len(run.data["pool"]))
