"""What a run is told about itself."""

import pytest

from nexus_cli.core.train.diagnosis import diagnose


def step(number, loss=2.0, **more):
    return {"step": number, "loss": loss, "clipped": False, "gate_mean_abs": 0.1, **more}


def evaluation(number, domain, replay_kd=0.0, objective=None):
    return {
        "step": number,
        "eval": {
            "domain": {"loss": 1.0, "perplexity": domain, "kd": 0.3},
            "replay": {"loss": 1.0, "perplexity": 3.0, "kd": replay_kd},
        },
        "held_out_objective": domain if objective is None else objective,
    }


def said(records, word):
    return [line for line in diagnose(records, ["replay"]) if word in line]


def test_a_healthy_run_is_told_what_it_learned_and_kept():
    records = [evaluation(0, 50.0), step(1), evaluation(1, 4.0, 0.02)]
    assert diagnose(records, ["replay"]) == [
        "learned: held-out perplexity of domain fell from 50.00 to 4.00",
        "kept: on replay the model is 0.0200 nats a token from the original",
    ]


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([evaluation(0, 5.0), evaluation(1, 6.0)], "not learned"),
        ([evaluation(0, 5.0), evaluation(1, 4.0, 0.4)], "forgotten"),
        ([evaluation(0, 5.0), evaluation(1, 3.0), evaluation(2, 4.0)], "use checkpoint-1"),
        ([evaluation(0, 5.0), evaluation(1, 6.0), evaluation(2, 7.0)], "better than the start"),
        ([step(n, loss=4 / n) for n in range(1, 17)], "still falling"),
        ([step(1, gate_mean_abs=1e-5)], "hardly opened"),
        ([step(n, clipped=n % 2 == 0) for n in range(1, 9)], "50% of the steps were clipped"),
        (
            [step(1, drift_topk_overlap=0.7, drift_layers={"topk_overlap": [0.9, 0.5]})],
            "70% of the experts that they went to before, least in layer 1",
        ),
        ([step(1, seconds={"teacher": 3.0, "forward": 1.0})], "teacher 75%, forward 25%"),
        ([step(1, seconds={"teacher": 3.0, "forward": 1.0})], "nexus precompute"),
    ],
)
def test_each_trouble_is_said(records, word):
    assert said(records, word)


def test_a_run_at_its_best_in_the_end_is_not_told_to_go_back():
    records = [evaluation(0, 5.0), evaluation(1, 4.0), evaluation(2, 3.0)]
    assert not said(records, "use checkpoint")


def test_no_records_say_nothing():
    assert diagnose([]) == []


def test_numbers_that_were_none_are_passed_over():
    records = [
        {"step": 0, "eval": {"domain": {"loss": None, "perplexity": None, "kd": None}}},
        step(1, loss=None, gate_mean_abs=None, drift_topk_overlap=None, clipped=None),
        step(2, drift_topk_overlap=0.5, drift_layers={"topk_overlap": [None, 0.5]}),
        step(3, seconds={"teacher": 0.0, "forward": 0.0}),
        {"step": 3, "eval": {"domain": {"perplexity": 2.0}}, "held_out_objective": None},
    ]
    assert any("time" in line for line in diagnose(records))
