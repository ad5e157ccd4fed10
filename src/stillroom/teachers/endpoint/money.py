"""What asking costs: prices, a budget that is a hard stop, what is still to come, and when a student pays."""

from __future__ import annotations

from dataclasses import dataclass

from stillroom.errors import BudgetError, UsageError
from stillroom.teachers.endpoint.journal import Totals

MILLION = 1e6
PER_CHARACTER = 1.0  # tokens, before any answer says how many there are: no tokenizer gives more for plain text
TEMPLATE = 50  # tokens that a chat template adds
UNKNOWN = 4096  # tokens of an answer whose length nobody limits


@dataclass(frozen=True)
class Price:
    """Of a million tokens, in and out, and of an hour of the machine that the student runs on; in ``currency``."""

    input: float = 0.0
    output: float = 0.0
    machine_hour: float = 0.0
    currency: str = "USD"

    def __post_init__(self) -> None:
        for name in ("input", "output", "machine_hour"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"price.{name}={getattr(self, name)!r} must be 0 or more.")

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """The cost of so many tokens."""
        return (self.input * input_tokens + self.output * output_tokens) / MILLION

    def shown(self, cost: float) -> str:
        """'0.0042 USD'."""
        digits = 2 if cost >= 1 else 4 if cost >= 0.01 else 6
        return f"{cost:.{digits}f} {self.currency}"


@dataclass
class Purse:
    """What was spent, what questions under way may still cost, and what is left of the budget (None: no limit)."""

    price: Price
    budget: float | None
    spent: Totals
    longest: int | None  # tokens of an answer, at most
    reserved: float = 0.0
    ratio: float = 0.0  # the most tokens a character that was seen

    def most(self, characters: int) -> tuple[float, float]:
        """Tokens (in, out) that a question of so many characters may take at most."""
        return characters * (self.ratio * 1.1 or PER_CHARACTER) + TEMPLATE, self.longest or UNKNOWN

    @property
    def cost(self) -> float:
        return self.price.of(self.spent.input_tokens, self.spent.output_tokens)

    def reserve(self, characters: int) -> float:
        """Set aside what a question may cost. Raises BudgetError where the budget does not reach."""
        cost = self.price.of(*self.most(characters))
        if self.budget is not None and self.cost + self.reserved + cost > self.budget:
            raise BudgetError(
                f"the budget of {self.price.shown(self.budget)} is used up: {self.price.shown(self.cost)} spent on "
                f"{self.spent.requests} answers, and the next may cost {self.price.shown(cost)}. They are in the "
                "journal: raise the budget, and the same command goes on from there."
            )
        self.reserved += cost
        return cost

    def give_back(self, reserved: float) -> None:
        """A question came to nothing."""
        self.reserved = max(0.0, self.reserved - reserved)

    def pay(self, reserved: float, characters: int, input_tokens: int, output_tokens: int, seconds: float) -> None:
        """A question was answered."""
        self.give_back(reserved)
        if characters and input_tokens:
            self.ratio = max(self.ratio, input_tokens / characters)
        was = self.spent
        self.spent = Totals(
            was.requests + 1,
            was.input_tokens + input_tokens,
            was.output_tokens + output_tokens,
            was.seconds + seconds,
        )


@dataclass(frozen=True)
class Outlook:
    """What asking about ``examples`` will take, from the ``sample`` that was asked. Tokens, cost and seconds are of
    what is still to be asked; ``spent`` of what was.
    """

    examples: int
    requests: int  # still to come
    sample: int
    input_tokens: float
    output_tokens: float
    cost: float
    spent: float
    seconds: float
    budget: float | None
    price: Price

    def __str__(self) -> str:
        said = (
            f"asking about {self.examples:,} examples: {self.requests:,} requests to come, about "
            f"{self.input_tokens:,.0f} tokens in, {self.output_tokens:,.0f} out, {self.price.shown(self.cost)}, "
            f"{_lasting(self.seconds)} (from {self.sample} that were asked; {self.price.shown(self.spent)} spent "
            "so far)"
        )
        if self.budget is None:
            return said
        reach = "enough" if self.spent + self.cost <= self.budget else "NOT enough: asking will stop there"
        return f"{said}; the budget of {self.price.shown(self.budget)} is {reach}"


def break_even(spent: float, teacher: float, student: float) -> float | None:
    """Answers after which what the student cost to make (``spent``) is won back: spent / (teacher - student).

    ``teacher``, ``student``: the cost of one answer. None where the student's answer is not cheaper.
    """
    return spent / (teacher - student) if teacher > student else None


def _lasting(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
