"""Real weights in safetensors: from a local folder or the hub, and into a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from assay.errors import Unavailable, UsageError
from assay.systems.decoder.model import Decoder
from assay.systems.decoder.shapes import Shape, to_raw
from assay.systems.decoder.state import load_strict, named_state, tied_names

__all__ = ["load_weights", "read_weights", "save", "weight_files"]


def weight_files(shape: Shape) -> list[Path]:
    """The safetensors files of a shape; empty where it has none, and then weights are random.

    Raises Unavailable where a hub id cannot be fetched, UsageError where an indexed shard is not there.
    """
    folder = _snapshot(shape.hub_id) if shape.hub_id else shape.folder
    if folder is None:
        return []
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    for shard in (s for s in shards if not s.is_file()):
        raise UsageError(f"'{index}' names a shard that is not there", expected=shard.name)
    return shards


def read_weights(files: list[Path]) -> dict[str, Tensor]:
    """Name -> tensor, memory-mapped, without the frequency tables that old checkpoints carry."""
    try:
        from safetensors import safe_open
    except ImportError as e:
        raise Unavailable("real weights need safetensors", "pip install 'assay[models]'") from e

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - the handle is not a mapping
                    yield name, shard.get_tensor(name)

    return {name: tensor for name, tensor in tensors() if not name.endswith("inv_freq")}


def load_weights(module: nn.Module, shape: Shape) -> str:
    """Load a shape's real weights, where it has them. Returns `real`, or `none`: nothing is touched."""
    files = weight_files(shape)
    if not files:
        return "none"
    load_strict(
        named_state(module),
        read_weights(files),
        to=f"shape '{shape.name}'",
        tied=tied_names(module),
        remedy="give the config.json that these safetensors were saved with",
    )
    return "real"


def save(model: Decoder, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which `load` and transformers read.

    Merged projections are written as what they were merged from. Raises UsageError for a folder that
    cannot be written and a shape that no config.json states, Unavailable without safetensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as e:
        raise Unavailable("saving weights needs safetensors", "pip install 'assay[models]'") from e
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    raw = {**to_raw(model.config), "dtype": dtype, "torch_dtype": dtype}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_apart(named_state(model)), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    except OSError as e:
        raise UsageError(f"cannot write '{folder}'", expected="a folder to write into", got=e) from e


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those that are slices of one memory copied: safetensors takes no views."""
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in state.items()
    }


def _snapshot(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise Unavailable(f"'{hub_id}' needs huggingface_hub", "pip install 'assay[models]'") from e
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as e:  # the hub's client raises several unrelated trees; each means "not reachable"
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise Unavailable(f"cannot fetch '{hub_id}': {reason}", "give a local folder") from e
