"""The memory store: this node's replicated log of memories, and recall from it."""
