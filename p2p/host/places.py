"""Who keeps a place when all are taken: fair by the part of the network. No I/O.

Purpose
-------
Ids cost nothing, so somebody with one machine can complete as many handshakes as there are
places, and keep everybody else out. Addresses cost more: places are shared out by them.

Rules
-----
- A peer counts for its address and for its network: a public IPv4 address and the 256 round
  it; an IPv6 network of 64 bits (one machine has all of its addresses) and the site of 48. An
  address on loopback or in a private range is its own network, with a larger share: whole
  clusters run on one machine, or come through one.
- No address has more than its share of all places, no network more than its own share.
- When all places are taken, a newcomer gets one of the network that has most, and there of the
  address that has most, if that has at least two more than the newcomer's has.
- Who makes room: first whoever has proved least (`Standing`), then whoever has been silent
  for longest. Never somebody with a live transfer.
- Where nobody has more than the newcomer's network, or that has its share, only a stranger
  who has said nothing for `IDLE_GRACE_S` makes room, of the same network. So nobody is
  pushed out by a neighbour who keeps coming back.

What it does not do: say who is a stranger and who transfers (it asks), or close anything
but by calling `leave`.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

SHARE_OF_ADDRESS = 8
"""A public address has at most such a part of all places: an office, a school."""

SHARE_OF_NETWORK = 4
"""A public network has at most such a part."""

SHARE_NEARBY = 0.75
"""An address on loopback or in a private range has at most so much of them."""

IDLE_GRACE_S = 10.0
"""A stranger that has been silent for less does not make room for its like, in seconds."""


class Standing(IntEnum):
    """What is known of a peer, from least to most."""

    STRANGER = 0
    NEIGHBOUR = 1
    PROVED = 2
    BUSY = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a peer comes from."""

    network: str
    address: str
    is_nearby: bool


def origin_of(host: str) -> Origin:
    """Return where an IP address belongs; of anything else, the text itself."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return Origin(host, host, is_nearby=False)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback or address.is_private:
        return Origin(str(address), str(address), is_nearby=True)
    wide, narrow = (24, 32) if address.version == 4 else (48, 64)
    network, own = (
        str(ipaddress.ip_network((address, bits), strict=False)) for bits in (wide, narrow)
    )
    return Origin(network, own, is_nearby=False)


@dataclass(slots=True)
class _Place:
    peer: str
    origin: Origin
    leave: Callable[[], None]
    heard_at: float


class Places:
    """A bounded number of places for peers.

    Parameters
    ----------
    size : int
        How many there are.
    standing : callable
        Tells what is known of a peer.

    Attributes
    ----------
    displaced, refused : int
        Peers that had to make room so far, and those that got no place.
    """

    def __init__(self, size: int, standing: Callable[[str], Standing]) -> None:
        self._size = size
        self._standing = standing
        self._places: dict[int, _Place] = {}
        self._numbers: dict[str, set[int]] = {}
        self._of_network: Counter[str] = Counter()
        self._of_address: Counter[str] = Counter()
        self._last = 0
        self.displaced = self.refused = 0

    def __len__(self) -> int:
        return len(self._places)

    def may_enter(self, host: str, now: float, others: int = 0) -> bool:
        """Tell whether there would be a place for somebody at an address.

        Parameters
        ----------
        host : str
            The IP address.
        now : float
            The time, in seconds.
        others : int
            Places taken by somebody who does not have to make room.
        """
        origin = origin_of(host)
        return not self._is_full_for(origin, others) or self._who_goes(origin, now) is not None

    def enter(
        self, peer: str, host: str, now: float, leave: Callable[[], None], others: int = 0
    ) -> int | None:
        """Give a peer a place; None if there is none.

        Parameters
        ----------
        peer : str
            Its id.
        host : str
            The IP address at which it is seen.
        now : float
            The time, in seconds.
        leave : callable
            Called when the peer has to make room.
        others : int
            Places taken by somebody who does not have to make room.

        Returns
        -------
        int or None
            Its number, for `left`.
        """
        origin = origin_of(host)
        if self._is_full_for(origin, others):
            loser = self._who_goes(origin, now)
            if loser is None:
                self.refused += 1
                return None
            place = self._places[loser]
            self.left(loser)
            self.displaced += 1
            place.leave()
        self._last += 1
        self._places[self._last] = _Place(peer, origin, leave, now)
        self._numbers.setdefault(peer, set()).add(self._last)
        self._of_network[origin.network] += 1
        self._of_address[origin.address] += 1
        return self._last

    def heard(self, peer: str, now: float) -> None:
        """Note that a peer has said something."""
        for number in self._numbers.get(peer, ()):
            self._places[number].heard_at = now

    def left(self, number: int) -> None:
        """Note that a place is free again."""
        place = self._places.pop(number, None)
        if place is None:
            return
        numbers = self._numbers[place.peer]
        numbers.discard(number)
        if not numbers:
            del self._numbers[place.peer]
        for counter, name in (
            (self._of_network, place.origin.network),
            (self._of_address, place.origin.address),
        ):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]

    # ---- who makes room

    def _has_its_share(self, origin: Origin) -> bool:
        if origin.is_nearby:
            return self._of_address[origin.address] >= max(1, int(self._size * SHARE_NEARBY))
        return self._of_address[origin.address] >= max(1, self._size // SHARE_OF_ADDRESS) or (
            self._of_network[origin.network] >= max(1, self._size // SHARE_OF_NETWORK)
        )

    def _is_full_for(self, origin: Origin, others: int) -> bool:
        return len(self._places) + others >= self._size or self._has_its_share(origin)

    def _who_goes(self, mine: Origin, now: float) -> int | None:
        """Return the number of whoever makes room for a newcomer, None if nobody does."""
        if not self._has_its_share(mine):
            for network, count in self._of_network.most_common():
                if network == mine.network:
                    continue
                if count < self._of_network[mine.network] + 2:
                    break
                loser = self._least(self._richest_of(network), now, Standing.PROVED, 0.0)
                if loser is not None:
                    return loser
        ours = [
            (number, place)
            for number, place in self._places.items()
            if place.origin.network == mine.network
        ]
        return self._least(ours, now, Standing.STRANGER, IDLE_GRACE_S)

    def _richest_of(self, network: str) -> list[tuple[int, _Place]]:
        """Return the places of the address that has most of a network's."""
        places = [each for each in self._places.items() if each[1].origin.network == network]
        of_address = Counter(place.origin.address for _, place in places)
        richest = of_address.most_common(1)[0][0]
        return [each for each in places if each[1].origin.address == richest]

    def _least(
        self, places: Iterable[tuple[int, _Place]], now: float, most: Standing, silent_s: float
    ) -> int | None:
        """Return who has proved least and was silent for longest, of at most a standing."""
        eligible = [
            (standing, place.heard_at, number)
            for number, place in places
            if now - place.heard_at >= silent_s and (standing := self._standing(place.peer)) <= most
        ]
        return min(eligible)[2] if eligible else None
