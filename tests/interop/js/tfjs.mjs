// Models written and read by TensorFlow.js itself, for tests/support/tfjs_library.py.
//
//     node tfjs.mjs write TABLE DATA FOLDER   tensors in DATA, listed in TABLE, become a model
//     node tfjs.mjs read FOLDER TABLE DATA    and the way back
//
// TABLE is JSON: name, dtype, shape, and the size in bytes of each tensor, in the order in
// which they lie in DATA. The library saves and loads models over HTTP; what would be
// requests are files here, so that every byte of model.json and of the weights is its own.
import { readFile, writeFile } from 'node:fs/promises'
import path from 'node:path'

console.warn = () => {} // an advice to install a faster backend
const tf = await import('@tensorflow/tfjs-core')
await import('@tensorflow/tfjs-backend-cpu')

const ARRAYS = { float32: Float32Array, int32: Int32Array, bool: Uint8Array }

async function write (table, data, folder) {
  const bytes = await readFile(data)
  const tensors = []
  let start = 0
  for (const { name, dtype, shape, size } of JSON.parse(await readFile(table, 'utf8'))) {
    const copy = new Uint8Array(bytes.subarray(start, start + size)).buffer
    tensors.push({ name, tensor: tf.tensor(new ARRAYS[dtype](copy), shape, dtype) })
    start += size
  }
  const { data: weightData, specs: weightSpecs } = await tf.io.encodeWeights(tensors)
  const saveParts = async (url, { body }) => {
    for (const part of body.values()) {
      await writeFile(path.join(folder, part.name), new Uint8Array(await part.arrayBuffer()))
    }
    return new Response(null, { status: 200 })
  }
  await tf.io.http('http://localhost/', { fetchFunc: saveParts }).save({
    modelTopology: { node: [] }, format: 'graph-model', weightSpecs, weightData
  })
}

async function read (folder, table, data) {
  const fetchFunc = async url => {
    const type = url.endsWith('.json') ? 'application/json' : 'application/octet-stream'
    const name = decodeURIComponent(url.slice(url.lastIndexOf('/') + 1))
    return new Response(await readFile(path.join(folder, name)), {
      headers: { 'content-type': type }
    })
  }
  const found = await tf.io.http('http://localhost/model.json', { fetchFunc }).load()
  const tensors = tf.io.decodeWeights(found.weightData, found.weightSpecs)
  const rows = []
  const parts = []
  for (const [name, tensor] of Object.entries(tensors)) {
    const values = await tensor.data()
    const part = Buffer.from(values.buffer, values.byteOffset, values.byteLength)
    rows.push({ name, dtype: tensor.dtype, shape: tensor.shape, size: part.length })
    parts.push(part)
  }
  await writeFile(table, JSON.stringify(rows))
  await writeFile(data, Buffer.concat(parts))
}

const [action, ...rest] = process.argv.slice(2)
await { write, read }[action](...rest)
