// The protocol /tensorswarm/1 as a client speaks it, written from docs/protocol.md.
//
// A message is the array that docs/protocol.md describes, [kind, field, ...].

import { decode, encode } from '@msgpack/msgpack'
import { CHUNK_BYTES, Reader, assertDigest, concat, hex } from './bytes.mjs'

export const PROTOCOL = '/tensorswarm/1'
export const MAX_FRAME_BYTES = 1 << 20
export const KIND = {
  hello: 1,
  bye: 2,
  refusal: 3,
  want: 4,
  have: 5,
  unwant: 6,
  getBlobs: 7,
  blobs: 8,
  getChunkList: 9,
  chunkListIs: 10,
  getPeers: 11,
  peers: 12,
  wantModel: 15,
  haveModel: 16
}
const MAX_BLOB_BYTES = 64 << 20

export function frameOf (message) {
  const body = encode(message)
  if (body.length > MAX_FRAME_BYTES) throw new Error('the frame is too long')
  const length = new Uint8Array(4)
  new DataView(length.buffer).setUint32(0, body.length)
  return concat([length, body])
}

export function messageOf (body) {
  const message = decode(body, { useBigInt64: true })
  if (!Array.isArray(message) || message.length === 0) throw new Error('no message')
  return message
}

/** A control stream, from our hello to our bye. */
export class Control {
  #stream
  #reader
  #lastId = 0

  constructor (stream) {
    this.#stream = stream
    this.#reader = new Reader(stream)
  }

  /** Opens the stream and says hello; `peerHello` is what came back. */
  static async open (node, peer, { agent = 'tensorswarm-js-test/1', bulk = [], addrs = [] } = {}) {
    const control = new Control(await node.dialProtocol(peer, PROTOCOL))
    control.#send([KIND.hello, 1, agent, bulk, addrs, []])
    const [kind, version, peerAgent, peerBulk, peerAddrs, features] = await control.#receive()
    if (kind !== KIND.hello) throw new Error(`message ${kind} came instead of hello`)
    control.peerHello = { version, agent: peerAgent, bulk: peerBulk, addrs: peerAddrs, features }
    return control
  }

  #send (message) {
    this.#stream.send(frameOf(message))
  }

  async #receive () {
    const head = await this.#reader.exactly(4)
    const length = new DataView(head.buffer).getUint32(0)
    if (length > MAX_FRAME_BYTES) throw new Error(`a frame of ${length} bytes`)
    return messageOf(await this.#reader.exactly(length))
  }

  /** Asks, and gives each frame of the answer; others (news, unknown kinds) are passed over. */
  async * #ask (kind, answerKind, ...fields) {
    const id = ++this.#lastId
    this.#send([kind, id, ...fields])
    for (;;) {
      const [got, gotId, ...rest] = await this.#receive()
      if (got === KIND.bye) throw new Error(`the peer left: ${rest[0]}`)
      if (gotId !== id) continue
      if (got === KIND.refusal) throw new Error(`refused with code ${rest[0]}: ${rest[1]}`)
      if (got !== answerKind) throw new Error(`message ${got} answers a request of kind ${kind}`)
      yield rest
      if (typeof rest.at(-1) !== 'boolean' || rest.at(-1)) return
    }
  }

  /** What the peer holds of these digests: [{ digest, size, bitmap, chunkList }]. */
  async want (digests) {
    const found = []
    for await (const [entries] of this.#ask(KIND.want, KIND.have, digests)) {
      for (const [digest, size, bitmap, chunkList] of entries) {
        found.push({ digest, size, bitmap, chunkList })
      }
    }
    return found
  }

  /** Indices, in the manifest, of a model's first `count` objects that the peer holds whole. */
  async wantModel (model, count) {
    const whole = []
    for await (const [of, runs] of this.#ask(KIND.wantModel, KIND.haveModel, model, [0, count])) {
      if (hex(of) !== hex(model)) throw new Error('an answer about another model')
      for (let i = 0; i < runs.length; i += 2) {
        for (let index = runs[i]; index < runs[i] + runs[i + 1]; index++) whole.push(index)
      }
    }
    return whole
  }

  /** A blob, checked; null when the peer does not hold it. */
  async blob (digest, maxBytes = MAX_BLOB_BYTES) {
    const parts = []
    let have = 0
    let size = null
    for await (const [pieces] of this.#ask(KIND.getBlobs, KIND.blobs, [[digest, 0]])) {
      for (const [of, wholeSize, offset, data] of pieces) {
        if (hex(of) !== hex(digest) || offset !== have || have + data.length > maxBytes) {
          throw new Error('a piece that was not asked for')
        }
        parts.push(data)
        have += data.length
        size = wholeSize
      }
    }
    if (size === null) return null
    const bytes = concat(parts)
    assertDigest(bytes, digest, 'the blob')
    return bytes
  }

  /** Size and chunk digests of an object. A hint, until the whole object was hashed. */
  async chunkDigests (object) {
    for await (const [, size, listDigest] of this.#ask(
      KIND.getChunkList, KIND.chunkListIs, object
    )) {
      if (size < 0) return null
      if (size <= CHUNK_BYTES) return { size, chunks: [object] }
      const list = await this.blob(listDigest)
      const count = Math.ceil(Number(size) / CHUNK_BYTES)
      if (list === null || list.length !== 32 * count) throw new Error('no such chunk list')
      const chunks = Array.from({ length: count }, (_, i) => list.slice(32 * i, 32 * (i + 1)))
      return { size: Number(size), chunks }
    }
    throw new Error('no answer')
  }

  async close () {
    this.#send([KIND.bye, 0, 'done'])
    await this.#stream.close()
  }
}
