"""What a run is put together from, where the student is a checkpoint of an earlier run."""

import pytest
import torch

from nexus_cli.core.data.batch import Batch
from nexus_cli.core.distributed import World
from nexus_cli.core.model.gpt_oss.export import nexus_tensors, write_model_directory
from nexus_cli.core.model.gpt_oss.loading import load_model
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline.training.assemble import load_models
from nexus_cli.pipeline.training.request import online_request

CPU = torch.device("cpu")


@pytest.fixture
def with_trained_router(tiny_converted_dir, tmp_path):
    name = "model.layers.0.mlp.router.weight"
    weight = load_model(tiny_converted_dir).get_parameter(name)
    trained = {name: weight.flip(0).contiguous()}
    target = tmp_path / "checkpoint-1"
    write_model_directory(target, tiny_converted_dir, nexus_tensors(tiny_converted_dir) | trained)
    return target


@pytest.mark.parametrize("train_router", [False, True])
def test_the_self_teacher_is_the_original_though_the_student_has_a_trained_router(
    with_trained_router, tiny_model_dir, make_config, tmp_path, train_router
):
    ids = torch.randint(0, 8000, (1, 24))
    batch = Batch(
        input_ids_BS=ids,
        position_ids_BS=torch.arange(24)[None],
        loss_mask_BS=torch.ones_like(ids, dtype=torch.bool),
        source_B=torch.zeros(1, dtype=torch.int64),
        index_B=torch.zeros(1, dtype=torch.int64),
    )
    config = make_config(student=str(with_trained_router), train_router=train_router)
    request = online_request(config, Workspace(tmp_path), 1)
    models = load_models(request, World(0, 1, CPU), CPU)
    base = load_model(tiny_model_dir, dtype=torch.float32).model
    with torch.no_grad():
        original = base(input_ids=ids, use_cache=False).last_hidden_state
        student = models.step.model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(models.teacher.signal(batch).hidden_NH, original.flatten(0, 1))
    assert not torch.equal(student, original)
