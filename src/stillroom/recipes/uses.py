"""Parts of a recipe that others are made of: a named function, and the driving of a control task."""

from __future__ import annotations

from typing import Any, Literal

from jsonschema import Draft202012Validator, SchemaError
from pydantic import BaseModel, ConfigDict, Field, field_validator


class Strict(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Use(BaseModel):
    """A function or class by name, and its arguments beside it: {use: NAME, argument: value, ...}."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str = Field(description="a built-in name, 'module:name', or 'my_file.py:name' (looked up beside the recipe)")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Driving(Strict):
    """A control task as data: what the student learns from is met while driving."""

    task: Use
    way: Literal["cloning", "dart", "dagger", "student_drives"] = Field(
        "dagger", description="who drives while the teacher is asked"
    )
    questions: int = Field(4000, gt=0, description="answers of the teacher, whatever the way")
    rounds: int | None = Field(None, gt=0, description="default: 5 of dagger, 20 of student_drives")
    steps: int | None = Field(None, gt=0, description="training steps between two rounds; default: fit's by the rounds")
    noise: float = Field(0.2, ge=0, description="of dart: standard deviation, as a share of half the action's range")
    first_share: float = Field(1.0, ge=0, le=1, description="of dagger: the teacher's share of the first round's steps")
    last_share: float = Field(0.0, ge=0, le=1, description="and of the last round's")
    unseen: int = Field(50, ge=1, description="starts of each task that the students are tested from")
    least_success: float = Field(0.9, ge=0, le=1, description="of the teacher itself, or nothing starts")
    least_return: float | None = Field(None, description="the same where a task says no success: its mean return")
    cloning: bool = Field(True, description="a control row: the same student, cloned with as many questions")


class Writing(Strict):
    """Answers in words: what the teacher writes becomes what the student learns to write (Kim and Rush 2016)."""

    prompt: str = Field(description="how the student is asked: a Jinja2 template over the columns")
    answer: str | None = Field(None, description="the column with a person's answer; default: the class, where known")
    base: str | None = Field(None, description="the model whose tokenizer and layers the student has; default: its own")
    chat: bool = Field(False, description="ask by the tokenizer's chat template; default: a text to go on with")
    thinking: bool | None = Field(None, description="the template's thinking switch, where it has one")
    length: int = Field(256, ge=8, description="tokens of a row: question and answer")
    new_tokens: int = Field(64, ge=1, description="of an answer, at most")
    fields: dict[str, Any] | None = Field(None, description="JSON Schema of answers that are JSON: compared by field")

    @field_validator("fields")
    @classmethod
    def _schema(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            Draft202012Validator.check_schema(given or {})
        except SchemaError as error:
            raise ValueError(f"no JSON Schema (2020-12): {error.message}") from None
        return given


def driven(content: Any) -> Any:
    """A recipe's raw content with the defaults of control tasks, which have continuous answers and no labels."""
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict) or not content["data"].get("driving"):
        return content
    if content.get("alone") is not None:
        raise ValueError("alone: a control task has no labels to learn from without its teacher; leave it out")
    student = content.get("student")
    student = {"answers": "values", **student} if isinstance(student, dict) else student
    return {"objective": {"use": "match_values"}, **content, "alone": None, "student": student}


def written(content: Any) -> Any:
    """A recipe's raw content with the defaults of answers in words: texts are kept, and learned as labels."""
    if not isinstance(content, dict) or not content.get("writes"):
        return content
    record = content.get("record") or {}
    kept = {"keep": [{"use": "texts"}], **record} if isinstance(record, dict) else record
    return {"objective": {"use": "hard_labels"}, **content, "record": kept}
