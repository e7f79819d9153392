// Bytes: hexadecimal, BLAKE3, CIDs, and reading a libp2p stream by count.

import { blake3 } from '@noble/hashes/blake3.js'
import { CID } from 'multiformats/cid'
import { base32 } from 'multiformats/bases/base32'
import * as Digest from 'multiformats/hashes/digest'

export const CHUNK_BYTES = 1 << 20
export const RAW_CODEC = 0x55
export const MODEL_CODEC = 0x0201 // messagepack
export const BLAKE3_CODE = 0x1e

export const hex = (bytes) => Buffer.from(bytes).toString('hex')
export const unhex = (text) => new Uint8Array(Buffer.from(text, 'hex'))
export const digestOf = (bytes) => blake3(bytes)

/** The CID of a digest; its multihash is the key on the DHT. */
export const cidOf = (digest, codec = RAW_CODEC) =>
  CID.createV1(codec, Digest.create(BLAKE3_CODE, digest))

export const textOf = (cid) => cid.toString(base32)

export function concat (parts) {
  return new Uint8Array(Buffer.concat(parts))
}

export function assertDigest (bytes, digest, what) {
  if (hex(digestOf(bytes)) !== hex(digest)) {
    throw new Error(`the bytes of ${what} do not have the digest ${hex(digest)}`)
  }
}

/** Reads a stream exactly as far as it is told to, each read with a deadline. */
export class Reader {
  #pieces
  #buffer = new Uint8Array(0)
  #timeoutMs

  constructor (stream, timeoutMs = 10_000) {
    this.#pieces = stream[Symbol.asyncIterator]()
    this.#timeoutMs = timeoutMs
  }

  async #more () {
    let timer
    const late = new Promise((_resolve, reject) => {
      timer = setTimeout(() => reject(new Error('no byte came in time')), this.#timeoutMs)
    })
    const { done, value } = await Promise.race([this.#pieces.next(), late])
    clearTimeout(timer)
    if (done === true) throw new Error('the stream ended early')
    this.#buffer = concat([this.#buffer, value.subarray()])
  }

  async exactly (count) {
    while (this.#buffer.length < count) await this.#more()
    const taken = this.#buffer.slice(0, count)
    this.#buffer = this.#buffer.subarray(count)
    return taken
  }

  /** Text up to and with `mark`, at most `maxBytes` long. */
  async until (mark, maxBytes) {
    for (;;) {
      const end = Buffer.from(this.#buffer).indexOf(mark)
      if (end >= 0) return Buffer.from(await this.exactly(end + mark.length)).toString('latin1')
      if (this.#buffer.length > maxBytes) throw new Error(`no end of the head in ${maxBytes} bytes`)
      await this.#more()
    }
  }
}
