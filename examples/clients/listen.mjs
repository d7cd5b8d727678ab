// Listen to new memories of every node: node listen.mjs HOST PORT
import { decode } from "@msgpack/msgpack";
import mqtt from "mqtt";

const [host, port] = process.argv.slice(2);
const client = mqtt.connect({ host, port: Number(port), protocolVersion: 5 });
client.on("connect", () => client.subscribe("mindstream/v1/+/memory/log", { qos: 1 }));
client.on("message", (topic, payload) => {
  for (const entry of decode(payload).data.entries)
    if (entry.content) console.log(topic, decode(entry.content).text); // gone when it was erased
});
