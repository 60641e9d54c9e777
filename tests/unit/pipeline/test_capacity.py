"""What a model takes of a machine, by its files alone."""

import torch

from nexus_cli.pipeline.capacity import forward_bytes, weight_bytes


def test_weights_are_counted_as_they_are_loaded(tiny_converted_dir):
    from nexus_cli.core.model.gpt_oss.loading import load_model

    model = load_model(tiny_converted_dir, dtype=torch.float32)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weight_bytes(tiny_converted_dir, torch.float32) == held


def test_attention_scores_outgrow_the_rest_in_long_sequences(tiny_model_dir):
    """Four heads; a score of every pair of positions, and copies of it."""
    one, four = (forward_bytes(tiny_model_dir, 2, n, torch.bfloat16) for n in (1024, 4096))
    assert four >= 2 * 4 * 4096**2 * 2
    assert four > 12 * one
