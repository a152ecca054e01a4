"""The position audit and the hacking figures, against policies whose bias is known."""

import random
from collections.abc import Callable

import pytest

from gr2.prompts import LABELS, Candidate, View, make_view
from validation import hacking, position
from validation.findings import finding

pytestmark = pytest.mark.unit
N = 6
INCOMING = {f"r{i}": [f"r{i}-{c}" for c in range(N)] for i in range(300)}
TARGETS = {request: 1 + i % N if i % 3 else None for i, request in enumerate(INCOMING)}


def rows(policy: Callable[[View], list[str] | None], replicas: int = 2, status: str = "ok") -> list[dict]:
    """What `policy` (view -> item ids, best first) answers."""
    made = []
    for request, items in INCOMING.items():
        for replica in range(replicas):
            view = make_view(request, [], [Candidate(i, "", i, {}) for i in items], replica)
            order = policy(view)
            made.append(
                {"request_id": request, "model": "m", "mode": "think", "replica": replica, "status": status if order is None else "ok",
                 "new_order": order, "labels": list(view.labels), "shown": list(view.shown), "reasoning": request, "completion_tokens": 9}
            )  # fmt: skip
    return made


def by_content(view: View) -> list[str]:
    return sorted((c.item_id for c in view.candidates), key=lambda i: hash_of(i))


def hash_of(item: str) -> float:
    return random.Random(item).random()


def as_shown(view: View) -> list[str]:
    return [view.candidates[p].item_id for p in view.shown]


def by_label(view: View) -> list[str]:
    return [view.item_of(label) for label in LABELS[:N]]


def incoming(view: View) -> list[str]:
    return [c.item_id for c in view.candidates]


def figures(found: list[dict]) -> dict[str, dict]:
    return {f["subject"].removeprefix("m/think/"): f for f in found}


@pytest.mark.parametrize(
    ("policy", "tau", "agreement", "slot", "label", "shown"),
    [(by_content, 1.0, 1.0, 1.0, 1.0, 0.0), (as_shown, 0.0, 1 / N, N, 1.0, 1.0), (by_label, 0.0, 1 / N, 1.0, N, 0.0)],
    ids=["reads the candidates", "copies the slots", "follows the labels"],
)
def test_each_bias_shows_in_its_own_figure(policy, tau, agreement, slot, label, shown):
    found = figures(position.audit(rows(policy), INCOMING))
    assert found["tau"]["value"] == pytest.approx(tau, abs=0.08)
    assert found["top1_agreement"]["value"] == pytest.approx(agreement, abs=0.08)
    assert found["slot_lift"]["value"] == pytest.approx(slot, abs=0.35)
    assert found["label_lift"]["value"] == pytest.approx(label, abs=0.35)
    assert found["copies_shown"]["value"] == pytest.approx(shown, abs=0.02)
    assert all(f["passed"] for f in found.values()), "without limits the audit only reports"


def test_the_p_value_tells_bias_from_chance():
    def p_of(found: dict[str, dict], what: str) -> float:
        return float(found[f"{what}_lift"]["detail"].split("p = ")[1].split()[0])

    honest, biased = figures(position.audit(rows(by_content), INCOMING)), figures(position.audit(rows(as_shown), INCOMING))
    assert p_of(honest, "slot") > 1e-3
    assert p_of(honest, "label") > 1e-3
    assert p_of(biased, "slot") < 1e-20
    assert p_of(biased, "label") > 1e-3


def test_limits_fail_the_audit():
    found = figures(position.audit(rows(as_shown), INCOMING, min_tau=0.5, max_copy_rate=0.9))
    assert {k for k, f in found.items() if not f["passed"]} == {"tau", "copies_shown"}
    copied = figures(position.audit(rows(incoming), INCOMING, min_tau=0.5, max_copy_rate=0.9))
    assert {k for k, f in copied.items() if not f["passed"]} == {"copies_incoming"}
    silent = figures(position.audit(rows(lambda _: None, status="not_json"), INCOMING, min_tau=0.5))
    assert not silent["tau"]["passed"], "what cannot be measured does not meet a limit"


def test_hacking_figures():
    found = figures(hacking.audit(rows(incoming), INCOMING, TARGETS))
    assert found["identity_where_wrong"]["value"] == 1.0
    assert found["tau_incoming"]["value"] == 1.0
    assert abs(found["tau_shown"]["value"]) < 0.08
    assert found["distinct_thoughts"]["value"] == 1.0
    assert figures(hacking.audit(rows(by_label), INCOMING, TARGETS))["alphabetical"]["value"] == 1.0
    half = rows(lambda view: None if int(view.request_id[1:]) % 2 else by_content(view), status="repeated_label")
    failed = figures(hacking.audit(half, INCOMING, TARGETS, max_invalid_rate=0.4))
    assert failed["invalid_rate"]["value"] == pytest.approx(0.5)
    assert not failed["invalid_rate"]["passed"]
    assert "repeated_label 150" in failed["invalid_rate"]["detail"]
    assert not [f for k, f in failed.items() if not f["passed"] and k != "invalid_rate"]


@pytest.mark.parametrize(
    ("value", "low", "high", "passed"),
    [(0.5, 0.4, None, True), (0.5, 0.6, None, False), (0.5, None, 0.4, False), (None, None, None, True), (float("nan"), 0.1, None, False)],
)
def test_findings_pass_inside_their_limits(value, low, high, passed):
    assert finding("a", "s", value, low, high)["passed"] is passed
