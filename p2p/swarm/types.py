"""The planner's vocabulary: limits, actions and statistics.

Plain data only. `tensorswarm.p2p.swarm.planner` gives all of it again under its own
name, so that a caller imports from one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from tensorswarm.store.digest import CHUNK_SIZE

from .source import Failure, Request

Priority: TypeAlias = int
"""How urgent an object is: 0 is normal, a lower number comes first."""

LIMITED_SOURCES = 16
"""Sources that our own limit may slow down together before one of them counts as slow."""


class SourceKind(Enum):
    """What a source is: another node, or an HTTP server with the model's files."""

    PEER = "peer"
    ORIGIN = "origin"


@dataclass(frozen=True, slots=True)
class PlannerLimits:
    """Every number that bounds or steers the planner, with its reason."""

    max_request_chunks: int = 16
    """Chunks' worth of bytes in one request: from 4 MiB on, a bigger one is not faster."""
    max_request_spans: int = 1024
    """Spans in one request, for models of many small tensors: bounds its encoding."""
    max_requests_per_source: int = 4
    """Requests open at one source: 64 MiB of work, more only delays a change of mind."""
    min_requests_per_source: int = 2
    """Requests open at one source at least, so that its pipe never runs dry."""
    queue_s: float = 1.0
    """Seconds of work queued at one source: above any round trip, short to wait out."""
    stall_s: float = 3.0
    """Silence after which a source is dropped; with it a stopped peer is out within 5 s."""
    max_stall_doublings: int = 3
    """A source that stalled before may take 2, 4, 8 times as long to its first byte: a
    cold origin that needs 4 s to answer must not be dropped and asked again for ever."""
    slow_chunk_s: float = 20.0
    """Longest time for one chunk (52 kB/s) when somebody else could give it."""
    max_copies: int = 2
    """Copies of one chunk in flight: a third would only add waste."""
    copy_gain: float = 0.8
    """A copy is worth its bytes when it should arrive in this part of the wait."""
    max_copy_chunks: int = 4
    """Chunks in a request for copies: a small one becomes useless as a whole, and only
    then can it be cancelled."""
    max_copy_owners: int = 16
    """How many of the latest sources are looked at for chunks to copy, per request."""
    unknown_wait_s: float = 0.5
    """What an untried source is supposed to need for a chunk."""
    min_relook_s: float = 0.02
    """A source without work looks again after a chunk's time, but not sooner than this:
    bounds the work of many idle sources."""
    max_relook_s: float = 0.25
    """A source without work looks again after this time at the latest."""
    sample_blocks: int = 16
    """Blocks of 256 chunks compared for rarity per request: exact up to 4,096 chunks;
    beyond, a rare block is found within the first 0.5 % of the download."""
    max_sources: int = 256
    """Sources at one time: rarity is counted over them, and each costs a bitmap."""
    max_past_sources: int = 1024
    """Names remembered after they left, liars longest: bounds the memory of churn."""
    max_empty_answers: int = 3
    """Requests in a row that a source may call done without bringing a chunk of them. One
    can be honest (somebody else just brought it); from the third on it lacks the chunk."""
    max_refused_chunks: int = 256
    """Wrong chunks that an origin may send before it is dropped like a lying peer."""
    random_first_chunks: int = 4
    """In a crowd, chunks taken at random before rarity counts: whoever has nothing should
    soon have something to give, and what is rare is asked for by all."""
    crowd_requests: int = 1
    """In a crowd, requests open at one source: others fill its uplink meanwhile, and a
    chunk that waits in a queue cannot be asked for elsewhere."""
    crowd_sources: int = 4
    """With fewer sources than this a crowd is none, and `min_requests_per_source` are
    open at each, so that no pipe runs dry."""
    max_offers: int = 4
    """Offers of one source that wait to be looked at; the oldest are forgotten."""
    offer_patience_s: float = 2.0
    """Who makes offers is asked without one when nothing is in flight, and nothing came
    from anybody for so long: it may have taken us for served."""
    crowd_queue_s: float = 0.1
    """In a crowd, seconds of work in one request: what is whole can be passed on."""
    origin_ahead: float = 0.75
    """In a crowd, part of the time of the last request after which the next is asked for: a
    quarter of what a chunk takes is longer than a round trip, unless the line is very long."""
    duty_members: int = 4
    """Members of a crowd that fetch from the origin at one time: two keep its uplink busy
    over any round trip, and the others make up for those that are slow or gone."""
    duty_first: int = 2
    """Members that ask the origin before anything has come: with four the first chunk would
    take twice as long, and all others wait for it."""
    duty_stagger_s: float = 0.1
    """And so much later each than the one before: with its whole uplink for one of them the
    origin gives the first chunk in half the time."""
    duty_patience_s: float = 1.0
    """A member that gets nothing for so long, and hears of nothing new, asks the origin
    though it is not on duty."""
    duty_growth: float = 1.5
    """So many times as long with each rank: when an origin is so weak that a chunk takes
    seconds, a few more members try, and not all of them."""
    duty_longest_s: float = 30.0
    """Longest patience of a member, whatever its rank."""
    duty_gain: float = 4.0
    """An origin so many times as fast as all peers together is asked freely."""
    duty_trial_s: float = 5.0
    """Not before the peers have had so long to show what they give."""
    duty_trial_chunks: int = 20
    """Nor before so many chunks have come, most of them from the origin: where a chunk
    takes seconds, no time is long enough to judge by."""
    duty_memory_s: float = 2.0
    """Time over which the speed of the peers is averaged for that."""
    near_first: bool = False
    """Whether farther sources are spared while nearer ones give enough (`nearness`)."""
    near_trial_s: float = 3.0
    """Time that the nearer ones have to show what they give: as long as a silent one."""
    near_least_bytes_per_s: float = 1e6
    """Less than this from all of them together is too dear in time: a 7B model in 4 bits
    (4 GB) takes more than an hour."""
    max_chunks: int = 1 << 24
    """Chunks in one download (16 TiB): bounds what a manifest can make us allocate."""
    max_priorities: int = 256
    """Different priorities told apart; the least urgent ones beyond count as equal."""

    def slowed_to(self, bytes_per_s: float) -> PlannerLimits:
        """Return these limits for a download that is held below a rate by its own limit.

        What that slows down is no source's fault, and near enough is what the limit allows.
        """
        chunk_s = CHUNK_SIZE / bytes_per_s
        return replace(
            self,
            slow_chunk_s=self.slow_chunk_s + LIMITED_SOURCES * chunk_s,
            # A second source shares the limit with the first: its copy slows the original.
            unknown_wait_s=self.unknown_wait_s + 2 * chunk_s,
            copy_gain=self.copy_gain / 2,
            near_least_bytes_per_s=min(self.near_least_bytes_per_s, bytes_per_s / 2),
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """Hand this request to its source's worker."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nothing of this request is wanted any more; the planner has forgotten it."""

    source: str
    request_id: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The planner has removed this source: close its worker."""

    source: str
    failure: Failure
    detail: str


@dataclass(frozen=True, slots=True)
class PassOn:
    """Tell this source that its offer is not taken up."""

    source: str
    object_index: int


Action: TypeAlias = Ask | Cancel | Drop | PassOn


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """What one source did, summed over all the times it was here.

    Attributes
    ----------
    source : str
        Its name.
    kind : SourceKind
        Peer or origin.
    proved_bytes : int
        Bytes of chunks that nobody had given before and that matched their hash.
    duplicate_bytes : int
        Bytes of chunks that were there already: wasted.
    refused_bytes : int
        Bytes of chunks that did not match their hash.
    rate_bytes_per_s : float or None
        Estimated speed; None until its first chunk.
    in_flight_requests, in_flight_bytes : int
        Asked of it and still to come.
    is_present : bool
        Whether it can be asked now.
    dropped : Failure or None
        Why the planner dropped it, if it did and it has not come back.
    """

    source: str
    kind: SourceKind
    proved_bytes: int
    duplicate_bytes: int
    refused_bytes: int
    rate_bytes_per_s: float | None
    in_flight_requests: int
    in_flight_bytes: int
    is_present: bool
    dropped: Failure | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """The sums of a download, and its sources in the order they first came.

    The sums also count what came from nobody's name and from names forgotten.
    """

    proved_bytes: int
    duplicate_bytes: int
    refused_bytes: int
    sources: tuple[SourceStatistics, ...]
