"""The services of a node, one package each; a service imports protocol and edge, never another service."""
