// Has js-libp2p's DHT server keep records under multihashes other than SHA-256.
//
// The key of a provider record is a multihash. js-libp2p's server (@libp2p/kad-dht 16.4.5) reads it
// with CID.decode, which takes a bare multihash for a CIDv0 and so takes SHA-256 only; at
// any other it resets the stream. Its client has no such limit. To be called once, before
// the node is made.

import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'
import { BLAKE3_CODE, RAW_CODEC } from './bytes.mjs'

const MULTIHASH_BYTES = 34

export function takeBlake3Keys () {
  const decode = CID.decode
  CID.decode = (bytes) =>
    bytes[0] === BLAKE3_CODE && bytes.length === MULTIHASH_BYTES
      ? CID.createV1(RAW_CODEC, Digest.decode(bytes))
      : decode(bytes)
}
