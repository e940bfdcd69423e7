"""Key-value caches: one that grows by concatenation, and one of fixed size with its position on the device.

Both answer `positions(T, device)` before a forward, `update(layer, k, v)` in each layer, and `advance(T)`
after it. Shapes: B batch, K key-value heads, T new positions, S all positions, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from assay.systems.decoder.rope import angles, frequencies
from assay.systems.decoder.shapes import DecoderConfig

__all__ = ["Cache", "GrowingCache", "StaticCache"]


class Cache(Protocol):
    """What the decoder asks of a cache."""

    keys: list[Tensor]
    values: list[Tensor]

    def positions(self, count: int, device: torch.device) -> Tensor: ...  # of the new tokens, (T,)
    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def advance(self, count: int) -> None: ...


class GrowingCache:
    """What a plain program does: concatenate. `length` tokens are held."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def length(self) -> int:
        """Tokens held for every row."""
        return int(self.keys[0].shape[2]) if self.keys else 0

    def positions(self, count: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + count, device=device)

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append to a layer and return all keys, all values and the mask that attention needs."""
        if layer == len(self.keys):
            self.keys.append(k_BKTD)
            self.values.append(v_BKTD)
            return k_BKTD, v_BKTD, None
        k_BKSD = self.keys[layer] = torch.cat((self.keys[layer], k_BKTD), dim=2)
        v_BKSD = self.values[layer] = torch.cat((self.values[layer], v_BKTD), dim=2)
        T, S = k_BKTD.shape[2], k_BKSD.shape[2]
        if T == 1:
            return k_BKSD, v_BKSD, None
        return k_BKSD, v_BKSD, torch.ones(T, S, dtype=torch.bool, device=k_BKSD.device).tril(S - T)

    def advance(self, count: int) -> None:
        """Nothing to do: the tensors have grown."""


class StaticCache:
    """Room for `size` tokens, allocated once; addresses never change, so a CUDA graph can be replayed.

    The whole prompt goes in at once into an empty cache (then attention sees the fresh keys alone); after
    it, one token at a time goes to the slot that `position`, a device tensor (1,), names, and slots beyond
    it are masked. The host knows nothing of the position: who owns the cache counts against `size`.

    Prompts of different lengths are padded on the left: row b begins at slot `starts_B[b]`, and no slot
    before it is ever seen. Rotary positions count slots, which turns queries and keys of a row by the same
    surplus: their products do not change.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.size = size
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.starts_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.padded = False
        self._slots_S = torch.arange(size, device=device)
        turn_SD = angles(frequencies(config).to(device), self._slots_S)
        self._cos_SD, self._sin_SD = turn_SD.cos(), turn_SD.sin()

    def reset(self, starts_B: Tensor | None = None) -> None:
        """Start over; what is in the slots is masked until it is overwritten."""
        self.position.zero_()
        self.padded = starts_B is not None
        if starts_B is None:
            self.starts_B.zero_()
        else:
            self.starts_B.copy_(starts_B)

    def has_kernel(self) -> bool:
        """Whether `attend` can take the place of `update` and masked attention: on CUDA, up to float32."""
        return self.position.is_cuda and self.keys[0].dtype != torch.float64

    def attend(
        self,
        layer: int,
        qkv_BH: Tensor,
        norms: Sequence[Tensor],
        eps: float,
    ) -> Tensor:
        """Take in the newest token as projected, (B, (N + 2 K) * D); return its attention, (B, N * D).

        `norms` are the weights of the queries' and the keys' RMSNorm, if there are any.
        """
        from assay.systems.decoder.kernels import decode_attention

        out_BH: Tensor = decode_attention(
            qkv_BH,
            norms,
            eps,
            self._cos_SD,
            self._sin_SD,
            self.keys[layer],
            self.values[layer],
            self.position,
            self.starts_B,
        )
        return out_BH

    def positions(self, count: int, device: torch.device) -> Tensor:
        return torch.arange(count, device=device) if count > 1 else self.position

    def update(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write a prompt or one token; return the keys, values and mask that attention needs.

        The mask is (B, 1, 1, S) for a token, (B, 1, T, T) for padded prompts, None for whole ones. A slot
        of padding sees itself, so that its softmax has something to sum; nobody sees it.
        """
        keys, values, T = self.keys[layer], self.values[layer], k_BKTD.shape[2]
        slots_S, starts_B1 = self._slots_S, self.starts_B[:, None]
        if T > 1:
            keys[:, :, :T].copy_(k_BKTD)
            values[:, :, :T].copy_(v_BKTD)
            if not self.padded:
                return k_BKTD, v_BKTD, None
            row_T1, column_1T = slots_S[:T, None], slots_S[None, :T]
            real_B1T = (column_1T >= starts_B1)[:, None]
            mask_BTT = (column_1T <= row_T1) & (real_B1T | (column_1T == row_T1))
            return k_BKTD, v_BKTD, mask_BTT[:, None]
        keys.index_copy_(2, self.position, k_BKTD.to(keys.dtype))
        values.index_copy_(2, self.position, v_BKTD.to(values.dtype))
        seen_BS = (slots_S <= self.position) & (slots_S >= starts_B1)
        return keys, values, seen_BS[:, None, None]

    def advance(self, count: int) -> None:
        self.position.add_(count)
