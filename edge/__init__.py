"""What every node has under its services: bus client, durable stores, blobs, supervisor, configuration, models, CLI.

Imports protocol and broker; never a service.
"""
