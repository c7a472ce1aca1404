"""Statistics of the inputs of layers from the weights alone: random tokens pass the blocks. Needs no transformers, no
tokenizer and no text, and reads a matrix at a time.

Attention is the mean of the values of a random number of tokens, drawn for every token and head: real attention is
narrow in some heads and wide in others. The mean squares of such inputs show which inputs of a layer are large.
Products of different inputs are unlike those of a text, and are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.model.blocks import BlockList, BlockPart, find_block_list, is_present
from loftq_cli.model.family import Family
from loftq_cli.runtime.workers import SERIAL, Workers
from loftq_cli.tensors.headers import TensorRef

if TYPE_CHECKING:
    import torch

WEIGHT_TOKENS = 1024  # random tokens
ATTENDED_TOKENS = 200  # most tokens that a head averages; the logarithm of the number is drawn evenly
_CHUNK = 128  # tokens that a thread computes at once
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")


class WeightSource(Protocol):
    """Weights by name: a checkpoint, or a model in memory."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """The headers of all tensors by name."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Load a tensor."""
        ...

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Load rows [start, stop) of a tensor."""
        ...


@dataclass(frozen=True)
class WeightStatistics:
    """Mean squares of the inputs of layers, by weight: float32 [in], see `InputStatistics`."""

    means: Mapping[str, torch.Tensor]

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights with a statistic."""
        return frozenset(self.means)

    @property
    def is_measured(self) -> bool:
        """False: no text gives such inputs."""
        return False

    def load(self, name: str) -> torch.Tensor:
        """The mean squares of the inputs of a weight. Raises KeyError for a weight without a statistic."""
        return self.means[name]


def has_known_blocks(names: Collection[str], family: Family) -> bool:
    """Whether the blocks of a model have a known structure; otherwise no weight gets a statistic.

    names    names of all tensors
    family   the config

    >>> has_known_blocks(["layers.0.weight"], Family({}))
    False
    """
    return _find_blocks(names, family) is not None


def measure_weights(
    source: WeightSource,
    family: Family,
    *,
    tokens: int = WEIGHT_TOKENS,
    attended: int = ATTENDED_TOKENS,
    workers: Workers = SERIAL,
    device: torch.device | str = "cpu",
    experts: Collection[str] = (),
) -> WeightStatistics:
    """Pass random tokens through the blocks, and measure the inputs of the layers.

    source       the original
    family       the config, and the layers stored [in, out]
    tokens       number of tokens, drawn from the rows of the embedding with a fixed seed
    attended     most tokens that a head averages; 1: every token attends to itself
    workers      threads; the numbers are the same with any number of threads
    device       the device of the products
    experts      names of the parameters of experts that read the input of an MLP; the tokens pass by the experts

    Weights of unknown blocks, and weights with inputs that are not finite, have no statistic.

    >>> from loftq_cli.checkpoint.source import open_checkpoint
    >>> from loftq_cli.model.builtin import resolve_model
    >>> checkpoint = open_checkpoint(resolve_model("builtin:tiny-llama"))
    >>> statistics = measure_weights(checkpoint, Family(checkpoint.config()), tokens=4)
    >>> len(statistics.names), statistics.load("model.layers.0.mlp.down_proj.weight").shape
    (28, torch.Size([512]))
    """
    blocks = _find_blocks(source.tensors.keys(), family)
    if blocks is None:
        return WeightStatistics({})
    means = _TokenForward(source, family, blocks, workers, device, experts).run(tokens, attended)
    return WeightStatistics({name: mean for name, mean in means.items() if bool(mean.isfinite().all() and mean.any())})


def _find_blocks(names: Collection[str], family: Family) -> BlockList | None:
    config = family.config
    model_types = [str(part.get("model_type")) for part in (config, _text_config(config))]
    return find_block_list(names, model_types)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


class _TokenForward:
    """Tokens on the way through the blocks, in chunks [tokens, hidden], float32."""

    def __init__(
        self,
        source: WeightSource,
        family: Family,
        blocks: BlockList,
        workers: Workers,
        device: torch.device | str,
        experts: Collection[str],
    ) -> None:
        self._experts = experts
        self._source, self._family, self._blocks = source, family, blocks
        self._workers, self._device = workers, device
        self._config = _text_config(family.config)
        self._means: dict[str, torch.Tensor] = {}

    def run(self, tokens: int, attended: int) -> dict[str, torch.Tensor]:
        """Mean squares of the inputs of all layers of known parts, by weight."""
        self._attended = min(attended, tokens)
        states, structure = self._embed(tokens), self._blocks.structure
        names = self._source.tensors
        for number in range(self._blocks.count):
            block = self._blocks.block(number)
            before = states
            for part in (structure.attention, structure.mlp):
                if is_present(part, block, names):
                    states = self._pass(part, block, states, before if structure.is_parallel else states)
            readers = [name for name in self._experts if name.startswith(block)]
            if readers and f"{block}{structure.mlp.norm}.weight" in names:
                inputs = self._map(self._norm(block, structure.mlp.norm), states)
                for name in readers:
                    self._measure(name, inputs, ending="")
        return self._means

    def _embed(self, tokens: int) -> list[torch.Tensor]:
        import torch

        structure, root = self._blocks.structure, self._blocks.root
        embedding = f"{root}{structure.embedding}.weight"
        self._generator = generator = torch.Generator().manual_seed(0)
        rows = torch.randint(self._source.tensors[embedding].shape[0], (tokens,), generator=generator).tolist()
        x = torch.cat([self._source.load_rows(embedding, row, row + 1) for row in rows]).float().to(self._device)
        x = x * float(self._config.get("embedding_multiplier") or 1.0)
        if structure.scales_embedding:
            x = x * math.sqrt(x.shape[1])
        for name, row in ((structure.positions, structure.first_position), (structure.types, 0)):
            if name is not None:
                added = self._source.load_rows(f"{root}{name}.weight", row, row + 1)
                x = x + added.float().to(self._device)
        norm = self._norm(root, structure.embedding_norm)
        return [norm(chunk) for chunk in torch.split(x, _CHUNK)]

    def _pass(
        self, part: BlockPart, block: str, states: list[torch.Tensor], read: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The states after a part: `read` goes through the part, and is added to `states`."""
        inputs = self._map(self._norm(block, part.norm), read)
        for name in dict.fromkeys((*part.reads, part.gate, part.up)):
            if name is not None:
                self._measure(block + name, inputs)
        inner = self._attend(part, block, inputs) if part.value is not None else self._activate(part, block, inputs)
        self._measure(block + part.output, inner)
        after, last = self._norm(block, part.after), self._norm(block, part.last)
        share = float(self._config.get("residual_multiplier") or 1.0)
        added = self._map(after, self._linear(block + part.output, inner))
        return [last(x + share * y) for x, y in zip(states, added, strict=True)]

    def _attend(self, part: BlockPart, block: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The values, repeated for the query heads, and averaged over tokens: [tokens, heads · head size]."""
        import torch

        values = self._linear(f"{block}{part.value}", inputs)
        wide = self._in_features(block + part.output)
        heads = int(self._config.get("num_attention_heads") or self._config.get("n_head") or 1)
        size = int(self._config.get("head_dim") or wide // heads)

        def spread(y: torch.Tensor) -> torch.Tensor:
            if part.value_rows == "heads":
                return y.view(len(y), -1, 3, size)[:, :, 2].reshape(len(y), -1)
            if part.value_rows == "last":
                y = y[:, -(y.shape[1] - wide) // 2 :] if y.shape[1] > wide else y
            copies = wide // y.shape[1]
            return y.view(len(y), -1, size).repeat_interleave(copies, dim=1).reshape(len(y), wide) if copies > 1 else y

        spread_values = self._map(spread, values)
        if self._attended == 1:
            return spread_values
        return list(torch.split(self._mix(torch.cat(spread_values), size), _CHUNK))

    def _mix(self, values: torch.Tensor, size: int) -> torch.Tensor:
        """Means of random numbers of neighbouring rows, drawn for each row and each head of `size` columns. Rows are
        random tokens, so neighbours are as random as any rows.
        """
        import torch

        tokens, width = values.shape
        shape = (tokens, width // size)
        draws = torch.rand(shape, generator=self._generator, dtype=torch.float32) * math.log(self._attended + 1)
        counts = draws.exp().long().clamp_(1, self._attended)
        starts = (torch.rand(shape, generator=self._generator, dtype=torch.float32) * (tokens + 1 - counts)).long()
        ends, starts, counts = ((n[..., None].to(values.device)) for n in (starts + counts, starts, counts))
        sums = torch.cat([values.new_zeros(1, width), values]).double().cumsum(0).view(tokens + 1, -1, size)
        ends, starts = (rows.expand(-1, -1, size) for rows in (ends, starts))
        return ((sums.gather(0, ends) - sums.gather(0, starts)) / counts).float().view(tokens, width)

    def _activate(self, part: BlockPart, block: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        activate = _activation(self._config, self._blocks.structure.activation)
        up = self._linear(f"{block}{part.up}", inputs)
        if part.is_gated:
            return self._map(lambda y: activate(y.chunk(2, dim=1)[0]) * y.chunk(2, dim=1)[1], up)
        if part.gate is None:
            return self._map(activate, up)
        gates = self._linear(block + part.gate, inputs)
        return [activate(gate) * y for gate, y in zip(gates, up, strict=True)]

    def _linear(self, module: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        from torch.nn.functional import linear

        weight = self._load(f"{module}.weight")
        matrix = weight.T if self._family.is_transposed(module) else weight
        bias = self._load(f"{module}.bias") if f"{module}.bias" in self._source.tensors else None
        return self._map(lambda x: linear(x, matrix, bias), inputs)

    def _in_features(self, module: str) -> int:
        shape = self._source.tensors[f"{module}.weight"].shape
        return shape[0] if self._family.is_transposed(module) else shape[1]

    def _norm(self, block: str, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm called `name`: a layer norm if the norm has a bias or the structure centers, else an RMS norm."""
        from torch.nn.functional import layer_norm, rms_norm

        if name is None:
            return lambda x: x
        weight = self._load(f"{block}{name}.weight") + self._blocks.structure.norm_offset
        bias_name = f"{block}{name}.bias"
        bias = self._load(bias_name) if bias_name in self._source.tensors else None
        epsilon = float(next((self._config[key] for key in _EPSILONS if self._config.get(key)), 1e-5))
        if bias is not None or self._blocks.structure.centers:
            return lambda x: layer_norm(x, weight.shape, weight, bias, epsilon)
        return lambda x: rms_norm(x, weight.shape, weight, epsilon)

    def _measure(self, module: str, inputs: list[torch.Tensor], *, ending: str = ".weight") -> None:
        import torch

        squares = self._map(lambda x: x.double().square().sum(0), inputs)
        total = torch.stack(squares).sum(0)
        self._means[module + ending] = (total / sum(map(len, inputs))).float().cpu()

    def _map(self, work: Callable[[torch.Tensor], torch.Tensor], chunks: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self._workers.map(work, chunks))

    def _load(self, name: str) -> torch.Tensor:
        return self._source.load(name).to(self._device).float()


def _activation(config: Mapping[str, Any], default: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of the MLP, by the name in the config; the identity for an unknown name."""
    from torch.nn import functional

    def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(x, approximate="tanh")

    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": functional.silu,
        "swish": functional.silu,
        "gelu": functional.gelu,
        "gelu_new": tanh_gelu,
        "gelu_fast": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
        "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    }
    name = next((config[key] for key in _ACTIVATIONS if isinstance(config.get(key), str)), default)
    return functions.get(name, lambda x: x)
