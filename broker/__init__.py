"""The brokers that Mindstream runs on.

As child processes that never outlive the process that started them: ``broker.embedded.EmbeddedBroker`` comes from a
wheel and is for trials, tests and a first node; ``broker.mosquitto.MosquittoBroker`` is for tests and benchmarks on
what devices run. Both are a ``broker.base.Broker``. ``broker.child`` ties any child process to its parent.

As a service of the system: ``broker.configuration`` writes a whole mosquitto.conf for a device or a hub,
``broker.access`` its ACL from the topic table, ``broker.passwords`` its password file, ``broker.certificates`` a small
CA; ``broker.check`` says what is wrong with a configuration. This room imports protocol and nothing else of the house.
"""
