// Models: a manifest as docs/format.md describes it, and fetching what it names.

import { createHash } from 'node:crypto'
import { decode, encode } from '@msgpack/msgpack'
import { CHUNK_BYTES, assertDigest, concat, hex } from './bytes.mjs'

/** Reads a manifest whose digest is checked already: { objects, files }. */
export function manifestOf (bytes) {
  const fields = decode(bytes)
  if (hex(encode(fields)) !== hex(bytes)) throw new Error('another encoding than the one allowed')
  const [version, objects, files] = fields
  if (version !== 1) throw new Error(`a manifest of version ${version}`)
  return {
    objects: objects.map(([digest, size, chunkList]) => ({ digest, size, chunkList })),
    files: files.map(([path, size, format, parts, tensors]) =>
      ({ path, size, format, parts, tensors }))
  }
}

/** The digest of each chunk, by way of the chunk list that the manifest names. */
async function chunkDigests (control, { digest, size, chunkList }) {
  if (size <= CHUNK_BYTES) return [digest]
  const list = await control.blob(chunkList)
  const count = Math.ceil(size / CHUNK_BYTES)
  if (list === null || list.length !== 32 * count) throw new Error('no such chunk list')
  return Array.from({ length: count }, (_, i) => list.slice(32 * i, 32 * (i + 1)))
}

/** Fetches a model from one peer and proves all of it; the SHA-256 of each file, by path. */
export async function fetchModel (control, bulk, id) {
  const manifestBytes = await control.blob(id)
  if (manifestBytes === null) throw new Error('the peer does not have this model')
  const manifest = manifestOf(manifestBytes)
  const bytesOf = []
  for (const object of manifest.objects) {
    const chunks = []
    for (const [index, digest] of (await chunkDigests(control, object)).entries()) {
      if (object.size > 0) chunks.push(await bulk.chunk(object.digest, object.size, index, digest))
    }
    const whole = concat(chunks)
    assertDigest(whole, object.digest, 'an object')
    bytesOf.push(whole)
  }
  return Object.fromEntries(manifest.files.map(({ path, parts }) => {
    const file = concat(parts.map((part) => bytesOf[part]))
    return [path, createHash('sha256').update(file).digest('hex')]
  }))
}
