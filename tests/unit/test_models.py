"""The classes that a Python user imports."""

import subprocess
import sys

import torch

from nexus_cli import models


def test_importing_the_models_lets_the_auto_classes_load_a_converted_folder(tiny_converted_dir):
    code = (
        "import sys, nexus_cli.models\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model) is nexus_cli.models.NexusGptOssForCausalLM, type(model)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_converted_dir)], check=True)


def test_the_shared_expert_stands_alone():
    expert = models.GptOssSharedExpert(hidden_size=8, intermediate_size=4)
    assert torch.equal(expert(torch.randn(3, 8)), torch.zeros(3, 8))
    assert sum(p.numel() for p in expert.parameters()) == 3 * 8 * 4 + 2 * 4 + 8 + 1
