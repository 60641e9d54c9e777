"""Lock, skip, refuse, commit: what every stage can rely on."""

import os
import shutil

import pytest

from nexus_cli.config.base import ConfigModel, RuntimeConfig
from nexus_cli.errors import ArtifactError, ResourceError, WorkspaceError
from nexus_cli.io import lock, manifest
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.inputs import Artifact, stage_input
from nexus_cli.pipeline.stage import stage


class Toy(ConfigModel):
    size: int = 1
    runtime: RuntimeConfig = RuntimeConfig()


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "run")


def work(workspace, config=None, *, text="done", digest="1", **options):
    """Run a toy stage; returns whether it worked or was up to date."""
    inputs = {"model": Artifact(workspace.root, digest)}
    with stage("toy", config or Toy(), workspace, main="out.txt", inputs=inputs, **options) as out:
        if out is None:
            return False
        out.main.parent.mkdir(parents=True, exist_ok=True)
        out.main.write_text(text)
        out.add(out.main, format="text")
    return True


def test_a_finished_stage_is_not_run_again(workspace):
    assert work(workspace)
    assert not work(workspace)


def test_what_the_user_removed_does_not_stand_in_the_way_of_other_settings(workspace):
    work(workspace)
    (workspace.stage_dir("toy") / "out.txt").unlink()
    assert work(workspace, Toy(size=2))


def test_force_runs_it_again(workspace):
    work(workspace)
    assert work(workspace, force=True)


def test_how_it_runs_does_not_make_it_stale(workspace):
    work(workspace)
    assert not work(workspace, Toy(runtime=RuntimeConfig(batch_size=99, device="cpu")))


def test_another_setting_is_refused_by_name(workspace):
    work(workspace)
    with pytest.raises(WorkspaceError, match=r"\(size\)") as caught:
        work(workspace, Toy(size=2))
    assert "--force" in caught.value.hint
    assert work(workspace, Toy(size=2), force=True)


def test_another_input_is_refused_by_name(workspace):
    work(workspace)
    with pytest.raises(WorkspaceError, match="input model"):
        work(workspace, digest="2")


def test_a_lost_output_is_made_again(workspace):
    work(workspace)
    (workspace.stage_dir("toy") / "out.txt").unlink()
    assert work(workspace)


def test_a_crash_leaves_no_stage_that_looks_finished(workspace):
    work(workspace)

    def crash():
        with stage("toy", Toy(), workspace, main="out.txt", inputs={}, force=True):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        crash()
    assert workspace.find("toy") is None


def test_a_second_process_is_refused(workspace):
    with (
        lock.exclusive(workspace.stage_dir("toy") / ".lock"),
        pytest.raises(WorkspaceError, match="in use"),
    ):
        work(workspace)


def test_an_output_elsewhere_has_its_manifest_beside_it(workspace, tmp_path):
    target = tmp_path / "data" / "mine.txt"
    assert work(workspace, output=target)
    assert target.read_text() == "done"
    assert manifest.read(tmp_path / "data" / "mine.txt.manifest.json").main == "mine.txt"
    assert not workspace.root.exists()
    assert not work(workspace, output=target)


def test_the_stage_after_finds_the_output_or_names_the_command(workspace):
    with pytest.raises(WorkspaceError) as caught:
        stage_input(workspace, "toy", None)
    assert "nexus toy" in caught.value.hint
    work(workspace)
    found = stage_input(workspace, "toy", None)
    assert found.path.read_text() == "done"


def test_an_explicit_path_beats_the_workspace(workspace, tmp_path):
    work(workspace)
    other = tmp_path / "other.txt"
    other.write_text("mine")
    assert stage_input(workspace, "toy", other).path == other
    with pytest.raises(WorkspaceError, match="does not exist"):
        stage_input(workspace, "toy", tmp_path / "none.txt")


def test_the_digest_follows_the_content_not_the_settings(workspace):
    work(workspace)
    first = stage_input(workspace, "toy", None).digest
    work(workspace, Toy(size=5), force=True)
    assert stage_input(workspace, "toy", None).digest == first
    work(workspace, Toy(size=5), text="other", force=True)
    assert stage_input(workspace, "toy", None).digest != first


def test_a_damaged_manifest_is_named(workspace):
    work(workspace)
    workspace.manifest_path("toy").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        work(workspace)


def test_force_makes_a_stage_with_a_damaged_manifest_again(workspace):
    work(workspace)
    workspace.manifest_path("toy").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        work(workspace)
    assert work(workspace, force=True)
    assert not work(workspace)


def follow(workspace, name, before, text, **options):
    """Run a stage that reads the one before."""
    inputs = {before: stage_input(workspace, before, None)}
    with stage(name, Toy(), workspace, main="out.txt", inputs=inputs, **options) as out:
        out.main.parent.mkdir(parents=True, exist_ok=True)
        out.main.write_text(text)
        out.add(out.main, format="text")


def test_a_stage_whose_source_was_made_again_is_stale_however_far_back(workspace):
    work(workspace)
    follow(workspace, "second", "toy", "from done")
    follow(workspace, "third", "second", "from from done")
    work(workspace, force=True)
    assert workspace.require("third")  # the same content again leaves nothing stale
    work(workspace, text="other", force=True)
    for late in ("second", "third"):
        with pytest.raises(WorkspaceError, match="second is stale: 'toy' was made again") as caught:
            stage_input(workspace, late, None)
        assert "nexus second" in caught.value.hint
    follow(workspace, "second", "toy", "from other", force=True)
    with pytest.raises(WorkspaceError, match="third is stale: 'second'"):
        stage_input(workspace, "third", None)


def test_what_was_made_from_a_deleted_stage_can_still_be_used(workspace):
    work(workspace)
    follow(workspace, "second", "toy", "from done")
    workspace.manifest_path("toy").unlink()
    assert stage_input(workspace, "second", None).path.read_text() == "from done"


class Follower:
    """A rank that is told what the main one found."""

    is_main = False

    def __init__(self, told):
        self.told = told

    def broadcast_object(self, _):
        return self.told

    def barrier(self):
        pass


class Leader(Follower):
    is_main = True

    def broadcast_object(self, value):
        self.told = value
        return value


def test_what_the_main_rank_refuses_every_rank_refuses(workspace):
    work(workspace)
    main = Leader(None)
    with pytest.raises(WorkspaceError, match=r"\(size\)"):
        work(workspace, Toy(size=2), world=main)
    with pytest.raises(WorkspaceError, match=r"\(size\)") as caught:
        work(workspace, Toy(size=2), world=Follower(main.told))
    assert "--force" in caught.value.hint


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write in"):
        work(Workspace(tmp_path / "file"))


def test_notes_beside_the_main_output_leave_nothing_stale(workspace):
    def first(note, **options):
        with stage("toy", Toy(), workspace, main="out.txt", inputs={}, **options) as out:
            for name, text in (("out.txt", "done"), ("note.txt", note)):
                (out.directory / name).write_text(text)
                out.add(out.directory / name, format="text")

    first("took 3 s")
    follow(workspace, "second", "toy", "from done")
    first("took 4 s", force=True)
    assert stage_input(workspace, "second", None)
    main = stage_input(workspace, "toy", None)
    assert stage_input(workspace, "toy", main.path).digest == main.digest


def test_a_model_that_changed_under_its_link_is_another_input(workspace, make_tiny_model, tmp_path):
    base = make_tiny_model(tmp_path / "base")
    with stage("toy", Toy(), workspace, main="model", inputs={}) as out:
        shutil.copytree(base, out.main, copy_function=os.link)
        out.add(out.main, format="nexus.model/1")
    before = stage_input(workspace, "toy", None)
    assert stage_input(workspace, "toy", before.path).digest == before.digest
    shard = base / "model-00001-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-4096:] = bytes(4096)
    with shard.open("r+b") as file:
        file.write(content)
    assert stage_input(workspace, "toy", None).digest != before.digest
