"""A recipe is checked before anything runs, and nothing of it is left to a default."""

import shutil
from pathlib import Path

import pytest
import yaml

from stillroom.errors import FolderError, MissingFileError, UsageError
from stillroom.recipes.named import OBJECTIVES, call, resolved
from stillroom.recipes.recipe import Use
from stillroom.recipes.yaml_file import check_recipe, keep_recipe, load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
LEAST = {
    "name": "x",
    "data": {"train": {"use": "csv", "path": "a.csv"}, "test": {"use": "csv", "path": "b.csv"}},
    "teacher": {"use": "network", "net": "mine.py:net"},
    "student": {"use": "mlp", "inputs": 4, "outputs": 2},
}


@pytest.mark.parametrize("name", ["digits", "reuters"])
def test_the_examples_are_recipes(name):
    recipe, folder = load_recipe(EXAMPLES / f"{name}.yaml")
    assert recipe.name == name
    assert folder == EXAMPLES


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("techer",), {}, "unknown key 'techer'; did you mean 'teacher'"),
        (("data", "labels"), {"cuont": 3}, "unknown key 'data.labels.cuont'; did you mean 'count'"),
        (("evaluate",), {"replicate": 3}, "did you mean 'replicates'"),
        (("learn_from",), "some", "learn_from"),
        (("record",), {"views": 0}, r"record.views: .*greater than or equal to 1 \(found 0\)"),
        (("name",), "../x", "name"),
        (("seeds",), [], "seeds"),
        (("data",), {"train": {"use": "csv"}}, "give either 'train' and 'test', or 'source'"),
    ],
)
def test_a_bad_key_or_value_is_one_clear_line(path, value, message):
    content = {**LEAST, "data": dict(LEAST["data"])}
    place = content
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(UsageError, match=message) as caught:
        check_recipe(content)
    assert "\n" not in str(caught.value)


def test_overrides_reach_into_the_recipe():
    """YAML 1.1 reads 1e-4 as text; here it is the number that was meant."""
    recipe, _ = load_recipe(EXAMPLES / "digits.yaml", ("fit.learning_rate=1e-4", "seeds=[5]", "data.labels.count=50"))
    assert recipe.fit["learning_rate"] == 1e-4
    assert recipe.seeds == [5]
    assert recipe.data.labels is not None
    assert recipe.data.labels.count == 50
    with pytest.raises(UsageError, match="key=value"):
        load_recipe(EXAMPLES / "digits.yaml", ("fit.learning_rate",))
    with pytest.raises(UsageError, match="did you mean 'data'"):
        load_recipe(EXAMPLES / "digits.yaml", ("dta.labels.count=50",))


def test_a_missing_or_broken_file_says_so(tmp_path):
    with pytest.raises(MissingFileError, match="absent.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(UsageError, match="broken.yaml is not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="holds list"):
        load_recipe(tmp_path / "list.yaml")


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UsageError, match="not YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_a_misspelt_argument_names_the_nearest():
    with pytest.raises(UsageError, match="takes no 'temprature'; did you mean 'temperature'"):
        call(Use(use="soft_targets", temprature=2), OBJECTIVES, EXAMPLES, "objective")
    with pytest.raises(UsageError, match="unknown objective 'soft_target'; did you mean 'soft_targets'"):
        call(Use(use="soft_target"), OBJECTIVES, EXAMPLES, "objective")


def test_nothing_is_left_to_a_default(tmp_path, monkeypatch):
    """The resolved recipe holds the functions' own defaults and the digests of own files, and is its own fixpoint."""
    monkeypatch.chdir(EXAMPLES.parent)
    recipe, folder = load_recipe(EXAMPLES / "digits.yaml")
    ready = resolved(recipe, folder)
    assert ready.objective.arguments["scale_by_temperature_squared"] is True
    assert ready.teacher.arguments["steps"] == 600
    assert list(ready.files) == ["examples/digits.py"]
    assert len(ready.files["examples/digits.py"]) == 64
    assert resolved(ready, Path()) == ready


def test_a_run_folder_with_another_recipe_is_refused(tmp_path):
    recipe = check_recipe(LEAST)
    keep_recipe(recipe, tmp_path / "run")
    keep_recipe(recipe, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    other = check_recipe({**LEAST, "fit": {"epochs": 3}})
    with pytest.raises(FolderError, match=r"another recipe \(different: fit\)"):
        keep_recipe(other, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FolderError, match="not empty"):
        keep_recipe(recipe, tmp_path / "full")


def test_a_kept_recipe_is_a_recipe(tmp_path, monkeypatch):
    """runs/NAME/recipe.yaml can be given to every command again."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "digits.py", tmp_path)
    shutil.copy(EXAMPLES / "digits.yaml", tmp_path)
    recipe, folder = load_recipe("digits.yaml")
    ready = resolved(recipe, folder)
    keep_recipe(ready, tmp_path / "runs" / "digits")
    again, _ = load_recipe(tmp_path / "runs" / "digits")
    assert again == ready
    text = yaml.safe_load((tmp_path / "runs" / "digits" / "recipe.yaml").read_text())
    assert str(tmp_path) not in str(text)
