"""One decoder over the ranks of torch's process group: weights sharded to train, layers split to infer.

`ShardedLM` is FSDP2: every rank holds a slice of each parameter, gathers a layer when it is due, and takes
its share of the batch. `TensorParallelLM` splits every projection: a rank has its heads, its part of the
MLP and its part of the key-value cache, and sums are exchanged after `o_proj` and `down_proj`.

Both answer on every rank alike: whole logits, the loss of the whole batch, whole weights and gradients. The
process group must have been started, and the rank's CUDA device set. No CUDA graphs: collectives stay out
of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from assay.measure.record import Scalar
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.compiling import compile_call, require_compiler
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.state import load_strict, named_gradients, named_state, tied_names

__all__ = ["ShardedLM", "TensorParallelLM"]


class _SpreadLM(ModuleLM):
    """A decoder whose parameters may be DTensors; whole tensors go in and come out.

    Every method is to be called on all ranks, with the same arguments.
    """

    module: Decoder

    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(torch.device(self._device).type, (dist.get_world_size(),))

    def state(self) -> dict[str, Tensor]:
        """Canonical name -> whole tensor in host memory: copies, gathered one after another."""
        return {name: _whole(t).cpu() for name, t in named_state(self.module).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy in every tensor by its canonical name: each rank takes its slice of what it is given."""
        to, tied = f"'{self._name}'", tied_names(self.module)
        load_strict(named_state(self.module), state, to=to, tied=tied, copy=_copy_slice)

    def gradients(self) -> dict[str, Tensor | None]:
        """Canonical name -> whole gradient of every parameter, None where it got none."""
        found = named_gradients(self.module)
        return {name: None if grad is None else _whole(grad) for name, grad in found.items()}

    def proof(self) -> dict[str, Scalar]:
        return {**super().proof(), "world_size": dist.get_world_size()}


class ShardedLM(_SpreadLM):
    """FSDP2, a group of parameters a layer. With `compile_mode` each layer is compiled apart.

    What is not in a layer (embedding, last norm, head and loss) is the root's group and runs eagerly.
    Gathering and resharding stay outside the compiled code, as hooks around it.
    """

    def __init__(
        self, module: nn.Module, *, compile_mode: str | None, cuda_graph: bool | None, **more: Any
    ) -> None:
        super().__init__(module, **more)
        assert not cuda_graph, "collectives are not captured"
        if compile_mode is not None:
            require_compiler(self._device)
        policy = MixedPrecisionPolicy()
        if self._at.weights.itemsize == 2:  # else a sum over many ranks rounds at each of them
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        mesh = self._mesh()
        for layer in self.module.model.layers:
            if compile_mode is not None:
                compiled = compile_call(layer.forward, compile_mode, cuda_graphs=False)
                layer.forward = compiled
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.module, mesh=mesh, mp_policy=policy)

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Mean loss of the whole batch, of which each rank computes its rows. Ready for backward.

        Backward gives the gradient of that mean, since FSDP2 averages over ranks. Where the ranks do not
        divide the rows, theirs are weighted; one without any takes a row that counts for nothing.
        """
        ranks, rank, rows = dist.get_world_size(), dist.get_rank(), ids_BT.shape[0]
        mine_BT = torch.tensor_split(ids_BT, ranks)[rank]
        weight = mine_BT.shape[0] * ranks / rows
        with self._at.context(self._device):
            loss = self._calls.loss(mine_BT if weight else ids_BT[:1])
        loss = loss if weight == 1 else loss * weight
        mean: Tensor = _MeanOverRanks.apply(loss)  # type: ignore[no-untyped-call]  # unannotated in torch
        return mean

    def state(self) -> dict[str, Tensor]:
        self._reshard()
        return super().state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._reshard()
        super().load(state)

    def gradients(self) -> dict[str, Tensor | None]:
        self._reshard()
        return super().gradients()

    def _reshard(self) -> None:
        """Drop gathered weights: the root keeps its own after a forward without gradients."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def proof(self) -> dict[str, Scalar]:
        self._reshard()
        sharded = sum(_is_split(p) for p in self.module.parameters())
        return {**super().proof(), "fsdp_sharded_parameters": sharded}


class TensorParallelLM(_SpreadLM):
    """Columns of q, k, v, gate and up; rows of o and down; the head by vocabulary unless it is tied.

    Embedding, norms and a tied head are replicated. The ranks must divide the key-value heads and the MLP.
    """

    def __init__(self, module: nn.Module, *, cuda_graph: bool | None, **more: Any) -> None:
        super().__init__(module, cuda_graph=False, **more)
        assert not cuda_graph, "collectives are not captured"
        mesh, config = self._mesh(), self.module.config
        plan: dict[str, ParallelStyle] = {}
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            plan[f"model.layers.*.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.*.{name}"] = RowwiseParallel()
        if not config.tie_word_embeddings:
            plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.module, mesh, plan)
        # what the cache is made by: the heads of this rank
        self.module.config = replace(
            config,
            num_attention_heads=config.num_attention_heads // mesh.size(),
            num_key_value_heads=config.num_key_value_heads // mesh.size(),
        )

    def proof(self) -> dict[str, Scalar]:
        """The cache's bytes a token are those of all ranks together."""
        found = super().proof()
        split = [m for m in self.module.modules() if isinstance(m, nn.Linear) and _is_split(m.weight)]
        held = float(found["kv_bytes_per_token"]) * dist.get_world_size()
        return {**found, "kv_bytes_per_token": held, "tensor_parallel_modules": len(split)}


class _MeanOverRanks(torch.autograd.Function):
    """The mean of each rank's scalar, on all of them; backward goes to the rank's own, unscaled."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # noqa: ARG004
        total = own.detach().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


def _is_split(tensor: Tensor) -> bool:
    """Whether each rank holds a part of it only."""
    return isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _copy_slice(own: Tensor, given: Tensor) -> None:
    """Copy this rank's slice of a whole tensor; no rank needs another for it."""
    if not isinstance(own, DTensor):
        own.copy_(given)
        return
    whole = given.to(own.device, own.dtype)
    mine = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    own.to_local().copy_(mine.to_local())
