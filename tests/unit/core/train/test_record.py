"""The log line of a step."""

from nexus_cli.core.train.record import log_line


def test_what_rounds_to_zero_has_no_sign():
    line = log_line({"step": 1, "loss": -0.00001, "kd": -0.000001, "router_kl": -1e-9}, 9)
    assert line == "step 1/9  loss 0.0000  kd 0.00000  router_kl 0.00000"
    assert "kd -0.00001" in log_line({"step": 1, "kd": -0.00001}, 9)
