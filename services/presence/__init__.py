"""How a node is, said for all to hear: its state, Home Assistant discovery, metrics, and peers that fall silent."""
