"""A DNS server on loopback that answers TXT questions from a table."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class DnsServer:
    """Use as ``with DnsServer({name: [text, …]}) as server``; it listens on UDP.

    Attributes
    ----------
    port : int
        Where, on 127.0.0.1.
    asked : list of str
        The names asked for, in order.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self._texts = {name.lower(): list(each) for name, each in texts.items()}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> DnsServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            data, who = self._socket.recvfrom(4096)
            if not data:
                return
            question = dns.message.from_wire(data)
            name = question.question[0].name.to_text().rstrip(".").lower()
            self.asked.append(name)
            answer = dns.message.make_response(question)
            texts = self._texts.get(name)
            if texts is None:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            else:
                quoted = [f'"{text}"' for text in texts]
                answer.answer.append(dns.rrset.from_text(f"{name}.", 60, "IN", "TXT", *quoted))
            self._socket.sendto(answer.to_wire(), who)
