"""A recipe with an endpoint from record to passport: costs, rows set aside, and no key in any file of the run."""

import json

import pytest
import yaml

import stillroom as sr
from endpoint_world import CHOICES, Proxy, asker, colours, llama_server
from stillroom import provenance
from stillroom.errors import UndecidedError
from stillroom.run import open_run

CANARY = "sk-canary-run-9"


@pytest.fixture(scope="module")
def server():
    with llama_server() as url:
        yield url


def recipe(folder, url, terms):
    for role, count in (("train", 24), ("test", 12)):
        rows = [
            {"id": f"{role}-{n}", "text": f"{role} {n} is blue or red:", "topic": CHOICES[n % 2]} for n in range(count)
        ]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {"use": "jsonl", "text": "text", "label": "topic", "id": "id"}
    made = {
        "name": "asked",
        "seeds": [0],
        "data": {"train": {**read, "path": "train.jsonl"}, "test": {**read, "path": "test.jsonl"}},
        "teacher": {
            "use": "endpoint", "url": url, "model": "smollm2", "prompt": "{{ text }}", "route": "completions",
            "top": 100, "least": 0.0, "key": "CANARY_KEY", "price": {"input": 1.0, "output": 2.0, "machine_hour": 0.05},
            "journal": str(folder / "journal.sqlite"), "extra": {"cache_prompt": False},
        },
        "student": {
            "use": "bag_of_words", "width": 8, "hidden": 8, "adapter": {"use": "words", "size": 100, "length": 8},
        },
        "fit": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
        "evaluate": {"replicates": 20},
        "terms": terms,
    }  # fmt: skip
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def test_a_run_from_questions_to_passport(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)
    own = {"teacher": {"licence": "Apache-2.0", "route": "local-weights"}}
    with Proxy(server, lambda number, body: "400" if body["prompt"].startswith("train 3 ") else None) as proxy:
        url = proxy.url.replace("http://", "http://me:secret-canary@")
        run = open_run(recipe(tmp_path, url, own), tmp_path / "run", progress=False)
        checks, estimate = run.check()
        assert "requests to come" in checks[0].detail
        assert estimate is None or estimate.record_seconds > 0
        run.record()
        run.fit()
        run.evaluate()
        run.seal()
        assert len(proxy.questions) == 24 + 12
        later = open_run(tmp_path / "asked.yaml", tmp_path / "run", progress=False)
        assert len(later.fit()["student"]) == 1  # the pool is known without asking
        assert len(proxy.questions) == 24 + 12
        assert all(headers["authorization"] == f"Bearer {CANARY}" for _, _, headers, _ in proxy.asked)
    asked = json.loads((tmp_path / "run/asked.json").read_text())
    assert list(asked["rows"]["pool"]["aside"]) == ["train-3"]
    assert asked["rows"]["test"] == {"rows": 12, "aside": {}}
    assert len(later.pool) == 23
    money = json.loads((tmp_path / "run/report/money.json").read_text())
    assert money["thousand"]["teacher"] > money["thousand"]["student"]
    assert money["rows"]["pool"] == {"asked": 24, "aside": 1}
    page = (tmp_path / "run/report/report.html").read_text()
    assert "What it costs" in page
    assert "1 of 24 rows of pool were set aside" in page
    passport = json.loads((tmp_path / "run/passport.json").read_text())
    assert passport["teachers"][0]["kind"] == "endpoint"
    assert {"asked.json", "report/money.json"} <= {file["path"] for file in passport["built_from"]}
    assert provenance.verify(tmp_path / "run") == []
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert CANARY.encode() not in content, path
            assert b"secret-canary" not in content or path == tmp_path / "asked.yaml"  # what the user wrote there


def test_a_providers_terms_come_first(server, tmp_path, monkeypatch):
    """Nothing is asked before whose account asks, and how often, is declared."""
    monkeypatch.setenv("CANARY_KEY", CANARY)
    with Proxy(server) as proxy:
        run = open_run(
            recipe(tmp_path, proxy.url, {"teacher": {"licence": "Apache-2.0"}}), tmp_path / "run", progress=False
        )
        with pytest.raises(UndecidedError, match="whose account asked"):
            run.record()
        assert proxy.asked == []


def test_what_a_server_writes_is_kept_and_counted_once(server, tmp_path):
    """Texts of the real server: recorded as they stand in the journal, JSON checked and re-asked, never guessed."""
    table = colours(6)
    schema = {"type": "object", "properties": {"colour": {"enum": list(CHOICES)}}, "required": ["colour"]}
    plain = asker(server, tmp_path, reads="text", max_tokens=4)
    kept = sr.record(plain, table, tmp_path / "plain", keep=[sr.Texts()], progress=False)
    assert kept(table.batch(range(6))).text == plain(table.batch(range(6))).text
    with Proxy(server) as proxy:
        picky = asker(proxy.url, tmp_path, reads="text", schema=schema, route="chat", max_tokens=24)
        said = sr.record(picky, table, tmp_path / "json", keep=[sr.Texts()], progress=False)(table.batch(range(6))).text
        asked = len(proxy.questions)
        assert [json.loads(text)["colour"] in CHOICES for text in said] == [True] * 6
        assert picky(table.batch([3])).text == said[3:4]
        assert len(proxy.questions) == asked  # from the journal
    assert kept.manifest["teacher"]["kind"] == "endpoint"
