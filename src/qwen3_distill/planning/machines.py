"""Describes machines that a config can be written for: known ones by name, or the one here."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from qwen3_distill.modeling.step_memory import GIB
from qwen3_distill.planning.device import DeviceMemory, available_bytes, detect_memory

MachineKind: TypeAlias = Literal["cuda", "unified", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine's kind and memory."""

    label: str
    """For people: ``one H200``."""
    kind: MachineKind
    """``unified``: GPU and CPU share one memory."""
    free_bytes: int
    """Memory that the engines may share."""

    @property
    def device(self) -> DeviceMemory:
        """The machine, as the memory plan sees it."""
        return DeviceMemory(kind=self.kind, name=self.label, free_bytes=self.free_bytes)


MACHINES = {
    # What the driver reports as free on an idle card.
    "h200": Machine(label="one H200", kind="cuda", free_bytes=139 * GIB),
    # Of 121.7 GiB, others report 110 to 116 as available on an idle machine.
    "gb10": Machine(label="a GB10 (DGX Spark)", kind="unified", free_bytes=108 * GIB),
}
"""Machines that shipped configs are for."""


def this_machine(kind: Literal["cuda", "cpu"]) -> Machine:
    """Return the machine that runs this, with the memory that is free now.

    Args:
        kind: ``cpu``: its GPU, if any, is not used.

    Raises:
        ConfigError: neither the driver nor the system reports the memory.
    """
    found = detect_memory()
    if kind == "cpu" or found.kind == "cpu":
        return Machine(label="a CPU", kind="cpu", free_bytes=_cpu_bytes(found))
    unified = found.kind == "unified"
    return Machine(
        label=f"one {found.name}",
        kind="unified" if unified else "cuda",
        free_bytes=found.free_bytes,
    )


def _cpu_bytes(found: DeviceMemory) -> int:
    """The system's memory, whatever a GPU has."""
    return found.free_bytes if found.kind != "cuda" else available_bytes()
