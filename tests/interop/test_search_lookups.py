"""How many look-ups a fetch needs, and whom it tries when many say they have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trio
import trio.testing
from safetensors.numpy import save_file

from tensorswarm.p2p.dht.search import MAX_REDIAL_AFTER_S, REDIAL_AFTER_S, Search
from tensorswarm.p2p.host.addresses import PeerAddress
from tensorswarm.p2p.node import Node
from tensorswarm.store.cid import model_cid
from tensorswarm.store.errors import NoSource
from tensorswarm.store.ingest import add_paths
from tensorswarm.store.store import Store
from tests.support.events import until_dht
from tests.support.hosts import HERE, NOBODY

MIB = 1 << 20
MAX_LOOK_UPS = 5


def model(path: Path, **tensors: int) -> Path:
    """Write a model of 2 MiB tensors, each made from its seed."""
    rows = {
        name: np.random.default_rng(seed).integers(0, 256, 2 * MIB, dtype=np.uint8)
        for name, seed in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(rows, path)
    return path


def test_a_fine_tune_finds_its_base_in_a_handful_of_look_ups(tmp_path: Path) -> None:
    base = model(tmp_path / "base.safetensors", a=1, b=2, c=3, head=4)
    tuned = model(tmp_path / "tuned.safetensors", a=1, b=2, c=3, head=9)
    with Store(tmp_path / "base") as store:
        add_paths(store, [base])
    with Store(tmp_path / "whole") as store:
        tuned_id = model_cid(add_paths(store, [tuned]).manifest.digest)

    async def main() -> None:
        async with Node(tmp_path / "hub", listen=[HERE]) as hub:
            known = hub.addrs[:1]
            async with Node(tmp_path / "part", listen=[HERE], bootstrap=known) as part:
                async with Node(tmp_path / "whole", listen=[HERE], bootstrap=known) as whole:
                    await part.fetch(tuned_id, include=["head"])
                    assert whole.peer_id
                async with Node(tmp_path / "base", listen=[HERE], bootstrap=known) as holder:
                    dht = holder.discovery
                    await until_dht(dht, lambda: dht.statistics()["announced"] >= 5)
                    async with Node(
                        tmp_path / "new", listen=[HERE], bootstrap=known, server=False
                    ) as newcomer:
                        result = await newcomer.fetch(tuned_id)
                        givers = {source.id for source in result.sources if source.bytes > MIB}
                        assert givers == {part.peer_id, holder.peer_id}
                        assert newcomer.discovery.searches <= MAX_LOOK_UPS

    trio.run(main)


class NobodyThere:
    """Neighbours that cannot be met."""

    def __init__(self) -> None:
        self.dialled: list[str] = []

    def is_neighbour(self, peer_id: str) -> bool:
        return False

    async def meet(self, peer: PeerAddress) -> None:
        self.dialled.append(peer.peer_id)
        raise NoSource("nobody is there")


def test_a_round_that_was_cut_short_has_not_looked_everywhere() -> None:
    class Silent(NobodyThere):
        def all(self) -> list[object]:
            return []

        async def meet(self, peer: PeerAddress) -> None:
            if peer.addrs:
                await trio.sleep_forever()
            await super().meet(peer)

    async def main() -> None:
        refusing, silent = PeerAddress(NOBODY, ()), PeerAddress(NOBODY, ("/ip4/192.0.2.1/tcp/1",))
        for peer, is_whole in ((refusing, True), (silent, False)):
            search = Search(Silent(), None, [peer])  # type: ignore[arg-type]
            assert await search.round([]) is is_whole

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_who_cannot_be_reached_is_tried_ever_more_rarely() -> None:
    async def main() -> None:
        neighbours = NobodyThere()
        search = Search(neighbours, None, [])  # type: ignore[arg-type]
        begun = trio.current_time()
        while trio.current_time() < begun + 600:
            await search.meet(PeerAddress(NOBODY, ("/ip4/192.0.2.1/tcp/1",)))
            await trio.sleep(1)
        # After 5, 10, 20, 40, 80 s, and then every two minutes.
        assert len(neighbours.dialled) == 9
        assert MAX_REDIAL_AFTER_S > REDIAL_AFTER_S

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
