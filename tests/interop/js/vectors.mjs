// Checks tests/vectors/ with this folder's own code, written from the documents:
//
//     node vectors.mjs FOLDER
//
// Prints how many of each file agreed, as JSON; ends with an error at the first that does not.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { peerIdFromString } from '@libp2p/peer-id'
import { requestFor, verdictOf } from './bulk.mjs'
import {
  CHUNK_BYTES, MODEL_CODEC, cidOf, concat, digestOf, hex, textOf, unhex
} from './bytes.mjs'
import { manifestOf } from './model.mjs'
import { frameOf, messageOf } from './wire.mjs'

const folder = process.argv[2]
const read = (name) => JSON.parse(readFileSync(join(folder, name), 'utf8'))

/** {"hex": ...} stands for bytes. */
function revived (value) {
  if (Array.isArray(value)) return value.map(revived)
  return value?.hex === undefined ? value : unhex(value.hex)
}

/** Cuts off the fields that a newer peer added, at every depth. */
function known (got, expected) {
  if (!Array.isArray(expected)) return typeof got === 'bigint' ? Number(got) : got
  return expected.map((item, index) => known(got[index], item))
}

const bodyOf = (frame) => {
  const bytes = unhex(frame)
  assert.equal(Buffer.from(bytes).readUInt32BE(), bytes.length - 4)
  return bytes.slice(4)
}

function wire () {
  const vectors = read('wire.json')
  for (const { name, message, frame } of vectors.valid) {
    assert.equal(hex(frameOf(revived(message))), frame, name)
  }
  const readable = [...vectors.valid, ...vectors.also_valid]
  for (const { name, message, frame } of readable) {
    const expected = revived(message)
    assert.deepEqual(known(messageOf(bodyOf(frame)), expected), expected, name)
  }
  for (const { name, kind, frame } of vectors.unknown) {
    assert.equal(messageOf(bodyOf(frame))[0], kind, name)
  }
  return readable.length + vectors.unknown.length
}

/** The bytes 0, 1, 2, … 250, 0, 1, … that digests.json speaks of. */
const counting = (length) => Uint8Array.from({ length }, (_, index) => index % 251)

function digests () {
  const vectors = read('digests.json')
  for (const vector of vectors) {
    const bytes = counting(vector.length)
    const digest = digestOf(bytes)
    assert.equal(hex(digest), vector.digest)
    const chunks = []
    for (let at = 0; at < bytes.length && bytes.length > CHUNK_BYTES; at += CHUNK_BYTES) {
      chunks.push(digestOf(bytes.subarray(at, at + CHUNK_BYTES)))
    }
    assert.deepEqual(chunks.map(hex), vector.chunk_list)
    if (chunks.length > 0) assert.equal(hex(digestOf(concat(chunks))), vector.chunk_list_digest)
    assert.equal(textOf(cidOf(digest)), vector.object_cid)
    assert.equal(textOf(cidOf(digest, MODEL_CODEC)), vector.model_cid)
    assert.equal(hex(cidOf(digest).multihash.bytes), vector.dht_key)
  }
  return vectors.length
}

function manifest () {
  const vector = read('manifest.json')
  const bytes = unhex(vector.manifest)
  assert.equal(textOf(cidOf(digestOf(bytes), MODEL_CODEC)), vector.model_id)
  const { objects, files } = manifestOf(bytes)
  assert.deepEqual(files.map(({ path }) => path), Object.keys(vector.files))
  assert.equal(objects.reduce((sum, { size }) => sum + size, 0), vector.total_bytes)
  const tensors = files.flatMap((file) => file.tensors.map(([, , , object]) => object))
  const weights = [...new Set(tensors)].sort((a, b) => a - b).map((i) => objects[i].digest)
  assert.equal(hex(digestOf(concat(weights))), vector.weights_digest)
  for (const { path, parts } of files) {
    const content = contentOf(vector.files[path])
    let at = 0
    for (const part of parts) {
      const { digest, size } = objects[part]
      assert.equal(hex(digestOf(content.subarray(at, at + size))), hex(digest), path)
      at += size
    }
    assert.equal(at, content.length)
  }
  return files.length
}

/** Where a key or a binary peer id lies on the DHT. */
const pointOf = (bytes) => createHash('sha256').update(bytes).digest('hex')

function dht () {
  const { keys, peers, distance } = read('dht.json')
  for (const { digest, key, point } of keys) {
    const made = cidOf(unhex(digest)).multihash.bytes
    assert.equal(hex(made), key)
    assert.equal(pointOf(made), point)
  }
  for (const { peer_id: id, binary, point } of peers) {
    const made = peerIdFromString(id).toMultihash().bytes
    assert.equal(hex(made), binary)
    assert.equal(pointOf(made), point)
  }
  const peer = peerIdFromString(distance.peer_id).toMultihash().bytes
  const apart = BigInt(`0x${pointOf(unhex(distance.key))}`) ^ BigInt(`0x${pointOf(peer)}`)
  assert.equal(apart.toString(16).padStart(64, '0'), distance.distance)
  return keys.length + peers.length + 1
}

function bulk () {
  const { requests, answers } = read('bulk.json')
  const { digest, first, last, head } = requests[0]
  assert.equal(requestFor(unhex(digest), first, last), head)
  for (const answer of answers) {
    assert.equal(verdictOf(answer.head, answer.first, answer.last), answer.verdict, answer.name)
  }
  return answers.length + 1
}

function contentOf ({ before, text, after, counting_bytes: length }) {
  if (length !== undefined) return counting(length)
  return concat([unhex(before ?? ''), new TextEncoder().encode(text), unhex(after ?? '')])
}

console.log(JSON.stringify({
  wire: wire(), digests: digests(), manifest: manifest(), dht: dht(), bulk: bulk()
}))
