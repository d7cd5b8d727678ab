"""Listen to new memories of every node: python listen.py HOST PORT"""

import sys

import msgpack
import paho.mqtt.client as mqtt


def hear(_client, _userdata, message):
    for entry in msgpack.unpackb(message.payload)["data"]["entries"]:
        if entry.get("content"):  # gone when it was erased
            print(message.topic, msgpack.unpackb(entry["content"])["text"], flush=True)


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.on_connect = lambda *_: client.subscribe("mindstream/v1/+/memory/log", qos=1)
client.on_message = hear
client.connect(sys.argv[1], int(sys.argv[2]))
client.loop_forever()
