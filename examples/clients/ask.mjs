// Let a node remember a text, then recall it: node ask.mjs HOST PORT NODE TEXT
import { randomUUID } from "node:crypto";
import { decode, encode } from "@msgpack/msgpack";
import mqtt from "mqtt";

const [host, port, node, text] = process.argv.slice(2);
const [me, ttl_s] = ["visitor", 10];
const name = `js-${randomUUID().slice(0, 8)}`;
const waiting = new Map();

function uuid7() { // RFC 9562: milliseconds, version, variant, random bits
  const digits = Date.now().toString(16).padStart(12, "0") + "7" + randomUUID().replaceAll("-", "").slice(13);
  return digits.replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, "$1-$2-$3-$4-$5");
}

function ask(service, verb, type, data) {
  const id = uuid7();
  const envelope = { v: 1, id, type, source: `${me}/${name}`, time_us: Date.now() * 1000, data };
  Object.assign(envelope, { reply_to: name, ttl_ms: ttl_s * 1000 });
  const options = { qos: 1, properties: { messageExpiryInterval: ttl_s } };
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("no answer")), ttl_s * 1000);
    waiting.set(id, (answer) => {
      clearTimeout(timer);
      answer.type === "error" ? reject(new Error(answer.data.message)) : resolve(answer.data);
    });
    client.publish(`mindstream/v1/${me}/ask/${node}/${service}/${verb}`, Buffer.from(encode(envelope)), options);
  });
}

const client = await mqtt.connectAsync({ host, port: Number(port), protocolVersion: 5 });
client.on("message", (_topic, payload) => {
  const answer = decode(payload);
  waiting.get(answer.correlation)?.(answer);
});
await client.subscribeAsync(`mindstream/v1/${node}/reply/${me}/${name}`, { qos: 1 });
console.log("stored as", (await ask("memory_store", "put", "memory.put", { text })).id);
for (const hit of (await ask("memory_store", "recall", "memory.recall", { query: text, limit: 3 })).hits)
  console.log("recalled", hit.id, hit.text);
await client.endAsync();
