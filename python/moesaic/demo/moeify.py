"""A mixture-of-experts version of a dense model, made from its own neurons.

An MLP's output is a sum over its intermediate neurons, so any partition of the neurons into experts
keeps it, if every expert is chosen and counts with weight 1. To make leaving experts out cheap in
quality, neurons that fire together belong together:

* **Experts**: balanced k-means over the neurons' gate directions and their strength (the root mean
  square of what the neuron adds to the output, on a log scale). Strength separates experts that
  nearly always matter from experts that seldom do; direction groups the latter by topic.
* **Router**: ridge regression from the layer's input to each expert's share of the output, measured
  as the norm of what the expert adds, over a few thousand tokens of text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .progress import progress
from .storage import written_whole
from .text import windows
from .types import Block, Model, Tokenizer

CALIBRATION_TOKENS = (8, 512)
_ROUNDS = 10
_RIDGE = 1e-2  # of the mean variance of the inputs
# Part of the cached file's name: raise it when the fit changes.
_FIT = 1


@dataclass(frozen=True)
class ExpertSplit:
    """How one MLP becomes E experts.

    neurons: [E, I / E] int64, the intermediate neurons of each expert.
    router_weight: [E, H], router_bias: [E]: predicted share of the output by expert.
    """

    neurons: Tensor
    router_weight: Tensor
    router_bias: Tensor

    def weights(self, mlp: Block) -> tuple[Tensor, Tensor]:
        """(w13 [E, 2 I / E, H] gate rows then up rows, w2 [E, H, I / E]) of a Llama MLP."""
        w13 = torch.cat((mlp.gate_proj.weight[self.neurons], mlp.up_proj.weight[self.neurons]), 1)
        return w13, mlp.down_proj.weight[:, self.neurons].transpose(0, 1).contiguous()


def expert_splits(
    folder: Path, tokenizer: Tokenizer, model: Model, num_experts: int,
    seed: int,
) -> list[ExpertSplit]:  # fmt: skip
    """The split of each layer of the dense fp32 ``model``; fitted once, then read from the cache.

    folder: that of the converted model; the fit is kept beside it.
    """
    from safetensors.torch import load_file, save_file

    settings = f"{num_experts}-{seed}-{CALIBRATION_TOKENS}-{_FIT}-{torch.__version__}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    final = folder.with_name(f"{folder.name}-experts-{num_experts}-{key}")
    if not final.exists():
        tokens = windows(tokenizer, *CALIBRATION_TOKENS, held_out=False)
        splits = fit(model, tokens, num_experts, seed)
        with written_whole(final) as partial:
            save_file(
                {f"{i}.{k}": v for i, split in enumerate(splits) for k, v in vars(split).items()},
                partial / "experts.safetensors",
            )
    tensors = load_file(final / "experts.safetensors")
    names = ExpertSplit.__dataclass_fields__
    return [
        ExpertSplit(**{k: tensors[f"{i}.{k}"] for k in names})
        for i in range(model.config.num_hidden_layers)
    ]


@torch.no_grad()
def fit(model: Model, tokens: Tensor, num_experts: int, seed: int) -> list[ExpertSplit]:
    """Split every MLP of a dense Llama model, in one forward pass over ``tokens`` [B, L]."""
    splits: list[ExpertSplit] = []
    layers = model.model.layers
    inputs: list[Tensor] = []  # of the MLP in progress
    hooks = []
    with progress("fitting experts and routers", len(layers)) as step:

        def fit_layer(down: nn.Linear, args: tuple[Tensor, ...]) -> None:
            mlp = layers[len(splits)].mlp
            neurons = args[0].flatten(0, -2)
            splits.append(split_mlp(mlp, inputs.pop(), neurons, num_experts, seed))
            step()

        for layer in layers:
            hooks += [
                layer.mlp.register_forward_pre_hook(
                    lambda mlp, args: inputs.append(args[0].flatten(0, -2))
                ),
                layer.mlp.down_proj.register_forward_pre_hook(fit_layer),
            ]
        try:
            model.model(tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return splits


def split_mlp(mlp: Block, x: Tensor, neurons: Tensor, num_experts: int, seed: int) -> ExpertSplit:
    """Experts and router of one MLP from its inputs x [T, H] and neuron values [T, I]."""
    down = mlp.down_proj.weight
    strength = (neurons.square().mean(0).sqrt() * down.norm(dim=0)).clamp_min(1e-30).log()
    strength = (strength - strength.mean()) / strength.std().clamp_min(1e-6)
    direction = nn.functional.normalize(mlp.gate_proj.weight, dim=1)
    members = balanced_clusters(torch.cat((direction, strength[:, None]), 1), num_experts, seed)
    norms = torch.stack([(neurons[:, m] @ down[:, m].T).norm(dim=1) for m in members], 1)
    shares = norms / norms.sum(1, keepdim=True).clamp_min(1e-30)
    weight, bias = ridge(x, shares)
    return ExpertSplit(members, weight, bias)


def balanced_clusters(points: Tensor, count: int, seed: int) -> Tensor:
    """k-means with clusters of equal size: [count, n / count] int64 indices of points [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        members = _assign(torch.cdist(points, centers), len(points) // count)
        centers = points[members].mean(1)
    return members


def _assign(distances: Tensor, capacity: int) -> Tensor:
    """Each point to the nearest cluster with room; who would lose most by waiting goes first."""
    two = distances.topk(min(2, distances.shape[1]), largest=False).values
    order = (two[:, -1] - two[:, 0]).argsort(descending=True, stable=True).tolist()
    preferences = distances.argsort(dim=1, stable=True).tolist()
    clusters: list[list[int]] = [[] for _ in range(distances.shape[1])]
    for point in order:
        nearest = next(i for i in preferences[point] if len(clusters[i]) < capacity)
        clusters[nearest].append(point)
    return torch.tensor(clusters).sort(1).values


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [E, H] and bias [E] of the ridge regression from x [T, H] to y [T, E]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = (x.T @ x).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (x.T @ y).double()).T.to(x.dtype)
    return weight.contiguous(), y_mean - weight @ x_mean
