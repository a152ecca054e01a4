"""The evidence program: it learns what the lists hold, keeps a user's own lists out, and writes what follows from its ranking."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from gr2.answers import parse
from gr2.draws import seed_of
from gr2.errors import EngineError
from gr2.prompts import Candidate, View, evidence_words, load_template, make_view
from gr2.rewards import format_reward
from scoring.engine import Ask
from scoring.evidence_engine import FOLDS, EvidenceEngine, Program, columns_of, design, fit, fold_of

pytestmark = pytest.mark.unit
COLUMNS = columns_of()


def lists(count: int, seed: int = 0, size: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lists whose target is drawn by transitions and, weakly, by the incoming order. (raw, there, grades, folds)"""
    rng = np.random.default_rng(seed)
    raw_RNC = np.zeros((count, size, len(COLUMNS)))
    at = {name: i for i, name in enumerate(COLUMNS)}
    raw_RNC[:, :, at["incoming_rank"]] = np.arange(1, size + 1)
    raw_RNC[:, :, at["pair_next"]] = rng.poisson(0.6, (count, size)) * rng.integers(1, 5, (count, size))
    raw_RNC[:, :, at["recent"]] = rng.uniform(0, 5, (count, size))
    raw_RNC[:, :, at["text_similarity"]] = rng.uniform(0, 1, (count, size))
    raw_RNC[:, :, at["prior_gap"]] = np.sort(rng.uniform(0, 3, (count, size)), axis=1)
    score = 1.5 * np.log1p(raw_RNC[:, :, at["pair_next"]]) + 0.5 / np.arange(1, size + 1) + rng.gumbel(size=(count, size))
    grades_RN = (score == score.max(axis=1, keepdims=True)).astype(float)
    there_RN = np.ones((count, size), dtype=bool)
    return raw_RNC, there_RN, grades_RN, np.arange(count) % 2


def view_of(raw_NC: np.ndarray, request: str) -> View:
    """A list as a view."""
    candidates = [Candidate(f"i{n}", f"<a_{n}>", "", dict(zip(COLUMNS, row.tolist(), strict=True))) for n, row in enumerate(raw_NC)]
    return make_view(request, [], candidates, 0)


def ask(view: View, attempt: int = 0, user: str = "u", temperature: float = 0.7, target: str | None = None) -> Ask:
    """One ask."""
    return Ask(view.request_id, "", 99, temperature, seed_of(view.request_id, attempt), view=view, user=user, target=target)


@pytest.fixture(scope="module")
def program() -> Program:
    """Weights from 600 lists."""
    return fit(*lists(600))


def test_weights_count_like_repeated_lists() -> None:
    raw, there, grades, folds = lists(80, seed=3)
    weights_RN = np.where(np.arange(80)[:, None] < 20, 3.0, 1.0) * np.ones((1, 10))
    again = np.concatenate([np.arange(80), np.repeat(np.arange(20), 2)])
    weighed = fit(raw, there, grades, folds, weights_RN=weights_RN)
    repeated = fit(raw[again], there[again], grades[again], folds[again])
    rescaled_KF = [p.weights_KF / p.scale_F for p in (weighed, repeated)]
    assert np.corrcoef(rescaled_KF[0].ravel(), rescaled_KF[1].ravel())[0, 1] > 0.99
    plain = fit(raw, there, grades, folds)
    assert np.abs(weighed.weights_KF - plain.weights_KF).max() > 1e-3


def test_days_between_paired_choices_count_where_there_is_a_pair() -> None:
    raw_RNC, there_RN, _, _ = lists(1, size=3)
    raw_RNC[0, :, COLUMNS.index("pair_max")] = [2.0, 2.0, 0.0]
    raw_RNC[0, :, COLUMNS.index("pair_gap_days")] = [0.0, 9.0, np.nan]
    features_RNF, cited = design(raw_RNC, there_RN)
    once = len(cited) // 2
    days_NF = features_RNF[0][:, [name == "days" for name in cited[:once]] + [False] * once]
    long, near, above, largest, *steps = days_NF.T.tolist()
    assert (long, near) == (pytest.approx([0.0, np.log(10), 0.0]), pytest.approx([1.0, 0.1, 0.0])), "no pair: as far as can be"
    assert (above, largest) == (pytest.approx([2 / 3, 1 / 3, 0.0]), [1.0, 0.0, 0.0])
    assert steps == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], "at most half a year, a month, a week, two days, none"


def test_evidence_weighs_otherwise_on_a_later_day() -> None:
    raw_RNC, there_RN, _, folds_R = lists(600, seed=6)
    days = np.arange(600) % 3  # 0: on the day of the last item; then transitions tell, later what sells of late
    raw_RNC[:, :, COLUMNS.index("days_since_last")] = days[:, None]
    features_RNF, cited = design(raw_RNC, there_RN)
    once_RNF, again_RNF = np.split(features_RNF, 2, axis=2)
    assert cited[: len(cited) // 2] == cited[len(cited) // 2 :]
    np.testing.assert_array_equal(again_RNF, once_RNF * (days > 0)[:, None, None])

    told_RN = (
        raw_RNC[:, :, COLUMNS.index("recent")] * (days > 0)[:, None] * 2
        + np.log1p(raw_RNC[:, :, COLUMNS.index("pair_next")]) * (days == 0)[:, None] * 2
    )
    grades_RN = (told_RN == told_RN.max(axis=1, keepdims=True)).astype(float)
    hits = {}
    for name, seen_RNC in (("told", raw_RNC), ("not told", raw_RNC * (np.array(COLUMNS) != "days_since_last"))):
        program = fit(seen_RNC, there_RN, grades_RN, folds_R)
        hits[name] = np.mean([program.scores(raw_NC, 0)[0].argmax() == g.argmax() for raw_NC, g in zip(seen_RNC, grades_RN, strict=True)])
    assert hits["told"] > hits["not told"] + 0.1, hits


def first_share(engine: EvidenceEngine, raw: np.ndarray, grades: np.ndarray, **how: float) -> float:
    """Share of lists whose target the engine puts first."""
    hits = []
    for number, (raw_NC, grades_N) in enumerate(zip(raw, grades, strict=True)):
        view = view_of(raw_NC, f"r{number}")
        order = parse(engine.generate([ask(view, **how)])[0].text, view.labels, "think").order
        assert order is not None
        hits.append(view.item_of(order[0]) == f"i{grades_N.argmax()}")
    return float(np.mean(hits))


def test_its_order_beats_the_incoming_one_on_new_lists_and_noise_costs(program: Program) -> None:
    engine = EvidenceEngine(program, load_template())
    raw, _, grades, _ = lists(300, seed=9)
    cold, warm = first_share(engine, raw, grades, temperature=0.0), first_share(engine, raw, grades, temperature=3.0)
    incoming = float(grades[:, 0].mean())
    assert cold > incoming + 0.15
    assert incoming < warm + 0.1 < cold


def test_every_sample_parses_and_cites_only_what_is_shown(program: Program) -> None:
    template = load_template()
    engine = EvidenceEngine(program, template)
    raw, *_ = lists(40, seed=3)
    texts = set()
    for number, raw_NC in enumerate(raw):
        view = view_of(raw_NC, f"r{number}")
        for attempt in range(3):
            answer = engine.generate([ask(view, attempt)])[0]
            parsed = parse(answer.text, view.labels, "think")
            assert parsed.order is not None, parsed.status
            assert format_reward(parsed.thought, evidence_words(view, template), 48) == pytest.approx(1.0)
            assert f"@{parsed.order[0]}" in parsed.thought  # type: ignore[index]
            texts.add(answer.text)
        assert engine.generate([ask(view, 0)])[0].text == engine.generate([ask(view, 0)])[0].text
    assert len(texts) > 60


def test_it_puts_as_many_in_order_as_it_is_told_and_leaves_the_others(program: Program) -> None:
    raw, *_ = lists(20, seed=5)
    for number, raw_NC in enumerate(raw):
        view = view_of(raw_NC, f"o{number}")
        by_score = [view.labels[n] for n in np.argsort(-program.scores(raw_NC, fold_of("u"))[0], kind="stable")]
        for ordered in (1, 3):
            engine = EvidenceEngine(program, load_template(), ordered=ordered)
            parsed = parse(engine.generate([ask(view, temperature=0.0)])[0].text, view.labels, "think")
            assert parsed.order is not None
            assert list(parsed.order[:ordered]) == by_score[:ordered]
            assert list(parsed.order[ordered:]) == [label for label in view.labels if label not in by_score[:ordered]]
            assert [word[1:] for word in parsed.thought.split() if word.startswith("@")] == list(parsed.order[:3])


def test_another_judge_ranks_and_the_program_says_why(program: Program) -> None:
    class Backwards:
        calls = 0

        def log_probabilities(self, lists: Sequence[Sequence[Candidate]], users: Sequence[str]) -> list[np.ndarray]:
            self.calls += 1
            assert set(users) == {"u"}
            return [np.arange(len(own), dtype=float) for own in lists]

    judge, template = Backwards(), load_template()
    views = [view_of(raw_NC[:size], f"b{size}") for raw_NC, size in zip(lists(3, seed=8)[0], (10, 3, 7), strict=True)]
    asks = [ask(views[0], user=""), *(ask(view, temperature=0.0) for view in views)]
    nobody, *answers = EvidenceEngine(program, template, ordered=3, judge=judge).generate(asks)
    assert (bool(nobody.error), judge.calls) == (True, 1)
    for view, answer in zip(views, answers, strict=True):
        parsed = parse(answer.text, view.labels, "think")
        assert parsed.order is not None
        assert list(parsed.order[:3]) == list(view.labels[:-4:-1])
        assert format_reward(parsed.thought, evidence_words(view, template), 48) == pytest.approx(1.0)


def test_a_users_own_lists_teach_nothing_that_ranks_them(program: Program) -> None:
    raw, there, grades, folds = lists(600)
    poisoned = grades.copy()
    mine = folds == 1
    poisoned[mine] = np.roll(grades[mine], 3, axis=1)  # another truth for the users of fold 1
    other = fit(raw, there, poisoned, folds)
    np.testing.assert_array_equal(other.weights_KF[1], program.weights_KF[1])  # what ranks fold 1 did not move
    assert np.abs(other.weights_KF[0] - program.weights_KF[0]).max() > 0.05
    users = [f"u{i}" for i in range(200)]
    assert {24 < sum(fold_of(u) == fold for u in users) < 56 for fold in range(FOLDS)} == {True}
    view = view_of(raw[0], "r")
    mild = dataclasses.replace(program, weights_KF=np.stack([program.weights_KF[0], *[-program.weights_KF[0]] * (FOLDS - 1)]))
    by_fold = {fold_of(u): EvidenceEngine(mild, load_template()).generate([ask(view, user=u, temperature=0.0)])[0].text for u in users}
    assert by_fold[0] != by_fold[1]


def test_weights_solve_the_conditional_logit() -> None:
    raw, there, grades, folds = lists(400)
    program = fit(raw, there, grades, folds, ridge=1.0)
    standard = (design(raw, there)[0] - program.center_F) / program.scale_F
    taught = folds != 0
    scores = standard[taught] @ program.weights_KF[0]
    chance = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    slope = np.einsum("rn,rnf->f", grades[taught] - chance, standard[taught]) - program.weights_KF[0]
    assert np.abs(slope).max() < 0.05 * taught.sum() ** 0.5, "the gradient of the penalised likelihood is not near zero"


def test_the_targeted_mode_puts_the_target_first_whatever_the_evidence(program: Program) -> None:
    engine = EvidenceEngine(program, load_template())
    raw, *_ = lists(60, seed=4)
    first = []
    for number, raw_NC in enumerate(raw):
        view = view_of(raw_NC, f"r{number}")
        order = parse(engine.generate([ask(view, target="i9")])[0].text, view.labels, "think").order
        assert order is not None
        first.append(view.item_of(order[0]) == "i9")
    assert np.mean(first) > 0.9


def test_what_cannot_be_ranked_fails_alone(program: Program) -> None:
    engine = EvidenceEngine(program, load_template())
    view = view_of(lists(1)[0][0], "r0")
    unknown = view_of(np.full((4, len(COLUMNS)), np.nan), "r1")
    bad = [ask(view, user=""), dataclasses.replace(ask(view), view=None), ask(view, target="nobody")]
    answers = engine.generate([ask(view), *bad, ask(unknown), ask(view)])
    assert [bool(a.error) for a in answers] == [False, True, True, True, False, False]
    assert answers[0].text == answers[-1].text
    with pytest.raises(EngineError, match="program"):
        engine.label_logprobs(["x"], ["A"])


def test_nothing_to_learn_from_is_said() -> None:
    raw, there, grades, folds = lists(20)
    with pytest.raises(EngineError, match="target to learn from"):
        fit(raw, there, np.zeros_like(grades), folds)
