// The bulk plane over a libp2p stream: HTTP/1.1 range requests, as docs/protocol.md has it.
// The peer answers whoever has a control stream with it, so keep one open meanwhile.

import { CHUNK_BYTES, Reader, assertDigest, hex } from './bytes.mjs'

export const PROTOCOL = '/tensorswarm/bulk/1'
const MAX_HEAD_BYTES = 8192

export class Bulk {
  #stream
  #reader

  constructor (stream) {
    this.#stream = stream
    this.#reader = new Reader(stream)
  }

  static async open (node, peer) {
    return new Bulk(await node.dialProtocol(peer, PROTOCOL))
  }

  /** The bytes `first` to `last`, both included, of an object; not checked. */
  async range (object, first, last) {
    this.#stream.send(new TextEncoder().encode(
      `GET /tensor/${hex(object)} HTTP/1.1\r\nHost: peer\r\nRange: bytes=${first}-${last}\r\n\r\n`
    ))
    const head = await this.#reader.until('\r\n\r\n', MAX_HEAD_BYTES)
    const status = Number(/^HTTP\/1\.1 (\d{3})/.exec(head)?.[1])
    if (status !== 206) throw new Error(`the peer answers with status ${status}`)
    const range = /^content-range: bytes (\d+)-(\d+)\/(\d+)\r$/im.exec(head)
    if (Number(range?.[1]) !== first || Number(range?.[2]) !== last) {
      throw new Error('the peer answers with another range')
    }
    return await this.#reader.exactly(last - first + 1)
  }

  /** One chunk of an object of `size` bytes, checked against its digest. */
  async chunk (object, size, index, digest) {
    const first = index * CHUNK_BYTES
    const bytes = await this.range(object, first, Math.min(first + CHUNK_BYTES, size) - 1)
    assertDigest(bytes, digest, `chunk ${index}`)
    return bytes
  }

  async close () {
    await this.#stream.close()
  }
}
