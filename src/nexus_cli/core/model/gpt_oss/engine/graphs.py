"""All layers of a small micro-batch as CUDA graphs, forward and backward.

At a few thousand tokens the GPU finishes a kernel sooner than Python launches the next. A graph
launches them all at once; it is tied to one batch shape, and to the memory that it was captured
with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Inputs and parameters to outputs: launches work and waits for none.
Stack = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]

MODE = "thread_local"  # other threads, such as a collective's watchdog, go on during a capture
MAX_TOKENS = 8192  # of a micro-batch; beyond, launches hide behind the kernels
WARM_UP = 2  # passes before a capture: kernels are compiled and libraries set up in them


class ForwardGraph:
    """A stack of layers without gradients.

    Args:
        stack: what to capture.
        inputs: an example of what it is given.
        parameters: their memory must stay where it is.
    """

    def __init__(
        self, stack: Stack, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        with torch.no_grad():
            _warm_up(lambda: stack(self._inputs, parameters))
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode=MODE):
                self._outputs = stack(self._inputs, parameters)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, in memory of their own."""
        _copy(self._inputs, inputs)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


class TrainingGraph:
    """A stack of layers whose parameters have gradients, and whose inputs have none.

    What the layers keep for the backward pass lies in the graph's memory, as do the gradients. One
    forward pass must be followed by its backward pass before the next.

    It is captured over other leaves in the parameters' memory: somebody (DDP) may hold the nodes
    that add up the parameters' own gradients, which belong to the stream of their making, and a
    capture can wait for no other stream.

    Args:
        stack: what to capture; all outputs have gradients.
        inputs: an example of what it is given.
        parameters: leaves, some with gradients; their memory must stay where it is.
        copies: give gradients in memory of their own, so that several passes can be summed.
    """

    def __init__(
        self,
        stack: Stack,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        *,
        copies: bool,
    ) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._trained = [p for p in parameters if p.requires_grad]
        self._copies = copies
        places = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        self._leaves = [place for place in places if place.requires_grad]
        _warm_up(lambda: self._differentiate(stack(self._inputs, places)))
        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, capture_error_mode=MODE):
            outputs = stack(self._inputs, places)
        self._incoming = [torch.zeros_like(output) for output in outputs]
        self._backward = torch.cuda.CUDAGraph()
        pool = self._forward.pool()
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode=MODE):
            self._gradients = self._differentiate(outputs)
        self._outputs = tuple(output.detach() for output in outputs)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, to be read before the next pass."""
        _copy(self._inputs, inputs)
        out: tuple[Tensor, ...] = _Replay.apply(self, *self._trained)
        return out

    def replay_forward(self) -> tuple[Tensor, ...]:
        """Run the layers on what lies in the inputs."""
        self._forward.replay()
        return tuple(output.detach() for output in self._outputs)

    def replay_backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the parameters from those of the outputs."""
        for place, grad in zip(self._incoming, grads, strict=True):
            place.zero_() if grad is None else place.copy_(grad)
        self._backward.replay()
        # A first gradient becomes the parameter's own, so the next replay must not write there;
        # later ones are added to it at once.
        return [
            None
            if grad is None
            else grad.clone()
            if self._copies and parameter.grad is None
            else grad.detach()
            for parameter, grad in zip(self._trained, self._gradients, strict=True)
        ]

    def _differentiate(self, outputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        grads = getattr(self, "_incoming", None) or [torch.zeros_like(out) for out in outputs]
        return torch.autograd.grad(outputs, self._leaves, grads, allow_unused=True)


class _Replay(torch.autograd.Function):
    """The two graphs of a stack, as one node of autograd."""

    @staticmethod
    def forward(ctx: Any, graph: TrainingGraph, *parameters: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return graph.replay_forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.graph.replay_backward(grads)


def _warm_up(work: Callable[[], object]) -> None:
    """Run ``work`` on another stream, as a capture must not be the first to run it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _copy(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
