"""Ctrl-C in the middle of a command is said, with its exit code."""

import pytest

from nexus_cli.cli import app
from nexus_cli.pipeline import pca


def test_ctrl_c_is_said_and_exits_130(monkeypatch, capsys):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pca, "run", interrupted)
    monkeypatch.setattr("sys.argv", ["nexus", "pca"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "error: interrupted" in said
    assert "hint: " in said
