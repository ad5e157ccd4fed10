"""What asking costs: prices, budgets, outlooks, break-even; and a whole run of a recipe with an endpoint."""

import json

import pytest
import torch

from endpoint_world import Proxy, asker, colours, llama_server
from stillroom import Table
from stillroom.errors import BudgetError, DataError, UsageError
from stillroom.recipes.asked import asked_ahead, bill, sampled
from stillroom.teachers.endpoint.journal import Totals
from stillroom.teachers.endpoint.money import Price, Purse, break_even

PRICE = {"input": 1.0, "output": 10.0, "machine_hour": 0.36}


@pytest.fixture(scope="module")
def server():
    with llama_server() as url:
        yield url


def test_prices_by_hand():
    assert Price(2.0, 8.0).of(1_000_000, 500_000) == 6.0
    assert Price().of(10, 10) == 0
    assert Price(currency="EUR").shown(0.05) == "0.0500 EUR"
    with pytest.raises(UsageError, match=r"price.input=-1 must be 0 or more"):
        Price(-1)


def test_break_even_by_hand():
    """30 spent, an answer costs 0.004 instead of 0.001: won back after 10,000 answers."""
    assert break_even(30.0, 0.004, 0.001) == pytest.approx(10_000)
    assert break_even(30.0, 0.001, 0.001) is None


def test_a_purse_never_begins_what_it_could_not_pay():
    """What may come of questions under way is set aside before the next one begins."""
    purse = Purse(Price(0.0, 1e6), 2.5, Totals(), longest=1)  # an answer costs 1 at most
    first, second = purse.reserve(10), purse.reserve(10)
    with pytest.raises(BudgetError, match=r"2.50 USD is used up: 0.000000 USD spent on 0 answers"):
        purse.reserve(10)
    purse.give_back(first)
    purse.pay(second, 10, 5, 1, 0.1)
    assert purse.cost == 1.0
    purse.reserve(10)
    with pytest.raises(BudgetError, match="1.00 USD spent on 1 answers"):
        purse.reserve(10)


def test_a_budget_is_a_hard_stop_that_can_be_raised(server, tmp_path):
    """What is spent never exceeds it, nothing is lost, and a raised budget goes on from there."""
    rows = colours(8)
    with Proxy(server) as proxy:
        teacher = asker(proxy.url, tmp_path, price={"output": 1e6}, budget=3.5, limits={"in_flight": 2})
        with pytest.raises(BudgetError, match="3.50 USD is used up: 3.00 USD spent on 3 answers"):
            teacher.ask_ahead(rows)
        assert teacher.cost(teacher.totals()) == 3.0
        assert len(proxy.questions) == 3
        richer = asker(proxy.url, tmp_path, price={"output": 1e6}, budget=20)
        assert richer.ask_ahead(rows) == {}
        assert len(proxy.questions) == 8


def test_the_outlook_is_what_is_then_spent(server, tmp_path):
    """Tokens and cost from a sample; every question is about as long as the sampled ones, so the estimate holds."""
    rows = colours(12)
    with Proxy(server) as proxy:
        teacher = asker(proxy.url, tmp_path, price=PRICE, budget=1.0)
        before = teacher.outlook(rows, sample=4)
        assert len(proxy.questions) == 4
        assert before.requests == 8
        assert "8 requests to come" in str(before)
        assert "is enough" in str(before)
        teacher.ask_ahead(rows)
        spent = teacher.totals()
        assert before.spent + before.cost == pytest.approx(teacher.cost(spent), rel=0.1)
        assert spent.output_tokens == 12
        assert teacher.outlook(rows).requests == 0
        assert len(proxy.questions) == 12
    poor = asker(server, tmp_path / "poor", price={"output": 1e6}, budget=5)
    assert "NOT enough" in str(poor.outlook(rows, sample=3))


def test_rows_that_are_set_aside_are_left_out_and_counted(server, tmp_path):
    """In the run's asked.json, with the reason; where nobody has an answer, nothing is trained."""
    with Proxy(server, lambda number, body: "400" if "Thing 2 " in body["prompt"] else None) as proxy:
        teacher = asker(proxy.url, tmp_path, price=PRICE)
        rows = asked_ahead(teacher, colours(4), "pool", tmp_path / "run", progress=False)
        assert rows.ids == ("row-0", "row-1", "row-3")
        said = json.loads((tmp_path / "run" / "asked.json").read_text())
        assert said["rows"]["pool"]["rows"] == 4
        assert "not allowed" in said["rows"]["pool"]["aside"]["row-2"]
        assert said["teachers"][0]["requests"] == 4  # the refused one too
        with pytest.raises(DataError, match="no answer to any of 1 rows"):
            asked_ahead(teacher, colours(3).select([2]), "pool", None, progress=False)
        few = sampled(teacher, colours(4), colours(3))
        assert (len(few.pool), len(few.labelled)) == (3, 2)
    plain = Table({"x": torch.zeros(2, 1)}, ids=("a", "b"))
    assert asked_ahead(lambda batch: None, plain, "pool", tmp_path, progress=False) is plain


def test_the_bill(server, tmp_path):
    """Teacher: tokens times price. Student: latency times the machine's hour. By hand from the files."""
    teacher = asker(server, tmp_path, price=PRICE)
    asked_ahead(teacher, colours(4), "pool", tmp_path, progress=False)
    for name, said in (
        ("report/report.json", {"rows": {"student": {"latency": {"value": 0.001}}}}),
        ("student/student.json", {"seconds": 100}),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(said))
    made = bill(teacher, tmp_path)
    spent = teacher.cost(teacher.totals())
    assert made == json.loads((tmp_path / "report/money.json").read_text())
    assert made["thousand"]["teacher"] == pytest.approx(1000 * spent / 4)
    assert made["thousand"]["student"] == pytest.approx(1000 * 0.001 / 3600 * 0.36)
    assert made["spent"] == {"asking": pytest.approx(spent), "training": pytest.approx(0.01)}
    assert made["break_even"] == pytest.approx((spent + 0.01) / (spent / 4 - 1e-7))
    assert bill(lambda batch: None, tmp_path) is None


def test_an_outlook_knows_what_another_reading_paid(server, tmp_path):
    """The same questions read in another way are in the journal: their tokens say what the rest will take."""
    table = colours(40)
    asker(server, tmp_path, price={"input": 1.0, "output": 1.0})(table.batch([*range(0, 40, 4)]))
    other = asker(server, tmp_path, price={"input": 1.0, "output": 1.0}, prior={"red": 0.3, "blue": 0.7})
    found = other.outlook(table, sample=10)
    assert found.sample == 0  # nothing was paid under its own name
    assert found.requests == 30
    assert found.input_tokens > 30 * 5
