"""Batch norm over the batches of all processes, on any device (torch's SyncBatchNorm refuses a CPU), or over parts."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from visiontasks.layers.distributed import world_size


class ProcessBatchNorm(_BatchNorm):
    """A batch norm that takes its statistics over all processes while it trains.

    It shares parameters, buffers and so the names in a state dict with the layer that it stands for, and goes on with
    what a subclass does after the norm, as timm's BatchNormAct2d with its activation. Processes may hold unequal
    numbers of values a channel, one or more each. Shapes: (B, C, ...) to the same.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self.replaced = (layer,)  # in a tuple, so that it is no submodule
        self._parameters, self._buffers, self._modules = layer._parameters, layer._buffers, layer._modules
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self._together(x) if self.training and world_size() > 1 else super().forward(x)
        for layer in self.children():
            x = layer(x)
        return x

    def _together(self, x: Tensor) -> Tensor:
        mean, variance, count = _moments(x)
        if self.track_running_stats:
            self._follow(mean, variance * (count / (count - 1)))
        weight = torch.ones_like(mean) if self.weight is None else self.weight.to(mean.dtype)
        bias = torch.zeros_like(mean) if self.bias is None else self.bias.to(mean.dtype)
        apply: Callable[..., Tensor] = _Normalise.apply
        return apply(x, weight, bias, mean, variance, count, self.eps)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    def _check_input_dim(self, _: Tensor) -> None:
        """Takes any number of dimensions."""


class ProcessBatchNorms(TorchSyncBatchNorm):
    """What Lightning takes in `plugins` beside `sync_batchnorm=True`, to make each batch norm one over all processes.

    Lightning calls `apply` before a run of several processes, and `revert` after it.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Puts a `ProcessBatchNorm` in the place of each batch norm below the model; the state dict stays as it is."""
        for name, child in model.named_children():
            if isinstance(child, _BatchNorm):
                setattr(model, name, ProcessBatchNorm(child))
            else:
                self.apply(child)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Puts the replaced layers back, with what they have learnt since."""
        for name, child in model.named_children():
            if isinstance(child, ProcessBatchNorm):
                setattr(model, name, child.replaced[0].train(child.training))
            else:
                self.revert(child)
        return model


@torch.no_grad()
def settle(network: nn.Module, forward: Callable[[], object]) -> None:
    """Gives those batch norms of a network that have seen nothing yet the statistics of what `forward` shows it.

    Layers whose statistics are kept from the start on would else norm nothing, and a deep network's values grow or fade
    from layer to layer. Leaves the network in evaluation.
    """
    network.eval()
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and _unseen(layer)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train().momentum = None  # the statistics of all that is seen, and nothing else
    forward()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval().momentum = momentum


@contextmanager
def in_parts(layers: Iterable[_BatchNorm], parts: int) -> Iterator[None]:
    """Within it batch norms see equal parts of a batch (B, ...), one after the other, as if each were a batch."""
    patched = list(layers)
    for layer in patched:
        layer.forward = partial(_each_part, type(layer).forward, layer, parts)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in patched:
            del layer.forward


def _each_part(forward: Callable[[_BatchNorm, Tensor], Tensor], layer: _BatchNorm, parts: int, x: Tensor) -> Tensor:
    return torch.cat([forward(layer, part) for part in x.chunk(parts)])


def values_normed(layers: Iterable[_BatchNorm], forward: Callable[[], object]) -> int:
    """How many values batch norms are given in a forward."""
    seen: list[int] = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel())) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    return sum(seen)


def _unseen(layer: _BatchNorm) -> bool:
    """Whether the statistics are those that a layer is made with."""
    mean, variance = layer.running_mean, layer.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1).all())


class _Normalise(torch.autograd.Function):
    """The norm with given moments, whose gradient knows that they are those of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, count = ctx.saved_tensors
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack((of_weight, of_bias))  # (2, C)
        dist.all_reduce(sums)
        slope, offset = -sums / count * weight * (variance + ctx.eps).rsqrt()
        through_moments = F.batch_norm(x, mean, variance, slope, offset, training=False, eps=ctx.eps)
        return direct.add_(through_moments), of_weight, of_bias, None, None, None, None


@torch.no_grad()
def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, biased variance and count of each channel's values over all processes, each (C,)."""
    unused = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))  # says in which type to compute
    mean, variance = torch.batch_norm_update_stats(x, unused, unused.clone(), 0.0)  # (C,)
    own = torch.stack((torch.full_like(mean, x.numel() / x.shape[1]), mean, variance))  # (3, C)
    everyone = own.new_empty(world_size() * 3, x.shape[1])
    dist.all_gather_into_tensor(everyone, own)
    counts, means, variances = everyone.view(-1, *own.shape).unbind(1)  # (processes, C)
    count = counts.sum(dim=0)
    mean = (counts / count * means).sum(dim=0)
    return mean, (counts / count * (variances + (means - mean).square())).sum(dim=0), count
