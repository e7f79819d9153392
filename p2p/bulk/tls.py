"""Who is at the other end of a bulk connection: TLS 1.3 with libp2p certificates.

Purpose: give the bulk plane the two TLS contexts of one identity, and read the
peer id out of the certificate that the other side presented.

Rules
- The certificates are those of the libp2p TLS specification
  (https://github.com/libp2p/specs/blob/master/tls/tls.md): self-signed, made anew
  for every process, with an extension in which the peer's own key signs the
  certificate's key. No certificate authority is asked, so OpenSSL checks only that
  the other side holds the certificate's key; whom it belongs to is decided here.
- Both sides present one. A handshake therefore proves nothing until
  `peer_id_of` has returned.
- No session tickets: every connection proves its identity anew.

Not here: which peer ids are allowed in. That is the caller's rule.
"""

from __future__ import annotations

import ssl

from cryptography import x509
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID
from libp2p.security.tls.certificate import verify_certificate_chain
from libp2p.security.tls.transport import TLSTransport

from tensorswarm.store.errors import ProtocolError

APPLICATION_PROTOCOL = "http/1.1"
"""Protocol named in the handshake (ALPN). Not ``libp2p``: no libp2p stream follows."""


CLEAR_PROTOCOL = "tensorswarm-clear/1"
"""Named as well by who would leave TLS after the handshake; see `bulk.clear`."""


class BulkIdentity:
    """The TLS contexts of one key pair, made once and shared by all connections.

    Parameters
    ----------
    key_pair : KeyPair
        The node's libp2p key pair.
    may_clear : bool, optional
        Whether connections within this machine, or within the private network, may leave
        TLS after the handshake.
    network_key : bytes, optional
        Of the private network that the node belongs to.

    Attributes
    ----------
    peer_id : str
        Peer id of the key pair, in base58.
    server_context : ssl.SSLContext
        For the accepting side. Asks for the client's certificate.
    client_context : ssl.SSLContext
        For the connecting side. Presents the same certificate.
    may_clear, network_key
        As given.
    clear_server_context, clear_client_context : ssl.SSLContext
        The same, naming `CLEAR_PROTOCOL` before the usual one.
    """

    def __init__(
        self, key_pair: KeyPair, *, may_clear: bool = False, network_key: bytes | None = None
    ) -> None:
        self.peer_id = str(ID.from_pubkey(key_pair.public_key))
        transport = TLSTransport(key_pair)
        usual, clear = [APPLICATION_PROTOCOL], [CLEAR_PROTOCOL, APPLICATION_PROTOCOL]
        self.server_context = _context(transport, usual, server_side=True)
        self.client_context = _context(transport, usual, server_side=False)
        self.may_clear = may_clear
        self.network_key = network_key
        self.clear_server_context = _context(transport, clear, server_side=True)
        self.clear_client_context = _context(transport, clear, server_side=False)


def _context(transport: TLSTransport, protocols: list[str], *, server_side: bool) -> ssl.SSLContext:
    context = transport.create_ssl_context(server_side=server_side)
    context.set_alpn_protocols(protocols)
    if server_side:
        context.num_tickets = 0
    return context


def peer_id_of(sock: ssl.SSLSocket) -> str:
    """Return the peer id that the other side proved in the handshake.

    Parameters
    ----------
    sock : ssl.SSLSocket
        A socket whose handshake is complete.

    Returns
    -------
    str
        The peer id in base58, as libp2p writes it.

    Raises
    ------
    ProtocolError
        There was no certificate, or it does not prove a libp2p identity.
    """
    encoded = sock.getpeercert(binary_form=True)
    if not encoded:
        raise ProtocolError("presented no certificate")
    try:
        public_key = verify_certificate_chain([x509.load_der_x509_certificate(encoded)])
        return str(ID.from_pubkey(public_key))
    except Exception as error:  # two libraries raise many kinds; all mean "not proved"
        raise ProtocolError(
            f"presented a certificate without a libp2p identity: {error}"
        ) from error
