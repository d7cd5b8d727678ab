"""The sync bridge: compares what nodes hold and fetches what is missing."""
