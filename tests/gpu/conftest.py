import warnings

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _the_backward_thread_has_its_context():
    """PyTorch makes it at the thread's first product and warns, once: here, not in a test."""
    if not torch.cuda.is_available():
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
        weight = torch.ones(16, 16, device="cuda", requires_grad=True)
        (weight @ weight).sum().backward()
