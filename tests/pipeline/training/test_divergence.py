"""``train.loss.divergence``: what a run learns by, and who can teach it."""

from __future__ import annotations

import pytest

from nexus_cli.config.shared import LossWeights
from nexus_cli.errors import ConfigError
from nexus_cli.io.metrics import read_metrics
from nexus_cli.pipeline.plotting.panels import LOSSES, OPTIMISER

OTHERS = [{"divergence": "reverse"}, {"divergence": "jsd", "jsd_beta": 0.3}]
LIVELY = {"learning_rate": 1.0, "gate_learning_rate": 2.0}


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_a_closed_gate_has_none_of_it_and_an_open_one_another_than_the_forward_kl(
    run, losses, settings
):
    changes = {"max_steps": 5, "optimizer": LIVELY, "schedule": {"temperature": 2.0}}
    forward = losses(run("forward", **changes))
    other = losses(run("other", loss=settings, **changes))
    assert forward[0]["kd"] == other[0]["kd"] == 0.0
    assert forward[0]["grad_norm"] == other[0]["grad_norm"]  # of the cross entropy alone
    assert other[-1]["kd"] > 1e-3
    assert other[-1]["kd"] != pytest.approx(forward[-1]["kd"], rel=1e-5)


def test_held_out_text_is_judged_by_the_forward_kl_whatever_a_run_learns_by(run):
    def judged(name, **changes):
        settings = {"every": 1, "sequences": 4}
        directory = run(name, max_steps=2, optimizer=LIVELY, evaluation=settings, **changes)
        return [record["eval"] for record in read_metrics(directory) if "eval" in record]

    forward, other = judged("forward"), judged("other", loss={"divergence": "reverse"})
    # The first step starts from a closed gate, so both runs have the same weights after it.
    assert all(source["kd"] > 0 for source in forward[1].values())
    assert forward[1] == other[1]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_a_store_teaches_the_forward_kl_alone(run, teacher_store, tmp_path, settings):
    with pytest.raises(ConfigError, match=f"{settings['divergence']} divergence needs") as caught:
        run(offline=True, teacher={"store": str(teacher_store)}, loss=settings)
    assert "nexus train" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_beta_belongs_to_the_jsd(make_config, divergence):
    with pytest.raises(ValueError, match="jsd_beta is of the jsd divergence"):
        make_config(loss={"divergence": divergence, "jsd_beta": 0.3})


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_beta_lies_between_teacher_and_student(make_config, beta):
    with pytest.raises(ValueError, match="jsd_beta"):
        make_config(loss={"divergence": "jsd", "jsd_beta": beta})


def test_settings_and_plots_do_not_call_kd_a_kl_whatever_it_is():
    described = str(LossWeights.model_fields["kd"].description)
    assert described.startswith("Divergence from the teacher")
    assert "train.loss.divergence" in described
    titles = {panel.keys: panel.title for figure in (LOSSES, OPTIMISER) for panel in figure.panels}
    for key in ("kd", "kd_weight", "temperature"):
        assert "KL" not in titles[(key,)]
