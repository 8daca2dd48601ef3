"""Advantages of scored groups by hand: who owns what, who is compared with whom, which groups are left out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pkv.config import GrpoConfig
from pkv.records import FIGHTERS, OWNERS, Group, Problem, Prompt, Reward, Rollout, Scorecard, Trace
from pkv.tracking import write_rollouts
from pkv.train import rollouts
from pkv.train.credit import assign_credit, with_signal
from pkv.train.run import measured_pass_rates, stored_pass_rates

OWNER = {"correctness": "answer", "length_pirate": "pirate", "judge_accuracy": "judge", "tag_structure": "tags"}
TOKENS = ("pirate", "pirate", "tags", "result", "answer")  # the owners of a response's tokens
WHOLE = dict.fromkeys(OWNER, 0.0)


def group(
    values: dict[str, list[float | None]],
    right: list[int] | None = None,
    finish=None,
    name="p",
    tokens=TOKENS,
    forced=None,
    failed: str = "",
) -> Group:
    """A group whose sample g has `values[reward][g]`, with `right[g]` fighters right; a `failed` one's None is that."""
    samples = len(next(iter(values.values())))
    owners = np.array([OWNERS.index(owner) for owner in tokens], np.int8)
    said, traces, cards = [], [], []
    for g in range(samples):
        ids = np.arange(len(tokens), dtype=np.int32)
        logprobs = np.full(len(tokens), -1.0, np.float32)
        said.append(Rollout(name, g, ids, logprobs, logprobs, (finish or ["stop"] * samples)[g], forced=forced))
        traces.append(Trace("", {}, (), owners))
        rewards = {n: Reward(n, values.get(n, [0.0] * samples)[g], owner) for n, owner in OWNER.items()}
        if failed and rewards[failed].value is None:
            rewards[failed] = Reward(failed, None, OWNER[failed], "unscored")
        facts = {f"right/{f}": at < (right or [0] * samples)[g] for at, f in enumerate(FIGHTERS)}
        cards.append(Scorecard(rewards, 0.0, facts=facts))
    return Group(Prompt(Problem(name, "?", "1"), np.zeros(3, np.int32)), tuple(said), tuple(traces), tuple(cards))


def credited(groups, weights, whole=None, budget=10, **config):
    return assign_credit(groups, weights, WHOLE | (whole or {}), GrpoConfig(**{"scale": "none"} | config), budget)


def test_every_block_gets_its_own_reward_and_the_whole_trace_its_share():
    found = credited(
        [group({"correctness": [1.0, 0.0], "length_pirate": [0.0, 0.4]})],
        {"correctness": 2.0, "length_pirate": 1.0},
        {"correctness": 0.5},
    )
    # correctness: ±0.5 times weight 2, half of it for tokens that aren't the answer's; the pirate's length: ∓0.2
    np.testing.assert_allclose(found.sequences[0].advantages, [0.3, 0.3, 0.5, 0.5, 1.0], rtol=1e-5)
    np.testing.assert_allclose(found.sequences[1].advantages, [-0.3, -0.3, -0.5, -0.5, -1.0], rtol=1e-5)
    assert found.by_owner[0][0] == pytest.approx({"pirate": 0.3, "tags": 0.5, "result": 0.5, "answer": 1.0})


def test_a_judge_is_not_paid_for_fighters_that_were_right_more_often():
    # With two fighters right any judge does better: the groups' mean would praise it for that.
    values = {"judge_accuracy": [0.0, 1.0, 1.0, 1.0]}
    given = [group(values, right=[1, 1, 2, 2])]
    advantages = [s.advantages[3] for s in credited(given, {"judge_accuracy": 1.0}).sequences]
    np.testing.assert_allclose(advantages, [-0.5, 0.5, 0, 0])
    advantages = [s.advantages[3] for s in credited(given, {"judge_accuracy": 1.0}, judge_baseline="group").sequences]
    np.testing.assert_allclose(advantages, [-0.75, 0.25, 0.25, 0.25])


def test_the_name_in_the_winners_tag_is_paid_for_the_judges_accuracy():
    """Rollouts that differ in nothing but the name: with the ruling's words alone paid, which are the same in all,
    nothing would be learnt of choosing."""
    given = [group({"judge_accuracy": [1.0, 0.0]}, right=[1, 1], tokens=(*TOKENS[:4], "winner", "answer"))]
    good, bad = (s.advantages for s in credited(given, {"judge_accuracy": 1.0}).sequences)
    np.testing.assert_allclose(good, [0, 0, 0, 0.5, 0.5, 0])
    np.testing.assert_allclose(bad, -good)


def judged(right: list[tuple[str, ...]], winners: list[str | None], **config) -> np.ndarray:
    """The advantages of the judge's accuracy of one group, by whom the fighters' answers say to be right."""
    named = list(zip(right, winners, strict=True))
    values = [None if len(who) in (0, len(FIGHTERS)) else float(name in who) for who, name in named]
    one = group({"judge_accuracy": values})
    for card, (who, name) in zip(one.cards, named, strict=True):
        card.facts.update({f"right/{fighter}": fighter in who for fighter in FIGHTERS}, winner=name)  # type: ignore[attr-defined]
    found = credited([one], {"judge_accuracy": 1.0}, judge_baseline="rates", **config).sequences
    return np.array([sequence.advantages[3] for sequence in found])


def test_with_rates_a_judge_gains_by_what_it_sees_and_nothing_by_a_favourite():
    pirate, knight, both = ("pirate",), ("knight",), ("pirate", "knight")
    right = [pirate, pirate, pirate, knight, both, ("viking",), (), FIGHTERS]
    for favourite in FIGHTERS:
        for scale in ("none", "std", "floored_std"):
            for baseline in ("mean", "leave_one_out"):
                found = judged(right, [favourite] * len(right), scale=scale, baseline=baseline)
                assert abs(found.sum()) < 1e-5, "whoever always names the same one gains nothing"
    assert judged(right, [favourite] * len(right)).any(), "though a rollout is paid or punished"
    sees = judged(right, ["pirate", "pirate", "pirate", "knight", "knight", "viking", None, "viking"])
    assert (sees[:6] > 0).all() and not sees[6:].any(), "where the fighters agree nothing was judged"
    assert sees[3] > sees[0], "to see that the one who is seldom right is right is worth more"
    # By hand: rates 4/6, 2/6, 1/6; the pirate right, alone: 1 - 4/6 less the mean of (1/3, -1/3, -1/6).
    np.testing.assert_allclose(sees[0], 1 / 3 - (1 / 3 - 1 / 3 - 1 / 6) / 3, rtol=1e-5)
    nobody = judged(right, [None] * len(right))[:6]
    named = [judged(right, [name] * len(right))[:6] for name in FIGHTERS]
    assert (nobody < 0).all() and (nobody <= np.min(named, axis=0) + 1e-6).all(), "naming nobody is never better"


def test_a_favourite_gains_nothing_by_what_is_left_out():
    """Groups without a signal and truncated rollouts are not trained on: a rate that counts them is no baseline."""
    right = [["pirate"], ["pirate"], ["knight"], ["viking"]]
    given = []
    for answers, finish in (([1.0, 1.0, 1.0, 1.0], None), ([1.0, 0.0, 0.0, 0.0], ["length", *["stop"] * 3])):
        one = group({"correctness": answers, "judge_accuracy": [1.0, 1.0, 0.0, 0.0]}, finish=finish)
        for card, who in zip(one.cards, right, strict=True):
            card.facts.update({f"right/{name}": name in who for name in FIGHTERS}, winner="pirate")  # type: ignore[attr-defined]
        given.append(one)
    how = {"judge_baseline": "rates", "signal": ("correctness",), "mask_truncated": True}
    found = [sequence.advantages[3] for sequence in credited(given, {"judge_accuracy": 1.0}, **how).sequences]
    assert len(found) == 3 and abs(sum(found)) < 1e-6 and any(found)


def test_with_rates_rollouts_need_nobody_who_fared_alike():
    found = judged([("pirate",), ("knight",)], ["pirate", "knight"])
    np.testing.assert_allclose(found, [0.5, 0.5])
    assert not judged([("pirate",)], ["pirate"]).any(), "of a single rollout a favourite would do as well"


def test_rates_are_those_of_all_hosts(monkeypatch):
    right = [("pirate",), ("pirate", "viking"), ("knight",), ("pirate",)]
    winners: list[str | None] = ["pirate", "viking", "pirate", None]
    together, said = judged(right, winners), []
    halves = [(right[:1], winners[:1]), (right[1:], winners[1:])]
    monkeypatch.setattr("pkv.train.credit.gather", lambda own: said.append(json.dumps(own)) or [own])
    for half in halves:
        judged(*half)
    assert len(said) == 2, "every host speaks once"
    monkeypatch.setattr("pkv.train.credit.gather", lambda own: [json.loads(one) for one in said])
    np.testing.assert_allclose(np.concatenate([judged(*half) for half in halves]), together, rtol=1e-6)


def test_a_group_differs_where_those_differ_that_are_compared():
    given = [group({"judge_accuracy": [0.0, 0.0, 1.0, 1.0]}, right=[1, 1, 2, 2])]
    assert not with_signal(given, {"judge_accuracy": 1.0}, GrpoConfig()).any()
    assert with_signal(given, {"judge_accuracy": 1.0}, GrpoConfig(judge_baseline="group")).all()


def test_a_total_leaves_out_whose_reward_failed_and_sums_what_there_is_of_one_that_does_not_apply():
    values = {"correctness": [1.0, None, 0.0, 1.0], "length_pirate": [0.5] * 4}
    how = {"combine": "total", "credit": "sequence", "overlong_tokens": 2}
    for failed, second in (("correctness", 0.0), ("", -2.0)):
        found = credited([group(values, failed=failed)], {"correctness": 4.0, "length_pirate": 1.0}, **how)
        assert found.sequences[1].advantages[0] == pytest.approx(second)


def test_groups_are_left_out_that_do_not_differ_in_what_gives_a_signal():
    given = [
        group({"correctness": [1.0, 0.0], "length_pirate": [0.1, 0.2]}),
        group({"correctness": [1.0, 1.0], "length_pirate": [0.1, 0.2]}),
        group({"correctness": [None, 1.0], "length_pirate": [0.1, 0.1]}),
    ]
    weights = {"correctness": 1.0, "length_pirate": 1.0}
    assert with_signal(given, weights, GrpoConfig()).tolist() == [True, True, False]
    assert with_signal(given, weights, GrpoConfig(signal=("correctness",))).tolist() == [True, False, False]
    found = credited(given, weights, signal=("correctness",))
    assert len(found.sequences) == 2 and found.silent == pytest.approx(2 / 3)


def test_a_group_without_two_totals_is_left_out():
    values = {"correctness": [1.0, 0.0, 1.0], "length_pirate": [0.5, None, None]}
    weights, how = {"correctness": 1.0, "length_pirate": 1.0}, {"combine": "total", "credit": "sequence"}
    found = credited([group(values, failed="length_pirate")], weights, **how)
    assert found.silent == 1.0 and not found.sequences
    assert credited([group(values)], weights, **how).silent == 0.0, "it doesn't apply: the totals are there"
    assert credited([group(values, failed="length_pirate")], weights).silent == 0.0, "each for itself they differ"


def test_a_response_near_its_budget_pays_with_all_its_tokens():
    given = [group({"correctness": [1.0, 1.0]})]
    long, short = given[0].rollouts
    long = Rollout("p", 0, *(np.tile(a, 2) for a in (long.tokens, long.logprobs, long.logprobs)), "stop")
    traces = (Trace("", {}, (), np.tile(given[0].traces[0].token_owners, 2)), given[0].traces[1])
    given = [Group(given[0].prompt, (long, short), traces, given[0].cards)]
    # 10 tokens of a budget of 12, of which the last 4 cost: -0.5 against 0.
    found = credited(given, {"correctness": 1.0}, budget=12, overlong_tokens=4, signal=())
    assert found.silent == 1.0, "the punishment alone is no signal"
    given[0].cards[0].rewards["correctness"] = Reward("correctness", 0.0, "answer")  # type: ignore[index]
    found = credited(given, {"correctness": 1.0}, budget=12, overlong_tokens=4)
    np.testing.assert_allclose(found.sequences[0].advantages[:5], [-0.25] * 4 + [-0.75])
    found = credited(given, {"correctness": 1.0}, budget=12, overlong_tokens=4, overlong_weight=2.0)
    np.testing.assert_allclose(found.sequences[0].advantages[:5], [-0.5] * 4 + [-1.0])


def test_truncated_responses_may_be_masked():
    given = [group({"correctness": [1.0, 0.0]}, finish=["stop", "length"])]
    assert len(credited(given, {"correctness": 1.0}).sequences) == 2
    assert len(credited(given, {"correctness": 1.0}, mask_truncated=True).sequences) == 1
    silent = [*given, group({"correctness": [1.0, 0.0]}, finish=["length", "length"])]
    found = credited(silent, {"correctness": 1.0}, mask_truncated=True)
    assert found.silent == 0.5, "what gives no gradient is replaced"


def test_a_total_is_one_scalar_for_all_tokens():
    given = [group({"correctness": [1.0, 0.0], "length_pirate": [0.0, 0.5]})]
    found = credited(given, {"correctness": 1.0, "length_pirate": 1.0}, combine="total", credit="sequence")
    np.testing.assert_allclose(found.sequences[0].advantages, [0.25] * 5)


def test_whitening_is_over_the_tokens_that_are_trained_on():
    given = [group({"correctness": [1.0, 0.0]}), group({"correctness": [1.0, 1.0]}, name="silent")]
    found = credited(given, {"correctness": 3.0}, whiten="tokens")
    tokens = np.concatenate([sequence.advantages for sequence in found.sequences])
    assert found.by_owner[0][0]["answer"] == found.sequences[0].advantages[-1], "logged is what is trained on"
    assert found.by_owner[1] == [{}, {}]
    assert np.mean(tokens**2) == pytest.approx(1.0, rel=1e-4) and (tokens == 0).sum() == 8
    forced = np.array([True, True, True, True, False])  # but for the answer
    given = [group({"correctness": [1.0, 0.0]}, forced=forced)]
    found = credited(given, {"correctness": 3.0}, whiten="tokens")
    np.testing.assert_allclose([sequence.advantages[-1] for sequence in found.sequences], [1, -1], rtol=1e-4)


def test_pass_rates_are_of_the_answers_that_could_be_judged_on_disk_as_in_memory(tmp_path):
    given = [
        group({"correctness": [1.0, 0.0, None]}, name="half"),
        group({"correctness": [1.0, 1.0, -1.0]}, name="twice"),
        group({"correctness": [0.0, 0.0, 0.0]}, name="twice"),
        group({"correctness": [None, None, None]}, name="never"),
    ]
    wanted = {"half": 1 / 2, "twice": 1 / 3}
    rows = [
        {"problem_id": one.prompt.problem.id, "rewards": {"correctness": card.rewards["correctness"].value}}
        for one in given
        for card in one.cards
    ]
    assert measured_pass_rates([{"problem": row["problem_id"], **row} for row in rows]) == pytest.approx(wanted)
    assert stored_pass_rates(write_rollouts(tmp_path, 0, rows)) == pytest.approx(wanted)


def gathered(monkeypatch, silent: set[str], refills: int):
    """What `gather` asks, where the problems in `silent` give no signal; problems are named by their order."""
    asked = []

    def draw(step, count, pass_rates, refill=0, left_out=()):
        first = 3 * refill
        names = [f"p{n}" for n in range(first, first + count)]
        assert not set(names) & set(left_out)
        return [SimpleNamespace(problem=SimpleNamespace(id=name)) for name in names]

    def sample(source, prompts, **_):
        asked.append([prompt.problem.id for prompt in prompts])
        found = [group({"correctness": [1.0, float(n in silent)]}, name=n) for n in asked[-1]]
        return SimpleNamespace(scored=lambda _: found, rollouts=[])

    monkeypatch.setattr(rollouts, "sample_groups", sample)
    monkeypatch.setattr(rollouts.dataclasses, "replace", lambda source, **_: source)
    grpo = GrpoConfig(prompts=3, signal=("correctness",), refills=refills)
    setup = SimpleNamespace(
        source=lambda *_: SimpleNamespace(weights={}), draw_prompts=draw, grpo=grpo, config=SimpleNamespace(seed=0)
    )
    stage = SimpleNamespace(required_round=SimpleNamespace(samples=0), weights={"correctness": 1.0}, budget=lambda _: 8)
    run = SimpleNamespace(waiting=None, pass_rates=dict)
    return rollouts.gather(setup, run, None, stage, 0, None, rollouts.Clock())[0], asked


def test_groups_without_signal_are_replaced_and_the_search_is_bounded(monkeypatch):
    groups, asked = gathered(monkeypatch, {"p0", "p3"}, refills=5)
    assert asked == [["p0", "p1", "p2"], ["p3"], ["p6"]] and len(groups) == 5
    groups, asked = gathered(monkeypatch, {"p0", "p3"}, refills=1)
    assert asked == [["p0", "p1", "p2"], ["p3"]]
    groups, asked = gathered(monkeypatch, set(), refills=5)
    assert len(asked) == 1
