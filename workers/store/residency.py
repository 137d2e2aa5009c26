"""Which models are in memory and which go when room is needed. Pure: no clock, no threads, no models.

A model that nobody holds goes before one that is held; among them the one that is worth least:
``reload seconds x jobs that wait for it / bytes``, and of equals the one that was not used for longest. Pinned ones
stay. So does one that arrives, until its first use: two that do not fit together would throw each other out for ever.
A model with waiting jobs is not thrown out for one that is worth less, as long as the newcomer is patient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cortex_tasks.errors import ModelUnavailable

__all__ = ["Residency", "Resident"]


@dataclass(slots=True)
class Resident:
    """A model in memory, or one that has been promised its place."""

    alias: str
    size_bytes: int
    #: What loading it again would take.
    reload_s: float = 1.0
    pinned: bool = False
    #: Uses that have not ended.
    holds: int = 0
    used_at_s: float = 0.0
    #: Jobs that wait for it, as far as they can be seen.
    waiting: float = 0.0
    #: It is being loaded, or has only just been: nobody has used it yet.
    arriving: bool = False
    #: It goes as soon as nobody holds it, and nobody new may. Only one that is held is ever about to leave.
    leaving: bool = False

    @property
    def worth(self) -> float:
        return self.reload_s * self.waiting / max(self.size_bytes, 1)


@dataclass(slots=True)
class Residency:
    """``idle_ttl_s``: a model that nobody used for so long goes, unless it is pinned."""

    budget_bytes: int
    idle_ttl_s: float
    residents: dict[str, Resident] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        return sum(one.size_bytes for one in self.residents.values())

    def room_for(self, newcomer: Resident, *, patient: bool = True) -> list[Resident] | None:
        """Who has to go so that the newcomer fits: [] when it does already, None when it had better wait.

        ``patient``: nobody who is held, or who has waiting jobs and is worth more, goes for it. Raises
        ModelUnavailable when it does not fit beside the pinned ones, whoever goes.
        """
        others = [one for one in self.residents.values() if one.alias != newcomer.alias]
        pinned_bytes = sum(one.size_bytes for one in others if one.pinned)
        if newcomer.size_bytes > self.budget_bytes - pinned_bytes:
            raise self._too_large(newcomer, others, pinned_bytes)
        missing = sum(one.size_bytes for one in others) + newcomer.size_bytes - self.budget_bytes
        going: list[Resident] = []
        for one in sorted(others, key=lambda one: (one.holds > 0, one.worth, one.used_at_s)):
            if missing <= 0:
                break
            spared = one.holds > 0 or (one.waiting > 0 and one.worth >= newcomer.worth)
            if one.pinned or one.arriving or one.size_bytes == 0 or (spared and patient and not one.leaving):
                continue
            going.append(one)
            missing -= one.size_bytes
        return going if missing <= 0 else None

    def _too_large(self, newcomer: Resident, others: list[Resident], pinned_bytes: int) -> ModelUnavailable:
        pinned = ", ".join(one.alias for one in others if one.pinned and one.size_bytes)
        beside = f", of which pinned models ({pinned}) take {pinned_bytes / 1e6:,.1f} MB" if pinned else ""
        return ModelUnavailable(
            f"model {newcomer.alias!r} needs {newcomer.size_bytes / 1e6:,.1f} MB of memory and models may take "
            f"{self.budget_bytes / 1e6:,.1f} MB{beside}; raise model_storage.l1_memory.size and "
            "memory_config.model_cache, or serve it from another worker",
            {"model": newcomer.alias, "needed_bytes": newcomer.size_bytes, "limit_bytes": self.budget_bytes},
        )

    def idle(self, now_s: float) -> list[Resident]:
        """Who was not used for the time to live, is not held and not pinned, and has no waiting jobs."""
        return [
            one
            for one in self.residents.values()
            if not one.pinned and one.holds == 0 and not one.waiting and now_s - one.used_at_s >= self.idle_ttl_s
        ]
