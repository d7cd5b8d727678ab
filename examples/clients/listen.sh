#!/bin/sh
# Listen to all that is said on the bus, as JSON lines: listen.sh HOST PORT
set -eu
mosquitto_sub -V mqttv5 -h "$1" -p "$2" -q 1 -t 'mindstream/v1/#' -F '%t %x' | mindstream decode
