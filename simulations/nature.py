"""What a simulated node is like: its line, its times, and whether it is honest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Nature:
    """What a node is like.

    Attributes
    ----------
    uplink_bytes_per_s, downlink_bytes_per_s : float
        Its line.
    starts_at, leaves_at : float
        When it is there.
    is_liar : bool
        Whether it claims to have everything and sends wrong bytes.
    is_staller : bool
        Whether it claims to have everything and never answers.
    is_behind_nat : bool
        Whether it can only be reached by those it dialled itself.
    has_everything : bool
        Whether it is a seed.
    stays_s : float
        How long it stays after it has finished.
    wants : int or None
        The chunks it wants, as a set of bits; None for all. Who wants the same shares
        origin duty.
    """

    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    starts_at: float = 0.0
    leaves_at: float = float("inf")
    is_liar: bool = False
    is_staller: bool = False
    is_behind_nat: bool = False
    has_everything: bool = False
    stays_s: float = float("inf")
    wants: int | None = None

    @property
    def is_honest(self) -> bool:
        """Whether it does what it says."""
        return not (self.is_liar or self.is_staller)
