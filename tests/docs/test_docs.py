"""Pages that can be checked are checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_configuration_page_is_current():
    script = ROOT / "scripts" / "configuration_docs.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["demo", "gpt-oss-20b", "gpt-oss-120b"])
def test_every_block_of_a_shipped_config_is_valid(name):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from configuration_docs import BLOCKS
    finally:
        sys.path.pop(0)
    from nexus_cli.config.load import resolve

    for section, kind in BLOCKS.items():
        resolve(kind, section, file=ROOT / "configs" / f"{name}.yaml")
