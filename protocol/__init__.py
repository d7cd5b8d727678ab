"""What crosses the bus: messages, topics, codec, ids and clock, identity and signing, manifests, errors.

This room does no I/O and imports no service: anyone may depend on it.
"""
