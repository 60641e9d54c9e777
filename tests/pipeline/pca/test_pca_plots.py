import json

import pytest

from nexus_cli.config.pca import PcaConfig
from nexus_cli.core.router.moments import Reservoir, RouterMoments
from nexus_cli.io import manifest
from nexus_cli.io.workspace import Workspace
from nexus_cli.pipeline import pca
from nexus_cli.pipeline.pca_plots import matrices
from nexus_cli.pipeline.router_statistics import save_moments


def test_plots_are_drawn_beside_the_statistics(run, collected, tmp_path):
    output = tmp_path / "out" / "pca_stats.json"
    run(collected, tmp_path, output=output, plots=True)
    drawn = sorted((output.parent / "pca_plots").iterdir())
    assert [path.stem for path in drawn] == [
        "expert_correlation",
        "expert_importance_heatmap",
        "expert_usage",
        "importance_distribution",
        "per_layer_variance",
        "router_confidence",
        "selected_experts",
        "variance_explained",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    found = manifest.read(output.with_name("pca_stats.json.manifest.json"))
    assert set(found.outputs) == {"pca_stats.json", "pca_plots"}


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (4, 8), (7, 32), (2, 128)])
def test_plots_are_drawn_for_other_shapes(router_moments, run, tmp_path, layers, experts):
    path = tmp_path / "router_probs.npz"
    moments = router_moments(layers=layers, experts=experts)
    empty = Reservoir.empty(0, layers, experts)
    save_moments(path, RouterMoments(moments.top_k, moments.body, moments.first, empty), {})
    run(path, tmp_path, plots=True)
    drawn = {path.stem for path in (tmp_path / "pca" / "pca_plots").iterdir()}
    assert "selected_experts" in drawn
    assert "router_confidence" not in drawn  # nothing was sampled


@pytest.mark.parametrize("experts", [2, 3])
def test_the_smallest_layers_are_analysed_and_drawn(router_moments, run, tmp_path, experts):
    path = tmp_path / "router_probs.npz"
    save_moments(path, router_moments(experts=experts, twins=False), {})
    document = run(path, tmp_path, top_k=1, plots=True)
    assert document["distribution"]["mean_top_fractions"] == {"4": pytest.approx(1.0)}
    assert (tmp_path / "pca" / "pca_plots" / "importance_distribution.png").exists()


def test_the_plot_of_the_selection_shows_layers_that_differ(uneven, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "nexus_cli.pipeline.pca_plots.matrices.selection",
        lambda layers, method, real=matrices.selection: (
            drawn.append(real(layers, method)) or drawn[0]
        ),
    )
    pca.run(PcaConfig(input=uneven, explained=0.8), Workspace(tmp_path))
    document = json.loads((tmp_path / "pca" / "pca_stats.json").read_text())
    panel = next(axes for axes in drawn[0].axes if axes.get_title("left") == "Experts taken")
    widths = [bar.get_width() for bar in panel.patches]
    assert widths == [len(x["top_expert_indices"]) for x in document["layers"].values()]
