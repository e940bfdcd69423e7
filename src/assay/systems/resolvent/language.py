"""The phase-2 model as a language model of the bench, and its oracle: what the variant `phase2` builds."""

from __future__ import annotations

from collections.abc import Mapping

from assay.measure.record import Scalar, Work
from assay.systems.decoder.adapter import ModuleLM
from assay.systems.decoder.state import named_state
from assay.systems.resolvent import cost
from assay.systems.resolvent.phase2 import create_phase2_model
from assay.systems.resolvent.reference import Phase2Reference
from assay.systems.resolvent.shapes import Phase2Config

__all__ = ["Phase2LM", "build_phase2_reference"]


class Phase2LM(ModuleLM):
    """A Phase2Model with its own costs."""

    def __init__(
        self,
        preset: str,
        *,
        dtype: str,
        device: str,
        seed: int,
        implementation: str = "auto",
        compile_mode: str | None = None,
        cuda_graph: bool | None = None,
    ) -> None:
        model = create_phase2_model(preset, device=device, seed=seed, implementation=implementation)
        self._shape: Phase2Config = model.config
        super().__init__(
            model,
            name="phase2",
            dtype=dtype,
            device=device,
            weights="random",
            vocab_size=model.config.vocab_size,
            compile_mode=compile_mode,
            cuda_graph=cuda_graph,
        )

    def work(self, workload: str, params: Mapping[str, Scalar]) -> dict[str, Work]:
        """Work of each phase; see cost.work."""
        return cost.work(self._shape, workload, params, self._dtype)

    def describe(self) -> dict[str, Scalar]:
        """Parameters, where the weights come from, and the configuration."""
        return super().describe() | dict(vars(self._shape))


def build_phase2_reference(preset: str, *, dtype: str, device: str, seed: int) -> Phase2Reference:
    """The oracle of a preset, with the weights that the model would have until it is given others."""
    model = create_phase2_model(preset, device=device, seed=seed)
    return Phase2Reference(model.config, named_state(model), dtype=dtype, device=device)
