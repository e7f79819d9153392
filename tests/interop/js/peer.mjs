// A js-libp2p node for tests: commands come in on standard input, answers go out.
//
//     node peer.mjs '{"dht_server": true, "stock": false}'
//
// With "stock", the DHT is as js-libp2p makes it; see dht_keys.mjs for what that lacks.
// First line out: {"peer_id", "addrs"}. Then, for each line {"do": NAME, ...} that comes
// in, one line: the answer, or {"error": text}. It ends when its input does. The commands
// are the functions below.

import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { Bulk } from './bulk.mjs'
import { cidOf, digestOf, hex, unhex } from './bytes.mjs'
import { takeBlake3Keys } from './dht_keys.mjs'
import { fetchModel } from './model.mjs'
import { Control } from './wire.mjs'

const PATIENCE_MS = 15_000

const options = JSON.parse(process.argv[2] ?? '{}')
if (options.stock !== true) takeBlake3Keys()
const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: {
    identify: identify(),
    ping: ping({ maxOutboundStreams: 8 }), // the DHT pings new nodes, too
    dht: kadDHT({
      protocol: '/ipfs/kad/1.0.0',
      clientMode: options.dht_server !== true,
      peerInfoMapper: passthroughMapper // this network has loopback addresses only
    })
  }
})

const inTime = () => ({ signal: AbortSignal.timeout(PATIENCE_MS) })
const peerOf = (command) => peerIdFromString(command.peer)

/** Waits until identify has told what a connected peer speaks. */
async function identified (peerId) {
  for (;;) {
    const known = await node.peerStore.get(peerId).catch(() => null)
    if (known !== null && known.protocols.length > 0) return known
    await new Promise((resolve, reject) => {
      const { signal } = inTime()
      signal.addEventListener('abort', () => reject(new Error('identify did not end in time')))
      node.addEventListener('peer:identify', resolve, { once: true, signal })
    })
  }
}

const commands = {
  async connect ({ addr }) {
    const connection = await node.dial(multiaddr(addr), inTime())
    const known = await identified(connection.remotePeer)
    return {
      peer_id: connection.remotePeer.toString(),
      protocols: known.protocols,
      agent: new TextDecoder().decode(known.metadata.get('AgentVersion') ?? new Uint8Array(0)),
      encryption: connection.encryption,
      muxer: connection.multiplexer
    }
  },

  async ping (command) {
    return { ms: await node.services.ping.ping(peerOf(command), inTime()) }
  },

  /** Waits until the routing table has as many nodes. */
  async dht_nodes ({ count }) {
    const { signal } = inTime()
    while (node.services.dht.routingTable.size < count) {
      signal.throwIfAborted()
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    return { nodes: node.services.dht.routingTable.size }
  },

  async provide ({ digest }) {
    await node.contentRouting.provide(cidOf(unhex(digest)), inTime())
    return {}
  },

  async find_providers ({ digest, until }) {
    const found = []
    for await (const provider of node.contentRouting.findProviders(
      cidOf(unhex(digest)), inTime()
    )) {
      found.push({ id: provider.id.toString(), addrs: provider.multiaddrs.map(String) })
      if (provider.id.toString() === until) break
    }
    return { providers: found }
  },

  async hello (command) {
    const control = await Control.open(node, peerOf(command))
    await control.close()
    return control.peerHello
  },

  /** What is said of digests in answer to a want. */
  async want (command) {
    const control = await Control.open(node, peerOf(command))
    const entries = await control.want(command.digests.map(unhex))
    await control.close()
    return {
      entries: entries.map(({ digest, size, bitmap }) => ({
        digest: hex(digest), size: Number(size), whole: bitmap === null
      }))
    }
  },

  /** Which objects of a model are held, told by its manifest. */
  async want_model (command) {
    const control = await Control.open(node, peerOf(command))
    const whole = await control.wantModel(unhex(command.model), command.count)
    await control.close()
    return { features: control.peerHello.features, whole }
  },

  /** Fetches a blob over the control stream and checks its digest. */
  async blob (command) {
    const control = await Control.open(node, peerOf(command))
    const bytes = await control.blob(unhex(command.digest))
    await control.close()
    return bytes === null ? { bytes: null } : { bytes: bytes.length, digest: hex(digestOf(bytes)) }
  },

  /** Size and chunk digests of an object that nothing but its digest is known of. */
  async chunk_digests (command) {
    const control = await Control.open(node, peerOf(command))
    const found = await control.chunkDigests(unhex(command.digest))
    await control.close()
    return found === null ? { chunks: null } : { size: found.size, chunks: found.chunks.map(hex) }
  },

  /** Fetches a chunk of an object over a bulk stream and checks its BLAKE3. */
  async chunk (command) {
    const object = unhex(command.digest)
    const control = await Control.open(node, peerOf(command))
    const { size, chunks } = await control.chunkDigests(object)
    const bulk = await Bulk.open(node, peerOf(command))
    const bytes = await bulk.chunk(object, size, command.index, chunks[command.index])
    await bulk.close()
    await control.close()
    return { bytes: bytes.length, digest: hex(digestOf(bytes)) }
  },

  /** Asks for a range over a bulk stream; without a hello before, unless told otherwise. */
  async range (command) {
    const control = command.hello === true ? await Control.open(node, peerOf(command)) : null
    const bulk = await Bulk.open(node, peerOf(command))
    const bytes = await bulk.range(unhex(command.digest), command.first, command.last)
    await bulk.close()
    await control?.close()
    return { bytes: bytes.length }
  },

  /** Fetches a model whole, and returns the SHA-256 of its files by path. */
  async fetch_model (command) {
    const control = await Control.open(node, peerOf(command))
    const bulk = await Bulk.open(node, peerOf(command))
    const files = await fetchModel(control, bulk, unhex(command.digest))
    await bulk.close()
    await control.close()
    return { files }
  }
}

const say = (answer) => process.stdout.write(`${JSON.stringify(answer)}\n`)

say({ peer_id: node.peerId.toString(), addrs: node.getMultiaddrs().map(String) })
for await (const line of createInterface({ input: process.stdin })) {
  try {
    const command = JSON.parse(line)
    say(await commands[command.do](command))
  } catch (error) {
    say({ error: `${error.name}: ${error.message}` })
  }
}
await node.stop()
process.exit(0)
