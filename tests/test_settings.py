"""What ran is written down exactly, and read back as what it was."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillroom import settings
from stillroom.divergences import bind, jensen_shannon
from stillroom.errors import MissingFileError, UsageError
from stillroom.objectives import HardLabels, Mix, SoftTargets
from stillroom.plan import Plan


@dataclass(frozen=True)
class Nested:
    plan: Plan
    names: tuple[str, ...] = ("a", "b")


@pytest.mark.parametrize(
    "value",
    [
        Plan(learning_rate=3e-4, steps=7),
        SoftTargets(temperature=4.0),
        SoftTargets(divergence=bind(jensen_shannon, teacher_weight=0.1)),
        Mix({SoftTargets(): 0.9, HardLabels(): 0.1}),
        Nested(Plan(seed=3)),
    ],
)
def test_a_frozen_dataclass_is_its_own_configuration(value):
    """describe and rebuild are inverse for dataclasses, nested ones and functions included."""
    assert settings.rebuild(settings.describe(value)) == value


def test_a_function_is_written_by_name():
    described = settings.describe(jensen_shannon)
    assert described == {"function": "stillroom.divergences:jensen_shannon"}
    assert settings.rebuild(described) is jensen_shannon


def test_every_changed_field_changes_the_description():
    start = settings.describe(Plan())
    for field in dataclasses.fields(Plan):
        others = {"schedule": "linear", "optimiser": "sgd", "precision": "bf16", "average": "example", "warmup": 0.5}
        others["checkpointing"] = True
        other = others.get(field.name, 17)
        assert settings.describe(dataclasses.replace(Plan(batch_size=64), **{field.name: other})) != start


def test_a_users_file_is_found_beside_the_recipe(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    found = settings.resolve("mine.py:double", tmp_path)
    assert found(21) == 42
    assert settings.name_of(found) == "mine.py:double"


def test_names_that_lead_nowhere_say_what_to_write(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    with pytest.raises(UsageError, match="'module:name' or 'my_file.py:name'"):
        settings.resolve("double")
    with pytest.raises(UsageError, match="did you mean 'double'"):
        settings.resolve("mine.py:doubel", tmp_path)
    with pytest.raises(MissingFileError, match="absent.py"):
        settings.resolve("absent.py:double", tmp_path)
    with pytest.raises(UsageError, match="no module 'nowhere_at_all'"):
        settings.resolve("nowhere_at_all:double")


def test_a_value_that_cannot_be_written_down_is_refused():
    with pytest.raises(UsageError, match="cannot be written down"):
        settings.describe(object())
