// The bulk plane over a libp2p stream: HTTP/1.1 range requests, as docs/protocol.md has it.
// The peer answers whoever has a control stream with it, so keep one open meanwhile.

import { CHUNK_BYTES, Reader, assertDigest, hex } from './bytes.mjs'

export const PROTOCOL = '/tensorswarm/bulk/1'
const MAX_HEAD_BYTES = 8192
const MAX_OBJECT_BYTES = 2 ** 44

const REFUSALS = { 403: 'denied', 404: 'lacks', 416: 'lacks', 503: 'busy' }

/** The request for the bytes `first` to `last`, both included, of an object. */
export const requestFor = (object, first, last) =>
  `GET /tensor/${hex(object)} HTTP/1.1\r\nHost: x\r\nRange: bytes=${first}-${last}\r\n\r\n`

/** What an answer's head says: content, lacks, denied, busy, or violation. */
export function verdictOf (head, first, last) {
  const [statusLine, ...lines] = head.slice(0, -4).split('\r\n')
  const fields = new Map(lines.map((line) => {
    const [name, value] = line.split(/:(.*)/s)
    return [name.toLowerCase(), value.trim()]
  }))
  const status = Number(/^HTTP\/1\.1 (\d{3}) /.exec(statusLine)?.[1])
  if (fields.has('transfer-encoding') || fields.has('content-encoding')) return 'violation'
  const length = Number(fields.get('content-length') ?? NaN)
  if (REFUSALS[status] !== undefined) return length === 0 ? REFUSALS[status] : 'violation'
  const range = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(fields.get('content-range') ?? '')
  if (status !== 206 || range === null || length !== last - first + 1) return 'violation'
  const [from, to, size] = range.slice(1).map(Number)
  const isAsked = from === first && to === last && last < size && size <= MAX_OBJECT_BYTES
  return isAsked ? 'content' : 'violation'
}

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
    this.#stream.send(new TextEncoder().encode(requestFor(object, first, last)))
    const head = await this.#reader.until('\r\n\r\n', MAX_HEAD_BYTES)
    const verdict = verdictOf(head, first, last)
    if (verdict !== 'content') throw new Error(`the peer answers: ${verdict}, ${head.slice(9, 12)}`)
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
