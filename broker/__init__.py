"""The brokers that Mindstream runs on, as child processes that never outlive the process that started them.

``broker.embedded.EmbeddedBroker`` comes from a wheel and is for trials, tests and a first node;
``broker.mosquitto.MosquittoBroker`` is what devices run. Both are a ``broker.base.Broker``. ``broker.child`` ties any
child process to its parent. This room imports protocol and nothing else of the house.
"""
