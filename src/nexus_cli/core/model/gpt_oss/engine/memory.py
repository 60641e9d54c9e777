"""What a layer keeps of its forward pass, and what it computes again."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes a token and a layer, for bf16 activations.
BF16 = 2


@dataclass(frozen=True)
class Kept:
    """Which intermediate results a layer keeps for its backward pass; its input it always keeps.

    Listed by milliseconds saved for a byte: what costs most to compute again comes first.

    Attributes:
        attention: attention's output with its log-sum-exp, and the sum after it. Without these
            the whole layer runs again.
        qkv: rotated queries, keys and values.
        gate_up: pre-activations of the routed experts.
        shared: pre-activations of the shared expert.
    """

    attention: bool = True
    qkv: bool = True
    gate_up: bool = True
    shared: bool = True


NOTHING = Kept(attention=False, qkv=False, gate_up=False, shared=False)
EVERYTHING = Kept()
LEVELS = ("attention", "qkv", "gate_up", "shared")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes a token that one layer keeps, part by part.

    Attributes:
        input: the layer's input.
        attention: see :class:`Kept`, likewise the others.
        qkv: rotated queries, keys and values.
        gate_up: of the routed experts.
        shared: of the shared expert.
    """

    input: int
    attention: int
    qkv: int
    gate_up: int
    shared: int

    @classmethod
    def of(
        cls,
        *,
        hidden: int,
        expert_width: int,
        shared_width: int,
        top_k: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> LayerBytes:
        """From a model's shape."""
        routing = top_k * (BF16 + 5 * 4)  # scores, experts, and the routing's int32 vectors
        return cls(
            input=BF16 * hidden,
            attention=BF16 * (heads * head_dim + hidden) + 4 * heads + routing,
            qkv=BF16 * (heads + 2 * kv_heads) * head_dim,
            gate_up=BF16 * top_k * 2 * expert_width,
            shared=BF16 * 2 * shared_width,
        )

    def kept(self, kept: Kept) -> int:
        """Bytes a token under a policy."""
        costs: list[int] = [getattr(self, level) for level in LEVELS if getattr(kept, level)]
        return self.input + sum(costs)


@dataclass(frozen=True)
class ActivationPlan:
    """What each layer keeps, and how many keep their experts decoded.

    Attributes:
        kept: policy of every layer.
        decoded_layers: layers, counted from the first, whose experts stay in bf16.
        activation_bytes: kept in all at the end of a forward pass.
        decoded_bytes: that the decoded layers take beyond their packed form.
    """

    kept: tuple[Kept, ...]
    decoded_layers: int
    activation_bytes: int
    decoded_bytes: int

    def describe(self) -> list[str]:
        """For people, a line a part."""
        layers = len(self.kept)
        parts = [f"{level} {sum(getattr(k, level) for k in self.kept)}" for level in LEVELS]
        return [
            f"activations kept, of {layers} layers: {', '.join(parts)} "
            f"({self.activation_bytes / 2**30:.1f} GiB)",
            f"experts kept decoded: {self.decoded_layers} of {layers} layers "
            f"({self.decoded_bytes / 2**30:.1f} GiB more)",
        ]


def plan_activations(
    layer: LayerBytes, *, layers: int, tokens: int, budget: int, decoded_bytes_a_layer: int = 0
) -> ActivationPlan | None:
    """Spend a budget where a byte saves most time.

    Levels are raised for one layer after another, from the last: attention first, then qkv,
    gate_up, the shared expert; what is left decodes experts.

    Args:
        layer: bytes a token.
        layers: of the model.
        tokens: of one micro-batch.
        budget: bytes for all this.
        decoded_bytes_a_layer: what a decoded layer takes beyond its packed form; 0 to decode none.

    Returns:
        The plan, or ``None`` if not even the layers' inputs fit.
    """
    left = budget - layers * layer.input * tokens
    if left < 0:
        return None
    used = layers * layer.input * tokens
    raised: dict[str, int] = {}
    for level in LEVELS:
        cost: int = getattr(layer, level) * tokens
        room = layers if level == LEVELS[0] else raised[LEVELS[0]]  # nothing without attention
        raised[level] = min(room, left // cost) if cost else room
        left -= raised[level] * cost
        used += raised[level] * cost
    kept = tuple(
        Kept(**{level: layers - index <= raised[level] for level in LEVELS})
        for index in range(layers)
    )
    decoded = min(layers, left // decoded_bytes_a_layer) if decoded_bytes_a_layer else 0
    return ActivationPlan(kept, decoded, used, decoded * decoded_bytes_a_layer)
