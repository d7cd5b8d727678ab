"""The gateway: an OpenAI-compatible endpoint, through which any chat program uses any node's model.

It speaks HTTP on one side and the bus on the other, and knows nothing of models: every answer is asked of a model
runner. It is the one service that runs asyncio (HTTP has thousands of idle connections, the bus has not); the bus's
threads hand over to it in ``mailbox``, and nowhere else.
"""
