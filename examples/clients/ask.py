"""Let a node remember a text, then recall it: python ask.py HOST PORT NODE TEXT"""

import queue
import sys
import time
import uuid

import msgpack
import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ME, CLIENT, TTL_S = "visitor", f"py-{uuid.uuid4().hex[:8]}", 10
host, port, node, text = sys.argv[1:]
subscribed, answers = queue.Queue(), queue.Queue()


def uuid7():  # RFC 9562: milliseconds, version, variant, random bits
    random = uuid.uuid4().int & ~(0xF << 76) & ((1 << 80) - 1)
    return str(uuid.UUID(int=time.time_ns() // 1_000_000 << 80 | 7 << 76 | random))


def ask(service, verb, type, data):
    envelope = {"v": 1, "id": uuid7(), "type": type, "source": f"{ME}/{CLIENT}", "time_us": time.time_ns() // 1000}
    envelope |= {"reply_to": CLIENT, "ttl_ms": TTL_S * 1000, "data": data}
    expiry = Properties(PacketTypes.PUBLISH)
    expiry.MessageExpiryInterval = TTL_S
    topic = f"mindstream/v1/{ME}/ask/{node}/{service}/{verb}"
    client.publish(topic, msgpack.packb(envelope), qos=1, properties=expiry)
    while (answer := answers.get(timeout=TTL_S))["correlation"] != envelope["id"]:
        pass  # an answer to somebody else, or one that came twice
    if answer["type"] == "error":
        sys.exit(answer["data"]["message"])
    return answer["data"]


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.on_connect = lambda *_: client.subscribe(f"mindstream/v1/{node}/reply/{ME}/{CLIENT}", qos=1)
client.on_subscribe = lambda *_: subscribed.put(True)
client.on_message = lambda _client, _userdata, message: answers.put(msgpack.unpackb(message.payload))
client.connect(host, int(port))
client.loop_start()
subscribed.get(timeout=TTL_S)
print("stored as", ask("memory_store", "put", "memory.put", {"text": text})["id"])
for hit in ask("memory_store", "recall", "memory.recall", {"query": text, "limit": 3})["hits"]:
    print("recalled", hit["id"], hit["text"])
client.disconnect()
client.loop_stop()
